"""What optimizers are worth for their cost."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from train import worth
from train.pages.groups import Group, grouped, load_runs
from train.settings.config import Config
from train.shared.errors import ConfigError

COMMON: dict[str, Any] = {
    "dataset": "digits", "model": "mlp", "epochs": 4, "batch_size": 100, "lr": 0.05,
    "device": "cpu", "threads": 1,
}  # fmt: skip


def write_run(root: Path, last: float, best: float, **keys: Any) -> None:
    """A run of 1000 images whose validation is best in the second of four epochs, and by noisy
    labels in the third."""
    config = Config(**{**COMMON, **keys})
    right, noisy = (0.5, best, 0.6, last), (0.2, 0.3, 0.5, 0.4)
    history: list[dict[str, float]] = [
        {"epoch": e, "val_accuracy": right[e - 1]} for e in (1, 2, 3, 4)
    ]
    if config.label_noise:
        for entry, value in zip(history, noisy, strict=True):
            entry["val_noisy_accuracy"] = value
    figures = {"test_accuracy": best, "last_test_accuracy": last, "best_val_accuracy": best}
    result = {
        "name": config.run_name, "config": dataclasses.asdict(config), "figures": figures,
        "history": history, "images": {"train": 1000, "val": 297, "test": 500}, "classes": 10,
        "device": "CPU", "versions": {"torch": "2"},
    }  # fmt: skip
    folder = root / config.full_name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


def groups_of(root: Path) -> dict[str, Group]:
    members = grouped(load_runs([root]))[0]
    return dict(zip(worth.short_labels(members), members, strict=True))


def table_after(text: str, line: str) -> dict[str, list[str]]:
    """The rows of the first table after a line, by their first cell."""
    block = text.split(f"{line}\n\n", 1)[1].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in block]
    return {row[0]: row[1:] for row in rows}


def test_labels_and_costs_of_a_grid(tmp_path: Path) -> None:
    write_run(tmp_path, 0.7, 0.8)
    write_run(tmp_path, 0.7, 0.8, epochs=8)
    for keys in (
        {}, {"when": "periodic:5"}, {"when": "from:30"}, {"when": "bernoulli:0.25"}
    ):  # fmt: skip
        write_run(tmp_path, 0.7, 0.8, opt_name="sam", rho=0.1, **keys)
    write_run(tmp_path, 0.7, 0.8, opt_name="msam", rho=1, adaptive=True)
    write_run(tmp_path, 0.7, 0.8, opt_name="looksam", rho=0.1, k=2, alpha=0.1)
    write_run(tmp_path, 0.7, 0.8, opt_name="gsam", rho=0.1)
    groups = groups_of(tmp_path)
    cost = {label: worth.gradients(group) for label, group in groups.items()}
    assert cost == pytest.approx(
        {
            "SGD": 4000, "SGD, epochs 8": 8000, "SAM, rho 0.1": 8000, "MSAM, rho 1, adaptive": 4000,
            "SAM, rho 0.1, periodic:5": 4800, "SAM, rho 0.1, from:30": 5000,
            "SAM, rho 0.1, bernoulli:0.25": 5000, "LookSAM, rho 0.1, k 2, alpha 0.1": 6000,
            "GSAM, rho 0.1": 8000,
        }
    )  # fmt: skip
    # Seconds: 40 steps (SGD also 80), by the times of both kinds of steps.
    steps = {worth._key(group): {"1": 1.0, "2": 3.0} for group in groups.values()}
    spent = {label: worth.seconds(group, steps) for label, group in groups.items()}
    assert spent["SGD"] == pytest.approx(0.04) and spent["SGD, epochs 8"] == pytest.approx(0.08)
    assert spent["SAM, rho 0.1"] == pytest.approx(0.12)
    assert spent["SAM, rho 0.1, from:30"] == pytest.approx(0.030 + 0.030)
    assert spent["MSAM, rho 1, adaptive"] == pytest.approx(0.04)
    assert worth.seconds(groups["SGD"], {}) is None


def test_statements_rest_on_the_smallest_difference(tmp_path: Path) -> None:
    """SAM gains 10 points at the end, 2 at the best epoch: 2 is what is said. Another gains at the
    end what it loses at the best epoch, and a third by no more than its seeds differ."""
    for seed in range(4):
        wobble = 0.001 * math.sin(3.0 * seed)
        write_run(tmp_path, 0.6, 0.7, seed=seed, label_noise=0.4)
        write_run(tmp_path, 0.7 + wobble, 0.72 + wobble, opt_name="sam", rho=0.1, seed=seed,
                  label_noise=0.4)  # fmt: skip
        write_run(tmp_path, 0.7 + wobble, 0.65 + wobble, opt_name="gsam", rho=0.1, seed=seed,
                  label_noise=0.4)  # fmt: skip
        write_run(tmp_path, 0.6 + 50 * wobble, 0.7 + 50 * wobble, opt_name="vasso", rho=0.1,
                  seed=seed, label_noise=0.4)  # fmt: skip
    assert worth.main([str(tmp_path)]) == 0
    text = (tmp_path / "worth.md").read_text()
    assert "## digits, 40% wrong labels, MLP" in text
    rows = table_after(text, "Points more than SGD:")
    assert rows["optimizer"] == ["last epoch", "best epoch", "by wrong labels", "n", "p", "verdict"]
    # The epoch that noisy labels choose is alike in all: no difference there.
    assert rows["SAM, rho 0.1"][2:] == ["+0.00", "4", "-", "not decided"]
    groups = groups_of(tmp_path)
    measured = worth.measures(groups["SAM, rho 0.1"])
    assert measured["by wrong labels"] == {seed: pytest.approx(60.0) for seed in range(4)}
    assert (tmp_path / "worth.png").read_bytes().startswith(b"\x89PNG")

    clean = tmp_path / "clean"
    for path in tmp_path.glob("digits-*"):
        result = json.loads((path / "result.json").read_text())
        result["config"]["label_noise"] = 0.0
        for entry in result["history"]:
            del entry["val_noisy_accuracy"]
        (clean / path.name).mkdir(parents=True)
        (clean / path.name / "result.json").write_text(json.dumps(result))
    assert worth.main([str(clean)]) == 0
    rows = table_after((clean / "worth.md").read_text(), "Points more than SGD:")
    assert rows["optimizer"] == ["last epoch", "best epoch", "n", "p", "verdict"]
    assert [rows[name][-1] for name in ("SAM, rho 0.1", "GSAM, rho 0.1", "VaSSO, rho 0.1")] == [
        "more", "depends on the epoch", "not decided"
    ]  # fmt: skip
    differences = [2 + 0.1 * math.sin(3.0 * seed) for seed in range(4)]
    mean = sum(differences) / 4
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3 / 4)
    reach = float(student.ppf(0.975, 3)) * error
    assert rows["SAM, rho 0.1"][1] == f"{mean:+.2f} [{mean - reach:+.2f}, {mean + reach:+.2f}]"
    cells = table_after((clean / "worth.md").read_text(), "## digits, MLP")["SGD"]
    assert cells == ["4", "4", "-", "60.0", "70.0"]


def test_validation_chooses_the_radius(tmp_path: Path) -> None:
    for rho, best in ((0.1, 0.70), (0.2, 0.75), (0.4, 0.60)):
        write_run(tmp_path, 0.5, best, opt_name="sam", rho=rho)
        write_run(tmp_path, 0.5, 1 - best, opt_name="sam", rho=rho, when="periodic:5")
    write_run(tmp_path, 0.5, 0.7)
    assert worth.main([str(tmp_path), f"--output_dir={tmp_path / 'out'}"]) == 0
    rows = table_after((tmp_path / "out" / "worth.md").read_text(), "Radii:")
    assert rows["SAM"] == ["0.1: 70.00, 0.2: 75.00, 0.4: 60.00", "0.2", ""]
    assert rows["SAM, periodic:5"][1:] == ["0.4", "at an end of the grid"]


def test_steps_are_timed(tmp_path: Path) -> None:
    """Steps with one and with two passes, of each kind that a run has."""
    write_run(tmp_path, 0.5, 0.6)
    write_run(tmp_path, 0.5, 0.6, opt_name="sam", rho=0.1)
    write_run(tmp_path, 0.5, 0.6, opt_name="sam", rho=0.1, when="from:20")
    write_run(tmp_path, 0.5, 0.6, opt_name="msam", rho=1)
    assert worth.main([str(tmp_path), "--time=true"]) == 0
    times = json.loads((tmp_path / "steps.json").read_text())["ms"]
    kinds_of = [sorted(kinds) for _, kinds in sorted(times.items())]
    assert kinds_of == [["1"], ["1", "2"], ["2"], ["1"]]  # MSAM, SAM from a step on, SAM, SGD
    for kinds in times.values():
        assert all(0 < value < 1000 for value in kinds.values())
    table = table_after((tmp_path / "worth.md").read_text(), "## digits, MLP")
    assert all(
        float(cells[2]) >= 0 for label, cells in table.items() if label[:3] in ("SGD", "SAM")
    )


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, 0.5, 0.6)
    for flag in ("--lr=1", "--time=maybe"):
        with pytest.raises(ConfigError, match="allowed"):
            worth.main([str(tmp_path), flag])
    (tmp_path / "steps.json").write_text("{}")
    with pytest.raises(Exception, match="measure again"):
        worth.main([str(tmp_path)])
    assert worth.main(["--help"]) == 0 and "Seconds are steps times" in capsys.readouterr().out


def test_times_belong_to_the_network_as_it_ran(tmp_path: Path) -> None:
    for keys in ({}, {"precision": "bf16"}, {"channels_last": True}, {"compile": True}):
        write_run(tmp_path, 0.7, 0.8, **keys)
    groups = list(groups_of(tmp_path).values())
    assert len({worth._key(group) for group in groups}) == len(groups) == 4
