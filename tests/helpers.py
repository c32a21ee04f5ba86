"""What the tests of the ops share: settings, guarded tensor lists, and comparisons with bounds.

Every tensor lies in a storage of its own that is filled with GUARD_VALUE around it and, if it is a
slice, between its elements: `assert_guards_intact` finds a write that went astray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from samkernels import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# csrc/cpu/blocks.h: tensors are cut into chunks, chunks into blocks, blocks into vectors of at
# most 16 elements. Sizes lie on, below and above each of them.
CHUNK_SIZE = 16384
SIZES = (0, 1, 2, 3, 15, 16, 17, 511, 512, 513, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1)
MANY_CHUNKS = 3 * CHUNK_SIZE + 5

GUARD_NUMEL = 64  # whole cache lines: an offset of 0 stays aligned for every dtype
GUARD_VALUE = -7.25  # exact in every dtype
INTEGER_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Setting(NamedTuple):
    """Where and how an op runs."""

    device: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}-{str(self.dtype).removeprefix('torch.')}"


SETTINGS = [
    Setting(device, backend, dtype)
    for device in DEVICES
    for backend in backends.BACKENDS
    if backend != "auto"
    for dtype in DTYPES
    if backends.why_unavailable(backend, torch.device(device), dtype) is None
]


class Slot(NamedTuple):
    """The layout of one tensor: `order` lists its dimensions from the outermost in memory to the
    innermost, `offset` is where it starts in its storage, `gap` its innermost stride."""

    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    offset: int = 0
    gap: int = 1


CHANNELS_LAST = (0, 2, 3, 1)
LAYOUTS = [
    Slot(()),
    Slot((), offset=1),
    Slot((5, 7)),
    Slot((5, 7), order=(1, 0), offset=3),
    Slot((2, 3, 4, 5), order=CHANNELS_LAST),
    Slot((8, 16, 3, 3), order=CHANNELS_LAST, offset=1),
    Slot((1, 6, 1)),
    Slot((3, 4, 5), order=(2, 0, 1), offset=2),
    Slot((0, 3)),
    Slot((513,), offset=1),
]
LISTS = {
    "sizes": [Slot((n,)) for n in (*SIZES, MANY_CHUNKS)],
    "offsets": [Slot((n,), offset=k) for k in (1, 2, 3) for n in (1, 15, 17, 513, CHUNK_SIZE + 1)],
    "layouts": LAYOUTS,
    "thousand": [Slot((i % 6,), offset=i % 4) for i in range(1000)],
    "empty": [Slot((0,)), Slot((3, 0))],
}


def make_list(
    slots: Sequence[Slot], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> list[Tensor]:
    """Normal values, a tenth of them 0, in storages with guards."""
    numel = [math.prod(slot.shape) for slot in slots]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(numel), generator=generator, dtype=torch.float64)
    values *= torch.rand(sum(numel), generator=generator) > 0.1
    parts = values.to(device, dtype).split(numel)
    return [place(slot, part.view(slot.shape)) for slot, part in zip(slots, parts, strict=True)]


def place(slot: Slot, values: Tensor) -> Tensor:
    """A copy of `values`, of the slot's shape, laid out as the slot says."""
    strides, stride = [0] * len(slot.shape), slot.gap
    for dim in reversed(slot.order or range(len(slot.shape))):
        strides[dim] = stride
        stride *= max(1, slot.shape[dim])
    room = slot.gap * values.numel() + slot.offset + 2 * GUARD_NUMEL
    storage = values.new_full((room,), GUARD_VALUE)
    return storage.as_strided(slot.shape, strides, GUARD_NUMEL + slot.offset).copy_(values)


def assert_guards_intact(*lists: Iterable[Tensor]) -> None:
    for tensors in lists:
        for i, tensor in enumerate(tensors):
            memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            memory.set_(tensor.untyped_storage())
            around = torch.ones_like(memory, dtype=torch.bool)
            around.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
            assert bool(((memory == GUARD_VALUE) | ~around).all()), f"wrote around tensor {i}"


def doubles(tensors: Iterable[Tensor]) -> list[Tensor]:
    """float64 copies, for the reference."""
    return [t.to(torch.float64, copy=True) for t in tensors]


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def bits(tensor: Tensor) -> Tensor:
    """The elements as integers: nan payloads and the sign of 0 count."""
    return tensor.detach().clone().view(INTEGER_OF[tensor.element_size()])


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype
        assert torch.equal(bits(a), bits(e)), f"tensor {i}: the bits differ"


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal values, of whatever dtypes; -0.0 equals 0.0."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a.double(), e.double()), f"tensor {i}: the values differ"


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one operation in the arithmetic that `dtype` is computed in."""
    return torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps / 2


def assert_near(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    sizes: Sequence[Tensor],
    roundings: float,
) -> None:
    """Each element is within `roundings` roundings of the float64 value, and rounded to its dtype.

    A rounding errs by at most unit_roundoff times the value that is rounded, and `sizes` bounds
    those: the sum of the absolute values of the terms, so that cancellation is allowed for. bf16
    and fp16 add one rounding to the dtype: half an ulp of the result.
    """
    assert len(actual) == len(expected) == len(sizes)
    for i, (a, e, size) in enumerate(zip(actual, expected, sizes, strict=True)):
        assert a.shape == e.shape
        info = torch.finfo(a.dtype)
        bound = roundings * unit_roundoff(a.dtype) * size + info.smallest_normal * info.eps
        if a.dtype in (torch.bfloat16, torch.float16):
            bound = bound + info.eps / 2 * (e.abs() + bound)
        error = (a.double() - e).abs()
        if not bool((error <= bound).all()):
            worst = (error / bound).max().item()
            raise AssertionError(f"tensor {i}: {worst:.3g} times the error that rounding explains")


def rejects(check: Callable[[], object]) -> bool:
    """Whether a comparison fails: wrong code must not pass it."""
    try:
        check()
    except AssertionError:
        return True
    return False
