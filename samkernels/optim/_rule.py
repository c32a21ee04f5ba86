"""Provide what the rule of a variant is written with: the lists of a step by name, their inner
products, and combinations of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samkernels import checks, ops
from samkernels.backends import Dots, Mix, TensorList
from samkernels.optim._lists import Bucket, refuse_capture

EPS = 1e-12  # is added to norms and squares that divide
Coefficient = float | Tensor


@dataclass(frozen=True)
class Option:
    """A hyperparameter of a variant, which each parameter group may set for itself.

    Attributes:
        default: its default; None if there is none, and a value has to be given.
        low, high: the smallest and the largest value.
        below: whether `high` itself is too large.
        is_whole: whether a value is an int.
        choices: all values that are allowed, where these are no numbers.
    """

    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    below: bool = False
    is_whole: bool = False
    choices: tuple[Any, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raise TypeError or ValueError, which name the option, if the value is wrong."""
        if self.choices:
            return checks.check_choice(name, value, self.choices)
        if value is None and self.default is None:
            return
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {type(value).__name__}: give True or False")
            return
        if self.is_whole:
            return checks.check_whole(name, value, self.low)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {type(value).__name__}: give a number")
        is_high = value >= self.high if self.below else value > self.high
        if not math.isfinite(value) or value < self.low or is_high:
            raise ValueError(f"{name}={value}: give {self.range()}")

    def range(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return "a finite number"
        if self.high == math.inf:
            return f"a finite number from {self.low:g}"
        if self.low == -math.inf:
            return f"a number {'below' if self.below else 'up to'} {self.high:g}"
        return f"a number from {self.low:g} {'to below' if self.below else 'to'} {self.high:g}"


def options(**values: Any) -> dict[str, Any]:
    """Return the options that a variant declares, by name."""
    return values


class Combination(NamedTuple):
    """A `samkernels.backends.Mix` with the names of lists in the place of lists."""

    x: str
    y: str | None = None
    a: Coefficient = 1.0
    b: Coefficient = 1.0
    function: str = "linear"


def linear(**coefficients: Coefficient) -> Combination:
    """Return a combination of one or two lists, such as linear(g1=0.2, g2=0.8)."""
    (x, a), *rest = coefficients.items()
    return Combination(x, rest[0][0], a, rest[0][1]) if rest else Combination(x, a=a)


G1, G2 = linear(g1=1.0), linear(g2=1.0)


class Lists:
    """Has the tensors of a bucket in a step by name: "w", "g1", "g2" and the variant's own state.

    Attributes:
        group: the parameter group.
        is_new: whether the variant's own state holds nothing yet: it is all zeros.
    """

    __slots__ = ("_find", "_options", "bucket", "early", "group", "waiting")

    def __init__(
        self,
        bucket: Bucket,
        find: Callable[[str, Bucket], TensorList],
        own_options: Mapping[str, Option],
    ) -> None:
        self.bucket, self.group = bucket, bucket.group
        self._find, self._options = find, own_options
        self.early: list[tuple[str, Combination]] = []  # moved() and set() write these down
        self.waiting: list[tuple[str, Combination]] = []

    @property
    def is_new(self) -> bool:
        return self.bucket.kind.is_new

    def __getitem__(self, name: str) -> TensorList:
        return self._find(name, self.bucket)

    def option(self, name: str, default: Any = None) -> Any:
        """Return the value that the group has for an option of SAM or of the variant.

        Raises:
            TypeError, ValueError: somebody has written a wrong value.
        """
        key = self.bucket.keys.get(name, name)
        value = self.group.get(key, default)
        option = self._options.get(name)
        if option is not None and self.bucket.checked_values.get(name, option) is not value:
            option.check(key, value)
            self.bucket.checked_values[name] = value
        return value

    def mix(
        self,
        of: Combination,
        divisor: Tensor | None = None,
        ascent_square: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Mix:
        x, y, a, b, function = of
        if isinstance(a, Tensor):
            a = self.bucket.bring(a)
        if isinstance(b, Tensor):
            b = self.bucket.bring(b)
        second = None if y is None else self[y]
        return Mix(self[x], second, a, b, function, divisor, ascent_square, found_inf)

    def resolve(self, of: str | Combination) -> TensorList:
        """Return a list of this name, or of these values, in the room for w until that is taken."""
        if isinstance(of, str):
            return self[of]
        if of == Combination(of.x):
            return self[of.x]
        self.bucket.ops.mix_(self.bucket.old, self.mix(of))
        return self.bucket.old

    def set(self, name: str, value: Combination) -> None:
        """Overwrite a list of the variant's state, when this step's lists have been read; a skipped
        step leaves it."""
        self.waiting.append((name, value))

    def moved(self, name: str, value: Combination) -> str:
        """Overwrite a list of the variant's state at once, unless g1 is not finite, and return its
        name: for a direction that is in the state."""
        self.early.append((name, value))
        return name

    def write(self, what: list[tuple[str, Combination]], *guards: Tensor | None) -> None:
        """Write what was noted; `guards` are the last arguments of `mix`."""
        for name, value in what:
            mix, kept = self.mix(value, *guards), self[name]
            if self.is_new:
                refuse_capture()
                takes_place = mix.takes_place()
                if takes_place is not None and not takes_place.item():
                    continue  # once in a training the host has to know: the state stays new
            self.bucket.ops.mix_(kept, mix, keeps=True)
            for slot, tensor in zip(self.bucket.slots, kept, strict=True):
                slot.own[name] = tensor
        what.clear()


@dataclass
class _Sum:
    """Takes one of the sums out of those that dots() gave for each bucket, when it is needed."""

    measured: Sequence[Dots]
    index: int

    @cached_property
    def total(self) -> Tensor:
        return ops.total_of([dots.total[self.index] for dots in self.measured])

    @cached_property
    def per_tensor(self) -> list[Tensor]:
        return [dots.per_tensor[:, self.index] for dots in self.measured]


class Products:
    """Inner products of the lists of a step over all parameters of all processes, dots["g1.g2"]:
    float64, shape (). They are measured when they are first asked for, with all that one reading of
    the two lists gives, and in one all-reduce."""

    def __init__(self, lists: Sequence[Lists], scale: Tensor | None = None) -> None:
        self._lists, self._scale = lists, scale
        self._known: dict[str, _Sum] = {}

    @property
    def scale(self) -> Coefficient:
        """Return what a GradScaler has multiplied the gradients with."""
        return 1.0 if self._scale is None else self._scale.reshape(()).double()

    def __getitem__(self, pair: str) -> Tensor:
        return self._of(pair).total

    def norm(self, name: str) -> Tensor:
        return self[f"{name}.{name}"].sqrt()

    def clipping(self, name: str, max_norm: float | None) -> Coefficient:
        """Return the factor by which torch.nn.utils.clip_grad_norm_ clips; 1 for None."""
        if max_norm is None:
            return 1.0
        return (max_norm / (self.norm(name) / self.scale + 1e-6)).clamp(max=1.0)

    def per_tensor(self, pair: str, x: Lists) -> Tensor:
        """Return the product for each tensor of a bucket, shape (n,)."""
        return self._of(pair).per_tensor[self._lists.index(x)]

    def of_partners(self, pair: str, x: Lists, partners: Mapping[Tensor, Tensor]) -> Tensor:
        """Return per_tensor of the partner of each tensor of a bucket, or its own without one."""
        slots = [slot for lists in self._lists for slot in lists.bucket.slots]
        index = {id(slot.param): i for i, slot in enumerate(slots)}
        own = [slot.param for slot in x.bucket.slots]
        at = [index.get(id(partners.get(p)), index[id(p)]) for p in own]
        device = x.bucket.place.device
        everything = torch.cat([of.to(device) for of in self._of(pair).per_tensor]).unbind()
        return torch.stack([everything[i] for i in at])  # indexed by a list, the host would wait

    def learn(self, names: Sequence[str], measured: Sequence[Dots]) -> None:
        """Take in what dots() of these lists gave for each bucket."""
        pairs = [(names[0], names[0])]
        if len(names) > 1:
            pairs += [(names[0], names[1]), (names[1], names[1])]
        if len(names) > 2:
            pairs.append((names[2], names[2]))
        for i, (x, y) in enumerate(pairs):
            self._known[f"{x}.{y}"] = self._known[f"{y}.{x}"] = _Sum(measured, i)

    def measure(self, *names: str) -> list[Dots]:
        """Return dots() of these lists for each bucket, over all processes."""
        measured = [x.bucket.ops.dots([x[name] for name in names]) for x in self._lists]
        return over_shards(measured, [x.bucket for x in self._lists])

    def square_of(self, of: Sequence[Combination]) -> Tensor:
        """Return |u|^2 over all parameters, u being a combination for each bucket. If it is no sum
        of lists, take |a x|^2."""
        parts = []
        for x, u in zip(self._lists, of, strict=True):
            a = max(abs(u.a), 1.0) if u.function == "damp" and isinstance(u.a, float) else u.a
            square = a * a * self.per_tensor(f"{u.x}.{u.x}", x)
            if u.y is not None and u.function == "linear":
                square = square + 2 * u.a * u.b * self.per_tensor(f"{u.x}.{u.y}", x)
                square = square + u.b * u.b * self.per_tensor(f"{u.y}.{u.y}", x)
            parts.append(square.sum())
        return ops.total_of(parts)

    def _of(self, pair: str) -> _Sum:
        if pair not in self._known:
            names = tuple(dict.fromkeys(pair.split(".")))
            self.learn(names, self.measure(*names))
        return self._known[pair]


def over_shards(measured: list[Dots], buckets: Sequence[Bucket]) -> list[Dots]:
    """Return what was measured of each bucket, for whole tensors."""
    groups = [bucket.place.process_groups for bucket in buckets]
    return ops.all_reduce(measured, groups) if any(groups) else measured
