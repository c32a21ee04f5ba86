"""What is measured on a GPU, beside bench/test_*.py: its lists, its candidates, and the kernels of
a step. Without a GPU, small lists on the CPU, for a rehearsal."""

from __future__ import annotations

from typing import Any

import torch

from bench.candidates import (
    COMPILED,
    RHO,
    SGD_OPTIONS,
    VARIANTS,
    Make,
    Problem,
    candidates,
)
from bench.clock import Clock, Work
from bench.lists import Shapes, resnet18_shapes, vit_large_shapes, wrn_28_10_shapes
from bench.peers import CompiledSAM
from samkernels import backends, ops

# Elements read and written per parameter by each kernel: norms g1; perturb g1, w -> w, old; sgd
# old, g2, buf -> w, buf. Times the size of an element: 40 B in fp32, 20 B in bf16.
FLOOR = {"norms": 1, "perturb": 4, "sgd": 5}


class Machine(Clock):
    """The GPU, or the CPU for a rehearsal."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.backend = "emulated" if dry_run else "native"
        if dry_run:
            from tests import emulated

            emulated.register()
        device = torch.device("cpu" if dry_run else "cuda")
        super().__init__(device, copied_elements=1 << 10 if dry_run else None)

    def lists(self) -> dict[str, Shapes]:
        """The parameter lists; small ones for a rehearsal."""
        if self.dry_run:
            return {"tiny": [torch.Size(shape) for shape in [(8, 3, 3, 3), (8,), (10, 8), ()]]}
        return {
            "ResNet-18": resnet18_shapes(),
            "WRN-28-10": wrn_28_10_shapes(),
            "ViT-L": vit_large_shapes(),
        }

    def wall_ms_per_call(self, work: Work, repeats: int = 5) -> float:
        """Of calls one behind the other: the slower one of host and device."""
        return self.wall_ms(lambda: [work() for _ in range(repeats)]) / repeats

    def kernel_backends(self) -> list[str]:
        """The backends with kernels of their own; native first."""
        triton = [] if backends.why_unavailable("triton", self.device) else ["triton"]
        return [self.backend, *triton]

    def candidates(self) -> dict[str, Make]:
        """Optimizers by name; native first. The compiled one is last: it may take too long."""
        found = candidates("SAM", self.device)
        if self.dry_run:
            found["native"] = VARIANTS["SAM"].on(self.backend)
            found[COMPILED] = lambda params: CompiledSAM(params, RHO, "eager", **SGD_OPTIONS)
        return found


def phases(problem: Problem, backend: str) -> dict[str, Work]:
    """The three kernels of a step, each on its own, by the keys of FLOOR."""
    w, g1, g2 = problem.weights, problem.first_grads, problem.second_grads
    old, buffers = ([torch.zeros_like(p) for p in w] for _ in range(2))
    norm = ops.norms(g1, backend=backend).total
    options: dict[str, Any] = {"backend": backend, "validate": False}
    return {
        "norms": lambda: ops.norms(g1, **options),
        "perturb": lambda: ops.perturb_(w, g1, old, rho=RHO, norm=norm, **options),
        "sgd": lambda: ops.sgd_(w, old, g2, buffers, ascent_norm=norm, **SGD_OPTIONS, **options),
    }
