"""SAM with the parts of a batch, each perturbed along its own gradient or together with others,
step by step in plain PyTorch and in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.optim_helpers import linear, snapshot
from tests.optimizers import VARIANT, norm_of

STEPS = 3
SIZE = 3  # of a rank's share
RHO = 0.5
SGD = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}


def share(step: int, part: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A rank's share of the batch of a step."""
    generator = torch.Generator().manual_seed(100 * step + part)
    x = torch.randn(SIZE, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(2, (SIZE,), generator=generator)


def means(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(of_parameter).mean(0) for of_parameter in zip(*gradients, strict=True)]


Loss = Callable[
    [nn.Module, int, int, bool], Tensor
]  # of model, step, part, whether it is the first


def loss_of_share(model: nn.Module, step: int, part: int, first: bool) -> Tensor:
    x, y = share(step, part)
    return cross_entropy(model(x), y)


def by_hand(
    variant: str,
    groups: list[list[int]],
    loss: Loss = loss_of_share,
    make_model: Callable[[], nn.Module] = lambda: linear(torch.float64),
    skipped: int | None = None,
) -> dict[str, Any]:
    """What Rank.train returns, but for all parts; groups: the parts that perturb alike.

    Args:
        skipped: a step that is not made.
    """
    model = make_model()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, **SGD)

    def gradient(step: int, part: int, first: bool) -> list[Tensor]:
        found = torch.autograd.grad(loss(model, step, part, first), params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]

    perturbed: list[list[list[Tensor]]] = []
    weights, all_first, all_second = [], [], []
    for step in range(STEPS):
        old = snapshot(params)
        firsts, seconds, at = [], [], []
        for group in groups:
            of_group = [gradient(step, part, True) for part in group]
            firsts += of_group
            mean = means(of_group)
            n = norm_of(mean)
            for part in group:
                with torch.no_grad():
                    for p, w, g in zip(params, old, mean, strict=True):
                        p.copy_(w + RHO * g / (n + 1e-12))
                at.append(snapshot(params))
                seconds.append(gradient(step, part, False))
                with torch.no_grad():
                    for p, w in zip(params, old, strict=True):
                        p.copy_(w)
        perturbed.append(at)
        all_first.append(means(firsts))
        all_second.append(means(seconds))
        u = VARIANT[variant].u(all_first[-1], all_second[-1])
        for p, of_param in zip(params, u, strict=True):
            p.grad = of_param
        if step != skipped:
            optimizer.step()
        weights.append(snapshot(params))
    return {
        "perturbed": perturbed, "weights": weights, "first": all_first, "second": all_second,
    }  # fmt: skip


def close(actual: Any, expected: Any) -> None:
    """In double precision: nothing but rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def is_far(actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Farther apart than rounding could bring them, by many orders of magnitude."""
    difference = norm_of([a - e for a, e in zip(actual, expected, strict=True)])
    return bool(difference > 1e-4 * norm_of(expected))
