"""Take a base optimizer as it is given, a class or an instance: say whether it can serve, and whose
option is meant where it has one of the same name."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer


def check_kind(base: Any) -> None:
    """Raise TypeError or ValueError unless this optimizer steps on gradients that are there."""
    cls = base if isinstance(base, type) else type(base)
    if not issubclass(cls, Optimizer):
        raise TypeError(
            f"base_optimizer is {base!r}: give a class such as torch.optim.SGD, and its options as "
            "keyword arguments; or an optimizer of these parameters"
        )
    closure = inspect.signature(cls.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if needs_closure or hasattr(cls, "first_step"):
        why = "its closure is required" if needs_closure else "it has a first_step"
        raise ValueError(
            f"base_optimizer is {cls.__name__}, whose step takes passes of its own ({why}): give "
            "one that steps on the gradients that are there"
        )


def options_of(cls: type[Optimizer]) -> set[str]:
    """Return the names of the options that a class takes."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base is Optimizer:
            break
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names.update(p.name for p in parameters if p.kind in _NAMED)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break  # what the classes above take is not passed on
    return names


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def refuse_collisions(
    wrapper: str, own: Iterable[str], cls: type[Optimizer], names: Iterable[str], given: Any
) -> None:
    """Raise ValueError if a base optimizer that is given as a class has an option of the wrapper's:
    a keyword would not tell which of the two it means."""
    both = sorted(set(own) & set(names))
    if not both:
        return
    options = ", ".join([*(f"{name}={value!r}" for name, value in given.items()), *_asked(both)])
    is_one = len(both) == 1
    raise ValueError(
        f"{cls.__name__} and {wrapper} both have {'an option' if is_one else 'options'} called "
        f"{', '.join(both)}: give the base optimizer as an instance, which keeps its own, as in "
        f"{wrapper}(params, {cls.__name__}(params, {options}), {', '.join(_asked(both))})"
    )


def _asked(names: list[str]) -> list[str]:
    return [f"{name}=..." for name in names]


def keys_beside(base: Optimizer, names: Iterable[str]) -> dict[str, str]:
    """Return the keys of a wrapper's options in the groups of this base optimizer: NAME, or
    sam_NAME where it has one of its own."""
    taken = set(base.defaults)
    if not is_of_torch(base):  # optimizers of torch have defaults of all
        taken = taken.union(*base.param_groups) - getattr(base, _WRITTEN, frozenset())
    return {name: f"sam_{name}" if name in taken else name for name in names}


# Attribute of a base optimizer: the keys that an earlier wrapper has put into its groups.
_WRITTEN = "_keys_of_samkernels"


def options_of_groups(
    base: Optimizer, params: Iterable[Any], keys: dict[str, str]
) -> list[dict[str, Any]]:
    """Return for each group of an instance its parameters, and its wrapper's options in `params`.

    Args:
        params: the instance's own parameters, or groups of them that are those of the instance.

    Raises:
        TypeError: a group sets an option of the base optimizer.
        ValueError: the parameters are others than the instance's.
    """
    given = list(params)
    groups = [{"params": list(group["params"])} for group in base.param_groups]
    if not given or not isinstance(given[0], dict):
        everything = [p for group in groups for p in group["params"]]
        _check_same(base, listed(given), everything, "")
        _take_names(base, given)
        return groups
    if len(given) != len(groups):
        raise ValueError(
            f"params has {len(given)} groups and base_optimizer has {len(groups)}: give groups "
            "like base_optimizer.param_groups"
        )
    for i, (options, group, own) in enumerate(zip(given, groups, base.param_groups, strict=True)):
        where = f" of parameter group {i}"
        _check_same(base, listed(options["params"]), group["params"], where)
        for key, value in options.items():
            if key in keys.values():
                group[key] = value
            elif not (key in ("params", "param_names") or value is own.get(key, group)):
                hint = f"; {keys[key]} is SAM's" if key in keys else ""
                raise TypeError(
                    f"{key}{where}: base_optimizer is an instance, whose options stand in its own "
                    f"groups{hint}. Leave {key} out"
                )
    return groups


def _take_names(base: Optimizer, params: list[Any]) -> None:
    """Give an instance that was made without names those of named parameters."""
    names = {id(item[1]): item[0] for item in params if isinstance(item, tuple)}
    for group in base.param_groups if names else ():
        group.setdefault("param_names", [names.get(id(p)) for p in group["params"]])


def listed(params: Any) -> list[Any]:
    """List parameters as torch.optim takes them for a group, by themselves or with names."""
    items = [params] if isinstance(params, Tensor) else list(params)
    return [item[1] if isinstance(item, tuple) else item for item in items]


def _check_same(base: Optimizer, given: list[Any], own: list[Tensor], where: str) -> None:
    if sorted(map(id, given)) == sorted(map(id, own)):
        return
    known = set(map(id, own))
    others = sum(id(p) not in known for p in given)
    raise ValueError(
        f"params{where} are not those of base_optimizer, the {type(base).__name__} that was given: "
        f"{others} of {len(given)} are others, and it has {len(own)}. Give "
        "base_optimizer.param_groups"
    )


def write_options(base: Optimizer, groups: Sequence[dict[str, Any]], keys: dict[str, str]) -> None:
    """Put a wrapper's options, from groups like those of base, into its groups."""
    for group, options in zip(base.param_groups, groups, strict=False):
        group.update({key: options[key] for key in keys.values() if key in options})
    note_keys(base, keys)


def note_keys(base: Optimizer, keys: dict[str, str]) -> None:
    """Note that these are no options of its own, should it be wrapped once more."""
    setattr(base, _WRITTEN, frozenset(keys.values()))


def is_of_torch(base: Optimizer) -> bool:
    """Say whether it is just what torch.optim has, and no subclass."""
    return type(base).__module__.startswith("torch.optim.")


def overrides(base: Optimizer, name: str) -> bool:
    """Say whether its class has this method of torch.optim.Optimizer in a version of its own."""
    return getattr(type(base), name) is not getattr(Optimizer, name)


def step(base: Optimizer) -> None:
    """Call base.step() without the hooks of all optimizers, which are told of the wrapper's."""
    before = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    if not any(before):
        base.step()
        return
    names = "_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"
    try:
        for name in names:
            setattr(torch_optimizer, name, OrderedDict())
        base.step()
    finally:
        for name, hooks in zip(names, before, strict=True):
            setattr(torch_optimizer, name, hooks)


def is_trained(p: Tensor) -> bool:
    """Say whether to look at a parameter before it has a gradient: a frozen one may be of any kind,
    and a lazy one is of none yet."""
    return p.requires_grad and not is_lazy(p)
