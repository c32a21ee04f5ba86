"""Progress of a run: a bar on a terminal, an occasional line elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds


def make_console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal and has no width."""
    return Console() if sys.stdout.isatty() else Console(width=120)


class RunProgress:
    """Shows epoch, loss, accuracy, throughput and time left. A context manager."""

    def __init__(self, console: Console, title: str, epochs: int, steps_per_epoch: int) -> None:
        self._console, self._title = console, title
        self._epochs, self._total = epochs, epochs * steps_per_epoch
        self._started = self._last_line = time.perf_counter()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                # 80 columns hold the longest name with this.
                TextColumn("{task.description}"),
                BarColumn(bar_width=8),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=self._total, state="")

    def __enter__(self) -> "RunProgress":
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

    def update(
        self,
        done: int,
        epoch: int,
        loss: float,
        accuracy: float,
        val_accuracy: float | None,
        images_per_second: float,
    ) -> None:
        """Show the state after `done` steps of the run; accuracies as shares."""
        state = f"{epoch}/{self._epochs} loss {loss:.3f} acc {100 * accuracy:.1f}%"
        if val_accuracy is not None:
            state += f" val {100 * val_accuracy:.1f}%"
        state += f" {images_per_second:.0f}/s"
        if self._bar:
            self._bar.update(self._task, completed=done, state=state)
            return
        now = time.perf_counter()
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            left = (now - self._started) * (self._total - done) / done
            self._console.print(f"{self._title}  {state}  {left:.0f} s left", soft_wrap=True)
