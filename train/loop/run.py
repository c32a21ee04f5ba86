"""Make one training run, from the configuration to the result."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import samkernels
from train.inputs.data import Dataset, Split, load_dataset, plain_batches, train_batches, visits
from train.loop.checkpoint import (
    LEFT_ALONE,
    check_same_run,
    load_checkpoint,
    locked,
    save_checkpoint,
)
from train.loop.distributed import (
    ALONE,
    Processes,
    mean_loss,
    parallel,
    process_group,
    synchronise_batchnorm,
)
from train.loop.graphs import CudaCapture, GraphedStep
from train.loop.lockstep import Lockstep
from train.loop.optimizers import (
    OnePassOptimizer,
    TwoPassOptimizer,
    backend_names,
    build_optimizer,
    names_of_norms,
)
from train.loop.termination import Termination
from train.loop.timing import StepTimer
from train.loop.trackers import Several, Tracker, make_tracker, scalars
from train.models import build_model
from train.pages import page
from train.settings.config import FIELDS, Config
from train.settings.registry import OPTIMIZERS
from train.shared import results
from train.shared.devices import pick_device, set_numerics
from train.shared.errors import CheckpointError, ConfigError, DivergedError, TerminatedError
from train.shared.progress import RunProgress, make_console
from train.spectrum.curvature import check_batch_size, measure

EVAL_BATCH = 1000
WARMUP_STEPS = 10  # a run of one epoch does not time so many steps after those in lockstep
GRAPH_AFTER = 5  # a run takes so many steps before one is recorded
CUDA_CHECK_EVERY = 50  # so many steps pass until a look at the loss, which waits for the device
MEASURED = ("lambda_max", "trace", "sharpness", "largest_eigenvalue", "negative_share")
STATISTICS = samkernels.ops.GradientStatistics._fields

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_scheduler(optimizer: Any, config: Config) -> torch.optim.lr_scheduler.LRScheduler:
    """Schedule the learning rate: it is lr i / (n + 1) in the i-th of n epochs of warm-up, then
    follows config.scheduler over the epochs that are left."""
    factor = config.lr_gamma if config.scheduler == "exponential" else 1.0
    warmup = config.warmup_epochs

    def share(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / (warmup + 1)
        done = epoch - warmup
        if config.scheduler == "cosine":
            return (1 + math.cos(math.pi * done / (config.epochs - warmup))) / 2
        return factor**done

    if warmup:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    if config.scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
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
    """Take one pass and an update. Return its loss, in a list, and the predicted classes.

    Args:
        forward: a function that turns images and labels into loss and logits.
        observe: a function that is called when the gradients are there.
        backward: a function that computes the gradients of the loss that it is given.
    """
    loss, logits = forward(images, labels)
    backward(loss)
    observe()
    with timer.optimizer():
        optimizer.step()
    optimizer.zero_grad()
    return [loss.detach()], logits.argmax(1)


def sam_step(
    forward: Forward,
    model: nn.Module,
    network: Any,
    optimizer: TwoPassOptimizer,
    images: Tensor,
    labels: Tensor,
    timer: StepTimer,
) -> tuple[list[Tensor], Tensor]:
    """Take two passes and an update. Return the losses at w and w + e(w), and the classes that are
    predicted at w. Where the optimizer wants no second pass, there is one loss.

    The batch-norm statistics are those of the first pass.

    Args:
        network: the model, or the module that averages its gradients over processes.
    """
    # Without a second pass, the processes average their gradients, as in any ordinary step.
    may_perturb = optimizer.needs_second_pass
    with optimizer.first_pass(network) if may_perturb else contextlib.nullcontext():
        first, logits = forward(images, labels)
        first.backward()
    losses = [first.detach()]
    with timer.optimizer():
        has_second_pass = optimizer.first_step()
    if has_second_pass:
        try:
            with samkernels.frozen_batchnorm_stats(model):
                second, _ = forward(images, labels)
                second.backward()
        except BaseException:
            optimizer.restore()
            raise
        losses.append(second.detach())
    with timer.optimizer():
        optimizer.second_step(zero_grad=True)
    return losses, logits.argmax(1)


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    model: nn.Module,
    dataset: Dataset,
    split: Split,
    processes: Processes = ALONE,
    *others: Tensor,
) -> tuple[float, ...]:
    """Return (mean cross-entropy, accuracy as a share) in eval mode; the mode is put back.

    Each process takes every world-th image.

    Args:
        forward: a function that turns normalised images into logits.
        others: other labels of the same images, int64 (N,); each adds an accuracy to the result.
    """
    training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    every = slice(processes.rank, None, processes.world)
    predicted = [split.labels[:0]]  # a process may have no image
    for images, labels in plain_batches(dataset, split[every], EVAL_BATCH):
        logits = forward(images).float()
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
        predicted.append(logits.argmax(1))
    model.train(training)
    answers = torch.cat(predicted)
    right = torch.stack([(answers == labels[every]).sum() for labels in (split.labels, *others)])
    processes.sum_(loss, right)
    return float(loss) / len(split), *(count / len(split) for count in right.tolist())


def accuracy_by_label(counts: Tensor) -> dict[str, float]:
    """Return accuracies over an epoch's training images, as they were predicted in its passes.

    clean_accuracy is the share of the images with the right label that are predicted right;
    mislabelled_accuracy is the share of those with a wrong label that are predicted as labelled,
    that is, learnt by heart; mislabelled_true_accuracy is the share of those with a wrong label
    that are predicted right all the same.

    Args:
        counts: int64 (5,): the number of clean images, and of these predicted right; the number of
            mislabelled images, of these predicted as labelled, and of these predicted right.
    """
    clean, right, mislabelled, learnt, seen_through = counts.tolist()
    found = {"clean_accuracy": right / clean} if clean else {}
    if mislabelled:
        found["mislabelled_accuracy"] = learnt / mislabelled
        found["mislabelled_true_accuracy"] = seen_through / mislabelled
    return found


class Training:
    """The state of a run between its epochs, and the epoch itself."""

    def __init__(self, config: Config, processes: Processes = ALONE) -> None:
        self.config, self.processes = config, processes
        self.row = OPTIMIZERS[config.opt_name]
        if self.row.step == "hessian" and processes.world > 1:
            raise ConfigError(
                f"opt_name={config.opt_name} in {processes.world} processes: batch normalisation "
                "over processes has no second derivatives; allowed one process, without torchrun"
            )
        self.device = pick_device(config.device)
        set_numerics(config.precision, config.threads)
        # The writer loads first: it may have to download what the others find then.
        if processes.writes:
            self.dataset = load_dataset(config, self.device)
        processes.wait()
        if not processes.writes:
            self.dataset = load_dataset(config, self.device)
        self._check_batches()
        if config.cuda_graph:
            self._check_graph()
        torch.manual_seed(config.seed)
        # The network is made on the CPU: so it has the same weights on every device.
        shape = self.dataset.train.images.shape[1:]
        self.model = build_model(config.model, shape, self.dataset.num_classes).to(self.device)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        network = self.model
        if processes.world > 1:
            # Where processes perturb on their own, batch norm takes the share of each by itself.
            if config.perturbation == "global":
                self.model = synchronise_batchnorm(self.model, self.device)
            network = parallel(self.model, self.device)
        # `model` has the weights and their names; the steps call `network`.
        self.network: Any = network
        if config.compile:
            self.network = torch.compile(network)
        norms = names_of_norms(self.model) if config.subset == "norm" else frozenset()
        self.steps_per_epoch = config.steps_per_epoch(len(self.dataset.train))
        make_optimizer = functools.partial(
            build_optimizer, config=config, norms=norms, steps=config.epochs * self.steps_per_epoch
        )
        self.optimizer = make_optimizer(self.model.named_parameters())
        self.scheduler = build_scheduler(self.optimizer, config)
        self.timer = StepTimer(self.device)
        self.lockstep: Lockstep | None = None
        self.verification: dict[str, Any] | None = None
        if self.row.step != "plain" and config.verify_steps:
            self.lockstep = Lockstep(
                self.model,
                self.optimizer,
                lambda params: make_optimizer(params, backend="reference"),
            )
        self.graphed: GraphedStep | None = None
        if config.cuda_graph:
            capture = CudaCapture(self.device)
            torch.cuda.set_stream(capture.stream)
            self.graphed = GraphedStep(self._recorded_step, capture)
        self.done = self.resumed = 0
        self.last_test: tuple[float, ...] = ()  # it holds loss and accuracy after the last epoch
        self.history: list[dict[str, float]] = []
        # Where training stopped within an epoch, this holds what is known of the steps so far.
        self.partial: dict[str, Any] | None = None
        self.id = uuid.uuid4().hex  # it names this run in all of its files
        # This function takes the losses of every log_every-th step: epoch, step and values.
        self.log_step: Callable[[int, int, dict[str, float]], object] = lambda *_: None

    @property
    def best(self) -> dict[str, float]:
        """Return the history's entry with the highest validation accuracy: the first of equals."""
        return max(self.history, key=lambda entry: entry["val_accuracy"])

    def state(self) -> dict[str, Any]:
        """Return all that a bit-exact continuation needs; its seed gives the order of the data."""
        with self._unperturbed():
            weights = self.model.state_dict()
            if self.row.step == "one pass":  # after the block, the weights are perturbed again
                weights = {name: value.clone() for name, value in weights.items()}
        generators = [torch.get_rng_state()]
        if self.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(self.device))
        return {
            "id": self.id,
            "config": dataclasses.asdict(self.config),
            "epoch": len(self.history),
            "partial": self.partial,
            "model": weights,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generators": generators,
            "history": self.history,
            "done": self.done,
            "verification": self.verification,
            "lockstep": self.lockstep.state() if self.lockstep else None,
        }

    def take_weights(self, weights: dict[str, Any]) -> None:
        """Load these weights into the model, after the last step."""
        if self.row.step == "one pass":
            self.optimizer.restore()  # else unperturbed() would perturb these weights in the end
        self.model.load_state_dict(weights)

    def _unperturbed(self) -> contextlib.AbstractContextManager[None]:
        """Keep the weights at w, also those of an optimizer that perturbs them between steps."""
        if self.row.step != "one pass":
            return contextlib.nullcontext()
        found: contextlib.AbstractContextManager[None] = self.optimizer.unperturbed()
        return found

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
        self.partial, self.id = state.get("partial"), state.get("id", "")
        self.verification = state["verification"]
        if self.lockstep and state["lockstep"]:
            self.lockstep.load(state["lockstep"])
        # verify_steps may be other than it was when the state was saved.
        if self.lockstep and (not state["lockstep"] or self._is_verified()):
            self.lockstep = None

    def epoch(
        self, number: int, progress: RunProgress, stops: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Train epoch `number` (from 1) and evaluate it. Return its entry of the history.

        Where `partial` is not None, training goes on within the epoch, after the steps in it.

        Args:
            stops: a function that says whether to stop. One process asks it after each step,
                several ask where they look at the losses.

        Raises:
            TerminatedError: `stops` returned True in one of the processes, before the last step;
                `partial` has what a continuation needs.
            DivergedError: a loss is not finite; the message names epoch, step and pass.
            VerificationError: see Lockstep.
        """
        config = self.config
        self.model.train()
        losses: list[Tensor] = []
        observed: list[Tensor] = []
        answers: list[Tensor] = []
        earlier_counts = torch.zeros(5, dtype=torch.int64, device=self.device)
        weighted = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        begin, before = 0, 0.0
        if self.partial is not None:
            begin, before = self.partial["step"], self.partial["seconds"]
            if self.processes.rank == 0:  # the saved values are sums over all processes
                weighted += self.partial["weighted"].to(self.device)
                right += self.partial["right"].to(self.device)
            observed = [values.to(self.device) for values in self.partial["observed"]]
            earlier_counts = self.partial["label_counts"].to(self.device)
            self.partial = None
        checked = begin
        seen = skipped = begin * config.batch_size
        if self.graphed:
            self.graphed.forget()  # the recording has the lr of the epoch before
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
            begin,
        )
        for step in range(begin + 1, self.steps_per_epoch + 1):
            observing = config.statistics_every > 0 and self.done % config.statistics_every == 0
            count = min(config.batch_size, len(self.dataset.train) - seen)
            with self.timer.step(self._counted(number) and not observing):
                images, labels = next(batches)
                taken, predicted = self.take_step(images, labels, count, observing, observed)
            losses.append(torch.stack(taken))
            weighted += losses[-1][0] * count
            right += (predicted == labels).sum()
            if self.dataset.train.true_labels is not None:
                answers.append(predicted)
            seen += count
            self.done += 1
            # Several processes have to agree, which they do where they look at the losses anyway.
            looks = step % check_every == 0 or step == self.steps_per_epoch
            is_stopping = stops() if self.processes.world == 1 else False
            if looks or is_stopping:
                self._look_at_losses(losses[checked - begin :], number, checked)
                checked = step
                speed = (seen - skipped) / (time.perf_counter() - started)
                if self.processes.world > 1:
                    asked = torch.tensor(float(stops()), device=self.device)
                    self.processes.sum_(asked)
                    is_stopping = bool(asked)
                shown = [weighted / self.processes.world, right.double()]
                self.processes.sum_(*shown)
                loss, accuracy = (float(value) / seen for value in shown)
                progress.update(self.done, number, loss, accuracy, val_accuracy, speed)
            if is_stopping and step < self.steps_per_epoch:
                self.processes.sum_(weighted, right)
                self.partial = {
                    "step": step,
                    "seconds": before + time.perf_counter() - started,
                    "weighted": weighted,
                    "right": right,
                    "observed": observed,
                    "label_counts": earlier_counts + self._label_counts(number, begin, answers),
                }
                raise TerminatedError(
                    f"ended by SIGTERM in epoch {number}, after step {step} of "
                    f"{self.steps_per_epoch}: the same command with --resume goes on there"
                )
        seconds = before + time.perf_counter() - started
        self.timer.collect()
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        if config.perturbation != "global":
            # Each process's batch norm saw its shares only: the mean stands for whole batches.
            self.processes.mean_(*(b for b in self.model.buffers() if b.is_floating_point()))
        noisy = self.dataset.noisy_val_labels
        val_loss, val_accuracy, *val_noisy = self.evaluate(
            self.dataset.val, *([] if noisy is None else [noisy])
        )
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
        if val_noisy:
            entry["val_noisy_accuracy"] = val_noisy[0]
        if self.dataset.train.true_labels is not None:
            counts = earlier_counts + self._label_counts(number, begin, answers)
            entry |= accuracy_by_label(counts)
        if config.test_every and number % config.test_every == 0:
            entry["test_loss"], entry["test_accuracy"] = self.evaluate(self.dataset.test)
        if observed:
            means = torch.stack(observed).double().nanmean(0).tolist()
            # Steps of one pass have no second gradient to compare with.
            entry |= {k: v for k, v in zip(STATISTICS, means, strict=True) if not math.isnan(v)}
        self.history.append(entry)
        return entry

    def _label_counts(self, number: int, begin: int, answers: list[Tensor]) -> Tensor:
        """Return the counts over all processes that accuracy_by_label takes, int64 (5,).

        Args:
            number: the number of the epoch.
            begin: the number of the epoch's steps before the first of the answers.
            answers: the predicted classes of each step.
        """
        train, config, processes = self.dataset.train, self.config, self.processes
        counts = torch.zeros(5, dtype=torch.int64, device=self.device)
        if answers and train.true_labels is not None:
            predicted = torch.cat(answers)
            place = (processes.rank, processes.world)
            visited = visits(
                self.dataset, config.batch_size, config.seed, number, *place, first=begin
            )[: len(predicted)]
            labels, true = train.labels[visited], train.true_labels[visited]
            wrong = labels != true
            counts = torch.stack(
                [
                    (~wrong).sum(), (predicted == true)[~wrong].sum(), wrong.sum(),
                    (predicted == labels)[wrong].sum(), (predicted == true)[wrong].sum(),
                ]
            )  # fmt: skip
        processes.sum_(counts)
        return counts

    def evaluate(self, split: Split, *others: Tensor) -> tuple[float, ...]:
        """Return what the function evaluate() returns for this model, at w."""

        def forward(images: Tensor) -> Tensor:
            with self._autocast():
                return self.model(self._laid_out(images))

        with self._unperturbed():
            return evaluate(forward, self.model, self.dataset, split, self.processes, *others)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _laid_out(self, images: Tensor) -> Tensor:
        if not self.config.channels_last:
            return images
        return images.contiguous(memory_format=torch.channels_last)

    def take_step(
        self, images: Tensor, labels: Tensor, count: int, observing: bool, observed: list[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Take a step with a batch. Return the losses of its passes, and the predicted classes.

        Args:
            count: the number of images of the batch, in all processes together.
            observing: whether to append STATISTICS to `observed`.
        """
        images = self._laid_out(images)
        # The first steps allocate buffers and the libraries' workspaces, which a recording may not.
        whole = count == self.config.batch_size and self.done >= GRAPH_AFTER
        if self.graphed and whole and not observing and self.lockstep is None:
            return self.graphed(images, labels)
        return self._eager_step(images, labels, count, observing, observed, self.timer)

    def _recorded_step(self, images: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
        # No event of a recording can be read, so the timer is one whose times nobody looks at.
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
            smoothing = self.config.label_smoothing
            return mean_loss(logits, labels, count, self.processes.world, smoothing), logits

        def observe() -> None:
            if observing:
                observed.append(self._single_statistics())

        optimizer: Any = self.lockstep or self.optimizer
        batch = (images, labels, timer)
        if self.row.step in ("plain", "one pass"):
            taken = sgd_step(forward, optimizer, *batch, observe)
        elif self.row.step == "hessian":
            taken = sgd_step(forward, optimizer, *batch, observe, optimizer.backward)
        else:
            self.optimizer.track_statistics = observing
            taken = sam_step(forward, self.model, self.network, optimizer, *batch)
            if observing and self.optimizer.statistics is not None:  # a step of one pass has none
                observed.append(torch.stack(list(self.optimizer.statistics)))
        if self.lockstep is not None:
            self.verification = self.lockstep.summary()
            if self._is_verified():
                self.lockstep = None  # the twin's weights and state go with it
        return taken

    def _is_verified(self) -> bool:
        return self.lockstep is not None and self.lockstep.steps >= self.config.verify_steps

    def _single_statistics(self) -> Tensor:
        """Return STATISTICS of a step with one gradient: nan for those that need a second."""
        params = [p for p in self.model.parameters() if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        missing = torch.full((), math.nan, device=self.device)
        known = {
            "first_grad_norm": samkernels.ops.dots(grads).total[0].sqrt(),
            "weight_norm": samkernels.ops.dots([p.detach() for p in params]).total[0].sqrt(),
        }
        return torch.stack([known.get(name, missing) for name in STATISTICS])

    def _counted(self, epoch: int) -> bool:
        """Return whether the next step's time counts: it does after lockstep and warm-up."""
        verified = 0 if self.row.step == "plain" else self.config.verify_steps
        warm = epoch > 1 or (self.config.epochs == 1 and self.done >= verified + WARMUP_STEPS)
        return warm and self.done >= verified

    def _check_graph(self) -> None:
        config = self.config
        why = None
        if self.device.type != "cuda":
            why = f"device={self.device.type}"
        elif self.processes.world > 1:
            why = f"{self.processes.world} processes"
        elif self.row.step == "hessian":
            why = f"opt_name={config.opt_name}, whose random vectors come from the host"
        elif self.row.step == "one pass":
            why = f"opt_name={config.opt_name}, whose weights the host perturbs between the steps"
        elif self.row.every or config.policy is not None:
            why = "second passes that the host decides on"
        elif config.rho_end < 1:
            why = f"rho_end={config.rho_end:g}, for which the host asks for lr"
        if why:
            raise ConfigError(
                f"cuda_graph=true does not go with {why}: it records the step of one process on a "
                "GPU; allowed here is false"
            )

    def _check_batches(self) -> None:
        size, world = self.config.batch_size, self.processes.world
        count = len(self.dataset.train)
        if count < max(2, world):
            raise ConfigError(
                f"train_samples={self.config.train_samples} leaves {count} image(s) to train with: "
                f"allowed 0 (all) and at least {max(2, world)}"
            )
        least_rest = max(2, world)  # batch normalisation needs two images, and every process one

        def rest_of(size: int) -> int:
            return count % size or min(size, count)

        if (rest := rest_of(size)) < least_rest:
            least = "one image" if rest == 1 else f"{rest} images"
            others = (s for s in range(1, count + 1) if rest_of(s) >= least_rest)
            raise ConfigError(
                f"batch_size={size} leaves a last batch of {least}, which batch normalisation and "
                f"{world} process(es) cannot take: allowed is what divides {count} with rest 0 or "
                f"at least {least_rest}; nearest {min(others, key=lambda s: abs(s - size))}"
            )

    def _look_at_losses(self, losses: list[Tensor], epoch: int, before: int) -> None:
        """Log the losses; the step before the first of them was the epoch's `before`-th.

        Raises:
            DivergedError: a loss is not finite.
        """
        # A step of one pass repeats its loss, so that all steps fit into one tensor.
        passes = max(len(values) for values in losses)
        together = torch.stack([torch.cat([v, v[:1].expand(passes - len(v))]) for v in losses])
        self.processes.mean_(together)  # so all processes stop, whichever of them diverged
        finite = together.isfinite()
        if finite.all():
            finished = zip(together.tolist(), losses, strict=True)
            self._log_losses([values[: len(of)] for values, of in finished], epoch)
            return
        step, which = (~finite).nonzero()[0].tolist()
        raise DivergedError(
            f"the loss of the {('first', 'second')[which]} pass is not finite in epoch {epoch}, "
            f"step {before + step + 1} of {self.steps_per_epoch} (lr "
            f"{self.optimizer.param_groups[0]['lr']:g}): the run is stopped, and its last good "
            "checkpoint kept; a smaller lr or rho may help"
        )

    def _log_losses(self, losses: list[list[float]], epoch: int) -> None:
        every = self.config.log_every
        lr = self.optimizer.param_groups[0]["lr"]
        for step, values in enumerate(losses, self.done - len(losses) + 1):
            if every and step % every == 0:
                named = zip(("loss", "perturbed_loss"), values, strict=False)
                self.log_step(epoch, step, {**dict(named), "lr": lr})


@dataclasses.dataclass(frozen=True)
class Files:
    """The files that a run keeps in its folder, beside its report."""

    folder: Path

    @property
    def best(self) -> Path:
        """Return the path of the weights with the best validation accuracy."""
        return self.folder / "best.pt"

    @property
    def last(self) -> Path:
        """Return the path of the state after the last epoch, or after the step at which training
        was stopped; the file is gone when the run is complete."""
        return self.folder / "last.pt"

    @property
    def result(self) -> Path:
        """Return the path of the result: with it, the run is complete but for measurements."""
        return self.folder / "result.json"

    @property
    def sharpness(self) -> Path:
        """Return the path of the measurements at the best weights."""
        return self.folder / "sharpness.json"

    @property
    def diverged(self) -> Path:
        """Return the path of the record that a run leaves if its loss was not finite."""
        return self.folder / "diverged.json"


RESUMABLE = ("config", "epoch", "model", "optimizer", "scheduler", "generators", "history", "done")
# These are measured over the first sharpness_samples images, the rest over sharpness_batches.
OF_SAMPLES = ("lambda_max", "lambda_min", "trace", "trace_error", "density")


def finished_result(config: Config) -> dict[str, Any] | None:
    """Return the result of the complete run in the configuration's folder; None if there is none.

    Raises:
        CheckpointError: the result is of another configuration, or a file is damaged.
    """
    files = Files(config.folder)
    if not files.result.exists():
        return None
    result = results.read_result(files.result)
    if files.last.exists():
        # last.pt is of the same run if the process ended before it was removed, or of a later run.
        state = load_checkpoint(files.last, RESUMABLE)
        if state.get("id") != result.get("id"):
            return None
    check_same_run(files.result, config, result["config"])
    return result


def diverged_before(config: Config) -> str | None:
    """Return what the run of this configuration said when it diverged; None if it did not."""
    try:
        found = json.loads(Files(config.folder).diverged.read_text(encoding="utf-8"))
        return None if config.differences(found["config"]) else str(found["error"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None  # a record that cannot be used stops nobody: the run is made again


def is_measured(config: Config) -> bool:
    """Return whether a finished run has all measurements that the configuration asks for."""
    return not any(_to_measure(config))


def _to_measure(config: Config) -> tuple[bool, bool]:
    """Return whether the batches, and whether the samples, are still to be measured.

    A measurement by train.sharpness with other settings stands for the one that the run asked for.
    """
    files = Files(config.folder)
    measured = _read_sharpness(files)
    asked_before = results.read_result(files.result)["config"]

    def lacks(figure: str, *keys: str) -> bool:
        wanted = [getattr(config, key) for key in keys]
        if not all(wanted):
            return False
        if measured is None or measured.get(figure) is None:
            return True
        settings = (measured["settings"], asked_before)
        return all([known.get(key) for key in keys] != wanted for known in settings)

    batches = lacks("eigenvalues", "sharpness_batches", "sharpness_batch_size")
    samples = (
        lacks("lambda_max", "sharpness_samples")
        or lacks("trace", "sharpness_samples", "trace_vectors")
        or lacks("density", "sharpness_samples", "density_steps")
    )
    return batches, samples


def _read_sharpness(files: Files) -> dict[str, Any] | None:
    try:
        measured = json.loads(files.sharpness.read_text(encoding="utf-8"))
        return measured if isinstance(measured["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prepare(config: Config) -> dict[str, Any] | None:
    """Return the state to go on from, on the CPU; None where there is none.

    Raises:
        CheckpointError: a run would be lost, or cannot be resumed.
    """
    files = Files(config.folder)
    if config.overwrite:
        return None
    if files.last.exists():
        if not config.resume:
            raise CheckpointError(
                f"'{files.last}' is the checkpoint of an unfinished run; {LEFT_ALONE}: add "
                "--resume to go on with it, or --overwrite to start over"
            )
        state = load_checkpoint(files.last, RESUMABLE)
        check_same_run(files.last, config, state["config"])
        return state
    if files.result.exists():
        raise CheckpointError(
            f"'{files.result}' is of a finished run; {LEFT_ALONE}: add --resume to take it as it "
            "is, --overwrite to start over, or choose another --output_dir"
        )
    if files.best.exists():
        raise CheckpointError(
            f"'{files.best}' lies there without last.pt or result.json; {LEFT_ALONE}: put them "
            "beside it, start over with --overwrite, or choose another --output_dir"
        )
    return None


def run(config: Config, console: Console) -> dict[str, Any]:
    """Train, test the best checkpoint, and write all files of the run's folder.

    Returns:
        the content of result.json; in a process of torchrun that does not write, a part of it.

    Raises:
        DriverError: something stops the run; the message says what, in one sentence.
        KeyboardInterrupt: the user ends the run; the message says how it goes on.
    """
    files = Files(config.folder)
    # Only one of torchrun's processes writes.
    is_writer = os.environ.get("RANK", "0") == "0"
    claimed: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if is_writer:
        claimed = locked(files.folder)
    with (
        claimed,
        Termination() as termination,
        _resumable(files),
        contextlib.ExitStack() as closed_last,
    ):
        if config.resume and (done := finished_result(config)) is not None:
            return _completed(config, done, console) if is_writer else done
        begun = time.perf_counter()
        with process_group(config.device) as processes:
            if not processes.writes:
                console = make_console(quiet=True)
            training, tracker = _train(config, console, processes, termination, closed_last)
            if training.best is training.history[-1]:
                test_loss, test_accuracy = training.last_test
            else:
                test_loss, test_accuracy = training.evaluate(training.dataset.test)
            if not processes.writes:  # one process does the rest
                return {"name": config.run_name, "figures": {"test_accuracy": test_accuracy}}
        result = _result(training, test_loss, test_accuracy, begun)
        for path in (files.sharpness, files.diverged):  # these files are of an earlier run
            path.unlink(missing_ok=True)
        # The result goes first: measuring may take long and fail, and the run is complete.
        results.write_json(files.result, result)
        if termination.asked:
            raise TerminatedError(
                "ended by SIGTERM after the training: the same command with --resume measures"
            )
        result = _completed(config, result, console, training)
        pictures = {path.stem: path for path in sorted(files.folder.glob("*.png"))}
        tracker.finish(config.epochs, training.done, scalars(result["figures"]), pictures)
        return result


@contextlib.contextmanager
def _resumable(files: Files) -> Iterator[None]:
    """Make Ctrl-C in the block say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        if files.last.exists():
            said = f"--resume goes on from the last checkpoint, '{files.last}'"
        elif files.result.exists():
            said = "the training is complete, and --resume measures what is missing"
        else:
            said = "nothing was saved yet"
        raise KeyboardInterrupt(said) from None


def _train(
    config: Config,
    console: Console,
    processes: Processes,
    termination: Termination,
    closed_last: contextlib.ExitStack,
) -> tuple[Training, Tracker]:
    """Train all epochs. Return the training, with the best weights, and the open tracker."""
    files = Files(config.folder)
    state = _prepare(config)
    training = Training(config, processes)
    _check_measures(config, training.dataset)
    if state is not None:
        training.load(state)
        where = f" and {state['partial']['step']} steps" if state.get("partial") else ""
        console.print(
            f"{config.run_name}: resumed after epoch {state['epoch']}{where}",
            markup=False,
            soft_wrap=True,
        )
        if processes.writes:
            _repair_best(files, training, state)
    del state
    tracker: Tracker = Several([])
    if processes.writes:
        tracker = make_tracker(config, files.folder, training.resumed, training.done)
    closed_last.enter_context(contextlib.closing(tracker))
    training.log_step = tracker.log_step
    with (
        RunProgress(
            console, config.run_name, config.epochs, training.steps_per_epoch, training.done
        ) as progress,
        termination.held(),
    ):
        for number in range(training.resumed + 1, config.epochs + 1):
            try:
                entry = training.epoch(number, progress, lambda: termination.asked)
            except TerminatedError:
                _save(files, training)
                raise
            except DivergedError as error:
                if processes.writes:
                    results.write_json(files.diverged, _record(training, str(error)))
                raise
            _save(files, training)
            if processes.writes:
                tracker.log_epoch(number, training.done, scalars(entry))
            if termination.asked and number < config.epochs and processes.world == 1:
                raise TerminatedError(
                    f"ended by SIGTERM after epoch {number}: the same command with --resume goes on"
                )
    training.last_test = training.evaluate(training.dataset.test)
    processes.wait()
    best = load_checkpoint(files.best, ("model", "epoch"), training.device)
    if best["epoch"] != training.best["epoch"]:
        raise _not_the_best(files, best, training)
    training.take_weights(best["model"])
    return training, tracker


def _check_measures(config: Config, dataset: Dataset) -> None:
    """Raise ConfigError before the training if something could not be measured after it."""
    if config.sharpness_batches:
        check_batch_size(dataset, config.sharpness_batch_size)


def _save(files: Files, training: Training) -> None:
    """Save last.pt, then best.pt: after a kill in between, _repair_best makes up for it."""
    if not training.processes.writes:
        return
    state = training.state()
    save_checkpoint(files.last, state)
    epochs = len(training.history)
    if epochs == 0 or (epochs == 1 and training.partial is None):
        # These files are of an earlier run, which stays until this run has a checkpoint.
        for path in (files.result, files.sharpness, files.diverged, files.best):
            path.unlink(missing_ok=True)
    if training.history and training.partial is None and training.best is training.history[-1]:
        _save_best(files, state)


def _save_best(files: Files, state: dict[str, Any]) -> None:
    kept = {name: state.get(name) for name in ("id", "model", "config")}
    save_checkpoint(files.best, {**kept, **state["history"][-1]})


def _repair_best(files: Files, training: Training, state: dict[str, Any]) -> None:
    """Save best.pt where, after a death between the two checkpoints, it is missing or earlier.

    Raises:
        CheckpointError: best.pt is missing or not the best, and last.pt has later weights.
    """
    if not training.history:
        return
    best = load_checkpoint(files.best, ("model", "epoch")) if files.best.exists() else None
    if best is not None:
        known = (best.get("id", training.id), best["epoch"])
        if known == (training.id, training.best["epoch"]):
            return
    if training.best is training.history[-1] and training.partial is None:
        _save_best(files, state)
    elif best is None:
        raise CheckpointError(
            f"'{files.last}' lies there without best.pt, which the test needs; {LEFT_ALONE}: put "
            "best.pt beside it, or start over with --overwrite"
        )
    else:
        raise _not_the_best(files, best, training)


def _not_the_best(files: Files, best: dict[str, Any], training: Training) -> CheckpointError:
    return CheckpointError(
        f"'{files.best}' is of epoch {best['epoch']}, but epoch {training.best['epoch']} was the "
        f"best; {LEFT_ALONE}: start over with --overwrite"
    )


def _record(training: Training, error: str) -> dict[str, Any]:
    """Return the record of a run that diverged."""
    config = training.config
    about = {"name": config.run_name, "config": dataclasses.asdict(config), "error": error}
    return {**about, "versions": results.versions(), "history": training.history}


def _result(
    training: Training, test_loss: float, test_accuracy: float, begun: float
) -> dict[str, Any]:
    """Return the content of result.json before anything is measured."""
    config, dataset = training.config, training.dataset
    return {
        "id": training.id,
        "name": config.run_name,
        "config": dataclasses.asdict(config),
        "versions": results.versions(),
        "device": results.describe_device(training.device),
        "processes": training.processes.world,
        "backends": backend_names(training.optimizer),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "classes": dataset.num_classes,
        "images": {name: len(getattr(dataset, name)) for name in ("train", "val", "test")},
        "figures": {
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            "last_test_accuracy": training.last_test[1],
            "last_test_loss": training.last_test[0],
            "best_epoch": training.best["epoch"],
            "best_val_accuracy": training.best["val_accuracy"],
            **dict.fromkeys(MEASURED),
            **training.timer.summary(),
            "seconds_per_epoch": sum(e["seconds"] for e in training.history) / config.epochs,
            # A resumed run counts the time of the last process and of the epochs before it.
            "seconds": time.perf_counter()
            - begun
            + sum(e["seconds"] for e in training.history[: training.resumed]),
        },
        "verification": training.verification,
        "history": training.history,
    }


def _completed(
    config: Config, result: dict[str, Any], console: Console, training: Training | None = None
) -> dict[str, Any]:
    """Measure what the configuration of a finished run asks for, and write the run's report.

    Args:
        training: the training, with the best weights; None: the weights are read if need be.

    Returns:
        the result, with the measurements.
    """
    files = Files(config.folder)
    files.last.unlink(missing_ok=True)
    batches, samples = _to_measure(config)
    if batches or samples:
        begun = time.perf_counter()
        if training is None:
            training = Training(dataclasses.replace(config, verify_steps=0, cuda_graph=False))
            best = load_checkpoint(files.best, ("model", "epoch"), training.device)
            training.model.load_state_dict(best["model"])
        asked = dataclasses.replace(
            config,
            sharpness_batches=config.sharpness_batches if batches else 0,
            sharpness_samples=config.sharpness_samples if samples else 0,
        )
        set_numerics()  # curvature is measured in fp32, whatever the training used
        found = measure(training.model, training.dataset, asked, console)
        found = _with_earlier(found, _read_sharpness(files), batches, samples)
        results.write_json(files.sharpness, found)
        result["config"] |= {
            name: value
            for name, value in config.measures.items()
            if FIELDS[name].metadata["section"] == "sharpness"
        }
        result["figures"] |= {name: found.get(name) for name in MEASURED}
        spent = result["figures"].get("measuring_seconds") or 0.0
        result["figures"]["measuring_seconds"] = spent + time.perf_counter() - begun
        results.write_json(files.result, result)
    if batches or samples or not (files.folder / "report.md").exists():
        page.write_report([files.folder], files.folder, f"{config.run_name} on {config.dataset}")
    return result


def _with_earlier(
    found: dict[str, Any], earlier: dict[str, Any] | None, batches: bool, samples: bool
) -> dict[str, Any]:
    """Return the new measurements, and the earlier ones of what was not measured now."""
    if earlier is None:
        return found
    before, now = earlier["settings"], found["settings"]
    kept = set()
    if not batches:
        kept |= {"sharpness_batches", "sharpness_batch_size"}
        found |= {k: v for k, v in earlier.items() if k != "settings" and k not in OF_SAMPLES}
    if not samples:
        kept |= {"sharpness_samples", "trace_vectors", "density_steps"}
        found |= {name: earlier.get(name) for name in OF_SAMPLES}
    elif before.get("sharpness_samples") == now["sharpness_samples"]:
        # What is asked for now may be one of the figures of the same images, and not the others.
        kept |= {name for name in ("trace_vectors", "density_steps") if not now[name]}
        found |= {name: earlier.get(name) for name in OF_SAMPLES if found[name] is None}
    now |= {name: value for name, value in before.items() if name in kept}
    return found
