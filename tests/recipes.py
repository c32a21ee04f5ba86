"""The snippets of docs/recipes.md and README's loop, and the loops that they are compared with."""

from __future__ import annotations

import copy
import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samkernels import SAM
from samkernels.integrations import _unwrap as unwrap
from tests.optim_helpers import plain_sam_step, snapshot

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "recipes.md", ROOT / "README.md"
SHARED = "Recipes"  # the heading of the page: what stands below it comes before every snippet


def read_page(page: Path) -> dict[str, str]:
    """The python blocks by heading; the second one of a heading has " 2" after it."""
    blocks: dict[str, str] = {}
    heading, start, in_block = "", 0, False
    lines = page.read_text().splitlines()
    for i, line in enumerate(lines):
        if in_block and line == "```":
            name, n = heading, 2
            while name in blocks:
                name, n = f"{heading} {n}", n + 1
            # As many empty lines before it as in the page: a traceback shows the page's lines.
            blocks[name] = "\n" * start + "\n".join(lines[start:i])
            in_block = False
        elif line == "```python":
            start, in_block = i + 1, True
        elif not in_block and (match := re.fullmatch(r"#+ (.+)", line)):
            heading = match[1]
    assert not in_block
    return blocks


BLOCKS = {**read_page(PAGE), "README": read_page(README)["Use it"]}


def execute(name: str, namespace: dict[str, Any]) -> None:
    page = README if name == "README" else PAGE
    # As a script of its own: without this file's `from __future__ import annotations`.
    exec(compile(BLOCKS[name], page, "exec", dont_inherit=True), namespace)


def run(name: str, **replaced: Any) -> SimpleNamespace:
    """The variables that a snippet leaves; `replaced` stands in for what all snippets share."""
    namespace = shared_namespace()
    namespace.update(replaced)
    execute(name, namespace)
    return SimpleNamespace(**namespace)


def shared_namespace() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "recipe"}
    execute(SHARED, namespace)
    return namespace


def interrupt(name: str, call: int) -> tuple[SimpleNamespace, list[list[Tensor]]]:
    """A snippet that is interrupted when its loss is computed for the call-th time, counted from 0.
    Returns its variables, and the weights at each computation."""
    namespace = shared_namespace()
    seen: list[list[Tensor]] = []

    def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(snapshot(namespace["model"].parameters()))
        if len(seen) > call:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(logits, target)

    namespace["loss_fn"] = loss_fn
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # Lightning exits
        execute(name, namespace)
    assert len(seen) == call + 1
    return SimpleNamespace(**namespace), seen


def weights(result: SimpleNamespace) -> list[Tensor]:
    return snapshot(result.model.parameters())


def loss_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    network = copy.deepcopy(getattr(model, "network", model)).cpu().eval()
    x, y = map(torch.cat, zip(*batches, strict=True))
    with torch.no_grad():
        return nn.functional.cross_entropy(network(x), y).item()


def optimizer_of(result: SimpleNamespace) -> torch.optim.Optimizer:
    """The optimizer itself, without a framework's wrapper."""
    holder = result if hasattr(result, "optimizer") else result.trainer
    if hasattr(holder, "optimizers"):  # Lightning's
        return holder.optimizers[0]
    optimizer = holder.optimizer if hasattr(holder, "optimizer") else holder.opt  # fastai's
    return getattr(optimizer, "optimizer", None) or getattr(optimizer, "opt", None) or optimizer


def sam_of(result: SimpleNamespace) -> SAM:
    return unwrap.sam_of(optimizer_of(result))


def by_hand(
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    *,
    rho: float = 0.05,
    model: nn.Module | None = None,
    accumulate: int = 1,
    before_step: Callable[[int, nn.Module, torch.optim.Optimizer], object] = lambda *_: None,
    after_backward: Callable[[nn.Module], object] = lambda _: None,
    after_step: Callable[[nn.Module], object] = lambda _: None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    leave_out: int | None = None,
) -> list[Tensor]:
    """The weights that the loop gives when it is written without samkernels."""
    shared: dict[str, Any] = {}
    execute(SHARED, shared)
    model = model or shared["model"]
    assert model is not None
    optimizer = (make_optimizer or sgd)(model)
    schedule = scheduler and scheduler(optimizer)
    batches = shared["batches"]
    # Of equal size: the mean of their losses is the loss of all.
    groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    for step, group in enumerate(groups):
        if step == leave_out:
            continue
        before_step(step, model, optimizer)
        x, y = map(torch.cat, zip(*group, strict=True))

        def compute(x: Tensor = x, y: Tensor = y) -> None:
            nn.functional.cross_entropy(model(x), y).backward()
            after_backward(model)

        plain_sam_step(model, optimizer, compute, rho)
        after_step(model)
        if schedule:
            schedule.step()
    return snapshot(model.parameters())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def assert_close(result: SimpleNamespace, expected: list[Tensor]) -> None:
    """Equal but for the order of sums."""
    for p, q in zip(weights(result), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def import_quietly(name: str) -> Any:
    """A framework, or a skip; fastai's dependencies warn when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(name)
        if name == "fastai":
            importlib.import_module("samkernels.integrations.fastai")
    return module


def forget_accelerate() -> None:
    """Accelerate's state, which its Accelerators and Trainers share: the first one's precision."""
    try:
        from accelerate.state import AcceleratorState, GradientState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
