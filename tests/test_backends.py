"""Which backend serves what, what the compiled core itself refuses, and life without it."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from samkernels import _C, backends, ops
from samkernels.backends import contract, native
from samkernels.ops import Mix
from tests.helpers import DTYPES, assert_same_bits, copies

CPU = torch.device("cpu")
NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROOT = Path(__file__).parents[1]


def run_python(code: str) -> str:
    """What a new interpreter prints; its standard error, if it fails or dies."""
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"
    return result.stdout


# The choice


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_auto_takes_native_on_the_cpu(dtype: torch.dtype) -> None:
    name, module = backends.choose("auto", CPU, dtype)
    assert name == "native"
    assert module.__name__ == "samkernels.backends.native"


@pytest.mark.parametrize(
    ("dtype", "dense"), [(torch.float64, True), *((dtype, False) for dtype in DTYPES)], ids=str
)
def test_auto_takes_foreach_for_what_native_cannot_serve(dtype: torch.dtype, dense: bool) -> None:
    assert backends.choose("auto", CPU, dtype, dense)[0] == "foreach"


def test_auto_takes_foreach_on_other_devices() -> None:
    assert backends.choose("auto", torch.device("meta"), torch.float32)[0] == "foreach"


# "triton" needs a GPU; "interpreted" is its kernels on the CPU (tests/interpreted.py).
@pytest.mark.parametrize("name", [n for n in backends.BACKENDS if n not in ("auto", "triton")])
def test_named_backends_are_taken(name: str) -> None:
    chosen, module = backends.choose(name, CPU, torch.float32)
    assert chosen == name
    assert module.__name__ == f"samkernels.backends.{name}"


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", ["foreach", "reference"])
def test_foreach_and_reference_serve_every_dtype_and_layout(name: str, dense: bool) -> None:
    for dtype in DTYPES:
        assert backends.why_unavailable(name, CPU, dtype, dense) is None


@pytest.mark.parametrize(
    ("device", "dtype", "dense", "reason"),
    [
        ("cpu", torch.float64, True, r"no kernels for torch\.float64"),
        ("cpu", torch.float32, False, "without gaps or overlap"),
        ("meta", torch.float32, True, "no kernels for meta"),
    ],
)
def test_native_says_why_it_cannot_serve(
    device: str, dtype: torch.dtype, dense: bool, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=rf'backend="native" cannot serve .*{reason}'):
        backends.choose("native", torch.device(device), dtype, dense)


@pytest.mark.skipif(
    torch.version.cuda is not None and _C.why_no_cuda() is None, reason="native serves CUDA here"
)
def test_native_says_why_it_cannot_serve_cuda() -> None:
    with pytest.raises(RuntimeError, match=r"cannot serve .*CUDA"):
        backends.choose("native", torch.device("cuda"), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_auto_takes_native_on_cuda() -> None:
    device = torch.device("cuda")
    without_native = "foreach" if backends.why_unavailable("triton", device) else "triton"
    expected = without_native if _C.why_no_cuda() else "native"
    assert backends.choose("auto", device, torch.float32)[0] == expected


@pytest.mark.parametrize("name", ["", "Native", "cuda", None])
def test_unknown_names(name: Any) -> None:
    with pytest.raises(
        ValueError, match=r"backend=.*'auto', 'native', 'triton', 'foreach', 'reference'"
    ):
        backends.choose(name, CPU, torch.float32)


LISTS_THAT_NATIVE_REFUSES: dict[str, tuple[Callable[[], Tensor], str]] = {
    "float64": (lambda: torch.ones(4, dtype=torch.float64), r"no kernels for torch\.float64"),
    "gaps": (lambda: torch.ones(8)[::2], "without gaps or overlap"),
    "columns": (lambda: torch.ones(4, 3)[:, :2], "without gaps or overlap"),
}


@pytest.mark.parametrize(
    ("make", "reason"), LISTS_THAT_NATIVE_REFUSES.values(), ids=LISTS_THAT_NATIVE_REFUSES
)
@pytest.mark.parametrize("op", ["dots", "perturb_", "restore_", "mix_", "sgd_", "sgd_hess_"])
def test_ops_on_native_refuse_what_it_cannot_serve(
    make: Callable[[], Tensor], reason: str, op: str
) -> None:
    a, b, c = ([make()] for _ in range(3))
    before = copies([*a, *b, *c])
    calls: dict[str, Callable[[], Any]] = {
        "dots": lambda: ops.dots(a, b, c, backend="native"),
        "perturb_": lambda: ops.perturb_(a, b, c, rho=0.1, backend="native"),
        "restore_": lambda: ops.restore_(a, b, backend="native"),
        "mix_": lambda: ops.mix_(a, Mix(b, c), backend="native"),
        "sgd_": lambda: ops.sgd_(a, b, Mix(c), lr=0.1, backend="native"),
        "sgd_hess_": lambda: ops.sgd_hess_(a, b, c, lr=0.1, rho=0.1, backend="native"),
    }
    with pytest.raises(RuntimeError, match=reason):
        calls[op]()
    assert_same_bits([*a, *b, *c], before)


def test_a_gap_in_any_tensor_of_the_list_counts() -> None:
    tensors = [torch.ones(4), torch.ones(8)[::2]]
    with pytest.raises(RuntimeError, match="without gaps or overlap"):
        ops.dots(tensors, backend="native")
    assert ops.dots(tensors, backend="auto").per_tensor.tolist() == [[4], [4]]


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.ones(()), True),
        (torch.ones(0, 3), True),
        (torch.ones(2, 3).t(), True),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.ones(4, 1, 3)[:, :, :], True),
        (torch.ones(4, 3)[:, :1].t(), False),
        (torch.ones(6)[::2], False),
        (torch.ones(1).expand(3), False),
        (torch.ones(6)[5:], True),
    ],
)
def test_dense_layouts(tensor: Tensor, dense: bool) -> None:
    assert ops.is_dense(tensor) == dense


# The compiled core: it walks lists by address, and refuses what would crash


class Fake:
    """What the core asks of a tensor, where its type has no exchange API."""

    dtype = "torch.float32"
    device = SimpleNamespace(type="cpu", index=None)

    def __init__(self, address: int, numel: int) -> None:
        self.address = address
        self.shape = (numel,)

    def stride(self) -> tuple[int]:
        return (1,)

    def data_ptr(self) -> int:
        return self.address


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def fakes(*tensors: tuple[int, int]) -> Any:
    return _C.TensorList([cast(Tensor, Fake(*tensor)) for tensor in tensors])


class Core:
    """Calls of the core's ops on two tensors of three elements."""

    def __init__(self) -> None:
        self.tensors = torch.arange(36.0).view(6, 2, 3)
        self.sums = torch.ones(3 * 6, dtype=torch.float64)
        self.steps = [torch.zeros(()), torch.zeros((), dtype=torch.float64)]
        self.bias_corrections = torch.zeros(2, 2)
        self.target = _C.cpu(1)

    def list_of(self, i: int, second_numel: int = 3) -> Any:
        first, second = self.tensors[i]
        return fakes((first.data_ptr(), 3), (second.data_ptr(), second_numel))

    def mix(self, lists: list[Any]) -> Any:
        return _C.Mix(lists[3], lists[4], 1.0, 0, 0, 1.0, 0, 0, 0, 0, 0, 0)

    def call(self, op: str, *, second_numel: int = 3, **wrong: Any) -> None:
        """With lists called "0", "1", ...; `wrong` replaces some of them."""
        lists = [wrong.get(str(i), self.list_of(i, second_numel)) for i in range(len(self.tensors))]
        sums = self.sums.data_ptr()
        if op == "dots":
            _C.dots(self.target, *lists[:3], None, 0.0, 0, sums, sums + 8 * 12)
        elif op == "dots with weights":
            _C.dots(self.target, lists[0], None, None, lists[1], 0.0, 0, sums, sums + 8 * 4)
        elif op == "perturb":
            number = sums, 0, 0.1, 0, 0, None, 0.0
            _C.perturb(self.target, *lists[:3], *number, False, True, None)
        elif op == "restore":
            _C.restore(self.target, *lists[:2])
        elif op == "mix":
            _C.mix(self.target, self.mix(lists), lists[0], False)
        elif op == "sgd":
            _C.sgd(self.target, self.mix(lists), *lists[:3], SGD_WITH_MOMENTUM, None)
        elif op == "adam":
            steps = wrong.get("steps", _C.TensorList(self.steps))
            corrections = wrong.get("bias_corrections", self.bias_corrections.data_ptr())
            lists = [self.mix(lists), *lists[:3], lists[5]]
            _C.adam(self.target, *lists, steps, corrections, ADAM, None)
        else:
            raise ValueError(op)


ADAM = _C.AdamOptions(
    lr=0.1,
    lr_address=0,
    beta1=0.9,
    one_minus_beta1=0.1,
    beta2=0.9,
    one_minus_beta2=0.1,
    eps=1e-8,
    weight_decay=0.0,
    gradient_sign=1.0,
    decoupled=False,
)
SGD_WITH_MOMENTUM = _C.SgdOptions(
    lr=0.1,
    lr_address=0,
    momentum=0.9,
    one_minus_dampening=1.0,
    one_minus_dampening_address=0,
    weight_decay=0.0,
    gradient_sign=1.0,
    nesterov=False,
    has_momentum=True,
    init_momentum=False,
)
CORE_LISTS = {
    "dots": {"0": "x", "1": "y", "2": "z"},
    "dots with weights": {"0": "x", "1": "weights"},
    "perturb": {"0": "params", "1": "direction", "2": "old_params"},
    "restore": {"0": "params", "1": "old_params"},
    "mix": {"0": "out", "3": "mix.x", "4": "mix.y"},
    "sgd": {
        "0": "params",
        "1": "old_params",
        "2": "momentum_buffers",
        "3": "mix.x",
        "4": "mix.y",
    },
    "adam": {
        "0": "params",
        "1": "old_params",
        "2": "exp_avgs",
        "3": "mix.x",
        "4": "mix.y",
        "5": "exp_avg_sqs",
    },
}
every_core_list = pytest.mark.parametrize(
    ("op", "which", "name"),
    [(op, which, name) for op, lists in CORE_LISTS.items() for which, name in lists.items()],
)


@pytest.mark.parametrize("op", CORE_LISTS)
def test_the_calls_of_the_core_below_are_right_but_for_one_list(op: str) -> None:
    Core().call(op)


@every_core_list
def test_the_core_refuses_null_addresses(op: str, which: str, name: str) -> None:
    core = Core()
    before = core.tensors.clone()
    with pytest.raises(ValueError, match=rf"{name}\[1\] has no memory .* 3 elements"):
        core.call(op, **{which: fakes((core.tensors[0][0].data_ptr(), 3), (0, 3))})
    assert torch.equal(core.tensors, before)


@every_core_list
def test_the_core_accepts_null_addresses_of_empty_tensors(op: str, which: str, name: str) -> None:
    core = Core()
    empty = fakes((core.tensors[5][0].data_ptr(), 3), (0, 0))
    core.call(op, second_numel=0, **{which: empty})


@every_core_list
@pytest.mark.parametrize("length", [0, 1, 3])
def test_the_core_refuses_lists_of_different_lengths(
    op: str, which: str, name: str, length: int
) -> None:
    core = Core()
    before = core.tensors.clone()
    wrong = fakes(*[(core.tensors[5 - i][0].data_ptr(), 3) for i in range(length)])
    message = rf" has {length} tensors " if which == "0" else f"{name} has {length} tensors "
    with pytest.raises(ValueError, match=f"{message}|has 2 tensors and {name} has {length}"):
        core.call(op, **{which: wrong})
    assert torch.equal(core.tensors, before)


@every_core_list
def test_the_core_refuses_lists_of_different_sizes(op: str, which: str, name: str) -> None:
    core = Core()
    before = core.tensors.clone()
    longer = fakes(*[(core.tensors[i][0].data_ptr(), numel) for i, numel in ((0, 3), (1, 4))])
    with pytest.raises(ValueError, match=f"{name}.* differ in dtype, device, shape or strides"):
        core.call(op, **{which: longer})
    assert torch.equal(core.tensors, before)


LISTS_THAT_DIFFER: dict[str, tuple[Tensor, Tensor]] = {
    "dtype": (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float16)),
    "half dtypes": (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16)),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "dimensions": (torch.zeros(6), torch.zeros(6, 1)),
    "strides": (torch.zeros(2, 3), torch.zeros(3, 2).t()),
}


@pytest.mark.parametrize("exchange_api", [True, False])
@pytest.mark.parametrize("what", LISTS_THAT_DIFFER)
def test_lists_that_differ_are_not_alike(what: str, exchange_api: bool) -> None:
    a, b = (_C.TensorList([t], exchange_api) for t in LISTS_THAT_DIFFER[what])
    assert a.is_alike(a) and b.is_alike(b)
    assert not a.is_alike(b) and not b.is_alike(a)
    first, second = LISTS_THAT_DIFFER[what]
    assert not contract.are_alike([first], [second])


@pytest.mark.parametrize("exchange_api", [True, False])
def test_strides_that_are_never_walked_do_not_matter(exchange_api: bool) -> None:
    for a, b in [
        (torch.zeros(4, 1, 3), torch.zeros(4, 3, 1).transpose(1, 2)),
        (torch.zeros(0, 3), torch.zeros(3, 0).t()),
        (torch.zeros(64, 3, 1, 1), torch.zeros(64, 3, 1, 1).to(memory_format=torch.channels_last)),
    ]:
        assert _C.TensorList([a], exchange_api).is_alike(_C.TensorList([b], exchange_api))


def test_both_ways_of_reading_a_tensor_agree() -> None:
    tensors = [
        torch.zeros(5)[2:],
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.zeros(()),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(3, 0),
    ]
    for dtype in NATIVE_DTYPES:
        cast_tensors = [t.to(dtype) for t in tensors]
        lists = [_C.TensorList(cast_tensors, exchange_api) for exchange_api in (True, False)]
        assert lists[0].is_alike(lists[1])


READER = _C.TensorReader(Tensor, torch.nn.Parameter)
needs_exchange_api = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"),
    reason="this PyTorch has no C exchange API: optimizers look closely in every step",
)


def trained() -> list[torch.nn.Parameter]:
    """Parameters with gradients; one is channels_last, one empty."""
    params = [torch.nn.Parameter(torch.randn(2, 3, 4, 5)) for _ in range(4)]
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    params[2].data = torch.zeros(0, 3)
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@needs_exchange_api
def test_gradients_are_read_where_nothing_has_changed() -> None:
    params = trained()
    known = _C.TensorList(params)
    frozen = torch.nn.Parameter(torch.ones(3))
    read = READER.gradients([*params[:2], frozen, *params[2:]], params, known)
    assert read is not None
    grads, of_grads, of_params = read
    assert all(grad is p.grad for grad, p in zip(grads, params, strict=True))
    assert of_params is known
    assert of_grads.is_alike(_C.TensorList(grads))
    _C.restore(_C.cpu(1), of_params, of_grads)  # the addresses are those of the gradients
    for p in params:
        assert torch.equal(p, cast(Tensor, p.grad))

    params[0].data = params[0].data.clone()  # other memory, laid out alike
    moved = READER.gradients(params, params, known)
    assert moved is not None and moved[2] is not known and moved[2].is_alike(known)
    expected = [torch.randn_like(p) for p in params]
    _C.restore(_C.cpu(1), moved[2], _C.TensorList(expected))
    assert torch.equal(params[0], expected[0])


class Subclass(Tensor):
    pass


CHANGES: dict[str, Callable[[list[torch.nn.Parameter]], Any]] = {
    "no gradient": lambda params: setattr(params[1], "grad", None),
    "a dtype": lambda params: setattr(params[1], "data", params[1].data.half()),
    "a layout": lambda params: setattr(params[1], "data", params[1].data.contiguous()),
    "a shape": lambda params: setattr(params[3], "data", torch.ones(2, 3, 5, 4)),
    "a layout of a gradient": lambda params: setattr(params[1], "grad", torch.randn(2, 3, 4, 5)),
    "a sparse gradient": lambda params: setattr(
        params[0], "grad", torch.zeros(2, 3, 4, 5).to_sparse()
    ),
    "a negated gradient": lambda params: setattr(
        params[0], "grad", torch.randn(2, 3, 4, 5, dtype=torch.complex64).conj().imag
    ),
    "a subclass": lambda params: setattr(
        params[0], "grad", torch.randn(2, 3, 4, 5).as_subclass(Subclass)
    ),
    "the order": lambda params: params.reverse(),
    "one more": lambda params: params.append(trained()[0]),
    "one less": lambda params: params.pop(),
    "another parameter": lambda params: params.__setitem__(0, trained()[0]),
    "no tensor": lambda params: params.__setitem__(0, cast(Any, 3)),
}


@needs_exchange_api
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_has_changed_is_left_to_a_closer_look(change: str) -> None:
    candidates = trained()
    params, known = list(candidates), _C.TensorList(candidates)
    assert READER.gradients(candidates, params, known) is not None
    CHANGES[change](candidates)
    assert READER.gradients(candidates, params, known) is None
    assert READER.gradients(tuple(params), params, known) is None


@pytest.mark.parametrize("backend", ["native", "triton", "foreach", "reference"])
def test_versions_are_those_of_pytorch(backend: str) -> None:
    tensors = [*trained(), torch.ones(2), torch.ones(3).as_subclass(Subclass)]
    for i, tensor in enumerate(tensors):
        for _ in range(i):
            tensor.detach().add_(1)
    versions_of = backends.get(backend).versions_of
    assert versions_of(tensors) == [t._version for t in tensors]
    assert versions_of(tensors)[-3:] == [3, 4, 5]
    assert versions_of(()) == []


@needs_exchange_api
@pytest.mark.parametrize("order", ["as the parameters", "reversed", "behind others"])
def test_state_is_read_in_any_order(order: str) -> None:
    params = trained()
    buffers = [torch.randn_like(p) for p in params]
    entries = [(p, {"momentum_buffer": b}) for p, b in zip(params, buffers, strict=True)]
    if order == "reversed":
        entries.reverse()
    if order == "behind others":
        entries = [(p, {}) for p in trained()] + entries
    read = READER.state(dict(entries), params, "momentum_buffer", _C.TensorList(params))
    assert read is not None
    assert all(found is b for found, b in zip(read[0], buffers, strict=True))
    _C.restore(_C.cpu(1), _C.TensorList(params), read[1])
    for p, buffer in zip(params, buffers, strict=True):
        assert torch.equal(p, buffer)


@needs_exchange_api
def test_state_that_is_not_there_or_not_alike_is_left_to_a_closer_look() -> None:
    params = trained()
    like = _C.TensorList(params)
    full: dict[Any, Any] = {p: {"momentum_buffer": torch.randn_like(p)} for p in params}
    other = torch.randn(2, 3, 4, 5)
    for of_first in ({}, {"momentum_buffer": None}, {"momentum_buffer": other.half()}, None):
        state = {**full, params[0]: of_first}
        assert READER.state(state, params, "momentum_buffer", like) is None
    without = {p: of_param for p, of_param in full.items() if p is not params[2]}
    assert READER.state(without, params, "momentum_buffer", like) is None
    assert READER.state(None, params, "momentum_buffer", like) is None
    assert READER.state(full, params, "momentum_buffer", like) is not None


@pytest.mark.parametrize("exchange_api", [True, False])
def test_the_core_refuses_other_dtypes(exchange_api: bool) -> None:
    core = Core()
    for dtype in (torch.float64, torch.int32):
        tensors = _C.TensorList([torch.zeros(3, dtype=dtype)], exchange_api)
        with pytest.raises(TypeError, match="float32, bfloat16 and float16"):
            _C.restore(core.target, tensors, tensors)
    mixed = _C.TensorList([torch.zeros(3), torch.zeros(3).half()], exchange_api)
    with pytest.raises(TypeError, match="differ in dtype"):
        _C.restore(core.target, mixed, mixed)


@pytest.mark.parametrize("exchange_api", [True, False])
@pytest.mark.parametrize(
    "thing", [None, 3, torch.zeros(3, 3).to_sparse()], ids=["None", "3", "sparse"]
)
def test_the_core_refuses_what_is_no_tensor_with_memory(thing: Any, exchange_api: bool) -> None:
    with pytest.raises((RuntimeError, AttributeError)):
        _C.TensorList([torch.zeros(3, 3), thing], exchange_api)


def test_the_core_refuses_momentum_without_buffers() -> None:
    core = Core()
    with pytest.raises(ValueError, match="momentum_buffers is missing"):
        core.call("sgd", **{"2": None})


def test_the_core_refuses_a_null_address_of_bias_corrections() -> None:
    core = Core()
    with pytest.raises(ValueError, match="bias_corrections has no memory"):
        core.call("adam", bias_corrections=0)


@pytest.mark.parametrize("exchange_api", [True, False])
@pytest.mark.parametrize(
    ("second", "mention"),
    [
        ([], "steps has 1 tensors and params has 2"),
        ([torch.zeros(2)], r"steps\[1\] is no float32 or float64 number"),
        ([torch.zeros((), dtype=torch.float16)], r"steps\[1\] is no float32"),
        ([torch.zeros((), dtype=torch.bfloat16)], r"steps\[1\] is no float32"),
        ([torch.zeros((), dtype=torch.int64)], r"steps\[1\] is no float32"),
        ([freed(torch.zeros(()))], r"steps\[1\] is no float32"),
    ],
    ids=["length", "shape", "float16", "bfloat16", "int64", "no memory"],
)
def test_the_core_refuses_what_is_no_step_count(
    second: list[Tensor], mention: str, exchange_api: bool
) -> None:
    core = Core()
    steps = _C.TensorList([torch.zeros(()), *second], exchange_api)
    with pytest.raises(ValueError, match=mention):
        core.call("adam", steps=steps)
    assert core.tensors.equal(torch.arange(36.0).view(6, 2, 3))
    for step in core.steps:
        assert step.item() == 0


@pytest.mark.parametrize("exchange_api", [True, False])
def test_the_core_counts_in_float32_and_in_float64(exchange_api: bool) -> None:
    core = Core()
    core.call("adam", steps=_C.TensorList(core.steps, exchange_api))
    assert [step.item() for step in core.steps] == [1, 1]


LOAD_THE_CORE_WITHOUT_TORCH = f"""
import array, importlib.util, sys, types
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("samkernels._C", {_C.__file__!r})
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
at = lambda values: values.buffer_info()[0]

class Fake:
    dtype, device = "torch.float32", types.SimpleNamespace(type="cpu", index=None)
    def __init__(self, address, numel):
        self.data_ptr, self.shape, self.stride = lambda: address, (numel,), lambda: (1,)

x = array.array("f", [3.0, 4.0, 12.0])
sums = array.array("d", [0.0] * 3 * core.num_dots(3, False))
tensors = core.TensorList([Fake(at(x), 2), Fake(at(x) + 8, 1)])
others = core.TensorList([Fake(at(x) + 4, 2), Fake(at(x), 1)])
target = core.cpu(2)
"""


def test_the_core_works_without_torch() -> None:
    printed = run_python(
        LOAD_THE_CORE_WITHOUT_TORCH
        + """
core.dots(target, tensors, None, None, None, 0.0, 0, at(sums), at(sums) + 16)
print(list(sums)[:3])
core.dots(target, tensors, others, tensors, None, 0.0, 0, at(sums), at(sums) + 96)
print(list(sums)[12:])
"""
    )
    of_tensors, of_both = printed.splitlines()
    assert of_tensors == "[25.0, 144.0, 169.0]"
    # The second list is x[1:3], x[0].
    assert of_both == "[169.0, 96.0, 169.0, 169.0, 2.0, 3.0]"


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        (
            "square",
            "core.perturb(target, *[tensors] * 3, 0, 0, 0.1, 0, 0, None, 0.0, False, True, None)",
        ),
        ("per_tensor", "core.dots(target, tensors, None, None, None, 0.0, 0, 0, at(sums))"),
        ("total", "core.dots(target, tensors, None, None, None, 0.0, 0, at(sums), 0)"),
    ],
    ids=["square", "per_tensor", "total"],
)
def test_the_core_refuses_null_addresses_of_scalars(argument: str, call: str) -> None:
    # In an interpreter of its own: a null address that is used kills it.
    printed = run_python(
        LOAD_THE_CORE_WITHOUT_TORCH
        + f"""
try:
    {call}
except ValueError as error:
    print(error)
"""
    )
    assert argument in printed


def test_the_core_makes_room_for_sums_by_itself_on_the_cpu() -> None:
    tensors = [torch.randn(40_000), torch.zeros(0), torch.randn(3)]
    core = _C.TensorList(tensors)
    assert _C.workspace_bytes(_C.cpu(1), core, 1) == 0
    per_tensor, total = (torch.zeros(n, dtype=torch.float64) for n in (3, 1))
    sums = per_tensor.data_ptr(), total.data_ptr()
    _C.dots(_C.cpu(1), core, None, None, None, 0.0, 0, *sums)
    expected = torch.stack([t.double().square().sum() for t in tensors])
    torch.testing.assert_close(per_tensor, expected)
    torch.testing.assert_close(total[0], expected.sum())


def test_the_core_refuses_lists_that_make_no_form_of_dots() -> None:
    x, sums = _C.TensorList([torch.ones(3)]), torch.zeros(6, dtype=torch.float64)
    for y, z, weights in ((None, x, None), (x, None, x), (x, x, x)):
        with pytest.raises(ValueError, match="dots: give x, y and z in their order"):
            _C.dots(_C.cpu(1), x, y, z, weights, 0.0, 0, sums.data_ptr(), sums.data_ptr())


@pytest.mark.parametrize(("function", "has_y"), [(-1, True), (4, True), (1, False), (3, False)])
def test_the_core_refuses_mixes_that_it_does_not_know(function: int, has_y: bool) -> None:
    x = _C.TensorList([torch.ones(3)])
    numbers = 1.0, 0, 0, 1.0, 0, 0
    with pytest.raises(ValueError, match=r"mix\.function is unknown, or lacks mix\.y"):
        _C.Mix(x, x if has_y else None, *numbers, function, 0, 0, 0)


WRONG_SCALARS: dict[str, Callable[[list[Tensor]], None]] = {
    "square": lambda x: native.perturb_(
        x, x, copies(x), square=torch.tensor(1.0), rho=0.1, **PLAIN
    ),
    "rho": lambda x: native.perturb_(
        x, x, copies(x), square=torch.ones((), dtype=torch.float64), rho=x[0].double(), **PLAIN
    ),
    "a": lambda x: native.mix_(x, Mix(x, a=torch.ones((), dtype=torch.float64))),
    "b": lambda x: native.mix_(x, Mix(x, x, b=torch.ones((), dtype=torch.float16))),
    "divisor": lambda x: native.mix_(x, Mix(x, divisor=torch.ones((), dtype=torch.float64))),
    "found_inf": lambda x: native.mix_(x, Mix(x, found_inf=torch.ones((), dtype=torch.float64))),
    "ascent_square": lambda x: native.mix_(x, Mix(x, ascent_square=torch.tensor(1.0))),
}
PLAIN: dict[str, Any] = {"eta": None, "eps": 0.0, "rounds_at_random": False, "journal": None}


@pytest.mark.parametrize("call", WRONG_SCALARS.values(), ids=WRONG_SCALARS)
def test_the_core_is_given_no_number_of_a_wrong_dtype(call: Callable[[list[Tensor]], None]) -> None:
    """It reads addresses: float32 taken for float64 would be another number."""
    x = [torch.ones(3)]
    with pytest.raises(AssertionError):
        call(x)
    assert x[0].tolist() == [1, 1, 1]


def test_a_device_needs_room_for_sums(emulated_core: Any) -> None:
    core = emulated_core
    x, sums = core.TensorList([torch.ones(3)]), torch.full((6,), -1.0, dtype=torch.float64)
    assert core.workspace_bytes(core.cuda(0), x, 1) > 0
    for others in ((None, None, None), (x, None, None), (x, x, None), (None, None, x)):
        with pytest.raises(ValueError, match="workspace has no memory"):
            core.dots(core.cuda(0), x, *others, 0.0, 0, *[sums.data_ptr()] * 2)
    assert (sums == -1).all()


def test_build_info() -> None:
    info = _C.build_info()
    assert info["cpu_variant"] in ("baseline", "avx2")
    assert info["compiler"]
    assert re.fullmatch(r"OpenMP \d.*|Grand Central Dispatch|", info["threads"])
    assert info["cuda"] or _C.why_no_cuda() is not None


# Without the compiled core


def test_without_the_core_the_import_works_and_the_reason_is_given() -> None:
    printed = run_python(
        """
import sys
sys.modules["samkernels._C"] = None
import torch
from samkernels import SAM, backends, ops

cpu = torch.device("cpu")
print(backends.why_unavailable("native", cpu))
print(backends.choose("auto", cpu, torch.float32)[0])
w, g, old = [torch.zeros(2)], [torch.tensor([3.0, 4.0])], [torch.ones(2)]
print(ops.perturb_(w, g, old, rho=5.0).sqrt().item(), w[0].tolist(), old[0].tolist())
try:
    ops.restore_(w, old, backend="native")
except RuntimeError as error:
    print(error)
print(w[0].tolist())
"""
    )
    reason, auto, perturbed, error, unchanged = printed.splitlines()
    assert reason.startswith("the compiled core could not be imported: ")
    assert "samkernels._C" in reason
    assert auto == "foreach"
    assert perturbed == "5.0 [3.0, 4.0] [0.0, 0.0]"
    assert error == f'backend="native" cannot serve torch.float32 on cpu: {reason}'
    assert unchanged == "[3.0, 4.0]"


@pytest.mark.parametrize("interface", [{}, {"INTERFACE": "of another commit"}])
def test_a_core_of_other_sources_is_not_called(interface: dict[str, str]) -> None:
    """As after a pull into an editable install, before it is installed again."""
    printed = run_python(
        f"""
import sys, types, warnings
core = types.ModuleType("samkernels._C")
core.__file__ = "_C.so"
vars(core).update({interface})
sys.modules["samkernels._C"] = core
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import samkernels
print(*[w.message for w in caught if "samkernels" in str(w.message)])
import torch
from samkernels import backends
cpu = torch.device("cpu")
print(backends.why_unavailable("native", cpu))
print(backends.choose("auto", cpu, torch.float32)[0])
"""
    )
    warning, reason, auto = printed.splitlines()
    assert reason.startswith("the compiled core _C.so was built from other sources")
    assert "install again" in reason
    assert warning == f"samkernels goes on without its core: {reason}"
    assert auto == "foreach"
