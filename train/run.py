"""One training run, from the configuration to the result."""

import dataclasses
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import samkernels
from train import results
from train.config import Config
from train.data import Dataset, Split, load_dataset, plain_batches, train_batches
from train.errors import ConfigError, DivergedError
from train.models import build_model
from train.optimizers import TwoPassOptimizer, backend_names, build_optimizer
from train.progress import RunProgress
from train.sharpness import lambda_max
from train.timing import StepTimer
from train.verify import Lockstep

EVAL_BATCH = 1000
SHARPNESS_BATCH = 256
WARMUP_STEPS = 10  # not timed after the lockstep steps, where a single epoch is all there is
CUDA_CHECK_EVERY = 50  # steps between looks at the loss: each look waits for the device


def pick_device(name: str) -> torch.device:
    """The device of the configuration; auto: CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no CUDA device: allowed here auto, cpu")
    return torch.device(name)


def sgd_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    timer: StepTimer,
) -> tuple[list[Tensor], Tensor]:
    """One pass and an update. Returns its loss, in a list, and the number of right answers."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    with timer.optimizer():
        optimizer.step()
    optimizer.zero_grad()
    return [loss.detach()], (logits.argmax(1) == labels).sum()


def sam_step(
    model: nn.Module,
    optimizer: TwoPassOptimizer,
    images: Tensor,
    labels: Tensor,
    timer: StepTimer,
) -> tuple[list[Tensor], Tensor]:
    """Two passes and an update. Returns the losses at w and w + e(w), and the right answers at w.

    Batch-norm statistics are those of the first pass.
    """
    logits = model(images)
    first = F.cross_entropy(logits, labels)
    first.backward()
    with timer.optimizer():
        optimizer.first_step()
    try:
        with samkernels.frozen_batchnorm_stats(model):
            second = F.cross_entropy(model(images), labels)
            second.backward()
    except BaseException:
        optimizer.restore()
        raise
    with timer.optimizer():
        optimizer.second_step(zero_grad=True)
    return [first.detach(), second.detach()], (logits.argmax(1) == labels).sum()


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, split: Split) -> tuple[float, float]:
    """(mean cross-entropy, accuracy as a share) in eval mode; the mode is put back."""
    training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    right = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for images, labels in plain_batches(dataset, split, EVAL_BATCH):
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        right += (logits.argmax(1) == labels).sum()
    model.train(training)
    return float(loss) / len(split), float(right) / len(split)


class Training:
    """The state of a run between its epochs, and the epoch itself."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        # Plain fp32, as in the report and as the comparison with the reference needs it.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        self.dataset = load_dataset(config, self.device)
        channels, classes = self.dataset.train.images.shape[1], self.dataset.num_classes
        torch.manual_seed(config.seed)
        # Made on the CPU: the same weights on every device.
        self.model = build_model(config.model, channels, classes).to(self.device)
        self.optimizer = build_optimizer(self.model.parameters(), config)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.epochs)
        self.timer = StepTimer(self.device)
        self.lockstep: Lockstep | None = None
        self.verification: dict[str, Any] | None = None
        if config.opt_name != "sgd" and config.verify_steps:
            self.lockstep = Lockstep(
                self.model,
                self.optimizer,
                lambda params: build_optimizer(params, config, backend="reference"),
            )
        if len(self.dataset.train) % config.batch_size == 1:
            raise ConfigError(
                f"batch_size={config.batch_size} leaves a last batch of one image, which batch "
                f"normalisation cannot take: allowed is what does not divide "
                f"{len(self.dataset.train)} with rest 1; nearest {config.batch_size + 1}"
            )
        self.steps_per_epoch = math.ceil(len(self.dataset.train) / config.batch_size)
        self.done = 0
        self.val_accuracy: float | None = None

    def epoch(self, number: int, progress: RunProgress) -> dict[str, float]:
        """Train epoch `number` (from 1) and evaluate it. Returns its entry of the history.

        Raises:
            DivergedError: a loss is not finite; names the epoch, the step and the pass.
            VerificationError: see Lockstep.
        """
        self.model.train()
        losses: list[list[Tensor]] = []
        weighted = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        seen = checked = 0
        check_every = CUDA_CHECK_EVERY if self.device.type == "cuda" else 1
        started = time.perf_counter()
        batches = train_batches(self.dataset, self.config.batch_size, self.config.seed, number)
        for step in range(1, self.steps_per_epoch + 1):
            with self.timer.step(self._counted(number)):
                images, labels = next(batches)
                step_losses, step_right = self._step(images, labels)
            losses.append(step_losses)
            weighted += step_losses[0] * len(labels)
            right += step_right
            seen += len(labels)
            self.done += 1
            if step % check_every == 0 or step == self.steps_per_epoch:
                self._check_losses(losses[checked:], number, checked)
                checked = step
                speed = seen / (time.perf_counter() - started)
                progress.update(
                    self.done,
                    number,
                    float(weighted) / seen,
                    int(right) / seen,
                    self.val_accuracy,
                    speed,
                )
        seconds = time.perf_counter() - started
        self.timer.collect()
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        val_loss, self.val_accuracy = evaluate(self.model, self.dataset, self.dataset.val)
        if not math.isfinite(val_loss):
            raise DivergedError(f"the validation loss is not finite after epoch {number}")
        return {
            "epoch": number,
            "lr": lr,
            "train_loss": float(weighted) / seen,
            "train_accuracy": int(right) / seen,
            "val_loss": val_loss,
            "val_accuracy": self.val_accuracy,
            "seconds": seconds,
        }

    def _step(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        if self.config.opt_name == "sgd":
            return sgd_step(self.model, self.optimizer, images, labels, self.timer)
        if self.lockstep is None:
            return sam_step(self.model, self.optimizer, images, labels, self.timer)
        taken = sam_step(self.model, self.lockstep, images, labels, self.timer)
        self.verification = self.lockstep.summary()
        if self.lockstep.steps == self.config.verify_steps:
            self.lockstep = None  # with the twin's weights and state
        return taken

    def _counted(self, epoch: int) -> bool:
        """Whether the next step's time counts: not while verified, nor while warming up."""
        verified = 0 if self.config.opt_name == "sgd" else self.config.verify_steps
        warm = epoch > 1 or (self.config.epochs == 1 and self.done >= verified + WARMUP_STEPS)
        return warm and self.done >= verified

    def _check_losses(self, losses: list[list[Tensor]], epoch: int, before: int) -> None:
        finite = torch.stack([torch.stack(step) for step in losses]).isfinite()
        if finite.all():
            return
        step, which = (~finite).nonzero()[0].tolist()
        raise DivergedError(
            f"the loss of the {('first', 'second')[which]} pass is not finite in epoch {epoch}, "
            f"step {before + step + 1} of {self.steps_per_epoch} (lr "
            f"{self.optimizer.param_groups[0]['lr']:g}): the run is stopped; a smaller lr or rho "
            "may help"
        )


def run(config: Config, console: Console) -> dict[str, Any]:
    """Train, test the best checkpoint, and write best.pt, result.json, report.md and curves.png.

    Returns:
        what result.json holds.

    Raises:
        DriverError: whatever stops the run, in one sentence.
    """
    started = time.perf_counter()
    training = Training(config)
    dataset, model = training.dataset, training.model
    best, finished = config.folder / "best.pt", config.folder / "result.json"
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        # Of an earlier run into the same folder: it would not belong to the new files.
        finished.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir={config.folder} cannot be written: {error}") from None
    history: list[dict[str, float]] = []
    best_entry: dict[str, float] = {}
    with RunProgress(console, config.run_name, config.epochs, training.steps_per_epoch) as progress:
        for number in range(1, config.epochs + 1):
            entry = training.epoch(number, progress)
            history.append(entry)
            if not best_entry or entry["val_accuracy"] > best_entry["val_accuracy"]:
                best_entry = entry
                results.save_checkpoint(
                    best,
                    {"model": model.state_dict(), "config": dataclasses.asdict(config), **entry},
                )
    model.load_state_dict(torch.load(best, map_location=training.device)["model"])
    test_loss, test_accuracy = evaluate(model, dataset, dataset.test)
    result = {
        "name": config.run_name,
        "config": dataclasses.asdict(config),
        "versions": results.versions(),
        "device": results.describe_device(training.device),
        "backends": backend_names(training.optimizer),
        "parameters": sum(p.numel() for p in model.parameters()),
        "figures": {
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "best_epoch": best_entry["epoch"],
            "best_val_accuracy": best_entry["val_accuracy"],
            "lambda_max": _sharpness(training, console),
            **training.timer.summary(),
            "seconds": time.perf_counter() - started,
        },
        "verification": training.verification,
        "history": history,
    }
    results.write_all(config.folder, f"{config.run_name} on {config.dataset}", [result])
    # Last: where it is, the run is complete.
    results.write_json(finished, result)
    return result


def _sharpness(training: Training, console: Console) -> float | None:
    """lambda_max of the weights as they are, over the first images of the training split."""
    count = training.config.sharpness_samples
    if not count:
        return None
    train = training.dataset.train
    part = Split(train.images[:count], train.labels[:count])
    batches = list(plain_batches(training.dataset, part, SHARPNESS_BATCH))
    with console.status(f"{training.config.run_name}: sharpness"):
        return lambda_max(training.model, batches)
