"""From parameters and gradients to lists that one backend takes, and what is kept between the
steps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from samkernels import backends, ops
from samkernels.backends import TensorList
from samkernels.optim import _shards
from samkernels.optim._ranks import Exchange


@dataclass(eq=False)
class Place:
    """Where a parameter lives and who serves it. One object for all that are alike: compared by
    identity."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    process_groups: tuple[Any, ...] = ()  # that parameters here are sharded over

    def prepare(self, tensors: TensorList) -> TensorList:
        return backends.get(self.backend).prepare(tensors)

    def are_alike(self, first: TensorList, *others: TensorList) -> bool:
        return backends.get(self.backend).are_alike(first, *others)


@dataclass(eq=False)
class Slot:
    """What is kept of a parameter from step to step. Compared by identity."""

    param: Tensor
    place: Place
    old: Tensor  # room for w, laid out like local

    @property
    def local(self) -> Tensor:
        """What the kernels work on: param, or of a DTensor the part that lies here. Asked for anew
        in each step, since FSDP2 may replace it."""
        return _shards.local(self.param)


@dataclass
class Bucket:
    """Parameters of one group in one place, and the gradients that they have now."""

    group: dict[str, Any]
    place: Place
    slots: list[Slot]
    params: TensorList  # local, as is all below
    grads: TensorList
    old: TensorList  # of the slots

    @property
    def options(self) -> dict[str, Any]:
        """For the ops: who serves, and that the lists were checked when they were made."""
        return {"backend": self.place.backend, "validate": False}

    @property
    def granularity(self) -> str:
        return self.group.get("granularity", "element")

    @property
    def numel(self) -> int:
        """Elements of the parameters, those in other processes too."""
        return sum(slot.param.numel() for slot in self.slots)

    def bring(self, norm: Tensor | None) -> Tensor | None:
        """A norm over all buckets, or another scalar, on this one's device, in the dtype that ops
        take it in."""
        if norm is None:
            return None
        dtype = torch.float64 if self.place.dtype is torch.float64 else torch.float32
        return norm.reshape(()).to(self.place.device, dtype, non_blocking=True)

    def select(self, keep: Callable[[Slot], bool]) -> Bucket:
        """The part whose slots satisfy `keep`; the bucket itself if all do."""
        indices = [i for i, slot in enumerate(self.slots) if keep(slot)]
        if len(indices) == len(self.slots):
            return self
        slots = [self.slots[i] for i in indices]
        return bucket_of(self.group, self.place, slots, [self.grads[i] for i in indices])


@dataclass
class Perturbation:
    """What the second step, or a restore, needs to know of the first one."""

    # Buckets of the first step while it is under way, each with its journal: not empty if it moved.
    moving: list[tuple[Bucket, list[bool]]] = field(default_factory=list)
    slots: dict[Slot, None] = field(default_factory=dict)  # exactly those that moved, in order
    first_grads: dict[Slot, Tensor] = field(default_factory=dict)  # empty if nobody reads g1
    ascent_norm: Tensor | None = None  # n
    first_norm: Tensor | None = None  # n1 over all parameters, if a granularity needs it
    second_norm: Tensor | None = None  # n2, likewise; known in the second step
    # n1 and n2 of each parameter, for the lists that they were taken of.
    first_norms: list[tuple[list[Slot], ops.Norms]] = field(default_factory=list)
    second_norms: list[tuple[list[Slot], ops.Norms]] = field(default_factory=list)
    divisor: Tensor | None = None  # of u: GradScaler's scale, and what clips
    hook: RemovableHandle | None = None  # see SAM._spread_overflow
    exchange: Exchange | None = None  # where g1 and n of all ranks replace those of this one

    def remove_hook(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def settle(self) -> None:
        """At the end of the first step, or when it was interrupted: take in what has moved."""
        for bucket, journal in self.moving:
            if journal:
                self.slots.update(dict.fromkeys(bucket.slots))
        self.moving.clear()  # and with it the gradients, which nobody may need any more

    def forget_first_norms(self) -> None:
        """They were of another g1 than the update is made with."""
        self.first_norm = None
        self.first_norms.clear()

    def old_of(self, bucket: Bucket) -> TensorList:
        """w; of a parameter that was not perturbed, for want of g1, w is the parameter itself."""
        if all(map(self.slots.__contains__, bucket.slots)):
            return bucket.old
        return [slot.old if slot in self.slots else slot.local for slot in bucket.slots]


def norms_of(slots: list[Slot], measured: list[tuple[list[Slot], ops.Norms]]) -> ops.Norms | None:
    """The norms of these parameters, if just this list was measured."""
    return next((norms for of, norms in measured if of == slots), None)


def per_tensor_norms_of(
    slots: list[Slot], measured: list[tuple[list[Slot], ops.Norms]]
) -> Tensor | None:
    """The norm of each parameter, if they were measured together, perhaps with others."""
    for of, norms in measured:
        if of == slots:
            return norms.per_tensor
        index = {slot: i for i, slot in enumerate(of)}
        if all(slot in index for slot in slots):
            return torch.stack([norms.per_tensor[index[slot]] for slot in slots])
    return None


class Slots:
    """The slots of an optimizer's parameters, kept from step to step, and the perturbation."""

    def __init__(self, backend: str) -> None:
        self.perturbation: Perturbation | None = None  # between the steps
        self._backend = backend
        self._places: dict[tuple[Any, ...], Place] = {}
        self._slots: dict[Tensor, Slot] = {}
        # Per group the buckets of the last step, without parameters and gradients.
        self._last: dict[int, list[Bucket]] = {}

    def serves(self, slot: Slot) -> bool:
        """Whether the slot still suits its parameter, which may have been cast, moved or laid out
        anew since."""
        place = self._places.get(_place_key(slot.param))
        return place is slot.place and fits(slot.old, slot.local)

    def place_of(self, p: Tensor) -> Place:
        """Raises RuntimeError if the backend that was named cannot serve p."""
        key = _place_key(p)
        if key not in self._places:
            device, dtype, dense, process_groups = key
            if process_groups and not dense:
                # A shard may have gaps in one process and none in the next: their lists would
                # differ, and sums of different tensors would be added.
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has a shard with gaps in its memory: "
                    "shard a contiguous tensor"
                )
            backend = backends.choose(self._backend, device, dtype, dense)[0]
            self._places[key] = Place(device, dtype, backend, process_groups)
        return self._places[key]

    def buckets(
        self, groups: list[dict[str, Any]], perturbed: Container[Slot] = ()
    ) -> list[Bucket]:
        """All parameters that have a gradient. Of a gradient in another layout there is a copy in
        its parameter's, and a parameter that was cast, moved or laid out anew gets a new slot.

        Raises:
            RuntimeError: a parameter whose slot is in `perturbed` would get a new one.
            ValueError: a gradient is sparse.
        """
        buckets: list[Bucket] = []
        for index, group in enumerate(groups):
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if not params:
                continue
            current = _unchanged(self._last.get(index, []), group, params, grads)
            if current is None:
                current = self._look_closely(index, group, perturbed)
                self._last[index] = [replace(bucket, params=[], grads=[]) for bucket in current]
            buckets += current
        return buckets

    def _look_closely(
        self, index: int, group: dict[str, Any], perturbed: Container[Slot]
    ) -> list[Bucket]:
        """The buckets of one group, parameter by parameter."""
        by_place: dict[Place, tuple[list[Slot], list[Tensor]]] = {}
        for i, p in enumerate(group["params"]):
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                ops.check_tensor(f"params[{i}].grad of parameter group {index}", grad)
            slot = self._slots.get(p)
            if slot is None or not self.serves(slot):
                if slot in perturbed:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(p.shape)} changed its shape, dtype, device "
                        "or layout between first_step and second_step. The weights were restored."
                    )
                here = _shards.local(p)
                ops.check_tensor(f"params[{i}] of parameter group {index}", here)
                slot = Slot(p, self.place_of(p), torch.empty_like(here, requires_grad=False))
                self._slots[p] = slot
            grad = _shards.local(_shards.cut_like(p, grad))
            if not fits(grad, slot.local) or grad.is_neg():
                grad = laid_out_like(slot.local, grad)
            slots, grads = by_place.setdefault(slot.place, ([], []))
            slots.append(slot)
            grads.append(grad)
        return [bucket_of(group, place, *lists) for place, lists in by_place.items()]


def _unchanged(
    last: list[Bucket], group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
) -> list[Bucket] | None:
    """The buckets of the last step with the gradients of this one, if nothing else differs."""
    if len(last) != 1:  # none, or more than one place in a group
        return None
    (bucket,) = last
    if len(params) != len(bucket.slots):
        return None
    if not all(map(operator.is_, params, map(_param_of, bucket.slots))):
        return None
    here = _shards.local_pairs(params, grads)
    if here is None:
        return None
    params, grads = here
    if any(map(Tensor.is_neg, grads)):
        return None
    place = bucket.place
    try:
        prepared = place.prepare(params), place.prepare(grads)
        if not place.are_alike(bucket.old, *prepared):
            return None
    except (RuntimeError, TypeError):  # a tensor without memory; the closer look finds words for it
        return None
    return [Bucket(group, place, bucket.slots, *prepared, bucket.old)]


_param_of = operator.attrgetter("param")


def _place_key(p: Tensor) -> tuple[torch.device, torch.dtype, bool, tuple[Any, ...]]:
    here = _shards.local(p)
    return here.device, here.dtype, ops.is_dense(here), _shards.process_groups(p)


def bucket_of(
    group: dict[str, Any], place: Place, slots: list[Slot], grads: list[Tensor]
) -> Bucket:
    params = place.prepare([slot.local for slot in slots])
    old = place.prepare([slot.old for slot in slots])
    return Bucket(group, place, slots, params, place.prepare(grads), old)


def fits(tensor: Tensor, p: Tensor) -> bool:
    """Whether a tensor can stand beside p in a list: dtype, device, shape and order in memory."""
    if tensor.dtype is not p.dtype or tensor.device != p.device or tensor.shape != p.shape:
        return False
    return ops.same_layout(tensor, p) or not (ops.is_dense(p) or ops.overlaps_itself(tensor))


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
