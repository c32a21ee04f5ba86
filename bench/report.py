"""Make tables and plots of committed results.

    python -m bench.report FILES... [--output docs/benchmarks.md] [--readme README.md]

FILES: what pytest-benchmark wrote of bench/test_*.py, and what bench.side_by_side wrote; those that
lie in one folder are of one machine, and the folder's name is its title; a case that is in several
files is taken from the last of them. Plots go into images/ beside the output. --readme also
replaces the part of README.md between its two bench comments.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import memory_floor, plots
from bench.names import PEER
from train.pages.tables import NUMBERS, markdown

Rows = list[list[str]]

MARKERS = ("<!-- bench: made by python -m bench.report -->", "<!-- end of bench -->")
PREFACE = """\
# Benchmarks

Made by `python -m bench.report {files}` from the files named there. Again on your machine:
`make bench` (all cases, one after the other) and `python -m bench.side_by_side` (one SAM step, all
candidates in turn, for ratios that hold where the speed drifts).

What is timed is the optimizer's part of a step: gradients are given. SGD has momentum 0.9 and
weight decay. Times are medians; quartiles stand in brackets.

- *Warm*: the same step again and again. *Cold*: after a copy that has emptied the caches, as in
  training, where passes of the network lie between.
- *Floor*: the bytes that a fused step has to move ([kernels](kernels.md#the-floor)), at the speed
  of a large copy, measured between the rounds of the same case. A step may be faster than that.
- *Memory*: the most that the optimizer has allocated at a time, state included, in units of the
  parameters, counted by PyTorch's allocator.
- A case that is in several files was measured again, and is taken from the last of them.
- The peers are in `bench/peers.py`; a test checks that they compute the same in float32. In
  bfloat16 they round after every operation; this package computes in float32, and rounds the
  perturbed weight at random ([why](kernels.md#cuda)).
"""


@dataclass
class Machine:
    """The results of one folder."""

    name: str
    environment: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    in_turn: list[dict[str, Any]] = field(default_factory=list)

    def add(self, environment: dict[str, Any]) -> None:
        """Of one more file; where files differ, as in the commit, all values are shown."""
        for name, value in environment.items():
            known = str(self.environment.get(name, value)).split(", ")
            self.environment[name] = ", ".join(dict.fromkeys([*known, str(value)]))

    def of(self, what: str, **facts: Any) -> list[dict[str, Any]]:
        """The cases of a kind for which these facts hold."""
        wanted = {"what": what, **facts}
        return [c for c in self.cases.values() if all(c.get(k) == v for k, v in wanted.items())]

    def values(self, what: str, key: str) -> list[Any]:
        """All that a fact is, in the order of the file."""
        return list(dict.fromkeys(c[key] for c in self.of(what)))


def read(files: Sequence[Path]) -> list[Machine]:
    """The machines of the files.

    Raises:
        ValueError: a file is neither of the two kinds.
    """
    machines: dict[Path, Machine] = {}
    for file in files:
        content = json.loads(file.read_text())
        machine = machines.setdefault(file.parent, Machine(file.resolve().parent.name))
        if "benchmarks" in content and "environment" in content.get("machine_info", {}):
            machine.add(content["machine_info"]["environment"])
            machine.cases |= {b["fullname"]: _case(b) for b in content["benchmarks"]}
        elif "rows" in content and "list" in content:
            machine.add(content["environment"])
            machine.in_turn.append(content)
        else:
            raise ValueError(f"{file} is neither of pytest-benchmark nor of bench.side_by_side")
    return list(machines.values())


def _case(benchmark: dict[str, Any]) -> dict[str, Any]:
    """Figures in milliseconds, each as lower quartile, median, upper quartile."""
    stats = benchmark["stats"]
    case = {**benchmark["extra_info"], "rounds": stats["rounds"]}
    case["warm_ms"] = [1e3 * stats[key] for key in ("q1", "median", "q3")]
    if "floor_bytes" in case:
        case["floor_ms"] = 1e-6 * case["floor_bytes"] / case["GB_per_s"][1]
    return case


# -- the page --------------------------------------------------------------------------------------


def page(machines: Sequence[Machine], files: Sequence[Path], images: Path) -> str:
    """The markdown; its plots are written into the folder."""
    parts = [PREFACE.format(files=" ".join(_shown(file) for file in files))]
    for machine in machines:
        parts += [f"## {machine.name}", environment_line(machine)]
        parts += _in_turn(machine, images)
        parts += _steps(machine, images)
        parts += _ops(machine, images)
        parts += _growth(machine, images)
        parts += _training(machine)
    return "\n\n".join(parts) + "\n"


def environment_line(machine: Machine) -> str:
    return "; ".join(f"{name}: {value}" for name, value in machine.environment.items())


def _in_turn(machine: Machine, images: Path) -> list[str]:
    parts = []
    for result in machine.in_turn:
        parts += [
            f"### One SAM step, all in turn: {result['list']}",
            f"{size_of(result)} parameters, fp32; medians of {result['rounds']} rounds. "
            f"`{result['command']}`",
            markdown(in_turn_table(result), NUMBERS),
            *_to_the_floor(result),
        ]
        plot = f"{machine.name}-{slug(result['list'])}.png"
        plots.in_turn(result, images / plot)
        parts.append(f"![Milliseconds of one SAM step on {result['list']}](images/{plot})")
    if goals := goals_table(machine):
        parts += ["### Goals of the project on two CPU cores", markdown(goals, NUMBERS)]
    return parts


def in_turn_table(result: dict[str, Any]) -> Rows:
    rows = [["", "ms", "times native", "passes"]]
    for row in result["rows"]:
        low, high = row["quartiles_ms"]
        rows.append(
            [
                row["name"],
                f"{row['median_ms']:.3g} ({low:.3g} to {high:.3g})",
                f"{row['times_native']:.2f}",
                f"{row['passes']:.1f}",
            ]
        )
    return rows


def _to_the_floor(result: dict[str, Any]) -> list[str]:
    """How far native is from what memory allows, in a sentence; nothing where that was not
    measured."""
    by_name = {row["name"]: row for row in result["rows"]}
    if memory_floor.NAME not in by_name or "tiny" in result["list"]:
        return []
    ratio = 1 / by_name[memory_floor.NAME]["times_native"]
    return [f"Native takes {ratio:.2f} times as long as the three bare loops."]


def goals_table(machine: Machine) -> Rows:
    """What the project set itself for two CPU cores, and what was found."""
    rows = [["goal", "found", ""]]
    for result in machine.in_turn:
        by_name = {row["name"]: row for row in result["rows"]}
        native, of = by_name["native"], result["list"]
        if of == "ResNet-18":
            found = native["passes"]
            rows.append([f"SAM step, {of}: at most 10 passes", f"{found:.1f}", _met(found <= 10)])
        elif "tiny" in of:
            ratio = by_name["reference"]["times_native"]
            what = f"SAM step, {of}: no slower than the reference"
            rows.append([what, f"{ratio:.2f} times faster", _met(ratio >= 1)])
    return rows if len(rows) > 1 else []


def _met(holds: bool) -> str:
    return "reached" if holds else "not reached"


def _steps(machine: Machine, images: Path) -> list[str]:
    if not machine.of("step"):
        return []
    parts = ["### Optimizer steps", "`pytest bench/test_steps.py`"]
    for of in machine.values("step", "list"):
        for dtype in machine.values("step", "dtype"):
            cases = machine.of("step", variant="SAM", list=of, dtype=dtype)
            if cases:
                size = size_of(cases[0])
                parts += [
                    f"**SAM, {of} ({size} parameters), {dtype}**",
                    markdown(step_table(cases), NUMBERS),
                ]
    plot = f"{machine.name}-steps.png"
    plots.steps(machine.of("step", variant="SAM"), images / plot)
    parts.append(f"![SAM steps in units of the floor]({'images/' + plot})")
    variants = [v for v in machine.values("step", "variant") if v != "SAM"]
    if variants:
        parts += [
            "### The rest of the family",
            "ResNet-18, fp32, cold, in milliseconds; in brackets the times of native.",
            markdown(variant_table(machine, variants), NUMBERS),
        ]
    return parts


def step_table(cases: Sequence[dict[str, Any]]) -> Rows:
    """A row per candidate."""
    on_gpu = "device_ms" in cases[0]
    native = next((c for c in cases if c["candidate"] == "native"), cases[0])
    header = ["", "warm ms", "cold ms", "times native (cold)", "times floor (cold)", "memory"]
    if on_gpu:
        header += ["device ms, warm", "host ms"]
    rows = [header]
    for case in cases:
        row = [
            case["candidate"],
            spread(case["warm_ms"]),
            spread(case["cold_ms"]),
            f"{case['cold_ms'][1] / native['cold_ms'][1]:.2f}",
            times_floor(case),
            f"{case['peak_bytes'] / (case['elements'] * SIZES[case['dtype']]):.2f}",
        ]
        if on_gpu:
            row += [spread(case["device_ms"]), spread(case["host_ms"])]
        rows.append(row)
    return rows


def variant_table(machine: Machine, variants: Sequence[str]) -> Rows:
    """A row per optimizer, a column per candidate."""
    by_name = {(c["variant"], c["candidate"]): c for c in machine.of("step", list="ResNet-18")}
    names = [
        n for n in machine.values("step", "candidate") if any((v, n) in by_name for v in variants)
    ]
    rows = [["", *names, "native: times floor"]]
    for variant in variants:
        native = by_name.get((variant, "native"))
        row = [variant]
        for name in names:
            case = by_name.get((variant, name))
            if case is None:
                row.append("")
                continue
            text = f"{case['cold_ms'][1]:.3g}"
            if native is not None and case is not native:
                text += f" ({case['cold_ms'][1] / native['cold_ms'][1]:.1f})"
            row.append(text)
        rows.append([*row, times_floor(native) if native else ""])
    return rows


def _ops(machine: Machine, images: Path) -> list[str]:
    if not machine.of("op"):
        return []
    names = "norms and compare are `ops.dots` of one and of three lists, recombine is `ops.mix_`"
    parts = ["### Ops", f"`pytest bench/test_ops.py`; cold; {names}."]
    for of in machine.values("op", "list"):
        for dtype in machine.values("op", "dtype"):
            cases = machine.of("op", list=of, dtype=dtype)
            parts += [
                f"**{of}, {dtype}, ms (share of the copy's speed)**",
                markdown(op_table(cases), NUMBERS),
            ]
    plot = f"{machine.name}-roofline.png"
    plots.roofline(machine.of("op", list="ResNet-18"), images / plot)
    parts.append(f"![Roofline of the ops]({'images/' + plot})")
    return parts


def op_table(cases: Sequence[dict[str, Any]]) -> Rows:
    """A row per op, a column per backend."""
    names = list(dict.fromkeys(c["candidate"] for c in cases))
    by_name = {(c["op"], c["candidate"]): c for c in cases}
    rows = [["", *names]]
    for op in dict.fromkeys(c["op"] for c in cases):
        row = [op]
        for name in names:
            case = by_name.get((op, name))
            text = ""
            if case is not None:
                ms = case["cold_ms"][1]
                text = f"{ms:.3g} ({case['floor_ms'] / ms:.0%})"
            row.append(text)
        rows.append(row)
    return rows


def _growth(machine: Machine, images: Path) -> list[str]:
    parts = []
    titles = {
        "elements": "Time against the number of parameters, in 64 tensors",
        "tensors": "Time against the number of tensors, 4 M parameters together",
    }
    for what, title in titles.items():
        if cases := machine.of(f"growth with {what}"):
            plot = f"{machine.name}-{what}.png"
            plots.growth(cases, what, images / plot)
            parts += [f"### {title}", "`pytest bench/test_growth.py`", f"![{title}](images/{plot})"]
    if cases := machine.of("growth with threads"):
        rows = [["threads", "warm ms", "cold ms", "faster than one thread (cold)"]]
        one = cases[0]["cold_ms"][1]
        for case in cases:
            ratio = f"{one / case['cold_ms'][1]:.2f}"
            threads = str(case["threads"])
            rows.append([threads, spread(case["warm_ms"]), spread(case["cold_ms"]), ratio])
        parts += [
            "### Threads",
            "SAM step on ResNet-18, native; the number is that of `torch.set_num_threads`.",
            markdown(rows, NUMBERS),
        ]
    return parts


def _training(machine: Machine) -> list[str]:
    cases = machine.of("training step")
    if not cases:
        return []
    rows = [["", "ms per training step", "optimizer's ms", "share"]]
    for case in cases:
        ms, alone = case["warm_ms"][1], case["optimizer_ms"]
        rows.append(
            [case["candidate"], spread(case["warm_ms"]), f"{alone:.3g}", f"{alone / ms:.1%}"]
        )
    return [
        "### Whole training steps",
        f"ResNet-18 on {cases[0]['batch']} images of 32 x 32, {cases[0].get('precision', 'fp32')}: "
        "forward and backward passes, "
        "and the optimizer. `pytest bench/test_training.py`",
        markdown(rows, NUMBERS),
    ]


# -- README ----------------------------------------------------------------------------------------


def readme_part(machine: Machine, file: Path, chart: Path) -> str:
    """The chart of README, and a sentence on it: the SAM step on ResNet-18, all in turn.

    Args:
        file: of the result; chart: both relative to README.md.
    """
    result = next(r for r in machine.in_turn if r["list"] == "ResNet-18")
    environment = result["environment"]
    by_name = {row["name"]: row for row in result["rows"]}
    peers = [row for name, row in by_name.items() if name.startswith(PEER)]
    fastest = min(peers, key=lambda row: row["median_ms"])
    return "\n\n".join(
        [
            MARKERS[0],
            f"![One SAM step on ResNet-18, in milliseconds]({chart.as_posix()})",
            f"The optimizer takes {by_name['native']['median_ms']:.3g} ms in a SAM step with SGD "
            f"on ResNet-18: **{fastest['times_native']:.2f} times as fast as the fastest other "
            f"implementation** tried. The machine is a CPU: {environment['threads']} threads of an "
            f"{environment['processor']}, torch {environment['torch']}, commit "
            f"{environment['commit'][:12]}. The gradients ({size_of(result)}, fp32) are given. "
            f"Times are medians of {result['rounds']} rounds, all in turn, from "
            f"{file.as_posix()}. `{result['command']}` measures them again.",
            MARKERS[1],
        ]
    )


def with_part(readme: str, part: str) -> str:
    """README with what stands between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    start, end = (readme.find(marker) for marker in MARKERS)
    if not 0 <= start < end:
        raise ValueError(f"README has no part between {MARKERS[0]!r} and {MARKERS[1]!r}")
    return readme[:start] + part + readme[end + len(MARKERS[1]) :]


# -- text ------------------------------------------------------------------------------------------

SIZES = {"float32": 4, "bfloat16": 2}


def count(number: int) -> str:
    """11220132 as 11.2 M."""
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}".replace(",", " ")


def size_of(result: dict[str, Any]) -> str:
    """62 tensors, 11.2 M"""
    return f"{result['tensors']} tensors, {count(result['elements'])}"


def number(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def spread(values: Sequence[float]) -> str:
    low, median, high = map(number, values)
    return f"{median} ({low} to {high})"


def times_floor(case: dict[str, Any]) -> str:
    return f"{case['cold_ms'][1] / case['floor_ms']:.2f}"


def slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _shown(file: Path) -> str:
    """Relative to where the command runs, if that is possible."""
    try:
        return file.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return file.name


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, and write the page, its plots and README's part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--readme", type=Path, help="README.md, whose part is to be replaced")
    chosen = parser.parse_args(arguments)
    try:
        machines = read(chosen.files)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    images = chosen.output.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(page(machines, chosen.files, images))
    print(f"written: {chosen.output}, {images}")
    if chosen.readme:
        for file in chosen.files:
            (machine,) = read([file])
            if any(r["list"] == "ResNet-18" for r in machine.in_turn):
                chart = images / f"{machine.name}-{slug('ResNet-18')}.png"
                root = chosen.readme.resolve().parent
                part = readme_part(machine, _below(root, file), _below(root, chart))
                chosen.readme.write_text(with_part(chosen.readme.read_text(), part))
                print(f"written: {chosen.readme}")
                break
        else:
            parser.error("--readme needs a file of bench.side_by_side for ResNet-18")


def _below(root: Path, path: Path) -> Path:
    return path.resolve().relative_to(root)


if __name__ == "__main__":
    main()
