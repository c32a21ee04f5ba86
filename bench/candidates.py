"""Make what is benchmarked: the optimizers of the SAM family on every backend, and their peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import samkernels
from bench.clock import Work
from bench.names import COMPILED, EAGER, FOREACH, PYTORCH_OPTIMIZER
from bench.peers import CompiledSAM, EagerSAM, ForeachSAM, pytorch_optimizer_sam
from samkernels import backends

RHO = 0.05
SGD_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
ADAMW_OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2}
# It unrolls the list: a thousand tensors take more than ten minutes.
COMPILED_TENSORS = 200

Make = Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class Variant:
    """An optimizer of the family.

    Attributes:
        elements: read and written per parameter and step, with fused kernels.
    """

    cls: type[samkernels.SAM]
    elements: int
    base: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def base_options(self) -> dict[str, Any]:
        return SGD_OPTIONS if self.base is torch.optim.SGD else ADAMW_OPTIONS

    def on(self, backend: str) -> Make:
        """The optimizer on a backend of this package."""
        options = {"rho": RHO, "backend": backend, **self.options, **self.base_options}
        return lambda params: self.cls(params, self.base, **options)


def _granular(cls: type[samkernels.SAM], granularity: str) -> Variant:
    # Element: the update reads g1 as well. The others: one more reading of g2, for its norm.
    return Variant(cls, 11, options={"granularity": granularity})


# norms read g1; perturb reads g1 and w, writes w and old; the update reads old, g2 and the momentum
# buffer, writes w and the buffer: 1 + 4 + 5. tests/test_traffic.py counts them.
VARIANTS: dict[str, Variant] = {
    "SAM": Variant(samkernels.SAM, 10),
    "ASAM": Variant(samkernels.SAM, 11, options={"adaptive": True}),
    **{
        f"{cls.__name__}, {granularity}": _granular(cls, granularity)
        for cls in (samkernels.SAMDirection, samkernels.SAMMagnitude)
        for granularity in ("element", "tensor", "global")
    },
    "SAM, AdamW": Variant(samkernels.SAM, 12, torch.optim.AdamW),
}


def ours(device: torch.device) -> list[str]:
    """The backends that serve the device; the fastest first. No interpreter."""
    names = ["native", *["triton"][: device.type == "cuda"], "foreach", "reference"]
    return [name for name in names if not backends.why_unavailable(name, device)]


def candidates(variant: str, device: torch.device, tensors: int = 0) -> dict[str, Make]:
    """Those that there are of a variant on a device, by name; this package's first.

    Args:
        tensors: of the list; torch.compile takes very long for many.
    """
    of = VARIANTS[variant]
    found = {name: of.on(name) for name in ours(device)}
    adaptive = variant == "ASAM"
    if variant in ("SAM", "ASAM", "SAM, AdamW"):
        found[EAGER] = lambda params: EagerSAM(params, RHO, adaptive, of.base, **of.base_options)
        if importlib.util.find_spec("pytorch_optimizer"):
            found[PYTORCH_OPTIMIZER] = lambda params: pytorch_optimizer_sam(
                params, of.base, RHO, adaptive, **of.base_options
            )
    if variant in ("SAM", "SAM, AdamW"):
        found[FOREACH] = lambda params: ForeachSAM(params, RHO, of.base, **of.base_options)
    if variant == "SAM" and tensors <= COMPILED_TENSORS:
        found[COMPILED] = lambda params: CompiledSAM(params, RHO, **of.base_options)
    return found


def draw(
    shapes: Sequence[torch.Size],
    scale: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Normal numbers of that scale."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)
        for shape in shapes
    ]


@dataclass(frozen=True)
class Problem:
    """Weights, and the gradients of the two passes, shared by all candidates."""

    weights: list[Tensor]
    first_grads: list[Tensor]
    second_grads: list[Tensor]

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights)

    def parameters(self) -> list[Tensor]:
        return [torch.nn.Parameter(w.clone()) for w in self.weights]

    def step_of(self, optimizer: Any, params: list[Tensor]) -> Work:
        """What a training loop does in a step beside its two backward passes."""

        def step() -> None:
            for p, grad in zip(params, self.first_grads, strict=True):
                p.grad = grad
            optimizer.first_step()
            for p, grad in zip(params, self.second_grads, strict=True):
                p.grad = grad
            optimizer.second_step()

        return step


def problem(
    shapes: Sequence[torch.Size],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Problem:
    device = torch.device(device)
    weights = draw(shapes, 0.05, 0, device, dtype)
    return Problem(weights, *(draw(shapes, 0.01, seed, device, dtype) for seed in (1, 2)))
