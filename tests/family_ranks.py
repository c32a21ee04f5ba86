"""What each process of tests/test_family_ranks.py does: `python -m tests.family_ranks RANK FOLDER`.

Both processes train every variant with DistributedDataParallel and over FSDP2's shards, each with
its half of the batches; what comes of it goes to FOLDER/RANK.pt, and the test compares.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import samkernels
from samkernels import SAM, Bernoulli, FromStep, GradientNormPolicy, Periodic, ProportionScheduler
from tests.family import Network, loss
from tests.test_family import BASES, FAMILY, Lora, Row, groups_of, row_has_one_pass, row_of

STEPS, SAVED_AFTER = 7, 4
Axes = Callable[[nn.Module], dict[str, Any]]


class Sharded(Network):
    """FSDP2 takes no parameters without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(self.scale.detach().reshape(1))


@dataclass(frozen=True)
class Case:
    """A variant with a base optimizer and options of SAM, made of the model."""

    row: Row
    base: str = "SGD"
    axes: Axes = lambda model: {}
    by_rule: dict[str, Any] | None = None  # those options for the rule; None: there is no rule
    # What the package says of perturbation="local"; None: it takes it.
    refuses_local: str | None = None

    def optimizer(self, model: nn.Module, **others: Any) -> SAM:
        cls, options = BASES[self.base]
        if others.get("perturbation") == "global":  # BAR takes none
            del others["perturbation"]
        given = {"backend": "reference", **options, **self.axes(model), **others}
        if self.row.cls is samkernels.BAR:
            return samkernels.BAR(model.named_parameters(), cls, **self.row.options, **given)
        if self.row.cls is samkernels.ASAM:
            return samkernels.ASAM(model.named_parameters(), cls, **given)
        return self.row.cls(groups_of(self.row, self.base, model), cls, **given)

    def model(self) -> nn.Module:
        return Lora() if self.row.cls is samkernels.BAR else Sharded()


def whole_mask(p: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(p.shape, generator=generator, dtype=torch.float64).round()


def masks(model: nn.Module) -> dict[str, Any]:
    found = {}
    for i, p in enumerate(model.parameters()):
        mask = whole_mask(p, i)
        if isinstance(p, DTensor):
            mask = distribute_tensor(mask, p.device_mesh, p.placements)
        found[p] = mask
    return {"mask": found}


def norms(model: nn.Module) -> dict[str, Any]:
    return {"subset": [p for name, p in model.named_parameters() if "norm" in name]}


IS_NORM = [False, False, True, True, False, False]  # of the parameters of Network
SAM_ROW = row_of(samkernels.SAM)
REFUSED = {
    samkernels.FriendlySAM: 'leave it "global"',
    samkernels.VaSSO: 'leave it "global"',
    samkernels.MSAM: "leave track_statistics and perturbation out",
    samkernels.BAR: "perturbation: BAR perturbs nothing",
}


def case(row: Row, base: str = "SGD", axes: Axes = lambda model: {}, **others: Any) -> Case:
    return Case(
        row, base, axes, refuses_local=others.pop("refused", REFUSED.get(row.cls)), **others
    )


def options(**axes: Any) -> dict[str, Any]:
    """Such that the rules know them, too."""
    return {"axes": lambda model: axes, "by_rule": axes}


CASES = {
    **{str(row): case(row, by_rule={}) for row in FAMILY},
    "BAR": case(Row(samkernels.BAR, SAM_ROW.rule, {"alpha": 0.3}), "AdamW"),
    "BAR, o": case(Row(samkernels.BAR, SAM_ROW.rule, {"alpha": 0.3, "kind": "o"}), "AdamW"),
    "ASAM": case(Row(samkernels.ASAM, SAM_ROW.rule)),
    "adaptive": case(SAM_ROW, **options(adaptive=True)),
    "eta": case(SAM_ROW, **options(scaling="elementwise", eta=0.05)),
    "tensor scaling": case(SAM_ROW, **options(scaling="tensor")),
    "one norm per tensor": case(SAM_ROW, **options(norm="tensor")),
    "LayerSAM": case(SAM_ROW, **options(scaling="tensor", norm="tensor")),
    "USAM": case(SAM_ROW, **options(norm=None)),
    "SAM-ON": case(SAM_ROW, axes=norms, by_rule={"is_moved": IS_NORM}),
    "FriendlySAM-ON": case(row_of(samkernels.FriendlySAM), axes=norms),
    "MSAM-ON": case(row_of(samkernels.MSAM), axes=norms),
    "SparseSAM": case(SAM_ROW, axes=masks),
    "MSAM, masked": case(row_of(samkernels.MSAM), axes=masks),
    "VaSSO, AdamW": case(row_of(samkernels.VaSSO), "AdamW", by_rule={}),
    "MSAM, AdamW": case(row_of(samkernels.MSAM), "AdamW", by_rule={}),
    "WSAM, RMSprop": case(row_of(samkernels.WSAM), "RMSprop", by_rule={}),
    "GSAM, clipped": case(row_of(samkernels.GSAM), axes=lambda model: {"max_grad_norm": 0.3}),
    "GSAM, rho follows lr": case(
        row_of(samkernels.GSAM),
        axes=lambda model: {"rho": ProportionScheduler(max_lr=0.1, max_value=0.2, min_value=0.05)},
    ),
    "periodic": case(SAM_ROW, axes=lambda model: {"when": Periodic(2)}),
    "late": case(row_of(samkernels.GSAM), axes=lambda model: {"when": FromStep(3)}),
    "at random": case(SAM_ROW, axes=lambda model: {"when": Bernoulli(0.5, seed=3)}),
    "MSAM, periodic": case(row_of(samkernels.MSAM), axes=lambda model: {"when": Periodic(2)}),
    "late FriendlySAM": case(
        row_of(samkernels.FriendlySAM), axes=lambda model: {"when": FromStep(2)}
    ),
    "AE-SAM": case(
        SAM_ROW,
        axes=lambda model: {"when": GradientNormPolicy(l1=0.3, l2=-0.3, steps=STEPS)},
        refused="each rank would decide by the norm of another gradient",
    ),
}  # fmt: skip


def every_variant() -> list[type[SAM]]:
    found = [getattr(samkernels, name) for name in samkernels.optim.__all__]
    return [cls for cls in found if isinstance(cls, type) and issubclass(cls, SAM)]


def train(
    network: nn.Module, optimizer: SAM, steps: Iterable[int], half: int | None = None
) -> list[bool]:
    """Which of the steps had a second pass."""
    had = []
    for step in steps:
        if row_has_one_pass(optimizer) or isinstance(optimizer, samkernels.BAR):
            loss(network, step, half).backward()
            optimizer.step()
        else:
            is_first = optimizer.needs_second_pass
            with optimizer.first_pass(network) if is_first else contextlib.nullcontext():
                loss(network, step, half).backward()
            had.append(optimizer.first_step())
            if had[-1]:
                loss(network, step, half).backward()
            optimizer.second_step()
        optimizer.zero_grad()
    return had


def weights(model: nn.Module, optimizer: SAM) -> Tensor:
    """All of them, at w."""
    at_w = optimizer.unperturbed() if row_has_one_pass(optimizer) else contextlib.nullcontext()
    with at_w, torch.no_grad():
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
        return torch.cat([p.detach().flatten() for p in whole])


def with_ddp(of: Case, rank: int, perturbation: str) -> dict[str, Any]:
    model = of.model()
    network = DistributedDataParallel(model)
    optimizer = of.optimizer(model, perturbation=perturbation)
    had = train(network, optimizer, range(STEPS), rank)
    return {"weights": weights(model, optimizer), "had": had}


def with_fsdp(of: Case, rank: int, folder: Path) -> dict[str, Any]:
    """One run, and one that begins with what the first had saved in the middle."""
    mesh = init_device_mesh("cpu", (2,))

    def made(**others: Any) -> tuple[nn.Module, SAM]:
        model = fully_shard(of.model(), mesh=mesh)
        return model, of.optimizer(model, **others)

    model, optimizer = made()
    had = train(model, optimizer, range(SAVED_AFTER), rank)
    of_model, of_optimizer = dcp_state.get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    had += train(model, optimizer, range(SAVED_AFTER, STEPS), rank)

    def resumed() -> dict[str, Any]:
        again, optimizer = made()
        with torch.no_grad():
            for p in again.parameters():
                p.zero_()
        names = ("model", "optimizer")
        loaded = dict(zip(names, dcp_state.get_state_dict(again, optimizer), strict=True))
        dcp.load(loaded, checkpoint_id=folder)
        # Not set_state_dict, which has the optimizer come first: MSAM's puts the model at w.
        dcp_state.set_model_state_dict(again, loaded["model"])
        dcp_state.set_optimizer_state_dict(again, optimizer, loaded["optimizer"])
        had = train(again, optimizer, range(SAVED_AFTER, STEPS), rank)
        return {"weights": weights(again, optimizer), "had": had}

    return {"weights": weights(model, optimizer), "had": had, "resumed": attempt(resumed)}


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """What it returns, or what it says when it raises."""
    try:
        return function(*args)
    except (Exception, CheckpointException) as error:  # the one is no case of the other
        return f"{type(error).__name__}: {error}"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}
    for i, (name, of) in enumerate(CASES.items()):
        results[name] = {
            "global": attempt(with_ddp, of, rank, "global"),
            "local": attempt(with_ddp, of, rank, "local"),
            "sharded": attempt(with_fsdp, of, rank, folder / f"saved-{i}"),
        }
        torch.save(results, folder / f"{rank}.pt")
    dist.barrier()  # or the last one finds the store gone
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
