"""Every op on every backend, device and dtype, against the reference in float64.

The bounds are derived: each op states how many roundings its result has been through, and
helpers.assert_near turns that into an error. A perturbation is compared given the norm that the
backend found, and the norm is compared on its own.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import ops
from tests.helpers import (
    CHUNK_SIZE,
    DEVICES,
    INTEGER_OF,
    LAYOUTS,
    LISTS,
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
    flat,
    make_list,
    rejects,
    unit_roundoff,
)

# Roundings on the longest way to a result. A scalar option counts one: it is rounded to float32.
PERTURB_ROUNDINGS = 8  # rho, + eps, rho / n (two as a reciprocal), w * w, * g, * scale, w +
RECOMBINE_ROUNDINGS = 6  # n1, n2, + eps, n1 / n2 (two), * g
SGD_ROUNDINGS = RECOMBINE_ROUNDINGS + 12  # 4 scalars; decay 2, momentum 2, Nesterov 2, update 2

RHO = 0.05
PERTURBATIONS = {
    "plain": {},
    "adaptive": {"adaptive": True},
    "maximize": {"maximize": True},
    "adaptive-maximize": {"adaptive": True, "maximize": True},
}
RULES = [
    ("sam", "element"),
    *((r, g) for r in ("samdirection", "sammagnitude") for g in ops.GRANULARITIES),
]
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
every_rule = pytest.mark.parametrize(("rule", "granularity"), RULES)
NATIVE = [s for s in SETTINGS if s.backend == "native"]
KERNELS = [s for s in SETTINGS if s.backend in ("native", "triton", "interpreted")]
every_kernel = pytest.mark.parametrize("setting", KERNELS, ids=str)
native_on_cpu = pytest.mark.parametrize(
    "setting", [s for s in NATIVE if s.device == "cpu"], ids=str
)
on_cuda = pytest.mark.parametrize("setting", [s for s in SETTINGS if s.device == "cuda"], ids=str)
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
    """2 where squares are summed in float64: the product with the weight, and the result.

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
    norm = perturb(w, g, lists.old_params, rho=RHO, backend=setting.backend, **options)
    assert norm.shape == ()
    expected = copies(wide)
    ops.perturb_(
        expected,
        wide_grads,
        copies(wide),
        rho=RHO,
        norm=norm.double(),
        backend="reference",
        **options,
    )
    sizes = [a.abs() + (e - a).abs() for a, e in zip(wide, expected, strict=True)]
    assert_near(w, expected, sizes, PERTURB_ROUNDINGS)
    assert_same_bits(lists.old_params, before)
    assert_same_bits(g, grads_before)
    lists.assert_guards_intact()


def check_recombine(
    recombine: Callable[..., None], slots: list[Slot], setting: Setting, **options: Any
) -> None:
    lists = Lists(slots, setting)
    first_before = copies(lists.first_grads)
    expected, wide_first = doubles(lists.grads), doubles(lists.first_grads)
    recombine(lists.grads, lists.first_grads, backend=setting.backend, **options)
    ops.recombine_(expected, wide_first, backend="reference", **options)
    if options.get("granularity", "element") == "element":
        assert_equal(lists.grads, expected)
    else:
        roundings = RECOMBINE_ROUNDINGS + 2 * norm_roundings(setting, total_numel(expected))
        assert_near(lists.grads, expected, [e.abs() for e in expected], roundings)
    assert_same_bits(lists.first_grads, first_before)
    lists.assert_guards_intact()


def check_sgd(
    sgd: Callable[..., None], slots: list[Slot], setting: Setting, **options: Any
) -> None:
    lists = Lists(slots, setting)
    unwritten = copies([*lists.old_params, *lists.grads, *lists.first_grads])
    w, u, buf, first = map(
        doubles, (lists.old_params, lists.grads, lists.momentum_buffers, lists.first_grads)
    )
    new, new_buf = copies(w), copies(buf)
    sgd(
        lists.params,
        lists.old_params,
        lists.grads,
        lists.momentum_buffers,
        lr=0.1,
        first_grads=lists.first_grads,
        backend=setting.backend,
        **options,
    )
    ops.sgd_(new, w, u, new_buf, lr=0.1, first_grads=first, backend="reference", **options)

    recombination = {key: options[key] for key in ("rule", "granularity") if key in options}
    if recombination:
        ops.recombine_(u, first, backend="reference", **recombination)
    momentum, decay = options.get("momentum", 0), options.get("weight_decay", 0)
    buf_sizes = [
        u_.abs() + decay * w_.abs() + momentum * b_.abs()
        for u_, w_, b_ in zip(u, w, buf, strict=True)
    ]
    sizes = [w_.abs() + 0.1 * (1 + momentum) * size for w_, size in zip(w, buf_sizes, strict=True)]
    roundings: float = SGD_ROUNDINGS
    if options.get("granularity", "element") != "element":
        roundings += 2 * norm_roundings(setting, total_numel(w))
    assert_near(lists.params, new, sizes, roundings)
    if momentum == 0:
        assert_equal(lists.momentum_buffers, buf)
    else:
        assert_near(lists.momentum_buffers, new_buf, buf_sizes, roundings)
    assert_same_bits([*lists.old_params, *lists.grads, *lists.first_grads], unwritten)
    lists.assert_guards_intact()


# Every op, list of tensors and setting


@every_setting
@every_list
@pytest.mark.parametrize("weighted", [False, True])
def test_norms(slots: list[Slot], setting: Setting, weighted: bool) -> None:
    lists = Lists(slots, setting)
    x, weights = lists.grads, lists.params if weighted else None
    norms = total, per_tensor = ops.norms(x, weights, backend=setting.backend)
    wide_weights = doubles(lists.params) if weighted else None
    expected = ops.norms(doubles(x), wide_weights, backend="reference")
    for actual, e in ((total, expected.total), (per_tensor, expected.per_tensor)):
        assert actual.dtype is (torch.float64 if setting.dtype is torch.float64 else torch.float32)
        assert actual.device.type == setting.device
        assert_near([actual], [e], [e], norm_roundings(setting, total_numel(x)))
    if weights is not None:
        both = ops.weighted_norms(x, weights, backend=setting.backend)
        assert_same_bits(list(both[0]), list(norms))
        assert_same_bits(list(both[1]), list(ops.norms(x, backend=setting.backend)))
    lists.assert_guards_intact()


@every_setting
@every_list
@pytest.mark.parametrize("options", ["plain", "adaptive-maximize"])
def test_perturb(slots: list[Slot], setting: Setting, options: str) -> None:
    check_perturb(ops.perturb_, slots, setting, **PERTURBATIONS[options])


@every_setting
@pytest.mark.parametrize("adaptive", [False, True])
def test_perturb_returns_the_norm(setting: Setting, adaptive: bool) -> None:
    lists = Lists(LAYOUTS, setting)
    weights = lists.params if adaptive else None
    expected = ops.norms(lists.grads, weights, backend=setting.backend).total
    norm = ops.perturb_(
        lists.params,
        lists.grads,
        lists.old_params,
        rho=RHO,
        adaptive=adaptive,
        backend=setting.backend,
    )
    assert_same_bits([norm], [expected])


@every_setting
@every_perturbation
def test_perturb_with_a_known_norm(setting: Setting, options: dict[str, Any]) -> None:
    norm = torch.tensor(3.0, dtype=torch.float32, device=setting.device)
    norm = norm.double() if setting.dtype is torch.float64 else norm

    def perturb(*args: Any, **kwargs: Any) -> Tensor:
        returned = ops.perturb_(*args, norm=norm, **kwargs)
        assert returned is norm
        return returned

    check_perturb(perturb, LAYOUTS, setting, **options)


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
@every_rule
def test_recombine(setting: Setting, rule: str, granularity: str) -> None:
    check_recombine(ops.recombine_, LAYOUTS, setting, rule=rule, granularity=granularity)


@every_setting
@every_list
@pytest.mark.parametrize(
    ("rule", "granularity"),
    [("samdirection", "element"), ("sammagnitude", "tensor")],
)
def test_recombine_on_every_list(
    slots: list[Slot], setting: Setting, rule: str, granularity: str
) -> None:
    check_recombine(ops.recombine_, slots, setting, rule=rule, granularity=granularity)


@every_setting
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@every_rule
def test_sgd(setting: Setting, options: dict[str, Any], rule: str, granularity: str) -> None:
    check_sgd(ops.sgd_, LAYOUTS, setting, rule=rule, granularity=granularity, **options)


@every_setting
@every_list
def test_sgd_on_every_list(slots: list[Slot], setting: Setting) -> None:
    recombination = {"rule": "sammagnitude", "granularity": "tensor"}
    check_sgd(ops.sgd_, slots, setting, **SGD_OPTIONS["nesterov"], **recombination)


@every_setting
def test_sgd_without_old_params_of_their_own(setting: Setting) -> None:
    lists, in_place = Lists(LAYOUTS, setting), Lists(LAYOUTS, setting)
    for one, params in ((lists, lists.params), (in_place, in_place.old_params)):
        ops.sgd_(params, one.old_params, one.grads, lr=0.1, backend=setting.backend)
    assert_same_bits(in_place.old_params, lists.params)


@every_setting
@pytest.mark.parametrize("granularity", ["tensor", "global"])
@pytest.mark.parametrize("rule", ["samdirection", "sammagnitude"])
def test_known_norms_are_used(setting: Setting, rule: str, granularity: str) -> None:
    lists = Lists(LAYOUTS, setting)
    wide = torch.float64 if setting.dtype is torch.float64 else torch.float32
    shape = () if granularity == "global" else (len(LAYOUTS),)
    generator = torch.Generator().manual_seed(0)
    first_norm, second_norm = torch.rand(2, *shape, generator=generator).add(0.5).to(wide)
    ratios = first_norm / second_norm if rule == "samdirection" else second_norm / first_norm
    magnitude = lists.grads if rule == "samdirection" else lists.first_grads
    expected = [
        ratio * m
        for ratio, m in zip(
            ratios.double().expand(len(LAYOUTS)).unbind(), doubles(magnitude), strict=True
        )
    ]
    ops.recombine_(
        lists.grads,
        lists.first_grads,
        rule=rule,
        granularity=granularity,
        first_norm=first_norm.to(setting.device),
        second_norm=second_norm.to(setting.device),
        eps=0,
        backend=setting.backend,
    )
    # The ratio above was rounded as well: one more.
    sizes = [e.abs() for e in expected]
    assert_near(lists.grads, expected, sizes, RECOMBINE_ROUNDINGS + 1)


@every_setting
@every_list
def test_compare(slots: list[Slot], setting: Setting) -> None:
    lists = Lists(slots, setting)
    check_comparison(lists.first_grads, lists.grads, lists.old_params, setting)
    lists.assert_guards_intact()


def check_comparison(
    first: list[Tensor], second: list[Tensor], weights: list[Tensor], setting: Setting
) -> None:
    sums, numel, second_norms = ops.compare(first, second, weights, backend=setting.backend)
    assert_same_bits(list(second_norms), list(ops.norms(second, backend=setting.backend)))
    g1, g2, w = (flat(doubles(tensors)) for tensors in (first, second, weights))
    expected = torch.stack(
        [
            (g1 * g1).sum(),
            (g2 * g2).sum(),
            (g1 * g2).sum(),
            (g2.abs() > g1.abs()).sum(),
            (g1.sign() * g2.sign() > 0).sum(),
            (w * w).sum(),
        ]
    )
    sizes = expected.clone()
    sizes[2] = (g1 * g2).abs().sum()
    sizes[3:5] = 0  # counts are exact
    assert sums.dtype is torch.float64 and sums.device.type == setting.device
    assert numel == len(g1)
    # foreach has its sums from products, and from norms whose squares double the roundings.
    bound = 2 * norm_roundings(setting, numel) * unit_roundoff(setting.dtype) * sizes
    assert bool(((sums - expected).abs() <= bound).all())


# Bits: the kernels do the reference's arithmetic, on every device


MIXED = [*LAYOUTS, Slot((CHUNK_SIZE + 1,), offset=1), Slot((511,))]


def in_setting_and_in_reference(setting: Setting) -> tuple[Setting, Setting]:
    return setting, Setting("cpu", "reference", setting.dtype)


def known_norms(setting: Setting, rule: str, granularity: str, length: int) -> dict[str, Tensor]:
    if rule == "sam" or granularity == "element":
        return {}
    shape = () if granularity == "global" else (length,)
    generator = torch.Generator().manual_seed(0)
    first_norm, second_norm = torch.rand(2, *shape, generator=generator).to(setting.device) + 0.5
    return {"first_norm": first_norm, "second_norm": second_norm}


@every_kernel
@every_perturbation
def test_kernels_perturb_as_the_reference_bit_for_bit(
    setting: Setting, options: dict[str, Any]
) -> None:
    results = []
    for device, backend, dtype in in_setting_and_in_reference(setting):
        lists = Lists(MIXED, Setting(device, backend, dtype))
        ops.perturb_(
            lists.params,
            lists.grads,
            lists.old_params,
            rho=RHO,
            norm=torch.tensor(7.5, device=device),  # RHO / 7.5 is not RHO * (1 / 7.5) in float32
            backend=backend,
            **options,
        )
        results.append(lists.params)
    assert_equal(*results)


@every_kernel
@every_rule
def test_kernels_recombine_as_the_reference_bit_for_bit(
    setting: Setting, rule: str, granularity: str
) -> None:
    results = []
    for one in in_setting_and_in_reference(setting):
        lists = Lists(MIXED, one)
        ops.recombine_(
            lists.grads,
            lists.first_grads,
            rule=rule,
            granularity=granularity,
            ascent_norm=scalar(1.0, one),
            backend=one.backend,
            **known_norms(one, rule, granularity, len(MIXED)),
        )
        results.append(lists.grads)
    assert_equal(*results)


@every_kernel
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@every_rule
def test_kernels_update_as_the_reference_bit_for_bit(
    setting: Setting, options: dict[str, Any], rule: str, granularity: str
) -> None:
    results = []
    for one in in_setting_and_in_reference(setting):
        lists = Lists(MIXED, one)
        ops.sgd_(
            lists.params,
            lists.old_params,
            lists.grads,
            lists.momentum_buffers,
            lr=0.1,
            rule=rule,
            granularity=granularity,
            first_grads=lists.first_grads,
            backend=one.backend,
            **known_norms(one, rule, granularity, len(MIXED)),
            **options,
        )
        results.append(lists.params + lists.momentum_buffers)
    assert_equal(*results)


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
        norm = torch.tensor(2.0)
        ops.perturb_(
            one.params, one.grads, one.old_params, rho=0.5, norm=norm, eps=0, backend=backend
        )
        assert_same_bits(one.old_params, before)
        ops.recombine_(one.grads, one.first_grads, rule="samdirection", backend=backend)
        perturbed = copies(one.params)
        ops.sgd_(
            one.params,
            one.old_params,
            one.grads,
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
def test_norms_of_gradients_that_are_not_finite(setting: Setting, where: str, value: float) -> None:
    grads = Lists(PLANT_SLOTS, setting).grads
    plant(grads, where, value)
    total, per_tensor = ops.norms(grads, backend=setting.backend)
    planted = torch.arange(len(grads)) == PLANTS[where][0]
    assert not total.isfinite()
    assert torch.equal(per_tensor.isfinite().cpu(), ~planted)


@every_setting
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", PLANTS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_gradient_that_is_not_finite_does_not_touch_the_weights(
    setting: Setting, where: str, value: float, adaptive: bool
) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    plant(lists.first_grads, where, value)
    with_negative_zeros(lists.params)
    before = copies(lists.params)
    norm = ops.perturb_(
        lists.params,
        lists.first_grads,
        lists.old_params,
        rho=RHO,
        adaptive=adaptive,
        backend=setting.backend,
    )
    assert not norm.isfinite()
    assert_same_bits(lists.params, before)
    assert_same_bits(lists.old_params, before)
    lists.assert_guards_intact()


@every_setting
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@pytest.mark.parametrize(
    ("norm", "rule"),
    [(math.inf, "sam"), (math.nan, "samdirection"), (math.inf, "sammagnitude")],
)
def test_sgd_skips_a_step_whose_norm_is_not_finite(
    setting: Setting, norm: float, options: dict[str, Any], rule: str
) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    for tensors in (lists.old_params, lists.momentum_buffers):
        with_negative_zeros(tensors)
    for where in PLANTS:
        plant(lists.first_grads, where, math.nan)
        plant(lists.grads, where, math.inf)
    old, buffers = copies(lists.old_params), copies(lists.momentum_buffers)
    ops.sgd_(
        lists.params,
        lists.old_params,
        lists.grads,
        lists.momentum_buffers,
        lr=0.1,
        rule=rule,
        first_grads=lists.first_grads,
        ascent_norm=scalar(norm, setting),
        backend=setting.backend,
        **options,
    )
    assert_same_bits(lists.params, old)
    if "init_momentum" in options:
        buffers = [torch.zeros_like(b) for b in buffers]
    assert_same_bits(lists.momentum_buffers, buffers)
    lists.assert_guards_intact()


@every_setting
@every_rule
@pytest.mark.parametrize("options", ["plain", "nesterov", "init"])
def test_a_finite_ascent_norm_changes_nothing(
    setting: Setting, rule: str, granularity: str, options: str
) -> None:
    def sgd(*args: Any, **kwargs: Any) -> None:
        ops.sgd_(*args, ascent_norm=scalar(1.5, setting), **kwargs)

    recombination = {"rule": rule, "granularity": granularity}
    check_sgd(sgd, LAYOUTS, setting, **recombination, **SGD_OPTIONS[options])


@every_setting
@every_rule
@pytest.mark.parametrize("norm", [-math.inf, math.nan])
def test_recombine_gives_zero_where_the_norm_is_not_finite(
    setting: Setting, rule: str, granularity: str, norm: float
) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    for where in PLANTS:
        plant(lists.first_grads, where, math.inf)
        plant(lists.grads, where, math.nan)
    ops.recombine_(
        lists.grads,
        lists.first_grads,
        rule=rule,
        granularity=granularity,
        ascent_norm=scalar(norm, setting),
        backend=setting.backend,
    )
    assert_equal(lists.grads, [torch.zeros_like(g) for g in lists.grads])
    lists.assert_guards_intact()


@every_setting
@every_rule
@pytest.mark.parametrize("scale", [1024.0, 3.0])
def test_sgd_divides_by_the_grad_scale(
    setting: Setting, rule: str, granularity: str, scale: float
) -> None:
    """As if lr and weight decay, without momentum, belonged to gradients that were divided."""

    def sgd(*args: Any, lr: float, weight_decay: float, **kwargs: Any) -> None:
        options = {"lr": lr * scale, "weight_decay": weight_decay / scale, **kwargs}
        ops.sgd_(*args, grad_scale=scalar(scale, setting), **options)

    check_sgd(sgd, LAYOUTS, setting, rule=rule, granularity=granularity, weight_decay=0.01)


@every_setting
@every_rule
def test_recombine_divides_by_the_grad_scale(setting: Setting, rule: str, granularity: str) -> None:
    results = []
    for scale in (None, 64.0):  # a power of 2: exact
        lists = Lists(LAYOUTS, setting)
        ops.recombine_(
            lists.grads,
            lists.first_grads,
            rule=rule,
            granularity=granularity,
            grad_scale=None if scale is None else scalar(scale, setting),
            backend=setting.backend,
        )
        results.append(doubles(lists.grads))
    if setting.dtype is torch.float16:  # may lose bits where it becomes subnormal
        for u, divided in zip(*results, strict=True):
            torch.testing.assert_close(divided, u / 64, rtol=0, atol=2.0**-25)
    else:
        assert_same_bits(results[1], [u / 64 for u in results[0]])


@every_setting
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@pytest.mark.parametrize("rule", ops.RULES)
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])
def test_sgd_skips_a_step_that_overflowed(
    setting: Setting, options: dict[str, Any], rule: str, found_inf: float
) -> None:
    results = []
    for found in (None, scalar(found_inf, setting)):
        lists = Lists(PLANT_SLOTS, setting)
        if found is not None and found_inf != 0:
            for where in PLANTS:
                plant(lists.grads, where, math.inf)
        ops.sgd_(
            lists.params,
            lists.old_params,
            lists.grads,
            lists.momentum_buffers,
            lr=0.1,
            rule=rule,
            first_grads=lists.first_grads,
            ascent_norm=scalar(1.5, setting),
            found_inf=found,
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
@every_rule
def test_recombine_gives_zero_after_an_overflow(
    setting: Setting, rule: str, granularity: str
) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    for where in PLANTS:
        plant(lists.grads, where, math.inf)
    ops.recombine_(
        lists.grads,
        lists.first_grads,
        rule=rule,
        granularity=granularity,
        found_inf=scalar(1.0, setting),
        backend=setting.backend,
    )
    assert_equal(lists.grads, [torch.zeros_like(g) for g in lists.grads])


def scalar(value: float, setting: Setting) -> Tensor:
    dtype = torch.float64 if setting.dtype is torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device=setting.device)


@every_setting
@pytest.mark.parametrize("adaptive", [False, True])
def test_zero_gradients_perturb_nothing(setting: Setting, adaptive: bool) -> None:
    lists = Lists(PLANT_SLOTS, setting)
    with_negative_zeros(lists.params)
    before = copies(lists.params)
    zeros = [torch.zeros_like(g) for g in lists.grads]
    norm = ops.perturb_(
        lists.params,
        zeros,
        lists.old_params,
        rho=RHO,
        adaptive=adaptive,
        backend=setting.backend,
    )
    assert norm.item() == 0
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
    total, per_tensor = ops.norms(grads, backend=setting.backend)
    wide = doubles(grads)
    expected = [torch.linalg.vector_norm(g) for g in (*wide, torch.cat(wide))]
    roundings = norm_roundings(setting, 10_000)
    assert_near([*per_tensor, total], expected, expected, roundings)


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
def test_comparison_of_extreme_gradients(setting: Setting, which: int) -> None:
    first, second, weights = (extreme_list(setting, which, seed) for seed in range(3))
    check_comparison(first, second, weights, setting)


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

    check_perturb(on_backend(ops.perturb_), slots, bounds, adaptive=True)
    check_recombine(on_backend(ops.recombine_), slots, bounds, rule="samdirection")
    check_sgd(on_backend(ops.sgd_), slots, bounds, rule="sammagnitude", **SGD_OPTIONS["nesterov"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_interleaved_slices_of_one_storage(device: str, backend: str) -> None:
    storage, ones = torch.arange(1.0, 9.0, device=device), torch.ones(8, device=device)
    params, grads = [storage[0::2], storage[1::2]], [ones[0::2], ones[1::2]]
    ops.sgd_(params, params, grads, lr=1, backend=backend)
    assert torch.equal(storage, torch.arange(8.0, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
def test_lazily_negated_gradients(device: str, backend: str) -> None:
    # PyTorch may keep a sign in a bit of the tensor and not in its memory, as in x.conj().imag.
    params, grads = [torch.zeros(3, device=device)], [torch.ones(3, device=device)]
    ops.sgd_(params, params, [torch._neg_view(grads[0])], lr=1, backend=backend)
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
        norms = ops.norms(g1, w, **backend)
        norm = ops.perturb_(w, g1, old, rho=RHO, **backend)
        sums = ops.compare(g1, g2, w, **backend).sums
        ops.recombine_(g2, g1, rule="sammagnitude", **backend)
        ops.sgd_(w, old, g2, buf, lr=0.1, momentum=0.9, **backend)
        ops.restore_(old, w, **backend)
        results.append([*norms, norm, sums, *w, *old, *g2, *buf])
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
        ops.sgd_(w, old, lists.grads, buffers, lr=lr, momentum=0.9, backend=backend)
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
    norm = ops.perturb_(w, lists.first_grads, old, rho=RHO, adaptive=True, **options)
    norms = ops.norms(lists.grads, **options)
    sums = ops.compare(lists.first_grads, lists.grads, old, **options).sums
    ops.sgd_(
        w,
        old,
        lists.grads,
        lists.momentum_buffers,
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        rule="sammagnitude",
        granularity="tensor",
        first_grads=lists.first_grads,
        ascent_norm=norm,
        **options,
    )
    ops.recombine_(
        lists.grads,
        lists.first_grads,
        rule="samdirection",
        granularity="global",
        ascent_norm=norm,
        **options,
    )
    ops.restore_(old, w, **options)
    return [norm, *norms, sums, *w, *old, *lists.grads, *lists.momentum_buffers]


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
        (lambda: ops.norms(g1, w, **backend), []),
        (lambda: ops.perturb_(w, g1, old, rho=RHO, **backend), [*w, *old]),
        (lambda: ops.restore_(w, old, **backend), w),
        (lambda: ops.recombine_(g2, g1, rule="samdirection", **backend), g2),
        (lambda: ops.sgd_(w, old, g2, lr=0.1, **backend), w),
        (lambda: ops.sgd_(w, old, g2, buf, lr=0.1, momentum=0.9, **backend), [*w, *buf]),
        (lambda: ops.compare(g1, g2, w, **backend), []),
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
            ops.sgd_([w], [old], [g], lr=0.1, **backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Mutants: the comparisons above reject wrong code

SWAPPED = {"samdirection": "sammagnitude", "sammagnitude": "samdirection"}


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
    "adaptive": perturb_with(adaptive=True),
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


@every_setting
@pytest.mark.parametrize("granularity", ops.GRANULARITIES)
@pytest.mark.parametrize("rule", SWAPPED)
def test_swapped_rules_are_rejected(setting: Setting, rule: str, granularity: str) -> None:
    def swapped(op: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **options: op(*args, **{**options, "rule": SWAPPED[rule]})

    options = {"rule": rule, "granularity": granularity}
    assert rejects(lambda: check_recombine(swapped(ops.recombine_), LAYOUTS, setting, **options))
    assert rejects(lambda: check_sgd(swapped(ops.sgd_), LAYOUTS, setting, **options))


def sgd_without_restore(
    params: list[Tensor], old_params: list[Tensor], *args: Any, **options: Any
) -> None:
    ops.sgd_(params, params, *args, **options)


def sgd_with_decay_of_perturbed_weights(
    params: list[Tensor],
    old_params: list[Tensor],
    grads: list[Tensor],
    *args: Any,
    weight_decay: float,
    **options: Any,
) -> None:
    decayed = [g + weight_decay * w for g, w in zip(grads, params, strict=True)]
    ops.sgd_(params, old_params, decayed, *args, **options)


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
