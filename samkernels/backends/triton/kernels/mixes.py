"""Compute what takes the gradient's place in an update: see `Mix` in backends/contract.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import WITHOUT_ROOT, address_of, chunk_of, is_aligned, kernel, load, scalar_of, store

TWO_TO_75 = tl.constexpr(2.0**75)
TWO_TO_MINUS_75 = tl.constexpr(2.0**-75)


@triton.jit
def coefficients(a, a_stride, b, b_stride, divisor, tensor):
    """Return a, b and 1 for a tensor; over the divisor if there is one."""
    first = scalar_of(a, a_stride, tensor)
    second = scalar_of(b, b_stride, tensor)
    whole = tl.full([], 1.0, tl.float32)
    if divisor is not None:
        by = tl.load(divisor)
        first, second, whole = tl.div_rn(first, by), tl.div_rn(second, by), tl.div_rn(whole, by)
    return first, second, whole


@triton.jit
def is_skipped(ascent_square, found_inf):
    skipped = tl.full([], False, tl.int1)
    if ascent_square is not None:
        square = tl.load(ascent_square)
        skipped = ~((square >= 0) & (square < WITHOUT_ROOT))
    if found_inf is not None:
        skipped = skipped | (tl.load(found_inf) != 0)
    return skipped


@triton.jit
def _is_proper_fraction(x, d):
    """Say whether 0 < x / d < 1 as float32, where the quotient may round to 0 but never up to 1;
    without the division, which is a call and takes room on the stack."""
    along = tl.where(d < 0, -x, x)
    size = tl.abs(d)
    # The quotient rounds to 0 up to 2^-150.
    return (along > 0) & (along < size) & (along * TWO_TO_75 > size * TWO_TO_MINUS_75)


@triton.jit
def mixed(
    x_at,
    y_at,
    offsets,
    mask,
    a,
    b,
    whole,
    FUNCTION: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    """Return u of a block. FUNCTION is one of contract.FUNCTIONS, or "scale" if there is no y.
    sign(nan) = 0."""
    x = load(x_at, offsets, mask, WHOLE, T).to(tl.float32)
    if FUNCTION == "scale":
        u = a * x
    else:
        y = load(y_at, offsets, mask, WHOLE, T).to(tl.float32)
        if FUNCTION == "linear":
            u = a * x + b * y
        elif FUNCTION == "sign":
            u = a * (tl.abs(x) * ((y > 0).to(tl.float32) - (y < 0).to(tl.float32)))
        elif FUNCTION == "product":
            u = a * (x * y)
        else:
            u = tl.where(_is_proper_fraction(x, y + 1e-8), a, whole) * x
    return u


@triton.jit
def _mix_block(
    out_at,
    x_at,
    y_at,
    offsets,
    mask,
    a,
    b,
    whole,
    skipped,
    FUNCTION: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    u = mixed(x_at, y_at, offsets, mask, a, b, whole, FUNCTION, WHOLE, T)
    store(out_at, offsets, mask, tl.where(skipped, 0.0, u).to(T), WHOLE, T)


@kernel
def mix(
    plan,
    addresses,
    a,
    a_stride,
    b,
    b_stride,
    divisor,
    ascent_square,
    found_inf,
    keeps,
    FUNCTION: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set out = u:  a * x,  a * x + b * y,  a * |x| * sign(y),  a * x * y,  or a damped x;  over
    the divisor.

    A step is skipped if ascent_square has no finite root, or found_inf is not 0: out is kept then
    if `keeps` is not 0, else 0. Lists: out, x and, unless FUNCTION is "scale", y.
    """
    LISTS: tl.constexpr = 2 + (FUNCTION != "scale")
    tensor, begin, count = chunk_of(plan)
    out_at = address_of(addresses, tensor, begin, 0, LISTS, T)
    x_at = address_of(addresses, tensor, begin, 1, LISTS, T)
    y_at = address_of(addresses, tensor, begin, LISTS - 1, LISTS, T)  # else x's again
    first, second, whole = coefficients(a, a_stride, b, b_stride, divisor, tensor)
    skipped = is_skipped(ascent_square, found_inf)
    count = tl.where(skipped & (keeps != 0), 0, count)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    if (count == BLOCK) & is_aligned(out_at | x_at | y_at):
        _mix_block(
            out_at, x_at, y_at, offsets, mask, first, second, whole, skipped, FUNCTION, True, T
        )
    else:
        _mix_block(
            out_at, x_at, y_at, offsets, mask, first, second, whole, skipped, FUNCTION, False, T
        )
