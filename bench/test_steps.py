"""Benchmark whole optimizer steps, gradients given: `make bench`.

The cases run one after the other. Ratios that are to hold on a machine whose speed drifts come from
bench.side_by_side, in which all candidates take turns.
"""

from __future__ import annotations

import pytest
import torch

from bench.candidates import VARIANTS, candidates, problem
from bench.clock import Clock
from bench.conftest import Take
from bench.lists import LISTS, numel_of

CPU = torch.device("cpu")
# Names that there may be on any device; a test whose candidate is missing here is skipped.
NAMES = ["triton", *candidates("SAM", CPU)]
DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize("candidate", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", LISTS)
def test_sam(of: str, dtype: str, candidate: str, take: Take, clock: Clock) -> None:
    step_of("SAM", of, dtype, candidate, take, clock)


@pytest.mark.parametrize("candidate", NAMES)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "SAM"])
def test_variants(variant: str, candidate: str, take: Take, clock: Clock) -> None:
    step_of(variant, "ResNet-18", "float32", candidate, take, clock)


def step_of(variant: str, of: str, dtype: str, candidate: str, take: Take, clock: Clock) -> None:
    shapes = LISTS[of]()
    makes = candidates(variant, clock.device, len(shapes))
    if candidate not in makes:
        pytest.skip(f"{candidate} has no {variant} for {of} on this device")
    given = problem(shapes, clock.device, getattr(torch, dtype))
    params = given.parameters()

    def first_steps() -> object:
        """With all that the optimizer keeps."""
        step = given.step_of(makes[candidate](params), params)
        step()
        step()
        return step

    if "compile" in candidate:
        first_steps()  # the compiler's own memory is not the step's
    memory = clock.peak_bytes(first_steps)
    take(
        given.step_of(makes[candidate](params), params),
        f"{variant}, {of}, {dtype}",
        what="step",
        variant=variant,
        list=of,
        dtype=dtype,
        candidate=candidate,
        tensors=len(shapes),
        elements=numel_of(shapes),
        floor_bytes=VARIANTS[variant].elements * given.nbytes,
        peak_bytes=memory,
    )
