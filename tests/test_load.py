"""Much of everything: steps, tensors, parameters.

What has billions of elements here has little memory: the pages in the middle of a tensor are a few,
mapped again and again. They hold zeros, which no op changes; its first and last elements are its
own.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from samkernels import SAM, SAMDirection, SAMMagnitude, ops
from tests.helpers import Slot, assert_same_bits, copies, make_list
from tests.optim_helpers import (
    linear,
    snapshot,
    take_step,
    unchanged,
)
from tests.optimizers import ALL_VARIANTS, OPTIMIZER_TABLE, STAND_ALONE, StandAlone, Variant

# -- 10,000 steps ----------------------------------------------------------------------------------

STATISTICS = {"track_statistics": True}
WARM_UP = 300  # until caches, free lists and the allocator have what they keep
MAX_BLOCKS = 1_000  # objects, or Python's blocks of memory: fewer than one for each step
MAX_BYTES = 2 << 20  # of the process: of 10,000 steps 200 each, less than one tensor takes


class Usage(NamedTuple):
    blocks: int
    objects: int
    resident: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        # What other tests have freed goes back to the system, or a leak would fill that first.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
        return cls(sys.getallocatedblocks(), len(gc.get_objects()), pages * mmap.PAGESIZE)


def growth(step: Callable[[], object], steps: int) -> Usage:
    for _ in range(WARM_UP):
        step()
    before = Usage.now()
    for _ in range(steps):
        step()
    return Usage(*(b - a for a, b in zip(before, Usage.now(), strict=True)))


def assert_no_growth(grown: Usage) -> None:
    assert grown.blocks < MAX_BLOCKS and grown.objects < MAX_BLOCKS and grown.resident < MAX_BYTES


def training_step(optimizer: SAM, model: nn.Module) -> Callable[[], None]:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        for make_step in (optimizer.first_step, optimizer.second_step):
            model(x).square().mean().backward()
            make_step()
        optimizer.zero_grad()

    return step


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, maps memory")


@linux
@pytest.mark.parametrize(
    ("variant", "base", "options", "steps"),
    [
        (Variant(info, info.variants[-1]), *how)
        for info, how in zip(
            OPTIMIZER_TABLE,
            cycle(
                [
                    (torch.optim.SGD, {"momentum": 0.9}, 10_000),
                    (torch.optim.AdamW, {**STATISTICS, "amsgrad": True}, 1_500),
                    (torch.optim.AdamW, STATISTICS, 2_000),
                ]
            ),
            strict=False,
        )
    ],
    ids=str,
)
def test_thousands_of_steps_take_no_more_memory_than_some(
    variant: Variant, base: type[torch.optim.Optimizer], options: dict[str, Any], steps: int
) -> None:
    model = linear()
    own = {**variant.options, **options}
    optimizer = variant.info.cls(model.parameters(), base, lr=1e-4, **own)
    step = training_step(optimizer, model)
    assert_no_growth(growth(step, steps))
    assert all(p.isfinite().all() for p in model.parameters())


@linux
@pytest.mark.parametrize("row", STAND_ALONE, ids=str)
def test_thousands_of_steps_of_one_pass_take_no_more_memory_than_some(row: StandAlone) -> None:
    model = linear()
    optimizer = row(model.parameters(), lr=1e-4, momentum=0.9)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    assert_no_growth(growth(step, 3_000))
    assert all(p.isfinite().all() for p in model.parameters())


class KeepsATensor(SAM):
    """Of each step, in a list that nobody clears."""

    kept: list[Tensor]

    def first_step(self, zero_grad: bool = False) -> None:
        super().first_step(zero_grad)
        self.kept.append(torch.ones(1000))


@linux
def test_one_tensor_per_step_is_noticed() -> None:
    model = linear()
    optimizer = KeepsATensor(model.parameters(), lr=1e-4)
    optimizer.kept = []
    grown = growth(training_step(optimizer, model), 1_500)
    assert grown.blocks > MAX_BLOCKS and grown.resident > MAX_BYTES


# -- thousands of tensors --------------------------------------------------------------------------

# More than one launch of any kernel can take: csrc/cuda/multi_tensor_apply.cuh.
SLOTS = [Slot((i % 9,), offset=i % 4) for i in range(2000)]


@pytest.mark.parametrize(
    ("backend", "variant"),
    [
        *(("native", variant) for variant in (*ALL_VARIANTS, *STAND_ALONE)),
        ("emulated", ALL_VARIANTS[0]),
    ],
    ids=str,
)
def test_two_thousand_tensors(backend: str, variant: Variant | StandAlone) -> None:
    results = []
    for name in (backend, "reference"):
        memory = make_list(SLOTS, torch.float32)
        params = [nn.Parameter(w) for w in memory]
        options = {"lr": 0.125, "momentum": 0.5, "weight_decay": 0.125}
        optimizer = variant(params, rho=0.25, backend=name, **options)
        assert optimizer.backends == {"cpu float32": name}
        for step in range(1 if backend == "emulated" else 2):  # which takes its time
            take_step(optimizer, step)
        memory.assert_intact()
        results.append(snapshot(params))
    assert not unchanged(results[0], list(make_list(SLOTS, torch.float32)))
    if not variant.options:
        assert unchanged(*results)
    for a, b in zip(*results, strict=True):
        # Two steps of a coefficient that is two norms' roundings off, and weights of order 1.
        torch.testing.assert_close(a, b, rtol=2**-20, atol=2**-20)


# -- a billion parameters, on paper ----------------------------------------------------------------

CUDA_CHUNK_SIZE = 8192
WIDTH, LAYERS = 1792, 24
OF_LAYER = [WIDTH, WIDTH, 3 * WIDTH**2, 3 * WIDTH, WIDTH**2, WIDTH, WIDTH, WIDTH, 4 * WIDTH**2]
OF_LAYER += [4 * WIDTH, 4 * WIDTH**2, WIDTH]
# A language model's parameters, by tensor.
BILLION = [50_304 * WIDTH, 2048 * WIDTH, *(OF_LAYER * LAYERS), WIDTH, WIDTH]


def tensor_without_memory(numel: int) -> Tensor:
    """One element, as often as needed: the core only reads its size."""
    return torch.zeros(1).expand(numel)


def num_chunks(core: Any, target: Any, sizes: list[int]) -> int:
    """How many chunks the core plans for tensors of these sizes: WorkspaceBytes of csrc/ops.h."""
    tensors = core.TensorList([tensor_without_memory(numel) for numel in sizes])
    num_bytes = [core.workspace_bytes(target, tensors, sums) for sums in (1, 2)]
    per_sum = (num_bytes[1] - num_bytes[0]) // 8
    assert num_bytes[0] == 8 * (per_sum + len(sizes) + 1)
    return per_sum - len(sizes)


def test_chunks_of_a_billion_parameters(emulated_core: Any) -> None:
    assert 1.0e9 < sum(BILLION) < 1.1e9
    core = emulated_core
    target = core.cuda(0)
    expected = sum(math.ceil(numel / CUDA_CHUNK_SIZE) for numel in BILLION)
    assert num_chunks(core, target, BILLION) == expected
    # The sums of the norms are all that a step takes beside its lists: 2 MB at most.
    tensors = core.TensorList([tensor_without_memory(numel) for numel in BILLION])
    num_bytes = core.workspace_bytes(target, tensors, core.num_dots(1, True))
    assert num_bytes == 8 * (2 * expected + 3 * len(BILLION) + 1) < 2 << 20
    assert core.workspace_bytes(core.cpu(1), tensors, 2) == 0  # it makes its own


@pytest.mark.parametrize("sizes", [[2**31 + 1], [2**33] * 3, [2**45, 1], [5, 2**44, 0, 2**44]])
def test_chunks_are_counted_in_64_bits(sizes: list[int], emulated_core: Any) -> None:
    expected = sum(math.ceil(numel / CUDA_CHUNK_SIZE) for numel in sizes)
    assert num_chunks(emulated_core, emulated_core.cuda(0), sizes) == expected


def test_more_chunks_than_a_launch_can_number_are_refused(emulated_core: Any) -> None:
    lists = [emulated_core.TensorList([tensor_without_memory(2**44 + 1)]) for _ in range(2)]
    with pytest.raises(ValueError, match="more than 2\\^44 elements in one launch"):
        emulated_core.restore(emulated_core.cuda(0), *lists)


@pytest.mark.parametrize(
    ("cls", "launches", "num_bytes"), [(SAM, 3, 40), (SAMDirection, 3, 44), (SAMMagnitude, 3, 44)]
)
def test_launches_and_bytes_of_a_billion_parameters(
    cls: type[SAM], launches: int, num_bytes: int, emulated_core: Any
) -> None:
    """Launches depend on the number of tensors, and bytes on that of elements: counted for as many
    tensors, 2^-15 times as large."""
    sizes = [max(1, numel >> 15) for numel in BILLION]
    params = [nn.Parameter(torch.randn(numel)) for numel in sizes]
    optimizer = cls(params, lr=0.1, momentum=0.9, backend="emulated")
    take_step(optimizer, 0)  # which makes the momentum buffers
    emulated_core.take_launches(), emulated_core.take_traffic()
    take_step(optimizer, 1)
    assert emulated_core.take_launches() == launches
    per_parameter = sum(emulated_core.take_traffic()) / sum(sizes)
    assert per_parameter == num_bytes
    # On paper: 41 GB a step for SAM, and 4 GB beside weights, gradients and momentum.
    assert 40e9 < per_parameter * sum(BILLION) < 46e9
    scratch = [slot.old for slot in optimizer._slots._slots.values()]
    assert sum(old.nbytes for old in scratch) == 4 * sum(sizes)


def test_one_more_tensor_is_at_most_one_more_launch_of_each_kernel(emulated_core: Any) -> None:
    """Cost grows with the number of tensors without a step larger than a launch."""
    launches = []
    counts = [1, 2, 50, 51, *range(70, 200), 400, 600, *range(640, 660), 2000]
    for count in counts:
        lists = [[torch.ones(1) for _ in range(count)] for _ in range(4)]
        emulated_core.take_launches()
        w, g, old, buf = lists
        ops.perturb_(w, g, old, rho=0.1, backend="emulated")  # with the norm
        ops.sgd_(w, old, ops.Mix(g), buf, lr=0.1, momentum=0.9, backend="emulated")
        launches.append(emulated_core.take_launches())
    assert launches[0] == 3
    for (before, after), (n, m) in zip(pairwise(launches), pairwise(counts), strict=True):
        assert before <= after and (m > n + 1 or after <= before + 3)
    # A table of 32 KB has the addresses of more than 600 tensors for each of the three kernels.
    assert launches[-1] <= 3 * math.ceil(2000 / 600)


# -- hundreds of millions of elements, and more than 32 bits can count -----------------------------

SEGMENT = 4 << 20  # bytes
OWN = 1000  # elements at each end that get values


def sparse(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of zeros, with random values at its ends: its first two and last two segments are
    its own memory, and all between is one."""
    size = numel * dtype.itemsize
    count = math.ceil(size / SEGMENT)
    assert count > 5
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def map_memory(address: int | None, size: int, flags: int, file: int, offset: int) -> int:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = libc.mmap(address, size, protection, flags, file, offset)
        if mapped in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        return mapped

    no_reserve, fixed, populate = 0x4000, 0x10, 0x8000  # of Linux; mmap does not name all
    file = os.memfd_create("sparse")
    try:
        os.ftruncate(file, 5 * SEGMENT)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        shared = mmap.MAP_SHARED | fixed | populate  # now, and not page by page
        start = map_memory(None, count * SEGMENT, private | no_reserve, -1, 0)
        # A class of its own can be referred to weakly: unmapped when the last tensor in it is gone.
        memory = type("Mapped", (ctypes.c_char * size,), {}).from_address(start)
        weakref.finalize(memory, libc.munmap, start, count * SEGMENT)
        for i in range(count):
            part = i if i < 2 else 2 if i < count - 2 else i - count + 5
            address = start + i * SEGMENT
            map_memory(address, SEGMENT, shared, file, part * SEGMENT)
    finally:
        os.close(file)  # the mappings keep it
    tensor = torch.frombuffer(memory, dtype=dtype, count=numel)
    generator = torch.Generator().manual_seed(seed)
    for end in ends(tensor):
        end.copy_(torch.randn(OWN, generator=generator))
    return tensor


def ends(tensor: Tensor) -> list[Tensor]:
    return [tensor[:OWN], tensor[-OWN:]]


# The last elements have indices that 31 bits do not hold, more than 2^32 bytes from the first.
ABOVE_INT32 = 2**31 + 512


@linux
def test_more_elements_than_int32_counts() -> None:
    a, b = (sparse(ABOVE_INT32, torch.bfloat16, seed) for seed in range(2))
    total = ops.dots([a], backend="native").total
    expected = ops.dots(ends(a), backend="reference").total
    torch.testing.assert_close(total, expected, rtol=2**-22, atol=0)
    kept = copies(ends(b))
    ops.restore_([a], [b], backend="native")
    assert_same_bits(ends(a), kept)


@linux
def test_two_hundred_million_parameters() -> None:
    """A whole step, in three tensors; the copy of the weights is the one real list."""
    sizes = [120_000_000, 60_000_000, 20_000_000]
    params, grads = (
        [sparse(numel, torch.float32, seed + i) for i, numel in enumerate(sizes)]
        for seed in (0, 10)
    )
    small = [[torch.cat(ends(x)) for x in tensors] for tensors in (params, grads)]
    before = copies(small[0])
    results = []
    for (weights, gradients), backend in (((params, grads), "native"), (small, "reference")):
        leaves = [nn.Parameter(w) for w in weights]
        optimizer = SAM(leaves, rho=0.5, lr=0.125, weight_decay=0.5, backend=backend)
        for step in (optimizer.first_step, optimizer.second_step):
            for p, g in zip(leaves, gradients, strict=True):
                p.grad = g
            step()
            results.append([torch.cat(ends(p.detach())) for p in leaves])
    perturbed, updated, small_perturbed, small_updated = results
    assert not unchanged(perturbed, before) and not unchanged(updated, before)
    for a, b in zip(perturbed, small_perturbed, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-22, atol=2**-22)  # the norm's last bit
    assert_same_bits(updated, small_updated)
