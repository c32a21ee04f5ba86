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
    compared = ops.compare(x, y, w, **EMULATED)
    weighted, plain = ops.weighted_norms(x, w, **EMULATED)
    return [
        *ops.norms(x, **EMULATED), *weighted, *plain, *compared.second_norms, compared.sums
    ]  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_sums(name: str) -> None:
    x, y, w = ([t.double() for t in tensors(LISTS[name], seed)] for seed in range(3))
    scaled = [(a.float() * b.float()).double() for a, b in zip(x, w, strict=True)]
    expected = []
    for of in (x, scaled, x, y):
        per_tensor = torch.stack([t.square().sum() for t in of])
        expected += [per_tensor.sum().sqrt(), per_tensor.sqrt()]
    g1, g2, weights = torch.cat(x), torch.cat(y), torch.cat(w)
    products = [g1 * g1, g2 * g2, g1 * g2, g2.abs() > g1.abs(), g1 * g2 > 0, weights * weights]
    expected.append(torch.stack([p.double().sum() for p in products]))
    found = sums(name)
    for ours, theirs in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-23, atol=0)
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-12, atol=1e-9)


def test_a_tensor_of_more_chunks_than_a_block_has_threads() -> None:
    x = torch.randn(300 * CHUNK + 1)
    found = ops.norms([x], **EMULATED)
    for norm in (found.total, found.per_tensor[0]):
        torch.testing.assert_close(norm.double(), x.double().norm(), rtol=2**-23, atol=0)


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
    ops.norms(tensors(sizes, 0), **EMULATED)
    assert core._C.take_launches() == max(1, sum(any(table) for table in tables))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -0.0, 1e-45, 3e38])
@pytest.mark.parametrize("other", [math.nan, math.inf, -math.inf, 0.0, -1e-45, 3e38])
def test_signs_are_compared_as_products_are(value: float, other: float) -> None:
    """The kernel looks at signs where the definition has a product in double."""
    first, second = [torch.tensor([value])], [torch.tensor([other])]
    found = ops.compare(first, second, first, **EMULATED).sums
    expected = ops.compare(first, second, first, backend="reference").sums
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
