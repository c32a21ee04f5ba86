"""What the ops refuse: the error names the argument and the tensor, and nothing was written."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from samkernels import ops
from samkernels.backends import reference
from tests.helpers import bits

SHAPES = ((4, 3), (5,), (2, 3, 2))


@dataclass
class Call:
    """A call that is right: an op, its lists of three tensors, and its options."""

    op: Callable[..., Any]
    lists: tuple[str, ...]
    written: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    step_counts: bool = False

    def arguments(self, **options: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        lists = {name: [torch.randn(s, generator=generator) for s in SHAPES] for name in self.lists}
        steps = {"steps": [torch.zeros(()) for _ in SHAPES]} if self.step_counts else {}
        return {**lists, **steps, **self.options, **options}


CALLS = {
    "norms": Call(ops.norms, ("tensors", "weights")),
    "perturb_": Call(
        ops.perturb_,
        ("params", "grads", "old_params"),
        written=("params", "old_params"),
        options={"rho": 0.05},
    ),
    "restore_": Call(ops.restore_, ("params", "old_params"), written=("params",)),
    "recombine_": Call(
        ops.recombine_,
        ("grads", "first_grads"),
        written=("grads",),
        options={"rule": "samdirection"},
    ),
    "sgd_": Call(
        ops.sgd_,
        ("params", "old_params", "grads", "momentum_buffers", "first_grads"),
        written=("params", "momentum_buffers"),
        options={"lr": 0.1, "momentum": 0.9, "rule": "samdirection"},
    ),
    "sgd_hess_": Call(
        ops.sgd_hess_,
        ("params", "grads", "hessian_products", "momentum_buffers"),
        written=("params", "momentum_buffers"),
        options={"lr": 0.1, "rho": 0.05, "momentum": 0.9},
    ),
    "adam_": Call(
        ops.adam_,
        ("params", "old_params", "grads", "exp_avgs", "exp_avg_sqs", "first_grads"),
        written=("params", "exp_avgs", "exp_avg_sqs"),
        options={"lr": 0.1, "rule": "samdirection"},
        step_counts=True,
    ),
    "compare": Call(ops.compare, ("first_grads", "second_grads", "weights")),
}
EVERY_OP = list(CALLS)
EVERY_LIST = [(name, list_) for name, call in CALLS.items() for list_ in call.lists]
WRITTEN_LISTS = [(name, list_) for name, call in CALLS.items() for list_ in call.written]

every_op = pytest.mark.parametrize("name", EVERY_OP)
every_list = pytest.mark.parametrize(("name", "argument"), EVERY_LIST)
every_written_list = pytest.mark.parametrize(("name", "argument"), WRITTEN_LISTS)


def refuses(name: str, arguments: dict[str, Any], error: type[Exception], *mentions: str) -> None:
    """The call raises `error`, all of `mentions` are in its message, and no tensor changes."""
    lists = [value for value in arguments.values() if isinstance(value, (list, tuple))]
    tensors = [t for tensors in lists for t in tensors if is_readable(t)]
    before = [bits([t]) for t in tensors]
    versions = [t._version for t in tensors]
    in_any_order = "".join(f"(?=.*{re.escape(mention)})" for mention in mentions)
    with pytest.raises(error, match=f"(?s){in_any_order}"):
        CALLS[name].op(**arguments)
    assert all(torch.equal(bits([t]), b) for t, b in zip(tensors, before, strict=True))
    assert [t._version for t in tensors] == versions


def is_readable(value: object) -> bool:
    return (
        isinstance(value, Tensor) and value.device.type != "meta" and value.layout is torch.strided
    )


@every_op
def test_the_calls_below_are_right_but_for_one_argument(name: str) -> None:
    CALLS[name].op(**CALLS[name].arguments())


# Lists


@every_list
@pytest.mark.parametrize(
    "value",
    [torch.ones(3), {0: torch.ones(3)}, 1.0, (t for t in ())],
    ids=["tensor", "dict", "number", "generator"],
)
def test_something_that_is_no_list(name: str, argument: str, value: Any) -> None:
    arguments = CALLS[name].arguments(**{argument: value})
    refuses(name, arguments, TypeError, f"{argument} is {type(value).__name__}")


OPTIONAL_LISTS = ("weights", "momentum_buffers", "first_grads")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, argument in EVERY_LIST
        if name == "compare" or argument not in OPTIONAL_LISTS
    ],
)
def test_none_instead_of_a_list(name: str, argument: str) -> None:
    refuses(name, CALLS[name].arguments(**{argument: None}), TypeError, f"{argument} is NoneType")


@every_op
def test_empty_lists(name: str) -> None:
    empty = {argument: [] for argument in CALLS[name].lists}
    refuses(name, CALLS[name].arguments(**empty), ValueError, f"{CALLS[name].lists[0]} is empty")


@every_list
@pytest.mark.parametrize("extra", [-1, 1])
def test_lists_of_different_lengths(name: str, argument: str, extra: int) -> None:
    arguments = CALLS[name].arguments()
    if extra > 0:
        arguments[argument] += [torch.ones(2)]
    else:
        del arguments[argument][-1]
    first = CALLS[name].lists[0]
    mentions = [f"{argument} has {3 + extra} tensors", f"{first} has 3"]
    if argument == first:
        mentions = [f"{first} has {3 + extra}", f"{CALLS[name].lists[1]} has 3 tensors"]
    refuses(name, arguments, ValueError, *mentions)


# Tensors


@every_list
@pytest.mark.parametrize(
    "value", [None, 1.0, [1.0], np.ones(5)], ids=["none", "number", "list", "array"]
)
def test_an_element_that_is_no_tensor(name: str, argument: str, value: Any) -> None:
    arguments = CALLS[name].arguments()
    arguments[argument][1] = value
    refuses(name, arguments, TypeError, f"{argument}[1] is {type(value).__name__}")


@every_list
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_a_dtype_that_is_not_supported(name: str, argument: str, dtype: torch.dtype) -> None:
    arguments = CALLS[name].arguments()
    arguments[argument][1] = torch.zeros(5, dtype=dtype)
    refuses(name, arguments, TypeError, f"{argument}[1]", "shape (5,)", str(dtype))


@every_op
def test_a_dtype_that_is_not_supported_in_all_lists(name: str) -> None:
    lists = {key: [torch.ones(5, dtype=torch.int32)] for key in CALLS[name].lists}
    first = CALLS[name].lists[0]
    refuses(name, CALLS[name].arguments(**lists), TypeError, f"{first}[0]", "torch.int32")


@every_list
@pytest.mark.parametrize("shape", [(6,), (5, 1), ()])
def test_a_shape_that_differs(name: str, argument: str, shape: tuple[int, ...]) -> None:
    arguments = CALLS[name].arguments()
    arguments[argument][1] = torch.ones(shape)
    refuses(name, arguments, ValueError, f"{argument}[1]", str(shape), "(5,)")


@every_list
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_dtype_that_differs_between_lists(name: str, argument: str, dtype: torch.dtype) -> None:
    arguments = CALLS[name].arguments()
    arguments[argument][1] = arguments[argument][1].to(dtype)
    refuses(name, arguments, ValueError, f"{argument}[1]", str(dtype), "torch.float32")


@every_op
def test_dtypes_that_differ_within_the_lists(name: str) -> None:
    arguments = CALLS[name].arguments()
    for argument in CALLS[name].lists:
        arguments[argument][1] = arguments[argument][1].half()
    first = CALLS[name].lists[0]
    refuses(name, arguments, ValueError, f"{first}[1]", "torch.float16", "torch.float32")


@every_list
def test_a_device_that_differs_between_lists(name: str, argument: str) -> None:
    arguments = CALLS[name].arguments()
    arguments[argument][1] = arguments[argument][1].to("meta")
    refuses(name, arguments, ValueError, f"{argument}[1]", "meta", "cpu")


@every_op
def test_devices_that_differ_within_the_lists(name: str) -> None:
    arguments = CALLS[name].arguments()
    for argument in CALLS[name].lists:
        arguments[argument][1] = arguments[argument][1].to("meta")
    refuses(name, arguments, ValueError, f"{CALLS[name].lists[0]}[1]", "meta", "cpu")


@every_list
def test_strides_that_differ(name: str, argument: str) -> None:
    arguments = CALLS[name].arguments()
    arguments[argument][0] = arguments[argument][0].t().contiguous().t()
    refuses(name, arguments, ValueError, f"{argument}[0]", "(4, 3)", "strides", "(1, 4)", "(3, 1)")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@every_list
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_sparse_tensor(name: str, argument: str, layout: torch.layout) -> None:
    arguments = CALLS[name].arguments()
    arguments[argument][0] = torch.eye(4, 3).to_sparse(layout=layout)
    refuses(name, arguments, ValueError, f"{argument}[0]", "(4, 3)", "sparse")


@every_list
@pytest.mark.parametrize(
    "overlapping",
    [
        torch.ones(1, 3).expand(4, 3),
        torch.ones(1).expand(4, 3),
        torch.ones(6).as_strided((4, 3), (1, 1)),
        torch.ones(9).as_strided((4, 3), (2, 1)),
    ],
    ids=["expanded", "expanded-twice", "windows", "windows-2"],
)
def test_a_tensor_that_overlaps_itself(name: str, argument: str, overlapping: Tensor) -> None:
    arguments = CALLS[name].arguments()
    arguments[argument][0] = overlapping
    refuses(name, arguments, ValueError, f"{argument}[0]", "(4, 3)", "overlaps itself")


@every_written_list
def test_the_same_tensor_twice(name: str, argument: str) -> None:
    arguments = CALLS[name].arguments()
    for list_ in CALLS[name].lists:
        arguments[list_][2] = torch.ones(4, 3)
    arguments[argument][2] = arguments[argument][0]
    refuses(name, arguments, ValueError, f"{argument}[0]", f"{argument}[2]", "(4, 3)", "overlap")


@every_written_list
def test_tensors_that_overlap_within_a_list(name: str, argument: str) -> None:
    arguments = CALLS[name].arguments()
    memory = torch.ones(16)
    arguments[argument][0] = memory[:12].view(4, 3)
    arguments[argument][1] = memory[11:]
    refuses(name, arguments, ValueError, f"{argument}[0]", f"{argument}[1]", "overlap")


@pytest.mark.parametrize(
    ("name", "argument", "other"),
    [
        (name, argument, other)
        for name, argument in WRITTEN_LISTS
        for other in CALLS[name].lists
        if other != argument
    ],
)
@pytest.mark.parametrize("start", [0, 1, 7], ids=lambda start: f"start={start}")
def test_tensors_that_overlap_between_lists(
    name: str, argument: str, other: str, start: int
) -> None:
    # At another index: whether the other one is read before or after the write is not defined.
    arguments = CALLS[name].arguments()
    memory = torch.ones(16)
    arguments[argument][0] = memory[:12].view(4, 3)
    arguments[other][1] = memory[start : start + 5]
    refuses(name, arguments, ValueError, f"{argument}[0]", f"{other}[1]", "overlap")


@pytest.mark.parametrize(
    ("name", "argument", "other"),
    [
        ("perturb_", "params", "old_params"),
        ("sgd_", "params", "momentum_buffers"),
        ("sgd_hess_", "params", "momentum_buffers"),
        ("adam_", "params", "exp_avgs"),
        ("adam_", "exp_avgs", "exp_avg_sqs"),
    ],
)
def test_the_same_tensor_in_two_lists_that_are_written(
    name: str, argument: str, other: str
) -> None:
    arguments = CALLS[name].arguments()
    arguments[other][1] = arguments[argument][1]
    refuses(name, arguments, ValueError, f"{argument}[1]", f"{other}[1]", "(5,)", "overlap")


@pytest.mark.parametrize(
    ("name", "argument", "other"),
    [
        ("perturb_", "params", "grads"),
        ("restore_", "params", "old_params"),
        ("recombine_", "grads", "first_grads"),
        ("sgd_", "params", "old_params"),
        ("sgd_", "params", "first_grads"),
        ("sgd_hess_", "params", "grads"),
        ("sgd_hess_", "momentum_buffers", "hessian_products"),
        ("adam_", "params", "old_params"),
        ("adam_", "exp_avgs", "grads"),
    ],
)
def test_shifted_by_one_element_at_the_same_index(name: str, argument: str, other: str) -> None:
    arguments = CALLS[name].arguments()
    memory = torch.ones(6)
    arguments[argument][1], arguments[other][1] = memory[:5], memory[1:]
    refuses(name, arguments, ValueError, f"{argument}[1]", f"{other}[1]", "(5,)", "overlap")


def test_overlap_of_tensors_that_are_only_read_is_accepted() -> None:
    x = torch.tensor([0.0, 2.0])
    assert ops.norms([x, x], [x, x]).per_tensor.tolist() == [4, 4]
    assert ops.compare([x, x], [x, x], [x, x]).sums.tolist() == [8, 8, 8, 0, 2, 8]


# Numbers

NUMBERS = [
    ("perturb_", "rho"),
    ("perturb_", "eps"),
    ("recombine_", "eps"),
    ("sgd_", "lr"),
    ("sgd_", "momentum"),
    ("sgd_", "weight_decay"),
    ("sgd_", "eps"),
    ("sgd_hess_", "lr"),
    ("sgd_hess_", "rho"),
    ("sgd_hess_", "momentum"),
    ("sgd_hess_", "weight_decay"),
    ("adam_", "lr"),
    ("adam_", "eps"),
    ("adam_", "weight_decay"),
]
MAY_BE_TENSORS = [
    ("perturb_", "rho"),
    ("sgd_", "lr"),
    ("sgd_hess_", "lr"),
    ("sgd_hess_", "rho"),
    ("adam_", "lr"),
]


@pytest.mark.parametrize(("name", "option"), NUMBERS)
@pytest.mark.parametrize("value", [-1.0, -1e-12, -math.inf])
def test_negative_numbers(name: str, option: str, value: float) -> None:
    refuses(name, CALLS[name].arguments(**{option: value}), ValueError, f"{option}={value}")


@pytest.mark.parametrize(("name", "option"), [*NUMBERS, ("sgd_", "dampening")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(name: str, option: str, value: float) -> None:
    refuses(name, CALLS[name].arguments(**{option: value}), ValueError, f"{option}={value}")


@pytest.mark.parametrize(("name", "option"), [*NUMBERS, ("sgd_", "dampening")])
@pytest.mark.parametrize(
    "value", [True, "0.1", None, 1j, [0.1]], ids=["bool", "str", "none", "complex", "list"]
)
def test_something_that_is_no_number(name: str, option: str, value: Any) -> None:
    arguments = CALLS[name].arguments(**{option: value})
    refuses(name, arguments, TypeError, f"{option} is {type(value).__name__}")


@pytest.mark.parametrize(("name", "option"), MAY_BE_TENSORS)
@pytest.mark.parametrize(
    "value", [torch.ones(2), torch.ones(0), torch.tensor(1), torch.tensor(True)], ids=str
)
def test_tensors_that_are_no_hyperparameter(name: str, option: str, value: Tensor) -> None:
    arguments = CALLS[name].arguments(**{option: value})
    refuses(name, arguments, ValueError, option, str(tuple(value.shape)), "one element")


@pytest.mark.parametrize(("name", "option"), MAY_BE_TENSORS)
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_tensors_out_of_range_on_the_host(name: str, option: str, value: float) -> None:
    arguments = CALLS[name].arguments(**{option: torch.tensor(value)})
    refuses(name, arguments, ValueError, f"{option}={value}")


@pytest.mark.parametrize(("name", "option"), MAY_BE_TENSORS)
def test_hyperparameters_on_another_device(name: str, option: str) -> None:
    arguments = CALLS[name].arguments(**{option: torch.tensor(0.1, device="meta")})
    refuses(name, arguments, ValueError, f"{option} is on meta", "cpu")


@pytest.mark.parametrize("name", ["sgd_", "sgd_hess_"])
@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"dampening": 0.5}], ids=str)
def test_nesterov_needs_momentum_and_no_dampening(name: str, options: dict[str, float]) -> None:
    arguments = CALLS[name].arguments(nesterov=True, **options)
    refuses(name, arguments, ValueError, "nesterov", "momentum", "dampening")


@pytest.mark.parametrize("name", ["sgd_", "sgd_hess_"])
def test_momentum_without_buffers(name: str) -> None:
    arguments = CALLS[name].arguments(momentum_buffers=None)
    refuses(name, arguments, ValueError, "momentum=0.9", "momentum_buffers")


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.999), None, "0.9"], ids=str)
def test_betas_that_are_no_pair(betas: Any) -> None:
    refuses("adam_", CALLS["adam_"].arguments(betas=betas), TypeError, f"betas is {betas!r}")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    ("beta", "error", "mention"),
    [
        (1.0, ValueError, "=1.0: give a number below 1"),
        (-0.1, ValueError, "=-0.1: give a finite number >= 0"),
        (math.nan, ValueError, "=nan: give a finite number"),
        (torch.tensor(0.9), TypeError, "is Tensor: give a number"),
        (True, TypeError, "is bool"),
    ],
    ids=str,
)
def test_betas_out_of_range(which: int, beta: Any, error: type[Exception], mention: str) -> None:
    betas = (beta, 0.9) if which == 0 else (0.9, beta)
    arguments = CALLS["adam_"].arguments(betas=betas)
    refuses("adam_", arguments, error, f"betas[{which}]", mention)


@pytest.mark.parametrize("option", ["decoupled_weight_decay", "maximize"])
def test_flags_of_adam_that_are_no_bool(option: str) -> None:
    refuses("adam_", CALLS["adam_"].arguments(**{option: 1}), TypeError, f"{option} is int")


# Step counts


@pytest.mark.parametrize(
    ("steps", "error", "mention"),
    [
        (torch.zeros(3), TypeError, "steps is Tensor: give a list"),
        (None, TypeError, "steps is NoneType"),
        ([torch.zeros(())] * 2, ValueError, "steps has 2 tensors and params has 3"),
        ([1.0, 1.0, 1.0], TypeError, "steps[0] is float: give a torch.Tensor"),
        ([torch.zeros(1) for _ in range(3)], ValueError, "steps[0] has shape (1,)"),
        ([torch.zeros((), dtype=torch.int64) for _ in range(3)], ValueError, "torch.int64"),
        ([torch.zeros((), device="meta") for _ in range(3)], ValueError, "on meta"),
        ([torch.zeros(())] * 3, ValueError, "steps[0] and steps[1] (shape ()) overlap in memory"),
    ],
    ids=["tensor", "none", "length", "number", "shape", "dtype", "device", "shared"],
)
def test_step_counts(steps: Any, error: type[Exception], mention: str) -> None:
    refuses("adam_", CALLS["adam_"].arguments(steps=steps), error, mention)


def test_an_error_of_the_backend_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no launch")

    monkeypatch.setattr(reference, "adam_", fail)
    arguments = CALLS["adam_"].arguments(backend="reference")
    refuses("adam_", arguments, RuntimeError, "no launch")
    assert [t.item() for t in arguments["steps"]] == [0, 0, 0]


# Choices


@pytest.mark.parametrize("name", ["recombine_", "sgd_", "adam_"])
@pytest.mark.parametrize("option", ["rule", "granularity"])
@pytest.mark.parametrize("value", ["SAM", "", None, 0])
def test_unknown_rules_and_granularities(name: str, option: str, value: Any) -> None:
    allowed = ops.RULES if option == "rule" else ops.GRANULARITIES
    arguments = CALLS[name].arguments(**{option: value})
    refuses(name, arguments, ValueError, f"{option}={value!r}", *map(repr, allowed))


@every_op
@pytest.mark.parametrize("value", ["cuda", "Native", None])
def test_unknown_backends(name: str, value: Any) -> None:
    arguments = CALLS[name].arguments(backend=value)
    refuses(name, arguments, ValueError, f"backend={value!r}", "'native'", "'reference'")


@pytest.mark.parametrize("name", ["recombine_", "sgd_", "adam_"])
@pytest.mark.parametrize("granularity", ops.GRANULARITIES)
@pytest.mark.parametrize("rule", ["samdirection", "sammagnitude"])
def test_missing_first_grads(name: str, granularity: str, rule: str) -> None:
    options = {"first_grads": None, "granularity": granularity, "rule": rule}
    refuses(name, CALLS[name].arguments(**options), ValueError, "first_grads is missing", rule)


# Norms

NORMS = [
    ("perturb_", "norm", {}, ()),
    ("recombine_", "ascent_norm", {}, ()),
    ("sgd_", "ascent_norm", {}, ()),
    ("adam_", "found_inf", {}, ()),
    *(
        (name, option, {"granularity": granularity}, shape)
        for name in ("recombine_", "sgd_", "adam_")
        for option in ("first_norm", "second_norm")
        for granularity, shape in (("global", ()), ("tensor", (3,)))
    ),
]
every_norm = pytest.mark.parametrize(("name", "option", "options", "shape"), NORMS)


@every_norm
def test_the_norms_below_are_right_but_for_one_thing(
    name: str, option: str, options: dict[str, str], shape: tuple[int, ...]
) -> None:
    CALLS[name].op(**CALLS[name].arguments(**{**options, option: torch.ones(shape)}))


@every_norm
@pytest.mark.parametrize("wrong", [(1,), (2,), (4,), (3, 1)], ids=str)
def test_norms_of_a_wrong_shape(
    name: str,
    option: str,
    options: dict[str, str],
    shape: tuple[int, ...],
    wrong: tuple[int, ...],
) -> None:
    arguments = CALLS[name].arguments(**{**options, option: torch.ones(wrong)})
    refuses(name, arguments, ValueError, f"{option} has shape {wrong}", f"give shape {shape}")


@every_norm
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda norm: norm.double(), "torch.float64"),
        (lambda norm: norm.half(), "torch.float16"),
        (lambda norm: norm.long(), "torch.int64"),
        (lambda norm: norm.to("meta"), "meta"),
    ],
    ids=["float64", "float16", "int64", "meta"],
)
def test_norms_of_a_wrong_dtype_or_device(
    name: str,
    option: str,
    options: dict[str, str],
    shape: tuple[int, ...],
    make: Callable[[Tensor], Tensor],
    what: str,
) -> None:
    arguments = CALLS[name].arguments(**{**options, option: make(torch.ones(shape))})
    refuses(name, arguments, ValueError, option, what, "torch.float32 on cpu")


@every_norm
def test_a_norm_that_is_no_tensor(
    name: str, option: str, options: dict[str, str], shape: tuple[int, ...]
) -> None:
    arguments = CALLS[name].arguments(**{**options, option: 1.0})
    refuses(name, arguments, TypeError, f"{option} is float")


@pytest.mark.parametrize("name", ["recombine_", "sgd_", "adam_"])
def test_a_norm_with_gaps(name: str) -> None:
    options = {"granularity": "tensor", "first_norm": torch.ones(6)[::2]}
    refuses(name, CALLS[name].arguments(**options), ValueError, "first_norm is not contiguous")


def test_norms_of_float64_tensors_are_float64() -> None:
    w = [torch.ones(3, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"norm has .*torch.float32.*give .*torch.float64"):
        ops.perturb_(w, [w[0].clone()], [w[0].clone()], rho=0.1, norm=torch.tensor(1.0))
