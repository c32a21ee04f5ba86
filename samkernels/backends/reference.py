"""The oracle: eager PyTorch, one tensor at a time, written to be read.

Every other backend implements the same functions and is tested against these. Arithmetic is in
float32 (float64 for float64 tensors), whatever the dtype of the tensors, and is rounded once, when
it is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samkernels.backends.contract import (
    AdamOptions,
    Comparison,
    Norms,
    Recombination,
    SgdOptions,
    TensorList,
)
from samkernels.backends.contract import are_alike as are_alike
from samkernels.backends.contract import gradients_of as gradients_of
from samkernels.backends.contract import prepare as prepare
from samkernels.backends.contract import state_of as state_of
from samkernels.backends.rounding import rounded_at_random


def why_unavailable(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
    """None: eager PyTorch serves every device, floating dtype and layout."""
    return None


def norms(tensors: TensorList) -> Norms:
    # Squares of float32 are summed in float64: they neither overflow nor lose small gradients.
    per_tensor = [torch.linalg.vector_norm(_wide(x), dtype=torch.float64) for x in tensors]
    squares = torch.stack(per_tensor).square()
    dtype = _wide(tensors[0]).dtype
    return Norms(total=squares.sum().sqrt().to(dtype), per_tensor=squares.sqrt().to(dtype))


def weighted_norms(tensors: TensorList, weights: TensorList) -> tuple[Norms, Norms]:
    weighted = [_wide(w) * _wide(x) for x, w in zip(tensors, weights, strict=True)]
    return norms(weighted), norms(tensors)


def perturb_(
    params: TensorList,
    grads: TensorList,
    old_params: TensorList,
    *,
    norm: Tensor,
    rho: float | Tensor,
    adaptive: bool,
    eps: float,
    rounds_at_random: bool,
    journal: list[bool] | None,
) -> None:
    for w, old in zip(params, old_params, strict=True):
        old.copy_(w)
    if journal is not None:
        journal.append(True)
    # A zero norm has no direction, a non-finite one would put nan into every weight.
    perturbs = (norm > 0) & norm.isfinite()
    # rho as a tensor: PyTorch divides a number by a tensor with a reciprocal, an ulp off.
    radius = rho if isinstance(rho, Tensor) else torch.full_like(norm, rho)
    scale = radius / (norm + eps)
    for i, (w, g) in enumerate(zip(params, grads, strict=True)):
        direction = _wide(w) * _wide(w) * _wide(g) if adaptive else _wide(g)
        perturbed = _wide(w) + scale * direction
        if rounds_at_random and w.dtype is torch.bfloat16:
            perturbed = rounded_at_random(perturbed, norm, i, like=w)
        w.copy_(torch.where(perturbs, perturbed, _wide(w)))


def restore_(params: TensorList, old_params: TensorList) -> None:
    for w, old in zip(params, old_params, strict=True):
        w.copy_(old)


def recombine_(out: TensorList, recombination: Recombination) -> None:
    for i, target in enumerate(out):
        u = _recombined(recombination, i)
        target.copy_(_unless_skipped(recombination, u, torch.zeros_like(u)))


def sgd_(
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    recombination: Recombination,
    options: SgdOptions,
) -> None:
    for i, (w, old) in enumerate(zip(params, old_params, strict=True)):
        u = _recombined(recombination, i)
        if options.maximize:
            u = -u
        if options.weight_decay != 0:
            u = u + options.weight_decay * _wide(old)
        if momentum_buffers is not None:
            buffer = momentum_buffers[i]
            if options.init_momentum:
                kept, new = torch.zeros_like(u), u
            else:
                kept = _wide(buffer)
                new = options.momentum * kept + (1 - options.dampening) * u
            u = u + options.momentum * new if options.nesterov else new
            buffer.copy_(_unless_skipped(recombination, new, kept))
        updated = _wide(old) - options.lr * u
        w.copy_(_unless_skipped(recombination, updated, _wide(old)))


def sgd_hess_(
    params: TensorList,
    grads: TensorList,
    hessian_products: TensorList,
    momentum_buffers: TensorList | None,
    rho: float | Tensor,
    options: SgdOptions,
) -> None:
    scaled = [
        _wide(g) * (1 + rho * _curvature(_wide(product)))
        for g, product in zip(grads, hessian_products, strict=True)
    ]
    sgd_(params, params, momentum_buffers, Recombination(scaled), options)


def adam_(
    params: TensorList,
    old_params: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    recombination: Recombination,
    options: AdamOptions,
) -> None:
    dtype = _wide(params[0]).dtype
    counts = torch.stack(list(steps)).double() + 1
    power = torch.pow if dtype is torch.float64 else _power
    first_corrections = (1 - power(options.beta1, counts)).to(dtype)
    second_corrections_sqrt = (1 - power(options.beta2, counts)).sqrt().to(dtype)
    for i, (w, old) in enumerate(zip(params, old_params, strict=True)):
        u = _recombined(recombination, i)
        weight = _wide(old)
        if options.maximize:
            u = -u
        # Tensors, as rho in perturb_.
        correction = first_corrections[i]
        lr = torch.ones_like(correction) * options.lr
        if options.decoupled:
            weight = (1 - lr * options.weight_decay) * weight
        elif options.weight_decay != 0:
            u = u + options.weight_decay * weight
        m, v = _wide(exp_avgs[i]), _wide(exp_avg_sqs[i])
        new_m = options.beta1 * m + (1 - options.beta1) * u
        new_v = options.beta2 * v + (1 - options.beta2) * u * u
        denominator = _root(new_v) / second_corrections_sqrt[i] + options.eps
        updated = weight - lr / correction * new_m / denominator
        exp_avgs[i].copy_(_unless_skipped(recombination, new_m, m))
        exp_avg_sqs[i].copy_(_unless_skipped(recombination, new_v, v))
        w.copy_(_unless_skipped(recombination, updated, _wide(old)))
        steps[i].copy_(_unless_skipped(recombination, steps[i] + 1, steps[i]))


def compare(first_grads: TensorList, second_grads: TensorList, weights: TensorList) -> Comparison:
    sums = torch.zeros(6, dtype=torch.float64, device=first_grads[0].device)
    for first, second, weight in zip(first_grads, second_grads, weights, strict=True):
        g1, g2, w = first.double(), second.double(), weight.double()
        sums += torch.stack(
            [
                (g1 * g1).sum(),
                (g2 * g2).sum(),
                (g1 * g2).sum(),
                (g2.abs() > g1.abs()).sum(),
                (g1 * g2 > 0).sum(),
                (w * w).sum(),
            ]
        )
    numel = sum(g.numel() for g in first_grads)
    return Comparison(sums, numel, second_norms=norms(second_grads))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _curvature(product: Tensor) -> Tensor:
    """D = |Hv|, of 4-D tensors its mean over the last two dimensions, added up in their order."""
    absolute = product.abs()
    if product.dim() != 4:
        return absolute
    total = torch.zeros_like(absolute[:, :, :1, :1])
    for i in range(product.shape[2]):
        for j in range(product.shape[3]):
            total = total + absolute[:, :, i : i + 1, j : j + 1]
    # A tensor of counts: PyTorch divides by a number with a reciprocal, an ulp off.
    return total / torch.full_like(total, product.shape[2] * product.shape[3])


def _root(x: Tensor) -> Tensor:
    """Rounded correctly: PyTorch's square root of float32 may be an ulp off on the CPU."""
    return x.double().sqrt().to(x.dtype)


def _power(base: float, exponents: Tensor) -> Tensor:
    """base ** exponents, 0 <= base < 1, by squaring, as csrc/update_math.h does it: the same bits
    everywhere. Off by an ulp for every multiplication that the power stands for, at most: nothing
    that float32 would show."""
    whole = exponents.nan_to_num(0.0).clamp(0.0, 2.0**62)  # no integer holds much more
    powers, rest = torch.ones_like(exponents), whole.long()
    while base > 0:
        powers = torch.where(rest % 2 == 1, powers * base, powers)
        rest = rest // 2
        base = base * base
    return torch.where(rest > 0, 0.0, powers)


def _recombined(recombination: Recombination, i: int) -> Tensor:
    magnitude = _wide(recombination.magnitude[i])
    coefficient = None
    if recombination.sign is not None:
        magnitude = magnitude.abs() * _wide(recombination.sign[i]).sign()
    elif recombination.numerator is not None and recombination.denominator is not None:
        numerator, denominator = (
            norm if norm.dim() == 0 else norm[i]
            for norm in (recombination.numerator, recombination.denominator)
        )
        coefficient = numerator / (denominator + recombination.eps)
    if recombination.grad_scale is not None:
        one = torch.ones_like(recombination.grad_scale)
        coefficient = (one if coefficient is None else coefficient) / recombination.grad_scale
    return magnitude if coefficient is None else coefficient * magnitude


def _unless_skipped(recombination: Recombination, updated: Tensor, kept: Tensor) -> Tensor:
    takes_place = recombination.takes_place()
    return updated if takes_place is None else torch.where(takes_place, updated, kept)
