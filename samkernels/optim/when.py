"""Choose the steps in which SAM makes its second pass; the others are made with g1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

from samkernels import checks
from samkernels.optim._random import random_bits


class When(Protocol):
    """A policy, given to SAM as `when`. It keeps nothing itself: what one with needs_norm has to
    know from step to step is in `memory`, which the parameter groups and checkpoints hold.

    Attributes:
        memory: names in there, and their values at first; may be missing.
    """

    needs_norm: bool

    def wants(self, step: int, square: float, memory: dict[str, Any]) -> bool:
        """Say whether step number `step` (0 is the first) has a second pass.

        Args:
            square: ||g1||_2^2 over all parameters; nan unless needs_norm.
            memory: numbers by name; to be written to.
        """


class Periodic:
    """SAM in every k-th step: when (step + 1) % k == 0; k = 1 is every step.

    Args:
        k: >= 1.

    Source: MosaicML Composer's SAMOptimizer (interval), where rho 10 times as large goes with k 10.
    """

    needs_norm = False

    def __init__(self, k: int) -> None:
        checks.check_whole("k", k, 1)
        self.k = k

    def wants(self, step: int, square: float, memory: dict[str, Any]) -> bool:
        """Say whether step number `step` has a second pass; see `When`."""
        return (step + 1) % self.k == 0


class FromStep:
    """SAM from a step on, plain steps before it: most of what SAM brings comes from late epochs.

    Args:
        first: number of the first step with a second pass; 0 is every step.

    Source: arXiv:2410.10373, whose code begins with an empty momentum there; this one goes on with
    what it has.
    """

    needs_norm = False

    def __init__(self, first: int) -> None:
        checks.check_whole("first", first, 0)
        self.first = first

    def wants(self, step: int, square: float, memory: dict[str, Any]) -> bool:
        """Say whether step number `step` has a second pass; see `When`."""
        return step >= self.first


class Bernoulli:
    """SAM with a probability, drawn from (seed, step) alone: alike on all ranks and after a resume.

    Args:
        p: from 0 to 1, or a function from the step to that.
        seed: whole number.

    Source: Zhao et al., arXiv:2203.09962 (RST); SS-SAM.
    """

    needs_norm = False

    def __init__(self, p: float | Callable[[int], float], seed: int = 0) -> None:
        if not callable(p):
            _share("p", p)
        checks.check_whole("seed", seed, -(2**63))
        self.p, self.seed = p, seed

    def wants(self, step: int, square: float, memory: dict[str, Any]) -> bool:
        """Say whether step number `step` has a second pass; see `When`."""
        p = _share("p", self.p(step)) if callable(self.p) else self.p
        return random_bits(self.seed, step) / 2**64 < p


class GradientNormPolicy:
    """SAM where ||g1|| is large for the steps before (AE-SAM). With s = ||g1||_2^2 and t the step:

        mean <- decay * mean + (1 - decay) * s
        variance <- decay * variance + (1 - decay) * (s - mean)^2
        SAM if s >= mean + c * sqrt(variance),  c = t / steps * l1 + (1 - t / steps) * l2

    The mean starts at the first s and the variance at 0, so that the first step is one of SAM: the
    authors do not say, and no code of theirs is known. The host waits for the norm in each step.

    Args:
        l1, l2: finite numbers; there are no defaults, since none are known to be good.
        steps: of the whole training, >= 1; afterwards c stays l1.
        decay: from 0 to 1.

    Source: Jiang et al., arXiv:2304.14647.
    """

    needs_norm = True
    memory: Mapping[str, float | None] = MappingProxyType({"mean": None, "variance": 0.0})

    def __init__(self, l1: float, l2: float, steps: int, decay: float = 0.9) -> None:
        for name, value in (("l1", l1), ("l2", l2)):
            checks.check_number(name, value)
        checks.check_whole("steps", steps, 1)
        self.l1, self.l2, self.steps = l1, l2, steps
        self.decay = _share("decay", decay)

    def wants(self, step: int, square: float, memory: dict[str, Any]) -> bool:
        """Say whether step number `step` has a second pass; see `When`."""
        if not math.isfinite(square):
            return True  # a step of SAM is skipped then; and the mean is not to take it in
        mean = memory.get("mean")
        if mean is None:  # a mean of equals would be rounded
            memory.update(mean=square, variance=0.0)
            return True
        mean = self.decay * mean + (1 - self.decay) * square
        variance = self.decay * memory.get("variance", 0.0)
        variance += (1 - self.decay) * (square - mean) ** 2
        memory.update(mean=mean, variance=variance)
        t = min(step / self.steps, 1.0)
        return square >= mean + (t * self.l1 + (1 - t) * self.l2) * math.sqrt(variance)


def check_when(when: Any) -> None:
    """Raise TypeError unless `when` is a policy, or None."""
    if when is not None and (isinstance(when, type) or not callable(getattr(when, "wants", None))):
        raise TypeError(
            f"when is {type(when).__name__}: give Periodic(k), FromStep(first), Bernoulli(p), "
            "GradientNormPolicy(l1, l2, steps), or None for every step"
        )


def _share(name: str, value: Any) -> float:
    checks.check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: give a number from 0 to 1")
    return float(value)
