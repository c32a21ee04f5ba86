"""Compute every op in eager PyTorch, one tensor at a time: the oracle, written to be read.

Every other backend implements the same functions and is tested against these. Arithmetic is in
float32 (float64 for float64 tensors), whatever the dtype of the tensors, and is rounded once, when
it is stored.
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
    """Return None: eager PyTorch serves every device, floating dtype and layout."""
    return None


def dots(lists: Sequence[TensorList], weights: TensorList | None = None, eta: float = 0.0) -> Dots:
    per_tensor = []
    for i, x in enumerate(lists[0]):
        # In float64, squares of float32 neither overflow nor lose small gradients.
        first = x.double()
        sums = [(first * first).sum()]
        if weights is not None:
            # In the dtype of the arithmetic, as perturb_ scales it.
            scaled = (_wide(weights[i]).abs() + eta) * _wide(x)
            sums.insert(0, scaled.double().square().sum())
        if len(lists) > 1:
            second = lists[1][i].double()
            sums += [(first * second).sum(), (second * second).sum()]
        if len(lists) > 2:
            third = lists[2][i].double()
            sums += [
                (third * third).sum(),
                (second.abs() > first.abs()).sum(),
                (first * second > 0).sum(),
            ]
        per_tensor.append(torch.stack(sums))
    of_tensors = torch.stack(per_tensor)
    return Dots(of_tensors.sum(0), of_tensors)


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
    directions = [_wide(d).clone() for d in direction]  # may be old_params
    if saves:
        for w, old in zip(params, old_params, strict=True):
            old.copy_(w)
    note(journal, True)
    norm = norm_of(square, params[0].dtype)
    # A zero norm has no direction, a non-finite one would put nan into every weight.
    perturbs = (norm > 0) & norm.isfinite()
    # rho as a tensor: PyTorch divides a number by a tensor with a reciprocal, an ulp off.
    radius = rho if isinstance(rho, Tensor) else torch.full_like(norm, rho)
    scale = radius / (norm + eps)
    for i, (p, old, d) in enumerate(zip(params, old_params, directions, strict=True)):
        w = _wide(old)
        if eta is not None:
            d = (w.abs() + eta) * (w.abs() + eta) * d
        perturbed = w + _of_tensor(scale, i) * d
        if rounds_at_random and p.dtype is torch.bfloat16:
            perturbed = rounded_at_random(perturbed, _of_tensor(norm, i), i, like=p)
        p.copy_(torch.where(_of_tensor(perturbs, i), perturbed, w))


def restore_(params: TensorList, old_params: TensorList) -> None:
    for w, old in zip(params, old_params, strict=True):
        w.copy_(old)


def mix_(out: TensorList, mix: Mix, *, keeps: bool = False) -> None:
    for i, target in enumerate(out):
        u = _mixed(mix, i)
        target.copy_(_unless_skipped(mix, u, _wide(target) if keeps else torch.zeros_like(u)))


def sgd_(
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    mix: Mix,
    options: SgdOptions,
    journal: list[bool] | None = None,
) -> None:
    note(journal, False)
    for i, (w, old) in enumerate(zip(params, old_params, strict=True)):
        u = _mixed(mix, i)
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
                undamped = options.one_minus_dampening
                factor = 1 - options.dampening if undamped is None else undamped
                new = options.momentum * kept + factor * u
            u = u + options.momentum * new if options.nesterov else new
            buffer.copy_(_unless_skipped(mix, new, kept))
        updated = _wide(old) - options.lr * u
        w.copy_(_unless_skipped(mix, updated, _wide(old)))
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
    scaled = [
        _wide(g) * (1 + rho * _curvature(_wide(product)))
        for g, product in zip(grads, hessian_products, strict=True)
    ]
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
    dtype = _wide(params[0]).dtype
    counts = torch.stack(list(steps)).double() + 1
    power = torch.pow if dtype is torch.float64 else _power
    first_corrections = (1 - power(options.beta1, counts)).to(dtype)
    second_corrections_sqrt = (1 - power(options.beta2, counts)).sqrt().to(dtype)
    for i, (w, old) in enumerate(zip(params, old_params, strict=True)):
        u = _mixed(mix, i)
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
        exp_avgs[i].copy_(_unless_skipped(mix, new_m, m))
        exp_avg_sqs[i].copy_(_unless_skipped(mix, new_v, v))
        w.copy_(_unless_skipped(mix, updated, _wide(old)))
        steps[i].copy_(_unless_skipped(mix, steps[i] + 1, steps[i]))
    note(journal, True)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _curvature(product: Tensor) -> Tensor:
    """Return D = |Hv|; of 4-D tensors, its mean over the last two dimensions, in their order."""
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
    """Return the correctly rounded root: PyTorch's of float32 may be an ulp off on the CPU."""
    return x.double().sqrt().to(x.dtype)


def _power(base: float, exponents: Tensor) -> Tensor:
    """Return base ** exponents, 0 <= base < 1, by squaring, as csrc/update_math.h does it: the same
    bits everywhere. They are off by at most an ulp for every multiplication that the power stands
    for, which float32 would not show."""
    whole = exponents.nan_to_num(0.0).clamp(0.0, 2.0**62)  # no integer holds much more
    powers, rest = torch.ones_like(exponents), whole.long()
    while base > 0:
        powers = torch.where(rest % 2 == 1, powers * base, powers)
        rest = rest // 2
        base = base * base
    return torch.where(rest > 0, 0.0, powers)


def _mixed(mix: Mix, i: int) -> Tensor:
    x = _wide(mix.x[i])
    a, b = (_of_tensor(value, i) for value in (mix.a, mix.b))
    whole: float | Tensor = 1.0
    if mix.divisor is not None:
        # Tensors, as rho in perturb_.
        one = torch.ones_like(mix.divisor)
        a, b, whole = one * a / mix.divisor, one * b / mix.divisor, one / mix.divisor
    if mix.y is None:
        return a * x
    y = _wide(mix.y[i])
    if mix.function == "linear":
        return a * x + b * y
    if mix.function == "sign":
        return a * (x.abs() * y.sign())
    if mix.function == "damp":
        ratio = x / (y + 1e-8)
        return torch.where((ratio > 0) & (ratio < 1), a * x, whole * x)
    return a * (x * y)


def _of_tensor(value: Any, i: int) -> Any:
    """Return the number of tensor i, if there is one for each tensor."""
    return value[i] if isinstance(value, Tensor) and value.dim() == 1 else value


def _unless_skipped(mix: Mix, updated: Tensor, kept: Tensor) -> Tensor:
    takes_place = mix.takes_place()
    return updated if takes_place is None else torch.where(takes_place, updated, kept)
