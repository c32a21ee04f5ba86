"""The benchmarks compare equals: every candidate moves the parameters to the same place."""

from __future__ import annotations

import pytest
import torch

from bench import memory_floor
from bench.candidates import OPTIMIZERS, RHO, SGD_OPTIONS, sam_step
from bench.side_by_side import summarize
from samkernels import ops

SHAPES = [torch.Size(shape) for shape in [(8, 3, 3, 3), (8,), (10, 8), (10,)]]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_candidates_compute_the_same(name: str) -> None:
    step, params = sam_step(name, SHAPES)
    reference_step, reference_params = sam_step("reference", SHAPES)
    before = [p.detach().clone() for p in reference_params]
    for _ in range(3):
        step()
        reference_step()
    for p, expected, start in zip(params, reference_params, before, strict=True):
        assert not torch.equal(expected, start)
        # A few roundings of weights of order 0.1.
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)


def test_summary_divides_within_rounds() -> None:
    seconds = {name: [2.0, 4.0, 8.0] for name in OPTIMIZERS}
    seconds["native"] = [1.0, 2.0, 4.0]
    seconds["pass"] = [0.1, 0.2, 0.4]
    rows = {row["name"]: row for row in summarize(seconds)}
    assert rows["native"]["passes"] == pytest.approx(10)
    assert rows["foreach"]["times_native"] == pytest.approx(2)
    assert rows["foreach"]["median_ms"] == pytest.approx(4000)


@pytest.mark.skipif(
    memory_floor.why_unavailable() is not None, reason=str(memory_floor.why_unavailable())
)
def test_the_memory_floor_is_a_sam_step() -> None:
    step, (w, _, g1, g2, momentum_buffer) = memory_floor.memory_floor_step(1000)
    expected, expected_buffer = w.clone(), momentum_buffer.clone()
    old = torch.empty_like(w)
    ops.perturb_([expected], [g1], [old], rho=RHO)
    ops.sgd_([expected], [old], [g2], [expected_buffer], **SGD_OPTIONS)
    step()
    # The norm's last bit may differ.
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(momentum_buffer, expected_buffer, rtol=1e-6, atol=1e-7)
