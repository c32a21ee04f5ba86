"""Keep the statistics of batch normalisation out of the second pass of SAM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

# These ask track_running_stats whether there is anything to be updated.
MINDS_SWITCH = (_BatchNorm.forward, nn.SyncBatchNorm.forward)

Kept = list[tuple[nn.Module, str, Tensor, Tensor]]  # module, name of its buffer, buffer, copy


@contextmanager
def frozen_batchnorm_stats(model: nn.Module) -> Iterator[None]:
    """Leave running means, variances and batch counters as they are.

    For the second pass of SAM, whose activations belong to w + e(w) and not to w. Layers in
    training mode still normalise with the statistics of the batch; layers in eval mode do what they
    did. Contexts may be nested, and exceptions leave the layers as they were found.

    What is frozen:

    - PyTorch's BatchNorm1d, 2d, 3d and SyncBatchNorm, and what inherits their forward: they are
      told not to track.
    - Every other module, scripted ones included, by its buffers: they are copied on entry and put
      back on exit, bit for bit. All of them in a subclass of the above and in instance
      normalisation, and in modules whose buffers are vectors, as the u and v of spectral
      normalisation and what observers of quantization keep; in any other module those called
      running_* or num_batches_tracked.

    Not frozen are statistics that are kept elsewhere: in other matrices (queues, codebooks, and
    beside them the vectors of the same module), in parameters, in attributes that are no buffers.

    Usage:

        with samkernels.frozen_batchnorm_stats(model):
            loss_fn(model(x), y).backward()

    Args:
        model: any module.

    Raises:
        TypeError: model is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: give a torch.nn.Module")
    modules = list(model.modules())
    layers = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = _keep([m for m in modules if getattr(m.forward, "__func__", None) not in MINDS_SWITCH])
    try:
        # A layer that does not track its statistics hands none over to update, and does not count;
        # momentum and buffers stay untouched.
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        _put_back(kept)


def _keep(modules: list[nn.Module]) -> Kept:
    kept = []
    for module in modules:
        buffers = [(name, b) for name, b in module._buffers.items() if b is not None]
        # Keep both or none where one makes no sense without the other: a queue and its position.
        whole = isinstance(module, _NormBase) or all(_is_vector(b) for _, b in buffers)
        for name, buffer in buffers:
            is_statistic = name.startswith("running_") or name == "num_batches_tracked"
            if (whole or is_statistic) and not is_lazy(buffer):
                kept.append((module, name, buffer, torch.empty_like(buffer)))
    _copy([(copy, buffer) for _, _, buffer, copy in kept])
    return kept


def _put_back(kept: Kept) -> None:
    for module, name, buffer, copy in kept:
        if getattr(module, name, None) is not buffer:
            setattr(module, name, buffer)
        if buffer.shape != copy.shape:  # observers start empty
            buffer.data = torch.empty_like(copy)
    # After buffer.copy_(), a later backward would find what it saved overwritten.
    _copy([(buffer.data, copy) for _, _, buffer, copy in kept])


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    alike: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
    for to, of in pairs:
        lists = alike.setdefault((type(to), to.device, to.dtype), ([], []))
        lists[0].append(to)
        lists[1].append(of)
    with torch.no_grad():
        for lists in alike.values():
            torch._foreach_copy_(*lists)


def _is_vector(tensor: Tensor) -> bool:
    return sum(size != 1 for size in tensor.shape) <= 1
