"""Measure durations of steps: by device events on CUDA, so that no step waits; by the clock
elsewhere."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# A mark is a torch.cuda.Event or a time in seconds.
Span = tuple[Any, Any]


class StepTimer:
    """The collected times of whole training steps and of the optimizer's share of each."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[Span, list[Span]]] = []
        self._optimizer_spans: list[Span] = []
        self._step_ms: list[float] = []
        self._optimizer_ms: list[float] = []

    @contextmanager
    def step(self, counted: bool = True) -> Iterator[None]:
        """Time a training step; forget the time if the step does not count (warm-up, lockstep)."""
        self._optimizer_spans = []
        start = self._mark()
        yield
        if counted:
            self._pending.append(((start, self._mark()), self._optimizer_spans))

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        """Time each call into the optimizer within a step; the times add up."""
        start = self._mark()
        yield
        self._optimizer_spans.append((start, self._mark()))

    def collect(self) -> None:
        """Read the marks of the steps so far; on CUDA this waits, so call it once per epoch."""
        if self._cuda and self._pending:
            torch.cuda.synchronize()
        for step, parts in self._pending:
            self._step_ms.append(self._milliseconds(step))
            if parts:  # a step that a CUDA graph replays has none
                self._optimizer_ms.append(sum(self._milliseconds(part) for part in parts))
        self._pending = []

    def summary(self) -> dict[str, float | int | None]:
        """Return medians in milliseconds over the counted steps, and how many these are; a median
        of no steps is None."""
        self.collect()
        counted = len(self._step_ms)
        optimizer = self._optimizer_ms
        return {
            "ms_per_optimizer_step": statistics.median(optimizer) if optimizer else None,
            "ms_per_training_step": statistics.median(self._step_ms) if counted else None,
            "timed_steps": counted,
        }

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, span: Span) -> float:
        start, end = span
        return start.elapsed_time(end) if self._cuda else 1e3 * (end - start)
