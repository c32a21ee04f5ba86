"""SAM as users write it today: what the kernels are compared with.

Both peers do what samkernels.SAM does with torch.optim.SGD as base, and tests/test_bench.py checks
that they compute the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EagerSAM:
    """One tensor at a time, with torch.optim.SGD as it comes: what the usual SAM repositories do.

    They handle SAM and ASAM in one expression, in which the factor of SAM is 1.0.
    """

    def __init__(
        self, params: list[Tensor], rho: float, adaptive: bool = False, **sgd_options: Any
    ) -> None:
        self.params = params
        self.rho = rho
        self.adaptive = adaptive
        self.base_optimizer = torch.optim.SGD(params, **sgd_options)
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
    """torch._foreach_* for the perturbation and the restore, and torch.optim.SGD(fused=True)."""

    def __init__(self, params: list[Tensor], rho: float, **sgd_options: Any) -> None:
        self.params = params
        self.rho = rho
        self.base_optimizer = torch.optim.SGD(params, **sgd_options, fused=True)
        self.old_params = [torch.empty_like(p) for p in params]

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_copy_(self.old_params, self.params)
        torch._foreach_add_(self.params, torch._foreach_mul(grads, self.rho / (norm + 1e-12)))

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.old_params)
        self.base_optimizer.step()
