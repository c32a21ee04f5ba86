"""The compiled core, samkernels._C: C++ on the CPU, CUDA kernels on the GPU.

The core takes addresses and knows nothing of PyTorch. This file does what libtorch would have done
for it: the device guard, the current stream, workspaces from the caching allocator, and the version
    counters by which
autograd notices that a tensor it saved was overwritten.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from samkernels.backends.contract import Comparison, Norms, Recombination, SgdOptions, TensorList

try:
    from samkernels import _C

    IMPORT_ERROR: str | None = None
except ImportError as error:
    IMPORT_ERROR = f"the compiled core could not be imported: {error}"
    if (Path(__file__).parents[2] / "CMakeLists.txt").exists():
        IMPORT_ERROR += (
            " (these are the sources: pip install -e . builds the core here; what pip install . "
            "built is imported from any other folder)"
        )
    DTYPES = {}
else:
    DTYPES = {
        torch.float32: _C.DType.float32,
        torch.bfloat16: _C.DType.bfloat16,
        torch.float16: _C.DType.float16,
    }


def why_unavailable(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
    """Why the compiled core cannot serve such tensors, or None if it can."""
    if IMPORT_ERROR is not None:
        return IMPORT_ERROR
    if device.type not in ("cpu", "cuda"):
        return f"the compiled core has no kernels for {device.type} tensors"
    if dtype not in DTYPES:
        return f"the compiled core has no kernels for {dtype}"
    if not dense:
        return "the compiled core takes tensors that fill their memory without gaps or overlap"
    return _why_no_cuda() if device.type == "cuda" else None


def build_info() -> dict[str, str]:
    """How the core was built: compiler, openmp, cpu_variant (in use), cuda, cuda_archs."""
    return _C.build_info()


@lru_cache(maxsize=1)
def _why_no_cuda() -> str | None:
    if not build_info()["cuda"]:
        return "the core was built without CUDA (install again where nvcc is found)"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return _C.why_no_cuda()


def norms(tensors: TensorList, weights: TensorList | None) -> Norms:
    device = tensors[0].device
    per_tensor = torch.empty(len(tensors), dtype=torch.float32, device=device)
    total = torch.empty((), dtype=torch.float32, device=device)
    with _target(device) as target:
        numel = _numel(tensors)
        workspace = _workspace(target, numel, _C.NORMS_SUMS, device)
        _C.norms(
            target,
            numel,
            DTYPES[tensors[0].dtype],
            _addresses(tensors),
            None if weights is None else _addresses(weights),
            workspace.data_ptr(),
            per_tensor.data_ptr(),
            total.data_ptr(),
        )
    return Norms(total, per_tensor)


def perturb_(
    params: TensorList,
    grads: TensorList,
    old_params: TensorList,
    *,
    norm: Tensor,
    rho: float,
    adaptive: bool,
    eps: float,
    journal: list[bool] | None,
) -> None:
    with _target(params[0].device) as target:
        _C.perturb(
            target,
            _numel(params),
            DTYPES[params[0].dtype],
            _addresses(params),
            _addresses(grads),
            _addresses(old_params),
            norm.data_ptr(),
            rho,
            eps,
            adaptive,
            journal,
        )
    _mark_written(params, old_params)


def restore_(params: TensorList, old_params: TensorList) -> None:
    with _target(params[0].device) as target:
        _C.restore(
            target,
            _numel(params),
            DTYPES[params[0].dtype],
            _addresses(params),
            _addresses(old_params),
        )
    _mark_written(params)


def recombine_(out: TensorList, recombination: Recombination) -> None:
    with _target(out[0].device) as target:
        _C.recombine(
            target,
            _numel(out),
            DTYPES[out[0].dtype],
            _core_recombination(recombination),
            _addresses(out),
        )
    _mark_written(out)


def sgd_(
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    recombination: Recombination,
    options: SgdOptions,
) -> None:
    with _target(params[0].device) as target:
        _C.sgd(
            target,
            _numel(params),
            DTYPES[params[0].dtype],
            _core_recombination(recombination),
            _addresses(params),
            _addresses(old_params),
            None if momentum_buffers is None else _addresses(momentum_buffers),
            _C.SgdOptions(
                lr=options.lr,
                momentum=options.momentum,
                one_minus_dampening=1 - options.dampening,
                weight_decay=options.weight_decay,
                gradient_sign=-1.0 if options.maximize else 1.0,
                nesterov=options.nesterov,
                has_momentum=momentum_buffers is not None,
                init_momentum=options.init_momentum,
            ),
        )
    _mark_written(params, momentum_buffers or ())


def compare(first_grads: TensorList, second_grads: TensorList) -> Comparison:
    device = first_grads[0].device
    sums = torch.empty(_C.COMPARE_SUMS, dtype=torch.float64, device=device)
    with _target(device) as target:
        numel = _numel(first_grads)
        workspace = _workspace(target, numel, _C.COMPARE_SUMS, device)
        _C.compare(
            target,
            numel,
            DTYPES[first_grads[0].dtype],
            _addresses(first_grads),
            _addresses(second_grads),
            workspace.data_ptr(),
            sums.data_ptr(),
        )
    return Comparison(sums, sum(numel))


@contextlib.contextmanager
def _target(device: torch.device) -> Iterator[_C.Target]:
    """Where to run: PyTorch's number of threads, or the current stream of the tensors' device."""
    if device.type == "cpu":
        yield _C.cpu(torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            yield _C.cuda(torch.cuda.current_stream(device).cuda_stream)


def _numel(tensors: TensorList) -> list[int]:
    return list(map(Tensor.numel, tensors))


def _addresses(tensors: TensorList) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _workspace(target: _C.Target, numel: list[int], num_sums: int, device: torch.device) -> Tensor:
    return torch.empty(
        _C.workspace_bytes(target, numel, num_sums), dtype=torch.uint8, device=device
    )


def _core_recombination(recombination: Recombination) -> _C.Recombination:
    numerator, denominator = recombination.numerator, recombination.denominator
    ascent_norm = recombination.ascent_norm
    return _C.Recombination(
        magnitude=_addresses(recombination.magnitude),
        sign=None if recombination.sign is None else _addresses(recombination.sign),
        numerator=0 if numerator is None else numerator.data_ptr(),
        denominator=0 if denominator is None else denominator.data_ptr(),
        per_tensor=numerator is not None and numerator.dim() == 1,
        eps=recombination.eps,
        ascent_norm=0 if ascent_norm is None else ascent_norm.data_ptr(),
    )


def _mark_written(*lists: TensorList) -> None:
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)
