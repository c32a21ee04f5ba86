"""Draw the loss around checkpoints: `python -m train.landscape CHECKPOINT...`.

The loss is taken along random directions whose filters are as long as those of the weights: biases
and normalisation stay as they are. So networks may be compared whose weights differ in scale.

Source: Li et al., arXiv:1712.09913.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from train.inputs.data import Dataset, Split
from train.loop.restore import restored
from train.loop.run import evaluate
from train.settings.config import check_keys, parse_flags
from train.shared import results
from train.shared.errors import ConfigError, guarded
from train.shared.progress import WorkProgress, make_console

USAGE = """\
python -m train.landscape CHECKPOINT [CHECKPOINT ...] [--KEY=VALUE ...]

Each CHECKPOINT is a best.pt or last.pt of a run. Writes landscape.json and landscape.png beside the
first, or into --output_dir: the loss along one filter-normalised random direction, and on the plane
of two. Keys, with their values here:
  --points=25                 of the line; 0: leave it out
  --grid=0                    points of each side of the plane, such as 15; 0: leave it out
  --extent=1                  how far the directions are followed, either way
  --sharpness_samples=1024    training images, not augmented
  --data_root, --device, --threads, --seed (of the directions)
"""
OWN = {"points": 25, "grid": 0, "extent": 1.0}
ALLOWED = ("sharpness_samples", "data_root", "device", "threads", "seed", "output_dir")
LEVELS = 15  # the plane is drawn with so many contour levels


def direction(model: nn.Module, seed: int) -> list[Tensor]:
    """Draw for each parameter a random tensor whose filters (first index) have the norms of the
    parameter's filters; for a parameter of fewer than two dimensions, the tensor is 0."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for p in model.parameters():
        # Random numbers are drawn on the CPU, so that every device has the same direction.
        random = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim < 2:
            found.append(torch.zeros_like(p))
            continue
        rows = random.flatten(1)
        length = p.detach().flatten(1).norm(dim=1, keepdim=True)
        found.append((rows * (length / rows.norm(dim=1, keepdim=True))).view_as(p))
    return found


def loss_at(
    model: nn.Module, dataset: Dataset, split: Split, moves: Sequence[tuple[float, list[Tensor]]]
) -> float:
    """Return the loss at w + sum of factor * direction; w is put back bit for bit."""
    before = [p.detach().clone() for p in model.parameters()]
    try:
        with torch.no_grad():
            for factor, tensors in moves:
                for p, d in zip(model.parameters(), tensors, strict=True):
                    p.add_(d, alpha=factor)
        return evaluate(model, model, dataset, split)[0]
    finally:
        with torch.no_grad():
            for p, w in zip(model.parameters(), before, strict=True):
                p.copy_(w)


def plot(curves: Sequence[dict[str, Any]]) -> Figure:
    """Draw the lines of all checkpoints, and a plane for each that has one."""
    planes = [curve for curve in curves if curve["plane"]]
    lines = [curve for curve in curves if curve["line"]]
    panels = len(planes) + bool(lines)
    figure = Figure(figsize=(5 * panels, 4), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False).flat)
    if lines:
        line = axes.pop(0)
        for curve in lines:
            line.plot(curve["line"]["at"], curve["line"]["loss"], label=curve["name"])
        line.set(xlabel="distance, in norms of the filters", ylabel="training loss", yscale="log")
        line.grid(alpha=0.3)
        line.legend(title="checkpoint", fontsize="small")
    for part, curve in zip(axes, planes, strict=True):
        at, plane = curve["plane"]["at"], torch.tensor(curve["plane"]["loss"])
        drawn = part.contourf(at, at, plane.log10(), levels=LEVELS, cmap="viridis")
        figure.colorbar(drawn, ax=part, label="log10 of the training loss")
        part.plot(0, 0, "w+")
        part.set(xlabel="first direction", ylabel="second direction", title=curve["name"])
        part.set_aspect("equal")
    return figure


def main(arguments: Sequence[str]) -> int:
    """Measure, draw, and return the exit code of the process."""
    if not arguments or arguments[0].startswith("-") or "--help" in arguments:
        print(USAGE)
        return 0 if "--help" in arguments else 2
    words: list[str] = []
    flags: dict[str, Any] = dict(parse_flags(arguments, words))
    paths = list(map(Path, words))
    own: dict[str, Any] = {}
    for name, default in OWN.items():
        given = flags.pop(name, default)
        try:
            own[name] = type(default)(given)
        except ValueError:
            raise ConfigError(f"{name}={given} is no number: default {default}") from None
        if own[name] < 0:
            raise ConfigError(f"{name}={given} is below 0: default {default}")
    if not own["points"] and not own["grid"]:
        raise ConfigError("points=0 with grid=0 leave nothing to do: allowed is one of them")
    check_keys(flags, "the command line")
    for name in flags:
        if name not in ALLOWED:
            known = ", ".join((*OWN, *ALLOWED))
            raise ConfigError(f"{name} is settled by the checkpoint: allowed {known}")
    console = make_console()
    found: list[dict[str, Any]] = []
    for path in paths:
        config, dataset, model, epoch = restored(path, {"sharpness_samples": 1024}, flags)
        split = dataset.train[: config.sharpness_samples or None]
        first, second = (direction(model, config.seed + i) for i in range(2))
        line = torch.linspace(-own["extent"], own["extent"], own["points"]).tolist()
        side = torch.linspace(-own["extent"], own["extent"], own["grid"]).tolist()
        losses: list[float] = []
        places = [[(a, first)] for a in line]
        places += [[(a, first), (b, second)] for b in side for a in side]
        with WorkProgress(console, f"{config.run_name}: loss", len(places)) as bar:
            for moves in places:
                losses.append(loss_at(model, dataset, split, moves))
                bar.show(len(losses), f"{losses[-1]:.3f}")
        plane = torch.tensor(losses[len(line) :]).view(len(side), len(side)).tolist()
        found.append(
            {
                "name": path.resolve().parent.name,
                "checkpoint": str(path),
                "epoch": epoch,
                "line": {"at": line, "loss": losses[: len(line)]} if line else None,
                # The index of a row goes along the second direction.
                "plane": {"at": side, "loss": plane} if side else None,
            }
        )
    folder = Path(flags.get("output_dir", paths[0].parent))
    results.write_json(folder / "landscape.json", {"versions": results.versions(), "runs": found})
    results.save_figure(folder / "landscape.png", plot(found))
    console.print(f"written to {folder}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
