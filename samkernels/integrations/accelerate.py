"""Adapt SAM to loops with Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from samkernels.batchnorm import frozen_batchnorm_stats
from samkernels.integrations._unwrap import sam_of


class TwoPasses:
    """Makes a loop's step with Accelerate: both passes, accumulation, the update.

    The micro-batches of a step make their first pass as they come; after the last of them all make
    the second one, and the optimizer steps. Whatever fails, the weights are w again, and what was
    accumulated is dropped. To clip, give the optimizer max_grad_norm.

    Usage:

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        passes = TwoPasses(accelerator, model, optimizer)
        for x, y in loader:
            loss = passes.step(lambda x, y: loss_fn(model(x), y), x, y)

    Args:
        accelerator: the accelerate.Accelerator.
        model, optimizer: as accelerator.prepare() returned them.

    Raises:
        TypeError: the optimizer is neither SAM nor a variant of it.
    """

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: Any) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self._sam = sam_of(optimizer)
        self._micro_batches: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = []

    def step(self, compute_loss: Callable[..., Tensor], *args: Any) -> Tensor:
        """Take one micro-batch: accumulate(), backward(), optimizer.step() and zero_grad().

        Args:
            compute_loss: called as compute_loss(*args) in each of the two passes.
            args: the batch. compute_loss takes nothing of the batch from elsewhere: with
                accumulation it is called again when the loop is at another one.

        Returns:
            The loss at w, detached.
        """
        accelerator = self.accelerator
        try:
            with accelerator.accumulate(self.model):
                loss = compute_loss(*args)
                accelerator.backward(loss)
                self._micro_batches.append((compute_loss, args))
                if accelerator.sync_gradients:
                    with self._sam.perturbed() as has_second_pass:
                        self._second_pass(has_second_pass)
                        self.optimizer.step()
                    self.optimizer.zero_grad()
        except BaseException:
            self._micro_batches.clear()
            self._sam.zero_grad()
            raise
        return loss.detach()

    def _second_pass(self, is_made: bool) -> None:
        micro_batches, self._micro_batches = self._micro_batches if is_made else [], []
        with frozen_batchnorm_stats(self.model):
            for i, (compute_loss, args) in enumerate(micro_batches, start=1):
                is_last = i == len(micro_batches)
                with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                    self.accelerator.backward(compute_loss(*args))
