"""Call torch._foreach_*: a few launches per list on any device, with nothing to compile.

Half-precision lists are computed on as float32 copies, so that results are rounded once, as in the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samkernels.backends.contract import (
    AdamOptions,
    Dots,
    Mix,
    SgdOptions,
    TensorList,
    norm_of,
    note,
)
from samkernels.backends.contract import are_alike as are_alike
from samkernels.backends.contract import gradients_of as gradients_of
from samkernels.backends.contract import prepare as prepare
from samkernels.backends.contract import state_of as state_of
from samkernels.backends.contract import versions_of as versions_of
from samkernels.backends.rounding import rounded_at_random


def why_unavailable(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
    """Return None: the foreach functions fall back to a loop where a device has no fused kernel."""
    return None


def dots(lists: Sequence[TensorList], weights: TensorList | None = None, eta: float = 0.0) -> Dots:
    wide = [[x.double() for x in tensors] for tensors in lists]
    # Squares of float32 overflow from 2e19 on, and vanish below 1e-23: float64 sums.
    sums = [_squares(wide[0])]
    if weights is not None:
        scaled = torch._foreach_mul(_scaling(weights, eta), _wide(lists[0]))
        sums.insert(0, _squares([x.double() for x in scaled]))
    if len(lists) > 1:
        products = torch._foreach_mul(wide[0], wide[1])
        sums += [_sums(products), _squares(wide[1])]
    if len(lists) > 2:
        larger = torch._foreach_sub(torch._foreach_abs(wide[1]), torch._foreach_abs(wide[0]))
        sums += [
            _squares(wide[2]),
            _sums([x > 0 for x in larger]),
            _sums([x > 0 for x in products]),
        ]
    per_tensor = torch.stack(sums, 1)
    return Dots(per_tensor.sum(0), per_tensor)


def perturb_(
    params: TensorList,
    direction: TensorList,
    old_params: TensorList,
    *,
    square: Tensor,
    rho: float | Tensor,
    eta: float | None,
    eps: float,
    rounds_at_random: bool,
    journal: list[bool] | None,
    saves: bool = True,
) -> None:
    if any(d is old for d, old in zip(direction, old_params, strict=True)):
        direction = [d.clone() for d in direction]
    if saves:
        torch._foreach_copy_(old_params, params)
    note(journal, True)
    w, d = _wide(old_params), _wide(direction)
    if eta is not None:
        scaling = _scaling(old_params, eta)
        d = torch._foreach_mul(torch._foreach_mul(scaling, scaling), d)
    norm = norm_of(square, params[0].dtype)
    radius = rho if isinstance(rho, Tensor) else torch.full_like(norm, rho)
    scale = radius / (norm + eps)
    perturbed: TensorList = torch._foreach_add(w, torch._foreach_mul(d, _for_each(scale)))
    if rounds_at_random and params[0].dtype is torch.bfloat16:
        norms = norm.expand(len(params)).unbind()
        pairs = enumerate(zip(params, perturbed, strict=True))
        perturbed = [rounded_at_random(x, norms[i], i, like=p) for i, (p, x) in pairs]
    moves = (norm > 0) & norm.isfinite()
    if moves.dim() == 0:
        perturbed = _where(moves, perturbed, w)
    else:
        perturbed = [
            torch.where(moved, new, old)
            for moved, new, old in zip(moves.unbind(), perturbed, w, strict=True)
        ]
    torch._foreach_copy_(params, perturbed)


def restore_(params: TensorList, old_params: TensorList) -> None:
    torch._foreach_copy_(params, old_params)


def mix_(out: TensorList, mix: Mix, *, keeps: bool = False) -> None:
    u = _mixed(mix)
    kept = _wide(out) if keeps else [torch.zeros_like(x) for x in u]
    torch._foreach_copy_(out, _unless_skipped(mix, u, kept))


def sgd_(
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    mix: Mix,
    options: SgdOptions,
    journal: list[bool] | None = None,
) -> None:
    note(journal, False)
    u = _mixed(mix)
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
            undamped = options.one_minus_dampening
            factor = 1 - options.dampening if undamped is None else undamped
            new = torch._foreach_add(decayed, torch._foreach_mul(u, factor))
        if options.nesterov:
            u = torch._foreach_add(u, torch._foreach_mul(new, options.momentum))
        else:
            u = new
        torch._foreach_copy_(momentum_buffers, _unless_skipped(mix, new, kept))
    updated = torch._foreach_sub(w, torch._foreach_mul(u, options.lr))
    torch._foreach_copy_(params, _unless_skipped(mix, updated, w))
    note(journal, True)


def sgd_hess_(
    params: TensorList,
    grads: TensorList,
    hessian_products: TensorList,
    momentum_buffers: TensorList | None,
    rho: float | Tensor,
    options: SgdOptions,
    journal: list[bool] | None = None,
) -> None:
    d = [
        x.mean((2, 3), keepdim=True).expand_as(x) if x.dim() == 4 else x
        for x in torch._foreach_abs(_wide(hessian_products))
    ]
    factors = torch._foreach_add(torch._foreach_mul(d, rho), 1)
    scaled = torch._foreach_mul(_wide(grads), factors)
    sgd_(params, params, momentum_buffers, Mix(scaled), options, journal)


def adam_(
    params: TensorList,
    old_params: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    mix: Mix,
    options: AdamOptions,
    journal: list[bool] | None = None,
) -> None:
    note(journal, False)
    u = _mixed(mix)
    old = _wide(old_params)
    w = old
    if options.maximize:
        u = torch._foreach_neg(u)
    dtype = old[0].dtype
    # In float64: in float32, 1 - 0.999 would be off by 1e-5.
    counted = torch.stack(list(steps)).double()
    counts = counted + 1
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
    torch._foreach_copy_(exp_avgs, _unless_skipped(mix, new_m, m))
    torch._foreach_copy_(exp_avg_sqs, _unless_skipped(mix, new_v, v))
    torch._foreach_copy_(params, _unless_skipped(mix, updated, old))
    takes_place = mix.takes_place()
    counts = counts if takes_place is None else counted + takes_place
    torch._foreach_copy_(steps, list(counts.unbind()))
    note(journal, True)


def _wide(tensors: TensorList) -> TensorList:
    if tensors[0].dtype in (torch.float32, torch.float64):
        return list(tensors)
    return [t.float() for t in tensors]


def _mixed(mix: Mix) -> TensorList:
    x = _wide(mix.x)
    a, b = mix.a, mix.b
    whole: float | Tensor = 1.0
    if mix.divisor is not None:
        one = torch.ones_like(mix.divisor)
        a, b, whole = one * a / mix.divisor, one * b / mix.divisor, one / mix.divisor
    if mix.y is None:
        return _times(x, a)
    y = _wide(mix.y)
    if mix.function == "linear":
        return torch._foreach_add(_times(x, a), _times(y, b))
    if mix.function == "sign":
        return _times(torch._foreach_mul(torch._foreach_abs(x), torch._foreach_sign(y)), a)
    if mix.function == "product":
        return _times(torch._foreach_mul(x, y), a)
    ratios = torch._foreach_div(x, torch._foreach_add(y, 1e-8))
    damped, undamped = _times(x, a), _times(x, whole)
    return [
        torch.where((ratio > 0) & (ratio < 1), small, large)
        for ratio, small, large in zip(ratios, damped, undamped, strict=True)
    ]


def _times(tensors: TensorList, factor: float | Tensor) -> TensorList:
    if not isinstance(factor, Tensor) and factor == 1:
        return list(tensors)
    return list(torch._foreach_mul(tensors, _for_each(factor)))


def _for_each(factor: Any) -> Any:
    """Return a number for each tensor as a list of numbers."""
    return list(factor.unbind()) if isinstance(factor, Tensor) and factor.dim() == 1 else factor


def _scaling(weights: TensorList, eta: float) -> TensorList:
    return torch._foreach_add(torch._foreach_abs(_wide(weights)), eta)


def _unless_skipped(mix: Mix, updated: TensorList, kept: TensorList) -> TensorList:
    takes_place = mix.takes_place()
    return updated if takes_place is None else _where(takes_place, updated, kept)


def _where(condition: Tensor, new: TensorList, kept: TensorList) -> TensorList:
    """Return `new` if the condition holds, else `kept`, bit for bit; the device decides.

    There is no foreach version of torch.where, and a product with 0 would keep a nan: the bits are
    multiplied as integers instead.
    """
    # No device to wait for, and no fake tensor, whose storage lies elsewhere than it says.
    if condition.device.type == "cpu" and condition.untyped_storage().device.type == "cpu":
        return new if condition else kept
    dtype = new[0].dtype
    integer = torch.int64 if dtype is torch.float64 else torch.int32
    takes = condition.to(integer)
    bits = torch._foreach_add(
        torch._foreach_mul([x.view(integer) for x in new], takes),
        torch._foreach_mul([x.view(integer) for x in kept], 1 - takes),
    )
    return [x.view(dtype) for x in bits]


def _squares(tensors: TensorList) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors, 2)).square()


def _sums(tensors: TensorList) -> Tensor:
    return torch.stack([x.sum(dtype=torch.float64) for x in tensors])
