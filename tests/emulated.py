"""The CUDA kernels as a backend on CPU tensors: built for the host on csrc/emulation, registered as
"emulated".

    python -m tests.emulated      builds the core, as `make emulation` does; nothing else does
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch
from torch import Tensor

from samkernels import backends
from samkernels.backends import native
from tests.stand_ins import load_module

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "emulation"
SOURCES = ("CMakeLists.txt", "cmake/*", "csrc/*", "csrc/*/*")
MODULE = "_emulated" + sysconfig.get_config_var("EXT_SUFFIX")  # of this Python


def build(folder: Path = BUILD, *options: str) -> Path:
    """Configure and build the module `_emulated`; a second time only if a source is newer."""
    cmake = [sys.executable, "-m", "cmake"]
    options = (
        *options,
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )
    configure: list[str | Path] = [
        *cmake,
        "-S",
        ROOT,
        "-B",
        folder,
        "-G",
        "Ninja",
        "-DSAMKERNELS_EMULATION=ON",
        *options,
    ]
    build_it: list[str | Path] = [*cmake, "--build", folder]
    for command in (configure, build_it):
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode != 0:
            raise RuntimeError(f"the emulated core cannot be built:\n{result.stdout}")
    (folder / "built").touch()  # the module itself is only written if something has changed
    return folder / MODULE


def why_missing() -> str | None:
    """Why there is no module to load, or None."""
    if not (BUILD / MODULE).exists():
        return "the emulated core is not built for this Python: make emulation"
    built = (BUILD / "built").stat().st_mtime
    for path in (path for pattern in SOURCES for path in ROOT.glob(pattern)):
        if path.is_file() and path.stat().st_mtime > built:
            return f"the emulated core is older than {path.relative_to(ROOT)}: make emulation"
    return None


def load(path: Path) -> Any:
    """Import what was built."""
    return load_module("samkernels._emulated", path)


def backend(core: Any, cuda: bool = True) -> ModuleType:
    """Another instance of the native backend, over this core, that serves CPU tensors: with the
    emulated CUDA kernels, or with those for the CPU."""
    module = load_module("samkernels.backends.emulated", Path(native.__file__))

    def run_on_the_emulated_device(first: Tensor, function: Any, *args: Any) -> None:
        assert first.is_cpu
        function(core.cuda(0) if cuda else core.cpu(torch.get_num_threads()), *args)

    vars(module).update(_C=core, _run=run_on_the_emulated_device)
    return module


def register() -> None:
    """Make `backend="emulated"` known to samkernels. The last one: "auto" never takes it.

    Raises:
        RuntimeError: it is not built, or older than its sources.
    """
    if "emulated" not in backends.BACKENDS:
        if reason := why_missing():
            raise RuntimeError(reason)
        add("emulated", backend(load(BUILD / MODULE)))


def add(name: str, module: Any) -> None:
    """Make a backend known to samkernels, behind all others."""
    backends._MODULES[name] = module
    backends.BACKENDS = (*backends.BACKENDS, name)


if __name__ == "__main__":
    print(build())
