"""Two and four processes with DistributedDataParallel against the same steps by hand, in one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from samkernels import SAM, frozen_batchnorm_stats
from tests import ranks
from tests.by_hand import RHO, SGD, STEPS, by_hand, close, is_far, loss_of_share, norm_of, share
from tests.optim_helpers import ConvNet, images, linear, snapshot, unchanged
from tests.processes import run_ranks
from tests.ranks import PERTURBATIONS, VARIANTS

Results = list[dict[str, Any]]  # of each rank


def results_of(world: int, folder: Path) -> Results:
    """What all cases of tests/ranks.py gave in `world` processes."""
    codes, errors = run_ranks("tests.ranks", world, world, folder)
    assert not any(codes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(4, tmp_path_factory.mktemp("four"))


def alike(perturbation: str, world: int) -> list[list[int]]:
    """The ranks that perturb alike."""
    size = {"global": world, "local": 1, "group": 2}[perturbation]
    return [list(range(begin, begin + size)) for begin in range(0, world, size)]


def same_on_all_ranks(results: Sequence[Any]) -> None:
    for result in results[1:]:
        for mine, theirs in zip(result["weights"], results[0]["weights"], strict=True):
            assert unchanged(mine, theirs)


# -- the three perturbations -----------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("world", [2, 4])
def test_against_one_process(
    world: int, variant: str, perturbation: str, request: pytest.FixtureRequest
) -> None:
    results = request.getfixturevalue({2: "two", 4: "four"}[world])
    results = [of_rank[f"{variant} {perturbation}"] for of_rank in results]
    expected = by_hand(variant, alike(perturbation, world))
    same_on_all_ranks(results)
    close(results[0]["weights"], expected["weights"])
    for rank, result in enumerate(results):
        for step in range(STEPS):
            close(result["perturbed"][step], expected["perturbed"][step][rank])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_three_differ(variant: str, four: Results) -> None:
    """Or the test above would not tell one from another."""
    ends = [four[0][f"{variant} {p}"]["weights"][-1] for p in PERTURBATIONS]
    for a, b in itertools.combinations(ends, 2):
        assert is_far(a, b)


def test_who_perturbs_alike(four: Results) -> None:
    for perturbation in PERTURBATIONS:
        first = [of_rank[f"SAM {perturbation}"]["perturbed"][0] for of_rank in four]
        for group in alike(perturbation, 4):
            assert all(unchanged(first[rank], first[group[0]]) for rank in group)
        leaders = [group[0] for group in alike(perturbation, 4)]
        for a, b in itertools.combinations(leaders, 2):
            assert is_far(first[a], first[b])


def test_no_sync_around_backward_alone_is_global(two: Results) -> None:
    """The trap that first_pass refuses: see test_misuse."""
    for of_rank in two:
        assert unchanged(of_rank["trap"], of_rank["SAM global"]["weights"][-1])
        assert is_far(of_rank["trap"], of_rank["SAM local"]["weights"][-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_local_ranks_are_parts_of_a_batch(variant: str, two: Results) -> None:
    """Fused kernels, float32: bit for bit, since halves add up without rounding."""
    results = [of_rank[f"native {variant}"] for of_rank in two]
    same_on_all_ranks(results)
    model = linear()
    cls, options = VARIANTS[variant]
    optimizer = cls(model.parameters(), rho=RHO, backend="native", **options, **SGD)
    for step in range(STEPS):
        for part in optimizer.parts(range(2)):
            x, y = share(step, part, torch.float32)
            cross_entropy(model(x), y).backward()
            optimizer.first_step()
            assert unchanged(model.parameters(), results[part]["perturbed"][step])
            cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert unchanged(model.parameters(), results[0]["weights"][step])


@pytest.mark.parametrize("variant", ["SAM", "SAMDirection-global", "SAMMagnitude-element"])
def test_parts_of_ranks(variant: str, two: Results) -> None:
    results = [of_rank[f"parts {variant}"] for of_rank in two]
    same_on_all_ranks(results)
    close(results[0]["weights"], by_hand(variant, [[part] for part in range(4)])["weights"])


@pytest.mark.parametrize("case", ["bfloat16", "adam", "adaptive groups", "clipped", "statistics"])
def test_all_ranks_have_the_same_weights(case: str, two: Results) -> None:
    results = [of_rank[case] for of_rank in two]
    same_on_all_ranks(results)
    for step in range(STEPS):
        assert not unchanged(results[0]["perturbed"][step], results[1]["perturbed"][step])
    assert not unchanged(results[0]["weights"][0], results[0]["weights"][-1])


@pytest.mark.parametrize("case", ["adam", "adaptive groups", "clipped"])
def test_options_against_parts(case: str, two: Results) -> None:
    """Parts of one process, with the same options; those are tested against hand-made steps."""
    model = linear(torch.float64)
    optimizer = {
        "adam": lambda: ranks.SAMMagnitude(model.parameters(), torch.optim.Adam, RHO, lr=0.01),
        "adaptive groups": lambda: ranks.SAMDirection(
            ranks.two_groups(model), torch.optim.SGD, RHO, True, **SGD
        ),
        "clipped": lambda: ranks.SAMDirection(
            model.parameters(), torch.optim.SGD, RHO, max_grad_norm=0.1, **SGD
        ),
    }[case]()
    for step in range(STEPS):
        for part in optimizer.parts(range(2)):
            loss_of_share(model, step, part, True).backward()
            optimizer.first_step()
            loss_of_share(model, step, part, False).backward()
        optimizer.second_step(zero_grad=True)
        close(two[0][case]["weights"][step], snapshot(model.parameters()))


def test_statistics_are_those_of_the_means(two: Results) -> None:
    expected = by_hand("SAM", alike("local", 2))
    old = [snapshot(linear(torch.float64).parameters()), *expected["weights"]]
    for step in range(STEPS):
        first, second = (
            torch.cat([g.flatten() for g in expected[which][step]]) for which in ("first", "second")
        )
        by_definition = [
            first.norm(), second.norm(), norm_of(old[step]),
            first @ second / (first.norm() * second.norm()),
            (second.abs() > first.abs()).double().mean(), (first * second > 0).double().mean(),
        ]  # fmt: skip
        for of_rank in two:
            statistics = of_rank["statistics"]["statistics"][step]
            torch.testing.assert_close(statistics, torch.stack(by_definition).float())


# -- what may go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", ["local", "group"])
@pytest.mark.parametrize("variant", ["SAM", "SAMDirection-element"])
def test_one_rank_overflows_and_all_skip(variant: str, perturbation: str, two: Results) -> None:
    results = [of_rank[f"overflow {variant} {perturbation}"] for of_rank in two]
    same_on_all_ranks(results)
    after = results[0]["weights"]
    assert unchanged(after[1], after[0])
    assert unchanged(results[1]["perturbed"][1], after[0])  # no direction to go
    close(after, by_hand(variant, alike(perturbation, 2), skipped=1)["weights"])


@pytest.mark.parametrize("passes", ["first second", "first", "second"])
def test_scaler_backs_off_on_all_ranks(passes: str, two: Results) -> None:
    (weights, scales), (others, other_scales) = (of_rank[f"scaler {passes}"] for of_rank in two)
    assert scales == other_scales == [1024.0, 512.0, 512.0]
    assert all(map(unchanged, weights, others))
    assert unchanged(weights[1], weights[0])
    expected = by_hand("SAMMagnitude-element", alike("local", 2), skipped=1)["weights"]
    for actual, double in zip(weights, expected, strict=True):
        torch.testing.assert_close(actual, [w.float() for w in double], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("perturbation", ["local", "group"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_use_different_parameters(variant: str, perturbation: str, two: Results) -> None:
    """A parameter that a rank did not use has g1 = 0 there."""

    def loss(model: nn.Module, step: int, part: int, first: bool) -> Tensor:
        x, y = share(step, part)
        return cross_entropy(model(x, [(step + part) % 2] if first else [0, 1]), y)

    results = [of_rank[f"unused {variant} {perturbation}"] for of_rank in two]
    same_on_all_ranks(results)
    expected = by_hand(variant, alike(perturbation, 2), loss, ranks.Branches)
    close(results[0]["weights"], expected["weights"])
    for rank, step in itertools.product(range(2), range(STEPS)):
        close(results[rank]["perturbed"][step], expected["perturbed"][step][rank])


@pytest.mark.parametrize(
    "option", ["gradient_as_bucket_view", "static_graph", "find_unused_parameters"]
)
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_options_of_distributed_data_parallel(perturbation: str, option: str, two: Results) -> None:
    plain = [of_rank[f"SAMMagnitude-tensor {perturbation}"] for of_rank in two]
    results = [of_rank[f"{perturbation} {option}"] for of_rank in two]
    same_on_all_ranks(results)
    for step in range(STEPS):
        assert unchanged(results[0]["weights"][step], plain[0]["weights"][step])


def test_batchnorm(two: Results) -> None:
    """Each rank normalises its own share; the statistics are those of rank 0, in the first pass."""
    models = {part: ConvNet().double() for part in range(2)}

    def loss(model: nn.Module, step: int, part: int, first: bool) -> Tensor:
        x, y = images(10 * step + part)
        with torch.no_grad():  # statistics of its own for each part
            for p, theirs in zip(models[part].parameters(), model.parameters(), strict=True):
                p.copy_(theirs)
        buffers = dict(models[part].named_buffers())
        if not first:
            with frozen_batchnorm_stats(model):
                return cross_entropy(model(x.double()), y)
        logits = torch.func.functional_call(model, buffers, (x.double(),))
        return cross_entropy(logits, y)

    expected = by_hand("SAM", alike("local", 2), loss, lambda: ConvNet().double())
    for of_rank in two:
        close(of_rank["batchnorm"]["weights"], expected["weights"][-1])
        assert unchanged(of_rank["batchnorm"]["weights"], two[0]["batchnorm"]["weights"])
    close(two[0]["batchnorm"]["buffers"], list(models[0].buffers()))


def test_accumulation(two: Results) -> None:
    """Two micro-batches per rank, of which g1 is the mean."""
    expected = by_hand("SAMDirection-element", [[0, 1], [2, 3]])
    for of_rank in two:
        close(of_rank["accumulation"], expected["weights"][-1])
        assert unchanged(of_rank["accumulation"], two[0]["accumulation"])


@pytest.mark.parametrize("perturbation", ["local", "group"])
def test_waits_for_what_others_send(perturbation: str, two: Results) -> None:
    for of_rank in two:
        late, plain = (
            of_rank[f"late {perturbation}"],
            of_rank[f"SAMDirection-global {perturbation}"],
        )
        assert unchanged(late["weights"][-1], plain["weights"][-1])


def test_closure_after_a_first_pass(two: Results) -> None:
    for of_rank in two:
        assert unchanged(of_rank["closure"], of_rank["SAM local"]["weights"][-1])


def test_restored_while_g1_is_on_its_way(two: Results) -> None:
    for of_rank in two:
        result = of_rank["interrupted"]
        assert unchanged(result["restored"], result["before"])
        plain = of_rank["SAMDirection-element local"]["weights"][-1]
        assert unchanged(result["weights"], plain)
        (message,) = result["messages"]
        assert "between first_step and second_step" in message


def test_copies(two: Results) -> None:
    assert two[0]["copies"] == [(perturbation, True) for perturbation in PERTURBATIONS]


def test_misuse(two: Results) -> None:
    for of_rank in two:
        messages = of_rank["misuse"]
        for perturbation in ("local", "group"):
            missing = f'RuntimeError: perturbation="{perturbation}": make the first forward and'
            for case in ("no first_pass", "and then", "closure"):
                assert messages[f"{perturbation}, {case}"].startswith(missing)
            outside = messages[f"{perturbation}, forward outside"]
            assert outside.startswith("RuntimeError: the forward pass was made outside")
            plain = messages[f"{perturbation}, plain"]
            assert plain.startswith("TypeError: model is Sequential without a Distributed")
        assert "static_graph=True" in messages["static_graph"]
        assert messages["not in the group"].startswith("ValueError: process_group: this rank")


# -- in one process --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"perturbation": "each"}, "perturbation='each': give one of 'global', 'local', 'group'"),
        ({"perturbation": "group"}, 'process_group=None with perturbation="group"'),
        ({"perturbation": "local", "process_group": 1}, "process_group=1 with perturbation"),
        ({"process_group": 1}, "process_group=1 with perturbation"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SAM(linear().parameters(), lr=0.1, **options)


def test_local_is_global_in_one_process() -> None:
    """The same script, without torchrun; first_pass takes any module then."""
    ends = []
    for perturbation in ("global", "local"):
        model = linear(torch.float64)
        optimizer = SAM(model.parameters(), rho=RHO, perturbation=perturbation, **SGD)
        for step in range(STEPS):
            with optimizer.first_pass(model):
                loss_of_share(model, step, 0, True).backward()
            optimizer.first_step()
            loss_of_share(model, step, 0, False).backward()
            optimizer.second_step(zero_grad=True)
        ends.append(snapshot(model.parameters()))
    assert unchanged(*ends)
    close(ends[0], by_hand("SAM", [[0]])["weights"][-1])


def test_first_pass_of_no_module() -> None:
    optimizer = SAM(linear().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"model is str: give a torch\.nn\.Module"):
        with optimizer.first_pass("model"):  # type: ignore[arg-type]
            pass
