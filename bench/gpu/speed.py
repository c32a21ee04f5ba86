"""The timings, the most decisive first; speed.json is written after each of them.

    python -m bench.gpu.speed first|again FOLDER [--cores FILE.tgz] [--rehearse]
    python -m bench.gpu.speed compile FOLDER --list NAME [--rehearse]

`compile` fills the compiler's cache for the compiled peer, and leaves a note, while nothing is
timed. A peer that fails or differs is reported; native's failure is one of this program too.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.candidates import Make, problem
from bench.clock import Work, quartiles
from bench.gpu import questions, variants
from bench.gpu.cases import FLOOR, Machine, phases
from bench.gpu.goals import Row
from bench.gpu.runner import write_whole
from bench.lists import Shapes
from bench.names import COMPILED
from bench.tables import markdown_of_mappings

MEGA = 1e6
ROUNDS = {"first": 15, "again": 9}
PEER_SECONDS = 30  # to compile and to warm up
# Weights are of order 0.1, and a step moves them by 0.01; the peers round differently.
DIFFERENCE = {"float32": 1e-5, "bfloat16": 1e-2}


class Book:
    """What was found so far."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._begin, self._title = folder, time.monotonic(), ""
        self.report: dict[str, Any] = {"seconds": {}, "notes": [], "failures": []}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._begin:5.1f} s] {text}", flush=True)

    def note(self, text: str) -> None:
        """What is no failure of this package."""
        self.report["notes"].append(f"{self._title}: {text}")
        self.say(text)

    def take(self, title: str, make: Callable[[], list[Row]]) -> None:
        """One table; what it raises is kept, and the next one goes on."""
        begin, self._title = time.monotonic(), title
        try:
            self.report[title] = rows = make()
            self.say(f"{title}\n{markdown_of_mappings(rows)}\n")
        except Exception as error:
            self.report[title] = traceback.format_exc()
            self.report["failures"].append(f"{title}: {type(error).__name__}: {error}"[:300])
            self.say(f"FAILED: {title}\n{self.report[title]}")
        self.report["seconds"][title] = round(time.monotonic() - begin, 1)
        write_whole(self.folder / "speed.json", (json.dumps(self.report, indent=1) + "\n").encode())


def steps(
    book: Book, machine: Machine, shapes: Shapes, dtype: str, rounds: int, makes: dict[str, Make]
) -> list[Row]:
    """One SAM step: a row per candidate, all in turn, round after round. Native comes first."""
    given = problem(shapes, machine.device, getattr(torch, dtype))
    floor = sum(FLOOR.values()) * given.nbytes
    ready: dict[str, Work] = {}
    host_ms: dict[str, float] = {}
    difference: dict[str, float] = {}
    expected: list[Tensor] = []
    for candidate, make in makes.items():
        params = given.parameters()
        step = given.step_of(make(params), params)
        try:
            within(PEER_SECONDS, lambda step=step: [step() for _ in range(3)])  # type: ignore[misc]
        except Exception as error:
            if candidate == "native":
                raise
            book.note(f"{candidate}: {type(error).__name__}: {error}"[:300])
            continue
        expected = expected or [p.detach().clone() for p in params]
        difference[candidate] = max(
            (p.detach().float() - e.float()).abs().max().item()
            for p, e in zip(params, expected, strict=True)
        )
        if not difference[candidate] < DIFFERENCE[dtype]:
            book.note(f"{candidate} is {difference[candidate]:.1e} off native")
        ready[candidate] = step
        host_ms[candidate] = statistics.median(machine.host_ms(step) for _ in range(7))
    del expected

    times: dict[str, dict[str, list[float]]] = {
        candidate: {"device": [], "cold": [], "wall": [], "host": []} for candidate in ready
    }
    speeds: list[float] = []
    for _ in range(rounds):
        speeds.append(machine.copy_speed())
        for candidate, step in ready.items():
            of = times[candidate]
            of["device"].append(machine.device_ms(step, host_ms[candidate], cold=False))
            of["cold"].append(machine.device_ms(step, host_ms[candidate], cold=True))
            of["host"].append(machine.host_ms(step))
            of["wall"].append(machine.wall_ms_per_call(step))
    speed = statistics.median(speeds)
    native = statistics.median(times["native"]["device"])
    rows = []
    for candidate, of in times.items():
        low, median, high = quartiles(of["device"])
        cold = statistics.median(of["cold"])
        rows.append(
            {
                "candidate": candidate,
                "device ms": median,
                "quartiles": f"{low:.4g} to {high:.4g}",
                "times native": median / native,
                "cold ms": cold,
                "wall ms": statistics.median(of["wall"]),
                "host us": 1e3 * statistics.median(of["host"]),
                "of copy": floor / median / speed,
                "cold of copy": floor / cold / speed,
                "copy GB/s": speed / MEGA,
                "off native": difference[candidate],
            }
        )
    return rows


def kernels(machine: Machine, shapes: Shapes, dtype: str, rounds: int) -> list[Row]:
    """A row per kernel of native's step, and of Triton's if it is there."""
    given = problem(shapes, machine.device, getattr(torch, dtype))
    works = {
        f"{backend}|{phase}": work
        for backend in machine.kernel_backends()
        for phase, work in phases(given, backend).items()
    }
    for work in works.values():
        work()  # Triton compiles at the first call
    speed = statistics.median(machine.copy_speed() for _ in range(rounds))
    warm, cold = (machine.medians(works, rounds, cold) for cold in (False, True))
    rows = []
    for key in works:
        backend, phase = key.split("|")
        bytes_per_us_of_copy = speed / 1e3
        ideal = FLOOR[phase] * given.nbytes / bytes_per_us_of_copy
        rows.append(
            {
                "phase": phase,
                "backend": backend,
                "times native": warm[key] / warm[f"native|{phase}"],
                "MB": FLOOR[phase] * given.nbytes / MEGA,
                "warm us": warm[key],
                "cold us": cold[key],
                "warm of copy": ideal / warm[key],
                "cold of copy": ideal / cold[key],
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


def note_of(folder: Path, name: str) -> Path:
    """What `compile` leaves."""
    return folder / f"compiled_{name}.json"


def fill_cache(folder: Path, machine: Machine, name: str) -> None:
    begin = time.monotonic()
    given = problem(machine.lists()[name], machine.device)
    params = given.parameters()
    step = given.step_of(machine.compiled()(params), params)
    for _ in range(3):
        step()
    machine.synchronize()
    seconds = round(time.monotonic() - begin, 1)
    note_of(folder, name).write_text(json.dumps({"seconds": seconds}) + "\n")
    print(f"compiled for {name} in {seconds} s")


def measure(plan: str, folder: Path, machine: Machine, cores: Path | None) -> list[str]:
    """All of it; the failures."""
    rounds = 3 if machine.rehearse else ROUNDS[plan]
    book = Book(folder)
    book.take("copy", lambda: [{"GB/s": machine.copy_speed() / MEGA} for _ in range(5)])

    def compare(of: str, shapes: Shapes, dtype: str) -> None:
        makes = machine.candidates()
        book.take(f"step {of} {dtype}", lambda: steps(book, machine, shapes, dtype, rounds, makes))
        book.take(f"phases {of} {dtype}", lambda: kernels(machine, shapes, dtype, rounds))

    for of, shapes in machine.lists().items():
        compare(of, shapes, "float32")
    for of, shapes in machine.lists().items():
        if note_of(folder, of).exists():
            makes = {"native": machine.candidates()["native"], COMPILED: machine.compiled()}
            book.take(
                f"compiled {of}",
                lambda shapes=shapes, makes=makes: steps(  # type: ignore[misc]
                    book, machine, shapes, "float32", rounds, makes
                ),
            )
    if cores is not None and cores.exists():
        book.take("variants", lambda: variants.measure(machine, cores, folder, rounds))
    for dtype in ("float32", "bfloat16"):
        book.take(
            f"misaligned {dtype}",
            lambda dtype=dtype: questions.misaligned(machine, dtype, rounds),  # type: ignore[misc]
        )
    book.take("many tiny tensors", lambda: questions.tiny(machine, rounds))
    if not machine.rehearse:
        book.take("graph replay", lambda: questions.replay(machine, rounds))
    if plan == "first":
        book.take("rounded at random", lambda: questions.at_random(machine, rounds))
        for of, shapes in machine.lists().items():
            compare(of, shapes, "bfloat16")
    return list(book.report["failures"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=[*ROUNDS, "compile"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", default="ResNet-18", help="compile: the list of parameters")
    parser.add_argument("--cores", type=Path, help="variants of the core, if there is such a file")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    machine = Machine(arguments.rehearse)
    if arguments.plan == "compile":
        return fill_cache(arguments.folder, machine, arguments.list)
    if failures := measure(arguments.plan, arguments.folder, machine, arguments.cores):
        raise SystemExit("\n".join(["", *failures]))


if __name__ == "__main__":
    main()
