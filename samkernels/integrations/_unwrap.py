"""Find the optimizer inside of what frameworks put around it."""

from __future__ import annotations

from typing import Any

from samkernels.optim import SAM


def sam_of(optimizer: Any) -> SAM:
    """Return the SAM in the wrappers of Accelerate, fastai and others.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not isinstance(inner, SAM):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "opt", None)
        if inner is None:
            raise TypeError(
                f"the optimizer is {type(optimizer).__name__}: give a SAM or a variant of it, "
                "or leave this adapter out"
            )
    return inner
