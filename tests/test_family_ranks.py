"""Every variant of SAM in two processes, which share its batches, against one process: with
DistributedDataParallel and over FSDP2's shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torch.distributed.fsdp", reason="no torch.distributed here")
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("this version of torch has no FSDP2", allow_module_level=True)

from tests import family_ranks
from tests.family import Halves, loss
from tests.family_ranks import CASES, SAVED_AFTER, STEPS, Case, train, weights
from tests.processes import run_ranks
from tests.test_family import by_rule

Results = list[dict[str, Any]]  # of each rank
each_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("family")
    codes, errors = run_ranks("tests.family_ranks", 2, folder)
    assert not any(codes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def of_both(results: Results, name: str, how: str) -> dict[str, Any]:
    """What both ranks found alike, bit for bit."""
    ours, theirs = (of_rank[name][how] for of_rank in results)
    assert not isinstance(ours, str), ours
    assert not isinstance(theirs, str), theirs
    assert torch.equal(ours["weights"], theirs["weights"])
    assert ours["had"] == theirs["had"]
    return ours


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def alone(case: Case) -> dict[str, Any]:
    model = case.model()
    optimizer = case.optimizer(model)
    had = train(model, optimizer, range(STEPS))
    return {"weights": weights(model, optimizer), "had": had}


@each_case
def test_ddp_equals_one_process(name: str, results: Results) -> None:
    ours, expected = of_both(results, name, "global"), alone(CASES[name])
    assert ours["had"] == expected["had"]
    close(ours["weights"], expected["weights"])


@each_case
def test_shards_equal_one_process(name: str, results: Results) -> None:
    ours, expected = of_both(results, name, "sharded"), alone(CASES[name])
    assert ours["had"] == expected["had"]
    close(ours["weights"], expected["weights"])


@each_case
def test_a_sharded_run_is_resumed_bit_for_bit(name: str, results: Results) -> None:
    for of_rank in results:
        ours = of_rank[name]["sharded"]
        resumed = ours["resumed"]
        assert not isinstance(resumed, str), resumed
        assert resumed["had"] == ours["had"][SAVED_AFTER:]
        assert torch.equal(resumed["weights"], ours["weights"])


@each_case
def test_local_perturbations_are_those_of_parts(name: str, results: Results) -> None:
    """And of the formula, where there is one; or the package says why there are none."""
    case = CASES[name]
    if case.refuses_local is not None:
        for of_rank in results:
            assert case.refuses_local in of_rank[name]["local"]
        return
    ours = of_both(results, name, "local")
    model = case.model()
    optimizer = case.optimizer(model)
    for step in range(STEPS):
        for half in optimizer.parts([0, 1]):
            loss(model, step, half).backward()
            if optimizer.first_step():
                loss(model, step, half).backward()
        optimizer.step()
        optimizer.zero_grad()
    close(ours["weights"], weights(model, optimizer))
    if case.by_rule is not None:
        expected = by_rule(case.row, case.base, STEPS, run_class=Halves, **case.by_rule)
        flat = torch.cat([p.detach().flatten() for p in expected.parameters()])
        close(ours["weights"], flat)


def test_policies_have_both_kinds_of_steps() -> None:
    """Or the tests above would not tell whether ranks decide alike."""
    for name in ("periodic", "late", "at random", "AE-SAM", "late FriendlySAM"):
        assert set(alone(CASES[name])["had"]) == {True, False}, name


def test_every_variant_is_here() -> None:
    classes = {case.row.cls for case in CASES.values()}
    assert classes == set(family_ranks.every_variant())
