"""What is measured on a GPU, beside bench/test_*.py: its lists, its candidates, and the kernels of
a step. Without a GPU, a small list on the CPU, for a rehearsal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from bench.candidates import RHO, SGD_OPTIONS, Make, Problem, candidates
from bench.clock import Clock, Work
from bench.lists import Shapes, resnet18_shapes, vit_large_shapes, wrn_28_10_shapes
from bench.names import EAGER, FOREACH
from bench.peers import CompiledSAM
from samkernels import backends, ops

# Elements read and written per parameter by each kernel: norms g1; perturb g1, w -> w, old; sgd
# old, g2, buf -> w, buf. Times the size of an element: 40 B in fp32, 20 B in bf16.
FLOOR = {"norms": 1, "perturb": 4, "sgd": 5}
# Who takes turns with native; the compiled step is timed apart, since it may take minutes to come.
CANDIDATES = ("native", "triton", FOREACH, EAGER, "foreach")


class Machine(Clock):
    """The GPU, or the CPU for a rehearsal."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        device = torch.device("cpu" if rehearse else "cuda")
        super().__init__(device, copied_elements=1 << 10 if rehearse else None)

    def lists(self) -> dict[str, Shapes]:
        """The parameter lists; tiny ones under the same names for a rehearsal."""
        if self.rehearse:
            tiny = [torch.Size(shape) for shape in [(8, 3, 3, 3), (8,), (10, 8), ()]]
            return dict.fromkeys(("ResNet-18", "WRN-28-10", "ViT-L"), tiny)
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
        return ["native", *triton]

    def candidates(self) -> dict[str, Make]:
        """Optimizers by name; native first."""
        found = candidates("SAM", self.device)
        return {name: found[name] for name in CANDIDATES if name in found}

    def compiled(self) -> Make:
        """The peer that torch.compile makes."""
        compiler = "eager" if self.rehearse else "inductor"
        return lambda params: CompiledSAM(params, RHO, compiler, **SGD_OPTIONS)

    def medians(
        self, works: Mapping[str, Work], rounds: int, cold: bool = True
    ) -> dict[str, float]:
        """Device microseconds of each, in turn, round after round."""
        host_ms = {}
        for name, work in works.items():
            work()
            host_ms[name] = self.host_ms(work)
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(1e3 * self.device_ms(work, host_ms[name], cold))
        return {name: statistics.median(values) for name, values in times.items()}


def phases(problem: Problem, backend: str) -> dict[str, Work]:
    """The three kernels of a step, each on its own, by the keys of FLOOR."""
    w, g1, g2 = problem.weights, problem.first_grads, problem.second_grads
    old, buffers = ([torch.zeros_like(p) for p in w] for _ in range(2))
    square = ops.dots(g1, backend=backend).total[0]
    mix = ops.Mix(g2, ascent_square=square)
    options: dict[str, Any] = {"backend": backend}
    return {
        "norms": lambda: ops.dots(g1, **options),
        "perturb": lambda: ops.perturb_(w, g1, old, rho=RHO, square=square, **options),
        "sgd": lambda: ops.sgd_(w, old, mix, buffers, **SGD_OPTIONS, **options),
    }
