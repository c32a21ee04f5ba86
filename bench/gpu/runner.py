"""Runs the steps of a plan: each with a cap, a log and a line in the table, whatever became of the
others. After every group of steps all that is known is packed."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What a step came to.
OK, FAILED, STOPPED = "ok", "failed", "stopped at its cap"
MISSING, SKIPPED, NOT_NEEDED = "missing", "no time left", "not needed"

NO_DEVICE = 3  # exit status of a step without which no other one has a meaning

PACKING = 8.0  # seconds of the limit that are kept for the end
GRACE = 5.0  # seconds from the interrupt to the end of a process
LEAST = 8.0  # seconds that a step needs at least
LARGEST = 4 << 20  # bytes; larger files are weights and the like, and not packed
LARGEST_ARCHIVE = 15 << 20
LINES_SHOWN = 15


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        cap: seconds that it may take.
        env: on top of the runner's.
        unless: the name of a step that makes this one unnecessary if it is ok.
        expect: a pattern that the log has to hold; the exit status then says nothing.
    """

    name: str
    cap: float
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    unless: str = ""
    expect: str = ""


@dataclass
class Outcome:
    """A line of the table of steps."""

    step: str
    status: str
    exit: int | None = None
    seconds: float = 0.0
    cap: float = 0.0


class Runner:
    """Runs groups of steps; those of a group side by side.

    Args:
        evidence: the folder for logs and for what the steps write.
        limit: seconds for all of it.
        env: of every step.
        pack: called after every group.
    """

    def __init__(
        self,
        evidence: Path,
        limit: float,
        env: Mapping[str, str],
        pack: Callable[[list[Outcome], float], None],
    ) -> None:
        self.evidence, self.limit, self.env, self._pack = evidence, limit, dict(env), pack
        self.outcomes: list[Outcome] = []
        self._begin = time.monotonic()
        evidence.mkdir(parents=True, exist_ok=True)
        # A shell's background job ignores interrupts, and so would the steps.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def seconds_left(self) -> float:
        return self.limit - (time.monotonic() - self._begin)

    def run(self, groups: Sequence[Sequence[Step]]) -> None:
        for group in groups:
            self._run_together(group)
            self._pack(self.outcomes, self.limit - self.seconds_left())
            if any(outcome.exit == NO_DEVICE for outcome in self.outcomes):
                return

    def _run_together(self, group: Sequence[Step]) -> None:
        running = [process for step in group if (process := self._start(step))]
        try:
            while not all([process.is_over() for process in running]):  # each is asked
                time.sleep(0.05)
        finally:
            for process in running:
                process.end()
        for process in running:
            self._add(process.outcome)
            if process.outcome.status != OK:
                _show_end(process.log)

    def _start(self, step: Step) -> _Process | None:
        room = self.seconds_left() - PACKING - GRACE
        cap = min(step.cap, room)
        status = None
        if step.unless and any(o.step == step.unless and o.status == OK for o in self.outcomes):
            status = NOT_NEEDED
        elif cap < min(LEAST, step.cap):
            status = SKIPPED
        elif shutil.which(step.command[0], path=self.env.get("PATH")) is None:
            status = MISSING
        if status:
            self._add(Outcome(step.name, status, cap=round(cap, 1)))
            return None
        left = {"SECONDS_LEFT": f"{room:.0f}"}
        env = {**os.environ, **self.env, **step.env, **left}
        return _Process(step, cap, self.evidence / f"{step.name}.log", env)

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(
            f"== {outcome.step}: {outcome.status}, {outcome.seconds:.0f} s; "
            f"{self.seconds_left():.0f} s left",
            flush=True,
        )


class _Process:
    """A step that runs."""

    def __init__(self, step: Step, cap: float, log: Path, env: Mapping[str, str]) -> None:
        self.step, self.log, self._cap = step, log, cap
        self.outcome = Outcome(step.name, OK, cap=round(cap, 1))
        self._begin = time.monotonic()
        self._interrupted_at: float | None = None
        with log.open("wb") as output:
            output.write(f"$ {' '.join(step.command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=env,
                start_new_session=True,  # so that its children end with it
            )

    def is_over(self) -> bool:
        """Whether the process has ended; interrupts it at its cap, and kills it a little later."""
        if self._process.poll() is not None:
            if not self.outcome.seconds:
                self.outcome.seconds = round(time.monotonic() - self._begin, 1)
            return True
        now = time.monotonic()
        if self._interrupted_at is not None:
            if now > self._interrupted_at + GRACE:
                self._kill()
        elif now > self._begin + self._cap:
            self._interrupted_at = now
            # Pytest writes its report then; its workers would not, if they were interrupted too.
            self._process.send_signal(signal.SIGINT)
        return False

    def end(self) -> None:
        """Whatever is left of it is killed; judges the step."""
        self._kill()
        self._process.wait()
        outcome = self.outcome
        outcome.exit = self._process.returncode
        if self._interrupted_at is not None:
            outcome.status = STOPPED
        elif self.step.expect:
            found = re.search(self.step.expect, self.log.read_text(errors="replace"))
            outcome.status = OK if found else FAILED
        elif outcome.exit != 0:
            outcome.status = FAILED

    def _kill(self) -> None:
        """With its children."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _show_end(log: Path) -> None:
    for line in log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]:
        print(f"    {line[:200]}", flush=True)


def rows_of(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    return [asdict(outcome) for outcome in outcomes]


def write_archive(evidence: Path, target: Path) -> None:
    """All files of the evidence as .tgz; of long ones their beginning and their end. A reader never
    finds half of it."""
    for longest in (1 << 20, 1 << 16, 1 << 13):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as tar:
            for path in sorted(p for p in evidence.rglob("*") if p.is_file()):
                name = path.relative_to(evidence.parent).as_posix()
                size = path.stat().st_size
                data = shortened(path, longest) if size <= LARGEST or path.suffix == ".log" else b""
                if size and not data:
                    name, data = f"{name}.left-out", f"{size} bytes\n".encode()
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
                tar.addfile(entry, io.BytesIO(data))
        if len(content.getbuffer()) <= LARGEST_ARCHIVE:
            break
    write_whole(target, content.getvalue())


def shortened(path: Path, longest: int) -> bytes:
    """The file, or its first and its last half of `longest` bytes."""
    with path.open("rb") as file:
        if path.stat().st_size <= longest or path.suffix == ".json":
            return file.read()
        begin = file.read(longest // 2)
        file.seek(-(longest // 2), io.SEEK_END)
        return begin + b"\n[...]\n" + file.read()


def write_whole(path: Path, content: bytes) -> None:
    """Whoever reads the path finds the old content or the new one."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
