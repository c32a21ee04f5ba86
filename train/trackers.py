"""Curves for TensorBoard or Weights & Biases, beside the files that every run writes."""

import dataclasses
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.config import Config
from train.errors import ConfigError


class Tracker(Protocol):
    """Takes what is logged per epoch."""

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """The entry of the history after an epoch."""

    def close(self) -> None:
        """Write what is left."""


class NoTracker:
    """Takes it and does nothing."""

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TensorBoard:
    """Event files in the run's folder tensorboard/."""

    def __init__(self, config: Config, folder: Path, epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run logged after its checkpoint is hidden.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandB:
    """A run of the project samkernels, in the run's folder wandb/; WANDB_MODE is obeyed."""

    def __init__(self, config: Config, folder: Path, epoch: int) -> None:
        import wandb

        # The same id again when the run is resumed, so that its curves go on.
        name = folder / "wandb" / "id"
        name.parent.mkdir(parents=True, exist_ok=True)
        if epoch == 0 or not name.exists():
            name.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project="samkernels",
            name=config.run_name,
            id=name.read_text(),
            resume="allow",
            dir=str(folder),
            config=dataclasses.asdict(config),
        )

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """One step of all values."""
        self._run.log(dict(values), step=epoch)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def make_tracker(config: Config, folder: Path, epoch: int) -> Tracker:
    """The tracker of the configuration, going on after `epoch`.

    Raises:
        ConfigError: its package is not installed.
    """
    if config.framework_name == "none":
        return NoTracker()
    try:
        return TRACKERS[config.framework_name](config, folder, epoch)
    except ImportError as error:
        raise ConfigError(
            f"framework_name={config.framework_name} needs its package ({error}): pip install -e "
            '".[tracking]"; allowed here none'
        ) from None


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a history entry, without the epoch."""
    return {k: float(v) for k, v in entry.items() if k != "epoch" and v is not None}
