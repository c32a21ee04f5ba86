"""Variants whose parameters come, freeze or are loaded while they train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import samkernels
from samkernels import BAR, MSAM, SAM
from tests.family import loss
from tests.optim_helpers import same_bits, snapshot, through_a_file, unchanged
from tests.test_family import Lora, Network, copies, row_of, take_steps, trained


def test_pairs_of_bar_are_pairs_of_its_parameters() -> None:
    model = Lora()
    for pairs in (3, [3], "AB"):
        with pytest.raises(TypeError, match="pairs"):
            BAR(model.parameters(), lr=0.1, pairs=pairs)
    other = Lora()
    with pytest.raises(ValueError, match="pairs selects 0"):
        BAR(model.parameters(), lr=0.1, pairs=[(other.lora_A, other.lora_B)])


@pytest.mark.parametrize("option", [{"adaptive": True}, {"norm": None}, {"perturbation": "local"}])
def test_bar_takes_no_options_of_a_perturbation(option: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(option))}: BAR perturbs nothing"):
        BAR(Lora().named_parameters(), lr=0.1, **option)


def test_bar_balances_pairs_of_groups_that_come_later() -> None:
    whole, grown = Lora(), Lora()
    named = dict(grown.named_parameters())
    second = {f"second.{n}": p for n, p in Lora().named_parameters()}
    options: dict[str, Any] = {"base_optimizer": torch.optim.SGD, "alpha": 0.3, "lr": 0.1}
    optimizer = BAR(named.items(), **options)
    optimizer.add_param_group({"params": list(second.items()), "alpha": 0.3})
    for p, q in zip(named.values(), second.values(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    assert unchanged(named.values(), list(second.values()))
    optimizer = BAR(whole.named_parameters(), **options)
    for p in whole.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert unchanged(whole.parameters(), list(named.values()))


def test_a_parameter_that_msam_trained_comes_back_to_w_when_it_is_frozen() -> None:
    model, optimizer = copies(row_of(MSAM))
    take_steps(model, optimizer, range(3))
    with optimizer.unperturbed():
        w = model.weight1.detach().clone()
    assert not same_bits(model.weight1.detach(), w)
    model.weight1.requires_grad_(False)
    take_steps(model, optimizer, range(3, 5))
    assert same_bits(model.weight1.detach(), w)
    with optimizer.unperturbed():
        assert same_bits(model.weight1.detach(), w)
    assert same_bits(model.weight1.detach(), w)


@pytest.mark.parametrize("cls", [SAM, samkernels.VaSSO])
def test_a_checkpoint_of_msam_leaves_another_variant_at_w(cls: type[SAM]) -> None:
    model, optimizer = trained(row_of(MSAM), steps=3)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    with optimizer.unperturbed():
        w = snapshot(model.parameters())
    other = Network()
    other.load_state_dict(saved["model"])  # at w + e(w)
    params = list(other.parameters())
    groups = [{"params": params[:3]}, {"params": params[3:]}]
    loaded = cls(groups, torch.optim.SGD, lr=0.1, momentum=0.9)
    loaded.load_state_dict(saved["optimizer"])
    assert unchanged(other.parameters(), w)
    take_steps(other, loaded, range(3, 5))
    assert not any("w" in loaded._slots.own_of(p) for p in params)


class Alternating:
    """A policy of somebody else's, which looks at the norm and remembers something."""

    needs_norm = True
    memory = {"turn": 0}  # noqa: RUF012

    def wants(self, step: int, square: float, memory: dict[str, Any]) -> bool:
        memory["turn"] += 1
        return bool(memory["turn"] % 2)


def test_a_policy_finds_what_it_remembered() -> None:
    model, optimizer = copies(row_of(SAM), when=Alternating())
    answers = []
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            model, optimizer = copies(row_of(SAM), when=Alternating())
            optimizer.load_state_dict(saved)
        loss(model, step).backward()
        answers.append(optimizer.first_step())
        if answers[-1]:
            loss(model, step).backward()
        optimizer.second_step(zero_grad=True)
    assert answers == [True, False] * 3


def test_a_mask_has_the_shape_of_its_parameter() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="has another shape"):
        SAM([p], lr=0.1, mask={p: torch.ones(2)})
