"""Checkpoints: continuation bit for bit after a kill at any moment; damaged and foreign files."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_helpers import no_progress, quiet
from train.loop import checkpoint, run
from train.settings.config import Config
from train.shared import results
from train.shared.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    InUseError,
    NumericsError,
    StorageError,
    TerminatedError,
)

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("no_pictures")


def small(folder: Path, **keys: Any) -> Config:
    return Config(
        **{
            "dataset": "digits", "model": "resnet_small", "opt_name": "sammagnitude", "rho": 0.1,
            "epochs": 3, "batch_size": 250, "device": "cpu", "threads": 1, "verify_steps": 6,
            "sharpness_samples": 0, "statistics_every": 2, "label_noise": 0.2,
            "output_dir": str(folder), **keys,
        }
    )  # fmt: skip


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, but for durations."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            if key not in ("seconds", "output_dir", "resume", "id"):
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("scheduler", ["cosine", "exponential"])
@pytest.mark.parametrize(
    "opt_name",
    ["sgd", "sam", "samdirection", "sammagnitude", "sgdhess", "looksam", "vasso", "msam"],
)
def test_the_whole_state_continues_bit_for_bit(
    tmp_path: Path, opt_name: str, scheduler: str
) -> None:
    """Six verified steps: the lockstep is under way at the first checkpoint, after four."""
    config = small(tmp_path, opt_name=opt_name, scheduler=scheduler, k=3, lr=0.05)
    whole = run.Training(config)
    for number in (1, 2, 3):
        whole.epoch(number, no_progress(whole))

    first = run.Training(config)
    first.epoch(1, no_progress(first))
    checkpoint.save_checkpoint(tmp_path / "last.pt", first.state())
    torch.manual_seed(99)  # another process has another state
    second = run.Training(config)
    second.load(checkpoint.load_checkpoint(tmp_path / "last.pt", run.RESUMABLE))
    for number in (2, 3):
        second.epoch(number, no_progress(second))
    assert_same(whole.state(), second.state())
    if opt_name != "sgd":
        assert second.verification is not None and second.verification["steps"] == 6


def test_learning_rates_of_the_schedulers(tmp_path: Path) -> None:
    def rates(**keys: Any) -> list[float]:
        training = run.Training(small(tmp_path, opt_name="sgd", lr=0.2, **keys))
        return [training.epoch(number, no_progress(training))["lr"] for number in (1, 2, 3)]

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


@pytest.fixture(scope="module")
def after_one_epoch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended after its first epoch."""
    folder = tmp_path_factory.mktemp("unfinished")
    epoch = run.Training.epoch

    def one(self: run.Training, number: int, *rest: Any) -> Any:
        if number == 2:
            raise KilledError
        return epoch(self, number, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Training, "epoch", one)
        with pytest.raises(KilledError):
            run.run(small(folder), quiet())
    return folder


@pytest.fixture
def unfinished(after_one_epoch: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(after_one_epoch, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def replacement(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of another run, which was not interrupted either."""
    return run.run(small(tmp_path_factory.mktemp("replacement"), lr=0.2), quiet())


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


@pytest.mark.full
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


def test_an_unfinished_run_is_not_lost_by_mistake(unfinished: Path) -> None:
    content = (unfinished / "last.pt").read_bytes()
    with pytest.raises(CheckpointError, match=r"unfinished run; .*--resume.*--overwrite"):
        run.run(small(unfinished), quiet())
    with pytest.raises(CheckpointError, match=r"lr=0\.1 there, 0\.2 here"):
        run.run(small(unfinished, lr=0.2, resume=True), quiet())
    assert (unfinished / "last.pt").read_bytes() == content
    result = run.run(small(unfinished, lr=0.2, epochs=1, overwrite=True), quiet())
    assert result["config"]["lr"] == 0.2
    # best.pt alone is somebody's as well.
    (unfinished / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"without last.pt or result.json; .*--overwrite"):
        run.run(small(unfinished, resume=True), quiet())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_run_is_not_lost_either(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"of a finished run; .*--resume.*--overwrite"):
        run.run(small(tmp_path, lr=0.2), quiet())
    assert contents(tmp_path) == before
    # Nor when the run that is to replace it comes to nothing.
    replacing = small(tmp_path, lr=0.2, overwrite=True)
    epoch = run.Training.epoch

    def failing(self: run.Training, number: int, *rest: Any) -> Any:
        raise KilledError

    monkeypatch.setattr(run.Training, "epoch", failing)
    with pytest.raises(KilledError):
        run.run(replacing, quiet())
    assert contents(tmp_path) == before
    monkeypatch.setattr(run.Training, "epoch", epoch)


@pytest.mark.parametrize("file", ["last.pt", "best.pt"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_death_while_a_finished_run_is_replaced(
    tmp_path: Path,
    uninterrupted: Path,
    replacement: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    after: bool,
) -> None:
    """Before the new run's first checkpoint the old one is whole; from then on, the new one is."""
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    measured = {"settings": {"sharpness_samples": 16}, "lambda_max": -1.0}
    (tmp_path / "sharpness.json").write_text(json.dumps(measured))
    replace = os.replace

    def dying(source: Any, target: Any) -> None:
        if Path(target).name == file and not after:
            raise KilledError
        replace(source, target)
        if Path(target).name == file:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "replace", dying)
        with pytest.raises(KilledError):
            run.run(small(tmp_path, lr=0.2, overwrite=True), quiet())
    if file == "last.pt" and not after:
        assert_same_run(tmp_path, uninterrupted)
        return
    # The old result may still lie there: it is not taken for the new one's.
    result = run.run(small(tmp_path, lr=0.2, resume=True, sharpness_samples=16), quiet())
    assert result["config"]["lr"] == 0.2 and len(result["history"]) == 3
    assert result["figures"]["lambda_max"] > 0  # its own
    assert without_times(result["history"]) == without_times(replacement["history"])
    assert result["figures"]["test_accuracy"] == replacement["figures"]["test_accuracy"]


def test_a_folder_is_for_one_process(tmp_path: Path, uninterrupted: Path) -> None:
    """Held by another process: refused, with its number; when that is killed, it is free."""
    code = (
        "import sys, time; from pathlib import Path; from train.loop.checkpoint import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    shutil.copytree(uninterrupted, tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE,
        text=True,
    ) as other:  # fmt: skip
        try:
            assert other.stdout is not None and other.stdout.readline() == "locked\n"
            before = contents(tmp_path / "run")
            for keys in ({"resume": True}, {"overwrite": True, "lr": 0.2}):
                with pytest.raises(InUseError, match=f"in use by process {other.pid} on"):
                    run.run(small(tmp_path / "run", **keys), quiet())
            assert contents(tmp_path / "run") == before
        finally:
            other.kill()
    assert run.run(small(tmp_path / "run", resume=True), quiet())["name"] == "sammagnitude-rho0.1"
    assert not list((tmp_path / "run").glob(".*"))


# -- interrupted -----------------------------------------------------------------------------------


def terminated_at(
    monkeypatch: pytest.MonkeyPatch, config: Config, step: int, number: int = signal.SIGTERM
) -> BaseException:
    """Run, and be sent the signal in the step; what the run ended with."""
    take = run.Training.take_step

    def signalled(self: run.Training, *arguments: Any) -> Any:
        if self.done == step:
            signal.raise_signal(number)
        return take(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run.Training, "take_step", signalled)
        # A shell has what it starts in the background ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises((TerminatedError, KeyboardInterrupt)) as caught:
                run.run(config, quiet())
        finally:
            signal.signal(signal.SIGINT, before)
    return caught.value


@pytest.mark.parametrize("step", [0, 1, 3, 5, 11])
def test_sigterm_saves_within_the_epoch_and_resumes_bit_for_bit(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Four steps an epoch, three epochs; six steps in lockstep, statistics at every second."""
    before = signal.getsignal(signal.SIGTERM)
    error = terminated_at(monkeypatch, small(tmp_path), step)
    assert isinstance(error, TerminatedError) and error.exit_code == 75
    assert "--resume" in str(error) and signal.getsignal(signal.SIGTERM) is before
    if step < 11:
        state = checkpoint.load_checkpoint(tmp_path / "last.pt", run.RESUMABLE)
        assert state["done"] == step + 1
        assert (state["partial"] is None) == (step % 4 == 3)
        torch.manual_seed(99)
    run.run(small(tmp_path, resume=True), quiet())
    assert_same_run(tmp_path, uninterrupted)


def test_sigterm_from_outside(tmp_path: Path) -> None:
    """`python -m train` in a process; the exit code is what queues start again upon."""
    flags = [f"--{k}={v}" for k, v in vars(small(tmp_path / "run", epochs=500)).items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *flags], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "best.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error.count("\n")) == (75, 1), error
    assert error.startswith("error: ended by SIGTERM") and "--resume" in error
    assert checkpoint.load_checkpoint(tmp_path / "run" / "last.pt", run.RESUMABLE)["done"] > 0
    assert not (tmp_path / "run" / ".lock").exists()


def test_ctrl_c_names_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = terminated_at(monkeypatch, small(tmp_path / "a"), 2, signal.SIGINT)
    assert isinstance(error, KeyboardInterrupt) and str(error) == "nothing was saved yet"
    assert not (tmp_path / "a").exists()
    error = terminated_at(monkeypatch, small(tmp_path / "b"), 6, signal.SIGINT)
    assert "--resume goes on from the last checkpoint" in str(error) and "last.pt" in str(error)


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of the second last.pt fails as it does on a full disk, and is said as such."""
    fsync, count = os.fsync, [0]

    def full(file: int) -> None:
        if "last.pt" in os.readlink(f"/proc/self/fd/{file}"):
            count[0] += 1
            if count[0] == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left on device.*--resume") as caught:
            run.run(small(tmp_path), quiet())
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert checkpoint.load_checkpoint(tmp_path / "last.pt", run.RESUMABLE)["epoch"] == 1
    assert not list(tmp_path.glob(".*"))
    run.run(small(tmp_path, resume=True), quiet())
    assert_same_run(tmp_path, uninterrupted)


# -- what is measured ------------------------------------------------------------------------------


def test_the_result_comes_before_what_is_measured(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens while the sharpness is measured, the training is not lost; and what is
    measured may be another thing when the run is resumed."""
    measured: list[tuple[int, int]] = []
    measure = run.measure

    def counting(model: Any, dataset: Any, config: Config, console: Any) -> Any:
        measured.append((config.sharpness_batches, config.sharpness_samples))
        if len(measured) == 1:
            raise NumericsError("no eigenvalues")
        return measure(model, dataset, config, console)

    monkeypatch.setattr(run, "measure", counting)
    keys = {"sharpness_samples": 16, "statistics_every": 2}
    with pytest.raises(NumericsError):
        run.run(small(tmp_path, **keys), quiet())
    assert_same_run(tmp_path, uninterrupted)
    assert json.loads((tmp_path / "result.json").read_text())["figures"]["lambda_max"] is None
    result = run.run(small(tmp_path, resume=True, **keys), quiet())
    assert result["figures"]["lambda_max"] > 0 and "SAMMagnitude" in (
        tmp_path / "report.md").read_text()  # fmt: skip
    # All there: nothing to do, though other keys that only measure differ.
    run.run(small(tmp_path, resume=True, **{**keys, "statistics_every": 1}), quiet())
    assert measured == [(0, 16), (0, 16)]
    # More is asked for: only that is measured, and the rest is kept.
    more = {**keys, "sharpness_batches": 1, "sharpness_batch_size": 32, "verify_steps": 0}
    both = run.run(small(tmp_path, resume=True, **more), quiet())
    assert measured[2:] == [(1, 0)]
    assert both["figures"]["lambda_max"] == result["figures"]["lambda_max"]
    assert both["figures"]["sharpness"] > 0 and both["verification"]["steps"] == 6
    kept = json.loads((tmp_path / "sharpness.json").read_text())
    assert kept["lambda_max"] == result["figures"]["lambda_max"]
    assert kept["settings"]["sharpness_samples"] == 16
    assert kept["settings"]["sharpness_batches"] == 1
    assert_same_run(tmp_path, uninterrupted)


def test_what_train_sharpness_measured_stands(tmp_path: Path) -> None:
    """It is not replaced by what the run asked for in the first place."""
    run.run(small(tmp_path, sharpness_samples=16), quiet())
    content = json.loads((tmp_path / "sharpness.json").read_text())
    content["settings"]["sharpness_samples"], content["lambda_max"] = 64, 1.5
    (tmp_path / "sharpness.json").write_text(json.dumps(content))
    run.run(small(tmp_path, sharpness_samples=16, resume=True), quiet())
    assert json.loads((tmp_path / "sharpness.json").read_text()) == content


@pytest.mark.parametrize("verify_steps", [0, 2, 5, 9])
def test_keys_that_measure_do_not_stop_a_resume(
    unfinished: Path, uninterrupted: Path, verify_steps: int
) -> None:
    """Interrupted after four of six steps in lockstep, then resumed with another number of them."""
    run.run(small(unfinished, resume=True, verify_steps=verify_steps, statistics_every=2), quiet())
    ours, theirs = (
        json.loads((f / "result.json").read_text()) for f in (unfinished, uninterrupted)
    )
    assert without_times(ours["history"]) == without_times(theirs["history"])
    assert ours["verification"]["steps"] == max(4, verify_steps)


def test_too_large_a_batch_for_the_sharpness_is_said_before_the_first_epoch(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"sharpness_batch_size=1001.*nearest 1000"):
        run.run(small(tmp_path / "a", sharpness_batches=1, sharpness_batch_size=1001), quiet())
    assert not (tmp_path / "a").exists()


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
    unfinished: Path, how: str, says: str
) -> None:
    damage(unfinished / "last.pt", how)
    before = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    for keys in ({"resume": True}, {}):
        with pytest.raises(CheckpointError) as caught:
            run.run(small(unfinished, **keys), quiet())
        message = str(caught.value)
        assert "left as it is" in message and "\n" not in message and "last.pt" in message
        assert not keys or says in message
    assert {path.name: path.read_bytes() for path in unfinished.iterdir()} == before


def test_a_foreign_result_is_left(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"accuracy": 1}')
    with pytest.raises(CheckpointError, match="no result of a run"):
        run.run(small(tmp_path, resume=True), quiet())
    assert (tmp_path / "result.json").read_text() == '{"accuracy": 1}'


def test_a_complete_run_is_not_taken_again(uninterrupted: Path) -> None:
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


def test_weights_that_stay_perturbed_are_tested_and_saved_at_w(tmp_path: Path) -> None:
    """Of MSAM: w is what a plain SGD would have stepped from, and best.pt has it."""
    config = small(tmp_path, opt_name="msam", epochs=2, verify_steps=0)
    training = run.Training(config)
    entry = training.epoch(1, no_progress(training))
    moved = [p.detach().clone() for p in training.model.parameters()]
    saved = training.state()["model"]
    pairs = list(zip(training.model.named_parameters(), moved, strict=True))
    assert all(torch.equal(p, before) for (_, p), before in pairs)
    assert not any(torch.equal(saved[name], p) for (name, p), _ in pairs if p.ndim > 1)
    with training.optimizer.unperturbed():
        assert all(torch.equal(saved[name], p) for (name, p), _ in pairs)

    alone = run.Training(config)
    alone.take_weights(saved)
    loss, accuracy = alone.evaluate(alone.dataset.val)
    assert (loss, accuracy) == (entry["val_loss"], entry["val_accuracy"])

    result = run.run(config, quiet())
    alone.take_weights(torch.load(tmp_path / "best.pt", weights_only=True)["model"])
    loss, accuracy = alone.evaluate(alone.dataset.test)
    figures = result["figures"]
    assert (loss, accuracy) == (figures["test_loss"], figures["test_accuracy"])
