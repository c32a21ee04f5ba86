"""What callgrind watches for test_instructions.py: the two halves of a step on tiny tensors.

So all that counts is the way from Python to the kernels. Gradients are given outside.

    valgrind --tool=callgrind --instr-atstart=no ... python instructions.py CLIENT_LIBRARY
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import torch

from samkernels import SAM, SAMDirection

STEPS = 3
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
CASES: dict[str, tuple[int, Any]] = {
    "SAM, 62 tensors": (62, lambda params: SAM(params, backend="native", **SGD)),
    "SAM, 1 tensor": (1, lambda params: SAM(params, backend="native", **SGD)),
    "SAMDirection, tensor, 62 tensors": (
        62,
        lambda params: SAMDirection(params, backend="native", granularity="tensor", **SGD),
    ),
    "SAM, AdamW, 62 tensors": (
        62,
        lambda params: SAM(params, torch.optim.AdamW, backend="native", lr=1e-3),
    ),
}


def main() -> None:
    callgrind = ctypes.CDLL(sys.argv[1])
    torch.set_num_threads(1)
    for name, (tensors, make) in CASES.items():
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(tensors)]
        grads = [[torch.ones(3) for _ in params] for _ in range(2)]
        optimizer = make(params)
        for i in range(2 + STEPS):  # the first ones make state and fill caches
            for half, given in zip(
                (optimizer.first_step, optimizer.second_step), grads, strict=True
            ):
                for p, grad in zip(params, given, strict=True):
                    p.grad = grad
                if i >= 2:
                    callgrind.start()
                half()
                if i >= 2:
                    callgrind.stop()
        callgrind.dump(name.encode())
    sys.stdout.flush()
    os._exit(0)  # taking torch apart would take long


if __name__ == "__main__":
    main()
