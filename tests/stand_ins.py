"""The kernels for GPUs as backends on CPU tensors, for the tests of the ops: the CUDA ones as
"emulated" (emulated.py), those of Triton as "interpreted" (interpreted.py)."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from samkernels import backends

STAND_INS = ("emulated", "interpreted")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SWITCHED_OFF = "SAMKERNELS_NO_EMULATION is set"


@cache
def register() -> dict[str, str]:
    """Make both known to samkernels; returns why those are missing that cannot be had. The tests of
    a missing one are there all the same, and are skipped: tests/conftest.py.

    Where SAMKERNELS_NO_EMULATION is set, because the real kernels run, say, neither is known."""
    if os.environ.get("SAMKERNELS_NO_EMULATION"):
        return dict.fromkeys(STAND_INS, SWITCHED_OFF)
    missing = {}
    for name in STAND_INS:
        try:
            _module(name).register()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
            backends._MODULES[name] = _absent(missing[name])
            backends.BACKENDS = (*backends.BACKENDS, name)
    return missing


def load_module(name: str, path: Path) -> Any:
    """The module at `path` under another name; a package with modules of its own."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if folder is not None:  # or its modules would not find it
        sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> Any:
    # Not above: triton need not be there.
    from tests import emulated

    if name == "emulated":
        return emulated
    from tests import interpreted

    return interpreted


def _absent(reason: str) -> Any:
    return SimpleNamespace(why_unavailable=lambda *_: reason)
