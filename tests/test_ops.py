"""Every op on every backend, device and dtype, against the reference in float64.

The bounds are derived: each op states how many roundings its result has been through, and
helpers.assert_near turns that into an error. A perturbation is compared given the sum of
squares that the backend found, and that sum is compared on its own.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import ops
from samkernels.ops import Mix
from tests.helpers import (
    CHUNK_SIZE,
    DEVICES,
    INTEGER_OF,
    LAYOUTS,
    LISTS,
    MIXES,
    SETTINGS,
    GuardedList,
    Setting,
    Slot,
    assert_equal,
    assert_near,
    assert_same_bits,
    bits,
    copies,
    doubles,
    make_list,
    make_mix,
    rejects,
    unit_roundoff,
)

# Roundings on the longest way to a result. A scalar option counts one: it is rounded to float32.
PERTURB_ROUNDINGS = (
    9  # the root, rho, + eps, rho / n (two as a reciprocal), t * t, * d, * scale, w +
)
ETA_ROUNDINGS = 4  # of t * t: eta and + eta, each twice
MIX_ROUNDINGS = 6  # a, a / divisor (two), x * y, * a, +
SGD_ROUNDINGS = MIX_ROUNDINGS + 12  # 4 scalars; decay 2, momentum 2, Nesterov 2, update 2

RHO = 0.05
PERTURBATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adaptive": {"eta": 0.0},
    "eta": {"eta": 0.1},
    "maximize": {"maximize": True},
    "eta-maximize": {"eta": 0.1, "maximize": True},
}
SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "init": {"momentum": 0.9, "dampening": 0.3, "init_momentum": True},
    "init-nesterov": {"momentum": 0.9, "nesterov": True, "init_momentum": True},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
}

every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)
every_list = pytest.mark.parametrize("slots", LISTS.values(), ids=LISTS)
every_perturbation = pytest.mark.parametrize("options", PERTURBATIONS.values(), ids=PERTURBATIONS)
every_mix = pytest.mark.parametrize("mix", MIXES)
# Without "damp", which jumps where rounding decides: in float64 it may go the other way.
every_smooth_mix = pytest.mark.parametrize("mix", [name for name in MIXES if name != "damp"])
NATIVE = [s for s in SETTINGS if s.backend == "native"]
KERNELS = [s for s in SETTINGS if s.backend in ("native", "triton", "interpreted")]
every_kernel = pytest.mark.parametrize("setting", KERNELS, ids=str)
native_on_cpu = pytest.mark.parametrize(
    "setting", [s for s in NATIVE if s.device == "cpu"], ids=str
)
NO_GPU = pytest.param(None, marks=pytest.mark.skip("needs a GPU"))
on_cuda = pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s.device == "cuda"] or [NO_GPU], ids=str
)
# PyTorch says so whenever a test asks it to refuse synchronisation.
may_debug_synchronisation = pytest.mark.filterwarnings(
    "ignore:Synchronization debug mode is a prototype:UserWarning"
)


class Lists:
    """The tensor lists of a step, in a setting. The weights in `params` are perturbed ones."""

    def __init__(self, slots: list[Slot], setting: Setting) -> None:
        self.old_params, self.params, self.first_grads, self.grads, self.momentum_buffers = (
            make_list(slots, setting.dtype, setting.device, seed) for seed in range(5)
        )

    def assert_guards_intact(self) -> None:
        for tensors in vars(self).values():
            tensors.assert_intact()


def norm_roundings(setting: Setting, numel: int) -> float:
    """2 where squares are summed in float64: + eta, and the product with the weight.

    foreach sums in the dtype's own arithmetic: the errors of n additions are independent, and add
    up to sqrt(n) roundings (Higham and Mary, SIAM J. Sci. Comput. 41, 2019), which the root halves.
    """
    sums_in_double = setting.backend != "foreach" and setting.dtype is not torch.float64
    return 2 if sums_in_double else 2 + math.sqrt(numel)


def total_numel(tensors: list[Tensor]) -> int:
    return sum(t.numel() for t in tensors)


# Comparisons: run the op that is given, and the reference beside it.


def check_perturb(
    perturb: Callable[..., Tensor], slots: list[Slot], setting: Setting, **options: Any
) -> None:
    lists = Lists(slots, setting)
    w, g = lists.params, lists.first_grads
    before, wide, wide_grads = copies(w), doubles(w), doubles(g)
    grads_before = copies(g)
    square = perturb(w, g, lists.old_params, rho=RHO, backend=setting.backend, **options)
    assert square.dtype is torch.float64
    expected = copies(wide)
    ops.perturb_(
        expected,
        wide_grads,
        copies(wide),
        rho=RHO,
        square=square,
        backend="reference",
        **options,
    )
    sizes = [a.abs() + (e - a).abs() for a, e in zip(wide, expected, strict=True)]
    assert_near(w, expected, sizes, PERTURB_ROUNDINGS + ETA_ROUNDINGS * ("eta" in options))
    assert_same_bits(lists.old_params, before)
    assert_same_bits(g, grads_before)
    lists.assert_guards_intact()


def doubled(mix: Mix) -> Mix:
    """The same in float64, for the reference."""
    y = None if mix.y is None else doubles(mix.y)
    numbers = [x.double() if isinstance(x, Tensor) else x for x in mix[2:4]]
    guards = [None if x is None else x.double() for x in mix[5:]]
    return Mix(doubles(mix.x), y, *numbers, mix.function, *guards)


def sizes_of(mix: Mix) -> list[Tensor]:
    """Bounds of the terms of u."""
    sizes: list[Tensor] = [torch.empty_like(x) for x in mix.x]
    x, y = ([t.abs() for t in tensors] for tensors in (mix.x, mix.y or mix.x))
    a, b = (abs(value) for value in (mix.a, mix.b))
    ops.mix_(sizes, mix._replace(x=x, y=mix.y and y, a=a, b=b), backend="reference")
    return [size.abs() for size in sizes]


def check_mix(
    mix_: Callable[..., None], slots: list[Slot], setting: Setting, mix: str, **guards: Any
) -> None:
    lists = Lists(slots, setting)
    first_before = copies(lists.first_grads)
    given = make_mix(mix, lists.grads, lists.first_grads, **guards)
    wide = doubled(given)
    expected = doubles(lists.grads)
    if mix == "damp":  # it jumps: in the same arithmetic
        in_place = copies(lists.grads)
        ops.mix_(in_place, given._replace(x=in_place), backend="reference")
        expected = doubles(in_place)
    else:
        ops.mix_(expected, wide, backend="reference")
    mix_(lists.grads, given, backend=setting.backend)
    if mix in ("x", "sign") and given.divisor is None:
        assert_equal(lists.grads, expected)
    else:
        assert_near(lists.grads, expected, sizes_of(wide), MIX_ROUNDINGS)
    assert_same_bits(lists.first_grads, first_before)
    lists.assert_guards_intact()


def check_sgd(
    sgd: Callable[..., None],
    slots: list[Slot],
    setting: Setting,
    mix: str = "x",
    guards: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    lists = Lists(slots, setting)
    unwritten = copies([*lists.old_params, *lists.grads, *lists.first_grads])
    given = make_mix(mix, lists.grads, lists.first_grads, **(guards or {}))
    wide = doubled(given)
    w, buf = map(doubles, (lists.old_params, lists.momentum_buffers))
    new, new_buf = copies(w), copies(buf)
    sgd(
        lists.params,
        lists.old_params,
        given,
        lists.momentum_buffers,
        lr=0.1,
        backend=setting.backend,
        **options,
    )
    ops.sgd_(new, w, wide, new_buf, lr=0.1, backend="reference", **options)

    momentum, decay = options.get("momentum", 0), options.get("weight_decay", 0)
    buf_sizes = [
        u + decay * w_.abs() + momentum * b_.abs()
        for u, w_, b_ in zip(sizes_of(wide), w, buf, strict=True)
    ]
    sizes = [w_.abs() + 0.1 * (1 + momentum) * size for w_, size in zip(w, buf_sizes, strict=True)]
    assert_near(lists.params, new, sizes, SGD_ROUNDINGS)
    if momentum == 0:
        assert_equal(lists.momentum_buffers, buf)
    else:
        assert_near(lists.momentum_buffers, new_buf, buf_sizes, SGD_ROUNDINGS)
    assert_same_bits([*lists.old_params, *lists.grads, *lists.first_grads], unwritten)
    lists.assert_guards_intact()


# Every op, list of tensors and setting


# What dots is called with: of first_grads, grads and old_params.
DOTS: dict[str, dict[str, Any]] = {
    "x": {"count": 1},
    "weights": {"count": 1, "weighted": True},
    "eta": {"count": 1, "weighted": True, "eta": 0.1},
    "xy": {"count": 2},
    "xyz": {"count": 3},
}
every_form = pytest.mark.parametrize("form", DOTS.values(), ids=DOTS)


@every_setting
@every_list
@every_form
def test_dots(slots: list[Slot], setting: Setting, form: dict[str, Any]) -> None:
    lists = Lists(slots, setting)
    check_dots([lists.first_grads, lists.grads, lists.old_params], setting, **form)
    lists.assert_guards_intact()


def check_dots(
    lists: list[list[Tensor]],
    setting: Setting,
    count: int,
    weighted: bool = False,
    eta: float = 0.0,
) -> None:
    """Of the first `count` lists, or of the first one with the second as weights."""
    weights = lists[1] if weighted else None
    actual = ops.dots(*lists[:count], weights=weights, eta=eta, backend=setting.backend)
    expected, sizes = [], []
    for x, y, z in zip(*map(doubles, lists), strict=True):
        if weighted:
            values = [((y.abs() + eta) * x).square().sum(), (x * x).sum()]
            bounds = values
        else:
            values = [
                *((x * x).sum(), (x * y).sum(), (y * y).sum(), (z * z).sum()),
                (y.abs() > x.abs()).sum(),
                (x.sign() * y.sign() > 0).sum(),
            ]
            bounds = [*values[:4], *torch.zeros(2, device=x.device)]  # counts are exact
            bounds[1] = (x * y).abs().sum()
        length = (0, 1, 3, 6)[count]
        expected.append(torch.stack(values[: max(length, 2 * weighted)]).double())
        sizes.append(torch.stack(bounds[: max(length, 2 * weighted)]).double())
    # foreach has its sums from products, and from norms whose squares double the roundings.
    roundings = 2 * (norm_roundings(setting, total_numel(lists[0])) + (eta != 0))
    per_tensor, bound = (torch.stack(values) for values in (expected, sizes))
    for sums, e, size in (
        (actual.per_tensor, per_tensor, bound),
        (actual.total, per_tensor.sum(0), bound.sum(0)),
    ):
        assert sums.dtype is torch.float64 and sums.device.type == setting.device
        assert sums.shape == e.shape
        assert bool(((sums - e).abs() <= roundings * unit_roundoff(setting.dtype) * size).all())


@every_setting
@every_list
@pytest.mark.parametrize("options", ["plain", "eta-maximize"])
def test_perturb(slots: list[Slot], setting: Setting, options: str) -> None:
    check_perturb(ops.perturb_, slots, setting, **PERTURBATIONS[options])


@every_setting
@pytest.mark.parametrize("eta", [None, 0.0, 0.1])
def test_perturb_returns_the_square(setting: Setting, eta: float | None) -> None:
    lists = Lists(LAYOUTS, setting)
    scaled = {} if eta is None else {"weights": lists.params, "eta": eta}
    expected = ops.dots(lists.grads, **scaled, backend=setting.backend).total[0]
    w, old = lists.params, lists.old_params
    square = ops.perturb_(w, lists.grads, old, rho=RHO, eta=eta, backend=setting.backend)
    assert square.shape == ()
    assert_same_bits([square], [expected])


def squares(slots: list[Slot], setting: Setting) -> Tensor:
    """One for each tensor; one is 0 and one has no root in float32 or float64."""
    values = torch.rand(len(slots), generator=torch.Generator().manual_seed(0)).double() + 1
    values[1], values[-1] = 0, math.inf
    return values.to(setting.device)


@every_setting
@every_perturbation
@pytest.mark.parametrize("per_tensor", [False, True])
def test_perturb_with_a_known_square(
    setting: Setting, options: dict[str, Any], per_tensor: bool
) -> None:
    square = torch.tensor(9.0, dtype=torch.float64, device=setting.device)
    if per_tensor:
        square = squares(LAYOUTS, setting)

    def perturb(*args: Any, **kwargs: Any) -> Tensor:
        returned = ops.perturb_(*args, square=square, **kwargs)
        assert returned is square
        return returned

    check_perturb(perturb, LAYOUTS, setting, **options)


@every_setting
@pytest.mark.parametrize("eta", [None, 0.1])
def test_perturb_along_what_old_params_holds(setting: Setting, eta: float | None) -> None:
    """A direction may be made in the room for w."""
    results = []
    for is_apart in (True, False):
        lists = Lists(LISTS["sizes"], setting)
        old = lists.old_params
        direction = copies(old) if is_apart else old
        options = {"rho": RHO, "eta": eta, "backend": setting.backend}
        square = ops.perturb_(lists.params, direction, old, **options)
        results.append([*lists.params, *old, square])
    assert_same_bits(*results)


@every_setting
@every_perturbation
def test_perturb_from_weights_that_are_saved_already(
    setting: Setting, options: dict[str, Any]
) -> None:
    options = {"rho": RHO, "backend": setting.backend, **options}
    for square in (None, squares(LAYOUTS, setting)):
        lists, saved = Lists(LAYOUTS, setting), Lists(LAYOUTS, setting)
        ops.perturb_(lists.params, lists.grads, lists.old_params, square=square, **options)
        for old, w in zip(saved.old_params, saved.params, strict=True):
            old.copy_(w)
            w.fill_(math.nan)
        journal: list[bool] = []
        ops.perturb_(
            saved.params,
            saved.grads,
            saved.old_params,
            square=square,
            saves=False,
            journal=journal,
            **options,
        )
        assert journal == [True]
        for name, tensors in vars(lists).items():
            assert_same_bits(getattr(saved, name), tensors)
        saved.assert_guards_intact()


@every_setting
@every_list
def test_restore_bit_for_bit(slots: list[Slot], setting: Setting) -> None:
    lists = Lists(slots, setting)
    # Any bits: nan payloads, -0.0, subnormal numbers.
    generator = torch.Generator().manual_seed(0)
    numel, size = total_numel(lists.old_params), torch.finfo(setting.dtype).bits // 8
    integers = torch.randint(-(2**63), 2**63 - 1, (numel,), generator=generator)
    values = integers.to(INTEGER_OF[size]).view(setting.dtype).to(setting.device)
    lists.old_params = GuardedList(slots, values)
    before = bits(lists.old_params)
    assert torch.equal(before, bits([values]))
    ops.restore_(lists.params, lists.old_params, backend=setting.backend)
    assert torch.equal(bits(lists.params), before)
    assert torch.equal(bits(lists.old_params), before)
    lists.assert_guards_intact()


@every_setting
@pytest.mark.parametrize("value", [-0.0, math.nan, math.inf, "payload", "subnormal"])
def test_perturb_saves_any_value_and_restore_returns_it(
    setting: Setting, value: float | str
) -> None:
    lists = Lists([Slot((17,), offset=1), Slot(())], setting)
    info = torch.finfo(setting.dtype)
    for w in lists.params:
        if value == "payload":  # a nan with all bits of its payload set
            ones = torch.full_like(w, -1, dtype=INTEGER_OF[w.element_size()])
            w.copy_(ones.view(setting.dtype))
        else:
            w.fill_(info.smallest_normal * info.eps if value == "subnormal" else value)
    before = copies(lists.params)
    old = lists.old_params
    ops.perturb_(lists.params, lists.grads, old, rho=RHO, backend=setting.backend)
    assert_same_bits(old, before)
    ops.restore_(lists.params, old, backend=setting.backend)
    assert_same_bits(lists.params, before)


@every_setting
@every_mix
def test_mix(setting: Setting, mix: str) -> None:
    check_mix(ops.mix_, LAYOUTS, setting, mix)


@every_setting
@every_list
@pytest.mark.parametrize("mix", ["sign", "linear-tensors"])
def test_mix_on_every_list(slots: list[Slot], setting: Setting, mix: str) -> None:
    check_mix(ops.mix_, slots, setting, mix)


@every_setting
@every_mix
def test_mix_into_either_of_its_lists(setting: Setting, mix: str) -> None:
    results = []
    for place in ("apart", "x", "y"):
        lists = Lists(LAYOUTS, setting)
        given = make_mix(mix, lists.grads, lists.first_grads)
        out = {"apart": lists.params, "x": lists.grads, "y": lists.first_grads}[place]
        ops.mix_(out, given, backend=setting.backend)
        results.append(out)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@every_setting
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@every_smooth_mix
def test_sgd(setting: Setting, options: dict[str, Any], mix: str) -> None:
    check_sgd(ops.sgd_, LAYOUTS, setting, mix, **options)


@every_setting
@every_list
def test_sgd_on_every_list(slots: list[Slot], setting: Setting) -> None:
    check_sgd(ops.sgd_, slots, setting, "linear-tensors", **SGD_OPTIONS["nesterov"])


@every_setting
def test_sgd_without_old_params_of_their_own(setting: Setting) -> None:
    lists, in_place = Lists(LAYOUTS, setting), Lists(LAYOUTS, setting)
    for one, params in ((lists, lists.params), (in_place, in_place.old_params)):
        ops.sgd_(params, one.old_params, Mix(one.grads), lr=0.1, backend=setting.backend)
    assert_same_bits(in_place.old_params, lists.params)


@every_setting
def test_numbers_of_tensors_with_a_stride(setting: Setting) -> None:
    """Columns of what dots returns."""
    lists, apart = Lists(LAYOUTS, setting), Lists(LAYOUTS, setting)
    per_tensor = ops.dots(lists.grads, lists.first_grads, backend=setting.backend).per_tensor
    wide = per_tensor.to(torch.promote_types(setting.dtype, torch.float32))
    for one, square, a in (
        (lists, per_tensor[:, 2], wide[:, 1]),
        (apart, per_tensor[:, 2].clone(), wide[:, 1].clone()),
    ):
        options = {"rho": a.abs(), "backend": setting.backend}
        ops.perturb_(one.params, one.grads, one.old_params, square=square, **options)
        ops.mix_(one.grads, Mix(one.grads, one.first_grads, a, a), backend=setting.backend)
    assert_same_bits([*lists.params, *lists.grads], [*apart.params, *apart.grads])


# Bits: the kernels do the reference's arithmetic, on every device


MIXED = [*LAYOUTS, Slot((CHUNK_SIZE + 1,), offset=1), Slot((511,))]


def in_setting_and_in_reference(setting: Setting) -> tuple[Setting, Setting]:
    return setting, Setting("cpu", "reference", setting.dtype)


# Where d and w lie when perturb_ is called.
PLACES: dict[str, Callable[[Lists], dict[str, Any]]] = {
    "apart": lambda lists: {"direction": lists.grads},
    "along-old": lambda lists: {"direction": lists.old_params},
    "saved": lambda lists: {"direction": lists.grads, "saves": False},
}


@every_kernel
@pytest.mark.parametrize(
    "options",
    [*PERTURBATIONS.values(), {"rounding": "stochastic"}],
    ids=[*PERTURBATIONS, "stochastic"],
)
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_kernels_perturb_as_the_reference_bit_for_bit(
    setting: Setting,
    options: dict[str, Any],
    per_tensor: bool,
    places: Callable[[Lists], dict[str, Any]],
) -> None:
    results = []
    for one in in_setting_and_in_reference(setting):
        lists = Lists(MIXED, one)
        with_negative_zeros(lists.params)
        # RHO / 7.5 is not RHO * (1 / 7.5) in float32.
        square = torch.tensor(7.5**2, dtype=torch.float64, device=one.device)
        rho: float | Tensor = RHO
        if per_tensor:
            square = squares(MIXED, one)
            rho = square.nan_to_num(0, posinf=1).float() * RHO
        ops.perturb_(
            lists.params,
            old_params=lists.old_params,
            rho=rho,
            square=square,
            backend=one.backend,
            **places(lists),
            **options,
        )
        results.append([t.cpu() for t in (*lists.params, *lists.old_params)])
        lists.assert_guards_intact()
    assert_same_bits(*results)


@every_kernel
@every_mix
@pytest.mark.parametrize("divides", [False, True])
def test_kernels_mix_as_the_reference_bit_for_bit(
    setting: Setting, mix: str, divides: bool
) -> None:
    results = []
    for one in in_setting_and_in_reference(setting):
        lists = Lists(MIXED, one)
        guards = {"ascent_square": scalar(1.0, one).double()}
        if divides:
            guards["divisor"] = scalar(3.0, one)
        given = make_mix(mix, lists.grads, lists.first_grads, **guards)
        ops.mix_(lists.grads, given, backend=one.backend)
        results.append(lists.grads)
    assert_equal(*results)


@every_kernel
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@every_mix
def test_kernels_update_as_the_reference_bit_for_bit(
    setting: Setting, options: dict[str, Any], mix: str
) -> None:
    results = []
    for one in in_setting_and_in_reference(setting):
        lists = Lists(MIXED, one)
        ops.sgd_(
            lists.params,
            lists.old_params,
            make_mix(mix, lists.grads, lists.first_grads),
            lists.momentum_buffers,
            lr=0.1,
            backend=one.backend,
            **options,
        )
        results.append(lists.params + lists.momentum_buffers)
    assert_equal(*results)


@every_setting
def test_backends_damp_as_the_reference_at_the_edges(setting: Setting) -> None:
    """Where the ratio rounds to 0 or 1, underflows, overflows, or is not a number."""
    info = torch.finfo(setting.dtype)
    ends = [0.0, 1e-8, -1e-8, 1.0, info.tiny, info.smallest_normal * info.eps, info.max, math.inf]
    edges = torch.tensor([*ends, math.nan], dtype=torch.float64)
    edges = torch.cat([edges, -edges, edges * (1 - info.eps), edges * 1e-5]).to(setting.dtype)
    x, y = (t.contiguous() for t in torch.meshgrid(edges, edges, indexing="ij"))
    results = []
    for one in in_setting_and_in_reference(setting):
        given = Mix([x.to(one.device)], [y.to(one.device)], 0.5, function="damp")
        out = [torch.empty_like(x, device=one.device)]
        ops.mix_(out, given, backend=one.backend)
        results.append([out[0].nan_to_num(7.0).cpu()])
    assert_equal(*results)


@every_setting
def test_a_square_whose_root_no_longer_fits(setting: Setting) -> None:
    """Which side of the end a root is rounded to decides over skipped steps."""
    largest = torch.finfo(torch.promote_types(setting.dtype, torch.float32)).max
    exact = torch.tensor(largest, dtype=torch.float64)
    end = exact * 1e-30 * exact * 1e30 if setting.dtype is torch.float64 else exact * exact
    values = [end]
    for _ in range(2):
        values = [*values, values[-1] * (1 + 2**-25), values[-1] * (1 - 2**-25)]
    for value in [*values, torch.tensor(math.inf), torch.tensor(math.nan), torch.tensor(0.0)]:
        square = value.double().to(setting.device)
        root = ops.Mix([scalar(0.0, setting)], ascent_square=square).takes_place()
        assert root is not None
        lists = Lists([Slot((17,))], setting)
        given = Mix(lists.first_grads, ascent_square=square)
        ops.mix_(lists.grads, given, backend=setting.backend)
        wanted = [g if bool(root) else torch.zeros_like(g) for g in lists.first_grads]
        assert_equal(lists.grads, wanted)


@native_on_cpu
def test_native_with_streaming_stores_and_threads_bit_for_bit(
    setting: Setting, threads: int
) -> None:
    # restore_ moves the fewest bytes: two lists of 9 MiB are above the 16 MiB from which the
    # stores stream (kStreamingBytes): to the first tensor, since none streams to odd offsets.
    numel = 9 * 2**20 // torch.finfo(setting.dtype).bits * 8
    slots = [Slot((numel - 600_000,)), Slot((17,), offset=2), Slot((600_000,), offset=3)]
    lists, plain = Lists(slots, setting), Lists(slots, setting)
    for one, backend in ((lists, "native"), (plain, "reference")):
        before = copies(one.params)
        # A scale that is exact, so that only the elements' arithmetic is compared.
        square = torch.tensor(4.0, dtype=torch.float64)
        ops.perturb_(
            one.params, one.grads, one.old_params, rho=0.5, square=square, eps=0, backend=backend
        )
        assert_same_bits(one.old_params, before)
        given = Mix(one.first_grads, one.grads, function="sign")
        ops.mix_(one.grads, given, backend=backend)
        perturbed = copies(one.params)
        ops.sgd_(
            one.params,
            one.old_params,
            Mix(one.grads),
            one.momentum_buffers,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.1,
            nesterov=True,
            backend=backend,
        )
        ops.restore_(one.old_params, perturbed, backend=backend)
        assert_same_bits(one.old_params, perturbed)
    for name, tensors in vars(lists).items():
        assert_equal(tensors, getattr(plain, name))
    lists.assert_guards_intact()


# Values that are not finite, large, small or zero

PLANTS = {  # tensor and element
    "first": (0, (0,)),
    "middle": (1, (CHUNK_SIZE // 2 + 1,)),
    "last-chunk": (1, (CHUNK_SIZE + 2,)),
    "last": (2, (-1, -1)),
}
PLANT_SLOTS = [
    Slot((17,), offset=1),
    Slot((CHUNK_SIZE + 5,)),
    Slot((5, 7), order=(1, 0), offset=3),
]


def plant(tensors: list[Tensor], where: str, value: float) -> None:
    tensor, element = PLANTS[where]
    tensors[tensor][element] = value


def with_negative_zeros(tensors: list[Tensor]) -> None:
    """-0.0 at every zero: 0.0 added to it gives 0.0, of other bits."""
    for tensor in tensors:
        tensor.copy_(torch.where(tensor == 0, -0.0, tensor.double()))


@every_setting
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", PLANTS)
def test_dots_of_gradients_that_are_not_finite(setting: Setting, where: str, value: float) -> None:
    grads = Lists(PLANT_SLOTS, setting).grads
    plant(grads, where, value)
    total, per_tensor = ops.dots(grads, backend=setting.backend)
    planted = torch.arange(len(grads)) == PLANTS[where][0]
    assert not total.isfinite()
    assert torch.equal(per_tensor[:, 0].isfinite().cpu(), ~planted)


@every_setting
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", PLANTS)
@pytest.mark.parametrize("eta", [None, 0.1])
def test_a_gradient_that_is_not_finite_does_not_touch_the_weights(
    setting: Setting, where: str, value: float, eta: float | None
) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    plant(lists.first_grads, where, value)
    with_negative_zeros(lists.params)
    before = copies(lists.params)
    square = ops.perturb_(
        lists.params,
        lists.first_grads,
        lists.old_params,
        rho=RHO,
        eta=eta,
        backend=setting.backend,
    )
    assert not square.isfinite()
    assert_same_bits(lists.params, before)
    assert_same_bits(lists.old_params, before)
    lists.assert_guards_intact()


@every_setting
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@pytest.mark.parametrize(
    ("square", "mix"), [(math.inf, "x"), (math.nan, "sign"), (math.inf, "linear-tensors")]
)
def test_sgd_skips_a_step_whose_square_is_not_finite(
    setting: Setting, square: float, options: dict[str, Any], mix: str
) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    for tensors in (lists.old_params, lists.momentum_buffers):
        with_negative_zeros(tensors)
    for where in PLANTS:
        plant(lists.first_grads, where, math.nan)
        plant(lists.grads, where, math.inf)
    old, buffers = copies(lists.old_params), copies(lists.momentum_buffers)
    guards = {"ascent_square": scalar(square, setting).double()}
    ops.sgd_(
        lists.params,
        lists.old_params,
        make_mix(mix, lists.grads, lists.first_grads, **guards),
        lists.momentum_buffers,
        lr=0.1,
        backend=setting.backend,
        **options,
    )
    assert_same_bits(lists.params, old)
    if "init_momentum" in options:
        buffers = [torch.zeros_like(b) for b in buffers]
    assert_same_bits(lists.momentum_buffers, buffers)
    lists.assert_guards_intact()


@every_setting
@every_smooth_mix
@pytest.mark.parametrize("options", ["plain", "nesterov", "init"])
def test_a_finite_ascent_square_changes_nothing(setting: Setting, mix: str, options: str) -> None:
    guards = {"ascent_square": scalar(1.5, setting).double()}
    check_sgd(ops.sgd_, LAYOUTS, setting, mix, guards, **SGD_OPTIONS[options])


@every_setting
@every_mix
@pytest.mark.parametrize("square", [math.inf, math.nan])
def test_mix_gives_zero_where_the_square_is_not_finite(
    setting: Setting, mix: str, square: float
) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    for where in PLANTS:
        plant(lists.first_grads, where, math.inf)
        plant(lists.grads, where, math.nan)
    guards = {"ascent_square": scalar(square, setting).double()}
    given = make_mix(mix, lists.grads, lists.first_grads, **guards)
    ops.mix_(lists.grads, given, backend=setting.backend)
    assert_equal(lists.grads, [torch.zeros_like(g) for g in lists.grads])
    lists.assert_guards_intact()


# What of a mix skips its step, or does not.
GUARDS: dict[str, dict[str, float]] = {
    "no-guards": {},
    "takes-place": {"ascent_square": 1.5, "found_inf": 0.0},
    "square-inf": {"ascent_square": math.inf},
    "square-nan": {"ascent_square": math.nan, "found_inf": 0.0},
    "found-inf": {"ascent_square": 1.5, "found_inf": 1.0},
}


@every_setting
@every_mix
@pytest.mark.parametrize("values", GUARDS.values(), ids=GUARDS)
def test_a_mix_that_keeps_writes_nothing_in_a_skipped_step(
    setting: Setting, mix: str, values: dict[str, float]
) -> None:
    skipped = values not in (GUARDS["no-guards"], GUARDS["takes-place"])
    for place in ("params", "grads", "first_grads"):  # apart, x, y
        results = []
        for one in in_setting_and_in_reference(setting):
            lists = Lists(PLANT_SLOTS, one)
            out = getattr(lists, place)
            with_negative_zeros(out)
            for where in PLANTS if skipped else ():
                for read, value in ((lists.grads, math.inf), (lists.first_grads, math.nan)):
                    if read is not out:
                        plant(read, where, value)
            before = copies(out)
            guards = {name: scalar(value, one) for name, value in values.items()}
            if "ascent_square" in guards:
                guards["ascent_square"] = guards["ascent_square"].double()
            given = make_mix(mix, lists.grads, lists.first_grads, **guards)
            ops.mix_(out, given, keeps=True, backend=one.backend)
            lists.assert_guards_intact()
            if skipped:
                assert_same_bits(out, before)
            results.append([t.cpu() for t in out])
        if setting.backend == "foreach" and not skipped:
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected)
        else:
            assert_same_bits(*results)


@every_setting
@every_smooth_mix
@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_sgd_divides(setting: Setting, mix: str, scale: float) -> None:
    """As if lr and weight decay, without momentum, belonged to gradients that were divided."""

    def sgd(*args: Any, lr: float, weight_decay: float, **kwargs: Any) -> None:
        params, old, given, buffers = args
        given = given._replace(divisor=scalar(scale, setting))
        options = {"lr": lr * scale, "weight_decay": weight_decay / scale, **kwargs}
        ops.sgd_(params, old, given, buffers, **options)

    check_sgd(sgd, LAYOUTS, setting, mix, weight_decay=0.01)


@every_setting
@every_mix
def test_mix_divides(setting: Setting, mix: str) -> None:
    results = []
    for scale in (None, 64.0):  # a power of 2: exact
        lists = Lists(LAYOUTS, setting)
        divisor = None if scale is None else scalar(scale, setting)
        given = make_mix(mix, lists.grads, lists.first_grads, divisor=divisor)
        ops.mix_(lists.grads, given, backend=setting.backend)
        results.append(doubles(lists.grads))
    if setting.dtype is torch.float16:  # may lose bits where it becomes subnormal
        for u, divided in zip(*results, strict=True):
            torch.testing.assert_close(divided, u / 64, rtol=0, atol=2.0**-25)
    else:
        assert_same_bits(results[1], [u / 64 for u in results[0]])


@every_setting
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@pytest.mark.parametrize("mix", ["x", "sign", "linear"])
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])
def test_sgd_skips_a_step_that_overflowed(
    setting: Setting, options: dict[str, Any], mix: str, found_inf: float
) -> None:
    results = []
    for found in (None, scalar(found_inf, setting)):
        lists = Lists(PLANT_SLOTS, setting)
        if found is not None and found_inf != 0:
            for where in PLANTS:
                plant(lists.grads, where, math.inf)
        guards = {"ascent_square": scalar(1.5, setting).double(), "found_inf": found}
        ops.sgd_(
            lists.params,
            lists.old_params,
            make_mix(mix, lists.grads, lists.first_grads, **guards),
            lists.momentum_buffers,
            lr=0.1,
            backend=setting.backend,
            **options,
        )
        results.append((lists.params, lists.momentum_buffers))
    expected = results[0]
    if found_inf != 0:
        untouched = Lists(PLANT_SLOTS, setting)
        buffers: list[Tensor] = untouched.momentum_buffers
        if "init_momentum" in options:
            buffers = [torch.zeros_like(b) for b in buffers]
        expected = (untouched.old_params, buffers)
    for actual, wanted in zip(results[1], expected, strict=True):
        assert_same_bits(actual, wanted)


@every_setting
@every_mix
def test_mix_gives_zero_after_an_overflow(setting: Setting, mix: str) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    for where in PLANTS:
        plant(lists.grads, where, math.inf)
    given = make_mix(mix, lists.grads, lists.first_grads, found_inf=scalar(1.0, setting))
    ops.mix_(lists.grads, given, backend=setting.backend)
    assert_equal(lists.grads, [torch.zeros_like(g) for g in lists.grads])


def scalar(value: float, setting: Setting) -> Tensor:
    dtype = torch.float64 if setting.dtype is torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device=setting.device)


@every_setting
@pytest.mark.parametrize("eta", [None, 0.1])
def test_zero_gradients_perturb_nothing(setting: Setting, eta: float | None) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    with_negative_zeros(lists.params)
    before = copies(lists.params)
    zeros = [torch.zeros_like(g) for g in lists.grads]
    square = ops.perturb_(
        lists.params,
        zeros,
        lists.old_params,
        rho=RHO,
        eta=eta,
        backend=setting.backend,
    )
    assert square.item() == 0
    assert_same_bits(lists.params, before)
    assert_same_bits(lists.old_params, before)


# Squares of these leave the range of the tensors' dtype, or of float32; the norms do not.
EXTREME_SCALES = {
    torch.float16: (6e4, 1e-5),
    torch.bfloat16: (1e30, 1e-30),
    torch.float32: (1e25, 1e-25),
    torch.float64: (1e140, 1e-140),
}
every_extreme = pytest.mark.parametrize("which", [0, 1], ids=["large", "small"])


def extreme_list(setting: Setting, which: int, seed: int = 0) -> list[Tensor]:
    """Values between half the scale and the scale, of either sign."""
    scale = EXTREME_SCALES[setting.dtype][which]
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(10_000, generator=generator, dtype=torch.float64)
    values = scale * torch.where(values < 0.5, values - 1, values)
    return [
        values[:17].to(setting.device, setting.dtype),
        values[17:].to(setting.device, setting.dtype),
    ]


@every_setting
@every_extreme
def test_norms_of_extreme_gradients(setting: Setting, which: int) -> None:
    grads = extreme_list(setting, which)
    total, per_tensor = (sums.sqrt() for sums in ops.dots(grads, backend=setting.backend))
    wide = doubles(grads)
    expected = [torch.linalg.vector_norm(g) for g in (*wide, torch.cat(wide))]
    roundings = norm_roundings(setting, 10_000)
    error = (torch.cat([*per_tensor, total]) - torch.stack(expected)).abs()
    assert bool((error <= roundings * unit_roundoff(setting.dtype) * torch.stack(expected)).all())


@every_setting
@every_extreme
def test_extreme_gradients_perturb_by_rho(setting: Setting, which: int) -> None:
    grads = extreme_list(setting, which)
    params = [torch.zeros_like(g) for g in grads]
    ops.perturb_(params, grads, copies(params), rho=64.0, eps=0, backend=setting.backend)
    wide = doubles(grads)
    norm = torch.linalg.vector_norm(torch.cat(wide))
    expected = [64 * (g / norm) for g in wide]
    roundings = PERTURB_ROUNDINGS + norm_roundings(setting, 10_000)
    assert_near(params, expected, [e.abs() for e in expected], roundings)


@every_setting
@every_extreme
def test_dots_of_extreme_gradients(setting: Setting, which: int) -> None:
    check_dots([extreme_list(setting, which, seed) for seed in range(3)], setting, count=3)


# Memory


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_with_gaps(device: str, backend: str, dtype: torch.dtype) -> None:
    slots = [Slot((17,), gap=2), Slot((5, 7), order=(1, 0), gap=3, offset=1), Slot((3,), gap=2)]
    setting = Setting(device, backend, dtype)
    # The bounds are those of foreach, which "auto" takes for slices.
    bounds = setting._replace(backend="foreach") if backend == "auto" else setting

    def on_backend(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: op(*args, **{**options, "backend": backend})

    check_perturb(on_backend(ops.perturb_), slots, bounds, eta=0.0)
    check_mix(on_backend(ops.mix_), slots, bounds, "sign")
    check_sgd(on_backend(ops.sgd_), slots, bounds, "linear", **SGD_OPTIONS["nesterov"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_interleaved_slices_of_one_storage(device: str, backend: str) -> None:
    storage, ones = torch.arange(1.0, 9.0, device=device), torch.ones(8, device=device)
    params, grads = [storage[0::2], storage[1::2]], [ones[0::2], ones[1::2]]
    ops.sgd_(params, params, Mix(grads), lr=1, backend=backend)
    assert torch.equal(storage, torch.arange(8.0, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_lazily_negated_gradients(device: str, backend: str) -> None:
    # PyTorch may keep a sign in a bit of the tensor and not in its memory, as in x.conj().imag.
    params, grads = [torch.zeros(3, device=device)], [torch.ones(3, device=device)]
    ops.sgd_(params, params, Mix([torch._neg_view(grads[0])]), lr=1, backend=backend)
    assert torch.equal(params[0], grads[0])


@every_setting
def test_tuples_do_the_same(setting: Setting) -> None:
    results = []
    for container in (list, tuple):
        lists = Lists(LAYOUTS, setting)
        w, old, g1, g2, buf = map(
            container,
            (
                lists.params,
                lists.old_params,
                lists.first_grads,
                lists.grads,
                lists.momentum_buffers,
            ),
        )
        backend = {"backend": setting.backend}
        weighted = ops.dots(g1, weights=w, **backend)
        square = ops.perturb_(w, g1, old, rho=RHO, **backend)
        sums = ops.dots(g1, g2, w, **backend)
        ops.mix_(g2, Mix(g2, g1, function="sign"), **backend)
        ops.sgd_(w, old, Mix(g2, g1), buf, lr=0.1, momentum=0.9, **backend)
        ops.restore_(old, w, **backend)
        results.append([*weighted, square, *sums, *w, *old, *g2, *buf])
    assert_same_bits(*results)


@every_setting
def test_rho_and_lr_as_tensors(setting: Setting) -> None:
    """On the device they are read when the op runs there, as a CUDA graph needs it."""
    results = []
    for as_tensor in (False, True):
        dtype = torch.float64 if setting.dtype is torch.float64 else torch.float32
        rho, lr = (
            torch.tensor(x, dtype=dtype, device=setting.device) if as_tensor else x
            for x in (RHO, 0.1)
        )
        lists = Lists(LAYOUTS, setting)
        w, old, backend = lists.params, lists.old_params, setting.backend
        ops.perturb_(w, lists.first_grads, old, rho=rho, backend=backend)
        perturbed = copies(w)
        buffers = lists.momentum_buffers
        ops.sgd_(w, old, Mix(lists.grads), buffers, lr=lr, momentum=0.9, backend=backend)
        results.append([*perturbed, *old, *w, *buffers])
    assert_same_bits(results[1], results[0])


# Determinism


@every_setting
def test_the_same_bits_again(setting: Setting) -> None:
    assert_same_bits(one_step(setting), one_step(setting))


@native_on_cpu
def test_native_gives_the_same_bits_for_any_number_of_threads(setting: Setting) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = one_step(setting)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(one_step(setting), alone)
    finally:
        torch.set_num_threads(before)


STEP_SLOTS = LISTS["sizes"] + LAYOUTS  # long enough for threads


def one_step(setting: Setting) -> list[Tensor]:
    return step(Lists(STEP_SLOTS, setting), setting)


def step(lists: Lists, setting: Setting) -> list[Tensor]:
    """All that the ops of a step write and return."""
    w, old = lists.params, lists.old_params
    options = {"backend": setting.backend}
    square = ops.perturb_(w, lists.first_grads, old, rho=RHO, eta=0.0, **options)
    single = ops.dots(lists.grads, **options)
    pair = ops.dots(lists.first_grads, lists.grads, **options)
    triple = ops.dots(lists.first_grads, lists.grads, old, **options)
    wide = torch.promote_types(setting.dtype, torch.float32)
    ratios = (pair.per_tensor[:, 0] / (pair.per_tensor[:, 2] + 1)).to(wide)
    ops.sgd_(
        w,
        old,
        Mix(lists.first_grads, lists.grads, ratios, 0.5, ascent_square=square),
        lists.momentum_buffers,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        **options,
    )
    given = Mix(lists.first_grads, lists.grads, function="sign", ascent_square=square)
    ops.mix_(lists.grads, given, **options)
    ops.restore_(old, w, **options)
    sums = [*single, *pair, *triple]
    return [square, *sums, *w, *old, *lists.grads, *lists.momentum_buffers]


# CUDA


@on_cuda
@may_debug_synchronisation
def test_nothing_waits_for_the_device(setting: Setting) -> None:
    one_step(setting)  # what is built once, or read once, may wait
    lists = Lists(LAYOUTS, setting)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(lists, setting)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda
def test_work_is_queued_on_the_current_stream(setting: Setting) -> None:
    expected = one_step(setting)
    lists = Lists(STEP_SLOTS, setting)
    gradients = copies(lists.first_grads)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch._foreach_zero_(lists.first_grads)
        torch.cuda._sleep(100_000_000)  # an op on another stream would see zeros
        torch._foreach_copy_(lists.first_grads, gradients)
        written = step(lists, setting)
    stream.synchronize()
    assert_same_bits(written, expected)


# Autograd


@every_setting
def test_version_counters_of_what_is_written(setting: Setting) -> None:
    lists = Lists(LAYOUTS, setting)
    w, old, g1, g2, buf = (
        lists.params,
        lists.old_params,
        lists.first_grads,
        lists.grads,
        lists.momentum_buffers,
    )
    backend = {"backend": setting.backend}
    calls: list[tuple[Callable[[], Any], list[Tensor]]] = [
        (lambda: ops.dots(g1, weights=w, **backend), []),
        (lambda: ops.perturb_(w, g1, old, rho=RHO, **backend), [*w, *old]),
        (lambda: ops.restore_(w, old, **backend), w),
        (lambda: ops.perturb_(w, g1, old, rho=RHO, saves=False, **backend), w),
        (lambda: ops.mix_(g2, Mix(g1, g2, function="sign"), **backend), g2),
        (lambda: ops.sgd_(w, old, Mix(g2), lr=0.1, **backend), w),
        (lambda: ops.sgd_(w, old, Mix(g2), buf, lr=0.1, momentum=0.9, **backend), [*w, *buf]),
        (lambda: ops.dots(g1, g2, w, **backend), []),
    ]
    everything = [*w, *old, *g1, *g2, *buf]
    for call, written in calls:
        versions = [t._version for t in everything]
        call()
        addresses = {id(t) for t in written}
        for tensor, version in zip(everything, versions, strict=True):
            assert (tensor._version > version) == (id(tensor) in addresses)


@every_setting
@pytest.mark.parametrize("op", ["perturb_", "restore_", "sgd_"])
def test_autograd_refuses_a_backward_through_overwritten_weights(setting: Setting, op: str) -> None:
    w = torch.nn.Parameter(torch.ones(3, dtype=setting.dtype, device=setting.device))
    old, g = torch.zeros_like(w), torch.ones_like(w)
    loss = (w * w).sum()  # saves w
    backend = {"backend": setting.backend}
    with torch.no_grad():
        if op == "perturb_":
            ops.perturb_([w], [g], [old], rho=RHO, **backend)
        elif op == "restore_":
            ops.restore_([w], [old], **backend)
        else:
            ops.sgd_([w], [old], Mix([g]), lr=0.1, **backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Mutants: the comparisons above reject wrong code


def perturb_with(**wrong: Any) -> Callable[..., Tensor]:
    return lambda *args, **options: ops.perturb_(*args, **{**options, **wrong})


def perturb_without_backup(
    params: list[Tensor], grads: list[Tensor], old_params: list[Tensor], **options: Any
) -> Tensor:
    return ops.perturb_(params, grads, copies(old_params), **options)


PERTURB_MUTANTS: dict[str, Callable[..., Tensor]] = {
    "rho=0": perturb_with(rho=0.0),
    "ten times rho": perturb_with(rho=10 * RHO),
    "negative rho": perturb_with(maximize=True),
    "adaptive": perturb_with(eta=0.0),
    "no backup": perturb_without_backup,
}


@every_setting
@pytest.mark.parametrize("mutant", PERTURB_MUTANTS.values(), ids=PERTURB_MUTANTS)
def test_wrong_perturbations_are_rejected(setting: Setting, mutant: Callable[..., Tensor]) -> None:
    assert rejects(lambda: check_perturb(mutant, LAYOUTS, setting))


@every_setting
def test_a_perturbation_that_is_slightly_too_far_is_rejected(setting: Setting) -> None:
    # 1% of e(w) is below the rounding of bf16 for most weights, and above it for some.
    mutant = perturb_with(rho=1.01 * RHO)
    assert rejects(lambda: check_perturb(mutant, LISTS["sizes"], setting))


# Of a mix, what of it may be wrong.
MIX_MUTANTS: dict[str, dict[str, Any]] = {
    "linear": {"b": 1.3},
    "linear-tensors": {"b": 1.0},
    "scaled": {"a": 1.0},
    "sign": {"function": "product"},
    "damp": {"a": 0.6},
    "product": {"function": "sign"},
}


@every_setting
@pytest.mark.parametrize(("mix", "wrong"), MIX_MUTANTS.items(), ids=MIX_MUTANTS)
def test_wrong_mixes_are_rejected(setting: Setting, mix: str, wrong: dict[str, Any]) -> None:
    def mutant(out: list[Tensor], given: Mix, **options: Any) -> None:
        ops.mix_(out, given._replace(**wrong), **options)

    def sgd_mutant(*args: Any, **options: Any) -> None:
        params, old, given, buffers = args
        ops.sgd_(params, old, given._replace(**wrong), buffers, **options)

    assert rejects(lambda: check_mix(mutant, LAYOUTS, setting, mix))
    if mix != "damp":
        assert rejects(lambda: check_sgd(sgd_mutant, LAYOUTS, setting, mix))


def sgd_without_restore(
    params: list[Tensor], old_params: list[Tensor], *args: Any, **options: Any
) -> None:
    ops.sgd_(params, params, *args, **options)


def sgd_with_decay_of_perturbed_weights(
    params: list[Tensor],
    old_params: list[Tensor],
    mix: Mix,
    *args: Any,
    weight_decay: float,
    **options: Any,
) -> None:
    decayed = [g + weight_decay * w for g, w in zip(mix.x, params, strict=True)]
    ops.sgd_(params, old_params, Mix(decayed), *args, **options)


def sgd_with(**wrong: Any) -> Callable[..., None]:
    return lambda *args, **options: ops.sgd_(*args, **{**options, **wrong})


SGD_MUTANTS: dict[str, Callable[..., None]] = {
    "no restore": sgd_without_restore,
    "decay of the perturbed weights": sgd_with_decay_of_perturbed_weights,
    "no decay": sgd_with(weight_decay=0.0),
    "no dampening": sgd_with(dampening=0.0),
    "nesterov": sgd_with(nesterov=True, dampening=0.0),
    "momentum restarted": sgd_with(init_momentum=True),
    "ascent": sgd_with(maximize=True),
    "nothing": lambda *args, **options: None,
}


@every_setting
@pytest.mark.parametrize("mutant", SGD_MUTANTS.values(), ids=SGD_MUTANTS)
def test_wrong_updates_are_rejected(setting: Setting, mutant: Callable[..., None]) -> None:
    options = SGD_OPTIONS["dampening"]
    check_sgd(ops.sgd_, LAYOUTS, setting, **options)
    assert rejects(lambda: check_sgd(mutant, LAYOUTS, setting, **options))


@every_setting
@pytest.mark.parametrize("element", [-1, 0], ids=["before", "behind"])
def test_stray_writes_are_noticed(setting: Setting, element: int) -> None:
    lists = Lists([Slot((3,), offset=1), Slot((2,), gap=2)], setting)
    lists.assert_guards_intact()
    tensor = lists.grads[1]
    position = tensor.storage_offset() + (element if element < 0 else tensor.numel() * 2)
    lists.grads.memory[position] = 0
    assert rejects(lists.assert_guards_intact)
