"""Adapt SAM to Lightning's automatic optimization. Manual optimization needs no adapter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from samkernels.batchnorm import frozen_batchnorm_stats
from samkernels.integrations._unwrap import sam_of

if TYPE_CHECKING:
    Base = Any
else:
    Base = object


class SAMLightningMixin(Base):
    """Makes a LightningModule that steps with SAM or a variant of it.

    training_step is called twice for each batch, the second time at w + e(w), where batch norm
    leaves its statistics alone and log() does nothing; what else should not happen twice asks
    `in_second_pass`. With accumulate_grad_batches, all micro-batches of a step make their first
    pass as they come, and their second one before the step. gradient_clip_val clips the second
    gradient; with "16-mixed", max_grad_norm of the optimizer takes its place. Batches for which
    training_step returns None are left out; if a step has no others, none is made. Whatever ends
    fit(), the weights are w.

    Usage:

        class Classifier(SAMLightningMixin, lightning.LightningModule):
            def configure_optimizers(self):
                return SAM(self.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

            def training_step(self, batch, batch_idx): ...

    on_train_batch_start and optimizer_step of your own call super()'s.

    Raises:
        TypeError: at the first step: the optimizer is another one.
        RuntimeError: on_train_batch_start was overridden and did not call super()'s.
    """

    in_second_pass = False
    _micro_batches: tuple[Any, ...] = ()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Keep the batch for its second pass (LightningModule.on_train_batch_start)."""
        is_first = batch_idx % self.trainer.accumulate_grad_batches == 0
        self._micro_batches = (*(() if is_first else self._micro_batches), (batch, batch_idx))
        return super().on_train_batch_start(batch, batch_idx)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """End the first pass, make the second and the step (LightningModule.optimizer_step)."""
        sam = sam_of(optimizer.optimizer)
        if not self._micro_batches or self._micro_batches[-1][1] != batch_idx:
            raise RuntimeError(
                "on_train_batch_start of SAMLightningMixin was not called: call "
                "super().on_train_batch_start(batch, batch_idx) in yours"
            )
        first_loss = optimizer_closure()
        try:
            if any(p.grad is not None for group in sam.param_groups for p in group["params"]):
                has_second_pass = sam.first_step()
                loss = self._second_pass(optimizer.optimizer) if has_second_pass else first_loss
                if loss is not None:
                    super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        finally:
            sam.restore()
            self._micro_batches = ()

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log in the first pass only (LightningModule.log)."""
        if not self.in_second_pass:
            super().log(*args, **kwargs)

    def _second_pass(self, optimizer: Any) -> Any:
        """Return the loss of the last micro-batch that has one."""
        strategy, loss = self.trainer.strategy, None
        takes_index = len(inspect.signature(self.training_step).parameters) > 1
        self.in_second_pass = True
        try:
            with frozen_batchnorm_stats(self):
                for batch, batch_idx in self._micro_batches:
                    output = strategy.training_step(*(batch, batch_idx)[: 1 + takes_index])
                    found = output["loss"] if isinstance(output, Mapping) else output
                    if found is not None:
                        found = found / self.trainer.accumulate_grad_batches
                        loss = strategy.backward(found, optimizer)
        finally:
            self.in_second_pass = False
        return loss
