"""Define what all benchmarks share: the device, and a fixture that takes every figure of a case."""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.clock import Clock, Work, quartiles
from bench.side_by_side import environment

# Seconds that the rounds of a case may take, and how many rounds there are at least and at most.
SECONDS = 0.5
ROUNDS = (5, 50)
COLD_ROUNDS = 9

Take = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.addoption("--quick", action="store_true", help="two rounds of everything")
    parser.addoption("--batch", type=int, help="images of a training step")
    parser.addoption("--precision", choices=["fp32", "bf16"], default="fp32", help="of the passes")


def _device(config: pytest.Config) -> torch.device:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(config.getoption("--device") or default)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return _device(pytestconfig)


@pytest.fixture(scope="session")
def clock(device: torch.device) -> Clock:
    return Clock(device)


@pytest.fixture
def take(benchmark: BenchmarkFixture, clock: Clock, pytestconfig: pytest.Config) -> Take:
    """Measure a piece of work: pytest-benchmark gets its wall time with warm caches, extra_info the
    rest, as lower quartile, median and upper quartile.

    cold_ms: with caches that a large copy has emptied. GB_per_s: the speed of that copy. On a GPU
    also device_ms and host_ms (of the device alone, and until all is enqueued).
    """

    def take(work: Work, group: str, **facts: Any) -> None:
        quick = pytestconfig.getoption("--quick")
        for _ in range(1 if quick else 3):
            estimate = clock.wall_ms(work)
        rounds = min(max(int(1e3 * SECONDS / estimate), ROUNDS[0]), ROUNDS[1])
        cold_rounds = COLD_ROUNDS
        if quick:
            rounds = cold_rounds = 2
        benchmark.group = group
        benchmark.extra_info |= facts

        def until_done() -> None:
            work()
            clock.synchronize()

        benchmark.pedantic(until_done, rounds=rounds)
        host_ms = statistics.median(clock.host_ms(work) for _ in range(1 if quick else 5))
        speeds, cold = [], []
        for _ in range(cold_rounds):
            speeds.append(1e-6 * clock.copy_speed())
            cold.append(clock.device_ms(work, host_ms))
        figures = {"cold_ms": cold, "GB_per_s": speeds}
        if clock.cuda:
            figures["host_ms"] = [clock.host_ms(work) for _ in range(rounds)]
            figures["device_ms"] = [clock.device_ms(work, host_ms) for _ in range(rounds)]
        benchmark.extra_info |= {name: quartiles(values) for name, values in figures.items()}

    return take


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """A figure comes with the commit, the versions, the device, its driver and its clocks."""
    device = _device(config)
    machine_info["environment"] = {**environment(), **describe_gpu(device)}


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Without single rounds and the name of the host: small enough, and fit, to be committed."""
    output_json["machine_info"] = {"environment": output_json["machine_info"]["environment"]}
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Name, driver and clocks as found; nothing for a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return {
        "device": properties.name,
        "memory GB": round(properties.total_memory / 1e9, 1),
        "cuda of torch": torch.version.cuda,
        **dict(zip(query.split(","), re.split(r",\s*", found), strict=False)),
    }
