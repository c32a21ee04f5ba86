"""The reference backend, the oracle of all others, against closed forms and steps taken by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import ops
from samkernels.ops import Mix
from tests.helpers import assert_same_bits, copies, unit_roundoff

PRECISIONS = (torch.float32, torch.float64)
ROUNDINGS = 8  # the longest chain of operations behind one element of a step below


def vector(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def assert_close(actual: Tensor, expected: Tensor, steps: int = 1) -> None:
    """Up to the roundings of every step, in units of the largest element."""
    bound = steps * ROUNDINGS * unit_roundoff(actual.dtype) * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=bound)


def perturbed(w: Tensor, g: Tensor, *, eps: float = 0.0, **options: Any) -> Tensor:
    """w + e(w); without eps, which in float64 would count, unless it is given."""
    w = w.clone()
    ops.perturb_([w], [g], [torch.empty_like(w)], eps=eps, backend="reference", **options)
    return w


def mixed(
    x: list[Tensor], y: list[Tensor] | None = None, *args: Any, **options: Any
) -> list[Tensor]:
    u = copies(x)
    ops.mix_(u, Mix(x, y, *args, **options), backend="reference")
    return u


# Inner products


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_dots_of_one_list_by_hand(dtype: torch.dtype) -> None:
    tensors = [vector(3, 4, dtype=dtype), vector(12, dtype=dtype), vector(dtype=dtype)]
    total, per_tensor = ops.dots(tensors, backend="reference")
    assert total.dtype is per_tensor.dtype is torch.float64
    assert total.tolist() == [169]
    assert per_tensor.tolist() == [[25], [144], [0]]


def test_dots_with_weights_by_hand() -> None:
    tensors, weights = [vector(3, 2), vector(6)], [vector(-1, 2), vector(-2)]
    total, per_tensor = ops.dots(tensors, weights=weights, backend="reference")
    assert per_tensor.tolist() == [[25, 13], [144, 36]]
    assert total.tolist() == [169, 49]
    shifted = ops.dots(tensors, weights=weights, eta=1.0, backend="reference")
    assert shifted.per_tensor.tolist() == [[72, 13], [324, 36]]  # (2 * 3, 3 * 2), 3 * 6


def test_dots_of_two_and_three_lists_by_hand() -> None:
    x, y = [vector(3, -4), vector(0, 1)], [vector(4, 2), vector(5, 1)]
    z = [vector(1, 2), vector(0, -3)]
    total, per_tensor = ops.dots(x, y, backend="reference")
    assert per_tensor.tolist() == [[25, 4, 20], [1, 1, 26]]
    assert total.tolist() == [26, 5, 46]
    total, per_tensor = ops.dots(x, y, z, backend="reference")
    # |y| > |x|: 4, 5; same sign: 3 * 4, 1 * 1
    assert per_tensor.tolist() == [[25, 4, 20, 5, 1, 1], [1, 1, 26, 9, 1, 1]]
    assert total.tolist() == [26, 5, 46, 14, 2, 2]


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_squares_of_the_first_integers(n: int) -> None:
    total = ops.dots([torch.arange(1.0, n + 1)], backend="reference").total
    assert total.item() == n * (n + 1) * (2 * n + 1) // 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_precision_do_not_overflow(dtype: torch.dtype) -> None:
    total = ops.dots([torch.full((10000,), 60000.0, dtype=dtype)], backend="reference").total
    value = torch.tensor(60000.0, dtype=dtype).item()  # 59904 in bfloat16
    assert total.item() == 10000 * value * value


def test_total_of_parts() -> None:
    assert ops.total_of([torch.tensor(9.0), torch.tensor(16.0)]).item() == 25
    assert ops.total_of([vector(1, 2), vector(3, 4)]).tolist() == [4, 6]
    only = torch.tensor(2.0)
    assert ops.total_of([only]) is only
    with pytest.raises(ValueError, match="parts is empty"):
        ops.total_of([])


# Perturbation


@pytest.mark.parametrize(
    ("w", "g", "options", "expected"),
    [
        # norm 5, e = 0.5 * g / 5
        ((1, 2), (3, 4), {"rho": 0.5}, (1.3, 2.4)),
        ((1, 2), (3, 4), {"rho": 0.5, "maximize": True}, (0.7, 1.6)),
        ((1, 2), (-3, 0), {"rho": 0.25}, (0.75, 2)),
        ((1, 2), (3, 4), {"rho": 0}, (1, 2)),
        # eps counts: e = 0.5 * g / (5 + 5)
        ((1, 2), (3, 4), {"rho": 0.5, "eps": 5}, (1.15, 2.2)),
        # norm(|w| g) = norm(3, 4) = 5, e = 0.5 * w^2 g / 5 = 0.1 * (3, 8)
        ((-1, 2), (3, 2), {"rho": 0.5, "eta": 0.0}, (-0.7, 2.8)),
        ((-1, 2), (3, 2), {"rho": 0.5, "eta": 0.0, "maximize": True}, (-1.3, 1.2)),
        # T = (2, 3), norm(T g) = norm(3, 4) = 5, e = 0.5 * T^2 g / 5 = 0.1 * (6, 12)
        ((-1, 2), (1.5, 4 / 3), {"rho": 0.5, "eta": 1.0}, (-0.4, 3.2)),
    ],
)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_perturbation_by_hand(
    w: tuple[float, ...],
    g: tuple[float, ...],
    options: dict[str, Any],
    expected: tuple[float, ...],
    dtype: torch.dtype,
) -> None:
    assert_close(
        perturbed(vector(*w, dtype=dtype), vector(*g, dtype=dtype), **options), vector(*expected)
    )


def test_perturbation_takes_one_norm_over_all_tensors_and_saves_the_weights() -> None:
    params, grads = [vector(1, 2), vector(0.5)], [vector(3, 4), vector(12)]
    old_params = [torch.zeros_like(p) for p in params]
    before = copies(params)
    square = ops.perturb_(params, grads, old_params, rho=1.3, eps=0, backend="reference")
    assert square.item() == 169
    assert_close(params[0], vector(1.3, 2.4))
    assert_close(params[1], vector(1.7))
    assert_same_bits(old_params, before)


def test_perturbation_with_a_known_square() -> None:
    # As if other tensors had added to the norm: e = 0.5 * g / 10.
    square = torch.tensor(100.0, dtype=torch.float64)
    assert_close(perturbed(vector(1, 2), vector(3, 4), rho=0.5, square=square), vector(1.15, 2.2))


def test_perturbation_with_a_norm_and_a_radius_for_each_tensor() -> None:
    params, direction = [vector(1, 2), vector(1), vector(5)], [vector(3, 4), vector(2), vector(1)]
    ops.perturb_(
        params,
        direction,
        copies(params),
        rho=vector(0.5, 6, 1),
        square=vector(25, 9, 0),
        eps=0,
        backend="reference",
    )
    for p, expected in zip(params, (vector(1.3, 2.4), vector(5), vector(5)), strict=True):
        assert_close(p, expected)


@pytest.mark.parametrize("eta", [None, 0.0, 0.1])
def test_perturbation_lies_on_the_sphere_of_radius_rho(eta: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    e = perturbed(w, g, rho=0.05, eta=eta) - w
    # ||e / T|| = rho. The difference above cancels: its error is that of w.
    length = torch.linalg.vector_norm(e if eta is None else e / (w.abs() + eta))
    assert abs(length.item() - 0.05) < 1000 * unit_roundoff(torch.float64)


@pytest.mark.parametrize("eta", [None, 0.0, 0.1])
@pytest.mark.parametrize("gradient", [0.0, math.inf, -math.inf, math.nan])
def test_no_direction_no_perturbation(gradient: float, eta: float | None) -> None:
    w = vector(-0.0, 1.5, -2.0, math.nan)
    g = vector(gradient, 0.0, 0.0, 0.0)
    if eta is not None:
        w[0] = 1.0  # inf * 0 is nan as well, but 0.0 would not be zero
    old = torch.empty_like(w)
    before = w.clone()
    ops.perturb_([w], [g], [old], rho=0.5, eta=eta, backend="reference")
    assert_same_bits([w, old], [before, before])


def test_restore() -> None:
    w, old = vector(1, 2), vector(-0.0, math.nan)
    ops.restore_([w], [old], backend="reference")
    assert_same_bits([w], [old])


# Mixes

G1, G2 = vector(3, -4, 0, 5, 0), vector(-1, 2, 7, 0, 0)


@pytest.mark.parametrize(
    ("function", "a", "b", "expected"),
    [
        ("linear", 1.0, 1.0, (2, -2, 7, 5, 0)),
        ("linear", -2.0, 0.5, (-6.5, 9, 3.5, -10, 0)),
        ("sign", 1.0, 1.0, (-3, 4, 0, 0, 0)),  # |x| * sign(y)
        ("sign", -0.5, 1.0, (1.5, -2, 0, 0, 0)),
        ("product", 0.5, 1.0, (-1.5, -4, 0, 0, 0)),
        ("damp", 0.5, 1.0, (3, -4, 0, 5, 0)),
    ],
)
def test_mixes_by_hand(function: str, a: float, b: float, expected: tuple[float, ...]) -> None:
    assert torch.equal(mixed([G1], [G2], a, b, function)[0], vector(*expected))


def test_a_mix_of_one_list_by_hand() -> None:
    assert torch.equal(mixed([G1])[0], G1)
    assert torch.equal(mixed([G1], None, -2.0)[0], -2 * G1)


def test_damping_by_hand() -> None:
    """Where y is larger than x, and of its sign."""
    x, y = vector(1, 1, 1, -1, -1, 0, 2, math.inf), vector(2, 0.5, -2, -2, 2, 5, 0, math.inf)
    assert_close(
        mixed([x[:7]], [y[:7]], 0.25, function="damp")[0], vector(0.25, 1, 1, -0.25, -1, 0, 2)
    )
    assert mixed([x[7:]], [y[7:]], 0.25, function="damp")[0].item() == math.inf  # inf / inf is nan
    # 1e-8 has a sign: it is added to y, not to |y|.
    y = vector(-1e-8, 1e-8)
    u = mixed([vector(-1e-9, 1e-9)], [y], 0.5, function="damp")[0]
    assert u.tolist() == [-1e-9, 0.5e-9]


def test_numbers_of_each_tensor_by_hand() -> None:
    x, y = [vector(3, 4), vector(6, -8)], [vector(-5, 12), vector(0, 20)]
    u = mixed(x, y, vector(2, -1), vector(1, 0.5))
    assert torch.equal(u[0], vector(1, 20))
    assert torch.equal(u[1], vector(-6, 18))
    halves = mixed(x, y, torch.tensor(2.0).double(), vector(1, 0.5), divisor=vector(4).squeeze())
    assert torch.equal(halves[0], vector(0.25, 5))
    assert torch.equal(halves[1], vector(3, -1.5))


@pytest.mark.parametrize("function", ["linear", "sign", "damp", "product"])
def test_a_mix_is_divided(function: str) -> None:
    divisor = torch.tensor(4.0, dtype=torch.float64)
    whole = mixed([G1], [G2], 0.5, function=function)[0]
    assert torch.equal(mixed([G1], [G2], 0.5, function=function, divisor=divisor)[0], whole / 4)


@pytest.mark.parametrize("function", ["linear", "sign", "damp", "product"])
@pytest.mark.parametrize("guard", [{"ascent_square": math.inf}, {"found_inf": 1.0}])
def test_the_mix_of_a_skipped_step_is_zero(function: str, guard: dict[str, float]) -> None:
    guards = {name: torch.tensor(value).double() for name, value in guard.items()}
    u = mixed([vector(1, math.nan)], [vector(math.nan, 2)], function=function, **guards)
    assert torch.equal(u[0], torch.zeros_like(u[0]))


# Update


def test_sgd_by_hand() -> None:
    w, buffer, g = vector(1, -2), vector(0.5, 1), vector(2, 3)
    perturbed_w = vector(100, 100)  # must not count
    ops.sgd_(
        [perturbed_w],
        [w],
        Mix([g]),
        [buffer],
        lr=0.1,
        momentum=0.5,
        dampening=0.25,
        weight_decay=0.5,
        backend="reference",
    )
    # u = g + 0.5 w = (2.5, 2);  buf = 0.5 buf + 0.75 u = (2.125, 2);  w -= 0.1 buf
    assert_close(buffer, vector(2.125, 2))
    assert_close(perturbed_w, vector(0.7875, -2.2))
    assert torch.equal(w, vector(1, -2))


SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1, "maximize": True},
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_sgd_follows_torch_optim_sgd(options: dict[str, Any], dtype: torch.dtype) -> None:
    steps = 6
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=dtype) for s in ((4, 3), (), (7,))]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = torch.optim.SGD(theirs, lr=0.1, foreach=False, **options)
    params = [torch.zeros_like(t) for t in start]
    old_params = copies(start)
    buffers = [torch.full_like(t, math.nan) for t in start]  # hold nothing before the first step
    for step in range(steps):
        grads = [torch.randn(t.shape, generator=generator, dtype=dtype) for t in start]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        ops.sgd_(
            params,
            old_params,
            Mix(grads),
            buffers if "momentum" in options else None,
            lr=0.1,
            init_momentum=step == 0,
            backend="reference",
            **options,
        )
        old_params = copies(params)
        for i, parameter in enumerate(theirs):
            assert_close(params[i], parameter.detach(), step + 1)
            if "momentum" in options:
                buffer = optimizer.state[parameter]["momentum_buffer"]
                assert_close(buffers[i], buffer, step + 1)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_by_hand(decoupled: bool) -> None:
    w, m, v = vector(1, -2), vector(0.5, -1), vector(0.6, 2)
    steps = [torch.tensor(1.0)]
    perturbed_w = vector(100, 100)  # must not count
    ops.adam_(
        [perturbed_w],
        [w],
        Mix([vector(2, 3)]),
        [m],
        [v],
        steps,
        lr=0.1,
        betas=(0.5, 0.75),
        eps=0.25,
        weight_decay=0.5,
        decoupled_weight_decay=decoupled,
        backend="reference",
    )
    # u = g = (2, 3), or g + 0.5 w = (2.5, 2);  m = (m + u) / 2;  v = (3 v + u^2) / 4
    # w is (0.95, -1.9), or stays;  w -= 0.1 / (1 - 0.25) * m / (sqrt(v / (1 - 0.5625)) + 0.25)
    start = vector(0.95, -1.9) if decoupled else vector(1, -2)
    new_m = vector(1.25, 1) if decoupled else vector(1.5, 0.5)
    new_v = vector(1.45, 3.75) if decoupled else vector(2.0125, 2.5)
    assert_close(m, new_m)
    assert_close(v, new_v)
    assert_close(perturbed_w, start - 0.1 / 0.75 * new_m / ((new_v / 0.4375).sqrt() + 0.25))
    assert torch.equal(w, vector(1, -2))
    assert steps[0].item() == 2


def test_the_first_step_of_adam_by_hand() -> None:
    """lr * sign(g), up to eps; eps counts where the gradient is as small."""
    w, g = vector(1, 1, 1, 1), vector(3, -1e-3, 1e-8, 0)
    state = [torch.zeros_like(w)], [torch.zeros_like(w)], [torch.tensor(0.0)]
    ops.adam_([w], [w], Mix([g]), *state, lr=0.5, eps=1e-8, backend="reference")
    assert_close(w, vector(1 - 0.5 / (1 + 1e-8 / 3), 1 + 0.5 / (1 + 1e-5), 0.75, 1))


ADAM_OPTIONS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"weight_decay": 0.1, "maximize": True, "betas": (0.8, 0.95)}),
    (torch.optim.AdamW, {"weight_decay": 0.0}),
    (torch.optim.AdamW, {"weight_decay": 0.1, "eps": 1e-3}),
    (torch.optim.AdamW, {"weight_decay": 0.1, "maximize": True, "betas": (0.0, 0.0)}),
    (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.4, 0.9999)}),
]


@pytest.mark.parametrize(
    ("base", "options"), ADAM_OPTIONS, ids=lambda x: "-".join(x) if isinstance(x, dict) else None
)
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_adam_follows_torch_optim_adam(
    base: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Single tensor, step by step. PyTorch takes m as m + (1 - beta1) * (u - m), the step size and
    the root of the correction in double: a few other roundings of the same numbers."""
    steps = 10
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator, dtype=dtype) for s in ((4, 3), (), (7,))]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    optimizer = base(theirs, lr=0.1, foreach=False, **options)
    params, old_params = copies(start), copies(start)
    m, v = ([torch.zeros_like(t) for t in start] for _ in range(2))
    counts = [torch.tensor(0.0) for _ in start]
    decoupled = base is torch.optim.AdamW
    for step in range(steps):
        grads = [torch.randn(t.shape, generator=generator, dtype=dtype) for t in start]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        lists = (params, old_params, Mix(grads), m, v, counts)
        options_ = {**options, "decoupled_weight_decay": decoupled}
        ops.adam_(*lists, lr=0.1, backend="reference", **options_)
        old_params = copies(params)
        for i, parameter in enumerate(theirs):
            state = optimizer.state[parameter]
            assert_close(params[i], parameter.detach(), step + 1)
            assert_close(m[i], state["exp_avg"], step + 1)
            assert_close(v[i], state["exp_avg_sq"], step + 1)
            assert counts[i].item() == state["step"].item() == step + 1


@pytest.mark.parametrize("square", [math.inf, math.nan])
def test_a_step_of_adam_with_a_non_finite_square_is_skipped(square: float) -> None:
    old, m, v = vector(-0.0, math.nan, 3), vector(-0.0, 1, 2), vector(0, 1, 2)
    params, count = vector(7, 8, 9), torch.tensor(4.0)
    before = copies([old, m, v, count])
    ops.adam_(
        [params],
        [old],
        Mix([vector(math.nan, 1, math.inf)], ascent_square=torch.tensor(square).double()),
        [m],
        [v],
        [count],
        lr=0.1,
        weight_decay=0.1,
        backend="reference",
    )
    assert_same_bits([params, m, v, count], before)


@pytest.mark.parametrize("square", [math.inf, math.nan])
@pytest.mark.parametrize("init_momentum", [False, True])
def test_a_step_with_a_non_finite_square_is_skipped(square: float, init_momentum: bool) -> None:
    old, buffer = vector(-0.0, math.nan, 3), vector(-0.0, 1, 2)
    params = vector(7, 8, 9)
    before = copies([old, buffer])
    ops.sgd_(
        [params],
        [old],
        Mix([vector(math.nan, 1, math.inf)], ascent_square=torch.tensor(square).double()),
        [buffer],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        init_momentum=init_momentum,
        backend="reference",
    )
    assert_same_bits([params, old], [before[0], before[0]])
    expected = torch.zeros_like(buffer) if init_momentum else before[1]
    assert_same_bits([buffer], [expected])


def test_sgd_with_a_mix_by_hand() -> None:
    for function, u in (("linear", (2, -2, 7, 5, 0)), ("sign", (-3, 4, 0, 0, 0))):
        w = torch.ones_like(G1)
        ops.sgd_([w], [w], Mix([G1], [G2], function=function), lr=0.5, backend="reference")
        assert torch.equal(w, 1 - 0.5 * vector(*u))


# Statistics


def test_statistics_over_two_lists_by_hand() -> None:
    measured = [
        ops.dots([vector(3)], [vector(4)], [vector(-6)], backend="reference"),
        ops.dots([vector(4)], [vector(-3)], [vector(8)], backend="reference"),
    ]
    statistics = ops.gradient_statistics(measured, numel=2)
    assert all(value.shape == () and value.dtype is torch.float32 for value in statistics)
    assert statistics._asdict() == {
        "first_grad_norm": 5,
        "second_grad_norm": 5,
        "weight_norm": 10,
        "cosine": 0,
        "share_second_larger": 0.5,
        "share_signs_agree": 0.5,
    }
