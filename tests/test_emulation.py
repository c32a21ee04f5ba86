"""What stands in for the CUDA runtime (csrc/emulation): what it finds, and what a test may make it
say."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import ops
from tests import emulated
from tests.helpers import Slot, assert_same_bits, make_list

CXX = shutil.which(os.environ.get("CXX", "c++"))

# Reverses the threads' numbers through shared memory, in blocks for which WRITES is true.
REVERSE = """
#include <cstdio>

#include "multi_tensor_apply.cuh"

namespace samkernels::cuda {

__global__ void Reverse(int* out) {
  __shared__ Shared<int[32]> numbers;
  __shared__ Shared<float> scale;
  if (WRITES) numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (WRITES && threadIdx.x == 0) scale = 1.0f;
  __syncthreads();
  out[32 * blockIdx.x + threadIdx.x] = numbers[31 - threadIdx.x] * (scale == 1.0f ? 1 : 2);
}

}  // namespace samkernels::cuda

int main() {
  int out[3 * 32];
  emulation::Launch(samkernels::cuda::Reverse, 3, 32, &out[0]);
  for (int x : out) std::printf("%d ", x);
}
"""


def compiled(source: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "main.cpp").write_text(source)
    includes = [f"-I{emulated.ROOT / 'csrc' / part}" for part in ("emulation", "cuda")]
    command = [str(CXX), "-std=c++17", "-DSAMKERNELS_EMULATED", *includes, *options]
    return subprocess.run(
        [*command, "-o", folder / "main", folder / "main.cpp"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def numbers_of(writes: str, folder: Path) -> list[int]:
    result = compiled(REVERSE, folder, f"-DWRITES=({writes})")
    assert result.returncode == 0, result.stdout
    output = subprocess.run([folder / "main"], capture_output=True, text=True, check=True).stdout
    return [int(x) for x in output.split()]


needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")


@needs_cxx
def test_shared_memory(tmp_path: Path) -> None:
    assert numbers_of("true", tmp_path) == 3 * list(reversed(range(32)))


@needs_cxx
@pytest.mark.parametrize("block", [0, 1, 2])
def test_what_no_thread_of_a_block_wrote_is_not_what_another_block_left(
    block: int, tmp_path: Path
) -> None:
    """It is -1 in integers and nan else, in the first block as in the others."""
    expected = 3 * list(reversed(range(32)))
    expected[32 * block : 32 * (block + 1)] = 32 * [-1 * 2]  # nan is not 1
    assert numbers_of(f"blockIdx.x != {block}", tmp_path) == expected


@needs_cxx
def test_shared_memory_that_the_emulation_would_not_know_of_is_refused(tmp_path: Path) -> None:
    plain = REVERSE.replace("Shared<float> scale", "float scale")
    assert compiled(plain, tmp_path, "-DWRITES=true").returncode != 0


@pytest.fixture
def core(emulated_core: Any) -> Iterator[Any]:
    yield emulated_core
    emulated_core.set_driver_version(13000)


SMALL_TABLE = 73  # tensors of five lists, or fewer: csrc/cuda/multi_tensor_apply.cuh
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "backend": "emulated"}


def step(core: Any, num_tensors: int) -> tuple[list[Tensor], int]:
    """Results of a norm and an update; launches."""
    slots = [Slot((i % 50,)) for i in range(num_tensors)]
    w, old, g1, g2, buf = (make_list(slots, torch.float32, seed=seed) for seed in range(5))
    core.take_launches()
    sums = ops.dots(g1, backend="emulated")
    ops.sgd_(w, old, ops.Mix(g1, g2, function="sign"), buf, **OPTIONS)
    return [*w, *buf, *sums], core.take_launches()


@pytest.mark.parametrize("version", [12000, 12010])
def test_an_old_driver_gets_small_tables_and_the_same_bits(core: Any, version: int) -> None:
    """Kernel parameters above 4 KB need a driver that knows CUDA 12.1."""
    expected, launches = step(core, 300)
    assert launches == 2
    core.set_driver_version(version)
    found, launches = step(core, 300)
    # 300 tensors: 192 and 108 of the norm's one list, 73 four times and 8 of the update's five.
    assert launches == (2 + 5 if version < 12010 else 2)
    assert_same_bits(found, expected)
    assert step(core, SMALL_TABLE)[1] == 2  # a short list is none of its concern
