"""The base optimizers whose update is one kernel together with restore and recombination: when that
kernel can serve, and what it is called with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from samkernels import ops
from samkernels.backends import AdamOptions, Recombination, SgdOptions, TensorList
from samkernels.optim import _shards
from samkernels.optim._lists import Bucket, fits, laid_out_like, refuse_capture

State = dict[str, Any]  # of one parameter


@dataclass
class Update:
    """A call of a fused op, not made yet: all that may be wrong with it has been found."""

    bucket: Bucket
    op: str  # of the backend
    lists: tuple[TensorList | None, ...]  # of the op, behind the weights
    options: SgdOptions | AdamOptions
    new_states: dict[Tensor, State]  # to be stored after the call

    def run(
        self, old_params: TensorList, recombination: Recombination, state: dict[Tensor, State]
    ) -> None:
        bucket = self.bucket
        op = getattr(bucket.ops, self.op)
        op(bucket.params, old_params, *self.lists, recombination, self.options)
        for p, of_param in self.new_states.items():
            state[p].update(of_param)


class FusedBase(Protocol):
    tensors: tuple[str, ...]  # in the state of a parameter, of its shape
    needed: tuple[str, ...]  # what a state that is not empty has to have

    def serves(self, group: dict[str, Any]) -> bool:
        """Whether the op can make the step of this group; if not, the base optimizer does."""

    def new_state(self, group: dict[str, Any], p: Tensor) -> State:
        """Of a parameter that no step was made with."""

    def updates(self, bucket: Bucket, state: dict[Tensor, State]) -> list[Update]:
        """Raises TypeError or ValueError if a hyperparameter or a state is wrong."""


class Sgd:
    tensors: tuple[str, ...] = ("momentum_buffer",)
    needed: tuple[str, ...] = ()

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
        buffers = bucket.ops.state_of(state, bucket.params, "momentum_buffer")
        if buffers is not None:
            return [Update(bucket, "sgd_", (buffers,), options, {})]

        # Parameters that have no momentum yet, and those that have.
        new = {slot for slot in bucket.slots if state[slot.param].get("momentum_buffer") is None}
        parts = [bucket.select(lambda slot: slot not in new), bucket.select(new.__contains__)]
        updates = []
        for part in parts if new else [bucket]:
            if not part.slots:
                continue
            init = part.slots[0] in new
            if init:
                refuse_capture()
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
            updates.append(Update(part, "sgd_", (buffers,), of_part, new_states))
        return updates


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
    """As backends take what a group says, for lists of tensors like one.

    Raises:
        TypeError, ValueError: an option is no hyperparameter of SGD.
    """
    options = {
        "momentum": _number(momentum),
        "dampening": _number(dampening),
        "weight_decay": _number(weight_decay),
        "nesterov": nesterov,
        "maximize": maximize,
    }
    ops.check_sgd_options(lr=lr, **options)
    return SgdOptions(ops.hyperparameter("lr", lr, like), **options, init_momentum=False)


class Adam:
    """Adam and AdamW, without amsgrad."""

    tensors: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    needed: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "step")

    def __init__(self, decoupled_weight_decay: bool) -> None:
        # Of groups that do not say, as before PyTorch 2.7.
        self._decoupled_weight_decay = decoupled_weight_decay

    def serves(self, group: dict[str, Any]) -> bool:
        values = [*group["betas"], group["eps"], group["weight_decay"]]
        return not (group["amsgrad"] or group["differentiable"] or _are_on_device(values))

    def updates(self, bucket: Bucket, state: dict[Tensor, State]) -> list[Update]:
        group = bucket.group
        decoupled = group.get("decoupled_weight_decay", self._decoupled_weight_decay)
        options = bucket.checked(_adam_options, *_ADAM_VALUES(group), decoupled)
        lists = self._known(bucket, state)
        new_states: dict[Tensor, State] = {}
        if lists is None:
            states, new_states = self._states(bucket, state)
            moments = [_laid_out(bucket, states, name) for name in self.tensors]
            lists = [*moments, [of_param["step"] for of_param in states]]
        return [Update(bucket, "adam_", tuple(lists), options, new_states)]

    def _known(self, bucket: Bucket, state: dict[Tensor, State]) -> list[TensorList] | None:
        """Moments and steps, if nothing about them is new."""
        lists: list[TensorList] = []
        for name in self.needed:
            found = bucket.ops.state_of(state, bucket.params, name, numbers=name == "step")
            if found is None:
                return None
            lists.append(found)
        return lists

    def _states(
        self, bucket: Bucket, state: dict[Tensor, State]
    ) -> tuple[list[State], dict[Tensor, State]]:
        """Of all parameters, with steps beside them; and of those that had none, by parameter."""
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
            # torch.optim keeps it on the host, unless capturable or fused. Here the device may skip
            # a step, which must not count.
            step = of_param["step"]
            if step.device != bucket.place.device or step.is_neg():
                step = of_param["step"] = step.to(bucket.place.device, copy=True).resolve_neg()
            ops.check_step("step in the state", step, p)
            states.append(of_param)
        ops.check_disjoint("step in the states", [of_param["step"] for of_param in states])
        return states, new_states

    def new_state(self, group: dict[str, Any], p: Tensor) -> State:
        """Layout and order of torch.optim's."""
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
    options = {
        "eps": _number(eps),
        "weight_decay": _number(weight_decay),
        "decoupled_weight_decay": decoupled_weight_decay,
        "maximize": maximize,
    }
    numbers = tuple(map(_number, betas))
    ops.check_adam_options(lr=lr, betas=numbers, **options)
    options["decoupled"] = options.pop("decoupled_weight_decay")
    beta1, beta2 = numbers
    return AdamOptions(ops.hyperparameter("lr", lr, like), beta1, beta2, **options)


# By their exact class: a subclass may have changed anything.
FUSED_BASES: dict[type[Optimizer], FusedBase] = {
    torch.optim.SGD: Sgd(),
    torch.optim.Adam: Adam(decoupled_weight_decay=False),
    torch.optim.AdamW: Adam(decoupled_weight_decay=True),
}


def _are_on_device(values: Iterable[object]) -> bool:
    """lr and rho may lie on the device. What else lies there is left to the base optimizer: reading
    it here would make the host wait."""
    for value in values:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return True
    return False


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _laid_out(bucket: Bucket, states: list[State], name: str) -> TensorList:
    """One tensor of each state, local; those in another layout than their parameter, as of a
    checkpoint, are replaced there."""
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
