"""Options of a run: precision, memory format, compilation, trackers, statistics."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import samkernels
from tests.train_helpers import no_progress, quiet
from train.inputs import data
from train.loop import distributed, graphs, optimizers, run, trackers
from train.settings.config import Config
from train.settings.registry import MODELS
from train.settings.registry import OPTIMIZERS as ROWS
from train.shared import devices, progress
from train.shared.errors import ConfigError

OPTIMIZERS = ("sgd", "sam", "samdirection", "sammagnitude", "sgdhess")


def small(folder: Path, **keys: Any) -> Config:
    return Config(
        **{
            "dataset": "digits", "model": "resnet_small", "opt_name": "sam", "rho": 0.1,
            "epochs": 2, "batch_size": 250, "device": "cpu", "verify_steps": 2,
            "sharpness_samples": 0, "output_dir": str(folder), **keys,
        }
    )  # fmt: skip


def trained(config: Config) -> run.Training:
    training = run.Training(config)
    for number in range(1, config.epochs + 1):
        training.epoch(number, no_progress(training))
    return training


def test_plain_fp32_is_the_default(tmp_path: Path) -> None:
    config = Config()
    assert (config.precision, config.channels_last, config.compile) == ("fp32", False, False)
    training = run.Training(small(tmp_path))
    dtypes = outputs_of(training)
    assert dtypes == {torch.float32}


def outputs_of(training: run.Training) -> set[torch.dtype]:
    """The dtypes that convolutions give in a step."""
    seen: set[torch.dtype] = set()
    for module in training.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    images, labels = next(run.train_batches(training.dataset, 250, 0, 1))
    training.take_step(images, labels, 250, False, [])
    return seen


@pytest.mark.parametrize("opt_name", OPTIMIZERS)
def test_bf16_passes_with_fp32_weights(tmp_path: Path, opt_name: str) -> None:
    config = small(tmp_path, opt_name=opt_name, precision="bf16", batch_size=100)
    training = trained(config)
    assert outputs_of(training) == {torch.bfloat16}
    assert {p.dtype for p in training.model.parameters()} == {torch.float32}
    full = trained(small(tmp_path, opt_name=opt_name, batch_size=100))
    # About the same run, and not the very same.
    assert training.history[-1]["train_loss"] != full.history[-1]["train_loss"]
    assert training.history[-1]["train_loss"] == pytest.approx(
        full.history[-1]["train_loss"], rel=0.2
    )


@pytest.mark.parametrize("opt_name", ["sammagnitude", "sgdhess"])
def test_channels_last_is_the_same_run_up_to_rounding(tmp_path: Path, opt_name: str) -> None:
    keys: dict[str, Any] = {"opt_name": opt_name, "epochs": 1}
    training = trained(small(tmp_path, channels_last=True, verify_steps=4, **keys))
    weights = [p for p in training.model.parameters() if p.ndim == 4 and p.shape[-1] == 3]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    plain = trained(small(tmp_path, **keys))
    assert training.history[0]["train_loss"] == pytest.approx(
        plain.history[0]["train_loss"], rel=1e-3
    )
    assert training.verification is not None and training.verification["value"] <= 1e-5


def test_compiled_steps_are_the_same_up_to_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backend that traces and runs eagerly: what is compiled, not how well."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend="aot_eager"))
    compiled = trained(small(tmp_path, compile=True, epochs=1))
    plain = trained(small(tmp_path, epochs=1))
    assert compiled.network is not compiled.model
    assert compiled.history[0]["train_loss"] == pytest.approx(
        plain.history[0]["train_loss"], rel=1e-4
    )
    # Statistics of batch norm move in the first pass only, also in the compiled graphs.
    for (name, a), b in zip(compiled.model.named_buffers(), plain.model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)


SMALL = {"mlp", "resnet_small", "resnet18"}  # the others take seconds


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SMALL else [pytest.mark.full])
        for name in sorted(set(MODELS) - {"resnet101", "resnet152"})
    ],
)
def test_verification_with_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Two steps in lockstep with the reference (the two deepest have resnet50's layers)."""
    load = run.load_dataset

    def few(config: Config, device: torch.device) -> Any:
        dataset = load(config, device)
        part = run.Split(dataset.train.images[:8], dataset.train.labels[:8])
        return run.dataclasses.replace(dataset, train=part, val=part, test=part)

    monkeypatch.setattr(run, "load_dataset", few)
    config = small(tmp_path, model=name, batch_size=4, epochs=1, lr=0.01, opt_name="sammagnitude")
    verification = trained(config).verification
    assert verification is not None and verification["steps"] == 2
    assert 0 <= verification["value"] <= 1e-5


AXES: tuple[dict[str, Any], ...] = (
    {"when": "periodic:2"}, {"subset": "norm", "norm": "tensor"}, {"scaling": "tensor"},
    {"sparsity": 0.5},
)  # fmt: skip


@pytest.mark.parametrize("opt_name", sorted(set(ROWS) - set(OPTIMIZERS) - {"adamw"}))
def test_the_whole_family_trains(tmp_path: Path, opt_name: str) -> None:
    """Two steps in lockstep, with statistics of both gradients where there are two passes."""
    config = small(
        tmp_path, opt_name=opt_name, batch_size=500, epochs=1, statistics_every=1, rho=0.2, k=2
    )
    training = trained(config)
    assert type(training.optimizer).__name__ == ROWS[opt_name].title
    assert training.verification is not None and training.verification["steps"] == 2
    assert training.verification["value"] <= 1e-5
    entry = training.history[0]
    assert entry["train_loss"] > 0 and ("cosine" in entry) is (opt_name != "msam")
    group = training.optimizer.param_groups[0]
    for key in ("rho", *ROWS[opt_name].keys):
        wanted = getattr(config, key)
        assert group[key] == (wanted if key != "max_norm" else None), key


@functools.cache
def loss_without_axes(opt_name: str) -> float:
    return trained(small(Path("not written to"), opt_name=opt_name, epochs=1)).history[0][
        "val_loss"
    ]


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("opt_name", ["gsam", "friendlysam", "msam"])
def test_axes_go_with_every_variant(tmp_path: Path, opt_name: str, axes: dict[str, Any]) -> None:
    training = trained(small(tmp_path, opt_name=opt_name, epochs=1, **axes))
    assert training.verification is not None and training.verification["value"] <= 1e-5
    assert training.history[0]["val_loss"] != loss_without_axes(opt_name)


@pytest.mark.parametrize("opt_name", ["gsam", "msam"])
def test_rho_follows_lr(tmp_path: Path, opt_name: str) -> None:
    """In lockstep also where lr has changed, in the second epoch."""
    config = small(tmp_path, opt_name=opt_name, rho_end=0.2, batch_size=500, verify_steps=4)
    training = trained(config)
    assert training.verification is not None and training.verification["steps"] == 4
    lr = training.history[-1]["lr"]
    assert 0 < lr < config.lr
    rho = training.optimizer.param_groups[0]["rho"]
    assert rho == pytest.approx(0.1 * (0.2 + 0.8 * lr / config.lr))


def test_sparse_sam_leaves_a_share_of_the_weights_where_they_are(tmp_path: Path) -> None:
    training = run.Training(small(tmp_path, sparsity=0.7, verify_steps=0))
    before = [p.detach().clone() for p in training.model.parameters()]
    for p in training.model.parameters():
        p.grad = torch.ones_like(p)
    training.optimizer.first_step()
    params = zip(training.model.parameters(), before, strict=True)
    moved = torch.cat([(p.detach() != w).flatten() for p, w in params])
    assert 0.28 < moved.double().mean() < 0.32


def test_second_passes_where_the_gradient_is_large(tmp_path: Path) -> None:
    config = small(tmp_path, when="norm:0.5:-0.5", batch_size=125, verify_steps=8, epochs=1)
    training = run.Training(config)
    assert training.optimizer._when.steps == 8
    answers = []
    first_step = training.optimizer.first_step
    training.optimizer.first_step = lambda: answers.append(first_step()) or answers[-1]
    training.epoch(1, progress.RunProgress(quiet(), "x", 1, training.steps_per_epoch))
    assert answers[0] and set(answers) == {True, False}
    assert training.verification is not None and training.verification["steps"] == 8


@pytest.mark.parametrize("wants", [True, False])
def test_a_step_without_a_second_pass_is_an_ordinary_one_of_all_processes(wants: bool) -> None:
    """Where each of them perturbs by itself, first_pass() is for steps that perturb."""
    model, entered = torch.nn.Linear(2, 1), []

    class Optimizer(samkernels.SAM):
        def first_pass(self, model: torch.nn.Module) -> Any:
            entered.append(True)
            return super().first_pass(model)

    optimizer = Optimizer(model.parameters(), lr=0.1, when=samkernels.FromStep(0 if wants else 9))
    timer = run.StepTimer(torch.device("cpu"))

    def forward(x: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(x).sum(), model(x)

    batch = torch.ones(3, 2), torch.zeros(3)
    losses, _ = run.sam_step(forward, model, model, optimizer, *batch, timer)
    assert len(losses) == 1 + wants and entered == [True] * wants


def test_steps_without_a_second_pass_make_one(tmp_path: Path) -> None:
    """Every second step of four has two; the losses of each are logged."""
    training = run.Training(small(tmp_path, when="periodic:2", epochs=1))
    logged: list[dict[str, float]] = []
    training.config.__dict__["log_every"] = 1
    training.log_step = lambda _epoch, _step, values: logged.append(values)
    passes = [0]
    training.model.register_forward_hook(
        lambda module, _i, _o: passes.__setitem__(0, passes[0] + module.training)
    )
    training.epoch(1, no_progress(training))
    assert passes[0] == 6
    assert ["perturbed_loss" in values for values in logged] == [False, True, False, True]


def test_options_that_do_not_go_together_are_said(tmp_path: Path) -> None:
    for keys, says in (
        ({"opt_name": "msam", "momentum": 0.0}, "opt_name=msam: momentum=0"),
        ({"opt_name": "wsam", "gamma": 1.0}, "opt_name=wsam: gamma"),
        ({"opt_name": "vasso", "perturbation": "local"}, "opt_name=vasso: perturbation"),
        ({"opt_name": "sam", "subset": "norm", "model": "mlp"}, "subset=norm .* allowed all"),
    ):
        with pytest.raises(ConfigError, match=says):
            run.Training(small(tmp_path, **keys))


# -- statistics and trackers -----------------------------------------------------------------------


def test_statistics_are_means_over_the_observed_steps(tmp_path: Path) -> None:
    """Against figures computed here from the gradients of every second step."""
    config = small(tmp_path, epochs=1, statistics_every=2, verify_steps=0)
    training = run.Training(config)
    seen: dict[str, list[float]] = {name: [] for name in run.STATISTICS}
    first: list[torch.Tensor] = []
    optimizer, steps = training.optimizer, [0]
    first_step, second_step = optimizer.first_step, optimizer.second_step

    def flat(tensors: Any) -> torch.Tensor:
        return torch.cat([t.detach().reshape(-1) for t in tensors]).double()

    def watch_first() -> bool:
        weights.append(flat(training.model.parameters()))
        first.append(flat(p.grad for p in training.model.parameters()))
        return bool(first_step())

    def watch_second(zero_grad: bool = False) -> None:
        g1, g2, w = first[-1], flat(p.grad for p in training.model.parameters()), weights[-1]
        if steps[0] % 2 == 0:
            figures = {
                "first_grad_norm": g1.norm(), "second_grad_norm": g2.norm(),
                "weight_norm": w.norm(), "cosine": g1 @ g2 / (g1.norm() * g2.norm()),
                "share_second_larger": (g2.abs() > g1.abs()).double().mean(),
                "share_signs_agree": (g1 * g2 > 0).double().mean(),
            }  # fmt: skip
            for name, value in figures.items():
                seen[name].append(float(value))
        steps[0] += 1
        second_step(zero_grad=zero_grad)

    weights: list[torch.Tensor] = []
    optimizer.first_step, optimizer.second_step = watch_first, watch_second
    entry = training.epoch(1, no_progress(training))
    for name, values in seen.items():
        assert len(values) == 2
        assert entry[name] == pytest.approx(sum(values) / 2, rel=1e-5), name
    assert training.timer.summary()["timed_steps"] == 0  # one epoch, all of it warm-up


@pytest.mark.parametrize("opt_name", ["sgd", "sgdhess"])
def test_statistics_of_one_pass_are_those_of_one_gradient(tmp_path: Path, opt_name: str) -> None:
    entry = trained(small(tmp_path, opt_name=opt_name, epochs=1, statistics_every=1)).history[0]
    assert entry["first_grad_norm"] > 0 and entry["weight_norm"] > 0
    assert "cosine" not in entry and "second_grad_norm" not in entry


def test_statistics_do_not_change_the_run(tmp_path: Path) -> None:
    for opt_name in ("sgd", "sam", "sgdhess"):
        plain, watched = (
            trained(small(tmp_path, opt_name=opt_name, epochs=1, statistics_every=every))
            for every in (0, 1)
        )
        pairs = zip(plain.model.parameters(), watched.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small(
        tmp_path, framework_name="tensorboard", statistics_every=1, log_every=3, density_steps=3,
        sharpness_samples=20,
    )  # fmt: skip
    result = run.run(config, quiet())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    steps = EventAccumulator(str(tmp_path / "tensorboard" / "steps")).Reload()
    assert [event.step for event in steps.Scalars("perturbed_loss")] == [3, 6]
    for name in ("best_val_accuracy", "test_accuracy", "lambda_max"):
        (event,) = events.Scalars(f"run/{name}")
        assert event.value == pytest.approx(result["figures"][name], rel=1e-6)
    pictures = events.Tags()["images"]
    assert any("density" in name for name in pictures) and any("curves" in n for n in pictures)
    for name in ("train_loss", "val_accuracy", "lr", *run.STATISTICS):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(entry["epoch"], entry[name]) for entry in result["history"]]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to the library, and that a resumed run has the same id."""
    wandb = pytest.importorskip("wandb")
    calls: list[Any] = []

    class Run:
        def __init__(self) -> None:
            self.summary = summary

        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            axes[name] = step_metric

        def log(self, values: dict[str, Any]) -> None:
            calls.append(values)

        def finish(self) -> None:
            calls.append("finished")

    axes: dict[str, str | None] = {}
    summary: dict[str, float] = {}
    started: list[dict[str, Any]] = []

    def init(**keys: Any) -> Run:
        started.append(keys)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "Image", lambda path: f"image {Path(path).name}")
    config = small(tmp_path, framework_name="wandb", project_name="mine", tags="one, two")
    for epoch in (0, 1):
        tracker = trackers.make_tracker(config, tmp_path, epoch, 4 * epoch)
        tracker.log_step(epoch + 1, 4 * epoch + 3, {"loss": 0.6})
        tracker.log_epoch(epoch + 1, 4 * epoch + 4, {"train_loss": 0.5})
        tracker.finish(2, 8, {"lambda_max": 3.0}, {"density": tmp_path / "density.png"})
        tracker.close()
    first, second = started
    assert first["id"] == second["id"] and first["project"] == "mine"
    assert first["config"]["rho"] == 0.1 and first["dir"] == str(tmp_path)
    assert (first["group"], first["tags"]) == ("digits-resnet_small", ["one", "two"])
    assert first["name"] == config.full_name and "seed0" in first["name"]
    assert axes == {"epoch": None, "*": "epoch", "step": None, "steps/*": "step"}
    assert calls[:4] == [
        {"step": 3, "steps/loss": 0.6},
        {"epoch": 1, "train_loss": 0.5},
        {"epoch": 2, "density": "image density.png"},
        "finished",
    ]
    assert calls[4] == {"step": 7, "steps/loss": 0.6} and calls.count("finished") == 2
    assert summary == {"lambda_max": 3.0}
    # A run that was ended within its first epoch goes on, too.
    trackers.make_tracker(config, tmp_path, 0, 2).close()
    trackers.make_tracker(config, tmp_path, 0, 0).close()
    assert started[2]["id"] == first["id"] != started[3]["id"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_metrics_grow_while_a_run_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every log_every-th step and every epoch, there before the next; then the figures.

    digits in batches of 250: four steps an epoch."""
    seen: list[int] = []
    evaluate = run.Training.evaluate

    def watched(self: run.Training, split: Any, *others: Any) -> Any:
        path = tmp_path / "metrics.jsonl"
        seen.append(len(lines_of(tmp_path)) if path.exists() else 0)
        return evaluate(self, split, *others)

    monkeypatch.setattr(run.Training, "evaluate", watched)
    result = run.run(small(tmp_path, log_every=2, test_every=2), quiet())
    # Validation after each epoch, the test after the second, and once more in the end: the last
    # weights are the best.
    assert seen == [2, 5, 5, 6] and result["figures"]["best_epoch"] == 2
    lines = lines_of(tmp_path)
    assert [(line["epoch"], line["step"]) for line in lines] == [
        (1, 2), (1, 4), (1, 4), (2, 6), (2, 8), (2, 8), (2, 8)
    ]  # fmt: skip
    assert {"loss", "perturbed_loss", "lr"} < lines[0].keys()
    for line, entry in zip((lines[2], lines[5]), result["history"], strict=True):
        assert line == {**entry, "step": line["step"]}
    assert "test_accuracy" not in lines[2]
    assert lines[5]["test_accuracy"] == result["figures"]["last_test_accuracy"]
    assert lines[6]["test_accuracy"] == result["figures"]["test_accuracy"]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_metrics_of_a_resumed_run_have_each_step_once(tmp_path: Path) -> None:
    """What was logged after the checkpoint, and a line cut off, are left out."""
    config = small(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        '{"epoch": 1, "step": 4, "loss": 1.0}\n{"epoch": 2, "step": 6, "loss": 2.0}\n{"epo'
    )
    tracker = trackers.make_tracker(config, tmp_path, 1, 4)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3  # nothing to say yet
    tracker.log_step(2, 5, {"loss": math.nan})
    tracker.close()
    assert lines_of(tmp_path) == [
        {"epoch": 1, "step": 4, "loss": 1.0}, {"epoch": 2, "step": 5, "loss": None}
    ]  # fmt: skip
    tracker = trackers.make_tracker(config, tmp_path, 0, 0)
    tracker.log_step(1, 1, {"loss": 3.0})
    tracker.close()
    assert lines_of(tmp_path) == [{"epoch": 1, "step": 1, "loss": 3.0}]


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", missing)
    with pytest.raises(ConfigError, match=r"framework_name=wandb needs .*\[tracking\]"):
        trackers.make_tracker(small(tmp_path, framework_name="wandb"), tmp_path, 0, 0)


# -- what is learnt, and how -----------------------------------------------------------------------


def test_accuracy_on_clean_and_on_mislabelled_images(tmp_path: Path) -> None:
    """Counted here, with what the network said to each batch."""
    config = small(tmp_path, opt_name="sgd", epochs=1, label_noise=0.3, batch_size=240)
    training = run.Training(config)
    said: list[torch.Tensor] = []
    hook = training.model.register_forward_hook(lambda _m, _i, output: said.append(output))
    evaluate = training.evaluate
    training.evaluate = lambda *a: (hook.remove(), evaluate(*a))[1]  # type: ignore[method-assign]
    entry = training.epoch(1, no_progress(training))
    predicted = torch.cat(said).argmax(1)
    train = training.dataset.train
    order = data.draw_epoch(training.dataset, 0, 1).order
    assert train.true_labels is not None
    given, true = train.labels[order], train.true_labels[order]
    wrong = given != true
    assert wrong.sum() == 300
    expected = {
        "clean_accuracy": (predicted == true)[~wrong],
        "mislabelled_accuracy": (predicted == given)[wrong],
        "mislabelled_true_accuracy": (predicted == true)[wrong],
        "train_accuracy": predicted == given,
    }
    for name, right in expected.items():
        assert entry[name] == pytest.approx(float(right.double().mean()), abs=1e-9), name
    noisy = training.dataset.noisy_val_labels
    assert noisy is not None
    val = run.Split(training.dataset.val.images, noisy)
    assert entry["val_noisy_accuracy"] == evaluate(val)[1] != entry["val_accuracy"]


def test_without_noise_there_is_nothing_mislabelled(tmp_path: Path) -> None:
    entry = trained(small(tmp_path, epochs=1)).history[0]
    assert not [name for name in entry if "mislabelled" in name or "clean" in name]
    assert "val_noisy_accuracy" not in entry


@pytest.mark.parametrize("scheduler", ["cosine", "constant", "exponential"])
def test_warm_up_rises_to_lr_and_the_scheduler_begins_there(scheduler: str) -> None:
    config = Config(warmup_epochs=3, epochs=7, lr=0.4, scheduler=scheduler, lr_gamma=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.4)
    schedule = run.build_scheduler(optimizer, config)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    cosine = [0.4 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    after = {
        "cosine": cosine, "constant": [0.4] * 4, "exponential": [0.4, 0.2, 0.1, 0.05]
    }[scheduler]  # fmt: skip
    assert rates == pytest.approx([0.1, 0.2, 0.3, *after])


def test_smoothed_labels_are_in_both_passes(tmp_path: Path) -> None:
    """The loss of uniform logits does not change, that of sure ones grows."""
    plain, smooth = (
        trained(small(tmp_path, epochs=1, label_smoothing=s, log_every=1)).history[0]
        for s in (0.0, 0.4)
    )
    assert smooth["train_loss"] != plain["train_loss"]
    logits, labels = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([0])
    wanted = torch.tensor([[0.6 + 0.4 / 3, 0.4 / 3, 0.4 / 3]])
    expected = -(wanted * logits.log_softmax(1)).sum()
    torch.testing.assert_close(distributed.mean_loss(logits, labels, 1, 1, 0.4), expected)


@pytest.mark.parametrize("opt_name", ["adamw", "sam", "samdirection", "sammagnitude"])
def test_adamw_alone_and_under_sam(tmp_path: Path, opt_name: str) -> None:
    base = "sgd" if opt_name == "adamw" else "adamw"
    config = small(tmp_path, opt_name=opt_name, base=base, lr=0.002, wd=0.01, batch_size=100)
    training = trained(config)
    assert training.history[-1]["train_accuracy"] > 0.5
    if opt_name == "adamw":
        assert type(training.optimizer) is torch.optim.AdamW
        assert training.verification is None
        assert optimizers.backend_names(training.optimizer) == {"cpu float32": "torch.optim.AdamW"}
    else:
        assert type(training.optimizer.base_optimizer) is torch.optim.AdamW
        assert training.verification is not None and training.verification["value"] <= 1e-5


@pytest.mark.parametrize(("precision", "convolutions"), [("fp32", False), ("tf32", True)])
def test_tf32_is_in_convolutions_where_it_is_asked_for(
    tmp_path: Path, precision: str, convolutions: bool
) -> None:
    try:
        run.Training(small(tmp_path, precision=precision))
        assert torch.backends.cudnn.allow_tf32 is convolutions
        assert torch.backends.cuda.matmul.allow_tf32 is False
        devices.set_numerics()
        assert torch.backends.cudnn.allow_tf32 is False
    finally:
        devices.set_numerics()


def test_a_missing_login_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> Any:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    config = small(tmp_path / "run", framework_name="wandb")
    with pytest.raises(ConfigError, match=r"wandb does not start \(No API key.*WANDB_MODE=offline"):
        run.run(config, quiet())
    assert not list(tmp_path.rglob("*.pt"))  # before the first epoch


# CUDA graphs


class Recorder:
    """Stands in for a CUDA graph: what is recorded happens when it is replayed, each time."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, do: Any) -> Any:
        self.recorded += 1

        def again() -> graphs.Outputs:
            self.replayed += 1
            return do()

        return again


@pytest.mark.parametrize("opt_name", OPTIMIZERS)
def test_recorded_steps_are_the_steps(tmp_path: Path, opt_name: str) -> None:
    config = small(tmp_path, opt_name=opt_name, batch_size=60, statistics_every=7)
    torch.manual_seed(0)
    plain = trained(config)
    recorder = Recorder()
    graphed = run.Training(config)
    graphed.graphed = graphs.GraphedStep(graphed._recorded_step, recorder)
    for number in range(1, config.epochs + 1):
        graphed.epoch(number, no_progress(graphed))
    for ours, theirs in zip(graphed.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(graphed.history, plain.history, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    # 17 steps an epoch; eager are the first 5 of all, the last of each epoch, which is smaller, and
    # of the others every 7th, where statistics are taken (7, 14, 21, 28; 0 is among the first 5).
    assert (recorder.recorded, recorder.replayed) == (2, 2 * 17 - 5 - 2 - 4)
    assert graphed.timer.summary()["timed_steps"] == plain.timer.summary()["timed_steps"]


@pytest.mark.parametrize(
    ("keys", "why"), [({}, "device=cpu"), ({"opt_name": "sgdhess"}, "device=cpu|sgdhess")]
)
def test_graphs_are_for_gpus(tmp_path: Path, keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=f"cuda_graph=true does not go with ({why})"):
        run.Training(small(tmp_path, cuda_graph=True, **keys))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("opt_name", OPTIMIZERS)
def test_cuda_graphs_train_as_eager_steps_do(tmp_path: Path, opt_name: str) -> None:
    config = small(tmp_path, opt_name=opt_name, batch_size=60, device="cuda")
    torch.backends.cudnn.deterministic = True
    try:
        eager = trained(config)
        graphed = trained(dataclasses.replace(config, cuda_graph=True))
    finally:
        torch.backends.cudnn.deterministic = False
        torch.cuda.set_stream(torch.cuda.default_stream())
    for ours, theirs in zip(graphed.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
