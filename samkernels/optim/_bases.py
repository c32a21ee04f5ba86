"""The base optimizers whose update is one kernel together with restore and recombination: when that
kernel can serve, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from samkernels import ops
from samkernels.backends import TensorList
from samkernels.optim import _shards
from samkernels.optim._lists import Bucket, fits, laid_out_like

State = dict[str, Any]  # of one parameter


@dataclass
class Update:
    """A call of a fused op, not made yet: all that may be wrong with it has been found."""

    bucket: Bucket
    op: Callable[..., None]
    lists: tuple[TensorList | None, ...]  # of the op, behind the gradients
    options: dict[str, Any]
    states: list[State]  # of the parameters, after the call

    def run(
        self,
        old_params: TensorList,
        recombination: dict[str, Any],
        state: dict[Tensor, State],
    ) -> None:
        bucket = self.bucket
        self.op(
            bucket.params,
            old_params,
            bucket.grads,
            *self.lists,
            **self.options,
            **recombination,
            **bucket.options,
        )
        for slot, of_param in zip(bucket.slots, self.states, strict=True):
            if of_param:  # or SGD without momentum would have empty ones
                state[slot.param].update(of_param)


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
        values = [group[name] for name in ("momentum", "dampening", "weight_decay")]
        return not (group["differentiable"] or _are_on_device(values))

    def new_state(self, group: dict[str, Any], p: Tensor) -> State:
        if group["momentum"] == 0:
            return {}
        return {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}

    def updates(self, bucket: Bucket, state: dict[Tensor, State]) -> list[Update]:
        group = bucket.group
        options = {name: group[name] for name in ("lr", "nesterov", "maximize")}
        for name in ("momentum", "dampening", "weight_decay"):
            options[name] = _number(group[name])
        ops.check_sgd_options(**options)
        options["lr"] = ops.hyperparameter("lr", options["lr"], bucket.params[0])
        if options["momentum"] == 0:
            return [Update(bucket, ops.sgd_, (None,), options, [{} for _ in bucket.params])]

        # Parameters that have no momentum yet, and those that have.
        new = {slot for slot in bucket.slots if state[slot.param].get("momentum_buffer") is None}
        parts = [bucket.select(lambda slot: slot not in new), bucket.select(new.__contains__)]
        updates = []
        for part in parts if new else [bucket]:
            if not part.slots:
                continue
            init = part.slots[0] in new
            states = [
                {"momentum_buffer": torch.empty_like(slot.param, requires_grad=False)}
                if init
                else state[slot.param]
                for slot in part.slots
            ]
            buffers = _laid_out(part, states, "momentum_buffer")
            of_part = {**options, "init_momentum": init}
            updates.append(Update(part, ops.sgd_, (buffers,), of_part, states))
        return updates


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
        options = {
            "lr": group["lr"],
            "betas": tuple(map(_number, group["betas"])),
            "eps": _number(group["eps"]),
            "weight_decay": _number(group["weight_decay"]),
            "decoupled_weight_decay": decoupled,
            "maximize": group["maximize"],
        }
        ops.check_adam_options(**options)
        options["lr"] = ops.hyperparameter("lr", options["lr"], bucket.params[0])
        params = [slot.param for slot in bucket.slots]
        states = [state.get(p) or self.new_state(group, p) for p in params]
        moments = [_laid_out(bucket, states, name) for name in self.tensors]
        device = bucket.place.device
        for p, of_param in zip(params, states, strict=True):
            if not isinstance(of_param["step"], Tensor):
                raise TypeError(
                    f"the step of a parameter of shape {tuple(p.shape)} is {of_param['step']!r}: "
                    "load_state_dict makes a tensor of it"
                )
            # torch.optim keeps it on the host, unless capturable or fused. Here the device may skip
            # a step, which must not count.
            if of_param["step"].device != device:
                of_param["step"] = of_param["step"].to(device, non_blocking=True)
            ops.check_step("step in the state", of_param["step"], p)
        steps = [of_param["step"] for of_param in states]
        return [Update(bucket, ops.adam_, (*moments, steps), options, states)]

    def new_state(self, group: dict[str, Any], p: Tensor) -> State:
        """Layout and order of torch.optim's."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
        }


# By their exact class: a subclass may have changed anything.
FUSED_BASES: dict[type[Optimizer], FusedBase] = {
    torch.optim.SGD: Sgd(),
    torch.optim.Adam: Adam(decoupled_weight_decay=False),
    torch.optim.AdamW: Adam(decoupled_weight_decay=True),
}


def _are_on_device(values: Iterable[object]) -> bool:
    """lr and rho may lie on the device. What else lies there is left to the base optimizer: reading
    it here would make the host wait."""
    return any(isinstance(v, Tensor) and v.device.type != "cpu" for v in values)


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
    prepared = bucket.place.prepare(tensors)
    if bucket.place.are_alike(bucket.old, prepared):
        return prepared
    for i, (slot, of_param) in enumerate(zip(bucket.slots, states, strict=True)):
        if not fits(tensors[i], slot.local):
            tensors[i] = laid_out_like(slot.local, tensors[i])
            of_param[name] = _shards.as_part_of(slot.param, tensors[i])
    return tensors
