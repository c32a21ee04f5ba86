"""Options of a run: precision, memory format, compilation, trackers, statistics."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from train import graphs, progress, run, trackers
from train.config import Config
from train.errors import ConfigError
from train.models import MODELS

OPTIMIZERS = ("sgd", "sam", "samdirection", "sammagnitude", "sgdhess")


def small(folder: Path, **keys: Any) -> Config:
    return Config(
        **{
            "dataset": "digits", "model": "resnet_small", "opt_name": "sam", "rho": 0.1,
            "epochs": 2, "batch_size": 250, "device": "cpu", "verify_steps": 2,
            "sharpness_samples": 0, "output_dir": str(folder), **keys,
        }
    )  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def trained(config: Config) -> run.Training:
    training = run.Training(config)
    bar = progress.RunProgress(quiet(), "x", config.epochs, training.steps_per_epoch)
    for number in range(1, config.epochs + 1):
        training.epoch(number, bar)
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
    training._step(images, labels, 250, False, [])
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


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"resnet101", "resnet152"}))
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

    def watch_first() -> None:
        weights.append(flat(training.model.parameters()))
        first.append(flat(p.grad for p in training.model.parameters()))
        first_step()

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
    entry = training.epoch(1, progress.RunProgress(quiet(), "x", 1, training.steps_per_epoch))
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

    config = small(tmp_path, framework_name="tensorboard", statistics_every=1)
    result = run.run(config, quiet())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("train_loss", "val_accuracy", "lr", *run.STATISTICS):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(entry["epoch"], entry[name]) for entry in result["history"]]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to the library, and that a resumed run has the same id."""
    wandb = pytest.importorskip("wandb")
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finished")

    def init(**keys: Any) -> Run:
        calls.append(keys)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    config = small(tmp_path, framework_name="wandb")
    for epoch in (0, 1):
        tracker = trackers.make_tracker(config, tmp_path, epoch)
        tracker.log(epoch + 1, {"train_loss": 0.5})
        tracker.close()
    first, second = (call for call in calls if isinstance(call, dict))
    assert first["id"] == second["id"] and first["project"] == "samkernels"
    assert first["config"]["rho"] == 0.1 and first["dir"] == str(tmp_path)
    assert [call for call in calls if isinstance(call, tuple)] == [
        (1, {"train_loss": 0.5}),
        (2, {"train_loss": 0.5}),
    ]
    assert calls.count("finished") == 2


def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'wandb'")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", missing)
    with pytest.raises(ConfigError, match=r"framework_name=wandb needs .*\[tracking\]"):
        trackers.make_tracker(small(tmp_path, framework_name="wandb"), tmp_path, 0)


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
    bar = progress.RunProgress(quiet(), "x", config.epochs, graphed.steps_per_epoch)
    for number in range(1, config.epochs + 1):
        graphed.epoch(number, bar)
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
