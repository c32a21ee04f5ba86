"""The ops of the SAM family on lists of tensors: validated, and handed to one backend.

Lists that go together have equal length; tensor i of each has the same shape, dtype, device and
dense layout (strides). All tensors of a call share one device and one dtype out of float32,
bfloat16, float16 and float64. Arithmetic is in float32 (float64 for float64 tensors) and rounded
when it is stored; norms are float32 (float64). Nothing here makes the host wait for the device.

Every function takes `backend`: "auto" (the fastest that can serve), "native", "triton", "foreach"
or "reference". Checks and a backend is all that an op is: whoever has checked lists may go to a
backend straight, as the optimizers do.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from samkernels import backends
from samkernels.backends import (
    AdamOptions,
    Backend,
    Comparison,
    Norms,
    Recombination,
    SgdOptions,
    TensorList,
)
from samkernels.backends.contract import positions_of

__all__ = [
    "GRANULARITIES",
    "ROUNDINGS",
    "RULES",
    "Comparison",
    "GradientStatistics",
    "Norms",
    "adam_",
    "add_",
    "all_reduce",
    "clipping_divisor",
    "compare",
    "gradient_statistics",
    "means_of",
    "norms",
    "pack",
    "perturb_",
    "recombine_",
    "restore_",
    "sgd_",
    "sgd_hess_",
    "spread_overflow_",
    "sums_of",
    "total_norm",
    "weighted_norms",
]

RULES = ("sam", "samdirection", "sammagnitude")
GRANULARITIES = ("element", "tensor", "global")
ROUNDINGS = ("nearest", "stochastic")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EPS = 1e-12  # added to norms that divide, unless another one is given


class GradientStatistics(NamedTuple):
    """How g1 and g2 compare over all elements; tensors of shape () on the device.

    Attributes:
        first_grad_norm: ||g1||_2
        second_grad_norm: ||g2||_2
        weight_norm: ||w||_2 of the restored weights, before the update
        cosine: g1.g2 / (||g1|| ||g2||)
        share_second_larger: share of elements with |g2| > |g1|
        share_signs_agree: share of elements with g1 * g2 > 0
    """

    first_grad_norm: Tensor
    second_grad_norm: Tensor
    weight_norm: Tensor
    cosine: Tensor
    share_second_larger: Tensor
    share_signs_agree: Tensor


@torch.no_grad()
def norms(
    tensors: TensorList,
    weights: TensorList | None = None,
    *,
    backend: str = "auto",
) -> Norms:
    """L2 norms of all tensors together and of each one.

        ||s * x||_2,  s = |weights| if given, else 1

    Args:
        tensors, weights: lists of n tensors (see the top of this module).

    Returns:
        A norm of shape () and norms of shape (n,), not finite if an element is not.

    Raises:
        TypeError, ValueError: see `perturb_`.
    """
    lists = {"tensors": tensors} if weights is None else {"tensors": tensors, "weights": weights}
    chosen = _backend_for(backend, lists, ())
    return chosen.norms(tensors) if weights is None else chosen.weighted_norms(tensors, weights)[0]


def weighted_norms(
    tensors: TensorList, weights: TensorList, *, backend: str = "auto"
) -> tuple[Norms, Norms]:
    """norms(tensors, weights) and norms(tensors); the tensors are read once for both.

    Args, errors: see `norms`.
    """
    lists = {"tensors": tensors, "weights": weights}
    return _backend_for(backend, lists, ()).weighted_norms(tensors, weights)


def total_norm(parts: TensorList) -> Tensor:
    """The norm of everything from the norms of its parts: sqrt(sum of squares).

    Args:
        parts: tensors of shape (); they may be on several devices.

    Returns:
        shape (), on parts[0].device.

    Raises:
        ValueError: parts is empty.
    """
    if not parts:
        raise ValueError("parts is empty: give at least one norm")
    if len(parts) == 1:
        return parts[0]
    device, dtype = parts[0].device, parts[0].dtype
    # Squares of float32 would overflow from 2e19 on.
    together = torch.stack([p.to(device, torch.float64, non_blocking=True) for p in parts])
    return torch.linalg.vector_norm(together).to(dtype)


@torch.no_grad()
def pack(
    tensors: Sequence[Tensor | None], likes: TensorList, *, divisor: float = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """tensors / divisor in few blocks of memory, so that few messages carry them; 0 for None.

    Args:
        tensors, likes: lists of n; the sizes of the blocks depend on `likes` alone.

    Returns:
        blocks: flat, one for each device and dtype of `likes`.
        views: n views into them, tensor i with the shape, dtype, device and (if it is dense) layout
            of likes[i].

    Raises:
        TypeError, ValueError: a tensor is sparse or of a wrong dtype.
    """
    step = 16  # elements: every view begins where vector instructions like it
    places: dict[tuple[torch.device, torch.dtype], int] = {}
    offsets = []
    for like in likes:
        key = like.device, like.dtype
        offsets.append(places.get(key, 0))
        places[key] = offsets[-1] + -(-like.numel() // step) * step
    blocks = {
        (device, dtype): torch.zeros(size, dtype=dtype, device=device)
        for (device, dtype), size in places.items()
    }
    views = []
    for like, offset in zip(likes, offsets, strict=True):
        strides = torch.empty_like(like, device="meta").stride()
        views.append(blocks[like.device, like.dtype].as_strided(like.shape, strides, offset))
    filled, sources = [], []
    for i, (tensor, view) in enumerate(zip(tensors, views, strict=True)):
        if tensor is not None:
            check_tensor(f"tensors[{i}]", tensor)
            filled.append(view)
            sources.append(tensor)
    if filled:
        torch._foreach_copy_(filled, sources)
    for block in blocks.values():
        block.div_(divisor)
    return list(blocks.values()), views


def sums_of(tensors: TensorList) -> list[Tensor]:
    """Copies in float32 (float64 for float64), for add_."""
    return [t.to(torch.promote_types(t.dtype, torch.float32), copy=True).detach() for t in tensors]


@torch.no_grad()
def add_(sums: list[Tensor], tensors: TensorList) -> None:
    """sums += tensors, of which the former are what sums_of returned."""
    if sums:
        torch._foreach_add_(sums, list(tensors))


@torch.no_grad()
def means_of(sums: list[Tensor], count: int, likes: TensorList) -> list[Tensor]:
    """sums / count in the dtypes of `likes`. The sums are used up."""
    if sums:
        torch._foreach_div_(sums, count)
    return [total.to(like.dtype) for total, like in zip(sums, likes, strict=True)]


@torch.no_grad()
def all_reduce(
    measured: Sequence[Norms | Comparison], process_groups: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Norms and Comparisons of whole tensors, from those of the shards that lie here.

    n = sqrt(sum over processes of n_here^2), in float64; sums of a Comparison are added up. All
    processes get the same bits, and none may stay away, not even one whose shards are empty.

    Args:
        measured: what `norms`, `weighted_norms` and `compare` returned.
        process_groups: for each of these, the process groups over which its tensors are sharded,
            one per dimension of the device mesh that cuts them; () if the tensors are whole.

    Returns:
        As `measured`, in one all-reduce for all that have groups and device in common. numel is
        not touched: the number of elements is known without asking.
    """
    whole: list[Any] = list(measured)
    by_groups: dict[tuple[Any, ...], dict[int, Tensor]] = {}
    for i, groups in enumerate(process_groups):
        if groups:
            sums = _sums(whole[i])
            by_groups.setdefault((*groups, sums.device), {})[i] = sums
    for key, sums_of in by_groups.items():
        together = torch.cat(list(sums_of.values()))
        for group in key[:-1]:
            torch.distributed.all_reduce(together, group=group)
        sizes = [sums.numel() for sums in sums_of.values()]
        for i, sums in zip(sums_of, together.split(sizes), strict=True):
            whole[i] = _with_sums(whole[i], sums)
    return whole


def _sums(measured: Norms | Comparison) -> Tensor:
    """What may be added up over disjoint sets of elements: float64, shape (k,)."""
    if isinstance(measured, Comparison):
        return torch.cat([measured.sums, _sums(measured.second_norms)])
    return measured.per_tensor.double().square()  # no float32 is too large to be squared here


def _with_sums(measured: Any, sums: Tensor) -> Any:
    if isinstance(measured, Comparison):
        own = measured.sums.numel()
        second_norms = _with_sums(measured.second_norms, sums[own:])
        return Comparison(sums[:own], measured.numel, second_norms)
    dtype = measured.per_tensor.dtype
    return Norms(sums.sum().sqrt().to(dtype), sums.sqrt().to(dtype))


@torch.no_grad()
def perturb_(
    params: TensorList,
    grads: TensorList,
    old_params: TensorList,
    *,
    rho: float | Tensor,
    norm: Tensor | None = None,
    adaptive: bool = False,
    maximize: bool = False,
    eps: float = EPS,
    rounding: str = "nearest",
    journal: list[bool] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Save w in old_params, then move each parameter to w + e(w), in place.

        n = ||s * g||_2 over all tensors,  s = 1, or |w| if adaptive
        e(w) = rho * s^2 * g / (n + eps)

    An n that is zero or not finite perturbs nothing: without a gradient there is no direction, and
    one nan would reach every weight.

    Args:
        params, grads, old_params: lists of n tensors. old_params is overwritten with w.
        rho: radius >= 0, in units of ||w||_2; dimensionless if adaptive. A tensor of one element
            on the device of the parameters is read there, and its value is not checked.
        norm: n, if it is known or spans more than these tensors; shape (), on their device.
        maximize: move to w - e(w): the neighbour that is worst for an objective that is maximized.
        eps: added to n, in the units of n.
        rounding: of w + e(w) to bfloat16: "nearest", or "stochastic": up or down at random, so that
            it is right on average, where nearest rounding loses all that is smaller than half a
            step of the weight. The random numbers are a function of n and of an element's place, so
            the same inputs give the same bits. Other dtypes are rounded to nearest.
        journal: True is appended once old_params holds w and parameters may have moved: after an
            interrupt (Ctrl-C) an empty journal says that nothing has to be restored.

    Returns:
        n: shape (), on the parameters' device.

    Raises:
        TypeError: something that is no tensor, or of a dtype that is not supported.
        ValueError: lengths, shapes, dtypes, devices or layouts differ, a tensor is sparse, tensors
            overlap that are written, or rho or eps is negative or not finite. Raised before
            anything is written.
        RuntimeError: the backend that was named cannot serve these tensors.

    Source: Foret et al., arXiv:2010.01412; adaptive: Kwon et al., arXiv:2102.11600, as in
    davda54/sam.
    """
    _check_non_negative("eps", eps)
    check_choice("rounding", rounding, ROUNDINGS)
    if not isinstance(rho, Tensor):
        _check_non_negative("rho", rho)
    lists = {"params": params, "grads": grads, "old_params": old_params}
    chosen = _backend_for(backend, lists, ("params", "old_params"))
    rho = signed_rho(rho, maximize, like=params[0])
    if norm is None:
        norms = chosen.weighted_norms(grads, params)[0] if adaptive else chosen.norms(grads)
        norm = norms.total
    else:
        _check_norm("norm", norm, params, ())
    chosen.perturb_(
        params,
        grads,
        old_params,
        norm=norm,
        rho=rho,
        adaptive=adaptive,
        eps=eps,
        rounds_at_random=rounding == "stochastic",
        journal=journal,
    )
    torch.autograd.graph.increment_version(old_params)  # left out by backends
    return norm


@torch.no_grad()
def restore_(
    params: TensorList,
    old_params: TensorList,
    *,
    backend: str = "auto",
) -> None:
    """params = old_params, bit for bit, in place.

    Raises:
        TypeError, ValueError, RuntimeError: see `perturb_`.
    """
    lists = {"params": params, "old_params": old_params}
    _backend_for(backend, lists, ("params",)).restore_(params, old_params)


@torch.no_grad()
def recombine_(
    grads: TensorList,
    first_grads: TensorList | None = None,
    *,
    rule: str,
    granularity: str = "element",
    first_norm: Tensor | None = None,
    second_norm: Tensor | None = None,
    ascent_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    eps: float = EPS,
    backend: str = "auto",
) -> None:
    """Overwrite g2 (`grads`) with u, which takes the gradient's place in the base optimizer.

        rule            u, granularity "element"     u, "tensor" and "global"
        "sam"           g2                           g2
        "samdirection"  |g1| * sign(g2)              n1 / (n2 + eps) * g2
        "sammagnitude"  |g2| * sign(g1)              n2 / (n1 + eps) * g1

    n1 and n2 are the L2 norms of g1 and g2, per tensor or over all tensors; sign(0) = 0.

    Args:
        grads, first_grads: g2 and g1, lists of n tensors; g1 is not needed for "sam".
        first_norm, second_norm: n1 and n2 where they are known: shape () for "global", (n,) for
            "tensor".
        ascent_norm: the norm that the perturbation was made with, shape (). If it is not finite,
            u = 0.
        grad_scale: what the loss was multiplied with, shape (): u is divided by it. See
            torch.amp.GradScaler.
        found_inf: shape (); if it is not 0, u = 0.
        eps: added to the norm that divides.

    Raises:
        TypeError, ValueError, RuntimeError: see `perturb_`; also an unknown rule or granularity, or
            a missing g1.
    """
    lists = {"grads": grads}
    if first_grads is not None:
        lists["first_grads"] = first_grads
    chosen = _backend_for(backend, lists, ("grads",))
    recombined = _checked_recombination(
        chosen,
        grads,
        first_grads,
        rule=rule,
        granularity=granularity,
        first_norm=first_norm,
        second_norm=second_norm,
        ascent_norm=ascent_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        eps=eps,
    )
    if rule != "sam" or any(x is not None for x in (ascent_norm, grad_scale, found_inf)):
        # else u is g2 already
        chosen.recombine_(grads, recombined)


@torch.no_grad()
def sgd_(
    params: TensorList,
    old_params: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    init_momentum: bool = False,
    rule: str = "sam",
    granularity: str = "element",
    first_grads: TensorList | None = None,
    first_norm: Tensor | None = None,
    second_norm: Tensor | None = None,
    ascent_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    eps: float = EPS,
    backend: str = "auto",
) -> None:
    """Restore, recombine and update in one pass: torch.optim.SGD from w with u for its gradient.

        u as in recombine_;  u = -u if maximize;  u += weight_decay * w
        buf = u if init_momentum, else momentum * buf + (1 - dampening) * u
        d = u + momentum * buf if nesterov, else buf (u without momentum)
        params = w - lr * d

    Args:
        params: list of n tensors, overwritten.
        old_params: w, n tensors; may be params itself.
        grads: g2, n tensors.
        momentum_buffers: buf, updated; needed if momentum is not 0.
        init_momentum: buf holds nothing yet.
        lr: >= 0. A tensor of one element on the device of the parameters is read there, and its
            value is not checked.
        rule, granularity, first_grads, first_norm, second_norm, grad_scale, eps: see `recombine_`.
        ascent_norm, found_inf: shape (). If the norm that the perturbation was made with is not
            finite, or found_inf is not 0, the step is skipped on the device: params = old_params,
            and buf stays (0 if init_momentum).

    Raises:
        TypeError, ValueError, RuntimeError: see `recombine_`.

    Source: torch.optim.SGD.
    """
    check_sgd_options(
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
    )
    if momentum != 0 and momentum_buffers is None:
        raise ValueError(f"momentum={momentum}: give momentum_buffers, one per parameter")
    lists = {"params": params, "old_params": old_params, "grads": grads}
    if first_grads is not None:
        lists["first_grads"] = first_grads
    if momentum == 0:
        momentum_buffers = None
    if momentum_buffers is not None:
        lists["momentum_buffers"] = momentum_buffers
    chosen = _backend_for(backend, lists, ("params", "momentum_buffers"))
    recombined = _checked_recombination(
        chosen,
        grads,
        first_grads,
        rule=rule,
        granularity=granularity,
        first_norm=first_norm,
        second_norm=second_norm,
        ascent_norm=ascent_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        eps=eps,
    )
    options = SgdOptions(
        lr=hyperparameter("lr", lr, params[0]),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        init_momentum=init_momentum,
    )
    chosen.sgd_(params, old_params, momentum_buffers, recombined, options)


@torch.no_grad()
def sgd_hess_(
    params: TensorList,
    grads: TensorList,
    hessian_products: TensorList,
    momentum_buffers: TensorList | None = None,
    *,
    lr: float | Tensor,
    rho: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    init_momentum: bool = False,
    backend: str = "auto",
) -> None:
    """torch.optim.SGD with each gradient scaled by the curvature there, in one pass.

        D = |Hv|; for 4-D tensors the mean of |Hv| over the two last dimensions
        u = g * (1 + rho * D);  u = -u if maximize;  u += weight_decay * w
        buf = u if init_momentum, else momentum * buf + (1 - dampening) * u
        d = u + momentum * buf if nesterov, else buf (u without momentum)
        params = w - lr * d

    What is not finite in grads or hessian_products goes into the weights, as in torch.optim.SGD.

    Args:
        params: w, list of n tensors, updated.
        grads: g, n tensors.
        hessian_products: Hv, n tensors.
        momentum_buffers: buf, updated; needed if momentum is not 0.
        init_momentum: buf holds nothing yet.
        lr, rho: >= 0. A tensor of one element on the device of the parameters is read there, and
            its value is not checked.

    4-D tensors whose two last dimensions have no common stride (neither contiguous nor
    channels_last) are left to the reference, whatever the backend.

    Raises:
        TypeError, ValueError, RuntimeError: see `perturb_`.

    Source: D: Yao et al., arXiv:2006.00719 (AdaHessian); the rest: torch.optim.SGD.
    """
    check_sgd_options(
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
    )
    check_hyperparameter("rho", rho)
    if momentum != 0 and momentum_buffers is None:
        raise ValueError(f"momentum={momentum}: give momentum_buffers, one per parameter")
    if momentum == 0:
        momentum_buffers = None
    lists = {"params": params, "grads": grads, "hessian_products": hessian_products}
    if momentum_buffers is not None:
        lists["momentum_buffers"] = momentum_buffers
    chosen = _backend_for(backend, lists, ("params", "momentum_buffers"))
    rho = hyperparameter("rho", rho, params[0])
    options = SgdOptions(
        lr=hyperparameter("lr", lr, params[0]),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        init_momentum=init_momentum,
    )
    sgd_hess_with(chosen, params, grads, hessian_products, momentum_buffers, rho, options)


def sgd_hess_with(
    chosen: Backend,
    params: TensorList,
    grads: TensorList,
    hessian_products: TensorList,
    momentum_buffers: TensorList | None,
    rho: float | Tensor,
    options: SgdOptions,
) -> None:
    """`sgd_hess_` by a backend, without checks; what backends do not take goes to the reference."""
    odd = [i for i, p in enumerate(params) if positions_of(p) is None]
    if not odd:
        chosen.sgd_hess_(params, grads, hessian_products, momentum_buffers, rho, options)
        return
    even = [i for i in range(len(params)) if i not in odd]
    for one, part in ((chosen, even), (backends.get("reference"), odd)):
        if part:
            w, g, products = (
                [tensors[i] for i in part] for tensors in (params, grads, hessian_products)
            )
            buffers = None if momentum_buffers is None else [momentum_buffers[i] for i in part]
            one.sgd_hess_(w, g, products, buffers, rho, options)


@torch.no_grad()
def adam_(
    params: TensorList,
    old_params: TensorList,
    grads: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    rule: str = "sam",
    granularity: str = "element",
    first_grads: TensorList | None = None,
    first_norm: Tensor | None = None,
    second_norm: Tensor | None = None,
    ascent_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    norm_eps: float = EPS,
    backend: str = "auto",
) -> None:
    """Restore, recombine and update in one pass: torch.optim.Adam from w with u for its gradient,
    or torch.optim.AdamW with decoupled_weight_decay.

        u as in recombine_;  u = -u if maximize
        u += weight_decay * w, or w *= 1 - lr * weight_decay if decoupled_weight_decay
        t += 1;  m = beta1 * m + (1 - beta1) * u;  v = beta2 * v + (1 - beta2) * u^2
        params = w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        params: list of n tensors, overwritten.
        old_params: w, n tensors; may be params itself.
        grads: g2, n tensors.
        exp_avgs, exp_avg_sqs: m and v, updated; zeros before the first step.
        steps: t, whole numbers, updated; float32 or float64 tensors of shape () on the device of
            the parameters, where they are read: they may differ, and the host does not wait for
            them. beta^t is made of them in float64, by squaring, which every kernel does alike.
        lr: >= 0. A tensor of one element on the device of the parameters is read there, and its
            value is not checked.
        eps: added to the root of v.
        rule, granularity, first_grads, first_norm, second_norm, grad_scale: see `recombine_`.
        norm_eps: the eps of `recombine_`.
        ascent_norm, found_inf: shape (). If the norm that the perturbation was made with is not
            finite, or found_inf is not 0, the step is skipped on the device: params = old_params,
            and m, v and t stay.

    Raises:
        TypeError, ValueError, RuntimeError: see `recombine_`.

    Source: torch.optim.Adam, torch.optim.AdamW; amsgrad is not there.
    """
    check_adam_options(
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    lists = {"params": params, "old_params": old_params, "grads": grads}
    if first_grads is not None:
        lists["first_grads"] = first_grads
    lists |= {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    chosen = _backend_for(backend, lists, ("params", "exp_avgs", "exp_avg_sqs"))
    _check_steps(steps, params)
    recombined = _checked_recombination(
        chosen,
        grads,
        first_grads,
        rule=rule,
        granularity=granularity,
        first_norm=first_norm,
        second_norm=second_norm,
        ascent_norm=ascent_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        eps=norm_eps,
    )
    options = AdamOptions(
        lr=hyperparameter("lr", lr, params[0]),
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled_weight_decay,
        maximize=maximize,
    )
    chosen.adam_(params, old_params, exp_avgs, exp_avg_sqs, steps, recombined, options)


@torch.no_grad()
def compare(
    first_grads: TensorList,
    second_grads: TensorList,
    weights: TensorList,
    *,
    backend: str = "auto",
) -> Comparison:
    """Sums over all elements of g1^2, g2^2, g1 * g2, [|g2| > |g1|], [g1 * g2 > 0] and w^2, all read
    once.

    Raises:
        TypeError, ValueError, RuntimeError: see `perturb_`.
    """
    lists = {"first_grads": first_grads, "second_grads": second_grads, "weights": weights}
    return _backend_for(backend, lists, ()).compare(first_grads, second_grads, weights)


def gradient_statistics(
    comparisons: Sequence[Comparison], grad_scale: Tensor | None = None
) -> GradientStatistics:
    """Statistics over several lists, from what `compare` gave for each; of gradients divided by
    grad_scale if that is given."""
    device = comparisons[0].sums.device
    sums = torch.stack([c.sums.to(device, non_blocking=True) for c in comparisons]).sum(0)
    numel = max(1, sum(c.numel for c in comparisons))
    first_norm, second_norm = sums[0].sqrt(), sums[1].sqrt()
    scale = 1 if grad_scale is None else grad_scale.to(device, non_blocking=True)
    statistics = (
        first_norm / scale,
        second_norm / scale,
        sums[5].sqrt(),
        sums[2] / (first_norm * second_norm),
        sums[3] / numel,
        sums[4] / numel,
    )
    return GradientStatistics(*(value.float() for value in statistics))


def clipping_divisor(norm: Tensor, max_norm: float, grad_scale: Tensor | None = None) -> Tensor:
    """What u is to be divided by so that a gradient of this norm is clipped: as GradScaler's scale,
    which is part of it.

        max(1, (norm / grad_scale + 1e-6) / max_norm) * grad_scale

    Args:
        norm: shape (), of gradients that grad_scale multiplies.
        max_norm: > 0.

    Returns:
        shape (), on the norm's device; not finite if the norm is not.

    Raises:
        TypeError, ValueError: max_norm is not a finite number > 0.

    Source: torch.nn.utils.clip_grad_norm_.
    """
    check_positive("max_norm", max_norm)
    scale = 1.0 if grad_scale is None else grad_scale.reshape(()).to(norm.device, norm.dtype)
    return ((norm / scale + 1e-6) / max_norm).clamp(min=1.0) * scale


@torch.no_grad()
def spread_overflow_(tensor: Tensor, norm: Tensor) -> None:
    """Make one element of the tensor nan if the norm, of shape (), is not finite; else change no
    bit."""
    one = tensor[(0,) * tensor.dim()]
    one.sub_((norm * 0).to(one.device, one.dtype, non_blocking=True))


def check_sgd_options(
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Raise TypeError or ValueError unless these are hyperparameters of SGD."""
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        _check_non_negative(name, value)
    check_hyperparameter("lr", lr)
    _check_number("dampening", dampening)
    for name, flag in (("nesterov", nesterov), ("maximize", maximize)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {type(flag).__name__}: give True or False")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError("nesterov=True: momentum must be above 0 and dampening 0")


def signed_rho(rho: float | Tensor, maximize: bool, *, like: Tensor) -> float | Tensor:
    """rho as backends take it: negative to go against the gradient. Raises as `hyperparameter`."""
    rho = hyperparameter("rho", rho, like)
    return -rho if maximize else rho


def check_adam_options(
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """Raise TypeError or ValueError unless these are hyperparameters of Adam."""
    check_hyperparameter("lr", lr)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas is {betas!r}: give a pair of numbers")
    for i, beta in enumerate(betas):
        _check_non_negative(f"betas[{i}]", beta)
        if beta >= 1:
            raise ValueError(f"betas[{i}]={beta}: give a number below 1")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        _check_non_negative(name, value)
    flags = {"decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {type(flag).__name__}: give True or False")


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order of
    dimensions.

    Not so for wrappers such as DTensor, whose memory is elsewhere, and for views that PyTorch
    negates when it reads them.
    """
    if tensor.is_neg():
        return False
    if type(tensor) not in (Tensor, torch.nn.Parameter) and is_traceable_wrapper_subclass(tensor):
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of equal shape keep their elements in the same order; strides of size-1
    dims are moot."""
    if a.stride() == b.stride() or a.numel() == 0:
        return True
    pairs = zip(a.stride(), b.stride(), a.shape, strict=True)
    return all(stride_a == stride_b or size == 1 for stride_a, stride_b, size in pairs)


def of_rule(
    recombination: Recombination,
    first_grads: TensorList | None,
    *,
    rule: str,
    granularity: str,
    first_norm: Tensor | None,
    second_norm: Tensor | None,
    backend: Backend,
) -> Recombination:
    """The recombination of a rule of `recombine_`, from one that takes g2 as it is. Norms that are
    missing are measured; nothing is checked."""
    if rule == "sam":
        return recombination
    assert first_grads is not None
    grads = recombination.magnitude
    g1_stays = rule == "sammagnitude"  # else its magnitude does
    if granularity == "element":
        magnitude, sign = (grads, first_grads) if g1_stays else (first_grads, grads)
        return recombination._replace(magnitude=magnitude, sign=sign)
    field = "total" if granularity == "global" else "per_tensor"
    n1 = first_norm if first_norm is not None else getattr(backend.norms(first_grads), field)
    n2 = second_norm if second_norm is not None else getattr(backend.norms(grads), field)
    if g1_stays:
        return recombination._replace(magnitude=first_grads, numerator=n2, denominator=n1)
    return recombination._replace(numerator=n1, denominator=n2)


def _checked_recombination(
    chosen: Backend,
    grads: TensorList,
    first_grads: TensorList | None,
    *,
    rule: str,
    granularity: str,
    first_norm: Tensor | None,
    second_norm: Tensor | None,
    ascent_norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    eps: float,
) -> Recombination:
    check_choice("rule", rule, RULES)
    check_choice("granularity", granularity, GRANULARITIES)
    _check_non_negative("eps", eps)
    if rule != "sam" and first_grads is None:
        raise ValueError(f'first_grads is missing: rule="{rule}" needs the first gradients')
    scalars = {"ascent_norm": ascent_norm, "grad_scale": grad_scale, "found_inf": found_inf}
    measured = {"first_norm": first_norm, "second_norm": second_norm}
    shape = (len(grads),) if granularity == "tensor" else ()
    takes_norms = rule != "sam" and granularity != "element"
    for name, number in (scalars | measured).items():
        if number is not None and (name in scalars or takes_norms):
            _check_norm(name, number, grads, () if name in scalars else shape)
    return of_rule(
        Recombination(
            grads, eps=eps, ascent_norm=ascent_norm, grad_scale=grad_scale, found_inf=found_inf
        ),
        first_grads,
        rule=rule,
        granularity=granularity,
        first_norm=first_norm,
        second_norm=second_norm,
        backend=chosen,
    )


def _backend_for(backend: str, lists: Mapping[str, TensorList], written: Sequence[str]) -> Backend:
    backends.check_name(backend)
    _check_lists(lists, written)
    dense = all(is_dense(t) for tensors in lists.values() for t in tensors)
    first = next(iter(lists.values()))[0]
    return backends.choose(backend, first.device, first.dtype, dense)[1]


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless value is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, allowed))}")


def _check_number(name: str, value: float) -> None:
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        raise TypeError(f"{name} is {type(value).__name__}: give a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: give a finite number")


def _check_non_negative(name: str, value: float) -> None:
    _check_number(name, value)
    if value < 0:
        raise ValueError(f"{name}={value}: give a finite number >= 0")


def check_hyperparameter(name: str, value: float | Tensor) -> None:
    """Raise TypeError or ValueError unless this is a finite number >= 0, or a tensor of one
    element; what is on a device is not looked at."""
    if not isinstance(value, Tensor):
        return _check_non_negative(name, value)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name} is a tensor of shape {tuple(value.shape)} and {value.dtype}: give a number or "
            "a floating-point tensor of one element"
        )
    if value.device.type == "cpu":
        _check_non_negative(name, value.item())


def check_positive(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless this is a finite number > 0."""
    _check_non_negative(name, value)
    if value == 0:
        raise ValueError(f"{name}=0: give a finite number > 0")


def hyperparameter(name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """As backends take it: a float, or a tensor of shape () beside `like`."""
    check_hyperparameter(name, value)
    if not isinstance(value, Tensor):
        if value > torch.finfo(torch.float32).max and like.dtype is not torch.float64:
            raise ValueError(f"{name}={value}: give a number that float32 can hold")
        return float(value)
    if value.device.type == "cpu" and like.device.type != "cpu":
        return value.item()
    if value.device != like.device:
        raise ValueError(
            f"{name} is on {value.device}: give a number, or a tensor on {like.device}"
        )
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return value.detach().resolve_neg().reshape(()).to(dtype)


def _check_norm(name: str, norm: Tensor, tensors: TensorList, shape: tuple[int, ...]) -> None:
    if not isinstance(norm, Tensor):
        raise TypeError(f"{name} is {type(norm).__name__}: give a torch.Tensor")
    dtype = torch.float64 if tensors[0].dtype is torch.float64 else torch.float32
    if norm.shape != shape or norm.dtype is not dtype or norm.device != tensors[0].device:
        raise ValueError(
            f"{name} has shape {tuple(norm.shape)}, {norm.dtype} on {norm.device}: give shape "
            f"{shape}, {dtype} on {tensors[0].device}"
        )
    if not norm.is_contiguous():
        raise ValueError(f"{name} is not contiguous: give {name}.contiguous()")


def _check_steps(steps: TensorList, params: TensorList) -> None:
    if not isinstance(steps, (list, tuple)):
        raise TypeError(f"steps is {type(steps).__name__}: give a list of tensors")
    if len(steps) != len(params):
        raise ValueError(
            f"steps has {len(steps)} tensors and params has {len(params)}: give lists of equal "
            "length"
        )
    for i, step in enumerate(steps):
        check_step(f"steps[{i}]", step, params[i])
    check_disjoint("steps", steps)


def check_step(name: str, step: object, param: Tensor) -> None:
    """Raise TypeError or ValueError unless this is a step count that lies beside a parameter."""
    if not isinstance(step, Tensor):
        raise TypeError(f"{name} is {type(step).__name__}: give a torch.Tensor")
    fits = step.shape == () and step.dtype in (torch.float32, torch.float64)
    if not fits or step.device != param.device:
        raise ValueError(
            f"{name} has shape {tuple(step.shape)}, {step.dtype} on {step.device}: give shape (), "
            f"torch.float32 on {param.device}"
        )


def _check_lists(lists: Mapping[str, TensorList], written: Sequence[str]) -> None:
    """Names the list, the tensor's index and its shape in every error."""
    first_name, first_list = next(iter(lists.items()))
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} is {type(tensors).__name__}: give a list of tensors")
        if len(tensors) != len(first_list):
            raise ValueError(
                f"{name} has {len(tensors)} tensors and {first_name} has {len(first_list)}: "
                "give lists of equal length"
            )
        for i, tensor in enumerate(tensors):
            check_tensor(f"{name}[{i}]", tensor)
    if not first_list:
        raise ValueError(f"{first_name} is empty: give at least one tensor")

    for i, expected in enumerate(first_list):
        if expected.device != first_list[0].device or expected.dtype != first_list[0].dtype:
            raise ValueError(
                f"{first_name}[{i}] is {expected.dtype} on {expected.device} and {first_name}[0] "
                f"is {first_list[0].dtype} on {first_list[0].device}: call once per device and "
                "dtype"
            )
        for name, tensors in lists.items():
            check_matches(f"{name}[{i}]", tensors[i], f"{first_name}[{i}]", expected)
    _check_overlap(lists, written)


def check_tensor(name: str, tensor: object) -> None:
    """Raise unless `tensor` is a strided tensor of a supported dtype without overlap inside."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}: give a torch.Tensor")
    shape = tuple(tensor.shape)
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} of shape {shape} is sparse ({tensor.layout}): only dense tensors are "
            "supported; for an embedding, set sparse=False"
        )
    if tensor.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} of shape {shape} is {tensor.dtype}: give one of {allowed}")
    if overlaps_itself(tensor):
        raise ValueError(
            f"{name} of shape {shape} and strides {tensor.stride()} overlaps itself in memory: "
            "give a copy (.contiguous())"
        )


def check_disjoint(name: str, tensors: TensorList) -> None:
    """Raise ValueError if two of the tensors share memory, or are the same."""
    _check_overlap({name: tensors}, (name,))


def check_matches(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless shape, dtype, device and layout are those of another tensor."""
    for what, value, expected in (
        ("shape", tuple(tensor.shape), tuple(other.shape)),
        ("dtype", tensor.dtype, other.dtype),
        ("device", tensor.device, other.device),
    ):
        if value != expected:
            raise ValueError(
                f"{name} has {what} {value} and {other_name} has {expected}: they must agree "
                f"(shape {tuple(tensor.shape)})"
            )
    if not same_layout(tensor, other):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()} and "
            f"{other_name} has {other.stride()}: they must agree "
            f"(torch.empty_like({other_name}).copy_(..) makes them)"
        )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two of its elements share memory."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _check_overlap(lists: Mapping[str, TensorList], written: Sequence[str]) -> None:
    """No tensor that is written may share memory with another one.

    One that is read may be the very tensor at the same index of a list that is written. Tensors
    with gaps (slices)
    are told apart by their first address only: their ranges may interleave.
    """
    ranges: dict[tuple[int, int, int], tuple[str, bool]] = {}
    for list_name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            start = tensor.data_ptr()
            size = tensor.numel() if is_dense(tensor) else min(1, tensor.numel())
            if size == 0 or start == 0:
                continue
            key = (start, start + size * tensor.element_size(), i)
            name, is_written = f"{list_name}[{i}]", list_name in written
            other_name, other_written = ranges.get(key, (name, False))
            if is_written and other_written:
                _raise_overlap(other_name, name, tensor)
            ranges[key] = (name, is_written or other_written)

    end_of_any = end_of_written = 0
    last_any = last_written = ""
    for (start, end, i), (name, is_written) in sorted(ranges.items()):
        if start < end_of_written:
            _raise_overlap(last_written, name, next(iter(lists.values()))[i])
        if is_written and start < end_of_any:
            _raise_overlap(last_any, name, next(iter(lists.values()))[i])
        if end > end_of_any:
            end_of_any, last_any = end, name
        if is_written and end > end_of_written:
            end_of_written, last_written = end, name


def _raise_overlap(name: str, other_name: str, tensor: Tensor) -> None:
    raise ValueError(
        f"{name} and {other_name} (shape {tuple(tensor.shape)}) overlap in memory: "
        "give tensors of their own"
    )
