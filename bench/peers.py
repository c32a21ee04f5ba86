"""Write SAM as users have it today: what the kernels are compared with.

All do what samkernels.SAM does, and tests/test_bench.py checks that they compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class EagerSAM:
    """One tensor at a time, with the base optimizer as it comes: what the usual SAM repositories
    do. They handle SAM and ASAM in one expression, in which the factor of SAM is 1.0."""

    def __init__(
        self,
        params: list[Tensor],
        rho: float,
        adaptive: bool = False,
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        **base_options: Any,
    ) -> None:
        self.params = params
        self.rho = rho
        self.adaptive = adaptive
        self.base_optimizer = base_optimizer(params, **base_options)
        self.old_params: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        norms = [
            ((torch.abs(p) if self.adaptive else 1.0) * p.grad).norm(p=2)
            for p in self.params
            if p.grad is not None
        ]
        scale = self.rho / (torch.norm(torch.stack(norms), p=2) + 1e-12)
        for p in self.params:
            if p.grad is not None:
                self.old_params[p] = p.data.clone()
                p.add_((torch.pow(p, 2) if self.adaptive else 1.0) * p.grad * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.params:
            p.data = self.old_params[p]
        self.base_optimizer.step()


class ForeachSAM:
    """torch._foreach_* for the perturbation and the restore, and PyTorch's fused optimizer."""

    def __init__(
        self,
        params: list[Tensor],
        rho: float,
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        **base_options: Any,
    ) -> None:
        self.params = params
        self.rho = rho
        self.base_optimizer = base_optimizer(params, **base_options, fused=True)
        self.old_params = [torch.empty_like(p) for p in params]

    @torch.no_grad()
    def first_step(self) -> None:
        grads = _grads(self.params)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_copy_(self.old_params, self.params)
        torch._foreach_add_(self.params, torch._foreach_mul(grads, self.rho / (norm + 1e-12)))

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.old_params)
        self.base_optimizer.step()


class CompiledSAM:
    """The step of ForeachSAM with SGD written out, as torch.compile fuses it."""

    def __init__(
        self,
        params: list[Tensor],
        rho: float,
        compiler: str = "inductor",
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


def pytorch_optimizer_sam(
    params: list[Tensor],
    base_optimizer: type[torch.optim.Optimizer],
    rho: float,
    adaptive: bool,
    **base_options: Any,
) -> Any:
    """SAM of the package pytorch_optimizer, as its documentation uses it."""
    from pytorch_optimizer import SAM

    return SAM(params, base_optimizer, rho=rho, adaptive=adaptive, **base_options)


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]
