"""m-sharpness on one device: SAM.parts, and the ops that average."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from samkernels import SAM, SAMDirection, SAMMagnitude, checks, ops
from tests.by_hand import RHO, SGD, STEPS, by_hand, close, loss_of_share
from tests.optim_helpers import (
    bits,
    linear,
    parameter,
    parameters_of,
    set_gradients,
    snapshot,
    take_step,
    unchanged,
)
from tests.optimizers import (
    OPTIMIZER_TABLE,
    OPTIMIZERS,
    Variant,
    each_backend,
    each_cls_and_variant,
    each_variant,
)


def take_parts(optimizer: SAM, seeds: range) -> list[list[list[Tensor]]]:
    """A step with random gradients for each part; returns [g1, g2] of each."""
    params = parameters_of(optimizer)
    gradients = []
    for seed in optimizer.parts(seeds):
        first = set_gradients(params, 2 * seed)
        optimizer.first_step()
        gradients.append([first, set_gradients(params, 2 * seed + 1)])
    optimizer.second_step(zero_grad=True)
    return gradients


@pytest.mark.parametrize("m", [1, 3])
@each_variant
def test_against_steps_by_hand(variant: Variant, m: int) -> None:
    model = linear(torch.float64)
    optimizer = variant(model.parameters(), rho=RHO, **SGD)
    name = str(variant)
    expected = by_hand(name, [[part] for part in range(m)])
    for step in range(STEPS):
        for part in optimizer.parts(range(m)):
            loss_of_share(model, step, part, True).backward()
            optimizer.first_step()
            close(snapshot(model.parameters()), expected["perturbed"][step][part])
            loss_of_share(model, step, part, False).backward()
        close([p.grad for p in model.parameters()], expected["second"][step])
        optimizer.second_step(zero_grad=True)
        close(snapshot(model.parameters()), expected["weights"][step])
    whole = by_hand(name, [list(range(m))])["weights"][-1]
    assert (m == 1) == torch.allclose(whole[0], expected["weights"][-1][0], rtol=1e-4)


@each_backend
@each_cls_and_variant
def test_one_part_is_the_usual_step(cls: type[SAM], variant: dict[str, Any], backend: str) -> None:
    """Bit for bit, and in no more memory: nothing is averaged."""
    results = []
    for steps in (take_step, lambda optimizer, seed: take_parts(optimizer, range(seed, seed + 1))):
        model = linear()
        optimizer = cls(model.parameters(), rho=RHO, backend=backend, **variant, **SGD)
        for seed in range(2):
            steps(optimizer, seed)
        results.append(snapshot(model.parameters()))
    assert unchanged(*results)


@each_backend
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_backends_and_bases(backend: str, base: type[torch.optim.Optimizer]) -> None:
    """SAM of parts is the base optimizer with the mean of g2."""
    models = [linear(), linear()]
    optimizer = SAM(models[0].parameters(), base, RHO, backend=backend, lr=0.1)
    plain = base(models[1].parameters(), lr=0.1)
    for seed in range(2):
        gradients = take_parts(optimizer, range(10 * seed, 10 * seed + 4))
        for i, p in enumerate(models[1].parameters()):
            p.grad = torch.stack([second[i] for _, second in gradients]).mean(0)
        plain.step()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    for p, expected in pairs:
        torch.testing.assert_close(p, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_added_up_in_float32(dtype: torch.dtype) -> None:
    """A sum in bfloat16 would stop growing at 256 times the addend."""
    p = parameter(1.0, dtype=dtype)
    optimizer = SAMDirection([p], rho=0.0, lr=1.0, granularity="element")
    count = 600
    for _ in optimizer.parts(range(count)):
        p.grad = torch.tensor([0.25], dtype=dtype)
        optimizer.first_step()
        p.grad = torch.tensor([0.5], dtype=dtype)
    assert p.grad is not None and p.grad.dtype is dtype and p.grad.item() == 0.5
    optimizer.step()
    assert p.item() == 0.75


def test_statistics_are_those_of_the_means() -> None:
    model = linear(torch.float64)
    optimizer = SAM(model.parameters(), rho=RHO, track_statistics=True, **SGD)
    before = snapshot(model.parameters())
    (first, second), (other_first, other_second) = (
        [torch.cat([g.flatten() for g in gradients]) for gradients in part]
        for part in take_parts(optimizer, range(2))
    )
    first, second = (first + other_first) / 2, (second + other_second) / 2
    assert optimizer.statistics is not None
    expected = [
        first.norm(), second.norm(), torch.cat([w.flatten() for w in before]).norm(),
        first @ second / (first.norm() * second.norm()),
        (second.abs() > first.abs()).double().mean(), (first * second > 0).double().mean(),
    ]  # fmt: skip
    torch.testing.assert_close(
        torch.stack(list(optimizer.statistics)), torch.stack(expected).float()
    )


@pytest.mark.parametrize("granularity", ["element", "tensor", "global"])
def test_clipping_in_the_update(granularity: str) -> None:
    """max_grad_norm clips by the norm of the mean of g1, which SAMDirection's u has as well."""
    results = []
    for options in ({}, {"max_grad_norm": 0.5}):
        model = linear(torch.float64)
        before = snapshot(model.parameters())
        optimizer = SAMDirection(
            model.parameters(), rho=RHO, granularity=granularity, lr=1.0, **options
        )
        gradients = take_parts(optimizer, range(3))
        results.append([b - p for b, p in zip(before, snapshot(model.parameters()), strict=True)])
    total = sum(torch.cat([g.flatten() for g in first]) for first, _ in gradients)
    assert isinstance(total, Tensor)
    factor = 0.5 / (total.norm() / 3 + 1e-6)
    assert factor < 1
    close(results[1], [factor * u for u in results[0]])


def test_clipping_between_the_steps() -> None:
    """.grad is the mean of g2 after the last part, so that clip_grad_norm_ clips it."""
    model = linear(torch.float64)
    optimizer = SAM(model.parameters(), rho=RHO, lr=1.0)
    before = snapshot(model.parameters())
    for seed in optimizer.parts(range(3)):
        set_gradients(model.parameters(), 2 * seed)
        optimizer.first_step()
        set_gradients(model.parameters(), 2 * seed + 1)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    moved = [(b - p).flatten() for b, p in zip(before, snapshot(model.parameters()), strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(0.5, abs=1e-5)


# -- parameters that have no gradient in some part -------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("cls", "variant"), [(SAM, {}), (SAMMagnitude, {"granularity": "global"})])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_gradient_that_is_missing_in_a_part_is_zero(
    missing: int, cls: type[SAM], variant: dict[str, Any], base: type[torch.optim.Optimizer]
) -> None:
    results, statistics = [], []
    for zeros in (False, True):
        params = [parameter(1.0, 2.0), parameter(3.0, -4.0)]
        optimizer = cls(params, base, RHO, lr=0.1, track_statistics=True, **variant)
        take_step(optimizer, 9)
        for part in optimizer.parts(range(3)):
            for seed, make_step in ((2 * part, optimizer.first_step), (2 * part + 1, None)):
                set_gradients(params, seed)
                if part == missing:
                    params[1].grad = torch.zeros(2) if zeros else None
                if make_step:
                    make_step()
        optimizer.step()
        optimizer.zero_grad()
        results.append(snapshot(params))
        assert optimizer.statistics is not None
        statistics.append(torch.stack(list(optimizer.statistics)))
    assert unchanged(*results)
    assert torch.equal(*statistics)


# -- overflow --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("part", [0, 1, 2])
@each_cls_and_variant
def test_a_part_whose_first_gradient_overflows(
    cls: type[SAM], variant: dict[str, Any], part: int, value: float
) -> None:
    model = linear()
    params = list(model.parameters())
    optimizer = cls(params, rho=RHO, **variant, **SGD)
    take_step(optimizer, 7)
    before, buffers = (
        snapshot(params),
        snapshot(s["momentum_buffer"] for s in optimizer.state.values()),
    )
    for i in optimizer.parts(range(3)):
        set_gradients(params, 2 * i)
        if i == part:
            assert params[0].grad is not None
            params[0].grad[1, 1] = value
        optimizer.first_step()
        assert unchanged(params, before) == (i == part)
        set_gradients(params, 2 * i + 1)
    optimizer.second_step(zero_grad=True)
    assert unchanged(params, before)
    assert unchanged((s["momentum_buffer"] for s in optimizer.state.values()), buffers)
    take_step(optimizer, 8)
    assert all(p.isfinite().all() for p in params) and not unchanged(params, before)


@pytest.mark.parametrize("passes", [("first",), ("second",), ("first", "second")])
@pytest.mark.parametrize("part", [0, 1])
def test_scaler(part: int, passes: tuple[str, ...]) -> None:
    """A gradient of one part overflows: the step is skipped, and the scale halved."""
    model = linear(torch.float64)
    params = list(model.parameters())
    optimizer = SAMMagnitude(params, rho=RHO, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    weights = [snapshot(params)]
    scales = []
    for step in range(3):
        for i in optimizer.parts(range(2)):
            factors = [
                torch.inf if (step, i) == (1, part) and name in passes else 1.0
                for name in ("first", "second")
            ]
            scaler.scale(factors[0] * loss_of_share(model, step, i, True)).backward()
            optimizer.first_step()
            scaler.scale(factors[1] * loss_of_share(model, step, i, False)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        weights.append(snapshot(params))
        scales.append(scaler.get_scale())
    assert scales == [64.0, 32.0, 32.0]
    assert [unchanged(*pair) for pair in itertools.pairwise(weights)] == [False, True, False]


def test_the_scale_of_a_scaler_is_taken_out() -> None:
    results = []
    for scale in (1.0, 64.0):
        model = linear(torch.float64)
        optimizer = SAMMagnitude(model.parameters(), rho=RHO, **SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for i in optimizer.parts(range(2)):
            scaler.scale(loss_of_share(model, 0, i, True)).backward()
            optimizer.first_step()
            scaler.scale(loss_of_share(model, 0, i, False)).backward()
        scaler.step(optimizer)
        results.append(snapshot(model.parameters()))
    close(results[1], results[0])


# -- order, exceptions, checkpoints ----------------------------------------------------------------


@pytest.fixture(params=OPTIMIZERS)
def optimizer(request: pytest.FixtureRequest) -> SAM:
    return request.param(linear().parameters(), rho=RHO, **SGD)


def both_passes(optimizer: SAM, seed: int) -> None:
    set_gradients(parameters_of(optimizer), 2 * seed)
    optimizer.first_step()
    set_gradients(parameters_of(optimizer), 2 * seed + 1)


def test_weights_are_restored_between_parts(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before, addresses = snapshot(params), [p.data_ptr() for p in params]
    for part in optimizer.parts(range(3)):
        assert unchanged(params, before) and not optimizer.is_perturbed
        assert all(p.grad is None for p in params)
        both_passes(optimizer, part)
        assert optimizer.is_perturbed
    assert optimizer.is_perturbed
    optimizer.step()
    assert not optimizer.is_perturbed and not unchanged(params, before)
    assert [p.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("after", ["nothing", "first_step", "both"])
def test_the_body_raises(optimizer: SAM, part: int, kind: type[BaseException], after: str) -> None:
    """The weights come back, and the next step knows nothing of the parts."""
    params = parameters_of(optimizer)
    before = snapshot(params)
    with pytest.raises(kind):
        for i in optimizer.parts(range(3)):
            if i == part and after == "nothing":
                raise kind
            set_gradients(params, 2 * i)
            optimizer.first_step()
            if i == part and after == "first_step":
                raise kind
            set_gradients(params, 2 * i + 1)
            if i == part:
                raise kind
    assert unchanged(params, before) and not optimizer.is_perturbed
    optimizer.zero_grad()
    take_parts(optimizer, range(5, 8))
    other = type(optimizer)(linear().parameters(), rho=RHO, **SGD)
    take_parts(other, range(5, 8))
    assert unchanged(params, parameters_of(other))


def test_the_body_breaks_off(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    for part in optimizer.parts(range(3)):
        both_passes(optimizer, part)
        if part == 1:
            break
    assert unchanged(params, before) and not optimizer.is_perturbed
    with pytest.raises(RuntimeError, match="second_step was called without first_step"):
        optimizer.second_step()


def test_the_batches_raise(optimizer: SAM) -> None:
    def batches() -> Iterator[int]:
        yield 0
        raise OSError("the disk")

    params = parameters_of(optimizer)
    before = snapshot(params)
    with pytest.raises(OSError, match="the disk"):
        for part in optimizer.parts(batches()):
            both_passes(optimizer, part)
    assert unchanged(params, before) and not optimizer.is_perturbed


def no_first_step(optimizer: SAM) -> None:
    set_gradients(parameters_of(optimizer), 0)


def whole_step(optimizer: SAM) -> None:
    take_step(optimizer, 0)


def restored(optimizer: SAM) -> None:
    both_passes(optimizer, 0)
    optimizer.restore()


@pytest.mark.parametrize("body", [no_first_step, whole_step, restored])
def test_misuse(optimizer: SAM, body: Callable[[SAM], None]) -> None:
    with pytest.raises(RuntimeError, match=r"parts\(\): each part needs backward\(\), first_step"):
        for _ in optimizer.parts(range(2)):
            body(optimizer)
    assert not optimizer.is_perturbed


def test_no_second_backward(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="second_step found no gradient"):
        for part in optimizer.parts(range(2)):
            set_gradients(params, part)
            optimizer.first_step()
    assert unchanged(params, before) and not optimizer.is_perturbed


def test_first_step_was_called_before(optimizer: SAM) -> None:
    params = parameters_of(optimizer)
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="first_step was called twice"):
        for part in optimizer.parts(range(2)):
            both_passes(optimizer, part)
    optimizer.restore()
    assert unchanged(params, before)


def test_checkpoints(optimizer: SAM) -> None:
    """Refused while perturbed, also after the last part; between parts the weights are w."""
    for part in optimizer.parts(range(2)):
        optimizer.state_dict()
        both_passes(optimizer, part)
        with pytest.raises(RuntimeError, match="state_dict between first_step and second_step"):
            optimizer.state_dict()
    with pytest.raises(RuntimeError, match="state_dict between first_step and second_step"):
        optimizer.state_dict()
    optimizer.step()
    optimizer.state_dict()


@pytest.mark.parametrize("cls", [i.cls for i in OPTIMIZER_TABLE if i.keeps_first_grads])
def test_the_second_backward_writes_over_the_first(cls: type[SAM]) -> None:
    optimizer = cls(linear().parameters(), rho=RHO, **SGD)
    params = parameters_of(optimizer)
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="was written over the first one"):
        for part in optimizer.parts(range(2)):
            set_gradients(params, part)
            grads = [p.grad for p in params]
            optimizer.first_step()
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
    assert unchanged(params, before)


def test_gradients_are_enabled_in_the_body(optimizer: SAM) -> None:
    for part in optimizer.parts(range(2)):
        assert torch.is_grad_enabled()
        both_passes(optimizer, part)
    assert torch.is_grad_enabled()


def test_an_empty_batch_makes_no_step(optimizer: SAM) -> None:
    assert list(optimizer.parts([])) == []
    with pytest.raises(RuntimeError, match="needs two gradients"):
        optimizer.step()


def test_a_scheduler_sees_one_step(recwarn: pytest.WarningsRecorder) -> None:
    optimizer = SAM(linear().parameters(), rho=RHO, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    take_parts(optimizer, range(3))
    scheduler.step()
    assert not recwarn and optimizer.param_groups[0]["lr"] == 0.05


def test_a_real_loop() -> None:
    """As in the docstring; the loss goes down, and batches of unequal parts are no trouble."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    xs = torch.randn(10, 4)
    ys = (xs.sum(1) > 0).long()
    optimizer = SAMMagnitude(model.parameters(), rho=0.05, granularity="global", lr=0.5)
    losses = []
    for _ in range(30):
        for x, y in optimizer.parts(zip(xs.chunk(3), ys.chunk(3), strict=True)):
            cross_entropy(model(x), y).backward()
            optimizer.first_step()
            cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        losses.append(cross_entropy(model(xs), ys).item())
    assert losses[-1] < 0.3 * losses[0]


# -- the ops ---------------------------------------------------------------------------------------


def test_pack() -> None:
    generator = torch.Generator().manual_seed(0)
    likes = [
        torch.randn(5, 3),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(3).to(torch.bfloat16),
        torch.randn(()),
        torch.randn(0, 4),
        torch.randn(4, 6)[:, ::2],
    ]
    tensors = [torch.randn(like.shape, generator=generator).to(like.dtype) for like in likes]
    given: list[Tensor | None] = [*tensors]
    given[3] = None
    blocks, views = ops.pack(given, likes, divisor=4)
    assert [(block.dim(), block.dtype) for block in blocks] == [
        (1, torch.float32), (1, torch.bfloat16),
    ]  # fmt: skip
    tensors[3] = torch.zeros(())
    for view, tensor, like in zip(views, tensors, likes, strict=True):
        assert torch.equal(view, tensor / 4) and view.dtype is like.dtype
        if ops.is_dense(like):
            assert checks.same_layout(view, like)
    for block in blocks:
        block.zero_()
    assert not any(view.any() for view in views)
    again = ops.pack([None] * len(likes), likes)[0]
    assert [block.shape for block in again] == [block.shape for block in blocks]
    assert ops.pack([], []) == ([], [])


def test_pack_refuses_sparse() -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(ValueError, match=r"tensors\[0\] of shape \(3, 3\) is sparse"):
        ops.pack([sparse], [torch.eye(3)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_and_means(dtype: torch.dtype) -> None:
    likes = [torch.randn(3, 2).to(dtype), torch.randn(2, 3, 2, 2).to(dtype)]
    likes[1] = likes[1].to(memory_format=torch.channels_last)
    copies = [bits(t) for t in likes]
    sums = ops.sums_of(likes)
    ops.add_(sums, likes)
    ops.add_(sums, likes)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    for total, like in zip(sums, likes, strict=True):
        assert total.dtype is wide and torch.equal(total, like.to(wide) + like.to(wide) + like)
        assert checks.same_layout(total, like)
    means = ops.means_of(sums, 3, likes)
    for mean, like, copy in zip(means, likes, copies, strict=True):
        assert mean.dtype is dtype
        torch.testing.assert_close(mean, like)
        assert torch.equal(bits(like), copy)  # the addends are left alone
    ops.add_([], [])
    assert ops.sums_of([]) == [] and ops.means_of([], 2, []) == []
