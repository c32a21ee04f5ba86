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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from samkernels import SAM, SAMDirection, SAMMagnitude, ops
from tests.optim_helpers import (
    BACKENDS,
    VARIANTS,
    ConvNet,
    images,
    linear,
    parameters_of,
    same_bits,
    set_gradients,
    snapshot,
    through_a_file,
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

    def __add__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Bounded) -> Bounded:
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Bounded) -> Bounded:
        error = (
            self.value.abs() * other.error
            + self.error * other.value.abs()
            + self.error * other.error
        )
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other: Bounded) -> Bounded:
        quotient = self.value / other.value
        smallest = other.value.abs() - other.error
        return self._rounded(quotient, (self.error + quotient.abs() * other.error) / smallest)

    def __neg__(self) -> Bounded:
        return replace(self, value=-self.value)

    def __abs__(self) -> Bounded:
        return replace(self, value=self.value.abs())

    def sign(self) -> Bounded:
        assert not self.error.any(), "the sign of a rounded number is not known"
        return replace(self, value=self.value.sign())

    def stored(self, dtype: torch.dtype) -> Bounded:
        """Rounded to `dtype`: exact again, unless the error leaves two numbers to round to."""
        low, value, high = (
            x.to(dtype).double()
            for x in (self.value - self.error, self.value, self.value + self.error)
        )
        return replace(self, value=value, error=torch.maximum(high - value, value - low))

    def _rounded(self, value: Tensor, error: Tensor) -> Bounded:
        return Bounded(value, error + self.roundoff * value.abs() + SMALLEST, self.roundoff)


@dataclass
class Arithmetic:
    """How an implementation computes, as far as its errors depend on it."""

    roundoff: float  # of one operation
    sums_in_float64: bool  # otherwise norms are sums in the precision of everything else

    @classmethod
    def of(cls, backend: str, dtype: torch.dtype) -> Arithmetic:
        # The oracle's own roundings are as large as those of a float64 tensor: twice one.
        roundoff = 2 * FLOAT64 if dtype is torch.float64 else FLOAT32
        return cls(roundoff, sums_in_float64=backend != "foreach" and dtype is not torch.float64)

    def exact(self, tensor: Tensor) -> Bounded:
        value = tensor.detach().double()
        return Bounded(value, torch.zeros_like(value), self.roundoff)

    def number(self, value: float) -> Bounded:
        """A hyperparameter, which the kernels round to float32."""
        exact = torch.tensor(value, dtype=torch.float64)
        return Bounded(exact, self.roundoff * exact.abs(), self.roundoff)

    def norm(self, tensors: Sequence[Bounded]) -> Bounded:
        norm = torch.stack([t.value.square().sum() for t in tensors]).sum().sqrt()
        error = torch.stack([t.error.square().sum() for t in tensors]).sum().sqrt()
        # A sum of n squares in any order is off by n roundings at most, its root by half as many.
        # Norms of tensors are rounded, and summed once more.
        longest = 0 if self.sums_in_float64 else max(t.value.numel() for t in tensors)
        roundings = longest / 2 + len(tensors) / 2 + 4
        return Bounded(norm, error + roundings * self.roundoff * norm, self.roundoff)


class Oracle:
    """Weights and momentum of one run, one option dict per parameter."""

    def __init__(
        self,
        arithmetic: Arithmetic,
        weights: Sequence[Tensor],
        options: Sequence[dict[str, Any]],
        rule: str,
        granularity: str,
    ) -> None:
        self.arithmetic = arithmetic
        self.dtypes = [w.dtype for w in weights]
        self.weights = [arithmetic.exact(w) for w in weights]
        self.options = options
        self.rule = rule
        self.granularity = granularity
        self.buffers: list[Bounded | None] = [None] * len(weights)

    def perturbed(self, first_grads: Sequence[Tensor]) -> list[Bounded]:
        """w + rho * s^2 * g1 / (||s * g1|| + eps), one norm over all parameters of all groups."""
        number = self.arithmetic.number
        g1 = [self.arithmetic.exact(g) for g in first_grads]
        scaled = [
            abs(w) * g if o.get("adaptive") else g
            for w, g, o in zip(self.weights, g1, self.options, strict=True)
        ]
        norm = self.arithmetic.norm(scaled) + number(EPS)
        points = []
        for w, g, o, dtype in zip(self.weights, g1, self.options, self.dtypes, strict=True):
            scale = number(-o["rho"] if o.get("maximize") else o["rho"]) / norm
            direction = w * w * g if o.get("adaptive") else g
            points.append((w + scale * direction).stored(dtype))
        return points

    def recombined(
        self, first_grads: Sequence[Tensor], second_grads: Sequence[Tensor]
    ) -> list[Bounded]:
        """u, which takes the gradient's place."""
        g1 = [self.arithmetic.exact(g) for g in first_grads]
        g2 = [self.arithmetic.exact(g) for g in second_grads]
        if self.rule == "sam":
            return g2
        # Whose magnitude, and whose direction:
        magnitudes, directions = (g1, g2) if self.rule == "samdirection" else (g2, g1)
        if self.granularity == "element":
            return [abs(m) * d.sign() for m, d in zip(magnitudes, directions, strict=True)]
        norm, eps = self.arithmetic.norm, self.arithmetic.number(EPS)
        if self.granularity == "global":
            scale = norm(magnitudes) / (norm(directions) + eps)
            return [scale * d for d in directions]
        return [
            norm([m]) / (norm([d]) + eps) * d for m, d in zip(magnitudes, directions, strict=True)
        ]

    def update(self, first_grads: Sequence[Tensor], second_grads: Sequence[Tensor]) -> None:
        """torch.optim.SGD's step from w with u for its gradient."""
        number = self.arithmetic.number
        for i, u in enumerate(self.recombined(first_grads, second_grads)):
            w, buffer, options, dtype = (
                self.weights[i],
                self.buffers[i],
                self.options[i],
                self.dtypes[i],
            )
            if options.get("maximize"):
                u = -u
            if options["weight_decay"]:
                u = u + number(options["weight_decay"]) * w
            if options["momentum"]:
                momentum = number(options["momentum"])
                if buffer is None:
                    buffer = u
                else:
                    buffer = momentum * buffer + number(1 - options.get("dampening", 0)) * u
                u = u + momentum * buffer if options.get("nesterov") else buffer
                self.buffers[i] = buffer.stored(dtype)
            self.weights[i] = (w - number(options["lr"]) * u).stored(dtype)


def check(what: str, expected: Sequence[Bounded], actual: Sequence[Tensor]) -> None:
    for i, (bounded, tensor) in enumerate(zip(expected, actual, strict=True)):
        off = (tensor.detach().double() - bounded.value).abs()
        # not (<=): nan deviates too
        if not bool((off <= bounded.error).all()):
            raise Deviation(
                f"{what} of parameter {i} is off by {off.max():.3e}, up to "
                f"{(off / bounded.error).max():.3g} times what rounding explains"
            )


def test_error_bounds_hold_and_are_sharp() -> None:
    """Sums of products in float32 lie within the oracle's bound, and not far within."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(100_000, generator=generator) for _ in range(3))
    arithmetic = Arithmetic(FLOAT32, sums_in_float64=True)
    bounded = arithmetic.exact(a) * arithmetic.exact(b) + arithmetic.exact(c)
    off = ((a * b + c).double() - bounded.value).abs()
    assert (off <= bounded.error).all()
    assert (off / bounded.error).max() > 0.8


def test_stored_numbers_are_exact_unless_two_are_near() -> None:
    arithmetic = Arithmetic(FLOAT32, sums_in_float64=True)
    halfway = 1 + 2.0**-8  # between two bfloat16 numbers
    number = replace(
        arithmetic.exact(torch.tensor([1.001, halfway])),
        error=torch.tensor([1e-6, 1e-6], dtype=torch.float64),
    ).stored(torch.bfloat16)
    assert number.value[0] == 1 and number.error[0] == 0
    assert number.error[1] == 2.0**-7


# -- the optimizers with torch.optim.SGD -----------------------------------------------------------

# For the weights of convolutions and linear layers, and for everything else.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum": (
        {"rho": 0.3, "lr": 0.05, "weight_decay": 0.05, "momentum": 0.9},
        {"rho": 0.1, "lr": 0.02, "weight_decay": 0.01, "momentum": 0.8, "dampening": 0.4},
    ),
    "nesterov, adaptive": (
        {"rho": 0.8, "lr": 0.05, "weight_decay": 0.03, "momentum": 0.9, "nesterov": True}
        | {"adaptive": True},
        {"rho": 0.2, "lr": 0.02, "weight_decay": 0.0, "momentum": 0.5},
    ),
    "maximize, no momentum": (
        {"rho": 0.3, "lr": 0.1, "weight_decay": 0.05, "momentum": 0.0, "maximize": True},
        {"rho": 0.1, "lr": 0.05, "weight_decay": 0.01, "momentum": 0.0, "maximize": True}
        | {"adaptive": True},
    ),
}
CHANNELS_LAST = "channels_last"
OPTIONS[CHANNELS_LAST] = OPTIONS["momentum"]

# Nothing of these may survive load_state_dict.
WRONG_OPTIONS: dict[str, Any] = {"rho": 7.0, "lr": 7.0, "momentum": 0.7, "weight_decay": 0.7}


def reloaded(optimizer: SAM, backend: str) -> SAM:
    """A new optimizer of other options on the same parameters, after load_state_dict."""
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    fresh = type(optimizer)(groups, adaptive=True, backend=backend, **WRONG_OPTIONS)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in params if p.grad is not None]


def follow(
    optimizer: SAM,
    backward: Callable[[int], None],
    rule: str,
    granularity: str,
    backend: str,
    *,
    steps: int = STEPS,
    reload: Callable[[SAM, str], SAM] = reloaded,
) -> Oracle:
    """Train, compare perturbed weights, weights and momentum in every step; reload halfway."""
    params = parameters_of(optimizer)
    options = [group for group in optimizer.param_groups for _ in group["params"]]
    options = [{k: v for k, v in o.items() if k != "params"} for o in options]
    arithmetic = Arithmetic.of(backend, params[0].dtype)
    oracle = Oracle(arithmetic, params, options, rule, granularity)
    for step in range(steps):
        if step == steps // 2:
            optimizer = reload(optimizer, backend)
        backward(step)
        first_grads = gradients(params)
        optimizer.first_step()
        check("perturbed weight", oracle.perturbed(first_grads), params)

        backward(step)
        second_grads = gradients(params)
        optimizer.second_step(zero_grad=True)
        oracle.update(first_grads, second_grads)
        check("weight", oracle.weights, params)
        for buffer, p in zip(oracle.buffers, params, strict=True):
            if buffer is not None:
                check("momentum", [buffer], [optimizer.state[p]["momentum_buffer"]])
    return oracle


def conv_net_run(
    cls: type[SAM], variant: dict[str, Any], name: str, backend: str
) -> tuple[SAM, Callable[[int], None]]:
    model = ConvNet()
    layout = torch.channels_last if name == CHANNELS_LAST else torch.contiguous_format
    model = model.to(memory_format=layout)
    groups = [
        {"params": params, **options}
        for params, options in zip(model.groups(), OPTIONS[name], strict=True)
    ]
    sign = -1 if OPTIONS[name][0].get("maximize") else 1

    def backward(step: int) -> None:
        x, y = images(step % 5)
        (sign * cross_entropy(model(x.to(memory_format=layout)), y)).backward()

    return cls(groups, backend=backend, lr=1.0, **variant), backward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("cls", "variant"), VARIANTS)
def test_conv_net(cls: type[SAM], variant: dict[str, Any], name: str, backend: str) -> None:
    optimizer, backward = conv_net_run(cls, variant, name, backend)
    before = snapshot(parameters_of(optimizer))
    granularity = variant.get("granularity", "element")
    oracle = follow(optimizer, backward, cls.__name__.lower(), granularity, backend)

    # A bound that has grown would say nothing, and weights that hardly moved neither.
    for weight, old in zip(oracle.weights, before, strict=True):
        moved = (weight.value - old.double()).abs().max()
        assert moved > 1e-2
        assert weight.error.max() < 1e-3 * moved


def test_the_oracle_is_torch_sgd_when_rho_is_zero() -> None:
    """Who tests the oracle: its update is that of torch.optim.SGD, in float64 to 2^-52."""
    for options in OPTIONS.values():
        for group in options:
            hyperparameters = {k: v for k, v in group.items() if k not in ("rho", "adaptive")}
            params = [p.double().detach().requires_grad_() for p in linear().parameters()]
            sgd = torch.optim.SGD(params, **hyperparameters)
            arithmetic = Arithmetic.of("reference", torch.float64)
            oracle = Oracle(arithmetic, params, [group] * len(params), "sam", "element")
            for step in range(STEPS):
                grads = set_gradients(params, step)
                sgd.step()
                oracle.update(grads, grads)
                check("weight", oracle.weights, params)


# -- half precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("cls", "variant"), VARIANTS)
def test_other_dtypes(
    cls: type[SAM], variant: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    """Arithmetic in float32, rounded where something is stored: perturbed weight, momentum, weight.

    Wherever the float32 errors leave one number to round to, the oracle demands that very number.
    """
    if backend == "native" and dtype is torch.float64:
        backend = "auto"  # the compiled core has no float64, and says so elsewhere
    model = linear(dtype)
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    options = OPTIONS["momentum"]
    groups = [{"params": weights, **options[0]}, {"params": biases, **options[1]}]
    optimizer = cls(groups, backend=backend, lr=1.0, **variant)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator).to(dtype)
    y = (x[:, 0] * x[:, 1] > 0).long()

    def backward(step: int) -> None:
        cross_entropy(model(x).float(), y).backward()

    granularity = variant.get("granularity", "element")
    before = snapshot(parameters_of(optimizer))
    backend = "foreach" if backend == "auto" else backend
    oracle = follow(optimizer, backward, cls.__name__.lower(), granularity, backend)

    if dtype is torch.float64:
        assert max(w.error.max() for w in oracle.weights) < 1e-12
    else:
        decided = torch.cat([w.error.flatten() == 0 for w in oracle.weights]).double().mean()
        assert decided > 0.8, "almost every element is compared bit for bit"
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# -- wrong optimizers ------------------------------------------------------------------------------


def with_rho_times(factor: float) -> Callable[..., Tensor]:
    right = ops.perturb_

    def perturb_(*lists: Any, rho: float, **options: Any) -> Tensor:
        return right(*lists, rho=factor * rho, **options)

    return perturb_


def downhill() -> Callable[..., Tensor]:
    right = ops.perturb_

    def perturb_(*lists: Any, maximize: bool, **options: Any) -> Tensor:
        return right(*lists, maximize=not maximize, **options)

    return perturb_


def with_weight_decay_in_the_ascent() -> Callable[..., Tensor]:
    right = ops.perturb_

    def perturb_(params: Any, grads: Any, old_params: Any, **options: Any) -> Tensor:
        grads = [g + 0.05 * p for g, p in zip(grads, params, strict=True)]
        return right(params, grads, old_params, **options)

    return perturb_


def first_norm_only() -> Callable[..., Tensor]:
    return lambda norms: norms[0]


def from_the_perturbed_weights() -> Callable[..., None]:
    right = ops.sgd_

    def sgd_(params: Any, old_params: Any, *lists: Any, **options: Any) -> None:
        right(params, params, *lists, **options)

    return sgd_


def with_weight_decay_on_perturbed_weights() -> Callable[..., None]:
    right = ops.sgd_

    def sgd_(
        params: Any, old_params: Any, grads: Any, *lists: Any, weight_decay: float, **options: Any
    ) -> None:
        for g, p in zip(grads, params, strict=True):
            g += weight_decay * p
        right(params, old_params, grads, *lists, weight_decay=0.0, **options)

    return sgd_


def with_momentum_from_zero() -> Callable[..., None]:
    right = ops.sgd_

    def sgd_(
        params: Any,
        old_params: Any,
        grads: Any,
        buffers: Any,
        *,
        init_momentum: bool,
        **options: Any,
    ) -> None:
        if init_momentum:
            torch._foreach_zero_(buffers)
        right(params, old_params, grads, buffers, init_momentum=False, **options)

    return sgd_


PATCHES: dict[str, tuple[str, Callable[[], Callable[..., Any]]]] = {
    "rho = 0": ("perturb_", lambda: with_rho_times(0.0)),
    "ten times rho": ("perturb_", lambda: with_rho_times(10.0)),
    "1.0001 rho": ("perturb_", lambda: with_rho_times(1.0001)),
    "negative rho": ("perturb_", downhill),
    "weight decay in the ascent": ("perturb_", with_weight_decay_in_the_ascent),
    "norm of the first group only": ("total_norm", first_norm_only),
    "never restoring": ("sgd_", from_the_perturbed_weights),
    "weight decay on perturbed weights": ("sgd_", with_weight_decay_on_perturbed_weights),
    "momentum starts at 0": ("sgd_", with_momentum_from_zero),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mutant", PATCHES)
@pytest.mark.parametrize("cls", [SAM, SAMDirection, SAMMagnitude])
def test_wrong_arithmetic_is_noticed(
    cls: type[SAM], mutant: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer, backward = conv_net_run(cls, {}, "momentum", backend)
    name, patch = PATCHES[mutant]
    monkeypatch.setattr(ops, name, patch())
    with pytest.raises(Deviation):
        follow(optimizer, backward, cls.__name__.lower(), "element", backend, steps=10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cls", "granularity", "rule", "expected_granularity"),
    [
        (cls, granularity, rule, expected)
        for cls in (SAMDirection, SAMMagnitude)
        for granularity in ops.GRANULARITIES
        for rule in ops.RULES
        for expected in ops.GRANULARITIES
        if (rule, expected) != (cls.__name__.lower(), granularity)
    ],
)
def test_optimizers_and_granularities_cannot_be_confused(
    cls: type[SAM], granularity: str, rule: str, expected_granularity: str, backend: str
) -> None:
    """SAMDirection for SAMMagnitude, element for global, and every other swap."""
    optimizer, backward = conv_net_run(cls, {"granularity": granularity}, "momentum", backend)
    with pytest.raises(Deviation):
        follow(optimizer, backward, rule, expected_granularity, backend, steps=4)


def test_lost_momentum_is_noticed() -> None:
    def forgetful(optimizer: SAM, backend: str) -> SAM:
        state_dict = {**optimizer.state_dict(), "state": {}}
        optimizer.load_state_dict(state_dict)
        return optimizer

    optimizer, backward = conv_net_run(SAM, {}, "momentum", "native")
    with pytest.raises(Deviation, match="^(weight|momentum)"):
        follow(optimizer, backward, "sam", "element", "native", steps=6, reload=forgetful)


# -- torch.optim.SGD, and any other base optimizer -------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["momentum", "nesterov, adaptive", "maximize, no momentum"])
def test_sam_with_rho_zero_is_torch_sgd(name: str, backend: str) -> None:
    """Both lie within the bound of one float64 computation, so at most twice the bound apart."""
    optimizer, backward = conv_net_run(SAM, {}, name, backend)
    for group in optimizer.param_groups:
        group["rho"] = 0.0
    params = parameters_of(optimizer)
    twins = [torch.nn.Parameter(w) for w in snapshot(params)]
    remaining = iter(twins)
    sgd_groups = [
        {
            **{k: v for k, v in group.items() if k not in ("rho", "adaptive")},
            "params": [next(remaining) for _ in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    sgd = torch.optim.SGD(sgd_groups)
    options = [group for group in optimizer.param_groups for _ in group["params"]]
    oracle = Oracle(Arithmetic.of(backend, torch.float32), params, options, "sam", "element")
    for step in range(STEPS):
        backward(step)
        optimizer.first_step()
        backward(step)
        grads = gradients(params)
        optimizer.second_step(zero_grad=True)
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad
        sgd.step()
        oracle.update(grads, grads)
        for p, twin, weight in zip(params, twins, oracle.weights, strict=True):
            assert ((p - twin).double().abs() <= 2 * weight.error).all()


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_training_by_itself_in_float64(rho: float) -> None:
    """No gradients are shared here: two trainings, one with SAM and one written out by hand."""
    ours, theirs = ConvNet().double(), ConvNet().double()
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    sam = SAM(ours.parameters(), torch.optim.SGD, rho, **options)
    sgd = torch.optim.SGD(theirs.parameters(), **options)
    for step in range(STEPS):
        x, y = images(step % 5)
        x = x.double()
        for model in (ours, theirs):
            cross_entropy(model(x), y).backward()
        sam.first_step()
        cross_entropy(ours(x), y).backward()
        sam.step()
        sam.zero_grad()

        with torch.no_grad():
            grads = gradients(list(theirs.parameters()))
            norm = torch.cat([g.flatten() for g in grads]).norm()
            weights = snapshot(theirs.parameters())
            for p, g in zip(theirs.parameters(), grads, strict=True):
                p += rho * g / norm
        sgd.zero_grad()
        cross_entropy(theirs(x), y).backward()
        with torch.no_grad():
            for p, w in zip(theirs.parameters(), weights, strict=True):
                p.copy_(w)
        sgd.step()
        sgd.zero_grad()
    # 2^-53 per step, and chaos: in float64 fifty steps leave six digits of room.
    for p, twin in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-9, atol=1e-9)


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


def recorded_steps(optimizer: SAM) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Weights and gradients that the base optimizer finds, step by step."""
    found: list[tuple[list[Tensor], list[Tensor]]] = []

    def record(*_: Any) -> None:
        params = parameters_of(optimizer.base_optimizer)
        found.append((snapshot(params), gradients(params)))

    optimizer.base_optimizer.register_step_pre_hook(record)
    while True:
        yield found.pop()
        assert not found, "the base optimizer steps once per step"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("base", "first", "second"), BASES)
@pytest.mark.parametrize(("cls", "variant"), VARIANTS)
def test_other_base_optimizers(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    first: dict[str, Any],
    second: dict[str, Any],
    backend: str,
) -> None:
    """The base optimizer finds the restored weights and u, and does with them what it always does.

    u is compared with the oracle's; handed to a twin of the base optimizer, it must give the same
    bits.
    """
    steps = 10
    model = ConvNet()
    params = [p for group in model.groups() for p in group]
    rhos = ({"rho": 0.3}, {"rho": 0.1, "adaptive": True})
    groups = [
        {"params": p, **options, **rho}
        for p, options, rho in zip(model.groups(), (first, second), rhos, strict=True)
    ]
    optimizer = cls(groups, base, backend=backend, **variant, lr=1.0)
    options = [
        dict(group) for group in optimizer.param_groups for _ in group["params"]
    ]

    twins = [torch.nn.Parameter(w) for w in snapshot(params)]
    count = len(model.groups()[0])
    twin = base(
        [{"params": twins[:count], **first}, {"params": twins[count:], **second}], lr=1.0
    )

    rule, granularity = cls.__name__.lower(), variant.get("granularity", "element")
    arithmetic = Arithmetic.of(backend, torch.float32)
    base_steps = recorded_steps(optimizer)
    sign = -1 if first.get("maximize") else 1
    for step in range(steps):
        if step == steps // 2:
            fresh_groups = [{"params": group["params"]} for group in optimizer.param_groups]
            fresh = cls(fresh_groups, base, rho=7.0, backend=backend, lr=7.0)
            fresh.load_state_dict(through_a_file(optimizer.state_dict()))
            optimizer, base_steps = fresh, recorded_steps(fresh)
            twin.load_state_dict(through_a_file(twin.state_dict()))
        x, y = images(step)
        if step == 0:
            next_step = None
        (sign * cross_entropy(model(x), y)).backward()
        first_grads = gradients(params)
        # The twin's weights are the optimizer's, bit for bit.
        oracle = Oracle(arithmetic, twins, options, rule, granularity)
        optimizer.first_step()
        check("perturbed weight", oracle.perturbed(first_grads), params)
        (sign * cross_entropy(model(x), y)).backward()
        second_grads = gradients(params)
        optimizer.second_step()
        weights, u = next(base_steps)
        assert all(same_bits(w, t) for w, t in zip(weights, twins, strict=True))
        check("u", oracle.recombined(first_grads, second_grads), u)
        for t, grad in zip(twins, u, strict=True):
            t.grad = grad
        twin.step()
        assert all(same_bits(p, t) for p, t in zip(params, twins, strict=True))
        optimizer.zero_grad()
