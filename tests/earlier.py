"""What commit 9ba4230, before variants were rules, wrote into checkpoints: tests/data/9ba4230.pt
holds, for each case, a run saved in the middle and how that commit went on. Written there by

    PYTHONPATH=. python PATH/TO/tests/earlier.py FILE.pt

Gradients are elementwise functions of the weights, so that they have the same bits everywhere.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from samkernels import SAM, SAMDirection, SAMMagnitude, SGDHess

SAVED_AFTER, STEPS = 3, 6
SHAPES = ((3, 4), (4,), (2, 3, 2, 2), ())
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "dampening": 0.2}
ADAMW: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
CASES: dict[str, tuple[type[torch.optim.Optimizer], type | None, dict[str, Any]]] = {
    "SAM, SGD": (SAM, torch.optim.SGD, {"rho": 0.2, "max_grad_norm": 1.0, **SGD}),
    "SAM, AdamW": (SAM, torch.optim.AdamW, {"rho": 0.2, "adaptive": True, **ADAMW}),
    "SAMDirection, SGD": (SAMDirection, torch.optim.SGD, {"granularity": "element", **SGD}),
    "SAMDirection, AdamW": (SAMDirection, torch.optim.AdamW, {"granularity": "tensor", **ADAMW}),
    "SAMMagnitude, SGD": (SAMMagnitude, torch.optim.SGD, {"granularity": "tensor", **SGD}),
    "SAMMagnitude, AdamW": (SAMMagnitude, torch.optim.AdamW, {"granularity": "global", **ADAMW}),
    "SGDHess": (SGDHess, None, {"rho": 0.1, "k": 2, "seed": 5, **SGD, "lr": 0.01}),
}


def new(name: str, **others: Any) -> torch.optim.Optimizer:
    """others: in the place of the options of this name."""
    cls, base, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    # Options of their own in one of the groups.
    groups = [{"params": params[::2]}, {"params": params[1::2], "rho": 0.3, "lr": 0.02}]
    return cls(groups, *([] if base is None else [base]), **{**options, **others})


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def loss(params: Iterable[Tensor], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    total = torch.zeros(())
    for p in params:
        a, b = torch.rand((2, *p.shape), generator=generator)
        total = total + (a * p * p * p * p + (b - 0.5) * p * p * p + b * p).sum()
    return total


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    params = params_of(optimizer)
    for step in steps:
        if isinstance(optimizer, SGDHess):
            optimizer.backward(loss(params, step))
            optimizer.step()
            optimizer.zero_grad()
            continue
        assert isinstance(optimizer, SAM)
        for make_step in (optimizer.first_step, optimizer.second_step):
            loss(params, step).backward()
            make_step()
            optimizer.zero_grad()


def main() -> None:
    written = {}
    for name in CASES:
        optimizer = new(name)
        train(optimizer, range(SAVED_AFTER))
        of_case = {
            "weights": [p.detach().clone() for p in params_of(optimizer)],
            "pickled": pickle.dumps(optimizer),
            "state_dict": pickle.loads(pickle.dumps(optimizer.state_dict())),
        }
        train(optimizer, range(SAVED_AFTER, STEPS))
        of_case["later_weights"] = [p.detach().clone() for p in params_of(optimizer)]
        written[name] = of_case
    torch.save(written, sys.argv[1])


if __name__ == "__main__":
    main()
