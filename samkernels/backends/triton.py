"""Triton kernels on the GPU: one launch per op over all tensors of a list, nothing to build.

The kernels (triton_kernels.py) find their tensors through two tables on the device: a plan of
chunks, which depends on the sizes, and the addresses. Both are kept while sizes and addresses do
not change, and are copied over from pinned memory when they do, without the host waiting.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samkernels.backends.contract import (
    AdamOptions,
    Comparison,
    Norms,
    Recombination,
    SgdOptions,
    TensorList,
    positions_of,
)
from samkernels.backends.contract import are_alike as are_alike
from samkernels.backends.contract import gradients_of as gradients_of
from samkernels.backends.contract import prepare as prepare
from samkernels.backends.contract import state_of as state_of

# To the names of Triton's dtypes.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
COMPARE_SUMS = 6
MIN_CAPABILITY = (8, 0)  # what Triton supports
MIN_VERSION = (3, 3)  # from which on launchers take all arguments, constants too: see _launch


class Launch(NamedTuple):
    """Elements per program, a power of two, and the warps that share them."""

    block: int
    warps: int


# By compute capability: enough bytes in flight per multiprocessor to cover the latency of its
# memory. Derived, not measured; `tune` measures.
LAUNCHES = {
    (8, 0): Launch(4096, 8),
    (8, 6): Launch(2048, 4),
    (8, 9): Launch(2048, 4),
    (9, 0): Launch(4096, 8),
    (10, 0): Launch(4096, 8),
    (12, 0): Launch(2048, 4),
}
DEFAULT_LAUNCH = Launch(2048, 4)
CANDIDATES = (Launch(1024, 4), Launch(2048, 4), Launch(4096, 4), Launch(4096, 8), Launch(8192, 8))

# More elements per thread than this, of the five lists that adam_ reads, do not fit in registers.
ADAM_PER_THREAD = 16

# Sums have chunks, and blocks of them, of one size everywhere: it sets the order of additions.
SUM_CHUNK = 16384
SUM_LAUNCH = Launch(1024, 4)

COUNT_LAUNCH = Launch(128, 4)  # of tensors


def why_unavailable(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
    """Why the Triton kernels cannot serve such tensors, or None if they can."""
    if device.type not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {device.type} tensors"
    if dtype not in DTYPES:
        return f"there are no Triton kernels for {dtype}"
    if not dense:
        return "the Triton kernels take tensors that fill their memory without gaps or overlap"
    if device.type == "cpu":
        if _is_interpreted():
            return None
        return "Triton compiles for GPUs (its interpreter, TRITON_INTERPRET=1, serves CPU tensors)"
    return _why_no_triton() or _why_no_gpu(device)


def _is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, a debugger (it cuts float32 off to bfloat16,
    where a GPU rounds). Does not import triton to say no."""
    asked = bool(os.environ.get("TRITON_INTERPRET"))
    return asked and _why_no_triton() is None and _kernels().INTERPRETED


@lru_cache(maxsize=1)
def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed (pip install "samkernels[triton]")'
    try:
        version = _kernels().triton.__version__
    except Exception as error:  # whatever a broken installation raises
        return f"Triton could not be imported: {error}"
    if tuple(map(int, version.split(".")[:2])) < MIN_VERSION:
        return f"Triton {version} is too old: 3.3 or newer is needed"
    return None


@lru_cache(maxsize=16)
def _why_no_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if _is_interpreted():
        return "Triton's interpreter (TRITON_INTERPRET is set) serves CPU tensors only"
    if torch.version.cuda is None:
        return "the Triton kernels were written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"Triton needs compute capability 8.0 or higher, and this GPU has {found}"
    return None


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    """Imported at the first use: triton takes a tenth of a second."""
    from samkernels.backends import triton_kernels

    return triton_kernels


def norms(tensors: TensorList) -> Norms:
    per_tensor = torch.empty(len(tensors), dtype=torch.float32, device=tensors[0].device)
    total = torch.empty((), dtype=torch.float32, device=tensors[0].device)
    _measure({"tensors": tensors}, per_tensor, total)
    return Norms(total, per_tensor)


def weighted_norms(tensors: TensorList, weights: TensorList) -> tuple[Norms, Norms]:
    per_tensor = torch.empty(2, len(tensors), dtype=torch.float32, device=tensors[0].device)
    total = torch.empty(2, dtype=torch.float32, device=tensors[0].device)
    _measure({"tensors": tensors, "weights": weights}, per_tensor, total)
    return Norms(total[0], per_tensor[0]), Norms(total[1], per_tensor[1])


def _measure(lists: dict[str, TensorList], per_tensor: Tensor, total: Tensor) -> None:
    device = total.device
    sums = total.numel()
    num_tensors = len(lists["tensors"])
    with _on(device):
        table = _table(lists, SUM_CHUNK)
        _launch(
            _kernels().norms,
            table,
            SUM_LAUNCH,
            torch.empty(sums * (table.chunks + num_tensors), dtype=torch.float64, device=device),
            torch.zeros(num_tensors + 1, dtype=torch.int32, device=device),
            per_tensor,
            total,
            WEIGHTED="weights" in lists,
        )


def perturb_(
    params: TensorList,
    grads: TensorList,
    old_params: TensorList,
    *,
    norm: Tensor,
    rho: float | Tensor,
    adaptive: bool,
    eps: float,
    rounds_at_random: bool,
    journal: list[bool] | None,
) -> None:
    lists = {"params": params, "grads": grads, "old_params": old_params}
    if journal is not None and _is_interpreted():
        # An interrupt would come between two chunks.
        torch._foreach_copy_(old_params, params)
        journal.append(True)
        journal = None
    launch = _launch_of(params[0])
    with _on(params[0].device):
        _launch(
            _kernels().perturb,
            _table(lists, launch.block),
            launch,
            norm,
            _number(rho),
            float(eps),
            journal=journal,
            ADAPTIVE=adaptive,
            AT_RANDOM=rounds_at_random and params[0].dtype is torch.bfloat16,
            RHO_ON_DEVICE=isinstance(rho, Tensor),
        )
    _mark_written(params, old_params)


def restore_(params: TensorList, old_params: TensorList) -> None:
    launch = _launch_of(params[0])
    with _on(params[0].device):
        table = _table({"params": params, "old_params": old_params}, launch.block)
        _launch(_kernels().restore, table, launch)
    _mark_written(params)


def recombine_(out: TensorList, recombination: Recombination) -> None:
    lists = {"out": out, "magnitude": recombination.magnitude}
    if recombination.sign is not None:
        lists["sign"] = recombination.sign
    launch = _launch_of(out[0])
    with _on(out[0].device):
        _launch(
            _kernels().recombine,
            _table(lists, launch.block),
            launch,
            *_scalars(recombination),
            **_rule(recombination),
        )
    _mark_written(out)


def sgd_(
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    recombination: Recombination,
    options: SgdOptions,
) -> None:
    lists = {"params": params, "old_params": old_params, "magnitude": recombination.magnitude}
    if recombination.sign is not None:
        lists["sign"] = recombination.sign
    if momentum_buffers is not None:
        lists["momentum_buffers"] = momentum_buffers
    launch = _launch_of(params[0])
    with _on(params[0].device):
        _launch(
            _kernels().sgd,
            _table(lists, launch.block),
            launch,
            *_scalars(recombination),
            *_sgd_scalars(options),
            **_rule(recombination),
            **_sgd_flags(momentum_buffers, options),
        )
    _mark_written(params, momentum_buffers or ())


def sgd_hess_(
    params: TensorList,
    grads: TensorList,
    hessian_products: TensorList,
    momentum_buffers: TensorList | None,
    rho: float | Tensor,
    options: SgdOptions,
) -> None:
    lists = {"params": params, "grads": grads, "hessian_products": hessian_products}
    if momentum_buffers is not None:
        lists["momentum_buffers"] = momentum_buffers
    counts, strides = zip(*(positions_of(p) or (0, 0) for p in params), strict=True)
    launch = _launch_of(params[0])
    with _on(params[0].device):
        _launch(
            _kernels().sgd_hess,
            _table(lists, launch.block, counts, strides),
            launch,
            _number(rho),
            *_sgd_scalars(options),
            RHO_ON_DEVICE=isinstance(rho, Tensor),
            **_sgd_flags(momentum_buffers, options),
        )
    _mark_written(params, momentum_buffers or ())


def adam_(
    params: TensorList,
    old_params: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    recombination: Recombination,
    options: AdamOptions,
) -> None:
    lists = {"params": params, "old_params": old_params, "magnitude": recombination.magnitude}
    lists |= {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if recombination.sign is not None:
        lists["sign"] = recombination.sign
    launch = _launch_of(params[0])
    launch = launch._replace(block=min(launch.block, ADAM_PER_THREAD * 32 * launch.warps))
    with _on(params[0].device):
        table = _table(lists, launch.block)  # before anything is written
        bias_corrections = _count_steps(steps, recombination, options)
        _launch(
            _kernels().adam,
            table,
            launch,
            *_scalars(recombination),
            _number(options.lr),
            float(options.beta1),
            float(1 - options.beta1),
            float(options.beta2),
            float(1 - options.beta2),
            float(options.eps),
            float(options.weight_decay),
            -1.0 if options.maximize else 1.0,
            bias_corrections,
            **_rule(recombination),
            DECAYS=options.weight_decay != 0,
            DECOUPLED=options.decoupled,
            LR_ON_DEVICE=isinstance(options.lr, Tensor),
        )
    _mark_written(params, exp_avgs, exp_avg_sqs, steps)


def _count_steps(steps: TensorList, recombination: Recombination, options: AdamOptions) -> Tensor:
    """Count this step, unless it is skipped. The bias corrections, as the kernel takes them."""
    device = steps[0].device
    are_double = tuple(t.dtype is torch.float64 for t in steps)
    bias_corrections = torch.empty(len(steps), 2, dtype=torch.float32, device=device)
    _run(
        _kernels().count_steps,
        -(-len(steps) // COUNT_LAUNCH.block),
        _addresses({"steps": steps}, are_double),
        len(steps),
        _bits_of_minus(options.beta1),
        _bits_of_minus(options.beta2),
        recombination.ascent_norm,
        recombination.found_inf,
        bias_corrections,
        GUARDED=recombination.ascent_norm is not None,
        CHECKED=recombination.found_inf is not None,
        BLOCK=COUNT_LAUNCH.block,
        num_warps=COUNT_LAUNCH.warps,
        enable_fp_fusion=False,
    )
    return bias_corrections


def _bits_of_minus(x: float) -> int:
    """Those of -x in float64. Its sign is the highest bit: of whatever x, Triton makes an int64."""
    (bits,) = struct.unpack("<q", struct.pack("<d", -x))
    return bits


def compare(first_grads: TensorList, second_grads: TensorList, weights: TensorList) -> Comparison:
    device = first_grads[0].device
    sums = torch.empty(COMPARE_SUMS, dtype=torch.float64, device=device)
    per_tensor = torch.empty(len(first_grads), dtype=torch.float32, device=device)
    total = torch.empty((), dtype=torch.float32, device=device)
    lists = {"first_grads": first_grads, "second_grads": second_grads, "weights": weights}
    with _on(device):
        table = _table(lists, SUM_CHUNK)
        _launch(
            _kernels().compare,
            table,
            SUM_LAUNCH,
            torch.empty(
                table.chunks * COMPARE_SUMS + len(first_grads), dtype=torch.float64, device=device
            ),
            torch.zeros(len(first_grads) + 1, dtype=torch.int32, device=device),
            sums,
            per_tensor,
            total,
        )
    numel = sum(map(Tensor.numel, first_grads))
    return Comparison(sums, numel, Norms(total, per_tensor))


def _scalars(recombination: Recombination) -> tuple[Any, ...]:
    """Scalars that recombine and the updates share."""
    return (
        recombination.numerator,
        recombination.denominator,
        float(recombination.eps),
        recombination.ascent_norm,
        recombination.grad_scale,
        recombination.found_inf,
    )


def _sgd_scalars(options: SgdOptions) -> tuple[Any, ...]:
    """Scalars that every kernel takes that ends in SGD's update."""
    return (
        _number(options.lr),
        float(options.momentum),
        float(1 - options.dampening),
        float(options.weight_decay),
        -1.0 if options.maximize else 1.0,
    )


def _sgd_flags(momentum_buffers: TensorList | None, options: SgdOptions) -> dict[str, Any]:
    """Their flags."""
    kernels = _kernels()
    if momentum_buffers is None:
        momentum = kernels.NO_MOMENTUM
    else:
        momentum = kernels.INIT_MOMENTUM if options.init_momentum else kernels.RUNNING_MOMENTUM
    return {
        "MOMENTUM": momentum.value,
        "NESTEROV": options.nesterov,
        "DECAYS": options.weight_decay != 0,
        "LR_ON_DEVICE": isinstance(options.lr, Tensor),
    }


def _number(value: float | Tensor) -> float | Tensor:
    """Not an int: Triton would compile a kernel for it."""
    return value if isinstance(value, Tensor) else float(value)


def _rule(recombination: Recombination) -> dict[str, Any]:
    """Flags that recombine and the updates share."""
    numerator = recombination.numerator
    return {
        "SIGNED": recombination.sign is not None,
        "SCALED": numerator is not None,
        "PER_TENSOR": numerator is not None and numerator.dim() == 1,
        "UNSCALED": recombination.grad_scale is not None,
        "GUARDED": recombination.ascent_norm is not None,
        "CHECKED": recombination.found_inf is not None,
    }


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, and on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _launch(
    kernel: Any,
    table: Table,
    launch: Launch,
    *scalars: Any,
    journal: list[bool] | None = None,
    **flags: Any,
) -> None:
    """scalars, flags: in the order of the kernel's parameters."""
    arguments = (table.plan, table.addresses, *scalars)
    constants = {**flags, "T": table.dtype, "BLOCK": launch.block}
    # Contraction into fused multiply-adds would change the bits.
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    if journal is None:
        _run(kernel, table.chunks, *arguments, **constants, **options)
    else:
        # Triton's launcher calls a hook, from C, before it launches. A hook that is a C function
        # as well leaves no instruction of Python between the two, at which a signal handler could
        # run: no interrupt finds a journal that does not tell what happens to the weights.
        compiled = kernel.warmup(*arguments, grid=(table.chunks,), **constants, **options)
        compiled.run(
            table.chunks,
            1,
            1,
            _stream(table.plan.device),
            compiled.function,
            compiled.packed_metadata,
            True,  # what the hook is called with
            journal.append,
            None,
            *arguments,
            *constants.values(),
        )


def _run(kernel: Any, programs: int, *arguments: Any, **constants_and_options: Any) -> None:
    kernel[(programs,)](*arguments, **constants_and_options)


# Tables


class Table(NamedTuple):
    """What a kernel needs to find its tensors (triton_kernels.py)."""

    plan: Tensor  # int64 [chunks, 5]
    addresses: Tensor  # int64 [tensors, lists and numbers]
    chunks: int
    dtype: Any  # Triton's


def _table(lists: dict[str, TensorList], chunk: int, *numbers: tuple[int, ...]) -> Table:
    """numbers: one for each tensor, behind its addresses."""
    first = next(iter(lists.values()))
    of_chunks = _on_device(_plan, first[0].device, tuple(map(Tensor.numel, first)), chunk)
    dtype = getattr(_kernels().tl, DTYPES[first[0].dtype])
    return Table(of_chunks, _addresses(lists, *numbers), len(of_chunks), dtype)


def _addresses(lists: dict[str, TensorList], *numbers: tuple[int, ...]) -> Tensor:
    """int64 [tensors, lists and numbers]."""
    columns = [list(map(Tensor.data_ptr, tensors)) for tensors in lists.values()]
    first = next(iter(lists.values()))
    for name, column in zip(lists, columns, strict=True):
        if 0 in column:
            _check_memory(name, column, list(map(Tensor.numel, first)))
    addresses = tuple(chain.from_iterable(zip(*columns, *numbers, strict=True)))
    return _on_device(_place, first[0].device, addresses)


def _on_device(make: Any, device: torch.device, *values: Any) -> Tensor:
    """make(device, stream, *values), from its cache."""
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if captures:
        # A table of the cache could be freed while the graph needs it, and one that the graph
        # fills would be empty until the first replay.
        make = make.__wrapped__
    table = make(device, _stream(device), *values)
    if device.type == "cuda" and not captures:
        _capture_staging.hold_ready()
    return table


def _check_memory(name: str, addresses: Sequence[int], numel: Sequence[int]) -> None:
    for i, (address, n) in enumerate(zip(addresses, numel, strict=True)):
        if address == 0 and n > 0:
            raise ValueError(
                f"{name}[{i}] has no memory (its address is 0) for {n} elements: was its storage "
                "freed?"
            )


# Keyed by the stream: on another one, a copy that is still under way would not be waited for. What
# falls out of a cache is freed on the stream that it was made and used on, after its last use.
@lru_cache(maxsize=64)
def _plan(device: torch.device, stream: int, numel: tuple[int, ...], chunk: int) -> Tensor:
    n = torch.tensor(numel, dtype=torch.int64, device="cpu")
    chunks = (n + (chunk - 1)).div(chunk, rounding_mode="floor").clamp(min=1)
    first = chunks.cumsum(0) - chunks
    tensor = torch.arange(len(numel), device="cpu").repeat_interleave(chunks)
    begin = (torch.arange(len(tensor), device="cpu") - first[tensor]) * chunk
    count = (n[tensor] - begin).clamp(max=chunk)
    return _upload(torch.stack([tensor, begin, count, first[tensor], chunks[tensor]], 1), device)


@lru_cache(maxsize=256)
def _place(device: torch.device, stream: int, addresses: tuple[int, ...]) -> Tensor:
    return _upload(torch.tensor(addresses, dtype=torch.int64, device="cpu"), device)


class CaptureStaging:
    """Pinned memory for the copies that become part of a CUDA graph.

    No memory may be pinned during a capture, so it is held ready. A graph copies at every replay:
    what it copies from is never given back, nor written again.
    """

    def __init__(self, min_room: int) -> None:
        self.min_room = min_room  # elements
        self.buffers: list[Tensor] = []
        self.taken = 0  # elements of the last buffer
        self.largest = 0  # table so far; a step has some of them, for each parameter group

    def room(self) -> int:
        return self.buffers[-1].numel() - self.taken if self.buffers else 0

    def hold_ready(self) -> None:
        wanted = max(self.min_room, 16 * self.largest)
        if self.room() < wanted:
            if self.buffers and self.taken == 0:
                self.buffers.pop()  # no graph has any of it
            self.buffers.append(_pinned(torch.empty(2 * wanted, dtype=torch.int64, device="cpu")))
            self.taken = 0

    def take(self, values: Tensor) -> Tensor:
        """A copy of the values.

        Raises:
            RuntimeError: there is no room.
        """
        if self.room() < values.numel():
            raise RuntimeError(
                "no pinned memory is left for the tables of a CUDA graph: make the same step once "
                "outside of a capture"
            )
        begin, self.taken = self.taken, self.taken + values.numel()
        return self.buffers[-1][begin : self.taken].view(values.shape).copy_(values)


_capture_staging = CaptureStaging(min_room=2**16)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for.

    Pinned memory must not be written while a copy from it is pending. None is written twice here:
    PyTorch takes it back when the copy is done.
    """
    if device.type == "cpu":
        return values
    _capture_staging.largest = max(_capture_staging.largest, values.numel())
    if torch.cuda.is_current_stream_capturing():
        staging = _capture_staging.take(values)
    else:
        staging = _pinned(values)
    return torch.empty_like(values, device=device).copy_(staging, non_blocking=True)


def _pinned(values: Tensor) -> Tensor:
    return values.pin_memory()


# Block sizes

_tuned: dict[tuple[torch.device, torch.dtype], Launch] = {}


def _launch_of(tensor: Tensor) -> Launch:
    if _tuned and (launch := _tuned.get((tensor.device, tensor.dtype))) is not None:
        return launch
    return _untuned(tensor.device)


@lru_cache(maxsize=16)
def _untuned(device: torch.device) -> Launch:
    if device.type == "cpu":
        return DEFAULT_LAUNCH
    return LAUNCHES.get(torch.cuda.get_device_capability(device), DEFAULT_LAUNCH)


def tune(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    numel: int = 2**24,
    seconds: Callable[[Callable[[], None]], float] | None = None,
) -> Launch:
    """Measure CANDIDATES on a step over `numel` elements and keep the fastest for this process.

    It takes a second or so, waits for the device, and changes no result: sums are not tuned.

    Args:
        seconds: how long a function takes on the device; by default, the best of ten, by events.
    """
    key = (device, dtype)
    if _is_interpreted():
        return _untuned(device)
    if key in _tuned:
        return _tuned[key]
    seconds = seconds or _seconds_on_device
    w, g, old, buffer = ([torch.zeros(numel, dtype=dtype, device=device)] for _ in range(4))
    norm = torch.ones((), device=device)
    options = SgdOptions(0.0, 0.9, 0.0, 0.0, False, False, False)

    def step() -> None:
        perturb_(
            w,
            g,
            old,
            norm=norm,
            rho=0.0,
            adaptive=False,
            eps=0.0,
            rounds_at_random=False,
            journal=None,
        )
        sgd_(w, old, buffer, Recombination(g), options)

    times = {}
    for candidate in CANDIDATES:
        _tuned[key] = candidate
        times[candidate] = seconds(step)
    _tuned[key] = min(times, key=lambda candidate: times[candidate])
    return _tuned[key]


def _seconds_on_device(function: Callable[[], None], repeats: int = 10) -> float:
    function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)


def _mark_written(*lists: Iterable[Tensor]) -> None:
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)
