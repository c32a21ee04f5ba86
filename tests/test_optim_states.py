"""A state machine makes the calls of a training loop in any order: steps, exceptions, overflow,
checkpoints, copies, new groups, other hyperparameters, frozen parameters, and misuse.

The reference has nothing of samkernels: the formulas of docs/concepts.md in float64, and PyTorch's
own optimizer on float64 copies of the parameters. It is never saved, loaded, copied or interrupted,
and gets its hyperparameters by hand. After every call: weights are where the formulas want them,
and where they had to stay or to come back they have the old bits; state and hyperparameters are the
reference's; addresses are the same; nothing is saved but the base optimizer's state.

The examples are the same each time, in every process (tests/examples.py). To look further, with
other examples on each run:

    SAMKERNELS_STATES=5000 python -m pytest tests/test_optim_states.py
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from samkernels import SAM, backends
from samkernels.optim._rule import Combination, Lists, linear
from tests import helpers
from tests.optim_helpers import parameters_of, same_bits, snapshot, through_a_file
from tests.optimizers import ALL_VARIANTS

pytest.importorskip("hypothesis")  # no CUDA machine need have it

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests import examples  # noqa: F401

EXAMPLES = int(os.environ.get("SAMKERNELS_STATES", "0"))
SETTINGS = settings(
    stateful_step_count=40,
    deadline=None,
    derandomize=EXAMPLES == 0,
    suppress_health_check=list(HealthCheck),
)

TESTED = [
    name
    for name in ("native", "emulated", "foreach", "reference")
    if name in backends.BACKENDS and not backends.why_unavailable(name, torch.device("cpu"))
]
SHAPES = [(17,), (3, 5), (), (0, 2), (2, 3, 1)]
VARIANTS = [(v.info.cls, v.options) for v in ALL_VARIANTS]
SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
BASES: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"momentum": 0.9, "dampening": 0.5}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
    (Adam, {"weight_decay": 0.1, "maximize": True}),
    (AdamW, {"weight_decay": 0.1}),
    (AdamW, {"weight_decay": 0.1, "amsgrad": True}),  # makes its own step
]
MOMENTS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
SAVED = {SGD: {"momentum_buffer"}, Adam: MOMENTS, AdamW: MOMENTS}

seeds = st.integers(0, 2**16)
indices = st.integers(0, 99)  # of a parameter or group, modulo how many there are
# Of most gradients, and of some: zero, large, small, one element not finite.
scales = st.sampled_from([1.0] * 5 + [0.0, 2.0**10, 2.0**-20, math.inf, math.nan])
unreached = st.sets(indices, max_size=2)  # parameters that a backward pass does not reach

Grads = dict[int, Tensor]  # by the index of the parameter


class Interrupted(BaseException):
    """As KeyboardInterrupt is: no Exception."""


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spoil(grads: Iterable[Tensor], value: float) -> None:
    """One element of one gradient."""
    for grad in grads:
        if grad.numel() > 0:
            grad.view(-1)[-1] = value
            return


def norm_of(grads: Grads) -> Tensor:
    squares = [g.double().square().sum() for g in grads.values()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(()).double()


class Optimizers(RuleBasedStateMachine):
    """The optimizer under test, the reference, and what is known of the weights and gradients."""

    instead: type[SAM] | None = None  # of the classes under test

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []  # w: the weights as they are, or have to come back
        self.perturbed: list[Tensor] | None = None  # w + e(w)
        self.first_grads: Grads = {}  # g1, while perturbed
        self.with_grad: set[int] = set()

    @initialize(
        variant=st.sampled_from(VARIANTS),
        base=st.sampled_from(BASES),
        adaptive=st.booleans(),
        backend=st.sampled_from(TESTED),
        half=st.booleans(),
        max_grad_norm=st.sampled_from([None, None, None, 0.5]),
        seed=seeds,
    )
    def build(
        self,
        variant: tuple[type[SAM], dict[str, Any]],
        base: tuple[type[torch.optim.Optimizer], dict[str, Any]],
        adaptive: bool,
        backend: str,
        half: bool,
        max_grad_norm: float | None,
        seed: int,
    ) -> None:
        (self.cls, own), (self.base, self.of_base) = variant, base
        self.rule = self.cls.__name__
        if self.instead is not None:
            self.cls, own, self.rule = self.instead, {}, "SAM"
        self.is_fused = not self.of_base.get("amsgrad", False)
        self.max_grad_norm = max_grad_norm
        self.dtype = torch.bfloat16 if half and self.is_fused else torch.float32
        self.weights = [values(shape, seed + i, self.dtype) for i, shape in enumerate(SHAPES)]
        options = {"rho": 0.25, "adaptive": adaptive, "lr": 0.125, **own}

        def groups(params: list[Any]) -> list[dict[str, Any]]:
            return [{"params": params[:3]}, {"params": params[3:], "rho": 0.5}]

        params = [nn.Parameter(w.clone()) for w in self.weights]
        self.use(self.new_optimizer(groups(params), backend, {**options, **self.of_base}))
        self.doubles = [w.double() for w in self.weights]
        defaults = [{**options, **self.of_base, **group} for group in groups(self.doubles)]
        self.reference: Any = self.base(defaults, **self.of_base)  # type: ignore[call-arg]

    # -- what the rules share ----------------------------------------------------------------------

    def new_optimizer(
        self, groups: list[dict[str, Any]], backend: str, options: dict[str, Any]
    ) -> SAM:
        self.backend = backend
        options = {"max_grad_norm": self.max_grad_norm, "backend": backend, **options}
        return self.cls(groups, self.base, **options)

    def use(self, optimizer: SAM) -> None:
        self.optimizer = optimizer
        self.params = parameters_of(optimizer)
        self.addresses = [p.data_ptr() for p in self.params]

    @property
    def is_perturbed(self) -> bool:
        return self.perturbed is not None

    @property
    def can_have_grad(self) -> bool:
        return any(p.requires_grad for p in self.params)

    def fails(
        self,
        error: type[BaseException] | tuple[type[BaseException], ...],
        text: str,
        act: Callable[[], object],
    ) -> None:
        with pytest.raises(error, match=text):
            act()

    def set_gradients(self, seed: int, scale: float = 1.0, without: Iterable[int] = ()) -> Grads:
        """A backward pass to what is not frozen: adds to what is there. Returns what it added."""
        skipped = {i % len(self.params) for i in without}
        reached = [i for i, p in enumerate(self.params) if p.requires_grad and i not in skipped]
        factor = scale if math.isfinite(scale) else 1.0
        grads = {
            i: factor * values(tuple(self.params[i].shape), seed + 31 * i, self.dtype)
            for i in reached
        }
        if not math.isfinite(scale):
            spoil(grads.values(), scale)
        if grads:  # by autograd, for its hooks
            copies = [grad.clone() for grad in grads.values()]
            torch.autograd.backward([self.params[i] for i in reached], copies)
        return grads

    def grads(self) -> Grads:
        return {i: p.grad.clone() for i, p in enumerate(self.params) if p.grad is not None}

    def has_grads(self) -> None:
        """What is there after a call that leaves it open."""
        self.with_grad = set(self.grads())

    def index_of_group(self, i: int) -> int:
        groups = enumerate(self.reference.param_groups)
        return next(n for n, g in groups if any(d is self.doubles[i] for d in g["params"]))

    def group_of(self, i: int) -> dict[str, Any]:
        """What the reference knows of it."""
        return self.reference.param_groups[self.index_of_group(i)]

    def ascent_norm(self, grads: Grads) -> Tensor:
        """||s * g1|| over all parameters."""
        return norm_of(
            {
                i: self.weights[i].double() * g.double() if self.group_of(i)["adaptive"] else g
                for i, g in grads.items()
            }
        )

    # -- what has to come out ----------------------------------------------------------------------

    def expect_perturbed(self, grads: Grads) -> None:
        """At w + rho * s^2 * g1 / (norm + eps), or at w if the norm is zero or not finite."""
        norm = self.ascent_norm(grads)
        for i, (p, w) in enumerate(zip(self.params, self.weights, strict=True)):
            if i not in grads or not norm.isfinite() or norm == 0:
                assert same_bits(p, w), "moved without a direction"
                continue
            group = self.group_of(i)
            e = group["rho"] / (norm + 1e-12) * grads[i].double()
            if group["adaptive"]:
                e = e * w.double().square()
            if group["maximize"]:
                e = -e
            self.assert_near_sum(p.detach(), w.double(), e)
        self.perturbed = snapshot(self.params)
        self.first_grads = grads
        self.with_grad = set()

    @staticmethod
    def assert_near_sum(p: Tensor, w: Tensor, e: Tensor) -> None:
        """p is w + e."""
        assert torch.equal(p[e == 0].double(), w[e == 0]), "moved without a gradient"
        # Rounded are: rho, the norm, + eps, the quotient, three products, the sum.
        error = 8 * helpers.unit_roundoff(p.dtype) * (w.abs() + e.abs())
        if p.dtype is torch.bfloat16:  # and then up or down: by less than the distance of two
            error += torch.finfo(p.dtype).eps * (w + e).abs()
        assert bool(((p.double() - (w + e)).abs() <= error).all()), "not at w + e(w)"

    def expect_restored(self) -> None:
        assert not self.optimizer.is_perturbed
        assert all(map(same_bits, self.params, self.weights)), "not restored"
        self.perturbed = None
        self.first_grads = {}

    def recombined(self, first: Grads, second: Grads) -> Grads:
        """u, of those that are updated."""
        first = {i: g.double() for i, g in first.items()}
        second = {i: g.double() for i, g in second.items()}
        if self.rule != "SAM":  # without g1, leave it alone
            second = {i: g for i, g in second.items() if i in first}
            first = {i: g for i, g in first.items() if i in second}  # over which n1 is
        n1, n2 = norm_of(first), norm_of(second)
        of_magnitude = n1 if self.rule == "SAMDirection" else n2
        clip = 1.0
        if self.max_grad_norm is not None:
            clip = (self.max_grad_norm / (of_magnitude + 1e-6)).clamp(max=1)
        result = {}
        for i, g2 in second.items():
            u = g2
            if self.rule != "SAM":
                granularity = self.group_of(i)["granularity"]
                g1 = first[i]
                magnitude, direction = (g1, g2) if self.rule == "SAMDirection" else (g2, g1)
                if granularity == "element":
                    u = magnitude.abs() * direction.sign()
                else:
                    norms = (n1, n2) if granularity == "global" else (g1.norm(), g2.norm())
                    of_one, of_other = norms if self.rule == "SAMDirection" else norms[::-1]
                    u = of_one / (of_other + 1e-12) * direction
            result[i] = clip * u
        return result

    def expect_updated(
        self, first: Grads, second: Grads, *, is_skipped: bool = False, error: float = 0.0
    ) -> None:
        """The base optimizer's step from w with u, g1 and g2 given; `error` of u is allowed."""
        assert not self.optimizer.is_perturbed
        u = self.recombined(first, second)
        if not self.ascent_norm(first).isfinite():
            is_skipped |= self.is_fused
            u = {i: torch.zeros_like(x) for i, x in u.items()}  # which others step with
        for i, (p, w) in enumerate(zip(self.params, self.weights, strict=True)):
            if is_skipped or i not in u:
                assert same_bits(p, w), "moved, though it had to stay"
        if is_skipped:
            self.adopt_state_of_a_skipped_step(u)
        else:
            for i, of_one in u.items():
                self.doubles[i].grad = of_one
            self.reference.step()
            for i, d in enumerate(self.doubles):
                d.grad = None
                if i in u:
                    self.assert_near_the_reference(i, u[i], error)
        self.perturbed = None
        self.first_grads = {}
        self.go_on()

    def adopt_state_of_a_skipped_step(self, updated: Grads) -> None:
        """A first step that was skipped may have left state that says nothing: the device knows
        that it was skipped, and the host does not. What was there before is still the reference's,
        which the invariant sees."""
        for i in updated:
            ours, theirs = self.state_of(i), self.reference.state[self.doubles[i]]
            for name, value in ours.items():
                if theirs.get(name) is None:
                    assert not value.any(), "a skipped step left something"
                    if self.is_nothing(name, value):
                        continue
                    theirs[name] = value.double() if name != "step" else value.clone()

    def is_nothing(self, name: str, value: Tensor | None) -> bool:
        """Whether this is a momentum whose steps were all skipped. With dampening the next one is u
        all the same, and checkpoints and copies leave it out."""
        is_momentum = name == "momentum_buffer" and "dampening" in self.of_base
        return is_momentum and (value is None or not value.any())

    def state_of(self, i: int) -> dict[str, Tensor]:
        return self.optimizer.state.get(self.params[i], {})

    def assert_near_the_reference(self, i: int, u: Tensor, error: float) -> None:
        """One step from the same bits: what differs are the roundings of this step."""
        p, d, group = self.params[i].detach(), self.doubles[i], self.group_of(i)
        theirs = {k: v for k, v in self.reference.state[d].items() if v is not None}
        # What a step that was skipped left, and none has used since: without momentum.
        ours = {
            k: v for k, v in self.state_of(i).items() if k in theirs or not self.is_nothing(k, v)
        }
        assert ours.keys() == theirs.keys()
        # u is off by some roundings: norms, quotient, product, weight decay, momentum, which is
        # stored in the dtype of p.
        eps = 2**-7 if self.dtype is torch.bfloat16 else 2**-22
        kept = theirs.get("exp_avg", theirs.get("momentum_buffer", torch.zeros(())))
        size = u.abs() + group["weight_decay"] * self.weights[i].double().abs() + kept.abs()
        of_u = error + (2**-19 + (eps if ours else 0)) * size
        steps = group["lr"] * 4 * of_u
        if self.base is not SGD:  # u is divided by the root of its mean square
            correction = 1 - group["betas"][1] ** float(theirs["step"])
            second = theirs.get("max_exp_avg_sq", theirs["exp_avg_sq"])
            steps = 2 * steps / ((second / correction).sqrt() + group["eps"])
        step = (d - self.weights[i].double()).abs()
        self.assert_near(p, d, steps + eps * (d.abs() + step))
        for name, value in ours.items():
            if name == "step":
                assert float(value) == float(theirs[name])
            elif name.endswith("_sq"):
                self.assert_near(value, theirs[name], 2 * of_u * size + eps * theirs[name])
            else:
                self.assert_near(value, theirs[name], 2 * of_u)

    @staticmethod
    def assert_near(a: Tensor, b: Tensor, error: Tensor) -> None:
        is_finite = b.isfinite()
        assert torch.equal(a.isfinite(), is_finite)
        near = (a.double() - b).abs() <= error + 1e-37
        assert bool(near[is_finite].all()), "not the reference's"

    def go_on(self) -> None:
        """The reference from our bits; both from the last weights and without state if training has
        become nan."""
        states = [self.state_of(i) for i in range(len(self.params))]
        kept = [value for of_one in states for value in of_one.values()]
        if all(bool(x.isfinite().all()) for x in (*self.params, *kept)):
            self.weights = snapshot(self.params)
            for d, of_one in zip(self.doubles, states, strict=True):
                for name, value in of_one.items():
                    theirs = self.reference.state[d].get(name)
                    if theirs is None:
                        assert self.is_nothing(name, value)
                    else:
                        theirs.copy_(value)
        else:
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": {}})
            self.reference.state.clear()
        with torch.no_grad():
            for p, d, w in zip(self.params, self.doubles, self.weights, strict=True):
                p.copy_(w)
                d.copy_(w)

    # -- gradients ---------------------------------------------------------------------------------

    @rule(seed=seeds, scale=scales, without=unreached)
    def backward(self, seed: int, scale: float, without: set[int]) -> None:
        self.set_gradients(seed, scale, without)
        self.has_grads()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none)
        if set_to_none:
            self.with_grad = set()

    @rule(index=indices, is_frozen=st.booleans())
    def lose_a_gradient(self, index: int, is_frozen: bool) -> None:
        i = index % len(self.weights)
        self.params[i].grad = None
        if is_frozen:
            self.params[i].requires_grad_(False)
        self.with_grad.discard(i)

    @rule()
    def unfreeze(self) -> None:
        for p in self.params:
            p.requires_grad_(True)

    # -- the steps ---------------------------------------------------------------------------------

    @rule(zero_grad=st.booleans())
    def first_step(self, zero_grad: bool) -> None:
        def act() -> None:
            self.optimizer.first_step(zero_grad=zero_grad)

        if self.is_perturbed:
            self.fails(RuntimeError, "first_step was called twice", act)
        elif not self.with_grad:
            self.fails(RuntimeError, "first_step found no gradient", act)
        else:
            grads = self.grads()
            act()
            self.expect_perturbed(grads)

    @rule(zero_grad=st.sampled_from([None, False, True]))
    def second_step(self, zero_grad: bool | None) -> None:
        """None: by step()."""

        def act() -> None:
            if zero_grad is None:
                self.optimizer.step()
            else:
                self.optimizer.second_step(zero_grad)

        if not self.is_perturbed:
            text = "needs two gradients" if zero_grad is None else "without first_step"
            self.fails(RuntimeError, text, act)
        elif not self.with_grad:
            self.fails(RuntimeError, "second_step found no gradient", act)
            self.expect_restored()
        else:
            second_grads = self.grads()
            act()
            self.expect_updated(self.first_grads, second_grads)
            if zero_grad:
                self.with_grad = set()

    @rule(seed=seeds, scale=st.tuples(scales, scales), without=st.tuples(unreached, unreached))
    def step_with_a_closure(
        self, seed: int, scale: tuple[float, float], without: tuple[set[int], set[int]]
    ) -> None:
        """At w and at w + e(w), or where g1 is there already, at w + e(w) only."""
        grads: dict[bool, Grads] = {}  # after the call at w, and at w + e(w)

        def closure() -> float:
            second = self.optimizer.is_perturbed
            assert second not in grads
            self.set_gradients(seed + second, scale[second], without[second])
            grads[second] = self.grads()
            return float(second)

        def act() -> None:
            assert self.optimizer.step(closure) == (None if has_first else 0.0)

        has_first = self.is_perturbed or bool(self.with_grad)
        first_grads = self.first_grads if self.is_perturbed else self.grads()
        reached = [
            {i for i, p in enumerate(self.params) if p.requires_grad}
            - {i % len(self.weights) for i in skipped}
            for skipped in without
        ]
        if self.is_perturbed and not reached[True] and not self.with_grad:
            self.fails(RuntimeError, "second_step found no gradient", act)
            self.expect_restored()
        elif not self.is_perturbed and not (reached[True] and (has_first or reached[False])):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it called no backward
                act()
            self.expect_restored()
        else:
            act()
            assert list(grads) == ([True] if has_first else [False, True])
            self.expect_updated(first_grads if has_first else grads[False], grads[True])
        self.with_grad = set()

    @precondition(lambda self: not self.is_perturbed and self.can_have_grad)
    @rule(seed=seeds, do=st.sampled_from(["raise", "raise later", "first_step", "restore"]))
    def step_with_a_closure_that_fails(self, seed: int, do: str) -> None:
        """It raises, or makes a step of its own, which raises."""
        if do == "raise" and self.with_grad:
            return  # there is g1 already: the closure is called once

        def closure() -> None:
            self.set_gradients(seed)
            if do == "raise" or (do == "raise later" and self.optimizer.is_perturbed):
                raise Interrupted("in the closure")
            if self.optimizer.is_perturbed:
                getattr(self.optimizer, do)()

        text = "in the closure|first_step was|made a"
        self.fails((Interrupted, RuntimeError), text, lambda: self.optimizer.step(closure))
        self.expect_restored()
        self.with_grad = set()  # what the closure left is not taken for g1

    @rule(seed=seeds, in_backward=st.booleans())
    def an_exception_in_the_body_of_perturbed(self, seed: int, in_backward: bool) -> None:
        def act() -> None:
            with self.optimizer.perturbed():
                assert self.optimizer.is_perturbed
                if not in_backward:
                    self.set_gradients(seed)
                raise Interrupted("in the body")

        if self.is_perturbed:
            self.fails(RuntimeError, "first_step was called twice", act)
        elif not self.with_grad:
            self.fails(RuntimeError, "first_step found no gradient", act)
        else:
            self.fails(Interrupted, "in the body", act)
        self.expect_restored()
        self.has_grads()

    @precondition(lambda self: self.with_grad)
    @rule(count=st.integers(0, 2), moves=st.booleans())
    def an_interrupt_in_a_step(self, count: int, moves: bool) -> None:
        """In the first step before or after one of the groups has moved, in the second one before
        anything has."""
        names = ["sgd_", "adam_", "mix_"] if self.is_perturbed else ["perturb_"]
        of_optimizer = backends.get(self.backend)
        original, calls = of_optimizer.perturb_, []

        def interrupted(*args: Any, **kwargs: Any) -> None:
            calls.append(args)
            if len(calls) > count or self.is_perturbed:
                if moves and not self.is_perturbed:
                    original(*args, **kwargs)
                raise Interrupted("in an op")
            original(*args, **kwargs)

        first_grads, second_grads = self.first_grads, self.grads()
        with mock.patch.multiple(of_optimizer, **dict.fromkeys(names, interrupted)):
            try:
                getattr(self.optimizer, "step" if self.is_perturbed else "first_step")()
            except Interrupted:
                self.expect_restored()
                self.has_grads()
                return
        # There were no groups that many, or none with both gradients.
        if self.is_perturbed:
            assert not calls
            self.expect_updated(first_grads, second_grads)
        else:
            self.expect_perturbed(second_grads)

    @precondition(lambda self: not self.is_perturbed and self.can_have_grad)
    @rule(seed=seeds, count=st.integers(1, 3), breaks_off=st.booleans())
    def step_in_parts(self, seed: int, count: int, breaks_off: bool) -> None:
        """m-sharpness: each part of a batch perturbs by itself."""
        self.zero_grad(True)
        grads: tuple[list[Grads], list[Grads]] = ([], [])

        def act() -> None:
            for part in self.optimizer.parts(range(count)):
                assert all(map(same_bits, self.params, self.weights)), "a part starts elsewhere"
                grads[0].append(self.set_gradients(seed + 2 * part))
                self.optimizer.first_step()
                grads[1].append(self.set_gradients(seed + 2 * part + 1))
                if breaks_off and part == count - 1:
                    raise Interrupted("in the last part")
            self.optimizer.step()

        if breaks_off:
            self.fails(Interrupted, "in the last part", act)
            # The generator ends when nobody holds it any more, which here is at once.
            self.expect_restored()
        else:
            act()
            first, second = (
                {i: sum(g[i].double() for g in parts) / count for i in parts[0]} for parts in grads
            )
            error = 0.0 if count == 1 else 2**-5 if self.dtype is torch.bfloat16 else 2**-18
            self.expect_updated(first, second, error=error)
        self.has_grads()

    @rule()
    def restore(self) -> None:
        self.optimizer.restore()
        self.expect_restored()

    @precondition(lambda self: not self.is_perturbed)
    @rule(seed=seeds, overflow=st.sampled_from(["", "first", "second", "first and second"]))
    def step_with_a_grad_scaler(self, seed: int, overflow: str) -> None:
        """Of a loss that is multiplied with 1024; `overflow`: whose gradients are not finite."""
        self.zero_grad(True)
        if not any(p.requires_grad and p.numel() > 0 for p in self.params):
            return
        # The scaler itself sees g2 only; an optimizer that knows it passes on what was in g1.
        is_seen = "second" in overflow or ("first" in overflow and self.optimizer._meets_scaler)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))  # or it has no scale yet
        unscaled = []
        for which in ("first", "second"):
            grads = self.set_gradients(seed + len(which), 1024.0)
            if which in overflow:
                spoil((p.grad for p in self.params if p.grad is not None), math.inf)
                spoil(grads.values(), math.inf)
            unscaled.append({i: g / 1024 for i, g in grads.items()})
            if which == "first":
                self.optimizer.first_step()
        scaler.step(self.optimizer)
        scaler.update()
        assert scaler.get_scale() == (512 if is_seen else 1024)
        self.expect_updated(*unscaled, is_skipped=is_seen)
        self.has_grads()

    # -- checkpoints and copies --------------------------------------------------------------------

    @rule(as_file=st.booleans(), backend=st.sampled_from(TESTED))
    def resume_in_a_new_optimizer(self, as_file: bool, backend: str) -> None:
        """Of any backend, with other options, which the checkpoint has to correct."""
        if self.is_perturbed:
            checkpoint: dict[str, Any] = {"state": {}, "param_groups": []}
            self.fails(RuntimeError, "^state_dict between", self.optimizer.state_dict)
            act = self.optimizer.load_state_dict
            self.fails(RuntimeError, "load_state_dict", lambda: act(checkpoint))
            return
        checkpoint = self.optimizer.state_dict()
        checkpoint = through_a_file(checkpoint) if as_file else copy.deepcopy(checkpoint)
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        wrong = {"rho": 9.0, "adaptive": True, "lr": 9.0, "weight_decay": 9.0}
        self.optimizer = self.new_optimizer(groups, backend, wrong)
        self.optimizer.load_state_dict(checkpoint)

    @rule(copied=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def go_on_with_a_copy(self, copied: Callable[[SAM], SAM]) -> None:
        if self.is_perturbed:
            text = "copying or pickling between"
            self.fails(RuntimeError, text, lambda: copied(self.optimizer))
            return
        self.use(copied(self.optimizer))
        self.with_grad = set()  # PyTorch copies parameters without

    # -- groups and hyperparameters ----------------------------------------------------------------

    @precondition(lambda self: len(self.weights) < 8)
    @rule(
        seed=seeds,
        options=st.sampled_from([{}, {"rho": 1.0}, {"lr": 0.5, "adaptive": True}, {"rho": 0.0}]),
    )
    def add_a_group(self, seed: int, options: dict[str, Any]) -> None:
        """Also while the others are perturbed."""
        w = values((4, 2), seed, self.dtype)
        self.optimizer.add_param_group({"params": [nn.Parameter(w.clone())], **options})
        self.use(self.optimizer)
        self.doubles.append(w.double())
        defaults = {**self.optimizer.defaults, **options}
        self.reference.add_param_group({**defaults, "params": self.doubles[-1:]})
        for weights in (self.weights, self.perturbed):
            if weights is not None:
                weights.append(w)

    @rule(options=st.sampled_from([{"rho": -1.0}, {"adaptive": 1}, {}]))
    def add_a_bad_group(self, options: dict[str, Any]) -> None:
        """Of options that are none, or of a parameter that is in another group."""
        p = nn.Parameter(torch.ones(2)) if options else self.params[0]
        act = self.optimizer.add_param_group
        text = "rho of|adaptive of|more than one parameter group"
        self.fails((TypeError, ValueError), text, lambda: act({"params": [p], **options}))

    @rule(
        index=indices,
        change=st.one_of(
            st.tuples(st.just("lr"), st.sampled_from([0.0, 0.0625, 0.3])),
            st.tuples(st.just("rho"), st.sampled_from([0.0, 0.1, 2.0])),
            st.tuples(st.just("momentum"), st.sampled_from([0.0, 0.5, 0.9])),
            st.tuples(st.just("betas"), st.sampled_from([(0.0, 0.5), (0.8, 0.99)])),
            st.tuples(st.just("weight_decay"), st.sampled_from([0.0, 0.25])),
        ),
        as_tensor=st.booleans(),
    )
    def change_a_hyperparameter(self, index: int, change: tuple[str, Any], as_tensor: bool) -> None:
        name, value = change
        index %= len(self.reference.param_groups)
        group = self.reference.param_groups[index]
        if name not in group or (name == "momentum" and group["nesterov"] and value == 0):
            return
        is_tensor = as_tensor and name in ("lr", "rho") and self.is_fused
        new = torch.tensor(value, dtype=torch.float64) if is_tensor else value
        self.optimizer.param_groups[index][name] = new
        group[name] = value

    @precondition(lambda self: self.with_grad)
    @rule(index=indices)
    def step_with_a_bad_hyperparameter(self, index: int) -> None:
        """In one group of several: nothing moves in any of them."""
        step, name = ("second_step", "lr") if self.is_perturbed else ("first_step", "rho")
        users = sorted(self.with_grad)
        if step == "second_step":
            if not self.is_fused:
                return  # PyTorch's takes any lr
            if self.rule != "SAM":
                users = [i for i in users if i in self.first_grads]
        if not users:
            return
        group = self.optimizer.param_groups[self.index_of_group(users[index % len(users)])]
        good, group[name] = group[name], float("nan")
        self.fails(ValueError, f"{name}=nan", getattr(self.optimizer, step))
        group[name] = good
        self.expect_restored()

    @precondition(lambda self: not self.is_perturbed)
    @rule(index=indices, seed=seeds)
    def write_weights(self, index: int, seed: int) -> None:
        """As loading a model does, or averaging."""
        i = index % len(self.weights)
        self.weights[i] = values(tuple(self.weights[i].shape), seed, self.dtype)
        with torch.no_grad():
            self.params[i].copy_(self.weights[i])
            self.doubles[i].copy_(self.weights[i])

    # -- after every call --------------------------------------------------------------------------

    @invariant()
    def weights_are_where_they_belong(self) -> None:
        assert self.optimizer.is_perturbed is self.is_perturbed
        assert [p.data_ptr() for p in self.params] == self.addresses, "an address changed"
        assert set(self.grads()) == self.with_grad
        expected = self.weights if self.perturbed is None else self.perturbed
        assert all(map(same_bits, self.params, expected)), "not where they belong"

    @invariant()
    def state_and_hyperparameters_are_the_references(self) -> None:
        for i, d in enumerate(self.doubles):
            ours, theirs = self.state_of(i), self.reference.state.get(d, {})
            for name in ours.keys() | theirs.keys():
                a, b = ours.get(name), theirs.get(name)
                if b is None and self.is_nothing(name, a):
                    continue
                assert (a is None) == (b is None), f"no {name}"
                assert a is None or b is None or torch.equal(a.double(), b.double()), name
        groups = self.optimizer.param_groups
        assert [id(p) for group in groups for p in group["params"]] == [*map(id, self.params)]
        for group, expected in zip(groups, self.reference.param_groups, strict=True):
            assert len(group["params"]) == len(expected["params"])
            for name, value in expected.items():
                assert name == "params" or group[name] == value, name

    @invariant()
    def nothing_is_kept_but_the_state_of_the_base_optimizer(self) -> None:
        optimizer = self.optimizer
        assert optimizer.param_groups is optimizer.base_optimizer.param_groups
        assert optimizer.state is optimizer.base_optimizer.state
        assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
        assert all(state.keys() <= SAVED[self.base] for state in optimizer.state.values())
        if not self.is_perturbed:
            assert not any(p._post_accumulate_grad_hooks for p in self.params)
            assert optimizer.state_dict().keys() == {"state", "param_groups"}


@pytest.mark.parametrize("number", [30, pytest.param(120, marks=pytest.mark.full)])
def test_calls_in_any_order(number: int) -> None:
    few = settings(SETTINGS, max_examples=EXAMPLES or number)
    run_state_machine_as_test(Optimizers, settings=few)


# -- the machine notices wrong optimizers ----------------------------------------------------------


class RestoresByArithmetic(SAM):
    """Some bits are lost."""

    def restore(self) -> None:
        moved = self.is_perturbed
        super().restore()
        for p in self._all_params() if moved else ():
            p.data.add_(1.0).sub_(1.0)


class StaysPerturbed(SAM):
    """After an exception."""

    def perturbed(self) -> AbstractContextManager[None]:  # type: ignore[override]
        self.first_step()
        return nullcontext()


class LeavesGradients(SAM):
    """Of a closure that was interrupted: the next step would take them for g1."""

    def _step(self, closure: Any) -> Any:
        try:
            return super()._step(closure)
        except Interrupted:
            for p in self._all_params():
                p.grad = torch.ones_like(p)
            raise


class SavesPerturbed(SAM):
    """Checkpoints with weights that are not to be kept."""

    def _require_unperturbed(self, what: str) -> None:
        pass


class MovesWeights(SAM):
    """They are restored, elsewhere."""

    def restore(self) -> None:
        super().restore()
        for p in self._all_params():
            p.data = p.data.clone()


class StartsAtPerturbedWeights(SAM):
    """The update is one of w + e(w)."""

    def _second_step(self) -> None:
        for slot in self._perturbation.slots:  # type: ignore[union-attr]
            slot.old.copy_(slot.param)
        super()._second_step()


class SavesScratch(SAM):
    """Something of its own in the state."""

    def _second_step(self) -> None:
        moved = list(self._perturbation.slots)  # type: ignore[union-attr]
        super()._second_step()
        for slot in moved:
            self.state[slot.param]["old_param"] = slot.old


class LoadsNoState(SAM):
    """Momentum starts anew after a resume."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})


class StepsWithTheFirstLr(SAM):
    """A scheduler is not heard."""

    def _second_step(self) -> None:
        now = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = self.defaults["lr"]
        try:
            super()._second_step()
        finally:
            for group, lr in zip(self.param_groups, now, strict=True):
                group["lr"] = lr


class ForgetsAddedGroups(SAM):
    """Those that were not there from the beginning are not perturbed."""

    def direction(self, x: Lists) -> str | Combination:
        known = any(x.group is group for group in self.param_groups[:2])
        return "g1" if known else linear(g1=0.0)


class TakesOneNormPerTensor(SAM):
    def first_step(self, zero_grad: bool = False, **options: Any) -> bool:
        self._axes = self._axes._replace(norm="tensor")
        return super().first_step(zero_grad, **options)


class StepsAfterOverflow(SAM):
    """What a GradScaler found is not looked at."""

    def _of_scaler(self, name: str) -> Any:
        return None if name == "found_inf" else super()._of_scaler(name)


@pytest.mark.full
@pytest.mark.parametrize(
    "wrong",
    [
        RestoresByArithmetic,
        StaysPerturbed,
        LeavesGradients,
        SavesPerturbed,
        MovesWeights,
        StartsAtPerturbedWeights,
        SavesScratch,
        LoadsNoState,
        StepsWithTheFirstLr,
        ForgetsAddedGroups,
        TakesOneNormPerTensor,
        StepsAfterOverflow,
    ],
)
def test_wrong_optimizers_are_noticed(wrong: type[SAM]) -> None:
    class Wrong(Optimizers):
        instead = wrong

    quick = settings(SETTINGS, max_examples=150, derandomize=True, phases=[Phase.generate])
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_state_machine_as_test(Wrong, settings=quick)
