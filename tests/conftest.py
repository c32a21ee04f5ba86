"""What all tests share: one thread, the stand-ins for GPUs, markers, and who runs which cases.

Nothing is marked by hand that can be read off the parameters or the module of a test. What takes
long is marked `full`: the slice for every day has none of it. Of optimizers, the driver and the
slow stand-ins it has only enough cases that every value occurs.

    pytest                    the full matrix (make test-all)
    pytest -m "not full"      its slice for every day (make test)
    pytest --products         every combination of parameters, too
"""

from __future__ import annotations

import gc
import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from samkernels import backends
from tests import stand_ins

MISSING = stand_ins.register()  # before any module of tests asks which backends there are

# Of modules, beside what parameters and fixtures say.
MARKERS = {
    "test_alignment": {"emulated"},
    "test_reduction": {"emulated"},
    "test_traffic": {"emulated"},
    "test_emulation": {"emulated"},
    "test_on_gpu": {"load"},
    "test_cuda_build": {"build"},
    "test_portability": {"build"},
    "test_sanitizers": {"build"},
    "test_family_ranks": {"processes"},
    "test_fsdp": {"processes"},
    "test_optim_ranks": {"processes"},
    "test_train_distributed": {"processes"},
    "test_frameworks": {"frameworks"},
    "test_load": {"load"},
}
FIXTURES = {"emulated_core": "emulated", "interpreted_kernels": "interpreted"}
LEFT_TO_TEST_ALL = {"build", "frameworks", "load", "processes"}
# Whose cases look at what was done once for all of them: every combination is as good as free.
SHARED_WORK = {"build", "processes"}
# Of whose cases `make test` has only enough that every value occurs, on whatever backend.
THIN = "test_family", "test_optim", "test_train", "test_triton"
# Whose fixtures are made once for the module: by one worker.
ONE_WORKER = {name for name, markers in MARKERS.items() if markers & SHARED_WORK}
ONE_WORKER |= {"test_bench", "test_instructions", "test_train_checkpoints", "test_train_sharpness"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--products", action="store_true", help="all combinations of parameters")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # for the fixtures of modules
    missing = {name: why for name, why in MISSING.items() if why != stand_ins.SWITCHED_OFF}
    if missing and os.environ.get("CI") == "true":
        raise pytest.UsageError(f"CI is set, and tests would be skipped: {missing}")


def pytest_collection_finish() -> None:
    # The cases and modules stay: the collector need not go through them again and again.
    gc.collect()
    gc.freeze()


def pytest_sessionstart() -> None:
    # What a test starts is no worker of pytest-xdist; pytest-benchmark would not measure there.
    os.environ.pop("PYTEST_XDIST_WORKER", None)


# -- fixtures --------------------------------------------------------------------------------------


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
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder for what is saved; and what the frameworks leave behind is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of it
    before = signal.getsignal(signal.SIGINT)  # Lightning ignores it once it was interrupted
    yield
    signal.signal(signal.SIGINT, before)


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
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the driver write empty ones: to draw them takes longer than a short training."""
    from train.shared import results

    monkeypatch.setattr(results, "save_figure", lambda path, figure: path.write_bytes(b""))


@pytest.fixture
def emulated_core() -> Any:
    """The compiled kernels for CUDA, on the emulation."""
    module: Any = backends.get("emulated")
    return module._C


@pytest.fixture
def interpreted_kernels() -> None:
    """For tests that call "interpreted" themselves."""


# -- which cases -----------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        for marker in markers_of(item):
            item.add_marker(marker)
        for name, why in MISSING.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=why))
        functions[item.nodeid.partition("[")[0]].append(item)
    # Who names a case gets it.
    if config.getoption("products") or any("[" in argument for argument in config.args):
        return
    kept = []
    for cases in functions.values():
        cases = [case for case in cases if not takes_minutes(case)]
        if not SHARED_WORK & markers_of(cases[0]):
            cases = covering(cases, 2)
        daily = [case for case in cases if not case.get_closest_marker("full")]
        slices = [daily]
        if not module_of(cases[0].nodeid).startswith(THIN):
            slices = [[c for c in daily if c.get_closest_marker(k)] for k in stand_ins.STAND_INS]
        for slow in slices:
            few = covering(slow, 1)
            for case in slow:
                if case not in few:
                    case.add_marker("full")
        kept += cases
    dropped = set(items).difference(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def markers_of(item: pytest.Item) -> set[str]:
    """The stand-ins that a test runs on, the kind of its module, and whether `make test` leaves it
    to `make test-all`."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = [getattr(value, "backend", value) for value in values]
    markers = {name for name in names if isinstance(name, str) and name in stand_ins.STAND_INS}
    markers |= {FIXTURES[name] for name in FIXTURES if name in item.fixturenames}
    module = module_of(item.nodeid)
    markers |= MARKERS.get(module, set())
    markers |= {mark.name for mark in item.iter_markers() if mark.name in LEFT_TO_TEST_ALL}
    return markers | ({"full"} if markers & LEFT_TO_TEST_ALL else set())


def module_of(nodeid: str) -> str:
    return nodeid.partition(".py")[0].rpartition("/")[-1]


def takes_minutes(item: pytest.Item) -> bool:
    """A list of a thousand tensors is for the tables of the kernels: there is none for the
    interpreter, and on the emulation it does not depend on the dtype."""
    names = item.callspec.id.split("-") if hasattr(item, "callspec") else []
    return "thousand" in names and (
        "interpreted" in names or ("emulated" in names and "float32" not in names)
    )


def covering(cases: Sequence[pytest.Item], strength: int) -> list[pytest.Item]:
    """Cases of one function that have among them all that single values (strength 1) or pairs of
    values (2) of its parameters ever come in; what is parametrized together is one parameter.

    A function of two parameters keeps all of its cases in pairs. Of three, there is a choice."""
    combined = [set(combinations(values_of(case), strength)) for case in cases]
    most = max(map(len, combined), default=0)
    if most == 0:  # fewer parameters than that
        return list(cases)
    seen: set[Any] = set()
    chosen = set()
    for new in range(most, 0, -1):  # first those that add much
        for i, of_case in enumerate(combined):
            if i not in chosen and len(of_case - seen) >= new:
                chosen.add(i)
                seen |= of_case
    return [case for i, case in enumerate(cases) if i in chosen]


def values_of(item: pytest.Item) -> list[tuple[Any, ...]]:
    """What each parametrization gives to a case. Values are what they are as objects: that is safe
    for tensors, functions and nan, and the same object comes in all cases of a value."""
    if not hasattr(item, "callspec"):
        return []
    ids = {name: id(value) for name, value in item.callspec.params.items()}
    values = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        names = names.replace(",", " ").split() if isinstance(names, str) else names
        values.append(tuple((name, ids.pop(name)) for name in names))
    return sorted(values + [(one,) for one in ids.items()])  # the rest: parameters of fixtures


# -- who runs them: pytest-xdist -------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFunction(LoadScopeScheduling):
        """A function goes to one worker with all its cases, or a whole module does."""

        def _split_scope(self, nodeid: str) -> str:
            module = module_of(nodeid)
            return module if module in ONE_WORKER else nodeid.partition("[")[0]

    return ByFunction(config, log)
