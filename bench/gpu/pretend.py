"""A plugin of pytest for rehearsals: collects as if there were a GPU that every backend serves, so
that a rehearsal knows which tests the real run takes. Nothing can be run with it.

    pytest -p bench.gpu.pretend --collect-only ...
"""

from __future__ import annotations

import pytest
import torch

from samkernels.backends import native, triton


def _serves(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
    if dtype not in native.DTYPES or not dense:
        return "has no kernels for it"
    return None if device.type == "cuda" else _as_it_is[native](device, dtype, dense)


_as_it_is = {native: native.why_unavailable}


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        raise pytest.UsageError("bench.gpu.pretend needs --collect-only: there is no GPU")
    torch.cuda.is_available = lambda: True
    native.why_unavailable = _serves

    def triton_serves(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
        if device.type != "cuda":
            return "serves CUDA tensors only"
        return _serves(device, dtype, dense)

    triton.why_unavailable = triton_serves


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many tests of each file were collected, for the page."""
    counts: dict[str, int] = {}
    for item in session.items:
        name = item.path.name
        counts[name] = counts.get(name, 0) + 1
    for name, count in counts.items():
        print(f"{name}: {count} tests")
