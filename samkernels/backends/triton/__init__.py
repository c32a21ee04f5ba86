"""Launch Triton kernels on the GPU: one launch per op over all tensors of a list.

The kernels (kernels/) find their tensors through two tables on the device (tables.py): a plan of
chunks, which depends on the sizes, and the addresses. Both are kept while sizes and addresses do
not change, and are copied over from pinned memory when they do, without the host waiting.

Imports within this folder are relative: tests import it a second time, for Triton's interpreter.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from samkernels.backends.contract import (
    AdamOptions,
    Dots,
    Mix,
    SgdOptions,
    TensorList,
    note,
    positions_of,
)
from samkernels.backends.contract import are_alike as are_alike
from samkernels.backends.contract import gradients_of as gradients_of
from samkernels.backends.contract import prepare as prepare
from samkernels.backends.contract import state_of as state_of
from samkernels.backends.contract import versions_of as versions_of

from . import availability, launching
from .availability import load_kernels
from .availability import why_unavailable as why_unavailable
from .launching import Launch, launch_of, on, run_over
from .tables import addresses_of, table_of


def dots(lists: Sequence[TensorList], weights: TensorList | None = None, eta: float = 0.0) -> Dots:
    read = dict(zip("xyz", lists, strict=False))
    if weights is not None:
        read["weights"] = weights
    num_lists, num_tensors = len(lists), len(lists[0])
    num_sums = num_lists * (num_lists + 1) // 2 if weights is None else 2
    device = lists[0][0].device
    sums: dict[str, Any] = {"dtype": torch.float64, "device": device}
    per_tensor = torch.empty(num_tensors, num_sums, **sums)
    total = torch.empty(num_sums, **sums)
    with on(device):
        table = table_of(read, launching.SUM_CHUNK)
        run_over(
            load_kernels().dots,
            table,
            launching.SUM_LAUNCH,
            torch.empty(table.chunks, num_sums, **sums),
            torch.zeros(num_tensors + 1, dtype=torch.int32, device=device),
            per_tensor,
            total,
            float(eta),
            LISTS=num_lists,
            WEIGHTED=weights is not None,
        )
    return Dots(total, per_tensor)


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
    if journal is not None and availability.is_interpreted():
        # An interrupt would come between two chunks.
        if saves:
            direction = [d.clone() for d in direction]  # it may be old_params
            torch._foreach_copy_(old_params, params)
        journal.append(True)
        journal = None
    lists = {"params": params, "direction": direction, "old_params": old_params}
    launch = launch_of(params[0])
    with on(params[0].device):
        run_over(
            load_kernels().perturb,
            table_of(lists, launch.block),
            launch,
            *_number_of(square),
            *_number_of(rho),
            None if eta is None else float(eta),
            float(eps),
            journal=journal,
            SAVES=saves,
            AT_RANDOM=rounds_at_random and params[0].dtype is torch.bfloat16,
        )
    _mark_written(params)


def restore_(params: TensorList, old_params: TensorList) -> None:
    launch = launch_of(params[0])
    with on(params[0].device):
        table = table_of({"params": params, "old_params": old_params}, launch.block)
        run_over(load_kernels().restore, table, launch)
    _mark_written(params)


def mix_(out: TensorList, mix: Mix, *, keeps: bool = False) -> None:
    lists = {"out": out, "x": mix.x, **_second_list_of(mix)}
    launch = launch_of(out[0])
    with on(out[0].device):
        run_over(
            load_kernels().mix,
            table_of(lists, launch.block),
            launch,
            *_scalars_of(mix),
            int(keeps),
            FUNCTION=_function_of(mix),
        )
    _mark_written(out)


def sgd_(
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    mix: Mix,
    options: SgdOptions,
    journal: list[bool] | None = None,
) -> None:
    lists = {"params": params, "old_params": old_params, "x": mix.x, **_second_list_of(mix)}
    if momentum_buffers is not None:
        lists["momentum_buffers"] = momentum_buffers
    launch = launch_of(params[0])
    with on(params[0].device):
        table = table_of(lists, launch.block)
        note(journal, False)
        run_over(
            load_kernels().sgd_step,
            table,
            launch,
            *_scalars_of(mix),
            *_sgd_scalars(options),
            FUNCTION=_function_of(mix),
            **_sgd_flags(momentum_buffers, options),
        )
    _mark_written(params, momentum_buffers or ())
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
    lists = {"params": params, "grads": grads, "hessian_products": hessian_products}
    if momentum_buffers is not None:
        lists["momentum_buffers"] = momentum_buffers
    counts, strides = zip(*(positions_of(p) or (0, 0) for p in params), strict=True)
    launch = launch_of(params[0])
    with on(params[0].device):
        table = table_of(lists, launch.block, counts, strides)
        note(journal, False)
        run_over(
            load_kernels().sgd_hess_step,
            table,
            launch,
            _scalar(rho),
            *_sgd_scalars(options),
            RHO_ON_DEVICE=isinstance(rho, Tensor),
            **_sgd_flags(momentum_buffers, options),
        )
    _mark_written(params, momentum_buffers or ())
    note(journal, True)


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
    lists = {"params": params, "old_params": old_params, "x": mix.x}
    lists |= {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, **_second_list_of(mix)}
    launch = launch_of(params[0])
    block = min(launch.block, launching.ADAM_PER_THREAD * 32 * launch.warps)
    launch = launch._replace(block=block)
    with on(params[0].device):
        table = table_of(lists, launch.block)  # is made before anything is written
        note(journal, False)
        bias_corrections = _count_steps(steps, mix, options)
        run_over(
            load_kernels().adam_step,
            table,
            launch,
            *_scalars_of(mix),
            _scalar(options.lr),
            float(options.beta1),
            float(1 - options.beta1),
            float(options.beta2),
            float(1 - options.beta2),
            float(options.eps),
            float(options.weight_decay),
            -1.0 if options.maximize else 1.0,
            bias_corrections,
            FUNCTION=_function_of(mix),
            DECAYS=options.weight_decay != 0,
            DECOUPLED=options.decoupled,
            LR_ON_DEVICE=isinstance(options.lr, Tensor),
        )
    _mark_written(params, exp_avgs, exp_avg_sqs, steps)
    note(journal, True)


def tune(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    numel: int = 2**24,
    seconds: Callable[[Callable[[], None]], float] | None = None,
) -> Launch:
    """Measure launching.CANDIDATES on a step over `numel` elements and keep the fastest for this
    process.

    It takes a second or so, waits for the device, and changes no result: sums are not tuned.

    Args:
        seconds: how long a function takes on the device; by default, the best of ten, by events.
    """
    key = (device, dtype)
    if availability.is_interpreted():
        return launching.untuned(device)
    if key in launching.tuned:
        return launching.tuned[key]
    seconds = seconds or launching.seconds_on_device
    w, g, old, buffer = ([torch.zeros(numel, dtype=dtype, device=device)] for _ in range(4))
    square = torch.ones((), dtype=torch.float64, device=device)
    options = SgdOptions(0.0, 0.9, 0.0, 0.0, False, False, False)

    def step() -> None:
        perturb_(
            w,
            g,
            old,
            square=square,
            rho=0.0,
            eta=None,
            eps=0.0,
            rounds_at_random=False,
            journal=None,
        )
        sgd_(w, old, buffer, Mix(g), options)

    times = {}
    for candidate in launching.CANDIDATES:
        launching.tuned[key] = candidate
        times[candidate] = seconds(step)
    launching.tuned[key] = min(times, key=lambda candidate: times[candidate])
    return launching.tuned[key]


def _count_steps(steps: TensorList, mix: Mix, options: AdamOptions) -> Tensor:
    """Count this step, unless it is skipped, and return the bias corrections for the kernel."""
    device = steps[0].device
    are_double = tuple(t.dtype is torch.float64 for t in steps)
    bias_corrections = torch.empty(len(steps), 2, dtype=torch.float32, device=device)
    launch = launching.COUNT_LAUNCH
    launching.run(
        load_kernels().count_steps,
        -(-len(steps) // launch.block),
        addresses_of({"steps": steps}, are_double),
        len(steps),
        _bits_of_minus(options.beta1),
        _bits_of_minus(options.beta2),
        mix.ascent_square,
        mix.found_inf,
        bias_corrections,
        BLOCK=launch.block,
        num_warps=launch.warps,
        enable_fp_fusion=False,
    )
    return bias_corrections


def _bits_of_minus(x: float) -> int:
    """Return the bits of -x in float64. Its sign is the highest bit, so Triton makes an int64."""
    (bits,) = struct.unpack("<q", struct.pack("<d", -x))
    return bits


def _scalars_of(mix: Mix) -> tuple[Any, ...]:
    """Return the arguments of every kernel that mixes."""
    numbers = (*_number_of(mix.a), *_number_of(mix.b))
    return *numbers, mix.divisor, mix.ascent_square, mix.found_inf


def _second_list_of(mix: Mix) -> dict[str, TensorList]:
    return {} if mix.y is None else {"y": mix.y}


def _function_of(mix: Mix) -> str:
    return "scale" if mix.y is None else mix.function


def _sgd_scalars(options: SgdOptions) -> tuple[Any, ...]:
    """Return the arguments of every kernel that ends in SGD's update."""
    undamped = options.one_minus_dampening
    return (
        _scalar(options.lr),
        float(options.momentum),
        float(1 - options.dampening) if undamped is None else undamped,
        float(options.weight_decay),
        -1.0 if options.maximize else 1.0,
    )


def _sgd_flags(momentum_buffers: TensorList | None, options: SgdOptions) -> dict[str, Any]:
    """Return the flags of kernels that end in SGD's update."""
    if momentum_buffers is None:
        momentum = load_kernels().NO_MOMENTUM
    else:
        momentum = (
            load_kernels().INIT_MOMENTUM
            if options.init_momentum
            else load_kernels().RUNNING_MOMENTUM
        )
    return {
        "MOMENTUM": momentum.value,
        "NESTEROV": options.nesterov,
        "DECAYS": options.weight_decay != 0,
        "LR_ON_DEVICE": isinstance(options.lr, Tensor),
        "DAMPENING_ON_DEVICE": options.one_minus_dampening is not None,
    }


def _scalar(value: float | Tensor) -> float | Tensor:
    """Return a float or a tensor, and no int: Triton would compile a kernel for it."""
    return value if isinstance(value, Tensor) else float(value)


def _number_of(value: float | Tensor) -> tuple[float | Tensor, int | None]:
    """Return a number and its stride, as `scalar_of` of the kernels takes them."""
    if not isinstance(value, Tensor):
        return float(value), None
    return value, value.stride(0) if value.dim() == 1 else 0


def _mark_written(*lists: Iterable[Tensor]) -> None:
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)
