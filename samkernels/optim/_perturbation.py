"""From the direction of a variant to perturbed weights, and back; what is kept in between."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from samkernels import backends, checks, ops
from samkernels.backends import Dots, Mix, TensorList
from samkernels.optim import _shards
from samkernels.optim._lists import Bucket, Place, Slot, Slots, current_stream, fits, laid_out_like
from samkernels.optim._ranks import Exchange
from samkernels.optim._rule import EPS, Combination, Lists, Products, over_shards

if TYPE_CHECKING:
    from samkernels.optim._variant import Variant


@dataclass
class Perturbation:
    """What the second step, or a restore, needs to know of the first one."""

    # Buckets of the first step while it is under way, each with its journal: not empty if it moved.
    moving: list[tuple[Bucket, list[bool]]] = field(default_factory=list)
    moved: list[list[Slot]] = field(default_factory=list)  # exactly those that did, by bucket
    first_grads: dict[Slot, Tensor] = field(default_factory=dict)  # empty if nobody reads g1
    has_second_pass: bool = True
    is_unscaled: bool = False  # g1, by first_step
    ascent_square: Tensor | None = None  # its root is not finite where the step is to be skipped
    # g1.g1 of the lists that it was measured of.
    first_dots: list[tuple[list[Slot], Dots]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(
        default_factory=list
    )  # of spread_overflow, or for want of a second pass
    # The parameters of `moved`, and their versions when they had moved.
    watched: list[tuple[TensorList, list[int]]] = field(default_factory=list)
    exchange: Exchange | None = None  # where g1 and its norm of all ranks replace those of this one
    streams: dict[torch.device, Any] = field(default_factory=dict)  # of the first step

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def settle(self) -> None:
        """At the end of the first step, or when it was interrupted: take in what has moved."""
        moved = [bucket for bucket, journal in self.moving if journal]
        self.moved += [bucket.slots for bucket in moved]
        self.watch(moved)
        self.moving.clear()  # and with it the gradients, which nobody may need any more

    def watch(self, buckets: Sequence[Bucket]) -> None:
        """Note the versions of parameters that have moved."""
        for bucket in buckets:
            params = bucket.written
            self.watched.append((params, list(map(_version_of, params))))

    def written(self) -> set[int]:
        """The ids of parameters (or of what lies here of them) written since they moved."""
        return {
            id(p)
            for params, versions in self.watched
            for p, version in zip(params, versions, strict=True)
            if _version_of(p) != version
        }

    def check_unwritten(self) -> None:
        """Raises RuntimeError if a parameter was written since it moved."""
        for params, versions in self.watched:
            now = list(map(_version_of, params))
            if now == versions:
                continue
            written = next(p for p, v, n in zip(params, versions, now, strict=True) if v != n)
            raise RuntimeError(
                f"a parameter of shape {tuple(written.shape)} was written while it was at "
                "w + e(w): w takes its place again, and what was written would be lost. Write "
                "weights (another optimizer's step, averaging, clamping, nn.Embedding(max_norm=..) "
                "in its forward) between whole steps. The weights were restored."
            )

    @cached_property
    def slots(self) -> dict[Slot, None]:
        """Those that moved, in order, once that is settled; a restore takes them out."""
        return dict.fromkeys(chain.from_iterable(self.moved))

    def moved_just(self, buckets: Sequence[Bucket]) -> bool:
        """Whether these are the buckets that moved, as a look at them tells; False may be wrong."""
        if len(buckets) != len(self.moved):
            return False
        return all(map(operator.is_, [bucket.slots for bucket in buckets], self.moved))

    def note_streams(self, buckets: Sequence[Bucket]) -> None:
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
            tensors += [] if self.ascent_square is None else [self.ascent_square]
            tensors += [x for _, dots in self.first_dots for x in dots]
            for tensor in tensors:
                if tensor.device == device:
                    tensor.record_stream(current)

    def old_of(self, bucket: Bucket) -> TensorList:
        """w; of a parameter that was not perturbed, for want of g1, w is the parameter itself."""
        for slots in self.moved:
            if slots is bucket.slots:
                return bucket.old
        if all(map(self.slots.__contains__, bucket.slots)):
            return bucket.old
        return [slot.old if slot in self.slots else slot.local for slot in bucket.slots]


_version_of = operator.attrgetter("_version")


def lists_of(
    sam: Variant, bucket: Bucket, perturbation: Perturbation, first: bool = False
) -> Lists:
    """The lists of a bucket by name, in the first step or in the second."""

    def find(name: str, of: Bucket) -> TensorList:
        if name == "w":
            return of.params if first else perturbation.old_of(of)
        if name == ("g1" if first or not perturbation.has_second_pass else "g2"):
            return of.grads
        if name == "g1":
            if not (sam.keeps_g1 or sam.track_statistics):
                raise KeyError(f'{type(sam).__name__} reads "g1": say keeps_g1 = True in it')
            return [perturbation.first_grads[slot] for slot in of.slots]
        if name in sam.own_state:
            return [
                slot.own[name] if name in slot.own else torch.zeros_like(slot.old)
                for slot in of.slots
            ]
        raise KeyError(f"a step of {type(sam).__name__} has no list {name!r}")

    return Lists(bucket, find, sam.own_options)


class Axes(NamedTuple):
    """What an optimizer composes with its direction; see SAM's arguments."""

    norm: str | None = "global"
    eps: float = EPS
    mask: Mapping[Tensor, Tensor] | None = None
    sign: float = 1.0  # -1: against the direction


class Aim(NamedTuple):
    """Of one bucket: along what, how far, and with which T."""

    bucket: Bucket
    direction: TensorList
    square: Tensor
    rho: float | Tensor
    eta: float | None


def aim(
    lists: Sequence[Lists],
    direction: Callable[[Lists], str | Combination],
    axes: Axes,
    perturbation: Perturbation,
    saves: bool = True,
) -> list[Aim]:
    """Evaluate the direction of each bucket and measure it; no parameter moves yet.

    Args:
        saves: w is in the parameters, else in the room for it.
    """
    directions = [direction(x) for x in lists]
    spoiled = None
    if any([x.early for x in lists]):
        # A state that takes in what is not finite would be lost.
        spoiled = Products(lists)["g1.g1"]
        for x in lists:
            x.write(x.early, ascent_square=x.bucket.bring(spoiled, torch.float64))
    moved: list[tuple[Lists, TensorList, float | None]] = []  # and eta
    measured: list[Dots] = []
    by_weight: dict[int, Dots] = {}  # |w|^2 of the tensors of those that are scaled by it
    for x, d in zip(lists, directions, strict=True):
        bucket = x.bucket
        if not bucket.kind.is_moved:
            continue
        tensors, scaling, eta = x.resolve(d), x.scaling, None
        if scaling == "elementwise":
            eta = x.option("eta", 0.0)
            measured.append(bucket.ops.dots([tensors], x["w"], eta))
        else:
            measured.append(bucket.ops.dots([tensors]))
        if scaling == "tensor":
            by_weight[len(moved)] = bucket.ops.dots([x["w"]])
        moved.append((x, tensors, eta))
    if not moved:
        perturbation.ascent_square = Products(lists)["g1.g1"]
        return []
    buckets = [x.bucket for x, _, _ in moved]
    of_weights = [buckets[i] for i in by_weight]
    whole = over_shards([*measured, *by_weight.values()], [*buckets, *of_weights])
    by_weight = dict(zip(by_weight, whole[len(buckets) :], strict=True))

    # What is not needed is not taken out of the sums: each view takes the host a while.
    squares: list[Tensor | None] = []  # |T d|^2 of each tensor, if that is needed
    totals: list[Tensor] = []
    for i, (x, tensors, eta) in enumerate(moved):
        dots, square = whole[i], None
        if i in by_weight:
            square = dots.per_tensor[:, 0] * by_weight[i].per_tensor[:, 0]
        elif axes.norm == "tensor":
            square = dots.per_tensor[:, 0]
        squares.append(square)
        totals.append(square.sum() if i in by_weight and square is not None else dots.total[0])
        if tensors is x.bucket.grads:
            known = dots if eta is None else Dots(dots.total[1:], dots.per_tensor[:, 1:])
            perturbation.first_dots.append((x.bucket.slots, known))
    total = ops.total_of(totals)
    perturbation.ascent_square = total if spoiled is None else total + 0 * spoiled.to(total.device)

    aims = []
    for i, (x, tensors, eta) in enumerate(moved):
        bucket, of_tensors = x.bucket, squares[i]
        square = bucket.bring(perturbation.ascent_square, torch.float64)
        if axes.norm == "tensor" and of_tensors is not None:
            # Of all, so that a tensor whose norm is not finite lets none move.
            square = (of_tensors + 0 * square).contiguous()
        elif axes.norm is None:
            square = torch.where(square.isfinite() & (square > 0), 1.0, square)
        rho = x.rho(axes.sign)
        if i in by_weight:
            rho = bucket.bring(by_weight[i].per_tensor[:, 0] * rho)
        if axes.mask is not None:
            tensors = _masked(bucket, tensors, axes.mask, saves)
        aims.append(Aim(bucket, tensors, square, rho, eta))
    return aims


def _masked(
    bucket: Bucket, direction: TensorList, of: Mapping[Tensor, Tensor], saves: bool
) -> TensorList:
    """In the room for w if that is still to be saved. The norm is that of the whole direction."""
    masks: list[Tensor] = []
    for slot in bucket.slots:
        mask = of.get(slot.param)
        if mask is None:
            mask = torch.ones_like(slot.old)
        mask = _shards.local(mask)
        masks.append(mask if fits(mask, slot.old) else laid_out_like(slot.old, mask))
    room = bucket.old if saves else [torch.empty_like(mask) for mask in masks]
    bucket.ops.mix_(room, Mix(direction, masks, function="product"))
    return room


def perturb(
    aims: Sequence[Aim], eps: float, perturbation: Perturbation, saves: bool = True
) -> None:
    """saves: as of `aim`."""
    for bucket, direction, square, rho, eta in aims:
        journal: list[bool] = []
        perturbation.moving.append((bucket, journal))
        bucket.ops.perturb_(
            bucket.params,
            direction,
            bucket.old,
            square=square,
            rho=rho,
            eta=eta,
            eps=eps,
            rounds_at_random=True,
            journal=journal,
            saves=saves,
        )


def _lost_memory(p: Tensor, old: Tensor) -> bool:
    return p.numel() > 0 and checks.has_address(old) and p.data_ptr() == 0


def restore(slots: dict[Slot, None], known: Slots) -> None:
    """Restores and removes what is in `slots`; what may be restored later stays in there."""
    lists: dict[tuple[Place, str], list[Slot]] = {}
    lost = []
    for slot in slots:
        p = slot.local
        if p.shape != slot.old.shape or _lost_memory(p, slot.old):
            lost.append(slot)
            continue
        # A parameter that was cast or laid out anew in between still gets its values back; a
        # wrapper by its own copy_.
        backend = slot.place.backend if known.serves(slot) else "foreach"
        if not slot.place.has_addresses:
            backend = "reference"
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
