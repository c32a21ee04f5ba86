"""What a run leaves behind: result.json, report.md, curves.png."""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import samkernels
from train.errors import CheckpointError
from train.machine import commit, processor

COLUMNS = (
    "optimizer",
    "test accuracy, %",
    "sharpness",
    "lambda_max",
    "deviation",
    "ms per optimizer step",
    "ms per training step",
)

NOTES = """\
- test accuracy: of the checkpoint with the best validation accuracy (the first of equals).
- sharpness: the report's figure: for each of some augmented training batches alone, the five
  eigenvalues of the Hessian that are largest in magnitude; the mean of the positive ones.
- lambda_max: largest eigenvalue of the Hessian of the mean cross-entropy of that checkpoint, over
  unaugmented training images with the labels trained on, eval mode, no weight decay.
- deviation: the largest relative deviation of any parameter from the reference backend, over the
  first steps, which were taken in lockstep with it.
- ms: medians; lockstep steps and the warm-up are left out. The optimizer step is first_step and
  second_step together; the training step has the batch, the passes and the optimizer.
"""


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Give `write` a temporary file in the same folder, then put it in the place of `path`.

    Whoever reads `path` finds the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, which would leave the result readable by its owner only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "samkernels": samkernels.__version__,
        "commit": commit() or "unknown",
    }


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the CPU's and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, threads: {torch.get_num_threads()}"


def row(result: Mapping[str, Any]) -> list[str]:
    """The cells of COLUMNS for one run."""
    figures, check = result["figures"], result["verification"]

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        result["name"],
        f"{100 * figures['test_accuracy']:.2f}",
        cell(figures.get("sharpness"), ".1f"),
        cell(figures["lambda_max"], ".1f"),
        cell(check["value"] if check else None, ".1e"),
        cell(figures["ms_per_optimizer_step"], ".3f"),
        cell(figures["ms_per_training_step"], ".2f"),
    ]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, head first."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_table(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    """COLUMNS and one row per run, on the console."""
    table = Table()
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
    for result in results:
        table.add_row(*row(result))
    console.print(table)


def _finite(value: Any) -> Any:
    """The same with null for nan and inf, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON, atomically."""
    text = json.dumps(_finite(dict(content)), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_result(path: Path) -> dict[str, Any]:
    """A result.json.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _ = content["name"], content["config"]["opt_name"], content["figures"], content["history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is no result of a run ({type(error).__name__}: {error}): it was left as it "
            "is; move it away to run again"
        ) from None
    return content


def save_figure(path: Path, figure: Figure) -> None:
    """As PNG, atomically."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def write_curves(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Training loss and validation accuracy per epoch, one line per run."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for result in results:
        history = result["history"]
        epochs = [entry["epoch"] for entry in history]
        # Markers where a line would not show: a single epoch is a single point.
        style = {"label": result["name"], "marker": "o" if len(epochs) == 1 else ""}
        loss.plot(epochs, [entry["train_loss"] for entry in history], **style)
        accuracy.plot(epochs, [100 * entry["val_accuracy"] for entry in history], **style)
    loss.set(xlabel="epoch", ylabel="training loss (cross-entropy)")
    accuracy.set(xlabel="epoch", ylabel="validation accuracy, %")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend(loc="lower right")
    save_figure(path, figure)


def write_report(
    path: Path, title: str, results: Sequence[Mapping[str, Any]], text: str = ""
) -> None:
    """The table, what its columns mean, the curves, and the conditions of the runs.

    Args:
        text: what the runs were for; stands under the title.
    """
    first = results[0]
    differing = [k for k in first["config"] if len({str(r["config"][k]) for r in results}) > 1]
    common = {k: v for k, v in first["config"].items() if k not in differing}
    backends = [f"{name} ({key})" for r in results for key, name in r["backends"].items()]
    conditions = [
        f"- device: {first['device']}",
        *(f"- {name}: {version}" for name, version in first["versions"].items()),
        f"- optimizer steps by: {', '.join(dict.fromkeys(backends))}",
        f"- parameters of the model: {first['parameters']:,}",
        "- configuration: " + ", ".join(f"{key}={value}" for key, value in common.items()),
    ]
    table = markdown([COLUMNS, *(row(result) for result in results)])
    parts = [f"# {title}", text.strip(), table, NOTES.strip()]
    parts += ["![curves](curves.png)", "## Conditions", "\n".join(conditions)]
    content = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(path, lambda file: file.write(content.encode()))


def write_all(
    folder: Path, title: str, results: Sequence[Mapping[str, Any]], text: str = ""
) -> None:
    """report.md and curves.png of one or several runs."""
    write_curves(folder / "curves.png", results)
    write_report(folder / "report.md", title, results, text)
