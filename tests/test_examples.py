"""The scripts of examples/ run, and learn something."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def accuracies(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"accuracy (\d\.\d+)", text)]


def run(
    name: str,
    *arguments: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """What a script prints, in this process: torch is imported already."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_all_are_listed_and_short() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    assert len(scripts) == 4
    readme = (EXAMPLES / "README.md").read_text()
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    for script in scripts:
        assert f"`examples/{script.name}`" in readme
        assert f'--8<-- "examples/{script.name}"' in page
        assert len(script.read_text().splitlines()) <= 60, script


def test_mixed_precision(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run("mixed_precision.py", "--epochs=1", capsys=capsys, monkeypatch=monkeypatch)
    (accuracy,) = accuracies(said)
    assert accuracy > 0.7


def test_lora(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("lora.py", "--epochs=2", capsys=capsys, monkeypatch=monkeypatch)
    (accuracy,) = accuracies(said)
    assert accuracy > 0.5, "the digits 0 to 4 alone are half"


def test_choose_variant(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--epochs=3", "--seeds=1")
    said = run("choose_variant.py", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    rows = [line.rsplit(maxsplit=3) for line in said.splitlines()[1:]]
    assert [name.strip() for name, *_ in rows][:2] == ["SGD", "SAM"]
    assert len(rows) == 7
    assert all(float(accuracy) > 0.6 for _, accuracy, *_ in rows)


@pytest.mark.processes
@pytest.mark.parametrize("perturbation", ["global", "local"])
def test_distributed(perturbation: str) -> None:
    script = [str(EXAMPLES / "distributed.py"), "--epochs=2", f"--perturbation={perturbation}"]
    result = subprocess.run(
        [*TORCHRUN, *script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    found = accuracies(result.stdout)
    assert len(found) == 2, "one process speaks"
    assert found[-1] > 0.7
