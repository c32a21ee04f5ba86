"""What the driver of commit 9ba4230, before variants were rules, left in run folders: in
tests/data/9ba4230/ a run that is finished, and the same one stopped after two of its three epochs.
Written there, with FOLDER empty, and committed without curves.png and report.md, by

    PYTHONPATH=. python PATH/TO/tests/earlier_run.py FOLDER

The network is a small one under the name of resnet_small, so that the folders take few bytes.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from train.loop import run
from train.models import resnet
from train.settings.config import Config

KEYS: dict[str, Any] = {
    "dataset": "digits", "model": "resnet_small", "opt_name": "sammagnitude", "rho": 0.1,
    "granularity": "tensor", "epochs": 3, "batch_size": 250, "device": "cpu", "threads": 1,
    "verify_steps": 2, "statistics_every": 2, "sharpness_samples": 0, "backend": "foreach",
}  # fmt: skip
RUNS = ("finished", "stopped")


def tiny(channels: Any, num_classes: int) -> Any:
    """channels: or the shape of the images, as resnet_small took it later."""
    channels = channels if isinstance(channels, int) else channels[0]
    return resnet.ResNet(resnet.BasicBlock, (1, 1), (4, 8), channels, num_classes)


class Stop(BaseException):
    """Stands for the end of the process."""


def main(folder: Path) -> None:
    import train.models

    train.models.MODELS["resnet_small"] = tiny  # as the modules of that commit look it up
    epoch = run.Training.epoch

    def stops(training: run.Training, number: int, *others: Any) -> Any:
        if number == 3:
            raise Stop
        return epoch(training, number, *others)

    for name in RUNS:
        if name == "stopped":
            run.Training.epoch = stops  # type: ignore[method-assign]
        try:
            run.run(Config(**KEYS, output_dir=str(folder / name)), Console(file=io.StringIO()))
        except Stop:
            pass


if __name__ == "__main__":
    main(Path(sys.argv[1]))
