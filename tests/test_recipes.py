"""Every snippet of docs/recipes.md is executed, and does what the page says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from samkernels import MSAM, Bernoulli, SGDHess
from tests.optim_helpers import snapshot, unchanged
from tests.optimizers import norm_of
from tests.recipes import (
    BLOCKS,
    SHARED,
    assert_close,
    by_hand,
    execute,
    import_quietly,
    interrupt,
    loss_of,
    optimizer_of,
    run,
    sam_of,
    weights,
)

# -- what is expected of each snippet --------------------------------------------------------------

CHECKS: dict[str, Callable[[SimpleNamespace], None]] = {}


def check(name: str) -> Callable[[Callable[[SimpleNamespace], None]], None]:
    def register(function: Callable[[SimpleNamespace], None]) -> None:
        assert name not in CHECKS
        CHECKS[name] = function

    return register


@check("The loop")
def _(result: SimpleNamespace) -> None:
    assert_close(result, by_hand())


@check("With a closure")
def _(result: SimpleNamespace) -> None:
    assert unchanged(weights(result), weights(run("The loop")))
    assert result.loss.item() < 0.5
    assert all(p.grad is None for p in result.model.parameters())


@check("A pass that may fail")
def _(result: SimpleNamespace) -> None:
    assert_close(result, by_hand())
    calls = []

    def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
        calls.append(len(calls))
        if len(calls) == 20:  # the second pass of the step with index 9
            raise torch.OutOfMemoryError
        return nn.functional.cross_entropy(logits, target)

    assert_close(run("A pass that may fail", loss_fn=loss_fn), by_hand(leave_out=9))
    assert len(calls) == 2 * len(result.batches)


@check("Batch normalisation")
def _(result: SimpleNamespace) -> None:
    assert result.model[1].num_batches_tracked == len(result.batches)
    assert result.model[1].track_running_stats


@check("Mixed precision in float16")
def _(result: SimpleNamespace) -> None:
    assert all(p.dtype is torch.float32 for p in result.model.parameters())
    plain = weights(run("The loop"))
    assert not unchanged(weights(result), plain), "float16 was not used"
    assert result.scaler.get_scale() == 65536, "a step was skipped"
    for p, q in zip(weights(result), plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.01)


@check("Mixed precision in bfloat16")
def _(result: SimpleNamespace) -> None:
    assert all(p.dtype is torch.float32 for p in result.model.parameters())
    plain = weights(run("The loop"))
    assert not unchanged(weights(result), plain), "bfloat16 was not used"
    for p, q in zip(weights(result), plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.08)


@check("Gradient accumulation")
def _(result: SimpleNamespace) -> None:
    assert_close(result, by_hand(accumulate=4))


@check("Gradient accumulation 2")
def _(result: SimpleNamespace) -> None:
    assert unchanged(weights(result), weights(run("Gradient accumulation")))


def clipped_by_hand() -> list[Tensor]:
    # Of both gradients: the direction of the first one is all that counts.
    return by_hand(
        after_backward=lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.5),
    )


@check("Clipping")
def _(result: SimpleNamespace) -> None:
    assert_close(result, clipped_by_hand())
    difference = torch.cat(
        [(p - q).flatten() for p, q in zip(weights(result), by_hand(), strict=True)]
    )
    assert difference.norm() > 0.1, "nothing was clipped"


@check("Clipping 2")
def _(result: SimpleNamespace) -> None:
    assert_close(result, clipped_by_hand())


@check("Schedulers")
def _(result: SimpleNamespace) -> None:
    schedulers = []

    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        schedulers.append(
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=48)
        )
        return schedulers[0]

    assert_close(result, by_hand(scheduler=scheduler))
    (group,) = result.optimizer.base_optimizer.param_groups
    (expected,) = schedulers[0].optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (expected["lr"], expected["momentum"])


@check("Averaged weights")
def _(result: SimpleNamespace) -> None:
    averages: list[AveragedModel] = []

    def average(model: nn.Module) -> None:
        if not averages:
            averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
        averages[0].update_parameters(model)

    assert_close(result, by_hand(after_step=average))
    expected = snapshot(averages[0].module.parameters())
    assert_close(SimpleNamespace(model=result.averaged.module), expected)
    assert result.averaged.n_averaged == len(result.batches)
    assert not unchanged(result.averaged.module.parameters(), weights(result))


@check("Groups, early and late")
def _(result: SimpleNamespace) -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        bias = {"params": [model[2].bias], "rho": 0.0, "weight_decay": 0.0}
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
        return torch.optim.SGD([{"params": [model[2].weight]}, bias], **options)

    def add(step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        if step == 24:
            optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.05})

    assert_close(result, by_hand(make, before_step=add))
    groups = result.optimizer.param_groups
    assert [(group["rho"], group["lr"]) for group in groups] == [
        (0.05, 0.1),
        (0.0, 0.1),
        (0.05, 0.05),
    ]


@check("Freezing and unfreezing")
def _(result: SimpleNamespace) -> None:
    def freeze(step: int, model: Any, _: torch.optim.Optimizer) -> None:
        model[0].requires_grad_(step < 12 or step >= 24)

    assert_close(result, by_hand(before_step=freeze))


@check("Tied weights")
def _(result: SimpleNamespace) -> None:
    assert result.model[2].weight is result.model[0].weight
    assert sum(len(group["params"]) for group in result.optimizer.param_groups) == 5
    shared: dict[str, Any] = {}
    execute(SHARED, shared)
    # The random numbers go on where the shared lines leave them, as they do in the snippet.
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model[2].weight = model[0].weight
    assert_close(result, by_hand(model=model))


@check("Checkpoints")
def _(result: SimpleNamespace) -> None:
    assert unchanged(weights(result), weights(run("The loop")))
    assert result.checkpoint["optimizer"]["state"][0].keys() == {"momentum_buffer"}


@check("From SGD to SAM")
def _(result: SimpleNamespace) -> None:
    def set_rho(step: int, _: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["rho"] = 0.05 if step >= 24 else 0.0

    assert_close(result, by_hand(before_step=set_rho))
    assert result.optimizer.param_groups[0]["rho"] == 0.05


@check("Other base optimizers")
def _(result: SimpleNamespace) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

    assert_close(result, by_hand(make))


@check("Other base optimizers 2")
def _(result: SimpleNamespace) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        group = {"params": model.parameters(), "sam_rho": 0.05}
        return torch.optim.Adadelta([group], lr=1.0, eps=1e-3)

    assert_close(result, by_hand(make))


def plain_steps(wants: Callable[[int], bool], rho: float) -> list[Tensor]:
    """SAM in some steps, and the base optimizer alone in the others."""

    def set_rho(step: int, _: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["rho"] = rho if wants(step) else 0.0

    return by_hand(before_step=set_rho)


def passes_of(name: str) -> int:
    """How often a snippet computes its loss."""
    calls = []

    def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
        calls.append(target)
        return nn.functional.cross_entropy(logits, target)

    run(name, loss_fn=loss_fn)
    return len(calls)


@check("A second pass in every tenth step")
def _(result: SimpleNamespace) -> None:
    assert_close(result, plain_steps(lambda step: step % 10 == 9, rho=0.5))
    assert passes_of("A second pass in every tenth step") == 48 + 4


@check("A second pass at the end of training")
def _(result: SimpleNamespace) -> None:
    assert_close(result, plain_steps(lambda step: step >= 36, rho=0.05))
    assert passes_of("A second pass at the end of training") == 48 + 12


@check("A second pass by chance")
def _(result: SimpleNamespace) -> None:
    chance = Bernoulli(0.5, seed=0)
    wanted = [chance.wants(step, float("nan"), {}) for step in range(48)]
    assert 12 < sum(wanted) < 36
    assert_close(result, plain_steps(wanted.__getitem__, rho=0.05))
    assert passes_of("A second pass by chance") == 48 + sum(wanted)


@check("LookSAM")
def _(result: SimpleNamespace) -> None:
    shared = run(SHARED)
    params = list(shared.model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    kept: list[Tensor] = []
    for step, (x, y) in enumerate(shared.batches):
        g1 = torch.autograd.grad(nn.functional.cross_entropy(shared.model(x), y), params)
        n1 = norm_of(g1)
        if step % 5 == 0:
            before = snapshot(params)
            with torch.no_grad():
                for p, g in zip(params, g1, strict=True):
                    p.add_(0.05 * g / n1)
            g2 = torch.autograd.grad(nn.functional.cross_entropy(shared.model(x), y), params)
            with torch.no_grad():
                for p, w in zip(params, before, strict=True):
                    p.copy_(w)
            along = sum((a * b).sum() for a, b in zip(g1, g2, strict=True)) / n1**2
            kept = [b - along * a for a, b in zip(g1, g2, strict=True)]
            u = list(g2)
        else:
            ratio = 0.1 * n1 / norm_of(kept)
            u = [a + ratio * b for a, b in zip(g1, kept, strict=True)]
        for p, of_param in zip(params, u, strict=True):
            p.grad = of_param
        optimizer.step()
    assert_close(result, snapshot(params))
    assert passes_of("LookSAM") == 48 + 10


@check("Momentum SAM")
def _(result: SimpleNamespace) -> None:
    shared = run(SHARED)
    params = list(shared.model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    before = snapshot(params)
    for x, y in shared.batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(shared.model(x), y).backward()
        with torch.no_grad():
            for p, w in zip(params, before, strict=True):
                p.copy_(w)
        optimizer.step()
        before = snapshot(params)
        momentum = [optimizer.state[p]["momentum_buffer"] for p in params]
        n = norm_of(momentum)
        with torch.no_grad():
            for p, v in zip(params, momentum, strict=True):
                p.sub_(0.3 * v / n)
    assert_close(result, snapshot(params))
    saved = result.checkpoint["model"].values()
    for p, w in zip(saved, before, strict=True):
        torch.testing.assert_close(p, w, rtol=1e-5, atol=1e-5)
    assert result.accuracy > 0.9
    assert passes_of("Momentum SAM") == 48


@check("SGDHess")
def _(result: SimpleNamespace) -> None:
    assert passes_of("SGDHess") == 48
    plain = plain_steps(lambda step: False, rho=0.0)
    assert not unchanged(weights(result), plain)
    for p, q in zip(weights(result), plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.3)


@check("SGDHess and attention")
def _(result: SimpleNamespace) -> None:
    """Without the math kernel there is an error, which names it."""
    x, y = result.batches[0]
    with pytest.raises(RuntimeError, match=r"sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)"):
        result.optimizer.backward(result.loss_fn(result.model(x), y))


@check("torch.compile")
def _(result: SimpleNamespace) -> None:
    from torch._dynamo.utils import counters

    assert counters["stats"]["unique_graphs"] == 2, "one for each pass of the first step"
    assert result.model[1].num_batches_tracked == len(result.batches)
    assert result.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@check("CUDA graphs")
def _(result: SimpleNamespace) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)

    assert_close(result, by_hand(scheduler=schedule))


@check("Several processes")
def _(result: SimpleNamespace) -> None:
    """In one process; tests/test_optim_ranks.py has the others."""
    assert unchanged(weights(result), weights(run("The loop")))


@check("FSDP2")
def _(result: SimpleNamespace) -> None:
    """In one process; tests/fsdp_worker.py executes it in several."""
    assert unchanged(weights(result), weights(run("The loop")))


@check("FSDP2 2")
def _(result: SimpleNamespace) -> None:
    assert unchanged(weights(result), weights(run("The loop")))
    assert (Path("checkpoint") / ".metadata").exists()


@check("m-sharpness on one device")
def _(result: SimpleNamespace) -> None:
    shared = run(SHARED)
    params = list(shared.model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for xs, ys in shared.batches:
        total = [torch.zeros_like(p) for p in params]
        for x, y in zip(xs.split(4), ys.split(4), strict=True):
            first = torch.autograd.grad(nn.functional.cross_entropy(shared.model(x), y), params)
            old = snapshot(params)
            norm = torch.cat([g.flatten() for g in first]).norm()
            with torch.no_grad():
                for p, g in zip(params, first, strict=True):
                    p += 0.05 * g / norm
            second = torch.autograd.grad(nn.functional.cross_entropy(shared.model(x), y), params)
            with torch.no_grad():
                for p, w, sum_, g in zip(params, old, total, second, strict=True):
                    p.copy_(w)
                    sum_ += g
        for p, sum_ in zip(params, total, strict=True):
            p.grad = sum_ / 4
        optimizer.step()
    assert_close(result, snapshot(params))
    with pytest.raises(AssertionError):
        assert_close(result, by_hand())


@check("Lightning")
def _(result: SimpleNamespace) -> None:
    assert result.trainer.global_step == len(result.batches)
    assert result.model.network[1].num_batches_tracked == len(result.batches)
    assert sam_of(result).param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert result.trainer.logged_metrics["loss"] < 0.5


@check("LightningCLI")
def _(result: SimpleNamespace) -> None:
    assert type(sam_of(result)).__name__ == "SAMWithSGD"
    assert_close(result, by_hand())


@check("Lightning, manual optimization")
def _(result: SimpleNamespace) -> None:
    assert result.trainer.global_step == len(result.batches)
    assert result.model.network[1].num_batches_tracked == len(result.batches)


@check("Accelerate")
def _(result: SimpleNamespace) -> None:
    assert_close(result, by_hand(accumulate=4))
    assert not result.loss.requires_grad


@check("Accelerate 2")
def _(result: SimpleNamespace) -> None:
    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    assert_close(result, by_hand(after_backward=clip))


@check("Hugging Face Trainer")
def _(result: SimpleNamespace) -> None:
    assert result.trainer.state.global_step == len(result.batches)
    assert sam_of(result).param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@check("fastai")
def _(result: SimpleNamespace) -> None:
    assert_close(result, by_hand())


@check("Ignite")
def _(result: SimpleNamespace) -> None:
    assert_close(result, by_hand())


@check("README")
def _(result: SimpleNamespace) -> None:
    assert_close(result, by_hand())


# -- the tests -------------------------------------------------------------------------------------

NEEDS = {
    "Lightning": ["lightning"],
    "LightningCLI": ["lightning", "jsonargparse"],
    "Accelerate": ["accelerate"],
    "Hugging": ["transformers"],
    "fastai": ["fastai"],
    "Ignite": ["ignite"],
}
# How often a pass computes the loss, where it is not once.
PER_PASS = {
    "Gradient accumulation": 4,
    "Gradient accumulation 2": 4,
    "m-sharpness on one device": 4,  # each of the four parts has its two passes
    "Accelerate": 4,
}
# Whose third step has one pass.
FEWER_PASSES = {
    "A second pass in every tenth step",
    "A second pass at the end of training",
    "A second pass by chance",
    "LookSAM",
    "Momentum SAM",
    "SGDHess",
    "SGDHess and attention",
}


def needed_by(name: str) -> list[str]:
    return NEEDS.get(name.split()[0].strip(","), [])


def named(name: str, *values: int, marks: Sequence[pytest.MarkDecorator] = ()) -> Any:
    of_name = [pytest.mark.frameworks] if needed_by(name) else []
    return pytest.param(name, *values, marks=[*of_name, *marks])


pytestmark = [
    # What the frameworks say of themselves, of this page's data, and of a machine without a GPU.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended"),
    pytest.mark.filterwarnings(
        "ignore:.*assuming the intent is to (save|load) in a single process"
    ),
    pytest.mark.usefixtures("alone", "fresh_accelerate"),
]


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def prepare(name: str) -> None:
        for module in needed_by(name):
            import_quietly(module)
        if name == "torch.compile":
            compile_ = torch.compile
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            # Takes a second instead of a minute, and guards alike.
            monkeypatch.setattr(torch, "compile", lambda m: compile_(m, backend="aot_eager"))

    return prepare


def test_every_snippet_has_a_check_and_every_check_a_snippet() -> None:
    """A snippet that is new, gone or renamed has to be looked at here as well."""
    assert list(BLOCKS) == [SHARED, *CHECKS]


@pytest.mark.parametrize("name", [named(name) for name in CHECKS])
def test_recipe(name: str, prepare: Callable[[str], None]) -> None:
    prepare(name)
    result = run(name)
    assert loss_of(run(SHARED).model, result.batches) > 1.2
    assert loss_of(result.model, result.batches) < 0.6
    # Between its steps MSAM is perturbed, and SGDHess never is.
    if not isinstance(optimizer_of(result), (MSAM, SGDHess)):
        assert not sam_of(result).is_perturbed
    CHECKS[name](result)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        # Every day where the weights are perturbed: in the first call of the second pass.
        named(name, call, marks=[] if call == PER_PASS.get(name, 1) else [pytest.mark.full])
        for name in CHECKS
        if name not in FEWER_PASSES
        for call in range(2 * PER_PASS.get(name, 1))
    ],
)
def test_recipe_is_interrupted_and_saves(
    name: str, call: int, prepare: Callable[[str], None]
) -> None:
    """Ctrl-C in each pass of a step, in the third one: what is saved then is w."""
    prepare(name)
    per_pass = PER_PASS.get(name, 1)
    start = 2 * 2 * per_pass + (24 if name == "From SGD to SAM" else 0)
    result, seen = interrupt(name, start + call)
    second = call % 2 == 1 if name.startswith("m-sharpness") else call >= per_pass
    assert unchanged(seen[-1], seen[start]) == (not second)
    torch.save(result.model.state_dict(), "model.pt")
    saved = torch.load("model.pt")
    assert unchanged([saved[n] for n, _ in result.model.named_parameters()], seen[start])
    sam_of(result).state_dict()  # refused between the steps
