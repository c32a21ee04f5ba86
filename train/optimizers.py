"""Optimizers by name, from a configuration."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

import samkernels
from train.config import Config
from train.errors import ConfigError


class TwoPassOptimizer(Protocol):
    """What the training step uses of samkernels' optimizers."""

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
    """torch.optim.SGD or one of the SAM family over it.

    Args:
        params: the parameters to train.
        config: opt_name and its hyperparameters.
        backend: overrides config.backend; only the SAM family has one.

    Raises:
        ConfigError: the optimizer is not in this version.
    """
    base_options: dict[str, Any] = {
        "lr": config.lr,
        "momentum": config.momentum,
        "weight_decay": config.wd,
        "nesterov": config.nesterov,
    }
    if config.opt_name == "sgd":
        return torch.optim.SGD(params, **base_options)
    if config.opt_name not in SAM_FAMILY:
        raise ConfigError(
            f"opt_name={config.opt_name} is not in this version: allowed sgd, "
            f"{', '.join(SAM_FAMILY)}; nearest sgd"
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
