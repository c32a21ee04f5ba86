"""The optimizers on every device: where a GPU is, all that the other tests of the optimizers ask of
CPU tensors in general is asked of CUDA tensors here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samkernels import SAM, SAMDirection, SAMMagnitude, SGDHess, backends
from samkernels.optim import _perturbation
from tests.helpers import DEVICES, serves
from tests.optim_helpers import (
    same_bits,
    set_gradients,
    snapshot,
    take_step,
    through_a_file,
    unchanged,
)
from tests.optimizers import each_cls_and_variant

PLACES = [
    pytest.param(device, backend, id=f"{device}-{backend}")
    for device in DEVICES
    for backend in backends.BACKENDS
    if backend != "auto" and serves(backend, device, torch.float32)
]
everywhere = pytest.mark.parametrize(("device", "backend"), PLACES)
SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05, "maximize": True},
}


def network(device: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters of several chunks, of odd sizes, channels_last, 0-dim and empty."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40_003,), (), (7, 3, 3, 3), (0, 4), (33, 5), (1,)]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    values[2] = values[2].to(memory_format=torch.channels_last)
    return [nn.Parameter(value.to(device)) for value in values]


def two_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[::2], "rho": 0.3}, {"params": params[1::2], "rho": 0.1, "lr": 0.02}]


def assert_near(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """A few roundings of weights of order 1: the backends differ in the order of their sums."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=3e-6, atol=3e-6)


@everywhere
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@each_cls_and_variant
def test_steps_are_those_of_the_reference_on_the_cpu(
    cls: type[SAM],
    variant: dict[str, Any],
    options: dict[str, Any],
    adaptive: bool,
    device: str,
    backend: str,
) -> None:
    weights = []
    for where, with_backend in ((device, backend), ("cpu", "reference")):
        params = network(where)
        options = {"lr": 0.05, "adaptive": adaptive, **options, **variant}
        optimizer = cls(two_groups(params), backend=with_backend, **options)
        addresses = [p.data_ptr() for p in params]
        for seed in range(3):
            take_step(optimizer, seed)
        assert [p.data_ptr() for p in params] == addresses
        weights.append(params)
    assert not same_bits(params[0].detach(), network("cpu")[0].detach())
    assert_near(*weights)


@everywhere
@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_other_base_optimizers(
    base: type[torch.optim.Optimizer], device: str, backend: str
) -> None:
    weights = []
    for where, with_backend in ((device, backend), ("cpu", "reference")):
        params = network(where)
        # A large eps: where u is near 0, u / (|u| + eps) would make much of a rounding.
        optimizer = SAMMagnitude(params, base, lr=0.01, eps=0.1, backend=with_backend)
        for seed in range(3):
            take_step(optimizer, seed)
        weights.append(params)
    assert_near(*weights)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_cls_and_variant
def test_restore_is_exact(
    cls: type[SAM], variant: dict[str, Any], dtype: torch.dtype, device: str, backend: str
) -> None:
    params = network(device, dtype)
    optimizer = cls(params, rho=0.5, lr=0.0, momentum=0.9, backend=backend, **variant)
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.first_step()
    assert not same_bits(params[0], before[0])
    optimizer.restore()
    assert unchanged(params, before)
    take_step(optimizer, 1)  # lr = 0
    assert unchanged(params, before)


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_first_gradient_that_is_not_finite_skips_the_step(
    value: float, device: str, backend: str
) -> None:
    params = network(device)
    optimizer = SAMDirection(params, lr=0.1, momentum=0.9, backend=backend)
    take_step(optimizer, 0)
    momentum = [optimizer.state[p]["momentum_buffer"] for p in params]
    before, momentum_before = snapshot(params), snapshot(momentum)
    set_gradients(params, 1)
    assert params[0].grad is not None
    params[0].grad[17] = value
    optimizer.first_step()
    assert unchanged(params, before)
    set_gradients(params, 2)
    optimizer.second_step()
    assert unchanged(params, before) and unchanged(momentum, momentum_before)


@everywhere
def test_what_was_perturbed_is_restored_whatever_happens_to_the_gradients(
    device: str, backend: str
) -> None:
    params = network(device)
    optimizer = SAM(params, rho=0.5, lr=0.1, backend=backend)
    before = snapshot(params)
    set_gradients(params, 0)
    params[4].grad = None
    optimizer.first_step()
    set_gradients(params, 1)
    params[0].grad = None  # perturbed, and without a second gradient
    optimizer.second_step()
    assert same_bits(params[0], before[0])
    assert not same_bits(params[2], before[2])


@everywhere
def test_a_failure_between_the_steps_leaves_the_weights(device: str, backend: str) -> None:
    params = network(device)
    optimizer = SAM(params, rho=0.5, lr=0.1, backend=backend)
    before = snapshot(params)
    set_gradients(params, 0)
    with pytest.raises(KeyError), optimizer.perturbed():
        assert not unchanged(params, before)
        raise KeyError
    assert unchanged(params, before) and not optimizer.is_perturbed


@everywhere
@pytest.mark.parametrize("destination", DEVICES)
def test_a_checkpoint_continues_on_any_device(device: str, backend: str, destination: str) -> None:
    params = network(device)
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}
    optimizer = SAM(params, rho=0.2, backend=backend, **options)
    take_step(optimizer, 0)
    saved = through_a_file(optimizer.state_dict())
    moved = [nn.Parameter(p.detach().clone().to(destination)) for p in params]
    resumed = SAM(moved, **options)
    resumed.load_state_dict(saved)
    for p in moved:
        assert resumed.state[p]["momentum_buffer"].device == p.device
    for one in (optimizer, resumed):
        take_step(one, 1)
    assert_near(params, moved)


@everywhere
def test_a_closure_makes_both_steps(device: str, backend: str) -> None:
    params = network(device)
    targets = [p.detach() + 1 for p in params]
    optimizer = SAM(params, rho=0.05, lr=0.05, backend=backend)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(((p - t) ** 2).sum() for p, t in zip(params, targets, strict=True))
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


@everywhere
def test_statistics_compare_the_two_gradients(device: str, backend: str) -> None:
    params = network(device)
    optimizer = SAM(params, lr=0.1, backend=backend, track_statistics=True)
    first = torch.cat([g.flatten() for g in set_gradients(params, 0)]).double()
    optimizer.first_step()
    second = torch.cat([g.flatten() for g in set_gradients(params, 1)]).double()
    optimizer.second_step()
    statistics = optimizer.statistics
    assert statistics is not None
    expected = [
        first.norm(),
        second.norm(),
        torch.cat([p.detach().flatten() for p in network("cpu")]).double().norm(),
        first @ second / first.norm() / second.norm(),
        (second.abs() > first.abs()).double().mean(),
        (first * second > 0).double().mean(),
    ]
    for value, exact in zip(statistics, expected, strict=True):
        assert value.device.type == device
        torch.testing.assert_close(value.double().cpu(), exact.cpu(), rtol=1e-5, atol=1e-6)


@everywhere
def test_dtypes_side_by_side(device: str, backend: str) -> None:
    weights = []
    for where, with_backend in ((device, backend), ("cpu", "reference")):
        params = network(where) + network(where, torch.bfloat16)
        optimizer = SAM(params, rho=0.2, lr=0.05, momentum=0.9, backend=with_backend)
        take_step(optimizer, 0)
        weights.append(params)
    (ours, theirs), length = weights, len(network("cpu"))
    assert_near(ours[:length], theirs[:length])
    for a, b in zip(ours[length:], theirs[length:], strict=True):
        # One rounding to bf16 may fall to the other side.
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=2**-7, atol=2**-9)


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs a GPU")
def test_cuda_and_cpu_parameters_in_one_optimizer() -> None:
    weights = []
    for second in ("cuda", "cpu"):
        params = network("cpu") + network(second)
        optimizer = SAMDirection(params, rho=0.2, lr=0.05, momentum=0.9, granularity="global")
        for seed in range(3):
            take_step(optimizer, seed)
        weights.append(params)
    assert_near(*weights)


def test_wrong_steps_are_rejected() -> None:
    """The comparison above sees a radius that is 1% off."""
    right, wrong = network("cpu"), network("cpu")
    for params, rho in ((right, 0.1), (wrong, 0.101)):
        set_gradients(params, 0)
        SAM(params, rho=rho, lr=0.05, backend="reference").first_step()
    with pytest.raises(AssertionError):
        assert_near(right, wrong)


# Capture and streams. What a GPU does with them: tests/test_cuda.py.


BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1}),
}


def begin_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.parametrize("base", BASES)
def test_a_capture_that_would_make_state_is_refused(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay would make it anew each time: momentum would start again, moments would be 0."""
    optimizer_class, options = BASES[base]
    params = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 3))]
    before = snapshot(params)
    with monkeypatch.context() as capture:
        begin_capture(capture)
        optimizer = SAM(params, optimizer_class, **options)
        set_gradients(params, 1)
        with pytest.raises(RuntimeError, match="make one step before the capture"):
            optimizer.first_step()
    assert not optimizer.is_perturbed and not optimizer.state
    optimizer.first_step()  # room for w is there; momentum or moments are not
    set_gradients(params, 2)
    with monkeypatch.context() as capture:
        begin_capture(capture)
        with pytest.raises(RuntimeError, match="make one step before the capture"):
            optimizer.second_step()
    assert unchanged(params, before) and not optimizer.is_perturbed
    assert not any(optimizer.state.values())

    take_step(optimizer, 3)
    moved = snapshot(params)
    begin_capture(monkeypatch)
    take_step(optimizer, 4)
    assert not unchanged(params, moved)


def test_a_capture_that_would_make_momentum_of_sgdhess_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = nn.Parameter(torch.randn(5))
    optimizer = SGDHess([p], lr=0.1, momentum=0.9)
    optimizer.backward((p**3).sum())
    begin_capture(monkeypatch)
    with pytest.raises(RuntimeError, match="make one step before the capture"):
        optimizer.step()
    assert not any(optimizer.state.values())


class Streams:
    """In place of CUDA's, on CPU tensors: the current stream, and what was recorded on which."""

    def __init__(self, optimizer: SAM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = "A"
        for place in optimizer._slots._places.values():
            monkeypatch.setattr(place, "has_streams", True)
        self.recorded: list[tuple[int, str]] = []
        monkeypatch.setattr(_perturbation, "current_stream", lambda device: self.current)
        monkeypatch.setattr(
            Tensor, "record_stream", lambda t, stream: self.recorded.append((t.data_ptr(), stream))
        )


@pytest.mark.parametrize("ends_with", ["second_step", "restore"])
@pytest.mark.parametrize("other", ["A", "B"])
@each_cls_and_variant
def test_what_the_first_step_left_is_recorded_on_another_stream(
    cls: type[SAM],
    variant: dict[str, Any],
    other: str,
    ends_with: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the allocator would hand it out anew while that stream still reads it."""
    params = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 3))]
    optimizer = cls(params, lr=0.1, momentum=0.9, **variant)
    take_step(optimizer, 0)
    streams = Streams(optimizer, monkeypatch)
    set_gradients(params, 1)
    first = [p.grad for p in params]
    optimizer.first_step()
    perturbation = optimizer._perturbation
    assert perturbation is not None and perturbation.ascent_square is not None
    left = [perturbation.ascent_square, *(slot.old for slot in perturbation.slots)]
    if cls is not SAM:
        left += [g for g in first if g is not None]
    if variant.get("granularity", "element") != "element":
        left += [x for _, dots in perturbation.first_dots for x in dots]
    assert not streams.recorded
    streams.current = other
    if ends_with == "second_step":
        set_gradients(params, 2)
        optimizer.second_step()
    else:
        optimizer.restore()
    expected = {(t.data_ptr(), "B") for t in left} if other == "B" else set()
    assert expected <= set(streams.recorded)
    assert other == "B" or not streams.recorded
