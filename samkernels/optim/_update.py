"""The second half of a step: from the gradients to the base optimizer's update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from samkernels import checks, ops
from samkernels.backends import Mix, SgdOptions
from samkernels.optim import _shards, _wrapping
from samkernels.optim._bases import Update, check_state
from samkernels.optim._lists import Bucket, Slot
from samkernels.optim._perturbation import Perturbation, lists_of, restore
from samkernels.optim._rule import Combination, Lists, Products, over_shards
from samkernels.optim._scalers import require_same_scale, require_unscaled_g1

if TYPE_CHECKING:
    from samkernels.optim.sam import SAM


def gradients(optimizer: SAM, perturbation: Perturbation) -> list[Bucket]:
    """g2, or where there is no second pass the only gradient; and where ranks differ, what they
    have sent replaces g1 and its norm."""
    if not perturbation.has_second_pass:
        _put_back(perturbation)
    perturbation.check_unwritten()
    buckets = optimizer._slots.buckets(optimizer.param_groups, perturbation)
    if not buckets:
        raise RuntimeError(
            "second_step found no gradient: call loss.backward() at the perturbed weights "
            "before it. The weights were restored."
        )
    if perturbation.first_grads:
        _check_first_grads_survived(buckets, perturbation.first_grads)
    exchange, perturbation.exchange = perturbation.exchange, None
    if exchange is not None:
        exchange.wait()
        perturbation.ascent_square = exchange.ascent_square
        # Of those with g2, which all ranks have or none.
        slots = [slot for bucket in buckets for slot in bucket.slots]
        perturbation.first_grads = {
            slot: exchange.first_grads[slot.param]
            for slot in slots
            if slot.param in exchange.first_grads
        }
        perturbation.first_dots.clear()  # of another g1 than the update is made with
    perturbation.record_streams()
    return buckets


def _put_back(perturbation: Perturbation) -> None:
    """The gradients that first_step took, unless a second backward has left others."""
    kept, perturbation.first_grads = perturbation.first_grads, {}
    if all(slot.param.grad is None for slot in kept):
        for slot, grad in kept.items():
            slot.param.grad = _shards.as_part_of(slot.param, grad)


def finish(
    optimizer: SAM, perturbation: Perturbation, into_old: bool = False
) -> tuple[list[Bucket], bool]:
    """Restore the weights and update them.

    Args:
        into_old: the new w may go to the room for it, and not to parameters that are moved.

    Returns:
        what was updated, and whether w lies in that room.
    """
    buckets = gradients(optimizer, perturbation)
    scale, found_inf = optimizer._of_scaler("grad_scale"), optimizer._of_scaler("found_inf")
    if found_inf is not None and scale is None:
        require_same_scale(optimizer)
    if scale is not None:
        require_unscaled_g1(optimizer, perturbation)

    # Without g1 there is nothing to mix: like torch.optim without a gradient, leave the parameter
    # alone.
    mixes_both = optimizer.keeps_g1 and perturbation.has_second_pass
    both = buckets
    if mixes_both or optimizer.track_statistics:
        both = _select(buckets, perturbation.first_grads.__contains__)
    updated = both if mixes_both else buckets
    lists = [lists_of(optimizer, bucket, perturbation) for bucket in updated]
    dots = Products(lists, scale)
    if mixes_both and lists:
        known = {id(slots): of for slots, of in perturbation.first_dots}
        if all(id(bucket.slots) in known for bucket in updated):
            dots.learn(("g1",), [known[id(bucket.slots)] for bucket in updated])
    if optimizer.track_statistics:
        _keep_statistics(optimizer, both, lists, dots, perturbation, scale)

    rule = optimizer.mix if perturbation.has_second_pass else optimizer.mix_alone
    combinations = [rule(x, dots) for x in lists]
    divisor = scale
    if optimizer.max_grad_norm is not None and lists:
        # That of a gradient is finite where the coefficients of u may be 0 times infinity.
        named = optimizer.has_norm_of if perturbation.has_second_pass else None
        square = dots.square_of(combinations) if named is None else dots[f"{named}.{named}"]
        divisor = ops.clipping_divisor(square.sqrt(), optimizer.max_grad_norm, scale)
    mixes = {
        id(x.bucket): x.mix(u, **_guards(x.bucket, perturbation, divisor, found_inf))
        for x, u in zip(lists, combinations, strict=True)
    }
    beside = [optimizer.beside(x, dots) for x in lists]
    before = [optimizer.before(x, dots) for x in lists]

    fused = optimizer._fused_base
    is_fused = fused is not None and all([fused.serves(bucket.group) for bucket in updated])
    if fused is not None and is_fused:
        # Of all groups, so that a wrong one is found before the first is updated.
        state = optimizer.state
        updates = [(update, b) for b in updated for update in fused.updates(b, state)]
        if not perturbation.moved_just(updated):
            done = {slot for bucket in updated for slot in bucket.slots}
            rest: dict[Slot, None] = {s: None for s in perturbation.slots if s not in done}
            restore(rest, optimizer._slots)
        _begin_with(lists, before, perturbation, found_inf)
        _make_all(optimizer, updates, mixes, perturbation, into_old)
        optimizer.base_optimizer._opt_called = True  # type: ignore[attr-defined]  # for its scheduler
        then = [None if of is None else x.mix(of) for x, of in zip(lists, beside, strict=True)]
    else:
        for bucket in updated:
            if fused is not None:
                check_state(fused, bucket, optimizer.state)
            checks.check_disjoint(".grad of the parameters", bucket.grads)  # u goes in there
        restore(dict(perturbation.slots), optimizer._slots)
        if found_inf is not None and found_inf.item():
            return updated, False
        for x in lists:
            x.write(x.waiting, **_guards(x.bucket, perturbation, scale, found_inf))
        _begin_with(lists, before, perturbation, found_inf)
        then = [None if of is None else _kept(x, of) for x, of in zip(lists, beside, strict=True)]
        for bucket in updated:
            bucket.ops.mix_(bucket.grads, mixes[id(bucket)])
            for slot, u in zip(bucket.slots, bucket.grads, strict=True):
                put_grad(slot.param, u)
        _step_base(optimizer, {slot.param for bucket in updated for slot in bucket.slots})
        perturbation.slots = {}  # an interrupt from here on undoes nothing
    for x, mix in zip(lists, then, strict=True):
        if mix is None and not x.waiting:
            continue
        guards = _guards(x.bucket, perturbation, scale, found_inf)
        if mix is not None:
            maximize = x.group.get("maximize", False)
            descend(x.bucket, mix._replace(**guards), maximize)
        x.write(x.waiting, **guards)
    if any(x.is_new for x in lists):
        optimizer._slots.forget_lists()  # they are of another kind now
    return updated, into_old and is_fused


def _begin_with(
    lists: Sequence[Lists],
    before: Sequence[Combination | None],
    perturbation: Perturbation,
    found_inf: Tensor | None,
) -> None:
    """What is subtracted from w before the base optimizer's step; maximize does not turn it."""
    for x, of in zip(lists, before, strict=True):
        if of is not None:
            guards = _guards(x.bucket, perturbation, None, found_inf)
            descend(x.bucket, x.mix(of, **guards), maximize=False)


def _make_all(
    optimizer: SAM,
    updates: Sequence[tuple[Update, Bucket]],
    mixes: dict[int, Mix],
    perturbation: Perturbation,
    into_old: bool,
) -> None:
    """All of them or none, whatever comes in between; unless a backend that is no single call was
    interrupted in the middle of a list: then all weights come back, and part of the state is that
    of after the step. A call that is made again does what was not done."""
    calls = [
        functools.partial(
            update.run,
            perturbation.old_of(update.bucket),
            _part_of(mixes[id(whole)], whole, update.bucket),
            optimizer.state,
            update.bucket.old if into_old and update.bucket.kind.is_moved else None,
        )
        for update, whole in updates
    ]
    try:
        for call in calls:
            call()
        perturbation.slots = {}  # nothing to restore
    except BaseException:
        journals = [update.journal for update, _ in updates]
        if any(journals) and [False] not in journals:
            for call in calls:
                call()
            perturbation.slots = {}
        raise


def _guards(
    bucket: Bucket, perturbation: Perturbation, divisor: Tensor | None, found_inf: Tensor | None
) -> dict[str, Any]:
    return {
        "divisor": bucket.bring(divisor),
        "ascent_square": bucket.bring(perturbation.ascent_square, torch.float64),
        "found_inf": bucket.bring(found_inf),
    }


def descend(bucket: Bucket, mix: Mix, maximize: bool) -> None:
    """w -= lr * u, and nothing else that the base optimizer does."""
    lr = checks.hyperparameter("lr", bucket.group["lr"], bucket.params[0], signed=True)
    options = SgdOptions(lr, 0.0, 0.0, 0.0, False, maximize, init_momentum=False)
    bucket.ops.sgd_(bucket.params, bucket.params, None, mix, options)


def _kept(x: Lists, of: Combination) -> Mix:
    """A combination of gradients that the base optimizer's step is about to lose: in the room for
    w, which is restored by now."""
    x.bucket.ops.mix_(x.bucket.old, x.mix(of))
    return Mix(x.bucket.old)


def _part_of(mix: Mix, whole: Bucket, part: Bucket) -> Mix:
    """The mix of some of the parameters of a bucket."""
    if part is whole:
        return mix
    index = {slot: i for i, slot in enumerate(whole.slots)}
    at = [index[slot] for slot in part.slots]
    x = [mix.x[i] for i in at]
    y = None if mix.y is None else [mix.y[i] for i in at]
    a, b = (c[at] if isinstance(c, Tensor) and c.dim() else c for c in (mix.a, mix.b))
    return mix._replace(x=x, y=y, a=a, b=b)


def _keep_statistics(
    optimizer: SAM,
    both: list[Bucket],
    lists: Sequence[Lists],
    dots: Products,
    perturbation: Perturbation,
    scale: Tensor | None,
) -> None:
    """How g1 and g2 compare; what is measured for that, the rule need not measure again."""
    if not both:
        optimizer._statistics = None
        return
    compared = [lists_of(optimizer, bucket, perturbation) for bucket in both]
    measured = [x.bucket.ops.dots([x["g1"], x["g2"], x["w"]]) for x in compared]
    measured = over_shards(measured, both)
    if [x.bucket.slots for x in lists] == [bucket.slots for bucket in both]:
        dots.learn(("g1", "g2", "w"), measured)
    numel = sum(bucket.numel for bucket in both)
    optimizer._statistics = ops.gradient_statistics(measured, numel, scale)


def _step_base(optimizer: SAM, updated: set[Tensor]) -> None:
    params = optimizer._all_params()
    hidden = {p: p.grad for p in params if p not in updated and p.grad is not None}
    for p in hidden:
        p.grad = None
    try:
        _wrapping.step(optimizer.base_optimizer)
    finally:
        for p, grad in hidden.items():
            p.grad = grad


def put_grad(p: Tensor, u: Tensor) -> None:
    """u, computed in a copy if p.grad has another layout or dtype (grad_dtype), for p.grad."""
    if p.grad is None or _shards.local(p.grad) is u:
        return
    if p.grad.dtype is u.dtype:
        p.grad = _shards.as_part_of(p, u)
    else:
        p.grad.copy_(_shards.as_part_of(p, u))


def _select(buckets: list[Bucket], keep: Callable[[Slot], bool]) -> list[Bucket]:
    parts = [bucket.select(keep) for bucket in buckets]
    return [part for part in parts if part.slots]


def _check_first_grads_survived(buckets: list[Bucket], first_grads: dict[Slot, Tensor]) -> None:
    for bucket in buckets:
        has_addresses = bucket.place.has_addresses
        for slot, grad in zip(bucket.slots, bucket.grads, strict=True):
            first = first_grads.get(slot)
            if first is None or first.numel() == 0:
                continue
            if not (has_addresses or checks.has_address(first)):
                continue
            if first.data_ptr() == grad.data_ptr():
                raise RuntimeError(
                    f"the second gradient of a parameter of shape {tuple(grad.shape)} was written "
                    "over the first one, whose memory first_step took over: let backward make a "
                    "new .grad. The weights were restored."
                )
