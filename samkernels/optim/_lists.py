"""From parameters and gradients to lists that one backend takes, and what is kept between the
steps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samkernels import backends, ops


@dataclass(eq=False)
class Place:
    """Where a parameter lives and who serves it. One object for all that are alike: compared by
    identity."""

    device: torch.device
    dtype: torch.dtype
    backend: str


@dataclass(eq=False)
class Slot:
    """Room for one parameter's old_param, in its layout."""

    place: Place
    old: Tensor


@dataclass
class Bucket:
    """Parameters of one group in one place, and the gradients that they have now."""

    group: dict[str, Any]
    place: Place
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """For the ops: who serves, and that the lists were checked when they were made."""
        return {"backend": self.place.backend, "validate": False}

    @property
    def granularity(self) -> str:
        return self.group.get("granularity", "element")

    def bring(self, norm: Tensor | None) -> Tensor | None:
        """A norm over all buckets, on this one's device, in the dtype that ops take it in."""
        if norm is None:
            return None
        dtype = torch.float64 if self.place.dtype is torch.float64 else torch.float32
        return norm.to(self.place.device, dtype, non_blocking=True)

    def select(self, keep: Callable[[Tensor], bool]) -> Bucket:
        """The part whose parameters satisfy `keep`; the bucket itself if all do."""
        indices = [i for i, p in enumerate(self.params) if keep(p)]
        if len(indices) == len(self.params):
            return self
        return Bucket(
            self.group,
            self.place,
            params=[self.params[i] for i in indices],
            grads=[self.grads[i] for i in indices],
            slots=[self.slots[i] for i in indices],
        )


@dataclass
class Perturbation:
    """What the second step, or a restore, needs to know of the first one."""

    # Buckets of the first step while it is under way, each with its journal: not empty if it moved.
    moving: list[tuple[Bucket, list[bool]]] = field(default_factory=list)
    slots: dict[Tensor, Slot] = field(default_factory=dict)  # exactly the parameters that moved
    first_grads: dict[Tensor, Tensor] = field(default_factory=dict)  # empty if nobody reads g1
    ascent_norm: Tensor | None = None  # n
    first_norm: Tensor | None = None  # n1 over all parameters, if a granularity needs it
    first_norms_per_tensor: list[tuple[list[Tensor], Tensor]] = field(default_factory=list)

    def settle(self) -> None:
        """At the end of the first step, or when it was interrupted: take in what has moved."""
        for bucket, journal in self.moving:
            if journal:
                self.slots.update(zip(bucket.params, bucket.slots, strict=True))
        self.moving.clear()  # and with it the gradients, which nobody may need any more

    def first_norm_per_tensor(self, params: list[Tensor]) -> Tensor | None:
        """n1 of each parameter, if the first step had just this list."""
        for measured, norms in self.first_norms_per_tensor:
            if len(measured) == len(params) and all(map(operator.is_, measured, params)):
                return norms
        return None


class Slots:
    """The slots of an optimizer's parameters, kept from step to step."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._places: dict[tuple[torch.device, torch.dtype, bool], Place] = {}
        self._slots: dict[Tensor, Slot] = {}

    def place_of(self, p: Tensor) -> Place:
        """Raises RuntimeError if the backend that was named cannot serve p."""
        key = (p.device, p.dtype, ops.is_dense(p))
        if key not in self._places:
            self._places[key] = Place(p.device, p.dtype, backends.choose(self._backend, *key)[0])
        return self._places[key]

    def slot_of(self, p: Tensor) -> Slot:
        """The slot of p: a new one if it has none, or was cast, moved or laid out anew."""
        slot = self._slots.get(p)
        if slot is None or not fits(slot.old, p):
            slot = Slot(self.place_of(p), torch.empty_like(p, requires_grad=False))
            self._slots[p] = slot
        return slot

    def buckets(self, groups: list[dict[str, Any]]) -> list[Bucket]:
        """All parameters that have a gradient. A gradient in another layout is laid out like its
        parameter.

        Raises:
            ValueError: a gradient is sparse.
        """
        buckets: dict[tuple[int, Place], Bucket] = {}
        for index, group in enumerate(groups):
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout is not torch.strided:
                    ops.check_tensor(f"params[{i}].grad of parameter group {index}", grad)
                if not fits(grad, p) or grad.is_neg():
                    grad = p.grad = laid_out_like(p, grad)
                slot = self.slot_of(p)
                bucket = buckets.get((index, slot.place))
                if bucket is None:
                    bucket = buckets[(index, slot.place)] = Bucket(group, slot.place)
                bucket.params.append(p)
                bucket.grads.append(grad)
                bucket.slots.append(slot)
        return list(buckets.values())


def fits(tensor: Tensor, p: Tensor) -> bool:
    """Whether a tensor can stand beside p in a list: dtype, device, shape and order in memory."""
    if tensor.dtype is not p.dtype or tensor.device != p.device or tensor.shape != p.shape:
        return False
    if tensor.is_contiguous() and p.is_contiguous():  # the usual case, and cheaper than strides
        return True
    return ops.same_layout(tensor, p) or not ops.is_dense(p)


def laid_out_like(p: Tensor, tensor: Tensor) -> Tensor:
    """A copy with the dtype, device and layout of p.

    Raises:
        ValueError: the shapes differ.
    """
    if tensor.shape != p.shape:
        raise ValueError(
            f"a gradient or momentum buffer has shape {tuple(tensor.shape)} and its parameter has "
            f"{tuple(p.shape)}: give it the parameter's shape"
        )
    return torch.empty_like(p, requires_grad=False).copy_(tensor)
