"""The optimizers and base optimizers, as tables that the tests of all of them go through, like
torch's OptimizerInfo: a new optimizer that wraps a base optimizer is one row of OPTIMIZER_TABLE,
one that makes its own step is one of STAND_ALONE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import SAM, SAMDirection, SAMMagnitude, SGDHess
from samkernels.optim.samdirection import GRANULARITIES

BACKENDS = ("native", "foreach", "reference")


@dataclass(frozen=True)
class OptimizerInfo:
    """One row: an optimizer that makes two passes.

    Args:
        u: the formula: u of all parameters, from g1 and g2 of all, and one of `variants`.
        variants: what it is built with, each of which is tested.
        keeps_first_grads: u needs g1; a parameter without one is left alone.
        has_the_norm_of_g2: so that max_grad_norm clips by that; else u has the norm of g1.
    """

    cls: type[SAM]
    u: Callable[..., Sequence[Tensor]]
    variants: tuple[dict[str, Any], ...] = ({},)
    keeps_first_grads: bool = True
    has_the_norm_of_g2: bool = True

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def group_options(self) -> set[str]:
        """What a group has beside the options of the base optimizer."""
        return {"rho", "adaptive"}.union(*self.variants)


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).norm()


def mixture(
    magnitude: Sequence[Tensor], direction: Sequence[Tensor], granularity: str
) -> list[Tensor]:
    """The direction of one with the magnitude of the other: docs/concepts.md."""
    pairs = list(zip(magnitude, direction, strict=True))
    if granularity == "element":
        return [m.abs() * d.sign() for m, d in pairs]
    if granularity == "tensor":
        return [m.norm() / (d.norm() + 1e-12) * d for m, d in pairs]
    factor = norm_of(magnitude) / (norm_of(direction) + 1e-12)
    return [factor * d for d in direction]


EACH_GRANULARITY = tuple({"granularity": granularity} for granularity in GRANULARITIES)
OPTIMIZER_TABLE = (
    OptimizerInfo(SAM, lambda g1, g2: g2, keeps_first_grads=False),
    OptimizerInfo(
        SAMDirection,
        lambda g1, g2, granularity: mixture(g1, g2, granularity),
        EACH_GRANULARITY,
        has_the_norm_of_g2=False,
    ),
    OptimizerInfo(
        SAMMagnitude, lambda g1, g2, granularity: mixture(g2, g1, granularity), EACH_GRANULARITY
    ),
)


@dataclass(frozen=True)
class StandAlone:
    """One row: an optimizer without a base optimizer, whose step is like that of one in PyTorch,
    with one backward pass: its own backward(loss).

    Args:
        like: whose options, state and checkpoints it has.
        options: what it is built with, so that two of them take the same steps.
    """

    cls: type[SGDHess]
    like: type[torch.optim.Optimizer]
    options: dict[str, Any]

    def __call__(self, params: Any, **options: Any) -> SGDHess:
        return self.cls(params, **{**self.options, **options})

    def __str__(self) -> str:
        return self.cls.__name__


STAND_ALONE = (StandAlone(SGDHess, torch.optim.SGD, {"rho": 0.5, "seed": 3}),)


@dataclass(frozen=True)
class Base:
    """A base optimizer and its options; `is_fused`: its step is one of ours."""

    name: str
    cls: type[torch.optim.Optimizer]
    options: dict[str, Any]
    is_fused: bool = True

    def __str__(self) -> str:
        return self.name


PLAIN = Base("SGD, plain", torch.optim.SGD, {"lr": 0.1})
SGD = Base("SGD", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05})
ADAM = Base("Adam", torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.05})
ADAMW = Base("AdamW", torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5})
# Makes its own step: there is no fused one with amsgrad.
AMSGRAD = Base("Adam, amsgrad", torch.optim.Adam, {**ADAM.options, "amsgrad": True}, is_fused=False)
BASES = (SGD, ADAM, AMSGRAD)


@dataclass(frozen=True)
class Variant:
    """An optimizer of the table with one of its options."""

    info: OptimizerInfo
    options: dict[str, Any] = field(default_factory=dict)

    def u(self, g1: Sequence[Tensor], g2: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.info.u(g1, g2, **self.options)

    def __call__(self, params: Any, base: Base = PLAIN, **options: Any) -> SAM:
        return self.info.cls(params, base.cls, **{**base.options, **self.options, **options})

    def __str__(self) -> str:
        return "-".join([self.info.name, *map(str, self.options.values())])


ALL_VARIANTS = [Variant(info, options) for info in OPTIMIZER_TABLE for options in info.variants]
VARIANT = {str(variant): variant for variant in ALL_VARIANTS}
INFO = {info.cls: info for info in OPTIMIZER_TABLE}
OPTIMIZERS = tuple(info.cls for info in OPTIMIZER_TABLE)
# (class, its own options)
VARIANTS = [pytest.param(v.info.cls, v.options, id=str(v)) for v in ALL_VARIANTS]

each_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS)
each_cls_and_variant = pytest.mark.parametrize(("cls", "variant"), VARIANTS)
each_variant = pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
each_base = pytest.mark.parametrize("base", BASES, ids=str)
each_fused_base = pytest.mark.parametrize("base", [b for b in BASES if b.is_fused], ids=str)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
