"""What the tests of the ops share: settings, guarded tensor lists, and comparisons with bounds.

The tensors of a list lie in one storage, with GUARD_VALUE before, behind and, if they are slices,
between their elements: `GuardedList.assert_intact` finds a write that went astray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samkernels import backends
from samkernels.ops import Mix
from tests import stand_ins

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# csrc/cpu/blocks.h: tensors are cut into chunks, chunks into blocks, blocks into vectors of at
# most 16 elements. Sizes lie on, below and above each of them.
CHUNK_SIZE = 16384
SIZES = (0, 1, 2, 3, 15, 16, 17, 511, 512, 513, CHUNK_SIZE - 1, CHUNK_SIZE, CHUNK_SIZE + 1)
MANY_CHUNKS = 3 * CHUNK_SIZE + 5

GUARD_NUMEL = 32  # whole cache lines: an offset of 0 stays aligned for every dtype
GUARD_VALUE = -7.25  # exact in every dtype
INTEGER_OF = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Setting(NamedTuple):
    """Where and how an op runs."""

    device: str
    backend: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}-{str(self.dtype).removeprefix('torch.')}"


def serves(backend: str, device: str, dtype: torch.dtype) -> bool:
    """Also if the stand-in is missing here: its tests are skipped, and say so."""
    if backend in stand_ins.STAND_INS:
        return device == "cpu" and dtype in stand_ins.DTYPES
    return backends.why_unavailable(backend, torch.device(device), dtype) is None


stand_ins.register()
SETTINGS = [
    Setting(device, backend, dtype)
    for device in DEVICES
    for backend in backends.BACKENDS
    if backend != "auto"
    for dtype in DTYPES
    if serves(backend, device, dtype)
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
# 4-D tensors: layouts in which the positions have one stride, and (the last row) none. Vectors of 4
# and 8 columns, and odd numbers of them; kernels that chunks cut.
SPATIAL = [
    *(Slot((5, 3, 3, 3), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST, (1, 0, 2, 3))),
    *(Slot((3, 16, 3, 3), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST, (2, 3, 1, 0))),
    *(Slot((2, 8, 1, 5), order=order, offset=1) for order in ((0, 1, 2, 3), CHANNELS_LAST)),
    *(Slot((2, 3, 5, 1), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST, (2, 3, 0, 1))),
    *(Slot((4, 7, 1, 1), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST)),
    *(Slot((1, 1, 2, 2), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST)),
    *(Slot((0, 2, 3, 3), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST)),
    Slot((2, 3, 0, 3)),
    *(Slot((40, 64, 3, 3), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST)),
    *(Slot((7, 600, 5, 1), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST)),
    *(Slot((2, 3, 4, 5), order=order) for order in ((0, 1, 3, 2), (2, 0, 1, 3), (3, 1, 0, 2))),
]
LISTS = {
    "sizes": [Slot((n,)) for n in (*SIZES, MANY_CHUNKS)],
    "offsets": [
        *(Slot((n,), offset=k) for k in (1, 2, 3) for n in (1, 15, 17, 513)),
        Slot((CHUNK_SIZE + 1,), offset=3),
    ],
    "layouts": LAYOUTS,
    "thousand": [Slot((i % 6,), offset=i % 4) for i in range(1000)],
    "empty": [Slot((0,)), Slot((3, 0))],
}


# Mixes of x and y. a and b: numbers, or "scalar" and "tensors" for one or several on the device.
MIXES: dict[str, dict[str, Any]] = {
    "x": {},
    "negated": {"a": -0.3},
    "scaled": {"a": "tensors"},
    "linear": {"y": True, "a": 0.7, "b": -1.3},
    "linear-tensors": {"y": True, "a": "scalar", "b": "tensors"},
    "sign": {"y": True, "function": "sign"},
    "sign-scaled": {"y": True, "a": "tensors", "function": "sign"},
    "damp": {"y": True, "a": 0.3, "function": "damp"},
    "product": {"y": True, "a": "scalar", "function": "product"},
}


def make_mix(name: str, x: list[Tensor], y: list[Tensor], **guards: Any) -> Mix:
    """One of MIXES, with numbers that are the same for lists of another dtype or device."""
    options = dict(MIXES[name])
    generator = torch.Generator().manual_seed(len(name))
    wide = torch.promote_types(x[0].dtype, torch.float32)
    for number in ("a", "b"):
        shape = {"scalar": (), "tensors": (len(x),)}.get(options.get(number, ""))
        if shape is not None:
            values = torch.rand(shape, generator=generator) - 1.5
            options[number] = values.to(x[0].device, wide)
    return Mix(x, y if options.pop("y", False) else None, **options, **guards)


class GuardedList(list[Tensor]):
    """Tensors in one storage, each with a version counter of its own."""

    def __init__(self, slots: Sequence[Slot], values: Tensor) -> None:
        places = _places(tuple(slots))
        self.memory = values.new_full(places.inside.shape, GUARD_VALUE)
        self.memory[places.positions.to(values.device)] = values
        self.inside = places.inside.to(values.device)
        storage = self.memory.untyped_storage()
        for slot, strides, start in zip(slots, places.strides, places.starts, strict=True):
            self.append(values.new_empty(0).set_(storage, start, slot.shape, strides))

    def assert_intact(self) -> None:
        assert bool(((self.memory == GUARD_VALUE) | self.inside).all()), "wrote around a tensor"


class _Places(NamedTuple):
    strides: list[list[int]]
    starts: list[int]
    positions: Tensor  # of all elements, in the order of the slots and of their dimensions
    inside: Tensor  # [elements of the storage]: whether a tensor has it


@lru_cache(maxsize=64)
def _places(slots: tuple[Slot, ...]) -> _Places:
    all_strides, starts, positions, room = [], [], [torch.empty(0, dtype=torch.int64)], GUARD_NUMEL
    for slot in slots:
        strides, stride = [0] * len(slot.shape), slot.gap
        for dim in reversed(slot.order or range(len(slot.shape))):
            strides[dim] = stride
            stride *= max(1, slot.shape[dim])
        start = room + slot.offset
        extent = slot.gap * math.prod(slot.shape)
        positions.append(torch.arange(start, start + extent + 1))
        positions[-1] = positions[-1].as_strided(slot.shape, strides).flatten()
        room = ((start + extent) // GUARD_NUMEL + 2) * GUARD_NUMEL
        all_strides.append(strides)
        starts.append(start)
    inside = torch.zeros(room, dtype=torch.bool)
    inside[torch.cat(positions)] = True
    return _Places(all_strides, starts, torch.cat(positions), inside)


def make_list(
    slots: Sequence[Slot], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> GuardedList:
    """Normal values, a tenth of them 0."""
    values = _normal_values(sum(math.prod(slot.shape) for slot in slots), seed)
    return GuardedList(slots, values.to(device, dtype))


@lru_cache(maxsize=64)
def _normal_values(numel: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator)
    return values * (torch.rand(numel, generator=generator) > 0.1)


def doubles(tensors: Iterable[Tensor]) -> list[Tensor]:
    """float64 copies, for the reference."""
    return [t.to(torch.float64, copy=True) for t in tensors]


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All elements of a list, copied into one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def bits(tensors: Iterable[Tensor]) -> Tensor:
    """All elements as integers: nan payloads and the sign of 0 count."""
    values = flat(tensors)
    return values.view(INTEGER_OF[values.element_size()])


def _assert_all(holds: Tensor, tensors: Sequence[Tensor], what: str) -> None:
    """Names the tensor of the first element for which it does not hold."""
    if not bool(holds.all()):
        element = int(holds.logical_not().nonzero()[0])
        ends = torch.tensor([t.numel() for t in tensors]).cumsum(0)
        raise AssertionError(f"tensor {int((ends <= element).sum())}: {what}")


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert [(a.shape, a.dtype) for a in actual] == [(e.shape, e.dtype) for e in expected]
    for dtype in {a.dtype for a in actual}:
        ours, theirs = ([t for t in ts if t.dtype is dtype] for ts in (actual, expected))
        _assert_all(bits(ours) == bits(theirs), ours, "the bits differ")


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal values, of whatever dtypes and devices; -0.0 equals 0.0."""
    assert [a.shape for a in actual] == [e.shape for e in expected]
    ours, theirs = flat(actual).double().cpu(), flat(expected).double().cpu()
    _assert_all(ours == theirs, actual, "the values differ")


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
    assert [a.shape for a in actual] == [e.shape for e in expected] == [x.shape for x in sizes]
    values, exact = flat(actual), flat(expected)
    info = torch.finfo(values.dtype)
    bound = roundings * unit_roundoff(values.dtype) * flat(sizes) + info.smallest_normal * info.eps
    if values.dtype in (torch.bfloat16, torch.float16):
        bound = bound + info.eps / 2 * (exact.abs() + bound)
    error = (values.double() - exact).abs()
    worst = (error / bound).max().item() if len(error) else 0
    _assert_all(error <= bound, actual, f"{worst:.3g} times the error that rounding explains")


def rejects(check: Callable[[], object]) -> bool:
    """Whether a comparison fails: wrong code must not pass it."""
    try:
        check()
    except AssertionError:
        return True
    return False
