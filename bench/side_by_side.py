"""Time one SAM step on the CPU, gradients given: all candidates in turn, round after round.

    python -m bench.side_by_side [--list ResNet-18] [--rounds 50] [--output FILE.json]

Prints for each the median and quartiles in milliseconds, the ratio to native (median of the ratios
within a round), and the time in passes: units of reading or writing the parameters once at the
speed of a large copy in the same round. The floor is what memory allows: see memory_floor.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import samkernels
from bench import memory_floor
from bench.candidates import candidates, problem
from bench.clock import Clock, Work
from bench.lists import LISTS, Shapes, numel_of
from train.shared.machine import commit, processor

WARMUP_ROUNDS = 3


def measure(shapes: Shapes, rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate and of the pass, one value per round."""
    numel = numel_of(shapes)
    given = problem(shapes)
    steps: dict[str, Work] = {}
    for name, make in candidates("SAM", torch.device("cpu"), len(shapes)).items():
        params = given.parameters()
        steps[name] = given.step_of(make(params), params)
    if reason := memory_floor.why_unavailable():
        print(f"without the memory floor: {reason}")
    else:
        steps[memory_floor.NAME] = memory_floor.memory_floor_step(numel)[0]
    clock = Clock(torch.device("cpu"))
    seconds: dict[str, list[float]] = {name: [] for name in [*steps, "pass"]}
    for i in range(WARMUP_ROUNDS + rounds):
        for name, step in steps.items():
            taken = _seconds(step)
            if i >= WARMUP_ROUNDS:
                seconds[name].append(taken)
        speed = clock.copy_speed()
        if i >= WARMUP_ROUNDS:
            seconds["pass"].append(1e-3 * given.nbytes / speed)
        print(
            f"\rround {i + 1} of {WARMUP_ROUNDS + rounds}, {WARMUP_ROUNDS} of them to warm up",
            end="",
            flush=True,
        )
    print()
    return seconds


def summarize(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A row per candidate."""
    rows = []
    for name in seconds:
        if name == "pass":
            continue
        low, median, high = statistics.quantiles(seconds[name], n=4)
        rows.append(
            {
                "name": name,
                "median_ms": 1e3 * median,
                "quartiles_ms": [1e3 * low, 1e3 * high],
                "times_native": _median_ratio(seconds[name], seconds["native"]),
                "passes": _median_ratio(seconds[name], seconds["pass"]),
            }
        )
    return rows


def environment() -> dict[str, Any]:
    """What a figure has to come with."""
    return {
        "commit": commit(),
        "processor": processor(),
        "MHz as found": clock_found(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "samkernels": samkernels.__version__,
    }


def clock_found() -> float | None:
    """Of the first core, now; None where the system does not tell."""
    try:
        found = re.search(r"^cpu MHz\s*: (\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return float(found[1]) if found else None


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _median_ratio(values: list[float], units: list[float]) -> float:
    return statistics.median(v / u for v, u in zip(values, units, strict=True))


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", choices=LISTS, default="ResNet-18", help="of parameters")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    shapes = LISTS[arguments.list]()
    seconds = measure(shapes, arguments.rounds)
    rows = summarize(seconds)
    print(f"{'':40}{'ms':>9}{'quartiles':>18}{'x native':>10}{'passes':>8}")
    for row in rows:
        quartiles = "{:.1f} to {:.1f}".format(*row["quartiles_ms"])
        print(
            f"{row['name']:40}{row['median_ms']:9.1f}{quartiles:>18}"
            f"{row['times_native']:10.2f}{row['passes']:8.1f}"
        )
    if arguments.output:
        result = {
            "what": "one SAM step (SGD with momentum), fp32, gradients given, on the CPU",
            "list": arguments.list,
            "tensors": len(shapes),
            "elements": numel_of(shapes),
            "rounds": arguments.rounds,
            "command": "python -m bench.side_by_side "
            f'--list "{arguments.list}" --rounds {arguments.rounds}',
            "environment": environment(),
            "pass_ms": 1e3 * statistics.median(seconds["pass"]),
            "rows": rows,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
