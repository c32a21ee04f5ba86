"""Measure the time that memory allows for one SAM step, by memory_floor.cpp, which is compiled
where it is needed."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bench.clock import Work

NAME = "floor: three bare loops"


def why_unavailable() -> str | None:
    if platform.machine() not in ("x86_64", "AMD64"):
        return "memory_floor.cpp is written for x86-64"
    if _compiler() is None:
        return "no C++ compiler was found (set CXX)"
    return None


def memory_floor_step(numel: int) -> tuple[Work, list[Tensor]]:
    """A function that makes the SAM step of sam_step on flat tensors, and these tensors: w, room
    for w, g1, g2 and the momentum buffer, fp32, `numel` elements, rounded down to a multiple of 16.

    Raises:
        RuntimeError: why_unavailable() gives a reason, or the compiler fails.
    """
    compiler = _compiler()
    if reason := why_unavailable():
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "memory_floor.so"
        source = Path(__file__).with_suffix(".cpp")
        flags = ["-O3", "-mavx2", "-fopenmp", "-shared", "-fPIC"]
        done = subprocess.run([str(compiler), *flags, "-o", library, source], capture_output=True)
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} failed:\n{done.stderr.decode()}")
        sam_step = ctypes.CDLL(str(library)).sam_step
    sam_step.restype = ctypes.c_double
    sam_step.argtypes = [ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * 5]
    numel -= numel % 16
    tensors = [torch.randn(numel) * 0.01 for _ in range(5)]  # PyTorch aligns them to 64 bytes
    threads = torch.get_num_threads()

    def step() -> None:
        sam_step(numel, threads, *[t.data_ptr() for t in tensors])

    return step, tensors


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))
