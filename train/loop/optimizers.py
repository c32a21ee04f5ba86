"""Make optimizers by name, from a configuration."""

from collections.abc import Callable, Container, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

import samkernels
from train.loop.distributed import own_group
from train.settings.config import Config
from train.settings.registry import OPTIMIZERS
from train.shared.errors import ConfigError


class OnePassOptimizer(Protocol):
    """The part of an optimizer that the training step uses."""

    def step(self) -> Any:
        """Update the weights."""

    def zero_grad(self) -> None:
        """Clear the gradients."""


class TwoPassOptimizer(Protocol):
    """The part of the SAM family that the training step uses."""

    @property
    def needs_second_pass(self) -> bool:
        """Return whether the next step may have a second pass."""

    def first_pass(self, model: nn.Module) -> AbstractContextManager[None]:
        """Enclose the first pass, so that processes that perturb alike average their gradients."""

    def first_step(self) -> bool:
        """Move the weights from w to w + e(w), by their gradients. Return whether there is a second
        pass; if not, the weights stay at w."""

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and update them."""

    def restore(self) -> None:
        """Undo first_step."""


def build_optimizer(
    params: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
    config: Config,
    backend: str | None = None,
    norms: Container[str] = (),
    steps: int = 1,
) -> Any:
    """Make the configuration's optimizer, over SGD or AdamW if it is of the SAM family.

    Args:
        params: the parameters to train, with their names or without.
        config: the configuration, with opt_name and the hyperparameters.
        backend: the backend, if it is not config.backend; torch's optimizers have none.
        norms: for subset=norm, the names of the parameters of normalisation layers.
        steps: the number of steps of the training, for when=norm.

    Raises:
        ConfigError: an optimizer of the SAM family does not take these options.
    """
    row = OPTIMIZERS[config.opt_name]
    given: list[Any] = list(params)
    if not (row.needs_names or config.subset == "norm"):
        given = [p[1] if isinstance(p, tuple) else p for p in given]
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.wd}
    base: type[torch.optim.Optimizer] = torch.optim.AdamW
    if "adamw" not in (config.opt_name, config.base):
        base = torch.optim.SGD
        options |= {"momentum": config.momentum, "nesterov": config.nesterov}
    if row.step == "plain":
        return row.make(given, **options)
    options |= {"rho": config.rho, "backend": backend or config.backend}
    options |= {name: getattr(config, name) for name in row.keys}
    if not options.get("max_norm", 1):
        del options["max_norm"]
    if row.step == "hessian":
        options["seed"] = config.seed
    else:
        options |= {"base_optimizer": base, **_axes(config, norms, steps)}
        if config.sparsity:
            options["mask"] = _masks([p[1] if isinstance(p, tuple) else p for p in given], config)
        if row.step == "two passes":
            options["perturbation"] = config.perturbation
    try:
        return row.make(given, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"opt_name={config.opt_name}: {error}") from None


def _masks(params: list[nn.Parameter], config: Config) -> dict[nn.Parameter, torch.Tensor]:
    """Draw masks of 0 for a weight that is not perturbed, else 1; the draws are made on the CPU, so
    that they are alike on every device."""
    generator = torch.Generator().manual_seed(config.seed)
    masks = {}
    for p in (p for p in params if p.requires_grad):
        kept = torch.rand(p.shape, generator=generator) >= config.sparsity
        masks[p] = torch.empty_like(p, requires_grad=False).copy_(kept)
    return masks


def _axes(config: Config, norms: Container[str], steps: int) -> dict[str, Any]:
    """Return the options that every optimizer of the SAM family takes."""
    axes: dict[str, Any] = {"adaptive": config.adaptive, "eta": config.eta}
    axes["norm"] = None if config.norm == "none" else config.norm
    if config.scaling != "auto":
        axes["scaling"] = config.scaling
    if config.subset == "norm":
        axes["subset"] = lambda name: name in norms
    if config.policy is not None:
        name, *numbers = config.policy
        policies: dict[str, Callable[..., Any]] = {
            "periodic": samkernels.Periodic,
            "from": samkernels.FromStep,
            "bernoulli": lambda p: samkernels.Bernoulli(p, config.seed),
            "norm": lambda l1, l2: samkernels.GradientNormPolicy(l1, l2, steps),
        }
        axes["when"] = policies[name](*numbers)
    if config.rho_end < 1:
        axes["rho"] = samkernels.ProportionScheduler(
            max_lr=config.lr, max_value=config.rho, min_value=config.rho * config.rho_end
        )
    if config.perturbation == "group":
        axes["process_group"] = own_group(config.perturbation_group)
    return axes


def names_of_norms(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of normalisation layers.

    Raises:
        ConfigError: the model has no normalisation layers.
    """
    try:
        norms = {id(p) for p in samkernels.norm_parameters(model)}
    except ValueError:
        raise ConfigError(
            "subset=norm with a model that has no normalisation layers: allowed all"
        ) from None
    return frozenset(name for name, p in model.named_parameters() if id(p) in norms)


def backend_names(optimizer: Any) -> dict[str, str]:
    """Say which backend serves which tensors, such as {"cpu float32": "native"}."""
    if type(optimizer) in (torch.optim.SGD, torch.optim.AdamW):
        first = optimizer.param_groups[0]["params"][0]
        name = f"torch.optim.{type(optimizer).__name__}"
        return {f"{first.device} {str(first.dtype).removeprefix('torch.')}": name}
    return dict(optimizer.backends)
