"""Serve base optimizers: those whose update is one kernel with restore and mix, and any other, that
finds the mix in `.grad` and makes its own step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from samkernels import checks
from samkernels.backends import AdamOptions, Mix, SgdOptions, TensorList
from samkernels.optim import _shards, _wrapping
from samkernels.optim._lists import Bucket, EmptyMomentum, Slot, fits, laid_out_like, refuse_capture

if TYPE_CHECKING:
    from samkernels.optim.sam import SAM

State = dict[str, Any]  # of one parameter


@dataclass
class Update:
    """Holds the call of a fused op that is not made yet; every error in it has been found."""

    bucket: Bucket
    op: str  # name of the backend's function
    lists: tuple[TensorList | None, ...]  # arguments of the op, after the weights
    options: SgdOptions | AdamOptions
    new_states: dict[Tensor, State]  # to be stored after the call
    # With dampening, it says on the device whether the buffers still hold nothing after the step.
    is_empty: Tensor | None = None
    journal: list[bool] = field(default_factory=list)  # the backend writes it

    def run(
        self,
        old_params: TensorList,
        mix: Mix,
        state: dict[Tensor, State],
        out: TensorList | None = None,
    ) -> None:
        """Make the call; after an interrupt, do what was not done.

        Args:
            out: the lists that the new w goes to; None: the parameters.
        """
        bucket = self.bucket
        if not self.journal:
            op = getattr(bucket.ops, self.op)
            params = bucket.params if out is None else out
            op(params, old_params, *self.lists, mix, self._options(), self.journal)
        for p, of_param in self.new_states.items():
            state.setdefault(p, {}).update(of_param)
        if self.is_empty is not None:
            self._note_emptiness(self.is_empty, mix, state)

    def _options(self) -> SgdOptions | AdamOptions:
        options = self.options
        if self.is_empty is None or isinstance(options, AdamOptions) or options.init_momentum:
            return options
        first = self.bucket.params[0]
        dtype = torch.float64 if first.dtype is torch.float64 else torch.float32
        factor = torch.full((), 1 - options.dampening, dtype=dtype, device=first.device)
        return options._replace(one_minus_dampening=factor.masked_fill_(self.is_empty, 1.0))

    def _note_emptiness(self, is_empty: Tensor, mix: Mix, state: dict[Tensor, State]) -> None:
        takes_place = mix.takes_place()
        if takes_place is None:
            is_empty.zero_()
        else:
            is_empty.logical_and_(takes_place.logical_not())
        is_known = is_empty.device.type == "cpu" and not is_empty
        self.bucket.place.notes_empty_momenta |= not is_known
        for slot in self.bucket.slots:
            buffer = state[slot.param]["momentum_buffer"]
            slot.empty_momentum = (
                None if is_known else EmptyMomentum(buffer, is_empty, len(self.bucket.slots))
            )


@dataclass
class MixIntoGrad:
    """Holds the call that leaves u in `.grad`, for a base optimizer that makes its own step."""

    bucket: Bucket
    journal: list[bool] = field(default_factory=list)  # stays empty: w takes its place again

    def run(
        self,
        old_params: TensorList,
        mix: Mix,
        state: dict[Tensor, State],
        out: TensorList | None = None,
    ) -> None:
        bucket = self.bucket
        bucket.ops.mix_(bucket.grads, mix)
        for slot, u in zip(bucket.slots, bucket.grads, strict=True):
            put_grad(slot.param, u)


def put_grad(p: Tensor, u: Tensor) -> None:
    """Put u into p.grad, if u is a copy since p.grad has another layout or dtype (grad_dtype)."""
    if p.grad is None or _shards.local(p.grad) is u:
        return
    if p.grad.dtype is u.dtype:
        p.grad = _shards.as_part_of(p, u)
    else:
        p.grad.copy_(_shards.as_part_of(p, u))


class Fused(Protocol):
    """What a base optimizer with a kernel says of a group."""

    restores: bool = True  # the update brings w back, by itself
    tensors: tuple[str, ...]  # in the state of a parameter, of its shape

    def needed(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names that a state has to have if it is not empty."""

    def check_options(self, group: dict[str, Any], like: Tensor) -> None:
        """Raise TypeError or ValueError if an option is wrong for parameters like this one."""

    def serves(self, group: dict[str, Any]) -> bool:
        """Say whether the op can make the step of this group; if not, the base optimizer does."""

    def new_state(self, group: dict[str, Any], p: Tensor) -> State:
        """Return the state of a parameter that no step was made with."""

    def updates(self, bucket: Bucket, state: dict[Tensor, State]) -> list[Update]:
        """Prepare calls. Raise TypeError or ValueError if a hyperparameter or a state is wrong."""

    def finish(self, optimizer: SAM, buckets: Sequence[Bucket]) -> None:
        """Do what is left when all updates are made."""
        optimizer.base_optimizer._opt_called = True  # type: ignore[attr-defined]  # for its scheduler

    def check_state(self, bucket: Bucket, state: dict[Tensor, State]) -> None:
        """Raise ValueError if the state of a parameter lacks what a step of its group reads:
        somebody has edited it, or switched amsgrad on."""
        needed = self.needed(bucket.group)
        for slot in bucket.slots:
            of_param = state.get(slot.param)
            for name in needed if of_param else ():
                if name not in of_param:  # type: ignore[operator]
                    raise ValueError(
                        f"the state of a parameter of shape {tuple(slot.param.shape)} has no "
                        f"{name}: put it there, or remove the state of this parameter, which "
                        "begins anew then"
                    )


class ByItself:
    """Any base optimizer that makes its own step.

    Args:
        fused: what is known of its class, if it is one of those with a kernel, which does not
            serve all groups.
    """

    restores = False

    def __init__(self, fused: Fused | None) -> None:
        self._fused = fused

    def updates(self, bucket: Bucket, state: dict[Tensor, State]) -> list[MixIntoGrad]:
        if self._fused is not None:
            self._fused.check_state(bucket, state)
        checks.check_disjoint(".grad of the parameters", bucket.grads)  # u goes in there
        return [MixIntoGrad(bucket)]

    def finish(self, optimizer: SAM, buckets: Sequence[Bucket]) -> None:
        """Let it make its step with the parameters of these buckets, and no others."""
        updated = {slot.param for bucket in buckets for slot in bucket.slots}
        hidden = {
            p: p.grad for p in optimizer._all_params() if p not in updated and p.grad is not None
        }
        for p in hidden:
            p.grad = None
        try:
            _wrapping.step(optimizer.base_optimizer)
        finally:
            for p, grad in hidden.items():
                p.grad = grad


Base = Fused | ByItself


class Sgd(Fused):
    tensors: tuple[str, ...] = ("momentum_buffer",)

    def needed(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ()

    def check_options(self, group: dict[str, Any], like: Tensor) -> None:
        sgd_options(*_SGD_VALUES(group), like=like)

    def serves(self, group: dict[str, Any]) -> bool:
        values = group["momentum"], group["dampening"], group["weight_decay"]
        return not (group["differentiable"] or _are_on_device(values))

    def new_state(self, group: dict[str, Any], p: Tensor) -> State:
        if group["momentum"] == 0:
            return {}
        return {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}

    def updates(self, bucket: Bucket, state: dict[Tensor, State]) -> list[Update]:
        options = bucket.checked(sgd_options, *_SGD_VALUES(bucket.group))
        if options.momentum == 0:
            return [Update(bucket, "sgd_", (None,), options, {})]
        notes_some = bucket.place.notes_empty_momenta
        if not (notes_some and any(slot.empty_momentum is not None for slot in bucket.slots)):
            buffers = bucket.ops.state_of(state, bucket.params, "momentum_buffer")
            if buffers is not None:
                return [Update(bucket, "sgd_", (buffers,), options, {})]

        # Kinds: parameters without momentum; those of which only the device knows; and the rest.
        kinds = {slot: _momentum_of(slot, state) for slot in bucket.slots}
        updates = []
        for kind in dict.fromkeys(kinds.values()):
            of_kind = {slot for slot in bucket.slots if kinds[slot] is kind}
            part = bucket.select(of_kind.__contains__)
            is_empty = _emptiness_of(part, kind) if isinstance(kind, Tensor) else None
            init = kind is NONE
            if init:
                refuse_capture()
                # Without dampening, a buffer of zeros is as good as none.
                if options.dampening != 0:
                    is_empty = torch.ones((), dtype=torch.bool, device=bucket.place.device)
            states = [
                {"momentum_buffer": torch.empty_like(slot.param, requires_grad=False)}
                if init
                else state[slot.param]
                for slot in part.slots
            ]
            buffers = _laid_out(part, states, "momentum_buffer")
            of_part = options._replace(init_momentum=init)
            params = [slot.param for slot in part.slots]
            new_states = dict(zip(params, states, strict=True)) if init else {}
            updates.append(Update(part, "sgd_", (buffers,), of_part, new_states, is_empty))
        return updates


NONE, SOME = "none", "some"


def _momentum_of(slot: Slot, state: dict[Tensor, State]) -> str | Tensor:
    """Return NONE or SOME; or, on the device, whether the buffer still holds nothing."""
    # state[..] would make a state.
    buffer = state.get(slot.param, {}).get("momentum_buffer")
    if buffer is None:
        return NONE
    if slot.empty_momentum is None or slot.empty_momentum.buffer is not buffer:
        return SOME
    return slot.empty_momentum.is_empty


def _emptiness_of(part: Bucket, is_empty: Tensor) -> Tensor:
    """Return is_empty, or a copy if parameters that are not in this step share it."""
    shared_by = max(slot.empty_momentum.shared_by for slot in part.slots if slot.empty_momentum)
    if len(part.slots) == shared_by:
        return is_empty
    refuse_capture()
    return is_empty.clone()


_SGD_VALUES = itemgetter("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


def sgd_options(
    lr: float | Tensor,
    momentum: float | Tensor,
    dampening: float | Tensor,
    weight_decay: float | Tensor,
    nesterov: bool,
    maximize: bool,
    *,
    like: Tensor,
) -> SgdOptions:
    """Return options as backends take them, for tensors like one. Like torch.optim.SGD, a step
    takes what schedules pass through: an lr below 0, nesterov where momentum is 0.

    Raises:
        TypeError, ValueError: an option is no hyperparameter of SGD.
    """
    numbers = {
        "momentum": _number(momentum),
        "dampening": _number(dampening),
        "weight_decay": _number(weight_decay),
    }
    checks.check_sgd_options(lr=lr, **numbers, nesterov=nesterov, maximize=maximize, in_step=True)
    _check_fits(numbers, like)
    return SgdOptions(
        checks.hyperparameter("lr", lr, like, signed=True),
        **numbers,
        nesterov=nesterov and numbers["momentum"] != 0,
        maximize=maximize,
        init_momentum=False,
    )


class Adam(Fused):
    """Adam and AdamW, without amsgrad."""

    tensors: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    kept: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "step")

    def __init__(self, decoupled_weight_decay: bool) -> None:
        # Groups that do not say take this, as before PyTorch 2.7.
        self._decoupled_weight_decay = decoupled_weight_decay

    def needed(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*self.kept, "max_exp_avg_sq") if group["amsgrad"] else self.kept

    def check_options(self, group: dict[str, Any], like: Tensor) -> None:
        values = *_ADAM_VALUES(group), self._is_decoupled(group)
        _adam_options(*values, like=like)

    def _is_decoupled(self, group: dict[str, Any]) -> bool:
        return group.get("decoupled_weight_decay", self._decoupled_weight_decay)

    def serves(self, group: dict[str, Any]) -> bool:
        values = [*group["betas"], group["eps"], group["weight_decay"]]
        return not (group["amsgrad"] or group["differentiable"] or _are_on_device(values))

    def updates(self, bucket: Bucket, state: dict[Tensor, State]) -> list[Update]:
        group = bucket.group
        options = bucket.checked(_adam_options, *_ADAM_VALUES(group), self._is_decoupled(group))
        lists = self._known(bucket, state)
        new_states: dict[Tensor, State] = {}
        if lists is None:
            self.check_state(bucket, state)
            states, new_states = self._states(bucket, state)
            moments = [_laid_out(bucket, states, name) for name in self.tensors]
            lists = [*moments, [of_param["step"] for of_param in states]]
        return [Update(bucket, "adam_", tuple(lists), options, new_states)]

    def _known(self, bucket: Bucket, state: dict[Tensor, State]) -> list[TensorList] | None:
        """Return moments and steps, if nothing about them is new."""
        lists: list[TensorList] = []
        for name in self.kept:
            found = bucket.ops.state_of(state, bucket.params, name, numbers=name == "step")
            if found is None:
                return None
            lists.append(found)
        return lists

    def _states(
        self, bucket: Bucket, state: dict[Tensor, State]
    ) -> tuple[list[State], dict[Tensor, State]]:
        """Return the states of all parameters, with steps beside them; and those that are new."""
        states, new_states = [], {}
        for slot in bucket.slots:
            p = slot.param
            of_param = state.get(p)
            if not of_param:
                refuse_capture()
                of_param = new_states[p] = self.new_state(bucket.group, p)
            if not isinstance(of_param["step"], Tensor):
                raise TypeError(
                    f"the step of a parameter of shape {tuple(p.shape)} is {of_param['step']!r}: "
                    "load_state_dict makes a tensor of it"
                )
            # torch.optim keeps steps on the host, unless capturable or fused. Here the device may
            # skip a step, which must not count.
            step = of_param["step"]
            if step.device != bucket.place.device or step.is_neg():
                step = of_param["step"] = step.to(bucket.place.device, copy=True).resolve_neg()
            checks.check_step("step in the state", step, p)
            states.append(of_param)
        checks.check_disjoint("step in the states", [of_param["step"] for of_param in states])
        return states, new_states

    def new_state(self, group: dict[str, Any], p: Tensor) -> State:
        """Return a state in the layout and order of torch.optim's."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }


_ADAM_VALUES = itemgetter("lr", "betas", "eps", "weight_decay", "maximize")


def _adam_options(
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float | Tensor,
    weight_decay: float | Tensor,
    maximize: bool,
    decoupled_weight_decay: bool,
    *,
    like: Tensor,
) -> AdamOptions:
    numbers = {"eps": _number(eps), "weight_decay": _number(weight_decay)}
    pair = tuple(map(_number, betas))
    checks.check_adam_options(
        lr=lr,
        betas=pair,
        **numbers,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
        in_step=True,
    )
    _check_fits(numbers, like)
    beta1, beta2 = pair
    return AdamOptions(
        checks.hyperparameter("lr", lr, like, signed=True),
        beta1,
        beta2,
        **numbers,
        decoupled=decoupled_weight_decay,
        maximize=maximize,
    )


# The keys are exact classes: a subclass may have changed anything.
FUSED_BASES: dict[type[Optimizer], Fused] = {
    torch.optim.SGD: Sgd(),
    torch.optim.Adam: Adam(decoupled_weight_decay=False),
    torch.optim.AdamW: Adam(decoupled_weight_decay=True),
}


def _are_on_device(values: Sequence[object]) -> bool:
    """Say whether other values than lr and rho lie on the device. The base optimizer reads these:
    here, that would make the host wait."""
    if _NUMBERS.issuperset(map(type, values)):
        return False
    return any(isinstance(value, Tensor) and value.device.type != "cpu" for value in values)


_NUMBERS = frozenset((float, int))


def _check_fits(numbers: dict[str, float], like: Tensor) -> None:
    for name, value in numbers.items():
        checks.hyperparameter(name, value, like, signed=True)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _laid_out(bucket: Bucket, states: list[State], name: str) -> TensorList:
    """Return one local tensor of each state. In the states, replace tensors in another layout than
    their parameter's, such as those of a checkpoint."""
    tensors = []
    for slot, of_param in zip(bucket.slots, states, strict=True):
        tensor = of_param.get(name)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"the {name} of a parameter of shape {tuple(slot.param.shape)} is "
                f"{type(tensor).__name__}: give a tensor, or remove it from optimizer.state"
            )
        tensors.append(tensor)
    tensors = _shards.locals_of(tensors)
    prepared = bucket.ops.prepare(tensors)
    if bucket.ops.are_alike(bucket.old, prepared) and not any(map(Tensor.is_neg, tensors)):
        return prepared
    for i, (slot, of_param) in enumerate(zip(bucket.slots, states, strict=True)):
        if not fits(tensors[i], slot.local) or tensors[i].is_neg():
            tensors[i] = laid_out_like(slot.local, tensors[i])
            of_param[name] = _shards.as_part_of(slot.param, tensors[i])
    return tensors
