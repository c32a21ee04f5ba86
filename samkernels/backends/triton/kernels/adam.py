"""Update as torch.optim.Adam and AdamW do."""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import address_of, chunk_of, is_aligned, kernel, load, scalar, store
from .mixes import coefficients, is_skipped, mixed


@triton.jit
def _power(base, exponents):
    """Return base ** exponents by squaring, as csrc/update_math.h does it; 0 <= base < 1, whole
    numbers, all in float64."""
    powers = tl.full(exponents.shape, 1.0, tl.float64)
    rest = exponents.to(tl.int64)
    while base > 0:
        powers = tl.where(rest % 2 == 1, powers * base, powers)
        rest = rest // 2
        base = base * base
    return tl.where(rest > 0, 0.0, powers)


@kernel
def count_steps(
    counts,
    tensors,
    minus_beta1,
    minus_beta2,
    ascent_square,
    found_inf,
    bias_corrections,
    BLOCK: tl.constexpr,
):
    """Count t += 1 for each tensor, unless the step is skipped; write what adam_step needs of t.

    counts: int64 [tensors, 2]: where t is, and whether it is a float64 (else float32) there.
    minus_beta1, minus_beta2: the bits of -beta in float64, as integers: Triton makes a float32 of a
    number. bias_corrections: float32 [tensors, 2], 1 - beta1^t and sqrt(1 - beta2^t).

    Source: torch.optim.Adam. This is a launch of its own: no chunk of a tensor may count while
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
    takes_place = is_skipped(ascent_square, found_inf) == 0
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
    x_at,
    y_at,
    exp_avg_at,
    exp_avg_sq_at,
    offsets,
    mask,
    a,
    b,
    whole,
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
    FUNCTION: tl.constexpr,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    WHOLE: tl.constexpr,
    T: tl.constexpr,
):
    u = mixed(x_at, y_at, offsets, mask, a, b, whole, FUNCTION, WHOLE, T)
    old = load(old_at, offsets, mask, WHOLE, T)
    old_m = load(exp_avg_at, offsets, mask, WHOLE, T)
    old_v = load(exp_avg_sq_at, offsets, mask, WHOLE, T)
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
    store(exp_avg_at, offsets, mask, tl.where(skipped, old_m, m.to(T)), WHOLE, T)
    store(exp_avg_sq_at, offsets, mask, tl.where(skipped, old_v, v.to(T)), WHOLE, T)
    store(w_at, offsets, mask, tl.where(skipped, old, updated.to(T)), WHOLE, T)


@kernel
def adam_step(
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
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    gradient_sign,
    bias_corrections,
    FUNCTION: tl.constexpr,
    DECAYS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Restore, mix and update: torch.optim.Adam's step from w = old_param with u, or AdamW's if
    DECOUPLED.

    u = gradient_sign * u;  u += weight_decay * w, or w *= 1 - lr * weight_decay if DECOUPLED
    m = beta1 * m + (1 - beta1) * u;  v = beta2 * v + (1 - beta2) * u^2
    w -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    If the step is skipped, w = old_param, and m and v stay. Lists: params, old_params, x,
    exp_avgs (m), exp_avg_sqs (v), then y unless FUNCTION is "scale". bias_corrections: see
    count_steps.

    Source: torch.optim.Adam, torch.optim.AdamW; u: see mix.
    """
    LISTS: tl.constexpr = 5 + (FUNCTION != "scale")
    tensor, begin, count = chunk_of(plan)
    w_at = address_of(addresses, tensor, begin, 0, LISTS, T)
    old_at = address_of(addresses, tensor, begin, 1, LISTS, T)
    x_at = address_of(addresses, tensor, begin, 2, LISTS, T)
    exp_avg_at = address_of(addresses, tensor, begin, 3, LISTS, T)
    exp_avg_sq_at = address_of(addresses, tensor, begin, 4, LISTS, T)
    y_at = address_of(addresses, tensor, begin, LISTS - 1, LISTS, T)  # else exp_avg_sq's again
    first, second, whole = coefficients(a, a_stride, b, b_stride, divisor, tensor)
    skipped = is_skipped(ascent_square, found_inf)
    rate = scalar(lr, LR_ON_DEVICE)
    step_size = tl.div_rn(rate, tl.load(bias_corrections + 2 * tensor))
    shrink = 1.0 - rate * weight_decay
    correction2_sqrt = tl.load(bias_corrections + 2 * tensor + 1)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    aligned = is_aligned(w_at | old_at | x_at | exp_avg_at | exp_avg_sq_at | y_at)
    if (count == BLOCK) & aligned:
        _adam_block(
            w_at, old_at, x_at, y_at, exp_avg_at, exp_avg_sq_at, offsets, mask, first, second,
            whole, skipped, step_size, shrink, beta1, one_minus_beta1, beta2, one_minus_beta2, eps,
            weight_decay, gradient_sign, correction2_sqrt, FUNCTION, DECAYS, DECOUPLED, True, T,
        )  # fmt: skip
    else:
        _adam_block(
            w_at, old_at, x_at, y_at, exp_avg_at, exp_avg_sq_at, offsets, mask, first, second,
            whole, skipped, step_size, shrink, beta1, one_minus_beta1, beta2, one_minus_beta2, eps,
            weight_decay, gradient_sign, correction2_sqrt, FUNCTION, DECAYS, DECOUPLED, False, T,
        )  # fmt: skip
