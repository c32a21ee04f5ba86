"""What must never happen to weights: that they do not come back, become nan, or change address."""

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from samkernels import SAM, SAMDirection, SAMMagnitude
from tests.optim_helpers import (
    ConvNet,
    images,
    linear,
    parameter,
    parameters_of,
    same_bits,
    set_gradients,
    snapshot,
    take_step,
    unchanged,
)
from tests.optimizers import (
    ADAM,
    ADAMW,
    AMSGRAD,
    BACKENDS,
    BASES,
    OPTIMIZER_TABLE,
    SGD,
    Base,
    Variant,
    each_backend,
    each_base,
    each_fused_base,
    each_optimizer,
    each_variant,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[::2], "rho": 0.3}, {"params": params[1::2], "rho": 0.1}]


def state_of(optimizer: SAM) -> list[Tensor]:
    """Momentum, or moments and step counts, of all parameters."""
    return [x for p in parameters_of(optimizer) for x in optimizer.state[p].values()]


# -- restore ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_backend
@each_variant
def test_second_step_without_lr_brings_back_every_bit(
    variant: Variant, backend: str, dtype: torch.dtype
) -> None:
    model = linear(dtype)
    options = {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = variant(two_groups(model), backend=backend, **options)
    before = snapshot(model.parameters())
    for step in range(3):
        set_gradients(model.parameters(), step)
        optimizer.first_step()
        assert not any(same_bits(p, b) for p, b in zip(model.parameters(), before, strict=True))
        set_gradients(model.parameters(), 100 + step)
        optimizer.second_step()
        assert unchanged(model.parameters(), before)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in BACKENDS
        for dtype in (*DTYPES, torch.float64)
        if not (backend == "native" and dtype is torch.float64)  # it has none, and says so
    ],
    ids=str,
)
@each_optimizer
def test_restore_brings_back_every_bit(cls: type[SAM], backend: str, dtype: torch.dtype) -> None:
    """Also of numbers that arithmetic would not keep: nan, -0.0, subnormals, infinities."""
    info = torch.finfo(dtype)
    odd = [float("nan"), -0.0, info.smallest_normal / 4, float("inf"), -float("inf"), info.max]
    params = [nn.Parameter(torch.tensor(odd * 3, dtype=dtype)), parameter(1.0, dtype=dtype)]
    optimizer = cls(params, rho=0.5, lr=0.1, backend=backend)
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.first_step()
    assert not unchanged(params, before)
    optimizer.restore()
    assert unchanged(params, before) and not optimizer.is_perturbed


class Interrupted(BaseException):
    """As KeyboardInterrupt is: no Exception."""


@pytest.mark.parametrize("error", [ValueError, Interrupted])
@each_base
@each_optimizer
def test_an_exception_in_the_second_forward(
    cls: type[SAM],
    base: Base,
    error: type[BaseException],
) -> None:
    model = linear()
    optimizer = cls(model.parameters(), base.cls, rho=0.5, **base.options)
    take_step(optimizer, 0)
    before = snapshot(model.parameters())
    state = copy.deepcopy(optimizer.state_dict())

    set_gradients(model.parameters(), 1)
    with pytest.raises(error, match="forward"), optimizer.perturbed():
        assert not unchanged(model.parameters(), before)
        raise error("forward")
    assert unchanged(model.parameters(), before) and not optimizer.is_perturbed

    calls = []

    def closure() -> None:
        calls.append(optimizer.is_perturbed)
        if optimizer.is_perturbed:
            assert not unchanged(model.parameters(), before)
            raise error("forward")
        set_gradients(model.parameters(), 2)

    with pytest.raises(error, match="forward"):
        optimizer.step(closure)
    assert calls == [False, True]
    assert unchanged(model.parameters(), before) and not optimizer.is_perturbed
    for after, old in zip(
        optimizer.state_dict()["state"].values(), state["state"].values(), strict=True
    ):
        assert all(same_bits(after[name], value) for name, value in old.items())
    take_step(optimizer, 3)


def test_an_exception_in_the_first_forward() -> None:
    model = linear()
    optimizer = SAM(model.parameters(), lr=0.1)
    before = snapshot(model.parameters())

    def closure() -> None:
        raise ValueError("forward")

    with pytest.raises(ValueError, match="forward"):
        optimizer.step(closure)
    assert unchanged(model.parameters(), before) and not optimizer.is_perturbed


class Failing(torch.optim.Optimizer):
    """Spoils the first parameter, and gives up at the second."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.param_groups[0]["params"][0].fill_(float("nan"))
        raise ValueError("gave up")


def sparse_gradient(params: list[Tensor], optimizer: SAM) -> None:
    set_gradients(params, 1)
    params[2].grad = params[2].grad.to_sparse()


def no_gradient(params: list[Tensor], optimizer: SAM) -> None:
    pass


def lr_nan_in_the_second_group(params: list[Tensor], optimizer: SAM) -> None:
    set_gradients(params, 1)
    optimizer.param_groups[1]["lr"] = float("nan")


@each_backend
@pytest.mark.parametrize(
    ("base", "prepare", "error", "text"),
    [
        pytest.param(
            torch.optim.SGD,
            sparse_gradient,
            ValueError,
            r"params\[1\]\.grad of parameter group 0 of shape .* is sparse",
            id="sparse",
        ),
        pytest.param(torch.optim.SGD, no_gradient, RuntimeError, "found no gradient", id="none"),
        pytest.param(torch.optim.SGD, lr_nan_in_the_second_group, ValueError, "lr=nan", id="lr"),
        pytest.param(
            Failing, lambda p, _: set_gradients(p, 1), ValueError, "gave up", id="base optimizer"
        ),
    ],
)
@each_optimizer
def test_a_second_step_that_fails(
    cls: type[SAM],
    base: type[torch.optim.Optimizer],
    prepare: Callable[[list[Tensor], SAM], object],
    error: type[Exception],
    text: str,
    backend: str,
) -> None:
    model = linear()
    optimizer = cls(two_groups(model), base, backend=backend, lr=0.1)
    params = list(model.parameters())
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.first_step()
    prepare(params, optimizer)
    with pytest.raises(error, match=text):
        optimizer.second_step()
    assert unchanged(params, before) and not optimizer.is_perturbed


@each_backend
@each_optimizer
def test_a_first_step_that_fails_halfway(cls: type[SAM], backend: str) -> None:
    model = linear()
    optimizer = cls(two_groups(model), lr=0.1, backend=backend)
    params = list(model.parameters())
    before = snapshot(params)
    grads = set_gradients(params, 0)
    optimizer.param_groups[1]["rho"] = -1.0
    with pytest.raises(ValueError, match=r"rho=-1\.0"):
        optimizer.first_step()
    assert unchanged(params, before) and not optimizer.is_perturbed
    assert unchanged([p.grad for p in params], grads), "g1 can be used once rho is right"


@each_backend
@each_base
@each_variant
def test_addresses_never_change(
    variant: Variant,
    base: Base,
    backend: str,
) -> None:
    model = linear()
    optimizer = variant(two_groups(model), base, backend=backend)
    params = list(model.parameters())
    addresses = [p.data_ptr() for p in params]
    state_addresses: set[tuple[int, ...]] = set()
    for step in range(4):
        set_gradients(params, 2 * step)
        optimizer.first_step()
        assert [p.data_ptr() for p in params] == addresses
        if step == 1:
            optimizer.restore()
            continue
        set_gradients(params, 2 * step + 1)
        optimizer.second_step()
        assert [p.data_ptr() for p in params] == addresses
        state_addresses.add(
            tuple(v.data_ptr() for p in params for v in optimizer.state[p].values())
        )
    assert len(state_addresses) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert [p.data_ptr() for p in params] == addresses


# -- gradients that are not finite, or zero --------------------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later step"])
@each_backend
@each_fused_base
@each_variant
def test_g1_that_is_not_finite_skips_the_step(
    variant: Variant,
    base: Base,
    backend: str,
    started: bool,
    value: float,
) -> None:
    """One bad element in one group: nothing moves in any group, and the step does not count."""
    model = linear()
    optimizer = variant(two_groups(model), base, backend=backend)
    if started:
        take_step(optimizer, 0)
    params = list(model.parameters())
    before = snapshot(params)
    state = snapshot(state_of(optimizer))
    assert bool(state) == started

    set_gradients(params, 1)
    params[1].grad[3] = value
    optimizer.first_step()
    assert unchanged(params, before)
    set_gradients(params, 2)
    optimizer.second_step(zero_grad=True)
    assert unchanged(params, before)
    if started:
        assert unchanged(state_of(optimizer), state)
    else:
        assert len(state_of(optimizer)) > 0 and not any(map(torch.any, state_of(optimizer)))

    take_step(optimizer, 3)
    assert not any(same_bits(p, b) for p, b in zip(params, before, strict=True))
    assert all(p.isfinite().all() for p in params)


@each_backend
@each_variant
@each_fused_base
def test_everything_not_finite(base: Base, variant: Variant, backend: str) -> None:
    """Both gradients, all elements, statistics on."""
    model = linear()
    optimizer = variant(model.parameters(), base, backend=backend, track_statistics=True)
    params = list(model.parameters())
    before = snapshot(params)
    for _ in range(2):
        for p in params:
            p.grad = torch.full_like(p, float("nan"))
        optimizer.first_step()
        for p in params:
            p.grad = torch.full_like(p, float("inf"))
        optimizer.second_step()
    assert unchanged(params, before)
    assert len(state_of(optimizer)) > 0 and not any(map(torch.any, state_of(optimizer)))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@each_backend
@each_variant
def test_g1_that_is_not_finite_gives_other_optimizers_zeros(
    variant: Variant, backend: str, value: float
) -> None:
    model, twin = linear(), linear()
    optimizer = variant(model.parameters(), AMSGRAD, backend=backend)
    alone = AMSGRAD.cls(twin.parameters(), **AMSGRAD.options)
    params = list(model.parameters())
    before = snapshot(params)

    set_gradients(params, 1)
    params[1].grad[3] = value
    optimizer.first_step()
    assert unchanged(params, before)
    set_gradients(params, 2)
    optimizer.second_step()

    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    alone.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twin.parameters(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_backend
@each_variant
def test_zero_g1_perturbs_nothing(variant: Variant, backend: str, dtype: torch.dtype) -> None:
    model = linear(dtype)
    optimizer = variant(two_groups(model), backend=backend, lr=0.5)
    params = list(model.parameters())
    before = snapshot(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.first_step()
    assert unchanged(params, before)
    grads = set_gradients(params, 0)
    optimizer.second_step()
    for p, old, g2 in zip(params, before, grads, strict=True):
        # Both halves of a mixture need g1: a zero magnitude, or a direction that is none.
        (u,) = variant.u([torch.zeros_like(g2).double()], [g2.double()])
        expected = (old.double() - 0.5 * u).to(dtype)
        torch.testing.assert_close(p.detach(), expected)


@each_backend
@each_variant
def test_zero_g2(variant: Variant, backend: str) -> None:
    model = linear()
    optimizer = variant(two_groups(model), backend=backend, lr=0.5)
    params = list(model.parameters())
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.first_step()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.second_step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@each_backend
def test_float16_norms_do_not_overflow(backend: str) -> None:
    p = nn.Parameter(torch.zeros(64, dtype=torch.float16))
    optimizer = SAM([p], rho=8.0, lr=0.1, backend=backend)
    p.grad = torch.full_like(p, 60000.0)
    optimizer.first_step()
    assert torch.equal(p, torch.ones_like(p))


# -- the perturbed set is the restored set ---------------------------------------------------------


def lose(p: nn.Parameter) -> None:
    p.grad = None


def freeze(p: nn.Parameter) -> None:
    p.grad = None
    p.requires_grad_(False)


@pytest.mark.parametrize("change", [lose, freeze])
@each_backend
@each_base
@each_variant
def test_parameters_that_lose_their_gradient_are_restored(
    variant: Variant,
    base: Base,
    backend: str,
    change: Callable[[nn.Parameter], None],
) -> None:
    """Restored, and left alone: no weight decay, no momentum."""
    model = linear()
    optimizer = variant(two_groups(model), base, backend=backend)
    params = list(model.parameters())
    before = snapshot(params)
    for step in range(3):
        set_gradients(params, step)
        optimizer.first_step()
        assert not same_bits(params[2], before[2])
        set_gradients(params, 100 + step)
        change(params[2])
        optimizer.second_step(zero_grad=True)
        assert same_bits(params[2], before[2])
    assert not optimizer.state.get(params[2])
    others = [i for i in range(len(params)) if i != 2]
    assert not any(same_bits(params[i], before[i]) for i in others)


@each_backend
@each_base
@each_variant
def test_parameters_with_g2_only(
    variant: Variant,
    base: Base,
    backend: str,
) -> None:
    """SAM's u is g2; SAMDirection and SAMMagnitude have no u without g1."""
    model, twin = linear(), linear()
    optimizer = variant(two_groups(model), base, backend=backend)
    alone = base.cls(twin.parameters(), **base.options)
    params, twins = list(model.parameters()), list(twin.parameters())
    before = snapshot(params)
    for step in range(3):
        at = snapshot(params[2:3])
        set_gradients(params, step)
        params[2].grad = None
        optimizer.first_step()
        assert unchanged(params[2:3], at)
        grads = set_gradients(params, 100 + step)
        optimizer.second_step(zero_grad=True)
        twins[2].grad = grads[2]
        alone.step()
    if not variant.info.keeps_first_grads:
        torch.testing.assert_close(params[2], twins[2])
        assert not same_bits(params[2], before[2])
    else:
        assert same_bits(params[2], before[2])
        assert not optimizer.state.get(params[2])


@each_variant
def test_parameters_removed_and_added_between_the_steps(variant: Variant) -> None:
    model = linear()
    optimizer = variant(two_groups(model), lr=0.1)
    params = list(model.parameters())
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.first_step()
    removed = optimizer.param_groups[1]["params"].pop()
    late = parameter(1.0, 2.0)
    optimizer.add_param_group({"params": [late]})
    set_gradients([*params, late], 1)
    optimizer.second_step()
    assert removed is params[3] and same_bits(removed, before[3])
    assert same_bits(late, torch.tensor([1.0, 2.0])) == variant.info.keeps_first_grads


@each_variant
def test_gradients_replaced_between_the_steps(variant: Variant) -> None:
    """What counts is `.grad` when a step is made, whoever put it there."""
    results = []
    for replace in (False, True):
        model = linear()
        optimizer = variant(two_groups(model), lr=0.1)
        params = list(model.parameters())
        set_gradients(params, 0)
        optimizer.first_step()
        if replace:
            set_gradients(params, 77)
            for p in params:
                p.grad.zero_()
        set_gradients(params, 1)
        optimizer.second_step()
        results.append(snapshot(params))
    assert unchanged(results[0], results[1])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *((backend, torch.float16) for backend in (*BACKENDS, "auto")),
        *((backend, torch.float64) for backend in ("foreach", "reference", "auto")),
    ],
    ids=str,
)
@each_base
@each_optimizer
def test_a_cast_between_the_steps(
    cls: type[SAM],
    backend: str,
    base: Base,
    dtype: torch.dtype,
) -> None:
    model = linear()
    optimizer = cls(model.parameters(), base.cls, rho=0.5, backend=backend, **base.options)
    before = [w.to(dtype) for w in snapshot(model.parameters())]
    set_gradients(model.parameters(), 0)
    optimizer.first_step()
    model.to(dtype)
    set_gradients(model.parameters(), 1)
    with pytest.raises(RuntimeError, match=r"parameter .*of shape \(8, 4\) changed its .*dtype"):
        optimizer.second_step()
    assert unchanged(model.parameters(), before) and not optimizer.is_perturbed


def test_another_layout_between_the_steps() -> None:
    model = ConvNet()
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.5)
    before = snapshot(model.parameters())
    set_gradients(model.parameters(), 0)
    optimizer.first_step()
    model.to(memory_format=torch.channels_last)
    set_gradients(model.parameters(), 1)
    with pytest.raises(RuntimeError, match=r"parameter .*of shape .* changed its .*layout"):
        optimizer.second_step()
    assert unchanged(model.parameters(), before) and not optimizer.is_perturbed


@each_variant
def test_another_dtype_or_layout_between_whole_steps(variant: Variant) -> None:
    """Nothing that is kept from step to step, momentum included, may be in the way."""
    results = []
    for dtype, layout in (
        (torch.float32, torch.contiguous_format),
        (torch.float64, torch.channels_last),
    ):
        model = ConvNet()
        optimizer = variant(model.parameters(), SGD, rho=0.3)
        take_step(optimizer, 0)
        model.to(memory_format=layout)
        take_step(optimizer, 1)
        model.to(dtype)
        take_step(optimizer, 2)
        take_step(optimizer, 3)
        assert all(p.dtype is dtype for p in model.parameters())
        results.append(snapshot(model.float().parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_optimizer
def test_another_shape_between_the_steps(cls: type[SAM]) -> None:
    """Its old values fit nowhere, but those of all other parameters come back."""
    first, second = parameter(1.0, 2.0, 3.0), parameter(4.0)
    optimizer = cls([first, second], rho=0.5, lr=0.1)
    set_gradients([first, second], 0)
    optimizer.first_step()
    first.data = torch.zeros(2)
    set_gradients([first, second], 1)
    with pytest.raises(RuntimeError, match=r"parameter .*of shape \(2,\) changed its shape"):
        optimizer.second_step()
    assert second.item() == 4.0 and not optimizer.is_perturbed


@each_backend
@pytest.mark.parametrize("base", [*BASES, ADAMW], ids=str)
@each_optimizer
def test_unused_parameters_are_untouched(cls: type[SAM], base: Base, backend: str) -> None:
    model = linear()
    unused = nn.Parameter(torch.randn(7))
    frozen = nn.Parameter(torch.randn(7), requires_grad=False)
    before = snapshot([unused, frozen])
    groups = [*two_groups(model), {"params": [unused]}]
    groups[0]["params"].append(frozen)
    optimizer = cls(groups, base.cls, backend=backend, **base.options)
    for step in range(3):
        set_gradients(model.parameters(), step)
        optimizer.first_step()
        assert unchanged([unused, frozen], before)
        set_gradients(model.parameters(), 100 + step)
        optimizer.second_step()
        assert unchanged([unused, frozen], before)
    assert unused not in optimizer.state and frozen not in optimizer.state
    assert len(optimizer.state) == 4


# -- the size of the perturbation ------------------------------------------------------------------


def perturbation_of(optimizer: SAM, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """w, g1 and e(w), each as one vector in float64."""
    params = parameters_of(optimizer)
    w = torch.cat([p.detach().double().flatten() for p in params])
    g1 = torch.cat([g.double().flatten() for g in set_gradients(params, seed, scale)])
    optimizer.first_step()
    e = torch.cat([p.detach().double().flatten() for p in params]) - w
    optimizer.restore()
    return w, g1, e


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@each_backend
@each_optimizer
def test_size_of_the_perturbation(cls: type[SAM], backend: str, scale: float) -> None:
    """||e(w)|| = rho over all groups together, whatever the size of the gradient."""
    model = linear()
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = cls(groups, rho=2.0, lr=0.1, backend=backend)
    _, g1, e = perturbation_of(optimizer, 0, scale)
    # e is a difference of float32 numbers around 1, and eps = 1e-12 is added to the norm.
    assert e.norm().item() == pytest.approx(2.0, rel=1e-6)
    assert (e @ g1 / (e.norm() * g1.norm())).item() == pytest.approx(1.0, abs=1e-9)


@each_backend
@each_optimizer
def test_size_of_the_adaptive_perturbation(cls: type[SAM], backend: str) -> None:
    """||e(w) / |w||| = rho: ASAM's neighbourhood."""
    model = linear()
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = cls(groups, rho=2.0, adaptive=True, lr=0.1, backend=backend)
    w, g1, e = perturbation_of(optimizer, 0)
    assert (e / w).norm().item() == pytest.approx(2.0, rel=1e-6)
    torch.testing.assert_close(e, 2.0 * w**2 * g1 / (w * g1).norm(), rtol=1e-5, atol=1e-6)


@each_backend
def test_size_of_the_perturbation_with_a_rho_per_group(backend: str) -> None:
    """Each group has its share of one norm, times its own rho; groups may differ in adaptive."""
    params = list(linear().parameters())
    groups = [
        {"params": params[:2], "rho": 1.0},
        {"params": params[2:3], "rho": 3.0},
        {"params": params[3:], "rho": 2.0, "adaptive": True},
    ]
    optimizer = SAM(groups, lr=0.1, backend=backend)
    w, g1, e = perturbation_of(optimizer, 0)
    first, second, third = slice(0, 40), slice(40, 56), slice(56, 58)
    norm = torch.cat([g1[first], g1[second], (w * g1)[third]]).norm()
    torch.testing.assert_close(e[first].norm(), g1[first].norm() / norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(e[second].norm(), 3 * g1[second].norm() / norm, rtol=1e-6, atol=0)
    expected = 2 * (w**2 * g1)[third].norm() / norm
    torch.testing.assert_close(e[third].norm(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("second", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_one_norm_over_parameters_of_two_dtypes(backend: str, second: torch.dtype) -> None:
    """|g1| = 5 over both: e = rho * g1 / 5, exactly. In the update, too."""
    one, two = parameter(0.0, 0.0), parameter(0.0, 0.0, dtype=second)
    optimizer = SAMMagnitude([one, two], rho=10.0, granularity="global", lr=1.0, backend=backend)
    one.grad, two.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0], dtype=second)
    optimizer.first_step()
    assert one.tolist() == pytest.approx([6.0, 0.0], rel=1e-6)
    assert two.tolist() == pytest.approx([0.0, 8.0], rel=1e-6)
    one.grad, two.grad = torch.tensor([6.0, 0.0]), torch.tensor([8.0, 0.0], dtype=second)
    optimizer.second_step()
    assert one.tolist() == pytest.approx([-6.0, 0.0], rel=1e-6)
    assert two.tolist() == pytest.approx([0.0, -8.0], rel=1e-6)


@each_backend
@each_base
@each_variant
def test_maximizing_f_is_minimizing_minus_f(
    variant: Variant,
    base: Base,
    backend: str,
) -> None:
    results = []
    for maximize in (False, True):
        sign = 1 if maximize else -1
        model = ConvNet()
        optimizer = variant(model.parameters(), base, rho=0.3, backend=backend, maximize=maximize)
        for step in range(3):
            x, y = images(step)
            for make_step in (optimizer.first_step, optimizer.second_step):
                (sign * cross_entropy(model(x), y)).backward()
                make_step()
            optimizer.zero_grad()
        results.append(snapshot(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not unchanged(results[0], snapshot(ConvNet().parameters()))


# -- parameters that share memory ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_the_same_parameter_twice_in_a_group() -> None:
    p = parameter(1.0, 2.0)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] \(shape \(2,\)\) overlap"):
        SAM([p, p], lr=0.1)


def test_the_same_parameter_in_two_groups() -> None:
    p = parameter(1.0, 2.0)
    with pytest.raises(ValueError, match="more than one parameter group"):
        SAM([{"params": [p]}, {"params": [p]}], lr=0.1)
    optimizer = SAM([p], lr=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


@each_optimizer
def test_overlapping_parameters(cls: type[SAM]) -> None:
    storage = torch.randn(10)
    first, second = nn.Parameter(storage[:6]), nn.Parameter(storage[5:])
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] .* overlap in memory"):
        cls([first, second], lr=0.1)
    optimizer = cls([first], lr=0.1)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] .* overlap in memory"):
        optimizer.add_param_group({"params": [second]})
    assert len(optimizer.param_groups) == len(optimizer.base_optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [nn.Parameter(storage[6:])]})


def test_a_parameter_that_overlaps_itself() -> None:
    p = nn.Parameter(torch.zeros(1).expand(4))
    with pytest.raises(ValueError, match=r"params\[0\] of parameter group 0 .* overlaps itself"):
        SAM([p], lr=0.1)


@each_backend
def test_tied_modules(backend: str) -> None:
    """One parameter in two modules is one parameter, with the sum of both gradients."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = SAM(model.parameters(), rho=1.0, lr=0.1, backend=backend)
    assert len(parameters_of(optimizer)) == 3
    _, _, e = perturbation_of(optimizer, 0)
    assert e.norm().item() == pytest.approx(1.0, rel=1e-6)
    take_step(optimizer, 1)


@each_backend
@each_variant
def test_parameters_in_one_flat_buffer(variant: Variant, backend: str) -> None:
    """Neighbours in memory, at any alignment, that do not overlap."""
    flat = torch.randn(23)
    views = [nn.Parameter(part) for part in flat.split([1, 5, 0, 9, 8])]
    copies = [nn.Parameter(v.detach().clone()) for v in views]
    for params in (views, copies):
        optimizer = variant(params, rho=0.3, lr=0.1, momentum=0.9, backend=backend)
        for step in range(3):
            take_step(optimizer, step)
    assert unchanged(views, copies)
    assert same_bits(flat, torch.cat([p.detach() for p in copies]))


@each_base
@each_variant
def test_one_gradient_tensor_for_two_parameters(
    variant: Variant,
    base: Base,
) -> None:
    """Handled or refused: u must not silently be written twice to one tensor."""
    results = []
    for shared in (False, True):
        params = [parameter(1.0, 2.0), parameter(3.0, 4.0)]
        optimizer = variant(params, base, rho=0.1)
        for make_step, value in ((optimizer.first_step, 2.0), (optimizer.second_step, 3.0)):
            grad = torch.tensor([value, -1.0])
            for p in params:
                p.grad = grad if shared else grad.clone()
            try:
                make_step()
            except ValueError as error:
                assert shared and "overlap" in str(error)
                return
        results.append(snapshot(params))
    assert unchanged(results[0], results[1])


@each_base
@each_variant
def test_gradients_in_a_buffer_that_every_backward_overwrites(
    variant: Variant,
    base: Base,
) -> None:
    """DistributedDataParallel(gradient_as_bucket_view=True) does this. Handled or refused: g1 must
    not silently become g2."""
    results = []
    for shared in (False, True):
        params = [parameter(1.0, 2.0), parameter(3.0, 4.0)]
        optimizer = variant(params, base, rho=0.1)
        bucket = torch.zeros(4)
        for make_step, values in (
            (optimizer.first_step, [1.0, -2.0, 3.0, 4.0]),
            (optimizer.second_step, [4.0, 3.0, -2.0, 1.0]),
        ):
            bucket.copy_(torch.tensor(values))
            for p, view in zip(params, bucket.split(2), strict=True):
                p.grad = view if shared else view.clone()
            try:
                make_step()
            except (RuntimeError, ValueError) as error:
                assert shared and "grad" in str(error)
                assert unchanged(params, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
                return
        results.append(snapshot(params))
    assert unchanged(results[0], results[1])


# -- gradients and parameters of unusual kinds -----------------------------------------------------


def test_sparse_gradients() -> None:
    dense = nn.Linear(3, 2)
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SAM([*dense.parameters(), embedding.weight], lr=0.1)
    params = parameters_of(optimizer)
    before = snapshot(params)
    dense(embedding(torch.tensor([1, 3]))).sum().backward()
    text = r"params\[2\]\.grad of parameter group 0 of shape \(5, 3\) is sparse.*sparse=False"
    with pytest.raises(ValueError, match=text):
        optimizer.first_step()
    assert unchanged(params, before) and not optimizer.is_perturbed
    with pytest.raises(ValueError, match=text):
        optimizer.step(lambda: None)
    assert unchanged(params, before) and not optimizer.is_perturbed


def layouts(shape: tuple[int, ...]) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to keep the same numbers in memory."""
    return {
        "contiguous": lambda t: t.contiguous(),
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "offset": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    }


LAYOUTS = layouts((4, 3, 2, 2))


@each_backend
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("of_parameter", ["contiguous", "channels_last", "offset"])
def test_gradients_of_another_layout(
    of_parameter: str, first: str, second: str, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    w, *grads = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(5))
    for info, base in zip(OPTIMIZER_TABLE, cycle((SGD, ADAM, AMSGRAD)), strict=False):
        results = []
        for layout, layout1, layout2 in (
            (of_parameter, first, second),
            ("contiguous", "contiguous", "contiguous"),
        ):
            p = nn.Parameter(LAYOUTS[layout](w.clone()))
            stride = p.stride()
            optimizer = Variant(info)([p], base, rho=0.3, backend=backend)
            for g1, g2 in (grads[:2], grads[2:]):
                p.grad = LAYOUTS[layout1](g1.clone())
                optimizer.first_step()
                p.grad = LAYOUTS[layout2](g2.clone())
                optimizer.second_step()
            assert p.stride() == stride
            results.append(p.detach())
        # Sums of another order differ by roundings.
        torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=2e-6)


@each_backend
@each_base
@each_variant
def test_expanded_gradients(
    variant: Variant,
    base: Base,
    backend: str,
) -> None:
    results = []
    for expanded in (False, True):
        params = [nn.Parameter(torch.arange(6.0).view(2, 3)), parameter(1.0, 2.0)]
        optimizer = variant(params, base, rho=0.3, backend=backend)
        for make_step, value in ((optimizer.first_step, 2.0), (optimizer.second_step, -3.0)):
            for p in params:
                grad = torch.tensor(value).expand(p.shape)
                p.grad = grad if expanded else grad.clone(memory_format=torch.contiguous_format)
            make_step()
        results.append(snapshot(params))
    assert unchanged(results[0], results[1])


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
@each_base
@each_variant
def test_parameters_with_gaps(
    variant: Variant,
    base: Base,
    backend: str,
) -> None:
    """Slices, here interleaved ones; what lies in the gaps is not touched."""
    storage = torch.randn(4, 9)
    start = storage.clone()
    slices = [nn.Parameter(storage[:, i::3]) for i in (0, 1)]
    copies = [nn.Parameter(s.detach().clone(memory_format=torch.contiguous_format)) for s in slices]
    for params in (slices, copies):
        optimizer = variant(params, base, rho=0.3, backend=backend)
        for step in range(3):
            take_step(optimizer, step)
    for s, c in zip(slices, copies, strict=True):
        torch.testing.assert_close(s, c, rtol=2e-6, atol=2e-6)
    assert same_bits(storage[:, 2::3], start[:, 2::3])
    assert not torch.equal(storage[:, 0::3], start[:, 0::3])


def test_parameters_with_gaps_and_the_compiled_core() -> None:
    p = nn.Parameter(torch.zeros(4, 6)[:, ::2])
    assert SAM([p], lr=0.1).backends == {"cpu float32": "foreach"}
    with pytest.raises(RuntimeError, match=r'backend="native" cannot serve .*without gaps'):
        SAM([p], lr=0.1, backend="native")


@each_backend
@each_base
@each_variant
def test_empty_and_scalar_parameters(
    variant: Variant,
    base: Base,
    backend: str,
) -> None:
    empty, scalar = nn.Parameter(torch.zeros(3, 0)), nn.Parameter(torch.tensor(2.0))
    optimizer = variant([empty, scalar], base, rho=0.5, backend=backend)
    empty.grad, scalar.grad = torch.zeros(3, 0), torch.tensor(-3.0)
    optimizer.first_step()
    assert scalar.item() == pytest.approx(1.5)
    empty.grad, scalar.grad = torch.zeros(3, 0), torch.tensor(-4.0)
    optimizer.second_step()
    assert scalar.item() > 2.0 and empty.shape == (3, 0)


@each_backend
def test_nothing_but_empty_parameters(backend: str) -> None:
    p = nn.Parameter(torch.zeros(0))
    optimizer = SAMMagnitude([p], lr=0.1, momentum=0.9, granularity="global", backend=backend)
    for _ in range(2):
        p.grad = torch.zeros(0)
        optimizer.first_step()
        p.grad = torch.zeros(0)
        optimizer.second_step()
    assert p.shape == (0,)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has gradients of one dtype only"
)
@each_backend
@pytest.mark.parametrize("step", ["first_step", "second_step"])
def test_gradients_of_another_dtype(step: str, backend: str) -> None:
    """Either they are understood or they are refused; never are their bytes misread."""
    p = parameter(1.0, 1.0, 1.0, dtype=torch.bfloat16)
    p.grad_dtype = None  # "any"
    optimizer = SAM([p], rho=3.0**0.5, lr=1.0, backend=backend)
    if step == "second_step":
        p.grad = torch.ones(3, dtype=torch.bfloat16)
        optimizer.first_step()
    p.grad = torch.ones(3, dtype=torch.float32)
    try:
        getattr(optimizer, step)()
    except (TypeError, ValueError) as error:
        assert "grad" in str(error)
        expected = 1.0
    else:
        expected = 2.0 if step == "first_step" else 0.0
    assert p.tolist() == [expected] * 3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e5m2], ids=str)
@each_optimizer
def test_dtypes_that_are_not_supported(cls: type[SAM], dtype: torch.dtype) -> None:
    good = parameter(1.0)
    bad = nn.Parameter(torch.zeros(3).to(dtype))
    with pytest.raises(TypeError, match=rf"params\[1\] of parameter group 0 .* is {dtype}: give"):
        cls([good, bad], lr=0.1)


def test_sparse_parameters() -> None:
    p = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match=r"params\[0\] of parameter group 0 .* is sparse"):
        SAM([p], lr=0.1)


# -- arguments -------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rho": -0.1}, ValueError, r"rho=-0\.1: give a finite number >= 0"),
        ({"rho": float("nan")}, ValueError, "rho=nan"),
        ({"rho": float("inf")}, ValueError, "rho=inf"),
        ({"rho": "0.1"}, TypeError, "rho is str"),
        ({"rho": None}, TypeError, "rho is NoneType"),
        ({"rho": True}, TypeError, "rho is bool"),
        ({"rho": torch.tensor(-0.1)}, ValueError, "rho=-0.1"),
        ({"rho": torch.ones(2)}, ValueError, "rho is a tensor of shape"),
        ({"adaptive": 1}, TypeError, "adaptive is int"),
        ({"adaptive": "yes"}, TypeError, "adaptive is str"),
        ({"backend": "cuda"}, ValueError, "backend='cuda': give one of 'auto', 'native'"),
        ({"backend": None}, ValueError, "backend=None"),
        ({"base_optimizer": "SGD"}, TypeError, "base_optimizer is 'SGD': give a class"),
        ({"base_optimizer": nn.Linear}, TypeError, "base_optimizer is .*Linear.*: give a class"),
        ({"base_optimizer": torch.optim.LBFGS}, ValueError, "base_optimizer is LBFGS, whose step"),
        ({"lr": -1.0}, ValueError, "learning rate: -1.0"),
        ({"momentum": -1.0}, ValueError, "momentum value: -1.0"),
        ({"nesterov": True}, ValueError, "Nesterov"),
    ],
)
def test_bad_arguments_are_named(
    cls: type[SAM], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        cls([parameter(1.0)], **{"lr": 0.1, **options})


@pytest.mark.parametrize(
    "cls", [info.cls for info in OPTIMIZER_TABLE if "granularity" in info.group_options]
)
@pytest.mark.parametrize("granularity", ["layer", "Element", "", None, 3])
def test_bad_granularity(cls: Any, granularity: Any) -> None:
    text = "granularity=.*: give one of 'element', 'tensor', 'global'"
    with pytest.raises(ValueError, match=text):
        cls([parameter(1.0)], lr=0.1, granularity=granularity)


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        ([], ValueError, "empty parameter list"),
        (torch.zeros(3), TypeError, "params argument"),
        ([torch.zeros(3, requires_grad=True) * 2], ValueError, "non-leaf"),
        ([3.0], TypeError, "can only optimize Tensors"),
        ([{"params": [parameter(1.0)], "rho": -1.0}], ValueError, "rho of parameter group 0=-1.0"),
    ],
)
def test_bad_params(params: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SAM(params, lr=0.1)


# -- autograd, copies ------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("moment", ["first_step", "restore", "second_step"])
@each_base
def test_a_retained_graph_notices_that_weights_were_overwritten(
    base: Base, moment: str, backend: str
) -> None:
    """Autograd saved the weights of the forward pass; with others, backward would be wrong."""
    model = linear()
    optimizer = SAM(model.parameters(), base.cls, 0.5, backend=backend, **base.options)
    x = torch.ones(2, 4)

    def loss() -> Tensor:
        return model(x).square().sum()

    old_loss = loss()
    old_loss.backward(retain_graph=True)
    optimizer.first_step()
    if moment != "first_step":
        old_loss = loss()
        old_loss.backward(retain_graph=True)
        getattr(optimizer, moment)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old_loss.backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
@each_base
@each_variant
def test_copies_step_identically_and_independently(
    variant: Variant,
    base: Base,
    duplicate: Callable[[Any], Any],
    backend: str,
) -> None:
    model = linear()
    optimizer = variant(two_groups(model), base, backend=backend, track_statistics=True)
    take_step(optimizer, 0)
    twin_model, twin = duplicate((model, optimizer))
    assert type(twin) is variant.info.cls and twin.backends == optimizer.backends
    assert twin.base_optimizer is not optimizer.base_optimizer
    assert twin.param_groups is twin.base_optimizer.param_groups
    assert twin.state is twin.base_optimizer.state
    own = {id(p) for p in twin_model.parameters()}
    assert {id(p) for p in parameters_of(twin)} == own
    before = snapshot(twin_model.parameters())
    for step in (1, 2):
        take_step(optimizer, step)
    assert unchanged(twin_model.parameters(), before), "the copy has weights of its own"
    for step in (1, 2):
        take_step(twin, step)
    assert unchanged(twin_model.parameters(), snapshot(model.parameters()))
    assert twin.statistics is not None and optimizer.statistics is not None
    assert unchanged(twin.statistics, optimizer.statistics)


def test_first_gradients_are_freed_when_nobody_reads_them() -> None:
    p = parameter(1.0, 2.0)
    optimizer = SAM([p], rho=0.5, lr=0.1)
    set_gradients([p], 0)
    gradient = weakref.ref(p.grad)
    optimizer.first_step()
    assert optimizer.is_perturbed
    assert gradient() is None


# -- what the optimizer looked at in the last step has changed -------------------------------------


def give(params: list[nn.Parameter], value: float = 1.0) -> None:
    for p in params:
        p.grad = torch.full_like(p, value)


@each_backend
@pytest.mark.parametrize(
    "swap",
    [
        lambda w: torch.cat([w] * 2, 1)[:, :4],
        lambda w: torch.zeros(1).expand(4, 4),
        lambda w: w.t(),
    ],
    ids=["gaps", "expanded", "transposed"],
)
def test_a_parameter_laid_out_anew_between_the_passes(
    swap: Callable[[Tensor], Tensor], backend: str
) -> None:
    """The step is refused, and everything that still can be is restored."""
    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    optimizer = SAM(params, lr=0.1, backend=backend)
    w = snapshot(params)
    give(params)
    optimizer.first_step()
    params[1].data = swap(params[1].data)
    give(params)
    with pytest.raises(RuntimeError):
        optimizer.second_step()
    assert unchanged(w[:1], params[:1])


def test_a_parameter_with_gaps_is_served_by_another_backend() -> None:
    params = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = SAM(params, lr=0.1, rho=0.1)
    for _ in range(2):
        give(params)
        optimizer.first_step()
        give(params)
        optimizer.second_step()
        params[1].data = torch.cat([params[1].data] * 2, 1)[:, :4]
    assert torch.equal(params[0], params[1])


def test_parameters_that_come_to_share_memory_are_refused() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    optimizer = SAM([a, b], lr=0.1, rho=1.0, backend="native")
    b.data = a.data
    give([a, b])
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] .* overlap"):
        optimizer.first_step()
    assert a.tolist() == [1, 1] and not optimizer.is_perturbed


@pytest.mark.parametrize(
    "spoil",
    [
        lambda o, b: o.state[b].update(momentum_buffer=torch.zeros(3)),
        lambda o, b: o.state[b].update(momentum_buffer=5),
        lambda o, b: o.param_groups[1].update(lr=torch.tensor(0.1, device="meta")),
        lambda o, b: o.param_groups[1].update(lr=float("inf")),
        lambda o, b: o.param_groups[1].update(granularity="layer"),
    ],
    ids=["shape", "number", "lr on meta", "lr", "granularity"],
)
@each_backend
def test_a_later_group_that_is_wrong_leaves_the_earlier_ones_alone(
    spoil: Callable[[SAM, Tensor], None], backend: str
) -> None:
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = SAMDirection(
        [{"params": [a]}, {"params": [b]}], lr=0.1, momentum=0.9, backend=backend
    )
    give([a, b])
    optimizer.first_step()
    give([a, b], 2.0)
    optimizer.second_step()
    before = snapshot([a, b, optimizer.state[a]["momentum_buffer"]])
    give([a, b])
    optimizer.first_step()
    spoil(optimizer, b)
    give([a, b], 2.0)
    with pytest.raises((ValueError, TypeError)):
        optimizer.second_step()
    assert unchanged(before, [a, b, optimizer.state[a]["momentum_buffer"]])


def test_a_first_gradient_in_memory_of_somebody_else_is_copied() -> None:
    """Slices of a flat buffer that hide that they are views."""
    flat = torch.arange(1.0, 9.0)
    params = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    optimizer = SAMDirection(params, lr=0.1)
    params[0].grad, params[1].grad = flat[:4].data, flat[4:].data
    optimizer.first_step()
    flat.fill_(100.0)
    params[0].grad, params[1].grad = flat[4:].data, flat[:4].data
    optimizer.second_step()
    torch.testing.assert_close(params[0].detach(), -0.1 * torch.arange(1.0, 5.0))


@each_backend
def test_hyperparameters_that_pytorch_negates_when_it_reads_them(backend: str) -> None:
    half = torch.tensor(1 - 0.5j).conj().imag
    assert half.is_neg() and half.item() == 0.5
    results = []
    for value in (half, 0.5):
        p = nn.Parameter(torch.ones(1))
        optimizer = SAM([p], rho=value, lr=value, backend=backend)
        give([p])
        optimizer.first_step()
        results.append(p.item())
        give([p])
        optimizer.second_step()
        results.append(p.item())
    assert results[:2] == results[2:] == [1.5, 0.5]


@each_backend
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (2, 3)])
def test_gradients_that_pytorch_negates_when_it_reads_them(
    backend: str, shape: tuple[int, ...]
) -> None:
    g = torch.arange(1.0, 1.0 + math.prod(shape)).view(shape)
    negated = torch.complex(torch.zeros_like(g), -g).conj().imag
    assert negated.is_neg()
    results = []
    for grad in (negated, g):
        p = nn.Parameter(torch.ones(shape))
        optimizer = SAM([p], rho=0.5, lr=0.1, momentum=0.9, backend=backend)
        for given in (g, g, grad, grad):  # what is as before is read quickly, from the second on
            p.grad = given.clone() if given is g else given
            optimizer.first_step()
            p.grad = given.clone() if given is g else given
            optimizer.second_step()
        results.append(p.detach())
    assert torch.equal(*results)


@each_backend
@pytest.mark.parametrize("since", [0, 2])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_parameters_that_pytorch_negates_when_it_reads_them(
    backend: str, since: int, shape: tuple[int, ...]
) -> None:
    p = nn.Parameter(torch.ones(shape))
    optimizer = SAM([p], rho=0.5, lr=0.1, momentum=0.9, backend=backend)

    def step() -> None:
        for half in (optimizer.first_step, optimizer.second_step):
            give([p])
            half()

    for _ in range(since):
        step()
    p.data = torch.complex(torch.zeros(shape), -p.detach()).conj().imag
    assert p.is_neg()
    before = p.detach().clone()
    give([p])
    with pytest.raises(ValueError, match=r"resolve_neg\(\)"):
        optimizer.first_step()
    assert torch.equal(p, before) and not optimizer.is_perturbed
    p.data = p.detach().clone()
    step()
    assert (p < before).all()


def test_rho_that_float32_cannot_hold() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = SAM([p], rho=1e39, lr=0.1)
    give([p])
    with pytest.raises(ValueError, match=r"rho=1e\+39"):
        optimizer.first_step()
    assert p.tolist() == [1, 1] and not optimizer.is_perturbed


def test_gradients_wider_than_their_parameter() -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this PyTorch knows no grad_dtype")
    p.grad_dtype = torch.float32
    optimizer = SAM([p], lr=0.5)
    for _ in range(2):
        p.grad = torch.ones(4)
        optimizer.first_step()
        p.grad = torch.ones(4)
        optimizer.second_step(zero_grad=True)
    assert p.tolist() == [0.0] * 4
