"""Adapt SAM to Hugging Face's Trainer, and to those that derive from it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from samkernels.batchnorm import frozen_batchnorm_stats
from samkernels.integrations._unwrap import sam_of

if TYPE_CHECKING:
    Base = Any
else:
    Base = object


class SAMTrainerMixin(Base):
    """Makes a Trainer that steps with SAM or a variant of it.

    The micro-batches of a step make their first pass as they come; after the last of them, all make
    the second one. Then the Trainer goes on as ever: it clips (the second gradient), steps, and
    calls the scheduler. Whatever ends train(), the weights are w: so they may be saved after Ctrl-C
    or an exception. auto_find_batch_size starts anew from w.

    Usage:

        class SAMTrainer(SAMTrainerMixin, Trainer):
            pass

        SAMTrainer(
            ..., optimizer_cls_and_kwargs=(SAM, {"base_optimizer": AdamW, "rho": 0.05, "lr": 1e-4})
        )

    A training_step of your own makes both passes if it is of a class after the mixin:
    class SAMTrainer(SAMTrainerMixin, MyTrainer).

    Raises:
        TypeError: at the first step: the optimizer is another one.
    """

    _micro_batches: Any = ()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train (Trainer.train); the weights are w when it ends, however it does."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._restore()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Keep what Trainer.get_batch_samples() returns at the beginning of a step."""
        self._restore()  # auto_find_batch_size starts again within train()
        samples = super().get_batch_samples(*args, **kwargs)
        self._micro_batches = samples[0]
        return samples

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Make a first pass (Trainer.training_step); after the last one, the second passes, too."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            last = len(self._micro_batches) - 1
            sam = sam_of(self.optimizer)
            with sam.perturbed() as has_second_pass, frozen_batchnorm_stats(model):
                for i, inputs in enumerate(self._micro_batches if has_second_pass else ()):
                    with nullcontext() if i == last else self.accelerator.no_sync(model):
                        super().training_step(model, inputs, *args, **kwargs)
            self._micro_batches = ()
        return loss

    def _restore(self) -> None:
        if self.optimizer is not None:
            sam_of(self.optimizer).restore()
