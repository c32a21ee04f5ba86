"""pytest-benchmark of one SAM step on ResNet-18's parameters: `make bench`.

The candidates run one after the other here; bench/side_by_side.py alternates them, for ratios that
hold on a machine whose speed drifts.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.candidates import OPTIMIZERS, resnet18_shapes, sam_step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sam_step_resnet18(benchmark: BenchmarkFixture, name: str) -> None:
    step, _ = sam_step(name, resnet18_shapes())
    benchmark.group = "SAM step, ResNet-18, fp32"
    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
