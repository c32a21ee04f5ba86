"""Round to bfloat16 up or down at random, as csrc/update_math.h does, for the backends that are
written in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 0xFFFFFFFF


def rounded_at_random(values: Tensor, norm: Tensor, index: int, *, like: Tensor) -> Tensor:
    """Round each value to one of the two bfloat16 beside it, so that it is itself on average.

    The random numbers are a function of the norm, of the tensor's index in its list, and of the
    element's place in memory. What is a bfloat16 already, or not finite, stays.

    Args:
        values: float32 tensor to round.
        norm: float32 tensor of shape ().
        like: tensor whose elements lie in memory as those of the list do.

    Returns:
        A float32 tensor of the shape of `values`.
    """
    key = _mixed(_bits(norm) ^ _mixed(torch.full_like(norm, index, dtype=torch.int64)))
    random = _mixed((key + _places(like)) & _BITS)
    rounded = (_bits(values) + (random & 0xFFFF)) & 0xFFFF0000
    return torch.where(values.isfinite(), rounded.to(torch.int32).view(torch.float32), values)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).to(torch.int64) & _BITS


def _mixed(x: Tensor) -> Tensor:
    """Make random bits from a number of 32 bits (C. Wellons, "lowbias32")."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _BITS
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _BITS
    return x ^ (x >> 16)


def _places(like: Tensor) -> Tensor:
    """Return the place of each element in memory; with gaps or overlap, that of its index."""
    places = torch.arange(like.numel(), device=like.device)
    packed = torch.empty_like(like, device="meta")  # keeps the strides of a dense tensor
    if packed.stride() == like.stride():
        return places.as_strided(like.shape, like.stride())
    return places.view(like.shape)
