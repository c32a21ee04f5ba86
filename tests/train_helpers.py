"""What tests of the driver share."""

import io

from rich.console import Console

from train.loop import run
from train.shared import progress


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def no_progress(training: run.Training) -> progress.RunProgress:
    return progress.RunProgress(quiet(), "x", training.config.epochs, training.steps_per_epoch)
