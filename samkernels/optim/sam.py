"""SAM: the two-step protocol, its state, and the hand-over to samkernels.ops. No arithmetic on
tensors in here."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from samkernels import backends, ops
from samkernels.backends import Recombination
from samkernels.optim import _shards
from samkernels.optim._bases import FUSED_BASES, FusedBase
from samkernels.optim._lists import (
    Bucket,
    Perturbation,
    Place,
    Slot,
    Slots,
    norms_of,
    per_tensor_norms_of,
)
from samkernels.optim._parts import PartSums
from samkernels.optim._ranks import Ranks, start_exchange

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def _without_grad(method: F) -> F:
    """torch.no_grad() as a decorator, in half of its time."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        try:  # before it is switched off: Ctrl-C may come in between
            torch.set_grad_enabled(False)
            return method(*args, **kwargs)
        finally:
            torch.set_grad_enabled(before)

    return cast(F, wrapper)


class SAM(Optimizer):
    """Sharpness-Aware Minimization around a base optimizer, with fused kernels.

    First step; n is taken over all parameters of all groups, rho is each group's own:

        n = ||s * g1||_2,  s = 1, or |w| if adaptive
        e(w) = rho * s^2 * g1 / (n + 1e-12)
        w <- w + e(w)

    Second step: w comes back bit for bit, and the base optimizer steps from it with u = g2, the
    gradient at w + e(w), in the gradient's place.

    With torch.optim.SGD, Adam and AdamW as base, restore, recombination and update are one kernel.
    Any other optimizer class finds u in `.grad` and makes its own step; so do subclasses of these
    three, Adam with amsgrad, and what somebody has hooked into.

    An n that is zero perturbs nothing. An n that is not finite perturbs nothing either, and the
    step is skipped without the host noticing: the three leave weights, momentum, moments and step
    counts as they were (which is why Adam's counts lie beside the parameters), other base
    optimizers step with u = 0. With maximize=True the perturbation goes against g1, so that
    maximizing f is minimizing -f.

    Usage:

        loss_fn(model(x), y).backward()
        optimizer.first_step()                     # takes the gradients over: .grad is None now
        loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)      # or optimizer.step()

    With torch.amp.GradScaler, scale the loss of both passes and call scaler.step(optimizer) for the
    second step: u is unscaled in the update, and a step whose gradients overflowed is skipped. To
    clip g2, scaler.unscale_(optimizer) may come between first_step and step, never before
    first_step: g2 would be taken for unscaled then.

    In bfloat16 weights, whose precision is often coarser than the perturbation, w + e(w) is rounded
    up or down at random (ops.perturb_): right on average, and the same bits from the same inputs.
    w itself comes back exactly.

    With DistributedDataParallel, `perturbation` says along which g1 a rank goes: "global", the mean
    over all ranks; "local", its own (m-sharpness); "group", the mean over the ranks of
    process_group. u is made of the means over all ranks, whatever the perturbation, so all ranks
    have the same weights after each step, bit for bit; a g1 that is not finite makes all of them
    skip. With "local" and "group" the first pass goes into `first_pass`. `parts` is m-sharpness on
    one device.

    Parameters that torch.distributed.fsdp.fully_shard has sharded (DTensors) are worked on where
    they lie. Norms and statistics are those of whole tensors, by one all-reduce in each of the two
    steps that needs them, so all processes have to make the same calls. FSDP2 must not hold
    gathered parameters when a step is made: a backward before it lets go of them, unless
    set_reshard_after_backward(False) or a later forward without a backward keeps them.

    Memory: one copy of the parameters beside the base optimizer's state; of shards, where they are
    sharded.

    Args:
        params: parameters or parameter groups, as for any torch.optim optimizer; a group may set
            its own rho, adaptive, and whatever the base optimizer knows.
        base_optimizer: a class, called as base_optimizer(param_groups, **base_options).
        rho: radius >= 0 of the neighbourhood, in units of ||w||_2; dimensionless if adaptive. Like
            lr, it may be a tensor of one element: on the parameters' device it is read there, and
            a CUDA graph sees what is written to it.
        adaptive: ASAM's perturbation, as in davda54/sam.
        backend: "auto" takes, per device and dtype, the fastest that can serve (see `backends`);
            "native", "triton", "foreach" or "reference" insists on one.
        track_statistics: fill `statistics` in each second step.
        max_grad_norm: u is multiplied by min(1, max_grad_norm / (n + 1e-6)), n the norm over all
            parameters of the gradient that u has its magnitude of: of g2, as
            torch.nn.utils.clip_grad_norm_ between the steps would do it; SAMDirection: of g1. One
            reduction more, and no pass to scale. None: as it is.
        perturbation: "global", "local" or "group", see above; of no consequence in one process.
            DTensors take "global" only.
        process_group: for "group": the group that this rank is in.
        base_options: lr, momentum, weight_decay and so on.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names
            it.
        RuntimeError: the backend that was named cannot serve a parameter.

    Source: Foret et al., arXiv:2010.01412; adaptive: Kwon et al., arXiv:2102.11600.
    """

    # How u is made of g1 and g2: one of ops.RULES.
    _rule = "sam"

    # For the time of a step torch.amp.GradScaler.step() sets grad_scale and found_inf, instead of
    # waiting for the device to know whether the step may be made.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        *,
        backend: str = "auto",
        track_statistics: bool = False,
        max_grad_norm: float | None = None,
        perturbation: str = "global",
        process_group: Any = None,
        **base_options: Any,
    ) -> None:
        self._init(
            params,
            base_optimizer,
            {"rho": rho, "adaptive": adaptive},
            base_options,
            backend=backend,
            track_statistics=track_statistics,
            max_grad_norm=max_grad_norm,
            perturbation=perturbation,
            process_group=process_group,
        )

    def _init(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        defaults: dict[str, Any],
        base_options: dict[str, Any],
        *,
        backend: str,
        track_statistics: bool,
        max_grad_norm: float | None,
        perturbation: str = "global",
        process_group: Any = None,
    ) -> None:
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            raise TypeError(
                f"base_optimizer is {base_optimizer!r}: give a class such as torch.optim.SGD, and "
                "its options as keyword arguments"
            )
        if (closure := inspect.signature(base_optimizer.step).parameters.get("closure")) and (
            closure.default is inspect.Parameter.empty
        ):
            raise ValueError(
                f"base_optimizer is {base_optimizer.__name__}, whose step takes passes of its own "
                "(its closure is required): give one that steps on the gradients that are there"
            )
        backends.check_name(backend)
        _check_options(defaults, "")
        self._backend = backend
        if max_grad_norm is not None:
            ops.check_positive("max_grad_norm", max_grad_norm)
        self.track_statistics = track_statistics
        self.max_grad_norm = max_grad_norm
        self._statistics: ops.GradientStatistics | None = None
        self._meets_scaler = True  # until a step shows that there is none
        self._ranks = Ranks(perturbation, process_group)
        self._slots = Slots(backend)
        self._is_constructed = False
        super().__init__(params, defaults)
        self._check_disjoint()  # once, not for each group
        self._is_constructed = True
        # One list of groups and one state for both: a scheduler changes the lr of both.
        self.base_optimizer = base_optimizer(self.param_groups, **base_options)
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self.defaults = {**self.base_optimizer.defaults, **self.defaults}

    # -- the step ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def first_pass(self, model: nn.Module) -> Iterator[None]:
        """For the forward and backward pass at w, of every rank: averages g1 over those ranks that
        perturb alike.

        With perturbation="global", or in one process, it does nothing: DistributedDataParallel
        averages g1 over all ranks by itself. Otherwise its averaging is switched off in here; and
        first_step sends, beside the second pass, what the update needs of g1: for SAM one number;
        for SAMDirection, SAMMagnitude and statistics all of g1. "group" sends g1 within the group
        before that, and waits for it.

        Usage:

            with optimizer.first_pass(model):
                loss_fn(model(x), y).backward()    # the forward pass inside, too
            optimizer.first_step()
            loss_fn(model(x), y).backward()
            optimizer.second_step(zero_grad=True)

        Args:
            model: the DistributedDataParallel module, compiled or inside of another one or not.
                Of its options, join() is not served, and static_graph=True needs one backward
                before training that averages. A parameter that a rank does not use
                (find_unused_parameters) has g1 = 0 there. SyncBatchNorm makes every loss depend on
                all ranks: m-sharpness is meant with batch norm of each share.

        Raises:
            TypeError: there is no DistributedDataParallel in model.
            RuntimeError: the forward pass was made before, so that backward has averaged over all
                ranks; or static_graph=True, at the very first pass.
        """
        with self._ranks.first_pass(model):
            yield

    @_without_grad
    def first_step(self, zero_grad: bool = False) -> None:
        """Keep w and move to w + e(w). Takes `.grad` over: it is None afterwards.

        Args:
            zero_grad: accepted because davda54/sam has it; the gradients are taken over in any
                case, since a second backward that adds to them would give g1 + g2.

        Raises:
            RuntimeError: called twice, no parameter has a gradient, or a first_pass is missing.
            ValueError: a gradient is sparse.
        """
        if self._perturbation is not None:
            raise RuntimeError(
                "first_step was called twice: call backward and second_step() (or step()) first, "
                "or restore() to undo the perturbation"
            )
        all_ranks = self._ranks.begin_first_step(self.param_groups)
        buckets = self._slots.buckets(self.param_groups)
        if not buckets:
            raise RuntimeError(
                "first_step found no gradient: call loss.backward() before it, and leave out "
                "zero_grad() between the two"
            )
        perturbation = self._measure(buckets)
        perturbation.note_streams(buckets)
        keeps_first_grads = self._needs_first_grads
        try:
            self._perturbation = perturbation
            for bucket in buckets:
                self._perturb(bucket, perturbation)
                if keeps_first_grads and all_ranks is None:
                    kept = list(bucket.grads)
                    if not bucket.place.process_groups:  # FSDP2 makes new memory in each backward
                        # Memory that somebody else has too may be used for g2: DDP's buckets.
                        kept = [g.clone() if _shares_memory(g) else g for g in kept]
                    perturbation.first_grads.update(zip(bucket.slots, kept, strict=True))
            if all_ranks is not None:
                sent = self._all_params() if keeps_first_grads else []
                ascent_norm = perturbation.ascent_norm
                perturbation.exchange = start_exchange(sent, ascent_norm, all_ranks)
            perturbation.settle()
            for bucket in buckets:
                for slot in bucket.slots:
                    slot.param.grad = None
            if self._meets_scaler:
                self._spread_overflow(perturbation)
        except BaseException:
            self.restore()
            raise

    def second_step(self, zero_grad: bool = False) -> None:
        """Bring w back and step the base optimizer from it: step(), after first_step().

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: first_step was not called, or no parameter has a gradient. The weights are
                restored.
        """
        if self._perturbation is None:
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

    @_without_grad
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The second step; with a closure, the whole of SAM.

        Args:
            closure: computes the loss, calls backward on it and returns it. After first_step() it
                is called once, at w + e(w). Otherwise gradients that are present are g1, and it is
                called once, at w + e(w); if none are, it is called twice, at w and at w + e(w).

        Returns:
            The loss at w if the closure was called there, else None. A step with a closure leaves
                no gradients.

        Before any other step, and with lr and all gradients zero, it only makes the base
        optimizer's state: so torch.distributed.checkpoint asks for it.

        Raises:
            RuntimeError: no first step was made and there is no closure; the closure made a step
                of its own; or see first_step and second_step. The weights are restored.
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
            if self._perturbation is None:
                if self._only_makes_state():
                    self._make_state()
                    return None
                raise RuntimeError(
                    f"{type(self).__name__}.step() needs two gradients: call first_step() after "
                    "the first backward and step() after the second, or give step() a closure"
                )
            self._second_step()
            return None

        loss = None
        try:
            if self._perturbation is None:
                if all(p.grad is None for p in self._all_params()):
                    with torch.enable_grad():
                        loss = closure()
                self.first_step()
            with torch.enable_grad():
                closure()
            self._second_step()
        finally:
            # After a failure too: what the closure left would be taken for g1 by the next step.
            self.zero_grad()
            self.restore()
        return loss

    @_without_grad
    def restore(self) -> None:
        """Undo first_step, if it was called: w comes back bit for bit, g1 is dropped.

        Raises:
            RuntimeError: a parameter cannot be restored, since its memory was freed or its shape
                is another one now. All others are restored.
        """
        perturbation = self._perturbation
        if perturbation is None:
            return
        perturbation.remove_hook()
        perturbation.settle()
        perturbation.record_streams()
        try:
            self._restore(perturbation.slots)
        finally:
            if not perturbation.slots:
                self._perturbation = None

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """first_step() on entry; if the body raises, the weights are restored.

        Usage:

            with optimizer.perturbed():
                loss_fn(model(x), y).backward()
            optimizer.step()
        """
        try:
            self.first_step()
            yield
        except BaseException:
            self.restore()
            raise

    def parts(self, batches: Iterable[T]) -> Iterator[T]:
        """m-sharpness on one device: each of the m parts of a batch perturbs along its own g1.

        The body makes both passes with its part; the weights are w again when the next one begins.
        After the last, everything is as after the second backward with one batch, but that g1 and
        g2 are the means over the parts: `.grad` has g2, which may be clipped, and step() makes the
        update. Like the ranks of perturbation="local", parts count alike: if they differ in size,
        weight their losses. A part whose g1 is not finite makes the step be skipped. If the body
        raises or breaks off, the weights are restored and all parts dropped.

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
        sums = PartSums()
        begun = False
        try:
            for batch in batches:
                if begun:
                    self._add_part(sums)
                    self.restore()
                    self.zero_grad()
                begun = True
                yield batch
            if sums.count:  # else one part has all of g1 and g2
                self._add_part(sums)
                self._average(sums)
        except BaseException:
            self.restore()
            raise

    # -- what can be asked -------------------------------------------------------------------------

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are at w + e(w): after first_step, before second_step."""
        return self._perturbation is not None

    @property
    def statistics(self) -> ops.GradientStatistics | None:
        """How g1 and g2 of the last step compare; None without track_statistics."""
        return self._statistics

    @property
    def backends(self) -> dict[str, str]:
        """Which backend serves whom, such as {"cuda:0 float32": "native"}."""
        served = {}
        for group in self.param_groups:
            for p in group["params"]:
                dtype = str(p.dtype).removeprefix("torch.")
                served[f"{p.device} {dtype}"] = self._slots.place_of(p).backend
        return served

    # -- groups and checkpoints --------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; the group may set its own rho and adaptive.

        Raises:
            TypeError, ValueError: an option or a parameter is of the wrong kind; the message names
                it.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is {type(param_group).__name__}: give a dict")
        index = len(self.param_groups)
        _check_options(param_group, f" of parameter group {index}")
        super().add_param_group(param_group)
        try:
            for i, p in enumerate(param_group["params"]):
                name = f"params[{i}] of parameter group {index}"
                _shards.check(name, p)
                ops.check_tensor(name, _shards.local(p))
                self._slots.place_of(p)
                if _shards.is_dtensor(p):
                    self._ranks.check_shards(name)
            if self._is_constructed:
                self._check_disjoint()
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict, with rho and the like in its groups.

        Raises:
            RuntimeError: between first_step and second_step, when the weights of the model are
                perturbed ones.
        """
        self._require_unperturbed("state_dict")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or of the base optimizer: rho and the like stay then.

        Raises:
            RuntimeError: between first_step and second_step.
            ValueError: groups or momentum buffers do not fit the parameters, are sharded in another
                way (torch.distributed.checkpoint loads those), or rho is out of range.
        """
        self._require_unperturbed("load_state_dict")
        try:
            groups, _ = list(state_dict["param_groups"]), dict(state_dict["state"])
            _ = [dict(group)["params"] for group in groups]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                "state_dict is no optimizer's: give what state_dict() returned, with 'state' and "
                "'param_groups'"
            ) from None
        for i, group in enumerate(groups):
            _check_options(group, f" of parameter group {i} in state_dict")
        self._check_state(state_dict)
        self._slots.forget_lists()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._require_unperturbed("copying or pickling")
        own = ("base_optimizer", "_backend", "_ranks", "track_statistics", "max_grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        previous_groups = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        self.__dict__.setdefault("max_grad_norm", None)
        self.__dict__.setdefault("_statistics", None)
        self.__dict__.setdefault("_meets_scaler", True)
        self.__dict__.setdefault("_ranks", Ranks("global", None))
        self.__dict__.setdefault("_is_constructed", True)
        self.__dict__.setdefault("_slots", Slots(self._backend))
        for group, previous in zip(self.param_groups, previous_groups, strict=False):
            for key, value in previous.items():
                group.setdefault(key, value)
        # Groups and state are new objects: share them again.
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})

    # -- private -----------------------------------------------------------------------------------

    # In an object and not in self, which is Lightning's wrapper where first_step is called on that:
    # reading goes through to this optimizer, while assigning stays with the wrapper.
    @property
    def _perturbation(self) -> Perturbation | None:
        return self._slots.perturbation

    @_perturbation.setter
    def _perturbation(self, perturbation: Perturbation | None) -> None:
        self._slots.perturbation = perturbation

    def _require_unperturbed(self, what: str) -> None:
        if self._perturbation is not None:
            raise RuntimeError(
                f"{what} between first_step and second_step: the model holds perturbed weights "
                "now. Call second_step() or restore() first."
            )

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        fused = FUSED_BASES.get(type(self.base_optimizer))
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for i, (index, p) in enumerate(zip(saved, self._all_params(), strict=False)):
            state = state_dict["state"].get(index, {})
            if not isinstance(state, dict):
                raise ValueError(f"state_dict: the state of parameter {i} is no dict")
            for name in () if fused is None or not state else fused.needed:
                if state.get(name) is None:
                    raise ValueError(
                        f"state_dict: the state of parameter {i} has no {name}: load a checkpoint "
                        f"of {type(self.base_optimizer).__name__}"
                    )
            for name in ("momentum_buffer",) if fused is None else fused.tensors:
                tensor = state.get(name)
                if tensor is None:
                    continue
                if not isinstance(tensor, Tensor) or tensor.shape != p.shape:
                    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
                    raise ValueError(
                        f"state_dict: the {name} of parameter {i} has shape {shape} and the "
                        f"parameter has {tuple(p.shape)}: load the checkpoint of the same model"
                    )
                if not _shards.are_cut_alike(tensor, p):
                    raise ValueError(
                        f"state_dict: the {name} of parameter {i} is not sharded as the parameter "
                        "is: load it with set_optimizer_state_dict of "
                        "torch.distributed.checkpoint.state_dict"
                    )

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _check_disjoint(self) -> None:
        ops.check_disjoint("params", _shards.locals_of(self._all_params()))

    def _only_makes_state(self) -> bool:
        """Whether this is the step by which torch.distributed.checkpoint has an optimizer make the
        state that is to be saved or loaded: before any other, with lr and all gradients zero. It
        is a step of SAM too, since a zero g1 perturbs nothing; g1 and g2 are the same."""
        if self.state or any(group.get("lr", 0) != 0 for group in self.param_groups):
            return False
        grads = [p.grad for p in self._all_params() if p.grad is not None]
        return bool(grads) and not any(g.any() for g in _shards.locals_of(grads))

    def _make_state(self) -> None:
        fused = self._fused_base
        if fused is None or not all(map(fused.serves, self.param_groups)):
            self.base_optimizer.step()
            return
        # Not by a step, which would count, and make weight_decay * w of a momentum.
        for group in self.param_groups:
            for p in group["params"]:
                state = fused.new_state(group, p) if p.grad is not None else {}
                if state:
                    self.state[p].update(state)

    def _measure(self, buckets: list[Bucket]) -> Perturbation:
        """The norms of g1 that the two steps need; nothing is perturbed yet."""
        ascent_norms, first_norms = [], []
        for bucket in buckets:
            if bucket.group["adaptive"]:
                ascent, norms = bucket.ops.weighted_norms(bucket.grads, bucket.params)
            else:
                ascent = norms = bucket.ops.norms(bucket.grads)
            ascent_norms.append(ascent)
            first_norms.append(norms)
        if not self._needs_first_norms(buckets):
            whole = _over_shards(ascent_norms, buckets)
            return Perturbation(ascent_norm=ops.total_norm([norms.total for norms in whole]))
        whole = _over_shards([*ascent_norms, *first_norms], [*buckets, *buckets])
        ascent_norms, first_norms = whole[: len(buckets)], whole[len(buckets) :]
        return Perturbation(
            ascent_norm=ops.total_norm([norms.total for norms in ascent_norms]),
            first_norm=ops.total_norm([norms.total for norms in first_norms]),
            first_norms=[
                (bucket.slots, norms) for bucket, norms in zip(buckets, first_norms, strict=True)
            ],
        )

    @property
    def _needs_first_grads(self) -> bool:
        return self._rule != "sam" or self.track_statistics

    def _needs_first_norms(self, buckets: list[Bucket]) -> bool:
        if self._rule == "sam":
            return False
        if self.max_grad_norm is not None and self._rule == "samdirection":
            return True
        return any(bucket.granularity != "element" for bucket in buckets)

    def _perturb(self, bucket: Bucket, perturbation: Perturbation) -> None:
        group = bucket.group
        rho = bucket.checked(ops.signed_rho, group["rho"], group.get("maximize", False))
        norm = bucket.bring(perturbation.ascent_norm)
        assert norm is not None
        journal: list[bool] = []
        perturbation.moving.append((bucket, journal))
        bucket.ops.perturb_(
            bucket.params,
            bucket.grads,
            bucket.old,
            norm=norm,
            rho=rho,
            adaptive=group["adaptive"],
            eps=ops.EPS,
            rounds_at_random=True,
            journal=journal,
        )

    def _restore(self, slots: dict[Slot, None]) -> None:
        """Restores and removes what is in `slots`; what may be restored later stays in there."""
        lists: dict[tuple[Place, str], list[Slot]] = {}
        lost = []
        for slot in slots:
            p = slot.local
            if p.shape != slot.old.shape or (p.data_ptr() == 0 and p.numel() > 0):
                lost.append(slot)
                continue
            # A parameter that was cast or laid out anew in between still gets its values back.
            backend = slot.place.backend if self._slots.serves(slot) else "foreach"
            lists.setdefault((slot.place, backend), []).append(slot)
        for (_, backend), of_place in lists.items():
            backends.get(backend).restore_(
                [slot.local for slot in of_place], [slot.old for slot in of_place]
            )
        slots.clear()
        slots.update((slot, None) for slot in lost if slot.local.shape == slot.old.shape)
        if lost:
            shape = tuple(lost[0].param.shape)
            raise RuntimeError(
                f"a parameter of shape {shape} changed its shape or lost its memory between "
                f"first_step and second_step: {len(lost)} parameters cannot be restored. All "
                "others were; if the memory comes back, call restore() again."
            )

    def _second_step(self) -> None:
        perturbation = self._perturbation
        if perturbation is None:
            raise RuntimeError(
                "the closure made a step or a restore of its own: leave step(), second_step() and "
                "restore() out of it"
            )
        perturbation.remove_hook()
        self._meets_scaler = self._of_scaler("found_inf") is not None
        try:
            self._finish(perturbation)
        except BaseException:
            self.restore()
            raise
        self._perturbation = None

    def _second_gradients(self, perturbation: Perturbation) -> list[Bucket]:
        """g2; and where ranks differ, what they have sent replaces g1 and its norms."""
        buckets = self._slots.buckets(self.param_groups, perturbation)
        if not buckets:
            raise RuntimeError(
                "second_step found no gradient: call loss.backward() at the perturbed weights "
                "before it. The weights were restored."
            )
        if perturbation.first_grads:
            _check_first_grads_survived(buckets, perturbation.first_grads)
        exchange, perturbation.exchange = perturbation.exchange, None
        if exchange is not None:
            exchange.wait()
            perturbation.ascent_norm = exchange.ascent_norm
            # Of those with g2, which all ranks have or none.
            slots = [slot for bucket in buckets for slot in bucket.slots]
            perturbation.first_grads = {
                slot: exchange.first_grads[slot.param]
                for slot in slots
                if slot.param in exchange.first_grads
            }
            perturbation.forget_first_norms()
        perturbation.record_streams()
        return buckets

    @_without_grad
    def _add_part(self, sums: PartSums) -> None:
        if self._perturbation is None:
            raise RuntimeError(
                "parts(): each part needs backward(), first_step() and backward() in the body of "
                "the loop, and step() comes once, after it. The weights were restored."
            )
        sums.add(self._perturbation, self._second_gradients(self._perturbation))

    @_without_grad
    def _average(self, sums: PartSums) -> None:
        assert self._perturbation is not None
        for slot, mean in sums.means_into(self._perturbation).items():
            if slot.param.grad is None:
                slot.param.grad = _shards.as_part_of(slot.param, mean)
            else:
                _put_grad(slot.param, mean)

    def _finish(self, perturbation: Perturbation) -> None:
        buckets = self._second_gradients(perturbation)
        found_inf = self._of_scaler("found_inf")
        if found_inf is not None and self._of_scaler("grad_scale") is None:
            self._require_same_scale()

        perturbation.divisor = self._of_scaler("grad_scale")
        updated = buckets
        if self._needs_first_grads or self.max_grad_norm is not None:
            # Without g1 there is nothing to recombine: like torch.optim without a gradient, leave
            # the parameter alone.
            both = _select(buckets, perturbation.first_grads.__contains__)
            updated = buckets if self._rule == "sam" else both
            self._measure_second(updated, both, perturbation)

        if self._rule != "sam":
            for bucket in updated:
                ops.check_choice("granularity", bucket.granularity, ops.GRANULARITIES)
        fused = self._fused_base
        if fused is not None and all([fused.serves(bucket.group) for bucket in updated]):
            # Of all groups, so that a wrong one is found before the first is updated.
            updates = [call for bucket in updated for call in fused.updates(bucket, self.state)]
            if not perturbation.moved_just(updated):
                done = {slot for bucket in updated for slot in bucket.slots}
                self._restore({slot: None for slot in perturbation.slots if slot not in done})
            for update in updates:
                old = perturbation.old_of(update.bucket)
                update.run(old, self._recombination(update.bucket, perturbation), self.state)
        else:
            for bucket in updated:
                ops.check_disjoint(".grad of the parameters", bucket.grads)  # u goes in there
            self._restore(dict(perturbation.slots))
            if found_inf is not None and found_inf.item():
                return
            for bucket in updated:
                bucket.ops.recombine_(bucket.grads, self._recombination(bucket, perturbation))
                for slot, u in zip(bucket.slots, bucket.grads, strict=True):
                    _put_grad(slot.param, u)
            self._step_base({slot.param for bucket in updated for slot in bucket.slots})

    def _spread_overflow(self, perturbation: Perturbation) -> None:
        """GradScaler looks for overflow in g2, when g1 is gone: have it find that of g1 there."""
        norm = perturbation.ascent_norm
        for slot in perturbation.slots:
            p = slot.param
            if p.requires_grad and slot.local.numel() > 0 and norm is not None:
                hook = functools.partial(_add_overflow, norm)
                perturbation.hook = p.register_post_accumulate_grad_hook(hook)
                return

    def _of_scaler(self, name: str) -> Tensor | None:
        return getattr(self, name, None)

    def _require_same_scale(self) -> None:
        if self._rule == "samdirection" or self.track_statistics:
            raise RuntimeError(
                "GradScaler.unscale_() was called: one of g1 and g2 was unscaled and the other was "
                "not, so their magnitudes cannot be compared. Leave unscale_() out; scaler.step() "
                "unscales both. The weights were restored."
            )

    @property
    def _fused_base(self) -> FusedBase | None:
        base = self.base_optimizer
        if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
            return None  # whoever hooks into its step wants to see it made
        return FUSED_BASES.get(type(base))

    def _measure_second(
        self, updated: list[Bucket], both: list[Bucket], perturbation: Perturbation
    ) -> None:
        """Of g2: the norms that the update needs, and where there is g1 too, the statistics; g2 is
        read once for them. Of g1, if it is not the one of the first step: its norms."""
        scale = perturbation.divisor  # GradScaler's
        of_first = self._rule == "samdirection"
        clips_second = self.max_grad_norm is not None and not of_first
        needs_total = clips_second or any(b.granularity == "global" for b in updated)
        # Norms per tensor are the recombination's to measure, unless other processes have to help.
        needs_norms = needs_total or any(
            b.granularity == "tensor" and b.place.process_groups for b in updated
        )
        first = both if perturbation.first_norm is None and self._needs_first_norms(both) else []
        compared = both if self.track_statistics else []
        of_compared = [bucket.slots for bucket in compared]
        second = [b for b in updated if b.slots not in of_compared] if needs_norms else []

        first_grads = [[perturbation.first_grads[slot] for slot in b.slots] for b in both]
        first_norms = [b.ops.norms(g1) for b, g1 in zip(first, first_grads, strict=False)]
        comparisons = [
            b.ops.compare(g1, b.grads, perturbation.old_of(b))._replace(numel=b.numel)
            for b, g1 in zip(compared, first_grads, strict=False)
        ]
        second_norms = [b.ops.norms(b.grads) for b in second]
        whole = iter(
            _over_shards([*first_norms, *comparisons, *second_norms], [*first, *compared, *second])
        )
        first_norms, comparisons, second_norms = (
            [next(whole) for _ in buckets] for buckets in (first, compared, second)
        )

        if first:
            perturbation.first_norm = ops.total_norm([norms.total for norms in first_norms])
            perturbation.first_norms = [
                (b.slots, norms) for b, norms in zip(first, first_norms, strict=True)
            ]
        second_norms = [*(c.second_norms for c in comparisons), *second_norms]
        perturbation.second_norms = [
            (b.slots, norms) for b, norms in zip([*compared, *second], second_norms, strict=True)
        ]
        if self.track_statistics:
            self._statistics = ops.gradient_statistics(comparisons, scale) if comparisons else None
        if updated and needs_total:
            known = [norms_of(b.slots, perturbation.second_norms) for b in updated]
            totals = [norms.total for norms in known if norms is not None]
            perturbation.second_norm = ops.total_norm(totals)
        norm = perturbation.first_norm if of_first else perturbation.second_norm
        if self.max_grad_norm is not None and norm is not None:
            perturbation.divisor = ops.clipping_divisor(norm, self.max_grad_norm, scale)

    def _recombination(self, bucket: Bucket, perturbation: Perturbation) -> Recombination:
        recombination = Recombination(
            bucket.grads,
            ascent_norm=bucket.bring(perturbation.ascent_norm),
            grad_scale=bucket.bring(perturbation.divisor),
            found_inf=bucket.bring(self._of_scaler("found_inf")),
        )
        if self._rule == "sam":
            return recombination
        first_norm = second_norm = None
        if bucket.granularity == "global":
            first_norm = bucket.bring(perturbation.first_norm)
            second_norm = bucket.bring(perturbation.second_norm)
        elif bucket.granularity == "tensor":
            first_norm = per_tensor_norms_of(bucket.slots, perturbation.first_norms)
            second_norm = per_tensor_norms_of(bucket.slots, perturbation.second_norms)
        return ops.of_rule(
            recombination,
            [perturbation.first_grads[slot] for slot in bucket.slots],
            rule=self._rule,
            granularity=bucket.granularity,
            first_norm=first_norm,
            second_norm=second_norm,
            backend=bucket.ops,
        )

    def _step_base(self, updated: set[Tensor]) -> None:
        hidden = {p: p.grad for p in self._all_params() if p not in updated and p.grad is not None}
        for p in hidden:
            p.grad = None
        try:
            self.base_optimizer.step()
        finally:
            for p, grad in hidden.items():
                p.grad = grad


def _over_shards(measured: list[Any], buckets: list[Bucket]) -> list[Any]:
    """What was measured of each bucket, for whole tensors."""
    groups = [bucket.place.process_groups for bucket in buckets]
    return ops.all_reduce(measured, groups) if any(groups) else measured


def _put_grad(p: Tensor, u: Tensor) -> None:
    """u, computed in a copy if p.grad has another layout or dtype (grad_dtype), for p.grad."""
    if p.grad is None or _shards.local(p.grad) is u:
        return
    if p.grad.dtype is u.dtype:
        p.grad = _shards.as_part_of(p, u)
    else:
        p.grad.copy_(_shards.as_part_of(p, u))


def _add_overflow(norm: Tensor, p: Tensor) -> None:
    if p.grad is not None:
        ops.spread_overflow_(_shards.local(p.grad), norm)


def _shares_memory(grad: Tensor) -> bool:
    return grad._is_view() or grad.untyped_storage().nbytes() != grad.nbytes


def _select(buckets: list[Bucket], keep: Callable[[Slot], bool]) -> list[Bucket]:
    parts = [bucket.select(keep) for bucket in buckets]
    return [part for part in parts if part.slots]


def _check_first_grads_survived(buckets: list[Bucket], first_grads: dict[Slot, Tensor]) -> None:
    for bucket in buckets:
        for slot, grad in zip(bucket.slots, bucket.grads, strict=True):
            first = first_grads.get(slot)
            if first is not None and first.numel() > 0 and first.data_ptr() == grad.data_ptr():
                raise RuntimeError(
                    f"the second gradient of a parameter of shape {tuple(grad.shape)} was written "
                    "over the first one, whose memory first_step took over: let backward make a "
                    "new .grad. The weights were restored."
                )


def _check_options(options: dict[str, Any], where: str) -> None:
    ops.check_hyperparameter(f"rho{where}", options.get("rho", 0.0))
    adaptive = options.get("adaptive", False)
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive{where} is {type(adaptive).__name__}: give True or False")
    if "granularity" in options:
        ops.check_choice(f"granularity{where}", options["granularity"], ops.GRANULARITIES)
