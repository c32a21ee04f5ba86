"""torch._foreach_*: a few launches per list on any device that PyTorch knows, nothing to compile.

Half-precision lists are computed on as float32 copies, so that results are rounded once, as in the
reference.
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
    """None: the foreach functions fall back to a loop where a device has no fused kernel."""
    return None


def norms(tensors: TensorList) -> Norms:
    wide = _wide(tensors)
    # Squares of float32 overflow from 2e19 on, and vanish below 1e-23: float64 sums.
    per_tensor = torch.stack(torch._foreach_norm(wide, 2, torch.float64))
    dtype = wide[0].dtype
    return Norms(torch.linalg.vector_norm(per_tensor).to(dtype), per_tensor.to(dtype))


def weighted_norms(tensors: TensorList, weights: TensorList) -> tuple[Norms, Norms]:
    return norms(torch._foreach_mul(_wide(weights), _wide(tensors))), norms(tensors)


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
    torch._foreach_copy_(old_params, params)
    if journal is not None:
        journal.append(True)
    w, direction = _wide(params), _wide(grads)
    if adaptive:
        direction = torch._foreach_mul(torch._foreach_mul(w, w), direction)
    radius = rho if isinstance(rho, Tensor) else torch.full_like(norm, rho)
    scale = radius / (norm + eps)
    perturbed: TensorList = torch._foreach_add(w, torch._foreach_mul(direction, scale))
    if rounds_at_random and params[0].dtype is torch.bfloat16:
        pairs = enumerate(zip(params, perturbed, strict=True))
        perturbed = [rounded_at_random(x, norm, i, like=p) for i, (p, x) in pairs]
    torch._foreach_copy_(params, _where((norm > 0) & norm.isfinite(), perturbed, w))


def restore_(params: TensorList, old_params: TensorList) -> None:
    torch._foreach_copy_(params, old_params)


def recombine_(out: TensorList, recombination: Recombination) -> None:
    u = _recombined(recombination)
    torch._foreach_copy_(out, _unless_skipped(recombination, u, [torch.zeros_like(x) for x in u]))


def sgd_(
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    recombination: Recombination,
    options: SgdOptions,
) -> None:
    u = _recombined(recombination)
    w = _wide(old_params)
    if options.maximize:
        u = torch._foreach_neg(u)
    if options.weight_decay != 0:
        u = torch._foreach_add(u, torch._foreach_mul(w, options.weight_decay))
    if momentum_buffers is not None:
        if options.init_momentum:
            kept: TensorList = [torch.zeros_like(x) for x in u]
            new = u
        else:
            kept = _wide(momentum_buffers)
            decayed = torch._foreach_mul(kept, options.momentum)
            new = torch._foreach_add(decayed, torch._foreach_mul(u, 1 - options.dampening))
        if options.nesterov:
            u = torch._foreach_add(u, torch._foreach_mul(new, options.momentum))
        else:
            u = new
        torch._foreach_copy_(momentum_buffers, _unless_skipped(recombination, new, kept))
    updated = torch._foreach_sub(w, torch._foreach_mul(u, options.lr))
    torch._foreach_copy_(params, _unless_skipped(recombination, updated, w))


def sgd_hess_(
    params: TensorList,
    grads: TensorList,
    hessian_products: TensorList,
    momentum_buffers: TensorList | None,
    rho: float | Tensor,
    options: SgdOptions,
) -> None:
    d = [
        x.mean((2, 3), keepdim=True).expand_as(x) if x.dim() == 4 else x
        for x in torch._foreach_abs(_wide(hessian_products))
    ]
    factors = torch._foreach_add(torch._foreach_mul(d, rho), 1)
    scaled = torch._foreach_mul(_wide(grads), factors)
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
    u = _recombined(recombination)
    old = _wide(old_params)
    w = old
    if options.maximize:
        u = torch._foreach_neg(u)
    dtype = old[0].dtype
    # In float64: in float32, 1 - 0.999 would be off by 1e-5.
    counts = torch.stack(list(steps)).double() + 1
    corrections = (1 - options.beta1**counts).to(dtype)
    corrections_sqrt = (1 - options.beta2**counts).sqrt().to(dtype)
    lr = torch.ones_like(corrections) * options.lr
    if options.decoupled:
        w = torch._foreach_mul(w, (1 - lr * options.weight_decay)[0])
    elif options.weight_decay != 0:
        u = torch._foreach_add(u, torch._foreach_mul(w, options.weight_decay))
    m, v = _wide(exp_avgs), _wide(exp_avg_sqs)
    new_m = torch._foreach_mul(m, options.beta1)
    torch._foreach_add_(new_m, torch._foreach_mul(u, 1 - options.beta1))
    new_v = torch._foreach_mul(v, options.beta2)
    torch._foreach_add_(new_v, torch._foreach_mul(torch._foreach_mul(u, 1 - options.beta2), u))
    denominators = torch._foreach_sqrt(new_v)
    torch._foreach_div_(denominators, list(corrections_sqrt.unbind()))
    torch._foreach_add_(denominators, options.eps)
    numerators = torch._foreach_mul(new_m, list((lr / corrections).unbind()))
    updated = torch._foreach_sub(w, torch._foreach_div(numerators, denominators))
    torch._foreach_copy_(exp_avgs, _unless_skipped(recombination, new_m, m))
    torch._foreach_copy_(exp_avg_sqs, _unless_skipped(recombination, new_v, v))
    torch._foreach_copy_(params, _unless_skipped(recombination, updated, old))
    takes_place = recombination.takes_place()
    torch._foreach_add_(steps, 1 if takes_place is None else takes_place.to(steps[0].dtype))


def compare(first_grads: TensorList, second_grads: TensorList, weights: TensorList) -> Comparison:
    g1, g2, w = ([x.double() for x in xs] for xs in (first_grads, second_grads, weights))
    product = torch._foreach_mul(g1, g2)
    larger = torch._foreach_sub(torch._foreach_abs(g2), torch._foreach_abs(g1))
    sums = [
        _sum(torch._foreach_mul(g1, g1)),
        _sum(torch._foreach_mul(g2, g2)),
        _sum(product),
        _sum([x > 0 for x in larger]),
        _sum([x > 0 for x in product]),
        _sum(torch._foreach_mul(w, w)),
    ]
    numel = sum(g.numel() for g in first_grads)
    return Comparison(torch.stack(sums), numel, norms(second_grads))


def _wide(tensors: TensorList) -> TensorList:
    if tensors[0].dtype in (torch.float32, torch.float64):
        return list(tensors)
    return [t.float() for t in tensors]


def _recombined(recombination: Recombination) -> TensorList:
    u = _wide(recombination.magnitude)
    coefficient = None
    if recombination.sign is not None:
        signs = torch._foreach_sign(_wide(recombination.sign))
        u = torch._foreach_mul(torch._foreach_abs(u), signs)
    elif recombination.numerator is not None and recombination.denominator is not None:
        coefficient = recombination.numerator / (recombination.denominator + recombination.eps)
    if recombination.grad_scale is not None:
        one = torch.ones_like(recombination.grad_scale)
        coefficient = (one if coefficient is None else coefficient) / recombination.grad_scale
    if coefficient is None:
        return list(u)
    scale = coefficient if coefficient.dim() == 0 else list(coefficient.unbind())
    return list(torch._foreach_mul(u, scale))


def _unless_skipped(
    recombination: Recombination, updated: TensorList, kept: TensorList
) -> TensorList:
    takes_place = recombination.takes_place()
    return updated if takes_place is None else _where(takes_place, updated, kept)


def _where(condition: Tensor, new: TensorList, kept: TensorList) -> TensorList:
    """`new` if the condition holds, else `kept`, bit for bit; decided on the device.

    There is no foreach version of torch.where, and a product with 0 would keep a nan: the bits are
    multiplied as integers instead.
    """
    if condition.device.type == "cpu":  # no device to wait for
        return new if condition else kept
    dtype = new[0].dtype
    integer = torch.int64 if dtype is torch.float64 else torch.int32
    takes = condition.to(integer)
    bits = torch._foreach_add(
        torch._foreach_mul([x.view(integer) for x in new], takes),
        torch._foreach_mul([x.view(integer) for x in kept], 1 - takes),
    )
    return [x.view(dtype) for x in bits]


def _sum(tensors: TensorList) -> Tensor:
    return torch.stack([x.sum(dtype=torch.float64) for x in tensors]).sum()
