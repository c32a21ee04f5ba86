"""From parameters and gradients to lists that one backend takes, and what is kept between the
steps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from samkernels import backends, ops
from samkernels.backends import Backend, TensorList
from samkernels.optim import _shards
from samkernels.optim._ranks import Exchange

T = TypeVar("T")


@dataclass(eq=False)
class Place:
    """Where a parameter lives and who serves it. One object for all that are alike: compared by
    identity."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    process_groups: tuple[Any, ...] = ()  # that parameters here are sharded over

    def __post_init__(self) -> None:
        self.ops = backends.get(self.backend)


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
    # What was made of options of the group, and of which values.
    made: dict[Callable[..., Any], tuple[tuple[Any, ...], Any]]

    def __post_init__(self) -> None:
        self.ops: Backend = self.place.ops  # these lists were checked when they were made

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
        if norm.dtype is dtype and norm.dim() == 0 and norm.device == self.place.device:
            return norm
        return norm.reshape(()).to(self.place.device, dtype, non_blocking=True)

    def select(self, keep: Callable[[Slot], bool]) -> Bucket:
        """The part whose slots satisfy `keep`; the bucket itself if all do."""
        indices = [i for i, slot in enumerate(self.slots) if keep(slot)]
        if len(indices) == len(self.slots):
            return self
        slots = [self.slots[i] for i in indices]
        return bucket_of(self.group, self.place, slots, [self.grads[i] for i in indices])

    def checked(self, make: Callable[..., T], *values: Any) -> T:
        """make(*values, like=params[0]), which checks options of the group; for values that are
        plain and the very same as in the last step, what it made then."""
        # Compared by identity: True is not 1, and tensors may change.
        known = self.made.get(make)
        if known is not None and all(map(operator.is_, values, known[0])):
            return known[1]
        made = make(*values, like=self.params[0])
        if all(map(_is_plain, values)):
            self.made[make] = values, made
        return made

    def without_gradients(self) -> Bucket:
        """What the next step may begin with. Parts of DTensors are looked up anew: FSDP2 may have
        replaced them."""
        are_whole = all(map(operator.is_, self.params, map(_param_of, self.slots)))
        return replace(self, params=self.params if are_whole else [], grads=[])


@dataclass
class Perturbation:
    """What the second step, or a restore, needs to know of the first one."""

    # Buckets of the first step while it is under way, each with its journal: not empty if it moved.
    moving: list[tuple[Bucket, list[bool]]] = field(default_factory=list)
    moved: list[list[Slot]] = field(default_factory=list)  # exactly those that did, by bucket
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
    streams: dict[torch.device, Any] = field(default_factory=dict)  # of the first step

    def remove_hook(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def settle(self) -> None:
        """At the end of the first step, or when it was interrupted: take in what has moved."""
        self.moved += [bucket.slots for bucket, journal in self.moving if journal]
        self.moving.clear()  # and with it the gradients, which nobody may need any more

    @cached_property
    def slots(self) -> dict[Slot, None]:
        """Those that moved, in order, once that is settled; a restore takes them out."""
        return dict.fromkeys(chain.from_iterable(self.moved))

    def moved_just(self, buckets: list[Bucket]) -> bool:
        """Whether these are the buckets that moved, as a look at them tells; False may be wrong."""
        if len(buckets) != len(self.moved):
            return False
        return all(map(operator.is_, [bucket.slots for bucket in buckets], self.moved))

    def note_streams(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            device = bucket.place.device
            if device not in self.streams:
                self.streams[device] = current_stream(device)

    def record_streams(self) -> None:
        """Before the second step or a restore. Memory goes back to the stream that it was allocated
        on as soon as nobody holds it: where another one reads it now, the allocator has to know."""
        for device, stream in self.streams.items():
            current = current_stream(device)
            if current == stream:
                continue
            tensors = [*self.first_grads.values(), *(slot.old for slot in self.slots)]
            tensors += [x for x in (self.ascent_norm, self.first_norm) if x is not None]
            tensors += [x for _, n in self.first_norms for x in (n.total, n.per_tensor)]
            for tensor in tensors:
                if tensor.device == device:
                    tensor.record_stream(current)

    def forget_first_norms(self) -> None:
        """They were of another g1 than the update is made with."""
        self.first_norm = None
        self.first_norms.clear()

    def old_of(self, bucket: Bucket) -> TensorList:
        """w; of a parameter that was not perturbed, for want of g1, w is the parameter itself."""
        for slots in self.moved:
            if slots is bucket.slots:
                return bucket.old
        if all(map(self.slots.__contains__, bucket.slots)):
            return bucket.old
        return [slot.old if slot in self.slots else slot.local for slot in bucket.slots]


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in (float, int, bool)


def refuse_capture() -> None:
    """Raise RuntimeError while a CUDA graph is captured: a replay would make anew what is made now,
    such as momentum, and lose what it held."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and this step makes memory and state of the optimizer "
            "that every replay would make anew: make one step before the capture"
        )


def current_stream(device: torch.device) -> Any:
    """None where there are no streams."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


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
        # Per group the buckets of the last step, without gradients.
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

    def forget_lists(self) -> None:
        """The next step looks closely. Nobody holds state that is about to be replaced then."""
        self._last.clear()

    def buckets(
        self, groups: list[dict[str, Any]], perturbation: Perturbation | None = None
    ) -> list[Bucket]:
        """All parameters that have a gradient. Of a gradient in another layout there is a copy in
        its parameter's, and a parameter that was cast, moved or laid out anew gets a new slot.

        Raises:
            RuntimeError: a parameter that the perturbation moved would get a new slot.
            ValueError: a gradient is sparse.
        """
        buckets: list[Bucket] = []
        for index, group in enumerate(groups):
            current = self._as_before(index, group)
            if current is None:
                current = self._look_closely(index, group, perturbation)
                if not current:
                    continue
                self._last[index] = [bucket.without_gradients() for bucket in current]
            buckets += current
        return buckets

    def _as_before(self, index: int, group: dict[str, Any]) -> list[Bucket] | None:
        """The buckets of the last step with the gradients of now, if nothing else differs."""
        last = self._last.get(index, [])
        if len(last) != 1:  # none, or more than one place in a group
            return None
        (bucket,) = last
        read = bucket.ops.gradients_of(group["params"], bucket.params)
        if read is None:
            read = _read_alike(bucket, group)
        if read is None:
            return None
        params, grads = read
        return [Bucket(group, bucket.place, bucket.slots, params, grads, bucket.old, bucket.made)]

    def _look_closely(
        self, index: int, group: dict[str, Any], perturbation: Perturbation | None
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
                if perturbation is not None and slot in perturbation.slots:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(p.shape)} changed its shape, dtype, device "
                        "or layout between first_step and second_step. The weights were restored."
                    )
                refuse_capture()
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


def _read_alike(bucket: Bucket, group: dict[str, Any]) -> tuple[TensorList, TensorList] | None:
    """Backend.gradients_of for all backends, and for shards."""
    params = [p for p in group["params"] if p.grad is not None]
    if len(params) != len(bucket.slots):
        return None
    if not all(map(operator.is_, params, map(_param_of, bucket.slots))):
        return None
    here = _shards.local_pairs(params, [p.grad for p in params])
    if here is None:
        return None
    params, grads = here
    if any(map(Tensor.is_neg, grads)):
        return None
    backend = bucket.ops
    try:
        prepared = backend.prepare(params), backend.prepare(grads)
        return prepared if backend.are_alike(bucket.old, *prepared) else None
    except (RuntimeError, TypeError):  # a tensor without memory; the closer look finds words for it
        return None


_param_of = operator.attrgetter("param")


def _place_key(p: Tensor) -> tuple[torch.device, torch.dtype, bool, tuple[Any, ...]]:
    here = _shards.local(p)
    return here.device, here.dtype, ops.is_dense(here), _shards.process_groups(p)


def bucket_of(
    group: dict[str, Any], place: Place, slots: list[Slot], grads: list[Tensor]
) -> Bucket:
    params = place.ops.prepare([slot.local for slot in slots])
    old = place.ops.prepare([slot.old for slot in slots])
    return Bucket(group, place, slots, params, place.ops.prepare(grads), old, {})


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
