"""torch.optim.Adam and AdamW as base optimizers: when the update is fused and when it is not, step
counts, options, and checkpoints that go to torch.optim and come from there.

Trajectories are in test_optim_trajectories.py."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samkernels import SAM, SAMDirection, SAMMagnitude, backends
from tests.optim_helpers import (
    ConvNet,
    count_calls,
    linear,
    parameter,
    set_gradients,
    snapshot,
    take_step,
    through_a_file,
    unchanged,
)
from tests.optimizers import (
    BACKENDS,
    INFO,
    each_cls_and_variant,
    each_optimizer,
)

ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99)}
every_base = pytest.mark.parametrize("base", [ADAM, ADAMW])
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# PyTorch 2.7 made AdamW an Adam with this option.
has_decoupled_option = "decoupled_weight_decay" in inspect.signature(ADAM).parameters


def sam_step(optimizer: SAM, params: Iterable[Tensor], seed: int) -> None:
    """Of SAM with rho = 0: the base optimizer's step with the gradients of that seed."""
    params = list(params)
    set_gradients(params, 99)
    optimizer.first_step()
    set_gradients(params, seed)
    optimizer.second_step(zero_grad=True)


def plain_step(optimizer: torch.optim.Optimizer, params: Iterable[Tensor], seed: int) -> None:
    set_gradients(params, seed)
    optimizer.step()
    optimizer.zero_grad()


def assert_near(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Some roundings in weights of order 1."""
    for a, b in zip(ours, theirs, strict=True):
        bound = 1e-14 if a.dtype is torch.float64 else 3e-6
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


# -- fused, or not ---------------------------------------------------------------------------------


class MyAdamW(torch.optim.AdamW):
    """May have changed anything, so that the fused update must not take its place."""


@pytest.mark.parametrize(
    ("base", "options", "is_fused"),
    [
        (ADAM, {}, True),
        (ADAMW, {}, True),
        (ADAMW, {"capturable": True}, True),
        (ADAMW, {"foreach": False, "maximize": True}, True),
        (ADAMW, {"fused": True}, True),
        (ADAM, {"amsgrad": True}, False),
        (ADAMW, {"amsgrad": True}, False),
        (MyAdamW, {}, False),
    ],
)
@every_backend
def test_which_steps_are_fused(
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    is_fused: bool,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = linear()
    optimizer = SAM(model.parameters(), base, backend=backend, lr=0.1, **options)
    module = backends.get(backend)
    fused, fused_calls = count_calls(module.adam_)
    base_step, base_calls = count_calls(optimizer.base_optimizer.step)
    monkeypatch.setattr(module, "adam_", fused)
    monkeypatch.setattr(optimizer.base_optimizer, "step", base_step)
    before = snapshot(model.parameters())
    take_step(optimizer, 0)
    assert (len(fused_calls), len(base_calls)) == ((1, 0) if is_fused else (0, 1))
    assert not unchanged(model.parameters(), before)


@pytest.mark.parametrize("name", ["betas", "eps", "weight_decay"])
def test_options_on_a_device_are_left_to_the_base_optimizer(name: str) -> None:
    """Reading them would make the host wait."""
    optimizer = SAM(linear().parameters(), ADAMW, lr=0.1)
    (group,) = optimizer.param_groups
    fused = optimizer._fused_base
    assert fused is not None and fused.serves(group)
    on_device = torch.tensor(0.1, device="meta")
    group[name] = (0.9, on_device) if name == "betas" else on_device
    assert not fused.serves(group)


def test_a_differentiable_step_is_left_to_the_base_optimizer() -> None:
    optimizer = SAM(linear().parameters(), ADAMW, lr=0.1, differentiable=True)
    fused = optimizer._fused_base
    assert fused is not None and not fused.serves(optimizer.param_groups[0])


@every_backend
@every_base
def test_amsgrad_steps_as_torch_does(base: type[torch.optim.Optimizer], backend: str) -> None:
    """Through the base optimizer's own step, in one group of two and so in both."""
    models = linear(), linear()
    groups = [
        [
            {"params": list(model[0].parameters()), "amsgrad": True},
            {"params": list(model[2].parameters())},
        ]
        for model in models
    ]
    optimizer = SAM(groups[0], base, rho=0.0, backend=backend, **OPTIONS)
    alone = base(groups[1], **OPTIONS)
    for step in range(5):
        sam_step(optimizer, models[0].parameters(), step)
        plain_step(alone, models[1].parameters(), step)
    assert unchanged(models[0].parameters(), snapshot(models[1].parameters()))
    (weight, *_), _ = (group["params"] for group in optimizer.param_groups)
    assert "max_exp_avg_sq" in optimizer.state[weight]


# -- step counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((backend, torch.float32) for backend in BACKENDS), ("foreach", torch.float64)],
)
@every_base
def test_parameters_without_a_gradient_in_some_steps(
    base: type[torch.optim.Optimizer], backend: str, dtype: torch.dtype
) -> None:
    """Each has a count of its own: torch.optim steps beside, with the same gradients."""
    models = linear(dtype), linear(dtype)
    optimizer = SAM(models[0].parameters(), base, rho=0.0, backend=backend, **OPTIONS)
    alone = base(models[1].parameters(), **OPTIONS)
    ours, theirs = (list(model.parameters()) for model in models)
    which = [(0, 1, 2, 3), (0, 2), (1,), (0, 1, 2, 3), (3, 1), (0,)]
    for step, present in enumerate(which):
        sam_step(optimizer, [ours[i] for i in present], step)
        plain_step(alone, [theirs[i] for i in present], step)
        assert_near(ours, theirs)
    counts = [sum(i in present for present in which) for i in range(4)]
    assert len(set(counts)) > 1
    assert [optimizer.state[p]["step"].item() for p in ours] == counts
    assert [alone.state[p]["step"].item() for p in theirs] == counts


@every_backend
@pytest.mark.parametrize("spoiled", [0, 1, 2])
@each_cls_and_variant
def test_a_skipped_step_is_as_if_it_had_not_been(
    cls: type[SAM], variant: dict[str, Any], spoiled: int, backend: str
) -> None:
    """The bias corrections of all later steps are those of a run without it."""
    weights, states = [], []
    for has_spoiled_step in (False, True):
        model = linear()
        params = list(model.parameters())
        optimizer = cls(params, ADAMW, 0.1, backend=backend, **OPTIONS, **variant)
        for step in range(3):
            if has_spoiled_step and step == spoiled:
                set_gradients(params, 50)
                params[1].grad[3] = float("nan")
                optimizer.first_step()
                set_gradients(params, 51)
                optimizer.second_step()
            take_step(optimizer, step)
        weights.append(snapshot(params))
        states.append([x for p in params for x in optimizer.state[p].values()])
    assert unchanged(*weights) and unchanged(*states)


def test_an_overflow_that_a_grad_scaler_finds_does_not_count() -> None:
    weights = []
    for overflows in (False, True):
        model = linear()
        params = list(model.parameters())
        optimizer = SAM(params, ADAMW, 0.1, **OPTIONS)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        for step in range(-1 if overflows else 0, 3):
            set_gradients(params, 2 * step, scaler.get_scale())
            optimizer.first_step()
            set_gradients(params, 2 * step + 1, scaler.get_scale())
            if step < 0:
                params[2].grad[0, 0] = float("inf")
            scaler.scale(torch.ones(()))  # the scaler makes its tensor of the scale here
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert [optimizer.state[p]["step"].item() for p in params] == [3] * 4
        weights.append(snapshot(params))
    for a, b in zip(*weights, strict=True):
        assert torch.equal(a, b)  # scales are powers of 2


# -- options ---------------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("option", ["capturable", "fused"])
def test_where_torch_keeps_the_count_makes_no_difference(option: str, backend: str) -> None:
    results = []
    for options in ({}, {option: True}):
        model = linear()
        optimizer = SAMDirection(model.parameters(), ADAMW, backend=backend, **OPTIONS, **options)
        for step in range(3):
            take_step(optimizer, step)
        results.append(snapshot(model.parameters()))
    assert unchanged(*results)


@every_backend
def test_options_as_tensors(backend: str) -> None:
    """On the host they are numbers; what is written to lr between steps counts."""
    results = []
    for number in (float, torch.tensor):
        model = linear()
        betas = (number(0.5), number(0.75))  # exact in float32
        optimizer = SAM(
            model.parameters(), ADAMW, backend=backend, lr=number(0.25), betas=betas, eps=1e-6
        )
        take_step(optimizer, 0)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        take_step(optimizer, 1)
        results.append(snapshot(model.parameters()))
    assert unchanged(*results)


@pytest.mark.skipif(not has_decoupled_option, reason="PyTorch before 2.7")
@every_backend
def test_decoupled_weight_decay_is_an_option(backend: str) -> None:
    """Of Adam in the constructor, and of either in the group."""
    results: dict[str, list[Tensor]] = {}
    for name, base, options, decoupled in (
        ("Adam", ADAM, {}, None),
        ("AdamW", ADAMW, {}, None),
        ("Adam, decoupled", ADAM, {"decoupled_weight_decay": True}, None),
        ("Adam, decoupled later", ADAM, {}, True),
        ("AdamW, not decoupled", ADAMW, {}, False),
    ):
        model = linear()
        optimizer = SAM(model.parameters(), base, backend=backend, **OPTIONS, **options)
        if decoupled is not None:
            optimizer.param_groups[0]["decoupled_weight_decay"] = decoupled
        take_step(optimizer, 0)
        take_step(optimizer, 1)
        results[name] = snapshot(model.parameters())
    assert unchanged(results["Adam, decoupled"], results["AdamW"])
    assert unchanged(results["Adam, decoupled later"], results["AdamW"])
    assert unchanged(results["AdamW, not decoupled"], results["Adam"])
    assert not unchanged(results["AdamW"], results["Adam"])


@every_base
def test_groups_that_do_not_say_whether_the_decay_is_decoupled(
    base: type[torch.optim.Optimizer],
) -> None:
    """Those of PyTorch before 2.7: the class says it."""
    results = []
    for says in (True, False):
        model = linear()
        optimizer = SAM(model.parameters(), base, **OPTIONS)
        if not says:
            optimizer.param_groups[0].pop("decoupled_weight_decay", None)
        take_step(optimizer, 0)
        results.append(snapshot(model.parameters()))
    assert unchanged(*results)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", float("nan"), "lr=nan"),
        ("betas", (0.9, 1.0), r"betas\[1\]=1\.0: give a number below 1"),
        ("betas", (float("nan"), 0.9), r"betas\[0\]=nan"),
        ("eps", -1e-8, "eps=-1e-08"),
        ("weight_decay", -0.1, r"weight_decay=-0\.1"),
        ("granularity", "layer", "granularity='layer'"),
    ],
)
@every_backend
def test_a_later_group_that_is_wrong_leaves_the_earlier_ones_alone(
    option: str, value: Any, message: str, backend: str
) -> None:
    params = [parameter(1.0, 2.0), parameter(3.0, 4.0)]
    optimizer = SAMMagnitude([{"params": [p]} for p in params], ADAMW, backend=backend, **OPTIONS)
    take_step(optimizer, 0)
    before = snapshot([*params, *(x for p in params for x in optimizer.state[p].values())])
    optimizer.param_groups[1][option] = value
    set_gradients(params, 1)
    optimizer.first_step()
    set_gradients(params, 2)
    with pytest.raises(ValueError, match=message):
        optimizer.second_step()
    now = [*params, *(x for p in params for x in optimizer.state[p].values())]
    assert unchanged(now, before) and not optimizer.is_perturbed


def test_a_first_step_that_fails_leaves_no_state() -> None:
    params = [parameter(1.0), parameter(2.0)]
    optimizer = SAM([{"params": [p]} for p in params], ADAM, **OPTIONS)
    optimizer.param_groups[1]["eps"] = -1.0
    set_gradients(params, 0)
    optimizer.first_step()
    set_gradients(params, 1)
    with pytest.raises(ValueError, match="eps"):
        optimizer.second_step()
    assert not optimizer.state_dict()["state"]


def test_a_state_that_is_no_tensor() -> None:
    (p,) = params = [parameter(1.0, 2.0)]
    optimizer = SAM(params, ADAM, **OPTIONS)
    take_step(optimizer, 0)
    optimizer.state[p]["exp_avg_sq"] = 3.0
    with pytest.raises(TypeError, match=r"exp_avg_sq of a parameter of shape \(2,\) is float"):
        take_step(optimizer, 1)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (1.0, TypeError, r"the step of a parameter of shape \(1,\) is 1.0"),
        (torch.ones(1), ValueError, r"step in the state has shape \(1,\)"),
        (torch.ones((), dtype=torch.int64), ValueError, r"step in the state .* torch.int64"),
    ],
)
def test_a_wrong_count_of_a_later_group_leaves_the_earlier_ones_alone(
    step: Any, error: type[Exception], message: str
) -> None:
    params = [parameter(1.0), parameter(2.0)]
    optimizer = SAM([{"params": [p]} for p in params], ADAM, **OPTIONS)
    take_step(optimizer, 0)
    optimizer.state[params[1]]["step"] = step
    kept = [params[0], *optimizer.state[params[0]].values()]
    before = snapshot(kept)
    with pytest.raises(error, match=message):
        take_step(optimizer, 1)
    assert unchanged(kept, before) and not optimizer.is_perturbed


def test_any_real_number_is_a_learning_rate() -> None:
    moved = []
    for lr in (0.25, Fraction(1, 4)):
        params = [parameter(1.0, 2.0), nn.Parameter(torch.ones(3, dtype=torch.float64))]
        optimizer = SAM(params, ADAMW, **{**OPTIONS, "lr": 0.25})
        optimizer.param_groups[0]["lr"] = lr
        take_step(optimizer, 0)
        moved.append(snapshot(params))
    assert unchanged(*moved)


# -- checkpoints -----------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_base
@each_optimizer
def test_layout_is_that_of_torch(
    cls: type[SAM], base: type[torch.optim.Optimizer], dtype: torch.dtype, backend: str
) -> None:
    model, twin = linear(dtype), linear(dtype)
    optimizer = cls(model.parameters(), base, backend=backend, track_statistics=True, **OPTIONS)
    alone = base(twin.parameters(), **OPTIONS)
    for step in range(2):
        take_step(optimizer, step)
        plain_step(alone, twin.parameters(), step)
    ours, theirs = optimizer.state_dict(), alone.state_dict()
    own_options = INFO[cls].group_options
    for group, their_group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {k: v for k, v in group.items() if k not in own_options} == their_group
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        assert list(state) == list(theirs["state"][index]) == ["step", "exp_avg", "exp_avg_sq"]
        tensors = zip(state.values(), theirs["state"][index].values(), strict=True)
        for tensor, their_tensor in tensors:
            assert (tensor.shape, tensor.dtype) == (their_tensor.shape, their_tensor.dtype)
            assert not tensor.requires_grad
    # torch.optim adds to each of them: a count that two parameters shared would run twice as fast.
    counts = [state["step"].data_ptr() for state in ours["state"].values()]
    assert len(set(counts)) == len(counts) == 4


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("backend", ["foreach", "reference"])
@every_base
def test_a_checkpoint_goes_to_torch_and_comes_back(
    base: type[torch.optim.Optimizer], backend: str, options: dict[str, Any]
) -> None:
    """Three steps there, three here, three there: the trajectory of torch.optim, in float64."""
    there, here, alone_model = (linear().double() for _ in range(3))
    theirs = base(there.parameters(), **OPTIONS)
    # Where torch keeps the count is an option of its checkpoint's groups, and it refuses to make
    # a step with capturable=True on the CPU.
    alone = base(alone_model.parameters(), **OPTIONS)
    for step in range(3):
        plain_step(theirs, there.parameters(), step)
    here.load_state_dict(there.state_dict())
    ours = SAM(here.parameters(), base, rho=0.0, lr=9.0, weight_decay=9.0, backend=backend)
    checkpoint = theirs.state_dict()
    checkpoint["param_groups"][0].update(options)
    ours.load_state_dict(through_a_file(checkpoint))
    assert {k: ours.param_groups[0][k] for k in OPTIONS} == OPTIONS
    for step in range(3, 6):
        sam_step(ours, here.parameters(), step)
    there.load_state_dict(here.state_dict())
    checkpoint = ours.state_dict()
    checkpoint["param_groups"][0].update(dict.fromkeys(options, False))
    theirs = base(there.parameters(), lr=9.0)
    theirs.load_state_dict(through_a_file(checkpoint))
    for step in range(6, 9):
        plain_step(theirs, there.parameters(), step)
    for step in range(9):
        plain_step(alone, alone_model.parameters(), step)
    assert_near(there.parameters(), alone_model.parameters())
    counts = [theirs.state[p]["step"].item() for p in there.parameters()]
    assert counts == [9] * 4


@every_backend
def test_a_checkpoint_of_another_memory_layout(backend: str) -> None:
    """Moments saved with channels_last weights, loaded for contiguous ones."""
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        model = ConvNet().to(memory_format=layout)
        optimizer = SAM(model.parameters(), ADAMW, backend=backend, **OPTIONS)
        take_step(optimizer, 0)
        twin = ConvNet()
        twin.load_state_dict(through_a_file(model.state_dict()))
        resumed = SAM(twin.parameters(), ADAMW, backend=backend, **OPTIONS)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        take_step(resumed, 1)
        take_step(resumed, 2)
        results.append(snapshot(twin.parameters()))
    assert_near(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_resuming_in_half_precision(dtype: torch.dtype) -> None:
    model, twin = linear(dtype), linear(dtype)
    optimizer = SAMMagnitude(model.parameters(), ADAMW, **OPTIONS)
    take_step(optimizer, 0)
    twin.load_state_dict(through_a_file(model.state_dict()))
    resumed = SAMMagnitude(twin.parameters(), ADAMW, **OPTIONS)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in twin.parameters():
        state = resumed.state[p]
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is dtype
        assert state["step"].dtype is torch.float32  # bfloat16 cannot count to 1000
    for o in (optimizer, resumed):
        take_step(o, 1)
        take_step(o, 2)
    assert unchanged(twin.parameters(), snapshot(model.parameters()))


def test_an_old_checkpoint_with_counts_that_are_numbers() -> None:
    """As before PyTorch 1.12."""
    results = []
    for old in (False, True):
        model = linear()
        optimizer = SAM(model.parameters(), ADAM, **OPTIONS)
        take_step(optimizer, 0)
        checkpoint = through_a_file(optimizer.state_dict())
        if old:
            for state in checkpoint["state"].values():
                state["step"] = int(state["step"])
        optimizer.load_state_dict(checkpoint)
        take_step(optimizer, 1)
        results.append(snapshot(model.parameters()))
    assert unchanged(*results)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["state"][1].pop(name)


def of_sgd(checkpoint: dict[str, Any]) -> None:
    checkpoint["state"] = {i: {"momentum_buffer": torch.zeros(())} for i in range(4)}


def of_another_shape(checkpoint: dict[str, Any]) -> None:
    checkpoint["state"][2]["exp_avg_sq"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("exp_avg"), "state of parameter 1 has no exp_avg: load a checkpoint of AdamW"),
        (without("step"), "state of parameter 1 has no step"),
        (of_sgd, "state of parameter 0 has no exp_avg"),
        (of_another_shape, r"exp_avg_sq of parameter 2 has shape \(3,\) and the parameter has"),
    ],
)
def test_checkpoints_that_do_not_fit(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    model = linear()
    optimizer = SAM(model.parameters(), ADAMW, **OPTIONS)
    take_step(optimizer, 0)
    state = [x for p in model.parameters() for x in optimizer.state[p].values()]
    before = snapshot(state)
    checkpoint = through_a_file(optimizer.state_dict())
    spoil(checkpoint)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(checkpoint)
    assert unchanged([x for p in model.parameters() for x in optimizer.state[p].values()], before)
    take_step(optimizer, 1)


# State that somebody has put there


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "momentum_buffer"])
@every_backend
def test_negated_state_counts_with_its_values(name: str, backend: str) -> None:
    """PyTorch negates such a tensor when it reads it: its memory holds the opposite."""
    base, options = torch.optim.Adam, {}
    if name == "momentum_buffer":
        base, options = torch.optim.SGD, {"momentum": 0.9}
    results = []
    for negated in (False, True):
        params = [nn.Parameter(torch.linspace(-1, 1, 5)), nn.Parameter(torch.ones(2, 3))]
        optimizer = SAM(params, base, backend=backend, lr=0.1, **options)
        for step in range(4):
            for half in (optimizer.first_step, optimizer.second_step):
                for p in params:
                    p.grad = torch.full_like(p, 0.3 + step)
                half()
            if negated and step == 1:
                for p in params:
                    state = optimizer.state[p]
                    state[name] = torch._neg_view(-state[name])
        results.append(snapshot(params))
    assert unchanged(results[0], results[1])


@every_backend
def test_steps_that_are_one_tensor_are_refused(backend: str) -> None:
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(2, 3))]
    optimizer = SAM(params, torch.optim.Adam, backend=backend, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.second_step()
    shared = torch.tensor(1.0)
    for p in params:
        optimizer.state[p]["step"] = shared
    before = snapshot(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"step.* (overlap in memory|one and the same)"):
        optimizer.second_step()
    assert unchanged(params, before) and not optimizer.is_perturbed
    assert shared.item() == 1


def test_counts_too_large_for_an_integer_in_the_reference() -> None:
    for count in (1e300, math.inf):
        params = [nn.Parameter(torch.ones(5))]
        optimizer = SAM(params, torch.optim.Adam, backend="reference", lr=0.1)
        for step in range(2):
            for half in (optimizer.first_step, optimizer.second_step):
                params[0].grad = torch.ones(5)
                half()
            if step == 0:
                optimizer.state[params[0]]["step"] = torch.tensor(count, dtype=torch.float64)
        assert params[0].isfinite().all()
