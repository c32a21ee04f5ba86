"""Check, load and make a state_dict, and undo a load that fails."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from samkernels.optim import _shards, _wrapping
from samkernels.optim._axes import Selection
from samkernels.optim._bases import FUSED_BASES, Base, ByItself, Fused
from samkernels.optim._lists import fits, laid_out_like
from samkernels.optim._perturbation import Axes
from samkernels.optim._ranks import Ranks
from samkernels.optim._scalers import Scalers
from samkernels.optim._variant import COMMON_OPTIONS, Variant


def read(state_dict: Any) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """Return copies of the groups of a state_dict, and its state.

    Raises:
        ValueError: the state_dict is no optimizer's.
    """
    try:
        groups = [dict(group) for group in state_dict["param_groups"]]
        _ = [list(group["params"]) for group in groups]
        return groups, dict(state_dict["state"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "state_dict is no optimizer's: give what state_dict() returned, with 'state' and "
            "'param_groups'"
        ) from None


def check_options(
    base: Optimizer, groups: list[dict[str, Any]], present: list[dict[str, Any]]
) -> None:
    """Raise TypeError or ValueError if a step with these groups would fail, or spoil the weights.

    Args:
        groups: the groups that were loaded.
        present: the groups that were there before.
    """
    for i, (group, current) in enumerate(zip(groups, present, strict=False)):
        like = next((p for p in group["params"] if p.is_floating_point()), torch.zeros(()))
        try:
            _check_options(base, group, current, like)
        except (TypeError, ValueError) as error:
            raise type(error)(f"parameter group {i} in state_dict: {error}") from None


def _check_options(
    base: Optimizer, group: dict[str, Any], present: dict[str, Any], like: Tensor
) -> None:
    is_torchs = _wrapping.is_of_torch(base)
    limit = math.inf if like.dtype is torch.float64 else torch.finfo(torch.float32).max
    for name in base.defaults.keys() & group.keys():
        values, expected = _numbers(group[name]), _numbers(present.get(name))
        if len(expected) > 1 and len(values) != len(expected):
            raise ValueError(f"{name}={group[name]!r}: give {len(expected)} numbers")
        for value in values:
            # Optimizers of others may mean something by an infinity.
            if math.isnan(value) or (is_torchs and not abs(value) <= limit):
                raise ValueError(f"{name}={group[name]!r}: give finite numbers for {like.dtype}")
    fused = FUSED_BASES.get(type(base))
    if fused is not None:
        fused.check_options(group, like)
    elif is_torchs:
        # The constructor checks them, but refuses an lr below zero, which a schedule may end with.
        known = inspect.signature(type(base).__init__).parameters.keys() & base.defaults.keys()
        options = {name: _plain(group[name]) for name in known if _numbers(group.get(name))}
        if options.get("lr", 0) < 0:
            del options["lr"]
        type(base)([torch.zeros(1, 1)], **options)


def _numbers(value: Any) -> list[float]:
    """Return the numbers of an option that is one, or several."""
    values = value if isinstance(value, (tuple, list)) else [_plain(value)]
    return [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _plain(value: Any) -> Any:
    is_read = isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu"
    return value.item() if is_read else value


def check_state(base: Optimizer, groups: list[dict[str, Any]], state: dict[Any, Any]) -> None:
    """Raise ValueError if state of a base optimizer of torch does not fit its parameters."""
    fused = FUSED_BASES.get(type(base))
    name_of_base = type(base).__name__
    if fused is not None:
        tensors: tuple[str, ...] = fused.tensors
    elif _wrapping.is_of_torch(base):
        tensors = ("momentum_buffer",)
    else:
        return  # the base optimizer says what it loads
    saved = [(index, group) for group in groups for index in group["params"]]
    params = [p for group in base.param_groups for p in group["params"]]
    for i, ((index, group), p) in enumerate(zip(saved, params, strict=False)):
        of_param = state.get(index, {})
        if not isinstance(of_param, dict):
            raise ValueError(f"state_dict: the state of parameter {i} is no dict")
        for name in () if fused is None or not of_param else fused.needed(group):
            if of_param.get(name) is None:
                raise ValueError(
                    f"state_dict: the state of parameter {i} has no {name}: load a checkpoint of "
                    f"{name_of_base}"
                )
        step = of_param.get("step", 0)
        if not (step.numel() == 1 if isinstance(step, Tensor) else _numbers(step)):
            raise ValueError(f"state_dict: the step of parameter {i} is {step!r}: give a number")
        for name in tensors:
            tensor = of_param.get(name)
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or tensor.shape != p.shape:
                shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
                raise ValueError(
                    f"state_dict: the {name} of parameter {i} has shape {shape} and the "
                    f"parameter has {tuple(p.shape)}: load the checkpoint of the same model"
                )
            if not _shards.are_cut_alike(tensor, p):
                raise ValueError(
                    f"state_dict: the {name} of parameter {i} is not sharded as the parameter "
                    "is: load it with set_optimizer_state_dict of "
                    "torch.distributed.checkpoint.state_dict"
                )


@contextlib.contextmanager
def undone_on_failure(optimizer: Optimizer) -> Iterator[None]:
    """Give the optimizer its groups, state and attributes back if the body raises. Tensors that
    were written in place stay as they are."""
    attributes = dict(vars(optimizer))
    groups, state = optimizer.param_groups, optimizer.state
    before = list(groups), dict(state)
    dicts = [d for d in (*groups, *state.values()) if isinstance(d, dict)]
    contents = [dict(d) for d in dicts]
    try:
        yield
    except BaseException:
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        groups[:] = before[0]
        state.clear()
        state.update(before[1])
        for d, content in zip(dicts, contents, strict=True):
            d.clear()
            d.update(content)
        raise


_W = "w"  # the state of variants whose parameters do not hold w between the steps
_OWN = "sam_"  # prefix of the names that a variant's own state has beside the base optimizer's


def _is_own(name: object) -> bool:
    return isinstance(name, str) and name.startswith(_OWN)


class Checkpointed(Variant):
    """Keeps the state of the base optimizer, and beside it that of the variant."""

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state_dict, with rho and the like in its groups, and a
        variant's own state beside that of its parameters, as sam_NAME.

        Raises:
            RuntimeError: between first_step and second_step, when the weights of the model are
                perturbed ones.
        """
        self._require_unperturbed("state_dict")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self.base_optimizer.state_dict()
        if isinstance(state_dict.get("state"), dict):  # else the base optimizer has its own format
            state_dict = {**state_dict, "state": self._without_empty_momentum(state_dict["state"])}
        if any(own := [self._own_of(p) for p in self._all_params()]):
            state = dict(state_dict.get("state", {}))
            for i, of_param in enumerate(own):
                if of_param:
                    of_param = {_OWN + name: tensor for name, tensor in of_param.items()}
                    state[i] = {**state.get(i, {}), **of_param}
            state_dict = {**state_dict, "state": state}
        for after in self._optimizer_state_dict_post_hooks.values():
            state_dict = _unless_none(after(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or of the base optimizer: rho and the like stay then.
        The base optimizer loads it; if that fails, the optimizer is as it was.

        Raises:
            RuntimeError: between first_step and second_step.
            TypeError, ValueError: groups or state do not fit the parameters, are sharded in another
                way (torch.distributed.checkpoint loads those), or an option is out of range.
        """
        self._require_unperturbed("load_state_dict")
        if isinstance(state_dict, dict):
            state_dict = dict(state_dict)  # hooks may change it
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = _unless_none(hook(self, state_dict), state_dict)
        state_dict, own = self._without_own(state_dict)
        if not _wrapping.overrides(self.base_optimizer, "load_state_dict"):
            state_dict = self._checked(state_dict)
        previous = [dict(group) for group in self.param_groups]
        self._slots.forget_lists()
        with undone_on_failure(self.base_optimizer):
            self.base_optimizer.load_state_dict(state_dict)
            for i, (group, before) in enumerate(zip(self.param_groups, previous, strict=False)):
                for key in self._keys.values():
                    if (value := before.get(key, self.defaults.get(key))) is not None:
                        group.setdefault(key, value)
                self._check_options(group, f" of parameter group {i} in state_dict")
            check_options(self.base_optimizer, self.param_groups, previous)
            for after in self._optimizer_load_state_dict_post_hooks.values():
                after(self)
        self._slots.forget_own()
        self._load_own(own)

    def _load_own(self, own: dict[Tensor, dict[str, Tensor]]) -> None:
        for p, of_param in own.items():
            slot, state = self._slots.find_or_add(p), dict(of_param)
            if _W in state:
                with torch.no_grad():
                    slot.local.copy_(state.pop(_W))
            for name, tensor in state.items():
                # A parameter may have been cast or laid out anew since the state was made.
                alike = tensor.shape != slot.old.shape or fits(tensor, slot.old)
                slot.own[name] = tensor if alike else laid_out_like(slot.old, tensor)

    def _without_empty_momentum(self, states: dict[Any, Any]) -> dict[Any, Any]:
        """Return states, by parameter or number, without the buffers whose steps were all skipped.
        These are known where there is dampening; to know them, the host waits for the device."""
        empty = self._slots.empty_momenta()
        of = {key: state for key, state in states.items() if isinstance(state, dict)}
        of = {key: state for key, state in of.items() if id(state.get("momentum_buffer")) in empty}
        if not of:
            return states
        states = copy.copy(states)
        for key, state in of.items():
            states[key] = {k: v for k, v in state.items() if k != "momentum_buffer"}
        return states

    def _own_of(self, p: Tensor) -> dict[str, Tensor]:
        own = self._slots.own_of(p)
        return {name: _shards.as_part_of(p, tensor) for name, tensor in own.items()}

    def _without_own(self, state_dict: Any) -> tuple[Any, dict[Tensor, dict[str, Tensor]]]:
        """Return the base optimizer's part, and the variant's own state of each parameter. State of
        another variant is left out, but for the weights, which its model may not have. FriendlySAM
        and VaSSO have the same m, a moving average of g1 that begins at g1: each goes on from the
        other's.

        Raises:
            ValueError: a variant's state does not fit its parameter.
        """
        if _wrapping.overrides(self.base_optimizer, "load_state_dict"):
            # The base optimizer may have its own format, to which state_dict() added "state".
            if not (isinstance(state_dict, dict) and isinstance(state_dict.get("state"), dict)):
                return state_dict, {}
            is_foreign = "param_groups" not in state_dict
        else:
            is_foreign = False
        if is_foreign:
            state = dict(state_dict["state"])
            saved = list(range(len(self._all_params())))
        else:
            groups, state = read(state_dict)
            saved = [index for group in groups for index in group["params"]]
        own: dict[Tensor, dict[str, Tensor]] = {}
        has_some = False
        for i, (index, p) in enumerate(zip(saved, self._all_params(), strict=False)):
            of_param = state.get(index)
            if not isinstance(of_param, dict) or not any(map(_is_own, of_param)):
                continue
            has_some = True
            of_base = {n: value for n, value in of_param.items() if not _is_own(n)}
            if of_base:
                state[index] = of_base
            else:  # base optimizers test that in their first step
                del state[index]
            is_ours = any(_OWN + name in of_param for name in self.own_state)
            names = list(self.own_state) if is_ours else []  # else the state is of another variant
            if _OWN + _W in of_param and _W not in names:
                names.append(_W)
            if not names:
                continue
            own[p] = {}
            for name in names:
                tensor = of_param.get(_OWN + name)
                if not isinstance(tensor, Tensor) or tensor.shape != p.shape:
                    raise ValueError(
                        f"state_dict: the {name} of parameter {i} does not have its shape, "
                        f"{tuple(p.shape)}: load the checkpoint of the same model"
                    )
                if not _shards.are_cut_alike(tensor, p):
                    raise ValueError(
                        f"state_dict: the {name} of parameter {i} is not sharded as the parameter "
                        "is: load it with set_optimizer_state_dict of "
                        "torch.distributed.checkpoint.state_dict"
                    )
                own[p][name] = laid_out_like(_shards.local(p), _shards.local(tensor))
        if not has_some:
            return state_dict, {}
        of_base_optimizer = {**state_dict, "state": state}
        if is_foreign and not state:
            del of_base_optimizer["state"]  # the base optimizer may not know the key
        return of_base_optimizer, own

    def _checked(self, state_dict: Any) -> dict[str, Any]:
        """Return a state_dict that was checked. Options that it lacks are as they are now."""
        groups, state = read(state_dict)
        for group, present in zip(groups, self.param_groups, strict=False):
            for key, value in present.items():
                if key not in ("params", "param_names"):
                    group.setdefault(key, value)
        check_state(self.base_optimizer, groups, state)
        return {**state_dict, "param_groups": groups}

    def __getstate__(self) -> dict[str, Any]:
        self._require_unperturbed("copying or pickling")
        own = {p: dict(of) for p in self._all_params() if (of := self._slots.own_of(p))}
        kept = {
            name: getattr(self, name)
            for name in ("base_optimizer", *_KEPT, *self.own_arguments, *self.own_attributes)
        }
        state = {**super().__getstate__(), **kept, "_own": own}
        return {**state, "state": self._without_empty_momentum(self.state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        shared = ("state", "param_groups")
        of_base: dict[str, Any] = {name: state[name] for name in shared if name in state}
        own = state.get("_own", {})
        rest = {k: v for k, v in state.items() if k not in of_base and k != "_own"}
        super().__setstate__(rest)
        known = {name: name for name in ("rho", "granularity", *COMMON_OPTIONS)}
        self.__dict__.setdefault("_keys", known)  # optimizers pickled earlier have these only
        for name, default in _KEPT.items():
            if name not in self.__dict__:
                setattr(self, name, default() if callable(default) else default)
        self._statistics, self._meets_scaler, self._is_constructed = None, True, True
        self._scalers = Scalers(self)
        if "_slots" not in self.__dict__:
            self._slots = self._new_slots(
                {k: self.defaults[k] for k in self._keys.values() if k in self.defaults}
            )
        self._slots.forget_lists()
        _wrapping.note_keys(self.base_optimizer, self._keys)
        if any(value is not getattr(self, name) for name, value in of_base.items()):
            self.base_optimizer.__setstate__(of_base)
        self._load_own(own)

    @property
    def _fused_base(self) -> Fused | None:
        base = self.base_optimizer
        if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
            return None  # the hooks of its step are to be called
        return FUSED_BASES.get(type(base))

    def _base_for(self, groups: Iterable[dict[str, Any]]) -> Base:
        """Return what makes the step of these groups."""
        fused = self._fused_base
        if fused is not None and all([fused.serves(group) for group in groups]):
            return fused
        return ByItself(fused)

    def _only_makes_state(self) -> bool:
        """Say whether by this step torch.distributed.checkpoint has an optimizer make the state
        that is to be saved or loaded: before any other, with lr and all gradients zero. It is a
        step of SAM too, since a zero g1 perturbs nothing; g1 and g2 are the same."""
        if self.state or any(group.get("lr", 0) != 0 for group in self.param_groups):
            return False
        grads = [p.grad for p in self._all_params() if p.grad is not None]
        return bool(grads) and not any(g.any() for g in _shards.locals_of(grads))

    def _make_state(self) -> None:
        names = [name for name in self.own_state if name != _W]
        for bucket in self._slots.buckets(self.param_groups) if names else ():
            for slot in bucket.slots:
                slot.own.update({name: torch.zeros_like(slot.old) for name in names})
        self._slots.forget_lists()
        fused = self._base_for(self.param_groups)
        if isinstance(fused, ByItself):
            _wrapping.step(self.base_optimizer)
            return
        # A step would count, and make weight_decay * w of a momentum.
        for group in self.param_groups:
            for p in group["params"]:
                state = fused.new_state(group, p) if p.grad is not None else {}
                if state:
                    self.state.setdefault(p, {}).update(state)

    def _require_unperturbed(self, what: str) -> None:
        if self._slots.perturbation is not None:
            raise RuntimeError(
                f"{what} between first_step and second_step: the model holds perturbed weights "
                "now. Call second_step() or restore() first."
            )

    @property
    def train(self) -> Callable[..., Any]:
        """Return the method of the base optimizer, if it has one, as schedule-free ones do.

        Raises:
            AttributeError: the base optimizer has none.
            RuntimeError: when called between first_step and second_step.
        """
        return self._of_base("train")

    @property
    def eval(self) -> Callable[..., Any]:
        """Return the method of the base optimizer, as `train` does."""
        return self._of_base("eval")

    def _of_base(self, name: str) -> Callable[..., Any]:
        method = getattr(self.base_optimizer, name)  # hasattr() goes by AttributeError

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._require_unperturbed(f"{name}()")
            return method(*args, **kwargs)

        return cast(Callable[..., Any], call)


# Attributes that are copied and pickled, and their values in an optimizer that was pickled before
# they existed.
_KEPT: dict[str, Any] = {
    "_backend": "auto",
    "_keys": dict,
    "_ranks": lambda: Ranks("global", None),
    "track_statistics": False,
    "max_grad_norm": None,
    "_schedule": None,
    "_when": None,
    "_scaled": lambda: Selection("scaled", None),
    "_subset": lambda: Selection("subset", None),
    "_mask": None,
    "_axes": Axes,
    "_closure_clears": None,
}


def _unless_none(new: Any, old: Any) -> Any:
    return old if new is None else new
