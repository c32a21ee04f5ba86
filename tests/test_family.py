"""Every variant of SAM against its formula: fifty steps on changing batches, in float64."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import samkernels
from samkernels import SAM
from samkernels.optim._onepass import OnePass
from samkernels.optim._rule import Option, linear, options
from samkernels.optim.when import Bernoulli, FromStep, GradientNormPolicy, Periodic
from tests import family
from tests.family import Network, Run, loss
from tests.optim_helpers import same_bits, snapshot, through_a_file, unchanged

STEPS = 50
Rule = Callable[[Run], None]


@dataclass(frozen=True)
class Row:
    """A variant: its class, its rule, its own options, and what is usual of SAM's."""

    cls: type[SAM]
    rule: Rule
    options: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] = field(default_factory=dict)  # own options of the second group
    rho: float = 0.1
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.cls.__name__


FAMILY = (
    Row(samkernels.SAM, family.sam),
    Row(samkernels.SAMDirection, family.samdirection, {"granularity": "global"}),
    Row(samkernels.SAMMagnitude, family.sammagnitude, {"granularity": "global"}),
    Row(samkernels.GSAM, family.gsam, {"alpha": 0.4}, {"alpha": 0.2}),
    Row(samkernels.WSAM, family.wsam, {"gamma": 0.8, "max_norm": 0.5}, {"gamma": 0.4}),
    Row(samkernels.WSAM, family.wsam_coupled, {"gamma": 0.8, "decouple": False}, name="WSAM, u"),
    Row(samkernels.GradientNormPenalty, family.penalty, {"alpha": 0.7}, {"alpha": 0.3}),
    Row(
        samkernels.GradientNormPenalty,
        family.penalty_normed,
        {"alpha": 0.7, "normed": True},
        name="GradientNormPenalty, normed",
    ),
    Row(
        samkernels.FriendlySAM,
        family.friendly,
        {"sigma": 0.9, "lmbda": 0.6},
        {"sigma": 0.5, "lmbda": 0.8},
    ),
    Row(samkernels.VaSSO, family.vasso, {"theta": 0.4}, {"theta": 0.7}),
    Row(samkernels.LookSAM, family.look, {"k": 5, "alpha": 0.3}, {"alpha": 0.1}),
    Row(samkernels.SANER, family.saner, {"alpha": 0.5}, {"alpha": 0.2}),
    Row(samkernels.XSAM, family.xsam, {"a": 1.3}, {"a": 0.8}),
    Row(samkernels.MSAM, family.msam, rho=0.5),
)


def row_of(cls: type[SAM]) -> Row:
    return next(row for row in FAMILY if row.cls is cls)


each_row = pytest.mark.parametrize("row", FAMILY, ids=str)

SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01})
NESTEROV = (torch.optim.SGD, {**SGD[1], "nesterov": True})
ADAM = (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01})
ADAMW = (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1})
RMSPROP = (torch.optim.RMSprop, {"lr": 0.002, "momentum": 0.5})
BASES = {"SGD": SGD, "Nesterov": NESTEROV, "Adam": ADAM, "AdamW": ADAMW, "RMSprop": RMSPROP}
NOT_RMSPROPS = ("rho", "alpha", "k", "normed")
FUSED = ("SGD", "Nesterov", "Adam", "AdamW")


def halves(model: Network) -> list[list[torch.nn.Parameter]]:
    params = list(model.parameters())
    return [params[:3], params[3:]]


def groups_of(row: Row, base: str, model: Network) -> list[dict[str, Any]]:
    """Two groups with rho, lr and own options of their own."""
    first, second = halves(model)
    options = BASES[base][1]
    one = {"params": first, "rho": row.rho, **row.options}
    other = {
        "params": second,
        **{**row.options, **row.second},
        "rho": row.rho / 2,
        "lr": options["lr"] / 2,
        "weight_decay": options["weight_decay"] / 2 if "weight_decay" in options else 0.0,
    }
    return [one, other]


def trained(
    row: Row,
    base: str = "SGD",
    *,
    backend: str = "reference",
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
    **axes: Any,
) -> tuple[Network, SAM]:
    model = Network().to(dtype)
    groups = groups_of(row, base, model)
    cls, options = BASES[base]
    if "alpha" in row.options and base == "RMSprop":  # which has an alpha of its own
        of_base = [{k: v for k, v in group.items() if k not in NOT_RMSPROPS} for group in groups]
        instance = cls(of_base, **options)
        own = {"params", "rho", *row.options}
        of_variant = [
            {("sam_alpha" if k == "alpha" else k): v for k, v in group.items() if k in own}
            for group in groups
        ]
        optimizer = row.cls(of_variant, instance, backend=backend, **axes)
    else:
        optimizer = row.cls(groups, cls, backend=backend, **options, **axes)
    take_steps(model, optimizer, range(steps))
    return model, optimizer


def take_steps(model: Network, optimizer: SAM, steps: range) -> None:
    for step in steps:

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            return value

        assert optimizer.step(closure) is not None


def by_rule(row: Row, base: str = "SGD", steps: int = STEPS, **axes: Any) -> Network:
    model = Network()
    rule = axes.pop("rule", row.rule)
    is_moved = axes.pop("is_moved", [True] * 6)
    is_scaled = axes.pop("is_scaled", [True] * 6)
    groups = groups_of(row, base, model)
    cls, options = BASES[base]
    known = set(cls([torch.zeros(1)], **options).param_groups[0]) | {"params"}
    known -= set(row.options)
    of_base = [{k: v for k, v in group.items() if k in known} for group in groups]
    of_params = [{**options, **group} for group in groups for _ in group["params"]]
    run_class = axes.pop("run_class", Run)
    run = run_class(model, of_params, cls(of_base, **options), is_moved, is_scaled, axes)
    for step in range(steps):
        run.t = step
        (rule(step) if rule is not row.rule else rule)(run)
    return model


def assert_same(actual: Network, expected: Network) -> None:
    for (name, p), q in zip(actual.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def weights_of(model: Network, optimizer: SAM) -> Network:
    """The network at w, where the optimizer leaves it elsewhere between the steps."""
    if row_has_one_pass(optimizer):
        optimizer.restore()
    return model


@each_row
@pytest.mark.parametrize("base", BASES)
def test_a_variant_equals_its_formula(row: Row, base: str) -> None:
    if row.cls is samkernels.MSAM and base not in FUSED:
        with pytest.raises(TypeError, match="momentum"):
            trained(row, base)
        return
    assert_same(weights_of(*trained(row, base)), by_rule(row, base))


AXES = {
    "adaptive": {"adaptive": True},
    "eta": {"scaling": "elementwise", "eta": 0.05},
    "tensor scaling": {"scaling": "tensor"},
    "one norm per tensor": {"norm": "tensor"},
    "no norm": {"norm": None},
    "layer": {"scaling": "tensor", "norm": "tensor"},
}


@each_row
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_every_variant_with_every_scaling(row: Row, axes: dict[str, Any]) -> None:
    assert_same(weights_of(*trained(row, **axes)), by_rule(row, **axes))


@pytest.mark.parametrize("decouple", [True, False])
def test_wsam_clips_each_gradient_by_its_own_norm(decouple: bool) -> None:
    max_norm = 0.6

    def clipped(g: torch.Tensor) -> torch.Tensor:
        norms.append(float(g.norm()))
        return g * min(1.0, max_norm / (norms[-1] + 1e-6))

    def rule(r: Run) -> None:
        g1 = r.grad()
        g2 = r.grad(r.up(g1))
        g1, g2 = clipped(g1), clipped(g2)
        alpha = r.option("gamma") / (1 - r.option("gamma"))
        r.step(g1 if decouple else (1 - alpha) * g1 + alpha * g2)
        if decouple:
            r.set(r.w - r.option("lr") * alpha * (g2 - g1))

    norms: list[float] = []
    options = {"gamma": 0.6, "decouple": decouple, "max_norm": max_norm}
    row = Row(samkernels.WSAM, rule, options, {"gamma": 0.4})
    assert_same(trained(row, steps=12)[0], by_rule(row, steps=12))
    assert min(norms) < max_norm < max(norms)


@each_row
@pytest.mark.parametrize("adaptive", [False, True])
def test_every_variant_on_a_subset(row: Row, adaptive: bool) -> None:
    model = Network()
    is_moved = ["norm" in name for name, _ in model.named_parameters()]
    cls, options = BASES["SGD"]
    groups = groups_of(row, "SGD", model)
    chosen = [p for p, moved in zip(model.parameters(), is_moved, strict=True) if moved]
    optimizer = row.cls(
        groups, cls, **options, adaptive=adaptive, subset=chosen, backend="reference"
    )
    take_steps(model, optimizer, range(STEPS))
    assert_same(weights_of(model, optimizer), by_rule(row, is_moved=is_moved, adaptive=adaptive))


def test_asam_scales_what_is_called_a_weight() -> None:
    model = Network()
    named = {p: (name, p) for name, p in model.named_parameters()}
    row = Row(samkernels.ASAM, family.sam)
    groups = groups_of(row, "SGD", model)
    for group in groups:
        group["params"] = [named[p] for p in group["params"]]
    optimizer = samkernels.ASAM(groups, torch.optim.SGD, backend="reference", **SGD[1])
    take_steps(model, optimizer, range(STEPS))
    is_scaled = ["weight" in name for name, _ in named.values()]
    expected = by_rule(row, is_scaled=is_scaled, scaling="elementwise", eta=0.01)
    assert_same(model, expected)


def test_one_tensor_that_is_not_finite_lets_none_move() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SAM(params, lr=0.1, norm="tensor", momentum=0.9)
    for make_step in (optimizer.first_step, optimizer.second_step):
        for p, grad in zip(params, (1.0, float("inf")), strict=True):
            p.grad = torch.full((2,), grad)
        make_step()
        assert all(p.eq(1).all() for p in params)


def test_norm_parameters_are_those_of_every_kind_of_normalisation() -> None:
    class OwnNorm(torch.nn.LayerNorm):
        pass

    norms = [
        torch.nn.BatchNorm1d(2), torch.nn.LayerNorm(2), torch.nn.GroupNorm(1, 2), OwnNorm(2),
        torch.nn.InstanceNorm1d(2, affine=True),
    ]  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), *norms)
    found = samkernels.norm_parameters(model)
    assert [id(p) for p in found] == [id(p) for norm in norms for p in norm.parameters()]
    with pytest.raises(ValueError, match="no normalisation layer"):
        samkernels.norm_parameters(model[0])


@each_row
def test_every_variant_with_a_mask(row: Row) -> None:
    model = Network()
    generator = torch.Generator().manual_seed(3)
    masks = {
        p: torch.rand(p.shape, generator=generator, dtype=torch.float64).round()
        for p in model.parameters()
    }
    cls, options = BASES["SGD"]
    optimizer = row.cls(
        groups_of(row, "SGD", model), cls, **options, mask=masks, backend="reference"
    )
    take_steps(model, optimizer, range(STEPS))
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    assert_same(weights_of(model, optimizer), by_rule(row, mask=flat))


# -- which steps have a second pass ----------------------------------------------------------------


POLICIES = {
    "periodic": (Periodic(3), lambda step: (step + 1) % 3 == 0),
    "late": (FromStep(7), lambda step: step >= 7),
    "never": (Bernoulli(0.0), lambda step: False),
    "always": (Bernoulli(1.0), lambda step: True),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("row", FAMILY[:4], ids=str)
def test_steps_without_a_second_pass_are_the_base_optimizers(row: Row, policy: Any) -> None:
    when, wants = policy
    expected = by_rule(row, steps=20, rule=lambda step: row.rule if wants(step) else family.plain)
    calls = []
    model = Network()
    cls, options = BASES["SGD"]
    optimizer = row.cls(
        groups_of(row, "SGD", model), cls, when=when, backend="reference", **options
    )
    for step in range(20):
        assert optimizer.needs_second_pass is wants(step)

        def closure(step: int = step) -> torch.Tensor:
            calls.append(step)
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            return value

        optimizer.step(closure)
    assert_same(model, expected)
    assert calls == [s for step in range(20) for s in [step] * (1 + wants(step))]


def test_bernoulli_draws_from_seed_and_step_alone() -> None:
    draws = [Bernoulli(0.3, seed=1).wants(step, 0.0, {}) for step in range(4000)]
    again = Bernoulli(0.3, seed=1)
    torch.manual_seed(0)
    assert draws == [again.wants(step, 0.0, {}) for step in reversed(range(4000))][::-1]
    assert draws != [Bernoulli(0.3, seed=2).wants(step, 0.0, {}) for step in range(4000)]
    assert abs(sum(draws) / 4000 - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5  # four deviations
    growing = Bernoulli(lambda step: step / 100)
    assert not growing.wants(0, 0.0, {}) and growing.wants(100, 0.0, {})


def test_the_norm_policy_by_hand() -> None:
    policy = GradientNormPolicy(l1=1.0, l2=-1.0, steps=4, decay=0.5)
    memory: dict[str, float] = {}
    assert policy.wants(0, 4.0, memory)  # mean 4, variance 0
    # mean 0.5 * 4 + 0.5 * 2 = 3, variance 0.5 * 0 + 0.5 * (2 - 3)^2 = 0.5, c = -0.5
    assert not policy.wants(1, 2.0, memory)
    assert memory == {"mean": 3.0, "variance": 0.5}
    # mean 3.5, variance 0.25 + 0.5 * 0.25 = 0.375, c = 0
    assert policy.wants(2, 4.0, memory)
    assert policy.wants(2, float("inf"), memory) and memory["mean"] == 3.5


@pytest.mark.parametrize(
    ("square", "step", "wants"),
    # (s - 3) / 2 >= c * sqrt(1 + (s - 3)^2 / 8), c = step / 10 - 1, from step 20 on 1
    [(1.0, 1, True), (1.0, 2, False), (5.0, 18, True), (5.0, 19, False), (13.0, 60, True)],
)
def test_the_norm_policy_goes_from_l2_to_l1(square: float, step: int, wants: bool) -> None:
    policy = GradientNormPolicy(l1=1.0, l2=-1.0, steps=20, decay=0.5)
    memory = {"mean": 3.0, "variance": 2.0}
    assert policy.wants(step, square, memory) is wants
    assert memory["variance"] == pytest.approx(1 + (square - 3) ** 2 / 8)


def test_the_norm_policy_begins_with_a_second_pass_whatever_rounds() -> None:
    for decay in (0.1, 0.3, 0.7, 0.9):
        policy = GradientNormPolicy(l1=0.0, l2=0.0, steps=4, decay=decay)
        assert all(policy.wants(0, k / 7, {}) for k in range(1, 200))


def test_a_norm_policy_is_asked_by_first_step() -> None:
    row = FAMILY[0]
    model = Network()
    when = GradientNormPolicy(l1=0.0, l2=0.0, steps=10)
    optimizer = SAM(groups_of(row, "SGD", model), when=when, backend="reference", **SGD[1])
    answers = []
    for step in range(10):
        assert optimizer.needs_second_pass
        loss(model, step).backward()
        answers.append(optimizer.first_step())
        assert optimizer.is_perturbed is answers[-1]
        if optimizer.is_perturbed:
            loss(model, step).backward()
        optimizer.second_step(zero_grad=True)
    assert answers[0] and {True, False} == set(answers)
    assert optimizer.param_groups[1]["sam_step"] == 10


def test_a_second_backward_replaces_g1_where_none_was_asked_for() -> None:
    a, b = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    for p, grads in ((a, [1.0, 3.0]), (b, [3.0])):
        optimizer = SAM([p], lr=0.1, when=FromStep(100), backend="reference")
        p.grad = torch.full_like(p, grads[0])
        assert not optimizer.first_step()
        if len(grads) > 1:
            p.grad = torch.full_like(p, grads[1])
        optimizer.second_step()
    assert torch.equal(a, b) and float(a[0].detach()) == pytest.approx(0.7)


# -- state -----------------------------------------------------------------------------------------


def copies(row: Row, backend: str = "reference", **axes: Any) -> tuple[Network, SAM]:
    model = Network()
    cls, options = BASES["SGD"]
    return model, row.cls(groups_of(row, "SGD", model), cls, backend=backend, **options, **axes)


@each_row
@pytest.mark.parametrize("steps", [1, 7])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(row: Row, steps: int) -> None:
    expected, optimizer = copies(row)
    take_steps(expected, optimizer, range(steps))
    saved = through_a_file({"model": expected.state_dict(), "optimizer": optimizer.state_dict()})
    take_steps(expected, optimizer, range(steps, steps + 6))
    model, resumed = copies(row)
    model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    take_steps(model, resumed, range(steps, steps + 6))
    assert unchanged(model.parameters(), list(expected.parameters()))


class MakesItsOwnStep(torch.optim.SGD):
    """A subclass may have changed anything, so no kernel serves it."""


@pytest.mark.parametrize("backend", ["native", "foreach"])
@each_row
def test_a_step_of_the_base_s_own_is_that_of_the_kernels(row: Row, backend: str) -> None:
    weights = []
    for cls in (torch.optim.SGD, MakesItsOwnStep):
        model = Network().to(torch.float32)
        optimizer = row.cls(groups_of(row, "SGD", model), cls, backend=backend, **SGD[1])
        take_steps(model, optimizer, range(8))
        weights.append(list(weights_of(model, optimizer).parameters()))
    torch.testing.assert_close(weights[0], weights[1])


class Fails(torch.optim.SGD):
    """A base optimizer that is interrupted in its own step, when it has written a weight."""

    def step(self, closure: Any = None) -> None:
        self.param_groups[0]["params"][0].data.add_(1.0)
        raise KeyboardInterrupt


# With one pass there is no w beside the parameters before there is momentum.
@pytest.mark.parametrize("row", [r for r in FAMILY if not issubclass(r.cls, OnePass)], ids=str)
def test_a_base_optimizer_that_fails_loses_no_weights(row: Row) -> None:
    model = Network()
    optimizer = row.cls(groups_of(row, "SGD", model), Fails, **SGD[1])
    before = snapshot(model.parameters())
    with pytest.raises(KeyboardInterrupt):
        take_steps(model, optimizer, range(1))
    assert unchanged(model.parameters(), before)


def transpose_memory(model: Network) -> None:
    for p in model.parameters():
        if p.ndim == 2:
            p.data = p.data.t().contiguous().t()


@each_row
def test_state_goes_with_parameters_that_are_laid_out_anew(row: Row) -> None:
    """As model.to() does it: mid-training, and after a checkpoint was loaded."""
    expected, optimizer = copies(row)
    take_steps(expected, optimizer, range(4))
    model, resumed = copies(row)
    saved = through_a_file({"model": expected.state_dict(), "optimizer": optimizer.state_dict()})
    model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    moved, of_moved = copies(row)
    take_steps(moved, of_moved, range(4))
    for m, o in ((model, resumed), (moved, of_moved)):
        with o.unperturbed() if row_has_one_pass(o) else contextlib.nullcontext():
            transpose_memory(m)
        take_steps(m, o, range(4, 9))
    take_steps(expected, optimizer, range(4, 9))
    for other in (model, moved):
        assert_same(other, expected)


@each_row
def test_copies_and_pickles_go_on_alike(row: Row) -> None:
    model, optimizer = copies(row)
    take_steps(model, optimizer, range(3))
    copied, of_copied = copy.deepcopy((model, optimizer))
    pickled, of_pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for m, o in ((model, optimizer), (copied, of_copied), (pickled, of_pickled)):
        take_steps(m, o, range(3, 8))
    for other in (copied, pickled):
        assert unchanged(model.parameters(), list(other.parameters()))


@each_row
def test_a_step_that_is_skipped_moves_nothing(row: Row) -> None:
    expected, of_expected = copies(row)
    model, optimizer = copies(row)
    for at in (0, 3):  # before there is any state, and later
        take_steps(expected, of_expected, range(at, at + 3))
        before = snapshot(model.parameters())
        skip_a_step(model, optimizer, at)
        if at == 0 and not row_has_one_pass(optimizer):
            assert unchanged(model.parameters(), before)
        take_steps(model, optimizer, range(at, at + 3))
    if row.cls is samkernels.LookSAM:  # the host counts the step, so later ones are others
        assert all(p.isfinite().all() for p in model.parameters())
        return
    assert unchanged(model.parameters(), list(expected.parameters()))


def skip_a_step(model: Network, optimizer: SAM, step: int) -> None:
    """By a g1 that is not finite; of one pass by a GradScaler, which finds it in the only one."""
    loss(model, step).backward()
    next(model.parameters()).grad.fill_(float("inf"))
    if row_has_one_pass(optimizer):
        optimizer.found_inf = torch.ones((), dtype=torch.float64)
        optimizer.grad_scale = torch.ones((), dtype=torch.float64)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
    else:
        optimizer.first_step()
        loss(model, step).backward()
        optimizer.second_step()
    optimizer.zero_grad()


def row_has_one_pass(optimizer: SAM) -> bool:
    return hasattr(optimizer, "unperturbed")


def test_assigning_state_resets_that_of_the_variant_too() -> None:
    row = row_of(samkernels.VaSSO)
    model, optimizer = copies(row)
    take_steps(model, optimizer, range(3))
    fresh_model = copy.deepcopy(model)
    fresh = row.cls(groups_of(row, "SGD", fresh_model), backend="reference", **SGD[1])
    optimizer.state = {}
    for m, o in ((model, optimizer), (fresh_model, fresh)):
        take_steps(m, o, range(3, 6))
    assert unchanged(model.parameters(), list(fresh_model.parameters()))


# -- one pass --------------------------------------------------------------------------------------


def test_msam_holds_w_in_unperturbed_and_in_its_state_dict() -> None:
    row = row_of(samkernels.MSAM)
    model, optimizer = copies(row)
    take_steps(model, optimizer, range(4))
    perturbed = snapshot(model.parameters())
    expected = by_rule(row, steps=4)
    with optimizer.unperturbed():
        assert not optimizer.is_perturbed
        assert_same(model, expected)
        inside = copy.deepcopy(model.state_dict())
        take = copy.deepcopy(optimizer.state_dict())
    assert optimizer.is_perturbed
    assert unchanged(model.parameters(), perturbed)
    held = [of["sam_w"] for of in optimizer.state_dict()["state"].values()]
    assert all(same_bits(w, p) for w, p in zip(held, inside.values(), strict=True))
    # A model file of either kind, and a state_dict of either, resume to the same bits.
    take_steps(model, optimizer, range(4, 7))
    for weights in (inside, None):
        other, resumed = copies(row)
        if weights is not None:
            other.load_state_dict(weights)
        else:
            with torch.no_grad():
                for p, q in zip(other.parameters(), perturbed, strict=True):
                    p.copy_(q)
        resumed.load_state_dict(take if weights is not None else saved_outside(row))
        take_steps(other, resumed, range(4, 7))
        assert unchanged(other.parameters(), list(model.parameters()))


def saved_outside(row: Row) -> dict[str, Any]:
    model, optimizer = copies(row)
    take_steps(model, optimizer, range(4))
    return optimizer.state_dict()


@pytest.mark.parametrize("policy", ["periodic", "late"])
def test_msam_is_perturbed_in_the_steps_that_a_policy_says(policy: str) -> None:
    row = row_of(samkernels.MSAM)
    when, wants = POLICIES[policy]
    expected = by_rule(row, steps=20, rule=lambda step: row.rule if wants(step) else family.plain)
    model, optimizer = copies(row, when=when)
    for step in range(20):
        take_steps(model, optimizer, range(step, step + 1))
        assert optimizer.is_perturbed is wants(step + 1)
        with optimizer.unperturbed():
            pass
        optimizer.perturb()  # not in a step that is to have none
        assert optimizer.is_perturbed is wants(step + 1)
    assert_same(weights_of(model, optimizer), expected)


def test_nothing_perturbs_in_unperturbed() -> None:
    model, optimizer = copies(row_of(samkernels.MSAM))
    take_steps(model, optimizer, range(3))
    with optimizer.unperturbed():
        w = snapshot(model.parameters())
        optimizer.perturb()
        optimizer.load_state_dict(optimizer.state_dict())
        assert unchanged(model.parameters(), w)
    assert not unchanged(model.parameters(), w)


def test_what_is_written_to_perturbed_parameters_counts_as_w() -> None:
    model, optimizer = copies(row_of(samkernels.MSAM))
    take_steps(model, optimizer, range(3))
    other = Network()
    model.load_state_dict(other.state_dict())
    with optimizer.unperturbed():
        assert unchanged(model.parameters(), list(other.parameters()))


def test_msam_refuses_the_protocol_of_two_passes() -> None:
    row = row_of(samkernels.MSAM)
    model, optimizer = copies(row)
    loss(model, 0).backward()
    for call in (optimizer.first_step, optimizer.second_step):
        with pytest.raises(RuntimeError, match="one pass"):
            call()
    with pytest.raises(ValueError, match="momentum=0"):
        samkernels.MSAM(Network().parameters(), lr=0.1)


# -- LoRA ------------------------------------------------------------------------------------------


class Lora(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: torch.nn.Parameter(  # noqa: E731
            torch.randn(shape, generator=generator, dtype=torch.float64)
        )
        self.lora_A, self.lora_B, self.head = draw(2, 5), draw(4, 2), draw(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.lora_A.T @ self.lora_B.T) @ self.head


@pytest.mark.parametrize("kind", ["n", "o"])
@pytest.mark.parametrize("by_name", [True, False])
def test_bar_equals_its_formula(kind: str, by_name: bool) -> None:
    options = {"lr": 0.02, "weight_decay": 0.1}
    model, expected = Lora(), Lora()
    params = model.named_parameters() if by_name else list(model.parameters())
    pairs = None if by_name else [(model.lora_A, model.lora_B)]
    optimizer = samkernels.BAR(params, torch.optim.AdamW, 0.3, pairs, kind, **options)
    base = torch.optim.AdamW(expected.parameters(), **options)
    of_params = [{**options, "alpha": 0.3}] * 3
    run = Run(expected, of_params, base, [True] * 3, [True] * 3, {"kind": kind, "pair": (0, 1)})
    for step in range(STEPS):
        run.t = step
        family.bar(run)
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("a", [0.5, 1.3])
def test_xsam_of_gradients_in_one_direction_is_sam(a: float) -> None:
    """The angle is 0, which nothing can be divided by the sine of."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = samkernels.XSAM([p], lr=1.0, a=a)
    for factor in (1.0, 2.0):
        p.grad = factor * torch.tensor([3.0, -4.0], dtype=torch.float64)
        (optimizer.first_step if factor == 1 else optimizer.second_step)()
    torch.testing.assert_close(p.detach(), torch.tensor([-6.0, 8.0], dtype=torch.float64))


# -- what does not compose -------------------------------------------------------------------------

WITH_STATE_OF_THE_DIRECTION = [
    row for row in FAMILY if row.cls.own_state and "direction" in vars(row.cls)
]


@pytest.mark.parametrize("row", WITH_STATE_OF_THE_DIRECTION, ids=str)
def test_state_of_the_direction_is_not_moved_by_parts_or_ranks(row: Row) -> None:
    _, optimizer = copies(row)
    with pytest.raises(RuntimeError, match=r"would move the \w+ of"):
        list(optimizer.parts([0, 1]))
    with pytest.raises(ValueError, match='leave it "global"'):
        copies(row, perturbation="local")


class Scaler:
    """What torch.amp.GradScaler does with an optimizer that unscales by itself."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def step(self, optimizer: SAM, overflows: bool = False) -> None:
        optimizer.grad_scale = torch.tensor(self.scale, dtype=torch.float64)
        optimizer.found_inf = torch.tensor(float(overflows), dtype=torch.float64)
        try:
            optimizer.step()
        finally:
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)


# A direction with state needs g1 without the scale, and a mix with g1 needs both gradients with it.
GO_WITH_SCALERS = [
    row for row in FAMILY if row not in WITH_STATE_OF_THE_DIRECTION or not row.cls.keeps_g1
]


@pytest.mark.parametrize("row", GO_WITH_SCALERS, ids=str)
def test_a_grad_scaler_changes_nothing(row: Row) -> None:
    scaler = Scaler(1024.0)
    needs_it = row in WITH_STATE_OF_THE_DIRECTION
    model, optimizer = copies(row)
    for step in range(12):
        scaler.scale = 2.0 ** (step % 3 + 8)
        (loss(model, step) * scaler.scale).backward()
        if not row_has_one_pass(optimizer):
            optimizer.first_step(grad_scale=scaler.scale if needs_it else None)
        if not row_has_one_pass(optimizer) and optimizer.is_perturbed:
            (loss(model, step) * scaler.scale).backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
    assert_same(weights_of(model, optimizer), by_rule(row, steps=12))


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop])
def test_a_step_that_a_scaler_skips_balances_nothing(base: Any) -> None:
    model = Lora()
    options: dict[str, Any] = {"alpha": 0.3, "lr": 0.1}
    if base is torch.optim.RMSprop:  # which has an alpha of its own
        base, options = base(model.parameters(), lr=0.1), {"alpha": 0.3}
    optimizer = samkernels.BAR(model.named_parameters(), base, **options)
    before = snapshot(model.parameters())
    loss(model, 0).backward()
    Scaler(8.0).step(optimizer, overflows=True)
    assert unchanged(model.parameters(), before)


@pytest.mark.parametrize("row", WITH_STATE_OF_THE_DIRECTION, ids=str)
def test_a_scaled_g1_is_refused_where_the_scale_matters(row: Row) -> None:
    model, optimizer = copies(row)
    before = snapshot(model.parameters())
    (loss(model, 0) * 8).backward()
    optimizer.first_step()
    (loss(model, 0) * 8).backward()
    with pytest.raises(RuntimeError, match=r"grad_scale=scaler\.get_scale"):
        Scaler(8.0).step(optimizer)
    assert unchanged(model.parameters(), before)
    model, optimizer = copies(row_of(samkernels.GSAM))
    loss(model, 0).backward()
    with pytest.raises(ValueError, match="grad_scale"):
        optimizer.first_step(grad_scale=8.0)


def test_contributing_shows_a_variant_that_works() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "AveragedSAM" in c]
    names: dict[str, Any] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)

    def rule(r: Run) -> None:
        g1, decay, share = r.grad(), r.option("decay"), r.option("share")
        m = r.state.get("m")
        r.keep(m=g1 if m is None else decay * m + (1 - decay) * g1)
        r.step((1 - share) * g1 + share * r.grad(r.up(r.state["m"])))

    row = Row(names["AveragedSAM"], rule, {"decay": 0.8, "share": 0.3}, {"share": 0.6})
    for base in ("SGD", "AdamW"):
        assert_same(trained(row, base)[0], by_rule(row, base))


def test_a_group_may_set_its_own_scaling() -> None:
    model, expected = Network(), Network()
    row = FAMILY[0]
    groups = groups_of(row, "SGD", model)
    groups[1].update(scaling="elementwise", eta=0.05)
    optimizer = SAM(groups, backend="reference", **SGD[1])
    take_steps(model, optimizer, range(5))
    of_both = groups_of(row, "SGD", expected)
    params = [p for group in of_both for p in group["params"]]
    reference = SAM(
        of_both, backend="reference", scaling="elementwise", eta=0.05, scaled=params[3:], **SGD[1]
    )
    take_steps(expected, reference, range(5))
    assert unchanged(model.parameters(), params)
    with pytest.raises(ValueError, match="scaling of parameter group 0"):
        SAM([{"params": model.parameters(), "scaling": "all"}], lr=0.1)


class WithEta(torch.optim.SGD):
    """A base optimizer that has an eta of its own."""

    def __init__(self, params: Any, lr: float = 0.1, eta: float = 7.0) -> None:
        super().__init__(params, lr)
        self.defaults["eta"] = eta
        for group in self.param_groups:
            group["eta"] = eta


def test_options_of_the_axes_stand_beside_those_of_the_base() -> None:
    p = torch.nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64))
    optimizer = SAM([p], WithEta([p]), rho=0.1, scaling="elementwise", eta=0.5)
    assert optimizer.param_groups[0]["eta"] == 7.0
    assert optimizer.param_groups[0]["sam_eta"] == 0.5
    p.grad = torch.ones_like(p)
    optimizer.first_step()
    # T = 2.5, e = 0.1 * 2.5^2 / (2.5 * sqrt(2))
    assert float(p[0].detach()) == pytest.approx(2 + 0.1 * 2.5 / 2**0.5)
    optimizer.restore()
    with pytest.raises(ValueError, match="both have an option called eta"):
        SAM([p], WithEta)


@each_row
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("backend", ["native", "emulated", "interpreted", "foreach"])
def test_every_backend_takes_the_reference_s_steps(row: Row, base: str, backend: str) -> None:
    """In float32, of 66 weights: sums of so few are the same in any order, or nearly so."""
    runs = [
        trained(row, base, backend=name, dtype=torch.float32, steps=7)
        for name in (backend, "reference")
    ]
    actual, expected = (list(weights_of(*run).parameters()) for run in runs)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


# -- what a user runs into -------------------------------------------------------------------------


def test_a_closure_that_clears_nothing_does_not_add_up() -> None:
    row = row_of(samkernels.MSAM)
    model, optimizer = copies(row)
    for step in range(6):

        def closure(step: int = step) -> torch.Tensor:
            value = loss(model, step)
            value.backward()
            return value

        optimizer.step(closure)
    assert_same(weights_of(model, optimizer), by_rule(row, steps=6))


def test_looksam_takes_no_other_policy() -> None:
    with pytest.raises(ValueError, match="LookSAM says itself which steps"):
        samkernels.LookSAM(Network().parameters(), lr=0.1, when=Periodic(5))


@pytest.mark.parametrize("option", ["subset", "scaled"])
def test_a_selection_that_selects_nothing_is_refused(option: str) -> None:
    model, other = Network(), Network()
    params = list(model.parameters())
    for selected in (other.parameters(), [params[0], next(other.parameters())]):
        with pytest.raises(ValueError, match=f"{option} selects . of the optimizer's parameters"):
            SAM(params, lr=0.1, **{option: selected})
    with pytest.raises(ValueError, match=f"{option} selects 0"):
        SAM(model.named_parameters(), lr=0.1, **{option: lambda name: "bn" in name})
    with pytest.raises(
        TypeError, match=r"rho: BAR perturbs nothing: .* BAR\(params, base_optimizer, alpha"
    ):
        samkernels.BAR(params, lr=0.1, rho=0.1)
    with pytest.raises(ValueError, match="pairs selects 0"):
        samkernels.BAR(params, lr=0.1, pairs=[tuple(other.parameters())[:2]])


def test_the_body_of_perturbed_learns_whether_there_is_a_second_pass() -> None:
    row = FAMILY[0]
    model, optimizer = copies(row, when=Periodic(3))
    passes = 0
    for step in range(6):
        loss(model, step).backward()
        with optimizer.perturbed() as has_second_pass:
            if has_second_pass:
                loss(model, step).backward()
                passes += 1
            optimizer.step()
        optimizer.zero_grad()
    assert passes == 2
    expected = by_rule(row, steps=6, rule=lambda t: row.rule if t % 3 == 2 else family.plain)
    assert_same(model, expected)


def test_a_plain_loop_is_refused_at_its_first_step() -> None:
    model, optimizer = copies(FAMILY[0], when=FromStep(25))
    loss(model, 0).backward()
    with pytest.raises(RuntimeError, match="needs two gradients"):
        optimizer.step()


@pytest.mark.parametrize("wants", [True, False])
def test_parts_of_a_step_without_a_second_pass(wants: bool) -> None:
    model, optimizer = copies(FAMILY[0], when=FromStep(0 if wants else 9))
    for half in optimizer.parts([0, 1]):
        loss(model, 0, half).backward()
        assert optimizer.first_step() == wants
        if wants:
            loss(model, 0, half).backward()
    optimizer.step()
    if not wants:
        assert_same(model, by_rule(FAMILY[0], steps=1, rule=lambda t: family.plain))


def test_asam_can_be_pickled_and_takes_an_instance() -> None:
    model = Network()
    optimizer = samkernels.ASAM(model.named_parameters(), lr=0.1)
    pickle.loads(pickle.dumps(optimizer))
    other = Network()
    base = torch.optim.SGD(other.parameters(), lr=0.1)
    of_instance = samkernels.ASAM(other.named_parameters(), base, 0.5, 0.01)
    take_steps(model, optimizer, range(3))
    take_steps(other, of_instance, range(3))
    assert unchanged(model.parameters(), list(other.parameters()))


def test_a_radius_follows_the_learning_rate_within_its_limits() -> None:
    schedule = samkernels.ProportionScheduler(max_lr=0.4, min_lr=0.2, max_value=1.0, min_value=0.5)
    assert [schedule.value(lr) for lr in (0.1, 0.2, 0.3, 0.4, 0.5)] == pytest.approx(
        [0.5, 0.5, 0.75, 1.0, 1.0]
    )
    one = samkernels.ProportionScheduler(max_lr=0.3, min_lr=0.3, max_value=1.0, min_value=0.5)
    assert one.value(0.1) == one.value(0.3) == 1.0
    groups = [{"params": [torch.zeros(1)], "lr": 0.3}, {"params": [torch.zeros(1)]}]
    of_lr = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(groups, lr=0.4), lambda _: 1.0)
    schedule.pytorch_lr_scheduler = of_lr
    assert schedule.step() == pytest.approx(0.75)  # of the first group, as the authors have it
    with pytest.raises(RuntimeError, match="without pytorch_lr_scheduler"):
        one.step()
    model = Network()
    optimizer = samkernels.GSAM(model.parameters(), torch.optim.SGD, schedule, lr=0.3)
    loss(model, 0).backward()
    optimizer.first_step()
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.75)
    with pytest.raises(TypeError, match="max_lr and max_value"):
        samkernels.ProportionScheduler(max_lr=0.1)


def test_a_model_that_is_loaded_counts_as_w() -> None:
    row = row_of(samkernels.MSAM)
    model, optimizer = copies(row)
    take_steps(model, optimizer, range(3))
    with optimizer.unperturbed():
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    take_steps(model, optimizer, range(3, 6))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    with optimizer.unperturbed():
        for p, w in zip(model.parameters(), saved[0].values(), strict=True):
            assert same_bits(p, w)
    model.load_state_dict(saved[0])  # alone, as where training stops early
    with optimizer.unperturbed():
        for p, w in zip(model.parameters(), saved[0].values(), strict=True):
            assert same_bits(p, w)
    next(model.parameters()).data.mul_(2)
    loss(model, 0).backward()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="written while they held"):
        optimizer.step()


@pytest.mark.parametrize("cls", [samkernels.MSAM, SAM, samkernels.WSAM])
def test_to_maximize_is_to_minimize_the_negative(cls: type[SAM]) -> None:
    found = []
    for sign in (1, -1):
        p = torch.nn.Parameter(torch.tensor([1.5, 2.0], dtype=torch.float64))
        optimizer = cls([p], rho=0.1, lr=0.01, momentum=0.9, maximize=sign < 0)
        for _ in range(4):

            def closure(p: torch.nn.Parameter = p, sign: int = sign) -> torch.Tensor:
                value = sign * (p**4).sum()
                value.backward()
                return value

            optimizer.step(closure)
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_bar_balances_alike_where_the_loss_is_maximized() -> None:
    found = []
    for sign in (1, -1):
        model = Lora()
        optimizer = samkernels.BAR(
            model.named_parameters(), torch.optim.SGD, 0.5, lr=0.1, maximize=sign < 0
        )
        for step in range(3):
            optimizer.zero_grad()
            (sign * loss(model, step)).backward()
            optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_a_step_without_a_second_pass_can_be_clipped() -> None:
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SAM([p], lr=1.0, when=FromStep(9))
    (100 * p.sum()).backward()
    assert not optimizer.first_step()
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    optimizer.second_step()
    assert float(p.detach().norm()) == pytest.approx(1)


def test_a_mask_goes_with_a_copy() -> None:
    model = Network()
    masks = {p: torch.zeros_like(p) for p in list(model.parameters())[:1]}
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.5, mask=masks)
    copied, of_copy = copy.deepcopy((model, optimizer))
    loss(copied, 0).backward()
    before = copied.weight1.detach().clone()
    of_copy.first_step()
    assert same_bits(copied.weight1, before)


def test_a_group_whose_momentum_is_zero_is_not_a_step_behind() -> None:
    p, q = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "momentum": 0.0}]
    optimizer = samkernels.MSAM(groups, torch.optim.SGD, 0.1, lr=0.1, momentum=0.9)
    (p.sum() + q.sum()).backward()
    optimizer.step()
    assert q.tolist() == pytest.approx([0.9, 0.9])


class WithoutLr(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    "make",
    [
        lambda p: samkernels.WSAM(p, WithoutLr),
        lambda p: samkernels.WSAM(p, WithoutLr(p)),
        lambda p: SAM(p, WithoutLr, samkernels.ProportionScheduler(max_lr=0.1, max_value=0.1)),
    ],
)
def test_what_goes_with_lr_is_refused_where_there_is_none(make: Callable[..., SAM]) -> None:
    with pytest.raises(ValueError, match=r"parameter group 0 of WithoutLr has no lr"):
        make([torch.nn.Parameter(torch.ones(3))])
    SAM([torch.nn.Parameter(torch.ones(3))], WithoutLr)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"own_options": "rho"}, "own_options of Mine is str"),
        ({"own_options": options(rho=Option(1.0))}, "has rho, which SAM itself has"),
        ({"own_options": options(when=Option(1.0))}, "has when, which SAM itself has"),
        ({"own_arguments": ("pairs",)}, "own_arguments of Mine is tuple: give options"),
        ({"own_arguments": {"mask": None}}, "own_arguments of Mine has mask"),
        ({"own_state": "m"}, r"own_state of Mine is a string: .* \('m',\)"),
        ({"positional": "rho"}, r"positional of Mine is a string"),
    ],
)
def test_a_variant_that_declares_nonsense_is_no_class(
    declared: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        type("Mine", (SAM,), declared)


@pytest.mark.parametrize(("key", "value"), [("scaling", "element"), ("eta", -1.0), ("rho", -1.0)])
def test_an_option_that_somebody_has_spoiled_is_refused_before_weights_move(
    key: str, value: Any
) -> None:
    params = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
    optimizer = SAM([{"params": [p]} for p in params], lr=0.1, adaptive=True)
    weights = snapshot(params)
    for spoiled in (value, 0.1 if key != "scaling" else None):
        optimizer.param_groups[1][key] = spoiled
        for p in params:
            p.grad = torch.ones_like(p)
        if spoiled is value:
            with pytest.raises(ValueError, match=key):
                optimizer.first_step()
            assert unchanged(params, weights)
    optimizer.first_step()
    optimizer.restore()
    assert unchanged(params, weights)


def test_rho_may_be_a_number_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    for p, rho in zip(params, (0.5, numpy.float32(0.5)), strict=True):
        p.grad = torch.ones(4)
        SAM([p], rho=rho, lr=0.1).first_step()
    assert torch.equal(*params)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nobody_holds_gradients_between_the_halves_of_a_step(backend: str) -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = SAM([p], lr=0.1, backend=backend)
    halves = [optimizer.first_step, optimizer.second_step]
    for half in (*halves, *halves):
        p.grad = torch.ones(4)
        gone = weakref.ref(p.grad)
        half()
        p.grad = None
        assert gone() is None


def test_a_variant_that_moves_nothing_takes_no_radius() -> None:
    class Decay(SAM):
        moves = False

        def before(self, x: Any, dots: Any) -> Any:
            return linear(w=0.5)

    w = torch.nn.Parameter(torch.ones(2))
    optimizer = Decay([w], torch.optim.SGD, lr=0.1)
    w.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(w, torch.full((2,), 0.95))
    with pytest.raises(TypeError, match="rho: Decay perturbs nothing"):
        Decay([w], torch.optim.SGD, lr=0.1, rho=0.1)
