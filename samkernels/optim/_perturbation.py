"""Perturb weights along the direction of a variant, keep what is needed later, and restore."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
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


VersionsOf = Callable[[TensorList], list[int]]


class Perturbation:
    """Holds what the second step, or a restore, needs to know of the first one.

    Attributes:
        moving: buckets of the first step while it is under way, each with its journal, which is not
            empty if the bucket moved.
        moved: exactly the slots that moved, by bucket.
        first_grads: g1; empty if nobody reads it.
        has_second_pass: whether first_step() asked for one.
        is_unscaled: whether first_step has divided g1 by the scale of a GradScaler.
        ascent_square: its root is not finite where the step is to be skipped.
        first_dots: g1.g1, each with the slots that it was measured for.
        hooks: those of spread_overflow, or those for want of a second pass.
        watched: the parameters of `moved`, each list with what reads their versions, and these
            when they had moved.
        exchange: g1 and its norm of all ranks, where they replace those of this one.
        streams: those of the first step, by device.
    """

    def __init__(self, moved: Sequence[list[Slot]] = (), is_unscaled: bool = False) -> None:
        self.moving: list[tuple[Bucket, list[bool]]] = []
        self.moved: list[list[Slot]] = list(moved)
        self.first_grads: dict[Slot, Tensor] = {}
        self.has_second_pass = True
        self.is_unscaled = is_unscaled
        self.ascent_square: Tensor | None = None
        self.first_dots: list[tuple[list[Slot], Dots]] = []
        self.hooks: list[RemovableHandle] = []
        self.watched: list[tuple[TensorList, VersionsOf, list[int]]] = []
        self.exchange: Exchange | None = None
        self.streams: dict[torch.device, Any] = {}

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def settle(self) -> None:
        """Take in what has moved, at the end of the first step, or when it was interrupted."""
        for bucket, journal in self.moving:
            if journal:
                self.moved.append(bucket.slots)
                self.watch(bucket)
        self.moving.clear()

    def watch(self, bucket: Bucket) -> None:
        """Note the versions of parameters that have moved."""
        params, versions_of = bucket.whole, bucket.ops.versions_of
        self.watched.append((params, versions_of, versions_of(params)))

    def written(self) -> set[int]:
        """Return the ids of parameters (or of what lies here of them) written since they moved."""
        return {
            id(p)
            for params, versions_of, versions in self.watched
            for p, version, now in zip(params, versions, versions_of(params), strict=True)
            if now != version
        }

    def check_unwritten(self) -> None:
        """Raise RuntimeError if a parameter was written since it moved."""
        for params, versions_of, versions in self.watched:
            now = versions_of(params)
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
        """Return the slots that moved, in order, once that is settled; a restore takes them out."""
        return dict.fromkeys(chain.from_iterable(self.moved))

    def moved_just(self, buckets: Sequence[Bucket]) -> bool:
        """Say at a glance whether these are the buckets that moved; False may be wrong."""
        are_as_many = len(buckets) == len(self.moved)
        return are_as_many and all(map(operator.is_, map(_slots_of, buckets), self.moved))

    def note_streams(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            place = bucket.place
            if place.has_streams and place.device not in self.streams:
                self.streams[place.device] = current_stream(place.device)

    def record_streams(self) -> None:
        """Tell the allocator, before the second step or a restore, if another stream reads memory
        now: it goes back to the stream that it was allocated on as soon as nobody holds it."""
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
        """Return w; if a parameter was not perturbed, for want of g1, w is the parameter itself."""
        for slots in self.moved:
            if slots is bucket.slots:
                return bucket.old
        if all(map(self.slots.__contains__, bucket.slots)):
            return bucket.old
        return [slot.old if slot in self.slots else slot.local for slot in bucket.slots]


_slots_of = operator.attrgetter("slots")


def lists_of(
    sam: Variant, buckets: Sequence[Bucket], perturbation: Perturbation, first: bool = False
) -> list[Lists]:
    """Return the lists of each bucket by name, in the first step or in the second."""
    only = "g1" if first or not perturbation.has_second_pass else "g2"

    def find(name: str, of: Bucket) -> TensorList:
        if name == only:
            return of.grads
        if name == "w":
            return of.params if first else perturbation.old_of(of)
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

    own_options = sam.own_options
    return [Lists(bucket, find, own_options) for bucket in buckets]


class Axes(NamedTuple):
    """Holds what an optimizer composes with its direction; see SAM's arguments."""

    norm: str | None = "global"
    eps: float = EPS
    mask: Mapping[Tensor, Tensor] | None = None
    sign: float = 1.0  # -1: against the direction


class Aim:
    """Says of one bucket along what, how far and with which T it moves.

    Attributes:
        dots: those of the direction, with T if T is elementwise.
        of_weights: |w|^2 of each tensor if T is ||w_l||, else None.
        square: its root divides the direction; it is there when all are measured.
    """

    square: Tensor

    def __init__(self, bucket: Bucket, direction: TensorList, w: TensorList, sign: float) -> None:
        self.bucket, self.direction = bucket, direction
        self.rho, scaling, eta = bucket.ascent(sign)
        dots = bucket.ops.dots
        self.eta = eta if scaling == "elementwise" else None
        self.dots = dots([direction]) if self.eta is None else dots([direction], w, eta)
        self.of_weights = dots([w]) if scaling == "tensor" else None

    def squares(self) -> Tensor:
        """Return |T d|^2 of each tensor."""
        squares = self.dots.per_tensor[:, 0]
        return squares if self.of_weights is None else squares * self.of_weights.per_tensor[:, 0]

    def total(self) -> Tensor:
        """Return |T d|^2 of the bucket."""
        return self.dots.total[0] if self.of_weights is None else self.squares().sum()


def directions_of(
    lists: Sequence[Lists], rule: Callable[[Lists], str | Combination]
) -> tuple[list[tuple[Bucket, TensorList]], Tensor | None]:
    """Return the direction of each bucket that is to move; and a number that is not finite if a
    state that lies in the direction was kept from taking g1 in."""
    directions = [rule(x) for x in lists]
    spoiled = None
    if any([x.early for x in lists]):
        # A state that takes in what is not finite would be lost.
        spoiled = Products(lists)["g1.g1"]
        for x in lists:
            x.write(x.early, None, x.bucket.bring(spoiled, torch.float64))
    along = [
        (x.bucket, x.resolve(d))
        for x, d in zip(lists, directions, strict=True)
        if x.bucket.kind.is_moved
    ]
    return along, spoiled


def aim(
    along: Sequence[tuple[Bucket, TensorList]],
    axes: Axes,
    perturbation: Perturbation,
    spoiled: Tensor | None = None,
    saves: bool = True,
) -> list[Aim]:
    """Measure the directions; no parameter moves yet.

    Args:
        along: some buckets, each with its direction.
        spoiled: the number that `directions_of` returned.
        saves: whether w is in the parameters, else in the room for w.
    """
    aims = []
    is_sharded = False
    for bucket, direction in along:
        w = bucket.params if saves else bucket.old
        aims.append(Aim(bucket, direction, w, axes.sign))
        is_sharded = is_sharded or bool(bucket.place.process_groups)
    if is_sharded:
        _sum_over_shards(aims)
    total = ops.total_of([aim.total() for aim in aims])
    perturbation.ascent_square = total if spoiled is None else total + 0 * spoiled.to(total.device)
    for aim in aims:
        bucket = aim.bucket
        if aim.direction is bucket.grads:
            known = aim.dots
            if aim.eta is not None:
                known = Dots(known.total[1:], known.per_tensor[:, 1:])
            perturbation.first_dots.append((bucket.slots, known))
        square = bucket.bring(perturbation.ascent_square, torch.float64)
        if axes.norm == "tensor":
            # `square` is of all tensors: one whose norm is not finite lets none move.
            square = (aim.squares() + 0 * square).contiguous()
        elif axes.norm is None:
            square = torch.where(square.isfinite() & (square > 0), 1.0, square)
        aim.square = square
        if aim.of_weights is not None:
            aim.rho = bucket.bring(aim.of_weights.per_tensor[:, 0] * aim.rho)
        if axes.mask is not None:
            aim.direction = _masked(bucket, aim.direction, axes.mask, saves)
    return aims


def _sum_over_shards(aims: Sequence[Aim]) -> None:
    """Add up what was measured of shards, in one all-reduce."""
    scaled = [aim for aim in aims if aim.of_weights is not None]
    measured = [aim.dots for aim in aims] + [aim.of_weights for aim in scaled if aim.of_weights]
    whole = over_shards(measured, [aim.bucket for aim in (*aims, *scaled)])
    for aim, dots in zip(aims, whole, strict=False):
        aim.dots = dots
    for aim, dots in zip(scaled, whole[len(aims) :], strict=True):
        aim.of_weights = dots


def _masked(
    bucket: Bucket, direction: TensorList, of: Mapping[Tensor, Tensor], saves: bool
) -> TensorList:
    """Return the masked direction: in the room for w, if w is still to be saved. The norm stays
    that of the whole direction."""
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
    """Move the parameters as `aim` has measured; `saves` is that of `aim`."""
    for aim in aims:
        bucket = aim.bucket
        journal: list[bool] = []
        perturbation.moving.append((bucket, journal))
        bucket.ops.perturb_(
            bucket.params,
            aim.direction,
            bucket.old,
            square=aim.square,
            rho=aim.rho,
            eta=aim.eta,
            eps=eps,
            rounds_at_random=True,
            journal=journal,
            saves=saves,
        )


def _lost_memory(p: Tensor, old: Tensor) -> bool:
    return p.numel() > 0 and checks.has_address(old) and p.data_ptr() == 0


def restore(slots: dict[Slot, None], known: Slots) -> None:
    """Restore and remove what is in `slots`; slots that may be restored later stay there."""
    lists: dict[tuple[Place, str], list[Slot]] = {}
    lost = []
    for slot in slots:
        p = slot.local
        if p.shape != slot.old.shape or _lost_memory(p, slot.old):
            lost.append(slot)
            continue
        # A parameter that was cast or laid out anew in between still gets its values back; a
        # wrapper gets them by its own copy_.
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
            f"a parameter of shape {shape} changed its shape or lost its memory while it was at "
            f"w + e(w): {len(lost)} parameters cannot be restored. All "
            "others were; if the memory comes back, call restore() again."
        )
