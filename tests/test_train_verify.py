"""The lockstep check passes right optimizers and catches wrong ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train import verify
from train.loop.lockstep import TOLERANCE, Lockstep, relative_deviation
from train.loop.optimizers import build_optimizer, names_of_norms
from train.models import build_model
from train.settings.config import Config
from train.shared.errors import ConfigError, DivergedError, VerificationError

SAM_FAMILY = ("sam", "samdirection", "sammagnitude")


def config(opt_name: str = "sam", **keys: Any) -> Config:
    return Config(opt_name=opt_name, **{"rho": 0.1, "lr": 0.1, "wd": 0.001, **keys})


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet_small", (1, 8, 8), 10)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 1, 8, 8, generator=generator)
    return images, torch.randint(0, 10, (16,), generator=generator)


def take_steps(
    wrong: Callable[[nn.Module], Any],
    right: Config,
    steps: int = 5,
    each: Callable[[], object] = lambda: None,
) -> tuple[Lockstep, nn.Module]:
    """Steps with the optimizer that `wrong` makes, against the reference for `right`."""
    model = network()
    lockstep = Lockstep(
        model, wrong(model), lambda params: build_optimizer(params, right, backend="reference")
    )
    for step in range(steps):
        images, labels = batch(step)
        F.cross_entropy(model(images), labels).backward()
        if lockstep.first_step():
            F.cross_entropy(model(images), labels).backward()
        lockstep.second_step(zero_grad=True)
        each()
    return lockstep, model


def made(settings: Config) -> Callable[[nn.Module], Any]:
    return lambda model: build_optimizer(
        model.named_parameters(), settings, norms=names_of_norms(model)
    )


@pytest.mark.parametrize("granularity", ["element", "tensor", "global"])
@pytest.mark.parametrize("opt_name", SAM_FAMILY)
def test_right_optimizers_pass(opt_name: str, granularity: str) -> None:
    settings = config(opt_name, granularity=granularity, nesterov=True)
    lockstep, _ = take_steps(made(settings), settings, steps=10)
    summary = lockstep.summary()
    assert (summary["steps"], summary["tolerance"]) == (10, TOLERANCE)
    assert 0 <= summary["value"] <= TOLERANCE


def test_another_second_pass_is_caught() -> None:
    with pytest.raises(VerificationError, match=r"step 1: .*has a second pass"):
        take_steps(made(config(when="periodic:2")), config())


def sgdhess_steps(
    wrong: Callable[[nn.Module], Any], right: Config, steps: int = 5
) -> tuple[Lockstep, nn.Module]:
    model = network()
    lockstep = Lockstep(
        model, wrong(model), lambda params: build_optimizer(params, right, backend="reference")
    )
    for step in range(steps):
        images, labels = batch(step)
        lockstep.backward(F.cross_entropy(model(images), labels))
        lockstep.step()
        lockstep.zero_grad()
    return lockstep, model


def test_sgdhess_passes_and_the_training_is_the_same() -> None:
    settings = config("sgdhess", nesterov=True)
    lockstep, checked = sgdhess_steps(made(settings), settings)
    summary = lockstep.summary()
    assert summary["steps"] == 5 and 0 <= summary["value"] <= TOLERANCE
    model = network()
    optimizer = build_optimizer(model.parameters(), settings)
    for step in range(5):
        images, labels = batch(step)
        optimizer.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(model.parameters(), checked.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("wrong", [{"rho": 0.2}, {"rho": 0.0}, {"wd": 0.0}, {"momentum": 0.0}])
def test_wrong_sgdhess_is_caught(wrong: dict[str, float]) -> None:
    with pytest.raises(VerificationError, match=r"after the update, parameter '.*' deviates"):
        sgdhess_steps(made(config("sgdhess", **wrong)), config("sgdhess"))


def test_a_hessian_vector_product_that_is_not_finite_is_said() -> None:
    settings = config("sgdhess")
    model = network()
    optimizer = build_optimizer(model.parameters(), settings)
    lockstep = Lockstep(model, optimizer, lambda params: build_optimizer(params, settings))
    images, labels = batch(0)
    lockstep.backward(F.cross_entropy(model(images), labels))
    next(iter(optimizer.hessian_products.values())).fill_(float("inf"))
    with pytest.raises(DivergedError, match=r"step 1: Hv of '.*' is not finite"):
        lockstep.step()


def test_adaptive_passes() -> None:
    settings = config(adaptive=True, rho=0.5)
    lockstep, _ = take_steps(made(settings), settings)
    assert lockstep.summary()["value"] <= TOLERANCE


def test_the_twin_follows_the_schedule() -> None:
    settings = config()
    optimizer: list[Any] = []

    def make(model: nn.Module) -> Any:
        optimizer.append(build_optimizer(model.parameters(), settings))
        return optimizer[0]

    def halve() -> None:
        optimizer[0].param_groups[0]["lr"] /= 2

    lockstep, _ = take_steps(make, settings, each=halve)
    assert lockstep.steps == 5


def test_lockstep_changes_nothing_in_the_training() -> None:
    settings = config()
    _, checked = take_steps(made(settings), settings)
    model = network()
    optimizer = build_optimizer(model.parameters(), settings)
    for step in range(5):
        images, labels = batch(step)
        F.cross_entropy(model(images), labels).backward()
        optimizer.first_step()
        F.cross_entropy(model(images), labels).backward()
        optimizer.second_step(zero_grad=True)
    pairs = zip(model.parameters(), checked.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.full
@pytest.mark.parametrize(
    ("wrong", "right", "phase"),
    [
        (config(rho=1.0), config(rho=0.1), "perturbation"),
        (config(rho=0.0), config(rho=0.1), "perturbation"),
        (config(adaptive=True), config(), "perturbation"),
        (config("samdirection"), config("sammagnitude"), "update"),
        (config("sammagnitude"), config("samdirection"), "update"),
        (config("sam"), config("samdirection"), "update"),
        (config("samdirection", granularity="tensor"), config("samdirection"), "update"),
        (config(wd=0.0), config(wd=0.001), "update"),
        (config(momentum=0.0), config(momentum=0.9), "update"),
        (config(nesterov=True), config(), "update"),
        (config("asam"), config("sam"), "perturbation"),
        (config("gsam", alpha=0.2), config("gsam"), "update"),
        (config("wsam", gamma=0.8), config("wsam"), "update"),
        (config("wsam", decouple=False), config("wsam"), "update"),
        (config("gradientnormpenalty", normed=True), config("gradientnormpenalty"), "update"),
        (config("friendlysam", sigma=0.5), config("friendlysam"), "perturbation"),
        (config("friendlysam", lmbda=0.5), config("friendlysam"), "perturbation"),
        (config("vasso", theta=0.5), config("vasso"), "perturbation"),
        (config("looksam", k=3, alpha=0.1), config("looksam", k=3), "update"),
        (config("saner", alpha=0.1), config("saner"), "update"),
        (config("xsam", a=0.5), config("xsam"), "update"),
        (config(norm="tensor"), config(), "perturbation"),
        (config(subset="norm"), config(), "perturbation"),
        (config(scaling="tensor"), config(), "perturbation"),
    ],
)
def test_wrong_optimizers_are_caught(wrong: Config, right: Config, phase: str) -> None:
    with pytest.raises(VerificationError, match=f"after the {phase}, parameter '.*' deviates"):
        take_steps(made(wrong), right)


def test_an_optimizer_that_never_restores_is_caught() -> None:
    def never_restoring(model: nn.Module) -> Any:
        optimizer = build_optimizer(model.parameters(), config())
        params = list(model.parameters())
        second_step = optimizer.second_step

        def keep_the_perturbation(zero_grad: bool = False) -> None:
            perturbed = [p.detach().clone() for p in params]
            second_step(zero_grad=False)
            after = [p.detach().clone() for p in params]
            optimizer.zero_grad()
            restored = copy.deepcopy(originals)
            with torch.no_grad():
                for p, w, e, old in zip(params, after, perturbed, restored, strict=True):
                    p.copy_(e + (w - old))

        first_step = optimizer.first_step
        originals: list[Tensor] = []

        def remember() -> bool:
            originals[:] = [p.detach().clone() for p in params]
            return bool(first_step())

        optimizer.first_step, optimizer.second_step = remember, keep_the_perturbation
        return optimizer

    with pytest.raises(VerificationError, match="step 1: after the update"):
        take_steps(never_restoring, config())


def test_non_finite_gradients_are_named() -> None:
    settings = config()

    def poisoned(model: nn.Module) -> Any:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))
        return build_optimizer(model.parameters(), settings)

    with pytest.raises(DivergedError, match=r"step 1: the gradient of 'features\..*not finite"):
        take_steps(poisoned, settings)


def test_relative_deviation() -> None:
    assert relative_deviation(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1
    assert relative_deviation(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
    assert relative_deviation(torch.zeros(2), torch.zeros(2)) == 0.0


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The first steps of a run, also over the end of an epoch."""
    flags = ["--dataset=digits", "--model=mlp", "--batch_size=500", "--device=cpu"]
    assert verify.main([*flags, "--opt_name=sam", "--rho=0.1", "--verify_steps=3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("MLP, sam-rho0.1: 3 steps of 500 images by ")
    assert "largest relative deviation" in said and "(allowed 1e-05)" in said
    for more in (["--opt_name=sgd"], ["--opt_name=sam", "--verify_steps=0"]):
        with pytest.raises(ConfigError, match="compares nothing"):
            verify.main([*flags, *more])
    assert verify.main(["--help"]) == 0
