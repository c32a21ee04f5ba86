"""Autograd, switched off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def without_grad(method: F) -> F:
    """torch.no_grad() as a decorator, in a quarter of its time."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        try:  # before it is switched off: Ctrl-C may come in between
            torch._C._set_grad_enabled(False)  # torch.set_grad_enabled makes an object for it
            return method(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return cast(F, wrapper)
