"""Sums by the CUDA kernels, on the emulation: one launch for every table of tensors, in which the
block that finishes a tensor adds up its chunks, and the one that finishes the last tensor adds up
all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import backends, ops
from tests.helpers import assert_same_bits

CHUNK = 8192  # csrc/cuda/multi_tensor_apply.cuh
EMULATED: dict[str, Any] = {"backend": "emulated"}
# Numbers of elements. A table holds 1625 tensors of one list, 1161 of two, 903 of three.
LISTS = {
    "one of several chunks": [9 * CHUNK + 1],
    "chunks and none": [0, 3, 2 * CHUNK, 0, CHUNK, CHUNK + 1, 0],
    "empty first tables": [0] * 3500 + [5, 3 * CHUNK],
    "empty last tables": [5, 3 * CHUNK] + [0] * 3500,
    "empty tables between": [2 * CHUNK + 1] + [0] * 3500 + [7],
    "all empty, several tables": [0] * 3500,
    "across tables": [(i % 25 == 0) * (i % 11) + (i % 900 == 0) * 2 * CHUNK for i in range(3700)],
}


def tensors(sizes: list[int], seed: int) -> list[Tensor]:
    values = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed))
    return list(values.split(sizes))


def sums(name: str) -> list[Tensor]:
    x, y, w = (tensors(LISTS[name], seed) for seed in range(3))
    forms = (
        ops.dots(x, **EMULATED),
        ops.dots(x, weights=w, **EMULATED),
        ops.dots(x, y, **EMULATED),
        ops.dots(x, y, w, **EMULATED),
    )
    return [found for form in forms for found in form]


@pytest.mark.parametrize("name", LISTS)
def test_sums(name: str) -> None:
    x, y, w = (tensors(LISTS[name], seed) for seed in range(3))
    expected = [
        *ops.dots(x, backend="reference"),
        *ops.dots(x, weights=w, backend="reference"),
        *ops.dots(x, y, backend="reference"),
        *ops.dots(x, y, w, backend="reference"),
    ]
    for ours, theirs in zip(sums(name), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)


def test_a_tensor_of_more_chunks_than_a_block_has_threads() -> None:
    x = torch.randn(300 * CHUNK + 1)
    found = ops.dots([x], **EMULATED)
    for square in (found.total[0], found.per_tensor[0, 0]):
        torch.testing.assert_close(square, x.double().square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["one of several chunks", "chunks and none"])
def test_the_order_of_the_blocks_does_not_matter(name: str) -> None:
    """They run in another one at every launch (csrc/emulation)."""
    first = sums(name)
    for _ in range(3):
        assert_same_bits(sums(name), first)


@pytest.mark.parametrize("name", LISTS)
def test_tables_of_empty_tensors_are_not_launched(name: str) -> None:
    sizes, room = LISTS[name], 192 if len(LISTS[name]) <= 192 else 1625
    tables = [sizes[i : i + room] for i in range(0, len(sizes), room)]
    core: Any = backends.get("emulated")
    core._C.take_launches()
    ops.dots(tensors(sizes, 0), **EMULATED)
    assert core._C.take_launches() == max(1, sum(any(table) for table in tables))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -0.0, 1e-45, 3e38])
@pytest.mark.parametrize("other", [math.nan, math.inf, -math.inf, 0.0, -1e-45, 3e38])
def test_signs_are_compared_as_products_are(value: float, other: float) -> None:
    """The kernel looks at signs where the definition has a product in double."""
    first, second = [torch.tensor([value])], [torch.tensor([other])]
    found = ops.dots(first, second, first, **EMULATED).total
    expected = ops.dots(first, second, first, backend="reference").total
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
