"""Studies and reports."""

import csv
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from scipy.stats import ttest_rel

from train import report, study
from train.loop import cost, run
from train.pages import groups as groups_of_runs
from train.pages import page, plots
from train.settings.config import Config
from train.settings.registry import OPTIMIZERS
from train.shared.errors import CheckpointError, ConfigError, DataError, DivergedError

PNG = b"\x89PNG\r\n\x1a\n"
QUICK = [
    "--epochs=1", "--sharpness_samples=0", "--sharpness_batches=0", "--verify_steps=3",
    "--batch_size=100", "--threads=1", "--device=cpu",
]  # fmt: skip


LABELS = ["SGD", "SAM, rho 0.1", "SAMDirection, rho 0.1", "SAMMagnitude, rho 0.1"]


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
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    taken = counted_runs(monkeypatch)
    assert study.main(["quickstart", *QUICK, f"--output_dir={tmp_path}"]) == 0
    names = ["sgd", "sam-rho0.1", "samdirection-rho0.1", "sammagnitude-rho0.1"]
    folders = [f"digits-resnet_small-{name}-noise0.2-batch100-epochs1-seed0" for name in names]
    assert taken == folders
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80 + len(str(tmp_path))  # where paths are
    text = (tmp_path / "report.md").read_text()
    for label, folder in zip(LABELS, folders, strict=True):
        assert f"| {label} | 1 |" in text and label in output
        result = json.loads((tmp_path / folder / "result.json").read_text())
        assert result["config"]["label_noise"] == 0.2
        assert result["figures"]["sharpness"] is None
    for kind in ("curves", "magnitudes", "norms"):
        path = tmp_path / f"{kind}.png"
        assert path.read_bytes().startswith(PNG) and f"({path.name})" in text

    request.getfixturevalue("no_pictures")
    # Again: nothing is left to do. With another seed: only that.
    assert study.main(["quickstart", *QUICK, f"--output_dir={tmp_path}"]) == 0
    assert len(taken) == 4 and capsys.readouterr().out.count("done already") == 4
    again = [*QUICK, f"--output_dir={tmp_path}", "--seed=0,1", "--opt_name=sam"]
    assert study.main(["quickstart", *again]) == 0
    assert taken[4:] == [folders[1].replace("seed0", "seed1")]
    assert "| SAM, rho 0.1 | 2 |" in (tmp_path / "report.md").read_text()
    # Another configuration beside them is another run; another measurement is none.
    more = ["quickstart", *QUICK, f"--output_dir={tmp_path}", "--opt_name=sgd"]
    assert study.main([*more, "--lr=0.2", "--sharpness_samples=0"]) == 0
    assert taken[5:] == ["digits-resnet_small-sgd-lr0.2-noise0.2-batch100-epochs1-seed0"]
    text = (tmp_path / "report.md").read_text()
    assert "| SGD, lr 0.1 | 1 |" in text and "| SGD, lr 0.2 | 1 |" in text
    weights = (tmp_path / folders[0] / "best.pt").read_bytes()
    assert study.main([*more, "--statistics_every=3", "--sharpness_samples=32"]) == 0
    result = json.loads((tmp_path / folders[0] / "result.json").read_text())
    assert result["figures"]["lambda_max"] > 0 and len(result["history"]) == 1
    assert (tmp_path / folders[0] / "best.pt").read_bytes() == weights


@pytest.mark.usefixtures("no_pictures")
def test_an_interrupted_study_goes_on_within_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["quickstart", *QUICK, "--epochs=2", f"--output_dir={tmp_path}", "--opt_name=sgd,sam"]
    epoch, numbers = run.Training.epoch, []

    def interrupting(self: run.Training, number: int, *rest: Any) -> Any:
        numbers.append((self.config.opt_name, number))
        if len(numbers) == 4:
            raise KeyboardInterrupt
        return epoch(self, number, *rest)

    monkeypatch.setattr(run.Training, "epoch", interrupting)
    with pytest.raises(KeyboardInterrupt, match=r"in \[2/2\] .*the same command goes on there"):
        study.main(flags)
    assert study.main(flags) == 0
    assert numbers == [("sgd", 1), ("sgd", 2), ("sam", 1), ("sam", 2), ("sam", 2)]


@pytest.mark.usefixtures("no_pictures")
def test_shards_are_a_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = counted_runs(monkeypatch)
    for index in (2, 0, 1):
        flags = [*QUICK, f"--output_dir={tmp_path}", f"--shard={index}/3"]
        assert study.main(["quickstart", *flags]) == 0
    assert len(taken) == len(set(taken)) == 4
    assert "- runs: 4" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_one_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    epoch, taken = run.Training.epoch, []

    def diverging(self: run.Training, *arguments: Any) -> Any:
        taken.append(self.config.opt_name)
        if self.config.opt_name == "sam":
            raise DivergedError("the loss is not finite")
        return epoch(self, *arguments)

    monkeypatch.setattr(run.Training, "epoch", diverging)
    flags = ["quickstart", *QUICK, f"--output_dir={tmp_path}"]
    assert study.main(flags) == 1
    captured = capsys.readouterr()
    assert "sam-rho0.1-noise0.2-batch100-epochs1-seed0: the loss is not finite" in captured.err
    text = (tmp_path / "report.md").read_text()
    assert "- runs: 3" in text and "## Diverged" in text
    assert "| SAM, rho 0.1 | 0 | - | - | - | 1 diverged |" in text
    # It would diverge again: only --overwrite tries.
    assert study.main(flags) == 1
    assert "diverged already (the loss is not finite)" in capsys.readouterr().err
    assert taken.count("sam") == 1
    assert study.main([*flags, "--opt_name=sam", "--overwrite"]) == 1
    assert taken.count("sam") == 2


@pytest.mark.usefixtures("no_pictures")
def test_a_cell_of_sgdhess(tmp_path: Path) -> None:
    """The grid of the report's table, on the digits with a small network, at one of its radii."""
    flags = [*QUICK, "--dataset=digits", "--model=resnet_small", "--opt_name=sgdhess", "--rho=1"]
    assert study.main(["cifar100-sgdhess", *flags, f"--output_dir={tmp_path}"]) == 0
    (folder,) = tmp_path.glob("*sgdhess*")
    result = json.loads((folder / "result.json").read_text())
    assert result["name"] == "sgdhess-rho1"
    assert result["verification"]["steps"] == 3 and result["verification"]["value"] <= 1e-5
    assert "| SGDHess, rho 1 | 1 |" in (tmp_path / "report.md").read_text()


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
    for module in (cost, run):
        monkeypatch.setattr(module, "load_dataset", missing)
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


@pytest.mark.usefixtures("no_pictures")
def test_a_study_from_a_file_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: Mine\ncommon: {dataset: digits, model: resnet_small}\n"
        "runs: [{opt_name: sgd, wd: [0, 0.001]}]\n"
    )
    flags = [str(path), *QUICK, "--epochs=1", f"--output_dir={tmp_path / 'out'}"]
    assert study.main(flags) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# Mine\n") and "| SGD, wd 0 | 1 |" in text
    assert "| SGD, wd 0.001 | 1 |" in text


@pytest.mark.parametrize(
    ("own", "flags", "number"),
    [
        # What a run does not use parts no runs.
        ([{"opt_name": ["sgd", "sam"]}], {"rho": "0.1,0.2"}, 3),
        ([{"seed": [0, 1]}], {"seed": "3"}, 1),
        ([{"log_every": [1, 5]}], {}, None),
        ([{}, {"sharpness_batches": 3}], {}, None),
    ],
)
def test_runs_of_one_name_are_one_run(
    own: list[dict[str, Any]], flags: dict[str, str], number: int | None
) -> None:
    configs = functools.partial(study.study_configs, {"runs": own}, "mine", flags)
    if number is not None:
        assert len(configs()[1]) == number
        return
    with pytest.raises(ConfigError, match="two runs of the same name"):
        configs()


# -- reports ---------------------------------------------------------------------------------------


def write_run(root: Path, accuracy: float, sharpness: float | None = None, **keys: Any) -> Path:
    """The files of a run, with given figures."""
    config = Config(**{"sharpness_batches": 40, **keys})
    folder = root / config.full_name
    folder.mkdir(parents=True)
    figures = {
        "test_accuracy": accuracy, "sharpness": sharpness, "lambda_max": 5.0, "best_epoch": 2,
        "best_val_accuracy": accuracy, "ms_per_optimizer_step": 1.0, "seconds_per_epoch": 3.0,
    }  # fmt: skip
    history = [
        {"epoch": e, "train_loss": math.exp(-e), "val_accuracy": 0.1 * e,
         "share_second_larger": 0.55 + 0.05 * e + 0.01 * config.seed, "share_signs_agree": 0.9}
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

    accuracy = table_of(text, "CIFAR-100 accuracy, %: ResNet-18, ours and published")
    assert accuracy[2:4] == [
        ["SAM", "80.00 ± 1.00, n=3", "-", "-"],
        ["published", "79.24", "79.54", "79.44"],
    ]
    assert accuracy[6:] == [
        ["SAMMagnitude", "-", "-", "-"],
        ["published", "78.73", "79.23", "77.94"],
    ]
    accuracy = table_of(text, "CIFAR-100 accuracy, %: ResNet-50, ours and published")
    assert accuracy[4:6] == [
        ["SAMDirection", "-", "81.23, n=1", "-"],
        ["published", "??", "??", "80.34"],
    ]
    accuracy = table_of(text, "CIFAR-100 accuracy, %: ResNet-101, ours and published")
    assert ["SAM", "-", "-", "50.00, n=1"] in accuracy and len(accuracy) == 2 + 3
    sharpness = table_of(text, "CIFAR-100 sharpness: ResNet-18, ours and published")
    assert ["SAM", "71.00 ± 1.00, n=3", "-", "-"] in sharpness
    singles = table_of(text, "CIFAR-100, one pass: ResNet-18, ours and published")
    assert ["SGD", "77.00, n=1", "77.36", "200.00, n=1", "207.06"] in singles
    assert ["SGDHess, rho 2", "-", "75.96", "-", "138.62"] in singles
    rows = table_of(text, "Accuracy: CIFAR-100, ResNet-18")
    assert ["SAM, rho 0.1", "3", "80.00 ± 1.00", "80.00 ± 1.00", "2 ± 0"] in rows
    assert ["SAMMagnitude, rho 0.1, global", "1", "11.00", "11.00", "2"] in rows
    assert "Not the protocol" not in text

    with (tmp_path / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert sorted(float(line["test_accuracy"]) for line in lines) == [
        0.11, 0.5, 0.77, 0.79, 0.80, 0.81, 0.8123, 0.93
    ]  # fmt: skip
    assert 'SAM,"80.00 ± 1.00, n=3",-,-' in (tmp_path / "tables.csv").read_text()
    # Markdown and all: 80 columns.
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 80


def test_runs_that_depart_from_the_protocol_are_said(tmp_path: Path) -> None:
    write_run(tmp_path, 0.5, opt_name="sam", rho=0.1, epochs=3, lr=0.05)
    write_run(tmp_path, 0.5, opt_name="sam", rho=0.2, epochs=3)
    report.main([str(tmp_path), f"--output_dir={tmp_path / 'out'}"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "- lr=0.05 (0.1): ResNet-18 SAM, rho 0.1, lr 0.05" in text
    assert "- epochs=3 (200): all runs" in text


def test_no_cell_replaces_or_pools_another(tmp_path: Path) -> None:
    """Two weight decays and two epochs of the same optimizer and rho: each has a row of its own."""
    for seed in (0, 1):
        for wd, accuracy in ((0.001, 0.8), (0.0005, 0.7)):
            write_run(tmp_path, accuracy + seed / 100, opt_name="sam", rho=0.1, wd=wd, seed=seed)
    write_run(tmp_path, 0.6, opt_name="sam", rho=0.1, epochs=100)
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    rows = table_of(text, "CIFAR-100 accuracy, %: ResNet-18, ours and published")
    assert sorted(row[:2] for row in rows if row[0].startswith("SAM,")) == [
        ["SAM, wd 0.0005, epochs 200", "70.50 ± 0.71, n=2"],
        ["SAM, wd 0.001, epochs 100", "60.00, n=1"],
        ["SAM, wd 0.001, epochs 200", "80.50 ± 0.71, n=2"],
    ]
    assert len(table_of(text, "Accuracy: CIFAR-100, ResNet-18")) == 2 + 3


def test_runs_that_are_measured_or_logged_otherwise_are_one_group(tmp_path: Path) -> None:
    write_run(tmp_path, 0.8, opt_name="sam", statistics_every=5, seed=0, threads=1)
    write_run(tmp_path, 0.7, opt_name="sam", verify_steps=0, seed=1, framework_name="wandb")
    groups, left_out = page.grouped(page.load_runs([tmp_path]))
    assert [group.values("test_accuracy") for group in groups] == [[80.0, 70.0]]
    assert left_out == []


def test_plots_and_later_measurements(tmp_path: Path) -> None:
    for rho in (0.1, 0.2):
        folder = write_run(tmp_path, 0.8 - rho / 10, opt_name="sam", rho=rho)
        density = {"values": [-1.0, 0.0, 1.0], "density": [0.1, 0.8, 0.1]}
        measured = {"sharpness": 60.0, "lambda_max": 9.0, "trace": None, "trace_error": None}
        settings = {"sharpness_batches": 40, "sharpness_batch_size": 256 if rho == 0.1 else 64}
        content = {
            **measured, "density": density, "settings": settings,
            "eigenvalues": [[-3.0, 50.0, 55.0, 60.0], [-2.0, 40.0, 65.0, 90.0]],
        }  # fmt: skip
        (folder / "sharpness.json").write_text(json.dumps(content))
    write_run(tmp_path, 0.77, 200.0)
    report.main([str(tmp_path)])
    # Without gradient norms in the history there is no plot of them.
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "curves", "accuracy-rho", "sharpness-rho", "accuracy-sharpness", "magnitudes", "density",
        "eigenvalues",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.glob("*.png"))
    text = (tmp_path / "report.md").read_text()
    sharpness = table_of(text, "CIFAR-100 sharpness: ResNet-18, ours and published")
    assert ["SAM", "60.00, n=1", "60.00, n=1", "-"] in sharpness
    rows = table_of(text, "Sharpness: CIFAR-100, ResNet-18")
    assert ["SAM, rho 0.1", "60.00", "90.0", "25", "9.00"] in rows
    # What was measured in another way is said.
    assert "- sharpness of 40 batches of 64 images (40 of 256): ResNet-18 SAM, rho 0.2\n" in text


def test_a_report_can_be_made_again_from_what_it_left(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write_run(tmp_path / "a", 0.8 + seed / 100, 60.0 + seed, opt_name="sam", rho=0.1, seed=seed)
        write_run(tmp_path / "a", 0.79, 200.0 + seed**2, seed=seed, data_root="/of/this/machine",
                  output_dir="/of/this/too")  # fmt: skip
    report.main([str(tmp_path / "a")])
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "runs.jsonl").write_bytes((tmp_path / "a" / "runs.jsonl").read_bytes())
    report.main([str(kept)])
    for name in ("report.md", "tables.csv", "runs.csv", "runs.jsonl"):
        assert (kept / name).read_text() == (tmp_path / "a" / name).read_text()
        assert "/of/this" not in (kept / name).read_text()
    assert sorted(p.name for p in kept.glob("*.png")) == sorted(
        p.name for p in (tmp_path / "a").glob("*.png")
    )


def test_the_same_run_in_two_folders_counts_once(tmp_path: Path) -> None:
    for copy in ("a", "b"):
        write_run(tmp_path / copy, 0.8, opt_name="sam", rho=0.1)
    groups, left_out = page.grouped(page.load_runs([tmp_path / "a", tmp_path / "b"]))
    assert [len(group.runs) for group in groups] == [1] and left_out == []
    # One that came out otherwise is not left out in silence.
    write_run(tmp_path / "c", 0.7, opt_name="sam", rho=0.1)
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "is there twice, with accuracies of 80.00 and 70.00%: only the first counts" in text


def test_rho_does_not_part_runs_of_sgd(tmp_path: Path) -> None:
    write_run(tmp_path, 0.8, rho=0.1, seed=0)
    write_run(tmp_path, 0.7, rho=0.2, seed=1)
    groups, _ = page.grouped(page.load_runs([tmp_path]))
    assert [group.values("test_accuracy") for group in groups] == [[80.0, 70.0]]


def test_runs_that_did_not_learn_are_said(tmp_path: Path) -> None:
    write_run(tmp_path, 0.011, opt_name="sam", rho=0.4)  # of 100 classes
    write_run(tmp_path, 0.6, opt_name="sam", rho=0.4, seed=1)
    folder = write_run(tmp_path, 0.6, opt_name="sam", rho=0.4, seed=2)
    lost = json.loads((folder / "result.json").read_text())
    (folder / "result.json").unlink()
    lost = {
        **{k: lost[k] for k in ("name", "config", "history", "versions")},
        "error": "not finite",
    }
    (folder / "diverged.json").write_text(json.dumps(lost))
    shutil.copytree(folder, tmp_path / "copy" / folder.name)  # counts once, as finished runs do
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    rows = table_of(text, "Accuracy: CIFAR-100, ResNet-18")
    assert rows[2][:3] == ["SAM, rho 0.4", "2", "30.55 ± 41.65"]
    assert rows[2][-1] == "1 diverged, 1 at chance"
    published = table_of(text, "CIFAR-100 accuracy, %: ResNet-18, ours and published")
    assert published[2][-1] == "30.55 ± 41.65, n=2; 1 diverged, 1 at chance"
    assert f"- {folder.name}: not finite" in text


# -- tests over seeds ------------------------------------------------------------------------------


def test_paired_comparisons_are_scipys() -> None:
    ours = {0: 1.0, 1: 3.0, 2: 2.5, 7: 9.0}
    theirs = {0: 0.5, 1: 1.0, 2: 2.0, 3: 4.0}
    found = groups_of_runs.paired(ours, theirs)
    expected = ttest_rel([1.0, 3.0, 2.5], [0.5, 1.0, 2.0])
    low, high = expected.confidence_interval(0.95)
    assert found is not None and (found.number, found.mean) == (3, 1.0)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, low, high))
    assert groups_of_runs.paired({0: 1.0}, {1: 1.0}) is None
    # One pair, or differences that are all the same, decide nothing.
    for pairs in (({0: 2.0}, {0: 1.0}), ({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})):
        alone = groups_of_runs.paired(*pairs)
        assert alone is not None and math.isnan(alone.p) and alone.mean == 1.0


def test_holm() -> None:
    assert groups_of_runs.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = groups_of_runs.holm([0.6, math.nan, 0.02])
    assert adjusted[0] == 0.6 and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("difference", "spread", "seeds", "said"),
    [
        (0.03, 0.001, 5, "confirmed"), (-0.03, 0.001, 5, "contradicted"),
        (0.03, 0.04, 5, "not decided"), (0.03, 0.0, 1, "one seed"),
    ],
)  # fmt: skip
def test_verdicts_rest_on_the_tests(
    tmp_path: Path, difference: float, spread: float, seeds: int, said: str
) -> None:
    """SAM's accuracy against SGD's; the words appear in the report where the test says so."""
    for seed in range(seeds):
        noise = spread * (-1) ** seed * (1 + 0.1 * seed)
        write_run(tmp_path, 0.7, 100.0, seed=seed)
        write_run(tmp_path, 0.7 + difference + noise, 50.0, opt_name="sam", rho=0.1, seed=seed)
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    rows = table_of(text, "The report's claims: CIFAR-100, ResNet-18")
    first = next(row for row in rows if row[0] == "1")
    assert first[1] == "SAM, rho 0.1 - SGD" and (first[3], first[-1]) == (str(seeds), said)
    against = table_of(text, "Against the base optimizer: CIFAR-100, ResNet-18")
    expected = {"confirmed": "more", "contradicted": "less"}.get(said, said)
    assert against[2][0] == "SAM, rho 0.1" and against[2][-1] == expected


def test_all_claims_have_their_tests(tmp_path: Path) -> None:
    for seed in range(4):
        wobble = 1 + 0.01 * math.sin(3.0 * seed)
        write_run(tmp_path, 0.7 * wobble, 100.0 * wobble, seed=seed)
        for rho in (0.1, 0.2):
            for opt_name, factor in (("sam", 1.0), ("sammagnitude", 1.1), ("samdirection", 3.0)):
                sharpness = factor * 60 * wobble**2 * (1 - rho)
                accuracy = 0.75 - 0.01 * factor * wobble
                write_run(tmp_path, accuracy, sharpness, opt_name=opt_name, rho=rho, seed=seed)
        for rho in (0.05, 1.0):
            write_run(tmp_path, 0.6, 90 * wobble**3 - 20 * rho, opt_name="sgdhess", rho=rho,
                      seed=seed)  # fmt: skip
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    rows = table_of(text, "The report's claims: CIFAR-100, ResNet-18")[2:]
    assert sorted({row[0] for row in rows}) == list("123456789")
    by_claim = {row[0]: row for row in reversed(rows)}  # the first of each
    assert by_claim["2"][-1] == "confirmed" and by_claim["4"][1] == "distance to SAM, rho 0.1"
    assert by_claim["4"][-1] == "confirmed" and by_claim["6"][-1] == "confirmed"
    # Runs of the report's optimizers with options that it does not have say nothing of it.
    told = len(rows)
    for seed in (0, 1):
        for keys in (
            {"adaptive": True}, {"subset": "norm"}, {"norm": "tensor"}, {"when": "periodic:5"},
            {"scaling": "tensor"}, {"base": "adamw"}, {"sparsity": 0.5}, {"rho_end": 0.5},
        ):  # fmt: skip
            write_run(tmp_path, 0.3, 900.0, opt_name="sam", rho=0.1, seed=seed, **keys)
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert len(table_of(text, "The report's claims: CIFAR-100, ResNet-18")[2:]) == told
    accuracy = table_of(text, "CIFAR-100 accuracy, %: ResNet-18, ours and published")
    assert [row[0] for row in accuracy].count("SAM") == 1 and "tensor" not in str(accuracy)
    # The same conditions only: SGD of another weight decay is no baseline.
    write_run(tmp_path, 0.9, opt_name="sam", rho=0.1, wd=0.0005, seed=0)
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert not any("wd 0.0005" in row[0] for row in table_of(
        text, "Against the base optimizer: CIFAR-100, ResNet-18"))  # fmt: skip


def test_each_optimizer_is_compared_with_its_own_base(tmp_path: Path) -> None:
    for seed, wobble in enumerate((0.0, 0.01, 0.03)):
        write_run(tmp_path, 0.5 + wobble, seed=seed, lr=0.01)
        write_run(tmp_path, 0.6 + 2 * wobble, opt_name="adamw", seed=seed, lr=0.01)
        write_run(tmp_path, 0.7, opt_name="sam", rho=0.1, seed=seed, lr=0.01)
        write_run(tmp_path, 0.8, opt_name="sam", rho=0.1, base="adamw", seed=seed, lr=0.01)
    report.main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    rows = table_of(text, "Against the base optimizer: CIFAR-100, ResNet-18")[2:]
    assert {tuple(row[:2]): row[2].partition(" ")[0] for row in rows} == {
        ("AdamW", "SGD"): "+11.33",
        ("SAM, rho 0.1", "SGD"): "+18.67",
        ("SAM, rho 0.1, adamw", "AdamW"): "+17.33",
    }


# -- plots -----------------------------------------------------------------------------------------


def test_labels_do_not_overprint() -> None:
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    points = [(1.0 + 0.01 * i, 2.0 + 0.005 * (i % 3)) for i in range(9)]
    axes.plot(*zip(*points, strict=True), "o")
    axes.set(xlim=(0, 2), ylim=(1, 3))
    boxes = plots.place_labels(
        figure, axes, [("0.4", point, "black") for point in points], [(p, (0, 0)) for p in points]
    )
    for i, box in enumerate(boxes):
        assert all(Bbox.intersection(box, other) is None for other in boxes[:i])
        assert axes.get_window_extent().contains(box.x0, box.y0)
        for point in points:
            assert not box.contains(*axes.transData.transform(point))


def test_styles_tell_any_number_of_radii_and_optimizers_apart(tmp_path: Path) -> None:
    for i in range(9):
        write_run(tmp_path, 0.7, opt_name="sam", rho=0.05 * (i + 1))
    for opt_name in ("samdirection", "sammagnitude", "sgdhess", "sgd"):
        write_run(tmp_path, 0.7, opt_name=opt_name, rho=0.1)
    groups, _ = page.grouped(page.load_runs([tmp_path]))
    names = {group.config.opt_name for group in groups}
    styles = [plots.style_of(name) for name in names]
    for key in ("color", "marker"):
        assert len({style[key] for style in styles}) == len(names)
    assert len({plots.shade("#0072b2", i, 9) for i in range(9)}) == 9
    styles = [plots.style_of(name) for name in OPTIMIZERS]
    assert len({style["color"] for style in styles}) == len(OPTIMIZERS)
    assert len({style["marker"] for style in styles}) == len(plots.MARKERS)
    figure = plots.plot_curves(groups, "x")
    assert figure is not None
    legends = {axes.get_title(): axes.get_legend() for axes in figure.axes if axes.get_title()}
    assert set(legends) == {"SGDHess", "SAM", "SAMDirection", "SAMMagnitude"}
    assert legends["SAM"].get_title().get_text() == "rho"
    assert len(legends["SAM"].get_texts()) == 9 + 1  # and SGD, for comparison


def test_legends_name_what_is_there(tmp_path: Path) -> None:
    """SGD has no second gradient: nothing of it in the plot that compares the two."""
    write_run(tmp_path, 0.7, opt_name="sam", rho=0.1)
    path = write_run(tmp_path, 0.7) / "result.json"
    result = json.loads(path.read_text())
    for entry in result["history"]:
        del entry["share_second_larger"], entry["share_signs_agree"]
    path.write_text(json.dumps(result))
    groups, _ = page.grouped(page.load_runs([tmp_path]))
    for figure, expected in (
        (plots.plot_curves(groups, "t"), ["0.1", "SGD"]),
        (plots.plot_magnitudes(groups, "t"), ["0.1"]),
    ):  # fmt: skip
        assert figure is not None
        legend = figure.axes[0].get_legend()
        assert legend is not None and [text.get_text() for text in legend.get_texts()] == expected


def test_radii_are_plotted_where_an_optimizer_has_several(tmp_path: Path) -> None:
    for i, opt_name in enumerate(("sam", "samdirection", "gsam")):
        write_run(tmp_path, 0.7, opt_name=opt_name, rho=0.1 * (i + 1))
    groups, _ = page.grouped(page.load_runs([tmp_path]))
    title = "a task of many words, " * 6
    assert plots.all_plots(groups, title, page._known_figures)["accuracy-rho"] is None
    write_run(tmp_path, 0.7, opt_name="gsam", rho=0.1)
    groups, _ = page.grouped(page.load_runs([tmp_path]))
    figure = plots.all_plots(groups, title, page._known_figures)["accuracy-rho"]
    assert figure is not None and figure._suptitle is not None  # type: ignore[attr-defined]
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert Bbox.intersection(figure._suptitle.get_window_extent(), legend) is None  # type: ignore[attr-defined]


def test_bands_and_error_bars_are_those_of_the_seeds(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        for rho in (0.1, 0.2):
            write_run(tmp_path, 0.7 + seed / 100, 50.0, opt_name="sam", rho=rho, seed=seed)
    groups, _ = page.grouped(page.load_runs([tmp_path]))
    figure = plots.plot_magnitudes(groups, "x")
    assert figure is not None
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    # The shares differ by a point from seed to seed: a deviation of 1 around 61 in epoch 1.
    assert {round(y, 6) for x, y in band if x == 1} == {60.0, 62.0}
    figure = plots.plot_against_rho(groups, "test_accuracy", "y", "x", False, lambda *_: {})
    assert figure is not None
    bars = figure.axes[0].containers[0][2][0].get_segments()
    assert [sorted(round(y, 6) for _, y in bar) for bar in bars] == [[70.0, 72.0]] * 2


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
