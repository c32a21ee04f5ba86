"""Measure the sharpness of a checkpoint: `python -m train.sharpness CHECKPOINT`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from train.inputs.data import Dataset
from train.loop.checkpoint import locked
from train.loop.restore import restored
from train.settings.config import Config, check_keys, parse_flags
from train.shared import results
from train.shared.errors import ConfigError, guarded
from train.shared.progress import make_console
from train.spectrum.curvature import measure

USAGE = """\
python -m train.sharpness CHECKPOINT [--KEY=VALUE ...]

CHECKPOINT is a best.pt or last.pt of a run. Writes sharpness.json and density.png beside it, or
into --output_dir. Keys, with their values here:
  --sharpness_batches=40      augmented batches for the report's sharpness; 0: leave it out
  --sharpness_batch_size=256  images in each of them
  --sharpness_samples=1024    training images for lambda_max, trace and density; 0: leave them out
  --trace_vectors=32          random vectors for the trace; 0: leave it out
  --density_steps=64          Lanczos steps for the spectral density; 0: leave it out
  --data_root, --device, --threads, --seed (of the batches and vectors)
"""
HERE = {
    "sharpness_batches": 40,
    "sharpness_batch_size": 256,
    "sharpness_samples": 1024,
    "trace_vectors": 32,
    "density_steps": 64,
}
ALLOWED = (*HERE, "data_root", "device", "threads", "seed", "output_dir")


def write_density(path: Path, curves: Sequence[tuple[str, dict[str, list[float]]]]) -> None:
    """Draw the spectral densities into a file, one line for each (name, density)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, density in curves:
        axes.semilogy(density["values"], density["density"], label=name, linewidth=1)
    top = max(max(density["density"]) for _, density in curves)
    axes.set(
        xlabel="eigenvalue of the Hessian", ylabel="spectral density", ylim=(top * 1e-9, 2 * top)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    results.save_figure(path, figure)


def main(arguments: Sequence[str]) -> int:
    """Measure a checkpoint, and return the exit code of the process."""
    if not arguments or arguments[0].startswith("-"):
        print(USAGE)
        return 0 if "--help" in arguments or "-h" in arguments else 2
    path = Path(arguments[0])
    flags = parse_flags(arguments[1:])
    check_keys(flags, "the command line")
    for name in flags:
        if name not in ALLOWED:
            raise ConfigError(f"{name} is settled by the checkpoint: allowed {', '.join(ALLOWED)}")
    config, dataset, model, epoch = restored(path, HERE, flags)
    console = make_console()
    with locked(Path(config.output_dir)):  # the folder may be that of a run that is under way
        return _write(path, config, dataset, model, epoch, console)


def _write(
    path: Path, config: Config, dataset: Dataset, model: nn.Module, epoch: int, console: Console
) -> int:
    found = measure(model, dataset, config, console)
    found |= {"checkpoint": str(path), "epoch": epoch, "name": config.run_name}
    found |= {
        "versions": results.versions(),
        "device": results.describe_device(dataset.mean.device),
    }
    folder = Path(config.output_dir)
    results.write_json(folder / "sharpness.json", found)
    if found["density"]:
        write_density(folder / "density.png", [(config.run_name, found["density"])])
    for name in (
        "sharpness", "largest_eigenvalue", "negative_share", "lambda_max", "lambda_min", "trace",
        "trace_error",
    ):  # fmt: skip
        if found[name] is not None:
            console.print(f"{name}: {found[name]:.4g}", highlight=False)
    console.print(f"written to {folder}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
