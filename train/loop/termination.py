"""Heed SIGTERM, with which queues end jobs: training stops after a step, and saves where it was."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

from train.shared.errors import TerminatedError


class Termination:
    """A block in which SIGTERM raises TerminatedError; in held(), it is only noted in `asked`.

    Outside of the main thread, which alone may handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._is_held = False

    def __enter__(self) -> "Termination":
        self._handles = threading.current_thread() is threading.main_thread()
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep SIGTERM from interrupting the block, which has to look at `asked`."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self._is_held:
            raise TerminatedError(
                "ended by SIGTERM: the same command goes on (a single run: with --resume)"
            )
