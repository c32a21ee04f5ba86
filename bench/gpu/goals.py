"""What is to be reached on a GPU, and what was predicted before one was there, as data; and the
verdicts on what was measured.

    python -m bench.gpu.goals docs/kernels.md     writes the tables into the page
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.names import COMPILED, FOREACH
from bench.tables import markdown_of_mappings

Row = dict[str, Any]


class Measured:
    """What bench.gpu.speed and bench/test_training.py wrote."""

    def __init__(self, speed: Mapping[str, Any], training: Mapping[str, Any]) -> None:
        self._speed, self._training = speed, training

    def row(self, title: str, **facts: Any) -> Row:
        """The row of a table of speed.json for which the facts hold; empty if there is none."""
        rows = self._speed.get(title)
        for row in rows if isinstance(rows, list) else ():  # text: the part failed
            if all(row.get(key) == value for key, value in facts.items()):
                return dict(row)
        return {}

    def step(self, of: str, candidate: str, key: str, dtype: str = "float32") -> float | None:
        return self.row(f"step {of} {dtype}", candidate=candidate).get(key)

    def times_native(self, of: str, candidate: str) -> float | None:
        """Device time of a candidate over native's."""
        if candidate == COMPILED:
            return self.row(f"compiled {of}", candidate=COMPILED).get("times native")
        return self.step(of, candidate, "times native")

    def training_ratio(self) -> float | None:
        """A whole SAM training step in steps of SGD."""
        seconds = {
            b["extra_info"].get("candidate"): b["stats"]["median"]
            for b in self._training.get("benchmarks", ())
        }
        if not {"SAM, native", "SGD"} <= seconds.keys():
            return None
        return seconds["SAM, native"] / seconds["SGD"]


class Figure(NamedTuple):
    """A quantity, and how it is read off the results, given a list of parameters."""

    what: str
    read: Callable[[Measured, str], float | None]


SHARE = Figure("share of the floor at copy speed", lambda m, of: m.step(of, "native", "of copy"))
SHARE_BF16 = Figure(
    "share of the floor at copy speed, bfloat16",
    lambda m, of: m.step(of, "native", "of copy", "bfloat16"),
)
NORM_SHARE = Figure(
    "the norm's share of the copy's speed",
    lambda m, of: m.row(f"phases {of} float32", phase="norms", backend="native").get(
        "warm of copy"
    ),
)
OF_FOREACH = Figure(
    "device time of foreach with fused SGD, over native's",
    lambda m, of: m.times_native(of, FOREACH),
)
OF_COMPILED = Figure(
    "device time of torch.compile, over native's", lambda m, of: m.times_native(of, COMPILED)
)
OF_TRITON = Figure(
    "device time of Triton, over native's", lambda m, of: m.times_native(of, "triton")
)
HOST = Figure("host's microseconds for a step", lambda m, of: m.step(of, "native", "host us"))
ODD = Figure(
    "speed with misaligned lists, in that of aligned ones",
    lambda m, of: m.row("misaligned float32", lists="all misaligned").get("of aligned"),
)
ODD_BF16 = Figure(
    "speed with misaligned lists, bfloat16, in that of aligned ones",
    lambda m, of: m.row("misaligned bfloat16", lists="all misaligned").get("of aligned"),
)
TRAINING = Figure("a SAM training step, in steps of SGD", lambda m, of: m.training_ratio())


class Goal(NamedTuple):
    figure: Figure
    of: str
    bound: float
    at_least: bool = True

    @property
    def text(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.bound:g}"


# What bandwidth allows: foreach with fused SGD moves 60 bytes per parameter where native moves 40,
# and torch.compile 40 too. Device time; float32.
GOALS = (
    Goal(SHARE, "WRN-28-10", 0.95),
    Goal(SHARE, "ViT-L", 0.95),
    Goal(SHARE, "ResNet-18", 0.85),
    *(Goal(OF_FOREACH, of, 1.6) for of in ("WRN-28-10", "ViT-L")),
    *(Goal(OF_COMPILED, of, 1.0) for of in ("WRN-28-10", "ViT-L")),
    *(Goal(OF_TRITON, of, 1.1, at_least=False) for of in ("WRN-28-10", "ViT-L")),
    Goal(HOST, "ResNet-18", 150.0, at_least=False),
    Goal(TRAINING, "ResNet-18", 2.02, at_least=False),
)


class Prediction(NamedTuple):
    """A bracket, and the value in it that was thought most likely.

    Attributes:
        reason: what it rests on.
    """

    figure: Figure
    of: str
    value: float
    low: float
    high: float
    reason: str = ""

    @property
    def text(self) -> str:
        return f"{self.value:g} ({self.low:g} to {self.high:g})"


# The same on every GPU of the kind; what a copy reaches differs.
_OF_PEERS = (
    Prediction(OF_FOREACH, "WRN-28-10", 1.7, 1.65, 1.8, "60 bytes per parameter against 40"),
    Prediction(OF_FOREACH, "ViT-L", 1.7, 1.65, 1.8, "60 bytes per parameter against 40"),
    Prediction(OF_COMPILED, "WRN-28-10", 1.15, 1.05, 1.25, "the same bytes"),
    Prediction(OF_COMPILED, "ViT-L", 1.15, 1.05, 1.25, "the same bytes"),
    Prediction(OF_TRITON, "ViT-L", 1.05, 1.03, 1.08, "the same bytes"),
    Prediction(
        HOST,
        "ResNet-18",
        145,
        100,
        210,
        "132 us on CPU tensors (d87ff520b552), and launches",
    ),
    Prediction(ODD, "ResNet-18", 0.98, 0.9, 1.05, "4 bytes at a time, several in flight"),
    Prediction(ODD_BF16, "ResNet-18", 0.85, 0.7, 1.05, "2 bytes at a time, several in flight"),
    Prediction(TRAINING, "ResNet-18", 2.0, 1.9, 2.05, "two passes, and 1 to 3% for the optimizer"),
)
# By a part of the GPU's name. Shares of a copy at the speed that such a GPU is known to reach.
PREDICTIONS: dict[str, tuple[Prediction, ...]] = {
    "H100": (
        Prediction(SHARE, "ResNet-18", 0.95, 0.85, 1.03, "157 us at 3.0 TB/s"),
        Prediction(SHARE, "WRN-28-10", 0.97, 0.92, 1.0, "503 us at 3.0 TB/s"),
        Prediction(SHARE, "ViT-L", 0.976, 0.92, 0.99, "4156 us at 3.0 TB/s"),
        Prediction(NORM_SHARE, "ResNet-18", 0.6, 0.55, 1.05, "25 us; up to 5 us less by its tail"),
        Prediction(NORM_SHARE, "WRN-28-10", 0.81, 0.76, 1.0, "60 us; up to 7 us less by its tail"),
        Prediction(NORM_SHARE, "ViT-L", 0.94, 0.89, 1.0, "430 us; up to 34 us less by its tail"),
        Prediction(SHARE_BF16, "ResNet-18", 0.8, 0.7, 1.03, "fixed costs weigh twice as much"),
        Prediction(SHARE_BF16, "ViT-L", 0.95, 0.9, 0.99, "half the bytes"),
        *_OF_PEERS,
    ),
    "H200": (
        Prediction(SHARE, "ResNet-18", 0.92, 0.82, 1.0, "113 us at 4.3 TB/s"),
        Prediction(SHARE, "WRN-28-10", 0.96, 0.9, 0.99, "354 us at 4.3 TB/s"),
        Prediction(SHARE, "ViT-L", 0.973, 0.92, 0.985, "2909 us at 4.3 TB/s"),
        *_OF_PEERS,
    ),
}

NOT_MEASURED = "not measured"


def goals(measured: Measured) -> list[Row]:
    rows = []
    for goal in GOALS:
        found = goal.figure.read(measured, goal.of)
        verdict = NOT_MEASURED
        if found is not None:
            reached = found >= goal.bound if goal.at_least else found <= goal.bound
            verdict = "reached" if reached else "not reached"
        rows.append(
            {
                "goal": goal.figure.what,
                "list": goal.of,
                "bound": goal.text,
                "found": found,
                "": verdict,
            }
        )
    return rows


def predictions(measured: Measured, device: str) -> list[Row]:
    """Those for the kind of GPU; none for a kind that nothing was predicted for."""
    kind = next((kind for kind in PREDICTIONS if kind in device), "")
    rows = []
    for of in PREDICTIONS.get(kind, ()):
        found = of.figure.read(measured, of.of)
        verdict = NOT_MEASURED
        if found is not None:
            verdict = "inside" if of.low <= found <= of.high else "outside"
        rows.append(
            {
                "prediction": of.figure.what,
                "list": of.of,
                "bracket": of.text,
                "found": found,
                "": verdict,
                "rests on": of.reason,
            }
        )
    return rows


def with_tables(page: str) -> str:
    """The page, with both tables between their comments.

    Raises:
        ValueError: a comment is missing.
    """
    tables: dict[str, list[Row]] = {
        "goals": [{"goal": g.figure.what, "list": g.of, "": g.text} for g in GOALS],
        "predictions": [
            {
                "GPU": kind,
                "": of.figure.what,
                "list": of.of,
                "bracket": of.text,
                "rests on": of.reason,
            }
            for kind, all_of in PREDICTIONS.items()
            for of in all_of
        ],
    }
    for name, rows in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page has no part between {begin.strip()!r} and {end!r}")
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n{markdown_of_mappings(rows)}\n\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text()))
