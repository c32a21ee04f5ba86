"""The CUDA kernels on lists that no 16-byte access fits: which access is used changes neither bits
nor traffic. Gradients are so in the buckets of DistributedDataParallel (gradient_as_bucket_view),
and shards of flat parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import backends, ops
from samkernels.ops import Mix
from tests.helpers import CHANNELS_LAST, Slot, assert_same_bits, copies, make_list

# Chunks of 8192 elements: two whole ones; loads in flight, single ones and a rest in the third.
SHAPES = [((2 * 8192 + 5003,), None), ((7, 12, 3, 3), None), ((7, 12, 3, 3), CHANNELS_LAST)]
EMULATED: dict[str, Any] = {"backend": "emulated"}


def lists_with(which: int | None, offset: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Six lists, of which one (or, for None, every one) lies `offset` elements behind a multiple of
    16 bytes."""
    return [
        make_list(
            [
                Slot(shape, order=order, offset=offset if which in (None, i) else 0)
                for shape, order in SHAPES
            ],
            dtype,
            seed=i,
        )
        for i in range(6)
    ]


def everything(w: Any, old: Any, g1: Any, g2: Any, buffer: Any, squares: Any) -> list[Tensor]:
    """The results of every kernel."""
    torch._foreach_abs_(squares)
    forms = (
        ops.dots(g1, **EMULATED),
        ops.dots(g1, weights=w, **EMULATED),
        ops.dots(g1, g2, **EMULATED),
        ops.dots(g1, g2, w, **EMULATED),
    )
    sums = [found for form in forms for found in form]
    square = torch.tensor(4.0, dtype=torch.float64)
    ops.perturb_(w, g1, old, rho=0.1, square=square, **EMULATED)
    results = [*sums, *copies(w)]
    ops.perturb_(w, g1, old, rho=0.1, square=square, eta=0.1, saves=False, **EMULATED)
    results += copies(w)
    ops.perturb_(w, old, old, rho=0.1, square=square, **EMULATED)
    results += [*copies(w), *copies(old)]
    for mix in (Mix(g2), Mix(g1, g2, function="sign")):
        for init_momentum in (True, False):
            momentum = {"momentum": 0.9, "init_momentum": init_momentum}
            ops.sgd_(w, old, mix, buffer, lr=0.1, **momentum, **EMULATED)
        results += copies(w)
        steps = [torch.zeros(()) for _ in w]
        ops.adam_(w, old, mix, buffer, squares, steps, lr=0.1, **EMULATED)
        results += copies(w)
    ops.mix_(g2, Mix(g2, g1, function="sign"), **EMULATED)
    ops.sgd_hess_(w, g1, g2, buffer, lr=0.1, rho=0.1, momentum=0.9, **EMULATED)
    results += copies(w)
    ops.restore_(w, old, **EMULATED)
    return [*results, *w, *g2, *buffer, *squares]


@pytest.mark.parametrize("which", [None, *range(6)])
@pytest.mark.parametrize(
    ("dtype", "offset"),
    [
        (torch.float32, 1),  # 4 bytes
        (torch.float32, 2),  # 8 bytes
        (torch.bfloat16, 1),  # 2 bytes
        (torch.bfloat16, 2),  # 4 bytes
        (torch.float16, 4),  # 8 bytes
        (torch.float16, 7),
    ],
    ids=str,
)
def test_alignment_changes_nothing(dtype: torch.dtype, offset: int, which: int | None) -> None:
    core: Any = backends.get("emulated")
    results, traffic = [], []
    for off_by in (0, offset):
        lists = lists_with(which, off_by, dtype)
        assert {t.data_ptr() % 16 for t in lists[which or 0]} == {off_by * dtype.itemsize}
        core._C.take_traffic()
        results.append(everything(*lists))
        traffic.append(core._C.take_traffic())
        for tensors in lists:
            tensors.assert_intact()  # type: ignore[attr-defined]
    # Sums are made in another order where other threads have the elements.
    sums = 8
    torch.testing.assert_close(results[1][:sums], results[0][:sums], rtol=1e-6, atol=0)
    assert_same_bits(results[1][sums:], results[0][sums:])
    assert traffic[1] == traffic[0]
