"""Batch normalisation in the second pass of SAM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_batchnorm_stats(model: nn.Module) -> Iterator[None]:
    """Leave running means, variances and batch counters of batch normalisation as they are.

    For the second pass of SAM, whose activations belong to w + e(w) and not to w. Layers in
    training mode still normalise with the statistics of the batch; layers in eval mode do what they
    did. Contexts may be nested, and exceptions leave the layers as they were found.

    Usage:

        with samkernels.frozen_batchnorm_stats(model):
            loss_fn(model(x), y).backward()

    Args:
        model: any module; layers that derive from PyTorch's BatchNorm1d, 2d, 3d and SyncBatchNorm
            are found in it. Instance normalisation, which keeps no statistics by default, is not
            covered.

    Raises:
        TypeError: model is no torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: give a torch.nn.Module")
    # A layer that does not track its statistics hands none over to update, and does not count;
    # momentum and buffers stay untouched.
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
