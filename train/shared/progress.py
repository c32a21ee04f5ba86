"""Show the progress of long work: a bar on a terminal, an occasional line elsewhere."""

import sys
import time
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # so many seconds pass from one line to the next


def make_console(quiet: bool = False) -> Console:
    """Make a console on standard output; it has 80 columns where there is no terminal."""
    return Console(quiet=quiet) if sys.stdout.isatty() else Console(width=80, quiet=quiet)


def duration(seconds: float) -> str:
    """Return text such as 42 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_Work = TypeVar("_Work", bound="WorkProgress")


class WorkProgress:
    """A view of how much of `total` is done, what the work says of itself, and the time left."""

    def __init__(self, console: Console, title: str, total: int | None, done: int = 0) -> None:
        """Begin at `done`. If nobody knows `total`, it is None, and no time left is shown."""
        self._console, self._title, self._total, self._before = console, title, total, done
        self._started = self._last_line = time.perf_counter()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                # 80 columns hold the longest name with this bar.
                TextColumn("{task.description}"),
                BarColumn(bar_width=8),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, state="")

    def __enter__(self: _Work) -> _Work:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, state: str) -> None:
        """Show the state after `done` of the total."""
        if self._bar:
            self._bar.update(self._task, completed=done, state=state)
            return
        now = time.perf_counter()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            here = done - self._before  # what came before the resume took no time here
            text = f"{self._title}  {state}"
            if self._total is not None and here:
                left = (now - self._started) * (self._total - done) / here
                text += f"  {duration(left)} left"
            self._console.print(text, soft_wrap=True, markup=False)


class RunProgress(WorkProgress):
    """A view of epoch, loss, accuracy, throughput and time left."""

    def __init__(
        self, console: Console, title: str, epochs: int, steps_per_epoch: int, done: int = 0
    ) -> None:
        super().__init__(console, title, epochs * steps_per_epoch, done)
        self._epochs = epochs

    def update(
        self,
        done: int,
        epoch: int,
        loss: float,
        accuracy: float,
        val_accuracy: float | None,
        images_per_second: float,
    ) -> None:
        """Show the state after `done` steps of the run; accuracies are shares."""
        state = f"{epoch}/{self._epochs} loss {loss:.3f} acc {100 * accuracy:.1f}%"
        if val_accuracy is not None:
            state += f" val {100 * val_accuracy:.1f}%"
        self.show(done, f"{state} {images_per_second:.0f}/s")
