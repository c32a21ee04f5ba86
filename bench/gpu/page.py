"""The page of tables, and one JSON file, of whatever evidence there is so far."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import goals, ncu
from bench.gpu.facts import REHEARSAL
from bench.gpu.goals import Row
from bench.gpu.runner import NOT_NEEDED, OK, Outcome, rows_of
from bench.tables import markdown_of_mappings

# How a test runner or a sanitizer sums up; the last such line counts.
SUMMARY = re.compile(
    r"^(?:=+ )?(?:ERROR SUMMARY: .*|RACECHECK SUMMARY: .*|\d[\d,]* .*(?:passed|failed|collected|"
    r"deselected|errors?)\b.*|.*\btests? collected\b.*|\d+ calls)$",
    re.MULTILINE,
)


def collect(
    plan: str, evidence: Path, outcomes: Sequence[Outcome], seconds: float
) -> dict[str, Any]:
    """Everything, as JSON: what FOLDER/report.json holds."""
    machine, core = (_json(evidence / f"{name}.json") for name in ("machine", "core"))
    speed, training = (_json(evidence / f"{name}.json") for name in ("speed", "training"))
    measured = goals.Measured(speed, training)
    verdicts = goals.goals(measured)
    if plan == "cifar":
        verdicts = [row for row in verdicts if row[""] != goals.NOT_MEASURED]
    if core.get("device") == REHEARSAL:
        verdicts = [{**row, "": "a rehearsal"} for row in verdicts]
    of_steps = {path.stem: read_outcomes(path) for path in sorted(evidence.glob("tests_*.jsonl"))}
    tests = [test for of_step in of_steps.values() for test in of_step]
    return {
        "plan": plan,
        "seconds": round(seconds, 1),
        "environment": {**machine, **core},
        "steps": [
            {**row, "summary": _summary(evidence / f"{row['step']}.log")}
            for row in rows_of(outcomes)
        ],
        "goals": verdicts,
        "predictions": goals.predictions(measured, str(core.get("device"))),
        "tests": [{"step": step, **row} for step, of in of_steps.items() for row in by_file(of)],
        "failed tests": [test for test in tests if test["outcome"] == "failed"],
        "ncu": {
            path.stem.removeprefix("ncu_"): ncu.rows_of(path.read_text(errors="replace"))
            for path in sorted(evidence.glob("ncu_*.log"))
        },
        "training": _training(training),
        "cifar": [_json(path) for path in sorted(evidence.glob("cifar_*.json"))],
        "speed": speed,
    }


def page(report: Mapping[str, Any]) -> str:
    """One page: environment, steps, what was not in order, goals, predictions."""
    parts = [f"# GPU: {report['plan']}, {report['seconds']:.0f} s"]
    environment = [{"": key, "value": value} for key, value in report["environment"].items()]
    parts += [markdown_of_mappings(environment), "## Steps", markdown_of_mappings(report["steps"])]
    wrong = [f"- {row['step']}: {row['status']}" for row in report["steps"] if row["exit"]]
    wrong += [f"- {test['test']}" for test in report["failed tests"][:20]]
    wrong += [f"- {text}" for text in report["speed"].get("failures", ())]
    parts += ["## Failures", "\n".join(wrong) or "None."]
    if notes := report["speed"].get("notes"):
        parts += ["Peers: " + "; ".join(notes)]
    for title in ("goals", "predictions"):
        parts += [f"## {title.capitalize()}", markdown_of_mappings(report[title])]
    if report["cifar"]:
        parts += ["## CIFAR-100", markdown_of_mappings(_runs(report["cifar"]))]
        parts += sorted({run["said"] for run in report["cifar"] if "said" in run})
    return "\n\n".join(parts) + "\n"


def details(report: Mapping[str, Any]) -> str:
    """All other tables."""
    parts = []
    tables = {
        "Tests by file": report["tests"],
        "Training steps of ResNet-18": report["training"],
        **{f"ncu: {name}": rows for name, rows in report["ncu"].items()},
        **{title: rows for title, rows in report["speed"].items() if title not in ("seconds",)},
    }
    for title, rows in tables.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            parts += [f"## {title}", markdown_of_mappings(rows)]
    return "\n\n".join(parts) + "\n"


def read_outcomes(path: Path) -> list[dict[str, Any]]:
    """What bench.gpu.outcomes wrote; the line may have been cut off."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def by_file(tests: Sequence[Mapping[str, Any]]) -> list[Row]:
    """How many tests of each file there were, by what became of them."""
    counts: dict[str, Row] = {}
    for test in tests:
        name = Path(test["test"].partition("::")[0]).name
        row = counts.setdefault(
            name, {"file": name, "tests": 0, "failed": 0, "skipped": 0, "seconds": 0.0}
        )
        row["tests"] += 1
        row["failed"] += test["outcome"] == "failed"
        row["skipped"] += test["outcome"] == "skipped"
        row["seconds"] += test["seconds"]
    return list(counts.values())


def _json(path: Path) -> dict[str, Any]:
    """Empty if the file is missing or was not written to its end."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _summary(log: Path) -> str:
    try:
        lines = SUMMARY.findall(log.read_text(errors="replace").replace("=========", ""))
    except OSError:
        return ""
    return lines[-1].strip("= ") if lines else ""


def _training(training: Mapping[str, Any]) -> list[Row]:
    rows = []
    for benchmark in training.get("benchmarks", ()):
        info = benchmark["extra_info"]
        rows.append(
            {
                "optimizer": info["candidate"],
                "batch": info["batch"],
                "precision": info["precision"],
                "ms per step": 1e3 * benchmark["stats"]["median"],
                "optimizer's ms": info["optimizer_ms"],
            }
        )
    return rows


def _runs(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows = []
    for run in runs:
        if "figures" not in run:
            continue
        figures, check = run["figures"], run.get("verification") or {}
        rows.append(
            {
                "optimizer": run["name"],
                "epochs": len(run["history"]),
                "test accuracy, %": 100 * figures["test_accuracy"],
                "best validation, %": 100 * figures["best_val_accuracy"],
                "lockstep steps": check.get("steps"),
                "deviation": check.get("value"),
                "ms per training step": figures["ms_per_training_step"],
                "ms per optimizer step": figures["ms_per_optimizer_step"],
            }
        )
    return rows


def all_in_order(outcomes: Sequence[Outcome]) -> bool:
    """Whether no step failed, was stopped, was missing or had no time."""
    needed = [o for o in outcomes if o.status != NOT_NEEDED and o.step not in _replaced(outcomes)]
    return all(outcome.status == OK for outcome in needed)


def _replaced(outcomes: Sequence[Outcome]) -> set[str]:
    """The carried core may be of no use, if one could be built."""
    built = any(o.step == "built" and o.status == OK for o in outcomes)
    return {"core"} if built else set()
