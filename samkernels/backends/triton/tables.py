"""Make the tables through which kernels find their tensors, and bring them to the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samkernels.backends.contract import TensorList

from .availability import DTYPES, load_kernels


class Table(NamedTuple):
    """Holds what a kernel needs to find its tensors (kernels/__init__.py)."""

    plan: Tensor  # int64 [chunks, 5]
    addresses: Tensor  # int64 [tensors, lists and numbers]
    chunks: int
    dtype: Any  # Triton's


def table_of(lists: dict[str, TensorList], chunk: int, *numbers: tuple[int, ...]) -> Table:
    """Make the table of lists. `numbers` has one for each tensor, which follows its addresses."""
    first = next(iter(lists.values()))
    of_chunks = _on_device(plan_of, first[0].device, tuple(map(Tensor.numel, first)), chunk)
    dtype = getattr(load_kernels().tl, DTYPES[first[0].dtype])
    return Table(of_chunks, addresses_of(lists, *numbers), len(of_chunks), dtype)


def addresses_of(lists: dict[str, TensorList], *numbers: tuple[int, ...]) -> Tensor:
    """Return the addresses as int64 [tensors, lists and numbers]."""
    columns = [list(map(Tensor.data_ptr, tensors)) for tensors in lists.values()]
    first = next(iter(lists.values()))
    for name, column in zip(lists, columns, strict=True):
        if 0 in column:
            _check_memory(name, column, list(map(Tensor.numel, first)))
    addresses = tuple(chain.from_iterable(zip(*columns, *numbers, strict=True)))
    return _on_device(place, first[0].device, addresses)


def _on_device(make: Any, device: torch.device, *values: Any) -> Tensor:
    """Return make(device, stream, *values), from its cache."""
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if captures:
        # A table of the cache could be freed while the graph needs it, and one that the graph
        # fills would be empty until the first replay.
        make = make.__wrapped__
    table = make(device, stream_of(device), *values)
    if device.type == "cuda" and not captures:
        capture_staging.hold_ready()
    return table


def _check_memory(name: str, addresses: Sequence[int], numel: Sequence[int]) -> None:
    for i, (address, n) in enumerate(zip(addresses, numel, strict=True)):
        if address == 0 and n > 0:
            raise ValueError(
                f"{name}[{i}] has no memory (its address is 0) for {n} elements: was its storage "
                "freed?"
            )


def stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


# The stream is in the key: another one would not wait for a copy that is still under way. What
# falls out of a cache is freed on the stream that it was made and used on, after its last use.
@lru_cache(maxsize=64)
def plan_of(device: torch.device, stream: int, numel: tuple[int, ...], chunk: int) -> Tensor:
    n = torch.tensor(numel, dtype=torch.int64, device="cpu")
    chunks = (n + (chunk - 1)).div(chunk, rounding_mode="floor").clamp(min=1)
    first = chunks.cumsum(0) - chunks
    tensor = torch.arange(len(numel), device="cpu").repeat_interleave(chunks)
    begin = (torch.arange(len(tensor), device="cpu") - first[tensor]) * chunk
    count = (n[tensor] - begin).clamp(max=chunk)
    return upload(torch.stack([tensor, begin, count, first[tensor], chunks[tensor]], 1), device)


@lru_cache(maxsize=256)
def place(device: torch.device, stream: int, addresses: tuple[int, ...]) -> Tensor:
    return upload(torch.tensor(addresses, dtype=torch.int64, device="cpu"), device)


class CaptureStaging:
    """Holds pinned memory for the copies that become part of a CUDA graph.

    No memory may be pinned during a capture, so it is held ready. A graph copies at every replay:
    what it copies from is never given back, nor written again.
    """

    def __init__(self, min_room: int) -> None:
        self.min_room = min_room  # elements
        self.buffers: list[Tensor] = []
        self.taken = 0  # elements of the last buffer
        self.largest = 0  # size of a table so far; a step has some tables for each parameter group

    def room(self) -> int:
        return self.buffers[-1].numel() - self.taken if self.buffers else 0

    def hold_ready(self) -> None:
        wanted = max(self.min_room, 16 * self.largest)
        if self.room() < wanted:
            if self.buffers and self.taken == 0:
                self.buffers.pop()  # no graph has any of it
            self.buffers.append(pinned(torch.empty(2 * wanted, dtype=torch.int64, device="cpu")))
            self.taken = 0

    def take(self, values: Tensor) -> Tensor:
        """Return a copy of the values.

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


capture_staging = CaptureStaging(min_room=2**16)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, without the host waiting.

    Pinned memory must not be written while a copy from it is pending. None of it is written twice
    here: PyTorch takes it back when the copy is done.
    """
    if device.type == "cpu":
        return values
    capture_staging.largest = max(capture_staging.largest, values.numel())
    if torch.cuda.is_current_stream_capturing():
        staging = capture_staging.take(values)
    else:
        staging = pinned(values)
    return torch.empty_like(values, device=device).copy_(staging, non_blocking=True)


def pinned(values: Tensor) -> Tensor:
    return values.pin_memory()
