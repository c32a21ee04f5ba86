"""Measure time and memory of a piece of work on a device, so that the figures can be compared.

A GPU works behind the host's back, so it has three times: of the device alone (CUDA events, with
the device kept busy while the host enqueues), of the host alone (until the work is enqueued), and
of both (what a loop feels that does nothing else).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Work = Callable[[], object]

# Larger than any cache: what is copied to find the memory's speed, and to empty the caches.
COPIED_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}
# Of the highest clock of any GPU: a sleep that is meant to outlast the host must not be too short.
CYCLES_PER_MS = 2e6


class Clock:
    """Measures on one device.

    Args:
        copied_elements: of the large copy; by default more than any cache holds.
    """

    def __init__(self, device: torch.device, copied_elements: int | None = None) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        numel = copied_elements or COPIED_ELEMENTS[device.type]
        self._source = torch.ones(numel, dtype=torch.float32, device=device)
        self._target = torch.empty_like(self._source)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def copy_speed(self) -> float:
        """Bytes per millisecond, read and written, of a large copy. It empties the caches."""
        ms = self.device_ms(lambda: self._target.copy_(self._source), host_ms=0.1)
        return 2 * self._source.nbytes / ms

    def wall_ms(self, work: Work) -> float:
        """Until the device is done."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def host_ms(self, work: Work) -> float:
        """Until the work is enqueued, with an idle device before; on a CPU, until it is done."""
        self.synchronize()
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)

    def device_ms(self, work: Work, host_ms: float, cold: bool = False) -> float:
        """What the device needs.

        Args:
            host_ms: what the host needs to enqueue the work; the device is kept busy for longer.
            cold: with caches that hold nothing of use.
        """
        if cold:
            self._target.copy_(self._source)
        if not self.cuda:
            return self.wall_ms(work)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        torch.cuda._sleep(int(CYCLES_PER_MS * (1.5 * host_ms + 0.1)))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak_bytes(self, work: Work) -> int:
        """The most that the work has allocated at a time, beyond what was there before: counted by
        PyTorch's allocators."""
        if self.cuda:
            self.synchronize()
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            work()
            self.synchronize()
            return torch.cuda.max_memory_allocated(self.device) - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            work()
        results = profile.profiler.kineto_results
        sizes = [size for _, size in sorted(_allocations(results.experimental_event_tree()))]
        held = peak = 0
        for size in sizes:
            held += size
            peak = max(peak, held)
        return peak


def _allocations(events: Iterable[Any]) -> Iterable[tuple[int, int]]:
    """When, and how many bytes; what is freed is negative."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.typed[1].alloc_size
        yield from _allocations(event.children)


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")
