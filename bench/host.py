"""The host's part of a step: CPU time of a native SAM step, and of a fused step of its base
optimizer by PyTorch, in turn, on CPU tensors of three elements.

    python -m bench.host [--rounds 500] [--output FILE.json]

So all that is timed is the way from Python to the kernels, which is the same for a GPU. Gradients
are given outside. Those of backward() are new ones in each pass: to free them is part of SAM's
step, which takes g1 over. Prints medians, and their ratio.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.side_by_side import environment
from samkernels import SAM

Params = list[torch.nn.Parameter]
Half = Callable[[], Any]

BASES: dict[str, tuple[type[torch.optim.SGD] | type[torch.optim.AdamW], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
}
# Base, tensors, parameter groups, and whether gradients are new in each pass.
CASES = {
    "62 tensors": ("SGD", 62, 1, False),
    "1 tensor": ("SGD", 1, 1, False),
    "62 tensors, gradients of backward()": ("SGD", 62, 1, True),
    "62 tensors in 2 groups": ("SGD", 62, 2, False),
    "AdamW, 62 tensors": ("AdamW", 62, 1, False),
}
WARMUP_ROUNDS = 20


def measure(name: str, rounds: int) -> tuple[list[float], list[float]]:
    """Microseconds of SAM's steps and of the base optimizer's."""
    base, tensors, groups, new_gradients = CASES[name]
    optimizer_class, options = BASES[base]
    sides = []
    for make in (
        lambda groups: SAM(groups, optimizer_class, backend="native", **options),
        lambda groups: optimizer_class(groups, fused=True, **options),
    ):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(tensors)]
        size = tensors // groups
        optimizer = make([{"params": params[i * size : (i + 1) * size]} for i in range(groups)])
        halves: list[Half] = [optimizer.step]
        if isinstance(optimizer, SAM):
            halves = [optimizer.first_step, optimizer.second_step]
        kept = None if new_gradients else [torch.ones(3) for _ in params]
        sides.append((params, kept, halves))
    times: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    for i in range(WARMUP_ROUNDS + rounds):
        for (params, kept, halves), of_side in zip(sides, times, strict=True):
            taken = sum(_microseconds(half, params, kept) for half in halves)
            for p in params:
                p.grad = None
            if i >= WARMUP_ROUNDS:
                of_side.append(taken)
    gc.enable()
    return times


def _microseconds(half: Half, params: Params, kept: list[Tensor] | None) -> float:
    if kept is None:
        torch.stack([p.sum() for p in params]).sum().backward()
    else:
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
    start = time.process_time_ns()
    half()
    return 1e-3 * (time.process_time_ns() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    print(f"{'':36s} {'SAM, us':>8s} {'base, us':>9s} {'ratio':>6s}")
    for name in CASES:
        sam, base = map(statistics.median, measure(name, arguments.rounds))
        found[name] = {"sam_us": sam, "base_us": base, "ratio": sam / base}
        print(f"{name:36s} {sam:8.1f} {base:9.1f} {sam / base:6.2f}", flush=True)
    many, one = found["62 tensors"]["sam_us"], found["1 tensor"]["sam_us"]
    print(f"each further tensor: {(many - one) / 61:.2f} us")
    if arguments.output:
        result = {"environment": environment(), "rounds": arguments.rounds, "cases": found}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
