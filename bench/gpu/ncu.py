"""What ncu watches, and how its table is read.

    ncu OPTIONS python -m bench.gpu.ncu --list NAME [--rehearse]

OPTIONS are those of bench/gpu/plans.py.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from typing import Any

MEGA = 1e6
# Title, metric of ncu, what to divide by: ncu prints base units.
COLUMNS = (
    ("read MB", "dram__bytes_read.sum", MEGA),
    ("written MB", "dram__bytes_write.sum", MEGA),
    ("us", "gpu__time_duration.sum", 1e3),
    ("registers", "launch__registers_per_thread", 1.0),
)


def rows_of(output: str) -> list[dict[str, Any]]:
    """A row per kernel; none if ncu printed no table."""
    begin = output.find('"ID",')
    if begin < 0:
        return []
    rows = []
    for kernel in list(csv.DictReader(io.StringIO(output[begin:])))[1:]:  # the first: units
        if not kernel.get("gpu__time_duration.sum"):
            continue
        row: dict[str, Any] = {"kernel": short(kernel["Kernel Name"])}
        for title, metric, unit in COLUMNS:
            row[title] = float((kernel.get(metric) or "nan").replace(",", "")) / unit
        row["GB/s"] = (row["read MB"] + row["written MB"]) / row["us"] * 1e3
        rows.append(row)
    return rows


def short(kernel: str) -> str:
    """The functor of a kernel's name, which says what it does, or all of it."""
    found = re.search(r"\w+Functor<[^<>]*>", kernel)
    return found[0] if found else kernel[:80]


def one_step(name: str, rehearse: bool) -> None:
    """One SAM step in float32, after two that warm up."""
    import torch

    from bench.candidates import problem
    from bench.gpu.cases import Machine

    machine = Machine(rehearse)
    given = problem(machine.lists()[name], machine.device)
    params = given.parameters()
    step = given.step_of(machine.candidates()["native"](params), params)
    step()
    step()
    machine.synchronize()
    if not rehearse:
        torch.cuda.profiler.start()
    step()
    machine.synchronize()
    if not rehearse:
        torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", default="ResNet-18", help="of parameters")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    one_step(arguments.list, arguments.rehearse)


if __name__ == "__main__":
    main()
