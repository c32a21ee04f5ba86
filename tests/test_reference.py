"""The reference backend, the oracle of all others, against closed forms and steps taken by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from samkernels import ops
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


def recombined(
    g1: list[Tensor], g2: list[Tensor], *, eps: float = 0.0, **options: Any
) -> list[Tensor]:
    u = copies(g2)
    ops.recombine_(u, g1, eps=eps, backend="reference", **options)
    return u


# Norms


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_norms_by_hand(dtype: torch.dtype) -> None:
    tensors = [vector(3, 4, dtype=dtype), vector(12, dtype=dtype), vector(dtype=dtype)]
    total, per_tensor = ops.norms(tensors, backend="reference")
    assert total.shape == () and total.dtype is dtype
    assert total.item() == 13
    assert per_tensor.tolist() == [5, 12, 0]


def test_weighted_norms_by_hand() -> None:
    tensors, weights = [vector(3, 2), vector(6)], [vector(-1, 2), vector(-2)]
    total, per_tensor = ops.norms(tensors, weights, backend="reference")
    assert total.item() == 13
    assert per_tensor.tolist() == [5, 12]
    weighted, plain = ops.weighted_norms(tensors, weights, backend="reference")
    assert weighted.per_tensor.tolist() == [5, 12]
    torch.testing.assert_close(plain.per_tensor.square(), vector(13, 36))
    assert plain.total.item() == 7


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_norm_of_the_first_integers(n: int) -> None:
    total = ops.norms([torch.arange(1.0, n + 1)], backend="reference").total
    assert_close(total / math.sqrt(n * (n + 1) * (2 * n + 1) / 6), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_are_float32(dtype: torch.dtype) -> None:
    total, per_tensor = ops.norms([torch.full((10000,), 60000.0, dtype=dtype)], backend="reference")
    assert total.dtype is per_tensor.dtype is torch.float32
    value = torch.tensor(60000.0, dtype=dtype).item()  # 59904 in bfloat16
    assert total.item() == 100 * value


def test_total_norm() -> None:
    assert ops.total_norm([torch.tensor(3.0), torch.tensor(4.0)]).item() == 5
    only = torch.tensor(2.0)
    assert ops.total_norm([only]) is only
    with pytest.raises(ValueError, match="parts is empty"):
        ops.total_norm([])


@pytest.mark.parametrize("part", [1e25, 1e-25])
def test_total_norm_neither_overflows_nor_underflows(part: float) -> None:
    total = ops.total_norm([torch.tensor(3 * part), torch.tensor(4 * part)])
    assert_close(total / (5 * part), torch.tensor(1.0))


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
        ((-1, 2), (3, 2), {"rho": 0.5, "adaptive": True}, (-0.7, 2.8)),
        ((-1, 2), (3, 2), {"rho": 0.5, "adaptive": True, "maximize": True}, (-1.3, 1.2)),
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
    norm = ops.perturb_(params, grads, old_params, rho=1.3, eps=0, backend="reference")
    assert norm.item() == 13
    assert_close(params[0], vector(1.3, 2.4))
    assert_close(params[1], vector(1.7))
    assert_same_bits(old_params, before)


def test_perturbation_with_a_known_norm() -> None:
    # As if other tensors had added to the norm: e = 0.5 * g / 10.
    norm = torch.tensor(10.0, dtype=torch.float64)
    assert_close(perturbed(vector(1, 2), vector(3, 4), rho=0.5, norm=norm), vector(1.15, 2.2))


@pytest.mark.parametrize("adaptive", [False, True])
def test_perturbation_lies_on_the_sphere_of_radius_rho(adaptive: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    e = perturbed(w, g, rho=0.05, adaptive=adaptive) - w
    # ||e / s|| = rho. The difference above cancels: its error is that of w.
    length = torch.linalg.vector_norm(e / w.abs() if adaptive else e)
    assert abs(length.item() - 0.05) < 1000 * unit_roundoff(torch.float64)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("gradient", [0.0, math.inf, -math.inf, math.nan])
def test_no_direction_no_perturbation(gradient: float, adaptive: bool) -> None:
    w = vector(-0.0, 1.5, -2.0, math.nan)
    g = vector(gradient, 0.0, 0.0, 0.0)
    if adaptive:
        w[0] = 1.0  # inf * 0 is nan as well, but 0.0 would not be zero
    old = torch.empty_like(w)
    before = w.clone()
    ops.perturb_([w], [g], [old], rho=0.5, adaptive=adaptive, backend="reference")
    assert_same_bits([w, old], [before, before])


def test_restore() -> None:
    w, old = vector(1, 2), vector(-0.0, math.nan)
    ops.restore_([w], [old], backend="reference")
    assert_same_bits([w], [old])


# Recombination

G1, G2 = vector(3, -4, 0, 5, 0), vector(-1, 2, 7, 0, 0)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sam", (-1, 2, 7, 0, 0)),
        ("samdirection", (-3, 4, 0, 0, 0)),  # |g1| * sign(g2)
        ("sammagnitude", (1, -2, 0, 0, 0)),  # |g2| * sign(g1)
    ],
)
def test_element_rules_by_hand(rule: str, expected: tuple[float, ...]) -> None:
    assert torch.equal(recombined([G1], [G2], rule=rule)[0], vector(*expected))


FIRST = [vector(3, 4), vector(6, -8)]  # norms 5 and 10
SECOND = [vector(-5, 12), vector(0, 20)]  # norms 13 and 20


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("sam", SECOND),
        ("samdirection", [SECOND[0] * 5 / 13, SECOND[1] * 10 / 20]),
        ("sammagnitude", [FIRST[0] * 13 / 5, FIRST[1] * 20 / 10]),
    ],
)
def test_tensor_rules_by_hand(rule: str, expected: list[Tensor]) -> None:
    for u, e in zip(
        recombined(FIRST, SECOND, rule=rule, granularity="tensor"), expected, strict=True
    ):
        assert_close(u, e)


@pytest.mark.parametrize("rule", ops.RULES)
def test_global_rules_by_hand(rule: str) -> None:
    n1, n2 = math.sqrt(5**2 + 10**2), math.sqrt(13**2 + 20**2)
    expected = {
        "sam": SECOND,
        "samdirection": [n1 / n2 * g for g in SECOND],
        "sammagnitude": [n2 / n1 * g for g in FIRST],
    }[rule]
    for u, e in zip(
        recombined(FIRST, SECOND, rule=rule, granularity="global"), expected, strict=True
    ):
        assert_close(u, e)


@pytest.mark.parametrize(
    ("granularity", "first_norm", "second_norm"),
    [("global", torch.tensor(2.0), torch.tensor(4.0)), ("tensor", vector(2, 6), vector(4, 3))],
)
def test_known_norms_are_used(granularity: str, first_norm: Tensor, second_norm: Tensor) -> None:
    norms = {"first_norm": first_norm.double(), "second_norm": second_norm.double()}
    u = recombined(FIRST, SECOND, rule="samdirection", granularity=granularity, **norms)
    ratios = torch.broadcast_to(first_norm / second_norm, (2,))
    assert_close(u[0], SECOND[0] * ratios[0])
    assert_close(u[1], SECOND[1] * ratios[1])


def test_eps_of_the_recombination_is_added_to_the_norm_that_divides() -> None:
    options = {"granularity": "tensor", "eps": 7.0}
    u = recombined([vector(3, 4)], [vector(5, 12)], rule="samdirection", **options)
    assert_close(u[0], vector(5, 12) * 5 / 20)
    u = recombined([vector(3, 4)], [vector(5, 12)], rule="sammagnitude", **options)
    assert_close(u[0], vector(3, 4) * 13 / 12)


@pytest.mark.parametrize("granularity", ops.GRANULARITIES)
@pytest.mark.parametrize("rule", ops.RULES)
def test_zero_gradients_recombine_to_zero(rule: str, granularity: str) -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    u = recombined([zero], [zero], rule=rule, granularity=granularity, eps=1e-12)
    assert torch.equal(u[0], zero)


@pytest.mark.parametrize("rule", ops.RULES)
def test_recombination_of_a_skipped_step_is_zero(rule: str) -> None:
    norm = torch.tensor(math.inf, dtype=torch.float64)
    u = recombined([vector(1, math.nan)], [vector(math.nan, 2)], rule=rule, ascent_norm=norm)
    assert torch.equal(u[0], torch.zeros_like(u[0]))


# Update


def test_sgd_by_hand() -> None:
    w, buffer, g = vector(1, -2), vector(0.5, 1), vector(2, 3)
    perturbed_w = vector(100, 100)  # must not count
    ops.sgd_(
        [perturbed_w],
        [w],
        [g],
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
            grads,
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
        [vector(2, 3)],
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
    ops.adam_([w], [w], [g], *state, lr=0.5, eps=1e-8, backend="reference")
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
        lists = (params, old_params, grads, m, v, counts)
        options_ = {**options, "decoupled_weight_decay": decoupled}
        ops.adam_(*lists, lr=0.1, backend="reference", **options_)
        old_params = copies(params)
        for i, parameter in enumerate(theirs):
            state = optimizer.state[parameter]
            assert_close(params[i], parameter.detach(), step + 1)
            assert_close(m[i], state["exp_avg"], step + 1)
            assert_close(v[i], state["exp_avg_sq"], step + 1)
            assert counts[i].item() == state["step"].item() == step + 1


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_step_of_adam_with_a_non_finite_norm_is_skipped(norm: float) -> None:
    old, m, v = vector(-0.0, math.nan, 3), vector(-0.0, 1, 2), vector(0, 1, 2)
    params, count = vector(7, 8, 9), torch.tensor(4.0)
    before = copies([old, m, v, count])
    ops.adam_(
        [params],
        [old],
        [vector(math.nan, 1, math.inf)],
        [m],
        [v],
        [count],
        lr=0.1,
        weight_decay=0.1,
        ascent_norm=torch.tensor(norm, dtype=torch.float64),
        backend="reference",
    )
    assert_same_bits([params, m, v, count], before)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
@pytest.mark.parametrize("init_momentum", [False, True])
def test_a_step_with_a_non_finite_norm_is_skipped(norm: float, init_momentum: bool) -> None:
    old, buffer = vector(-0.0, math.nan, 3), vector(-0.0, 1, 2)
    params = vector(7, 8, 9)
    before = copies([old, buffer])
    ops.sgd_(
        [params],
        [old],
        [vector(math.nan, 1, math.inf)],
        [buffer],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.1,
        init_momentum=init_momentum,
        ascent_norm=torch.tensor(norm, dtype=torch.float64),
        backend="reference",
    )
    assert_same_bits([params, old], [before[0], before[0]])
    expected = torch.zeros_like(buffer) if init_momentum else before[1]
    assert_same_bits([buffer], [expected])


def test_sgd_with_element_rules_by_hand() -> None:
    for rule, u in (("samdirection", (-3, 4, 0, 0, 0)), ("sammagnitude", (1, -2, 0, 0, 0))):
        w = torch.ones_like(G1)
        ops.sgd_([w], [w], [G2], lr=0.5, rule=rule, first_grads=[G1], backend="reference")
        assert torch.equal(w, 1 - 0.5 * vector(*u))


# Comparison and statistics


def test_comparison_by_hand() -> None:
    g1, g2 = [vector(3, -4), vector(0, 1)], [vector(4, 2), vector(5, 1)]
    weights = [vector(1, 2), vector(0, -3)]
    sums, numel, second_norms = ops.compare(g1, g2, weights, backend="reference")
    assert numel == 4
    torch.testing.assert_close(second_norms.per_tensor, vector(20, 26).sqrt())
    torch.testing.assert_close(second_norms.total, torch.tensor(46.0, dtype=torch.float64).sqrt())
    assert sums.dtype is torch.float64
    assert sums.tolist() == [26, 46, 5, 2, 2, 14]  # |g2| > |g1|: 4, 5; same sign: 3*4, 1*1


def test_statistics_over_two_lists_by_hand() -> None:
    comparisons = [
        ops.compare([vector(3)], [vector(4)], [vector(-6)], backend="reference"),
        ops.compare([vector(4)], [vector(-3)], [vector(8)], backend="reference"),
    ]
    statistics = ops.gradient_statistics(comparisons)
    assert all(value.shape == () and value.dtype is torch.float32 for value in statistics)
    assert statistics._asdict() == {
        "first_grad_norm": 5,
        "second_grad_norm": 5,
        "weight_norm": 10,
        "cosine": 0,
        "share_second_larger": 0.5,
        "share_signs_agree": 0.5,
    }
