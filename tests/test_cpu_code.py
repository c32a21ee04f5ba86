"""What the CPU ops take besides memory traffic: time in proportion to the elements, and little of
the stack."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from samkernels import _C

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("backend", "min_calls"), [("native", 150), ("emulated", 2)])
def test_ops_run_in_a_thread_with_a_small_stack(backend: str, min_calls: int) -> None:
    """Also on the emulation: the host's part of a launch is CUDA's."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.small_stack", backend],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    calls = re.search(r"^(\d+) calls$", result.stdout, re.MULTILINE)
    assert calls is not None and int(calls[1]) >= min_calls


# Elements: of four chunks (csrc/cpu/blocks.h), and of thirty-two.
SMALL, LARGE = 1 << 16, 1 << 19
# The number of positions, and their stride.
POSITIONS: dict[str, Callable[[int], tuple[int, int]]] = {
    "one kernel": lambda numel: (numel, 1),
    "one kernel, few columns": lambda numel: (numel // 4, 4),
    "one kernel, many columns": lambda numel: (64, numel // 64),
    "many kernels": lambda numel: (8, 1),
}


@pytest.mark.full
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_sgd_hess_takes_time_in_proportion_to_the_elements(
    positions: Callable[[int], tuple[int, int]], tmp_path: Path
) -> None:
    """Instructions, of a processor with one thread: a mean that every chunk made anew would take
    eight times as many for each element of the larger tensor."""
    small, large = (instructions(numel, positions(numel), tmp_path) for numel in (SMALL, LARGE))
    assert small > SMALL
    assert large <= 1.1 * LARGE / SMALL * small


def instructions(numel: int, positions: tuple[int, int], folder: Path) -> int:
    """Of sgd_hess on one tensor."""
    command = [
        "valgrind", "--tool=callgrind", "--collect-atstart=no",
        "--toggle-collect=samkernels::cpu::*::SgdHess(*",
        f"--callgrind-out-file={folder / 'out'}",
        sys.executable, ROOT / "tests" / "linear_time.py", _C.__file__,
        *map(str, (numel, *positions)),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "PYTHONHASHSEED": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    total = re.search(r"^totals: (\d+)$", (folder / "out").read_text(), re.MULTILINE)
    assert total is not None
    return int(total[1])
