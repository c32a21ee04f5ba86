"""Define variants with one pass per step, whose weights stay perturbed in between."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from samkernels.backends import TensorList
from samkernels.optim import _shards
from samkernels.optim._grad import without_grad
from samkernels.optim._lists import Bucket, Kind, Place, Slot, bucket_of, fits, laid_out_like
from samkernels.optim._perturbation import Perturbation, aim, perturb, restore
from samkernels.optim._update import finish
from samkernels.optim._variant import Base
from samkernels.optim.sam import SAM


class OnePass(SAM):
    """SAM along a direction that is known before the gradient: plain backward() and step().

    Between the steps the parameters hold w + e(w), and the optimizer holds w. A subclass names
    `along`, the state of the base optimizer that it goes along; axes.sign says which way.
    """

    along: ClassVar[tuple[str, ...]] = ()  # names in a parameter's state, of which one is there
    own_state = ("w",)
    own_attributes = ("_is_held",)
    _is_held = False  # whether unperturbed() holds w in the parameters

    @property
    def needs_second_pass(self) -> bool:
        """Return False: each step has one pass."""
        return False

    @property
    def is_perturbed(self) -> bool:
        """Say whether the weights are at w + e(w): between the steps, but within unperturbed()."""
        return self._perturbation is not None

    def first_step(self, zero_grad: bool = False, *, grad_scale: Any = None) -> bool:
        """Raise RuntimeError: there is one pass only."""
        raise RuntimeError(
            f"{type(self).__name__} makes one pass: call loss.backward() and optimizer.step(), "
            "without first_step() and second_step()"
        )

    def second_step(self, zero_grad: bool = False) -> None:
        """Raise RuntimeError: there is one pass only."""
        self.first_step()

    @without_grad
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update w with the gradient at w + e(w); then move to w + e(w) along the new direction.

        Args:
            closure: computes the loss, calls backward on it and returns it.

        Returns:
            What the closure returned, which is the loss at w + e(w); else None. A step with a
                closure leaves no gradients.
        """
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if self._only_makes_state():
                self._make_state()
            elif self._has_gradients:
                self._make_step()
        finally:
            if closure is not None:
                self.zero_grad()
        return loss

    @without_grad
    def restore(self) -> None:
        """Put w into the parameters; the next step perturbs them again. What was written to a
        parameter meanwhile, as by loading a model, counts as w."""
        perturbation = self._perturbation
        if perturbation is not None:
            perturbation.settle()
            perturbation.record_streams()
            written = perturbation.written()
            for slot in list(perturbation.slots):
                if id(slot.param) in written or id(slot.local) in written:
                    del perturbation.slots[slot]
            restore(perturbation.slots, self._slots)
            self._perturbation = None

    @without_grad
    def perturb(self) -> None:
        """Put w + e(w) into the parameters, which have w: after restore()."""
        if self._perturbation is None and not self._is_held and self._wants_next():
            self._ascend(self._with_momentum(), saves=True)

    @contextlib.contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Let the parameters hold w in the body: for evaluation, for saving the model, for averages
        of weights. What the body does to them stays.

        Usage:

            with optimizer.unperturbed():
                evaluate(model)
        """
        was_perturbed, was_held = self.is_perturbed, self._is_held
        self.restore()
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = was_held
            if was_perturbed:
                self.perturb()

    # -- private -----------------------------------------------------------------------------------

    def _init(
        self,
        params: Any,
        base_optimizer: Base,
        options: dict[str, Any],
        base_options: dict[str, Any],
        **axes: Any,
    ) -> None:
        name = type(self).__name__
        cls = base_optimizer if isinstance(base_optimizer, type) else type(base_optimizer)
        if not issubclass(cls, (torch.optim.SGD, torch.optim.Adam)):
            raise TypeError(
                f"base_optimizer is {cls.__name__}: {name} goes along the momentum of "
                "torch.optim.SGD, Adam or AdamW; give one of them"
            )
        if axes["track_statistics"] or axes["perturbation"] != "global":
            raise ValueError(
                f"{name} has no gradient at w: leave track_statistics and perturbation out"
            )
        if getattr(axes["when"], "needs_norm", False):
            raise ValueError(f"when: {name} has no gradient at w, whose norm this policy looks at")
        super()._init(params, base_optimizer, options, base_options, **axes)
        if all(group.get("momentum") == 0 for group in self.param_groups):
            raise ValueError(f"momentum=0: {name} goes along the momentum; give one above 0")

    def _kind_of(self, group: dict[str, Any], i: int, own: dict[str, Tensor]) -> Kind:
        return super()._kind_of(group, i, own)._replace(is_new=False)

    def parts(self, batches: Iterable[Any]) -> Any:
        """Raise RuntimeError: there is one pass only."""
        self.first_step()

    def _make_step(self) -> None:
        if self._perturbation is not None and self._perturbation.written():
            raise RuntimeError(
                "parameters were written while they held w + e(w): write them in `with "
                "optimizer.unperturbed():`, or call optimizer.restore() now, after which what was "
                "written counts as w"
            )
        self._follow_schedule()
        try:
            self._update_and_ascend()
        except BaseException:
            self.restore()
            raise
        finally:
            self._slots.drop_gradients()

    def _update_and_ascend(self) -> None:
        if self._perturbation is None:
            self._perturbation = Perturbation()
        updated, lies_in_old = finish(self, self._perturbation, into_old=True)
        if lies_in_old:
            moved = [bucket for bucket in updated if bucket.kind.is_moved]
            self._perturbation = Perturbation(moved=[bucket.slots for bucket in moved])
        else:
            self._perturbation = None
        self._count_step()
        if not self._wants_next():
            self.restore()
            return
        everything = sum(len(bucket.slots) for bucket in updated) == len(self._slots)
        if everything and lies_in_old:
            self._ascend(updated, saves=False)
        else:
            self.restore()
            self._ascend(self._with_momentum(), saves=True)

    def _wants_next(self) -> bool:
        return self._when is None or self._when.wants(self.option("sam_step"), math.nan, {})

    def _along(self, bucket: Bucket) -> TensorList | None:
        """Return the direction of a bucket; None if a parameter has none."""
        for name in self.along:
            lists = bucket.ops.state_of(self.state, bucket.params, name)
            if lists is not None:
                return lists
            states = [self.state.get(slot.param, {}).get(name) for slot in bucket.slots]
            if all(isinstance(tensor, Tensor) for tensor in states):
                pairs = zip(_shards.locals_of(states), bucket.slots, strict=True)
                # The parameters may have been cast, moved or laid out anew since.
                return [t if fits(t, s.old) else laid_out_like(s.old, t) for t, s in pairs]
        return None

    def _with_momentum(self) -> list[Bucket]:
        """Return all parameters that have a direction."""
        found = []
        for group in self.param_groups:
            by_kind: dict[tuple[Place, Kind], list[Slot]] = {}
            for i, p in enumerate(group["params"]):
                state = self.state.get(p, {}) if p.requires_grad else {}  # a frozen p stays at w
                if any(state.get(name) is not None for name in self.along):
                    slot = self._slots.find_or_add(p)
                    key = slot.place, self._kind_of(group, i, {})
                    by_kind.setdefault(key, []).append(slot)
            for key, slots in by_kind.items():
                olds = [slot.old for slot in slots]
                found.append(bucket_of(group, *key, slots, olds, self._keys))
        return found

    def _ascend(self, buckets: list[Bucket], saves: bool) -> None:
        along = []
        for bucket in buckets:
            direction = self._along(bucket) if bucket.kind.is_moved else None
            if direction is not None:
                along.append((bucket, direction))
            elif bucket.kind.is_moved and not saves:  # momentum is being warmed up from 0
                restore(dict.fromkeys(bucket.slots), self._slots)
        perturbation = Perturbation(() if saves else [bucket.slots for bucket, _ in along])
        self._perturbation = perturbation
        if along:
            aims = aim(along, self._axes, perturbation, saves=saves)
            perturb(aims, self._axes.eps, perturbation, saves=saves)
        perturbation.ascent_square = None  # it would have the next step skipped
        perturbation.first_dots.clear()
        if not saves:
            perturbation.moving.clear()  # they are in `moved`
            for bucket, _ in along:
                perturbation.watch(bucket)
        perturbation.settle()
        perturbation.note_streams([bucket for bucket, _ in along])

    def _require_unperturbed(self, what: str) -> None:
        """Pass at any time: state is saved as of w."""

    def _own_of(self, p: Tensor) -> dict[str, Tensor]:
        if not self.state.get(p):
            return {}
        slot = self._slots.find(p)
        if slot is None or self._perturbation is None or slot not in self._perturbation.slots:
            slot = self._slots.find_or_add(p)
            # w is copied: what is loaded into a state_dict in place is not loaded into the model.
            slot.old.copy_(slot.local.detach())
        return {"w": _shards.as_part_of(p, slot.old)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as SAM does, put the parameters at the w that was loaded, and perturb them."""
        self.restore()
        try:
            super().load_state_dict(state_dict)
        finally:
            self.perturb()

    def __getstate__(self) -> dict[str, Any]:
        own = {p: of for p in self._all_params() if (of := self._own_of(p))}
        return {**super().__getstate__(), "_own": own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with torch.no_grad():
            self.perturb()
