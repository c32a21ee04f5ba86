"""Step with a closure, which may clear the gradients that it finds, as those of torch.optim do, or
leave none."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from samkernels.optim import _shards

if TYPE_CHECKING:
    from samkernels.optim.sam import SAM


class ClearingProbe:
    """Puts zeros in the place of the gradients that first_step took over, for the time of a call.
    When the first gradient of a backward pass comes, or the call is over, the zeros show whether
    the closure clears gradients: it would have replaced them, or written over them. Then they are
    removed, and backward makes new gradients as it does without them.

    Attributes:
        clears: the answer after the call; None if it neither cleared nor added gradients.
    """

    def __init__(self, grads: dict[Tensor, Tensor]) -> None:
        self.clears: bool | None = None
        # Something may be added to them all the same: -0 + g is g, bit for bit.
        self._zeros = {p: torch.full_like(g, -0.0) for p, g in grads.items()}
        self._versions = {p: _versions_of(zeros) for p, zeros in self._zeros.items()}
        self._hooks: list[Any] = []
        self._lock = threading.Lock()  # backward has a thread for each device

    def __enter__(self) -> None:
        for p, zeros in self._zeros.items():
            p.grad = zeros
        # Backward calls the hooks before it adds to `.grad`.
        self._hooks = [p.register_hook(self._begin) for p in self._zeros if p.requires_grad]

    def __exit__(self, error: object, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if error is None:
            self._look()

    def _begin(self, _: Tensor) -> None:
        with self._lock:
            if self._zeros:
                self._look()
                self.clears = bool(self.clears)

    def _look(self) -> None:
        for p, zeros in self._zeros.items():
            whole, here = _versions_of(zeros)
            known_whole, known_here = self._versions[p]
            if p.grad is not zeros or whole != known_whole:
                self.clears = True
            elif here != known_here:  # FSDP2 has added to the part that lies here
                self.clears = bool(self.clears)
            else:
                p.grad = None
        self._zeros.clear()


def _versions_of(tensor: Tensor) -> tuple[int, int]:
    return tensor._version, _shards.local(tensor)._version


def step_with_closure(sam: SAM, closure: Callable[[], Any]) -> Any:
    """Make a step, or what is left of it; see SAM.step. The caller clears the gradients and
    restores in any case."""
    if sam._perturbation is not None:
        if sam.is_perturbed:
            with torch.enable_grad():
                closure()
        _finish(sam)
        return None
    if sam._has_gradients:
        if not sam._closure_clears and _step_from_gradients(sam, closure):
            return None
        sam.zero_grad()  # they are of something else: leave no trace of them
    with torch.enable_grad():
        loss = closure()
    if sam._perturbation is None and _is_skipped(sam, loss):
        return loss
    if not sam.first_step():
        _finish(sam)
        return loss
    with torch.enable_grad():
        second_loss = closure()
    if sam._perturbation is None or not _is_skipped(sam, second_loss):
        _finish(sam)
    return loss


def _step_from_gradients(sam: SAM, closure: Callable[[], Any]) -> bool:
    """Make the step whose g1 is there. Return False, at w again, if the closure clears gradients,
    which only a call shows."""
    grads = {p: p.grad for p in sam._all_params() if p.grad is not None}
    sam.first_step()
    probe = ClearingProbe(grads) if sam._closure_clears is None else None
    del grads
    with probe or contextlib.nullcontext(), torch.enable_grad():
        loss = closure()
    if probe is not None and probe.clears is not None:
        sam._closure_clears = probe.clears
        if probe.clears:
            sam.restore()
            return False
    if sam._perturbation is None or not _is_skipped(sam, loss):
        _finish(sam)
    return True


def _is_skipped(sam: SAM, loss: Any) -> bool:
    """Say whether a closure left no gradient."""
    if sam._has_gradients:
        return False
    if loss is not None and not sam._has_warned:
        sam._has_warned = True
        warnings.warn(
            "the closure returned a loss and left no gradient, so no step was made: call "
            "loss.backward() in it. To skip a batch, let it return None.",
            stacklevel=2,
        )
    return True


def _finish(sam: SAM) -> None:
    if sam._perturbation is None:
        raise RuntimeError(
            "the closure made a step or a restore of its own: leave step(), second_step() and "
            "restore() out of it"
        )
    sam._second_step()
