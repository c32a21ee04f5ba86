"""The command behind bench/on_gpu.sh."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.gpu.page import all_in_order, collect, details, page
from bench.gpu.plans import CARRIED, LIMITS, PLANS, Context
from bench.gpu.runner import Outcome, Runner, write_archive, write_whole

PATIENCE = 4  # the caps and the limit of a rehearsal, in those of the real run


def environment(work: Path) -> dict[str, str]:
    """Of every step: caches that start empty, no emulated kernels, and the tools of CUDA and of
    this Python on the path."""
    folders = [Path(sys.executable).parent, Path(sys.executable).resolve().parent]
    path = [*map(str, folders), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return {
        "PATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "SAMKERNELS_NO_EMULATION": "1",
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("folder", type=Path, help="takes report.md, report.json, evidence.tgz")
    parser.add_argument("--seconds", type=float, help="limit; by default that of the plan")
    parser.add_argument("--carried", type=Path, default=CARRIED, help="what was prepared")
    parser.add_argument("--rehearse", action="store_true", help="the same steps on the CPU")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="samkernels-"))
    evidence = work / "evidence"
    last = ""

    def pack(outcomes: list[Outcome], seconds: float) -> None:
        nonlocal last
        report = collect(arguments.plan, evidence, outcomes, seconds)
        last = page(report)
        write_whole(folder / "report.md", (last + details(report)).encode())
        write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
        write_archive(evidence, folder / "evidence.tgz")

    limit = arguments.seconds or LIMITS[arguments.plan] * (PATIENCE if arguments.rehearse else 1)
    runner = Runner(evidence, limit, environment(work), pack)
    here = Context(evidence, work, arguments.carried.resolve(), arguments.rehearse)
    try:
        groups = PLANS[arguments.plan](here)
        if arguments.rehearse:  # a slow machine is none that fails
            groups = [
                [replace(step, cap=PATIENCE * step.cap) for step in group] for group in groups
            ]
        runner.run(groups)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{last}")
    return 0 if all_in_order(runner.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
