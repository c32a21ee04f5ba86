"""pytest-benchmark of whole training steps of ResNet-18, and the share of them that the optimizer
takes: `make bench`. --precision=bf16: under autocast, in channels_last; --batch: other batches."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import samkernels
from bench.candidates import RHO, SGD_OPTIONS
from bench.clock import Clock
from bench.conftest import Take
from train.models.resnet import resnet18

BATCH = {"cpu": 16, "cuda": 128}
OPTIMIZERS = ["SGD", "SAM, native", "SAM, reference"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resnet18(name: str, take: Take, clock: Clock, pytestconfig: pytest.Config) -> None:
    torch.manual_seed(0)
    precision = pytestconfig.getoption("--precision")
    batch = pytestconfig.getoption("--batch") or BATCH[clock.device.type]
    model = resnet18((3, 32, 32), num_classes=100).to(clock.device)
    images = torch.randn(batch, 3, 32, 32, device=clock.device)
    if precision == "bf16":
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(100, (len(images),), device=clock.device)
    params = list(model.parameters())
    optimizer: Any
    if name == "SGD":
        optimizer = torch.optim.SGD(params, **SGD_OPTIONS, fused=True)
    else:
        backend = name.rpartition(" ")[2]
        optimizer = samkernels.SAM(params, rho=RHO, backend=backend, **SGD_OPTIONS)

    def passes() -> None:
        optimizer.zero_grad()
        with torch.autocast(clock.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    def step() -> None:
        passes()
        if name != "SGD":
            optimizer.first_step()
            passes()
        optimizer.step()

    passes()
    gradients = [p.grad for p in params]

    def optimizer_alone() -> None:
        for _ in range(1 if name == "SGD" else 2):
            for p, grad in zip(params, gradients, strict=True):
                p.grad = grad
            optimizer.first_step() if _first(optimizer) else optimizer.step()

    optimizer_alone()
    host_ms = clock.host_ms(optimizer_alone)
    alone = [clock.device_ms(optimizer_alone, host_ms, cold=True) for _ in range(9)]
    take(
        step,
        f"training step, ResNet-18, {precision}",
        what="training step",
        candidate=name,
        precision=precision,
        batch=len(images),
        optimizer_ms=statistics.median(alone),
    )


def _first(optimizer: Any) -> bool:
    """Whether the optimizer's next step is SAM's first one."""
    return isinstance(optimizer, samkernels.SAM) and not optimizer.is_perturbed
