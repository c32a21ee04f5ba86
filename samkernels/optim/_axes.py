"""Read what composes with every variant: how the perturbation is scaled, and what it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from samkernels import checks
from samkernels.optim import _shards

SCALINGS = ("none", "elementwise", "tensor")
NORMS = ("global", "tensor", None)
# A variant that perturbs nothing has no use for these.
OF_PERTURBATIONS = (
    "rho", "adaptive", "scaling", "eta", "scaled", "subset", "mask", "norm", "perturb_eps",
    "perturbation", "process_group",
)  # fmt: skip
Selected = Callable[[str], bool] | Iterable[Tensor] | None


class Ascent(NamedTuple):
    """Holds what the options of a group say of its perturbation."""

    rho: float | Tensor  # as backends take rho: negative against the direction
    scaling: str
    eta: float


def ascent(
    rho: float | Tensor,
    flips: bool,
    adaptive: bool,
    scaling: str | None,
    eta: float,
    *,
    like: Tensor,
) -> Ascent:
    """Make an Ascent of options. Raise TypeError or ValueError if one of them is wrong."""
    if type(adaptive) is not bool:
        raise TypeError(f"adaptive={adaptive!r}: give True or False")
    if scaling is None:
        scaling = "elementwise" if adaptive else "none"
    checks.check_choice("scaling", scaling, SCALINGS)
    checks.check_non_negative("eta", eta)
    return Ascent(checks.signed_rho(rho, flips, like=like), scaling, eta)


class Selection:
    """Holds a choice of parameters: all for None, a list, or those that a function picks."""

    def __init__(self, option: str, of: Selected) -> None:
        self.option = option
        self._picks: Callable[[str], bool] | None = None
        self._params: dict[Tensor, None] | None = None
        if callable(of) and not isinstance(of, nn.Module):
            self._picks = of
        elif of is not None:
            if isinstance(of, (Tensor, str, nn.Module)) or not isinstance(of, Iterable):
                raise TypeError(
                    f"{option} is {type(of).__name__}: give a list of parameters, or a function "
                    "from a parameter's name to True or False"
                )
            self._params = dict.fromkeys(of)
            if not self._params or not all(isinstance(p, Tensor) for p in self._params):
                raise TypeError(f"{option}: give a list of parameters that is not empty")

    def __bool__(self) -> bool:
        """Say whether anything is left out."""
        return self._picks is not None or self._params is not None

    def check(self, named: list[tuple[Tensor, str | None]]) -> None:
        """Raise ValueError if none of these parameters is selected, or one that is none of them."""
        chosen = [p for p, name in named if self.has(p, name)]
        if not chosen or (self._params is not None and len(chosen) < len(self._params)):
            raise ValueError(
                f"{self.option} selects {len(chosen)} of the optimizer's parameters"
                + ("" if self._params is None else f", and {len(self._params)} were given")
                + ": select some, and only such that the optimizer has"
            )

    def has(self, p: Tensor, name: str | None) -> bool:
        if self._picks is not None:
            return bool(self._picks(require_name(self.option, name)))
        return self._params is None or p in self._params


def require_name(option: str, name: str | None) -> str:
    if name is None:
        raise ValueError(
            f"{option} needs the names of the parameters: give model.named_parameters() in the "
            "place of model.parameters()"
        )
    return name


def name_of(group: dict[str, Any], index: int) -> str | None:
    names = group.get("param_names")
    return names[index] if names is not None and index < len(names) else None


def named(groups: list[dict[str, Any]]) -> list[tuple[Tensor, str | None]]:
    """Return the parameters of all groups, and their names where they have some."""
    return [(p, name_of(group, i)) for group in groups for i, p in enumerate(group["params"])]


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all normalisation layers: `subset` of SAM-ON.

    They belong to modules whose class has "Norm" in its name, as PyTorch's batch, layer, group,
    instance and RMS normalisation have, and most others.

    Raises:
        TypeError: model is no torch.nn.Module.
        ValueError: the model has none.

    Source: Mueller et al., arXiv:2306.04226.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: give a torch.nn.Module")
    layers = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    found = [p for layer in layers for p in layer.parameters(recurse=False)]
    if not found:
        raise ValueError("model has no normalisation layer with parameters: name some as subset")
    return list(dict.fromkeys(found))


def check_mask(mask: Mapping[Tensor, Tensor] | None, params: Iterable[Tensor]) -> None:
    """Raise TypeError or ValueError unless a mask maps parameters to tensors of their shapes."""
    if mask is None:
        return
    if not isinstance(mask, Mapping):
        raise TypeError(
            f"mask is {type(mask).__name__}: give a dict from parameters to tensors of their shapes"
        )
    known = dict.fromkeys(params)
    for p, of_param in mask.items():
        if p not in known:
            raise ValueError("mask has a key that is no parameter of this optimizer")
        if not isinstance(of_param, Tensor) or of_param.shape != p.shape:
            raise ValueError(
                f"mask of a parameter of shape {tuple(p.shape)} has another shape: give a tensor "
                "of 0 and 1 with the parameter's"
            )
        if not _shards.are_cut_alike(of_param, p):
            raise ValueError(
                f"mask of a parameter of shape {tuple(p.shape)} is not sharded as the parameter "
                "is: give distribute_tensor(mask, p.device_mesh, p.placements)"
            )


def check_norm(norm: str | None) -> None:
    if norm not in NORMS:
        raise ValueError(f'norm={norm!r}: give "global", "tensor", or None')


def partners(pairs: Any, groups: list[dict[str, Any]]) -> dict[Tensor, Tensor]:
    """Return a dict from each parameter of a pair to the other one.

    Args:
        pairs: what dict() takes; None: each parameter whose name has lora_A, and the one that has
            lora_B in its place.

    Raises:
        TypeError, ValueError: these are no pairs of parameters in the groups.
    """
    if pairs is None:
        found = _pairs_by_name(groups)
    else:
        try:
            found = dict(pairs)
        except (TypeError, ValueError):
            raise TypeError(
                f"pairs is {type(pairs).__name__}: give pairs of parameters, such as "
                "[(lora_A, lora_B)], or None and model.named_parameters()"
            ) from None
    found.update({y: x for x, y in found.items()})
    Selection("pairs", found).check(named(groups))
    return found


def _pairs_by_name(groups: list[dict[str, Any]]) -> dict[Tensor, Tensor]:
    by_name = {require_name("pairs=None", name): p for p, name in named(groups)}
    pairs = {
        p: by_name[name.replace("lora_A", "lora_B")]
        for name, p in by_name.items()
        if "lora_A" in name and name.replace("lora_A", "lora_B") in by_name
    }
    if not pairs:
        raise ValueError("pairs=None: no two names differ in lora_A and lora_B; give the pairs")
    return pairs
