"""The parts of a batch, each with a perturbation of its own: what is kept from part to part."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from samkernels import ops
from samkernels.optim._lists import Bucket, Perturbation, Slot


class PartSums:
    """g1, where it is kept, and g2, added up over the parts of a batch."""

    def __init__(self) -> None:
        self.count = 0
        self._ascent_norms: list[Tensor] = []
        self._first: dict[Slot, Tensor] = {}
        self._second: dict[Slot, Tensor] = {}

    def add(self, perturbation: Perturbation, buckets: list[Bucket]) -> None:
        """Take in a part whose second pass is done. A gradient that it lacks counts as 0."""
        assert perturbation.ascent_norm is not None
        self.count += 1
        self._ascent_norms.append(perturbation.ascent_norm)
        for bucket in buckets:
            _add(self._second, zip(bucket.slots, bucket.grads, strict=True))
            # One of the two gradients alone does not count, as where the batch is one part.
            both = [slot for slot in bucket.slots if slot in perturbation.first_grads]
            _add(self._first, ((slot, perturbation.first_grads[slot]) for slot in both))

    def means_into(self, perturbation: Perturbation) -> dict[Slot, Tensor]:
        """Make the perturbation of the last part one of all parts. Returns the means of g2."""
        # One part whose norm is not finite makes this one so, and the step is skipped.
        perturbation.ascent_norm = ops.total_norm(self._ascent_norms)
        perturbation.first_grads = self._means(self._first)
        perturbation.forget_first_norms()
        return self._means(self._second)

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
