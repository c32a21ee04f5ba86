"""The CUDA kernels as a backend on CPU tensors: built for the host on csrc/emulation, registered as
"emulated"."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch

from samkernels import backends
from samkernels.backends import native

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "emulation"


def build() -> Any:
    """Configure and build the module `_emulated` (a second time only if a source is newer), and
    import it."""
    cmake = [sys.executable, "-m", "cmake"]
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    configure = [
        *cmake,
        "-S",
        ROOT,
        "-B",
        BUILD,
        "-G",
        "Ninja",
        "-DSAMKERNELS_EMULATION=ON",
        *options,
    ]
    for command in (configure, [*cmake, "--build", BUILD]):
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode != 0:
            raise RuntimeError(f"the emulated core cannot be built:\n{result.stdout}")
    (path,) = BUILD.glob("_emulated*.so")
    return _load("samkernels._emulated", path)


def backend() -> ModuleType:
    """A second instance of the native backend, over the emulated core, that serves CPU tensors."""
    core = build()
    module = _load("samkernels.backends.emulated", Path(native.__file__))

    @contextlib.contextmanager
    def on_the_emulated_device(device: torch.device) -> Iterator[Any]:
        assert device.type == "cpu"
        yield core.cuda(0)

    vars(module).update(_C=core, _target=on_the_emulated_device)
    return module


def register() -> None:
    """Make `backend="emulated"` known to samkernels. The last one: "auto" never takes it."""
    if "emulated" not in backends.BACKENDS:
        backends._MODULES["emulated"] = backend()
        backends.BACKENDS = (*backends.BACKENDS, "emulated")


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
