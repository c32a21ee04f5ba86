"""Benchmark every op on every backend: `make bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench.candidates import ADAMW_OPTIONS, RHO, SGD_OPTIONS, ours, problem
from bench.clock import Clock, Work
from bench.conftest import Take
from bench.lists import LISTS, numel_of
from samkernels import ops
from samkernels.ops import Mix


class Lists(NamedTuple):
    """w, g1, g2, and lists of the same shapes that ops write."""

    w: list[Tensor]
    g1: list[Tensor]
    g2: list[Tensor]
    old: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    steps: list[Tensor]
    square: Tensor


class Op(NamedTuple):
    """An op as a step calls it.

    Attributes:
        elements: read and written per parameter: tests/test_traffic.py counts them.
        flops: floating-point operations per parameter, a division or root counted as one.
    """

    elements: int
    flops: int
    call: Callable[..., Any]


def _adam(x: Lists, **options: Any) -> object:
    return ops.adam_(
        x.w, x.old, Mix(x.g2, ascent_square=x.square), x.m, x.v, x.steps,
        decoupled_weight_decay=True, **ADAMW_OPTIONS, **options,
    )  # fmt: skip


def _direction(x: Lists, **options: Any) -> object:
    return ops.mix_(x.g2, Mix(x.g1, x.g2, function="sign"), **options)


# By the names that bench/results knows them by.
OPS: dict[str, Op] = {
    "norms": Op(1, 2, lambda x, **o: ops.dots(x.g1, **o)),
    "norms, adaptive": Op(2, 3, lambda x, **o: ops.dots(x.g1, weights=x.w, **o)),
    "perturb": Op(
        4, 2, lambda x, **o: ops.perturb_(x.w, x.g1, x.old, rho=RHO, square=x.square, **o)
    ),
    "restore": Op(2, 0, lambda x, **o: ops.restore_(x.w, x.old, **o)),
    "recombine": Op(3, 1, _direction),
    "compare": Op(3, 12, lambda x, **o: ops.dots(x.g1, x.g2, x.w, **o)),
    "sgd": Op(
        5, 6, lambda x, **o: ops.sgd_(
            x.w, x.old, Mix(x.g2, ascent_square=x.square), x.m, **SGD_OPTIONS, **o
        )
    ),
    "adam": Op(7, 14, _adam),
}  # fmt: skip
DTYPES = ["float32", "bfloat16"]


@pytest.mark.parametrize("backend", ["native", "triton", "foreach", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", ["ResNet-18", "1000 tiny tensors"])
@pytest.mark.parametrize("op", OPS)
def test_op(op: str, of: str, dtype: str, backend: str, take: Take, clock: Clock) -> None:
    if backend not in ours(clock.device):
        pytest.skip(f"{backend} does not serve this device")
    shapes = LISTS[of]()
    given = problem(shapes, clock.device, getattr(torch, dtype))
    take(
        work(op, lists_of(given.weights, given.first_grads, given.second_grads), backend),
        f"{op}, {of}, {dtype}",
        what="op",
        op=op,
        list=of,
        dtype=dtype,
        candidate=backend,
        elements=numel_of(shapes),
        floor_bytes=OPS[op].elements * given.nbytes,
        flops=OPS[op].flops * numel_of(shapes),
    )


def lists_of(w: list[Tensor], g1: list[Tensor], g2: list[Tensor]) -> Lists:
    m, v = ([torch.zeros_like(t) for t in w] for _ in range(2))
    steps = [torch.zeros((), device=t.device) for t in w]
    return Lists(w, g1, g2, [t.clone() for t in w], m, v, steps, ops.dots(g1).total[0])


def work(op: str, lists: Lists, backend: str) -> Work:
    return lambda: OPS[op].call(lists, backend=backend)
