"""How many bytes the CUDA kernels move, counted by the emulation in every load and store of a
tensor: the figures of the table in docs/kernels.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import SAM, SAMDirection, SAMMagnitude, SGDHess, backends, ops
from samkernels.ops import Mix
from tests.helpers import CHANNELS_LAST, CHUNK_SIZE, Slot, make_list

SLOTS = [Slot((n,)) for n in (1, 5, 512, CHUNK_SIZE - 1, CHUNK_SIZE + 7)]
# By one element, and by two: in bfloat16 pairs are accessed then.
MISALIGNED = [Slot((n,), offset=k) for k in (1, 2) for n in (1, 5, 512, CHUNK_SIZE + 7)]
OPTIONS: dict[str, Any] = {"backend": "emulated"}

Lists = list[list[Tensor]]


def mix_of(name: str, g1: list[Tensor], g2: list[Tensor]) -> Mix:
    """u = g2 by SAM, |g1| sign(g2) by SAMDirection, g2 + g1 by "linear"."""
    if name == "sam":
        return Mix(g2)
    return Mix(g1, g2, function="sign") if name == "sign" else Mix(g2, g1)


def sgd(mix: str, **options: Any) -> Callable[..., None]:
    return lambda w, old, g1, g2, buf, _: ops.sgd_(
        w, old, mix_of(mix, g1, g2), buf, lr=0.1, **options, **OPTIONS
    )


def sgd_hess(**options: Any) -> Callable[..., None]:
    return lambda w, old, g, hv, buf, _: ops.sgd_hess_(
        w, g, hv, buf, lr=0.1, rho=0.1, **options, **OPTIONS
    )


def adam(mix: str, found_inf: Tensor | None = None, **options: Any) -> Callable[..., None]:
    def run(w: list[Tensor], old: list[Tensor], g1: Any, g2: Any, m: Any, v: Any) -> None:
        torch._foreach_abs_(v)
        steps = [torch.zeros(()) for _ in w]
        given = mix_of(mix, g1, g2)._replace(found_inf=found_inf)
        ops.adam_(w, old, given, m, v, steps, lr=0.1, **options, **OPTIONS)

    return run


def perturb(**options: Any) -> Callable[..., Any]:
    square = torch.tensor(4.0, dtype=torch.float64)
    return lambda w, old, g1, *_: ops.perturb_(w, g1, old, rho=0.1, square=square, **options)


def mix(name: str) -> Callable[..., Any]:
    return lambda w, old, g1, g2, *_: ops.mix_(g2, mix_of(name, g1, g2), **OPTIONS)


def kept(w: Any, old: Any, g1: list[Tensor], g2: list[Tensor], *_: Any) -> None:
    skipped = mix_of("linear", g1, g2)._replace(found_inf=torch.tensor(1.0))
    ops.mix_(g2, skipped, keeps=True, **OPTIONS)


MOMENTUM = {"momentum": 0.9, "weight_decay": 0.1}
# fp32 elements read and written per parameter.
TRAFFIC: dict[str, tuple[Callable[..., Any], int, int]] = {
    "dots": (lambda w, old, g1, *_: ops.dots(g1, **OPTIONS), 1, 0),
    "dots, weights": (lambda w, old, g1, *_: ops.dots(g1, weights=w, **OPTIONS), 2, 0),
    "dots, two lists": (lambda w, old, g1, g2, *_: ops.dots(g1, g2, **OPTIONS), 2, 0),
    "dots, three lists": (lambda w, old, g1, g2, *_: ops.dots(g1, g2, w, **OPTIONS), 3, 0),
    "perturb": (perturb(**OPTIONS), 2, 2),
    "perturb, saved": (perturb(saves=False, **OPTIONS), 2, 1),
    "restore": (lambda w, old, *_: ops.restore_(w, old, **OPTIONS), 1, 1),
    "sgd": (sgd("sam", **MOMENTUM), 3, 2),
    "sgd, first step": (sgd("sam", init_momentum=True, **MOMENTUM), 3, 2),
    "sgd, no momentum": (sgd("sam"), 2, 1),
    "sgd, sign": (sgd("sign", **MOMENTUM), 4, 2),
    "sgd, linear": (sgd("linear", **MOMENTUM), 4, 2),
    "adam": (adam("sam", weight_decay=0.1), 4, 3),
    "adam, decoupled": (adam("sam", weight_decay=0.1, decoupled_weight_decay=True), 4, 3),
    "adam, sign": (adam("sign"), 5, 3),
    "adam, linear": (adam("linear"), 5, 3),
    "adam, skipped": (adam("sam", found_inf=torch.tensor(1.0)), 1, 1),
    "mix": (mix("sam"), 1, 1),
    "mix, sign": (mix("sign"), 2, 1),
    "mix, linear": (mix("linear"), 2, 1),
    "mix, skipped and kept": (kept, 0, 0),
    "sgd_hess": (sgd_hess(**MOMENTUM), 4, 2),
    "sgd_hess, first step": (sgd_hess(init_momentum=True, **MOMENTUM), 3, 2),
    "sgd_hess, no momentum": (sgd_hess(), 3, 1),
}


@pytest.mark.parametrize("slots", [SLOTS, MISALIGNED], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TRAFFIC)
def test_bytes_per_parameter(name: str, dtype: torch.dtype, slots: list[Slot]) -> None:
    run, reads, writes = TRAFFIC[name]
    lists = [make_list(slots, dtype, seed=seed) for seed in range(6)]
    take_traffic()
    run(*lists)
    numel = sum(t.numel() for t in lists[0])
    assert take_traffic() == (reads * numel * dtype.itemsize, writes * numel * dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("order", "numel_twice"),
    # Contiguous kernels that chunks cut are averaged on both sides: 9 elements at each of 17 cuts.
    [((0, 1, 2, 3), 9 * 17), (CHANNELS_LAST, 0)],
    ids=["contiguous", "channels_last"],
)
def test_bytes_of_a_spatial_mean(
    order: tuple[int, ...], numel_twice: int, dtype: torch.dtype
) -> None:
    lists = [
        make_list([Slot((128, 128, 3, 3), order=order)], dtype, seed=seed) for seed in range(4)
    ]
    take_traffic()
    ops.sgd_hess_(*lists, lr=0.1, rho=0.1, **MOMENTUM, **OPTIONS)
    numel = lists[0][0].numel()
    read, written = take_traffic()
    assert written == 2 * numel * dtype.itemsize
    assert 4 * numel * dtype.itemsize <= read <= (4 * numel + numel_twice) * dtype.itemsize


@pytest.mark.parametrize("shape", [(1, 1, 150, 150), (2, 1, 300, 400)], ids=str)
def test_kernels_of_many_chunks_are_read_once(shape: tuple[int, ...]) -> None:
    lists = [make_list([Slot(shape)], torch.float32, seed=seed) for seed in range(4)]
    take_traffic()
    ops.sgd_hess_(*lists, lr=0.1, rho=0.1, **MOMENTUM, **OPTIONS)
    numel = lists[0][0].numel()
    assert take_traffic() == (4 * 4 * numel, 2 * 4 * numel)


@pytest.mark.parametrize("k", [1, 2])
def test_bytes_per_parameter_and_step_of_sgdhess(k: int) -> None:
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 512, CHUNK_SIZE + 7)]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "rho": 0.1, "k": k}
    optimizer = SGDHess(params, backend="emulated", **options)
    for _ in range(3):  # the first step makes the momentum buffers
        optimizer.zero_grad()
        optimizer.backward(sum((p**3).sum() for p in params))
        take_traffic()
        optimizer.step()
        read, written = take_traffic()
    assert read + written == (16 + 8) * sum(p.numel() for p in params)


# With statistics, g1, g2 and w are read once more, which gives the norms of g2 as well.
STATISTICS = 12


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("track_statistics", [False, True])
@pytest.mark.parametrize(
    ("cls", "granularity", "expected"),
    [
        (SAM, None, 4 + 16 + 20),
        (SAMDirection, "element", 4 + 16 + 24),
        (SAMMagnitude, "element", 4 + 16 + 24),
        (SAMDirection, "tensor", 4 + 16 + 4 + 20),
        (SAMMagnitude, "tensor", 4 + 16 + 4 + 20),
        (SAMDirection, "global", 4 + 16 + 4 + 20),
        (SAMMagnitude, "global", 4 + 16 + 4 + 20),
    ],
)
def test_bytes_per_parameter_and_step(
    cls: type[SAM],
    granularity: str | None,
    expected: int,
    track_statistics: bool,
    adaptive: bool,
    max_grad_norm: float | None,
) -> None:
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 512, CHUNK_SIZE + 7)]
    options: dict[str, Any] = {} if granularity is None else {"granularity": granularity}
    options["max_grad_norm"] = max_grad_norm
    options |= {"track_statistics": track_statistics, "adaptive": adaptive, "backend": "emulated"}
    optimizer = cls(params, rho=0.1, lr=0.1, momentum=0.9, **options)
    if track_statistics:
        expected += STATISTICS - (4 if granularity in ("tensor", "global") else 0)
    if max_grad_norm is not None and cls is not SAMDirection and not track_statistics:
        expected += 4 if granularity in (None, "element") else 0  # the norm of g2
    if adaptive:
        expected += 4  # the norm reads w
    assert traffic_of_a_step(optimizer) == expected * sum(p.numel() for p in params)


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    ("cls", "granularity", "expected"),
    [
        (SAM, None, 4 + 16 + 28),
        (SAMDirection, "element", 4 + 16 + 32),
        (SAMMagnitude, "element", 4 + 16 + 32),
        (SAMDirection, "tensor", 4 + 16 + 4 + 28),
        (SAMMagnitude, "global", 4 + 16 + 4 + 28),
    ],
)
def test_bytes_per_parameter_and_step_of_adam(
    cls: type[SAM], granularity: str | None, expected: int, base: type[torch.optim.Optimizer]
) -> None:
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 512, CHUNK_SIZE + 7)]
    options = {} if granularity is None else {"granularity": granularity}
    optimizer = cls(params, base, rho=0.1, lr=0.1, backend="emulated", **options)
    assert traffic_of_a_step(optimizer) == expected * sum(p.numel() for p in params)


def traffic_of_a_step(optimizer: SAM) -> int:
    """Bytes, of the second step: the first one makes the base optimizer's state."""
    for _ in range(2):
        take_traffic()
        for step in (optimizer.first_step, optimizer.second_step):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.randn_like(p)
            step()
        read, written = take_traffic()
    return read + written


def take_traffic() -> tuple[int, int]:
    """Bytes read and written since the last call."""
    core: Any = backends.get("emulated")
    return core._C.take_traffic()
