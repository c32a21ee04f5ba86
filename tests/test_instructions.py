"""The host's part of a step, counted: instructions from Python to the kernels, by callgrind.

Counts hardly vary, times do. They depend on the versions of Python and torch, so the bounds hold
for those named here. A change that lowers counts stores them; one that raises them says why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.instructions import CASES, STEPS

ROOT = Path(__file__).parents[1]
# Found with these versions; per step.
VERSIONS = ((3, 11), "2.15")
FOUND = {
    "SAM, 62 tensors": 2_469_000,
    "SAM, 1 tensor": 1_045_000,
    "SAMDirection, tensor, 62 tensors": 2_898_000,
    "SAM, AdamW, 62 tensors": 3_733_000,
}
SLACK = 1.1
CLIENT = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(void) { CALLGRIND_STOP_INSTRUMENTATION; }
void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


def why_not() -> str | None:
    if not (shutil.which("valgrind") and Path("/usr/include/valgrind/callgrind.h").exists()):
        return "valgrind is not installed"
    if shutil.which("cc") is None:
        return "no C compiler was found"
    if (sys.version_info[:2], ".".join(torch.__version__.split(".")[:2])) != VERSIONS:
        return f"the bounds were found with other versions: {VERSIONS}"
    return None


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Instructions per step of each case."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("callgrind")
    (folder / "client.c").write_text(CLIENT)
    library = folder / "client.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, folder / "client.c"], check=True
    )
    command = [
        "valgrind", "--tool=callgrind", "--instr-atstart=no",
        f"--callgrind-out-file={folder / 'out'}",
        sys.executable, ROOT / "tests" / "instructions.py", library,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for file in folder.glob("out.*"):
        text = file.read_text()
        name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        assert name and total, text[:500]
        found[name[1]] = int(total[1]) / STEPS
    assert found.keys() == CASES.keys()
    return found


@pytest.mark.parametrize("case", CASES)
def test_instructions_per_step(case: str, counts: dict[str, float]) -> None:
    assert counts[case] <= SLACK * FOUND[case]
    assert counts[case] >= FOUND[case] / SLACK, "fewer: store the new count, so that it is kept"
