"""Make the first half of a step: from g1 to perturbed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from samkernels.optim._lists import Bucket
from samkernels.optim._perturbation import Perturbation, aim, directions_of, lists_of, perturb
from samkernels.optim._ranks import start_exchange
from samkernels.optim._rule import Lists, Products
from samkernels.optim._scalers import spread_overflow

if TYPE_CHECKING:
    from samkernels.optim.sam import SAM


def begin(
    optimizer: SAM,
    perturbation: Perturbation,
    buckets: list[Bucket],
    all_ranks: Any,
) -> None:
    """Perturb, keep of g1 what is needed later, and take `.grad` over.

    Args:
        all_ranks: the group that g1 is averaged over, where ranks perturb by their own.
    """
    perturbation.note_streams(buckets)
    lists: list[Lists] = []
    if perturbation.has_second_pass:
        spoiled = None
        if optimizer.goes_along_g1:
            along = [(bucket, bucket.grads) for bucket in buckets if bucket.kind.is_moved]
        else:
            lists = lists_of(optimizer, buckets, perturbation, first=True)
            along, spoiled = directions_of(lists, optimizer.direction)
        if along:
            aims = aim(along, optimizer._axes, perturbation, spoiled)
            perturb(aims, optimizer._axes.eps, perturbation)
        else:
            lists_of_all = lists_of(optimizer, buckets, perturbation, first=True)
            perturbation.ascent_square = Products(lists_of_all)["g1.g1"]
    keeps = optimizer.keeps_g1 or optimizer.track_statistics or not perturbation.has_second_pass
    if keeps and all_ranks is None:
        for bucket in buckets:
            kept = list(bucket.grads)
            if not bucket.place.process_groups:  # FSDP2 makes new memory in each backward
                # Memory that is shared, such as DDP's buckets, may be used for g2.
                kept = [g.clone() if _shares_memory(g) else g for g in kept]
            perturbation.first_grads.update(zip(bucket.slots, kept, strict=True))
    if all_ranks is not None:
        sent = optimizer._all_params() if keeps else []
        perturbation.exchange = start_exchange(sent, perturbation.ascent_square, all_ranks)
    perturbation.settle()
    for x in lists:
        if x.waiting:
            assert perturbation.ascent_square is not None
            square = x.bucket.bring(perturbation.ascent_square, torch.float64)
            x.write(x.waiting, None, square)
    if not perturbation.has_second_pass:
        _replace_by_a_second_backward(perturbation)
        return
    for bucket in buckets:
        for p in bucket.whole:
            p.grad = None
    if optimizer._meets_scaler:
        spread_overflow(perturbation)


def _replace_by_a_second_backward(perturbation: Perturbation) -> None:
    """Leave g1 in `.grad`, to be clipped or unscaled, and let a backward that nobody asked for
    replace g1, and not add to it."""
    params = [slot.param for slot in perturbation.first_grads]

    def clear(_: Tensor) -> None:
        for p in params:
            p.grad = None
        params.clear()

    # Backward calls the hooks before it adds to `.grad`.
    perturbation.hooks = [p.register_hook(clear) for p in params if p.requires_grad]


def _shares_memory(grad: Tensor) -> bool:
    return grad._is_view() or grad.untyped_storage().nbytes() != grad.nbytes
