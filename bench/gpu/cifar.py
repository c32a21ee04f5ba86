"""ResNet-18 on CIFAR-100 with the driver, in as many epochs as there is time for.

    python -m bench.gpu.cifar images FROM TO FOLDER
    python -m bench.gpu.cifar train OPTIMIZER DATA RUNS FOLDER [--rehearse]

FROM holds cifar-100-python, the official files; or sheets: lossless images train-K.* and test-K.*,
in which a row holds the images of a class and a column is 32 pixels wide, and classes.txt. Sheets
are smaller, and a part of them is enough. `images` writes the official layout into TO. `train` runs
one optimizer on it; all of them take as many epochs as FOLDER/epochs.json says, which the first one
writes: of the times of a training step in FOLDER/training.json, and of the time that is left.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.plans import OPTIMIZERS

LAYOUT = "cifar-100-python"
SIDE = 32
RHO = 0.2
BATCH = 256
HELD_OUT = 5000  # of the training images, by train/inputs/data.py
START_SECONDS = 15  # of a run, until its first step and after its last
SHARE_OF_TIME = 0.75  # the rest is for the data, the evaluation, and for what was not foreseen
MOST_EPOCHS = 200


def convert(source: Path, target: Path) -> dict[str, int]:
    """The official layout in `target`; how many images there are of each split.

    Raises:
        FileNotFoundError: the source has neither the official files nor sheets.
    """
    folder = target / LAYOUT
    if (source / LAYOUT).exists():
        shutil.copytree(source / LAYOUT, folder, dirs_exist_ok=True)
        return {"train": 50_000, "test": 10_000}
    folder.mkdir(parents=True, exist_ok=True)
    classes = (source / "classes.txt").read_text().split()
    counts = {}
    for split in ("train", "test"):
        sheets = sorted(p for p in source.glob(f"{split}-*") if p.suffix != ".txt")
        if not sheets:
            raise FileNotFoundError(f"{source} holds neither {LAYOUT} nor a sheet {split}-*")
        images = np.concatenate([read_sheet(path, len(classes)) for path in sheets])
        labels = [i % len(classes) for i in range(len(images))]
        _write(folder / split, {"data": images, "fine_labels": labels})
        counts[split] = len(images)
    _write(folder / "meta", {"fine_label_names": classes})
    return counts


def read_sheet(path: Path, classes: int) -> np.ndarray:
    """uint8 [images, 3 * 32 * 32], as the official files have them: column by column of the sheet,
    and within a column by class."""
    from PIL import Image

    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    columns = sheet.shape[1] // SIDE
    tiles = sheet.reshape(classes, SIDE, columns, SIDE, 3).transpose(2, 0, 4, 1, 3)
    return np.ascontiguousarray(tiles.reshape(columns * classes, -1))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        pickle.dump(dict(content), file)


def said_of(counts: Mapping[str, int]) -> str:
    """What was trained and tested on, in one sentence."""
    return (
        f"Trained on {counts['train'] - HELD_OUT:,} of CIFAR-100's 50,000 training images, with "
        f"{HELD_OUT:,} more for validation, and tested on {counts['test']:,} of its 10,000 test "
        "images."
    )


def epochs_for(seconds: float, images: int, step_ms: Mapping[str, float]) -> int:
    """How many epochs all optimizers can take.

    Args:
        seconds: for all runs.
        step_ms: of a training step of SGD and of SAM.
    """
    steps = math.ceil((images - HELD_OUT) / BATCH)
    others = len(OPTIMIZERS) - 1
    epoch = 1e-3 * steps * (step_ms["SGD"] + others * step_ms["SAM, native"])
    left = SHARE_OF_TIME * (seconds - START_SECONDS * len(OPTIMIZERS))
    return min(max(int(left / epoch), 1), MOST_EPOCHS)


def flags(optimizer: str, data: Path, runs: Path, epochs: int, rehearse: bool) -> list[str]:
    """Of `python -m train`."""
    found = [
        f"--experiment={'default' if optimizer == 'sgd' else 'default_sam'}",
        f"--opt_name={optimizer}",
        f"--data_root={data}",
        f"--output_dir={runs / optimizer}",
        f"--epochs={epochs}",
        "--sharpness_samples=0",
        "--verify=20",
        f"--batch_size={BATCH}",
        "--model=resnet18",
        "--precision=bf16",
        "--channels_last=true",
        "--overwrite",
    ]
    if optimizer != "sgd":
        found.append(f"--rho={RHO}")
    if rehearse:
        found += ["--model=resnet_small", "--train_samples=16", "--batch_size=8", "--verify=2"]
        found += ["--epochs=1", "--precision=fp32"]  # CPUs are slow in bfloat16
    return found


def train(optimizer: str, data: Path, runs: Path, folder: Path, rehearse: bool) -> int:
    """One run of the driver; its exit status. What it found is copied into the folder."""
    from torchvision.datasets import CIFAR100

    from train.__main__ import main as driver

    # The known checksums are those of all images.
    for name in ("train_list", "test_list"):
        setattr(CIFAR100, name, [[file, None] for file, _ in getattr(CIFAR100, name)])
    CIFAR100.meta = {**CIFAR100.meta, "md5": None}
    status = driver(flags(optimizer, data, runs, planned_epochs(folder), rehearse))
    found = json.loads((runs / optimizer / "result.json").read_text())
    found["said"] = said_of(json.loads((folder / "images.json").read_text()))
    order = OPTIMIZERS.index(optimizer)
    (folder / f"cifar_{order}_{optimizer}.json").write_text(json.dumps(found, indent=1) + "\n")
    return status


def planned_epochs(folder: Path) -> int:
    """The same for all optimizers."""
    plan = folder / "epochs.json"
    if not plan.exists():
        images = json.loads((folder / "images.json").read_text())["train"]
        benchmarks = json.loads((folder / "training.json").read_text())["benchmarks"]
        step_ms = {b["extra_info"]["candidate"]: 1e3 * b["stats"]["median"] for b in benchmarks}
        epochs = epochs_for(float(os.environ["SECONDS_LEFT"]), images, step_ms)
        plan.write_text(json.dumps({"epochs": epochs}) + "\n")
    return int(json.loads(plan.read_text())["epochs"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    images = commands.add_parser("images")
    training = commands.add_parser("train")
    training.add_argument("optimizer", choices=OPTIMIZERS)
    for command, names in ((images, ("source", "target")), (training, ("data", "runs"))):
        for name in (*names, "folder"):
            command.add_argument(name, type=Path)
        command.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "images":
        counts = convert(arguments.source, arguments.target)
        (arguments.folder / "images.json").write_text(json.dumps(counts) + "\n")
        print(said_of(counts))
        return 0
    return train(
        arguments.optimizer,
        arguments.data,
        arguments.runs,
        arguments.folder,
        arguments.rehearse,
    )


if __name__ == "__main__":
    raise SystemExit(main())
