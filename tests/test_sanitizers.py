"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: those for the CPU, in every
variant, and the CUDA ones on the emulated runtime."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import emulated

CXX = shutil.which(os.environ.get("CXX", "c++")) or ""


def library(name: str) -> str:
    """Where the compiler keeps a library; its bare name if it has none."""
    if not CXX:
        return name
    command = [CXX, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# libasan comes first in the process, and right behind it the library whose exceptions it watches.
PRELOAD = [library("libasan.so"), library("libstdc++.so.6")]
pytestmark = pytest.mark.skipif(
    not all(Path(path).is_absolute() for path in PRELOAD), reason="the compiler has no libasan.so"
)


@pytest.fixture(scope="module")
def module() -> Path:
    folder = emulated.ROOT / "build" / "sanitized"
    return emulated.build(folder, "-DSAMKERNELS_SANITIZE=ON")


def run(module: Path, device: str, *arguments: str, variant: str = "") -> tuple[int, str]:
    """Exit status and output of tests/sanitized.py."""
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(PRELOAD),
        # Python's own memory outlives it. The status tells a finding from any other failure.
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
        "SAMKERNELS_CPU_VARIANT": variant,
        "SAMKERNELS_NO_EMULATION": "1",
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.sanitized", str(module), device, *arguments],
        cwd=emulated.ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize(("device", "variant"), [("cpu", ""), ("cpu", "baseline"), ("cuda", "")])
def test_every_op(module: Path, device: str, variant: str) -> None:
    status, output = run(module, device, variant=variant)
    assert status == 0, output
    calls = re.search(r"^(\d+) calls$", output, re.MULTILINE)
    assert calls is not None and int(calls[1]) > 300
    assert f"CPU code {variant}" in output


# Mutants: what the sanitizers are for ends the process. An op that is told of memory that is not
# there does what a kernel would that goes one element too far.


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("lie", "numel", "finding"),  # of single elements, and at the end of a long row of vectors
    [
        ("read", 2, "ERROR: AddressSanitizer: heap-buffer-overflow.*READ of size"),
        ("write", 1025, "ERROR: AddressSanitizer: heap-buffer-overflow.*WRITE of size"),
        ("misalign", 2, "runtime error: (load|reference binding to|store) .*misaligned address"),
    ],
    ids=["read", "write", "misalign"],
)
def test_an_access_that_is_wrong_is_found(
    module: Path, device: str, lie: str, numel: int, finding: str
) -> None:
    status, output = run(module, device, "--lie", lie, "--numel", str(numel))
    assert status == 99 and re.search(finding, output, re.DOTALL), output
