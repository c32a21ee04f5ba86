"""bench/on_gpu.sh, rehearsed without a GPU: the same steps, files, environment and order; what the
runner does with steps that fail, are missing or run over; and the verdicts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.gpu import cifar, goals, ncu, page, plans, prepare, runner, speed
from bench.gpu.cases import FLOOR, Machine
from bench.gpu.plans import LIMITS, PLANS, Context
from bench.gpu.runner import FAILED, MISSING, NOT_NEEDED, OK, SKIPPED, STOPPED, Runner, Step
from bench.lists import vit_large_shapes, wrn_28_10_shapes
from bench.names import COMPILED, FOREACH
from samkernels.backends import native
from train.settings.config import from_command_line

ROOT = Path(__file__).parents[1]
# One thread, and memory that is kept: the kernel takes long to give the same pages again and again.
SPARING = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
}
MOST_FILES, LARGEST_FILE = 8, 16 << 20

# What ncu and compute-sanitizer print, as far as it is read.
NCU = """#!/bin/sh
while [ "$1" != {python} ]; do shift; done
"$@" || exit 1
cat <<'TABLE'
==PROF== Connected
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum",\
"launch__registers_per_thread"
"","","byte","byte","nsecond","register/thread"
"0","void samkernels::Kernel<samkernels::SgdFunctor<float>>(int)","1,000","2000","1500","32"
TABLE
"""
SANITIZER = """#!/bin/sh
case "$*" in
  *--lie*) echo "========= Invalid __global__ read of size 4 bytes"; exit 9 ;;
  *) echo "========= ERROR SUMMARY: 0 errors" ;;
esac
"""


# -- the runner ------------------------------------------------------------------------------------


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def run(
    folder: Path, groups: Sequence[Sequence[Step]], limit: float = 60, **env: str
) -> tuple[dict[str, runner.Outcome], list[int]]:
    """The outcomes by step, and how many there were at each packing."""
    packed: list[int] = []
    these = Runner(folder, limit, env, lambda outcomes, _: packed.append(len(outcomes)))
    these.run(groups)
    return {outcome.step: outcome for outcome in these.outcomes}, packed


def test_a_step_that_fails_or_is_missing_stops_no_other(tmp_path: Path) -> None:
    groups = [
        [Step("fails", 20, python("print('why'); raise SystemExit(7)"))],
        [Step("missing", 20, ("no-such-program",))],
        [Step("dies", 20, python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))],
        [Step("works", 20, python("import os; print(*map(os.getenv, 'AB'))"), {"B": "2"})],
    ]  # fmt: skip
    ended, packed = run(tmp_path, groups, A="1")
    assert [o.status for o in ended.values()] == [FAILED, MISSING, FAILED, OK]
    assert [o.exit for o in ended.values()] == [7, None, -11, 0]
    assert "why" in (tmp_path / "fails.log").read_text()
    assert "1 2" in (tmp_path / "works.log").read_text()
    assert packed == [1, 2, 3, 4]


def test_a_step_that_runs_over_is_interrupted_then_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.5)
    deaf = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(100)"])
print(child.pid, flush=True)
time.sleep(100)
"""
    polite = """
import time
try:
    time.sleep(100)
except KeyboardInterrupt:
    print("wrote its report")
"""
    begin = time.monotonic()
    ended, _ = run(tmp_path, [[Step("deaf", 1, python(deaf)), Step("polite", 1, python(polite))]])
    assert time.monotonic() - begin < 10  # side by side
    assert {o.status for o in ended.values()} == {STOPPED}
    assert "wrote its report" in (tmp_path / "polite.log").read_text()
    child = int((tmp_path / "deaf.log").read_text().splitlines()[-1])
    for _ in range(100):  # until init has collected it
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a child of a stopped step lives on")


def test_the_limit_holds_for_all_steps_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("GRACE", 0.2), ("PACKING", 0.3), ("LEAST", 1.0)):
        monkeypatch.setattr(runner, name, value)
    begin = time.monotonic()
    groups = [
        [Step("long", 50, python("import time; time.sleep(60)"))],
        [Step("late", 9, ("true",))],
    ]
    ended, packed = run(tmp_path, groups, limit=3)
    assert time.monotonic() - begin < 3
    assert [o.status for o in ended.values()] == [STOPPED, SKIPPED]
    assert ended["long"].cap < 3 and packed == [1, 2]


def test_a_step_may_be_needed_only_if_another_fails(tmp_path: Path) -> None:
    for status in (0, 1):
        groups = [
            [Step("core", 20, python(f"raise SystemExit({status})"))],
            [Step("build", 20, ("true",), unless="core")],
        ]
        ended, _ = run(tmp_path, groups)
        assert ended["build"].status == (OK if status else NOT_NEEDED)


@pytest.mark.parametrize("printed", ["Invalid __global__ read", "nothing"])
def test_a_step_may_be_judged_by_what_it_prints(printed: str, tmp_path: Path) -> None:
    code = f"print({printed!r}); raise SystemExit(9)"
    step = Step("lie", 20, python(code), expect="^Invalid __global__")
    ended, _ = run(tmp_path, [[Step("lie", 20, step.command, expect="Invalid __global__ ")]])
    # Neither the exit status nor the command, which the log begins with, decides.
    assert ended["lie"].status == (OK if printed != "nothing" else FAILED)


def test_without_a_device_the_rest_is_not_tried(tmp_path: Path) -> None:
    groups = [[Step("core", 20, python("raise SystemExit(3)"))], [Step("next", 20, ("true",))]]
    ended, _ = run(tmp_path, groups)
    assert [*ended] == ["core"]


def test_the_archive_is_small_and_says_what_it_left_out(tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    evidence.mkdir()
    (evidence / "long.log").write_text("begin\n" + "x" * (3 << 20) + "\nend\n")
    (evidence / "weights.pt").write_bytes(bytes(runner.LARGEST + 1))
    (evidence / "speed.json").write_text("{}")
    runner.write_archive(evidence, tmp_path / "evidence.tgz")
    with tarfile.open(tmp_path / "evidence.tgz") as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    assert [*content] == [
        "evidence/long.log", "evidence/speed.json", "evidence/weights.pt.left-out",
    ]  # fmt: skip
    log = content["evidence/long.log"]
    assert log.startswith(b"begin") and log.endswith(b"end\n") and len(log) < (1 << 20) + 20

    noise = np.random.default_rng(0)
    for i in range(20):
        (evidence / f"{i}.log").write_bytes(noise.bytes(1 << 20))
    runner.write_archive(evidence, tmp_path / "evidence.tgz")
    assert (tmp_path / "evidence.tgz").stat().st_size <= runner.LARGEST_ARCHIVE


# -- the plans -------------------------------------------------------------------------------------


def steps_of(plan: str, rehearse: bool) -> list[list[Step]]:
    return PLANS[plan](Context(Path("evidence"), Path("work"), rehearse=rehearse))


@pytest.mark.parametrize("plan", PLANS)
def test_a_rehearsal_takes_the_same_steps_files_and_environment(plan: str) -> None:
    collects = ("--collect-only", "-p", "bench.gpu.pretend")
    small = ("--device=cpu", "--batch=2", "--quick", "-k=SGD or native")

    def rehearsed(step: Step) -> tuple[str, ...]:
        command = step.command
        if "tests.sanitized" in command:
            return tuple("cpu" if word == "cuda" else word for word in command)
        if step.name.startswith("tests_"):
            return (*command, *collects)
        if step.name == "training":
            assert command[-1] == "--device=cuda"
            return (*command[:-1], *small)
        return (*command, "--rehearse")

    real, rehearsal = (steps_of(plan, rehearse) for rehearse in (False, True))
    for group, like_group in zip(real, rehearsal, strict=True):
        for step, like in zip(group, like_group, strict=True):
            for name in ("name", "cap", "env", "unless", "expect"):
                assert getattr(like, name) == getattr(step, name)
            if step.name != "build":  # a rehearsal leaves the core as it is
                assert like.command == rehearsed(step)


def test_all_that_has_to_be_asked_of_a_gpu_is_asked_in_order() -> None:
    names = [[step.name for step in group] for group in steps_of("first", False)]
    assert names == [
        ["facts"], ["core"], ["build"], ["built"], ["smoke"],
        [
            "tests_cuda", "memcheck", "racecheck", "memcheck_lie", "compile_WRN-28-10",
            "compile_ViT-L",
        ],
        ["speed"], ["ncu_ViT-L"], ["ncu_ResNet-18"], ["tests_native"], ["training"],
        ["tests_triton"], ["initcheck"],
    ]  # fmt: skip
    (native_tests,) = (s for g in steps_of("first", False) for s in g if s.name == "tests_native")
    for name in ("ops", "ops_adam", "ops_sgd_hess", "optim_devices"):
        assert f"tests/test_{name}.py" in native_tests.command
    again = [step for group in steps_of("again", False) for step in group]
    first = {step.name: step for group in steps_of("first", False) for step in group}
    assert all(step.cap <= first[step.name].cap for step in again)
    assert {"smoke", "tests_cuda", "memcheck", "speed", "ncu_ViT-L"} <= {s.name for s in again}


def test_ncu_leaves_the_caches_and_the_clocks_alone() -> None:
    options = " ".join(plans.NCU)
    assert "--cache-control none" in options and "--clock-control none" in options
    assert [metric for _, metric, _ in ncu.COLUMNS] == list(plans.METRICS)


# -- the rehearsals --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A path with ncu and compute-sanitizer."""
    folder = tmp_path_factory.mktemp("tools")
    for name, text in (("ncu", NCU), ("compute-sanitizer", SANITIZER)):
        (folder / name).write_text(text.replace("{python}", sys.executable))
        (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What bench.gpu.prepare would have made: another core, and sheets of images."""
    folder = tmp_path_factory.mktemp("carried")
    with tarfile.open(folder / plans.VARIANTS, "w:gz") as tar:
        tar.add(native._C.__file__, "reverse_perturb_0.so")
    source = folder / "sheets"
    source.mkdir()
    (source / "classes.txt").write_text("\n".join(f"class{i:02}" for i in range(100)))
    # 5,000 images are held out, and some more are needed.
    for name, columns in (("train-0", 51), ("test-0", 1)):
        pixels = np.zeros((100, 32, columns, 32, 3), np.uint8)
        pixels[..., 0] = np.arange(100)[:, None, None, None]
        pixels[..., 1] = np.arange(columns)[:, None]
        Image.fromarray(pixels.reshape(3200, 32 * columns, 3)).save(
            source / f"{name}.webp", lossless=True
        )
    copied = prepare.gather(source, folder / plans.IMAGES, megabytes=1)
    assert copied == ["classes.txt", "test-0.webp", "train-0.webp"]
    return folder


def on_gpu(
    plan: str, folder: Path, *options: object, **env: str
) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "bench/on_gpu.sh", plan, folder, *options]
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **SPARING, "PYTHON": sys.executable, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rehearse(plan: str, folder: Path, carried: Path, path: str) -> tuple[dict[str, Any], str]:
    """The report, and what was printed."""
    options = ("--carried", carried, "--rehearse")
    done = on_gpu(plan, folder, *options, PATH=path, SAMKERNELS_COMMIT="0123abc")
    report = json.loads((folder / "report.json").read_text())
    assert done.returncode == 0, done.stdout
    assert {row["status"] for row in report["steps"]} <= {OK, NOT_NEEDED}
    planned = [step.name for group in steps_of(plan, True) for step in group]
    assert sorted(row["step"] for row in report["steps"]) == sorted(planned)
    files = [*folder.iterdir()]
    assert len(files) <= MOST_FILES and all(f.stat().st_size < LARGEST_FILE for f in files)
    assert report["environment"]["commit"] == "0123abc"
    # Never mistaken for a result.
    assert "rehearsal" in report["environment"]["device"]
    assert {row[""] for row in report["goals"]} <= {"a rehearsal"} and not report["predictions"]
    text = (folder / "report.md").read_text()
    assert "rehearsal" in text and "## Steps" in text and "## Goals" in text
    assert text[: text.index("## Goals")] in done.stdout
    return report, text


def test_first(tmp_path: Path, carried: Path, stand_ins: str) -> None:
    report, _ = rehearse("first", tmp_path, carried, stand_ins)
    found = report["speed"]
    assert found["failures"] == []
    for dtype in ("float32", "bfloat16"):
        for of in ("ResNet-18", "WRN-28-10", "ViT-L"):
            names = {row["candidate"] for row in found[f"step {of} {dtype}"]}
            assert {"native", FOREACH} <= names
            assert [row["phase"] for row in found[f"phases {of} {dtype}"]] == [*FLOOR]
        assert len(found[f"misaligned {dtype}"]) == 3
    for of in plans.LONG_LISTS:
        assert [row["candidate"] for row in found[f"compiled {of}"]] == ["native", COMPILED]
    assert {row["core"] for row in found["variants"]} == {"native", "reverse_perturb_0"}
    assert [row["kernel"] for row in report["ncu"]["ViT-L"]] == ["SgdFunctor<float>"]
    assert {row["optimizer"] for row in report["training"]} == {"SGD", "SAM, native"}
    measured = {(row["goal"], row["list"]) for row in report["goals"] if row["found"] is not None}
    # Triton needs a GPU; everything else was measured, and read.
    assert {of for what, of in measured if what == goals.SHARE.what} == set(Machine(True).lists())
    assert (goals.OF_COMPILED.what, "ViT-L") in measured
    assert (goals.TRAINING.what, "ResNet-18") in measured
    with tarfile.open(tmp_path / "evidence.tgz") as tar:
        logs = {m.name: tar.extractfile(m).read().decode() for m in tar.getmembers()}  # type: ignore[union-attr]
    for name in ("cuda", "native", "triton"):
        step = next(s for g in steps_of("first", True) for s in g if s.name == f"tests_{name}")
        for file in (word for word in step.command if word.startswith("tests/")):
            counted = re.search(
                rf"{Path(file).name}: (\d+) tests", logs[f"evidence/tests_{name}.log"]
            )
            assert counted and int(counted[1]) > 0, f"no test of {file} for a GPU"
    assert "calls" in logs["evidence/smoke.log"]


def test_cifar(tmp_path: Path, carried: Path, stand_ins: str) -> None:
    report, text = rehearse("cifar", tmp_path, carried, stand_ins)
    names = ["sgd", "sam-rho0.2", "samdirection-rho0.2", "sammagnitude-rho0.2"]
    assert [run["name"] for run in report["cifar"]] == names
    for of in report["cifar"]:
        assert of["config"]["channels_last"] is True
        assert of["config"]["opt_name"] == "sgd" or of["verification"]["steps"] == 2
    assert text.count("Trained on 100 of CIFAR-100's 50,000 training images") == 1
    assert {row["precision"] for row in report["training"]} == {"bf16"}


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    done = on_gpu("again", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "--rehearse" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["step"] for row in report["steps"]] == ["facts", "core"]


def test_what_is_typed_wrong_is_answered_with_the_usage(tmp_path: Path) -> None:
    assert on_gpu("second", tmp_path).returncode == 2
    done = subprocess.run([ROOT / "bench/on_gpu.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and all(plan in done.stderr for plan in LIMITS)


# -- peers -----------------------------------------------------------------------------------------


class Broken:
    """A peer that cannot be had here."""

    def __init__(self, params: object) -> None: ...

    def first_step(self) -> None:
        raise RuntimeError("no such kernel")


class Off(Broken):
    """A peer that computes something else."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = params

    def first_step(self) -> None:
        torch._foreach_add_([p.detach() for p in self.params], 1.0)

    def second_step(self) -> None: ...


def test_a_peer_that_fails_or_differs_is_reported(tmp_path: Path) -> None:
    machine, book = Machine(True), speed.Book(tmp_path)
    makes = {"native": machine.candidates()["native"], "broken": Broken, "off": Off}
    shapes = machine.lists()["ViT-L"]
    book.take("steps", lambda: speed.steps(book, machine, shapes, "float32", 2, makes))
    assert [row["candidate"] for row in book.report["steps"]] == ["native", "off"]
    assert book.report["failures"] == []
    broken, off = book.report["notes"]
    assert "broken" in broken and "no such kernel" in broken and "off native" in off


def test_native_that_fails_is_a_failure_and_the_next_table_is_made(tmp_path: Path) -> None:
    machine, book = Machine(True), speed.Book(tmp_path)
    shapes = machine.lists()["ViT-L"]
    makes = {"native": Broken}
    book.take("steps", lambda: speed.steps(book, machine, shapes, "float32", 2, makes))
    book.take("next", lambda: [{"a": 1}])
    written = json.loads((tmp_path / "speed.json").read_text())
    assert "no such kernel" in written["failures"][0] and written["next"] == [{"a": 1}]


# -- verdicts --------------------------------------------------------------------------------------


def measured() -> goals.Measured:
    def row(candidate: str, **values: float) -> dict[str, Any]:
        return {"candidate": candidate, **values}

    speed_: dict[str, Any] = {
        "step ResNet-18 float32": [row("native", **{"of copy": 0.86, "host us": 151.0})],
        "step WRN-28-10 float32": [
            row("native", **{"of copy": 0.94}),
            row(FOREACH, **{"times native": 1.7}),
            row("triton", **{"times native": 1.11}),
        ],
        "step ViT-L float32": "Traceback ...",
        "compiled WRN-28-10": [row(COMPILED, **{"times native": 1.01})],
        "phases ResNet-18 float32": [
            {"phase": "norms", "backend": "native", "warm of copy": 0.5},
        ],
    }
    benchmarks = [
        {"extra_info": {"candidate": name}, "stats": {"median": seconds}}
        for name, seconds in (("SGD", 1.0), ("SAM, native", 2.02))
    ]
    return goals.Measured(speed_, {"benchmarks": benchmarks})


def test_goals_are_reached_or_not() -> None:
    verdicts = {(row["goal"], row["list"]): row[""] for row in goals.goals(measured())}
    assert verdicts == {
        (goals.SHARE.what, "WRN-28-10"): "not reached",
        (goals.SHARE.what, "ViT-L"): "not measured",
        (goals.SHARE.what, "ResNet-18"): "reached",
        (goals.OF_FOREACH.what, "WRN-28-10"): "reached",
        (goals.OF_FOREACH.what, "ViT-L"): "not measured",
        (goals.OF_COMPILED.what, "WRN-28-10"): "reached",
        (goals.OF_COMPILED.what, "ViT-L"): "not measured",
        (goals.OF_TRITON.what, "WRN-28-10"): "not reached",
        (goals.OF_TRITON.what, "ViT-L"): "not measured",
        (goals.HOST.what, "ResNet-18"): "not reached",
        (goals.TRAINING.what, "ResNet-18"): "reached",
    }


def test_predictions_are_inside_or_outside() -> None:
    rows = goals.predictions(measured(), "NVIDIA H100 80GB HBM3")
    verdicts = {(row["prediction"], row["list"]): row[""] for row in rows}
    assert verdicts[goals.SHARE.what, "ResNet-18"] == "inside"
    assert verdicts[goals.NORM_SHARE.what, "ResNet-18"] == "outside"
    assert verdicts[goals.SHARE.what, "ViT-L"] == "not measured"
    assert goals.predictions(measured(), "NVIDIA GeForce RTX 4090") == []
    for of_kind in goals.PREDICTIONS.values():
        assert all(p.low <= p.value <= p.high for p in of_kind)


def test_the_page_on_kernels_shows_goals_and_predictions() -> None:
    text = (ROOT / "docs/kernels.md").read_text()
    assert goals.with_tables(text) == text
    with pytest.raises(ValueError, match="end of goals"):
        goals.with_tables(text.replace("<!-- end of goals -->", ""))


TESTS = """
import os, time, pytest
@pytest.mark.parametrize("i", range(3))
def test_passes(i): pass
def test_fails(): raise ValueError("why it failed")
@pytest.mark.skip
def test_is_skipped(): pass
def test_takes_long():
    open(os.environ["STARTED"], "w").close()
    time.sleep(100)
"""


def test_tests_that_ran_before_the_cap_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(TESTS)
    lines, started = tmp_path / "tests_a.jsonl", tmp_path / "started"
    pytest_ = (sys.executable, "-m", "pytest", "-p", "bench.gpu.outcomes", "-p", "no:cacheprovider")
    command = (*pytest_, f"--outcomes={lines}", "-c", os.devnull, str(tmp_path / "test_a.py"))
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "STARTED": str(started)}, stdout=subprocess.DEVNULL
    )
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    with lines.open("a") as file:
        file.write('{"test": "cut o')  # as a full disk would do
    tests = page.read_outcomes(lines)
    (row,) = page.by_file(tests)
    assert (row["file"], row["tests"], row["failed"], row["skipped"]) == ("test_a.py", 5, 1, 1)
    (error,) = (test["error"] for test in tests if test["outcome"] == "failed")
    assert error.rstrip().endswith("ValueError") and "why it failed" in error


def test_the_table_of_ncu_is_read() -> None:
    (row,) = ncu.rows_of(NCU)
    assert row["read MB"] == 0.001 and row["us"] == 1.5 and row["registers"] == 32
    assert row["GB/s"] == pytest.approx(2.0)
    assert ncu.rows_of("==ERROR== ERR_NVGPUCTRPERM") == []


# -- data ------------------------------------------------------------------------------------------


def test_lists_are_those_of_the_networks() -> None:
    lists = (wrn_28_10_shapes(), vit_large_shapes())
    sizes = [sum(shape.numel() for shape in shapes) for shapes in lists]
    assert sizes == [36_536_884, 304_326_632]


def test_sheets_become_the_official_layout(carried: Path, tmp_path: Path) -> None:
    counts = cifar.convert(carried / plans.IMAGES, tmp_path)
    assert counts == {"train": 5100, "test": 100}
    content = np.load(tmp_path / cifar.LAYOUT / "train", allow_pickle=True)
    images = content["data"].reshape(-1, 3, 32, 32)
    assert content["fine_labels"][:3] == [0, 1, 2] and content["fine_labels"][-1] == 99
    # Of the image in row 7 and column 2 of the sheet.
    assert (images[207, 0] == 7).all() and (images[207, 1] == 2).all() and not images[207, 2].any()


def test_images_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a b")
    with pytest.raises(FileNotFoundError, match="neither cifar-100-python nor a sheet train"):
        cifar.convert(tmp_path, tmp_path / "data")


def test_the_driver_is_told_what_the_plan_says() -> None:
    real = cifar.flags("sammagnitude", Path("data"), Path("runs"), 7, rehearse=False)
    config = from_command_line(real)
    assert config.opt_name == "sammagnitude" and config.rho == 0.2 and config.epochs == 7
    assert config.model == "resnet18" and config.precision == "bf16" and config.channels_last
    assert config.verify_steps == 20 and config.folder == Path("runs/sammagnitude")
    assert config.train_samples == 0 and config.sharpness_samples == 0


def test_epochs_fill_the_time_that_is_left() -> None:
    step_ms = {"SGD": 10.0, "SAM, native": 20.0}
    # 20,000 images: 59 steps of 256, 4.13 s for an epoch of all four.
    assert cifar.epochs_for(160, 20_000, step_ms) == int(0.75 * 100 / (59 * 0.07))
    assert cifar.epochs_for(20, 20_000, step_ms) == 1
    assert cifar.epochs_for(1e6, 20_000, step_ms) == cifar.MOST_EPOCHS


def test_the_macros_of_the_variants_are_known() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu*"))
    for macro in prepare.MACROS:
        assert f"ifndef {macro.partition('=')[0]}\n" in sources
    with pytest.raises(ValueError, match="know no macro SAMKERNELS_NONE"):
        prepare.build("90", Path("nowhere"), "SAMKERNELS_NONE=1")
