"""docs/variants.md against what a step does: bytes and launches of each variant, counted in the
calls of a backend, and which lists it keeps.

How many bytes the kernels move for a call is in test_traffic.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samkernels
from samkernels import (
    ASAM,
    BAR,
    GSAM,
    MSAM,
    SAM,
    SANER,
    WSAM,
    XSAM,
    FriendlySAM,
    GradientNormPenalty,
    LookSAM,
    SAMDirection,
    SAMMagnitude,
    VaSSO,
    norm_parameters,
)
from samkernels.backends import Mix, reference
from samkernels.optim._onepass import OnePass
from samkernels.optim.when import Bernoulli, FromStep, GradientNormPolicy, Periodic

PAGE = (Path(__file__).parents[1] / "docs" / "variants.md").read_text()
Make = Callable[[nn.Module, dict[str, Any]], SAM]


class Model(nn.Module):
    """Factors of LoRA, a hidden layer, and a normalisation that is a hundredth of the whole."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (("lora_A", (10, 20)), ("lora_B", (30, 10)), ("hidden", (80, 20))):
            setattr(self, f"{name}_weight", nn.Parameter(torch.randn(shape, generator=generator)))
        self.norm = nn.LayerNorm(10)


def plain(cls: type[SAM], **own: Any) -> Make:
    return lambda model, options: cls(model.named_parameters(), **own, **options)


# By the first column of the tables.
MADE_BY: dict[str, Make] = {
    "`SAM`": plain(SAM),
    "`adaptive=True`": plain(SAM, adaptive=True),
    "`ASAM`": plain(ASAM),
    "`subset=norm_parameters(model)`, SAM-ON": lambda model, options: SAM(
        model.parameters(), subset=norm_parameters(model), **options
    ),
    '`norm="tensor"`': plain(SAM, norm="tensor"),
    '`norm="tensor", scaling="tensor"`, LayerSAM': plain(SAM, norm="tensor", scaling="tensor"),
    "`norm=None`, USAM": plain(SAM, norm=None),
    "`mask=...`, Sparse SAM": lambda model, options: SAM(
        model.parameters(), mask={p: (p > 0).float() for p in model.parameters()}, **options
    ),
    "`SAMDirection`": plain(SAMDirection),
    "`SAMMagnitude`": plain(SAMMagnitude),
    "`GSAM`": plain(GSAM),
    "`WSAM`": plain(WSAM),
    "`GradientNormPenalty`": plain(GradientNormPenalty),
    "`FriendlySAM`": plain(FriendlySAM),
    "`VaSSO`": plain(VaSSO),
    "`SANER`": plain(SANER),
    "`XSAM`": plain(XSAM, a=1.3),
    "`when=Periodic(k)`": plain(SAM, when=Periodic(3)),
    "`when=FromStep(s)`": plain(SAM, when=FromStep(5)),
    "`when=Bernoulli(p)`": plain(SAM, when=Bernoulli(0.5)),
    "`when=GradientNormPolicy(l1, l2, steps)`": plain(SAM, when=GradientNormPolicy(0.0, 0.0, 100)),
    "`LookSAM`": plain(LookSAM, k=3),
    "`MSAM`": plain(MSAM),
    "`BAR`": plain(BAR),
}
SGD = {"base_optimizer": torch.optim.SGD, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
ADAMW = {"base_optimizer": torch.optim.AdamW, "lr": 0.01}


def rows() -> dict[str, dict[str, str]]:
    """Of all tables that have bytes: the cells of a row by column, by their first one."""
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        header, _, *lines = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in table.strip().split("\n")
        ]
        if "bytes" in header:
            found.update({cells[0]: dict(zip(header, cells, strict=True)) for cells in lines})
    return found


ROWS = rows()


class Traffic:
    """Counts what the calls of a backend read and write: each list once, as its contract says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bytes, self.launches = 0, 0
        for name in ("dots", "perturb_", "restore_", "mix_", "sgd_", "adam_"):
            patch.setattr(reference, name, self._counting(name, getattr(reference, name)))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        lists_of = getattr(self, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.launches += 1
            self.bytes += sum(t.nbytes for of in lists_of(*args, **kwargs) for t in of or ())
            return function(*args, **kwargs)

        return call

    def take(self) -> tuple[int, int]:
        taken = self.bytes, self.launches
        self.bytes, self.launches = 0, 0
        return taken

    # The lists that each call reads, then those that it writes.

    def dots(self, lists: Any, weights: Any = None, eta: float = 0.0) -> list[Any]:
        return [*lists, weights]

    def perturb_(self, params: Any, direction: Any, old: Any, **options: Any) -> list[Any]:
        w = params if options["saves"] else old
        return [w, direction, params, *([old] if options["saves"] else [])]

    def restore_(self, params: Any, old: Any) -> list[Any]:
        return [old, params]

    def mix_(self, out: Any, mix: Mix, keeps: bool = False) -> list[Any]:
        return [mix.x, mix.y, out]

    def sgd_(self, params: Any, old: Any, buffers: Any, mix: Mix, *rest: Any) -> list[Any]:
        return [old, mix.x, mix.y, buffers, params, buffers]

    def adam_(self, params: Any, old: Any, m: Any, v: Any, steps: Any, mix: Mix, *rest: Any) -> Any:
        return [old, mix.x, mix.y, m, v, params, m, v]


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    return Traffic(monkeypatch)


def give_gradients(params: Sequence[Tensor], generator: torch.Generator) -> None:
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def counted(
    name: str, options: dict[str, Any], traffic: Traffic, steps: int = 16
) -> list[tuple[float, int]]:
    """Bytes per parameter, and launches, of each kind of step; the first ones make state."""
    model = Model()
    params = list(model.parameters())
    optimizer = MADE_BY[name](model, {**options, "backend": "reference"})
    generator = torch.Generator().manual_seed(1)
    kinds = {}
    for step in range(steps):
        traffic.take()
        give_gradients(params, generator)
        if not isinstance(optimizer, (OnePass, BAR)):
            if optimizer.first_step():
                give_gradients(params, generator)
            optimizer.second_step()
        else:
            optimizer.step()
        if step >= 4:
            kinds[traffic.take()] = None
    numel = sum(p.numel() for p in params)
    return sorted((size / numel, launches) for size, launches in kinds)


def figures(cell: str) -> list[int]:
    return sorted(map(int, re.findall(r"\b\d+\b", cell)))


def test_every_row_of_the_tables_is_counted() -> None:
    assert ROWS.keys() == MADE_BY.keys()
    named = {re.match(r"`(\w+)", name)[1] for name in ROWS if "=" not in name}  # type: ignore[index]
    variants = {
        name
        for name in samkernels.__all__
        if isinstance(of := getattr(samkernels, name), type) and issubclass(of, SAM)
    }
    assert named == variants


@pytest.mark.parametrize(("options", "more"), [(SGD, 0), (ADAMW, 8)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("name", MADE_BY)
def test_bytes_and_launches_of_a_step(
    name: str, options: dict[str, Any], more: int, traffic: Traffic
) -> None:
    row = ROWS[name]
    kinds = counted(name, options, traffic)
    expected = [of + more for of in figures(row["bytes"])]
    # A hundredth is perturbed by SAM-ON, and not scaled by ASAM.
    slack = 0.01 * 20 if "a little" in row["bytes"] or "almost" in row["bytes"] else 0
    assert [size for size, _ in kinds] == pytest.approx(expected, rel=0, abs=slack)
    assert [launches for _, launches in kinds] == figures(row["launches"])


def test_who_keeps_a_list_of_gradients_is_said() -> None:
    variants = [getattr(samkernels, name) for name in samkernels.__all__]
    variants = [of for of in variants if isinstance(of, type) and issubclass(of, SAM)]
    (listed,) = re.findall(r"g1 where u needs it\s*\(([^)]*)\)", PAGE)
    assert {of.strip() for of in listed.split(",")} == {v.__name__ for v in variants if v.keeps_g1}
    states = {v.__name__: v.own_state for v in variants if v.own_state and v is not MSAM}
    (said,) = re.findall(r"\);\s+(\w+ of [^.]*)\.", PAGE)  # m of FriendlySAM and VaSSO, ...
    parts = [part.split(" of ") for part in said.split(", ")]
    assert states == {name: (own,) for own, names in parts for name in names.split(" and ")}
