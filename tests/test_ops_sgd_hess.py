"""sgd_hess_ on every backend, device and dtype: against the reference, and numbers by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import ops
from samkernels.backends.contract import positions_of
from samkernels.ops import Mix
from tests.helpers import (
    CHANNELS_LAST,
    CHUNK_SIZE,
    LAYOUTS,
    LISTS,
    SETTINGS,
    SPATIAL,
    Setting,
    Slot,
    assert_equal,
    assert_near,
    assert_same_bits,
    copies,
    doubles,
    make_list,
    rejects,
    unit_roundoff,
)
from tests.test_ops import (
    SGD_OPTIONS,
    SGD_ROUNDINGS,
    every_setting,
    in_setting_and_in_reference,
    native_on_cpu,
)

RHO = 0.5
# rho, rho * D, 1 +, g *; D: one for each position, and the division.
HESS_ROUNDINGS = SGD_ROUNDINGS + 5

# Longer than a chunk of the CUDA kernels: not for the interpreter, which would take minutes.
# And kernels that the blocks of the CPU ops cut, into rows of few columns and into few rows.
LONG = [
    *(Slot((1, 2, 3, 3000), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST)),
    *(Slot((3, 3, 16, 16), order=order) for order in ((0, 1, 2, 3), CHANNELS_LAST)),
    *(Slot((70, 40, 3, 3), order=order, offset=1) for order in (CHANNELS_LAST, (2, 3, 0, 1))),
]
SMALL = [slot for slot in SPATIAL if max(slot.shape) < 600 and slot.shape[1] < 64]
ALL_LISTS = {**LISTS, "spatial": SPATIAL}

every_kernel = pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s.backend not in ("foreach", "reference")], ids=str
)


class Lists:
    """The tensor lists of the op, in a setting."""

    def __init__(self, slots: list[Slot], setting: Setting) -> None:
        self.params, self.grads, self.products, self.momentum_buffers = (
            make_list(slots, setting.dtype, setting.device, seed) for seed in range(4)
        )

    def assert_guards_intact(self) -> None:
        for tensors in vars(self).values():
            tensors.assert_intact()


def curvature(product: Tensor) -> Tensor:
    """D by its definition, in the dtype of the product."""
    if product.dim() != 4:
        return product.abs()
    return product.abs().mean((2, 3), keepdim=True).expand_as(product)


def check_sgd_hess(
    op: Callable[..., None], slots: list[Slot], setting: Setting, **options: Any
) -> None:
    """Against ops.sgd_ in float64, with u from the definition."""
    lists = Lists(slots, setting)
    unwritten = copies([*lists.grads, *lists.products])
    w, g, hv, buf = map(
        doubles, (lists.params, lists.grads, lists.products, lists.momentum_buffers)
    )
    new, new_buf = copies(w), copies(buf)
    op(
        lists.params,
        lists.grads,
        lists.products,
        lists.momentum_buffers,
        lr=0.1,
        rho=RHO,
        backend=setting.backend,
        **options,
    )
    u = [g_ * (1 + RHO * curvature(hv_)) for g_, hv_ in zip(g, hv, strict=True)]
    ops.sgd_(new, w, Mix(u), new_buf, lr=0.1, backend="reference", **options)

    momentum, decay = options.get("momentum", 0), options.get("weight_decay", 0)
    buf_sizes = [
        u_.abs() + decay * w_.abs() + momentum * b_.abs()
        for u_, w_, b_ in zip(u, w, buf, strict=True)
    ]
    sizes = [w_.abs() + 0.1 * (1 + momentum) * size for w_, size in zip(w, buf_sizes, strict=True)]
    positions = max([x[0] for p in w if (x := positions_of(p)) is not None], default=1)
    assert_near(lists.params, new, sizes, HESS_ROUNDINGS + positions)
    if momentum == 0:
        assert_equal(lists.momentum_buffers, buf)
    else:
        assert_near(lists.momentum_buffers, new_buf, buf_sizes, HESS_ROUNDINGS + positions)
    assert_same_bits([*lists.grads, *lists.products], unwritten)
    lists.assert_guards_intact()


@every_setting
@pytest.mark.parametrize("slots", ALL_LISTS.values(), ids=ALL_LISTS)
def test_every_list(slots: list[Slot], setting: Setting) -> None:
    check_sgd_hess(ops.sgd_hess_, slots, setting, **SGD_OPTIONS["nesterov"])


@every_setting
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
def test_every_option(setting: Setting, options: dict[str, Any]) -> None:
    check_sgd_hess(ops.sgd_hess_, [*LAYOUTS, *SMALL], setting, **options)


@every_kernel
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
def test_kernels_do_as_the_reference_bit_for_bit(setting: Setting, options: dict[str, Any]) -> None:
    check_bits(setting, [*LAYOUTS, *SMALL, Slot((CHUNK_SIZE + 1,), offset=1)], options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["native", "emulated"])
def test_long_kernels_as_the_reference_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    check_bits(Setting("cpu", backend, dtype), LONG, SGD_OPTIONS["nesterov"])


@every_kernel
def test_long_lists_as_the_reference_bit_for_bit(setting: Setting) -> None:
    check_bits(setting, SPATIAL, SGD_OPTIONS["nesterov"])


def check_bits(setting: Setting, slots: list[Slot], options: dict[str, Any]) -> None:
    results = []
    for one in in_setting_and_in_reference(setting):
        lists = Lists(slots, one)
        ops.sgd_hess_(
            lists.params,
            lists.grads,
            lists.products,
            lists.momentum_buffers,
            lr=0.1,
            rho=RHO,
            backend=one.backend,
            **options,
        )
        results.append(lists.params + lists.momentum_buffers)
    assert_equal(*results)


@native_on_cpu
def test_threads_change_no_bit(setting: Setting, threads: int) -> None:
    check_bits(setting, [*SPATIAL, *LONG, Slot((3 * CHUNK_SIZE + 5,))], SGD_OPTIONS["momentum"])


def test_by_hand() -> None:
    w, buf = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    g, hv = torch.tensor([2.0, 3.0]), torch.tensor([-1.5, 0.5])
    ops.sgd_hess_(
        [w], [g], [hv], [buf], lr=0.5, rho=2.0, momentum=0.5, weight_decay=1.0, backend="reference"
    )
    # u = g (1 + 2 |hv|) + w = (8 + 1, 6 - 2);  buf = 0.5 buf + u = (9.25, 4.5);  w -= 0.5 buf
    assert buf.tolist() == [9.25, 4.5]
    assert w.tolist() == [-3.625, -4.25]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_spatial_mean_by_hand(memory_format: torch.memory_format) -> None:
    hv = torch.tensor([[1.0, -2.0], [3.0, -6.0]])  # mean of the absolute values: 3
    products = torch.stack([hv, 2 * hv])[None].contiguous(memory_format=memory_format)
    grads = torch.ones_like(products)
    for backend in ("reference", "foreach", "native"):
        w = torch.zeros_like(products)
        ops.sgd_hess_([w], [grads], [products], lr=1.0, rho=1.0, backend=backend)
        assert w[0, 0].tolist() == [[-4.0, -4.0], [-4.0, -4.0]]
        assert w[0, 1].tolist() == [[-7.0, -7.0], [-7.0, -7.0]]


@every_setting
def test_rho_and_lr_as_tensors(setting: Setting) -> None:
    dtype = torch.float64 if setting.dtype is torch.float64 else torch.float32
    results = []
    for as_tensor in (False, True):
        lr, rho = (
            torch.tensor(x, dtype=dtype, device=setting.device) if as_tensor else x
            for x in (0.1, RHO)
        )
        lists = Lists([*LAYOUTS, *SMALL], setting)
        ops.sgd_hess_(
            lists.params, lists.grads, lists.products, lr=lr, rho=rho, backend=setting.backend
        )
        results.append(lists.params)
    assert_same_bits(*results)


@every_setting
def test_rho_0_is_sgd_bit_for_bit(setting: Setting) -> None:
    slots = [*LAYOUTS, *SMALL, Slot((CHUNK_SIZE + 1,), offset=1)]
    lists, plain = Lists(slots, setting), Lists(slots, setting)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    options["backend"] = setting.backend
    ops.sgd_hess_(
        lists.params, lists.grads, lists.products, lists.momentum_buffers, rho=0, **options
    )
    ops.sgd_(plain.params, plain.params, Mix(plain.grads), plain.momentum_buffers, **options)
    assert_equal(lists.params, plain.params)
    assert_equal(lists.momentum_buffers, plain.momentum_buffers)


@every_setting
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_goes_into_the_weights(setting: Setting, value: float) -> None:
    """Into those of the kernel that it is in, and into no other."""
    slots = [Slot((2, 3, 3, 3)), Slot((2, 3, 3, 3), order=CHANNELS_LAST), Slot((17,))]
    lists = Lists(slots, setting)
    for w, g in zip(lists.params, lists.grads, strict=True):
        w.fill_(1.0)
        g.fill_(1.0)
    for product in lists.products[:2]:
        product[1, 2, 0, 1] = value
    lists.products[2][5] = value
    ops.sgd_hess_(
        lists.params, lists.grads, lists.products, lr=0.1, rho=RHO, backend=setting.backend
    )
    for w in lists.params[:2]:
        expected = torch.ones_like(w, dtype=torch.bool)
        expected[1, 2] = False
        assert torch.equal(w.isfinite(), expected)
    assert (~lists.params[2].isfinite()).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_slices_with_gaps(backend: str) -> None:
    slots = [Slot((17,), gap=2), Slot((2, 3, 3, 3), gap=3, offset=1), Slot((2, 4, 3, 3), gap=2)]
    setting = Setting("cpu", "foreach", torch.float32)

    def on_backend(*args: Any, **options: Any) -> None:
        ops.sgd_hess_(*args, **{**options, "backend": backend})

    check_sgd_hess(on_backend, slots, setting, **SGD_OPTIONS["nesterov"])


@every_setting
def test_version_counters_of_what_is_written(setting: Setting) -> None:
    lists = Lists([*LAYOUTS, *SMALL], setting)
    everything = [*lists.params, *lists.momentum_buffers, *lists.grads, *lists.products]
    for momentum, written in ((0.0, lists.params), (0.9, lists.params + lists.momentum_buffers)):
        versions = [t._version for t in everything]
        ops.sgd_hess_(
            lists.params,
            lists.grads,
            lists.products,
            lists.momentum_buffers,
            lr=0.1,
            rho=RHO,
            momentum=momentum,
            backend=setting.backend,
        )
        ids = {id(t) for t in written}
        for tensor, version in zip(everything, versions, strict=True):
            assert (tensor._version > version) == (id(tensor) in ids)


# Positions


@pytest.mark.parametrize(
    ("slot", "expected"),
    [
        (Slot((5, 3, 2, 3)), (6, 1)),
        (Slot((5, 3, 2, 3), order=CHANNELS_LAST), (6, 3)),
        (Slot((5, 3, 2, 3), order=(2, 3, 0, 1)), (6, 15)),
        (Slot((5, 3, 1, 3), order=(3, 2, 0, 1)), (3, 15)),
        (Slot((5, 3, 3, 1), order=(1, 0, 3, 2)), (3, 1)),
        (Slot((5, 3, 2, 3), order=(0, 1, 3, 2)), None),  # transposed
        (Slot((5, 3, 2, 3), order=(2, 0, 1, 3)), None),  # apart
        (Slot((5, 3, 1, 1)), (1, 1)),
        (Slot((5, 3, 0, 3)), (1, 1)),
        (Slot((5, 6, 7)), (1, 1)),
        (Slot((2, 3, 4, 5, 6)), (1, 1)),
        (Slot(()), (1, 1)),
    ],
)
def test_positions(slot: Slot, expected: tuple[int, int] | None) -> None:
    (tensor,) = make_list([slot], torch.float32)
    assert positions_of(tensor) == expected


def test_positions_beyond_int32_are_left_to_the_reference() -> None:
    meta = torch.device("meta")
    assert positions_of(torch.empty(1, 1, 2**16, 2**15, device=meta)) is None
    assert positions_of(torch.empty(2**16, 2**15, 1, 2, device=meta)) == (2, 1)
    assert positions_of(torch.empty(2, 1, 2**16, 2**15, device=meta).permute(2, 3, 0, 1)) is None


@pytest.mark.parametrize(
    "positions", [[], [(9, 1), (1, 1)], [(0, 1)], [(9, 0)], [(5, 1)], [(9, 5)], [(2**31, 1)]]
)
def test_the_core_refuses_positions_that_do_not_fit(positions: list[tuple[int, int]]) -> None:
    from samkernels import _C
    from samkernels.backends import SgdOptions, native

    tensors = [torch.ones(2, 2, 3, 3) for _ in range(3)]
    lists = [_C.TensorList([t]) for t in tensors]
    options = native._core_sgd_options(
        SgdOptions(0.1, 0.0, 0.0, 0.0, False, False, False), has_momentum=False
    )
    with pytest.raises(ValueError, match="positions"):
        _C.sgd_hess(_C.cpu(1), *lists, None, positions, 0.1, 0, options, None)
    assert all(bool((t == 1).all()) for t in tensors)


# Mutants


def mean_of_signed(product: Tensor) -> Tensor:
    return product.mean((2, 3), keepdim=True).expand_as(product) if product.dim() == 4 else product


def with_products(change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """The op on other Hessian-vector products."""

    def mutant(params: Any, grads: Any, products: Any, *args: Any, **options: Any) -> None:
        changed = [torch.empty_like(p).copy_(change(p)) for p in products]
        ops.sgd_hess_(params, grads, changed, *args, **options)

    return mutant


def flattened(params: Any, grads: Any, products: Any, buffers: Any, **options: Any) -> None:
    """No means: as if there were no 4-D tensors."""

    def flat(tensors: Any) -> list[Tensor]:
        return [t.as_strided((t.numel(),), (1,)) for t in tensors]

    ops.sgd_hess_(*map(flat, (params, grads, products, buffers)), **options)


MUTANTS: dict[str, Callable[..., None]] = {
    "no curvature": lambda *args, **options: ops.sgd_hess_(*args, **{**options, "rho": 0.0}),
    "no mean": flattened,
    "mean of signed": with_products(mean_of_signed),
    "mean over one dimension": with_products(
        lambda p: p.abs().mean(3, keepdim=True).expand_as(p) * 1.01 if p.dim() == 4 else p
    ),
    "other order of channels": with_products(lambda p: p.flip(1) if p.dim() == 4 else p),
    "nothing": lambda *args, **options: None,
}


@every_setting
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_wrong_updates_are_rejected(setting: Setting, mutant: Callable[..., None]) -> None:
    slots = [Slot((5, 3, 3, 3)), Slot((3, 16, 3, 3), order=CHANNELS_LAST), Slot((17,))]
    check_sgd_hess(ops.sgd_hess_, slots, setting, **SGD_OPTIONS["momentum"])
    assert rejects(lambda: check_sgd_hess(mutant, slots, setting, **SGD_OPTIONS["momentum"]))


def test_the_bounds_are_tight_enough_to_see_one_position_too_few() -> None:
    """A mean of 9 that leaves one out is off by far more than the roundings that are allowed."""
    assert 1 / 9 > 1000 * (HESS_ROUNDINGS + 9) * unit_roundoff(torch.float32)
