"""Define SAM: the two-step protocol, without arithmetic on tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from samkernels.optim import _wrapping
from samkernels.optim._axes import Selected
from samkernels.optim._checkpoints import Checkpointed
from samkernels.optim._closures import step_with_closure
from samkernels.optim._compile import keep_out_of_graphs
from samkernels.optim._first import begin
from samkernels.optim._grad import without_grad
from samkernels.optim._parts import Parts, PartSums, check_parts, each_of
from samkernels.optim._perturbation import Perturbation, restore
from samkernels.optim._scalers import unscale
from samkernels.optim._update import finish, gradients
from samkernels.optim._variant import Base, Radius
from samkernels.optim.when import When

# The methods that torch.compile meets.
KEPT_OUT = ("first_step", "second_step", "step", "restore", "_add_part", "_average")

T = TypeVar("T")


class SAM(Checkpointed):
    """Sharpness-Aware Minimization around a base optimizer, with fused kernels.

    First step; n is taken over all parameters of all groups, rho is each group's own:

        n = ||T * g1||_2,  T = 1, or |w| if adaptive
        e(w) = rho * T^2 * g1 / (n + 1e-12)
        w <- w + e(w)

    Second step: w comes back bit for bit, and the base optimizer steps from it with u = g2, the
    gradient at w + e(w), in the gradient's place.

    With torch.optim.SGD, Adam and AdamW as base, restore, recombination and update are one kernel.
    Any other optimizer class finds u in `.grad` and makes its own step; so do subclasses of these
    three, Adam with amsgrad, and what somebody has hooked into.

    An n that is zero perturbs nothing. An n that is not finite perturbs nothing either, and the
    step is skipped without the host noticing: the three leave weights, momentum, moments and step
    counts as they were (which is why Adam's counts lie beside the parameters; a new momentum begins
    with the next u), other base optimizers step with u = 0. With maximize=True the perturbation
    goes against g1, so that maximizing f is minimizing -f.

    Usage:

        loss_fn(model(x), y).backward()
        optimizer.first_step()                     # takes the gradients over: .grad is None now
        loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)      # or optimizer.step()

    With torch.amp.GradScaler, scale the loss of both passes and call scaler.step(optimizer) for the
    second step: u is unscaled in the update, and a step whose gradients overflowed is skipped. To
    clip g2, scaler.unscale_(optimizer) may come between first_step and step; before first_step it
    is refused, since a scaler unscales once a step.

    In bfloat16 weights, whose precision is often coarser than the perturbation, w + e(w) is rounded
    up or down at random (ops.perturb_): right on average, and the same bits from the same inputs.
    w itself comes back exactly.

    With DistributedDataParallel, `perturbation` says along which g1 a rank goes: "global", the mean
    over all ranks; "local", its own (m-sharpness); "group", the mean over the ranks of
    process_group. u is made of the means over all ranks in any case, so all ranks have the same
    weights after each step, bit for bit; a g1 that is not finite makes all of them skip. With
    "local" and "group" the first pass goes into `first_pass`. `parts` is m-sharpness on one device.

    Parameters that torch.distributed.fsdp.fully_shard has sharded (DTensors) are worked on where
    they lie. Norms and statistics are those of whole tensors, by one all-reduce in each half of a
    step that needs them, so all processes have to make the same calls. FSDP2 must not hold gathered
    parameters then: a backward lets go of them, unless set_reshard_after_backward(False) or a later
    forward without a backward keeps them.

    Memory: one copy of the parameters, or of the shards, beside the base optimizer's state.

    Args:
        params: parameters or parameter groups, as for any torch.optim optimizer; a group may set
            its own rho, adaptive, and whatever the base optimizer knows. With an instance as base
            optimizer: its parameters, or groups like its own, which may set rho and adaptive.
        base_optimizer: a class, called as base_optimizer(param_groups, **base_options); or an
            instance, whose groups and state are taken over:

                SAM(params, torch.optim.Adadelta(params, lr=1.0, rho=0.9), rho=0.05)

            An instance keeps its options; one of SAM that has the name of one of them stands in
            the groups as sam_NAME: group["sam_rho"] here. By class, such a base is refused.
        rho: radius >= 0 of the neighbourhood, in units of ||w||_2; dimensionless if adaptive. Like
            lr, it may be a tensor of one element: on the parameters' device it is read there, and
            a CUDA graph sees what is written to it. A `ProportionScheduler` lets it follow lr.
        adaptive: ASAM's perturbation, as in davda54/sam.
        scaling: T: "elementwise", |w| + eta; "tensor", ||w_l||_2 of each tensor; "none", 1. None:
            as adaptive says. Each group may set its own.
        eta: of the elementwise scaling, >= 0.
        scaled: which parameters are scaled; T is 1 for the others. None: all; a list of parameters;
            or a function from a parameter's name to True or False, for model.named_parameters().
        subset: which are perturbed, likewise: n is taken over these only, as in SAM-ON, where it is
            `norm_parameters(model)`. With rho=0 in a group n would span that, too.
        mask: from parameters to tensors of 0 and 1 (any numbers) that multiply e(w), after n was
            taken: Sparse SAM. Parameters that are not in it are not masked.
        norm: "global"; "tensor": n of each tensor by itself, so that ||e|| = rho sqrt(number of
            tensors); None: e = rho * T^2 * g1, as in USAM, where a loss that is scaled scales e.
        when: in which steps there is a second pass: `Periodic`, `FromStep`, `Bernoulli` or
            `GradientNormPolicy`; None: in all. In the others u = g1. See `needs_second_pass`.
        perturb_eps: what is added to n.
        backend: "auto" takes, per device and dtype, the fastest that can serve (see `backends`);
            "native", "triton", "foreach" or "reference" insists on one.
        track_statistics: fill `statistics` in each second step.
        max_grad_norm: u is multiplied by min(1, max_grad_norm / (n + 1e-6)), n the norm over all
            parameters of the gradient that u has its magnitude of: of g2, as
            torch.nn.utils.clip_grad_norm_ between the steps would do it; SAMDirection: of g1. One
            reduction more, and no pass to scale. What WSAM subtracts beside u is not clipped. None:
            as it is.
        perturbation: "global", "local" or "group", see above; of no consequence in one process.
            DTensors take "global" only.
        process_group: for "group": the group that this rank is in.
        base_options: lr, momentum, weight_decay and so on; none for an instance.

    What the base optimizer does in a way of its own (state_dict, load_state_dict, add_param_group,
    zero_grad, and train and eval of schedule-free ones) is done in that way. `param_groups` and
    `state` are its own, also when they are assigned.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, an option of the
            base optimizer has the name of one of SAM, or an instance has other parameters; the
            message names it.
        RuntimeError: the backend that was named cannot serve a parameter.

    Source: Foret et al., arXiv:2010.01412; adaptive: Kwon et al., arXiv:2102.11600.
    """

    # For the time of a step torch.amp.GradScaler.step() sets grad_scale and found_inf, instead of
    # waiting for the device to know whether the step may be made.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: Base = torch.optim.SGD,
        rho: Radius = 0.05,
        adaptive: bool = False,
        *,
        scaling: str | None = None,
        eta: float = 0.0,
        scaled: Selected = None,
        subset: Selected = None,
        mask: Mapping[Tensor, Tensor] | None = None,
        norm: str | None = "global",
        when: When | None = None,
        perturb_eps: float = 1e-12,
        backend: str = "auto",
        track_statistics: bool = False,
        max_grad_norm: float | None = None,
        perturbation: str = "global",
        process_group: Any = None,
        **base_options: Any,
    ) -> None:
        options: dict[str, Any] = {"rho": rho, "adaptive": adaptive}
        if scaling is not None or eta != 0:
            options.update(scaling=scaling, eta=eta)
        for name, option in self.own_options.items():
            options[name] = base_options.pop(name, option.default)
        self._init(
            params,
            base_optimizer,
            options,
            base_options,
            scaled=scaled,
            subset=subset,
            mask=mask,
            norm=norm,
            when=when,
            perturb_eps=perturb_eps,
            backend=backend,
            track_statistics=track_statistics,
            max_grad_norm=max_grad_norm,
            perturbation=perturbation,
            process_group=process_group,
        )

    @without_grad
    def first_step(
        self, zero_grad: bool = False, *, grad_scale: float | Tensor | None = None
    ) -> bool:
        """Keep w, move to w + e(w) and take `.grad` over: it is None afterwards, unless there is no
        second pass.

        Args:
            zero_grad: accepted because davda54/sam has it; the gradients are taken over in any
                case, since a second backward that adds to them would give g1 + g2.
            grad_scale: what g1 is divided by first, such as scaler.get_scale(): for the variants
                that need it, which say so where a GradScaler is met.

        Returns:
            Whether there is a second pass to make. If not, the weights stay where they are, and
            second_step() takes what `.grad` holds: g1, or what a second backward has put there.

        Raises:
            RuntimeError: called twice, no parameter has a gradient, or a first_pass is missing;
                another optimizer has perturbed one of the parameters; GradScaler.unscale_() was
                called before.
            TypeError: a parameter with a gradient is a wrapper subclass that cannot be copied and
                copied back.
            ValueError: a gradient is sparse.
        """
        slots = self._slots
        if slots.perturbation is not None:
            raise RuntimeError(
                "first_step was called twice: call backward and second_step() (or step()) first, "
                "or restore() to undo the perturbation"
            )
        if self._meets_scaler:
            self._scalers.refuse_unscaled()
        groups, needs_second_pass = self.param_groups, self.needs_second_pass
        all_ranks = self._ranks.begin_step(groups, needs_second_pass)
        self._follow_schedule()
        try:
            buckets = slots.buckets(groups)
            slots.check_alone(buckets)
            if not buckets:
                raise RuntimeError(
                    "first_step found no gradient: call loss.backward() before it, and leave out "
                    "zero_grad() between the two"
                )
            perturbation = Perturbation(is_unscaled=grad_scale is not None)
            if grad_scale is not None:
                unscale(self, buckets, grad_scale)
            perturbation.has_second_pass = needs_second_pass and self._wants_by_norm(buckets)
            slots.hold(perturbation)
            begin(self, perturbation, buckets, all_ranks)
        except BaseException:
            self.restore()
            raise
        finally:
            slots.drop_gradients()
        return perturbation.has_second_pass

    def second_step(self, zero_grad: bool = False) -> None:
        """Bring w back and step the base optimizer from it: step(), after first_step().

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: first_step was not called, or no parameter has a gradient. The weights are
                restored.
        """
        if self._slots.perturbation is None:
            raise RuntimeError(
                "second_step was called without first_step: call first_step() before it"
            )
        try:
            self.step()  # not _second_step(): schedulers and hooks watch step()
        except BaseException:
            self.restore()  # a hook may have failed before step() had a chance to
            raise
        if zero_grad:
            self.zero_grad()

    @without_grad
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make the second step; with a closure, the whole of SAM.

        Args:
            closure: computes the loss, calls backward on it and returns it. It is called twice, at
                w and at w + e(w); once where there is no second pass; after first_step() once, at
                w + e(w). If it leaves no gradient, no step is made: the batch is skipped, with one
                warning if it returned a loss.

                Gradients that are there before: a closure that clears gradients, as closures of
                torch.optim do, leaves no trace of them. For one that does not, they are g1, and it
                is called once, at w + e(w), as davda54/sam has it. The first such step shows which
                of the two it is; if it clears, the step is made anew from w, with two more calls.

        Returns:
            The loss at w if the closure was called there, else None. A step with a closure leaves
                no gradients.

        Before any other step, and with lr and all gradients zero, it only makes the base
        optimizer's state: so torch.distributed.checkpoint asks for it.

        An interrupt such as Ctrl-C leaves the step made, for all groups, or not made for any. There
        are two exceptions, in which all weights are restored, and part of the state may be that of
        after the step: in the middle of a list, with a backend other than "native"; and in the step
        of a base optimizer that makes its own.

        Raises:
            RuntimeError: no first step was made and there is no closure; the closure made a step
                of its own; somebody wrote weights while they were at w + e(w); or see first_step
                and second_step. The weights are restored.
        """
        try:
            return self._step(closure)
        except BaseException:
            # What a GradScaler set would otherwise count in the next step.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            if self._slots.perturbation is None:
                if self._only_makes_state():
                    self._make_state()
                    return None
                # Where only some steps have a second pass, all of them go through first_step().
                if self.needs_second_pass or self._when is not None or self.counts_steps:
                    raise RuntimeError(
                        f"{type(self).__name__}.step() needs two gradients: call first_step() "
                        "after the first backward and step() after the second, or give step() a "
                        "closure. A framework's loop takes an adapter or another step function: "
                        'docs/recipes.md, "Hugging Face Trainer" (sentence-transformers, too), '
                        '"Lightning", "Accelerate", "fastai", "Ignite"'
                    )
                self.first_step()
            self._second_step()
            return None

        try:
            return step_with_closure(self, closure)
        finally:
            # So after a failure: the next step would take for g1 what the closure left.
            self.zero_grad()
            self.restore()

    @without_grad
    def restore(self) -> None:
        """Undo first_step, if it was called: w comes back bit for bit, g1 is dropped.

        Raises:
            RuntimeError: a parameter cannot be restored, since its memory was freed or its shape
                is another one now. All others are restored.
        """
        perturbation = self._perturbation
        if perturbation is None:
            return
        perturbation.remove_hooks()
        perturbation.settle()
        perturbation.record_streams()
        try:
            restore(perturbation.slots, self._slots)
        finally:
            if not perturbation.slots:
                self._perturbation = None

    @contextlib.contextmanager
    def perturbed(self, *, grad_scale: float | Tensor | None = None) -> Iterator[bool]:
        """Call first_step() on entry; if the body raises, restore the weights. The body learns
        whether there is a second pass to make, which only LookSAM and `when` make False.

        Usage:

            with optimizer.perturbed():
                loss_fn(model(x), y).backward()
                optimizer.step()
        """
        try:
            yield self.first_step(grad_scale=grad_scale)
        except BaseException:
            self.restore()
            raise

    def parts(self, batches: Iterable[T]) -> Parts[T]:
        """Let each of the m parts of a batch perturb along its own g1: m-sharpness on one device.

        The body makes both passes with its part; the weights are w again when the next one begins.
        After the last, everything is as after the second backward with one batch, but that g1 and
        g2 are the means over the parts: `.grad` has g2, which may be clipped, and step() makes the
        update. Like the ranks of perturbation="local", parts count alike: if they differ in size,
        weight their losses. A part whose g1 is not finite makes the step be skipped. If the body
        raises or breaks off, the weights are restored and all parts dropped, as soon as nobody
        holds the iterator: at once in a for loop over what this returns.

        Usage:

            for x, y in optimizer.parts(zip(xs.chunk(m), ys.chunk(m))):
                loss_fn(model(x), y).backward()
                optimizer.first_step()
                loss_fn(model(x), y).backward()
            optimizer.step()

        Memory: a copy of g2 more, in float32 for half precision; where g1 is kept, one of it too.

        Args:
            batches: what the body gets, one item after the other; one item is the usual step.

        Raises:
            RuntimeError: the body called no first_step or no backward after it, or it called
                step(), second_step() or restore(). The weights are restored.
        """
        check_parts(self)
        return Parts(lambda: each_of(self, batches))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as in torch.optim, and do what the base optimizer does beside that."""
        if _wrapping.overrides(self.base_optimizer, "zero_grad"):
            self.base_optimizer.zero_grad(set_to_none)
        super().zero_grad(set_to_none)

    @property
    def is_perturbed(self) -> bool:
        """Say whether the weights are at w + e(w), from a perturbing first_step to second_step."""
        return self._perturbation is not None and self._perturbation.has_second_pass

    def _patch_step_function(self) -> None:  # called by torch.optim when step gets its hooks
        super()._patch_step_function()
        keep_out_of_graphs(type(self), KEPT_OUT)

    def _second_step(self) -> None:
        slots = self._slots
        perturbation = slots.perturbation
        assert perturbation is not None
        perturbation.remove_hooks()
        try:
            finish(self, perturbation)
        except BaseException:
            self.restore()
            raise
        finally:
            slots.drop_gradients()
        slots.hold(None)
        self._count_step()

    @without_grad
    def _add_part(self, sums: PartSums) -> None:
        if self._perturbation is None:
            raise RuntimeError(
                "parts(): each part needs backward(), first_step() and backward() in the body of "
                "the loop, and step() comes once, after it. The weights were restored."
            )
        sums.add(self._perturbation, gradients(self, self._perturbation))
        self._slots.drop_gradients()

    @without_grad
    def _average(self, sums: PartSums) -> None:
        assert self._perturbation is not None
        sums.average_into(self._perturbation)
