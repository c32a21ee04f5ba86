"""A step is made as a whole or not at all: skipped first steps, interrupts in the second step, and
parts of a batch that measure as the batch does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samkernels import SAM, SAMDirection, SAMMagnitude, SGDHess, backends
from samkernels.backends import Mix, SgdOptions, native
from samkernels.optim import _update
from tests.optim_helpers import (
    linear,
    parameter,
    parameters_of,
    same_bits,
    set_gradients,
    snapshot,
    take_step,
    through_a_file,
    unchanged,
)
from tests.optimizers import ADAM, BACKENDS, SGD, Base, Variant, each_backend, each_variant

DAMPED: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.05}


def skipped_step(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    set_gradients(params, 100)
    params[1].grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
    optimizer.first_step()
    set_gradients(params, 101)
    optimizer.second_step(zero_grad=True)


def resumed(optimizer: SAM) -> SAM:
    (group,) = optimizer.param_groups
    new = type(optimizer)(group["params"], lr=9.0, backend=optimizer._backend)
    new.load_state_dict(through_a_file(optimizer.state_dict()))
    return new


COPIES: dict[str, Callable[[SAM], SAM]] = {
    "the same": lambda optimizer: optimizer,
    "resumed": resumed,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("skipped", [1, 2])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each_backend
def test_first_steps_that_are_skipped_leave_momentum_as_it_was(
    backend: str, dtype: torch.dtype, copied: Callable[[SAM], SAM], skipped: int
) -> None:
    """The next one has u for its momentum, and not (1 - dampening) * u."""
    if dtype is torch.float64 and backend == "native":
        backend = "auto"
    for options in (DAMPED, {**DAMPED, "maximize": True}):
        optimizer, twin = (
            SAM(linear(dtype).parameters(), backend=backend, **options) for _ in range(2)
        )
        for _ in range(skipped):
            skipped_step(optimizer)
        optimizer = copied(optimizer)
        for step in range(3):
            take_step(optimizer, step)
            take_step(twin, step)
            if step == 1:
                skipped_step(optimizer)
        params, twins = parameters_of(optimizer), parameters_of(twin)
        assert unchanged(params, snapshot(twins))
        for p, q in zip(params, twins, strict=True):
            assert same_bits(
                optimizer.state[p]["momentum_buffer"], twin.state[q]["momentum_buffer"]
            )


@pytest.mark.parametrize(
    ("users", "skipped"),
    [
        pytest.param(([0], [0, 1], [0, 1], [0, 1, 2]), 1, id="one has momentum"),
        pytest.param(([0, 1], [0], [1, 2], [0, 1, 2]), 0, id="one steps before the other"),
        pytest.param(([0, 1, 2], [0], [0, 1], [0, 1], [0, 1, 2]), 0, id="one by one"),
    ],
)
@each_backend
def test_parameters_whose_first_step_was_skipped_together(
    backend: str, users: tuple[list[int], ...], skipped: int
) -> None:
    """What one of them does next says nothing of the others."""
    params, twins = ([parameter(1.0, 2.0), parameter(3.0), parameter(4.0)] for _ in range(2))
    optimizer, twin = (SAM(ps, backend=backend, **DAMPED) for ps in (params, twins))
    for step, of_step in enumerate(users):
        for o, ps in ((optimizer, params), (twin, twins)):
            if step == skipped and o is twin:
                continue
            for half in (o.first_step, o.second_step):
                o.zero_grad()
                set_gradients([ps[i] for i in of_step], step)
                if step == skipped:
                    ps[0].grad[0] = torch.nan  # type: ignore[index]
                half()
    assert unchanged(params, snapshot(twins))


@pytest.mark.parametrize("is_saved", [False, True])
@each_backend
def test_momentum_that_began_with_a_skipped_step_and_went_on_without_dampening(
    backend: str, is_saved: bool
) -> None:
    """It is saved, and is no first momentum when there is dampening again."""
    optimizer, twin = (SAM(linear().parameters(), backend=backend, **DAMPED) for _ in range(2))
    skipped_step(optimizer)
    for step, dampening in enumerate([0.0, 0.5, 0.5]):
        for o in (optimizer, twin):
            o.param_groups[0]["dampening"] = dampening
            take_step(o, step)
        if is_saved:
            optimizer = resumed(optimizer)
    assert unchanged(parameters_of(optimizer), snapshot(parameters_of(twin)))


@pytest.mark.parametrize("is_empty", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["native", "emulated", "interpreted", "foreach", "reference"])
def test_dampening_that_lies_on_the_device(
    backend: str, dtype: torch.dtype, is_empty: bool
) -> None:
    """1 with buffers of 0 is a first step, bit for bit; 1 - dampening is any other."""
    of = backends.get(backend)
    shapes = [(3, 5), (70,), ()]
    generator = torch.Generator().manual_seed(0)

    def values() -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    old, grads, buffers = values(), values(), values()
    skip = Mix(grads, ascent_square=torch.tensor(torch.inf, dtype=torch.float64))
    options = SgdOptions(0.1, 0.9, 0.3, 0.0, False, False, init_momentum=is_empty)
    results = []
    for on_device in (False, True):
        w, b = [x.clone() for x in old], [x.clone() for x in buffers]
        now = options
        if is_empty:
            of.sgd_(w, old, b, skip, options)
            assert all(same_bits(x, torch.zeros_like(x)) for x in b)
            assert unchanged(w, old)
        if on_device:
            factor = torch.tensor(1.0 if is_empty else 1 - 0.3)
            now = options._replace(init_momentum=False, one_minus_dampening=factor)
        of.sgd_(w, old, b, Mix(grads), now)
        results.append([*w, *b])
    assert all(map(same_bits, *results))


# -- interrupts in the second step -----------------------------------------------------------------


@pytest.mark.parametrize("interrupted", [0, 1, 2])
@pytest.mark.parametrize("where", ["before the op", "after the op", "state"])
@pytest.mark.parametrize("base", [SGD, ADAM], ids=str)
@pytest.mark.parametrize("started", [False, True])
@each_variant
def test_an_interrupt_between_groups_makes_all_of_the_step_or_nothing(
    variant: Variant,
    base: Base,
    where: str,
    interrupted: int,
    started: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build() -> SAM:
        params = list(linear().parameters())
        groups = [{"params": params[:1]}, {"params": params[1:2]}, {"params": params[2:]}]
        optimizer = variant(groups, base, backend="native")
        if started:
            take_step(optimizer, 7)
        return optimizer

    optimizer, twin = build(), build()
    params = parameters_of(optimizer)
    name = "sgd_" if base is SGD else "adam_"
    original, calls = getattr(native, name), []

    def interrupts(*args: Any, **kwargs: Any) -> None:
        calls.append(0)
        is_now = len(calls) == interrupted + 1
        if is_now and where == "before the op":
            raise KeyboardInterrupt
        original(*args, **kwargs)
        if is_now and where == "after the op":
            raise KeyboardInterrupt

    before, state = snapshot(params), copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(params, 0)
    optimizer.first_step()
    set_gradients(params, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "state":  # the last instruction of the step but one
            patch.setattr(_update, "_make_all", _interrupted_after(_update._make_all))
        else:
            patch.setattr(native, name, interrupts)
        optimizer.second_step()
    assert not optimizer.is_perturbed
    optimizer.zero_grad()
    if where == "before the op" and interrupted == 0:
        assert unchanged(params, before)
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    else:
        take_step(twin, 0)
    take_step(optimizer, 3)
    take_step(twin, 3)
    assert unchanged(params, snapshot(parameters_of(twin)))
    states = (o.state_dict()["state"] for o in (optimizer, twin))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def _interrupted_after(function: Callable[..., None]) -> Callable[..., None]:
    def interrupted(*args: Any) -> None:
        function(*args)
        raise KeyboardInterrupt

    return interrupted


class Interrupting(dict[str, Any]):
    """A group whose step cannot be counted."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "step":
            raise KeyboardInterrupt
        super().__setitem__(key, value)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("interrupted", [0, 1])
def test_sgdhess_counts_a_step_that_was_interrupted(
    interrupted: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all groups or none, together with the weights; and what it saves can be loaded."""

    def build() -> tuple[nn.Module, SGDHess]:
        model = linear()
        groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
        return model, SGDHess(groups, lr=0.1, momentum=0.9, seed=0, k=k)

    def step(model: nn.Module, optimizer: SGDHess, seed: int) -> None:
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        optimizer.backward(model(x).square().sum())
        optimizer.step()

    (model, optimizer), (twin, other) = build(), build()
    groups = list(optimizer.param_groups)
    optimizer.param_groups[interrupted] = Interrupting(groups[interrupted])
    with pytest.raises(KeyboardInterrupt):
        step(model, optimizer, 0)
    optimizer.param_groups[interrupted] = dict(optimizer.param_groups[interrupted])
    step(twin, other, 0)
    assert unchanged(model.parameters(), snapshot(twin.parameters()))
    saved = through_a_file(optimizer.state_dict())
    assert len({group["step"] for group in saved["param_groups"]}) == 1
    _, new = build()
    new.load_state_dict(saved)

    original, calls = native.sgd_hess_, []

    def interrupts(*args: Any) -> None:
        original(*args)
        calls.append(0)
        if len(calls) == 1:
            raise KeyboardInterrupt

    model, optimizer = build()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(native, "sgd_hess_", interrupts)
        step(model, optimizer, 0)
    for seed in (1, 2):
        step(model, optimizer, seed)
        step(twin, other, seed)
    assert unchanged(model.parameters(), snapshot(twin.parameters()))
    torch.testing.assert_close(optimizer.state_dict(), other.state_dict(), rtol=0, atol=0)


# -- parts -----------------------------------------------------------------------------------------


def test_a_body_that_raises_while_the_parts_have_a_name() -> None:
    model = linear()
    params = list(model.parameters())
    optimizer = SAM(params, lr=0.1)
    before = snapshot(params)
    parts = optimizer.parts(range(3))
    with pytest.raises(OSError, match="the disk") as caught:
        for part in parts:
            set_gradients(params, part)
            optimizer.first_step()
            set_gradients(params, part + 1)
            if part == 1:
                raise OSError("the disk")
    assert caught.traceback  # which holds the frame, and with it the name
    assert unchanged(params, before) and not optimizer.is_perturbed


def test_parts_that_are_asked_for_one_by_one() -> None:
    results = []
    for by_next in (False, True):
        params = [parameter(1.0, 2.0)]
        optimizer = SAM(params, lr=0.1)
        parts = optimizer.parts(range(3))
        if by_next:
            _both_passes(optimizer, next(parts))
        for part in parts:
            _both_passes(optimizer, part)
        optimizer.step()
        results.append(snapshot(params))
    assert unchanged(*results)


def _both_passes(optimizer: SAM, part: int) -> None:
    set_gradients(parameters_of(optimizer), part)
    optimizer.first_step()
    set_gradients(parameters_of(optimizer), part + 10)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("granularity", ["element", "tensor", "global"])
@pytest.mark.parametrize("cls", [SAMDirection, SAMMagnitude])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_parts_measure_as_their_batch_does(
    backend: str, cls: type[SAM], granularity: str, max_grad_norm: float | None
) -> None:
    """n1 and n2 are over the parameters that have both gradients, as if there were no others."""
    results = []
    for count, num_params in ((1, 3), (2, 3), (1, 2)):
        params = [parameter(1.0, 2.0), parameter(3.0, -4.0), parameter(5.0)][:num_params]
        optimizer = cls(
            params,
            lr=0.1,
            granularity=granularity,  # type: ignore[call-arg]
            max_grad_norm=max_grad_norm,
            backend=backend,
        )
        for step in range(2):
            for _ in optimizer.parts(range(count)):
                set_gradients(params, step)
                optimizer.first_step()
                set_gradients(params[:2], step + 10)
            optimizer.step()
            optimizer.zero_grad()
        results.append(snapshot(params))
    whole, in_parts, alone = results
    for one, two in zip(whole, in_parts, strict=True):
        torch.testing.assert_close(one, two)
    assert unchanged(whole[:2], alone)
    assert same_bits(whole[2], torch.tensor([5.0]))
