"""What is used beside an optimizer in a training loop: schedulers, averaged weights, groups that
come later, freezing, branches without gradients, tied weights, torch.compile. Each against the
same loop around a plain SAM step; warnings are errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler, swa_utils

from samkernels import SAM, SAMDirection, SAMMagnitude, SGDHess, frozen_batchnorm_stats
from tests.optim_helpers import (
    ConvNet,
    images,
    parameters_of,
    plain_sam_step,
    snapshot,
    unchanged,
)
from tests.optimizers import (
    INFO,
    Variant,
)

STEPS = 12
RHO = 0.1


class Network(nn.Module):
    """Two layers with one weight, two branches of which one is used at a time, and one never."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.branches = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.to(dtype)

        self.averages: list[swa_utils.AveragedModel] = []  # in a list: no submodule

    def forward(self, x: Tensor, branch: int) -> Tensor:
        return self.branches[branch](self.second(self.first(x).tanh()).tanh())


# A feature is given model and optimizer, and returns what it does after each step (step, loss).
After = Callable[[int, float], object]
Feature = Callable[[Network, torch.optim.Optimizer], After]


def scheduled(make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]) -> Feature:
    def feature(_: Network, optimizer: torch.optim.Optimizer) -> After:
        scheduler = make(optimizer)
        return lambda step, loss: scheduler.step()

    return feature


def warm_up_then_cosine(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
        lr_scheduler.CosineAnnealingLR(optimizer, 8),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [4])


def cyclic(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """Writes momentum, or the first beta, into the groups as well as lr."""
    return lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.1, step_size_up=3, base_momentum=0.5, max_momentum=0.9
    )


def plateau(_: Network, optimizer: torch.optim.Optimizer) -> After:
    # Every loss is a bad one: lr falls at each third step.
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=2, threshold=10.0)
    return lambda step, loss: scheduler.step(loss)


def averaged(model: Network, optimizer: torch.optim.Optimizer) -> After:
    """Stochastic weight averaging, with its scheduler."""
    model.averages.append(swa_utils.AveragedModel(model))
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=4)

    def after(step: int, loss: float) -> None:
        if step >= 3:
            model.averages[0].update_parameters(model)
        scheduler.step()

    return after


def moving_average(model: Network, optimizer: torch.optim.Optimizer) -> After:
    average = swa_utils.get_ema_multi_avg_fn(0.8)
    model.averages.append(swa_utils.AveragedModel(model, multi_avg_fn=average))
    return lambda step, loss: model.averages[0].update_parameters(model)


def added_groups(model: Network, optimizer: torch.optim.Optimizer) -> After:
    """A branch and the layers' biases come later; its scheduler was made before them."""
    late = [*model.branches[1].parameters(), model.first.bias]
    (group,) = optimizer.param_groups
    group["params"] = [p for p in group["params"] if all(p is not q for q in late)]

    def after(step: int, loss: float) -> None:
        if step == 3:
            optimizer.add_param_group({"params": late[:2], "lr": 0.02, "rho": 0.3})
        if step == 7:
            optimizer.add_param_group({"params": late[2:]})

    return after


def freezing(model: Network, _: torch.optim.Optimizer) -> After:
    """Parameters with momentum pause, parameters that were frozen from the start begin."""
    model.branches[0].requires_grad_(False)

    def after(step: int, loss: float) -> None:
        model.first.requires_grad_(not 3 <= step < 6)  # its weight is the second layer's, too
        model.branches[0].requires_grad_(step >= 5)

    return after


FEATURES: dict[str, Feature] = {
    "nothing but branches and tied weights": lambda *_: lambda *_: None,
    "SequentialLR": scheduled(warm_up_then_cosine),
    "CosineAnnealingWarmRestarts": scheduled(
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5)
    ),
    "CyclicLR": scheduled(cyclic),
    "MultiplicativeLR": scheduled(lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.8)),
    "ReduceLROnPlateau": plateau,
    "SWA": averaged,
    "EMA": moving_average,
    "add_param_group": added_groups,
    "freezing": freezing,
}
BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}),
}


def element_of(cls: type[SAM]) -> Callable[[Tensor, Tensor], Tensor]:
    """u of one parameter, with the options that an optimizer has if none are given."""
    variant = Variant(INFO[cls], INFO[cls].variants[0])
    return lambda g1, g2: variant.u([g1], [g2])[0]


def train(
    dtype: torch.dtype, feature: str, base: str, cls: type[SAM], backend: str | None
) -> tuple[Network, torch.optim.Optimizer]:
    """With backend=None the plain step makes what `cls` makes."""
    base_class, options = BASES[base]
    model = Network(dtype)
    optimizer: torch.optim.Optimizer
    if backend is None:
        optimizer = base_class(model.parameters(), **options)
    else:
        optimizer = cls(model.parameters(), base_class, RHO, backend=backend, **options)
    after = FEATURES[feature](model, optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x = torch.randn(8, 6, generator=generator).to(dtype)
        y = torch.randint(3, (8,), generator=generator)
        losses = []

        def compute(step: int = step, x: Tensor = x, y: Tensor = y, losses: Any = losses) -> None:
            loss = cross_entropy(model(x, branch=step % 2), y)
            loss.backward()
            losses.append(loss.item())

        if isinstance(optimizer, SAM):
            compute()
            optimizer.first_step()
            compute()
            optimizer.step()
            model.zero_grad()
        else:
            plain_sam_step(model, optimizer, compute, RHO, element_of(cls))
        after(step, losses[0])
    return model, optimizer


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    ("cls", "dtype", "backend", "tolerance"),
    [
        # In float64 nothing but wrong arithmetic could be larger; signs do not flip there.
        (SAM, torch.float64, "reference", 1e-12),
        (SAMDirection, torch.float64, "foreach", 1e-12),
        (SAMMagnitude, torch.float64, "foreach", 1e-12),
        # The fused kernels: float32's roundings of 12 steps.
        (SAM, torch.float32, "native", 2e-5),
    ],
    ids=["SAM", "SAMDirection", "SAMMagnitude", "native"],
)
def test_features(
    cls: type[SAM], dtype: torch.dtype, backend: str, tolerance: float, feature: str, base: str
) -> None:
    model, optimizer = train(dtype, feature, base, cls, backend)
    expected, plain = train(dtype, feature, base, cls, None)
    start = Network(dtype)
    for name, p in model.named_parameters():
        q = expected.get_parameter(name)
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        assert torch.equal(p, start.get_parameter(name)) == name.startswith("branches.2"), name
    assert len(model.averages) == (feature in ("SWA", "EMA"))
    for average, other in zip(model.averages, expected.averages, strict=True):
        for p, q in zip(average.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    # lr, momentum and the like, and who has a state: all but the branch that was never used.
    for group, of_plain in zip(optimizer.param_groups, plain.param_groups, strict=True):
        for key in of_plain.keys() - {"params"}:
            assert group[key] == of_plain[key], key
    with_state = [p in optimizer.state for p in parameters_of(optimizer)]
    assert with_state == [p in plain.state for p in parameters_of(plain)]
    assert with_state.count(False) == 2


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.fixture
def graphs() -> Callable[[], int]:
    """How many graphs were compiled in this test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def two_steps(optimizer: SAM, backward: Callable[[], Tensor]) -> None:
    backward()
    optimizer.first_step()
    backward()
    optimizer.step()
    optimizer.zero_grad()


def closure(optimizer: SAM, backward: Callable[[], Tensor]) -> None:
    optimizer.step(backward)


@pytest.mark.parametrize("freeze", [False, True], ids=["plain", "frozen_batchnorm_stats"])
@pytest.mark.parametrize("make_step", [two_steps, closure])
@pytest.mark.parametrize(
    ("cls", "base"), [(SAM, "SGD"), (SAMDirection, "SGD"), (SAMMagnitude, "AdamW")]
)
def test_a_compiled_model_is_not_compiled_again(
    cls: type[SAM],
    base: str,
    make_step: Callable[[SAM, Callable[[], Tensor]], None],
    freeze: bool,
    graphs: Callable[[], int],
) -> None:
    """frozen_batchnorm_stats makes a second graph, in the first step; none comes later. The
    weights are those of the model that is not compiled, bit for bit."""

    def train(compiled: bool) -> list[Tensor]:
        model = ConvNet()
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        base_class, options = BASES[base]
        optimizer = cls(model.parameters(), base_class, RHO, **options)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)

        def step(i: int) -> None:
            x, y = images(i)

            def backward() -> Tensor:
                if freeze and optimizer.is_perturbed:
                    with frozen_batchnorm_stats(model):
                        loss = cross_entropy(run(x), y)
                else:
                    loss = cross_entropy(run(x), y)
                loss.backward()
                return loss

            make_step(optimizer, backward)
            scheduler.step()

        step(0)
        assert graphs() == (1 + freeze if compiled else 0)
        with torch.compiler.set_stance("fail_on_recompile"):
            for i in range(1, 8):
                step(i)
        assert graphs() == (1 + freeze if compiled else 0)
        assert model.norm1.num_batches_tracked == (8 if freeze else 16)
        return snapshot(model.state_dict().values())

    eager = train(compiled=False)
    assert unchanged(train(compiled=True), eager)


def whole_step(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> Tensor:
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.first_step()
    with frozen_batchnorm_stats(model):
        cross_entropy(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
    return loss


def step_in_a_context(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> Any:
    cross_entropy(model(x), y).backward()
    with optimizer.perturbed():
        cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer.statistics


def step_with_a_closure(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> Tensor:
    def closure() -> Tensor:
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


def step_of_parts(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    for part in optimizer.parts(zip(x.chunk(2), y.chunk(2), strict=True)):
        cross_entropy(model(part[0]), part[1]).backward()
        optimizer.first_step()
        cross_entropy(model(part[0]), part[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def step_that_is_undone(model: nn.Module, optimizer: SAM, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(x), y).backward()
    optimizer.first_step()
    optimizer.restore()
    whole_step(model, optimizer, x, y)


def step_of_sgdhess(model: nn.Module, optimizer: SGDHess, x: Tensor, y: Tensor) -> None:
    optimizer.backward(cross_entropy(model(x), y))
    optimizer.step()
    optimizer.zero_grad()


COMPILED_STEPS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "SAM": (whole_step, lambda p: SAM(p, rho=RHO, lr=0.1, momentum=0.9)),
    "SAMDirection": (whole_step, lambda p: SAMDirection(p, rho=RHO, lr=0.1)),
    "SAMMagnitude": (
        whole_step,
        lambda p: SAMMagnitude(p, torch.optim.AdamW, RHO, granularity="tensor", lr=0.01),
    ),
    "statistics": (
        step_in_a_context,
        lambda p: SAM(p, torch.optim.RMSprop, RHO, track_statistics=True, lr=0.01),
    ),
    "closure": (step_with_a_closure, lambda p: SAMDirection(p, rho=RHO, lr=0.1)),
    "parts": (step_of_parts, lambda p: SAMDirection(p, rho=RHO, lr=0.1)),
    "restore": (step_that_is_undone, lambda p: SAM(p, rho=RHO, lr=0.1, max_grad_norm=1.0)),
    "SGDHess": (step_of_sgdhess, lambda p: SGDHess(p, lr=0.1, momentum=0.9, k=2, seed=1)),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's
@pytest.mark.parametrize("name", COMPILED_STEPS)
def test_a_compiled_training_step(name: str, graphs: Callable[[], int]) -> None:
    """The optimizer stays out of the graphs: a break for each call of it and of backward, nothing
    new in later steps, and the weights of the step that is not compiled, bit for bit."""
    step, make = COMPILED_STEPS[name]
    breaks = torch._dynamo.utils.counters["graph_break"]

    def train(compiled: bool) -> list[Tensor]:
        model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), ConvNet())
        optimizer = make(model.parameters())
        scheduler = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=5)

        def run(x: Tensor, y: Tensor) -> Any:
            return step(model, optimizer, x, y)

        run = torch.compile(run, backend="eager") if compiled else run
        for i in range(5):
            run(*images(i))
            scheduler.step()
            if i == 0:
                known = sum(breaks.values()), graphs()
        if compiled:
            assert (sum(breaks.values()), graphs()) == known
            assert 0 < known[0] <= 8
        return snapshot(model.state_dict().values())

    eager = train(compiled=False)
    assert unchanged(train(compiled=True), eager)


def test_a_compiled_model_beside_a_grad_scaler(graphs: Callable[[], int]) -> None:
    """Between the steps there is a hook on a parameter then, from the second step on."""

    def train(compiled: bool) -> list[Tensor]:
        model = ConvNet()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = SAM(model.parameters(), rho=RHO, lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def step(i: int) -> None:
            x, y = images(i)
            scaler.scale(cross_entropy(run(x), y)).backward()
            optimizer.first_step()
            with frozen_batchnorm_stats(model):
                scaler.scale(cross_entropy(run(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        step(0)
        with torch.compiler.set_stance("fail_on_recompile"):
            for i in range(1, 6):
                step(i)
        return snapshot(model.parameters())

    eager = train(compiled=False)
    torch.testing.assert_close(train(compiled=True), eager)
    assert graphs() == 2


def test_compiling_again_would_be_noticed(graphs: Callable[[], int]) -> None:
    model = nn.BatchNorm1d(4)
    run = torch.compile(model, backend="eager")
    run(torch.ones(2, 4))
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        frozen_batchnorm_stats(model),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        run(torch.ones(2, 4))
    assert graphs() == 1
