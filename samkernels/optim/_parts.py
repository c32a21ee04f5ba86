"""Take a batch in parts, each with a perturbation of its own, and keep sums from part to part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor

from samkernels import ops
from samkernels.optim import _shards
from samkernels.optim._bases import put_grad
from samkernels.optim._lists import Bucket, Slot
from samkernels.optim._perturbation import Perturbation

if TYPE_CHECKING:
    from samkernels.optim.sam import SAM

T = TypeVar("T")


class Parts(Generic[T]):
    """Gives each loop over SAM.parts a generator that nobody else holds: if the body raises, it
    ends at once and restores the weights, though the parts may have a name."""

    def __init__(self, make: Callable[[], Iterator[T]]) -> None:
        self._make = make
        self._begun: Iterator[T] | None = None  # the iterator of next()

    def __iter__(self) -> Iterator[T]:
        return self._make() if self._begun is None else self._begun

    def __next__(self) -> T:
        if self._begun is None:
            self._begun = self._make()
        return next(self._begun)


def check_parts(sam: SAM) -> None:
    """Raise RuntimeError if parts would do by themselves what a step does once."""
    if sam._direction_has_state:
        raise RuntimeError(
            f"parts(): each part would move the {', '.join(sam.own_state)} of "
            f"{type(sam).__name__} by itself; make the two passes with the whole batch"
        )
    if getattr(sam._when, "needs_norm", False):
        raise RuntimeError(
            "parts(): each part would decide by its own norm whether there is a second pass; "
            "make the passes with the whole batch, or take another when"
        )


class PartSums:
    """Holds g1, where it is kept, and g2, added up over the parts of a batch."""

    def __init__(self) -> None:
        self.count = 0
        self._ascent_squares: list[Tensor] = []
        self._first: dict[Slot, Tensor] = {}
        self._second: dict[Slot, Tensor] = {}

    def add(self, perturbation: Perturbation, buckets: list[Bucket]) -> None:
        """Take in a part whose second pass is done. A gradient that it lacks counts as 0."""
        self.count += 1
        if perturbation.ascent_square is not None:  # else this step has no second pass
            self._ascent_squares.append(perturbation.ascent_square)
        for bucket in buckets:
            _add(self._second, zip(bucket.slots, bucket.grads, strict=True))
        _add(self._first, perturbation.first_grads.items())

    def average_into(self, perturbation: Perturbation) -> None:
        """Make the perturbation of the last part one of all parts, and leave the means of g2 in
        `.grad`."""
        # One part whose norm is not finite makes this one so, and the step is skipped.
        if self._ascent_squares:
            perturbation.ascent_square = ops.total_of(self._ascent_squares)
        perturbation.first_grads = self._means(self._first)
        perturbation.first_dots.clear()
        for slot, mean in self._means(self._second).items():
            if slot.param.grad is None:
                slot.param.grad = _shards.as_part_of(slot.param, mean)
            else:
                put_grad(slot.param, mean)

    def _means(self, sums: dict[Slot, Tensor]) -> dict[Slot, Tensor]:
        means = ops.means_of(list(sums.values()), self.count, [slot.old for slot in sums])
        return dict(zip(sums, means, strict=True))


def _add(sums: dict[Slot, Tensor], addends: Iterable[tuple[Slot, Tensor]]) -> None:
    known: tuple[list[Tensor], list[Tensor]] = ([], [])
    new = {}
    for slot, tensor in addends:
        if slot in sums:
            known[0].append(sums[slot])
            known[1].append(tensor)
        else:
            new[slot] = tensor
    ops.add_(*known)
    sums.update(zip(new, ops.sums_of(list(new.values())), strict=True))


def each_of(sam: SAM, batches: Iterable[T]) -> Iterator[T]:
    """Yield the parts of SAM.parts."""
    sums = PartSums()
    begun = False
    try:
        for batch in batches:
            if begun:
                sam._add_part(sums)
                sam.restore()
                sam.zero_grad()
            begun = True
            yield batch
        if sums.count:  # else one part has all of g1 and g2
            sam._add_part(sums)
            sam._average(sums)
    except BaseException:
        sam.restore()
        raise
