"""Choose block sizes, and launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tables import Table, stream_of


class Launch(NamedTuple):
    """Names the elements per program, a power of two, and the warps that share them."""

    block: int
    warps: int


# By compute capability, with enough bytes in flight per multiprocessor to cover the latency of its
# memory. These are derived, not measured; `tune` measures.
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

COUNT_LAUNCH = Launch(128, 4)  # the block counts tensors


tuned: dict[tuple[torch.device, torch.dtype], Launch] = {}


def launch_of(tensor: Tensor) -> Launch:
    if tuned and (launch := tuned.get((tensor.device, tensor.dtype))) is not None:
        return launch
    return untuned(tensor.device)


@lru_cache(maxsize=16)
def untuned(device: torch.device) -> Launch:
    if device.type == "cpu":
        return DEFAULT_LAUNCH
    return LAUNCHES.get(torch.cuda.get_device_capability(device), DEFAULT_LAUNCH)


def seconds_on_device(function: Callable[[], None], repeats: int = 10) -> float:
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


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the device current: Triton launches there, and on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def run_over(
    kernel: Any,
    table: Table,
    launch: Launch,
    *scalars: Any,
    journal: list[bool] | None = None,
    **flags: Any,
) -> None:
    """Run a kernel over a table; scalars and flags are in the order of its parameters."""
    arguments = (table.plan, table.addresses, *scalars)
    constants = {**flags, "T": table.dtype, "BLOCK": launch.block}
    # Contraction into fused multiply-adds would change the bits.
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    if journal is None:
        run(kernel, table.chunks, *arguments, **constants, **options)
    else:
        # Triton's launcher calls a hook, from C, before it launches. A hook that is a C function
        # as well leaves no instruction of Python between the two, at which a signal handler could
        # run: no interrupt finds a journal that does not tell what happens to the weights.
        compiled = kernel.warmup(*arguments, grid=(table.chunks,), **constants, **options)
        compiled.run(
            table.chunks,
            1,
            1,
            stream_of(table.plan.device),
            compiled.function,
            compiled.packed_metadata,
            True,  # what the hook is called with
            journal.append,
            None,
            *arguments,
            *constants.values(),
        )


def run(kernel: Any, programs: int, *arguments: Any, **constants_and_options: Any) -> None:
    kernel[(programs,)](*arguments, **constants_and_options)
