"""Optimizers by name, from a configuration."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

import samkernels
from train.config import Config


class OnePassOptimizer(Protocol):
    """What the training step uses of an optimizer."""

    def step(self) -> Any:
        """Update the weights."""

    def zero_grad(self) -> None:
        """Clear the gradients."""


class TwoPassOptimizer(Protocol):
    """What it uses of the SAM family."""

    def first_step(self) -> None:
        """Take the gradients over and move the weights to w + e(w)."""

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and update them."""

    def restore(self) -> None:
        """Undo first_step."""


SAM_FAMILY = {
    "sam": samkernels.SAM,
    "samdirection": samkernels.SAMDirection,
    "sammagnitude": samkernels.SAMMagnitude,
}


def build_optimizer(
    params: Iterable[nn.Parameter], config: Config, backend: str | None = None
) -> Any:
    """torch.optim.SGD, SGDHess, or one of the SAM family over SGD.

    Args:
        params: the parameters to train.
        config: opt_name and its hyperparameters.
        backend: overrides config.backend; torch.optim.SGD has none.
    """
    base_options: dict[str, Any] = {
        "lr": config.lr,
        "momentum": config.momentum,
        "weight_decay": config.wd,
        "nesterov": config.nesterov,
    }
    if config.opt_name == "sgd":
        return torch.optim.SGD(params, **base_options)
    if config.opt_name == "sgdhess":
        return samkernels.SGDHess(
            params,
            rho=config.rho,
            seed=config.seed,
            backend=backend or config.backend,
            **base_options,
        )
    options: dict[str, Any] = {"rho": config.rho, "adaptive": config.adaptive}
    if config.opt_name != "sam":
        options["granularity"] = config.granularity
    return SAM_FAMILY[config.opt_name](
        params, torch.optim.SGD, backend=backend or config.backend, **options, **base_options
    )


def backend_names(optimizer: Any) -> dict[str, str]:
    """Which backend serves which tensors, such as {"cpu float32": "native"}."""
    if isinstance(optimizer, torch.optim.SGD):
        first = optimizer.param_groups[0]["params"][0]
        return {f"{first.device} {str(first.dtype).removeprefix('torch.')}": "torch.optim.SGD"}
    return dict(optimizer.backends)
