"""The Triton kernels. samkernels/backends/triton.py launches them, and imports this file when it is
needed: importing triton takes a tenth of a second.

A kernel works on lists of tensors. Program p has chunk p, a part of one tensor, the same part in
every list:

    plan        int64 [chunks, 5]: the chunk's tensor, its first element and number of elements,
                and of that tensor the first chunk and the number of chunks; a tensor without
                elements has one chunk
    addresses   int64 [tensors, LISTS]: where each tensor begins; some kernels have numbers of each
                tensor in further columns

Loads and stores are of 16 bytes where a block of a chunk is whole and all its addresses allow it,
and masked elsewhere. Arithmetic is in float32, in the order of the reference, and rounded once,
when it is stored; launches forbid its contraction into fused multiply-adds. `/` would be
approximate: div_rn is not. Sums are in float64 and of a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
PLAN_COLUMNS = tl.constexpr(5)
VECTOR_BYTES = tl.constexpr(16)

# Kinds of momentum.
NO_MOMENTUM = tl.constexpr(0)
INIT_MOMENTUM = tl.constexpr(1)  # the buffers hold nothing yet
RUNNING_MOMENTUM = tl.constexpr(2)


@triton.jit
def _chunk(plan):
    """This program's tensor, first element and number of elements."""
    row = plan + tl.program_id(0).to(tl.int64) * PLAN_COLUMNS
    return tl.load(row), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def _address(addresses, tensor, begin, LIST: tl.constexpr, LISTS: tl.constexpr, T: tl.constexpr):
    """Of element `begin`. An integer: a pointer would keep what `_pointers` says of it from
    Triton."""
    SIZE: tl.constexpr = 4 if T == tl.float32 else 2
    return tl.load(addresses + tensor * LISTS + LIST) + begin * SIZE


@triton.jit
def _is_aligned(address):
    return address % VECTOR_BYTES == 0


@triton.jit
def _pointers(address, offsets, WHOLE: tl.constexpr, T: tl.constexpr):
    pointer = address.to(tl.pointer_type(T))
    if WHOLE:  # said of the cast that is in this branch only
        pointer = tl.multiple_of(pointer, VECTOR_BYTES)
    return pointer + offsets


@triton.jit
def _load(address, offsets, mask, WHOLE: tl.constexpr, T: tl.constexpr):
    pointers = _pointers(address, offsets, WHOLE, T)
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask, other=0.0)


@triton.jit
def _store(address, offsets, mask, values, WHOLE: tl.constexpr, T: tl.constexpr):
    pointers = _pointers(address, offsets, WHOLE, T)
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask)


@triton.jit
def _scalar(value, ON_DEVICE: tl.constexpr):
    """A hyperparameter: a number, or the address of one."""
    if ON_DEVICE:
        return tl.load(value)
    else:
        return value


@triton.jit
def _is_finite(x):
    return (x >= -LARGEST_FLOAT) & (x <= LARGEST_FLOAT)


# Perturb and restore


@triton.jit
def _mixed(x):
    """Random bits from a number of 32 bits (C. Wellons, "lowbias32")."""
    x = x ^ (x >> 16)
    x = x * tl.full([1], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([1], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _rounded_at_random(x, key, places):
    """x rounded to a bfloat16, up or down, so that it is x on average; see csrc/update_math.h."""
    random = _mixed(key + places.to(tl.uint32))
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (random & 0xFFFF)) & tl.full([1], 0xFFFF0000, tl.uint32)
    return tl.where(_is_finite(x), rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def _perturb_block(
    w_at,
    g_at,
    old_at,
    offsets,
    mask,
    scale,
    key,
    begin,
    ADAPTIVE: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    stored = _load(w_at, offsets, mask, WHOLE, T)
    w = stored.to(tl.float32)
    direction = _load(g_at, offsets, mask, WHOLE, T).to(tl.float32)
    if ADAPTIVE:
        direction = w * w * direction
    perturbed = w + scale * direction
    if AT_RANDOM:
        perturbed = _rounded_at_random(perturbed, key, begin + offsets)
    perturbed = perturbed.to(T)
    _store(old_at, offsets, mask, stored, WHOLE, T)
    _store(w_at, offsets, mask, tl.where(scale != 0, perturbed, stored), WHOLE, T)


@triton.jit(do_not_specialize=["plan", "addresses", "norm", "rho", "eps"])
def perturb(
    plan,
    addresses,
    norm,
    rho,
    eps,
    ADAPTIVE: tl.constexpr,
    AT_RANDOM: tl.constexpr,
    RHO_ON_DEVICE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """old_param = w;  w += rho / (n + eps) * s^2 * g,  s = |w| if adaptive, else 1.

    An n that is zero or not finite perturbs nothing. Lists: params, grads, old_params.

    Source: Foret et al., arXiv:2010.01412; adaptive: Kwon et al., arXiv:2102.11600.
    """
    tensor, begin, count = _chunk(plan)
    w_at = _address(addresses, tensor, begin, 0, 3, T)
    g_at = _address(addresses, tensor, begin, 1, 3, T)
    old_at = _address(addresses, tensor, begin, 2, 3, T)
    n = tl.load(norm)
    radius = _scalar(rho, RHO_ON_DEVICE)
    scale = tl.where((n > 0) & (n <= LARGEST_FLOAT), tl.div_rn(radius, n + eps), 0.0)
    key = tl.full([1], 0, tl.uint32)
    if AT_RANDOM:
        of_norm = (tl.full([1], 0.0, tl.float32) + n).to(tl.uint32, bitcast=True)
        key = _mixed(of_norm ^ _mixed(key + tensor.to(tl.uint32)))
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    if (count == BLOCK) & _is_aligned(w_at | g_at | old_at):
        _perturb_block(
            w_at, g_at, old_at, offsets, mask, scale, key, begin, ADAPTIVE, AT_RANDOM, True, T
        )
    else:
        _perturb_block(
            w_at, g_at, old_at, offsets, mask, scale, key, begin, ADAPTIVE, AT_RANDOM, False, T
        )


@triton.jit(do_not_specialize=["plan", "addresses"])
def restore(plan, addresses, T: tl.constexpr, BLOCK: tl.constexpr):
    """w = old_param. Lists: params, old_params."""
    tensor, begin, count = _chunk(plan)
    w_at = _address(addresses, tensor, begin, 0, 2, T)
    old_at = _address(addresses, tensor, begin, 1, 2, T)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    if (count == BLOCK) & _is_aligned(w_at | old_at):
        _store(w_at, offsets, mask, _load(old_at, offsets, mask, True, T), True, T)
    else:
        _store(w_at, offsets, mask, _load(old_at, offsets, mask, False, T), False, T)


# Recombine and update


@triton.jit
def _coefficient(
    numerator,
    denominator,
    eps,
    grad_scale,
    tensor,
    SCALED: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    UNSCALED: tl.constexpr,
):
    """numerator / (denominator + eps) of a tensor if SCALED, over grad_scale if UNSCALED."""
    coefficient = tl.full([], 1.0, tl.float32)
    if SCALED:
        if PER_TENSOR:
            numerator += tensor
            denominator += tensor
        coefficient = tl.div_rn(tl.load(numerator), tl.load(denominator) + eps)
    if UNSCALED:
        coefficient = tl.div_rn(coefficient, tl.load(grad_scale))
    return coefficient


@triton.jit
def _is_skipped(ascent_norm, found_inf, GUARDED: tl.constexpr, CHECKED: tl.constexpr):
    skipped = tl.full([], False, tl.int1)
    if GUARDED:
        skipped = ~_is_finite(tl.load(ascent_norm))
    if CHECKED:
        skipped = skipped | (tl.load(found_inf) != 0)
    return skipped


@triton.jit
def _recombined(
    magnitude_at,
    sign_at,
    offsets,
    mask,
    coefficient,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    """u = magnitude, or |magnitude| * sign(sign); times coefficient if SCALED. sign(nan) = 0."""
    u = _load(magnitude_at, offsets, mask, WHOLE, T).to(tl.float32)
    if SIGNED:
        sign = _load(sign_at, offsets, mask, WHOLE, T).to(tl.float32)
        u = tl.abs(u) * ((sign > 0).to(tl.float32) - (sign < 0).to(tl.float32))
    if SCALED:
        u = coefficient * u
    return u


@triton.jit
def _recombine_block(
    out_at,
    magnitude_at,
    sign_at,
    offsets,
    mask,
    coefficient,
    skipped,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    u = _recombined(magnitude_at, sign_at, offsets, mask, coefficient, SIGNED, SCALED, WHOLE, T).to(
        T
    )
    _store(out_at, offsets, mask, tl.where(skipped, 0.0, u).to(T), WHOLE, T)


@triton.jit(
    do_not_specialize=[
        "plan",
        "addresses",
        "numerator",
        "denominator",
        "eps",
        "ascent_norm",
        "grad_scale",
        "found_inf",
    ]
)
def recombine(
    plan,
    addresses,
    numerator,
    denominator,
    eps,
    ascent_norm,
    grad_scale,
    found_inf,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    UNSCALED: tl.constexpr,
    GUARDED: tl.constexpr,
    CHECKED: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = u: |magnitude| * sign(sign), numerator / (denominator + eps) * magnitude, or magnitude;
    over grad_scale if UNSCALED.

    If ascent_norm is not finite, or found_inf not 0, 0. Lists: out, magnitude and, if SIGNED, sign.
    """
    LISTS: tl.constexpr = 2 + SIGNED
    tensor, begin, count = _chunk(plan)
    out_at = _address(addresses, tensor, begin, 0, LISTS, T)
    magnitude_at = _address(addresses, tensor, begin, 1, LISTS, T)
    sign_at = _address(addresses, tensor, begin, LISTS - 1, LISTS, T)  # else magnitude's again
    coefficient = _coefficient(
        numerator, denominator, eps, grad_scale, tensor, SCALED, PER_TENSOR, UNSCALED
    )
    skipped = _is_skipped(ascent_norm, found_inf, GUARDED, CHECKED)
    HAS_COEFFICIENT: tl.constexpr = SCALED or UNSCALED
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    if (count == BLOCK) & _is_aligned(out_at | magnitude_at | sign_at):
        _recombine_block(
            out_at, magnitude_at, sign_at, offsets, mask, coefficient, skipped, SIGNED,
            HAS_COEFFICIENT, True, T,
        )  # fmt: skip
    else:
        _recombine_block(
            out_at, magnitude_at, sign_at, offsets, mask, coefficient, skipped, SIGNED,
            HAS_COEFFICIENT, False, T,
        )  # fmt: skip


@triton.jit
def _sgd_block(
    w_at,
    old_at,
    magnitude_at,
    sign_at,
    buffer_at,
    offsets,
    mask,
    coefficient,
    skipped,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    gradient_sign,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    u = _recombined(magnitude_at, sign_at, offsets, mask, coefficient, SIGNED, SCALED, WHOLE, T)
    _sgd_update(
        w_at, old_at, u, buffer_at, offsets, mask, skipped, lr, momentum, one_minus_dampening,
        weight_decay, gradient_sign, MOMENTUM, NESTEROV, DECAYS, WHOLE, T,
    )  # fmt: skip


@triton.jit
def _sgd_update(
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
    """torch.optim.SGD's step from old with u in the gradient's place."""
    old = _load(old_at, offsets, mask, WHOLE, T)
    w = old.to(tl.float32)
    u = gradient_sign * u
    if DECAYS:
        u = u + weight_decay * w
    if MOMENTUM != NO_MOMENTUM:
        if MOMENTUM == INIT_MOMENTUM:
            buffer = u
            kept = tl.full(old.shape, 0.0, T)
        else:
            kept = _load(buffer_at, offsets, mask, WHOLE, T)
            buffer = momentum * kept.to(tl.float32) + one_minus_dampening * u
        if NESTEROV:
            u = u + momentum * buffer
        else:
            u = buffer
        _store(buffer_at, offsets, mask, tl.where(skipped, kept, buffer.to(T)), WHOLE, T)
    updated = (w - lr * u).to(T)
    _store(w_at, offsets, mask, tl.where(skipped, old, updated), WHOLE, T)


@triton.jit(
    do_not_specialize=[
        "plan",
        "addresses",
        "numerator",
        "denominator",
        "eps",
        "ascent_norm",
        "grad_scale",
        "found_inf",
        "lr",
        "momentum",
        "one_minus_dampening",
        "weight_decay",
        "gradient_sign",
    ]
)
def sgd(
    plan,
    addresses,
    numerator,
    denominator,
    eps,
    ascent_norm,
    grad_scale,
    found_inf,
    lr,
    momentum,
    one_minus_dampening,
    weight_decay,
    gradient_sign,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    UNSCALED: tl.constexpr,
    GUARDED: tl.constexpr,
    CHECKED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAYS: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Restore, recombine and update: torch.optim.SGD's step from w = old_param with u.

    u = gradient_sign * u;  u += weight_decay * w
    buf = u at first, then momentum * buf + (1 - dampening) * u
    d = u + momentum * buf with Nesterov, else buf (u without momentum);  w -= lr * d

    If ascent_norm is not finite, or found_inf not 0, w = old_param and buf stays (0 at first).
    Lists: params, old_params, magnitude, then sign if SIGNED, then the buffers if there are any.

    Source: torch.optim.SGD; u: see recombine.
    """
    LISTS: tl.constexpr = 3 + SIGNED + (MOMENTUM != NO_MOMENTUM)
    tensor, begin, count = _chunk(plan)
    w_at = _address(addresses, tensor, begin, 0, LISTS, T)
    old_at = _address(addresses, tensor, begin, 1, LISTS, T)
    magnitude_at = _address(addresses, tensor, begin, 2, LISTS, T)
    # A list that is not there stands for one that is, and is not used.
    sign_at = _address(addresses, tensor, begin, 2 + SIGNED, LISTS, T)
    buffer_at = _address(addresses, tensor, begin, LISTS - 1, LISTS, T)
    coefficient = _coefficient(
        numerator, denominator, eps, grad_scale, tensor, SCALED, PER_TENSOR, UNSCALED
    )
    skipped = _is_skipped(ascent_norm, found_inf, GUARDED, CHECKED)
    HAS_COEFFICIENT: tl.constexpr = SCALED or UNSCALED
    rate = _scalar(lr, LR_ON_DEVICE)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    if (count == BLOCK) & _is_aligned(w_at | old_at | magnitude_at | sign_at | buffer_at):
        _sgd_block(
            w_at, old_at, magnitude_at, sign_at, buffer_at, offsets, mask, coefficient, skipped,
            rate, momentum, one_minus_dampening, weight_decay, gradient_sign, SIGNED,
            HAS_COEFFICIENT, MOMENTUM, NESTEROV, DECAYS, True, T,
        )  # fmt: skip
    else:
        _sgd_block(
            w_at, old_at, magnitude_at, sign_at, buffer_at, offsets, mask, coefficient, skipped,
            rate, momentum, one_minus_dampening, weight_decay, gradient_sign, SIGNED,
            HAS_COEFFICIENT, MOMENTUM, NESTEROV, DECAYS, False, T,
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
    """D = |Hv|, or its mean over `count` positions that lie `stride` apart, added up in their order
    by every element for itself, from the cache. start_at: where the tensor begins."""
    if count == 1:
        d = tl.abs(_load(product_at, offsets, mask, WHOLE, T).to(tl.float32))
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
    u = _load(g_at, offsets, mask, WHOLE, T).to(tl.float32) * (1.0 + rho * d)
    skipped = tl.full([], False, tl.int1)
    _sgd_update(
        w_at, w_at, u, buffer_at, offsets, mask, skipped, lr, momentum, one_minus_dampening,
        weight_decay, gradient_sign, MOMENTUM, NESTEROV, DECAYS, WHOLE, T,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "plan",
        "addresses",
        "rho",
        "lr",
        "momentum",
        "one_minus_dampening",
        "weight_decay",
        "gradient_sign",
    ]
)
def sgd_hess(
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
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """torch.optim.SGD's step with u = g * (1 + rho * D), D = |Hv| or its mean over the positions.

    Lists: params, grads, Hessian-vector products, then the buffers if there are any. Numbers: how
    many positions a tensor has, and the stride from one to the next.

    Source: D: Yao et al., arXiv:2006.00719.
    """
    LISTS: tl.constexpr = 3 + (MOMENTUM != NO_MOMENTUM)
    COLUMNS: tl.constexpr = LISTS + 2
    tensor, begin, size = _chunk(plan)
    w_at = _address(addresses, tensor, begin, 0, COLUMNS, T)
    g_at = _address(addresses, tensor, begin, 1, COLUMNS, T)
    product_at = _address(addresses, tensor, begin, 2, COLUMNS, T)
    start_at = _address(addresses, tensor, 0, 2, COLUMNS, T)
    buffer_at = _address(addresses, tensor, begin, LISTS - 1, COLUMNS, T)
    count = tl.load(addresses + tensor * COLUMNS + LISTS)
    stride = tl.load(addresses + tensor * COLUMNS + LISTS + 1)
    radius = _scalar(rho, RHO_ON_DEVICE)
    rate = _scalar(lr, LR_ON_DEVICE)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    if (size == BLOCK) & _is_aligned(w_at | g_at | product_at | buffer_at):
        _sgd_hess_block(
            w_at, g_at, product_at, start_at, buffer_at, begin, count, stride, offsets, mask,
            radius, rate, momentum, one_minus_dampening, weight_decay, gradient_sign, MOMENTUM,
            NESTEROV, DECAYS, True, T,
        )  # fmt: skip
    else:
        _sgd_hess_block(
            w_at, g_at, product_at, start_at, buffer_at, begin, count, stride, offsets, mask,
            radius, rate, momentum, one_minus_dampening, weight_decay, gradient_sign, MOMENTUM,
            NESTEROV, DECAYS, False, T,
        )  # fmt: skip


@triton.jit
def _power(base, exponents):
    """base ** exponents by squaring, as csrc/update_math.h does it; 0 <= base < 1, whole numbers,
    all in float64."""
    powers = tl.full(exponents.shape, 1.0, tl.float64)
    rest = exponents.to(tl.int64)
    while base > 0:
        powers = tl.where(rest % 2 == 1, powers * base, powers)
        rest = rest // 2
        base = base * base
    return tl.where(rest > 0, 0.0, powers)


@triton.jit(
    do_not_specialize=[
        "counts",
        "tensors",
        "minus_beta1",
        "minus_beta2",
        "ascent_norm",
        "found_inf",
        "bias_corrections",
    ]
)
def count_steps(
    counts,
    tensors,
    minus_beta1,
    minus_beta2,
    ascent_norm,
    found_inf,
    bias_corrections,
    GUARDED: tl.constexpr,
    CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """t += 1 for each tensor, unless the step is skipped; what `adam` needs to know of t.

    counts: int64 [tensors, 2]: where t is, and whether it is a float64 (else float32) there.
    minus_beta1, minus_beta2: the bits of -beta in float64, as integers: Triton makes a float32 of a
    number. bias_corrections: float32 [tensors, 2], 1 - beta1^t and sqrt(1 - beta2^t).

    Source: torch.optim.Adam. A launch of its own: of the chunks of a tensor, none may count while
    another still reads.
    """
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = tensor < tensors
    address = tl.load(counts + 2 * tensor, exists, other=0)
    is_double = exists & (tl.load(counts + 2 * tensor + 1, exists, other=0) != 0)
    is_float = exists & (is_double == 0)
    in_double = address.to(tl.pointer_type(tl.float64))
    in_float = address.to(tl.pointer_type(tl.float32))
    t = tl.load(in_float, is_float, other=0.0).to(tl.float64)
    t = tl.where(is_double, tl.load(in_double, is_double, other=0.0), t) + 1.0
    takes_place = _is_skipped(ascent_norm, found_inf, GUARDED, CHECKED) == 0
    tl.store(in_double, t, is_double & takes_place)
    tl.store(in_float, t.to(tl.float32), is_float & takes_place)
    first = 1.0 - _power(-minus_beta1.to(tl.float64, bitcast=True), t)
    second = 1.0 - _power(-minus_beta2.to(tl.float64, bitcast=True), t)
    tl.store(bias_corrections + 2 * tensor, first.to(tl.float32), exists)
    tl.store(bias_corrections + 2 * tensor + 1, tl.sqrt(second).to(tl.float32), exists)


@triton.jit
def _adam_block(
    w_at,
    old_at,
    magnitude_at,
    exp_avg_at,
    exp_avg_sq_at,
    sign_at,
    offsets,
    mask,
    coefficient,
    skipped,
    step_size,
    shrink,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    gradient_sign,
    bias_correction2_sqrt,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    u = _recombined(magnitude_at, sign_at, offsets, mask, coefficient, SIGNED, SCALED, WHOLE, T)
    old = _load(old_at, offsets, mask, WHOLE, T)
    old_m = _load(exp_avg_at, offsets, mask, WHOLE, T)
    old_v = _load(exp_avg_sq_at, offsets, mask, WHOLE, T)
    w = old.to(tl.float32)
    u = gradient_sign * u
    if DECAYS:
        if DECOUPLED:
            w = shrink * w
        else:
            u = u + weight_decay * w
    m = beta1 * old_m.to(tl.float32) + one_minus_beta1 * u
    v = beta2 * old_v.to(tl.float32) + one_minus_beta2 * u * u
    denominator = tl.div_rn(tl.sqrt_rn(v), bias_correction2_sqrt) + eps
    updated = w - tl.div_rn(step_size * m, denominator)
    _store(exp_avg_at, offsets, mask, tl.where(skipped, old_m, m.to(T)), WHOLE, T)
    _store(exp_avg_sq_at, offsets, mask, tl.where(skipped, old_v, v.to(T)), WHOLE, T)
    _store(w_at, offsets, mask, tl.where(skipped, old, updated.to(T)), WHOLE, T)


@triton.jit(
    do_not_specialize=[
        "plan",
        "addresses",
        "numerator",
        "denominator",
        "norm_eps",
        "ascent_norm",
        "grad_scale",
        "found_inf",
        "lr",
        "beta1",
        "one_minus_beta1",
        "beta2",
        "one_minus_beta2",
        "eps",
        "weight_decay",
        "gradient_sign",
        "bias_corrections",
    ]
)
def adam(
    plan,
    addresses,
    numerator,
    denominator,
    norm_eps,
    ascent_norm,
    grad_scale,
    found_inf,
    lr,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    gradient_sign,
    bias_corrections,
    SIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    PER_TENSOR: tl.constexpr,
    UNSCALED: tl.constexpr,
    GUARDED: tl.constexpr,
    CHECKED: tl.constexpr,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Restore, recombine and update: torch.optim.Adam's step from w = old_param with u, or AdamW's
    if DECOUPLED.

    u = gradient_sign * u;  u += weight_decay * w, or w *= 1 - lr * weight_decay if DECOUPLED
    m = beta1 * m + (1 - beta1) * u;  v = beta2 * v + (1 - beta2) * u^2
    w -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    If ascent_norm is not finite, or found_inf not 0, w = old_param, and m and v stay.
    Lists: params, old_params, magnitude, exp_avgs (m), exp_avg_sqs (v), then sign if SIGNED.
    bias_corrections: see count_steps.

    Source: torch.optim.Adam, torch.optim.AdamW; u: see recombine.
    """
    LISTS: tl.constexpr = 5 + SIGNED
    tensor, begin, count = _chunk(plan)
    w_at = _address(addresses, tensor, begin, 0, LISTS, T)
    old_at = _address(addresses, tensor, begin, 1, LISTS, T)
    magnitude_at = _address(addresses, tensor, begin, 2, LISTS, T)
    exp_avg_at = _address(addresses, tensor, begin, 3, LISTS, T)
    exp_avg_sq_at = _address(addresses, tensor, begin, 4, LISTS, T)
    sign_at = _address(addresses, tensor, begin, LISTS - 1, LISTS, T)  # else exp_avg_sq's again
    coefficient = _coefficient(
        numerator, denominator, norm_eps, grad_scale, tensor, SCALED, PER_TENSOR, UNSCALED
    )
    skipped = _is_skipped(ascent_norm, found_inf, GUARDED, CHECKED)
    HAS_COEFFICIENT: tl.constexpr = SCALED or UNSCALED
    rate = _scalar(lr, LR_ON_DEVICE)
    step_size = tl.div_rn(rate, tl.load(bias_corrections + 2 * tensor))
    shrink = 1.0 - rate * weight_decay
    correction2_sqrt = tl.load(bias_corrections + 2 * tensor + 1)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    aligned = _is_aligned(w_at | old_at | magnitude_at | exp_avg_at | exp_avg_sq_at | sign_at)
    if (count == BLOCK) & aligned:
        _adam_block(
            w_at, old_at, magnitude_at, exp_avg_at, exp_avg_sq_at, sign_at, offsets, mask,
            coefficient, skipped, step_size, shrink, beta1, one_minus_beta1, beta2,
            one_minus_beta2, eps, weight_decay, gradient_sign, correction2_sqrt, SIGNED,
            HAS_COEFFICIENT, DECAYS, DECOUPLED, True, T,
        )  # fmt: skip
    else:
        _adam_block(
            w_at, old_at, magnitude_at, exp_avg_at, exp_avg_sq_at, sign_at, offsets, mask,
            coefficient, skipped, step_size, shrink, beta1, one_minus_beta1, beta2,
            one_minus_beta2, eps, weight_decay, gradient_sign, correction2_sqrt, SIGNED,
            HAS_COEFFICIENT, DECAYS, DECOUPLED, False, T,
        )  # fmt: skip


# Sums: every program writes the sums of its chunk; the one that finishes last adds them up, in the
# order of the chunks. Only integers are counted atomically, so the same inputs give the same bits.


@triton.jit
def _is_last(finished, count):
    """Whether this program is the last of `count` to come here; it sees what the others wrote."""
    tl.debug_barrier()
    before = tl.atomic_add(finished, 1, sem="acq_rel")
    tl.debug_barrier()
    return before == count - 1


@triton.jit
def _sum(values, first, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of values[STRIDE * i] for `count` indices i from `first` on, which others wrote."""
    offsets = tl.arange(0, BLOCK)
    sums = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        mask = start + offsets < count
        pointers = values + (first + start + offsets.to(tl.int64)) * STRIDE
        sums += tl.load(pointers, mask, other=0.0, cache_modifier=".cg")
    return tl.sum(sums, 0)


@triton.jit
def _neighbours(plan):
    """The first chunk of this program's tensor, how many it has, and how many tensors there are."""
    row = plan + tl.program_id(0).to(tl.int64) * PLAN_COLUMNS
    last = plan + (tl.num_programs(0) - 1).to(tl.int64) * PLAN_COLUMNS
    return tl.load(row + 3), tl.load(row + 4), tl.load(last) + 1


@triton.jit
def _squares(
    x_at,
    weights_at,
    offsets,
    mask,
    weighted,
    plain,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    x = _load(x_at, offsets, mask, WHOLE, T).to(tl.float32)
    if WEIGHTED:
        scaled = (_load(weights_at, offsets, mask, WHOLE, T).to(tl.float32) * x).to(tl.float64)
        weighted = tl.fma(scaled, scaled, weighted)
    wide = x.to(tl.float64)
    return weighted, tl.fma(wide, wide, plain)


@triton.jit(do_not_specialize=["plan", "addresses", "workspace", "finished", "per_tensor", "total"])
def norms(
    plan,
    addresses,
    workspace,
    finished,
    per_tensor,
    total,
    WEIGHTED: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """per_tensor = ||x||_2 of each tensor, total of all;  if WEIGHTED, ||weights * x||_2 first.

    Lists: x and, if WEIGHTED, weights. workspace: float64 [SUMS, chunks + tensors], per_tensor
    [SUMS, tensors], total [SUMS], SUMS = 2 if WEIGHTED, else 1; finished: int32 [tensors + 1],
    zeros.
    """
    LISTS: tl.constexpr = 1 + WEIGHTED
    SUMS: tl.constexpr = 1 + WEIGHTED
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    tensor, begin, count = _chunk(plan)
    first_chunk, chunks_of_tensor, tensors = _neighbours(plan)
    x_at = _address(addresses, tensor, begin, 0, LISTS, T)
    weights_at = _address(addresses, tensor, begin, LISTS - 1, LISTS, T)
    aligned = _is_aligned(x_at | weights_at)

    offsets = tl.arange(0, BLOCK)
    weighted = tl.full([BLOCK], 0.0, tl.float64)
    plain = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        here = start + offsets
        mask = here < count
        if aligned & (start + BLOCK <= count):
            weighted, plain = _squares(
                x_at, weights_at, here, mask, weighted, plain, WEIGHTED, True, T
            )
        else:
            weighted, plain = _squares(
                x_at, weights_at, here, mask, weighted, plain, WEIGHTED, False, T
            )
    row = (chunks + tensors).to(tl.int64)  # of the workspace
    if WEIGHTED:
        tl.store(workspace + chunk, tl.sum(weighted, 0))
    tl.store(workspace + (SUMS - 1) * row + chunk, tl.sum(plain, 0))

    if _is_last(finished + tensor, chunks_of_tensor):
        for k in tl.static_range(SUMS):
            of_tensor = _sum(workspace + k * row, first_chunk, chunks_of_tensor, 1, BLOCK)
            tl.store(per_tensor + k * tensors + tensor, tl.sqrt(of_tensor).to(tl.float32))
            tl.store(workspace + k * row + chunks + tensor, of_tensor)
        if _is_last(finished + tensors, tensors):
            for k in tl.static_range(SUMS):
                of_all = _sum(workspace + k * row + chunks, 0, tensors, 1, BLOCK)
                tl.store(total + k, tl.sqrt(of_all).to(tl.float32))


@triton.jit
def _compare_block(
    first_at,
    second_at,
    w_at,
    offsets,
    mask,
    a,
    b,
    c,
    d,
    e,
    f,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    # float64: products of float32 are exact there, and none of them is lost to underflow.
    # Fused operations therefore give the bits of separate ones.
    g1 = _load(first_at, offsets, mask, WHOLE, T).to(tl.float32)
    g2 = _load(second_at, offsets, mask, WHOLE, T).to(tl.float32)
    w = _load(w_at, offsets, mask, WHOLE, T).to(tl.float32).to(tl.float64)
    larger = (tl.abs(g2) > tl.abs(g1)).to(tl.int32)
    agree = (((g1 > 0) & (g2 > 0)) | ((g1 < 0) & (g2 < 0))).to(tl.int32)
    g1, g2 = g1.to(tl.float64), g2.to(tl.float64)
    a, b, c, f = tl.fma(g1, g1, a), tl.fma(g2, g2, b), tl.fma(g1, g2, c), tl.fma(w, w, f)
    return a, b, c, d + larger, e + agree, f


@triton.jit(
    do_not_specialize=["plan", "addresses", "workspace", "finished", "sums", "per_tensor", "total"]
)
def compare(
    plan,
    addresses,
    workspace,
    finished,
    sums,
    per_tensor,
    total,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums = g1^2, g2^2, g1 * g2, [|g2| > |g1|], [g1 * g2 > 0], w^2, over all elements;
    per_tensor = ||g2|| of each tensor, total of all.

    Lists: first_grads, second_grads, weights. workspace: float64 [6 * chunks + tensors]; finished:
    int32 [tensors + 1], zeros.
    """
    SUMS: tl.constexpr = 6
    chunk = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(0)
    tensor, begin, count = _chunk(plan)
    first_at = _address(addresses, tensor, begin, 0, 3, T)
    second_at = _address(addresses, tensor, begin, 1, 3, T)
    w_at = _address(addresses, tensor, begin, 2, 3, T)
    aligned = _is_aligned(first_at | second_at | w_at)

    offsets = tl.arange(0, BLOCK)
    a = tl.full([BLOCK], 0.0, tl.float64)
    b = tl.full([BLOCK], 0.0, tl.float64)
    c = tl.full([BLOCK], 0.0, tl.float64)
    d = tl.full([BLOCK], 0, tl.int32)
    e = tl.full([BLOCK], 0, tl.int32)
    f = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        here = start + offsets
        mask = here < count
        if aligned & (start + BLOCK <= count):
            a, b, c, d, e, f = _compare_block(
                first_at, second_at, w_at, here, mask, a, b, c, d, e, f, True, T
            )
        else:
            a, b, c, d, e, f = _compare_block(
                first_at, second_at, w_at, here, mask, a, b, c, d, e, f, False, T
            )
    of_chunk = workspace + chunk * SUMS
    tl.store(of_chunk, tl.sum(a, 0))
    tl.store(of_chunk + 1, tl.sum(b, 0))
    tl.store(of_chunk + 2, tl.sum(c, 0))
    tl.store(of_chunk + 3, tl.sum(d, 0).to(tl.float64))
    tl.store(of_chunk + 4, tl.sum(e, 0).to(tl.float64))
    tl.store(of_chunk + 5, tl.sum(f, 0))

    # Not earlier: in the loop, registers are scarce.
    first_chunk, chunks_of_tensor, tensors = _neighbours(plan)
    if _is_last(finished + tensor, chunks_of_tensor):
        of_tensor = _sum(workspace + 1, first_chunk, chunks_of_tensor, SUMS, BLOCK)
        tl.store(per_tensor + tensor, tl.sqrt(of_tensor).to(tl.float32))
        of_tensors = workspace + chunks.to(tl.int64) * SUMS
        tl.store(of_tensors + tensor, of_tensor)
        if _is_last(finished + tensors, tensors):
            tl.store(total, tl.sqrt(_sum(of_tensors, 0, tensors, 1, BLOCK)).to(tl.float32))
            for k in tl.static_range(SUMS):
                tl.store(sums + k, _sum(workspace + k, 0, chunks, SUMS, BLOCK))


# Whether all this was meant for Triton's interpreter (TRITON_INTERPRET), and takes CPU tensors.
INTERPRETED = not isinstance(restore, triton.JITFunction)
