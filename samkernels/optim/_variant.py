"""Make an optimizer of what a variant of SAM says of itself: its options, its groups, and the base
optimizer that it shares them with."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from samkernels import backends, checks, ops
from samkernels.optim import _axes, _shards, _wrapping
from samkernels.optim._lists import Bucket, Kind, Slots, refuse_capture
from samkernels.optim._perturbation import Axes, Perturbation, lists_of
from samkernels.optim._ranks import Ranks
from samkernels.optim._rule import G1, G2, Combination, Lists, Option, Products
from samkernels.optim._scalers import Scalers
from samkernels.optim.schedule import ProportionScheduler
from samkernels.optim.when import When, check_when

Base = type[Optimizer] | Optimizer
Radius = float | Tensor | ProportionScheduler


class Variant(Optimizer):
    """The part of SAM that does not depend on the protocol. A variant is a subclass of SAM that
    sets some of these attributes and methods; see CONTRIBUTING.md."""

    own_options: ClassVar[Mapping[str, Option]] = {}  # which each group may set
    own_state: ClassVar[tuple[str, ...]] = ()  # lists like the parameters, kept from step to step
    positional: ClassVar[tuple[str, ...]] = ("rho", "adaptive")  # behind params and base_optimizer
    default_rho: ClassVar[float] = 0.05
    axes: ClassVar[Mapping[str, Any]] = {}  # other defaults of SAM's arguments
    keeps_g1: ClassVar[bool] = False  # whether mix or beside reads g1 in a step with two passes
    compares_scales: ClassVar[bool] = True  # whether u depends on how g1 is scaled against g2
    has_norm_of: ClassVar[str | None] = None  # the gradient whose norm u has, if it has one's
    counts_steps: ClassVar[bool] = False  # whether `perturbs` looks at the step
    own_arguments: ClassVar[
        Mapping[str, Any]
    ] = {}  # attributes of which the constructor makes arguments
    own_attributes: ClassVar[tuple[str, ...]] = ()  # further ones that a copy has, too
    moves: ClassVar[bool] = (
        True  # False: no step has a second pass, and no option says how it moves
    )
    sign: ClassVar[float] = 1.0  # -1: against the direction

    # __init_subclass__ sees from the methods what of the rule there is to evaluate.
    decides: ClassVar[bool]  # it says itself which steps have a second pass
    goes_along_g1: ClassVar[bool]
    takes_one_gradient: ClassVar[bool]  # u is g2, or g1 where there is no other
    has_terms_beside: ClassVar[bool]

    # Whether a closure clears the gradients that it finds, which running one shows.
    _closure_clears: bool | None = None
    _has_warned = False  # about a closure that calls no backward

    def perturbs(self, options: dict[str, Any], step: int) -> bool:
        """Say whether this step, 0 at first, has a second pass."""
        return self.moves

    def direction(self, x: Lists) -> str | Combination:
        """Return d, along which the first step perturbs. A rule may call x.set and x.moved."""
        return "g1"

    def mix(self, x: Lists, dots: Products) -> Combination:
        """Return u, which takes the gradient's place, with two passes. A rule may call x.set."""
        return G2

    def mix_alone(self, x: Lists, dots: Products) -> Combination:
        """Return u in a step without a second pass, where there is g1 only."""
        return G1

    def before(self, x: Lists, dots: Products) -> Combination | None:
        """Return what is subtracted from w, times lr, before the base optimizer's step."""
        return None

    def beside(self, x: Lists, dots: Products) -> Combination | None:
        """Return what is subtracted from w, times lr, after the base optimizer's step. It is asked
        for in steps with two passes."""
        return None

    # -- construction ------------------------------------------------------------------------------

    base_optimizer: Optimizer
    # Leads from the name of each option that a group may set to its key there: the name itself,
    # or sam_NAME beside an option of the base optimizer.
    _keys: dict[str, str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _check_declarations(cls)
        if not cls.moves:
            cls.positional = tuple(n for n in cls.positional if n not in _axes.OF_PERTURBATIONS)
        cls.decides = cls.perturbs is not Variant.perturbs or not cls.moves
        cls.goes_along_g1 = cls.direction is Variant.direction
        cls.has_terms_beside = not (cls.before is Variant.before and cls.beside is Variant.beside)
        mixes = cls.mix is not Variant.mix or cls.mix_alone is not Variant.mix_alone
        cls.takes_one_gradient = not (mixes or cls.has_terms_beside or cls.own_state)
        parent: Any = cls.__mro__[1]
        if "__init__" in vars(cls) or "__init__" not in vars(parent):
            return
        # A constructor that somebody else has made stays.
        if parent.__name__ == "SAM" or hasattr(parent.__init__, "is_made_of_options"):
            cls.__init__ = _constructor(cls)  # type: ignore[method-assign]

    def _init(
        self,
        params: Any,
        base_optimizer: Base,
        options: dict[str, Any],
        base_options: dict[str, Any],
        *,
        scaled: _axes.Selected,
        subset: _axes.Selected,
        mask: Mapping[Tensor, Tensor] | None,
        norm: str | None,
        when: When | None,
        perturb_eps: float,
        backend: str,
        track_statistics: bool,
        max_grad_norm: float | None,
        perturbation: str,
        process_group: Any,
    ) -> None:
        _wrapping.check_kind(base_optimizer)
        backends.check_name(backend)
        check_when(when)
        if self._direction_has_state and perturbation != "global":
            raise ValueError(
                f'perturbation="{perturbation}": each rank of {type(self).__name__} would move its '
                f'{", ".join(self.own_state)} by another gradient; leave it "global"'
            )
        if when is not None and self.decides:
            raise ValueError(
                f"when: {type(self).__name__} says itself which steps have a second pass: leave "
                "it out"
            )
        if getattr(when, "needs_norm", False) and perturbation != "global":
            raise ValueError(
                f'perturbation="{perturbation}": each rank would decide by the norm of another '
                'gradient whether there is a second pass; leave it "global", or take another when'
            )
        checks.check_non_negative("perturb_eps", perturb_eps)
        _axes.check_norm(norm)
        if max_grad_norm is not None:
            checks.check_positive("max_grad_norm", max_grad_norm)
        self._schedule = options["rho"] if isinstance(options["rho"], ProportionScheduler) else None
        if self._schedule is not None:
            options["rho"] = self._schedule.max_value
        self._keys = {name: name for name in (*options, *COMMON_OPTIONS)}
        self._check_options(options, "")
        if isinstance(base_optimizer, Optimizer):
            if base_options:
                raise TypeError(
                    f"{', '.join(base_options)}: base_optimizer is an instance, whose options are "
                    "given where it is made; leave them out here, or give the class"
                )
            self._keys = _wrapping.keys_beside(base_optimizer, self._keys)
            options = {self._keys[name]: value for name, value in options.items()}
            params = _wrapping.options_of_groups(base_optimizer, params, self._keys)
        else:
            self._refuse_collisions(base_optimizer, _wrapping.options_of, base_options)
        if self.counts_steps or when is not None:
            kept = {f"sam_{name}": first for name, first in getattr(when, "memory", {}).items()}
            kept["sam_step"] = 0
            self._keys.update({key: key for key in kept})
            options.update(kept)
        self._backend = backend
        self.track_statistics = track_statistics
        self.max_grad_norm = max_grad_norm
        self._when = when
        self._scaled = _axes.Selection("scaled", scaled)
        self._subset = _axes.Selection("subset", subset)
        self._mask = mask
        self._axes = Axes(norm, perturb_eps, mask, self.sign)
        self._statistics: ops.GradientStatistics | None = None
        self._meets_scaler = True  # until a step shows that there is none
        self._ranks = Ranks(perturbation, process_group)
        self._slots = self._new_slots(options)
        self._scalers = Scalers(self)
        self._is_constructed = False
        # Groups and state are the base optimizer's; until it has them, they are here.
        self.base_optimizer = cast(Any, SimpleNamespace())
        super().__init__(params, options)
        self._check_disjoint(self._all_params())  # once, not for each group
        _axes.check_mask(mask, self._all_params())
        groups = self.param_groups
        if isinstance(base_optimizer, Optimizer):
            base = base_optimizer
        else:
            base = base_optimizer(groups, **base_options)
            self._refuse_collisions(base_optimizer, lambda _: base.defaults, base_options)
        self._require_lr(base)
        if len(base.param_groups) == len(groups):
            _wrapping.write_options(base, groups, self._keys)
        self.base_optimizer = base
        self.defaults = {**base.defaults, **self.defaults}
        self._is_constructed = True
        self._check_selections()

    def _require_lr(self, base: Optimizer) -> None:
        """Raise ValueError if a group lacks the lr that a term or a schedule goes with."""
        if not (self.has_terms_beside or self._schedule is not None):
            return
        for i, group in enumerate(base.param_groups):
            if "lr" not in group:
                needs = (
                    "a ProportionScheduler" if self._schedule is not None else "a term of its own"
                )
                raise ValueError(
                    f"parameter group {i} of {type(base).__name__} has no lr, and "
                    f"{type(self).__name__} has {needs} that goes with lr: write one into the "
                    'groups, group["lr"], and give the base optimizer as an instance'
                )

    @property
    def _direction_has_state(self) -> bool:
        """Say whether the first step writes the variant's own state."""
        return bool(self.own_state) and type(self).direction is not Variant.direction

    def _refuse_collisions(
        self,
        base: type[Optimizer],
        names_of: Callable[[type[Optimizer]], Iterable[str]],
        base_options: dict[str, Any],
    ) -> None:
        parameters = inspect.signature(Variant._init).parameters.values()
        own = [*self._keys, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
        name = type(self).__name__
        _wrapping.refuse_collisions(name, own, base, names_of(base), base_options)

    def _new_slots(self, options: dict[str, Any]) -> Slots:
        """Make slots; a group that comes to be without `options`, which are by key, gets them."""
        one_kind = not (self.own_state or self._scaled or self._subset)
        return Slots(self._backend, options, self._keys, None if one_kind else self._kind_of)

    def _kind_of(self, group: dict[str, Any], i: int, own: dict[str, Tensor]) -> Kind:
        p, name = group["params"][i], _axes.name_of(group, i)
        is_new = bool(self.own_state) and not own
        return Kind(self._subset.has(p, name), self._scaled.has(p, name), is_new)

    def _check_selections(self) -> None:
        """Raise ValueError unless each selection has some of the parameters and no others, with the
        names that it asks for."""
        for selection in (self._scaled, self._subset):
            if selection:
                selection.check(_axes.named(self.param_groups))

    def _check_options(self, options: dict[str, Any], where: str) -> None:
        """Raise TypeError or ValueError if an option that is there is wrong."""
        for name, key in self._keys.items():
            if key not in options:
                continue
            value = options[key]
            what = f"{key}{where}"
            if name == "rho":
                self._check_rho(what, value)
            elif name in self.own_options:
                self.own_options[name].check(what, value)
            elif name in COMMON_OPTIONS:
                COMMON_OPTIONS[name].check(what, value)

    def _check_rho(self, what: str, value: Any) -> None:
        is_known = isinstance(value, (numbers.Real, Tensor))
        if not is_known:
            raise TypeError(
                f"{what} is {type(value).__name__}: give a number, a tensor of one element or, to "
                f"the constructor, a ProportionScheduler; {type(self).__name__}{_call(type(self))}"
            )
        checks.check_hyperparameter(what, value)

    def option(self, name: str) -> Any:
        """Return an option that is the same in all groups: that of the first."""
        return self.param_groups[0][self._keys[name]]

    # -- which steps have a second pass ------------------------------------------------------------

    @property
    def needs_second_pass(self) -> bool:
        """Say whether the next step has two passes. It is known before the forward pass, but for
        policies that look at g1: it is True for them, and first_step() returns what they say."""
        if not self.decides and self._when is None:
            return True
        step = self.option("sam_step") if "sam_step" in self._keys else 0
        if self.decides and not self.perturbs({n: self.option(n) for n in self.own_options}, step):
            return False
        return self._when is None or self._when.needs_norm or self._when.wants(step, math.nan, {})

    def _wants_by_norm(self, buckets: list[Bucket]) -> bool:
        """Say whether a policy that looks at g1 wants a second pass; True without one."""
        if self._when is None or not self._when.needs_norm:
            return True
        lists = lists_of(self, buckets, Perturbation(), first=True)
        square = Products(lists)["g1.g1"].item()  # the host has to know
        first = self.param_groups[0]
        names = getattr(self._when, "memory", {})
        memory = {name: first[f"sam_{name}"] for name in names if f"sam_{name}" in first}
        wants = self._when.wants(self.option("sam_step"), square, memory)
        for group in self.param_groups:
            group.update({f"sam_{name}": value for name, value in memory.items()})
        return wants

    def _follow_schedule(self) -> None:
        """Write the rho that goes with the lr of each group, before a perturbation.

        Raises:
            RuntimeError: a CUDA graph is being captured, and a replay would not ask again.
        """
        if self._schedule is not None or "sam_step" in self._keys:
            what = "rho" if self._schedule is not None else "whether there is a second pass"
            refuse_capture(
                f"in each step of this {type(self).__name__} the host decides {what}, which no "
                "replay asks: make its steps without a graph"
            )
        if self._schedule is not None:
            for group in self.param_groups:
                group[self._keys["rho"]] = self._schedule.value(group["lr"])

    def _count_step(self) -> None:
        """Count a step, if a variant or policy looks at the number; a GradScaler's skip is none."""
        if "sam_step" in self._keys:
            found_inf = self._of_scaler("found_inf")
            if found_inf is not None and found_inf.item():
                return
            step = self.option("sam_step") + 1
            for group in self.param_groups:
                group["sam_step"] = step

    def _of_scaler(self, name: str) -> Tensor | None:
        """Return grad_scale or found_inf, if a GradScaler has set it; shape ()."""
        number = self.__dict__.get(name)
        return number.reshape(()) if isinstance(number, Tensor) else None

    @contextlib.contextmanager
    def first_pass(self, model: nn.Module) -> Iterator[None]:
        """Average g1 over those ranks that perturb alike, in the forward and backward pass at w of
        every rank.

        With perturbation="global", or in one process, it does nothing: DistributedDataParallel
        averages g1 over all ranks by itself. Otherwise its averaging is switched off in here; and
        first_step sends, beside the second pass, what the update needs of g1: for SAM one number;
        for SAMDirection, SAMMagnitude and statistics all of g1. "group" sends g1 within the group
        before that, and waits for it.

        Usage:

            with optimizer.first_pass(model):
                loss_fn(model(x), y).backward()    # the forward pass inside, too
            optimizer.first_step()
            loss_fn(model(x), y).backward()
            optimizer.second_step(zero_grad=True)

        Args:
            model: the DistributedDataParallel module, compiled or inside of another one or not.
                Of its options, join() is not served, and static_graph=True needs one backward
                before training that averages. A parameter that a rank does not use
                (find_unused_parameters) has g1 = 0 there. SyncBatchNorm makes every loss depend on
                all ranks: m-sharpness is meant with batch norm of each share.

        Raises:
            TypeError: there is no DistributedDataParallel in model.
            RuntimeError: the forward pass was made before, so that backward has averaged over all
                ranks; or static_graph=True, at the very first pass.
        """
        with self._ranks.first_pass(model):
            yield

    @property
    def statistics(self) -> ops.GradientStatistics | None:
        """Say how g1 and g2 of the last step compare; None without track_statistics."""
        return self._statistics

    @property
    def backends(self) -> dict[str, str]:
        """Say which backend serves which tensors, such as {"cuda:0 float32": "native"}."""
        served = {}
        for group in self.param_groups:
            for p in group["params"]:
                if _wrapping.is_trained(p):
                    dtype = str(p.dtype).removeprefix("torch.")
                    served[f"{p.device} {dtype}"] = self._slots.place_of(p).backend
        return served

    # An object has it and not self, which is Lightning's wrapper where first_step is called on one:
    # reading goes through to this optimizer, while assigning stays with the wrapper.
    @property
    def _perturbation(self) -> Perturbation | None:
        return self._slots.perturbation

    @_perturbation.setter
    def _perturbation(self, perturbation: Perturbation | None) -> None:
        self._slots.hold(perturbation)

    # -- groups ------------------------------------------------------------------------------------

    # One list of groups and one state serve both: a scheduler changes the lr of both.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups of the base optimizer."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """Return the state of the base optimizer."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: dict[Tensor, Any]) -> None:
        if not isinstance(state, defaultdict):  # the steps of torch.optim count on one
            state = defaultdict(dict, state)
        self.base_optimizer.state = state
        self._slots.forget_own()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as the base optimizer does; it may set its own rho, adaptive and so on.

        Raises:
            TypeError, ValueError: an option or a parameter is of the wrong kind; the message names
                it.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is {type(param_group).__name__}: give a dict")
        index = len(self.param_groups)
        self._check_options(param_group, f" of parameter group {index}")
        if not self._is_constructed:
            super().add_param_group(param_group)
            self._check_params(param_group["params"], index)
            return
        given = param_group["params"]
        if not isinstance(given, (Tensor, set)):  # a set is for torch.optim to refuse
            param_group["params"] = given = list(given)
        new = [p for p in _wrapping.listed(given) if isinstance(p, Tensor)]
        self._check_params(new, index)
        added = set(new)
        self._check_disjoint([*(p for p in self._all_params() if p not in added), *new])
        for key in self._keys.values():
            if key in self.defaults:
                param_group.setdefault(key, self.defaults[key])
        try:
            self.base_optimizer.add_param_group(param_group)
            self._check_selections()
        except BaseException:
            del self.param_groups[index:]
            raise

    def _check_params(self, params: Iterable[Tensor], index: int) -> None:
        for i, p in enumerate(params):
            name = f"params[{i}] of parameter group {index}"
            _shards.check(name, p)
            if _shards.is_dtensor(p):
                self._ranks.check_shards(name)
            if _wrapping.is_trained(p):
                checks.check_tensor(name, _shards.local(p))
                self._slots.place_of(p)

    @property
    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._all_params())

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _check_disjoint(self, params: list[Tensor]) -> None:
        trained = list(filter(_wrapping.is_trained, params))
        checks.check_disjoint("params", _shards.locals_of(trained))


# Options of every variant, beside rho, in the groups.
COMMON_OPTIONS: dict[str, Option] = {
    "adaptive": Option(False),
    "scaling": Option(None, choices=(None, *_axes.SCALINGS)),
    "eta": Option(0.0, 0, math.inf),
}


def _check_declarations(cls: type[Variant]) -> None:
    """Raise TypeError if a class declares what cannot be meant."""
    arguments = inspect.signature(Variant._init).parameters
    for name, example in {"own_options": "Option(..)", "own_arguments": "DEFAULT"}.items():
        declared = getattr(cls, name)
        if not isinstance(declared, Mapping):
            raise TypeError(
                f"{name} of {cls.__name__} is {type(declared).__name__}: give "
                f"options(NAME={example})"
            )
        taken = {"rho", *COMMON_OPTIONS, *arguments} & declared.keys()
        if taken:
            raise TypeError(
                f"{name} of {cls.__name__} has {', '.join(sorted(taken))}, which SAM itself has: "
                "give it another name"
            )
    for name in ("own_state", "own_attributes", "positional"):
        if isinstance(value := getattr(cls, name), str):
            raise TypeError(
                f"{name} of {cls.__name__} is a string: give a tuple of names, ({value!r},)"
            )


def _arguments(cls: type[Variant]) -> list[inspect.Parameter]:
    """Return the arguments of the constructor of a variant that declares its options."""
    common = dict(inspect.signature(_sam().__init__).parameters)
    for name in () if cls.moves else _axes.OF_PERTURBATIONS:
        del common[name]
    named = {name: option.default for name, option in cls.own_options.items()}
    named.update(cls.own_arguments)
    defaults = {"rho": cls.default_rho, **named, **cls.axes}
    base = common["base_optimizer"]
    base = base.replace(default=defaults.get("base_optimizer", base.default))
    positional = [common["self"], common["params"], base]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    for name in cls.positional:
        default = defaults.get(name, common[name].default if name in common else None)
        positional.append(inspect.Parameter(name, kind, default=default))
    rest = []
    for name in (*named, *common):
        if name not in cls.positional and name not in ("self", "params", "base_optimizer"):
            parameter = common.get(name)
            if parameter is not None and parameter.kind is parameter.VAR_KEYWORD:
                rest.append(parameter)
                continue
            default = defaults.get(name, None if parameter is None else parameter.default)
            rest.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    rest.sort(key=lambda p: p.kind)
    return [*positional, *rest]


def _sam() -> Any:
    from samkernels.optim.sam import SAM

    return SAM


def _constructor(cls: type[Variant]) -> Callable[..., None]:
    """Make a constructor that takes the options of a class, in the order that it declares."""
    signature = inspect.Signature(_arguments(cls))

    def __init__(self: Variant, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"{cls.__name__}: {error}. It is called {cls.__name__}{_call(cls)}"
            ) from None
        bound.apply_defaults()
        values = dict(bound.arguments)
        del values["self"]
        values.update(values.pop("base_options", {}))
        if not cls.moves:
            if name := next(filter(values.__contains__, _axes.OF_PERTURBATIONS), None):
                raise TypeError(
                    f"{name}: {cls.__name__} perturbs nothing: leave it out. It is called "
                    f"{cls.__name__}{_call(cls)}"
                )
            values["rho"] = 0.0
        for name in cls.own_arguments:
            setattr(self, name, values.pop(name))
        _sam().__init__(self, **values)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.is_made_of_options = True  # type: ignore[attr-defined]
    return __init__


def _call(cls: type[Variant]) -> str:
    """Return the first arguments, for messages."""
    named = [n for n in (*cls.own_options, *cls.own_arguments) if n not in cls.positional]
    shown = ["params", "base_optimizer", *cls.positional, *(["*"] if named else []), *named]
    return f"({', '.join(shown)}, ...)"
