"""Record curves while a run trains: metrics.jsonl always; TensorBoard or Weights & Biases on
demand.

What is logged is one of three: the losses of a step, the entry of an epoch, and the figures and
pictures of the finished run.
"""

import dataclasses
import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from train.settings.config import Config
from train.shared import results
from train.shared.errors import ConfigError


class Tracker(Protocol):
    """An object that records the curves and figures of a run."""

    def log_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Log the losses of a step; steps and epochs count from 1."""

    def log_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Log an epoch's entry of the history, after the epoch's last step."""

    def finish(
        self, epoch: int, step: int, figures: Mapping[str, float], pictures: Mapping[str, Path]
    ) -> None:
        """Log the figures of the run, and PNG files by name."""

    def close(self) -> None:
        """Write what is not written yet, and close the files."""


class MetricsFile:
    """The file metrics.jsonl: a line for each thing logged, with epoch and step, written at once.

    A resumed run goes on after the step of its checkpoint.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path, self._step = folder / "metrics.jsonl", step
        # The file is opened for the first line: until then the file of an earlier run stays.
        self._file: IO[str] | None = None

    def log_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        self._write(epoch, step, values)

    def log_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        self._write(epoch, step, values)

    def finish(
        self, epoch: int, step: int, figures: Mapping[str, float], pictures: Mapping[str, Path]
    ) -> None:
        self._write(epoch, step, figures)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        if self._file is None:
            kept = "".join(self._known_lines())
            results.write_atomically(self._path, lambda file: file.write(kept.encode()))
            self._file = self._path.open("a", encoding="utf-8")
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"epoch": epoch, "step": step, **finite}) + "\n")
        self._file.flush()

    def _known_lines(self) -> list[str]:
        """Return the lines up to the checkpoint's step: the steps after it are taken again."""
        if not self._step or not self._path.exists():
            return []
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:  # the line was cut off, as the process was killed
                break
            if entry["step"] <= self._step and "best_epoch" not in entry:
                kept.append(line)
        return kept


class TensorBoard:
    """Event files in the run's folder tensorboard/: losses over steps, the rest over epochs."""

    def __init__(self, config: Config, folder: Path, epoch: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._config, self._epoch = config, epoch
        # There are two writers, since purge_step counts in the unit of its own events. What an
        # interrupted run logged after its checkpoint is hidden.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)
        self._steps: Any = None
        self._folder = folder / "tensorboard" / "steps"

    def log_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        if self._steps is None:
            from torch.utils.tensorboard import SummaryWriter

            self._steps = SummaryWriter(str(self._folder), purge_step=step)
        self._scalars(self._steps, step, values)

    def log_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        self._scalars(self._writer, epoch, values)
        for writer in (self._writer, self._steps):
            if writer:
                writer.flush()

    def finish(
        self, epoch: int, step: int, figures: Mapping[str, float], pictures: Mapping[str, Path]
    ) -> None:
        import numpy as np
        from PIL import Image

        # TensorBoard's page HPARAMS needs figures and hyperparameters together, in this folder.
        named = {f"run/{name}": value for name, value in figures.items()}
        self._writer.add_hparams(dataclasses.asdict(self._config), named, run_name=".")
        for name, path in pictures.items():
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(name, pixels, epoch, dataformats="HWC")

    def close(self) -> None:
        for writer in (self._writer, self._steps):
            if writer:
                writer.close()

    def _scalars(self, writer: Any, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)


class WandB:
    """A run of the project `project_name`, in the run's folder wandb/; WANDB_MODE is obeyed."""

    def __init__(self, config: Config, folder: Path, epoch: int, step: int) -> None:
        import wandb

        self._wandb = wandb
        # A resumed run has the same id again, so that its curves go on.
        name = folder / "wandb" / "id"
        name.parent.mkdir(parents=True, exist_ok=True)
        if step == 0 or not name.exists():
            name.write_text(uuid.uuid4().hex[:8])
        self._run = wandb.init(
            project=config.project_name,
            group=config.group or f"{config.dataset}-{config.model}",
            tags=[tag.strip() for tag in config.tags.split(",") if tag.strip()],
            name=config.full_name,
            id=name.read_text(),
            resume="allow",
            dir=str(folder),
            config=dataclasses.asdict(config),
        )
        # There are two axes: wandb's own step may only grow, and a resumed run repeats steps.
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        self._run.define_metric("step")
        self._run.define_metric("steps/*", step_metric="step")

    def log_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"steps/{name}": v for name, v in values.items()}})

    def log_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"epoch": epoch, **values})

    def finish(
        self, epoch: int, step: int, figures: Mapping[str, float], pictures: Mapping[str, Path]
    ) -> None:
        self._run.summary.update(dict(figures))
        shown = {name: self._wandb.Image(str(path)) for name, path in pictures.items()}
        if shown:
            self._run.log({"epoch": epoch, **shown})

    def close(self) -> None:
        self._run.finish()


class Several:
    """Several trackers, each of which records everything."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def log_step(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log_step(epoch, step, values)

    def log_epoch(self, epoch: int, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log_epoch(epoch, step, values)

    def finish(
        self, epoch: int, step: int, figures: Mapping[str, float], pictures: Mapping[str, Path]
    ) -> None:
        for tracker in self._trackers:
            tracker.finish(epoch, step, figures, pictures)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def make_tracker(config: Config, folder: Path, epoch: int, step: int) -> Tracker:
    """Make the tracker of metrics.jsonl and of the configuration; it goes on after epoch and step.

    Raises:
        ConfigError: the tracker's package is not installed, or wandb does not start.
    """
    file = MetricsFile(folder, step)
    if config.framework_name == "none":
        return file
    try:
        return Several([file, TRACKERS[config.framework_name](config, folder, epoch, step)])
    except ImportError as error:
        raise ConfigError(
            f"framework_name={config.framework_name} needs its package ({error}): pip install -e "
            '".[tracking]"; allowed here none'
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"framework_name=wandb does not start ({reason}): run `wandb login`, or set "
            "WANDB_MODE=offline and upload later by `wandb sync`; allowed here tensorboard, none"
        ) from None


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a history entry or of figures, without the epoch."""
    numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and k != "epoch"}
    return {k: float(v) for k, v in numbers.items()}
