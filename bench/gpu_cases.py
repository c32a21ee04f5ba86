"""What is measured on a GPU: parameter lists, candidates, and a clock that a tired host does not
slow down. Without a GPU the clock and the lists are small ones on the CPU, for a rehearsal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import samkernels
from bench.candidates import RHO, SGD_OPTIONS, resnet18_shapes
from bench.peers import EagerSAM, ForeachSAM
from samkernels import backends, ops

# Bytes per parameter and SAM step, in elements: norms 1, perturb 4, sgd 5 (g1 | g1, w -> w, old |
# old, g2, buf -> w, buf). Times the size of an element: 40 B in fp32, 20 B in bf16.
FLOOR = {"norms": 1, "perturb": 4, "sgd": 5}

Work = Callable[[], object]


def wrn_28_10_shapes() -> list[torch.Size]:
    """WideResNet-28-10 with 100 classes: 36.5 M elements."""
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3)]
    channels = 16
    for width in (160, 320, 640):
        for _ in range(4):
            shapes += [(channels,)] * 2 + [(width, channels, 3, 3)]
            shapes += [(width,)] * 2 + [(width, width, 3, 3)]
            if channels != width:
                shapes += [(width, channels, 1, 1)]
            channels = width
    shapes += [(channels,)] * 2 + [(100, channels), (100,)]
    return [torch.Size(shape) for shape in shapes]


def vit_large_shapes(layers: int = 24, dim: int = 1024) -> list[torch.Size]:
    """ViT-L/16 with 1000 classes: 304 M elements."""
    shapes: list[tuple[int, ...]] = [(1, 1, dim), (1, 197, dim), (dim, 3, 16, 16), (dim,)]
    for _ in range(layers):
        shapes += [(dim,)] * 2 + [(3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
        shapes += [(dim,)] * 2 + [(4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    shapes += [(dim,)] * 2 + [(1000, dim), (1000,)]
    return [torch.Size(shape) for shape in shapes]


class Machine:
    """The GPU, or the CPU for a rehearsal."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.backend = "emulated" if dry_run else "native"
        if dry_run:
            from tests import emulated

            emulated.register()
        # More than any second-level cache holds.
        self._flushed = torch.empty(1 << (10 if dry_run else 28), dtype=torch.int8)
        self._flushed = self._flushed.to(self.device)

    def lists(self) -> dict[str, list[torch.Size]]:
        """The parameter lists; small ones for a rehearsal."""
        if self.dry_run:
            return {"tiny": [torch.Size(shape) for shape in [(8, 3, 3, 3), (8,), (10, 8), ()]]}
        return {
            "ResNet-18": resnet18_shapes(),
            "WRN-28-10": wrn_28_10_shapes(),
            "ViT-L": vit_large_shapes(),
        }

    def synchronize(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    def device_ms(self, work: Work, host_ms: float, cold: bool) -> float:
        """What the device needs. It is kept busy while the host enqueues the work, which takes
        host_ms; in a cold start its caches hold nothing of use."""
        self.synchronize()
        if cold:
            self._flushed.add_(1)
        if self.dry_run:
            return self.host_ms(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2e6 * (1.5 * host_ms + 0.1)))  # cycles, of at most 2 GHz
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def host_ms(self, work: Work) -> float:
        """What the host needs to enqueue the work, with the device idle before."""
        self.synchronize()
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def wall_ms(self, work: Work, repeats: int = 5) -> float:
        """Per call, of calls one behind the other: the slower one of host and device."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start) / repeats


class CompiledSAM:
    """The step of ForeachSAM with SGD written out, as torch.compile fuses it."""

    def __init__(
        self,
        params: list[Tensor],
        rho: float,
        compiler: str,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self.params = params
        self.old_params = [torch.empty_like(p, requires_grad=False) for p in params]
        self.buffers = [torch.zeros_like(p, requires_grad=False) for p in params]

        def first(params: list[Tensor], old: list[Tensor], grads: list[Tensor]) -> None:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            torch._foreach_copy_(old, params)
            torch._foreach_add_(params, torch._foreach_mul(grads, rho / (norm + 1e-12)))

        def second(
            params: list[Tensor], old: list[Tensor], grads: list[Tensor], buffers: list[Tensor]
        ) -> None:
            u = torch._foreach_add(grads, old, alpha=weight_decay)
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, u)
            torch._foreach_copy_(params, torch._foreach_add(old, buffers, alpha=-lr))

        torch._dynamo.reset()  # or the guards of earlier instances would cost time in each call
        self._first = torch.compile(first, backend=compiler, dynamic=False)
        self._second = torch.compile(second, backend=compiler, dynamic=False)

    @torch.no_grad()
    def first_step(self) -> None:
        self._first(self.params, self.old_params, _grads(self.params))

    @torch.no_grad()
    def second_step(self) -> None:
        self._second(self.params, self.old_params, _grads(self.params), self.buffers)


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


EAGER = "eager, per tensor"
FOREACH = "torch._foreach, fused SGD"
COMPILED = "torch.compile of the foreach step"


def kernel_backends(machine: Machine) -> list[str]:
    """The backends with kernels of their own; native first."""
    found = [machine.backend]
    if "triton" in backends.BACKENDS and not backends.why_unavailable("triton", machine.device):
        found.append("triton")
    return found


def candidates(machine: Machine) -> dict[str, Callable[[list[Tensor]], Any]]:
    """Optimizers by name; native first. The compiled one is last: it may take too long."""

    def ours(backend: str) -> Callable[[list[Tensor]], Any]:
        return lambda params: samkernels.SAM(params, rho=RHO, backend=backend, **SGD_OPTIONS)

    native, *others = kernel_backends(machine)
    found = {"native": ours(native), **{name: ours(name) for name in others}}
    compiler = "eager" if machine.dry_run else "inductor"
    return {
        **found,
        EAGER: lambda params: EagerSAM(params, RHO, **SGD_OPTIONS),
        FOREACH: lambda params: ForeachSAM(params, RHO, **SGD_OPTIONS),
        COMPILED: lambda params: CompiledSAM(params, RHO, compiler, **SGD_OPTIONS),
    }


class Gradients(NamedTuple):
    """g1 and g2, shared by all candidates."""

    first: list[Tensor]
    second: list[Tensor]


def draw(
    machine: Machine, shapes: list[torch.Size], dtype: torch.dtype, scale: float, seed: int
) -> list[Tensor]:
    generator = torch.Generator(machine.device).manual_seed(seed)
    like: dict[str, Any] = {"generator": generator, "device": machine.device}
    return [torch.randn(shape, **like).mul_(scale).to(dtype) for shape in shapes]


def sam_step(optimizer: Any, params: list[Tensor], gradients: Gradients) -> Work:
    """One SAM step: what a training loop does beside its two backward passes."""

    def step() -> None:
        for p, grad in zip(params, gradients.first, strict=True):
            p.grad = grad
        optimizer.first_step()
        for p, grad in zip(params, gradients.second, strict=True):
            p.grad = grad
        optimizer.second_step()

    return step


def phases(
    machine: Machine, params: list[Tensor], gradients: Gradients, backend: str
) -> dict[str, Work]:
    """The three kernels of a step, each on its own, by the keys of FLOOR."""
    w = [p.detach() for p in params]
    old, buffers = ([torch.zeros_like(p) for p in w] for _ in range(2))
    norm = ops.norms(gradients.first, backend=backend).total
    options: dict[str, Any] = {"backend": backend, "validate": False}
    return {
        "norms": lambda: ops.norms(gradients.first, **options),
        "perturb": lambda: ops.perturb_(w, gradients.first, old, rho=RHO, norm=norm, **options),
        "sgd": lambda: ops.sgd_(
            w, old, gradients.second, buffers, ascent_norm=norm, **SGD_OPTIONS, **options
        ),
    }


def copy_of(machine: Machine) -> tuple[Work, int]:
    """A copy that no cache holds, and the bytes that it reads and writes."""
    source = torch.zeros(1 << (10 if machine.dry_run else 30), dtype=torch.int8)
    source = source.to(machine.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel()


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")
