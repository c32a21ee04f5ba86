"""The two-step protocol: what is called when, with which errors; hooks, schedulers, groups."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from samkernels import SAM, SAMDirection, SAMMagnitude
from samkernels.optim.samdirection import GRANULARITIES
from tests.optim_helpers import (
    count_calls,
    linear,
    parameter,
    parameters_of,
    same_bits,
    set_gradients,
    snapshot,
    take_step,
    unchanged,
)
from tests.optimizers import (
    BACKENDS,
    INFO,
    OPTIMIZERS,
    each_backend,
    each_cls_and_variant,
    each_optimizer,
)

BASES = [
    pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, id="SGD"),
    pytest.param(torch.optim.Adam, {"lr": 0.1}, id="Adam"),
    pytest.param(torch.optim.RMSprop, {"lr": 0.1}, id="RMSprop"),
]
# Those with a fused update, and one that makes its own step.
CLASSES = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam]
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1] * 4)


def loss_of(model: nn.Module) -> Tensor:
    return cross_entropy(model(X), Y)


# -- construction ----------------------------------------------------------------------------------


@each_optimizer
def test_positional_order_is_that_of_davda54(cls: type[SAM]) -> None:
    optimizer = cls(linear().parameters(), torch.optim.AdamW, 0.7, True, lr=0.3, betas=(0.5, 0.6))
    assert type(optimizer.base_optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["rho"], group["adaptive"]) == (0.7, True)
    assert (group["lr"], group["betas"]) == (0.3, (0.5, 0.6))


def test_davda54_keywords() -> None:
    optimizer = SAM(
        params=linear().parameters(),
        base_optimizer=torch.optim.SGD,
        rho=2.0,
        adaptive=True,
        lr=0.1,
        momentum=0.9,
    )
    assert optimizer.param_groups[0]["rho"] == 2.0


@each_optimizer
def test_defaults(cls: type[SAM]) -> None:
    optimizer = cls(linear().parameters(), lr=0.1)
    assert type(optimizer.base_optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert (group["rho"], group["adaptive"]) == (0.05, False)
    assert INFO[cls].group_options <= group.keys()
    assert group.get("granularity", "element") == "element"
    assert optimizer.statistics is None and not optimizer.track_statistics


def test_backend_and_granularity_are_no_positional_arguments() -> None:
    with pytest.raises(TypeError, match="positional"):
        SAM(linear().parameters(), torch.optim.SGD, 0.05, False, "native", lr=0.1)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        SAMDirection(linear().parameters(), torch.optim.SGD, 0.05, False, "global", lr=0.1)  # type: ignore[misc]


@each_optimizer
def test_granularity_is_an_option_of_mixtures_only(cls: type[SAM]) -> None:
    if "granularity" in INFO[cls].group_options:
        assert cls(linear().parameters(), granularity="global", lr=0.1)  # type: ignore[call-arg]
        return
    with pytest.raises(TypeError, match="granularity"):
        cls(linear().parameters(), granularity="global", lr=0.1)  # type: ignore[call-arg]


def test_options_that_the_base_optimizer_does_not_know() -> None:
    with pytest.raises(TypeError, match="betas"):
        SAM(linear().parameters(), torch.optim.SGD, lr=0.1, betas=(0.9, 0.99))


@each_optimizer
def test_is_a_torch_optimizer(cls: type[SAM]) -> None:
    optimizer = cls(linear().parameters(), lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    text = repr(optimizer)
    assert text.startswith(f"{cls.__name__} (")
    assert "rho: 0.05" in text and "lr: 0.1" in text


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_named_parameters(base: type[torch.optim.Optimizer]) -> None:
    model = linear()
    optimizer = SAM(model.named_parameters(), base, lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    before = snapshot(model.parameters())
    take_step(optimizer, 0)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_generators_tensors_and_named_groups() -> None:
    one, two, three = parameter(1.0), parameter(2.0), parameter(3.0)
    optimizer = SAM([{"params": (p for p in [one, two])}, {"params": three}], lr=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]


@each_backend
def test_backends_tells_who_serves(backend: str) -> None:
    params = [parameter(1.0), parameter(1.0, dtype=torch.bfloat16)]
    optimizer = SAM(params, lr=0.1, backend=backend)
    assert optimizer.backends == {"cpu float32": backend, "cpu bfloat16": backend}


def test_auto_takes_what_can_serve() -> None:
    params = [parameter(1.0), parameter(1.0, dtype=torch.float64)]
    assert SAM(params, lr=0.1).backends == {"cpu float32": "native", "cpu float64": "foreach"}
    with pytest.raises(RuntimeError, match=r'backend="native" cannot serve torch\.float64'):
        SAM(params, lr=0.1, backend="native")


# -- the order of the steps ------------------------------------------------------------------------


@pytest.fixture(params=OPTIMIZERS)
def optimizer(request: pytest.FixtureRequest) -> SAM:
    return request.param(linear().parameters(), rho=0.1, lr=0.1, momentum=0.9)


def test_first_step_twice(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.first_step()
    perturbed = snapshot(params)
    set_gradients(params, 1)
    with pytest.raises(RuntimeError, match=r"first_step was called twice: .*second_step"):
        optimizer.first_step()
    # Still the same perturbation, which second_step takes back.
    assert optimizer.is_perturbed and unchanged(params, perturbed)
    optimizer.restore()
    assert unchanged(params, before)


def test_second_step_without_first(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    set_gradients(params, 0)
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="second_step was called without first_step"):
        optimizer.second_step()
    assert unchanged(params, before)


def test_step_without_first_and_without_closure(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    set_gradients(params, 0)
    before = snapshot(params)
    name = type(optimizer).__name__
    with pytest.raises(RuntimeError, match=rf"^{name}\.step\(\) needs two gradients.*closure"):
        optimizer.step()
    assert unchanged(params, before)


def test_first_step_without_gradients(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    with pytest.raises(RuntimeError, match=r"first_step found no gradient: call loss\.backward"):
        optimizer.first_step()
    assert not optimizer.is_perturbed and unchanged(params, before)


@pytest.mark.parametrize("second", ["second_step", "step"])
def test_second_step_without_gradients(optimizer: SAM, second: str) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.first_step()
    assert not unchanged(params, before)
    with pytest.raises(RuntimeError, match=r"second_step found no gradient: .*restored"):
        getattr(optimizer, second)()
    assert not optimizer.is_perturbed and unchanged(params, before)
    take_step(optimizer, 1)  # nothing is broken


def test_restore_without_perturbation_does_nothing(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    optimizer.restore()
    take_step(optimizer, 0)
    after = snapshot(params)
    optimizer.restore()
    assert unchanged(params, after) and not unchanged(params, before)


def test_is_perturbed(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    assert optimizer.is_perturbed is False
    set_gradients(params, 0)
    assert optimizer.is_perturbed is False
    optimizer.first_step()
    assert optimizer.is_perturbed is True
    set_gradients(params, 1)
    optimizer.second_step()
    assert optimizer.is_perturbed is False


@pytest.mark.parametrize(("base", "options"), BASES)
@each_cls_and_variant
def test_all_ways_to_step_are_the_same(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
) -> None:
    def two_steps(optimizer: SAM, model: nn.Module) -> None:
        loss_of(model).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model).backward()
        optimizer.second_step(zero_grad=True)

    def first_step_and_step(optimizer: SAM, model: nn.Module) -> None:
        loss_of(model).backward()
        optimizer.first_step()
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    def closure(optimizer: SAM, model: nn.Module) -> None:
        def compute() -> Tensor:
            loss = loss_of(model)
            loss.backward()
            return loss

        optimizer.step(compute)

    def closure_with_gradients(optimizer: SAM, model: nn.Module) -> None:
        loss_of(model).backward()
        closure(optimizer, model)

    def context(optimizer: SAM, model: nn.Module) -> None:
        loss_of(model).backward()
        with optimizer.perturbed():
            loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    results = []
    for way in (two_steps, first_step_and_step, closure, closure_with_gradients, context):
        model = linear()
        optimizer = cls(model.parameters(), base, 0.1, **variant, **options)
        for _ in range(3):
            way(optimizer, model)
        results.append(snapshot(model.parameters()))
    for result in results[1:]:
        assert unchanged(result, results[0])
    assert not unchanged(results[0], snapshot(linear().parameters()))


# -- closures --------------------------------------------------------------------------------------


def closure_of(optimizer: SAM, model: nn.Module, zero_grad: bool = True) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        if zero_grad:
            optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_closure_is_called_twice_without_gradients(
    base: type[torch.optim.Optimizer], options: dict[str, Any], zero_grad: bool
) -> None:
    model = linear()
    optimizer = SAM(model.parameters(), base, 0.1, **options)
    for _ in range(2):
        expected = loss_of(model).detach()
        closure, calls = count_calls(closure_of(optimizer, model, zero_grad))
        loss = optimizer.step(closure)
        assert len(calls) == 2
        torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=0)
        assert all(p.grad is None for p in model.parameters())


def test_a_closure_that_keeps_gradients_is_called_once_with_gradients() -> None:
    """davda54's way: they are g1."""
    models = [linear(), linear()]
    optimizer, twin = (SAM(m.parameters(), rho=0.1, lr=0.1, momentum=0.9) for m in models)
    for _ in range(3):
        loss_of(models[0]).backward()
        closure, calls = count_calls(closure_of(optimizer, models[0], zero_grad=False))
        assert optimizer.step(closure) is None
        assert len(calls) == 1
        assert all(p.grad is None for p in models[0].parameters())
        loss_of(models[1]).backward()
        twin.first_step()
        assert not any(p._backward_hooks for p in models[0].parameters())
        loss_of(models[1]).backward()
        twin.second_step(zero_grad=True)
    assert unchanged(models[0].parameters(), snapshot(models[1].parameters()))


def by_none(model: nn.Module, optimizer: SAM) -> None:
    for p in model.parameters():
        p.grad = None


def by_writing_zeros(model: nn.Module, optimizer: SAM) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.detach_().zero_()


CLEARING: dict[str, Callable[[nn.Module, SAM], object]] = {
    "optimizer.zero_grad": lambda model, optimizer: optimizer.zero_grad(),
    "to zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad": lambda model, optimizer: model.zero_grad(),
    "None": by_none,
    "zeros": by_writing_zeros,
    "one of two": lambda model, optimizer: model[0].zero_grad(),  # type: ignore[index]
}


@pytest.mark.parametrize("left", ["zeros", "huge", "infinite", "of one parameter"])
@pytest.mark.parametrize("clear", CLEARING.values(), ids=CLEARING)
@each_optimizer
def test_a_closure_that_clears_gradients_leaves_no_trace_of_them(
    cls: type[SAM], clear: Callable[[nn.Module, SAM], object], left: str
) -> None:
    def leave(model: nn.Module) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, {"zeros": 0.0, "infinite": math.inf}.get(left, 1e9))
            if left == "of one parameter":
                break

    models = [linear(), linear()]
    optimizers = [cls(m.parameters(), rho=0.5, lr=0.1, momentum=0.9) for m in models]
    for step in range(3):
        losses: list[Tensor] = []
        calls: list[bool] = []
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure(
                model: nn.Module = model, optimizer: SAM = optimizer, calls: list[bool] = calls
            ) -> Tensor:
                if model is models[0]:
                    calls.append(optimizer.is_perturbed)
                    clear(model, optimizer)
                loss = loss_of(model)
                loss.backward()
                return loss

            if model is models[0]:
                leave(model)
            losses.append(optimizer.step(closure))
        assert calls == ([True, False, True] if step == 0 else [False, True])
        assert torch.equal(*losses)
        assert unchanged(models[0].parameters(), snapshot(models[1].parameters()))
    copies = [pickle.loads(pickle.dumps(optimizers[0])), copy.deepcopy(optimizers[0])]
    assert all(c._closure_clears for c in copies)


def test_a_probing_call_that_fails_tells_nothing(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    set_gradients(params, 0)

    def closure() -> float:
        optimizer.zero_grad()
        raise MemoryError

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert optimizer._closure_clears is None and unchanged(params, before)
    assert all(p.grad is None and not p._backward_hooks for p in params)


def test_backward_makes_the_gradients_of_a_probing_call_anew() -> None:
    """Zeros of -0 stay what they are, and a parameter that backward does not reach has none."""
    params = [parameter(1.0, 2.0), parameter(3.0)]
    optimizer = SAM(params, rho=0.1, lr=0.1, momentum=0.9)
    params[0].grad, params[1].grad = torch.ones(2), torch.ones(1)
    given = torch.tensor([-0.0, 1.0])

    def closure() -> None:
        torch.autograd.backward([params[0]], [given])
        assert same_bits(params[0].grad, given) and params[1].grad is None  # type: ignore[arg-type]

    optimizer.step(closure)
    assert same_bits(optimizer.state[params[0]]["momentum_buffer"], given)
    assert not optimizer.state.get(params[1])


@pytest.mark.parametrize("who", ["closure", "body"])
@each_optimizer
def test_closure_after_first_step_is_called_once(cls: type[SAM], who: str) -> None:
    """At w + e(w). Lightning's wrapper passes a closure always, if need be one that does nothing:
    then the gradients that are there are g2."""
    models = [linear(), linear()]
    optimizer, twin = (cls(m.parameters(), rho=0.1, lr=0.1, momentum=0.9) for m in models)
    for _ in range(2):
        loss_of(models[0]).backward()
        optimizer.first_step()
        if who == "body":
            loss_of(models[0]).backward()
        pass_2 = closure_of(optimizer, models[0]) if who == "closure" else lambda: None
        closure, calls = count_calls(pass_2)
        assert optimizer.step(closure) is None
        assert len(calls) == 1 and not optimizer.is_perturbed
        twin.step(closure_of(twin, models[1]))
    assert unchanged(models[0].parameters(), snapshot(models[1].parameters()))
    assert not unchanged(models[0].parameters(), snapshot(linear().parameters()))


def test_closure_after_first_step_that_leaves_no_gradient(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step found no gradient"):
        optimizer.step(lambda: 1.0)
    assert unchanged(params, before) and not optimizer.is_perturbed


class ReadingWrapper:
    """As Lightning wraps optimizers in manual optimization: their class is a base of its own, what
    is read comes from them, what is assigned stays with it, and each step has a closure."""

    def __init__(self, optimizer: SAM) -> None:
        self.wrapped = optimizer
        self.__class__ = type("Wrapper", (ReadingWrapper, type(optimizer)), {})

    def step(self, closure: Callable[[], Any] = lambda: None) -> Any:
        return self.wrapped.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


@pytest.mark.parametrize("second", ["step", "second_step"])
def test_steps_that_are_called_on_a_wrapper(optimizer: SAM, second: str) -> None:
    model = linear()
    twin = type(optimizer)(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
    wrapper: Any = ReadingWrapper(optimizer)
    params = parameters_of(optimizer)
    before = snapshot(params)
    for step in range(2):
        take_step(twin, step)
        set_gradients(params, 2 * step)
        wrapper.first_step()
        assert optimizer.is_perturbed and wrapper.is_perturbed
        set_gradients(params, 2 * step + 1)
        getattr(wrapper, second)()
        assert not optimizer.is_perturbed and not wrapper.is_perturbed
    assert unchanged(params, snapshot(model.parameters()))
    assert not unchanged(params, before)


def test_closure_runs_at_the_two_points_with_gradients_enabled() -> None:
    model = linear()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    before = snapshot(model.parameters())
    seen = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        seen.append((optimizer.is_perturbed, unchanged(model.parameters(), before)))
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert seen == [(False, True), (True, False)]
    assert isinstance(loss, float)


@pytest.mark.parametrize("has_first", [False, True])
def test_a_closure_that_forgets_backward_is_told_once(optimizer: SAM, has_first: bool) -> None:
    model = linear()
    optimizer = type(optimizer)(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
    before = snapshot(model.parameters())

    def forgetful_step() -> None:
        if has_first:
            loss_of(model).backward()
        loss = optimizer.step(lambda: loss_of(model))
        assert loss is None if has_first else torch.equal(loss, loss_of(model))

    with pytest.warns(UserWarning, match=r"left no gradient.*call loss\.backward\(\)"):
        forgetful_step()
    forgetful_step()  # warnings are errors here
    assert unchanged(model.parameters(), before) and not optimizer.is_perturbed
    assert not optimizer.state


@pytest.mark.parametrize("skipping", [1, 2, "with g1 given"])
def test_a_closure_that_returns_none_skips_the_batch(optimizer: SAM, skipping: int | str) -> None:
    """As Lightning's training_step: in the first call, or at w + e(w)."""
    model = linear()
    twin = linear()
    optimizer, other = (
        type(optimizer)(m.parameters(), rho=0.1, lr=0.1, momentum=0.9) for m in (model, twin)
    )
    for o, m in ((optimizer, model), (other, twin)):
        o.step(closure_of(o, m))
    calls = []

    def closure() -> Tensor | None:
        calls.append(optimizer.is_perturbed)
        if len(calls) == skipping or skipping == "with g1 given":
            return None
        return closure_of(optimizer, model)()

    before = snapshot(model.parameters())
    if skipping == "with g1 given":
        loss_of(model).backward()
    loss = optimizer.step(closure)
    assert (loss is not None) == (skipping == 2)
    assert calls == {1: [False], 2: [False, True]}.get(skipping, [True])  # type: ignore[call-overload]
    assert unchanged(model.parameters(), before) and not optimizer.is_perturbed
    assert all(p.grad is None for p in model.parameters())
    for o, m in ((optimizer, model), (other, twin)):
        o.step(closure_of(o, m))
    assert unchanged(model.parameters(), snapshot(twin.parameters()))


def test_gradient_accumulation_in_the_closure() -> None:
    """Micro-batches summed in both passes are one batch."""
    models = [linear().double(), linear().double()]
    x = X.double()

    def whole() -> None:
        cross_entropy(models[0](x), Y).backward()

    def in_parts() -> None:
        for part, target in zip(x.chunk(4), Y.chunk(4), strict=True):
            (cross_entropy(models[1](part), target) / 4).backward()

    for model, closure in zip(models, (whole, in_parts), strict=True):
        optimizer = SAMMagnitude(
            model.parameters(), rho=0.1, granularity="global", lr=0.1, backend="reference"
        )
        for _ in range(3):
            optimizer.step(closure)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_grad", [False, True])
def test_first_step_takes_the_gradients_over(optimizer: SAM, zero_grad: bool) -> None:
    params = parameters_of(optimizer)
    set_gradients(params, 0)
    optimizer.first_step(zero_grad=zero_grad)
    assert all(p.grad is None for p in params)
    set_gradients(params, 1)
    optimizer.second_step(zero_grad=False)
    assert all(p.grad is not None for p in params)
    set_gradients(params, 0)
    optimizer.first_step()
    set_gradients(params, 1)
    optimizer.second_step(zero_grad=True)
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("between", ["nothing", "zero_grad", "set_to_none=False", "model"])
@pytest.mark.parametrize(("base", "options"), BASES)
@each_cls_and_variant
def test_zero_grad_between_the_passes_makes_no_difference(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    between: str,
) -> None:
    """Neither can it wipe g1 out, nor would g2 be added to g1 without it."""

    def train(clear: Callable[[SAM, nn.Module], object]) -> list[Tensor]:
        model = linear()
        optimizer = cls(model.parameters(), base, 0.1, **variant, **options)
        for _ in range(3):
            loss_of(model).backward()
            optimizer.first_step()
            clear(optimizer, model)
            loss_of(model).backward()
            optimizer.second_step(zero_grad=True)
        return snapshot(model.parameters())

    ways: dict[str, Callable[[SAM, nn.Module], object]] = {
        "nothing": lambda optimizer, model: None,
        "zero_grad": lambda optimizer, model: optimizer.zero_grad(),
        "set_to_none=False": lambda optimizer, model: optimizer.zero_grad(set_to_none=False),
        "model": lambda optimizer, model: model.zero_grad(set_to_none=False),
    }
    expected = train(
        lambda optimizer, model: [setattr(p, "grad", None) for p in model.parameters()]
    )
    assert unchanged(train(ways[between]), expected)


def test_zero_grad_in_place_between_steps() -> None:
    """Gradients that are zeroed and filled again give the same steps as new ones."""
    results = []
    for set_to_none in (True, False):
        model = linear()
        optimizer = SAMMagnitude(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model).backward()
            optimizer.first_step()
            loss_of(model).backward()
            optimizer.step()
        results.append(snapshot(model.parameters()))
    assert unchanged(results[0], results[1])


def test_clipping_g2_between_backward_and_second_step() -> None:
    p = parameter(3.0, 4.0)
    optimizer = SAM([p], rho=0.1, lr=1.0)
    p.grad = torch.tensor([1.0, 0.0])
    optimizer.first_step()
    p.grad = torch.tensor([0.0, 10.0])
    nn.utils.clip_grad_norm_([p], 1.0)
    optimizer.second_step()
    torch.testing.assert_close(p.detach(), torch.tensor([3.0, 3.0]))


# -- schedulers ------------------------------------------------------------------------------------

SCHEDULERS = [
    pytest.param(lambda o: lr_scheduler.StepLR(o, 2, 0.1), id="StepLR"),
    pytest.param(lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=8), id="OneCycleLR"),
    pytest.param(lambda o: lr_scheduler.CosineAnnealingLR(o, 8), id="CosineAnnealingLR"),
    pytest.param(lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step), id="LambdaLR"),
    pytest.param(lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4), id="LinearLR"),
]


@pytest.mark.parametrize("way", ["second_step", "step", "closure"])
@pytest.mark.parametrize(("base", "options"), BASES)
@pytest.mark.parametrize("make_scheduler", SCHEDULERS)
def test_schedulers_without_a_warning(
    make_scheduler: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler],
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    way: str,
) -> None:
    """The lr (and momentum) of each step are those of a scheduler on the base optimizer alone."""
    model = linear()
    optimizer = SAM(model.parameters(), base, **options)
    twin = base(linear().parameters(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler, twin_scheduler = make_scheduler(optimizer), make_scheduler(twin)
        seen = set()
        for _ in range(6):
            if way == "closure":
                optimizer.step(closure_of(optimizer, model))
            else:
                loss_of(model).backward()
                optimizer.first_step()
                loss_of(model).backward()
                getattr(optimizer, way)()
                optimizer.zero_grad()
            twin.step()
            scheduler.step()
            twin_scheduler.step()
            for name in ("lr", "momentum", "betas"):
                value = optimizer.param_groups[0].get(name)
                assert value == twin.param_groups[0].get(name)
                assert value == optimizer.base_optimizer.param_groups[0].get(name)
            seen.add(optimizer.param_groups[0]["lr"])
    assert len(seen) > 2


@each_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_scheduled_lr_is_the_lr_of_the_update(
    base: type[torch.optim.Optimizer], backend: str
) -> None:
    """Adam's first step is lr * sign(u), and SGD's lr * u: the update tells lr."""
    p = parameter(0.0)
    optimizer = SAM([p], base, lr=1.0, backend=backend)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.125][step])
    for expected in (1.0, 0.5, 0.125):
        before = p.item()
        p.grad = torch.ones(1)
        optimizer.first_step()
        p.grad = torch.ones(1)
        optimizer.second_step()
        assert before - p.item() == pytest.approx(expected, rel=1e-6)
        if expected > 0.2:
            scheduler.step()


def test_a_scheduler_leaves_the_update_fused() -> None:
    """It puts tensors of its own into the groups: on a device they may lie there."""
    model = linear()
    optimizer = SAM(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
    lr_scheduler.StepLR(optimizer, 1)
    group = optimizer.param_groups[0]
    assert isinstance(group["initial_lr"], Tensor)
    group["initial_lr"] = torch.tensor(0.1, device="meta")
    fused = optimizer._fused_base
    assert fused is not None and fused.serves(group)
    group["weight_decay"] = torch.tensor(0.1, device="meta")
    assert not fused.serves(group)


def test_lr_and_rho_as_tensors() -> None:
    """What is written to them between steps counts."""
    results = []
    for as_tensor in (False, True):
        lr, rho = (torch.tensor(x) if as_tensor else x for x in (0.5, 0.25))
        model = linear()
        optimizer = SAM(model.parameters(), rho=rho, lr=lr, momentum=0.9)
        take_step(optimizer, 0)
        for group in optimizer.param_groups:
            for name in ("lr", "rho"):
                if as_tensor:
                    group[name].mul_(0.5)
                else:
                    group[name] *= 0.5
        take_step(optimizer, 1)
        results.append(snapshot(model.parameters()))
    assert unchanged(results[0], results[1])


# -- torch.amp.GradScaler --------------------------------------------------------------------------

SCALED = pytest.mark.parametrize(
    ("cls", "options"),
    [
        (SAM, {}),
        *((cls, {"granularity": g}) for cls in (SAMDirection, SAMMagnitude) for g in GRANULARITIES),
    ],
)


def scaled_step(model: nn.Module, optimizer: SAM, scaler: Any, spoil: str = "") -> None:
    """The training step of the documentation; `spoil` makes "first" or "second" overflow."""
    scaler.scale(loss_of(model)).backward()
    if spoil == "first":
        spoil_gradient(model)
    optimizer.first_step()
    scaler.scale(loss_of(model)).backward()
    if spoil == "second":
        spoil_gradient(model)
    scaler.step(optimizer)
    scaler.update()
    assert not optimizer.is_perturbed
    optimizer.zero_grad()


def spoil_gradient(model: nn.Module) -> None:
    grad = next(model.parameters()).grad
    assert grad is not None
    grad.view(-1)[1] = math.inf


@SCALED
@pytest.mark.parametrize("base", CLASSES)
def test_a_grad_scaler_changes_nothing_but_roundings(
    base: type[torch.optim.Optimizer], cls: type[SAM], options: dict[str, Any]
) -> None:
    results, statistics = [], []
    for enabled in (False, True):
        model = linear()
        optimizer = cls(
            model.parameters(),
            base,
            0.1,
            lr=0.1,
            track_statistics=True,
            weight_decay=0.01,
            **options,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for _ in range(3):
            scaled_step(model, optimizer, scaler)
        results.append(snapshot(model.parameters()))
        statistics.append(optimizer.statistics)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*statistics, strict=True):
        torch.testing.assert_close(a, b)
    assert not unchanged(results[1], snapshot(linear().parameters()))


@SCALED
@pytest.mark.parametrize("spoil", ["first", "second"])
@pytest.mark.parametrize("base", CLASSES)
def test_an_overflow_in_the_very_first_step_lowers_the_scale(
    base: type[torch.optim.Optimizer], spoil: str, cls: type[SAM], options: dict[str, Any]
) -> None:
    model = linear()
    weights = snapshot(model.parameters())
    optimizer = cls(model.parameters(), base, 0.1, lr=0.1, weight_decay=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(model, optimizer, scaler, spoil)
    assert unchanged(weights, snapshot(model.parameters()))
    assert scaler.get_scale() == 512
    scaled_step(model, optimizer, scaler)
    assert not unchanged(weights, snapshot(model.parameters()))


@SCALED
@pytest.mark.parametrize("spoil", ["first", "second"])
@pytest.mark.parametrize("base", CLASSES)
def test_an_overflow_skips_the_step_and_lowers_the_scale(
    base: type[torch.optim.Optimizer], spoil: str, cls: type[SAM], options: dict[str, Any]
) -> None:
    model = linear()
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    optimizer = cls(model.parameters(), base, 0.1, lr=0.1, **momentum, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(model, optimizer, scaler)
    weights = snapshot(model.parameters())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    scaled_step(model, optimizer, scaler, spoil)
    assert unchanged(weights, snapshot(model.parameters()))
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    assert scaler.get_scale() == 512
    scaled_step(model, optimizer, scaler)
    assert not unchanged(weights, snapshot(model.parameters()))


@pytest.mark.parametrize(
    ("cls", "options"), [(SAMDirection, {}), (SAM, {"track_statistics": True})]
)
def test_unscaling_one_gradient_of_two_is_refused(cls: type[SAM], options: dict[str, Any]) -> None:
    model = linear()
    weights = snapshot(model.parameters())
    optimizer = cls(model.parameters(), rho=0.1, lr=0.1, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model)).backward()
    optimizer.first_step()
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) was called: one of g1 and g2"):
        scaler.step(optimizer)
    assert unchanged(weights, snapshot(model.parameters()))


def test_what_a_scaler_set_does_not_outlive_a_step_that_failed() -> None:
    model = linear()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(RuntimeError, match="first_step"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    twin = linear()
    other = SAM(twin.parameters(), rho=0.1, lr=0.1)
    for m, o in ((model, optimizer), (twin, other)):
        loss_of(m).backward()
        o.first_step()
        loss_of(m).backward()
        o.second_step()
    assert unchanged(snapshot(model.parameters()), snapshot(twin.parameters()))


@pytest.mark.parametrize("cls", [SAM, SAMMagnitude])
def test_gradients_may_be_clipped_after_unscaling(cls: type[SAM]) -> None:
    results = []
    for enabled in (False, True):
        model = linear()
        optimizer = cls(model.parameters(), rho=0.1, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        scaler.scale(loss_of(model)).backward()
        optimizer.first_step()
        scaler.scale(loss_of(model)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        results.append(snapshot(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("clipped", ["", "g1", "g2", "g1 g2"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize("unscaled", ["before first_step", "before step"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.NAdam])
def test_unscaling_before_first_step_is_refused(
    base: type[torch.optim.Optimizer],
    unscaled: str,
    set_to_none: bool,
    micro_batches: int,
    clipped: str,
) -> None:
    """g2 would be taken for unscaled; before step, it works."""
    model, twin = linear(), linear()
    optimizer = SAM(model.parameters(), base, 0.1, lr=0.1)
    other = SAM(twin.parameters(), base, 0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def passes(m: nn.Module, s: Any) -> None:
        for _ in range(micro_batches):
            loss = loss_of(m) / micro_batches
            (loss if s is None else s.scale(loss)).backward()

    def step() -> None:
        passes(model, scaler)
        if unscaled == "before first_step":
            scaler.unscale_(optimizer)
        if "g1" in clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.first_step()
        passes(model, scaler)
        if unscaled == "before step":
            scaler.unscale_(optimizer)
        if "g2" in clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=set_to_none)

    if unscaled == "before first_step":
        before = snapshot(model.parameters())
        with pytest.raises(RuntimeError, match=r"unscale_\(\) was called before first_step"):
            step()
        assert unchanged(model.parameters(), before) and not optimizer.is_perturbed
        return
    for _ in range(3):
        step()
        passes(twin, None)
        other.first_step()
        passes(twin, None)
        if "g2" in clipped:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        other.second_step(zero_grad=True)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


OLDER_SCALER = """
import torch
scaler = torch.amp.GradScaler("cpu")
from samkernels import SAM
w = torch.nn.Parameter(torch.ones(2))
optimizer = SAM([w], lr=0.1)
scaler.scale(w.sum()).backward()
scaler.unscale_(optimizer)
try:
    optimizer.first_step()
except RuntimeError as error:
    print(error)
"""


def test_a_scaler_that_is_older_than_the_import_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OLDER_SCALER], capture_output=True, text=True, check=True
    )
    assert "unscale_() was called before first_step" in done.stdout


def test_scalers_are_looked_for_where_there_may_be_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All objects of the process are gone through for that."""
    scans = []
    objects = gc.get_objects
    gc.collect()
    SAM([torch.nn.Parameter(torch.ones(1))], lr=0.1)._scalers.look()
    monkeypatch.setattr(gc, "get_objects", lambda: (scans.append(1), objects())[1])
    model = linear()
    optimizer = SAM(model.parameters(), lr=0.1)
    optimizer._scalers.look()
    assert not scans
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(3):
        scaled_step(model, optimizer, scaler)
    assert len(scans) == 1


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("reached", [[0], [1], [3], [1, 2]], ids=str)
@each_optimizer
def test_an_overflow_of_g1_shows_in_any_g2(
    cls: type[SAM], reached: list[int], unscaled: bool
) -> None:
    model = linear()
    params = list(model.parameters())
    optimizer = cls(params, rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled_step(model, optimizer, scaler)
    before = snapshot(params)
    for step in range(2):
        scaler.scale(loss_of(model)).backward()
        spoil_gradient(model)
        optimizer.first_step()
        for i, p in enumerate(params):
            p.requires_grad_(i in reached)
        scaler.scale(loss_of(model)).backward()
        for p in params:
            p.requires_grad_(True)
        if unscaled:
            scaler.unscale_(optimizer)
        if unscaled and cls is SAMDirection:
            optimizer.restore()  # which wants g1 unscaled, too
            break
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512 / 2**step
        optimizer.zero_grad()
        assert not any(p._post_accumulate_grad_hooks for p in params)
    assert unchanged(params, before)


# -- weights that somebody else writes -------------------------------------------------------------


def test_two_optimizers_may_not_perturb_the_same_parameters(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    other = SAM([*params[:1], parameter(1.0)], rho=0.1, lr=0.1)
    set_gradients(params, 0)
    optimizer.first_step()
    perturbed = snapshot(params)
    set_gradients(parameters_of(other), 1)
    with pytest.raises(
        RuntimeError, match=r"shape \(8, 4\) is at w \+ e\(w\) of another optimizer"
    ):
        other.first_step()
    assert unchanged(params, perturbed) and not other.is_perturbed
    set_gradients(params, 2)
    optimizer.restore()
    assert unchanged(params, before)
    other.first_step()
    del other  # perturbed: nobody remembers it
    set_gradients(params, 3)
    optimizer.first_step()


def test_two_optimizers_of_different_parameters_may_be_perturbed_at_once() -> None:
    models = [linear(seed=0), linear(seed=1)]
    twins = [linear(seed=0), linear(seed=1)]
    optimizers, others = ([SAM(m.parameters(), lr=0.1) for m in ms] for ms in (models, twins))
    for optimizer, model in zip(optimizers, models, strict=True):
        loss_of(model).backward()
        optimizer.first_step()
    for optimizer, model in zip(optimizers, models, strict=True):
        loss_of(model).backward()
        optimizer.second_step(zero_grad=True)
    for other, twin, model in zip(others, twins, models, strict=True):
        other.step(closure_of(other, twin))
        assert unchanged(model.parameters(), snapshot(twin.parameters()))


@pytest.mark.parametrize("base", CLASSES)
@pytest.mark.parametrize("writer", ["optimizer", "clamp", "closure", "parts"])
@each_optimizer
def test_weights_written_between_the_passes_are_refused(
    cls: type[SAM], writer: str, base: type[torch.optim.Optimizer]
) -> None:
    model = linear()
    params = list(model.parameters())
    optimizer = cls(params, base, 0.1, lr=0.1)
    take_step(optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    before = snapshot(params)

    def write() -> None:
        with torch.no_grad():
            if writer == "optimizer":
                torch.optim.SGD(params[3:], lr=0.1).step()
            else:
                params[1].clamp_(-0.1, 0.1)

    def closure() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        if optimizer.is_perturbed:
            write()
        return loss

    with pytest.raises(RuntimeError, match=r"was written while it was at w"):
        if writer == "closure":
            optimizer.step(closure)
        elif writer == "parts":
            for _ in optimizer.parts(range(2)):
                closure()
                optimizer.first_step()
                closure()
        else:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
    assert unchanged(params, before) and not optimizer.is_perturbed
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("when", ["first", "second", "both"])
@pytest.mark.parametrize("base", CLASSES)
@each_cls_and_variant
def test_gradients_that_are_the_weights_themselves(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    when: str,
    backend: str,
) -> None:
    results = []
    for alias in (False, True):
        params = [parameter(1.0, -2.0, 3.0), parameter(0.5)]
        optimizer = cls(params, base, 0.1, lr=0.1, backend=backend, **variant)
        for step in range(3):
            for now in ("first", "second"):
                set_gradients(params, step)
                if when in (now, "both"):
                    params[0].grad = params[0].data if alias else params[0].detach().clone()
                (optimizer.first_step if now == "first" else optimizer.second_step)()
        results.append(snapshot(params))
    assert unchanged(*results)


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["second_step", "step", "closure"])
@pytest.mark.parametrize(("base", "options"), BASES)
def test_hooks_fire_once_per_step(
    base: type[torch.optim.Optimizer], options: dict[str, Any], way: str
) -> None:
    model = linear()
    optimizer = SAM(model.parameters(), base, **options)
    events: list[str] = []

    def pre_hook(hooked: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert hooked is optimizer
        events.append("pre")

    def post_hook(hooked: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        assert not optimizer.is_perturbed
        events.append("post")

    optimizer.register_step_pre_hook(pre_hook)
    optimizer.register_step_post_hook(post_hook)
    for step in range(3):
        if way == "closure":
            optimizer.step(closure_of(optimizer, model))
        else:
            loss_of(model).backward()
            optimizer.first_step()
            assert events == ["pre", "post"] * step
            loss_of(model).backward()
            getattr(optimizer, way)()
        assert events == ["pre", "post"] * (step + 1)
        optimizer.zero_grad()


@pytest.mark.parametrize("which", ["pre", "post"])
@pytest.mark.parametrize("base", CLASSES)
def test_base_optimizer_hooks_fire_once_per_step(
    base: type[torch.optim.Optimizer], which: str
) -> None:
    """Whoever hooks into its step gets to see it, and the same weights up to rounding."""
    models = linear(), linear()
    optimizer, plain = (SAM(model.parameters(), base, lr=0.1) for model in models)
    hook, calls = count_calls(lambda *_: None)
    getattr(optimizer.base_optimizer, f"register_step_{which}_hook")(hook)
    for step in range(3):
        for o, model in zip((optimizer, plain), models, strict=True):
            o.step(closure_of(o, model))
        assert len(calls) == step + 1
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


# -- groups ----------------------------------------------------------------------------------------


def assert_shared(optimizer: SAM) -> None:
    base = optimizer.base_optimizer
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state


@pytest.mark.parametrize(("base", "options"), BASES)
def test_groups_and_state_are_shared_with_the_base_optimizer(
    base: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model = linear()
    optimizer = SAM(model.parameters(), base, **options)
    assert_shared(optimizer)
    take_step(optimizer, 0)
    assert_shared(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_shared(optimizer)
    optimizer.add_param_group({"params": [parameter(1.0, 2.0)], "rho": 0.5, "lr": 0.25})
    assert_shared(optimizer)
    assert len(optimizer.base_optimizer.param_groups) == 2
    take_step(optimizer, 1)
    assert len(optimizer.base_optimizer.state) == 5
    optimizer.load_state_dict(optimizer.state_dict())
    assert_shared(optimizer)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_changed_lr_after_load_state_dict(base: type[torch.optim.Optimizer]) -> None:
    p = parameter(0.0)
    optimizer = SAM([p], base, lr=1.0)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.25
    p.grad = torch.ones(1)
    optimizer.first_step()
    p.grad = torch.ones(1)
    optimizer.second_step()
    assert p.item() == pytest.approx(-0.25, rel=1e-6)


@each_optimizer
def test_added_groups_get_the_defaults(cls: type[SAM]) -> None:
    first = cls([parameter(1.0)], rho=0.3, adaptive=True, lr=0.1, momentum=0.9)
    first.add_param_group({"params": [parameter(1.0)]})
    own, added = first.param_groups
    assert {k: v for k, v in own.items() if k != "params"} == {
        k: v for k, v in added.items() if k != "params"
    }


def test_each_group_has_its_own_rho() -> None:
    """One norm over all groups: |g1| = 5, and e = rho * g1 / 5."""
    one, two, three = parameter(0.0), parameter(0.0), parameter(0.0)
    groups = [{"params": [one], "rho": 10.0}, {"params": [two], "rho": 0.0}, {"params": [three]}]
    optimizer = SAM(groups, rho=5.0, lr=0.1)
    one.grad, two.grad, three.grad = (torch.full((1,), g) for g in (3.0, 2.0, 12.0**0.5))
    optimizer.first_step()
    expected = [10 * 3 / 5, 0.0, 5 * 12**0.5 / 5]
    assert [p.item() for p in (one, two, three)] == pytest.approx(expected, rel=1e-6)


@each_backend
def test_granularity_may_differ_between_groups(backend: str) -> None:
    """The norms of "global" are over all groups, those of "tensor" over one tensor."""
    params = [parameter(0.0, 0.0) for _ in range(3)]
    groups = [
        {"params": [p], "granularity": granularity}
        for p, granularity in zip(params, GRANULARITIES, strict=True)
    ]
    optimizer = SAMMagnitude(groups, lr=1.0, backend=backend)
    g1 = set_gradients(params, 0)
    optimizer.first_step()
    g2 = set_gradients(params, 1)
    optimizer.second_step()
    n1, n2 = torch.cat(g1).norm(), torch.cat(g2).norm()
    u = [
        g2[0].abs() * g1[0].sign(),
        g2[1].norm() / g1[1].norm() * g1[1],
        n2 / n1 * g1[2],
    ]
    for p, expected in zip(params, u, strict=True):
        torch.testing.assert_close(p.detach(), -expected)


@pytest.mark.parametrize(
    ("group", "error", "text"),
    [
        ({"rho": -0.1}, ValueError, r"rho of parameter group 1=-0\.1"),
        ({"rho": "0.1"}, TypeError, "rho of parameter group 1 is str"),
        ({"adaptive": 1}, TypeError, "adaptive of parameter group 1 is int"),
        ({"granularity": "layer"}, ValueError, "granularity of parameter group 1='layer'"),
    ],
)
def test_options_of_added_groups_are_checked(
    group: dict[str, Any], error: type[Exception], text: str
) -> None:
    optimizer = SAMDirection([parameter(1.0)], lr=0.1)
    with pytest.raises(error, match=text):
        optimizer.add_param_group({"params": [parameter(1.0)], **group})
    assert len(optimizer.param_groups) == 1
    assert_shared(optimizer)


def test_a_group_that_is_no_dict() -> None:
    optimizer = SAM([parameter(1.0)], lr=0.1)
    with pytest.raises(TypeError, match="param_group is list: give a dict"):
        optimizer.add_param_group([parameter(1.0)])  # type: ignore[arg-type]


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(("base", "options"), BASES)
@each_cls_and_variant
def test_statistics(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    backend: str,
) -> None:
    model = linear()
    weights, biases = list(model.parameters())[::2], list(model.parameters())[1::2]
    groups = [{"params": weights}, {"params": biases, "rho": 0.5}]
    optimizer = cls(groups, base, backend=backend, track_statistics=True, **variant, **options)
    assert optimizer.statistics is None
    for step in range(3):
        params = parameters_of(optimizer)
        w = torch.cat([p.detach().flatten() for p in params]).double()
        g1 = torch.cat([g.flatten() for g in set_gradients(params, 10 + step)]).double()
        optimizer.first_step()
        g2 = torch.cat([g.flatten() for g in set_gradients(params, 20 + step)]).double()
        optimizer.second_step(zero_grad=True)

        expected = {
            "first_grad_norm": g1.norm(),
            "second_grad_norm": g2.norm(),
            "weight_norm": w.norm(),
            "cosine": g1 @ g2 / (g1.norm() * g2.norm()),
            "share_second_larger": (g2.abs() > g1.abs()).double().mean(),
            "share_signs_agree": (g1 * g2 > 0).double().mean(),
        }
        assert optimizer.statistics is not None
        statistics = optimizer.statistics._asdict()
        assert statistics.keys() == expected.keys()
        for name, value in statistics.items():
            assert isinstance(value, Tensor), name
            assert (value.shape, value.dtype) == ((), torch.float32)
            assert not value.requires_grad
            # One sum of 58 products in float32, and roots and quotients of such.
            torch.testing.assert_close(value.double(), expected[name], rtol=4e-6, atol=4e-6)


def test_statistics_leave_the_trajectory_alone() -> None:
    results = []
    for track_statistics in (False, True):
        model = linear()
        optimizer = SAM(model.parameters(), lr=0.1, track_statistics=track_statistics)
        for step in range(3):
            take_step(optimizer, step)
        results.append(snapshot(model.parameters()))
        assert (optimizer.statistics is None) == (not track_statistics)
    assert unchanged(results[0], results[1])
