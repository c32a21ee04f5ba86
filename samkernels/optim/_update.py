"""Make the second half of a step: from the gradients to the base optimizer's update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samkernels import checks, ops
from samkernels.backends import Mix, SgdOptions
from samkernels.optim import _shards
from samkernels.optim._bases import Base, MixIntoGrad, Update
from samkernels.optim._lists import Bucket, Slot
from samkernels.optim._perturbation import Perturbation, lists_of, restore
from samkernels.optim._rule import Combination, Lists, Products, over_shards
from samkernels.optim._scalers import require_same_scale, require_unscaled_g1

if TYPE_CHECKING:
    from samkernels.optim.sam import SAM


def gradients(optimizer: SAM, perturbation: Perturbation) -> list[Bucket]:
    """Return g2, or where there is no second pass the only gradient. Where ranks differ, replace
    g1 and its norm by what they have sent."""
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
        # g1 of parameters with g2, which all ranks have or none.
        slots = [slot for bucket in buckets for slot in bucket.slots]
        perturbation.first_grads = {
            slot: exchange.first_grads[slot.param]
            for slot in slots
            if slot.param in exchange.first_grads
        }
        perturbation.first_dots.clear()  # the update is made with another g1
    perturbation.record_streams()
    return buckets


def _put_back(perturbation: Perturbation) -> None:
    """Put back the gradients that first_step took, unless a second backward has left others."""
    kept, perturbation.first_grads = perturbation.first_grads, {}
    if all(slot.param.grad is None for slot in kept):
        for slot, grad in kept.items():
            slot.param.grad = _shards.as_part_of(slot.param, grad)


def finish(
    optimizer: SAM, perturbation: Perturbation, into_old: bool = False
) -> tuple[list[Bucket], bool]:
    """Restore the weights and update them.

    Args:
        into_old: whether new w may go to the room for w, and not to parameters that are moved.

    Returns:
        The buckets that were updated, and whether w lies in that room.
    """
    step = _Step(optimizer, perturbation)
    base = optimizer._base_for([bucket.group for bucket in step.buckets])
    step.update(base, into_old)
    for x in step.lists:
        if x.is_new:
            optimizer._slots.forget_lists()  # parameters are of another kind now
    return step.buckets, into_old and base.restores


class _Step:
    """Knows what the base optimizer is to do, and does it.

    Attributes:
        buckets: those that are updated.
        mixes: what takes the gradient's place, for each bucket.
        lists: those of each bucket, if the rule reads any.
        before, beside: what is subtracted from w before and after the base optimizer's step.
    """

    def __init__(self, optimizer: SAM, perturbation: Perturbation) -> None:
        self.optimizer, self.perturbation = optimizer, perturbation
        self.buckets = buckets = gradients(optimizer, perturbation)
        self.scale = scale = optimizer._of_scaler("grad_scale")
        self.found_inf = optimizer._of_scaler("found_inf")
        optimizer._meets_scaler = self.found_inf is not None
        if optimizer._meets_scaler:
            optimizer._scalers.look()
            if scale is None:
                require_same_scale(optimizer)
        if scale is not None:
            require_unscaled_g1(optimizer, perturbation)
        self.mixes: list[Mix] = []
        self.lists: list[Lists] = []
        self.before: list[tuple[Lists, Combination]] = []
        self.beside: list[tuple[Lists, Combination]] = []
        measures = optimizer.track_statistics or optimizer.max_grad_norm is not None
        if optimizer.takes_one_gradient and not measures:
            for bucket in buckets:
                self.mixes.append(Mix(bucket.grads, None, *ALONE, *self.guards(bucket, scale)))
        else:
            self._evaluate()

    def _evaluate(self) -> None:
        optimizer, perturbation, scale = self.optimizer, self.perturbation, self.scale
        # Without g1 there is nothing to mix: like torch.optim without a gradient, leave the
        # parameter alone.
        mixes_both = optimizer.keeps_g1 and perturbation.has_second_pass
        both = self.buckets
        if mixes_both or optimizer.track_statistics:
            both = _select(both, perturbation.first_grads.__contains__)
        if mixes_both:
            self.buckets = both
        self.lists = lists = lists_of(optimizer, self.buckets, perturbation)
        dots = Products(lists, scale)
        if mixes_both and lists:
            known = {id(slots): of for slots, of in perturbation.first_dots}
            if all(id(bucket.slots) in known for bucket in both):
                dots.learn(("g1",), [known[id(bucket.slots)] for bucket in both])
        if optimizer.track_statistics:
            _keep_statistics(optimizer, both, lists, dots, perturbation, scale)

        rule = optimizer.mix if perturbation.has_second_pass else optimizer.mix_alone
        combinations = [rule(x, dots) for x in lists]
        divisor = scale
        if optimizer.max_grad_norm is not None and lists:
            # A gradient's norm is finite where the coefficients of u may be 0 times infinity.
            named = optimizer.has_norm_of if perturbation.has_second_pass else None
            square = dots.square_of(combinations) if named is None else dots[f"{named}.{named}"]
            divisor = ops.clipping_divisor(square.sqrt(), optimizer.max_grad_norm, scale)
        for x, u in zip(lists, combinations, strict=True):
            self.mixes.append(x.mix(u, *self.guards(x.bucket, divisor)))
        if optimizer.has_terms_beside:
            for x in lists:
                if (of := optimizer.before(x, dots)) is not None:
                    self.before.append((x, of))
                if perturbation.has_second_pass and (of := optimizer.beside(x, dots)) is not None:
                    self.beside.append((x, of))

    def guards(self, bucket: Bucket, divisor: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return divisor, ascent_square and found_inf of a Mix."""
        square, found_inf = self.perturbation.ascent_square, self.found_inf
        return (
            None if divisor is None else bucket.bring(divisor),
            None if square is None else bucket.bring(square, torch.float64),
            None if found_inf is None else bucket.bring(found_inf),
        )

    def update(self, base: Base, into_old: bool) -> None:
        """Restore the weights, mix the gradients and update: in one kernel if `base` has one."""
        optimizer, perturbation, buckets = self.optimizer, self.perturbation, self.buckets
        state = optimizer.state
        # All groups come first, so that a wrong one is found before any is updated.
        updates = []
        for bucket, mix in zip(buckets, self.mixes, strict=True):
            for update in base.updates(bucket, state):
                updates.append((update, bucket, mix))
        if not (base.restores and perturbation.moved_just(buckets)):
            done = {slot for bucket in buckets for slot in bucket.slots} if base.restores else ()
            rest: dict[Slot, None] = {s: None for s in perturbation.slots if s not in done}
            restore(rest, optimizer._slots)
        if not base.restores:
            if self.found_inf is not None and self.found_inf.item():
                return
            self._write_state()  # its lists are about to be lost; so are those of `beside`
        for x, of in self.before:  # maximize does not turn it
            descend(x.bucket, x.mix(of, *self.guards(x.bucket, None)), maximize=False)
        beside = [(x, x.mix(of) if base.restores else _kept(x, of)) for x, of in self.beside]
        _make_all(updates, base, optimizer, perturbation, into_old)
        for x, mix in beside:
            mix = Mix(*mix[:5], *self.guards(x.bucket, self.scale))
            descend(x.bucket, mix, x.group.get("maximize", False))
        if base.restores:
            self._write_state()

    def _write_state(self) -> None:
        for x in self.lists:
            if x.waiting:
                x.write(x.waiting, *self.guards(x.bucket, self.scale))


ALONE = 1.0, 1.0, "linear"  # the rest of a Mix of one list as it is


def _make_all(
    updates: Sequence[tuple[Update | MixIntoGrad, Bucket, Mix]],
    base: Base,
    optimizer: SAM,
    perturbation: Perturbation,
    into_old: bool,
) -> None:
    """Make all of them or none, whatever comes in between; unless a backend that is no single call
    was interrupted in the middle of a list, or a base optimizer in a step of its own: then all
    weights come back, and part of the state is that of after the step.

    Args:
        updates: each with its whole bucket, and the mix that updates that.
    """
    state = optimizer.state
    calls = []
    for update, whole, mix in updates:
        bucket = update.bucket
        out = bucket.old if into_old and bucket.kind.is_moved else None
        calls.append((update, perturbation.old_of(bucket), _part_of(mix, whole, bucket), out))
    try:
        for update, old, mix, out in calls:
            update.run(old, mix, state, out)
        base.finish(optimizer, [update.bucket for update, _, _ in updates])
        perturbation.slots = {}  # nothing to restore
    except BaseException:
        journals = [update.journal for update, _, _ in updates]
        if any(journals) and [False] not in journals:
            for update, old, mix, out in calls:
                update.run(old, mix, state, out)  # this does what was not done
            perturbation.slots = {}
        raise


def descend(bucket: Bucket, mix: Mix, maximize: bool) -> None:
    """Compute w -= lr * u, and nothing else that the base optimizer does."""
    lr = checks.hyperparameter("lr", bucket.group["lr"], bucket.params[0], signed=True)
    options = SgdOptions(lr, 0.0, 0.0, 0.0, False, maximize, init_momentum=False)
    bucket.ops.sgd_(bucket.params, bucket.params, None, mix, options)


def _kept(x: Lists, of: Combination) -> Mix:
    """Keep a combination of gradients that the base optimizer's step is about to lose. The room for
    w has w, should that step fail."""
    room = [torch.empty_like(slot.old) for slot in x.bucket.slots]
    x.bucket.ops.mix_(room, x.mix(of))
    return Mix(room)


def _part_of(mix: Mix, whole: Bucket, part: Bucket) -> Mix:
    """Return the mix of some of the parameters of a bucket."""
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
    """Keep how g1 and g2 compare. The rule need not measure again what is measured here."""
    if not both:
        optimizer._statistics = None
        return
    compared = lists_of(optimizer, both, perturbation)
    measured = [x.bucket.ops.dots([x["g1"], x["g2"], x["w"]]) for x in compared]
    measured = over_shards(measured, both)
    if [x.bucket.slots for x in lists] == [bucket.slots for bucket in both]:
        dots.learn(("g1", "g2", "w"), measured)
    numel = sum(bucket.numel for bucket in both)
    optimizer._statistics = ops.gradient_statistics(measured, numel, scale)


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
