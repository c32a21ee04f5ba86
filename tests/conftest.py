"""What all tests share: one thread, the stand-ins for GPUs, markers, and who runs what.

Nothing is marked by hand that can be read off the parameters or the module of a test: `mark` below.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from samkernels import backends
from tests import stand_ins

MISSING = stand_ins.register()  # before any module of tests asks which backends there are

# By module, beside what the parameters say.
MARKERS = {
    "test_traffic": "emulated",
    "test_on_gpu": "emulated",
    "test_cuda_build": "build",
    "test_packaging": "build",
    "test_sanitizers": "build",
    "test_fsdp": "processes",
    "test_optim_ranks": "processes",
    "test_train_distributed": "processes",
    "test_frameworks": "frameworks",
    "test_load": "load",
}
# Fixtures that stand for a backend.
FIXTURES = {"emulated_core": "emulated", "interpreted_kernels": "interpreted"}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # for the fixtures of modules
    missing = {name: why for name, why in MISSING.items() if why != stand_ins.SWITCHED_OFF}
    if missing and os.environ.get("CI") == "true":
        raise pytest.UsageError(f"CI is set, and tests would be skipped: {missing}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads; tests that are about threads set their number."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest, one_thread: None) -> int:
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate as if nobody had used it yet, on the CPU: it is compared with loops."""
    from tests.recipes import forget_accelerate

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # A Trainer in bfloat16 sets it, for everything that comes after.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def emulated_core() -> Any:
    """The compiled kernels for CUDA, on the emulation."""
    module: Any = backends.get("emulated")
    return module._C


@pytest.fixture
def interpreted_kernels() -> None:
    """For tests that call "interpreted" themselves."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in markers_of(item):
            item.add_marker(marker)
        for name, why in MISSING.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=why))


def markers_of(item: pytest.Item) -> set[str]:
    """The stand-ins that a test runs on, and the kind of its module."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = [getattr(value, "backend", value) for value in values]
    markers = {name for name in names if isinstance(name, str) and name in stand_ins.STAND_INS}
    markers |= {FIXTURES[name] for name in FIXTURES if name in item.fixturenames}
    module = item.module.__name__.rpartition(".")[-1]
    return markers | ({MARKERS[module]} if module in MARKERS else set())
