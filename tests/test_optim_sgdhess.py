"""SGDHess: D against dense Hessians, SGD's semantics, graphs that go, checkpoints, bad input."""

import copy
import gc
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from samkernels import SGDHess
from samkernels.optim.sgdhess import rademacher
from tests.helpers import rejects
from tests.optim_helpers import (
    ConvNet,
    assert_equal,
    images,
    linear,
    parameter,
    same_bits,
    snapshot,
    through_a_file,
    unchanged,
)

OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "rho": 0.5, "seed": 3}
BACKENDS = ("native", "foreach", "reference")
# What PyTorch says of backward(create_graph=True): of the cycle that step() breaks.
WARNING = "ignore:Using backward\\(\\) with create_graph=True"

Backward = Callable[[SGDHess, Tensor], None]


def through_optimizer(optimizer: SGDHess, loss: Tensor) -> None:
    optimizer.backward(loss)


def through_loss(optimizer: SGDHess, loss: Tensor) -> None:
    loss.backward(create_graph=True)


both_ways = pytest.mark.parametrize(
    "backward",
    [through_optimizer, pytest.param(through_loss, marks=pytest.mark.filterwarnings(WARNING))],
)
every_model = pytest.mark.parametrize("make", [linear, ConvNet])


def loss_of(model: nn.Module, seed: int) -> Tensor:
    first = next(model.parameters())
    if isinstance(model, ConvNet):
        x, y = images(seed)
        return F.cross_entropy(model(x.to(first)), y)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator).to(first)
    return F.mse_loss(model(x), x[:, :2] ** 2)


def train(
    model: nn.Module, optimizer: SGDHess, steps: range, backward: Backward = through_optimizer
) -> None:
    for step in steps:
        backward(optimizer, loss_of(model, step))
        optimizer.step()
        optimizer.zero_grad()


# D


def hessian_times(model: nn.Module, seed: int, v: list[Tensor]) -> list[Tensor]:
    """H v from the dense Hessian, row by row, over all parameters."""
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model, seed), params, create_graph=True)
    flat_v, products = torch.cat([x.reshape(-1) for x in v]), []
    for element in torch.cat([g.reshape(-1) for g in grads]):
        row = torch.autograd.grad(element, params, retain_graph=True, materialize_grads=True)
        products.append(torch.cat([r.reshape(-1) for r in row]) @ flat_v)
    parts = torch.stack(products).split([p.numel() for p in params])
    return [part.reshape(p.shape) for part, p in zip(parts, params, strict=True)]


def expected_step(model: nn.Module, v: list[Tensor], mean: bool = True) -> list[Tensor]:
    """w - 0.1 * (g * (1 + 0.5 * D) + 0.01 * w)."""
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model, 0), params)
    products = hessian_times(model, 0, v)
    d = [
        hv.abs().mean((2, 3), keepdim=True) if mean and hv.dim() == 4 else hv.abs()
        for hv in products
    ]
    return [
        w - 0.1 * (g * (1 + 0.5 * d_) + 0.01 * w)
        for w, g, d_ in zip(snapshot(params), grads, d, strict=True)
    ]


@both_ways
@every_model
def test_one_step_against_the_dense_hessian(make: Any, backward: Backward) -> None:
    model = make().double()
    params = list(model.parameters())
    v = [rademacher(p, 3, 0, i) for i, p in enumerate(params)]
    expected = expected_step(model, v)
    wrong = {
        "no mean": expected_step(model, v, mean=False),
        "another v": expected_step(model, [rademacher(p, 4, 0, i) for i, p in enumerate(params)]),
    }
    optimizer = SGDHess(params, **{**OPTIONS, "momentum": 0.0})
    train(model, optimizer, range(1), backward)

    def check(others: list[Tensor]) -> None:
        for p, other in zip(params, others, strict=True):
            torch.testing.assert_close(p.detach(), other, rtol=1e-12, atol=1e-13)

    check(expected)
    assert rejects(lambda: check(wrong["another v"]))
    assert rejects(lambda: check(wrong["no mean"])) == (make is ConvNet)


def test_v() -> None:
    p = torch.zeros(40, 3, 5, 5)
    v = rademacher(p, 1, 2, 3)
    assert v.shape == p.shape and v.dtype is p.dtype
    assert torch.equal(v.abs(), torch.ones_like(p))
    assert abs(float(v.mean())) < 5 / p.numel() ** 0.5
    assert torch.equal(rademacher(p, 1, 2, 3), v)
    assert torch.equal(rademacher(p.contiguous(memory_format=torch.channels_last), 1, 2, 3), v)
    for key in ((0, 2, 3), (1, 1, 3), (1, 2, 4), (2, 1, 3), (12, 3)):
        other = rademacher(p, *key)
        assert abs(float((v * other).mean())) < 5 / p.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_v_in_other_dtypes(dtype: torch.dtype) -> None:
    v = rademacher(torch.zeros(9, dtype=dtype), 0)
    assert v.dtype is dtype and set(v.tolist()) == {-1.0, 1.0}


@both_ways
def test_v_is_renewed_every_k_steps_and_serves_in_between(backward: Backward) -> None:
    w = parameter(1.0, -2.0, dtype=torch.float64)
    optimizer = SGDHess([w], lr=0.125, rho=1.0, k=3, seed=0)
    diagonal = torch.tensor([0.5, -4.0], dtype=torch.float64)
    d = torch.zeros(2, dtype=torch.float64)
    for step in range(7):
        assert optimizer.needs_graph == (step % 3 == 0)
        factor = step + 1.0
        if step % 3 == 0:
            d = (factor * diagonal).abs()  # |Hv| = |H| for a diagonal H
        expected = w.detach() * (1 - 0.125 * factor * diagonal * (1 + d))
        if step % 3 == 1:
            (factor * (diagonal * w * w).sum() / 2).backward()  # plain gradients suffice
        else:
            backward(optimizer, factor * (diagonal * w * w).sum() / 2)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(w.detach(), expected, rtol=1e-15, atol=0)
        assert torch.equal(optimizer.state[w]["hessian_product"].abs(), d)


def test_nothing_is_kept_of_v_that_serves_once() -> None:
    model = linear()
    optimizer = SGDHess(model.parameters(), **OPTIONS)
    train(model, optimizer, range(2))
    assert all(set(optimizer.state[p]) == {"momentum_buffer"} for p in model.parameters())
    assert optimizer.hessian_products == {}


@both_ways
def test_losses_add_up(backward: Backward) -> None:
    """Two calls of backward are one with the sum, D included."""
    weights = []
    for together in (True, False):
        model = linear(torch.float64)
        optimizer = SGDHess(model.parameters(), **OPTIONS)
        losses = [loss_of(model, seed) for seed in (0, 1)]
        for loss in [losses[0] + losses[1]] if together else losses:
            backward(optimizer, loss)
        optimizer.step()
        weights.append(snapshot(model.parameters()))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings(WARNING)
def test_both_ways_give_the_same_bits() -> None:
    weights = []
    for way in (through_optimizer, through_loss):
        model = ConvNet()
        train(model, SGDHess(model.parameters(), **OPTIONS, k=2), range(4), way)
        weights.append(snapshot(model.parameters()))
    assert unchanged(weights[1], weights[0])


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("first", [through_loss, through_optimizer])
@pytest.mark.parametrize("second", [through_loss, through_optimizer])
def test_both_ways_mix(first: Backward, second: Backward) -> None:
    w = parameter(1.0, 2.0)
    optimizer = SGDHess([w], lr=1.0, rho=1.0)
    for backward in (first, second):
        backward(optimizer, (w**2).sum() / 4)
    optimizer.step()
    assert w.tolist() == [-1.0, -2.0]  # H = 1: w - w * (1 + 1)


def test_zero_grad_forgets_hessian_products() -> None:
    model, twin = linear(), linear()
    optimizer, other = (SGDHess(m.parameters(), **OPTIONS) for m in (model, twin))
    optimizer.backward(loss_of(model, 5))
    optimizer.zero_grad()
    assert optimizer.hessian_products == {}
    train(model, optimizer, range(1))
    train(twin, other, range(1))
    assert unchanged(model.parameters(), snapshot(twin.parameters()))


def test_a_gradient_that_is_thrown_away_takes_its_hessian_product_along() -> None:
    model, twin = linear(), linear()
    optimizer, other = (SGDHess(m.parameters(), **OPTIONS) for m in (model, twin))
    optimizer.backward(loss_of(model, 5))
    model.zero_grad()  # the optimizer's is another one
    train(model, optimizer, range(1))
    train(twin, other, range(1))
    assert unchanged(model.parameters(), snapshot(twin.parameters()))


# Parameters of every kind


def test_parameters_without_second_derivative_or_without_gradient() -> None:
    used, flat, unused, frozen = (parameter(1.0, 2.0) for _ in range(4))
    frozen.requires_grad_(False)
    optimizer = SGDHess([used, flat, unused, frozen], lr=1.0, rho=1.0)
    optimizer.backward((used**2).sum() / 2 + (3 * flat).sum() + frozen.sum())
    optimizer.step()
    assert used.tolist() == [-1.0, -2.0]  # 1 - 1 * (1 + 1)
    assert flat.tolist() == [-2.0, -1.0]  # D = 0
    assert unused.tolist() == [1.0, 2.0] and unused.grad is None
    assert frozen.tolist() == [1.0, 2.0]
    assert unused not in optimizer.state


def test_a_loss_without_any_second_derivative_is_sgd() -> None:
    w = parameter(1.0, 2.0)
    optimizer = SGDHess([w], lr=1.0, rho=1.0)
    optimizer.backward((3 * w).sum())
    optimizer.step()
    assert w.tolist() == [-2.0, -1.0]


def test_a_parameter_that_missed_v_has_no_curvature_until_the_next() -> None:
    early, late = parameter(1.0), parameter(1.0)
    optimizer = SGDHess([early, late], lr=1.0, rho=1.0, k=2)
    for step in range(3):
        loss = (early**2).sum() / 2
        optimizer.backward(loss if step == 0 else loss + (late**2).sum() / 2)
        optimizer.step()
        optimizer.zero_grad()
    # D = 1: w becomes w - 2 w; D = 0: w - w.
    assert early.tolist() == [-1.0] and late.tolist() == [0.0]


def test_one_gradient_for_two_parameters_is_copied() -> None:
    a, b = parameter(1.0), parameter(2.0)
    optimizer = SGDHess([a, b], lr=1.0)
    optimizer.backward((a + b).sum())
    assert a.grad is not None and b.grad is not None
    assert a.grad.data_ptr() != b.grad.data_ptr()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_memory_format_changes_rounding_only(backend: str) -> None:
    weights = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = ConvNet().double() if backend == "reference" else ConvNet()
        model.to(memory_format=memory_format)
        optimizer = SGDHess(model.parameters(), **OPTIONS, backend=backend)
        train(model, optimizer, range(3))
        weights.append(snapshot(model.parameters()))
    bound = 1e-10 if backend == "reference" else 1e-3
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (2, 0, 1, 3)])
def test_layouts_without_a_stride_of_positions(order: tuple[int, ...]) -> None:
    """Served by the reference, whatever the backend: the same bits as there."""
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    inverse = [order.index(i) for i in range(4)]
    weights = []
    for backend in ("native", "reference"):
        odd = nn.Parameter(values.permute(order).contiguous().permute(inverse))
        plain = nn.Parameter(values.clone())
        optimizer = SGDHess([plain, odd], lr=0.1, rho=0.5, seed=0, backend=backend)
        optimizer.backward(((plain * odd) ** 2).sum())
        optimizer.step()
        weights += [plain.detach(), odd.detach()]
    assert same_bits(weights[0], weights[2]) and same_bits(weights[1], weights[3])


def test_a_parameter_with_gaps() -> None:
    memory = torch.arange(1.0, 7.0)
    w = nn.Parameter(memory[::2])
    optimizer = SGDHess([w], lr=1.0, rho=1.0)
    optimizer.backward((w**2).sum() / 2)
    optimizer.step()
    assert w.tolist() == [-1.0, -3.0, -5.0]
    assert optimizer.backends == {"cpu float32": "foreach"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = linear(dtype)
    before = float(loss_of(model, 0).detach())
    train(model, SGDHess(model.parameters(), lr=0.1, rho=0.1, momentum=0.5), range(20))
    assert float(loss_of(model, 0).detach()) < before
    assert all(p.dtype is dtype for p in model.parameters())


def test_storage_addresses_stay() -> None:
    model = ConvNet()
    optimizer = SGDHess(model.parameters(), **OPTIONS)
    train(model, optimizer, range(1))
    tensors = [
        *model.parameters(),
        *(optimizer.state[p]["momentum_buffer"] for p in model.parameters()),
    ]
    before = [t.data_ptr() for t in tensors]
    train(model, optimizer, range(1, 3))
    again = [
        *model.parameters(),
        *(optimizer.state[p]["momentum_buffer"] for p in model.parameters()),
    ]
    assert [t.data_ptr() for t in again] == before


# SGD

SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1, "maximize": True},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_without_rho_it_is_torch_optim_sgd(options: dict[str, Any], backend: str) -> None:
    dtype = torch.float32 if backend == "native" else torch.float64
    model, twin = linear(dtype), linear(dtype)
    ours = SGDHess(model.parameters(), lr=0.01, rho=0.0, backend=backend, **options)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.01, **options)
    for step in range(10):
        ours.backward(loss_of(model, step))
        loss_of(twin, step).backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    bound = 1e-5 if dtype is torch.float32 else 1e-13
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", ["native", "emulated"])
def test_backends_give_the_same_bits(backend: str) -> None:
    weights = []
    for name in (backend, "reference"):
        model = ConvNet()
        options = {**OPTIONS, "backend": name}
        train(model, SGDHess(model.parameters(), **options), range(5))
        weights.append(snapshot(model.parameters()))
    assert unchanged(*weights)


def test_maximizing_is_minimizing_the_negative() -> None:
    model, twin = linear(), linear()
    up = SGDHess(model.parameters(), **OPTIONS, maximize=True)
    down = SGDHess(twin.parameters(), **OPTIONS)
    for step in range(3):
        up.backward(-loss_of(model, step))
        down.backward(loss_of(twin, step))
        for optimizer in (up, down):
            optimizer.step()
            optimizer.zero_grad()
    assert unchanged(model.parameters(), snapshot(twin.parameters()))


def test_groups_have_their_own_options_and_share_v() -> None:
    model, twin = ConvNet(), ConvNet()
    weights, rest = model.groups()
    split = SGDHess(
        [{"params": weights}, {"params": rest, "rho": 0.0, "lr": torch.tensor(0.05)}], **OPTIONS
    )
    # In the order of the groups, so that each parameter keeps its v.
    whole = SGDHess([p for group in twin.groups() for p in group], **OPTIONS)
    start = snapshot(model.parameters())
    train(model, split, range(1))
    train(twin, whole, range(1))
    for p, q, w in zip(model.parameters(), twin.parameters(), start, strict=True):
        if p.dim() > 1:
            assert same_bits(p.detach(), q.detach())
        else:
            expected = w - 0.05 * split.state[p]["momentum_buffer"]
            torch.testing.assert_close(p.detach(), expected)
    group = {"params": [parameter(1.0)]}
    split.add_param_group(group)
    assert (group["k"], group["seed"], group["step"]) == (1, 3, 1)


def test_a_scheduler_changes_lr() -> None:
    w = parameter(8.0)
    optimizer = SGDHess([w], lr=0.5, rho=0.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for expected in (4.0, 3.0):
        optimizer.backward((w**2).sum() / 2)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert w.item() == expected


def test_a_closure() -> None:
    model, twin = linear(), linear()
    optimizer, other = (SGDHess(m.parameters(), **OPTIONS) for m in (model, twin))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        optimizer.backward(loss)
        return loss

    assert optimizer.step(closure).item() == loss_of(twin, 0).item()
    train(twin, other, range(1))
    assert unchanged(model.parameters(), snapshot(twin.parameters()))


def test_without_gradients_nothing_happens() -> None:
    w = parameter(1.0)
    optimizer = SGDHess([w], lr=1.0)
    optimizer.step()
    assert w.item() == 1.0 and optimizer.param_groups[0]["step"] == 0


# Graphs


@both_ways
@pytest.mark.parametrize("k", [1, 3])
def test_no_graph_is_left_and_nothing_grows(k: int, backward: Backward) -> None:
    """Without the garbage collector, whose work cycles would be."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh())
    optimizer = SGDHess(model.parameters(), lr=0.01, momentum=0.9, rho=0.1, k=k)
    x = torch.randn(128, 64)
    seen: list[weakref.ref[Any]] = []
    model[1].register_forward_hook(lambda module, inputs, out: seen.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        for step in range(200):
            loss = model(x).square().mean()
            seen.append(weakref.ref(loss))
            backward(optimizer, loss)
            optimizer.step()
            if step % 2:
                optimizer.zero_grad()
            else:
                for p in model.parameters():
                    assert p.grad is not None and not p.grad.requires_grad
            del loss
            assert all(ref() is None for ref in seen)
            seen.clear()
            if step == 20:
                tensors, memory = live_tensors(), resident_bytes()
        assert live_tensors() <= tensors
        assert resident_bytes() - memory < 180 * 128 * 256 * 4  # one activation of each step
    finally:
        gc.enable()


def live_tensors() -> int:
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.filterwarnings(WARNING)
def test_the_tests_above_notice_a_cycle() -> None:
    model = linear()
    loss = loss_of(model, 0)
    seen = weakref.ref(loss)
    gc.disable()
    try:
        loss.backward(create_graph=True)
        del loss
        first = next(model.parameters())
        assert first.grad is not None and first.grad.requires_grad
        graph = weakref.ref(first.grad)
        del model, first
        assert graph() is not None, "no step() has broken the cycle"
    finally:
        gc.enable()
    gc.collect()
    assert seen() is None


@pytest.mark.filterwarnings(WARNING)
def test_a_graph_that_is_not_needed_goes_too() -> None:
    model = linear()
    optimizer = SGDHess(model.parameters(), **OPTIONS, k=2)
    for step in range(4):
        loss_of(model, step).backward(create_graph=True)
        optimizer.step()
        assert not any(p.grad.requires_grad for p in model.parameters() if p.grad is not None)
        optimizer.zero_grad()


class Identity(torch.autograd.Function):
    """Has a derivative, and that has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: int) -> Tensor:
        ctx.order = order
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if ctx.order == 2:
            raise RuntimeError("no second derivative")
        return Identity.apply(grads[0], ctx.order + 1), None


@both_ways
def test_a_loss_that_has_no_second_derivative(backward: Backward) -> None:
    model = linear()
    optimizer = SGDHess(model.parameters(), **OPTIONS)
    before = snapshot(model.parameters())
    with pytest.raises(RuntimeError, match="no second derivative"):
        backward(optimizer, Identity.apply(loss_of(model, 0), 1).square())
        optimizer.step()
    assert unchanged(model.parameters(), before) and not optimizer.state
    assert optimizer.param_groups[0]["step"] == 0
    assert all(p.grad is None or not p.grad.requires_grad for p in model.parameters())


class Attention(nn.Module):
    """One head, fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.project = nn.Linear(4, 12)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)[:, None].chunk(3, -1)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.mT / 2).softmax(-1) @ v


@both_ways
def test_fused_attention_by_its_math_kernel(backward: Backward) -> None:
    """Without it the error names it; with it the step is that of attention written out."""
    model, twin = Attention(fused=True), Attention(fused=False)
    optimizer, other = (SGDHess(m.parameters(), **OPTIONS) for m in (model, twin))
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    before = snapshot(model.parameters())
    with pytest.raises(RuntimeError, match=r"sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)"):
        backward(optimizer, model(x).square().mean())
        optimizer.step()
    assert unchanged(model.parameters(), before) and not optimizer.state
    optimizer.zero_grad()
    for _ in range(3):
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(x).square().mean()
        backward(optimizer, loss)
        backward(other, twin(x).square().mean())
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    for p, q, w in zip(model.parameters(), twin.parameters(), before, strict=True):
        torch.testing.assert_close(p, q)
        assert not torch.equal(p, w)


@both_ways
def test_other_functions_without_second_derivatives(backward: Backward) -> None:
    """The message says what to do, whatever it is."""
    bag, linear_ = nn.EmbeddingBag(5, 3, mode="sum"), linear()
    torch.compiler.reset()  # what was compiled for other shapes would be compiled for any
    compiled = torch.compile(linear_, backend="aot_eager")
    losses = {
        "replace the function": (bag, lambda: bag(torch.tensor([[1, 2]])).square().mean()),
        "leave out torch.compile": (linear_, lambda: compiled(torch.ones(2, 4)).square().mean()),
    }
    for cure, (model, loss) in losses.items():
        optimizer = SGDHess(model.parameters(), **OPTIONS)
        with pytest.raises(RuntimeError, match=f"needs second derivatives: {cure}"):
            backward(optimizer, loss())
            optimizer.step()


def test_networks_that_are_compiled_for_any_shape() -> None:
    """Autograd says nothing of second derivatives then."""
    torch.compiler.reset()
    model = linear()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    optimizer = SGDHess(model.parameters(), **OPTIONS)
    with pytest.raises(RuntimeError, match=r"leave out torch.compile.* donated buffer"):
        optimizer.backward(compiled(torch.ones(2, 4)).square().mean())


def test_a_first_derivative_that_is_missing_is_no_second_one() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = SGDHess([w], **OPTIONS)
    with pytest.raises(NotImplementedError, match=r"^the derivative for 'zeta'"):
        optimizer.backward(torch.special.zeta(w + 1, w).sum())


# Seeds and checkpoints


def test_the_global_generator_is_left_alone_and_does_not_matter() -> None:
    weights = []
    for seed in (0, 1):
        model = linear()
        torch.manual_seed(seed)
        optimizer = SGDHess(model.parameters(), **OPTIONS)
        state = torch.get_rng_state()
        train(model, optimizer, range(3))
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(snapshot(model.parameters()))
    assert unchanged(weights[1], weights[0])


def test_without_a_seed_one_is_drawn_from_the_global_generator() -> None:
    seeds = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seeds.append(SGDHess([parameter(1.0)], lr=0.1).param_groups[0]["seed"])
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("stop", range(1, 5))
@pytest.mark.parametrize("k", [1, 3])
def test_a_resumed_run_gives_the_same_bits(k: int, stop: int) -> None:
    whole = ConvNet()
    train(whole, SGDHess(whole.parameters(), **OPTIONS, k=k), range(6))
    model = ConvNet()
    optimizer = SGDHess(model.parameters(), **OPTIONS, k=k)
    train(model, optimizer, range(stop))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = ConvNet(seed=9)
    resumed.load_state_dict(saved["model"])
    other = SGDHess(resumed.parameters(), lr=1.0, rho=0.0, seed=8)  # all of it is overwritten
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(stop, 6))
    assert unchanged(resumed.parameters(), snapshot(whole.parameters()))


def test_a_checkpoint_of_torch_optim_sgd() -> None:
    model, twin = linear(torch.float64), linear(torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8, weight_decay=0.1)
    loss_of(model, 0).backward()
    sgd.step()
    twin.load_state_dict(model.state_dict())
    ours = SGDHess(twin.parameters(), lr=1.0, rho=0.0, k=2, seed=5)
    ours.load_state_dict(through_a_file(sgd.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, 0.8, 0.1)
    assert (group["rho"], group["k"], group["seed"], group["step"]) == (0.0, 2, 5, 0)
    for step in range(1, 4):
        model.zero_grad()
        loss_of(model, step).backward()
        sgd.step()
        train(twin, ours, range(step, step + 1))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_torch_optim_sgd_takes_the_checkpoint() -> None:
    model = linear()
    optimizer = SGDHess(model.parameters(), **OPTIONS)
    train(model, optimizer, range(2))
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    sgd.load_state_dict(through_a_file(optimizer.state_dict()))
    assert sgd.param_groups[0]["lr"] == 0.1
    for p in model.parameters():
        ours = optimizer.state[p]["momentum_buffer"]
        assert same_bits(sgd.state[p]["momentum_buffer"], ours)
    loss_of(model, 2).backward()
    sgd.step()


def test_state_in_another_layout_is_laid_out_anew() -> None:
    weights = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = ConvNet()
        optimizer = SGDHess(model.parameters(), **OPTIONS, k=3, backend="native")
        train(model, optimizer, range(1))
        for state in optimizer.state.values():
            for name, value in state.items():
                if value.dim() == 4:
                    state[name] = value.contiguous(memory_format=memory_format)
        train(model, optimizer, range(1, 3))
        weights.append(snapshot(model.parameters()))
    assert unchanged(weights[1], weights[0])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_by_themselves(how: Any) -> None:
    model = linear()
    optimizer = SGDHess(model.parameters(), **OPTIONS, k=2, backend="reference")
    train(model, optimizer, range(1))
    twin, other = how((model, optimizer))
    train(model, optimizer, range(1, 4))
    train(twin, other, range(1, 4))
    assert unchanged(twin.parameters(), snapshot(model.parameters()))
    assert other.backends == {"cpu float32": "reference"}


# Bad input


@pytest.mark.parametrize("k", [1, 3])
def test_a_gradient_without_a_graph_where_v_is_due(k: int) -> None:
    model = linear()
    optimizer = SGDHess(model.parameters(), **OPTIONS, k=k)
    train(model, optimizer, range(k))
    before = snapshot(model.parameters())
    state = copy.deepcopy(optimizer.state_dict())
    loss_of(model, 9).backward()
    with pytest.raises(RuntimeError, match=r"step\(\) needs Hv.*optimizer.backward\(loss\)"):
        optimizer.step()
    assert unchanged(model.parameters(), before)
    for p, saved in zip(model.parameters(), state["state"].values(), strict=True):
        assert unchanged(optimizer.state[p].values(), list(saved.values()))
    assert optimizer.param_groups[0]["step"] == k
    # Nothing is lost: the same step with a graph.
    optimizer.zero_grad()
    train(model, optimizer, range(9, 10))
    assert not unchanged(model.parameters(), before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho=-1.0"),
        ({"rho": float("nan")}, ValueError, "rho=nan"),
        ({"rho": "1"}, TypeError, "rho is str"),
        ({"rho": torch.ones(2)}, ValueError, "rho is a tensor of shape"),
        ({"lr": -0.1}, ValueError, "lr=-0.1"),
        ({"momentum": -0.1}, ValueError, "momentum=-0.1"),
        ({"weight_decay": None}, TypeError, "weight_decay is NoneType"),
        ({"nesterov": True}, ValueError, "nesterov=True: momentum"),
        ({"maximize": 1}, TypeError, "maximize is int"),
        ({"k": 0}, ValueError, "k=0: give a whole number from 1"),
        ({"k": 1.5}, TypeError, "k is float: give a whole number"),
        ({"k": True}, TypeError, "k is bool"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"seed": 2**63}, ValueError, "seed=9223372036854775808"),
        ({"seed": 0.5}, TypeError, "seed is float"),
        ({"backend": "cuda"}, ValueError, "backend='cuda'"),
    ],
    ids=str,
)
def test_options_out_of_range(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SGDHess([parameter(1.0)], **{"lr": 0.1, **options})


def test_groups_that_are_wrong() -> None:
    optimizer = SGDHess([parameter(1.0)], **OPTIONS)
    for group, error, message in (
        ({"k": 2}, ValueError, "k=2 of parameter group 1: all groups have k=1"),
        ({"seed": 4}, ValueError, "seed=4 of parameter group 1"),
        ({"rho": -1.0}, ValueError, "rho of parameter group 1=-1.0"),
        ({"params": optimizer.param_groups[0]["params"]}, ValueError, "more than one"),
        ({"params": [nn.Parameter(torch.ones(1).to(torch.complex64))]}, TypeError, "complex64"),
    ):
        with pytest.raises(error, match=message):
            optimizer.add_param_group({"params": [parameter(1.0)], **group})  # type: ignore[dict-item]
        assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="param_group is list"):
        optimizer.add_param_group([parameter(1.0)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("rho", -1.0, ValueError), ("lr", "fast", TypeError), ("k", 0, ValueError)],
)
def test_options_that_become_wrong_are_found_before_anything_is_written(
    name: str, value: Any, error: type[Exception]
) -> None:
    a, b = parameter(1.0), parameter(1.0)
    optimizer = SGDHess([{"params": [a]}, {"params": [b]}], lr=0.1)
    optimizer.backward((a * b).sum())
    optimizer.param_groups[1][name] = value
    with pytest.raises(error, match=name):
        optimizer.step()
    assert a.item() == b.item() == 1.0
    optimizer.param_groups[1][name] = optimizer.param_groups[0][name]
    optimizer.step()  # with the Hessian-vector product that is there
    assert a.item() == b.item() != 1.0


def test_sparse_gradients() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = SGDHess(table.parameters(), lr=0.1)
    before = snapshot(table.parameters())
    with pytest.raises(ValueError, match=r"params\[0\]\.grad of parameter group 0.*sparse"):
        optimizer.backward(table(torch.tensor([1])).sum())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"params\[0\]\.grad of parameter group 0.*sparse"):
        optimizer.step()
    assert unchanged(table.parameters(), before)


def test_grad_scaler_is_refused() -> None:
    model = linear()
    optimizer = SGDHess(model.parameters(), **OPTIONS)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.backward(scaler.scale(loss_of(model, 0)))
    before = snapshot(model.parameters())
    with pytest.raises(RuntimeError, match="GradScaler: Hv would stay scaled"):
        scaler.step(optimizer)
    assert unchanged(model.parameters(), before)
    optimizer.zero_grad()
    train(model, optimizer, range(1))  # without it, all is well
    assert not unchanged(model.parameters(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("state"), "no optimizer's"),
        (lambda s: s.update(param_groups=3), "no optimizer's"),
        (lambda s: s["param_groups"][0].update(rho=-1.0), "rho of parameter group 0 in state_dict"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr=nan"),
        (lambda s: s["param_groups"][0].update(weight_decay=1e39), r"weight_decay=1e\+39"),
        (lambda s: s["param_groups"][0].update(rho=1e39), "rho of parameter group 0.*=1e"),
        (lambda s: s["param_groups"][0].update(k=0), "k=0 of parameter group 0 in state_dict"),
        (lambda s: s["state"][0].update(momentum_buffer=torch.ones(3)), "momentum_buffer of param"),
        (lambda s: s["state"][1].update(hessian_product=torch.ones(3)), "hessian_product of param"),
    ],
)
def test_a_state_dict_that_is_wrong(change: Callable[[Any], Any], message: str) -> None:
    model = linear()
    optimizer = SGDHess(model.parameters(), **OPTIONS, k=2)
    train(model, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state)
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_equal(optimizer.state_dict(), kept)
    train(model, optimizer, range(1, 2))


def test_a_load_that_fails_changes_nothing() -> None:
    model = linear()
    optimizer = SGDHess(model.parameters(), **OPTIONS, k=2)
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())

    def fail(_: Any) -> None:
        raise OSError("gave up")

    optimizer.register_load_state_dict_post_hook(fail)
    checkpoint = copy.deepcopy(before)
    checkpoint["param_groups"][0]["lr"] = 7.0
    with pytest.raises(OSError, match="gave up"):
        optimizer.load_state_dict(checkpoint)
    assert_equal(optimizer.state_dict(), before)


def test_a_loss_that_is_no_tensor() -> None:
    optimizer = SGDHess([torch.nn.Parameter(torch.ones(2))], lr=0.1, rho=0.1)
    with pytest.raises(TypeError, match="loss is float: give a"):
        optimizer.backward(1.0)  # type: ignore[arg-type]
