"""Benchmark how the cost of a SAM step grows: `make bench`.

With the number of parameters in 64 tensors, with the number of tensors that hold 4 M parameters
together, and with threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.candidates import VARIANTS, candidates, problem
from bench.clock import Clock
from bench.conftest import Take
from bench.lists import Shapes, equal_shapes, numel_of, resnet18_shapes
from bench.names import FOREACH

NAMES = ["native", "triton", "foreach", FOREACH]
TENSORS, ELEMENTS = 64, 1 << 22
# w, g1, g2, old and the momentum buffer; twice, for the optimizers that keep temporaries.
LISTS_HELD = {"native": 5, "triton": 5}
LISTS_HELD_BY_OTHERS = 10
SIZES = [10**4, 10**5, 10**6, 10**7, 10**8, 10**9]
COUNTS = [1, 4, 16, 64, 256, 1000, 4000, 10_000]


@pytest.mark.parametrize("candidate", NAMES)
@pytest.mark.parametrize("numel", SIZES)
def test_elements(numel: int, candidate: str, take: Take, clock: Clock) -> None:
    needed = 4 * numel * LISTS_HELD.get(candidate, LISTS_HELD_BY_OTHERS)
    free = free_bytes(clock)
    if needed > 0.9 * free:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free")
    grow("elements", equal_shapes(TENSORS, numel), candidate, take, clock)


@pytest.mark.parametrize("candidate", NAMES)
@pytest.mark.parametrize("tensors", COUNTS)
def test_tensors(tensors: int, candidate: str, take: Take, clock: Clock) -> None:
    grow("tensors", equal_shapes(tensors, ELEMENTS), candidate, take, clock)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("threads", range(1, (os.cpu_count() or 1) + 1))
def test_threads(threads: int, take: Take, clock: Clock) -> None:
    """The thread count is torch.set_num_threads'."""
    if clock.cuda:
        pytest.skip("threads are for the CPU")
    torch.set_num_threads(threads)
    grow("threads", resnet18_shapes(), "native", take, clock)


def grow(what: str, shapes: Shapes, candidate: str, take: Take, clock: Clock) -> None:
    makes = candidates("SAM", clock.device)
    if candidate not in makes:
        pytest.skip(f"{candidate} does not serve this device")
    given = problem(shapes, clock.device)
    params = given.parameters()
    take(
        given.step_of(makes[candidate](params), params),
        f"growth with {what}",
        what=f"growth with {what}",
        candidate=candidate,
        tensors=len(shapes),
        elements=numel_of(shapes),
        threads=torch.get_num_threads(),
        floor_bytes=VARIANTS["SAM"].elements * given.nbytes,
    )


def free_bytes(clock: Clock) -> int:
    """Of the device's memory; 0 where the system does not tell."""
    if clock.cuda:
        return torch.cuda.mem_get_info(clock.device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable")), 0)
