"""Studies and reports."""

import csv
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from train import report, run, study
from train.config import Config
from train.errors import CheckpointError, ConfigError, DataError, DivergedError

PNG = b"\x89PNG\r\n\x1a\n"
QUICK = [
    "--epochs=1", "--sharpness_samples=0", "--sharpness_batches=0", "--verify_steps=3",
    "--batch_size=100", "--threads=1", "--device=cpu",
]  # fmt: skip


def counted_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are really trained."""
    taken: list[str] = []
    right = run.Training

    class Counted(right):  # type: ignore[valid-type, misc]
        def __init__(self, config: Config, *rest: Any) -> None:
            taken.append(config.folder.name)
            super().__init__(config, *rest)

    monkeypatch.setattr(run, "Training", Counted)
    return taken


def test_quickstart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = counted_runs(monkeypatch)
    assert study.main(["quickstart", *QUICK, f"--output_dir={tmp_path}"]) == 0
    names = ["sgd", "sam-rho0.1", "samdirection-rho0.1", "sammagnitude-rho0.1"]
    assert taken == [f"resnet_small-{name}-seed0" for name in names]
    output = capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    for name in names:
        assert f"| small ResNet | {name} | 1 |" in text and name in output
        result = json.loads((tmp_path / f"resnet_small-{name}-seed0/result.json").read_text())
        assert result["config"]["label_noise"] == 0.2
        assert result["figures"]["sharpness"] is None
    for kind in ("curves", "magnitudes", "norms"):
        path = tmp_path / f"{kind}-digits-noise0.2-resnet_small.png"
        assert path.read_bytes().startswith(PNG) and f"({path.name})" in text

    # Again: nothing is left to do. With another seed: only that.
    assert study.main(["quickstart", *QUICK, f"--output_dir={tmp_path}"]) == 0
    assert len(taken) == 4 and capsys.readouterr().out.count("done already") == 4
    again = [*QUICK, f"--output_dir={tmp_path}", "--seed=0,1", "--opt_name=sam"]
    assert study.main(["quickstart", *again]) == 0
    assert taken[4:] == ["resnet_small-sam-rho0.1-seed1"]
    assert "| small ResNet | sam-rho0.1 | 2 |" in (tmp_path / "report.md").read_text()
    # Another configuration in the same folder is no continuation.
    assert study.main(["quickstart", *QUICK, f"--output_dir={tmp_path}", "--lr=0.2"]) == 1
    assert "lr=0.1 there, 0.2 here" in capsys.readouterr().err


def test_an_interrupted_study_goes_on_within_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["quickstart", *QUICK, "--epochs=2", f"--output_dir={tmp_path}", "--opt_name=sgd,sam"]
    epoch, numbers = run.Training.epoch, []

    def interrupting(self: run.Training, number: int, bar: Any) -> Any:
        numbers.append((self.config.opt_name, number))
        if len(numbers) == 4:
            raise KeyboardInterrupt
        return epoch(self, number, bar)

    monkeypatch.setattr(run.Training, "epoch", interrupting)
    with pytest.raises(KeyboardInterrupt):
        study.main(flags)
    assert study.main(flags) == 0
    assert numbers == [("sgd", 1), ("sgd", 2), ("sam", 1), ("sam", 2), ("sam", 2)]


def test_shards_are_a_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted_runs(monkeypatch)
    for index in (2, 0, 1):
        flags = [*QUICK, f"--output_dir={tmp_path}", f"--shard={index}/3"]
        assert study.main(["quickstart", *flags]) == 0
    assert len(taken) == len(set(taken)) == 4
    assert "- runs: 4" in (tmp_path / "report.md").read_text()


def test_one_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch = run.Training.epoch

    def diverging(self: run.Training, number: int, bar: Any) -> Any:
        if self.config.opt_name == "sam":
            raise DivergedError("the loss is not finite")
        return epoch(self, number, bar)

    monkeypatch.setattr(run.Training, "epoch", diverging)
    assert study.main(["quickstart", *QUICK, f"--output_dir={tmp_path}"]) == 1
    captured = capsys.readouterr()
    assert "sam-rho0.1-seed0: the loss is not finite" in captured.err
    assert "- runs: 3" in (tmp_path / "report.md").read_text()


def test_a_cell_of_sgdhess(tmp_path: Path) -> None:
    """The grid of the report's table, on the digits with a small network, at one of its radii."""
    flags = [*QUICK, "--dataset=digits", "--model=resnet_small", "--opt_name=sgdhess", "--rho=1"]
    assert study.main(["cifar100-sgdhess", *flags, f"--output_dir={tmp_path}"]) == 0
    (folder,) = tmp_path.glob("*sgdhess*")
    result = json.loads((folder / "result.json").read_text())
    assert result["name"] == "sgdhess-rho1"
    assert result["verification"]["steps"] == 3 and result["verification"]["value"] <= 1e-5
    assert "| small ResNet | sgdhess-rho1 | 1 |" in (tmp_path / "report.md").read_text()


def test_sgdhess_has_a_cost_of_its_own() -> None:
    sgd, hess = Config(epochs=1), Config(epochs=1, opt_name="sgdhess")
    assert study.time_left([(sgd, 10.0), (hess, 40.0)], [hess]) == 40.0


def test_missing_data_stops_the_study_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(config: Config, device: torch.device) -> Any:
        calls.append(1)
        raise DataError("no data")

    calls: list[int] = []
    monkeypatch.setattr(run, "load_dataset", missing)
    with pytest.raises(DataError):
        study.main(["cifar100-all", f"--output_dir={tmp_path}"])
    assert len(calls) == 1


def test_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--shard=I/N"):
        study.main(["quickstart"])


def test_time_left() -> None:
    sgd, sam = Config(epochs=10), Config(epochs=10, opt_name="sam")
    big = Config(epochs=10, model="wrn28_10", opt_name="sam")
    assert study.time_left([], [sgd]) is None
    spent = [(sgd, 10.0), (sam, 20.0), (sam, 22.0)]
    assert study.time_left(spent, [sgd, dataclasses.replace(sam, epochs=20)]) == 10.0 + 42.0
    assert study.time_left(spent, [big]) == pytest.approx((10 + 20 + 22) / 3)


# -- reports ---------------------------------------------------------------------------------------


def write_run(root: Path, accuracy: float, sharpness: float | None = None, **keys: Any) -> Path:
    """The files of a run, with given figures."""
    config = Config(**{"sharpness_batches": 40, **keys})
    folder = root / f"{config.dataset}-{config.model}-{config.run_name}-seed{config.seed}"
    folder.mkdir(parents=True)
    figures = {
        "test_accuracy": accuracy, "sharpness": sharpness, "lambda_max": 5.0, "best_epoch": 2,
        "ms_per_optimizer_step": 1.0, "seconds_per_epoch": 3.0,
    }  # fmt: skip
    history = [
        {"epoch": e, "train_loss": math.exp(-e), "val_accuracy": 0.1 * e,
         "share_second_larger": 0.6, "share_signs_agree": 0.9}
        for e in (1, 2, 3)
    ]  # fmt: skip
    result = {
        "name": config.run_name, "config": dataclasses.asdict(config), "figures": figures,
        "history": history, "versions": {"torch": "2"}, "device": "CPU", "backends": {"cpu": "x"},
        "verification": None,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def table_of(text: str, title: str) -> list[list[str]]:
    block = text.split(f"## {title}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]


def test_the_tables_of_the_report(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.79, 0.80, 0.81)):
        write_run(tmp_path, accuracy, 70.0 + seed, opt_name="sam", rho=0.1, seed=seed)
    write_run(tmp_path, 0.8123, model="resnet50", opt_name="samdirection", rho=0.2)
    write_run(tmp_path, 0.77, 200.0)
    write_run(tmp_path, 0.5, model="resnet101", opt_name="sam", rho=0.4)
    # Not comparable: another granularity, another data set.
    write_run(tmp_path, 0.11, opt_name="sammagnitude", rho=0.1, granularity="global")
    write_run(tmp_path, 0.93, dataset="fashion", opt_name="sammagnitude", rho=0.1)
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()

    accuracy = table_of(text, "CIFAR-100 accuracy, %: ours (published)")
    assert ["ResNet-18", "SAM", "80.00 ± 1.00 (79.24)", "- (79.54)", "- (79.44)"] in accuracy
    assert ["ResNet-18", "SAMMagnitude", "- (78.73)", "- (79.23)", "- (77.94)"] in accuracy
    assert ["ResNet-50", "SAMDirection", "- (??)", "81.23 (??)", "- (80.34)"] in accuracy
    assert ["ResNet-101", "SAM", "-", "-", "50.00"] in accuracy
    assert len(accuracy) == 2 + 5 * 3
    sharpness = table_of(text, "CIFAR-100 sharpness: ours (published)")
    assert ["ResNet-18", "SAM", "71.00 ± 1.00 (71.04)", "- (56.53)", "- (52.23)"] in sharpness
    singles = table_of(text, "SGD and SGDHess: ours (published)")
    assert ["SGD", "77.00 (77.36)", "200.00 (207.06)"] in singles
    assert ["SGDHess rho 2", "- (75.96)", "- (138.62)"] in singles
    everything = table_of(text, "All runs")
    assert len(everything) == 2 + 6
    assert any(row[2:5] == ["sammagnitude-rho0.1-global", "1", "11.00"] for row in everything)
    assert "Not the protocol" not in text

    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(float(row["test_accuracy"]) for row in rows) == [
        0.11, 0.5, 0.77, 0.79, 0.80, 0.81, 0.8123, 0.93
    ]  # fmt: skip
    tables = (tmp_path / "tables.csv").read_text()
    assert "ResNet-18,SAM,80.00 ± 1.00 (79.24),- (79.54),- (79.44)" in tables


def test_runs_that_depart_from_the_protocol_are_said(tmp_path: Path) -> None:
    write_run(tmp_path, 0.5, opt_name="sam", rho=0.1, epochs=3, lr=0.05)
    report.main([str(tmp_path), f"--output_dir={tmp_path / 'out'}"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "- ResNet-18 sam-rho0.1: epochs=3 (200), lr=0.05 (0.1)" in text


def test_plots_and_later_measurements(tmp_path: Path) -> None:
    for rho in (0.1, 0.2):
        folder = write_run(tmp_path, 0.8 - rho / 10, opt_name="sam", rho=rho)
        density = {"values": [-1.0, 0.0, 1.0], "density": [0.1, 0.8, 0.1]}
        measured = {"sharpness": 60.0, "lambda_max": 9.0, "trace": None, "trace_error": None}
        settings = {"sharpness_batches": 40, "sharpness_batch_size": 256 if rho == 0.1 else 64}
        content = {**measured, "density": density, "settings": settings}
        (folder / "sharpness.json").write_text(json.dumps(content))
    write_run(tmp_path, 0.77, 200.0)
    report.main([str(tmp_path)])
    kinds = {path.name.split("-cifar100")[0] for path in tmp_path.glob("*-cifar100-resnet18.png")}
    # Without gradient norms in the history there is no plot of them.
    assert kinds == {
        "curves", "accuracy-rho", "sharpness-rho", "accuracy-sharpness", "magnitudes", "density"
    }  # fmt: skip
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.glob("*.png"))
    text = (tmp_path / "report.md").read_text()
    sharpness = table_of(text, "CIFAR-100 sharpness: ours (published)")
    assert ["ResNet-18", "SAM", "60.00 (71.04)", "60.00 (56.53)", "- (52.23)"] in sharpness
    # What was measured in another way is said.
    assert "- ResNet-18 sam-rho0.2: sharpness of 40 batches of 64 images (40 of 256)" in text
    assert "- ResNet-18 sam-rho0.1:" not in text


def test_the_same_run_in_two_folders_counts_once(tmp_path: Path) -> None:
    for copy in ("a", "b"):
        write_run(tmp_path / copy, 0.8, opt_name="sam", rho=0.1)
    groups = report.grouped(report.load_runs([tmp_path / "a", tmp_path / "b"]))
    assert [len(group.runs) for group in groups] == [1]


def test_rho_does_not_part_runs_of_sgd(tmp_path: Path) -> None:
    write_run(tmp_path, 0.8, rho=0.1, seed=0)
    write_run(tmp_path, 0.7, rho=0.2, seed=1)
    groups = report.grouped(report.load_runs([tmp_path]))
    assert [group.values("test_accuracy") for group in groups] == [[80.0, 70.0]]


def test_report_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        report.main([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="no complete run"):
        report.main([str(tmp_path)])
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no result of a run"):
        report.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="unknown flag --epochs"):
        report.main([str(tmp_path), "--epochs=1"])
