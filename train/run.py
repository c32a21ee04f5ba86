"""One training run, from the configuration to the result."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import samkernels
from train import results
from train.checkpoint import LEFT_ALONE, check_same_run, load_checkpoint, save_checkpoint
from train.config import Config
from train.data import Dataset, Split, load_dataset, plain_batches, train_batches
from train.distributed import (
    ALONE,
    Processes,
    mean_loss,
    parallel,
    process_group,
    synchronise_batchnorm,
)
from train.errors import CheckpointError, ConfigError, DivergedError
from train.graphs import CudaCapture, GraphedStep
from train.models import build_model
from train.optimizers import OnePassOptimizer, TwoPassOptimizer, backend_names, build_optimizer
from train.progress import RunProgress, make_console
from train.sharpness import measure
from train.timing import StepTimer
from train.trackers import make_tracker, scalars
from train.verify import Lockstep

EVAL_BATCH = 1000
WARMUP_STEPS = 10  # not timed after the lockstep steps, where a single epoch is all there is
GRAPH_AFTER = 5  # steps of a run, before one is recorded
CUDA_CHECK_EVERY = 50  # steps between looks at the loss: each look waits for the device
STATISTICS = samkernels.ops.GradientStatistics._fields

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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


def plain_fp32() -> None:
    """No TF32, as in the report and as the comparison with the reference needs it; and the same
    sums at every pass, without which a resumed run would not come out the same."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def build_scheduler(optimizer: Any, config: Config) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate per epoch."""
    if config.scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    factor = config.lr_gamma if config.scheduler == "exponential" else 1.0
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, factor)


def sgd_step(
    forward: Forward,
    optimizer: OnePassOptimizer,
    images: Tensor,
    labels: Tensor,
    timer: StepTimer,
    observe: Callable[[], object] = lambda: None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> tuple[list[Tensor], Tensor]:
    """One pass and an update. Returns its loss, in a list, and the number of right answers.

    Args:
        forward: images and labels to loss and logits.
        observe: called when the gradients are there.
        backward: of the loss.
    """
    loss, logits = forward(images, labels)
    backward(loss)
    observe()
    with timer.optimizer():
        optimizer.step()
    optimizer.zero_grad()
    return [loss.detach()], (logits.argmax(1) == labels).sum()


def sam_step(
    forward: Forward,
    model: nn.Module,
    optimizer: TwoPassOptimizer,
    images: Tensor,
    labels: Tensor,
    timer: StepTimer,
) -> tuple[list[Tensor], Tensor]:
    """Two passes and an update. Returns the losses at w and w + e(w), and the right answers at w.

    Batch-norm statistics are those of the first pass.
    """
    first, logits = forward(images, labels)
    first.backward()
    with timer.optimizer():
        optimizer.first_step()
    try:
        with samkernels.frozen_batchnorm_stats(model):
            second, _ = forward(images, labels)
            second.backward()
    except BaseException:
        optimizer.restore()
        raise
    with timer.optimizer():
        optimizer.second_step(zero_grad=True)
    return [first.detach(), second.detach()], (logits.argmax(1) == labels).sum()


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    processes: Processes = ALONE,
) -> tuple[float, float]:
    """(mean cross-entropy, accuracy as a share) in eval mode; the mode is put back.

    Each process takes every world-th image.
    """
    training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    right = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    every = slice(processes.rank, None, processes.world)
    part = Split(split.images[every], split.labels[every])
    for images, labels in plain_batches(dataset, part, EVAL_BATCH):
        logits = forward(images).float()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
        right += (logits.argmax(1) == labels).sum()
    model.train(training)
    processes.sum_(loss, right)
    return float(loss) / len(split), float(right) / len(split)


class Training:
    """The state of a run between its epochs, and the epoch itself."""

    def __init__(self, config: Config, processes: Processes = ALONE) -> None:
        self.config, self.processes = config, processes
        if config.opt_name == "sgdhess" and processes.world > 1:
            raise ConfigError(
                f"opt_name=sgdhess in {processes.world} processes: batch normalisation over "
                "processes has no second derivatives; allowed one process, without torchrun"
            )
        self.device = pick_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        plain_fp32()
        # The writer first: it may have to download what the others find then.
        if processes.writes:
            self.dataset = load_dataset(config, self.device)
        processes.wait()
        if not processes.writes:
            self.dataset = load_dataset(config, self.device)
        self._check_batches()
        if config.cuda_graph:
            self._check_graph()
        channels, classes = self.dataset.train.images.shape[1], self.dataset.num_classes
        torch.manual_seed(config.seed)
        # Made on the CPU: the same weights on every device.
        self.model = build_model(config.model, channels, classes).to(self.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        network = self.model
        if processes.world > 1:
            self.model = synchronise_batchnorm(self.model, self.device)
            network = parallel(self.model, self.device)
        # `model` has the weights and their names; `network` is what the steps call.
        self.network: Callable[[Tensor], Tensor] = network
        if config.compile:
            self.network = torch.compile(network)
        self.optimizer = build_optimizer(self.model.parameters(), config)
        self.scheduler = build_scheduler(self.optimizer, config)
        self.timer = StepTimer(self.device)
        self.lockstep: Lockstep | None = None
        self.verification: dict[str, Any] | None = None
        if config.opt_name != "sgd" and config.verify_steps:
            self.lockstep = Lockstep(
                self.model,
                self.optimizer,
                lambda params: build_optimizer(params, config, backend="reference"),
            )
        self.graphed: GraphedStep | None = None
        if config.cuda_graph:
            capture = CudaCapture(self.device)
            torch.cuda.set_stream(capture.stream)
            self.graphed = GraphedStep(self._recorded_step, capture)
        self.steps_per_epoch = math.ceil(len(self.dataset.train) / config.batch_size)
        self.done = self.resumed = 0
        self.history: list[dict[str, float]] = []

    @property
    def best(self) -> dict[str, float]:
        """The epoch with the highest validation accuracy: the first of equals."""
        return max(self.history, key=lambda entry: entry["val_accuracy"])

    def state(self) -> dict[str, Any]:
        """All that a bit-exact continuation needs. The order of the data follows from the seed."""
        generators = [torch.get_rng_state()]
        if self.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.device))
        return {
            "config": dataclasses.asdict(self.config),
            "epoch": len(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": generators,
            "history": self.history,
            "done": self.done,
            "verification": self.verification,
            "lockstep": self.lockstep.state() if self.lockstep else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state() returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["generators"][0].cpu())
        if self.device.type == "cuda" and len(state["generators"]) > 1:
            torch.cuda.set_rng_state(state["generators"][1].cpu(), self.device)
        self.history, self.done = state["history"], state["done"]
        self.resumed = len(self.history)
        self.verification = state["verification"]
        if self.lockstep and state["lockstep"]:
            self.lockstep.load(state["lockstep"])
        else:
            self.lockstep = None

    def epoch(self, number: int, progress: RunProgress) -> dict[str, float]:
        """Train epoch `number` (from 1) and evaluate it. Returns its entry of the history.

        Raises:
            DivergedError: a loss is not finite; names the epoch, the step and the pass.
            VerificationError: see Lockstep.
        """
        config = self.config
        self.model.train()
        losses: list[Tensor] = []
        observed: list[Tensor] = []
        weighted = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        seen = checked = 0
        if self.graphed:
            self.graphed.forget()  # lr is another one now
        val_accuracy = self.history[-1]["val_accuracy"] if self.history else None
        check_every = CUDA_CHECK_EVERY if self.device.type == "cuda" else 1
        started = time.perf_counter()
        batches = train_batches(
            self.dataset,
            config.batch_size,
            config.seed,
            number,
            self.processes.rank,
            self.processes.world,
        )
        for step in range(1, self.steps_per_epoch + 1):
            observing = config.statistics_every > 0 and self.done % config.statistics_every == 0
            count = min(config.batch_size, len(self.dataset.train) - seen)
            with self.timer.step(self._counted(number) and not observing):
                images, labels = next(batches)
                taken, step_right = self._step(images, labels, count, observing, observed)
            losses.append(torch.stack(taken))
            weighted += losses[-1][0] * count
            right += step_right
            seen += count
            self.done += 1
            if step % check_every == 0 or step == self.steps_per_epoch:
                self._check_losses(losses[checked:], number, checked)
                checked = step
                speed = seen / (time.perf_counter() - started)
                shown = [weighted / self.processes.world, right.double()]
                self.processes.sum_(*shown)
                loss, accuracy = (float(value) / seen for value in shown)
                progress.update(self.done, number, loss, accuracy, val_accuracy, speed)
        seconds = time.perf_counter() - started
        self.timer.collect()
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        val_loss, val_accuracy = self.evaluate(self.dataset.val)
        if not math.isfinite(val_loss):
            raise DivergedError(
                f"the validation loss is not finite after epoch {number}: the run is stopped; a "
                "smaller lr or rho may help"
            )
        entry = {
            "epoch": number,
            "lr": lr,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": seconds,
        }
        if observed:
            means = torch.stack(observed).double().mean(0).tolist()
            # One pass has no second gradient to compare with.
            entry |= {k: v for k, v in zip(STATISTICS, means, strict=True) if not math.isnan(v)}
        self.history.append(entry)
        return entry

    def evaluate(self, split: Split) -> tuple[float, float]:
        """(mean cross-entropy, accuracy) of the weights as they are."""

        def forward(images: Tensor) -> Tensor:
            with self._autocast():
                return self.model(self._laid_out(images))

        return evaluate(forward, self.model, self.dataset, split, self.processes)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _laid_out(self, images: Tensor) -> Tensor:
        if not self.config.channels_last:
            return images
        return images.contiguous(memory_format=torch.channels_last)

    def _step(
        self, images: Tensor, labels: Tensor, count: int, observing: bool, observed: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        images = self._laid_out(images)
        # The first steps make what a recording may not: buffers, and the libraries' workspaces.
        whole = count == self.config.batch_size and self.done >= GRAPH_AFTER
        if self.graphed and whole and not observing and self.lockstep is None:
            return self.graphed(images, labels)
        return self._eager_step(images, labels, count, observing, observed, self.timer)

    def _recorded_step(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        # No event of a recording can be read: another timer, whose times nobody looks at.
        timer = StepTimer(torch.device("cpu"))
        return self._eager_step(images, labels, len(labels), False, [], timer)

    def _eager_step(
        self,
        images: Tensor,
        labels: Tensor,
        count: int,
        observing: bool,
        observed: list[Tensor],
        timer: StepTimer,
    ) -> tuple[list[Tensor], Tensor]:
        def forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with self._autocast():
                logits = self.network(images).float()
            return mean_loss(logits, labels, count, self.processes.world), logits

        def observe() -> None:
            if observing:
                observed.append(self._single_statistics())

        optimizer: Any = self.lockstep or self.optimizer
        batch = (images, labels, timer)
        if self.config.opt_name == "sgd":
            taken = sgd_step(forward, optimizer, *batch, observe)
        elif self.config.opt_name == "sgdhess":
            taken = sgd_step(forward, optimizer, *batch, observe, optimizer.backward)
        else:
            self.optimizer.track_statistics = observing
            taken = sam_step(forward, self.model, optimizer, *batch)
            if observing:
                observed.append(torch.stack(list(self.optimizer.statistics)))
        if self.lockstep is not None:
            self.verification = self.lockstep.summary()
            if self.lockstep.steps == self.config.verify_steps:
                self.lockstep = None  # with the twin's weights and state
        return taken

    def _single_statistics(self) -> Tensor:
        """STATISTICS where there is one gradient only: nan for the rest."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        missing = torch.full((), math.nan, device=self.device)
        known = {
            "first_grad_norm": samkernels.ops.norms(grads).total,
            "weight_norm": samkernels.ops.norms([p.detach() for p in params]).total,
        }
        return torch.stack([known.get(name, missing) for name in STATISTICS])

    def _counted(self, epoch: int) -> bool:
        """Whether the next step's time counts: not while verified, nor while warming up."""
        verified = 0 if self.config.opt_name == "sgd" else self.config.verify_steps
        warm = epoch > 1 or (self.config.epochs == 1 and self.done >= verified + WARMUP_STEPS)
        return warm and self.done >= verified

    def _check_graph(self) -> None:
        config = self.config
        why = None
        if self.device.type != "cuda":
            why = f"device={self.device.type}"
        elif self.processes.world > 1:
            why = f"{self.processes.world} processes"
        elif config.opt_name == "sgdhess":
            why = "opt_name=sgdhess, whose random vectors come from the host"
        if why:
            raise ConfigError(
                f"cuda_graph=true does not go with {why}: it records the step of one process on a "
                "GPU; allowed here is false"
            )

    def _check_batches(self) -> None:
        size, world = self.config.batch_size, self.processes.world
        count = len(self.dataset.train)
        rest = count % size or min(size, count)
        # Batch normalisation needs two images, and every process at least one.
        if rest < max(2, world):
            least = "one image" if rest == 1 else f"{rest} images"
            raise ConfigError(
                f"batch_size={size} leaves a last batch of {least}, which batch normalisation and "
                f"{world} process(es) cannot take: allowed is what divides {count} with rest 0 or "
                f"at least {max(2, world)}; nearest {size + 1}"
            )

    def _check_losses(self, losses: list[Tensor], epoch: int, before: int) -> None:
        together = torch.stack(losses)
        self.processes.sum_(together)  # all stop, wherever it happens
        finite = together.isfinite()
        if finite.all():
            return
        step, which = (~finite).nonzero()[0].tolist()
        raise DivergedError(
            f"the loss of the {('first', 'second')[which]} pass is not finite in epoch {epoch}, "
            f"step {before + step + 1} of {self.steps_per_epoch} (lr "
            f"{self.optimizer.param_groups[0]['lr']:g}): the run is stopped, and its last good "
            "checkpoint kept; a smaller lr or rho may help"
        )


@dataclasses.dataclass(frozen=True)
class Files:
    """What a run keeps in its folder, beside report.md and curves.png."""

    folder: Path

    @property
    def best(self) -> Path:
        """The weights with the best validation accuracy."""
        return self.folder / "best.pt"

    @property
    def last(self) -> Path:
        """The state after the last epoch; gone when the run is complete."""
        return self.folder / "last.pt"

    @property
    def result(self) -> Path:
        """Where it is, the run is complete."""
        return self.folder / "result.json"


RESUMABLE = ("config", "epoch", "model", "optimizer", "scheduler", "generators", "history", "done")


def finished_result(config: Config) -> dict[str, Any] | None:
    """The result of the complete run in the folder of the configuration; None if there is none.

    Raises:
        CheckpointError: it is of another configuration, or damaged.
    """
    path = Files(config.folder).result
    if not path.exists():
        return None
    result = results.read_result(path)
    check_same_run(path, config, result["config"])
    return result


def _prepare(config: Config, writes: bool) -> dict[str, Any] | None:
    """The state to go on from, if any; on the CPU.

    Raises:
        CheckpointError: an unfinished run would be lost, or cannot be resumed.
    """
    files = Files(config.folder)
    if files.last.exists() and not config.overwrite:
        if not config.resume:
            raise CheckpointError(
                f"'{files.last}' is the checkpoint of an unfinished run; {LEFT_ALONE}: add "
                "--resume to go on with it, or --overwrite to start over"
            )
        state = load_checkpoint(files.last, RESUMABLE)
        check_same_run(files.last, config, state["config"])
        if not files.best.exists():
            raise CheckpointError(
                f"'{files.last}' lies there without best.pt, which the test needs; {LEFT_ALONE}: "
                "put best.pt beside it, or start over with --overwrite"
            )
        return state
    if writes:
        # Of an earlier run: they would not belong to the new files.
        for path in (files.result, files.last, files.best, files.folder / "sharpness.json"):
            path.unlink(missing_ok=True)
    return None


def run(config: Config, console: Console) -> dict[str, Any]:
    """Train, test the best checkpoint, and write all that the folder of a run holds.

    Returns:
        what result.json holds.

    Raises:
        DriverError: whatever stops the run, in one sentence.
    """
    if config.resume and (done := finished_result(config)) is not None:
        Files(config.folder).last.unlink(missing_ok=True)  # of a process that ended just then
        return done
    begun = time.perf_counter()
    with process_group(config.device) as processes:
        if not processes.writes:
            console = make_console(quiet=True)
        training = _train(config, console, processes)
        test_loss, test_accuracy = training.evaluate(training.dataset.test)
        if not processes.writes:  # the rest is for one
            return {"name": config.run_name, "figures": {"test_accuracy": test_accuracy}}
    return _finish(training, console, test_loss, test_accuracy, begun)


def _train(config: Config, console: Console, processes: Processes) -> Training:
    """All epochs; the training then has the best weights."""
    files = Files(config.folder)
    if processes.writes:
        try:
            files.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir={config.folder} cannot be written: {error}") from None
        for leftover in files.folder.glob(".*.[0-9]*"):  # of a process killed as it wrote
            leftover.unlink(missing_ok=True)
    processes.wait()
    state = _prepare(config, processes.writes)
    training = Training(config, processes)
    if state is not None:
        training.load(state)
        console.print(
            f"{config.run_name}: resumed after epoch {state['epoch']}", markup=False, soft_wrap=True
        )
    del state
    quiet = dataclasses.replace(config, framework_name="none")
    tracker = make_tracker(config if processes.writes else quiet, files.folder, training.resumed)
    with (
        contextlib.closing(tracker),
        RunProgress(
            console, config.run_name, config.epochs, training.steps_per_epoch, training.done
        ) as progress,
    ):
        for number in range(training.resumed + 1, config.epochs + 1):
            entry = training.epoch(number, progress)
            if processes.writes:
                state = training.state()
                # The best first: if the process dies between the two, the epoch is taken again,
                # and comes out the same.
                if training.best is entry:
                    kept = {"model": state["model"], "config": state["config"]}
                    save_checkpoint(files.best, {**kept, **entry})
                save_checkpoint(files.last, state)
                tracker.log(number, scalars(entry))
    processes.wait()
    best = load_checkpoint(files.best, ("model", "epoch"), training.device)
    if best["epoch"] != training.best["epoch"]:
        raise CheckpointError(
            f"'{files.best}' is of epoch {best['epoch']}, but epoch {training.best['epoch']} was "
            f"the best; {LEFT_ALONE}: start over with --overwrite"
        )
    training.model.load_state_dict(best["model"])
    return training


def _finish(
    training: Training, console: Console, test_loss: float, test_accuracy: float, begun: float
) -> dict[str, Any]:
    """Measure the sharpness, and write the result."""
    config, files = training.config, Files(training.config.folder)
    sharpness = measure(training.model, training.dataset, config, console)
    results.write_json(files.folder / "sharpness.json", sharpness)
    result = {
        "name": config.run_name,
        "config": dataclasses.asdict(config),
        "versions": results.versions(),
        "device": results.describe_device(training.device),
        "processes": training.processes.world,
        "backends": backend_names(training.optimizer),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "figures": {
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "best_epoch": training.best["epoch"],
            "best_val_accuracy": training.best["val_accuracy"],
            **{name: sharpness[name] for name in ("lambda_max", "trace", "sharpness")},
            **training.timer.summary(),
            "seconds_per_epoch": sum(e["seconds"] for e in training.history) / config.epochs,
            # Of an interrupted run: what the last process took, and the epochs before it.
            "seconds": time.perf_counter()
            - begun
            + sum(e["seconds"] for e in training.history[: training.resumed]),
        },
        "verification": training.verification,
        "history": training.history,
    }
    results.write_all(files.folder, f"{config.run_name} on {config.dataset}", [result])
    # Last: where it is, the run is complete.
    results.write_json(files.result, result)
    files.last.unlink(missing_ok=True)
    return result
