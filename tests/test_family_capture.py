"""Which variants a CUDA graph may hold: those whose steps ask the host nothing. There is no GPU in
here: a step behaves as in a capture, and no tensor may be read by the host or made of its numbers.
What a GPU does with them: tests/test_cuda.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import samkernels
from samkernels import SAM
from tests.family import loss
from tests.optim_helpers import snapshot, unchanged
from tests.test_family import BASES, FAMILY, Lora, Network, Row, groups_of, row_has_one_pass, row_of
from tests.test_optim_devices import begin_capture

WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.lift_fresh.default,  # torch.tensor of numbers
}


class NoWaiting(TorchDispatchMode):
    """Raises AssertionError where the host would wait for the device, or send it numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func not in WAITS, f"{func} in a capture"
        return func(*args, **(kwargs or {}))


def backward(model: nn.Module, step: int) -> None:
    loss(model, step).backward()


def take_step(model: nn.Module, optimizer: SAM, step: int) -> None:
    backward(model, step)
    if not (row_has_one_pass(optimizer) or isinstance(optimizer, samkernels.BAR)):
        if optimizer.first_step():
            backward(model, step)
    optimizer.step()
    optimizer.zero_grad()


AXES: dict[str, dict[str, Any]] = {
    "": {},
    "eta": {"scaling": "elementwise", "eta": 0.05},
    "LayerSAM": {"scaling": "tensor", "norm": "tensor"},
    "USAM": {"norm": None},
    "clipped": {"max_grad_norm": 0.1},
}
HOST_DECIDES = {
    "LookSAM": (row_of(samkernels.LookSAM), {}),
    "Periodic": (row_of(SAM), {"when": samkernels.Periodic(2)}),
    "FromStep": (row_of(SAM), {"when": samkernels.FromStep(1)}),
    "Bernoulli": (row_of(SAM), {"when": samkernels.Bernoulli(0.5)}),
    "GradientNormPolicy": (row_of(SAM), {"when": samkernels.GradientNormPolicy(0.0, 0.0, 9)}),
    "MSAM, Periodic": (row_of(samkernels.MSAM), {"when": samkernels.Periodic(2)}),
    "ProportionScheduler": (
        row_of(samkernels.GSAM),
        {"rho": samkernels.ProportionScheduler(max_lr=0.1, max_value=0.2)},
    ),
}


def made(row: Row, base: str, **axes: Any) -> tuple[Network, SAM]:
    model = Network().float()
    cls, options = BASES[base]
    return model, row.cls(groups_of(row, base, model), cls, **options, **axes)


def assert_capturable(model: nn.Module, optimizer: SAM, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one ordinary step."""
    take_step(model, optimizer, 0)
    before = snapshot(model.parameters())
    begin_capture(monkeypatch)
    with NoWaiting():
        take_step(model, optimizer, 1)
    assert not unchanged(model.parameters(), before)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("row", [r for r in FAMILY if not r.cls.counts_steps], ids=str)
def test_a_step_that_can_be_captured(
    row: Row, base: str, axes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_capturable(*made(row, base, **axes), monkeypatch)


@pytest.mark.parametrize("cls", [SAM, samkernels.MSAM])
def test_masks_and_subsets_can_be_captured(cls: type[SAM], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network().float()
    params = list(model.parameters())
    masks = {p: torch.ones_like(p) for p in params[:4]}
    options = {"mask": masks, "subset": params[1:], **BASES["SGD"][1]}
    assert_capturable(model, cls(params, torch.optim.SGD, 0.1, **options), monkeypatch)


@pytest.mark.parametrize("kind", ["n", "o"])
def test_bar_can_be_captured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Lora().float()
    optimizer = samkernels.BAR(model.named_parameters(), alpha=0.3, kind=kind, lr=0.01)
    assert_capturable(model, optimizer, monkeypatch)


@pytest.mark.parametrize(("row", "options"), HOST_DECIDES.values(), ids=HOST_DECIDES.keys())
def test_a_step_that_the_host_decides_of_is_refused(
    row: Row, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = made(row, "SGD", **options)
    take_step(model, optimizer, 0)
    before = snapshot(model.parameters())
    backward(model, 1)
    with monkeypatch.context() as capture:
        begin_capture(capture)
        step = optimizer.step if row_has_one_pass(optimizer) else optimizer.first_step
        with pytest.raises(RuntimeError, match=r"the host decides .*: make its steps without a"):
            step()
    assert unchanged(model.parameters(), before)
    optimizer.zero_grad()
    take_step(model, optimizer, 1)  # nothing is lost
    assert not unchanged(model.parameters(), before)
