"""What callgrind watches for test_instructions.py: the two halves of a step on tiny tensors, and a
step of the base optimizer itself beside them.

So all that counts is the way from Python to the kernels. Gradients are given outside.

    valgrind --tool=callgrind --instr-atstart=no ... python instructions.py CLIENT_LIBRARY
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samkernels import SAM, SAMDirection

WARMUP_STEPS = 10  # make state, fill caches, and let Python specialize its bytecode
STEPS = 3
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
ADAMW: dict[str, Any] = {"lr": 1e-3}


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, fused=True, **SGD)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **ADAMW)


def sam(params: Any) -> SAM:
    return SAM(params, backend="native", **SGD)


# Tensors, parameter groups, and who makes steps with them.
CASES: dict[str, tuple[int, int, Callable[[Any], torch.optim.Optimizer]]] = {
    "SGD, 62 tensors": (62, 1, sgd),
    "SGD, 1 tensor": (1, 1, sgd),
    "SGD, 62 tensors in 2 groups": (62, 2, sgd),
    "AdamW, 62 tensors": (62, 1, adamw),
    "SAM, 62 tensors": (62, 1, sam),
    "SAM, 1 tensor": (1, 1, sam),
    "SAM, 62 tensors in 2 groups": (62, 2, sam),
    "SAMDirection, 62 tensors": (
        62, 1, lambda params: SAMDirection(params, backend="native", **SGD),
    ),
    "SAMDirection, tensor, 62 tensors": (
        62, 1, lambda params: SAMDirection(params, backend="native", granularity="tensor", **SGD),
    ),
    "SAM, AdamW, 62 tensors": (
        62, 1, lambda params: SAM(params, torch.optim.AdamW, backend="native", **ADAMW),
    ),
}  # fmt: skip


def main() -> None:
    callgrind = ctypes.CDLL(sys.argv[1])
    torch.set_num_threads(1)
    for name, (tensors, groups, make) in CASES.items():
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(tensors)]
        grads = [[torch.ones(3) for _ in params] for _ in range(2)]
        size = tensors // groups
        optimizer = make([{"params": params[i * size : (i + 1) * size]} for i in range(groups)])
        halves: list[Callable[[], Any]] = [optimizer.step]
        if isinstance(optimizer, SAM):
            halves = [optimizer.first_step, optimizer.second_step]
        for i in range(WARMUP_STEPS + STEPS):
            for half, given in zip(halves, grads, strict=False):
                give(params, given)
                if i < WARMUP_STEPS:
                    half()
                    continue
                gc.collect()  # what all that was made before has brought due is no part of a step
                callgrind.start()
                half()
                callgrind.stop()
        callgrind.dump(name.encode())
    sys.stdout.flush()
    os._exit(0)  # taking torch apart would take long


def give(params: list[torch.nn.Parameter], grads: list[Tensor]) -> None:
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


if __name__ == "__main__":
    main()
