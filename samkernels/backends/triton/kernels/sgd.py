"""Update as torch.optim.SGD does, with a mix or with a gradient that curvature scales."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import address_of, chunk_of, is_aligned, kernel, load, scalar, store
from .mixes import coefficients, is_skipped, mixed

# Kinds of momentum.
NO_MOMENTUM = tl.constexpr(0)
INIT_MOMENTUM = tl.constexpr(1)  # the buffers hold nothing yet
RUNNING_MOMENTUM = tl.constexpr(2)


@triton.jit
def _update(
    w_at,
    old_at,
    u,
    buffer_at,
    offsets,
    mask,
    skipped,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    gradient_sign,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    """Make torch.optim.SGD's step from old with u in the gradient's place."""
    old = load(old_at, offsets, mask, WHOLE, T)
    w = old.to(tl.float32)
    u = gradient_sign * u
    if DECAYS:
        u = u + weight_decay * w
    if MOMENTUM != NO_MOMENTUM:
        if MOMENTUM == INIT_MOMENTUM:
            buffer = u
            kept = tl.full(old.shape, 0.0, T)
        else:
            kept = load(buffer_at, offsets, mask, WHOLE, T)
            buffer = momentum * kept.to(tl.float32) + one_minus_dampening * u
        if NESTEROV:
            u = u + momentum * buffer
        else:
            u = buffer
        store(buffer_at, offsets, mask, tl.where(skipped, kept, buffer.to(T)), WHOLE, T)
    updated = (w - lr * u).to(T)
    store(w_at, offsets, mask, tl.where(skipped, old, updated), WHOLE, T)


@triton.jit
def _sgd_block(
    w_at,
    old_at,
    x_at,
    y_at,
    buffer_at,
    offsets,
    mask,
    a,
    b,
    whole,
    skipped,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    gradient_sign,
    FUNCTION: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    u = mixed(x_at, y_at, offsets, mask, a, b, whole, FUNCTION, WHOLE, T)
    _update(
        w_at, old_at, u, buffer_at, offsets, mask, skipped, lr, momentum, one_minus_dampening,
        weight_decay, gradient_sign, MOMENTUM, NESTEROV, DECAYS, WHOLE, T,
    )  # fmt: skip


@kernel
def sgd_step(
    plan,
    addresses,
    a,
    a_stride,
    b,
    b_stride,
    divisor,
    ascent_square,
    found_inf,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    gradient_sign,
    FUNCTION: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DAMPENING_ON_DEVICE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Restore, mix and update: torch.optim.SGD's step from w = old_param with u.

    u = gradient_sign * u;  u += weight_decay * w
    buf = u at first, then momentum * buf + (1 - dampening) * u
    d = u + momentum * buf with Nesterov, else buf (u without momentum);  w -= lr * d

    If the step is skipped, w = old_param and buf stays (0 at first). Lists: params, old_params, x,
    then y unless FUNCTION is "scale", then the buffers if there are any.

    Source: torch.optim.SGD; u: see mix.
    """
    HAS_Y: tl.constexpr = FUNCTION != "scale"
    LISTS: tl.constexpr = 3 + HAS_Y + (MOMENTUM != NO_MOMENTUM)
    tensor, begin, count = chunk_of(plan)
    w_at = address_of(addresses, tensor, begin, 0, LISTS, T)
    old_at = address_of(addresses, tensor, begin, 1, LISTS, T)
    x_at = address_of(addresses, tensor, begin, 2, LISTS, T)
    # A list that is not there stands for one that is, and is not used.
    y_at = address_of(addresses, tensor, begin, 2 + HAS_Y, LISTS, T)
    buffer_at = address_of(addresses, tensor, begin, LISTS - 1, LISTS, T)
    first, second, whole = coefficients(a, a_stride, b, b_stride, divisor, tensor)
    skipped = is_skipped(ascent_square, found_inf)
    rate = scalar(lr, LR_ON_DEVICE)
    undamped = scalar(one_minus_dampening, DAMPENING_ON_DEVICE)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    if (count == BLOCK) & is_aligned(w_at | old_at | x_at | y_at | buffer_at):
        _sgd_block(
            w_at, old_at, x_at, y_at, buffer_at, offsets, mask, first, second, whole, skipped,
            rate, momentum, undamped, weight_decay, gradient_sign, FUNCTION, MOMENTUM, NESTEROV,
            DECAYS, True, T,
        )  # fmt: skip
    else:
        _sgd_block(
            w_at, old_at, x_at, y_at, buffer_at, offsets, mask, first, second, whole, skipped,
            rate, momentum, undamped, weight_decay, gradient_sign, FUNCTION, MOMENTUM, NESTEROV,
            DECAYS, False, T,
        )  # fmt: skip


@triton.jit
def _curvature(
    product_at,
    start_at,
    begin,
    count,
    stride,
    offsets,
    mask,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    """Return D = |Hv|, or its mean over `count` positions that lie `stride` apart, added up in
    their order by every element for itself, from the cache. The tensor begins at start_at."""
    if count == 1:
        d = tl.abs(load(product_at, offsets, mask, WHOLE, T).to(tl.float32))
    else:
        element = begin + offsets
        first = element - element // stride % count * stride
        pointers = start_at.to(tl.pointer_type(T)) + first
        d = tl.full(offsets.shape, 0.0, tl.float32)
        for position in range(0, count):
            d += tl.abs(tl.load(pointers + position * stride, mask, other=0.0).to(tl.float32))
        d = tl.div_rn(d, tl.full(offsets.shape, 0.0, tl.float32) + count.to(tl.float32))
    return d


@triton.jit
def _sgd_hess_block(
    w_at,
    g_at,
    product_at,
    start_at,
    buffer_at,
    begin,
    count,
    stride,
    offsets,
    mask,
    rho,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    gradient_sign,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    d = _curvature(product_at, start_at, begin, count, stride, offsets, mask, WHOLE, T)
    u = load(g_at, offsets, mask, WHOLE, T).to(tl.float32) * (1.0 + rho * d)
    skipped = tl.full([], False, tl.int1)
    _update(
        w_at, w_at, u, buffer_at, offsets, mask, skipped, lr, momentum, one_minus_dampening,
        weight_decay, gradient_sign, MOMENTUM, NESTEROV, DECAYS, WHOLE, T,
    )  # fmt: skip


@kernel
def sgd_hess_step(
    plan,
    addresses,
    rho,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    gradient_sign,
    RHO_ON_DEVICE: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    DAMPENING_ON_DEVICE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step as torch.optim.SGD with u = g * (1 + rho * D), D = |Hv| or its mean over the positions.

    Lists: params, grads, Hessian-vector products, then the buffers if there are any. Numbers: how
    many positions a tensor has, and the stride from one to the next.

    Source: D: Yao et al., arXiv:2006.00719.
    """
    LISTS: tl.constexpr = 3 + (MOMENTUM != NO_MOMENTUM)
    COLUMNS: tl.constexpr = LISTS + 2
    tensor, begin, size = chunk_of(plan)
    w_at = address_of(addresses, tensor, begin, 0, COLUMNS, T)
    g_at = address_of(addresses, tensor, begin, 1, COLUMNS, T)
    product_at = address_of(addresses, tensor, begin, 2, COLUMNS, T)
    start_at = address_of(addresses, tensor, 0, 2, COLUMNS, T)
    buffer_at = address_of(addresses, tensor, begin, LISTS - 1, COLUMNS, T)
    count = tl.load(addresses + tensor * COLUMNS + LISTS)
    stride = tl.load(addresses + tensor * COLUMNS + LISTS + 1)
    radius = scalar(rho, RHO_ON_DEVICE)
    rate = scalar(lr, LR_ON_DEVICE)
    undamped = scalar(one_minus_dampening, DAMPENING_ON_DEVICE)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    if (size == BLOCK) & is_aligned(w_at | g_at | product_at | buffer_at):
        _sgd_hess_block(
            w_at, g_at, product_at, start_at, buffer_at, begin, count, stride, offsets, mask,
            radius, rate, momentum, undamped, weight_decay, gradient_sign, MOMENTUM, NESTEROV,
            DECAYS, True, T,
        )  # fmt: skip
    else:
        _sgd_hess_block(
            w_at, g_at, product_at, start_at, buffer_at, begin, count, stride, offsets, mask,
            radius, rate, momentum, undamped, weight_decay, gradient_sign, MOMENTUM, NESTEROV,
            DECAYS, False, T,
        )  # fmt: skip
