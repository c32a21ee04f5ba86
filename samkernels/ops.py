"""Check lists of tensors, and hand the ops of the SAM family to one backend.

Lists that go together have equal length; tensor i of each has the same shape, dtype, device and
dense layout (strides). All tensors of a call share one device and one dtype out of float32,
bfloat16, float16 and float64. Arithmetic is in float32 (float64 for float64 tensors) and rounded
when it is stored; norms are float32 (float64). Nothing here makes the host wait for the device.

Every function takes `backend`: "auto" (the fastest that can serve), "native", "triton", "foreach"
or "reference". An op is its checks and a backend, and nothing else: a caller that has checked its
lists may call a backend, as the optimizers do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from samkernels import backends
from samkernels.backends import AdamOptions, Backend, Dots, Mix, SgdOptions, TensorList
from samkernels.backends.contract import FUNCTIONS, note, positions_of
from samkernels.checks import (
    check_adam_options,
    check_choice,
    check_hyperparameter,
    check_lists,
    check_non_negative,
    check_positive,
    check_scalar,
    check_scalars_of,
    check_sgd_options,
    check_steps,
    check_tensor,
    hyperparameter,
    is_dense,
    lists_of,
    signed_rho,
)

__all__ = [
    "FUNCTIONS",
    "ROUNDINGS",
    "Dots",
    "GradientStatistics",
    "Mix",
    "adam_",
    "add_",
    "all_reduce",
    "clipping_divisor",
    "dots",
    "gradient_statistics",
    "means_of",
    "mix_",
    "pack",
    "perturb_",
    "restore_",
    "sgd_",
    "sgd_hess_",
    "spread_overflow_",
    "sums_of",
    "total_of",
]

ROUNDINGS = ("nearest", "stochastic")

EPS = 1e-12  # is added to norms that divide, unless another number is given

_REPLACED = {
    "norms": "dots(tensors), whose roots they are",
    "weighted_norms": "dots(tensors, weights=weights), whose roots they are",
    "compare": "dots(first_grads, second_grads, weights)",
    "recombine_": "mix_(out, Mix(..))",
    "total_norm": "total_of(squares), whose root it is",
    "Norms": "Dots",
    "Comparison": "Dots",
}


def __getattr__(name: str) -> NoReturn:
    message = f"module {__name__!r} has no attribute {name!r}"
    if name in _REPLACED:
        message += f": samkernels.ops.{_REPLACED[name]}, is in its place"
    raise AttributeError(message)


class GradientStatistics(NamedTuple):
    """Holds how g1 and g2 compare over all elements, in tensors of shape () on the device.

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
def dots(
    *lists: TensorList,
    weights: TensorList | None = None,
    eta: float = 0.0,
    backend: str = "auto",
) -> Dots:
    """Add up inner products, over all elements, of one to three lists, each read once.

        lists            sums
        x                x.x
        x, with weights  |T x|^2, x.x                      T = |weights| + eta
        x, y             x.x, x.y, y.y
        x, y, z          x.x, x.y, y.y, z.z, [|y| > |x|], [x * y > 0]

    The last two count elements. From these sums come the norms of all combinations:
    |a x + b y|^2 = a^2 x.x + 2 a b x.y + b^2 y.y.

    Args:
        lists, weights: lists of n tensors (see the top of this module).
        eta: >= 0; needs weights.

    Returns:
        Sums in float64: those over all tensors, shape (s,), and those of each one, shape (n, s).
        They are not finite if an element is not.

    Raises:
        TypeError, ValueError: see `perturb_`; also for another number of lists, or weights with
            more than one.
    """
    if not 1 <= len(lists) <= 3:
        raise ValueError(f"dots of {len(lists)} lists: give one to three")
    check_non_negative("eta", eta)
    named = dict(zip("xyz", lists, strict=False))
    if weights is not None:
        if len(lists) > 1:
            raise ValueError(f"weights with {len(lists)} lists: they scale one list only")
        named["weights"] = weights
    elif eta != 0:
        raise ValueError(f"eta={eta} without weights: it is added to their absolute values")
    return _backend_for(backend, named, ()).dots(lists, weights, eta)


def total_of(parts: Sequence[Tensor]) -> Tensor:
    """Add up sums over parts: of squares, this gives that of everything.

    Args:
        parts: tensors of one shape; they may be on several devices.

    Returns:
        A tensor on parts[0].device.

    Raises:
        ValueError: parts is empty.
    """
    if not parts:
        raise ValueError("parts is empty: give at least one sum")
    if len(parts) == 1:
        return parts[0]
    return torch.stack([p.to(parts[0].device, non_blocking=True) for p in parts]).sum(0)


@torch.no_grad()
def pack(
    tensors: Sequence[Tensor | None], likes: TensorList, *, divisor: float = 1
) -> tuple[list[Tensor], list[Tensor]]:
    """Put tensors / divisor into few blocks of memory, for few messages; None becomes 0.

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
    """Copy tensors in float32 (float64 for float64), for add_."""
    return [t.to(torch.promote_types(t.dtype, torch.float32), copy=True).detach() for t in tensors]


@torch.no_grad()
def add_(sums: list[Tensor], tensors: TensorList) -> None:
    """Compute sums += tensors, where sums_of returned the sums."""
    if sums:
        torch._foreach_add_(sums, list(tensors))


@torch.no_grad()
def means_of(sums: list[Tensor], count: int, likes: TensorList) -> list[Tensor]:
    """Return sums / count in the dtypes of `likes`. The sums are used up."""
    if sums:
        torch._foreach_div_(sums, count)
    return [total.to(like.dtype) for total, like in zip(sums, likes, strict=True)]


@torch.no_grad()
def all_reduce(measured: Sequence[Dots], process_groups: Sequence[tuple[Any, ...]]) -> list[Dots]:
    """Add up the Dots of shards over processes, which gives those of whole tensors.

    All processes get the same bits, and none may stay away, not even one whose shards are empty.

    Args:
        measured: what `dots` returned.
        process_groups: for each of these, the process groups over which its tensors are sharded,
            one per dimension of the device mesh that cuts them; () if the tensors are whole.

    Returns:
        As `measured`, in one all-reduce for all that have groups and device in common.
    """
    whole = list(measured)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, groups in enumerate(process_groups):
        if groups:
            alike.setdefault((*groups, whole[i].total.device), []).append(i)
    for key, indices in alike.items():
        together = torch.cat([whole[i].per_tensor.flatten() for i in indices])
        for group in key[:-1]:
            torch.distributed.all_reduce(together, group=group)
        sums = together.split([whole[i].per_tensor.numel() for i in indices])
        for i, of_list in zip(indices, sums, strict=True):
            per_tensor = of_list.view_as(whole[i].per_tensor)
            whole[i] = Dots(per_tensor.sum(0), per_tensor)
    return whole


@torch.no_grad()
def perturb_(
    params: TensorList,
    direction: TensorList,
    old_params: TensorList,
    *,
    rho: float | Tensor,
    square: Tensor | None = None,
    eta: float | None = None,
    maximize: bool = False,
    eps: float = EPS,
    rounding: str = "nearest",
    saves: bool = True,
    journal: list[bool] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Save w in old_params, then move each parameter to w + e(w), in place.

        n = ||T * d||_2 over all tensors,  T = 1, or |w| + eta
        e(w) = rho * T^2 * d / (n + eps)

    An n that is zero or not finite perturbs nothing: without a gradient there is no direction, and
    one nan would reach every weight.

    Args:
        params: w, list of n tensors, moved.
        direction: d, n tensors; may be old_params itself.
        old_params: n tensors, overwritten with w.
        rho: radius >= 0, in units of ||w||_2; dimensionless with eta. A tensor on the device of the
            parameters, of one element or with one for each of them, is read there, and its values
            are not checked.
        square: n^2, if it is known or spans more than these tensors: float64 on their device, of
            shape (), or (n,) for a norm of each.
        eta: >= 0, added to |w|; None: T = 1.
        maximize: move to w - e(w): the neighbour that is worst for an objective that is maximized.
        eps: added to n, in the units of n.
        rounding: of w + e(w) to bfloat16: "nearest", or "stochastic": up or down at random, so that
            it is right on average, where nearest rounding loses all that is smaller than half a
            step of the weight. The random numbers are a function of n and of an element's place, so
            the same inputs give the same bits. Other dtypes are rounded to nearest.
        saves: False: old_params holds w already, and params is only written.
        journal: True is appended once old_params holds w and parameters may have moved: after an
            interrupt (Ctrl-C) an empty journal says that nothing has to be restored.

    Returns:
        n^2: `square`, or what was measured, of shape (), on the parameters' device.

    Raises:
        TypeError: something that is no tensor, or of a dtype that is not supported.
        ValueError: lengths, shapes, dtypes, devices or layouts differ, a tensor is sparse, tensors
            overlap that are written, or rho, eta or eps is negative or not finite. Raised before
            anything is written.
        RuntimeError: the backend that was named cannot serve these tensors.

    Source: Foret et al., arXiv:2010.01412; eta: Kwon et al., arXiv:2102.11600, and eta=0 as in
    davda54/sam.
    """
    check_non_negative("eps", eps)
    check_choice("rounding", rounding, ROUNDINGS)
    if eta is not None:
        check_non_negative("eta", eta)
    if not isinstance(rho, Tensor):
        check_non_negative("rho", rho)
    lists = {"params": params, "direction": direction, "old_params": old_params}
    written = ("params", "old_params") if saves else ("params",)
    chosen = _backend_for(backend, lists, written)
    if isinstance(rho, Tensor) and rho.dim() == 1 and len(rho) == len(params):
        check_scalar("rho", rho, params, per_tensor=True)
        rho = -rho if maximize else rho
    else:
        rho = signed_rho(rho, maximize, like=params[0])
    if square is None:
        weights = params if saves else old_params
        measured = chosen.dots([direction], None if eta is None else weights, eta or 0.0)
        square = measured.total[0]
    else:
        check_scalar("square", square, params, per_tensor=True, dtype=torch.float64)
    chosen.perturb_(
        params,
        direction,
        old_params,
        square=square,
        rho=rho,
        eta=eta,
        eps=eps,
        rounds_at_random=rounding == "stochastic",
        journal=journal,
        saves=saves,
    )
    if saves:
        torch.autograd.graph.increment_version(old_params)  # backends leave this out
    return square


@torch.no_grad()
def restore_(
    params: TensorList,
    old_params: TensorList,
    *,
    backend: str = "auto",
) -> None:
    """Set params = old_params, bit for bit, in place.

    Raises:
        TypeError, ValueError, RuntimeError: see `perturb_`.
    """
    lists = {"params": params, "old_params": old_params}
    _backend_for(backend, lists, ("params",)).restore_(params, old_params)


@torch.no_grad()
def mix_(out: TensorList, mix: Mix, *, keeps: bool = False, backend: str = "auto") -> None:
    """Set out = u, which takes the gradient's place; 0 where the step is skipped.

        function     u
        "linear"     a * x + b * y;  a * x without y
        "sign"       a * |x| * sign(y),  sign(0) = 0
        "damp"       a * x where 0 < x / (y + 1e-8) < 1, else x
        "product"    a * x * y

    u is divided by mix.divisor, if that is given.

    Args:
        out: list of n tensors, overwritten; may be one of the lists of the mix.
        mix: lists of n tensors, numbers, and what skips a step: see `Mix`. Numbers may be tensors
            on the device of the lists, in float32 (float64 for float64 lists): a and b of shape (),
            or (n,) for one of each tensor, divisor and found_inf of shape ().
        keeps: where the step is skipped, leave out as it was, as state of an optimizer has to.

    Raises:
        TypeError, ValueError, RuntimeError: see `perturb_`; also an unknown function, or one that
            lacks its second list.
    """
    chosen = _backend_for(backend, {"out": out, **lists_of(mix)}, ("out",))
    check_scalars_of(mix)
    chosen.mix_(out, mix, keeps=keeps)


@torch.no_grad()
def sgd_(
    params: TensorList,
    old_params: TensorList,
    mix: Mix,
    momentum_buffers: TensorList | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    init_momentum: bool = False,
    backend: str = "auto",
) -> None:
    """Restore, mix and update in one pass, as torch.optim.SGD does from w with the gradient u.

        u as in mix_;  u = -u if maximize;  u += weight_decay * w
        buf = u if init_momentum, else momentum * buf + (1 - dampening) * u
        d = u + momentum * buf if nesterov, else buf (u without momentum)
        params = w - lr * d

    Args:
        params: list of n tensors, overwritten.
        old_params: w, n tensors; may be params itself.
        mix: what u is made of, lists of n tensors (see `mix_`); Mix(gradients) is u = gradients.
            Where it skips the step, on the device, params = old_params, and buf
            stays (0 if init_momentum).
        momentum_buffers: buf, updated; needed if momentum is not 0.
        init_momentum: buf holds nothing yet.
        lr: >= 0. A tensor of one element on the device of the parameters is read there, and its
            value is not checked.

    Raises:
        TypeError, ValueError, RuntimeError: see `mix_`.

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
    lists = {"params": params, "old_params": old_params, **lists_of(mix)}
    if momentum == 0:
        momentum_buffers = None
    if momentum_buffers is not None:
        lists["momentum_buffers"] = momentum_buffers
    chosen = _backend_for(backend, lists, ("params", "momentum_buffers"))
    check_scalars_of(mix)
    options = SgdOptions(
        lr=hyperparameter("lr", lr, params[0]),
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        init_momentum=init_momentum,
    )
    chosen.sgd_(params, old_params, momentum_buffers, mix, options)


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
    """Step as torch.optim.SGD, with each gradient scaled by the curvature there, in one pass.

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
    journal: list[bool] | None = None,
) -> None:
    """Do `sgd_hess_` by a backend, without checks; the reference does what backends do not take."""
    odd = [i for i, p in enumerate(params) if positions_of(p) is None]
    if not odd:
        chosen.sgd_hess_(params, grads, hessian_products, momentum_buffers, rho, options, journal)
        return
    note(journal, False)
    even = [i for i in range(len(params)) if i not in odd]
    for one, part in ((chosen, even), (backends.get("reference"), odd)):
        if part:
            w, g, products = (
                [tensors[i] for i in part] for tensors in (params, grads, hessian_products)
            )
            buffers = None if momentum_buffers is None else [momentum_buffers[i] for i in part]
            one.sgd_hess_(w, g, products, buffers, rho, options)
    note(journal, True)


@torch.no_grad()
def adam_(
    params: TensorList,
    old_params: TensorList,
    mix: Mix,
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
    backend: str = "auto",
) -> None:
    """Restore, mix and update in one pass, as torch.optim.Adam does from w with the gradient u, or
    torch.optim.AdamW with decoupled_weight_decay.

        u as in mix_;  u = -u if maximize
        u += weight_decay * w, or w *= 1 - lr * weight_decay if decoupled_weight_decay
        t += 1;  m = beta1 * m + (1 - beta1) * u;  v = beta2 * v + (1 - beta2) * u^2
        params = w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Args:
        params: list of n tensors, overwritten.
        old_params: w, n tensors; may be params itself.
        mix: what u is made of, lists of n tensors (see `mix_`); Mix(gradients) is u = gradients.
            Where it skips the step, on the device, params = old_params, and m, v
            and t stay.
        exp_avgs, exp_avg_sqs: m and v, updated; zeros before the first step.
        steps: t, whole numbers, updated; float32 or float64 tensors of shape () on the device of
            the parameters, where they are read: they may differ, and the host does not wait for
            them. beta^t is made of them in float64, by squaring, which every kernel does alike.
        lr: >= 0. A tensor of one element on the device of the parameters is read there, and its
            value is not checked.
        eps: added to the root of v.

    Raises:
        TypeError, ValueError, RuntimeError: see `mix_`.

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
    lists = {"params": params, "old_params": old_params, **lists_of(mix)}
    lists |= {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    chosen = _backend_for(backend, lists, ("params", "exp_avgs", "exp_avg_sqs"))
    check_steps(steps, params)
    check_scalars_of(mix)
    options = AdamOptions(
        lr=hyperparameter("lr", lr, params[0]),
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled_weight_decay,
        maximize=maximize,
    )
    chosen.adam_(params, old_params, exp_avgs, exp_avg_sqs, steps, mix, options)


def gradient_statistics(
    measured: Sequence[Dots], numel: int, grad_scale: Tensor | None = None
) -> GradientStatistics:
    """Return statistics over several lists, from what dots(g1, g2, w) gave for each. They are those
    of gradients divided by grad_scale, if that is given.

    Args:
        numel: elements of all lists together, in all processes.
    """
    sums = total_of([of_list.total for of_list in measured])
    scale = 1 if grad_scale is None else grad_scale.to(sums.device, non_blocking=True)
    first_norm, second_norm = sums[0].sqrt(), sums[2].sqrt()
    statistics = (
        first_norm / scale,
        second_norm / scale,
        sums[3].sqrt(),
        sums[1] / (first_norm * second_norm),
        sums[4] / max(1, numel),
        sums[5] / max(1, numel),
    )
    return GradientStatistics(*(value.float() for value in statistics))


def clipping_divisor(norm: Tensor, max_norm: float, grad_scale: Tensor | None = None) -> Tensor:
    """Return what u is to be divided by so that a gradient of this norm is clipped: GradScaler's
    scale is part of it.

        max(1, (norm / grad_scale + 1e-6) / max_norm) * grad_scale

    Args:
        norm: shape (), of gradients that grad_scale multiplies.
        max_norm: > 0.

    Returns:
        A tensor of shape (), on the norm's device; not finite if the norm is not.

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


def _backend_for(backend: str, lists: Mapping[str, TensorList], written: Sequence[str]) -> Backend:
    backends.check_name(backend)
    check_lists(lists, written)
    dense = all(is_dense(t) for tensors in lists.values() for t in tensors)
    first = next(iter(lists.values()))[0]
    return backends.choose(backend, first.device, first.dtype, dense)[1]
