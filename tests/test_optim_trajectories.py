"""Fifty steps of every optimizer, granularity and backend against formulas in float64.

The oracle below is written from the formulas of the docstrings and calls nothing of samkernels. It
keeps its own weights and momentum, but takes the gradients of the optimizer under test: training is
chaotic, and with gradients of its own a difference of one rounding would grow to any size.

The bound is no tolerance that was tried out. Each number of the oracle carries how far a
computation in float32 may be from it (running error analysis): every operation passes on the errors
of its operands and adds one rounding of its result. What the optimizer holds must lie within.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from samkernels import SAM, SAMDirection, SAMMagnitude, backends, ops
from samkernels.backends import Mix, SgdOptions
from samkernels.optim.samdirection import GRANULARITIES
from tests.optim_helpers import (
    ConvNet,
    images,
    linear,
    parameters_of,
    set_gradients,
    snapshot,
    through_a_file,
    unchanged,
)
from tests.optimizers import (
    BACKENDS,
    OPTIMIZERS,
    each_backend,
    each_cls_and_variant,
    each_optimizer,
)

STEPS = 50
EPS = 1e-12
# Half the distance of two neighbours around 1, in the precision of the arithmetic.
FLOAT32, FLOAT64 = 2.0**-24, 2.0**-53
# The distance of two neighbours around 0.
SMALLEST = 2.0**-149


class Deviation(AssertionError):
    """The optimizer is further from the oracle than rounding can explain."""


# -- the oracle ------------------------------------------------------------------------------------


@dataclass
class Bounded:
    """value, in float64, and how far off a computation with this unit roundoff may be."""

    value: Tensor
    error: Tensor
    roundoff: float

    @classmethod
    def exact(cls, value: Tensor, roundoff: float) -> Bounded:
        return cls(value, torch.zeros_like(value), roundoff)

    def __add__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        error = self.value.abs() * other.error + self.error * (other.value.abs() + other.error)
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        quotient = self.value / other.value
        smallest = other.value.abs() - other.error
        return self._rounded(quotient, (self.error + quotient.abs() * other.error) / smallest)

    def __abs__(self) -> Bounded:
        return replace(self, value=self.value.abs())

    def sqrt(self) -> Bounded:
        low, root, high = (
            x.clamp(min=0).sqrt()
            for x in (self.value - self.error, self.value, self.value + self.error)
        )
        # PyTorch's root of float32 is an ulp off here and there on the CPU: one rounding more.
        error = torch.maximum(high - root, root - low) + self.roundoff * root
        return self._rounded(root, error)

    def sign(self) -> Bounded:
        assert not self.error.any(), "the sign of a rounded number is not known"
        return replace(self, value=self.value.sign())

    def where(self, condition: Tensor, other: Bounded) -> Bounded:
        value = torch.where(condition, self.value, other.value)
        return replace(self, value=value, error=torch.where(condition, self.error, other.error))

    def stored(self, dtype: torch.dtype) -> Bounded:
        """Rounded to `dtype`: exact again, unless the error leaves two numbers to round to."""
        low, value, high = (
            x.to(dtype).double()
            for x in (self.value - self.error, self.value, self.value + self.error)
        )
        return replace(self, value=value, error=torch.maximum(high - value, value - low))

    def _rounded(self, value: Tensor, error: Tensor) -> Bounded:
        return Bounded(value, error + self.roundoff * value.abs() + SMALLEST, self.roundoff)


class Oracle:
    """Weights and momentum (moments) of one run: all elements of all parameters in one vector."""

    def __init__(
        self, weights: Sequence[Tensor], groups: Sequence[dict[str, Any]], cls: str, backend: str
    ) -> None:
        """groups[i] has the options of parameter i; cls is the name of the optimizer's class."""
        self.cls = cls
        self.groups = groups
        self.dtype = weights[0].dtype
        # The oracle's own roundings are as large as those of float64 tensors: twice one for them.
        self.roundoff = 2 * FLOAT64 if self.dtype is torch.float64 else FLOAT32
        self.sums_in_float64 = backend != "foreach" and self.dtype is not torch.float64
        self.sizes = torch.tensor([w.numel() for w in weights])
        self.owner = torch.arange(len(weights)).repeat_interleave(self.sizes)
        self.w = self.exact(weights)
        self.buffer: Bounded | None = None
        self.steps = 0
        self.m = self.v = Bounded.exact(torch.zeros_like(self.w.value), self.roundoff)
        self.eps = self.number([EPS] * len(self.sizes))
        self.rho, self.lr, self.momentum, self.weight_decay = map(
            self.option, ("rho", "lr", "momentum", "weight_decay")
        )
        self.one_minus_dampening = self.number([1 - group.get("dampening", 0) for group in groups])
        self.adaptive, self.maximize, self.nesterov, self.decoupled = map(
            self.flag, ("adaptive", "maximize", "nesterov", "decoupled_weight_decay")
        )
        self.is_adam = "betas" in groups[0]

    def exact(self, tensors: Sequence[Tensor]) -> Bounded:
        vector = torch.cat([t.detach().double().flatten() for t in tensors])
        return Bounded.exact(vector, self.roundoff)

    def number(self, values: Sequence[float]) -> Bounded:
        """One number per parameter, rounded to float32 as the kernels do, for all its elements."""
        vector = torch.tensor(values, dtype=torch.float64)[self.owner]
        return Bounded(vector, self.roundoff * vector.abs(), self.roundoff)

    def option(self, name: str) -> Bounded:
        return self.number([float(group.get(name, 0)) for group in self.groups])

    def flag(self, name: str) -> Tensor:
        return torch.tensor([bool(group.get(name, False)) for group in self.groups])[self.owner]

    def norm(self, x: Bounded, granularity: str) -> Bounded:
        """Of each element's tensor, or of everything."""
        each = self.owner if granularity == "tensor" else torch.zeros_like(self.owner)
        norm, error = (
            torch.zeros(len(self.sizes), dtype=torch.float64)
            .index_add(0, each, part.square())
            .sqrt()[each]
            for part in (x.value, x.error)
        )
        # A sum of n numbers in any order is off by n - 1 roundings at most, its root by half as
        # many. Norms of tensors are rounded, and summed once more.
        longest = 0 if self.sums_in_float64 else int(self.sizes.max())
        roundings = longest / 2 + len(self.sizes) / 2 + 4
        return Bounded(norm, error + roundings * self.roundoff * norm, self.roundoff)

    def perturbed(self, first_grads: Sequence[Tensor]) -> Bounded:
        """w + rho * s^2 * g1 / (||s * g1|| + eps), one norm over all parameters of all groups."""
        w, g1, adaptive = self.w, self.exact(first_grads), self.adaptive
        norm = self.norm((abs(w) * g1).where(adaptive, g1), "global")
        scale = self.rho / (norm + self.eps)
        e = scale * (w * w * g1).where(adaptive, g1)
        return (w - e).where(self.maximize, w + e).stored(self.dtype)

    def recombined(self, first_grads: Sequence[Tensor], second_grads: Sequence[Tensor]) -> Bounded:
        """u, which takes the gradient's place."""
        g1, g2 = self.exact(first_grads), self.exact(second_grads)
        if self.cls == "SAM":
            return g2
        magnitude, direction = {"SAMDirection": (g1, g2), "SAMMagnitude": (g2, g1)}[self.cls]
        (granularity,) = {group["granularity"] for group in self.groups}
        if granularity == "element":
            return abs(magnitude) * direction.sign()
        norm = self.norm(direction, granularity) + self.eps
        return self.norm(magnitude, granularity) / norm * direction

    def update(self, first_grads: Sequence[Tensor], second_grads: Sequence[Tensor]) -> None:
        """The base optimizer's step from w with u for its gradient."""
        u = self.recombined(first_grads, second_grads)
        u = replace(u, value=-u.value).where(self.maximize, u)
        if self.is_adam:
            self.update_with_adam(u)
        else:
            self.update_with_sgd(u)

    def update_with_adam(self, u: Bounded) -> None:
        """torch.optim.Adam's, and AdamW's."""
        one = Bounded.exact(torch.ones_like(self.w.value), self.roundoff)
        shrunk = (one - self.lr * self.weight_decay) * self.w
        w = shrunk.where(self.decoupled, self.w)
        u = u.where(self.decoupled, u + self.weight_decay * self.w)
        self.steps += 1
        (beta1, rest1, correction1), (beta2, rest2, correction2) = (
            (
                self.number([group["betas"][i] for group in self.groups]),
                self.number([1 - group["betas"][i] for group in self.groups]),
                self.number(
                    [(1 - group["betas"][i] ** self.steps) ** power for group in self.groups]
                ),
            )
            for i, power in ((0, 1), (1, 0.5))
        )
        m = beta1 * self.m + rest1 * u
        v = beta2 * self.v + rest2 * u * u
        denominator = v.sqrt() / correction2 + self.option("eps")
        self.w = (w - self.lr / correction1 * m / denominator).stored(self.dtype)
        self.m, self.v = m.stored(self.dtype), v.stored(self.dtype)

    def update_with_sgd(self, u: Bounded) -> None:
        u = u + self.weight_decay * self.w
        buffer = u
        if self.buffer is not None:
            buffer = self.momentum * self.buffer + self.one_minus_dampening * u
        u = (u + self.momentum * buffer).where(self.nesterov, buffer)
        self.buffer = buffer.stored(self.dtype)
        self.w = (self.w - self.lr * u).stored(self.dtype)

    def check_state(self, states: Sequence[dict[str, Tensor]]) -> None:
        """What the optimizer keeps of each parameter."""
        expected: dict[str, Bounded | None] = {}
        if self.is_adam:
            expected = {"exp_avg": self.m, "exp_avg_sq": self.v}
            assert all(state["step"].item() == self.steps for state in states)
        elif self.groups[0]["momentum"] != 0:
            expected = {"momentum_buffer": self.buffer}
        for name, value in expected.items():
            self.check(name, value, [state[name] for state in states])
        names = {*expected, "step"} if self.is_adam else {*expected}
        assert all(state.keys() == names for state in states)

    def check(self, what: str, expected: Bounded, actual: Sequence[Tensor]) -> None:
        off = (self.exact(actual).value - expected.value).abs()
        excess = off / expected.error.clamp(min=SMALLEST)
        within = (off <= expected.error) & off.isfinite()
        if not within.all():
            i = int(torch.where(within, -1.0, excess.nan_to_num(nan=math.inf)).argmax())
            raise Deviation(
                f"{what} of parameter {int(self.owner[i])} is off by {float(off[i]):.3e}, "
                f"{float(excess[i]):.3g} times what rounding explains"
            )


def oracle_of(optimizer: SAM, backend: str) -> Oracle:
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
        for _ in group["params"]
    ]
    return Oracle(parameters_of(optimizer), groups, type(optimizer).__name__, backend)


# -- the optimizers with base optimizers whose update is fused -------------------------------------

# For the weights of convolutions and linear layers, and for everything else.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum": (
        {"rho": 0.3, "lr": 0.05, "weight_decay": 0.05, "momentum": 0.9},
        {"rho": 0.1, "lr": 0.02, "weight_decay": 0.01, "momentum": 0.8, "dampening": 0.4},
    ),
    "channels_last, nesterov, adaptive": (
        {"rho": 0.8, "lr": 0.05, "weight_decay": 0.03, "momentum": 0.9, "nesterov": True}
        | {"adaptive": True},
        {"rho": 0.2, "lr": 0.02, "weight_decay": 0.0, "momentum": 0.5},
    ),
    "maximize, no momentum": (
        {"rho": 0.3, "lr": 0.1, "weight_decay": 0.05, "momentum": 0.0, "maximize": True},
        {"rho": 0.1, "lr": 0.05, "weight_decay": 0.01, "momentum": 0.0, "maximize": True}
        | {"adaptive": True},
    ),
    "Adam": (
        {"rho": 0.3, "lr": 0.01, "weight_decay": 0.02},
        {"rho": 0.1, "lr": 0.02, "weight_decay": 0.01, "betas": (0.7, 0.95), "eps": 1e-3},
    ),
    "AdamW": (
        {"rho": 0.3, "lr": 0.01, "weight_decay": 0.5},
        {"rho": 0.1, "lr": 0.02, "weight_decay": 0.1, "betas": (0.7, 0.95), "eps": 1e-3},
    ),
    "AdamW, channels_last, adaptive, maximize": (
        {"rho": 0.8, "lr": 0.01, "weight_decay": 0.5, "adaptive": True, "maximize": True},
        {"rho": 0.2, "lr": 0.02, "weight_decay": 0.0, "betas": (0.0, 0.9), "maximize": True},
    ),
}


def base_of(name: str) -> type[torch.optim.Optimizer]:
    bases = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
    return bases.get(name.split(",")[0], torch.optim.SGD)


# Nothing of these may survive load_state_dict.
WRONG_OPTIONS: dict[type[torch.optim.Optimizer], dict[str, Any]] = {
    torch.optim.SGD: {"momentum": 0.7, "weight_decay": 0.7},
    torch.optim.Adam: {"betas": (0.1, 0.2), "eps": 0.7, "weight_decay": 0.7},
    torch.optim.AdamW: {"betas": (0.1, 0.2), "eps": 0.7, "weight_decay": 0.7},
}


def test_error_bounds_hold_and_are_sharp() -> None:
    """Products and sums in float32 lie within the oracle's bound, and not far within."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(100_000, generator=generator) for _ in range(3))
    bounded_a, bounded_b, bounded_c = (Bounded.exact(x.double(), FLOAT32) for x in (a, b, c))
    bounded = bounded_a * bounded_b + bounded_c
    off = ((a * b + c).double() - bounded.value).abs()
    assert (off <= bounded.error).all()
    assert (off / bounded.error).max() > 0.8


def test_stored_numbers_are_exact_unless_two_are_near() -> None:
    halfway = 1 + 2.0**-8  # between two bfloat16 numbers
    value = torch.tensor([1.001, halfway], dtype=torch.float64)
    number = Bounded(value, torch.full_like(value, 1e-6), FLOAT32).stored(torch.bfloat16)
    assert number.value[0] == 1 and number.error[0] == 0
    assert number.error[1] == 2.0**-7


@pytest.mark.parametrize("name", OPTIONS)
def test_the_oracle_is_torch_optim(name: str) -> None:
    """Who tests the oracle: with g2 for u, it takes the steps of torch.optim, in float64."""
    params = [p.double().detach().requires_grad_() for p in linear().parameters()]
    options = [group for group in OPTIONS[name] for _ in range(2)]
    base = base_of(name)(
        [
            {"params": [p]} | {k: v for k, v in group.items() if k not in ("rho", "adaptive")}
            for p, group in zip(params, options, strict=True)
        ],
        lr=1.0,
    )
    oracle = Oracle(params, base.param_groups, "SAM", "reference")
    for step in range(STEPS):
        grads = set_gradients(params, step)
        base.step()
        oracle.update(grads, grads)
        oracle.check("weight", oracle.w, params)


def reloaded(optimizer: SAM, backend: str) -> SAM:
    """A new optimizer of other options on the same parameters, after load_state_dict."""
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    base = type(optimizer.base_optimizer)
    options = {"rho": 7.0, "lr": 7.0, **WRONG_OPTIONS.get(base, {})}
    fresh = type(optimizer)(groups, base, adaptive=True, backend=backend, **options)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def follow(
    optimizer: SAM,
    oracle: Oracle,
    backward: Callable[[int], None],
    backend: str,
    *,
    steps: int = STEPS,
    reload: Callable[[SAM, str], SAM] = reloaded,
) -> None:
    """Train; compare perturbed weights, weights and state in every step; reload halfway."""
    params = parameters_of(optimizer)
    for step in range(steps):
        if step == steps // 2:
            optimizer = reload(optimizer, backend)
        backward(step)
        first_grads = gradients(params)
        optimizer.first_step()
        oracle.check("perturbed weight", oracle.perturbed(first_grads), params)

        backward(step)
        second_grads = gradients(params)
        optimizer.second_step(zero_grad=True)
        oracle.update(first_grads, second_grads)
        oracle.check("weight", oracle.w, params)
        oracle.check_state([optimizer.state.get(p, {}) for p in params])


def conv_net_run(
    cls: type[SAM], variant: dict[str, Any], name: str, backend: str
) -> tuple[SAM, Callable[[int], None]]:
    """An optimizer, and what puts the gradients of a step at the current weights into .grad."""
    layout = torch.channels_last if "channels_last" in name else torch.contiguous_format
    model = ConvNet().to(memory_format=layout)
    groups = [
        {"params": params, **options}
        for params, options in zip(model.groups(), OPTIONS[name], strict=True)
    ]
    sign = -1 if OPTIONS[name][0].get("maximize") else 1

    def backward(step: int) -> None:
        x, y = images(step % 5)
        (sign * cross_entropy(model(x.to(memory_format=layout)), y)).backward()

    return cls(groups, base_of(name), backend=backend, lr=1.0, **variant), backward


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=[pytest.mark.full] if is_slow else [])
        for name in OPTIONS
        for backend in (*BACKENDS, "interpreted")
        for is_slow in [backend == "interpreted" and name != "momentum"]
        # The slow ones without variations, all of them or Adam's.
        if backend in ("native", "foreach")
        or name in ("momentum", "AdamW")
        or (backend == "interpreted" and base_of(name) is torch.optim.SGD)
    ],
)
@each_cls_and_variant
def test_conv_net(cls: type[SAM], variant: dict[str, Any], name: str, backend: str) -> None:
    optimizer, backward = conv_net_run(cls, variant, name, backend)
    before = oracle_of(optimizer, backend).w
    oracle = oracle_of(optimizer, backend)
    follow(optimizer, oracle, backward, backend, steps=STEPS)

    # A bound that has grown would say nothing, and weights that hardly moved neither.
    moved = (oracle.w.value - before.value).abs()
    assert moved.mean() > 0.02
    assert oracle.w.error.max() < 1e-3 * moved.mean()


# -- other dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (dtype, backend)
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
        for backend in (*BACKENDS, "interpreted")
        # The kernels have no float64.
        if dtype is not torch.float64 or backend not in ("native", "interpreted")
    ],
)
@pytest.mark.parametrize("name", ["momentum", "AdamW"])
@each_cls_and_variant
def test_other_dtypes(
    cls: type[SAM],
    variant: dict[str, Any],
    name: str,
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half precision: arithmetic in float32, rounded once where something is stored, which is the
    perturbed weight, the momentum and the weight.

    To nearest, here; stochastic rounding depends on all bits of the norm, and is compared bit for
    bit in test_rounding.py.

    Wherever the float32 errors leave one number to round to, the oracle demands that very number.
    """
    module = backends.get(backend)
    right = module.perturb_

    def to_nearest(*lists: Any, **options: Any) -> None:
        right(*lists, **{**options, "rounds_at_random": False})

    monkeypatch.setattr(module, "perturb_", to_nearest)
    model = linear(dtype)
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    options = OPTIONS[name]
    groups = [{"params": weights, **options[0]}, {"params": biases, **options[1]}]
    optimizer = cls(groups, base_of(name), backend=backend, lr=1.0, **variant)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = (x[:, 0] * x[:, 1] > 0).long()

    def backward(step: int) -> None:
        cross_entropy(model(x).float(), y).backward()

    before = oracle_of(optimizer, backend).w
    oracle = oracle_of(optimizer, backend)
    # Each step leaves some numbers of m undecided, and those stay so.
    follow(optimizer, oracle, backward, backend, steps=25 if name == "momentum" else 10)
    assert (oracle.w.value - before.value).abs().mean() > 0.02
    if dtype is torch.float64:
        assert oracle.w.error.max() < 1e-12
    else:
        decided = (oracle.w.error == 0).double().mean()
        assert decided > 0.5, "most elements have been compared bit for bit"


# -- wrong optimizers ------------------------------------------------------------------------------


Op = Callable[..., Any]  # of a backend


def with_rho_times(factor: float) -> Callable[[Op], Op]:
    return lambda right: lambda *lists, rho, **options: right(*lists, rho=factor * rho, **options)


def with_weight_decay_in_the_ascent(right: Op) -> Op:
    def perturb_(params: Any, grads: Any, old_params: Any, **options: Any) -> None:
        grads = [g + 0.05 * p for g, p in zip(grads, params, strict=True)]
        right(params, grads, old_params, **options)

    return perturb_


def from_the_perturbed_weights(right: Op) -> Op:
    return lambda params, old_params, *others: right(params, params, *others)


def with_weight_decay_on_perturbed_weights(right: Op) -> Op:
    def sgd_(
        params: Any, old_params: Any, buffers: Any, mix: Mix, options: SgdOptions, journal: Any
    ) -> None:
        for u, p in zip(mix.x, params, strict=True):
            u += options.weight_decay * p
        right(params, old_params, buffers, mix, options._replace(weight_decay=0.0), journal)

    return sgd_


def with_momentum_from_zero(right: Op) -> Op:
    def sgd_(
        params: Any, old_params: Any, buffers: Any, mix: Mix, options: SgdOptions, journal: Any
    ) -> None:
        if options.init_momentum:
            torch._foreach_zero_(list(buffers))
        right(params, old_params, buffers, mix, options._replace(init_momentum=False), journal)

    return sgd_


def with_the_other_decay(right: Op) -> Op:
    def adam_(*lists_and_rule: Any) -> None:
        *others, options, journal = lists_and_rule
        right(*others, options._replace(decoupled=not options.decoupled), journal)

    return adam_


def with_a_step_too_many(right: Op) -> Op:
    def adam_(params: Any, old_params: Any, m: Any, v: Any, steps: Any, *others: Any) -> None:
        right(params, old_params, m, v, [t + 1 for t in steps], *others)
        torch._foreach_add_(list(steps), 1)

    return adam_


PATCHES: dict[str, tuple[str, Callable[[Op], Op]]] = {
    "rho = 0": ("perturb_", with_rho_times(0.0)),
    "ten times rho": ("perturb_", with_rho_times(10.0)),
    "1.0001 rho": ("perturb_", with_rho_times(1.0001)),
    "negative rho": ("perturb_", with_rho_times(-1.0)),
    "weight decay in the ascent": ("perturb_", with_weight_decay_in_the_ascent),
    "norm of the first group only": ("total_of", lambda right: lambda squares: squares[0]),
    "never restoring": ("sgd_", from_the_perturbed_weights),
    "weight decay on perturbed weights": ("sgd_", with_weight_decay_on_perturbed_weights),
    "momentum starts at 0": ("sgd_", with_momentum_from_zero),
    "Adam never restoring": ("adam_", from_the_perturbed_weights),
    "Adam for AdamW": ("adam_", with_the_other_decay),
    "a step too many": ("adam_", with_a_step_too_many),
}


@each_backend
@pytest.mark.parametrize("mutant", PATCHES)
@each_optimizer
def test_wrong_arithmetic_is_noticed(
    cls: type[SAM], mutant: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, patch = PATCHES[mutant]
    optimizer, backward = conv_net_run(cls, {}, "AdamW" if name == "adam_" else "momentum", backend)
    module = ops if name == "total_of" else backends.get(backend)
    monkeypatch.setattr(module, name, patch(getattr(module, name)))
    with pytest.raises(Deviation):
        follow(optimizer, oracle_of(optimizer, backend), backward, backend, steps=10)


@each_backend
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("cls", [SAMDirection, SAMMagnitude])
def test_optimizers_and_granularities_cannot_be_confused(
    cls: type[SAM], granularity: str, backend: str
) -> None:
    """SAMDirection for SAMMagnitude, element for global, and every other swap."""
    swaps = 0
    for claimed in ("SAM", "SAMDirection", "SAMMagnitude"):
        for claimed_granularity in GRANULARITIES:
            if (claimed, claimed_granularity) == (cls.__name__, granularity):
                continue
            run = conv_net_run(cls, {"granularity": granularity}, "momentum", backend)
            oracle = oracle_of(run[0], backend)
            oracle.cls = claimed
            oracle.groups = [{**g, "granularity": claimed_granularity} for g in oracle.groups]
            with pytest.raises(Deviation, match=r"^weight"):
                follow(run[0], oracle, run[1], backend, steps=2)
            swaps += 1
    assert swaps == 8


@pytest.mark.parametrize("name", ["momentum", "Adam"])
def test_lost_state_is_noticed(name: str) -> None:
    def forgetful(optimizer: SAM, backend: str) -> SAM:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
        return optimizer

    optimizer, backward = conv_net_run(SAM, {}, name, "native")
    oracle = oracle_of(optimizer, "native")
    with pytest.raises(Deviation, match=r"^weight"):
        follow(optimizer, oracle, backward, "native", steps=6, reload=forgetful)


def test_nan_is_noticed() -> None:
    optimizer, _ = conv_net_run(SAM, {}, "momentum", "native")
    oracle = oracle_of(optimizer, "native")
    params = parameters_of(optimizer)
    oracle.check("weight", oracle.w, params)
    with torch.no_grad():
        params[3][0] = math.nan
    with pytest.raises(Deviation, match="parameter 3"):
        oracle.check("weight", oracle.w, params)


# -- torch.optim itself, and any other base optimizer ----------------------------------------------


@each_backend
@pytest.mark.parametrize("name", OPTIONS)
def test_sam_with_rho_zero_is_torch_optim(name: str, backend: str) -> None:
    """Both lie within the bound of one float64 computation, so at most twice the bound apart."""
    optimizer, backward = conv_net_run(SAM, {}, name, backend)
    for group in optimizer.param_groups:
        group["rho"] = 0.0
    params = parameters_of(optimizer)
    twins = [torch.nn.Parameter(w) for w in snapshot(params)]
    remaining = iter(twins)
    base = base_of(name)(
        [
            {k: v for k, v in group.items() if k not in ("rho", "adaptive")}
            | {"params": [next(remaining) for _ in group["params"]]}
            for group in optimizer.param_groups
        ],
        foreach=False,
    )
    oracle = oracle_of(optimizer, backend)
    for step in range(STEPS):
        backward(step)
        optimizer.first_step()
        backward(step)
        grads = gradients(params)
        optimizer.second_step(zero_grad=True)
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad
        base.step()
        oracle.update(grads, grads)
        off = oracle.exact(params).value - oracle.exact(twins).value
        assert (off.abs() <= 2 * oracle.w.error).all()


COMBINATIONS: dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
    ("SAM", "element"): lambda g1, g2: g2,
    ("SAMDirection", "element"): lambda g1, g2: g1.abs() * g2.sign(),
    ("SAMMagnitude", "element"): lambda g1, g2: g2.abs() * g1.sign(),
    ("SAMDirection", "global"): lambda g1, g2: g1.norm() / g2.norm() * g2,
    ("SAMMagnitude", "global"): lambda g1, g2: g2.norm() / g1.norm() * g1,
}


@pytest.mark.parametrize("backend", ["foreach", "reference"])
@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize(("name", "granularity"), COMBINATIONS)
def test_training_by_itself(name: str, granularity: str, rho: float, backend: str) -> None:
    """No gradients are shared: two trainings in float64, one of them written out by hand."""
    ours, theirs = ConvNet().double(), ConvNet().double()
    variant = {} if name == "SAM" else {"granularity": granularity}
    cls = {cls.__name__: cls for cls in OPTIMIZERS}[name]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = cls(ours.parameters(), rho=rho, backend=backend, **options, **variant)

    w = parameters_to_vector(theirs.parameters()).detach()
    start = w
    momentum = torch.zeros_like(w)

    def gradient_at(point: Tensor) -> Tensor:
        vector_to_parameters(point, theirs.parameters())
        grads = torch.autograd.grad(cross_entropy(theirs(x), y), list(theirs.parameters()))
        return torch.cat([g.flatten() for g in grads])

    for step in range(20):
        x, y = images(step % 5)
        x = x.double()
        cross_entropy(ours(x), y).backward()
        optimizer.first_step()
        cross_entropy(ours(x), y).backward()
        optimizer.second_step(zero_grad=True)

        g1 = gradient_at(w)
        g2 = gradient_at(w + rho * g1 / g1.norm())
        momentum = 0.9 * momentum + COMBINATIONS[name, granularity](g1, g2) + 0.01 * w
        w = w - 0.05 * momentum
    # Differences of 2^-53 have twenty steps to grow, and eight digits of room.
    off = parameters_to_vector(ours.parameters()) - w
    assert off.norm() < 1e-8 * (w - start).norm()


def backward_of(model: ConvNet, step: int) -> None:
    x, y = images(step % 5)
    cross_entropy(model(x.double()), y).backward()


def eager_step(
    name: str,
    granularity: str,
    base: torch.optim.Optimizer,
    rho: float,
    backward: Callable[[], None],
) -> None:
    """davda54/sam's step, with u for the gradient: one parameter at a time."""
    params = parameters_of(base)
    backward()
    first_grads = gradients(params)
    norm = torch.stack([g.norm() for g in first_grads]).norm()
    old = snapshot(params)
    with torch.no_grad():
        for p, g in zip(params, first_grads, strict=True):
            p.add_(rho / (norm + EPS) * g)
    base.zero_grad()
    backward()
    u = combined(name, granularity, first_grads, gradients(params))
    for p, w, grad in zip(params, old, u, strict=True):
        p.data = w
        p.grad = grad
    base.step()
    base.zero_grad()


def combined(
    name: str, granularity: str, first: Sequence[Tensor], second: Sequence[Tensor]
) -> Sequence[Tensor]:
    combine = COMBINATIONS[name, granularity]
    g1, g2 = (torch.cat([g.flatten() for g in grads]) for grads in (first, second))
    parts = combine(g1, g2).split([g.numel() for g in first])
    return [part.view_as(g) for part, g in zip(parts, first, strict=True)]


@pytest.mark.parametrize("backend", ["foreach", "reference"])
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(("name", "granularity"), COMBINATIONS)
def test_training_by_itself_with_adam(
    name: str, granularity: str, base: type[torch.optim.Optimizer], backend: str
) -> None:
    """As above, fifty steps beside torch.optim's own, in two groups."""
    ours, theirs = ConvNet().double(), ConvNet().double()
    variant = {} if name == "SAM" else {"granularity": granularity}
    cls = {cls.__name__: cls for cls in OPTIMIZERS}[name]
    options = ({"weight_decay": 0.1, "betas": (0.8, 0.99)}, {"weight_decay": 0.0, "lr": 2e-3})
    our_groups, their_groups = (
        [{"params": g, **o} for g, o in zip(model.groups(), options, strict=True)]
        for model in (ours, theirs)
    )
    optimizer = cls(our_groups, base, 0.1, backend=backend, lr=5e-3, **variant)
    eager = base(their_groups, lr=5e-3, foreach=False)
    start = parameters_to_vector(ours.parameters()).detach().clone()
    for step in range(STEPS):
        backward_of(ours, step)
        optimizer.first_step()
        backward_of(ours, step)
        optimizer.second_step(zero_grad=True)
        eager_step(name, granularity, eager, 0.1, partial(backward_of, theirs, step))
    w, expected = (parameters_to_vector(m.parameters()).detach() for m in (ours, theirs))
    # Differences of 2^-53 have fifty steps to grow, and eight digits of room.
    assert (w - expected).norm() < 1e-8 * (expected - start).norm()
    assert (expected - start).norm() > 0.1
    for p, q in zip(parameters_of(optimizer), parameters_of(eager), strict=True):
        assert optimizer.state[p]["step"].item() == eager.state[q]["step"].item() == STEPS


class SignDescent(torch.optim.Optimizer):
    """Somebody's own optimizer, with options and state that torch.optim does not know."""

    def __init__(self, params: Any, lr: float, decay: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["decay"])
                p -= group["lr"] * average.sign()


class MySGD(torch.optim.SGD):
    """May have changed anything, so that the fused update must not take its place."""


BASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Any]]] = [
    (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.05}, {"lr": 3e-3, "betas": (0.8, 0.99)}),
    (torch.optim.Adam, {"lr": 1e-2, "maximize": True}, {"lr": 3e-3, "maximize": True}),
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.05}, {"lr": 3e-3, "weight_decay": 0.01}),
    (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.05}, {"lr": 3e-3}),
    (SignDescent, {"lr": 1e-3}, {"lr": 3e-3, "decay": 0.9}),
    (MySGD, {"lr": 5e-2, "momentum": 0.9, "weight_decay": 0.05}, {"lr": 2e-2, "momentum": 0.8}),
]


def record_steps(optimizer: SAM) -> list[tuple[list[Tensor], list[Tensor]]]:
    """A list that gets the weights and gradients that the base optimizer finds in each step."""
    found: list[tuple[list[Tensor], list[Tensor]]] = []

    def record(*_: Any) -> None:
        params = parameters_of(optimizer.base_optimizer)
        found.append((snapshot(params), gradients(params)))

    optimizer.base_optimizer.register_step_pre_hook(record)
    return found


@each_backend
@pytest.mark.parametrize(
    ("base", "first", "second"), BASES, ids=lambda value: getattr(value, "__name__", "")
)
@each_cls_and_variant
def test_other_base_optimizers(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    first: dict[str, Any],
    second: dict[str, Any],
    backend: str,
) -> None:
    """The base optimizer finds the restored weights and u, and does with them what it always does.

    u is compared with the oracle's; a twin of the base optimizer makes the same step of it by hand,
    to the same bits.
    """
    model = ConvNet()
    rhos = ({"rho": 0.3}, {"rho": 0.1, "adaptive": True})
    groups = [
        {"params": params, **options, **rho}
        for params, options, rho in zip(model.groups(), (first, second), rhos, strict=True)
    ]
    optimizer = cls(groups, base, backend=backend, **variant, lr=1.0)
    params = parameters_of(optimizer)
    oracle = oracle_of(optimizer, backend)
    base_steps = record_steps(optimizer)

    twins = [torch.nn.Parameter(w) for w in snapshot(params)]
    count = len(model.groups()[0])
    twin = base([{"params": twins[:count], **first}, {"params": twins[count:], **second}], lr=1.0)

    sign = -1 if first.get("maximize") else 1
    for step in range(6):
        if step == 3:
            optimizer = reloaded(optimizer, backend)
            base_steps = record_steps(optimizer)
        x, y = images(step)
        oracle.w = oracle.exact(twins)

        (sign * cross_entropy(model(x), y)).backward()
        first_grads = gradients(params)
        optimizer.first_step()
        oracle.check("perturbed weight", oracle.perturbed(first_grads), params)
        (sign * cross_entropy(model(x), y)).backward()
        second_grads = gradients(params)
        optimizer.second_step(zero_grad=True)

        ((weights, u),) = base_steps
        base_steps.clear()
        assert unchanged(weights, twins)
        oracle.check("u", oracle.recombined(first_grads, second_grads), u)
        for t, grad in zip(twins, u, strict=True):
            t.grad = grad
        twin.step()
        assert unchanged(params, twins)
