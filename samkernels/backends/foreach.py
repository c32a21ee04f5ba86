"""torch._foreach_*: a few launches per list on any device that PyTorch knows, nothing to compile.

Half-precision lists are computed on as float32 copies, so that results are rounded once, as in the
reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samkernels.backends.contract import Comparison, Norms, Recombination, SgdOptions, TensorList


def why_unavailable(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
    """None: the foreach functions fall back to a loop where a device has no fused kernel."""
    return None


def norms(tensors: TensorList, weights: TensorList | None) -> Norms:
    wide = _wide(tensors)
    if weights is not None:
        wide = torch._foreach_mul(torch._foreach_abs(_wide(weights)), wide)
    per_tensor = torch.stack(torch._foreach_norm(wide))
    return Norms(torch.linalg.vector_norm(per_tensor), per_tensor)


def perturb_(
    params: TensorList,
    grads: TensorList,
    old_params: TensorList,
    *,
    norm: Tensor,
    rho: float,
    adaptive: bool,
    eps: float,
) -> None:
    torch._foreach_copy_(old_params, params)
    perturbs = (norm > 0) & norm.isfinite()
    w, direction = _wide(params), _wide(grads)
    if adaptive:
        direction = torch._foreach_mul(torch._foreach_mul(w, w), direction)
    step = _zero_unless(perturbs, torch._foreach_mul(direction, rho / (norm + eps)))
    torch._foreach_copy_(params, torch._foreach_add(w, step))


def restore_(params: TensorList, old_params: TensorList) -> None:
    torch._foreach_copy_(params, old_params)


def recombine_(out: TensorList, recombination: Recombination) -> None:
    u = _recombined(recombination)
    if recombination.ascent_norm is not None:
        u = _zero_unless(recombination.ascent_norm.isfinite(), u)
    torch._foreach_copy_(out, u)


def sgd_(
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    recombination: Recombination,
    options: SgdOptions,
) -> None:
    u = _recombined(recombination)
    w = _wide(old_params)
    lr: float | Tensor = options.lr
    momentum: float | Tensor = options.momentum
    if options.maximize:
        u = torch._foreach_neg(u)
    if options.weight_decay != 0:
        u = torch._foreach_add(u, torch._foreach_mul(w, options.weight_decay))
    if recombination.ascent_norm is not None:
        # A skipped step is one with u = 0, lr = 0 and momentum = 1: decided on the device.
        takes = recombination.ascent_norm.isfinite()
        u = _zero_unless(takes, u)
        lr = torch.where(takes, lr, 0.0).to(w[0].dtype)
        momentum = torch.where(takes, momentum, 1.0).to(w[0].dtype)
    if momentum_buffers is not None:
        if options.init_momentum:
            new = u
        else:
            new = torch._foreach_mul(_wide(momentum_buffers), momentum)
            torch._foreach_add_(new, torch._foreach_mul(u, 1 - options.dampening))
        torch._foreach_copy_(momentum_buffers, new)
        u = torch._foreach_add(u, torch._foreach_mul(new, momentum)) if options.nesterov else new
    torch._foreach_copy_(params, torch._foreach_sub(w, torch._foreach_mul(u, lr)))


def compare(first_grads: TensorList, second_grads: TensorList) -> Comparison:
    g1, g2 = _wide(first_grads), _wide(second_grads)
    product = torch._foreach_mul(g1, g2)
    larger = torch._foreach_sub(torch._foreach_abs(g2), torch._foreach_abs(g1))
    sums = [
        _sum_of_squares(g1),
        _sum_of_squares(g2),
        torch.stack([x.sum(dtype=torch.float64) for x in product]).sum(),
        _count_positive(larger),
        _count_positive(product),
    ]
    return Comparison(torch.stack(sums), sum(g.numel() for g in first_grads))


def _wide(tensors: TensorList) -> TensorList:
    if tensors[0].dtype in (torch.float32, torch.float64):
        return list(tensors)
    return [t.float() for t in tensors]


def _recombined(recombination: Recombination) -> TensorList:
    magnitude = _wide(recombination.magnitude)
    if recombination.sign is not None:
        signs = torch._foreach_sign(_wide(recombination.sign))
        return list(torch._foreach_mul(torch._foreach_abs(magnitude), signs))
    if recombination.numerator is not None and recombination.denominator is not None:
        scale = recombination.numerator / (recombination.denominator + recombination.eps)
        if scale.dim() == 0:
            return list(torch._foreach_mul(magnitude, scale))
        return list(torch._foreach_mul(magnitude, list(scale.unbind())))
    return magnitude


def _zero_unless(condition: Tensor, tensors: TensorList) -> TensorList:
    """Copies in which all elements are 0 unless condition holds, also those that were nan or inf.

    A product with 0 would leave nan, and there is no foreach version of torch.where: the bits are
    multiplied as integers instead.
    """
    integer = torch.int64 if tensors[0].dtype is torch.float64 else torch.int32
    bits = torch._foreach_mul([t.view(integer) for t in tensors], condition.to(integer))
    return [b.view(tensors[0].dtype) for b in bits]


def _sum_of_squares(tensors: TensorList) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


def _count_positive(tensors: TensorList) -> Tensor:
    return torch.stack([(x > 0).sum() for x in tensors]).sum().double()
