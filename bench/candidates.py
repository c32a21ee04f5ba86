"""What is benchmarked: one SAM step, gradients given, on the parameter list of a real network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import samkernels
from bench.peers import EagerSAM, ForeachSAM
from train.models.resnet import resnet18

RHO = 0.05
SGD_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}

Step = Callable[[], None]


def _ours(backend: str) -> Callable[[list[Tensor]], Any]:
    return lambda params: samkernels.SAM(params, rho=RHO, backend=backend, **SGD_OPTIONS)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], Any]] = {
    "native": _ours("native"),
    "foreach": _ours("foreach"),
    "reference": _ours("reference"),
    "peer: eager, per tensor": lambda params: EagerSAM(params, RHO, **SGD_OPTIONS),
    "peer: torch._foreach, fused SGD": lambda params: ForeachSAM(params, RHO, **SGD_OPTIONS),
}


def resnet18_shapes() -> list[torch.Size]:
    """The shapes of ResNet-18's parameters with 100 classes: 62 tensors, 11.2 M elements."""
    return [p.shape for p in resnet18(in_channels=3, num_classes=100).parameters()]


def sam_step(name: str, shapes: list[torch.Size], seed: int = 0) -> tuple[Step, list[Tensor]]:
    """A function that makes one SAM step with fixed gradients, and the parameters that it moves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> list[Tensor]:
        return [torch.randn(shape, generator=generator) * scale for shape in shapes]

    params: list[Tensor] = [torch.nn.Parameter(w) for w in draw(0.05)]
    first_grads, second_grads = draw(0.01), draw(0.01)
    optimizer = OPTIMIZERS[name](params)

    def step() -> None:
        for p, grad in zip(params, first_grads, strict=True):
            p.grad = grad
        optimizer.first_step()
        for p, grad in zip(params, second_grads, strict=True):
            p.grad = grad
        optimizer.second_step()

    return step, params
