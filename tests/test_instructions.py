"""The host's part of a step, counted: instructions from Python to the kernels, by callgrind, as
ratios to a step of the base optimizer itself, fused, in the same run.

Counts hardly vary, times do. A change that lowers a ratio lowers its bound; one that raises it says
why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from tests.instructions import CASES, STEPS

ROOT = Path(__file__).parents[1]
# At most, of a step of the first to one of the second: where the core reads tensors through
# DLPack's C exchange API (PyTorch 2.10 and later), and where it asks their Python attributes. Found
# with Python 3.11 and PyTorch 2.14: 1.15, 2.41, 1.36, 1.88, 2.02 and 0.59; with Python 3.10 and
# PyTorch 2.6: 6.6, 4.1, 6.6, 8.0, 7.5 and 4.8. The latter were 5.7, 3.5, 5.9, 7.1, 6.5 and 3.5
# before variants became rules: there the closer look at each tensor, in every step, is Python.
BOUNDS = {
    ("SAM, 62 tensors", "SGD, 62 tensors"): (1.22, 7.0),
    ("SAM, 1 tensor", "SGD, 1 tensor"): (2.5, 4.4),
    ("SAM, 62 tensors in 2 groups", "SGD, 62 tensors in 2 groups"): (1.44, 7.0),
    ("SAMDirection, 62 tensors", "SGD, 62 tensors"): (1.98, 8.5),
    ("SAMDirection, tensor, 62 tensors", "SGD, 62 tensors"): (2.13, 8.0),
    ("SAM, AdamW, 62 tensors", "AdamW, 62 tensors"): (0.63, 5.1),
}
HAS_EXCHANGE_API = hasattr(Tensor, "__dlpack_c_exchange_api__")
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


@pytest.mark.full
@pytest.mark.parametrize(("ours", "theirs"), BOUNDS)
def test_instructions_per_step(ours: str, theirs: str, counts: dict[str, float]) -> None:
    bound = BOUNDS[ours, theirs][0 if HAS_EXCHANGE_API else 1]
    assert counts[ours] <= bound * counts[theirs]
