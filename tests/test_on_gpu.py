"""bench/on_gpu.sh, rehearsed without a GPU: every stage runs to its end and writes its report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_cases
from bench.candidates import COMPILED, EAGER, FOREACH
from bench.lists import vit_large_shapes, wrn_28_10_shapes

ROOT = Path(__file__).parents[1]


def rehearse(stage: str, folder: Path, *arguments: str) -> dict[str, Any]:
    result = subprocess.run(
        [ROOT / "bench/on_gpu.sh", stage, folder, *arguments, "--dry-run"],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    report = json.loads((folder / f"{stage}.json").read_text())
    assert report["failures"] == []
    environment = report["environment"]
    assert {"commit", "torch", "triton", "device", "nvcc", "core"} <= environment.keys()
    assert "rehearsal" in environment["device"]  # never mistaken for a result
    text = (folder / f"{stage}.md").read_text()
    assert "rehearsal" in text and "| --- |" in text
    return report


def test_build(tmp_path: Path) -> None:
    report = rehearse("build", tmp_path)
    assert any("native" in line for row in report["backends"] for line in row.values())


def test_test(tmp_path: Path) -> None:
    report = rehearse("test", tmp_path)
    (row,) = (r for r in report["tests by file"] if r["file"] == "test_optim_devices")
    assert row["tests"] > row["skipped"] and row["failed"] == 0


def test_sanitize(tmp_path: Path) -> None:
    rows = rehearse("sanitize", tmp_path)["compute-sanitizer"]
    assert [row["tool"] for row in rows] == ["memcheck", "memcheck", "racecheck"]
    assert "calls" in (tmp_path / "memcheck_all.log").read_text()


def test_profile(tmp_path: Path) -> None:
    report = rehearse("profile", tmp_path)
    assert {"ncu: tiny, float32", "torch.profiler: tiny, float32"} <= report.keys()


def test_bench(tmp_path: Path) -> None:
    report = rehearse("bench", tmp_path)
    for dtype in ("float32", "bfloat16"):
        rows = report[f"SAM step: tiny, {dtype}"]
        names = {row["candidate"] for row in rows}
        assert {"native", EAGER, FOREACH, COMPILED} <= names
        assert [row["phase"] for row in report[f"phases: tiny, {dtype}"]] == [*gpu_cases.FLOOR]
    assert {row[""] for row in report["goals"]} <= {"reached", "not reached"}


def test_suite(tmp_path: Path) -> None:
    rows = rehearse("suite", tmp_path)["median of each case"]
    assert len(rows) == 2 and all(row["wall ms"] > 0 for row in rows)
    cases = json.loads((tmp_path / "pytest_benchmark.json").read_text())["benchmarks"]
    assert {case["extra_info"]["op"] for case in cases} == {"norms"}


def test_tune(tmp_path: Path) -> None:
    rows = rehearse("tune", tmp_path, "NAME=1 OTHER=2")["cold device ms of each variant"]
    assert [(row["variant"], row["round"]) for row in rows] == [("NAME=1 OTHER=2", 1)]


def test_a_stage_that_fails_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = gpu.Stage("build", tmp_path, dry_run=True)
    stage.check(True, "this holds")
    stage.check(False, "this does not")
    stage.write()
    assert json.loads((tmp_path / "build.json").read_text())["failures"] == ["this does not"]
    assert "FAILED: this does not" in (tmp_path / "build.md").read_text()


def test_a_stage_without_a_gpu_ends_with_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "build", str(tmp_path)]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode != 0 and "--dry-run" in result.stderr


def test_goals_are_reached_or_not() -> None:
    rows = [
        {"candidate": "native", "of copy": 0.8, "wall ms": 1.0, "device ms": 1.0, "host us": 101.0},
        {"candidate": EAGER, "wall ms": 10.5},
        {"candidate": FOREACH, "wall ms": 1.9},
        {"candidate": "triton", "wall ms": 2.0, "device ms": 1.05},
    ]
    verdicts = {row["what"]: row[""] == "reached" for row in gpu.goals_of("ResNet-18", rows)}
    assert verdicts == {
        "share of the copy's speed": True,
        "host microseconds per step": False,
        f"times faster than {EAGER}": True,
        f"times faster than {FOREACH}": False,
        f"triton times faster than {FOREACH}": False,
    }
    verdicts = {row["what"]: row[""] == "reached" for row in gpu.goals_of("ViT-L", rows)}
    assert not verdicts["share of the copy's speed"]
    assert verdicts["triton's time over native's"]


def test_lists_are_those_of_the_networks() -> None:
    lists = (wrn_28_10_shapes(), vit_large_shapes())
    sizes = [sum(shape.numel() for shape in shapes) for shapes in lists]
    assert sizes == [36_536_884, 304_326_632]


def test_the_table_of_ncu_is_read() -> None:
    (row,) = gpu.rows_of_ncu(gpu.SAMPLE_OF_NCU)
    assert row["read MB"] == 0.001 and row["us"] == 1.5
    assert row["GB/s"] == pytest.approx(2.0)
    assert gpu.rows_of_ncu("==ERROR== ERR_NVGPUCTRPERM") == []
