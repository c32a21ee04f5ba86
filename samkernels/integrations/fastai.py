"""Adapt SAM to fastai's Learner."""

from __future__ import annotations

from typing import Any

from fastai.callback.core import Callback, CancelBackwardException, CancelStepException
from fastai.callback.fp16 import MixedPrecision

from samkernels.batchnorm import frozen_batchnorm_stats
from samkernels.integrations._unwrap import sam_of
from samkernels.optim._scalers import require_same_scale


class SAMCallback(Callback):
    """Makes a Learner that steps with SAM or a variant of it.

    With GradientAccumulation, all batches of a step make their first pass as they come, and their
    second one before the step. GradientClip clips the second gradient. Whatever ends fit(), the
    weights are w.

    Usage:

        opt_func = partial(OptimWrapper, opt=SAM, base_optimizer=torch.optim.SGD, rho=0.05)
        Learner(dls, model, loss_func=loss_fn, opt_func=opt_func, cbs=SAMCallback)

    Raises:
        TypeError: at fit(): the optimizer is another one.
        ValueError: at fit(): MixedPrecision in float16 unscales the second gradient only, so that
            track_statistics and variants that compare it with the first (SAMDirection, GSAM, ...)
            would take gradients of two scales.
    """

    # GradientAccumulation has let the step through; nothing has unscaled or clipped gradients yet.
    order = MixedPrecision.order - 2
    run_valid = False

    def before_train(self) -> None:
        """Check the optimizer, and forget what an earlier fit() left."""
        self._micro_batches: list[tuple[Any, Any]] = []
        sam = sam_of(self.opt)
        scaler = vars(self.learn).get("scaler")
        if scaler is not None and scaler.is_enabled():
            try:
                require_same_scale(sam)
            except RuntimeError as error:
                raise ValueError(
                    "MixedPrecision in float16 unscales the second gradient only, and "
                    f"{type(sam).__name__} or its track_statistics compares it with the first: "
                    "call learn.to_bf16(), or take SAM without statistics"
                ) from error

    def after_backward(self) -> None:
        """Keep the batch for its second pass."""
        if not sam_of(self.opt).is_perturbed:
            self._micro_batches.append((self.xb, self.yb))

    def before_step(self) -> None:
        """Make the second pass and the step."""
        learn: Any = self.learn
        micro_batches, self._micro_batches = self._micro_batches, []
        names = ("xb", "yb", "pred", "loss", "loss_grad")
        of_first_pass = {name: getattr(learn, name) for name in names}
        sam = sam_of(self.opt)
        with sam.perturbed() as has_second_pass:
            with frozen_batchnorm_stats(self.model):
                for learn.xb, learn.yb in micro_batches if has_second_pass else ():
                    self._second_pass(learn)
            for name, value in of_first_pass.items():
                setattr(learn, name, value)
            # Here and not after this method, so that w comes back if one of them fails.
            callbacks = list(learn.cbs.sorted("order"))
            for callback in callbacks[callbacks.index(self) + 1 :]:
                callback("before_step")
            learn._step()
        raise CancelStepException  # it was made

    def _second_pass(self, learn: Any) -> None:
        if "mixed_precision" in vars(learn):
            learn.mixed_precision.before_batch()  # enters autocast
        learn.pred = learn.model(*learn.xb)
        learn("after_pred")
        learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
        learn.loss = learn.loss_grad.clone()
        learn("after_loss")
        learn._with_events(learn._backward, "backward", CancelBackwardException)
