"""What the optimizer keeps of its lists from step to step is dropped when it no longer holds."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samkernels import ASAM, GSAM, MSAM, SAM, WSAM, FriendlySAM, FromStep, LookSAM, VaSSO
from tests.optim_helpers import set_gradients, unchanged
from tests.optimizers import each_backend

SGD = torch.optim.SGD


def parameters(number: int = 2) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4)) for _ in range(number)]


def step_of(optimizer: SAM, seed: int) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_gradients(params, 2 * seed)
    if isinstance(optimizer, MSAM):
        optimizer.step()
        return
    if optimizer.first_step():
        set_gradients(params, 2 * seed + 1)
    optimizer.second_step(zero_grad=True)


def average_of(optimizer: SAM, p: Tensor) -> Tensor:
    return optimizer._slots.own_of(p)["m"]


@pytest.mark.parametrize(("cls", "share"), [(FriendlySAM, 0.1), (VaSSO, 0.9)])
@each_backend
def test_a_moving_average_does_not_begin_anew(backend: str, cls: type[SAM], share: float) -> None:
    """After a first step that was undone, and while another parameter of the group has none yet:
    that one has g1 and never g2."""
    params = parameters()
    optimizer = cls(params[:1], SGD, lr=0.1, backend=backend)
    set_gradients(params[:1], 0)
    optimizer.first_step()
    optimizer.restore()
    for step in range(1, 4):
        set_gradients(params[: 1 if step == 1 else 2], step)
        g1 = params[0].grad
        assert g1 is not None
        g1 = g1.clone()
        before = average_of(optimizer, params[0]).clone()
        optimizer.first_step()
        expected = before + share * (g1 - before)
        torch.testing.assert_close(average_of(optimizer, params[0]), expected)
        set_gradients(params[:1], step + 10)
        optimizer.second_step(zero_grad=True)
        if step == 1:
            optimizer.add_param_group({"params": params[1:]})


@pytest.mark.parametrize("decouple", [True, False])
@each_backend
def test_wsam_subtracts_nothing_beside_in_a_step_with_one_pass(
    backend: str, decouple: bool
) -> None:
    params, twins = parameters(), parameters()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "backend": backend}
    optimizer = WSAM(params, SGD, when=FromStep(9), decouple=decouple, **options)
    plain = SGD(twins, lr=0.1, momentum=0.9)
    set_gradients(params, 1)
    set_gradients(twins, 1)
    assert not optimizer.first_step()
    optimizer.second_step()
    plain.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


def twice(optimizer: SAM, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[1]["params"].append(params[0])


def overlaps(optimizer: SAM, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[1]["params"].append(nn.Parameter(params[0].data))


def moves(optimizer: SAM, params: list[nn.Parameter]) -> None:
    params[1].data = params[0].data


@pytest.mark.parametrize(
    ("share", "backend"),
    [
        (twice, "native"),
        (twice, "reference"),
        (overlaps, "native"),
        (overlaps, "reference"),
        (moves, "native"),
    ],
)
def test_memory_that_is_shared_is_refused_in_every_step(share: Any, backend: str) -> None:
    params = parameters()
    groups = [{"params": [p]} for p in params]
    optimizer = SAM(groups, SGD, lr=0.1, backend=backend)
    step_of(optimizer, 0)
    share(optimizer, params)
    before = [p.detach().clone() for p in params]
    for step in range(3):
        for group in optimizer.param_groups:
            set_gradients(group["params"], step)
        with pytest.raises(ValueError, match=r"are the same|overlap in memory"):
            optimizer.first_step()
        assert unchanged(params, before)


@pytest.mark.parametrize("change", ["half", "transposed"])
@pytest.mark.parametrize("cls", [FriendlySAM, VaSSO, LookSAM, MSAM])
@each_backend
def test_parameters_that_were_cast_and_then_copied(
    backend: str, cls: type[SAM], change: str
) -> None:
    params = parameters()
    optimizer = cls(params, SGD, lr=0.1, momentum=0.9, backend=backend)
    for step in range(2):
        step_of(optimizer, step)
    for p in params:
        p.data = p.data.half() if change == "half" else p.data.t().contiguous().t()
    params, optimizer = copy.deepcopy((params, optimizer))
    for step in range(2, 4):
        step_of(optimizer, step)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("cls", [SAM, ASAM, GSAM, FriendlySAM, VaSSO, LookSAM, MSAM])
def test_an_optimizer_that_nobody_holds_is_freed_at_once(cls: type[SAM]) -> None:
    params = parameters()
    named = [(f"{i}.weight", p) for i, p in enumerate(params)]
    optimizer = cls(named, SGD, lr=0.1, momentum=0.9)
    step_of(optimizer, 0)
    gone = [weakref.ref(optimizer), weakref.ref(params[0])]
    gc.collect()
    gc.disable()
    try:
        del optimizer, params, named
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_adaptive_is_true_or_false() -> None:
    params = parameters()
    optimizer = SAM(params, SGD, lr=0.1)
    optimizer.param_groups[0]["adaptive"] = "no"
    set_gradients(params, 0)
    with pytest.raises(TypeError, match="adaptive='no': give True or False"):
        optimizer.first_step()
