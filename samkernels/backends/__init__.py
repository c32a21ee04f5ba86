"""The backends and the choice between them."""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch

from samkernels.backends import foreach, native, reference, triton
from samkernels.backends.contract import (
    AdamOptions,
    Backend,
    Dots,
    Mix,
    SgdOptions,
    TensorList,
)

__all__ = [
    "BACKENDS",
    "AdamOptions",
    "Backend",
    "Dots",
    "Mix",
    "SgdOptions",
    "TensorList",
    "check_name",
    "choose",
    "get",
    "why_unavailable",
]

# Fastest first; "auto" takes the first one that can serve. The reference is an oracle, never a
# choice of "auto".
_MODULES: dict[str, ModuleType] = {
    "native": native,
    "triton": triton,
    "foreach": foreach,
    "reference": reference,
}
BACKENDS = ("auto", *_MODULES)


def check_name(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or the name of a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: give one of {', '.join(map(repr, BACKENDS))}")


def why_unavailable(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, dense: bool = True
) -> str | None:
    """Say why a backend cannot serve tensors of this device, dtype and layout; None if it can."""
    return get(name).why_unavailable(device, dtype, dense)


def get(name: str) -> Backend:
    """Return the module of a backend."""
    return cast(Backend, _MODULES[name])


def choose(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32, dense: bool = True
) -> tuple[str, Backend]:
    """Return the name and the module of the backend that serves such tensors.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend was named and cannot serve; the message says why.
    """
    check_name(backend)
    if backend == "auto":
        backend = next(
            name
            for name in _MODULES
            if (name, device.type) != ("triton", "cpu")  # Triton's interpreter is for debugging
            and not why_unavailable(name, device, dtype, dense)
        )
    elif reason := why_unavailable(backend, device, dtype, dense):
        raise RuntimeError(f'backend="{backend}" cannot serve {dtype} on {device}: {reason}')
    return backend, get(backend)
