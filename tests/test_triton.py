"""The Triton backend around its kernels: what they are compiled to, when they are compiled again,
tables, the journal, and life without Triton.

The ops are in test_ops.py: on "interpreted", and on "triton" where there is a GPU."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import backends, ops
from samkernels.backends import AdamOptions, Mix, SgdOptions, foreach, native, triton
from samkernels.backends.contract import FUNCTIONS
from samkernels.backends.triton import availability, launching, tables
from samkernels.backends.triton.availability import load_kernels
from tests import compiled
from tests.helpers import Slot, assert_same_bits, copies, make_list
from tests.test_backends import run_python

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ARCHITECTURES = (80, 90)
INTERPRETED: Any = backends._MODULES.get("interpreted")  # tests/stand_ins.py

on_the_interpreter = pytest.mark.usefixtures("interpreted_kernels")
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def tensors(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = (3, 5000)) -> list[Tensor]:
    return [torch.ones(n, dtype=dtype) for n in sizes]


def sgd_options(**options: Any) -> SgdOptions:
    defaults: dict[str, Any] = {
        "lr": 0.1,
        "momentum": 0.9,
        "dampening": 0.1,
        "weight_decay": 0.1,
        "nesterov": True,
        "maximize": False,
        "init_momentum": False,
    }
    return SgdOptions(**{**defaults, **options})


def adam_options(**options: Any) -> AdamOptions:
    defaults: dict[str, Any] = {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "decoupled": True,
        "maximize": False,
    }
    return AdamOptions(**{**defaults, **options})


# What the kernels are compiled to


class Lists:
    """Calls of every kernel: (call, lists that it reads, lists that it writes)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.w, self.g1, self.g2, self.old, self.buffer, self.squares = (
            tensors(dtype) for _ in range(6)
        )
        self.number, self.numbers = torch.ones(()), torch.ones(2)
        self.square = torch.ones((), dtype=torch.float64)
        self.steps = [torch.zeros(()), torch.zeros((), dtype=torch.float64)]
        # With all that makes the arithmetic longer.
        of_each: dict[str, Any] = {"a": self.numbers, "b": self.numbers, "divisor": self.number}
        of_each |= {"ascent_square": self.square, "found_inf": self.number}
        self.mixes = {"x": Mix(self.g2, **of_each)}
        for function in FUNCTIONS:
            self.mixes[function] = Mix(self.g1, self.g2, function=function, **of_each)
        self.calls: dict[str, tuple[Callable[[], Any], int, int]] = {
            "dots, x": (lambda: triton.dots([self.g1]), 1, 0),
            "dots, weights": (lambda: triton.dots([self.g1], self.w, 0.1), 2, 0),
            "dots, xy": (lambda: triton.dots([self.g1, self.g2]), 2, 0),
            "dots, xyz": (lambda: triton.dots([self.g1, self.g2, self.w]), 3, 0),
            "restore": (lambda: triton.restore_(self.w, self.old), 1, 1),
            "perturb": (lambda: self.perturb(0.1), 2, 2),
            "perturb, eta": (lambda: self.perturb(self.number, eta=0.1), 2, 2),
            "perturb, of each": (lambda: self.perturb(self.numbers, per_tensor=True), 2, 2),
            "perturb, saved": (lambda: self.perturb(0.1, eta=0.1, saves=False), 2, 1),
            "perturb, at random": (lambda: self.perturb(0.1, at_random=True), 2, 2),
        }
        for name, mix in self.mixes.items():
            reads = 1 + (name != "x")
            self.calls[f"mix, {name}"] = (self.mix(mix), reads, 1)
            self.calls[f"sgd, {name}"] = (self.sgd(mix, None), reads + 1, 1)
            self.calls[f"sgd, {name}, init"] = (self.sgd(mix, True), reads + 1, 2)
            self.calls[f"sgd, {name}, running"] = (self.sgd(mix, False), reads + 2, 2)
            self.calls[f"adam, {name}"] = (self.adam(mix, True), reads + 3, 3)
            self.calls[f"adam, {name}, decay"] = (self.adam(mix, False), reads + 3, 3)

        for name, init in (("", None), (", init", True), (", running", False)):
            writes = 1 if init is None else 2
            self.calls[f"sgd_hess{name}"] = (self.sgd_hess(init), 3 + (init is False), writes)

        bare = Mix(self.g2)
        options = sgd_options(
            lr=self.number, weight_decay=0.0, nesterov=False, one_minus_dampening=self.number
        )
        self.calls["mix, bare"] = (self.mix(bare), 1, 1)
        self.calls["sgd, bare"] = (
            lambda: triton.sgd_(self.w, self.old, self.buffer, bare, options),
            3,
            2,
        )

    def perturb(
        self,
        rho: Any,
        *,
        eta: float | None = None,
        journal: list[bool] | None = None,
        at_random: bool = False,
        per_tensor: bool = False,
        saves: bool = True,
    ) -> None:
        triton.perturb_(
            self.w,
            self.g1,
            self.old,
            square=self.square.expand(2) if per_tensor else self.square,
            rho=rho,
            eta=eta,
            eps=1e-12,
            rounds_at_random=at_random,
            journal=journal,
            saves=saves,
        )

    def mix(self, mix: Mix) -> Callable[[], None]:
        return lambda: triton.mix_(self.g2, mix)

    def adam(self, mix: Mix, decoupled: bool) -> Callable[[], None]:
        options = adam_options(decoupled=decoupled, lr=self.number if decoupled else 0.1)
        lists = (self.w, self.old, self.buffer, self.squares, self.steps)
        return lambda: triton.adam_(*lists, mix, options)

    def sgd(self, mix: Mix, init: bool | None) -> Callable[[], None]:
        buffer = None if init is None else self.buffer
        options = sgd_options(nesterov=init is not None, init_momentum=init is True)
        return lambda: triton.sgd_(self.w, self.old, buffer, mix, options)

    def sgd_hess(self, init: bool | None) -> Callable[[], None]:
        buffer = None if init is None else self.buffer
        options = sgd_options(nesterov=init is not None, init_momentum=init is True)
        return lambda: triton.sgd_hess_(self.w, self.g1, self.g2, buffer, 0.1, options)


# Every kernel in float32, and in half precision one of each kind, the longest: these every day.
LONGEST = (
    "dots, weights", "dots, xy", "dots, xyz", "restore", "perturb, eta", "perturb, saved",
    "perturb, at random", "mix, damp", "sgd, damp, running", "sgd_hess, running",
    "adam, damp, decay",
)  # fmt: skip
COMPILED = [
    *(
        pytest.param(torch.float32, name, marks=[] if name in LONGEST else pytest.mark.full)
        for name in Lists(torch.float32).calls
    ),
    *((torch.bfloat16, name) for name in LONGEST),
    *(pytest.param(torch.float16, name, marks=pytest.mark.full) for name in LONGEST),
]


def compiled_code(arch: int, call: Callable[[], Any]) -> tuple[compiled.Code, Any]:
    with compiled.gpu(arch) as gpu:
        call()
    kernels = [compiled.kernel_of(load_kernels(), launched, arch) for launched in gpu.launches]
    assert len(kernels) == 1 or [k.name for k in kernels] == ["count_steps", "adam_step"]
    return compiled.code_of(kernels[-1]), kernels[-1]


@every_architecture
@pytest.mark.parametrize(("dtype", "name"), COMPILED)
def test_kernels_are_compiled_to_vectors_without_spills(
    dtype: torch.dtype, name: str, arch: int
) -> None:
    call, reads, writes = Lists(dtype).calls[name]
    code, kernel = compiled_code(arch, call)
    assert kernel.metadata.target.arch == arch
    assert code.local_bytes == 0
    is_sum = name.startswith("dots")
    launch = launching.SUM_LAUNCH if is_sum else launching.DEFAULT_LAUNCH
    per_thread = launch.block * dtype.itemsize // (launch.warps * 32)
    assert 16 * code.count("ld.global.v4.b32") == reads * per_thread
    assert 16 * code.count("st.global.v4.b32") == writes * per_thread
    # The bits of the reference: rounded after every operation, and nothing flushed to zero.
    assert "fma.rn.f32" not in code.ptx and "mad.rn.f32" not in code.ptx
    assert ".ftz" not in code.ptx and ".approx" not in code.ptx and "div.full" not in code.ptx
    # Deterministic: atomic operations count, on integers.
    assert code.ptx.count("atom.") == code.ptx.count("atom.global.gpu.acq_rel.add.u32")
    assert ("atom." in code.ptx) == is_sum


@every_architecture
def test_steps_are_counted_in_double_precision_as_ieee_has_it(arch: int) -> None:
    call, _, _ = Lists(torch.float32).calls["adam, x"]
    with compiled.gpu(arch) as gpu:
        call()
    kernel = compiled.kernel_of(load_kernels(), gpu.launches[0], arch)
    code = compiled.code_of(kernel)
    assert kernel.name == "count_steps"
    assert code.local_bytes == 0
    assert code.count("mul.rn.f64") + code.count("mul.f64") >= 4  # power and square, for two betas
    assert code.count("sqrt.rn.f64") == 1
    assert "fma.rn.f64" not in code.ptx and ".ftz" not in code.ptx and ".approx" not in code.ptx


@every_architecture
@pytest.mark.parametrize(
    "name", ["sgd, sign, running", "sgd, damp, running", "adam, linear, decay", "adam, damp, decay"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_block_size_spills(
    dtype: torch.dtype, name: str, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, reads, _ = Lists(dtype).calls[name]
    for launch in {*launching.LAUNCHES.values(), *launching.CANDIDATES}:
        monkeypatch.setattr(launching, "DEFAULT_LAUNCH", launch)
        launching.untuned.cache_clear()
        try:
            code, kernel = compiled_code(arch, call)
        finally:
            launching.untuned.cache_clear()
        assert kernel.metadata.num_warps == launch.warps
        assert code.local_bytes == 0
        assert code.count("ld.global.v4.b32") >= reads


# When they are compiled again


def test_nothing_is_compiled_again_for_other_numbers() -> None:
    def step(sizes: tuple[int, ...], rho: float, lr: float, **options: Any) -> None:
        # Views of all alignments, norms included.
        w, g1, g2, old, buffer, squares = ([torch.ones(n + i)[i:] for n in sizes] for i in range(6))
        number, square = torch.ones(8)[len(sizes) % 3], torch.ones(8).double()[len(sizes) % 3]
        per_tensor = torch.ones(len(sizes) + 1)[1:]
        for lists in ([g1], [g1, g2], [g1, g2, w]):
            triton.dots(lists)
        triton.dots([g1], w, rho)
        for journal in (None, []):
            for radius in (rho, per_tensor):
                triton.perturb_(
                    w,
                    g1,
                    old,
                    square=square,
                    rho=radius,
                    eta=lr,
                    eps=rho / 7,
                    rounds_at_random=False,
                    journal=journal,
                )
        triton.restore_(w, old)
        mix = Mix(g1, g2, rho, per_tensor, divisor=number, ascent_square=square)
        triton.mix_(g2, mix, keeps=bool(options))
        triton.sgd_(w, old, buffer, mix, sgd_options(lr=lr, **options))
        kernels = [x[: n // 9 * 9].view(-1, 1, 3, 3) for x, n in zip(w, sizes, strict=True)]
        for ws in (w, kernels):
            lists = [[x.clone() for x in ws] for _ in range(2)]
            triton.sgd_hess_(ws, *lists, None, rho, sgd_options(lr=lr, **options))
        decays = {"weight_decay": rho + 1, "eps": lr, "beta1": rho / 7, "beta2": lr}
        adam = adam_options(lr=lr, maximize=options.get("maximize", False), **decays)
        triton.adam_(w, old, buffer, squares, [torch.zeros(()) for _ in w], mix, adam)

    with compiled.gpu(90) as gpu:
        step((3, 5000), 0.05, 0.1)
        before = len(gpu.launches)
        del gpu.compilations[:]
        step((1,), 1, 1, momentum=1, dampening=0, weight_decay=1)
        step((16, 32, 48), 0.0, 0.0, momentum=0.5, maximize=True)
        step((16384 * 17, 0, 7), 1e30, 1e-30, dampening=1.0, weight_decay=1e-4)
        assert len(gpu.launches) == 4 * before
        assert gpu.compilations == []
        # It does count.
        load_kernels().restore.device_caches[gpu.get_current_device()][0].clear()
        triton.restore_(tensors(), tensors())
        (compilation,) = gpu.compilations
        assert compilation.endswith("restore")


# The journal


def test_the_journal_is_written_by_the_launch_itself() -> None:
    """By a function written in C that Triton's launcher calls from C: see launching.run_over."""
    lists, journal = Lists(torch.float32), []
    with compiled.gpu(90) as gpu:
        lists.perturb(0.25)
        lists.perturb(0.25, journal=journal)
    without, with_journal = gpu.launches
    assert journal == [True]
    assert isinstance(with_journal.enter_hook, types.BuiltinFunctionType)
    assert with_journal.enter_hook.__self__ is journal
    assert with_journal.handle is without.handle
    assert with_journal.programs == without.programs == 1 + 3
    for one, other in zip(with_journal.arguments, without.arguments, strict=True):
        assert one is other or one == other


def test_the_journal_stays_empty_if_there_is_no_launch() -> None:
    lists, journal = Lists(torch.float32), []
    lists.w[1].untyped_storage().resize_(0)
    with compiled.gpu(90) as gpu, pytest.raises(ValueError, match=r"params\[1\] has no memory"):
        lists.perturb(0.25, journal=journal)
    assert journal == [] and gpu.launches == []


# Alignment: one list that is off by an element rules vectors out. tests/interpreted.py checks every
# address that Triton is told to be a multiple of 16 bytes.

ALIGNED = [Slot((8192,))]
MISALIGNED = [Slot((8192,), offset=1)]


@on_the_interpreter
@pytest.mark.parametrize("which", range(6))
def test_the_alignment_of_every_list_counts(which: int) -> None:
    results = []
    for odd in (ALIGNED, MISALIGNED):
        w, g1, g2, old, buffer, squares = (
            make_list(odd if i == which else ALIGNED, torch.float32, seed=i) for i in range(6)
        )
        torch._foreach_abs_(squares)
        options = {"backend": "interpreted"}
        sums = [*ops.dots(g1, weights=w, **options), *ops.dots(g1, g2, w, **options)]
        ops.perturb_(w, g1, old, rho=0.1, **options)
        perturbed = copies(w)
        for function in FUNCTIONS:
            mix = Mix(g1, g2, 0.7, 0.3 if function == "linear" else 1.0, function)
            ops.sgd_(w, old, mix, buffer, lr=0.1, momentum=0.9, **options)
            state = buffer, squares, [torch.zeros(())]
            ops.adam_(w, old, mix, *state, lr=0.1, eps=0.1, **options)
            ops.mix_(g2, mix, **options)
        updated = copies(w)
        ops.restore_(w, old, **options)
        results.append([*sums, *perturbed, *updated, *w, *g2, *buffer, *squares])
    assert_same_bits(*results)


# Hyperparameters on the device


@on_the_interpreter
def test_radius_and_learning_rate_may_be_on_the_device() -> None:
    results = []
    for number in (float, torch.tensor):
        slots = [Slot((17,)), Slot((2049,), offset=1)]
        w, g, old, buffer = (make_list(slots, torch.float32, seed=i) for i in range(4))
        options: dict[str, Any] = {"eta": 0.0, "eps": 1e-12, "journal": None}
        options |= {"square": torch.tensor(9.0).double(), "rounds_at_random": False}
        INTERPRETED.perturb_(w, g, old, rho=number(0.05), **options)
        perturbed = copies(w)
        INTERPRETED.sgd_(w, old, buffer, Mix(g), sgd_options(lr=number(0.1)))
        assert not torch.equal(perturbed[0], old[0]) and not torch.equal(perturbed[0], w[0])
        results.append([*perturbed, *w, *buffer])
    assert_same_bits(*results)


# Sums of many chunks, and of many tensors


@on_the_interpreter
def test_sums_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(INTERPRETED.launching, "SUM_CHUNK", 32)
    monkeypatch.setattr(INTERPRETED.launching, "SUM_LAUNCH", launching.Launch(8, 1))
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 32 * 21 + 5, 0, *(range(1, 20)))
    first, second, w = ([torch.randn(n, generator=generator) for n in sizes] for _ in range(3))
    for lists in ((first,), (first, second), (first, second, w)):
        measured = ops.dots(*lists, backend="interpreted")
        expected = ops.dots(*lists, backend="reference")
        for sums, those in zip(measured, expected, strict=True):
            torch.testing.assert_close(sums, those, rtol=1e-14, atol=1e-13)


# Tables


def test_tables_are_made_on_the_host_whatever_the_default_device() -> None:
    with torch.device("meta"):
        plan = tables.plan_of.__wrapped__(CPU, 0, (5, 4), 4)
        place = tables.place.__wrapped__(CPU, 0, (16, 32))
    assert plan.device == place.device == CPU
    assert plan[:, 0].tolist() == [0, 0, 1] and place.tolist() == [16, 32]


def test_plan() -> None:
    plan = tables.plan_of.__wrapped__(CPU, 0, (5, 0, 4, 9), 4)
    assert plan.tolist() == [
        [0, 0, 4, 0, 2],
        [0, 4, 1, 0, 2],
        [1, 0, 0, 2, 1],
        [2, 0, 4, 3, 1],
        [3, 0, 4, 4, 3],
        [3, 4, 4, 4, 3],
        [3, 8, 1, 4, 3],
    ]


def test_offsets_beyond_int32() -> None:
    plan = tables.plan_of.__wrapped__(CPU, 0, (2**33 + 1,), 2**31)
    assert plan.tolist()[-1] == [0, 2**33, 1, 0, 5]


def test_tables_are_kept_until_an_address_or_a_size_changes() -> None:
    lists = {"a": tensors(), "b": tensors()}
    plan, addresses, chunks, _ = tables.table_of(lists, 4096)
    assert chunks == 3
    assert addresses.tolist() == [
        t.data_ptr() for pair in zip(*lists.values(), strict=True) for t in pair
    ]
    again = tables.table_of({name: list(ts) for name, ts in lists.items()}, 4096)
    assert again.plan is plan and again.addresses is addresses
    moved = tables.table_of({"a": lists["a"], "b": tensors()}, 4096)
    assert moved.plan is plan and moved.addresses is not addresses
    resized = tables.table_of({"a": tensors(sizes=(4, 5000))}, 4096)
    assert resized.plan is not plan


@pytest.fixture
def staging(monkeypatch: pytest.MonkeyPatch) -> tables.CaptureStaging:
    """Memory for captures, with room for 4 numbers; as if a graph was being captured."""
    staging = tables.CaptureStaging(min_room=4)
    monkeypatch.setattr(tables, "capture_staging", staging)
    monkeypatch.setattr(tables, "pinned", lambda values: values.clone())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    return staging


def upload(*values: int) -> None:
    device = torch.device("meta")  # any that is not the CPU
    on_device = tables.upload(torch.tensor(values), device)
    assert on_device.device == device and on_device.shape == (len(values),)


def test_what_a_graph_copies_from_is_never_written_again(staging: tables.CaptureStaging) -> None:
    staging.hold_ready()  # by a step outside of the capture: 8 numbers
    upload(1, 2, 3)
    upload(4, 5)
    with pytest.raises(RuntimeError, match="once outside of a capture"):
        upload(6, 7, 8, 9)
    staging.hold_ready()
    upload(6, 7, 8, 9)
    first, second = staging.buffers
    assert first[:5].tolist() == [1, 2, 3, 4, 5]
    assert second[:4].tolist() == [6, 7, 8, 9]


def test_captures_need_a_step_before(staging: tables.CaptureStaging) -> None:
    with pytest.raises(RuntimeError, match="once outside of a capture"):
        upload(1)


def test_memory_for_captures_grows_with_the_tables(staging: tables.CaptureStaging) -> None:
    staging.hold_ready()
    (unused,) = staging.buffers
    with pytest.raises(RuntimeError, match="once outside of a capture"):
        upload(*range(9))
    staging.hold_ready()
    for _ in range(10):
        upload(*range(9))
    (buffer,) = staging.buffers
    assert buffer is not unused
    assert buffer[:90].tolist() == 10 * list(range(9))


def test_outside_of_a_capture_the_memory_for_captures_is_not_touched(
    staging: tables.CaptureStaging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    upload(1, 2, 3)
    assert staging.taken == 0 and staging.buffers == []


@pytest.mark.skipif(
    backends.why_unavailable("triton", CUDA) is not None, reason="no GPU for Triton"
)
def test_a_captured_step_is_replayed() -> None:
    w, g, old = ([torch.ones(n, device=CUDA) for n in (3, 5000)] for _ in range(3))
    options: dict[str, Any] = {
        "rho": 1.0,
        "square": torch.ones((), dtype=torch.float64, device=CUDA),
    }
    ops.perturb_(w, g, old, **options, backend="triton")
    ops.restore_(w, old, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.perturb_(w, g, old, **options, backend="triton")
    tables.plan_of.cache_clear()
    tables.place.cache_clear()
    for steps in range(1, 4):
        graph.replay()
        assert all(bool((x == 1 + steps).all()) for x in w)


# Block sizes


def test_tuning_takes_the_fastest_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "tuned", {})
    fastest = launching.CANDIDATES[3]
    tried = []

    def seconds(step: Callable[[], None]) -> float:
        step()
        tried.append(launching.tuned[CPU, torch.float32])
        return float(tried[-1] != fastest)

    with compiled.gpu(90) as gpu:
        assert triton.tune(CPU, numel=3, seconds=seconds) == fastest
        assert tuple(tried) == launching.CANDIDATES
        assert triton.tune(CPU, seconds=seconds) == fastest
        assert len(tried) == len(launching.CANDIDATES), "measured once"
        del gpu.launches[:]
        a, b = (tensors(sizes=(fastest.block * 2 + 1,)) for _ in range(2))
        triton.restore_(a, b)
        triton.dots([a])
        assert [launch.programs for launch in gpu.launches] == [3, 1], "sums are not tuned"


@on_the_interpreter
def test_the_interpreter_is_not_tuned() -> None:
    def seconds(step: Callable[[], None]) -> float:
        raise AssertionError("measured")

    assert INTERPRETED.tune(CPU, seconds=seconds) == launching.DEFAULT_LAUNCH


# The choice


def test_auto_on_cuda_prefers_native_then_triton_then_foreach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = []
    for module in (None, native, triton):
        if module is not None:
            monkeypatch.setattr(module, "why_unavailable", lambda *_: "not here")
        else:
            for one in (native, triton, foreach):
                monkeypatch.setattr(one, "why_unavailable", lambda *_: None)
        chosen.append(backends.choose("auto", CUDA, torch.float32)[0])
    assert chosen == ["native", "triton", "foreach"]


@pytest.mark.parametrize(
    ("device", "dtype", "dense", "reason"),
    [
        ("cpu", torch.float32, True, "compiles for GPUs"),
        ("cuda", torch.float64, True, r"no Triton kernels for torch\.float64"),
        ("cuda", torch.float32, False, "without gaps or overlap"),
        ("meta", torch.float32, True, "no Triton kernels for meta"),
    ],
)
def test_triton_says_why_it_cannot_serve(
    device: str, dtype: torch.dtype, dense: bool, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=rf'backend="triton" cannot serve .*{reason}'):
        backends.choose("triton", torch.device(device), dtype, dense)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_says_that_there_is_no_gpu() -> None:
    assert backends.why_unavailable("triton", CUDA) == "PyTorch sees no CUDA device"


def test_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for capability, reason in (((7, 5), "and this GPU has 7.5"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        availability.why_no_gpu.cache_clear()
        found = triton.why_unavailable(CUDA, torch.float32, True)
        availability.why_no_gpu.cache_clear()
        assert found == reason if reason is None else reason in str(found)


def test_old_versions_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, reason in (("3.2.0", "Triton 3.2.0 is too old"), ("3.10.0+git1", None)):
        monkeypatch.setattr(load_kernels().triton, "__version__", version)
        availability.why_no_triton.cache_clear()
        found = availability.why_no_triton()
        availability.why_no_triton.cache_clear()
        assert found is None if reason is None else str(found).startswith(reason)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("triton", "Triton is not installed"), ("triton.language", "Triton could not be imported")],
)
def test_without_triton_the_import_works_and_the_reason_is_given(missing: str, reason: str) -> None:
    printed = run_python(
        f"""
import sys
sys.modules[{missing!r}] = None
import torch
from samkernels import SAM, backends
cuda = torch.device("cuda")
print(backends.why_unavailable("triton", cuda))
print(backends.choose("auto", torch.device("cpu"))[0])
"""
    )
    assert printed.splitlines()[0].startswith(reason)
    assert printed.splitlines()[1] == "native"


def test_triton_is_imported_when_it_is_needed() -> None:
    printed = run_python(
        """
import sys
import torch
from samkernels import SAM, backends, ops
ops.dots([torch.ones(3)])
backends.why_unavailable("triton", torch.device("cpu"))
print("triton" in sys.modules)
backends.why_unavailable("triton", torch.device("cuda"))
print("triton" in sys.modules)
"""
    )
    assert printed.split() == ["False", "True"]


def test_the_interpreter_serves_cpu_tensors_if_asked_by_name() -> None:
    printed = run_python(
        """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["samkernels._C"] = None
import torch
from samkernels import backends, ops
print(backends.choose("auto", torch.device("cpu"))[0])
print(backends.choose("triton", torch.device("cpu"))[0])
torch.cuda.is_available = lambda: True
print(backends.why_unavailable("triton", torch.device("cuda")))
print(ops.dots([torch.tensor([3.0, 4.0])], backend="triton").total.item())
"""
    )
    auto, named, cuda, square = printed.splitlines()
    assert (auto, named, square) == ("foreach", "triton", "25.0")
    assert "serves CPU tensors only" in cuda
