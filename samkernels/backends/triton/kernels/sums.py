"""Add up: every program writes the sums of its chunk; the one that finishes last adds them, in the
order of the chunks. Only integers are counted atomically, so the same inputs give the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import PLAN_COLUMNS, address_of, chunk_of, is_aligned, kernel, load


@triton.jit
def _is_last(finished, count):
    """Say whether this program is the last of `count` to come here: it sees what others wrote."""
    tl.debug_barrier()
    before = tl.atomic_add(finished, 1, sem="acq_rel")
    tl.debug_barrier()
    return before == count - 1


@triton.jit
def _sum(values, first, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Add up values[STRIDE * i] for `count` indices i from `first` on, which others wrote."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        mask = start + offsets < count
        pointers = values + (first + start + offsets.to(tl.int64)) * STRIDE
        sums += tl.load(pointers, mask, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 0)


@triton.jit
def _neighbours(plan):
    """Return the first chunk of this program's tensor, their number, and that of all tensors."""
    row = plan + tl.program_id(0).to(tl.int64) * PLAN_COLUMNS
    last = plan + (tl.num_programs(0) - 1).to(tl.int64) * PLAN_COLUMNS
    return tl.load(row + 3), tl.load(row + 4), tl.load(last) + 1


@triton.jit
def _dots_block(
    x_at,
    y_at,
    z_at,
    offsets,
    mask,
    eta,
    a,
    b,
    c,
    d,
    larger,
    agree,
    LISTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    # float64: products of float32 are exact there, and none of them is lost to underflow.
    # Fused operations therefore give the bits of separate ones.
    x = load(x_at, offsets, mask, WHOLE, T).to(tl.float32)
    wide_x = x.to(tl.float64)
    if WEIGHTED:
        weight = load(y_at, offsets, mask, WHOLE, T).to(tl.float32)
        scaled = ((tl.abs(weight) + eta) * x).to(tl.float64)
        a, b = tl.fma(scaled, scaled, a), tl.fma(wide_x, wide_x, b)
    else:
        a = tl.fma(wide_x, wide_x, a)
        if LISTS > 1:
            y = load(y_at, offsets, mask, WHOLE, T).to(tl.float32)
            wide_y = y.to(tl.float64)
            b, c = tl.fma(wide_x, wide_y, b), tl.fma(wide_y, wide_y, c)
            if LISTS > 2:
                z = load(z_at, offsets, mask, WHOLE, T).to(tl.float32).to(tl.float64)
                d = tl.fma(z, z, d)
                larger += (tl.abs(y) > tl.abs(x)).to(tl.int32)
                agree += (((x > 0) & (y > 0)) | ((x < 0) & (y < 0))).to(tl.int32)
    return a, b, c, d, larger, agree


@kernel
def dots(
    plan,
    addresses,
    workspace,
    finished,
    per_tensor,
    total,
    eta,
    LISTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set per_tensor and total to sums of one to three lists x, y, z, of each tensor and of all.

        x                  x.x
        x, WEIGHTED        |t * x|^2, x.x,  t = |weights| + eta
        x, y               x.x, x.y, y.y
        x, y, z            x.x, x.y, y.y, z.z, [|y| > |x|], [x * y > 0]

    Lists: x, y, z, as many as there are; the weights in y's place. workspace: float64
    [chunks, SUMS], per_tensor [tensors, SUMS], total [SUMS]; finished: int32 [tensors + 1], zeros.
    """
    SUMS: tl.constexpr = 2 if WEIGHTED else LISTS * (LISTS + 1) // 2
    READ: tl.constexpr = LISTS + WEIGHTED
    SECOND: tl.constexpr = 1 if READ > 1 else 0
    chunk = tl.program_id(0).to(tl.int64)
    tensor, begin, count = chunk_of(plan)
    # A list that is not there stands for one that is, and is not used.
    x_at = address_of(addresses, tensor, begin, 0, READ, T)
    y_at = address_of(addresses, tensor, begin, SECOND, READ, T)
    z_at = address_of(addresses, tensor, begin, READ - 1, READ, T)
    aligned = is_aligned(x_at | y_at | z_at)

    offsets = tl.arange(0, BLOCK)
    a = tl.full([BLOCK], 0.0, tl.float64)
    b = tl.full([BLOCK], 0.0, tl.float64)
    c = tl.full([BLOCK], 0.0, tl.float64)
    d = tl.full([BLOCK], 0.0, tl.float64)
    larger = tl.full([BLOCK], 0, tl.int32)
    agree = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, count, BLOCK):
        here = start + offsets
        mask = here < count
        if aligned & (start + BLOCK <= count):
            a, b, c, d, larger, agree = _dots_block(
                x_at, y_at, z_at, here, mask, eta, a, b, c, d, larger, agree, LISTS, WEIGHTED,
                True, T,
            )  # fmt: skip
        else:
            a, b, c, d, larger, agree = _dots_block(
                x_at, y_at, z_at, here, mask, eta, a, b, c, d, larger, agree, LISTS, WEIGHTED,
                False, T,
            )  # fmt: skip
    of_chunk = workspace + chunk * SUMS
    tl.store(of_chunk, tl.sum(a, 0))
    if SUMS > 1:
        tl.store(of_chunk + 1, tl.sum(b, 0))
    if SUMS > 2:
        tl.store(of_chunk + 2, tl.sum(c, 0))
    if SUMS > 3:
        tl.store(of_chunk + 3, tl.sum(d, 0))
        tl.store(of_chunk + 4, tl.sum(larger, 0).to(tl.float64))
        tl.store(of_chunk + 5, tl.sum(agree, 0).to(tl.float64))

    # This is not read earlier: in the loop, registers are scarce.
    first_chunk, chunks_of_tensor, tensors = _neighbours(plan)
    if _is_last(finished + tensor, chunks_of_tensor):
        for k in tl.static_range(SUMS):
            of_tensor = _sum(workspace + k, first_chunk, chunks_of_tensor, SUMS, BLOCK)
            tl.store(per_tensor + tensor * SUMS + k, of_tensor)
        if _is_last(finished + tensors, tensors):
            for k in tl.static_range(SUMS):
                tl.store(total + k, _sum(per_tensor + k, 0, tensors, SUMS, BLOCK))
