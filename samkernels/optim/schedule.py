"""Let rho follow the learning rate."""

from __future__ import annotations

from typing import Any

from samkernels import checks


class ProportionScheduler:
    """A radius that goes with lr, given to an optimizer as `rho`:

        rho = min_value + (max_value - min_value) * (lr - min_lr) / (max_lr - min_lr)

    The optimizer asks it before each first step, for each group with the group's own lr, and writes
    its answer to group["rho"]. rho stays between the values where lr leaves its limits. With equal
    limits of lr, rho is max_value.

    Args:
        pytorch_lr_scheduler: what step() reads lr from, as its authors' class does; None where only
            an optimizer asks.
        max_lr, min_lr, max_value, min_value: finite numbers.

    Source: Zhuang et al., arXiv:2203.08065, and their code.
    """

    def __init__(
        self,
        pytorch_lr_scheduler: Any = None,
        max_lr: float | None = None,
        min_lr: float = 0.0,
        max_value: float | None = None,
        min_value: float = 0.0,
    ) -> None:
        if max_lr is None or max_value is None:
            raise TypeError("max_lr and max_value are missing: give the largest lr and its radius")
        limits = {"max_lr": max_lr, "min_lr": min_lr, "max_value": max_value}
        for name, value in {**limits, "min_value": min_value}.items():
            checks.check_number(name, value)
        self.pytorch_lr_scheduler = pytorch_lr_scheduler
        self.max_lr, self.min_lr = max_lr, min_lr
        self.max_value, self.min_value = max_value, min_value

    def value(self, lr: float) -> float:
        """Return rho for a learning rate."""
        if self.max_lr == self.min_lr:
            return self.max_value
        share = (float(lr) - self.min_lr) / (self.max_lr - self.min_lr)
        share = min(max(share, 0.0), 1.0)  # a warm-up may begin below min_lr
        return self.min_value + (self.max_value - self.min_value) * share

    def step(self) -> float:
        """Return rho for the lr that the scheduler has now."""
        if self.pytorch_lr_scheduler is None:
            raise RuntimeError("step() without pytorch_lr_scheduler: give it, or call value(lr)")
        return self.value(self.pytorch_lr_scheduler.get_last_lr()[0])
