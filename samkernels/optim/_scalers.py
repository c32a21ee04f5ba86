"""Do what torch.amp.GradScaler asks of SAM: find out whether unscale_() was called, which a scaler
keeps to itself; show an overflow of g1, which it would not see; and mind the scale."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

from samkernels import ops
from samkernels.backends import Mix
from samkernels.optim import _shards
from samkernels.optim._lists import Bucket
from samkernels.optim._perturbation import Perturbation

if TYPE_CHECKING:
    from samkernels.optim.sam import SAM


def _family(cls: type[GradScaler] = GradScaler) -> list[type[GradScaler]]:
    return [cls, *(c for subclass in cls.__subclasses__() for c in _family(subclass))]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _references() -> dict[str, int]:
    """Count the references to the classes of scalers: an instance is one more."""
    return {_name(cls): sys.getrefcount(cls) for cls in _family()}


# The references that there were beside those of the instances, when these were looked for last.
_without_scalers: dict[str, int] = {}


class Scalers:
    """Knows the GradScalers of this process that may have to do with one optimizer."""

    def __init__(self, optimizer: object) -> None:
        self._optimizer = id(optimizer)  # as scalers know it
        self._known: list[weakref.ref[GradScaler]] | None = None

    def refuse_unscaled(self) -> None:
        """Raise RuntimeError if the gradients that the optimizer has now are unscaled."""
        if self._known is None:
            self.look()
        if OptState.UNSCALED in self._stages():
            raise RuntimeError(
                "GradScaler.unscale_() was called before first_step, and cannot be called a second "
                "time for the gradients of the second pass: call it between the second backward "
                "and scaler.step(), or leave it out. scaler.step() unscales, and the perturbation "
                "does not depend on the scale; max_grad_norm clips without unscale_()."
            )

    def look(self) -> None:
        """Find scalers, unless one is known or there are none. It takes a while: once is enough."""
        if self._stages():
            return
        found: list[GradScaler] = []
        references = _references()
        if references != _without_scalers:  # so the first time: a scaler may be older than this
            classes = set(_family())
            found = [x for x in gc.get_objects() if type(x) in classes]
            _without_scalers.clear()
            _without_scalers.update(references)
            for scaler in found:
                _without_scalers[_name(type(scaler))] -= 1
        self._known = [weakref.ref(scaler) for scaler in found]

    def _stages(self) -> list[OptState]:
        scalers = [scaler() for scaler in self._known or ()]
        states = [getattr(s, "_per_optimizer_states", {}) for s in scalers]  # none if disabled
        return [of[self._optimizer]["stage"] for of in states if self._optimizer in of]


def spread_overflow(perturbation: Perturbation) -> None:
    """Have GradScaler find an overflow of g1 in g2, in whichever gradient comes first: when it
    looks, g1 is gone."""
    if perturbation.ascent_square is None:
        return
    spread = _OverflowOf(perturbation.ascent_square)
    perturbation.hooks = [
        slot.param.register_post_accumulate_grad_hook(spread)
        for slot in perturbation.slots
        if slot.param.requires_grad and slot.local.numel() > 0
    ]


def require_unscaled_g1(sam: SAM, perturbation: Perturbation) -> None:
    """Raise RuntimeError if a variant that minds the scale of g1 was not told of it."""
    if perturbation.is_unscaled:
        return
    if sam._direction_has_state or sam._axes.norm is None:
        why = "keeps g1 from step to step" if sam._direction_has_state else "takes no norm"
        raise RuntimeError(
            f"{type(sam).__name__} {why}, so the scale of a GradScaler matters: call "
            "first_step(grad_scale=scaler.get_scale()), which divides g1 first. The weights "
            "were restored."
        )


def require_same_scale(sam: SAM) -> None:
    """Raise RuntimeError if a rule compares g1 and g2, of which one was unscaled."""
    if (sam.keeps_g1 and sam.compares_scales) or sam.track_statistics:
        raise RuntimeError(
            "GradScaler.unscale_() was called: one of g1 and g2 was unscaled and the other was "
            "not, so their magnitudes cannot be compared. Leave unscale_() out; scaler.step() "
            "unscales both. The weights were restored."
        )


def unscale(sam: SAM, buckets: list[Bucket], grad_scale: float | Tensor) -> None:
    """Divide g1 by the scale, in place.

    Raises:
        ValueError: g2 would not be divided, and both are compared.
    """
    if sam.keeps_g1 or sam.track_statistics:
        raise ValueError(
            "grad_scale: g1 would be unscaled and g2 not, and their magnitudes are compared; "
            "leave it out, scaler.step() unscales both"
        )
    for bucket in buckets:
        scale = grad_scale if isinstance(grad_scale, Tensor) else torch.tensor(float(grad_scale))
        bucket.ops.mix_(bucket.grads, Mix(bucket.grads, divisor=bucket.bring(scale)))


class _OverflowOf:
    """A hook of several parameters, which spreads the overflow of a norm to the gradient of the one
    that it is called for first, each time that it gets one."""

    def __init__(self, square: Tensor) -> None:
        self._square = square
        self._carrier: Tensor | None = None

    def __call__(self, p: Tensor) -> None:
        if self._carrier is None:
            self._carrier = p
        if self._carrier is p and p.grad is not None:
            ops.spread_overflow_(_shards.local(p.grad), self._square)
