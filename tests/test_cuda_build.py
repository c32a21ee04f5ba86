"""The CUDA sources compile for Ampere and Hopper without register spills. Needs nvcc, no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90")
SOURCES = sorted(path for path in (ROOT / "csrc/cuda").glob("*.cu") if path.name != "op_table.cu")


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(source: Path, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    # The flags of CMakeLists.txt, and the assembler's report.
    command = [NVCC, "-std=c++17", "-O3", "--fmad=false", "--threads=2", *targets]
    command += ["-Xptxas=-v", "-Werror=all-warnings", "-c", str(source), "-o", tmp_path / "x.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    for arch in ARCHITECTURES:
        assert f"for 'sm_{arch}'" in result.stderr
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
    assert len(stacks) >= 2 * len(ARCHITECTURES), "the assembler reported too few kernels"
    assert all(stack == ("0", "0") for stack in stacks), result.stderr
