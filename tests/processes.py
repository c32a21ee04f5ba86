"""Start the processes of a worker module, one for each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_ranks(module: str, world: int, *arguments: object) -> tuple[list[int], list[str]]:
    """Run `python -m module RANK ARGUMENTS` for each rank; return exit codes and what went to
    stderr. All processes have ended then."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), *map(str, arguments)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors
