"""ops.adam_ on every backend, device and dtype, against the reference in float64: see test_ops.py,
whose bounds, lists and settings these are."""

import decimal
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from samkernels import ops
from samkernels.backends import reference
from samkernels.ops import Mix
from tests.helpers import (
    CHUNK_SIZE,
    LAYOUTS,
    LISTS,
    SETTINGS,
    Setting,
    Slot,
    assert_equal,
    assert_near,
    assert_same_bits,
    copies,
    doubles,
    make_list,
    make_mix,
    rejects,
)
from tests.test_ops import (
    MIX_ROUNDINGS,
    MIXED,
    PLANT_SLOTS,
    PLANTS,
    Lists,
    doubled,
    every_kernel,
    every_mix,
    every_setting,
    every_smooth_mix,
    in_setting_and_in_reference,
    may_debug_synchronisation,
    native_on_cpu,
    on_cuda,
    plant,
    scalar,
    sizes_of,
    with_negative_zeros,
)

LR, BETAS, EPS = 0.1, (0.9, 0.999), 1e-3
OPTIONS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "Adam, decay": {"weight_decay": 0.1},
    "Adam, maximize": {"weight_decay": 0.1, "maximize": True},
    "AdamW": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "AdamW, maximize": {
        "weight_decay": 0.3,
        "decoupled_weight_decay": True,
        "maximize": True,
        "betas": (0.0, 0.5),
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

# u: as far as the mix, and decay 3. m: 2 scalars, 3. v: u twice, which the root halves, 2
# scalars, 4. Denominator: root 1 (2 where PyTorch takes it), 2 scalars, 2. Update: lr, shrink 4,
# step size 2, 3. The terms of the sizes below bear no more than this many each.
ADAM_ROUNDINGS = MIX_ROUNDINGS + 24


class AdamLists(Lists):
    """With moments; those of the gradient are called as their list in `Lists`."""

    def __init__(self, slots: list[Slot], setting: Setting) -> None:
        super().__init__(slots, setting)
        self.exp_avgs = self.momentum_buffers
        self.exp_avg_sqs = make_list(slots, setting.dtype, setting.device, 5)
        torch._foreach_abs_(self.exp_avg_sqs)

    def state(self) -> list[list[Tensor]]:
        return [self.params, self.exp_avgs, self.exp_avg_sqs]


def steps_for(lists: Lists, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """0, 1, 2, 100, 0, ..: some tensors have had more steps than others."""
    device = lists.params[0].device
    counts = [(0, 1, 2, 100)[i % 4] for i in range(len(lists.params))]
    return [torch.tensor(float(t), dtype=dtype, device=device) for t in counts]


def run(
    adam: Callable[..., None],
    lists: AdamLists,
    setting: Setting,
    steps: list[Tensor],
    mix: str = "x",
    guards: dict[str, Tensor] | None = None,
    **options: Any,
) -> None:
    adam(
        lists.params,
        lists.old_params,
        make_mix(mix, lists.grads, lists.first_grads, **(guards or {})),
        lists.exp_avgs,
        lists.exp_avg_sqs,
        steps,
        backend=setting.backend,
        **{"lr": LR, "eps": EPS, **options},
    )


def check_adam(
    adam: Callable[..., None],
    slots: list[Slot],
    setting: Setting,
    mix: str = "x",
    **options: Any,
) -> None:
    lists = AdamLists(slots, setting)
    unwritten = copies([*lists.old_params, *lists.grads, *lists.first_grads])
    wide = doubled(make_mix(mix, lists.grads, lists.first_grads))
    w, m, v = map(doubles, (lists.old_params, lists.exp_avgs, lists.exp_avg_sqs))
    new, new_m, new_v = copies(w), copies(m), copies(v)
    steps, counts = steps_for(lists), steps_for(lists)
    run(adam, lists, setting, steps, mix, **options)
    options = {"eps": EPS, **options}
    ops.adam_(new, w, wide, new_m, new_v, counts, lr=LR, backend="reference", **options)
    assert_same_bits(steps, counts)

    u_sizes = sizes_of(wide)
    (beta1, beta2), decay = options.get("betas", BETAS), options.get("weight_decay", 0)
    sizes, m_sizes, v_sizes = [], [], []
    for i, count in enumerate(counts):
        u_size = u_sizes[i] + decay * w[i].abs()
        m_sizes.append(beta1 * m[i].abs() + (1 - beta1) * u_size)
        v_sizes.append(beta2 * v[i] + (1 - beta2) * u_size.square())
        correction1, correction2 = (1 - beta ** count.item() for beta in (beta1, beta2))
        # The root of v is the length of a vector of which u is an element: it errs by no more than
        # that does. The quotient passes on both errors.
        denominator = (new_v[i] / correction2).sqrt() + options["eps"]
        largest = (v_sizes[i] / correction2).sqrt() + options["eps"]
        quotient = m_sizes[i] / denominator * (1 + largest / denominator)
        sizes.append((1 + LR * decay) * w[i].abs() + LR / correction1 * quotient)
    assert_near(lists.params, new, sizes, ADAM_ROUNDINGS)
    assert_near(lists.exp_avgs, new_m, m_sizes, ADAM_ROUNDINGS)
    assert_near(lists.exp_avg_sqs, new_v, v_sizes, 2 * ADAM_ROUNDINGS)
    assert_same_bits([*lists.old_params, *lists.grads, *lists.first_grads], unwritten)
    lists.assert_guards_intact()


@every_setting
@every_option
@every_smooth_mix
def test_adam(setting: Setting, options: dict[str, Any], mix: str) -> None:
    check_adam(ops.adam_, LAYOUTS, setting, mix, **options)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        (name, setting)
        for name in LISTS
        for setting in SETTINGS
        if (name, setting.backend) != ("thousand", "interpreted")  # a minute; sgd_ has that one
    ],
    ids=str,
)
def test_adam_on_every_list(name: str, setting: Setting) -> None:
    check_adam(ops.adam_, LISTS[name], setting, "linear-tensors", **OPTIONS["AdamW"])


@every_setting
def test_without_old_params_of_their_own(setting: Setting) -> None:
    lists, in_place = AdamLists(LAYOUTS, setting), AdamLists(LAYOUTS, setting)
    in_place.params = in_place.old_params
    for one in (lists, in_place):
        run(ops.adam_, one, setting, steps_for(one))
    assert_same_bits(in_place.params, lists.params)


@every_kernel
@every_option
@every_mix
def test_kernels_update_as_the_reference_bit_for_bit(
    setting: Setting, options: dict[str, Any], mix: str
) -> None:
    results = []
    for one in in_setting_and_in_reference(setting):
        lists = AdamLists(MIXED, one)
        run(ops.adam_, lists, one, steps_for(lists), mix, **options)
        results.append([t for tensors in lists.state() for t in tensors])
    assert_equal(*results)


@native_on_cpu
def test_native_with_streaming_stores_and_threads_bit_for_bit(
    setting: Setting, threads: int
) -> None:
    # Seven passes over 3 MiB are above the 16 MiB from which the stores stream (kStreamingBytes):
    # to the first tensor, since none streams to odd offsets.
    numel = 3 * 2**20 // setting.dtype.itemsize
    slots = [Slot((numel - 200_000,)), Slot((17,), offset=2), Slot((200_000,), offset=3)]
    results = []
    for one in in_setting_and_in_reference(setting):
        lists = AdamLists(slots, one)
        run(ops.adam_, lists, one, steps_for(lists), **OPTIONS["Adam, decay"])
        lists.assert_guards_intact()
        results.append([t for tensors in lists.state() for t in tensors])
    assert_equal(*results)


# The step count


@every_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_tensor_has_its_own_step_count(setting: Setting, dtype: torch.dtype) -> None:
    together, alone = AdamLists(LAYOUTS, setting), AdamLists(LAYOUTS, setting)
    steps, steps_alone = steps_for(together, dtype), steps_for(alone, dtype)
    before = [t.item() for t in steps]
    run(ops.adam_, together, setting, steps)
    for i, step in enumerate(steps_alone):
        ops.adam_(
            *([tensors[i]] for tensors in (alone.params, alone.old_params)),
            Mix([alone.grads[i]]),
            *([tensors[i]] for tensors in (alone.exp_avgs, alone.exp_avg_sqs)),
            [step],
            lr=LR,
            eps=EPS,
            backend=setting.backend,
        )
    for ours, theirs in zip(together.state(), alone.state(), strict=True):
        assert_same_bits(ours, theirs)
    assert [t.item() for t in steps] == [t.item() for t in steps_alone] == [t + 1 for t in before]
    assert all(t.dtype is dtype for t in steps)


@every_setting
def test_the_bias_corrections_are_accurate(setting: Setting) -> None:
    """From zero moments, the first step is lr * sign(u) whatever the betas: 1 - 0.999 in float32
    would be off by 1e-5."""
    w, g = ([torch.full((5,), x, device=setting.device)] for x in (0.0, -3.0))
    state = [[torch.zeros(5, dtype=setting.dtype, device=setting.device)] for _ in range(2)]
    w, g = ([t.to(setting.dtype) for t in tensors] for tensors in (w, g))
    steps = [torch.zeros((), device=setting.device)]
    options = {"lr": 0.5, "betas": (0.9, 0.9999), "eps": 0, "backend": setting.backend}
    ops.adam_(w, w, Mix(g), *state, steps, **options)
    expected = [torch.full((5,), 0.5, dtype=torch.float64, device=setting.device)]
    assert_near(w, expected, expected, ADAM_ROUNDINGS)


COUNTS = [0, 1, 2, 3, 6, 7, 99, 1023, 1024, 54321, 2**24 - 2, 2**24]


@every_kernel
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9999), (0.5, 1 - 2**-53)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels_correct_the_bias_as_the_reference_bit_for_bit(
    setting: Setting, dtype: torch.dtype, betas: tuple[float, float]
) -> None:
    """After any number of steps, up to where float32 counts no further. More tensors than a block
    of the kernels has threads; float32 and float64 side by side."""
    results = []
    for one in in_setting_and_in_reference(setting):
        slots = [Slot((3,))] * 300
        lists = AdamLists(slots, one)
        counts = [COUNTS[i % len(COUNTS)] for i in range(len(slots))]
        dtypes = [dtype if i % 3 else torch.float32 for i in range(len(slots))]
        steps = [
            torch.tensor(float(t), dtype=of_step, device=one.device)
            for t, of_step in zip(counts, dtypes, strict=True)
        ]
        run(ops.adam_, lists, one, steps, betas=betas)
        assert [t.dtype for t in steps] == dtypes
        results.append([*lists.params, *steps])
    assert_equal(*results)


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999, 1 - 2**-53])
def test_powers_of_the_reference_are_accurate(beta: float) -> None:
    """By squaring: one rounding for each of the multiplications that a power stands for."""
    powers = reference._power(beta, torch.tensor(COUNTS, dtype=torch.float64))
    with decimal.localcontext(decimal.Context(prec=60, Emin=decimal.MIN_EMIN)):
        for t, power in zip(COUNTS, map(decimal.Decimal, powers.tolist()), strict=True):
            exact = decimal.Decimal(beta) ** t
            bound = t * decimal.Decimal(2.0**-53) * exact + decimal.Decimal(2.0**-1074)
            assert abs(power - exact) <= bound


def test_powers_of_zero() -> None:
    powers = reference._power(0.0, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert powers.tolist() == [1, 0, 0]


def test_a_step_is_two_launches_and_no_small_operations(emulated_core: Any) -> None:
    """One launch counts and corrects the bias, whatever the number of tensors, and one updates."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            names.append(str(func))
            return func(*args, **kwargs or {})

    setting = Setting("cpu", "emulated", torch.float32)
    for slots in ([Slot((3,))], [Slot((3,))] * 70, [Slot((3,))] * 600):
        lists, names = AdamLists(slots, setting), []
        steps, mix = steps_for(lists), Mix(lists.grads, **passing(setting))
        moments = lists.exp_avgs, lists.exp_avg_sqs
        emulated_core.take_launches()
        with Names():
            ops.adam_(
                lists.params, lists.old_params, mix, *moments, steps, lr=LR, backend="emulated"
            )
        assert emulated_core.take_launches() == 2
        assert names == ["aten.empty.memory_format"]  # where the corrections go
        assert steps[0].item() == 1


@every_setting
@pytest.mark.parametrize("options", ["Adam, decay", "AdamW"])
@pytest.mark.parametrize(
    ("mix", "square", "found_inf"),
    [
        ("x", math.inf, None),
        ("sign", math.nan, 0.0),
        ("linear", 1.5, 1.0),
        ("scaled", None, 2.0),
    ],
)
def test_a_skipped_step_leaves_everything(
    setting: Setting, options: str, mix: str, square: float | None, found_inf: float | None
) -> None:
    lists = AdamLists(PLANT_SLOTS, setting)
    for tensors in (lists.old_params, lists.exp_avgs, lists.exp_avg_sqs):
        with_negative_zeros(tensors)
    for where in PLANTS:
        plant(lists.first_grads, where, math.nan)
        plant(lists.grads, where, math.inf)
    steps = steps_for(lists)
    before = [copies(ts) for ts in (lists.old_params, lists.exp_avgs, lists.exp_avg_sqs, steps)]
    guards = {}
    if square is not None:
        guards["ascent_square"] = scalar(square, setting).double()
    if found_inf is not None:
        guards["found_inf"] = scalar(found_inf, setting)
    run(ops.adam_, lists, setting, steps, mix, guards, **OPTIONS[options])
    for tensors, unchanged in zip([*lists.state(), steps], before, strict=True):
        assert_same_bits(tensors, unchanged)
    lists.assert_guards_intact()


def passing(setting: Setting) -> dict[str, Tensor]:
    """What may skip a step, and does not."""
    square = scalar(1.5, setting).double()
    return {"ascent_square": square, "found_inf": scalar(0.0, setting)}


@every_setting
@every_mix
@pytest.mark.parametrize("options", ["AdamW"])
def test_checks_that_pass_change_nothing(setting: Setting, mix: str, options: str) -> None:
    results = []
    for guards in ({}, passing(setting)):
        lists = AdamLists(PLANT_SLOTS, setting)
        steps = steps_for(lists)
        run(ops.adam_, lists, setting, steps, mix, guards, **OPTIONS[options])
        results.append([*lists.params, *lists.exp_avgs, *lists.exp_avg_sqs, *steps])
    assert_same_bits(*results)


@every_setting
@pytest.mark.parametrize("mix", ["x", "negated", "scaled", "linear", "linear-tensors", "sign"])
@pytest.mark.parametrize("options", ["Adam, decay"])
def test_gradients_are_divided(setting: Setting, mix: str, options: str) -> None:
    """A power of 2, in the gradients and in the divisor, cancels to the last bit."""
    results = []
    for scale in (1.0, 64.0):
        lists = AdamLists(LAYOUTS, setting)
        for tensors in (lists.grads, lists.first_grads):
            torch._foreach_mul_(tensors, scale)
        guards = {"divisor": scalar(scale, setting)}
        run(ops.adam_, lists, setting, steps_for(lists), mix, guards, **OPTIONS[options])
        results.append([*lists.params, *lists.exp_avgs, *lists.exp_avg_sqs])
    assert_same_bits(*results)


# Memory


@pytest.mark.parametrize("backend", ["auto", "foreach", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_with_gaps(backend: str, dtype: torch.dtype) -> None:
    slots = [Slot((17,), gap=2), Slot((5, 7), order=(1, 0), gap=3, offset=1), Slot((3,), gap=2)]
    setting = Setting("cpu", "reference" if backend == "reference" else "foreach", dtype)

    def adam(*args: Any, **options: Any) -> None:
        ops.adam_(*args, **{**options, "backend": backend})

    check_adam(adam, slots, setting, "sign", **OPTIONS["AdamW"])


@every_setting
def test_lr_as_a_tensor(setting: Setting) -> None:
    """Read on the device when the op runs there: the bits are those of a number."""
    results = []
    for lr in (LR, scalar(LR, setting)):
        lists = AdamLists(LAYOUTS, setting)
        run(ops.adam_, lists, setting, steps_for(lists), lr=lr, **OPTIONS["AdamW"])
        results.append([*lists.params, *lists.exp_avgs, *lists.exp_avg_sqs])
    assert_same_bits(*results)


@every_setting
def test_tuples_do_the_same(setting: Setting) -> None:
    results = []
    for container in (list, tuple):
        lists = AdamLists(LAYOUTS, setting)
        steps = steps_for(lists)
        w, old, g2, m, v, counts = map(
            container,
            (*lists.state()[:1], lists.old_params, lists.grads, *lists.state()[1:], steps),
        )
        ops.adam_(w, old, Mix(g2), m, v, counts, lr=LR, backend=setting.backend)
        results.append([*w, *m, *v, *counts])
    assert_same_bits(*results)


# Determinism


def everything_after_a_step(setting: Setting) -> list[Tensor]:
    lists = AdamLists(LISTS["sizes"] + LAYOUTS, setting)  # long enough for threads
    steps = steps_for(lists)
    guards = {**passing(setting), "divisor": scalar(3.0, setting)}
    run(ops.adam_, lists, setting, steps, "linear-tensors", guards, **OPTIONS["AdamW"])
    return [*lists.params, *lists.exp_avgs, *lists.exp_avg_sqs, *steps]


@every_setting
def test_the_same_bits_again(setting: Setting) -> None:
    assert_same_bits(everything_after_a_step(setting), everything_after_a_step(setting))


@native_on_cpu
def test_native_gives_the_same_bits_for_any_number_of_threads(setting: Setting) -> None:
    alone = everything_after_a_step(setting)
    for number in (2, 3):
        torch.set_num_threads(number)
        try:
            assert_same_bits(everything_after_a_step(setting), alone)
        finally:
            torch.set_num_threads(1)


@on_cuda
@may_debug_synchronisation
def test_nothing_waits_for_the_device(setting: Setting) -> None:
    everything_after_a_step(setting)  # what is built once, or read once, may wait
    lists = AdamLists(LAYOUTS, setting)
    steps = steps_for(lists)
    guards = passing(setting)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ops.adam_, lists, setting, steps, guards=guards)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Autograd


@every_setting
def test_version_counters_of_what_is_written(setting: Setting) -> None:
    lists = AdamLists(LAYOUTS, setting)
    steps = steps_for(lists)
    written = [*steps, *(t for tensors in lists.state() for t in tensors)]
    read = [*lists.old_params, *lists.grads, *lists.first_grads]
    before = [t._version for t in written], [t._version for t in read]
    run(ops.adam_, lists, setting, steps, "sign")
    assert all(t._version > version for t, version in zip(written, before[0], strict=True))
    assert [t._version for t in read] == before[1]


@every_setting
def test_autograd_refuses_a_backward_through_overwritten_weights(setting: Setting) -> None:
    w = torch.nn.Parameter(torch.ones(3, dtype=setting.dtype, device=setting.device))
    loss = (w * w).sum()  # saves w
    old, g, m, v = ([torch.ones_like(w, requires_grad=False)] for _ in range(4))
    steps = [torch.zeros((), device=setting.device)]
    ops.adam_([w], old, Mix(g), m, v, steps, lr=LR, backend=setting.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Mutants: the comparison above rejects wrong code


def adam_with(**wrong: Any) -> Callable[..., None]:
    return lambda *args, **options: ops.adam_(*args, **{**options, **wrong})


def without_restore(params: Any, old_params: Any, *args: Any, **options: Any) -> None:
    ops.adam_(params, params, *args, **options)


def with_swapped_moments(
    params: Any, old_params: Any, grads: Any, m: Any, v: Any, *args: Any, **options: Any
) -> None:
    ops.adam_(params, old_params, grads, v, m, *args, **options)


def with_one_count_for_all(*args: Any, **options: Any) -> None:
    *lists, steps = args
    ops.adam_(*lists, [steps[0].clone() for _ in steps], **options)
    torch._foreach_add_(steps, 1)


def without_counting(*args: Any, **options: Any) -> None:
    *lists, steps = args
    ops.adam_(*lists, copies(steps), **options)


def with_a_count_too_many(*args: Any, **options: Any) -> None:
    *lists, steps = args
    ops.adam_(*lists, [t + 1 for t in steps], **options)
    torch._foreach_add_(steps, 1)


MUTANTS: dict[str, Callable[..., None]] = {
    "no restore": without_restore,
    "no decay": adam_with(weight_decay=0.0),
    "the other decay": adam_with(decoupled_weight_decay=True),
    "ascent": adam_with(maximize=True),
    "beta1": adam_with(betas=(0.91, 0.999)),
    "beta2": adam_with(betas=(0.9, 0.995)),
    "swapped betas": adam_with(betas=(0.999, 0.9)),
    "swapped moments": with_swapped_moments,
    "eps": adam_with(eps=2 * EPS),
    "lr": adam_with(lr=1.1 * LR),
    "one count for all": with_one_count_for_all,
    "counted before": with_a_count_too_many,
    "not counted": without_counting,
    "nothing": lambda *args, **options: None,
}


@every_setting
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_wrong_updates_are_rejected(setting: Setting, mutant: Callable[..., None]) -> None:
    slots = [*LAYOUTS, Slot((CHUNK_SIZE,))]
    options = OPTIONS["Adam, decay"]
    check_adam(ops.adam_, slots, setting, **options)
    assert rejects(lambda: check_adam(mutant, slots, setting, **options))


@every_setting
def test_swapped_lists_are_rejected(setting: Setting) -> None:
    def swapped(params: Any, old_params: Any, mix: Mix, *args: Any, **options: Any) -> None:
        assert mix.y is not None
        ops.adam_(params, old_params, mix._replace(x=mix.y, y=mix.x), *args, **options)

    assert rejects(lambda: check_adam(swapped, LAYOUTS, setting, "sign"))
