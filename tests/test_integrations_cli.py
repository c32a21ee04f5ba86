"""Optimizers whose signatures name the options of their base, and command lines."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from samkernels import SAM, SAMDirection, SAMMagnitude
from samkernels.integrations import cli
from samkernels.integrations.cli import ExplicitOptions, SAMWithSGD
from tests.optim_helpers import unchanged

BASES = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
CLASSES = {c.__name__: c for c in (SAM, SAMDirection, SAMMagnitude)}


def some_params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, n)) for n in (3, 5)]


def some_steps(optimizer: SAM) -> None:
    params = optimizer.param_groups[0]["params"]
    for _ in range(3):
        for _ in range(2):
            sum((p**4).sum() for p in params).backward()
            (optimizer.second_step if optimizer.is_perturbed else optimizer.first_step)()
        optimizer.zero_grad()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", CLASSES)
def test_signature_and_steps(name: str, base: str) -> None:
    cls = getattr(cli, f"{name}With{base}")
    assert issubclass(cls, CLASSES[name])
    signature = inspect.signature(cls)
    assert next(iter(signature.parameters)) == "params"
    assert not {"base_optimizer", "base_options", "self"} & signature.parameters.keys()
    of_base = inspect.signature(BASES[base], eval_str=True).parameters
    of_class = inspect.signature(CLASSES[name], eval_str=True).parameters
    for option, parameter in signature.parameters.items():
        if option == "params":
            continue
        origin = {**of_base, **of_class}[option]
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == origin.default
        assert parameter.annotation == origin.annotation
    assert {*of_base, *of_class} - {*signature.parameters} == {"base_optimizer", "base_options"}

    plain, explicit = some_params(), some_params()
    options = {"rho": 0.1, "lr": 0.01, "weight_decay": 0.1}
    some_steps(CLASSES[name](plain, BASES[base], **options))
    optimizer = cls(explicit, **options)
    some_steps(optimizer)
    assert unchanged(explicit, plain)
    assert type(pickle.loads(pickle.dumps(optimizer))) is cls
    assert (
        copy.deepcopy(optimizer).state_dict()["param_groups"]
        == (optimizer.state_dict()["param_groups"])
    )


def test_a_class_of_ones_own() -> None:
    class SAMWithRMSprop(ExplicitOptions, SAM, base_optimizer=torch.optim.RMSprop):
        pass

    class Derived(SAMWithRMSprop):
        pass

    for cls in (SAMWithRMSprop, Derived):
        assert inspect.signature(cls).parameters["alpha"].default == 0.99
        optimizer = cls(some_params(), alpha=0.9)
        assert type(optimizer.base_optimizer) is torch.optim.RMSprop
        assert optimizer.param_groups[0]["alpha"] == 0.9


def test_types_that_are_not_there() -> None:
    class Typed(torch.optim.SGD):
        def __init__(self, params: Any, lr: Nowhere = 0.1) -> None:  # type: ignore # noqa: F821
            super().__init__(params, lr)

    class SAMWithTyped(ExplicitOptions, SAM, base_optimizer=Typed):
        pass

    assert inspect.signature(SAMWithTyped).parameters["lr"].default == 0.1
    assert SAMWithTyped(some_params(), lr=0.2).param_groups[0]["lr"] == 0.2


def test_wrong_options_are_refused() -> None:
    with pytest.raises(TypeError, match="nesterow"):
        SAMWithSGD(some_params(), nesterow=True)
    with pytest.raises(TypeError, match="SAMWithAdadelta: Adadelta has an option called rho, as"):

        class SAMWithAdadelta(ExplicitOptions, SAM, base_optimizer=torch.optim.Adadelta):
            pass


def test_command_lines_reach_the_options() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
    path = "--optimizer=samkernels.integrations.cli.SAMDirectionWithAdamW"
    options = ["rho=0.1", "granularity=tensor", "lr=0.2", "betas=[0.8,0.9]", "weight_decay=0.3"]
    arguments = parser.parse_args([path, *(f"--optimizer.{option}" for option in options)])
    optimizer = parser.instantiate(arguments).optimizer(some_params())
    assert type(optimizer) is cli.SAMDirectionWithAdamW
    (group,) = optimizer.param_groups
    assert {"rho": 0.1, "granularity": "tensor", "lr": 0.2, "weight_decay": 0.3}.items() <= (
        group.items()
    )
    assert tuple(group["betas"]) == (0.8, 0.9)
    with pytest.raises(jsonargparse.ArgumentError, match="momentum"):
        parser.parse_args([path, "--optimizer.momentum=0.9"])
