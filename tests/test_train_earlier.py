"""Run folders of commit 9ba4230, before variants were rules: tests/earlier_run.py wrote them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests import earlier_run
from train import report, sharpness
from train.loop import run
from train.models import resnet
from train.settings.config import Config

EARLIER = Path(__file__).parent / "data" / "9ba4230"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, and the network that they are of."""
    monkeypatch.setattr(resnet, "resnet_small", earlier_run.tiny)
    shutil.copytree(EARLIER, tmp_path / "runs")
    return tmp_path / "runs"


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_a_finished_run_is_reported(runs: Path) -> None:
    assert report.main([str(runs / "finished"), f"--output_dir={runs}"]) == 0
    text = (runs / "report.md").read_text()
    assert "13.80" in text and "SAMMagnitude" in text


@pytest.mark.parametrize("file", ["finished/best.pt", "stopped/last.pt"])
def test_a_checkpoint_is_measured(runs: Path, file: str) -> None:
    arguments = ["--sharpness_samples=64", "--sharpness_batches=0", "--trace_vectors=0"]
    assert sharpness.main([str(runs / file), *arguments, "--density_steps=0"]) == 0
    found = json.loads((runs / file).with_name("sharpness.json").read_text())
    assert found["lambda_max"] > 0 and found["epoch"] == 2


def test_a_finished_run_is_taken_as_it_is(runs: Path) -> None:
    config = Config(**earlier_run.KEYS, output_dir=str(runs / "finished"), resume=True)
    run.run(config, Console(file=io.StringIO()))
    assert figures(runs / "finished")["history"] == figures(EARLIER / "finished")["history"]


def test_a_run_that_was_stopped_goes_on_as_it_would_have_then(runs: Path) -> None:
    """It is the same run: what the third epoch gives is what that commit had from it."""
    config = Config(**earlier_run.KEYS, output_dir=str(runs / "stopped"), resume=True)
    run.run(config, Console(file=io.StringIO()))
    ours, theirs = (figures(folder) for folder in (runs / "stopped", EARLIER / "finished"))
    assert len(ours["history"]) == 3
    for entry, then in zip(ours["history"], theirs["history"], strict=True):
        for name in ("train_loss", "val_loss", "val_accuracy", "lr"):
            assert entry[name] == pytest.approx(then[name], rel=1e-5), name
