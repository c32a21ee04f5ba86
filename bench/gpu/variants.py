"""Cores built with other macros (bench/gpu/prepare.py), timed beside the installed one."""

from __future__ import annotations

import importlib.util
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.candidates import problem
from bench.gpu.cases import FLOOR, Machine, phases
from bench.gpu.goals import Row
from samkernels import backends
from samkernels.backends import native


def measure(machine: Machine, archive: Path, folder: Path, rounds: int) -> list[Row]:
    """Device microseconds of the kernels of a step, cold: all cores in one process and in turn."""
    names = ["native", *register(archive, folder.parent / "cores")]
    rows = []
    for of, shapes in machine.lists().items():
        given = problem(shapes, machine.device)
        works = {
            f"{name}|{phase}": work for name in names for phase, work in phases(given, name).items()
        }
        found = machine.medians(works, rounds)
        for name in names:
            us = {phase: found[f"{name}|{phase}"] for phase in FLOOR}
            rows.append({"list": of, "core": name, **us, "sum": sum(us.values())})
    return rows


def register(archive: Path, folder: Path) -> list[str]:
    """Make each core of the archive a backend; their names."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    names = []
    for path in sorted(folder.glob("*.so")):
        module: Any = _load(f"samkernels.backends.{path.stem}", Path(native.__file__))
        # The name of the last part is that of the function by which Python imports it.
        module._C = _load(f"{path.stem}._C", path)
        backends._MODULES[path.stem] = module
        backends.BACKENDS = (*backends.BACKENDS, path.stem)
        names.append(path.stem)
    return names


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
