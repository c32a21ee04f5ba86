"""Perturb and restore."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import (
    LARGEST_FLOAT,
    address_of,
    chunk_of,
    is_aligned,
    is_finite,
    kernel,
    load,
    scalar_of,
    store,
)


@triton.jit
def _scrambled(x):
    """Make random bits from a number of 32 bits (C. Wellons, "lowbias32")."""
    x = x ^ (x >> 16)
    x = x * tl.full([1], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([1], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _rounded_at_random(x, key, places):
    """Round x to a bfloat16, up or down, so that it is x on average; see csrc/update_math.h."""
    random = _scrambled(key + places.to(tl.uint32))
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (random & 0xFFFF)) & tl.full([1], 0xFFFF0000, tl.uint32)
    return tl.where(is_finite(x), rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def _perturb_block(
    w_at,
    d_at,
    old_at,
    offsets,
    mask,
    scale,
    eta,
    key,
    begin,
    SAVES: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    # All is read before anything is written: d may be old.
    if SAVES:
        stored = load(w_at, offsets, mask, WHOLE, T)
    else:
        stored = load(old_at, offsets, mask, WHOLE, T)
    w = stored.to(tl.float32)
    direction = load(d_at, offsets, mask, WHOLE, T).to(tl.float32)
    if eta is not None:
        t = tl.abs(w) + eta
        direction = t * t * direction
    perturbed = w + scale * direction
    if AT_RANDOM:
        perturbed = _rounded_at_random(perturbed, key, begin + offsets)
    perturbed = perturbed.to(T)
    if SAVES:
        store(old_at, offsets, mask, stored, WHOLE, T)
    store(w_at, offsets, mask, tl.where(scale != 0, perturbed, stored), WHOLE, T)


@kernel
def perturb(
    plan,
    addresses,
    square,
    square_stride,
    rho,
    rho_stride,
    eta,
    eps,
    SAVES: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Set old_param = w;  param = w + rho / (n + eps) * t^2 * d,  n^2 = square,  t = |w| + eta, or
    1 if eta is None.

    An n that is zero or not finite perturbs nothing. w is in params, or, unless it SAVES, in
    old_params. Lists: params, direction, old_params.

    Source: Foret et al., arXiv:2010.01412; eta: Kwon et al., arXiv:2102.11600.
    """
    tensor, begin, count = chunk_of(plan)
    w_at = address_of(addresses, tensor, begin, 0, 3, T)
    d_at = address_of(addresses, tensor, begin, 1, 3, T)
    old_at = address_of(addresses, tensor, begin, 2, 3, T)
    n = tl.sqrt(scalar_of(square, square_stride, tensor)).to(tl.float32)
    radius = scalar_of(rho, rho_stride, tensor)
    scale = tl.where((n > 0) & (n <= LARGEST_FLOAT), tl.div_rn(radius, n + eps), 0.0)
    key = tl.full([1], 0, tl.uint32)
    if AT_RANDOM:
        of_norm = (tl.full([1], 0.0, tl.float32) + n).to(tl.uint32, bitcast=True)
        key = _scrambled(of_norm ^ _scrambled(key + tensor.to(tl.uint32)))
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    if (count == BLOCK) & is_aligned(w_at | d_at | old_at):
        _perturb_block(
            w_at, d_at, old_at, offsets, mask, scale, eta, key, begin, SAVES, AT_RANDOM, True, T
        )
    else:
        _perturb_block(
            w_at, d_at, old_at, offsets, mask, scale, eta, key, begin, SAVES, AT_RANDOM, False, T
        )


@kernel
def restore(plan, addresses, T: tl.constexpr, BLOCK: tl.constexpr):
    """Set w = old_param. Lists: params, old_params."""
    tensor, begin, count = chunk_of(plan)
    w_at = address_of(addresses, tensor, begin, 0, 2, T)
    old_at = address_of(addresses, tensor, begin, 1, 2, T)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    if (count == BLOCK) & is_aligned(w_at | old_at):
        store(w_at, offsets, mask, load(old_at, offsets, mask, True, T), True, T)
    else:
        store(w_at, offsets, mask, load(old_at, offsets, mask, False, T), False, T)
