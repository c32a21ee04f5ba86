"""What is run on a GPU machine, in stages: see bench/on_gpu.sh.

Every stage writes STAGE.json and STAGE.md into its folder, with the machine and the commit, and
exits with an error if what it checks does not hold. --dry-run rehearses it on the CPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gpu_cases
from bench.candidates import COMPILED, EAGER, FOREACH, problem
from bench.clock import Work, quartiles
from bench.side_by_side import environment
from samkernels.backends import native

ROOT = Path(__file__).parents[1]
STAGE_SECONDS = 450  # of eight minutes: the rest is for starting and for writing
MEGA = 1e6
DTYPES = ("float32", "bfloat16")

Row = dict[str, Any]


class Stage:
    """Where a stage writes, how long it may take, and what the machine is."""

    def __init__(self, name: str, folder: Path, dry_run: bool) -> None:
        self.name, self.folder, self.dry_run = name, folder, dry_run
        self.start = time.monotonic()
        self.report: dict[str, Any] = {"stage": name, "environment": describe(dry_run)}
        self.tables: list[str] = []
        self.failures: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(f"[{self.name} {time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def seconds_left(self) -> float:
        return STAGE_SECONDS - (time.monotonic() - self.start)

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Into both files, and onto the terminal."""
        self.report[title] = list(rows)
        self.tables.append(f"## {title}\n\n{markdown(rows)}")
        print(f"\n{title}\n{markdown(rows)}", flush=True)

    def note(self, text: str) -> None:
        self.report.setdefault("notes", []).append(text)
        self.tables.append(text)
        self.say(text)

    def check(self, holds: bool, what: str) -> None:
        """The stage fails, at its end, if this does not hold."""
        if not holds:
            self.failures.append(what)
            self.note(f"FAILED: {what}")

    def write(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self.start, 1)
        self.report["failures"] = self.failures
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.report, indent=2) + "\n")
        machine = [{"": key, "value": value} for key, value in self.report["environment"].items()]
        parts = [f"# {self.name}", markdown(machine), *self.tables]
        (self.folder / f"{self.name}.md").write_text("\n\n".join(parts) + "\n")

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, log: str = ""
    ) -> tuple[int, str]:
        """Exit status and output, which is shown as it comes and kept as LOG.log. Ends with the
        time of the stage."""
        self.say(" ".join(" ".join(command).split())[:300])
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            start_new_session=True,  # so that its children end with it
        )
        overdue = threading.Timer(
            max(1.0, self.seconds_left()), os.killpg, (process.pid, signal.SIGKILL)
        )
        overdue.start()
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not log:
                continue
            print(f"    {line.rstrip()[:160]}", flush=True)
        status = process.wait()
        overdue.cancel()
        output = "".join(lines)
        if log:
            (self.folder / f"{log}.log").write_text(output)
        return status, output


def describe(dry_run: bool) -> dict[str, Any]:
    """What a figure has to come with."""
    facts = environment()
    facts["triton"] = _version_of("triton")
    facts["cuda of torch"] = torch.version.cuda
    facts["core"] = "none" if native.IMPORT_ERROR else native.build_info()
    nvcc = re.findall(r"release (\S+),", _output_of(["nvcc", "--version"]) or "")
    facts["nvcc"] = nvcc[0] if nvcc else None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit"]
    facts["GPU, driver, memory, clock, power"] = _output_of([*query, "--format=csv,noheader"])
    if not dry_run:
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = properties.name
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
    else:
        facts["device"] = "none: a rehearsal on the CPU, whose figures mean nothing"
    facts["commit"] = facts["commit"] or os.environ.get("SAMKERNELS_COMMIT")
    return facts


def _version_of(module: str) -> str | None:
    found = importlib.util.find_spec(module)
    return importlib.metadata.version(module) if found else None


def _output_of(command: Sequence[str]) -> str | None:
    """None if there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def markdown(rows: Sequence[Row]) -> str:
    """A table, with the keys of the first row as its head."""
    if not rows:
        return "(nothing)"

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        return str(value).replace("|", "\\|").replace("\n", " ")

    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([text(row.get(key, "")) for key in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# build and test


def build(stage: Stage) -> None:
    """The core, in place, for the GPU that is visible."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if stage.dry_run:  # the core that is imported here stays
        command = [sys.executable, "-c", "raise SystemExit('as if setuptools were too old')"]
    status, _ = stage.run(command, {"SAMKERNELS_CUDA": "ON"}, log="build")
    if status != 0:
        stage.note(f"setup.py exits with {status} (build.log): CMake alone")
        in_place = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'samkernels'}"
        status = run_cmake(stage, ROOT / "build" / "gpu", [in_place], log="cmake")
    stage.check(status == 0, f"the build exits with {status}: cmake.log")
    status, output = stage.run([sys.executable, "-m", "samkernels"], log="backends")
    serves = re.search(r"native +cuda +available", output) is not None
    stage.check(status == 0, f"python -m samkernels exits with {status}")
    stage.check(serves or stage.dry_run, "the native backend does not serve CUDA tensors")
    rows = [{"python -m samkernels": line} for line in output.splitlines()]
    stage.table("backends", rows)


def run_cmake(stage: Stage, folder: Path, options: Sequence[str], log: str) -> int:
    """Configure and build the core with CUDA; the exit status. A rehearsal only prints."""
    cmake = [sys.executable, "-c", "import sys; print(sys.argv)"] if stage.dry_run else ["cmake"]
    configure = [*cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DSAMKERNELS_CUDA=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", *options]
    status, _ = stage.run(configure, log=f"{log}_configure")
    if status == 0:
        status, _ = stage.run([*cmake, "--build", str(folder)], log=log)
    return status


def ensure_built(stage: Stage) -> None:
    """Each stage may be the first one on a machine."""
    _, output = stage.run([sys.executable, "-m", "samkernels"])
    if not stage.dry_run and not re.search(r"native +cuda +available", output):
        if os.environ.get("SAMKERNELS_WAS_BUILT"):
            raise SystemExit(f"the core was built, and cannot be used:\n{output}")
        stage.say("the core has no kernels for this GPU: building it first")
        build(stage)
        if stage.failures:
            raise SystemExit("the core cannot be built: see build.log")
        # This process has imported samkernels without it.
        os.environ["SAMKERNELS_WAS_BUILT"] = "1"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *sys.argv[1:]])


def test(stage: Stage) -> None:
    """The tests of the ops, the optimizers and the backends, on CUDA tensors."""
    files = ["test_ops.py", "test_cuda.py", "test_optim_devices.py", "test_backends.py"]
    files += ["test_triton.py"]
    chosen = "cuda or test_backends or test_triton"
    if importlib.util.find_spec("hypothesis"):
        files.append("test_ops_random.py")
        chosen += " or test_ops_random"
    else:
        stage.note("hypothesis is missing: the tests with random lists were not run")
    # Plugins that warn, and warnings are errors here.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    if importlib.util.find_spec("xdist") and not stage.dry_run:
        command += ["-n", "6"]
    report = stage.folder / "test.xml"
    command += [f"--junitxml={report}", "-o", "junit_family=xunit2", "-k"]
    if stage.dry_run:
        command += ["cpu-reference and closure or test_cuda", "tests/test_optim_devices.py"]
        command += ["tests/test_cuda.py"]
    else:
        command += [chosen, *(f"tests/{name}" for name in files)]
    # The kernels run for real: no need to build the emulated ones.
    env = {} if stage.dry_run else {"SAMKERNELS_NO_EMULATION": "1"}
    status, _ = stage.run(command, env, log="test")
    stage.check(status == 0, f"pytest exits with {status}: test.log")
    stage.check(report.exists(), "pytest was stopped before it had written its report")
    if report.exists():
        stage.table("tests by file", by_file(report))


def by_file(junit: Path) -> list[Row]:
    counts: dict[str, Row] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        name = (case.get("classname") or "?").rsplit(".", 1)[-1]
        row = counts.setdefault(
            name, {"file": name, "tests": 0, "failed": 0, "skipped": 0, "seconds": 0.0}
        )
        kinds = {child.tag for child in case}
        row["tests"] += 1
        row["failed"] += bool(kinds & {"failure", "error"})
        row["skipped"] += "skipped" in kinds
        row["seconds"] += float(case.get("time") or 0)
    return list(counts.values())


# sanitize

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def sanitize(stage: Stage) -> None:
    """Every op at awkward sizes under compute-sanitizer, and a kernel's call that it must object
    to."""
    ensure_built(stage)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None and not stage.dry_run:
        stage.check(False, "compute-sanitizer was not found: nothing was checked")
        return
    # Each tensor an allocation of its own.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SAMKERNELS_NO_EMULATION": "1"}
    rows = []
    for tool in TOOLS[:2] if stage.dry_run else TOOLS:
        for case in ("all", "lie") if tool == "memcheck" else ("all",):
            if stage.seconds_left() < 30 and tool != "memcheck":
                stage.check(False, f"{tool}: no time was left")
                continue
            command = [sys.executable, "-m", "tests.sanitized", "native", "cuda"]
            prefix = [str(sanitizer), "--tool", tool, "--error-exitcode", "9"]
            if stage.dry_run:
                command, prefix, env = [*command[:-2], "native", "cpu"], [], {}
            elif tool == "memcheck":  # the kernels are watched, not what PyTorch asks the driver
                prefix += ["--report-api-errors", "no"]
            # 3996 bytes: what follows them belongs to no other allocation.
            command += ["--lie", "read", "--numel", "1000"] if case == "lie" else ["--brief"]
            status, output = stage.run([*prefix, *command], env, log=f"{tool}_{case}")
            summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
            rows.append(
                {
                    "tool": tool,
                    "what": "every op" if case == "all" else "a read past the end, on purpose",
                    "exit status": status,
                    "summary": summary[-1] if summary else "none",
                }
            )
            if case == "all":
                stage.check(status == 0, f"{tool} exits with {status}: {tool}_{case}.log")
            elif not stage.dry_run:  # nothing watches there
                # Not the status: the program may end with an error of its own, as it finds one.
                found = re.search("Invalid __global__ read", output) is not None
                stage.check(found, f"{tool} overlooked a read past the end")
    stage.table("compute-sanitizer", rows)


# profile

METRICS = {
    "read MB": "dram__bytes_read.sum",
    "written MB": "dram__bytes_write.sum",
    "% of DRAM peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "us": "gpu__time_duration.sum",
    "% of warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
# What ncu prints, for the rehearsal.
SAMPLE_OF_NCU = (
    "==PROF== Connected\n"
    + ",".join(f'"{name}"' for name in ["ID", "Kernel Name", *METRICS.values()])
    + '\n"","","byte","byte","%","nsecond","%","register/thread"\n'
    + '"0","samkernels::A","1,000","2000","50.5","1500","75","32"\n'
)


def profile(stage: Stage) -> None:
    """DRAM traffic and throughput of each kernel of a SAM step."""
    ensure_built(stage)
    for name in gpu_cases.Machine(stage.dry_run).lists():
        for dtype in DTYPES[:1] if stage.dry_run else DTYPES:
            work = [sys.executable, "-m", "bench.gpu", "one-step", str(stage.folder)]
            work += ["--list", name, "--dtype", dtype]
            rows = profile_with_ncu(stage, work, f"ncu_{name}_{dtype}")
            if rows:
                stage.table(f"ncu: {name}, {dtype}", rows)
            if not rows or stage.dry_run:
                stage.table(
                    f"torch.profiler: {name}, {dtype}", profile_with_torch(stage, name, dtype)
                )


def profile_with_ncu(stage: Stage, work: list[str], log: str) -> list[Row]:
    """A row per kernel; none where ncu is missing or the counters are forbidden."""
    if stage.dry_run:
        stage.run([*work, "--dry-run"], log=log)
        return rows_of_ncu(SAMPLE_OF_NCU)
    ncu = shutil.which("ncu")
    if ncu is None:
        stage.note("ncu was not found: times are torch.profiler's, bytes those of the model")
        return []
    # Base units, so that there is one conversion; the clocks are left alone.
    options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    options += ["--profile-from-start", "off", "--kernel-name-base", "demangled"]
    options += ["--kernel-name", "regex:samkernels", "--metrics", ",".join(METRICS.values())]
    status, output = stage.run([ncu, *options, *work], log=log)
    rows = rows_of_ncu(output)
    if status != 0 or not rows:
        why = re.findall(r"==ERROR==.*", output) or [f"exit status {status}"]
        stage.note(f"ncu gave nothing for {log} ({why[0]}): torch.profiler and the model instead")
        return []
    return rows


def rows_of_ncu(output: str) -> list[Row]:
    begin = output.find('"ID",')
    if begin < 0:
        return []
    rows = []
    for kernel in list(csv.DictReader(io.StringIO(output[begin:])))[1:]:  # the first: units
        if not kernel.get(METRICS["us"]):
            continue
        row: Row = {"kernel": short(kernel["Kernel Name"])}
        for title, metric in METRICS.items():
            value = float((kernel.get(metric) or "nan").replace(",", ""))
            row[title] = value / {"read MB": MEGA, "written MB": MEGA, "us": 1e3}.get(title, 1)
        row["GB/s"] = (row["read MB"] + row["written MB"]) / row["us"] * 1e3
        rows.append(row)
    return rows


def short(kernel: str) -> str:
    """The functor of a kernel's name, which says what it does, or all of it."""
    found = re.search(r"\w+Functor<[^<>]*>", kernel)
    return found[0] if found else kernel[:80]


def profile_with_torch(stage: Stage, name: str, dtype: str) -> list[Row]:
    """Kernel times, and the bytes that the model of the traffic gives them."""
    from torch.profiler import ProfilerActivity

    machine = gpu_cases.Machine(stage.dry_run)
    given = problem(machine.lists()[name], machine.device, getattr(torch, dtype))
    works = gpu_cases.phases(given, machine.backend)
    activity = ProfilerActivity.CPU if stage.dry_run else ProfilerActivity.CUDA
    rows = []
    for phase, work in works.items():
        work()
        machine.synchronize()
        with torch.profiler.profile(activities=[activity]) as profiler:
            for _ in range(5):
                work()
            machine.synchronize()
        us = sum(
            event.device_time_total
            for event in profiler.key_averages()
            if "samkernels" in event.key
        )
        megabytes = gpu_cases.FLOOR[phase] * given.nbytes / MEGA
        rows.append(
            {
                "phase": phase,
                "us": us / 5,
                "MB of the model": megabytes,
                "GB/s": megabytes / (us / 5) * 1e3 if us else float("nan"),
            }
        )
    return rows


def one_step(stage: Stage, name: str, dtype: str) -> None:
    """What ncu watches: one SAM step, after two that warm up."""
    machine = gpu_cases.Machine(stage.dry_run)
    given = problem(machine.lists()[name], machine.device, getattr(torch, dtype))
    params = given.parameters()
    step = given.step_of(machine.candidates()["native"](params), params)
    step()
    step()
    machine.synchronize()
    if not stage.dry_run:
        torch.cuda.profiler.start()
    step()
    machine.synchronize()
    if not stage.dry_run:
        torch.cuda.profiler.stop()


# bench

ROUNDS = 20
COMPILE_SECONDS = 75


def bench(stage: Stage) -> None:
    """One SAM step, all candidates in turn, round after round; and the phases of native's."""
    ensure_built(stage)
    machine = gpu_cases.Machine(stage.dry_run)
    goals: list[Row] = []
    for name, shapes in machine.lists().items():
        for dtype in DTYPES:
            rows = bench_steps(stage, machine, name, shapes, dtype)
            stage.table(f"SAM step: {name}, {dtype}", rows)
            phases = bench_phases(stage, machine, shapes, dtype)
            stage.table(f"phases: {name}, {dtype}", phases)
            if dtype == "float32":
                goals += goals_of(name, rows)
    stage.table("goals", goals)


def suite(stage: Stage) -> None:
    """bench/test_*.py, without the compiled peer, which the stage bench has: for bench.report."""
    ensure_built(stage)
    file = stage.folder / "pytest_benchmark.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", f"--benchmark-json={file}"]
    chosen = "test_op and norms-1000 and native" if stage.dry_run else "not compile"
    device = "cpu" if stage.dry_run else "cuda"
    status, output = stage.run([*command, f"--device={device}", "-k", chosen], log="suite")
    stage.check(status == 0 and file.exists(), output[-500:])
    if file.exists():
        cases = json.loads(file.read_text())["benchmarks"]
        rows = [{"case": c["name"], "wall ms": 1e3 * c["stats"]["median"]} for c in cases]
        stage.table("median of each case", rows)


def bench_steps(
    stage: Stage,
    machine: gpu_cases.Machine,
    name: str,
    shapes: list[torch.Size],
    dtype: str,
) -> list[Row]:
    """A row per candidate."""
    given = problem(shapes, machine.device, getattr(torch, dtype))
    floor = sum(gpu_cases.FLOOR.values()) * given.nbytes
    steps: dict[str, Work] = {}
    host_ms: dict[str, float] = {}
    difference: dict[str, float] = {}
    expected: list[Tensor] = []
    for candidate, make in machine.candidates().items():
        params = given.parameters()
        step = given.step_of(make(params), params)
        stage.say(f"{name}, {dtype}: {candidate} warms up")
        if candidate == COMPILED and stage.seconds_left() < 2 * COMPILE_SECONDS:
            stage.note(f"{name}, {dtype}: no time was left for {candidate}")
            continue
        try:
            within(COMPILE_SECONDS, lambda step=step: [step() for _ in range(3)])  # type: ignore[misc]
        except Exception as error:
            # A peer that fails is reported; the package itself has to work.
            if candidate == "native":
                raise
            stage.note(
                f"{name}, {dtype}: {candidate} failed: {type(error).__name__}: {error}"[:300]
            )
            continue
        expected = expected or [p.detach().clone() for p in params]
        difference[candidate] = max(
            (p.detach().float() - e.float()).abs().max().item()
            for p, e in zip(params, expected, strict=True)
        )
        steps[candidate] = step
        host_ms[candidate] = statistics.median(machine.host_ms(step) for _ in range(7))
    del expected
    # The peers round differently; weights are of order 0.1, and a step moves them by 0.01.
    for candidate, value in difference.items():
        limit = 1e-5 if dtype == "float32" else 1e-2
        stage.check(value < limit, f"{name}, {dtype}: {candidate} is {value:.1e} off native")

    times: dict[str, dict[str, list[float]]] = {
        candidate: {"device": [], "cold": [], "wall": [], "host": []} for candidate in steps
    }
    speeds: list[float] = []
    for round_ in range(3 if stage.dry_run else ROUNDS):
        speeds.append(machine.copy_speed())
        for candidate, step in steps.items():
            of = times[candidate]
            of["device"].append(machine.device_ms(step, host_ms[candidate], cold=False))
            of["cold"].append(machine.device_ms(step, host_ms[candidate], cold=True))
            of["host"].append(machine.host_ms(step))
            of["wall"].append(machine.wall_ms_per_call(step))
        if round_ % 5 == 0:
            stage.say(f"{name}, {dtype}: round {round_ + 1}")
    speed = statistics.median(speeds)
    raw = {"copied bytes per ms": speeds, **times}
    stage.report.setdefault("raw", {})[f"{name}, {dtype}"] = raw
    native = statistics.median(times["native"]["device"])
    rows = []
    for candidate, of in times.items():
        low, median, high = quartiles(of["device"])
        rows.append(
            {
                "candidate": candidate,
                "device ms": median,
                "quartiles": f"{low:.4g} to {high:.4g}",
                "times native": median / native,
                "cold ms": statistics.median(of["cold"]),
                "wall ms": statistics.median(of["wall"]),
                "host us": 1e3 * statistics.median(of["host"]),
                "floor GB/s": floor / median / MEGA,
                "of copy": floor / median / speed,
                "cold of copy": floor / statistics.median(of["cold"]) / speed,
                "copy GB/s": speed / MEGA,
                "off native": difference[candidate],
            }
        )
    return rows


def within(seconds: int, work: Callable[[], object]) -> None:
    """Raises TimeoutError if the work takes longer."""

    def overdue(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, overdue)
    signal.alarm(seconds)
    try:
        work()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def bench_phases(
    stage: Stage,
    machine: gpu_cases.Machine,
    shapes: list[torch.Size],
    dtype: str,
) -> list[Row]:
    """A row per kernel of native's step, and of Triton's if it is there."""
    given = problem(shapes, machine.device, getattr(torch, dtype))
    works = {
        (backend, phase): work
        for backend in machine.kernel_backends()
        for phase, work in gpu_cases.phases(given, backend).items()
    }
    for work in works.values():
        work()  # Triton compiles at the first call
    times: dict[tuple[str, str], dict[str, list[float]]] = {
        key: {"warm": [], "cold": [], "host": []} for key in works
    }
    speeds = []
    for _ in range(3 if stage.dry_run else ROUNDS):
        speeds.append(machine.copy_speed())
        for key, work in works.items():
            of = times[key]
            of["host"].append(machine.host_ms(work))
            of["warm"].append(machine.device_ms(work, of["host"][-1], cold=False))
            of["cold"].append(machine.device_ms(work, of["host"][-1], cold=True))
    speed = statistics.median(speeds)
    rows = []
    for (backend, phase), of in times.items():
        native = times[machine.backend, phase]
        moved = gpu_cases.FLOOR[phase] * given.nbytes
        warm, cold = statistics.median(of["warm"]), statistics.median(of["cold"])
        rows.append(
            {
                "phase": phase,
                "backend": backend,
                "times native": warm / statistics.median(native["warm"]),
                "MB": moved / MEGA,
                "warm us": 1e3 * warm,
                "cold us": 1e3 * cold,
                "warm of copy": moved / warm / speed,
                "cold of copy": moved / cold / speed,
                "host us": 1e3 * statistics.median(of["host"]),
            }
        )
    return rows


# What to reach in fp32: the share of the copy's speed, how many times faster than a peer, and the
# host's time per step. A small list is host-bound.
SHARE_OF_COPY = {"ResNet-18": 0.75, "WRN-28-10": 0.9, "ViT-L": 0.9}
FASTER_THAN = {EAGER: 10.0, FOREACH: 2.0, COMPILED: 1.3}
HOST_US = {"ResNet-18": 100.0}
# Triton's step may take this many times native's on a large list, and no longer than foreach's.
TRITON_BEHIND = 1.1


def goals_of(name: str, rows: Sequence[Row]) -> list[Row]:
    """A row per goal for a list of tensors in fp32. Ratios to peers are of wall time: what a loop
    feels that does nothing else."""
    by_name = {row["candidate"]: row for row in rows}
    native = by_name["native"]
    goals: list[Row] = []

    def add(what: str, goal: float, here: float, at_least: bool = True) -> None:
        reached = here >= goal if at_least else here <= goal
        text = f"{'at least' if at_least else 'at most'} {goal:g}"
        verdict = "reached" if reached else "not reached"
        goals.append({"list": name, "what": what, "goal": text, "here": here, "": verdict})

    add("share of the copy's speed", SHARE_OF_COPY.get(name, 0.75), native["of copy"])
    if name in HOST_US:
        add("host microseconds per step", HOST_US[name], native["host us"], at_least=False)
    for peer, goal in FASTER_THAN.items():
        if peer in by_name and (peer != EAGER or name == "ResNet-18"):
            ratio = by_name[peer]["wall ms"] / native["wall ms"]
            add(f"times faster than {peer}", goal, ratio)
    if "triton" in by_name:
        triton = by_name["triton"]
        if name != "ResNet-18":
            behind = triton["device ms"] / native["device ms"]
            add("triton's time over native's", TRITON_BEHIND, behind, at_least=False)
        if FOREACH in by_name:
            ratio = by_name[FOREACH]["wall ms"] / triton["wall ms"]
            add(f"triton times faster than {FOREACH}", 1.0, ratio)
    return goals


# tune

# Sets of macros, each on top of the defaults; in the order in which they are tried.
VARIANTS = [
    "",
    "SAMKERNELS_CHUNK_SIZE=4096",
    "SAMKERNELS_CHUNK_SIZE=16384",
    "SAMKERNELS_CHUNK_SIZE=32768",
    "SAMKERNELS_THREADS=128",
    "SAMKERNELS_THREADS=512",
    "SAMKERNELS_STREAMING=0",
    "SAMKERNELS_REVERSE_PERTURB=0",
]

# A core from elsewhere takes the place of samkernels._C: in a new process, before samkernels comes.
WITH_CORE = """
import importlib.util, runpy, sys
spec = importlib.util.spec_from_file_location("samkernels._C", sys.argv.pop(1))
sys.modules["samkernels._C"] = core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
runpy.run_module("bench.gpu", run_name="__main__", alter_sys=True)
"""


def tune(stage: Stage, variants: Sequence[str]) -> None:
    """Variants of the core, built by macros, each timed in a process of its own, in two rounds."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu*"))
    known = []
    for variant in variants or VARIANTS:
        names = [define.partition("=")[0] for define in variant.split()]
        unknown = [name for name in names if name not in sources]
        if unknown and not stage.dry_run:
            stage.note(f"{variant}: csrc/cuda knows no {', '.join(unknown)}; left out")
        else:
            known.append(variant)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        cores = dict(zip(known, pool.map(lambda v: core_of(stage, v), known), strict=True))
    timed: dict[str, list[Row]] = {}
    for round_ in range(1 if stage.dry_run else 2):
        for variant, core in cores.items():
            if core is None or stage.seconds_left() < 45:
                if round_ == 0:
                    stage.check(core is not None, f"the variant {variant!r} cannot be built")
                continue
            command = [sys.executable, "-c", WITH_CORE, str(core)]
            command += ["time-core", str(stage.folder), *["--dry-run"][: stage.dry_run]]
            status, output = stage.run(command)
            found = re.search(r"^TIMES (.*)$", output, re.MULTILINE)
            stage.check(status == 0 and found is not None, f"{variant!r}: {output[-500:]}")
            if found:
                timed.setdefault(variant, []).append(json.loads(found[1]))
    rows = [
        {"variant": variant or "(defaults)", "round": i + 1, **times}
        for variant, rounds in timed.items()
        for i, times in enumerate(rounds)
    ]
    stage.table("cold device ms of each variant", rows)


def core_of(stage: Stage, variant: str) -> Path | None:
    """The core, built with these macros; for a rehearsal, the one that is there."""
    folder = ROOT / "build" / "tune" / (re.sub(r"\W+", "_", variant) or "defaults")
    defines = f"-DSAMKERNELS_CXX_DEFINES={variant}"
    status = run_cmake(stage, folder, [defines], log=f"tune_{folder.name}")
    if stage.dry_run:
        return Path(native._C.__file__)
    built = list(folder.glob("_C*.so"))
    return built[0] if status == 0 and built else None


def time_core(stage: Stage) -> None:
    """Times of the phases and of a step with this process's core, as one line of JSON."""
    machine = gpu_cases.Machine(stage.dry_run)
    times = {}
    for name, shapes in machine.lists().items():
        given = problem(shapes, machine.device)
        works = gpu_cases.phases(given, machine.backend)
        params = given.parameters()
        works["step"] = given.step_of(machine.candidates()["native"](params), params)
        for phase, work in works.items():
            host = [machine.host_ms(work) for _ in range(4)][-1]
            values = [
                machine.device_ms(work, host, cold=True) for _ in range(3 if stage.dry_run else 25)
            ]
            times[f"{name} {phase}"] = statistics.median(values)
    print("TIMES", json.dumps(times))


STAGES: dict[str, Callable[[Stage], None]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "profile": profile,
    "bench": bench,
    "suite": suite,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=[*STAGES, "tune", "one-step", "time-core"])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "variants", nargs="*", help='tune: sets of macros, such as "NAME=1 OTHER=2"'
    )
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--list", default="", help="one-step: the parameter list")
    parser.add_argument("--dtype", default="float32", help="one-step: the dtype")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device: --dry-run rehearses a stage without one")
    stage = Stage(arguments.stage, arguments.folder.resolve(), arguments.dry_run)
    if stage.name == "one-step":
        return one_step(stage, arguments.list, arguments.dtype)
    if stage.name == "time-core":
        return time_core(stage)
    try:
        if stage.name == "tune":
            tune(stage, arguments.variants)
        else:
            STAGES[stage.name](stage)
    except Exception as error:
        stage.check(False, f"{type(error).__name__}: {error}")
        raise
    finally:
        stage.write()  # what was found so far, after a failure too
    if stage.failures:
        raise SystemExit("\n".join(["", *stage.failures]))
    stage.say(f"done: {stage.folder / stage.name}.md")


if __name__ == "__main__":
    main()
