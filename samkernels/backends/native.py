"""Call the compiled core, samkernels._C: C++ on the CPU, CUDA kernels on the GPU.

The core does not link PyTorch. This file does what libtorch would have done for it: the device
guard, the current stream, workspaces from the caching allocator, and the version counters by which
autograd notices that a tensor it saved was overwritten.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samkernels.backends.contract import (
    FUNCTIONS,
    AdamOptions,
    Dots,
    Mix,
    SgdOptions,
    TensorList,
    positions_of,
)


def _why_not_of_these_sources(core: Any) -> str | None:
    """Say why this core is not to be called, or None: its functions may have other arguments."""
    interface = Path(__file__).parents[1] / "_C.pyi"
    if not interface.exists():  # a frozen application may leave it out
        return None
    if getattr(core, "INTERFACE", None) == hashlib.sha256(interface.read_bytes()).hexdigest():
        return None
    return (
        f"the compiled core {core.__file__} was built from other sources than the Python files "
        "beside it: install again (pip install -e . in a checkout, after each change of the core)"
    )


try:
    from samkernels import _C

    IMPORT_ERROR = _why_not_of_these_sources(_C)
    if IMPORT_ERROR is not None:
        warnings.warn(f"samkernels goes on without its core: {IMPORT_ERROR}", stacklevel=2)
except ImportError as error:
    IMPORT_ERROR = f"the compiled core could not be imported: {error}"
    if (Path(__file__).parents[2] / "CMakeLists.txt").exists():
        IMPORT_ERROR += (
            " (these are the sources: pip install -e . builds the core here; what pip install . "
            "built is imported from any other folder)"
        )
    elif find_spec("samkernels._C") is None:
        IMPORT_ERROR += (
            " (this package was built without it, by SAMKERNELS_CORE=OFF: install again without "
            "that where there is a C++17 compiler)"
        )

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_unavailable(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
    """Say why the compiled core cannot serve such tensors, or None if it can."""
    if IMPORT_ERROR is not None:
        return IMPORT_ERROR
    if device.type not in ("cpu", "cuda"):
        return f"the compiled core has no kernels for {device.type} tensors"
    if dtype not in DTYPES:
        return f"the compiled core has no kernels for {dtype}"
    if not dense:
        return "the compiled core takes tensors that fill their memory without gaps or overlap"
    return _why_no_cuda(device) if device.type == "cuda" else None


def build_info() -> dict[str, str]:
    """Say how the core was built: compiler, threads, cpu_variant (in use), cuda, cuda_archs."""
    return _C.build_info()


@lru_cache(maxsize=64)
def _why_no_cuda(device: torch.device) -> str | None:
    if not build_info()["cuda"]:
        return "the core was built without CUDA (install again where nvcc is found)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    with torch.cuda.device(device):
        return _C.why_no_cuda()


class PreparedList(list[Tensor]):
    """Holds tensors that the core has read. It is good until one of them gets other memory."""

    __slots__ = ("core", "state")
    core: _C.TensorList
    state: dict[str, list[Tensor]]  # of parameters: what `state_of` found last


def _prepared(tensors: TensorList, core: _C.TensorList) -> PreparedList:
    prepared = PreparedList(tensors)
    prepared.core, prepared.state = core, {}
    return prepared


def prepare(tensors: TensorList) -> TensorList:
    return _prepared(tensors, _C.TensorList(list(tensors)))


def are_alike(first: TensorList, *others: TensorList) -> bool:
    core = _core(first)
    return all(core.is_alike(_core(other)) for other in others)


def gradients_of(
    candidates: list[Tensor], params: TensorList
) -> tuple[TensorList, TensorList] | None:
    if type(params) is not PreparedList:
        return None
    read = _reader().gradients(candidates, params, params.core)
    if read is None:
        return None
    grads, core_of_grads, core_of_params = read
    if core_of_params is not params.core:
        params = _prepared(params, core_of_params)
    return params, _prepared(grads, core_of_grads)


def state_of(
    state: dict[Tensor, Any], params: TensorList, name: str, *, numbers: bool = False
) -> TensorList | None:
    if type(params) is not PreparedList:
        return None
    seen = params.state.pop(name, None)
    read = _reader().state(state, params, name, params.core, numbers, seen)
    if read is None:
        return None
    params.state[name] = read[0]
    return _prepared(*read)


def versions_of(tensors: TensorList) -> list[int]:
    return _reader().versions(tensors if isinstance(tensors, list) else list(tensors))


@lru_cache(maxsize=1)
def _reader() -> _C.TensorReader:
    return _C.TensorReader(Tensor, torch.nn.Parameter)


def dots(lists: Sequence[TensorList], weights: TensorList | None = None, eta: float = 0.0) -> Dots:
    x = lists[0]
    first = x[0]
    num_sums = _num_dots(len(lists), weights is not None)
    per_tensor = torch.empty(len(x), num_sums, dtype=torch.float64, device=first.device)
    total = torch.empty(num_sums, dtype=torch.float64, device=first.device)
    _run(first, _dots, lists, weights, eta, per_tensor, total)
    return Dots(total, per_tensor)


@lru_cache(maxsize=8)
def _num_dots(num_lists: int, weighted: bool) -> int:
    return _C.num_dots(num_lists, weighted)


def _dots(
    target: _C.Target,
    lists: Sequence[TensorList],
    weights: TensorList | None,
    eta: float,
    per_tensor: Tensor,
    total: Tensor,
) -> None:
    x, *others = map(_core, lists)
    y, z = (*others, None, None)[:2]
    workspace = _workspace(target, x, total)
    _C.dots(
        target,
        x,
        y,
        z,
        None if weights is None else _core(weights),
        eta,
        0 if workspace is None else workspace.data_ptr(),
        per_tensor.data_ptr(),
        total.data_ptr(),
    )


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
    assert square.dtype is torch.float64
    _run(
        params[0],
        _C.perturb,
        _core(params),
        _core(direction),
        _core(old_params),
        square.data_ptr(),
        _stride(square),
        *_scalar(rho),
        eta,
        eps,
        rounds_at_random,
        saves,
        journal,
    )
    _mark_written(params)


def restore_(params: TensorList, old_params: TensorList) -> None:
    _run(params[0], _C.restore, _core(params), _core(old_params))
    _mark_written(params)


def mix_(out: TensorList, mix: Mix, *, keeps: bool = False) -> None:
    _run(out[0], _C.mix, _core_mix(mix), _core(out), keeps)
    _mark_written(out)


def sgd_(
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    mix: Mix,
    options: SgdOptions,
    journal: list[bool] | None = None,
) -> None:
    _run(
        params[0],
        _C.sgd,
        _core_mix(mix),
        _core(params),
        _core(old_params),
        None if momentum_buffers is None else _core(momentum_buffers),
        _core_sgd_options(options, momentum_buffers is not None),
        journal,
    )
    _mark_written(params, momentum_buffers)


def sgd_hess_(
    params: TensorList,
    grads: TensorList,
    hessian_products: TensorList,
    momentum_buffers: TensorList | None,
    rho: float | Tensor,
    options: SgdOptions,
    journal: list[bool] | None = None,
) -> None:
    _run(
        params[0],
        _C.sgd_hess,
        _core(params),
        _core(grads),
        _core(hessian_products),
        None if momentum_buffers is None else _core(momentum_buffers),
        [positions_of(p) for p in params],
        *_scalar(rho)[:2],
        _core_sgd_options(options, momentum_buffers is not None),
        journal,
    )
    _mark_written(params, momentum_buffers)


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
    bias_corrections = torch.empty(len(params), 2, dtype=torch.float32, device=params[0].device)
    _run(
        params[0],
        _C.adam,
        _core_mix(mix),
        _core(params),
        _core(old_params),
        _core(exp_avgs),
        _core(exp_avg_sqs),
        _core(steps),
        bias_corrections.data_ptr(),
        _core_adam_options(options),
        journal,
    )
    _mark_written(params, exp_avgs, exp_avg_sqs, steps)


def _run(first: Tensor, function: Callable[..., None], *args: Any) -> None:
    """function(target, *args); target: PyTorch's number of threads, or the current stream of the
    device that the first tensor is on."""
    if not first.is_cuda:  # in a sixth of the time of first.device.type
        function(_cpu(torch.get_num_threads()), *args)
        return
    with torch.cuda.device(first.device):
        function(_C.cuda(torch.cuda.current_stream(first.device).cuda_stream), *args)


@lru_cache(maxsize=8)
def _cpu(num_threads: int) -> _C.Target:
    return _C.cpu(num_threads)


def _core(tensors: TensorList) -> _C.TensorList:
    return tensors.core if type(tensors) is PreparedList else _C.TensorList(list(tensors))


def _address(x: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
    if x is None:
        return 0
    assert x.dtype is dtype  # the core reads addresses
    return x.data_ptr()


def _stride(x: Tensor) -> int:
    """Return the stride of numbers for each tensor; 0 for one number for all."""
    return x.stride(0) if x.dim() == 1 else 0


def _scalar(x: float | Tensor) -> tuple[float, int, int]:
    """Return a number as value, address and stride. One on the device is read there."""
    return (0.0, _address(x), _stride(x)) if isinstance(x, Tensor) else (x, 0, 0)


def _workspace(target: _C.Target, tensors: _C.TensorList, sums: Tensor) -> Tensor | None:
    """Make room for the sums of an op; None if the op makes its own, as on the CPU."""
    num_bytes = _C.workspace_bytes(target, tensors, sums.numel())
    return torch.empty(num_bytes, dtype=torch.uint8, device=sums.device) if num_bytes else None


def _core_mix(mix: Mix) -> _C.Mix:
    x, y, a, b, function, divisor, ascent_square, found_inf = mix
    return _C.Mix(
        _core(x),
        None if y is None else _core(y),
        *_scalar(a),
        *_scalar(b),
        FUNCTIONS.index(function),
        _address(divisor),
        _address(ascent_square, torch.float64),
        _address(found_inf),
    )


def _core_sgd_options(options: SgdOptions, has_momentum: bool) -> _C.SgdOptions:
    on_device = isinstance(options.lr, Tensor) or options.one_minus_dampening is not None
    make = _new_sgd_options if on_device else _kept_sgd_options
    return make(options, has_momentum)


def _new_sgd_options(options: SgdOptions, has_momentum: bool) -> _C.SgdOptions:
    lr, lr_address, _ = _scalar(options.lr)
    return _C.SgdOptions(
        lr=lr,
        lr_address=lr_address,
        momentum=options.momentum,
        one_minus_dampening=1 - options.dampening,
        one_minus_dampening_address=_address(options.one_minus_dampening),
        weight_decay=options.weight_decay,
        gradient_sign=-1.0 if options.maximize else 1.0,
        nesterov=options.nesterov,
        has_momentum=has_momentum,
        init_momentum=options.init_momentum,
    )


def _core_adam_options(options: AdamOptions) -> _C.AdamOptions:
    make = _new_adam_options if isinstance(options.lr, Tensor) else _kept_adam_options
    return make(options)


def _new_adam_options(options: AdamOptions) -> _C.AdamOptions:
    lr, lr_address, _ = _scalar(options.lr)
    return _C.AdamOptions(
        lr=lr,
        lr_address=lr_address,
        beta1=options.beta1,
        one_minus_beta1=1 - options.beta1,
        beta2=options.beta2,
        one_minus_beta2=1 - options.beta2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        gradient_sign=-1.0 if options.maximize else 1.0,
        decoupled=options.decoupled,
    )


# A number in memory is not kept: it may lie elsewhere the next time.
_kept_sgd_options = lru_cache(maxsize=256)(_new_sgd_options)
_kept_adam_options = lru_cache(maxsize=256)(_new_adam_options)


def _mark_written(params: TensorList, *state: TensorList | None) -> None:
    if any(state):
        params = [*params, *chain.from_iterable(filter(None, state))]
    torch.autograd.graph.increment_version(params)
