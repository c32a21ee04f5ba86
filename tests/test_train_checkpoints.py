"""Checkpoints: continuation bit for bit after a kill at any moment; damaged and foreign files."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from train import checkpoint, progress, results, run
from train.config import Config
from train.errors import CheckpointError, DivergedError

ROOT = Path(__file__).parent.parent


def small(folder: Path, **keys: Any) -> Config:
    return Config(
        **{
            "dataset": "digits", "model": "resnet_small", "opt_name": "sammagnitude", "rho": 0.1,
            "epochs": 3, "batch_size": 250, "device": "cpu", "threads": 1, "verify_steps": 6,
            "sharpness_samples": 0, "statistics_every": 2, "output_dir": str(folder), **keys,
        }
    )  # fmt: skip


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def bar(training: run.Training) -> progress.RunProgress:
    return progress.RunProgress(quiet(), "x", training.config.epochs, training.steps_per_epoch)


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, but for durations."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            if key not in ("seconds", "output_dir", "resume"):
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("scheduler", ["cosine", "exponential"])
@pytest.mark.parametrize("opt_name", ["sgd", "sam", "samdirection", "sammagnitude", "sgdhess"])
def test_the_whole_state_continues_bit_for_bit(
    tmp_path: Path, opt_name: str, scheduler: str
) -> None:
    """Six verified steps: the lockstep is under way at the first checkpoint, after four."""
    config = small(tmp_path, opt_name=opt_name, scheduler=scheduler)
    whole = run.Training(config)
    for number in (1, 2, 3):
        whole.epoch(number, bar(whole))

    first = run.Training(config)
    first.epoch(1, bar(first))
    checkpoint.save_checkpoint(tmp_path / "last.pt", first.state())
    torch.manual_seed(99)  # another process has another state
    second = run.Training(config)
    second.load(checkpoint.load_checkpoint(tmp_path / "last.pt", run.RESUMABLE))
    for number in (2, 3):
        second.epoch(number, bar(second))
    assert_same(whole.state(), second.state())
    if opt_name != "sgd":
        assert second.verification is not None and second.verification["steps"] == 6


def test_learning_rates_of_the_schedulers(tmp_path: Path) -> None:
    def rates(**keys: Any) -> list[float]:
        training = run.Training(small(tmp_path, opt_name="sgd", lr=0.2, **keys))
        return [training.epoch(number, bar(training))["lr"] for number in (1, 2, 3)]

    assert rates(scheduler="constant") == pytest.approx([0.2, 0.2, 0.2])
    assert rates(scheduler="exponential", lr_gamma=0.5) == pytest.approx([0.2, 0.1, 0.05])
    assert rates(scheduler="cosine") == pytest.approx([0.2, 0.15, 0.05])


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run.run(small(folder), quiet())
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, whole))
    assert without_times(ours["history"]) == without_times(theirs["history"])
    for name in ("test_accuracy", "test_loss", "best_epoch"):
        assert ours["figures"][name] == theirs["figures"][name]
    assert ours["verification"] == theirs["verification"]
    best = [torch.load(f / "best.pt", weights_only=True)["model"] for f in (folder, whole)]
    assert_same(*best)
    assert not (folder / "last.pt").exists()


# A run with three epochs replaces best.pt and last.pt in each, then writes the tables.
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("file", ["best.pt", "last.pt", "report.md", "result.json"])
def test_death_at_any_file(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, file: str, after: bool
) -> None:
    """The process ends around the replacement of a file, whenever it comes; resumed each time."""
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if Path(target).name != file or Path(target).parent != tmp_path:
            replace(source, target)
            return
        died.append(1)
        if len(died) % 2:  # the next time it gets through
            if after:
                replace(source, target)
            raise KilledError
        replace(source, target)

    died: list[int] = []
    monkeypatch.setattr(results.os, "replace", dying)
    for _ in range(10):
        try:
            run.run(small(tmp_path, resume=True), quiet())
            break
        except KilledError:
            continue
    assert died
    assert_same_run(tmp_path, uninterrupted)


def test_a_killed_process_goes_on(tmp_path: Path, uninterrupted: Path) -> None:
    """SIGKILL, once at a checkpoint and then after ever longer times; the run is the same."""
    config = small(tmp_path, resume=True)
    flags = [f"--{k}={v}" for k, v in vars(config).items()]
    command = [sys.executable, "-m", "train", *flags]
    kills = 0
    for attempt in range(8):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if attempt < 2:
            # The first while the temporary file of a checkpoint is there, or just after.
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                names = os.listdir(tmp_path)
                if any(name.startswith(".last.pt") for name in names) or (
                    attempt == 1 and "last.pt" in names and "best.pt" in names
                ):
                    break
                time.sleep(0.0002)
            process.send_signal(signal.SIGKILL)
        _, error = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
    assert kills >= 1
    assert_same_run(tmp_path, uninterrupted)
    assert not list(tmp_path.glob(".*"))  # nor are half-written files left


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A run that ended after its first epoch; the bytes of last.pt."""
    epoch = run.Training.epoch

    def one(self: run.Training, number: int, bar: Any) -> Any:
        if number == 2:
            raise KilledError
        return epoch(self, number, bar)

    with monkeypatch.context() as patch:
        patch.setattr(run.Training, "epoch", one)
        with pytest.raises(KilledError):
            run.run(small(folder), quiet())
    return (folder / "last.pt").read_bytes()


def test_an_unfinished_run_is_not_lost_by_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = interrupted(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match=r"unfinished run; .*--resume.*--overwrite"):
        run.run(small(tmp_path), quiet())
    with pytest.raises(CheckpointError, match=r"lr=0\.1 there, 0\.2 here"):
        run.run(small(tmp_path, lr=0.2, resume=True), quiet())
    assert (tmp_path / "last.pt").read_bytes() == content
    result = run.run(small(tmp_path, lr=0.2, epochs=1, overwrite=True), quiet())
    assert result["config"]["lr"] == 0.2


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[:-100])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "text":
        path.write_text("no checkpoint")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        torch.save({"state_dict": {}, "epoch": 3}, path)
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "best":
        path.write_bytes(path.with_name("best.pt").read_bytes())
    elif how == "code":
        torch.save(Config(), path)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "damaged"), ("flipped", "damaged"), ("text", "damaged"), ("empty", "damaged"),
        ("code", "damaged"), ("foreign", "no checkpoint of this version"),
        ("list", "no checkpoint of this version"), ("best", "has no optimizer"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_checkpoints_are_said_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, says: str
) -> None:
    interrupted(tmp_path, monkeypatch)
    damage(tmp_path / "last.pt", how)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for keys in ({"resume": True}, {}):
        with pytest.raises(CheckpointError) as caught:
            run.run(small(tmp_path, **keys), quiet())
        message = str(caught.value)
        assert "left as it is" in message and "\n" not in message and "last.pt" in message
        assert not keys or says in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_foreign_result_is_left(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"accuracy": 1}')
    with pytest.raises(CheckpointError, match="no result of a run"):
        run.run(small(tmp_path, resume=True), quiet())
    assert (tmp_path / "result.json").read_text() == '{"accuracy": 1}'


def test_a_complete_run_is_not_taken_again(tmp_path: Path, uninterrupted: Path) -> None:
    before = (uninterrupted / "result.json").stat().st_mtime_ns
    result = run.run(small(uninterrupted, resume=True), quiet())
    assert result == json.loads((uninterrupted / "result.json").read_text())
    assert (uninterrupted / "result.json").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="another configuration"):
        run.run(small(uninterrupted, resume=True, rho=0.3), quiet())


def test_divergence_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = run.train_batches

    def poisoned(dataset: Any, size: int, seed: int, epoch: int, *share: int) -> Any:
        for images, labels in batches(dataset, size, seed, epoch, *share):
            yield images * (float("inf") if epoch == 2 else 1.0), labels

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_batches", poisoned)
        with pytest.raises(DivergedError, match=r"epoch 2, step 1 of 4 .*checkpoint kept"):
            run.run(small(tmp_path, verify_steps=0), quiet())
    kept = checkpoint.load_checkpoint(tmp_path / "last.pt", run.RESUMABLE)
    assert kept["epoch"] == 1
    assert all(value.isfinite().all() for value in kept["model"].values())
    # And the run can go on from it.
    assert len(run.run(small(tmp_path, verify_steps=0, resume=True), quiet())["history"]) == 3
