"""What PyTorch's own test_optim.py asks of its optimizers, asked of ours.

The inputs, good and bad, are those that ship with torch (torch.testing._internal.common_optimizers)
for the base optimizers SGD, Adam and AdamW, and some for rho, adaptive and granularity.
test_optim.py does not ship: what it asserts is stated anew, for optimizers whose step needs two
gradients.

| what it asserts | here |
| --- | --- |
| errors on bad input; complex parameters | refused, with our words where we are stricter |
| right direction, param groups, schedulers, tensor lr, repr | yes |
| foreach and fused against the loop | our backends against the reference; the base's flags |
| other default dtypes; mixed dtypes; empty, non-contiguous | yes |
| no gradient is a no-op | yes with a closure, with a warning; without one, an error |
| gradients of zero are a no-op | yes, up to weight decay |
| hooks of step, state_dict and load_state_dict, global ones | yes |
| state_dict: deterministic, older, named, cast, copied, weights_only, hooks | yes |
| differentiable=True | refused with every base: a restore cannot be differentiated |
| sparse gradients; Rosenbrock with them | refused: tests/test_optim_safety.py |
| capturable | needs a GPU: tests/test_cuda.py captures whole steps |
| several devices, parameters on CUDA, state on the CPU | needs a GPU: tests/test_optim_devices.py |
| peak memory of foreach on CUDA | needs a GPU; bytes per parameter: tests/test_traffic.py |
| fused steps of GradScaler, found_inf | tests/test_optim_protocol.py |
| large tensors | tests/test_load.py |
| defaults changed to foreach | the choice is `backend`'s: tests/test_optim_protocol.py |
| beta1 = 0 saves memory; Muon, LBFGS, SparseAdam and the like alone | about other optimizers |
| torch.compile of step | stays out of the graph: tests/test_loop_features.py |
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import cycle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from samkernels import SAM
from tests.optim_helpers import (
    backward,
    parameters_of,
    set_gradients,
    snapshot,
    take_step,
    through_a_file,
    unchanged,
)
from tests.optimizers import OPTIMIZER_TABLE, STAND_ALONE

pytest.importorskip("expecttest")  # which torch.testing._internal needs

# Its import would freeze the flags of torch.backends for everybody else: nobody could set
# torch.backends.cudnn.deterministic any more.
with mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal import common_optimizers as common

BASES = (SGD, Adam, AdamW)
OWN_ERRORS = [
    ({"rho": -0.1}, ValueError, r"rho=-0\.1"),
    ({"rho": "0.1"}, TypeError, "rho is str"),
    ({"rho": torch.ones(2)}, ValueError, r"rho is a tensor of shape \(2,\)"),
    ({"adaptive": 1}, TypeError, "adaptive is int"),
    ({"backend": "cuda"}, ValueError, "backend='cuda'"),
]


def info(cls: type[Optimizer], base: type[Optimizer], **own: Any) -> Any:
    """One entry of a database like torch's optim_db: an optimizer, and what it is built with."""
    name = base.__name__.lower()
    of_base = {"base_optimizer": base} if issubclass(cls, SAM) else {}
    inputs_of_base = getattr(common, f"optim_inputs_func_{name}")
    errors_of_base = getattr(common, f"optim_error_inputs_func_{name}")

    def inputs(device: str, dtype: Any = None) -> list[Any]:
        kwargs = [(i.desc, i.kwargs) for i in inputs_of_base(device, dtype)]
        kwargs.append(("rho", {"rho": 0.25}))
        if issubclass(cls, SAM):
            kwargs.append(("adaptive", {"rho": torch.tensor(0.5), "adaptive": True}))
        return [
            common.OptimizerInput(None, {**of_base, **own, **of_one}, desc)
            for desc, of_one in kwargs
        ]

    def errors(device: str, dtype: Any) -> list[Any]:
        for error in errors_of_base(device, dtype):
            error.optimizer_error_input.kwargs["base_optimizer"] = base
            yield error
        own_errors = [
            *OWN_ERRORS,
            *([({"granularity": "layer"}, ValueError, "layer")] if "granularity" in own else []),
        ]
        for kwargs, error_type, text in own_errors:
            yield common.ErrorOptimizerInput(
                common.OptimizerInput(None, {"base_optimizer": base, **kwargs}, text),
                error_type=error_type,
                error_regex=text,
            )

    return common.OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=next(i for i in common.optim_db if i.optim_cls is base).scheduler_inputs,
        supported_impls=(),
        supports_complex=False,
    )


# Every optimizer of ours with a base, in turn; and SAM with each.
PAIRS = [(SAM, base, {}) for base in BASES]
PAIRS += [
    (row.cls, base, row.variants[i % len(row.variants)])
    for i, (row, base) in enumerate(zip(OPTIMIZER_TABLE[1:], cycle((AdamW, SGD)), strict=False))
]
INFOS = {f"{cls.__name__}-{base.__name__}": info(cls, base, **own) for cls, base, own in PAIRS}
CASES = [
    pytest.param(of_one.optim_cls, case.kwargs, id=f"{name}-{case.desc}")
    for name, of_one in INFOS.items()
    for case in of_one.optim_inputs_func("cpu")
]
each_case = pytest.mark.parametrize(("cls", "kwargs"), CASES)
each_info = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)

# And those that have no base and one pass, where nothing is asked of a base or of a second pass.
ALL_INFOS = INFOS | {
    row.cls.__name__: info(row.cls, row.like, **row.options) for row in STAND_ALONE
}
ALL_CASES = [
    pytest.param(of_one.optim_cls, case.kwargs, id=f"{name}-{case.desc}")
    for name, of_one in ALL_INFOS.items()
    for case in of_one.optim_inputs_func("cpu")
]
each_case_of_all = pytest.mark.parametrize(("cls", "kwargs"), ALL_CASES)
each_info_of_all = pytest.mark.parametrize("info", ALL_INFOS.values(), ids=ALL_INFOS)

Build = Callable[..., Any]


def is_fused(kwargs: dict[str, Any]) -> bool:
    """Whether the base optimizer's step is ours."""
    return not kwargs.get("amsgrad", False)


@pytest.fixture
def build(cls: type[Optimizer], kwargs: dict[str, Any]) -> Build:
    """The optimizer of a case; other options come first. Schedulers write to tensors: copies."""
    return lambda params, **other: cls(params, **copy.deepcopy({**kwargs, **other}))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_and_bias(
    dtype: torch.dtype = torch.float32, contiguous: bool = True
) -> tuple[Parameter, Parameter]:
    weight, bias = normal(10, 5, 2).to(dtype)[..., 0], normal(10, 2, seed=1).to(dtype)[..., 0]
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    return Parameter(weight), Parameter(bias)


INPUT = normal(5, seed=2)


def closure_of(optimizer: Any, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(INPUT.to(weight.dtype)) + bias).square().sum()
        backward(optimizer, loss)
        return loss.detach()

    return closure


def maximizes(optimizer: Optimizer) -> bool:
    return any(group.get("maximize", False) for group in optimizer.param_groups)


def state_of(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


# -- construction ----------------------------------------------------------------------------------


@each_info
def test_errors(info: Any) -> None:
    errors = list(info.optim_error_inputs_func("cpu", torch.float32))
    assert len(errors) > 10
    for error in errors:
        case = error.optimizer_error_input
        assert error.error_on is common.OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = [Parameter(torch.randn(1, 1))] if case.params is None else case.params
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                if "duplicate" in case.desc:  # PyTorch only warns: its SGD moves them twice
                    with pytest.raises(ValueError, match="overlap in memory"):
                        info.optim_cls(params, **case.kwargs)
                else:
                    info.optim_cls(params, **case.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                info.optim_cls(params, **case.kwargs)


@each_case_of_all
def test_complex_parameters_are_refused(build: Build) -> None:
    with pytest.raises(TypeError, match=r"params\[0\] .* of shape \(2, 3\) is torch\.complex64"):
        build([Parameter(torch.randn(2, 3, dtype=torch.complex64))])


@each_case_of_all
def test_repr_names_what_is_in_the_groups(build: Build) -> None:
    optimizer = build(weight_and_bias())
    text = repr(optimizer)
    for name, value in optimizer.param_groups[0].items():
        assert name == "params" or f"{name}: {value}" in text


# -- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "with gaps"])
@each_case_of_all
def test_steps_go_in_the_right_direction(build: Build, contiguous: bool) -> None:
    weight, bias = weight_and_bias(contiguous=contiguous)
    optimizer = build([weight, bias])
    closure = closure_of(optimizer, weight, bias)
    before = closure().item()
    for _ in range(20):
        optimizer.step(closure)
    after = closure().item()
    assert after > before if maximizes(optimizer) else after < before


@each_info_of_all
def test_schedulers_of_groups_go_in_the_right_direction(info: Any) -> None:
    cases, schedulers_of = info.optim_inputs_func("cpu"), info.scheduler_inputs
    for i in range(max(len(cases), len(schedulers_of))):  # each of both, not all pairs
        weight, bias = weight_and_bias()
        groups = [{"params": [weight], "lr": 0.01}, {"params": [bias]}]
        optimizer = info.optim_cls(groups, **copy.deepcopy(cases[i % len(cases)].kwargs))
        constructors = schedulers_of[i % len(schedulers_of)]
        schedulers = [constructor(optimizer) for constructor in constructors]
        closure = closure_of(optimizer, weight, bias)
        before = closure().item()
        optimizer.zero_grad()  # or what is there would be taken for g1
        for _ in range(20):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                of_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(loss) if of_plateau else scheduler.step()
        after = closure().item()
        assert after > before if maximizes(optimizer) else after < before


@each_case_of_all
def test_weight_decay_of_one_group(build: Build) -> None:
    """It draws that group's parameters towards zero, and leaves the others alone."""
    pairs = []
    for weight_decay in (0.0, 0.5):
        weight, bias = weight_and_bias()
        groups = [{"params": [weight], "weight_decay": weight_decay}, {"params": [bias]}]
        optimizer = build(groups, lr=0.01, weight_decay=0.0, maximize=False)
        for step in range(3):
            take_step(optimizer, step)
        pairs.append((weight.detach(), bias.detach()))
    (weight, bias), (decayed, other_bias) = pairs
    torch.testing.assert_close(bias, other_bias)
    assert decayed.norm() < weight.norm()


@each_case_of_all
def test_lr_of_one_group(build: Build) -> None:
    weight, bias = weight_and_bias()
    before = snapshot([weight, bias])
    optimizer = build([{"params": [weight], "lr": 0.0}, {"params": [bias]}], lr=0.25)
    for step in range(3):
        take_step(optimizer, step)
    assert unchanged([weight], before[:1]) and not torch.equal(bias, before[1])


@each_case_of_all
def test_lr_as_a_tensor(build: Build) -> None:
    """The same lr, the same steps."""
    results = []
    for lr in (0.015625, torch.tensor(0.015625)):
        weight, bias = weight_and_bias()
        optimizer = build([weight, bias], lr=lr)
        closure = closure_of(optimizer, weight, bias)
        for _ in range(5):
            optimizer.step(closure)
        results.append(snapshot([weight, bias]))
        assert type(optimizer.param_groups[0]["lr"]) is type(lr)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
@each_info
def test_other_default_dtypes(info: Any, backend: str, default: torch.dtype) -> None:
    """What is made of numbers must not be of the default dtype."""
    results = []
    before = torch.get_default_dtype()
    for dtype in (before, default):
        params = weight_and_bias()
        kwargs = info.optim_inputs_func("cpu")[4].kwargs
        try:
            torch.set_default_dtype(dtype)
            optimizer = info.optim_cls(params, backend=backend, track_statistics=True, **kwargs)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.first_step()
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            optimizer.second_step()
        finally:
            torch.set_default_dtype(before)
        results.append(snapshot(params))
    for a, b in zip(*results, strict=True):
        assert a.dtype is b.dtype is torch.float32
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["auto", "native", "foreach"])
@each_case_of_all
def test_backends_match_the_loop_of_the_reference(build: Build, backend: str) -> None:
    """Also of parameters with gaps and of none, where the backend serves them."""
    results = []
    for name in (backend, "reference"):
        params = [*weight_and_bias(), Parameter(torch.empty(0)), Parameter(torch.tensor(0.5))]
        if backend != "native":
            params += weight_and_bias(torch.float64, contiguous=False)
        optimizer = build(params, backend=name)
        for step in range(5):
            take_step(optimizer, step)
        results.append([*snapshot(params), *state_of(optimizer)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
@each_case
def test_flags_of_the_base_optimizer(build: Build, kwargs: dict[str, Any], flag: str) -> None:
    """They choose how a base steps by itself. Our kernels have one way, whatever they say."""
    results = []
    for value in (False, True):
        params = weight_and_bias()
        optimizer = build(params, **{flag: value})
        for step in range(5):
            take_step(optimizer, step)
        assert optimizer.param_groups[0][flag] is value
        results.append([*snapshot(params), *state_of(optimizer)])
    if is_fused(kwargs):
        assert unchanged(*results)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@each_case
def test_differentiable_steps_are_refused(build: Build) -> None:
    params = weight_and_bias()
    before = snapshot(params)
    optimizer = build(params, differentiable=True)
    set_gradients(params, 0)
    optimizer.first_step()
    set_gradients(params, 1)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        optimizer.second_step()
    assert unchanged(params, before) and not optimizer.is_perturbed


@each_case
def test_without_gradients(build: Build) -> None:
    params = weight_and_bias()
    before = snapshot(params)
    optimizer = build(params)
    assert optimizer.step(lambda: None) is None
    with pytest.warns(UserWarning, match=r"left no gradient.*backward\(\)"):
        assert optimizer.step(lambda: 1.0) == 1.0
    assert unchanged(params, before) and not state_of(optimizer)


@each_case
def test_gradients_of_zero_change_nothing(build: Build) -> None:
    params = weight_and_bias()
    before = snapshot(params)
    optimizer = build(params, weight_decay=0.0)
    for _ in range(2):
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step() if optimizer.is_perturbed else optimizer.first_step()
    assert unchanged(params, before)


@each_case_of_all
def test_steps_leave_state_that_is_counted(build: Build) -> None:
    params = weight_and_bias()
    optimizer = build(params)
    for step in range(3):
        take_step(optimizer, step)
    group = optimizer.param_groups[0]
    if "betas" in group:
        assert [optimizer.state[p]["step"].item() for p in params] == [3, 3]
    else:
        assert len(state_of(optimizer)) == (2 if group["momentum"] else 0)


@each_case_of_all
def test_all_parameters_empty(build: Build) -> None:
    optimizer = build([Parameter(torch.empty(0)), Parameter(torch.empty(3, 0))])
    take_step(optimizer, 0)
    take_step(optimizer, 1)
    assert not getattr(optimizer, "is_perturbed", False)


# -- hooks -----------------------------------------------------------------------------------------


@each_case_of_all
def test_step_hooks(build: Build) -> None:
    """Of the optimizer and of all optimizers, in PyTorch's order: global ones are outermost, before
    as well as after. They hear of one step, also where the base optimizer makes its own."""
    weight, bias = weight_and_bias()
    optimizer = build([weight, bias])
    events: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def record(hooked: Optimizer, args: Any, kwargs: Any) -> None:
            assert hooked is optimizer
            events.append(name)

        return record

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
    ]
    try:
        optimizer.step(closure_of(optimizer, weight, bias))
    finally:
        for handle in handles:
            handle.remove()
    assert events == ["global pre", "pre", "post", "global post"]
    optimizer.step(closure_of(optimizer, weight, bias))
    assert len(events) == 4  # those that were removed are


@each_case_of_all
def test_a_step_pre_hook_may_replace_the_closure(build: Build) -> None:
    weight, bias = weight_and_bias()
    optimizer = build([weight, bias])
    closure = closure_of(optimizer, weight, bias)
    expected = closure().item()
    optimizer.zero_grad()
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((args[0], closure), {}))
    assert optimizer.step(lambda: 1 / 0).item() == expected


@each_case_of_all
def test_state_dict_hooks(build: Build) -> None:
    """In order, with what they change; load_state_dict likewise. prepend puts one in front."""
    params = weight_and_bias()
    optimizer = build(params)
    take_step(optimizer, 0)
    plain = optimizer.state_dict()
    events: list[str] = []

    def pre(hooked: Optimizer) -> None:
        assert hooked is optimizer
        events.append("pre")

    def add_a_note(hooked: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        events.append("post")
        return {**state_dict, "note": len(events)}

    def first(hooked: Optimizer, state_dict: dict[str, Any]) -> None:
        events.append("first")

    optimizer.register_state_dict_pre_hook(pre)
    optimizer.register_state_dict_post_hook(add_a_note)
    optimizer.register_state_dict_post_hook(first, prepend=True)
    saved = optimizer.state_dict()
    assert events == ["pre", "first", "post"]
    assert saved.pop("note") == 3 and saved.keys() == plain.keys()

    other = build(weight_and_bias())
    lrs = []

    def rename(hooked: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 0.75} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    def look(hooked: Optimizer, state_dict: dict[str, Any]) -> None:
        lrs.append(float(state_dict["param_groups"][0]["lr"]))

    def loaded(hooked: Optimizer) -> None:
        lrs.append(hooked.param_groups[0]["lr"])

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_pre_hook(look)
    other.register_load_state_dict_pre_hook(look, prepend=True)
    other.register_load_state_dict_post_hook(loaded)
    other.load_state_dict(saved)
    assert lrs == [pytest.approx(float(plain["param_groups"][0]["lr"])), 0.75, 0.75]
    assert getattr(other, "base_optimizer", other).param_groups[0]["lr"] == 0.75


# -- checkpoints -----------------------------------------------------------------------------------


def primed(build: Build) -> SAM:
    optimizer = build(weight_and_bias())
    for step in range(3):
        take_step(optimizer, step)
    return optimizer


def copied_params(optimizer: SAM, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(p.detach().clone().to(dtype)) for p in parameters_of(optimizer)]


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    for group, other in zip(a["param_groups"], b["param_groups"], strict=True):
        assert group.keys() == other.keys()
        assert all(bool(value == other[name]) for name, value in group.items())


def assert_same_steps(optimizer: SAM, other: SAM, steps: range = range(3, 8)) -> None:
    for step in steps:
        for each in (optimizer, other):
            take_step(each, step)
        assert unchanged(parameters_of(optimizer), snapshot(parameters_of(other)))


@each_case_of_all
def test_state_dicts_are_deterministic(build: Build) -> None:
    """Loading does not change what is loaded, and equal optimizers have equal state_dicts."""
    optimizer = primed(build)
    other = build(copied_params(optimizer))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    assert_same_state(saved, kept)
    assert_same_state(other.state_dict(), kept)
    assert_same_steps(optimizer, other)
    assert_same_state(optimizer.state_dict(), other.state_dict())


@each_case_of_all
def test_older_state_dicts(build: Build) -> None:
    """Of a PyTorch that did not know some of the flags yet: they stay as they are."""
    optimizer = primed(build)
    saved = copy.deepcopy(optimizer.state_dict())
    flags = {"foreach", "fused", "differentiable", "maximize", "capturable"}
    for group in saved["param_groups"]:
        for flag in flags & group.keys():
            del group[flag]
    other = build(copied_params(optimizer))
    other.load_state_dict(saved)
    for flag in flags & optimizer.param_groups[0].keys():
        assert other.param_groups[0][flag] == optimizer.param_groups[0][flag]
    assert_same_steps(optimizer, other)


@each_case_of_all
def test_steps_saved_as_numbers(build: Build) -> None:
    optimizer = primed(build)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    other = build(copied_params(optimizer))
    other.load_state_dict(saved)
    assert_same_steps(optimizer, other)


@each_case_of_all
def test_named_parameters_in_state_dicts(build: Build) -> None:
    """Saved with names, loaded without, and the other way round."""
    optimizer = primed(build)
    unnamed = copy.deepcopy(optimizer.state_dict())
    named = build(list(zip("wb", copied_params(optimizer), strict=True)))
    named.load_state_dict(unnamed)
    saved = through_a_file(named.state_dict())
    assert saved["param_groups"][0]["param_names"] == ["w", "b"]
    other = build(copied_params(optimizer))
    other.load_state_dict(saved)
    assert "param_names" not in unnamed["param_groups"][0]
    assert_same_steps(named, other)


@each_case_of_all
def test_save_and_load_with_weights_only(build: Build) -> None:
    optimizer = primed(build)
    other = build(copied_params(optimizer))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_state(optimizer.state_dict(), other.state_dict())
    assert_same_steps(optimizer, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_case_of_all
def test_loading_into_parameters_of_another_dtype(build: Build, dtype: torch.dtype) -> None:
    """State takes the dtype of its parameter, but for the count of steps."""
    optimizer = primed(build)
    other = build(copied_params(optimizer, dtype))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in parameters_of(other):
        for name, value in other.state[p].items():
            assert value.dtype is (torch.float32 if name == "step" else dtype)
    info = torch.finfo(dtype)
    for p, q in zip(parameters_of(other), parameters_of(optimizer), strict=True):
        before = q.detach().to(dtype)
        assert torch.equal(p, before)
    take_step(other, 3)
    take_step(optimizer, 3)
    for p, q in zip(parameters_of(other), parameters_of(optimizer), strict=True):
        tolerance = 8 * max(info.eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(p.detach().float(), q.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))]
)
@each_case_of_all
def test_copies_have_all_public_attributes(build: Build, copied: Callable[[SAM], SAM]) -> None:
    optimizer = primed(build)
    other = copied(optimizer)

    def public(x: SAM) -> set[str]:
        return {name for name in vars(x) if not name.startswith("_")}

    assert public(other) == public(optimizer)
    assert other.defaults.keys() == optimizer.defaults.keys()
    assert repr(other) == repr(optimizer)
    take_step(other, 3)


@each_case_of_all
def test_zero_grad(build: Build) -> None:
    params = weight_and_bias()
    optimizer = build(params)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_importing_torchs_checks_leaves_the_flags_of_torch_alone() -> None:
    assert not torch.backends.flags_frozen()
