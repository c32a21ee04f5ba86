"""bfloat16 weights are perturbed with stochastic rounding: right on average, reproducible, and the
same on every backend."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.bf16_perturbation import survival
from samkernels import SAM, ops
from samkernels.backends.rounding import rounded_at_random
from tests.helpers import LISTS, SETTINGS, Setting, Slot, assert_same_bits, copies, make_list

BF16 = torch.bfloat16
HALVES = [s for s in SETTINGS if s.dtype is BF16]


def perturbed(
    w: list[Tensor], g: list[Tensor], rounding: str = "stochastic", **options: Any
) -> list[Tensor]:
    w, old = copies(w), copies(w)
    ops.perturb_(w, g, old, **{"rho": 0.05, **options}, rounding=rounding)
    return w


@pytest.mark.parametrize("setting", HALVES, ids=str)
@pytest.mark.parametrize("slots", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("eta", [None, 0.0])
def test_every_backend_rounds_alike(slots: list[Slot], setting: Setting, eta: float | None) -> None:
    w, g, old = (make_list(slots, BF16, setting.device, seed) for seed in range(3))
    before, square = copies(w), torch.tensor(13.7, dtype=torch.float64, device=setting.device)
    options: dict[str, Any] = {"rho": 0.05, "square": square, "eta": eta}
    expected = copies(w)
    ops.perturb_(expected, g, copies(w), **options, rounding="stochastic", backend="reference")
    ops.perturb_(w, g, old, **options, rounding="stochastic", backend=setting.backend)
    assert_same_bits(w, expected)
    assert_same_bits(old, before)
    w.assert_intact()


def test_the_tests_see_randomness() -> None:
    w, g = (make_list([Slot((400,))], BF16, seed=seed) for seed in range(2))
    assert not torch.equal(perturbed(w, g)[0], perturbed(w, g, "nearest")[0])


def wide(n: int = 4000) -> Tensor:
    """Values of many sizes that are no bfloat16."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=generator) * 10 ** torch.linspace(-38, 38, n)


def rounded(values: Tensor, norm: float = 1.0, index: int = 0) -> Tensor:
    return rounded_at_random(values, torch.tensor(norm), index, like=values)


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 below and above, in magnitude."""
    bits = values.view(torch.int32)
    return (bits & -0x10000).view(torch.float32), ((bits & -0x10000) + 0x10000).view(torch.float32)


def test_a_value_becomes_one_of_its_neighbours() -> None:
    values = wide()
    below, above = neighbours(values)
    result = rounded(values)
    assert ((result == below) | (result == above)).all()
    assert 0.4 < (result == above).float().mean() < 0.6
    assert torch.equal(result.to(BF16).float(), result)


def test_it_is_right_on_average() -> None:
    values = wide(200)
    below, above = neighbours(values)
    chance = ((values.double() - below.double()) / (above.double() - below.double())).clamp(0, 1)
    rounds = 4000
    ups = sum((rounded(values, norm=1 + i / 7) == above).double() for i in range(rounds))
    sigma = (chance * (1 - chance) / rounds).sqrt() + 1 / rounds
    assert ((ups / rounds - chance).abs() < 5 * sigma).all()


def test_what_is_a_bfloat16_stays() -> None:
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    exact = torch.cat([wide().to(BF16).float(), special])
    for norm in (1.0, 2.5):
        assert_same_bits([rounded(exact, norm)], [exact])


def test_random_numbers_differ_by_step_by_tensor_and_by_element() -> None:
    values = torch.full((1000,), 1.001)
    first = rounded(values)
    assert first.unique().numel() == 2
    assert_same_bits([rounded(values)], [first])
    assert not torch.equal(rounded(values, norm=1.0000001), first)
    assert not torch.equal(rounded(values, index=1), first)


def test_an_element_keeps_its_number_in_every_layout() -> None:
    values = torch.full((2, 3, 4, 5), 1.001)
    last = values.contiguous(memory_format=torch.channels_last)
    in_memory = rounded_at_random(last, torch.tensor(1.0), 0, like=last).permute(0, 2, 3, 1)
    assert torch.equal(in_memory.reshape(-1), rounded(values).reshape(-1))
    assert not torch.equal(in_memory.permute(0, 3, 1, 2), rounded(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_to_nearest(dtype: torch.dtype) -> None:
    w, g = (make_list([Slot((400,))], dtype, seed=seed) for seed in range(2))
    assert_same_bits(perturbed(w, g), perturbed(w, g, "nearest"))


def test_what_has_no_gradient_does_not_move() -> None:
    (w,) = make_list([Slot((400,))], BF16)
    g = torch.zeros_like(w)
    g[::2] = 1
    (moved,) = perturbed([w], [g])
    assert torch.equal(moved[1::2], w[1::2])
    assert not torch.equal(moved, w)


@pytest.mark.parametrize("norm", [0.0, float("inf"), float("nan")])
def test_a_norm_without_direction_moves_nothing(norm: float) -> None:
    w, g = (make_list([Slot((40,))], BF16, seed=seed) for seed in range(2))
    assert_same_bits(perturbed(w, g, square=torch.tensor(norm).double()), w)


def test_a_wrong_name_is_said() -> None:
    w, g = (make_list([Slot((40,))], BF16, seed=seed) for seed in range(2))
    with pytest.raises(ValueError, match=r"rounding.*'up'.*nearest.*stochastic"):
        perturbed(w, g, "up")


def test_the_perturbation_survives_where_nearest_rounding_loses_it() -> None:
    _, along, _ = survival(10**6, 0.02, "stochastic")
    assert along == pytest.approx(1, abs=0.02)
    _, along, _ = survival(10**6, 0.02, "nearest")
    assert along < 0.6


def test_sam_uses_it_and_comes_back() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter((0.02 * torch.randn(10**5)).bfloat16())
    optimizer = SAM([p], rho=0.01, lr=0.1)
    before = p.detach().clone()
    grad = torch.randn_like(p)
    p.grad = grad.clone()
    optimizer.first_step()
    assert_same_bits([p.detach()], perturbed([before], [grad], rho=0.01))
    e = 0.01 * grad.double() / grad.double().norm()
    moved = p.detach().double() - before.double()
    assert (moved @ e / e.square().sum()).item() == pytest.approx(1, abs=0.1)
    optimizer.restore()
    assert_same_bits([p.detach()], [before])
