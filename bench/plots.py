"""Draw the plots of bench.report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import memory_floor
from bench.names import PEER

# Colours that stay apart for those who do not see red and green (Okabe and Ito).
OURS_COLOUR, OTHERS_COLOUR, FLOOR_COLOUR = "#0072B2", "#B0B0B0", "#D55E00"
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000"]
MARKERS = "osD^vPX*"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    # Without the version of matplotlib, the same figures give the same file.
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def in_turn(result: dict[str, Any], path: Path) -> None:
    """Bars of one SAM step."""
    rows = result["rows"][::-1]

    def label(name: str) -> str:
        """The name for readers who know nothing of backends and peers."""
        if name == memory_floor.NAME:
            return "what memory allows: three bare loops"
        return name.removeprefix(PEER) if name.startswith(PEER) else f"samkernels, {name}"

    figure, axes = _figure(8, 0.45 * len(rows) + 1)
    colours = {"native": OURS_COLOUR, memory_floor.NAME: FLOOR_COLOUR}
    times = [row["median_ms"] for row in rows]
    bars = axes.barh(
        [label(row["name"]) for row in rows],
        times,
        color=[colours.get(row["name"], OTHERS_COLOUR) for row in rows],
        height=0.7,
    )
    axes.bar_label(bars, [f" {ms:.3g} ms" for ms in times])
    axes.set_xlim(0, 1.15 * max(times))
    axes.set_xlabel("milliseconds (median)")
    axes.set_title(f"One SAM step, {result['list']}, fp32", loc="left")
    axes.tick_params(axis="y", length=0)
    _save(figure, path)


def steps(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars per list and dtype: cold time in units of the floor."""
    groups = list(dict.fromkeys((c["list"], c["dtype"]) for c in cases))
    groups = [group for group in groups if "tiny" not in group[0]]  # no floor of memory there
    names = list(dict.fromkeys(c["candidate"] for c in cases))
    figure, axes = _figure(8, 4.8)
    width = 0.8 / len(names)
    highest = 0.0
    for i, name in enumerate(names):
        of_name = {(c["list"], c["dtype"]): c for c in cases if c["candidate"] == name}
        at = [j for j, group in enumerate(groups) if group in of_name]
        heights = [of_name[groups[j]]["cold_ms"][1] / of_name[groups[j]]["floor_ms"] for j in at]
        highest = max([highest, *heights])
        where = [j + (i - (len(names) - 1) / 2) * width for j in at]
        axes.bar(where, heights, width, label=name, color=COLOURS[i % len(COLOURS)])
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(groups)), [f"{of}\n{dtype}" for of, dtype in groups])
    axes.set_yscale("log")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.set_ylim(0.4, max(3.0, 1.3 * highest))
    axes.set_ylabel("times the floor (cold)")
    axes.set_title("One SAM step; the floor is its bytes at the speed of a copy", loc="left")
    axes.legend(frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.15))
    _save(figure, path)


def roofline(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Operations per second against operations per byte that a fused op moves, cold."""
    figure, axes = _figure(8, 5)
    backends = list(dict.fromkeys(c["candidate"] for c in cases))
    dtypes = list(dict.fromkeys(c["dtype"] for c in cases))
    cases = [c for c in cases if c["flops"]]  # restore computes nothing
    labelled = set()
    for case in cases:
        colour = COLOURS[backends.index(case["candidate"])]
        x = case["flops"] / case["floor_bytes"]
        y = 1e-6 * case["flops"] / case["cold_ms"][1]
        label = f"{case['candidate']}, {case['dtype']}"
        filled = colour if case["dtype"] == dtypes[0] else "none"
        axes.scatter(
            x, y, marker="o", edgecolors=colour, facecolors=filled,
            label=None if label in labelled else label,
        )  # fmt: skip
        labelled.add(label)
        if case["candidate"] == backends[0] and case["dtype"] == dtypes[0]:
            below = case["op"].startswith("norms")
            axes.annotate(
                case["op"], (x, y), xytext=(0, -13 if below else 7), textcoords="offset points",
                fontsize=9, ha="center",
            )  # fmt: skip
    speed = sorted(c["GB_per_s"][1] for c in cases)[len(cases) // 2]
    ends = [c["flops"] / c["floor_bytes"] for c in cases]
    xs = [0.7 * min(ends), 1.4 * max(ends)]
    axes.plot(xs, [speed * x for x in xs], color="black", linewidth=1)
    axes.annotate(
        f"copy: {speed:.3g} GB/s", (xs[1], speed * xs[1]), ha="right", va="bottom", fontsize=9
    )
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("operations per byte that the op has to move")
    axes.set_ylabel("10^9 operations per second")
    axes.set_title("Ops on ResNet-18, cold, and the roof of memory", loc="left")
    axes.legend(frameon=False, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.12))
    _save(figure, path)


def growth(cases: Sequence[dict[str, Any]], what: str, path: Path) -> None:
    """Warm time against elements or tensors, with the floor."""
    figure, axes = _figure(8, 4.5)
    names = list(dict.fromkeys(c["candidate"] for c in cases))
    for i, name in enumerate(names):
        of_name = sorted((c for c in cases if c["candidate"] == name), key=lambda c: c[what])
        xs = [c[what] for c in of_name]
        ys = [c["warm_ms"][1] for c in of_name]
        axes.plot(xs, ys, marker=MARKERS[i], color=COLOURS[i], label=name, markersize=5)
        if i == 0:
            floor = [c["floor_ms"] for c in of_name]
            axes.plot(xs, floor, color="black", linestyle="--", linewidth=1, label="floor")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("parameters in 64 tensors" if what == "elements" else "tensors")
    axes.set_ylabel("milliseconds per SAM step (warm)")
    axes.set_title(f"How a SAM step grows with the number of {what}", loc="left")
    axes.legend(frameon=False)
    axes.grid(alpha=0.2)
    _save(figure, path)
