"""max_grad_norm: bounds the norm of u, as torch.nn.utils.clip_grad_norm_ would bound that of the
gradient that u has its magnitude of."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samkernels import SAM, SAMMagnitude
from tests.optim_helpers import (
    snapshot,
    unchanged,
)
from tests.optimizers import (
    ALL_VARIANTS,
    each_cls_and_variant,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


X = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def backward(model: nn.Module) -> None:
    model(X).square().mean().backward()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:1]}, {"params": params[1:], "rho": 0.3}]


def train(
    cls: type[SAM], steps: int = 3, between: Callable[[nn.Module], object] = id, **options: Any
) -> tuple[list[Tensor], SAM]:
    """`between` is called between the second backward and the second step."""
    model = network()
    optimizer = cls(groups(model), **{"rho": 0.1, "lr": 1.0, **options})
    for _ in range(steps):
        backward(model)
        optimizer.first_step()
        backward(model)
        between(model)
        optimizer.second_step(zero_grad=True)
    return snapshot(model.parameters()), optimizer


MAX_NORM = 0.05


def test_these_gradients_are_larger() -> None:
    model = network()
    backward(model)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm > 4 * MAX_NORM


@each_cls_and_variant
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("backend", ["reference", "foreach"])
def test_the_update_has_the_norm(
    cls: type[SAM], variant: dict[str, Any], adaptive: bool, backend: str
) -> None:
    before = snapshot(network().parameters())
    options = {"adaptive": adaptive, "backend": backend, **variant}
    after, _ = train(cls, steps=1, max_grad_norm=MAX_NORM, **options)
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    # n + 1e-6 instead of n; and eps in the coefficients.
    torch.testing.assert_close(moved.item(), MAX_NORM, rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("cls", "variant"), [(v.info.cls, v.options) for v in ALL_VARIANTS if v.info.has_the_norm_of_g2]
)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("track_statistics", [False, True])
def test_it_is_clip_grad_norm_of_g2(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    track_statistics: bool,
) -> None:
    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)

    options = {"base_optimizer": base, "lr": 0.01, "momentum": 0.9, **variant}
    expected, _ = train(cls, between=clip, **options)
    fused, optimizer = train(
        cls, max_grad_norm=MAX_NORM, track_statistics=track_statistics, **options
    )
    torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-12)
    assert not unchanged(fused, train(cls, **options)[0])
    if track_statistics:  # of the gradients as they were
        assert optimizer.statistics is not None
        assert optimizer.statistics.second_grad_norm > 2 * MAX_NORM


@each_cls_and_variant
def test_smaller_gradients_are_left_alone(cls: type[SAM], variant: dict[str, Any]) -> None:
    plain, _ = train(cls, **variant)
    bounded, _ = train(cls, max_grad_norm=100.0, **variant)
    assert unchanged(plain, bounded)


@pytest.mark.parametrize("cls", [SAM, SAMMagnitude])
def test_the_scale_of_a_grad_scaler_is_taken_out_first(cls: type[SAM]) -> None:
    results = []
    for fused in (False, True):
        model = network().float()
        optimizer = cls(
            model.parameters(), rho=0.1, lr=1.0, max_grad_norm=MAX_NORM if fused else None
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for pass_ in range(2):
            scaler.scale(model(X.float()).square().mean()).backward()
            if pass_ == 0:
                optimizer.first_step()
        if not fused:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        results.append(snapshot(model.parameters()))
    torch.testing.assert_close(results[1], results[0])


def test_it_is_kept_in_copies_and_may_be_changed() -> None:
    _, optimizer = train(SAM, max_grad_norm=MAX_NORM)
    assert copy.deepcopy(optimizer).max_grad_norm == MAX_NORM
    optimizer.max_grad_norm = None
    assert "max_grad_norm" not in optimizer.state_dict()


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)],
)
def test_bad_values(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_grad_norm"):
        SAM(network().parameters(), lr=0.1, max_grad_norm=value)
    # Later, too: before anything is written.
    model = network()
    optimizer = SAM(model.parameters(), lr=0.1, max_grad_norm=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.max_grad_norm = value
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(error, match="max_norm"):
        optimizer.second_step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
