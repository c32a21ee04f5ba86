"""Runs from end to end, on the digits, a few steps each."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from tests.train_helpers import no_progress, quiet
from train import __main__, study
from train.loop import run, timing
from train.pages import groups
from train.settings.config import Config
from train.shared import devices, progress, results
from train.shared.errors import ConfigError, DivergedError, StorageError, VerificationError

ROOT = Path(__file__).parent.parent
OPTIMIZERS = ("sgd", "sam", "samdirection", "sammagnitude", "sgdhess")
PNG = b"\x89PNG\r\n\x1a\n"


def small(tmp_path: Path, opt_name: str = "sam", **keys: Any) -> Config:
    return Config(
        **{
            "dataset": "digits",
            "model": "resnet_small",
            "opt_name": opt_name,
            "rho": 0.1,
            "epochs": 2,
            "batch_size": 100,  # 10 steps per epoch
            "device": "cpu",
            "verify_steps": 13,
            "sharpness_samples": 32,
            "output_dir": str(tmp_path / opt_name),
            **keys,
        }
    )


@pytest.mark.parametrize("opt_name", OPTIMIZERS)
def test_a_run_learns_and_leaves_its_files(tmp_path: Path, opt_name: str) -> None:
    config = small(tmp_path, opt_name, label_noise=0.2)
    result = run.run(config, quiet())
    figures, folder = result["figures"], config.folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt", "curves.png", "metrics.jsonl", "report.md", "result.json", "sharpness.json"
    ]  # fmt: skip
    assert json.loads((folder / "result.json").read_text()) == result
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    assert f"| 1 | {100 * figures['test_accuracy']:.2f} |" in (folder / "report.md").read_text()
    assert result["versions"]["torch"] == torch.__version__
    assert result["config"]["opt_name"] == opt_name

    history = result["history"]
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["train_accuracy"] > 0.3  # chance is 0.1
    # Half a cosine over the epochs.
    assert [entry["lr"] for entry in history] == pytest.approx([0.1, 0.05])
    # Of 20 steps, the first epoch and the verified steps are not timed.
    assert figures["timed_steps"] == (10 if opt_name == "sgd" else 7)
    assert 0 < figures["ms_per_optimizer_step"] < figures["ms_per_training_step"]
    assert figures["lambda_max"] > 0
    if opt_name == "sgd":
        assert result["verification"] is None
        assert result["backends"] == {"cpu float32": "torch.optim.SGD"}
    else:
        assert result["verification"]["steps"] == 13
        assert result["verification"]["value"] <= 1e-5
        assert list(result["backends"]) == ["cpu float32"]


@pytest.mark.usefixtures("no_pictures")
def test_the_best_checkpoint_is_the_one_tested(tmp_path: Path) -> None:
    config = small(tmp_path, "sgd", epochs=3, lr=1.0)
    result = run.run(config, quiet())
    checkpoint = torch.load(config.folder / "best.pt", weights_only=True)
    accuracies = [entry["val_accuracy"] for entry in result["history"]]
    best = accuracies.index(max(accuracies)) + 1
    assert checkpoint["epoch"] == result["figures"]["best_epoch"] == best
    training = run.Training(config)
    training.model.load_state_dict(checkpoint["model"])
    dataset = training.dataset
    accuracy = training.evaluate(dataset.test)[1]
    assert accuracy == result["figures"]["test_accuracy"]
    assert training.evaluate(dataset.val)[1] == max(accuracies)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    def losses(seed: int) -> list[float]:
        training = run.Training(small(tmp_path, seed=seed, verify_steps=0))
        entry = training.epoch(1, no_progress(training))
        return [entry["train_loss"], entry["val_loss"]]

    first, again, other = losses(0), losses(0), losses(1)
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    "opt_name", ["sammagnitude", pytest.param("sgdhess", marks=pytest.mark.full)]
)
def test_command_line_in_a_process(tmp_path: Path, opt_name: str) -> None:
    """`python -m train` prints lines and a table, no control codes, and no warning."""
    flags = {
        "experiment": "default_sam", "opt_name": opt_name, "rho": "0.2", "wd": "0.001",
        "dataset": "digits", "model": "resnet_small", "epochs": "1", "device": "cpu",
        "threads": "1", "sharpness_samples": "0", "verify_steps": "2",
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "train", *(f"--{k}={v}" for k, v in flags.items())],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{groups.title_of(opt_name)}, rho 0.2" in done.stdout and "accuracy, %" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(tmp_path) not in line)
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    assert (tmp_path / "out" / "result.json").exists()


def test_errors_are_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from torchvision.datasets import CIFAR100

    def download(self: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(CIFAR100, "download", download)
    monkeypatch.setattr(sys, "argv", ["train", f"--data_root={tmp_path}"])
    assert __main__.guarded(__main__.main) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: CIFAR-100 is not in")
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err
    monkeypatch.setattr(sys, "argv", ["train", "--opt_nam=sam"])
    assert __main__.guarded(__main__.main) == 2
    assert "'opt_name'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir=.*cannot be written"):
        run.run(small(tmp_path, output_dir=str(tmp_path / "file" / "out")), quiet())


def test_help_needs_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--help"]) == 0
    assert "--verify_steps=20" in capsys.readouterr().out
    assert study.main(["--help"]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_missing_cuda_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device"):
        devices.pick_device("cuda")


def test_a_wrong_optimizer_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = run.build_optimizer

    def ten_times_rho(
        params: Any, config: Config, backend: str | None = None, **others: Any
    ) -> Any:
        rho = config.rho if backend == "reference" else 10 * config.rho
        return right(params, Config(**{**vars(config), "rho": rho}), backend, **others)

    monkeypatch.setattr(run, "build_optimizer", ten_times_rho)
    config = small(tmp_path)
    with pytest.raises(VerificationError, match="step 1: after the perturbation"):
        run.run(config, quiet())
    assert VerificationError.exit_code == 1
    assert not config.folder.exists()  # it was made for the run, and has nothing


def test_a_non_finite_loss_stops_the_run_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = run.train_batches

    def poisoned(dataset: Any, batch_size: int, seed: int, epoch: int, *share: int) -> Any:
        whole = batches(dataset, batch_size, seed, epoch, *share)
        for step, (images, labels) in enumerate(whole, 1):
            yield images * (float("nan") if (epoch, step) == (2, 4) else 1.0), labels

    monkeypatch.setattr(run, "train_batches", poisoned)
    config = small(tmp_path, "sgd")
    with pytest.raises(DivergedError, match="first pass is not finite in epoch 2, step 4 of 10"):
        run.run(config, quiet())
    # The last good checkpoint stays.
    assert torch.load(config.folder / "best.pt", weights_only=True)["epoch"] == 1


def test_a_non_finite_second_pass_is_said(tmp_path: Path) -> None:
    training = run.Training(small(tmp_path, verify_steps=0))
    first_step = training.optimizer.first_step

    def broken() -> bool:
        training.model.register_forward_hook(lambda _m, _i, logits: logits * float("nan"))
        return bool(first_step())

    training.optimizer.first_step = broken
    with pytest.raises(DivergedError, match="second pass is not finite in epoch 1, step 1 of 10"):
        training.epoch(1, no_progress(training))


def test_weights_ruined_by_the_last_update_do_not_become_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = run.sgd_step

    def ruin(forward: Any, optimizer: Any, *rest: Any) -> Any:
        taken = take(forward, optimizer, *rest)
        with torch.no_grad():
            optimizer.param_groups[0]["params"][-1].fill_(float("nan"))
        return taken

    monkeypatch.setattr(run, "sgd_step", ruin)
    config = small(tmp_path, "sgd", batch_size=1000)  # one step per epoch
    with pytest.raises(DivergedError, match="validation loss is not finite after epoch 1"):
        run.run(config, quiet())
    assert [path.name for path in config.folder.iterdir()] == ["diverged.json"]


def test_the_twin_is_let_go_when_it_has_served(tmp_path: Path) -> None:
    training = run.Training(small(tmp_path, verify_steps=3))
    assert training.lockstep is not None
    training.epoch(1, no_progress(training))
    assert training.lockstep is None
    assert training.verification is not None and training.verification["steps"] == 3


def test_statistics_move_in_the_first_pass_only(tmp_path: Path) -> None:
    training = run.Training(small(tmp_path))
    twin = run.Training(small(tmp_path))
    images, labels = next(run.train_batches(training.dataset, 100, 0, 1))
    training.take_step(images, labels, 100, False, [])
    twin.model(images)
    buffers = dict(twin.model.named_buffers())
    assert buffers
    for name, value in training.model.named_buffers():
        assert torch.equal(value, buffers[name])


def test_weights_are_restored_when_the_second_pass_fails(tmp_path: Path) -> None:
    training = run.Training(small(tmp_path))
    images, labels = next(run.train_batches(training.dataset, 100, 0, 1))
    before = [p.detach().clone() for p in training.model.parameters()]
    calls: list[int] = []

    def fail_second(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    training.model.register_forward_pre_hook(fail_second)
    with pytest.raises(MemoryError):
        training.take_step(images, labels, 100, False, [])
    pairs = zip(training.model.parameters(), before, strict=True)
    assert all(torch.equal(p, old) for p, old in pairs)


def test_timer_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10, 20 and 60 s with an optimizer's share of two spans; one is not counted."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    timer = timing.StepTimer(torch.device("cpu"))
    for seconds, counted in ((1000.0, False), (10.0, True), (60.0, True), (20.0, True)):
        with timer.step(counted):
            for _ in range(2):
                with timer.optimizer():
                    clock[0] += seconds / 5
            clock[0] += seconds * 3 / 5
    assert timer.summary() == {
        "ms_per_optimizer_step": pytest.approx(8e3),
        "ms_per_training_step": pytest.approx(20e3),
        "timed_steps": 3,
    }
    assert timing.StepTimer(torch.device("cpu")).summary()["ms_per_training_step"] is None


def test_progress_on_a_terminal_and_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    outputs = []
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        with progress.RunProgress(console, "sam", epochs=2, steps_per_epoch=10) as bar:
            for done in range(1, 21):
                clock[0] += 3.0
                bar.update(done, 1, 0.5, 0.25, 0.75, 1234.0)
        outputs.append(console.file.getvalue())  # type: ignore[attr-defined]
    for output in outputs:
        assert "loss 0.500 acc 25.0% val 75.0% 1234/s" in output
    # Every 10 s at steps of 3 s: the 4th, 8th, ..., 20th.
    assert "\x1b" in outputs[0] and "\x1b" not in outputs[1]
    assert outputs[1].count("\n") == 5
    assert "48 s left" in outputs[1]  # after 4 of 20 steps in 12 s


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "result.json"
    results.write_json(path, {"x": float("nan"), "y": [1.5, float("inf")]})
    assert json.loads(path.read_text()) == {"x": None, "y": [1.5, None]}

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(StorageError, match=r"result.json' could not be written \(disk full\)"):
        results.write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"x": None, "y": [1.5, None]}
    assert list(path.parent.iterdir()) == [path]


def test_last_batch_of_one_image_is_refused(tmp_path: Path) -> None:
    # 1000 = 27 * 37 + 1
    config = Config(dataset="digits", model="resnet_small", batch_size=27, output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="batch_size=27 leaves a last batch of one image"):
        run.Training(config)
    # 13 = 3 * 4 + 1
    config = dataclasses.replace(config, batch_size=3, train_samples=13)
    with pytest.raises(ConfigError, match=r"batch_size=3 leaves .*nearest 5$"):
        run.Training(config)
    # With one image there is no batch size that would do.
    config = dataclasses.replace(config, train_samples=1)
    with pytest.raises(ConfigError, match=r"train_samples=1 leaves 1 image.*allowed 0 .* 2$"):
        run.Training(config)


@pytest.mark.parametrize("best", [1, 3])
def test_the_test_images_are_looked_at_once_for_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    evaluate, tested = run.Training.evaluate, []

    def counting(self: run.Training, split: Any, *others: Any) -> tuple[float, ...]:
        found = evaluate(self, split, *others)
        if split is self.dataset.test:
            tested.append(found[1])
            return found
        return (found[0], 1.0 if len(self.history) + 1 == best else 0.5)

    monkeypatch.setattr(run.Training, "evaluate", counting)
    figures = run.run(small(tmp_path, "sgd", epochs=3, sharpness_samples=0), quiet())["figures"]
    assert figures["best_epoch"] == best and len(tested) == (1 if best == 3 else 2)
    assert (figures["last_test_accuracy"], figures["test_accuracy"]) == (tested[0], tested[-1])


SETTINGS = {
    "sharpness_samples": 100, "trace_vectors": 2, "density_steps": 0, "sharpness_batches": 0,
    "sharpness_batch_size": 256,
}  # fmt: skip


@pytest.mark.parametrize("images", [100, 200])
def test_later_measurements_keep_the_earlier_ones(images: int) -> None:
    earlier = {
        "sharpness": 7.0, "eigenvalues": [[7.0]], "lambda_max": 5.0, "lambda_min": None,
        "trace": 3.0, "trace_error": 1, "density": None,
        "settings": {**SETTINGS, "sharpness_batches": 1},
    }  # fmt: skip
    found = {
        **dict.fromkeys(earlier), "lambda_max": 5.5, "density": "new",
        "settings": {
            **SETTINGS, "sharpness_samples": images, "trace_vectors": 0, "density_steps": 9,
        },
    }  # fmt: skip
    both = run._with_earlier(found, earlier, batches=False, samples=True)
    assert (both["sharpness"], both["eigenvalues"]) == (7.0, [[7.0]])
    assert (both["lambda_max"], both["density"]) == (5.5, "new")
    settings = both["settings"]
    assert (settings["sharpness_batches"], settings["density_steps"]) == (1, 9)
    # The trace is that of other images, or is kept.
    kept = (3.0, 2) if images == 100 else (None, 0)
    assert (both["trace"], settings["trace_vectors"]) == kept

    asked = {**SETTINGS, "sharpness_batches": 3, "sharpness_samples": 0, "trace_vectors": 0}
    found = {**dict.fromkeys(earlier), "sharpness": 8.0, "settings": asked}
    both = run._with_earlier(found, earlier, batches=True, samples=False)
    assert (both["sharpness"], both["lambda_max"], both["trace"]) == (8.0, 5.0, 3.0)
    assert both["settings"] == {**SETTINGS, "sharpness_batches": 3}
