"""Do what all kernels share: compile them, find, load and store elements, and read scalars."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
# From here on roots round to infinity in float32: (2^128 - 2^103)^2. It is a float64, too large for
# float32.
WITHOUT_ROOT = tl.constexpr(1.1579208233556995e77)
PLAN_COLUMNS = tl.constexpr(5)
VECTOR_BYTES = tl.constexpr(16)


def kernel(function: Callable[..., None]) -> Any:
    """Make a kernel that is compiled once for all values of arguments that are no constants, 1 and
    aligned addresses too, for which Triton has code of their own."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
    return triton.jit(function, do_not_specialize=names)


@triton.jit
def chunk_of(plan):
    """Return this program's tensor, first element and number of elements."""
    row = plan + tl.program_id(0).to(tl.int64) * PLAN_COLUMNS
    return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def address_of(addresses, tensor, begin, LIST: tl.constexpr, LISTS: tl.constexpr, T: tl.constexpr):
    """Return the address of element `begin`, an integer: a pointer would keep what `_pointers` says
    of it from Triton."""
    SIZE: tl.constexpr = 4 if T == tl.float32 else 2
    return tl.load(addresses + tensor * LISTS + LIST) + begin * SIZE


@triton.jit
def is_aligned(address):
    return address % VECTOR_BYTES == 0


@triton.jit
def _pointers(address, offsets, WHOLE: tl.constexpr, T: tl.constexpr):
    pointer = address.to(tl.pointer_type(T))
    if WHOLE:  # this is said of the cast in this branch only
        pointer = tl.multiple_of(pointer, VECTOR_BYTES)
    return pointer + offsets


@triton.jit
def load(address, offsets, mask, WHOLE: tl.constexpr, T: tl.constexpr):
    pointers = _pointers(address, offsets, WHOLE, T)
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask, other=0.0)


@triton.jit
def store(address, offsets, mask, values, WHOLE: tl.constexpr, T: tl.constexpr):
    pointers = _pointers(address, offsets, WHOLE, T)
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask)


@triton.jit
def scalar(value, ON_DEVICE: tl.constexpr):
    """Return a hyperparameter from a number, or the address of one."""
    if ON_DEVICE:
        return tl.load(value)
    else:
        return value


@triton.jit
def scalar_of(value, stride, tensor):
    """Return a number from itself, stride None, or from the address of one for all tensors, stride
    0, or of one for each."""
    if stride is None:
        return value
    else:
        return tl.load(value + stride * tensor)


@triton.jit
def is_finite(x):
    return (x >= -LARGEST_FLOAT) & (x <= LARGEST_FLOAT)
