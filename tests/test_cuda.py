"""What only a GPU can show: streams, devices, graphs, and that nothing makes the host wait. The
tests of the ops and of the optimizers run on CUDA tensors too where there are any."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samkernels
from samkernels import SAM, SAMDirection, SAMMagnitude, backends, ops
from tests.helpers import assert_same_bits
from tests.optim_helpers import (
    parameters_of,
    same_bits,
    snapshot,
    unchanged,
)
from tests.optimizers import (
    each_cls_and_variant,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # PyTorch says so whenever a test asks it to refuse synchronisation.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

BACKENDS = [
    name
    for name in backends.BACKENDS
    if name not in ("auto", "reference")
    and backends.why_unavailable(name, torch.device("cuda")) is None
]
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
KERNELS = [name for name in BACKENDS if name != "foreach"]
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
every_base = pytest.mark.parametrize(
    ("base", "options"),
    [
        pytest.param(torch.optim.SGD, SGD, id="SGD"),
        pytest.param(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}, id="AdamW"),
    ],
)
CAPTURED = ("FriendlySAM", "GSAM", "GradientNormPenalty", "SANER", "VaSSO", "WSAM", "XSAM")
# Long enough for every multiprocessor, with odd ends, and too many tensors for one table.
SHAPES = [(3_000_001,), (1 << 20,), (512, 513), (), (0,), *[(i % 7,) for i in range(1500)]]


def draw(seed: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    like: dict[str, Any] = {"generator": generator, "device": device}
    return [torch.randn(shape, **like).to(dtype) for shape in SHAPES]


def parameters(dtype: torch.dtype = torch.float32, device: str = "cuda") -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in draw(0, dtype, device)]


def give(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient


def take_step(optimizer: SAM, first: list[Tensor], second: list[Tensor]) -> None:
    params = parameters_of(optimizer)
    give(params, first)
    optimizer.first_step()
    give(params, second)
    optimizer.second_step(zero_grad=True)


@pytest.fixture
def no_synchronisation() -> Iterator[Callable[[], None]]:
    """A function from whose call on PyTorch refuses to make the host wait."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def test_the_native_backend_is_there() -> None:
    """Without it, this file would test nothing of the kernels."""
    assert "native" in BACKENDS, backends.why_unavailable("native", torch.device("cuda"))
    assert backends.choose("auto", torch.device("cuda"))[0] == "native"


# Determinism


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_cls_and_variant
def test_twenty_runs_give_the_same_bits(
    cls: type[SAM], variant: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    first, second = draw(1, dtype), draw(2, dtype)
    expected: list[Tensor] = []
    for _ in range(20):
        params = parameters(dtype)
        optimizer = cls(params, backend=backend, track_statistics=True, **SGD, **variant)
        take_step(optimizer, first, second)
        take_step(optimizer, second, first)
        assert optimizer.statistics is not None
        found = [p.detach() for p in params] + list(optimizer.statistics)
        expected = expected or found
        assert_same_bits(found, expected)


def test_norms_do_not_depend_on_what_else_the_device_does() -> None:
    """The order in which blocks finish changes; the sums do not."""
    x = draw(3)
    alone = ops.dots(x, backend="native")
    busy = torch.cuda.Stream()
    noise = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(busy):
            noise.copy_((noise @ noise).clamp(-1, 1))
        assert_same_bits(list(ops.dots(x, backend="native")), list(alone))


# Streams and devices


@on_every_backend
@each_cls_and_variant
def test_steps_are_queued_on_the_current_stream(
    cls: type[SAM], variant: dict[str, Any], backend: str
) -> None:
    first, second = draw(1), draw(2)
    plain = parameters()
    take_step(cls(plain, backend=backend, **SGD, **variant), first, second)

    params = parameters()
    optimizer = cls(params, backend=backend, **SGD, **variant)
    late = [torch.zeros_like(g) for g in first]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(400_000_000)  # a fifth of a second: another stream would see the zeros
        torch._foreach_copy_(late, first)
        take_step(optimizer, late, second)
        if backend == "native":  # few launches: the queue of a stream holds about a thousand
            assert not stream.query(), "the step waited for the stream"
    stream.synchronize()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in plain])


@pytest.mark.parametrize("ends_with", ["second_step", "restore"])
@each_cls_and_variant
def test_the_steps_may_run_on_different_streams(
    cls: type[SAM], variant: dict[str, Any], ends_with: str
) -> None:
    """The first step's stream must not give away what the other one has yet to read: g1, the norms
    and the weights that were kept. Native only: other backends fill the queue of a stream."""
    backend = "native"
    first, second = draw(1), draw(2)
    expected = parameters()
    if ends_with == "second_step":
        take_step(cls(expected, backend=backend, **SGD, **variant), first, second)

    params = parameters()
    optimizer = cls(params, backend=backend, **SGD, **variant)
    gradients = [g.clone() for g in first]  # which nobody but the optimizer holds in the end
    sizes = [g.numel() for g in gradients]
    torch.cuda.synchronize()
    give(params, gradients)
    del gradients
    optimizer.first_step()
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        torch.cuda._sleep(400_000_000)  # a fifth of a second, in which all below is done
        if ends_with == "second_step":
            give(params, second)
            optimizer.second_step(zero_grad=True)
        else:
            optimizer.restore()
    del optimizer  # and with it the weights that were kept
    gc.collect()
    # Whatever has gone back to the first stream is taken and overwritten at once.
    taken = [torch.full((n,), float("nan"), device="cuda") for n in sizes for _ in range(3)]
    assert not other.query(), "the stream was not slow enough for this test"
    torch.cuda.synchronize()
    assert_same_bits([p.detach() for p in params], [p.detach() for p in expected])
    del taken


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@on_every_backend
def test_tensors_of_another_device_than_the_current_one(backend: str) -> None:
    weights = []
    for device in ("cuda:0", "cuda:1"):
        params = parameters(device=device)
        optimizer = SAMMagnitude(params, backend=backend, granularity="global", **SGD)
        first, second = ([g.to(device) for g in draw(seed, device="cuda:0")] for seed in (1, 2))
        give(params, first)
        with torch.cuda.device("cuda:0"):
            optimizer.first_step()
            give(params, second)
            optimizer.second_step()
            assert torch.cuda.current_device() == 0
        weights.append([p.detach().cpu() for p in params])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# The host does not wait


@pytest.mark.parametrize(
    ("backend", "lr_on_device"), [*((name, False) for name in BACKENDS), ("native", True)]
)
@every_base
@each_cls_and_variant
def test_no_step_makes_the_host_wait(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    backend: str,
    lr_on_device: bool,
    no_synchronisation: Callable[[], None],
) -> None:
    if lr_on_device:
        options = {**options, "lr": torch.tensor(0.1, device="cuda")}
    optimizer = cls(
        parameters(), base, backend=backend, track_statistics=True, **options, **variant
    )
    first, second = draw(1), draw(2)
    take_step(optimizer, first, second)  # what is made once may wait
    torch.cuda.synchronize()
    no_synchronisation()
    take_step(optimizer, second, first)


def test_the_refusal_to_wait_works(no_synchronisation: Callable[[], None]) -> None:
    value = torch.ones((), device="cuda")
    no_synchronisation()
    with pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


# Autograd


@on_every_backend
def test_autograd_notices_each_step(backend: str) -> None:
    params = parameters()
    optimizer = SAM(params, backend=backend, **SGD)
    first, second = draw(1), draw(2)
    versions = [p._version for p in params]
    give(params, first)
    optimizer.first_step()
    perturbed = [p._version for p in params]
    assert all(new > old for new, old in zip(perturbed, versions, strict=True))
    loss = sum((p * p).sum() for p in params)  # saves the perturbed weights
    give(params, second)
    optimizer.second_step()
    assert all(p._version > old for p, old in zip(params, perturbed, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Graphs


class Training:
    """A model without matrix products, whose libraries choose algorithms; its optimizer."""

    def __init__(
        self,
        cls: type[SAM],
        variant: dict[str, Any],
        base: type[torch.optim.Optimizer],
        options: dict[str, Any],
        rho_on_device: bool,
        backend: str,
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        like: dict[str, Any] = {"generator": generator, "device": "cuda"}
        self.x = torch.randn(300, 41, **like)
        self.params = [
            nn.Parameter(torch.randn(shape, **like)) for shape in [(300, 41), (41,), (300, 1), ()]
        ]
        self.lr = torch.tensor(0.1, device="cuda")
        options = {**options, "lr": self.lr}
        self.optimizer = cls(self.params, base, backend=backend, **options, **variant)
        group = self.optimizer.param_groups[0]
        self.rho = torch.tensor(0.05, device="cuda")
        if rho_on_device:
            group["rho"] = self.rho
        assert group["lr"] is self.lr

    def backward(self) -> None:
        a, b, c, d = self.params
        ((self.x * a + b).tanh() * c + d).square().mean().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.first_step()
        self.backward()
        self.optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("rho_on_device", [False, True])
@every_base
@each_cls_and_variant
def test_a_captured_step_replays_bit_for_bit(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    rho_on_device: bool,
    backend: str,
) -> None:
    eager, captured = (
        Training(cls, variant, base, options, rho_on_device, backend) for _ in range(2)
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # buffers and slots are made here
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        eager.step()
    assert unchanged(captured.params, snapshot(eager.params))

    graph = torch.cuda.CUDAGraph()
    before = snapshot(captured.params)
    with torch.cuda.graph(graph):
        captured.step()
    assert unchanged(captured.params, before)  # captured, not run
    for i in range(6):
        if i == 3:  # a graph that had copied the numbers would go on with the old ones
            for training in (eager, captured):
                training.lr.fill_(0.03)
                if rho_on_device:
                    training.rho.fill_(0.2)
        eager.step()
        graph.replay()
        torch.cuda.synchronize()
        for ours, theirs in zip(captured.params, eager.params, strict=True):
            assert same_bits(ours, theirs), f"replay {i}"
    assert not unchanged(captured.params, before)


@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_step_of_the_family_replays_bit_for_bit(name: str) -> None:
    """Those that refuse a capture: tests/test_family_capture.py."""
    cls = getattr(samkernels, name)
    test_a_captured_step_replays_bit_for_bit(cls, {}, torch.optim.SGD, SGD, True, "native")


def capture_right_after_the_first_step(base: type[torch.optim.Optimizer], **options: Any) -> None:
    """Run in a process of its own, where no test has loaded a kernel: the second step is the first
    to use some of them, and it is captured."""
    captured, eager = (Training(SAM, {}, base, options, False, "native") for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    eager.step()
    assert unchanged(captured.params, snapshot(eager.params))  # captured, not run
    for i in range(4):
        eager.step()
        graph.replay()
        torch.cuda.synchronize()
        for ours, theirs in zip(captured.params, eager.params, strict=True):
            assert same_bits(ours, theirs), f"replay {i}"
            states = (t.optimizer.state[p] for t, p in ((captured, ours), (eager, theirs)))
            for x, y in zip(*(state.values() for state in states), strict=True):
                assert same_bits(x, y), f"state after replay {i}"


@every_base
def test_one_step_is_warm_up_enough_for_a_capture(
    base: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    code = (
        "import torch\n"
        "from tests.test_cuda import capture_right_after_the_first_step as capture\n"
        f"capture(torch.optim.{base.__name__}, **{options!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "CUDA_MODULE_LOADING": "LAZY", "SAMKERNELS_NO_EMULATION": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("backend", KERNELS)
@every_base
def test_capturing_the_first_step_is_refused(
    base: type[torch.optim.Optimizer], options: dict[str, Any], backend: str
) -> None:
    """It makes the state: a replay would make it anew each time."""
    refused, plain = (Training(SAM, {}, base, options, False, backend) for _ in range(2))
    before = snapshot(refused.params)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as autograd wants it: so it is the step that is refused
        refused.backward()
    torch.cuda.current_stream().wait_stream(stream)
    refused.optimizer.zero_grad()
    with (
        pytest.raises(RuntimeError, match="make one step before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        refused.step()
    assert not refused.optimizer.is_perturbed
    assert unchanged(refused.params, before)
    for training in (refused, plain):
        training.optimizer.zero_grad()  # those of the capture were never computed
        training.step()
    assert unchanged(refused.params, snapshot(plain.params))


@pytest.mark.parametrize("backend", KERNELS)
@every_base
def test_a_gradient_that_is_not_finite_skips_a_replay(
    base: type[torch.optim.Optimizer], options: dict[str, Any], backend: str
) -> None:
    training = Training(SAMDirection, {}, base, options, rho_on_device=True, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.step()
    graph.replay()
    state = [x for p in training.params for x in training.optimizer.state[p].values()]
    before, finite = snapshot([*training.params, *state]), training.x.clone()
    training.x[17, 3] = float("nan")
    graph.replay()
    assert unchanged([*training.params, *state], before)
    training.x.copy_(finite)
    graph.replay()
    assert not unchanged(training.params, before)


@on_every_backend
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"fused": True}], ids=str)
def test_an_adamw_checkpoint_with_its_counts_on_the_host_or_the_device(
    options: dict[str, Any], backend: str
) -> None:
    """The count moves to the parameters, and torch.optim goes on from there."""
    weights = []
    for goes_through_sam in (False, True):
        params = parameters()
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, lr=0.01, **options)
        for seed in range(9):
            if goes_through_sam and seed in (3, 6):
                checkpoint = optimizer.state_dict()
                if seed == 3:
                    optimizer = SAM(params, torch.optim.AdamW, 0.0, lr=9.0, backend=backend)
                else:
                    optimizer = torch.optim.AdamW(params, lr=9.0)
                optimizer.load_state_dict(checkpoint)
            if isinstance(optimizer, SAM):
                take_step(optimizer, draw(99), draw(seed))
                assert all(optimizer.state[p]["step"].device == p.device for p in params)
            else:
                give(params, draw(seed))
                optimizer.step()
            assert all(optimizer.state[p]["step"].item() == seed + 1 for p in params)
        weights.append(params)
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)
