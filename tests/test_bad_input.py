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
from samkernels.ops import Mix
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


def with_mix(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op with the fields of its mix as arguments of their own: "mix.x", .."""

    def call(**arguments: Any) -> Any:
        fields = {name: arguments.pop(name) for name in list(arguments) if name.startswith("mix.")}
        mix = Mix(**{name.removeprefix("mix."): value for name, value in fields.items()})
        return op(mix=mix, **arguments)

    return call


CALLS = {
    "dots of one": Call(
        lambda x, weights, **options: ops.dots(x, weights=weights, **options), ("x", "weights")
    ),
    "dots of three": Call(lambda x, y, z, **options: ops.dots(x, y, z, **options), ("x", "y", "z")),
    "perturb_": Call(
        ops.perturb_,
        ("params", "direction", "old_params"),
        written=("params", "old_params"),
        options={"rho": 0.05},
    ),
    "restore_": Call(ops.restore_, ("params", "old_params"), written=("params",)),
    "mix_": Call(
        with_mix(ops.mix_),
        ("out", "mix.x", "mix.y"),
        written=("out",),
        options={"mix.function": "sign"},
    ),
    "sgd_": Call(
        with_mix(ops.sgd_),
        ("params", "old_params", "mix.x", "mix.y", "momentum_buffers"),
        written=("params", "momentum_buffers"),
        options={"lr": 0.1, "momentum": 0.9, "mix.function": "sign"},
    ),
    "sgd_hess_": Call(
        ops.sgd_hess_,
        ("params", "grads", "hessian_products", "momentum_buffers"),
        written=("params", "momentum_buffers"),
        options={"lr": 0.1, "rho": 0.05, "momentum": 0.9},
    ),
    "adam_": Call(
        with_mix(ops.adam_),
        ("params", "old_params", "mix.x", "mix.y", "exp_avgs", "exp_avg_sqs"),
        written=("params", "exp_avgs", "exp_avg_sqs"),
        options={"lr": 0.1, "mix.function": "sign"},
        step_counts=True,
    ),
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


OPTIONAL_LISTS = ("weights", "momentum_buffers", "mix.y")


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, argument in EVERY_LIST if argument not in OPTIONAL_LISTS],
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
        ("perturb_", "params", "direction"),
        ("perturb_", "old_params", "direction"),
        ("restore_", "params", "old_params"),
        ("mix_", "out", "mix.x"),
        ("sgd_", "params", "old_params"),
        ("sgd_", "params", "mix.y"),
        ("sgd_hess_", "params", "grads"),
        ("sgd_hess_", "momentum_buffers", "hessian_products"),
        ("adam_", "params", "old_params"),
        ("adam_", "exp_avgs", "mix.x"),
    ],
)
def test_shifted_by_one_element_at_the_same_index(name: str, argument: str, other: str) -> None:
    arguments = CALLS[name].arguments()
    memory = torch.ones(6)
    arguments[argument][1], arguments[other][1] = memory[:5], memory[1:]
    refuses(name, arguments, ValueError, f"{argument}[1]", f"{other}[1]", "(5,)", "overlap")


def test_overlap_of_tensors_that_are_only_read_is_accepted() -> None:
    x = torch.tensor([0.0, 2.0])
    assert ops.dots([x, x], weights=[x, x]).per_tensor.tolist() == [[16, 4], [16, 4]]
    assert ops.dots([x, x], [x, x], [x, x]).total.tolist() == [8, 8, 8, 8, 0, 2]


# Numbers

NUMBERS = [
    ("perturb_", "rho"),
    ("perturb_", "eps"),
    ("perturb_", "eta"),
    ("dots of one", "eta"),
    ("sgd_", "lr"),
    ("sgd_", "momentum"),
    ("sgd_", "weight_decay"),
    ("sgd_hess_", "lr"),
    ("sgd_hess_", "rho"),
    ("sgd_hess_", "momentum"),
    ("sgd_hess_", "weight_decay"),
    ("adam_", "lr"),
    ("adam_", "eps"),
    ("adam_", "weight_decay"),
]
SIGNED = [("sgd_", "dampening"), ("mix_", "mix.a"), ("sgd_", "mix.a"), ("adam_", "mix.b")]
MAY_BE_TENSORS = [
    ("perturb_", "rho"),
    ("sgd_", "lr"),
    ("sgd_hess_", "lr"),
    ("sgd_hess_", "rho"),
    ("adam_", "lr"),
]


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((*of, value) for of in NUMBERS for value in (-1.0, -1e-12, -math.inf)),
        *((*of, value) for of in (*NUMBERS, *SIGNED) for value in (math.nan, math.inf)),
    ],
)
def test_numbers_out_of_range(name: str, option: str, value: float) -> None:
    refuses(name, CALLS[name].arguments(**{option: value}), ValueError, f"{option}={value}")


@pytest.mark.parametrize(("name", "option"), [*NUMBERS, *SIGNED])
@pytest.mark.parametrize(
    "value", [True, "0.1", None, 1j, [0.1]], ids=["bool", "str", "none", "complex", "list"]
)
def test_something_that_is_no_number(name: str, option: str, value: Any) -> None:
    if value is None and option == "eta" and name == "perturb_":
        return  # there it is an option
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


@pytest.mark.parametrize("name", ["mix_", "sgd_", "adam_"])
@pytest.mark.parametrize("value", ["SIGN", "", None, 0])
def test_unknown_functions(name: str, value: Any) -> None:
    arguments = CALLS[name].arguments(**{"mix.function": value})
    refuses(name, arguments, ValueError, f"mix.function={value!r}", *map(repr, ops.FUNCTIONS))


@every_op
@pytest.mark.parametrize("value", ["cuda", "Native", None])
def test_unknown_backends(name: str, value: Any) -> None:
    arguments = CALLS[name].arguments(backend=value)
    refuses(name, arguments, ValueError, f"backend={value!r}", "'native'", "'reference'")


# Mixes


@pytest.mark.parametrize("name", ["mix_", "sgd_", "adam_"])
@pytest.mark.parametrize("function", ["sign", "damp", "product"])
def test_a_function_that_lacks_its_second_list(name: str, function: str) -> None:
    arguments = CALLS[name].arguments(**{"mix.y": None, "mix.function": function})
    refuses(name, arguments, ValueError, "mix.y is missing", function)


@pytest.mark.parametrize("mix", [None, [torch.ones(3)], (torch.ones(3),)], ids=str)
def test_something_that_is_no_mix(mix: Any) -> None:
    w = [torch.ones(3)]
    wanted = rf"mix is {type(mix).__name__}: give .*Mix\(gradients\)"
    with pytest.raises(TypeError, match=wanted):
        ops.mix_(w, mix)
    with pytest.raises(TypeError, match=wanted):
        ops.sgd_(w, w, mix, lr=0.1)
    with pytest.raises(TypeError, match=wanted):
        ops.adam_(w, w, mix, w, w, [torch.zeros(())], lr=0.1)
    assert w[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["mix_", "sgd_", "adam_"])
@pytest.mark.parametrize("wrong", [{}, {"mix.function": "linear", "mix.y": None}], ids=str)
@pytest.mark.parametrize("b", [0.0, torch.tensor(1.0)], ids=str)
def test_a_number_that_nothing_reads(name: str, wrong: dict[str, Any], b: Any) -> None:
    arguments = CALLS[name].arguments(**wrong, **{"mix.b": b})
    refuses(name, arguments, ValueError, "mix.b is given", "linear")


@pytest.mark.parametrize("number", ["mix.a", "mix.b"])
@pytest.mark.parametrize("value", [1e39, -1e39])
def test_numbers_that_float32_cannot_hold(number: str, value: float) -> None:
    arguments = CALLS["mix_"].arguments(**{"mix.function": "linear", number: value})
    refuses("mix_", arguments, ValueError, f"{number}={value}", "float32")


@pytest.mark.parametrize("count", [0, 4])
def test_dots_of_a_wrong_number_of_lists(count: int) -> None:
    with pytest.raises(ValueError, match=f"dots of {count} lists: give one to three"):
        ops.dots(*[[torch.ones(3)]] * count)


def test_dots_of_several_lists_with_weights() -> None:
    x = [torch.ones(3)]
    with pytest.raises(ValueError, match="weights with 2 lists"):
        ops.dots(x, x, weights=x)
    with pytest.raises(ValueError, match=r"eta=0\.1 without weights"):
        ops.dots(x, eta=0.1)


# Numbers on the device

LINEAR = {"mix.function": "linear"}
SCALARS: list[tuple[str, str, dict[str, Any], torch.dtype, tuple[tuple[int, ...], ...]]] = [
    ("perturb_", "square", {}, torch.float64, ((), (3,))),
    *(
        (name, option, LINEAR, torch.float32, ((), (3,)))
        for name in ("mix_", "sgd_", "adam_")
        for option in ("mix.a", "mix.b")
    ),
    ("mix_", "mix.ascent_square", {}, torch.float64, ((),)),
    ("sgd_", "mix.divisor", {}, torch.float32, ((),)),
    ("adam_", "mix.found_inf", {}, torch.float32, ((),)),
]
every_scalar = pytest.mark.parametrize(("name", "option", "options", "dtype", "shapes"), SCALARS)


@every_scalar
def test_the_scalars_below_are_right_but_for_one_thing(
    name: str,
    option: str,
    options: dict[str, str],
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    for shape in shapes:
        value = torch.ones(shape, dtype=dtype)
        CALLS[name].op(**CALLS[name].arguments(**{**options, option: value}))


@every_scalar
@pytest.mark.parametrize("wrong", [(1,), (2,), (4,), (3, 1)], ids=str)
def test_scalars_of_a_wrong_shape(
    name: str,
    option: str,
    options: dict[str, str],
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...],
    wrong: tuple[int, ...],
) -> None:
    value = torch.ones(wrong, dtype=dtype)
    arguments = CALLS[name].arguments(**{**options, option: value})
    wanted = "give shape " + " or ".join(map(str, shapes))
    refuses(name, arguments, ValueError, f"{option} has shape {wrong}", wanted)


@every_scalar
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda x: x.to(torch.float32 if x.dtype is torch.float64 else torch.float64), "float"),
        (lambda x: x.half(), "torch.float16"),
        (lambda x: x.long(), "torch.int64"),
        (lambda x: x.to("meta"), "meta"),
    ],
    ids=["other", "float16", "int64", "meta"],
)
def test_scalars_of_a_wrong_dtype_or_device(
    name: str,
    option: str,
    options: dict[str, str],
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...],
    make: Callable[[Tensor], Tensor],
    what: str,
) -> None:
    value = make(torch.ones(shapes[0], dtype=dtype))
    arguments = CALLS[name].arguments(**{**options, option: value})
    refuses(name, arguments, ValueError, option, what, f"{dtype} on cpu")


@every_scalar
def test_a_scalar_that_is_no_tensor(
    name: str,
    option: str,
    options: dict[str, str],
    dtype: torch.dtype,
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    arguments = CALLS[name].arguments(**{**options, option: "1.0"})
    refuses(name, arguments, TypeError, f"{option} is str")


@pytest.mark.parametrize("wrong", [torch.float64, torch.float16], ids=str)
def test_radii_of_a_wrong_dtype(wrong: torch.dtype) -> None:
    arguments = CALLS["perturb_"].arguments(rho=torch.ones(3, dtype=wrong))
    refuses("perturb_", arguments, ValueError, "rho", str(wrong), "torch.float32 on cpu")


def test_a_scalar_that_is_negated_lazily() -> None:
    arguments = CALLS["mix_"].arguments(**{**LINEAR, "mix.a": torch._neg_view(torch.ones(3))})
    refuses("mix_", arguments, ValueError, "mix.a", "resolve_neg")


def test_scalars_of_float64_tensors_are_float64() -> None:
    w = [torch.ones(3, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"mix.a has .*torch.float32.*give .*torch.float64"):
        ops.mix_(w, Mix([w[0].clone()], a=torch.tensor(1.0)))


@pytest.mark.parametrize(
    ("name", "successor"),
    [
        ("norms", "dots"),
        ("weighted_norms", "weights=weights"),
        ("compare", "dots"),
        ("recombine_", "mix_"),
        ("total_norm", "total_of"),
        ("Norms", "Dots"),
    ],
)
def test_names_that_are_gone_tell_what_is_in_their_place(name: str, successor: str) -> None:
    with pytest.raises(AttributeError, match=rf"{name}.*{successor}"):
        getattr(ops, name)
    with pytest.raises(AttributeError, match=r"no attribute 'something'$"):
        ops.something  # type: ignore[attr-defined]  # noqa: B018
