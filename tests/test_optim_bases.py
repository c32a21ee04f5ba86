"""Base optimizers that do things in a way of their own: given as instances, with options, state and
methods that torch.optim's have not."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from samkernels import SAM, SAMDirection, SGDHess, VaSSO
from tests.optim_helpers import (
    assert_equal,
    linear,
    parameter,
    parameters_of,
    same_bits,
    set_gradients,
    snapshot,
    take_step,
    through_a_file,
    unchanged,
)
from tests.optimizers import OPTIMIZER_TABLE, OPTIMIZERS, each_backend, each_optimizer

# -- stand-ins for optimizers of other packages ----------------------------------------------------


class EightBit(torch.optim.Optimizer):
    """Momentum in codes of eight bits with a scale, which load_state_dict must not cast."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["codes"] = torch.full_like(p, 128, dtype=torch.uint8)
                    state["scale"] = torch.ones((), dtype=torch.float64)
                buffer = (state["codes"].to(p.dtype) - 128) * state["scale"].to(p.dtype) / 127
                buffer = group["momentum"] * buffer + p.grad
                state["scale"] = buffer.abs().max().double() + 1e-9
                state["codes"] = (buffer / state["scale"] * 127 + 128).round().to(torch.uint8)
                p.add_(buffer, alpha=-group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state_dict = copy.deepcopy(state_dict)
        params = iter(parameters_of(self))
        state = {next(params): state_dict["state"].get(i) for i in range(len(parameters_of(self)))}
        groups = state_dict["param_groups"]
        for group, own in zip(groups, self.param_groups, strict=True):
            group["params"] = own["params"]
        self.__setstate__(
            {
                "state": defaultdict(dict, {p: s for p, s in state.items() if s}),
                "param_groups": groups,
            }
        )


class Counting(torch.optim.Optimizer):
    """Its lr falls with a counter that lies beside the state, and is saved in a format of its
    own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.num_steps = 0
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.num_steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / self.num_steps)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": super().state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict.keys() == {"inner", "num_steps"}
        self.num_steps = state_dict["num_steps"]
        super().load_state_dict(state_dict["inner"])


class PairMomentum(torch.optim.Optimizer):
    """A momentum_buffer that is no tensor."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                rows, columns = self.state[p].get("momentum_buffer", (0.0, 0.0))
                rows = rows + p.grad.mean(0)
                columns = columns + p.grad.mean(-1)
                self.state[p]["momentum_buffer"] = (rows, columns)
                p.sub_(group["lr"] * (rows + columns.mean()))


class Lamb(torch.optim.Optimizer):
    """Clips by itself; groups that are added get a trust ratio of their own."""

    def __init__(self, params: Any, lr: float = 0.1, max_grad_norm: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "max_grad_norm": max_grad_norm})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1]["trust"] = 0.25 * len(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            norm = torch.stack([g.norm() for g in grads]).norm()
            factor = group["trust"] * min(1.0, group["max_grad_norm"] / norm.item())
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] * factor)


class ScheduleFree(torch.optim.Optimizer):
    """Weights of training and of evaluation, like schedulefree's."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.is_training = False
        super().__init__(params, {"lr": lr})

    def _move(self, away: bool) -> None:
        with torch.no_grad():
            for p in parameters_of(self) if self.is_training != away else ():
                p.add_(1.0 if away else -1.0)
        self.is_training = away

    def train(self) -> None:
        self._move(True)

    def eval(self) -> None:
        self._move(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not self.is_training:
            raise RuntimeError("not in train mode")
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


class Adaptive(torch.optim.Optimizer):
    """Has options with the names of SAM's and SAMDirection's, of other types."""

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        defaults = {"adaptive": "rows", "granularity": 3, "rho": -0.5, **options}
        super().__init__(params, {"lr": lr, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["adaptive"] == "rows"
            for p in group["params"]:
                p.add_(p.grad, alpha=group["rho"] * group["lr"] * group["granularity"])


class Lion(torch.optim.Optimizer):
    """Its momentum has the name of state that variants have."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in filter(lambda p: p.grad is not None, group["params"]):
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.add_(torch.sign(0.9 * m + 0.1 * p.grad), alpha=-group["lr"])
                m.mul_(0.99).add_(p.grad, alpha=0.01)


Make = Callable[[Any], torch.optim.Optimizer]
STAND_INS = [EightBit, Counting, PairMomentum, Lamb, Adaptive, Lion]
USUAL: dict[str, Make] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.05),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=0.1, rho=0.8),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}
INSTANCES: dict[str, Make] = {**{base.__name__: base for base in STAND_INS}, **USUAL}
each_instance = pytest.mark.parametrize("make", INSTANCES.values(), ids=INSTANCES)


class ByHand:
    """SAM around an optimizer, with nothing of samkernels."""

    def __init__(self, base: torch.optim.Optimizer, rho: float) -> None:
        self.base, self.rho = base, rho

    @torch.no_grad()
    def step(self, seed: int) -> None:
        params = parameters_of(self.base)
        old = snapshot(params)
        grads = set_gradients(params, 2 * seed)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for p, g in zip(params, grads, strict=True):
            p.add_(g, alpha=self.rho / (norm.item() + 1e-12))
        set_gradients(params, 2 * seed + 1)
        for p, w in zip(params, old, strict=True):
            p.copy_(w)
        self.base.step()


# -- instances -------------------------------------------------------------------------------------


@each_instance
def test_an_instance_steps_from_w_with_g2(make: Make) -> None:
    model, twin = linear(), linear()
    base = make(model.parameters())
    optimizer = SAM(model.parameters(), base, rho=0.7)
    by_hand = ByHand(make(twin.parameters()), 0.7)
    assert optimizer.base_optimizer is base
    for step in range(4):
        take_step(optimizer, step)
        by_hand.step(step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@each_instance
@pytest.mark.parametrize("cls", [*OPTIMIZERS, VaSSO])
def test_resuming_is_bit_exact(cls: type[SAM], make: Make) -> None:
    """What the base optimizer saves and loads is what is saved and loaded; a variant's own state
    lies beside it, whatever format the base optimizer has."""
    model, twin = linear(), linear()
    optimizer = cls(model.parameters(), make(model.parameters()), rho=0.3)
    for step in range(3):
        take_step(optimizer, step)
    twin.load_state_dict(model.state_dict())
    resumed = cls(twin.parameters(), make(twin.parameters()), rho=9.0)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_equal(resumed.state_dict(), optimizer.state_dict())
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    assert resumed.state is resumed.base_optimizer.state
    for step in range(3, 6):
        take_step(optimizer, step)
        take_step(resumed, step)
    assert unchanged(twin.parameters(), snapshot(model.parameters()))
    assert_equal(resumed.state_dict(), optimizer.state_dict())


def test_a_checkpoint_of_another_variant_leaves_nothing_behind() -> None:
    model = linear()
    optimizer = VaSSO(model.parameters(), Lion)
    take_step(optimizer, 0)
    other = SAM(model.parameters(), Lion)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in model.parameters():
        assert other.state[p].keys() == {"m"}
        assert same_bits(other.state[p]["m"], optimizer.state[p]["m"])


@each_instance
def test_a_checkpoint_of_the_base_optimizer_loads(make: Make) -> None:
    """Its options are its own, rho stays."""
    model, twin = linear(), linear()
    base = make(model.parameters())
    for step in range(2):
        set_gradients(model.parameters(), step)
        base.step()
    twin.load_state_dict(model.state_dict())
    optimizer = SAM(twin.parameters(), make(twin.parameters()), rho=0.0)
    before = copy.deepcopy(optimizer.base_optimizer.defaults)
    optimizer.load_state_dict(through_a_file(base.state_dict()))
    group = optimizer.param_groups[0]
    assert group[optimizer._keys["rho"]] == 0.0
    assert {name: group[name] for name in before} == before
    take_step(optimizer, 3)
    set_gradients(model.parameters(), 7)
    base.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("make", [EightBit, PairMomentum, Lamb, Adaptive, *USUAL.values()])
def test_copies_share_groups_and_state(make: Make, copied: Callable[[SAM], SAM]) -> None:
    model = linear()
    optimizer = SAM(model.parameters(), make(model.parameters()), rho=0.3)
    take_step(optimizer, 0)
    other = copied(optimizer)
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.state is other.base_optimizer.state
    assert repr(other) == repr(optimizer)
    take_step(optimizer, 1)
    take_step(other, 1)
    assert unchanged(parameters_of(other), snapshot(model.parameters()))


def test_an_instance_goes_on_from_its_state() -> None:
    """As if its checkpoint had been loaded."""
    results = []
    for is_instance in (False, True):
        model = linear()
        base = torch.optim.AdamW(model.parameters(), lr=0.1)
        set_gradients(model.parameters(), 0)
        base.step()
        if is_instance:
            optimizer = SAM(model.parameters(), base)
        else:
            optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=9.0)
            optimizer.load_state_dict(base.state_dict())
        take_step(optimizer, 1)
        results.append(snapshot(model.parameters()))
    assert unchanged(*results)


def test_groups_of_an_instance() -> None:
    a, b = parameter(1.0, 2.0), parameter(3.0)
    groups = [{"params": [a]}, {"params": [b], "lr": 0.5}]
    base = torch.optim.Adadelta(groups, lr=0.1)
    own = [{"params": [a], "sam_rho": 0.3}, {"params": b, "adaptive": True, "lr": 0.5}]
    optimizer = SAM(own, base, rho=0.2)
    keys = ("sam_rho", "adaptive", "lr", "rho")
    assert [[group[key] for key in keys] for group in optimizer.param_groups] == [
        [0.3, False, 0.1, 0.9],
        [0.2, True, 0.5, 0.9],
    ]
    assert optimizer.defaults["rho"] == 0.9 and optimizer.defaults["sam_rho"] == 0.2
    optimizer.add_param_group({"params": [parameter(4.0)], "rho": 0.5})
    assert [optimizer.param_groups[2][key] for key in keys] == [0.2, False, 0.1, 0.5]
    take_step(optimizer, 0)

    base = torch.optim.Adadelta([{"params": [a]}, {"params": [b], "lr": 0.5}])
    assert SAM(base.param_groups, base).param_groups[1]["lr"] == 0.5
    names = torch.optim.SGD([("a", a), ("b", b)], lr=0.1)
    assert SAM([("a", a), ("b", b)], names).param_groups[0]["param_names"] == ["a", "b"]


def test_an_instance_that_is_wrapped_once_more() -> None:
    """What the first wrapper put into the groups is no option of the base optimizer."""
    p = parameter(1.0, 2.0)
    for first in (SAM([p], torch.optim.SGD([p], lr=0.1)), SAM([p], torch.optim.SGD, lr=0.1)):
        second = SAMDirection([p], first.base_optimizer, rho=0.5, granularity="tensor")
        (group,) = second.param_groups
        assert (group["rho"], group["granularity"]) == (0.5, "tensor")
        assert "sam_rho" not in group
        take_step(second, 0)


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda p, q, base: SAM([p], base, lr=0.1), TypeError, "lr: base_optimizer is an instance"),
        (lambda p, q, base: SAM([p, q], base), ValueError, "1 of 2 are others, and it has 1"),
        (lambda p, q, base: SAM([], base), ValueError, "params are not those of base_optimizer"),
        (
            lambda p, q, base: SAM([{"params": [q]}], base),
            ValueError,
            "params of parameter group 0",
        ),
        (
            lambda p, q, base: SAM([{"params": [p]}, {"params": [q]}], base),
            ValueError,
            "params has 2 groups and base_optimizer has 1",
        ),
        (
            lambda p, q, base: SAM([{"params": [p], "lr": 0.5}], base),
            TypeError,
            "lr of parameter group 0: base_optimizer is an instance",
        ),
        (
            lambda p, q, base: SAM([p], torch.optim.Adadelta([p]), rho=-1.0),
            ValueError,
            "rho=-1.0: give a finite number",
        ),
        (
            lambda p, q, base: SAM([{"params": [p], "rho": 0.5}], torch.optim.Adadelta([p])),
            TypeError,
            "rho of parameter group 0: .*; sam_rho is SAM's",
        ),
        (lambda p, q, base: SAM([p], SAM([p], base)), ValueError, "passes of its own"),
    ],
)
def test_instances_that_do_not_fit(
    build: Callable[..., SAM], error: type[Exception], text: str
) -> None:
    p, q = parameter(1.0), parameter(2.0)
    base = torch.optim.SGD([p], lr=0.1)
    before = dict(base.param_groups[0])
    with pytest.raises(error, match=text):
        build(p, q, base)
    assert base.param_groups[0].keys() - {"rho", "adaptive"} == before.keys()


# -- options of the same name ----------------------------------------------------------------------


@pytest.mark.parametrize("option", ["backend", "max_grad_norm", "perturbation", "granularity"])
@each_optimizer
def test_a_collision_by_keyword_is_refused(cls: type[SAM], option: str) -> None:
    """Whichever option it is; the message shows the way."""

    class Base(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, **options: Any) -> None:
            super().__init__(params, lr)
            self.defaults.update({option: 1.0, **options})

    if option == "granularity" and cls is SAM:
        assert cls([parameter(1.0)], Base, lr=0.1, granularity=5).defaults["granularity"] == 5
        return
    text = rf"called {option}: .*{cls.__name__}\(params, Base\(params, lr=0.1, {option}=\.\.\.\), "
    with pytest.raises(ValueError, match=text + rf"{option}=\.\.\.\)"):
        cls([parameter(1.0)], Base, lr=0.1)


@pytest.mark.parametrize("base", [torch.optim.Adadelta, Lamb, Adaptive])
def test_bases_whose_options_collide(base: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(ValueError, match=rf"give the base .* SAM\(params, {base.__name__}\(params"):
        SAM([parameter(1.0)], base, lr=0.1)


@pytest.mark.parametrize("info", OPTIMIZER_TABLE, ids=lambda info: info.name)
def test_options_beside_those_of_the_base_optimizer(info: Any) -> None:
    """Every option that a group may set stands there as sam_NAME, and has the effect that it has
    beside other base optimizers."""
    options = {"rho": 0.7, "adaptive": True, **info.variants[-1]}

    class Base(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1, momentum=0.9)
            for name in options:
                self.defaults[name] = self.param_groups[0][name] = "the base optimizer's"

    results = []
    for make in (Base, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)):
        model = linear()
        optimizer = info.cls(model.parameters(), make(model.parameters()), **options)
        (group,) = optimizer.param_groups
        for name, value in options.items():
            assert group[f"sam_{name}" if make is Base else name] == value
            assert make is not Base or group[name] == "the base optimizer's"
        for step in range(3):
            take_step(optimizer, step)
        results.append(snapshot(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_max_grad_norm_of_both() -> None:
    model = linear()
    base = Lamb(model.parameters(), max_grad_norm=0.25)
    optimizer = SAM(model.parameters(), base, max_grad_norm=3.0)
    assert (optimizer.max_grad_norm, optimizer.param_groups[0]["max_grad_norm"]) == (3.0, 0.25)
    take_step(optimizer, 0)


# -- methods of the base optimizer -----------------------------------------------------------------


def test_add_param_group_is_that_of_the_base_optimizer() -> None:
    model = linear()
    optimizer = SAM(model.parameters(), Lamb(model.parameters()), rho=0.3)
    optimizer.add_param_group({"params": [parameter(1.0)], "adaptive": True})
    group = optimizer.base_optimizer.param_groups[1]
    assert (group["trust"], group["rho"], group["adaptive"]) == (0.5, 0.3, True)
    take_step(optimizer, 0)
    with pytest.raises(ValueError, match="can't optimize a non-leaf"):
        optimizer.add_param_group({"params": [parameter(1.0) * 2]})
    assert len(optimizer.param_groups) == 2


def test_a_group_that_was_added_to_the_base_optimizer() -> None:
    p, q = parameter(1.0, 2.0), parameter(3.0)
    optimizer = SAM([p], lr=0.1, rho=0.3)
    optimizer.base_optimizer.add_param_group({"params": [q]})
    take_step(optimizer, 0)
    assert (optimizer.param_groups[1]["rho"], optimizer.param_groups[1]["adaptive"]) == (0.3, False)


def test_zero_grad_is_that_of_the_base_optimizer() -> None:
    class Base(torch.optim.SGD):
        calls: list[bool]

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.calls.append(set_to_none)

    p = parameter(1.0)
    base = Base([p], lr=0.1)
    base.calls = []
    optimizer = SAM([p], base)
    for set_to_none in (False, True):
        p.grad = torch.ones(1)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert p.grad is None if set_to_none else p.grad.item() == 0
    take_step(optimizer, 0)
    assert base.calls == [False, True, True]


def test_train_and_eval_are_those_of_the_base_optimizer() -> None:
    p = parameter(1.0)
    optimizer = SAM([p], ScheduleFree([p], lr=0.5), rho=0.1)
    optimizer.train()
    assert p.item() == 2.0
    p.grad = torch.ones(1)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"eval\(\) between first_step and second_step"):
        optimizer.eval()
    p.grad = torch.ones(1)
    optimizer.second_step()
    assert p.item() == 1.5
    optimizer.eval()
    assert p.item() == 0.5
    usual = SAM([p], lr=0.1)
    assert not hasattr(usual, "train") and not hasattr(usual, "eval")


def test_a_step_that_the_base_optimizer_refuses_leaves_the_weights() -> None:
    p = parameter(1.0)
    optimizer = SAM([p], ScheduleFree([p], lr=0.5), rho=0.1)
    with pytest.raises(RuntimeError, match="not in train mode"):
        take_step(optimizer, 0)
    assert p.item() == 1.0 and not optimizer.is_perturbed


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_scheduler_of_the_base_optimizer_does_not_warn(base: type[torch.optim.Optimizer]) -> None:
    p = parameter(1.0)
    optimizer = SAM([p], base, lr=0.1)
    scheduler = StepLR(optimizer.base_optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_step(optimizer, 0)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


class Halfway(torch.optim.SGD):
    """Gives up when half is loaded."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.param_groups[0]["lr"] = 5.0
        self.state.clear()
        self.loaded = True
        raise OSError("gave up")


@pytest.mark.parametrize("hooked", [False, True])
def test_a_load_that_fails_changes_nothing(hooked: bool) -> None:
    model = linear()
    base = (torch.optim.SGD if hooked else Halfway)(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SAM(model.parameters(), base)
    take_step(optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict())

    def fail(_: Any) -> None:
        raise OSError("gave up")

    if hooked:
        optimizer.register_load_state_dict_post_hook(fail)
    checkpoint = copy.deepcopy(before)
    checkpoint["param_groups"][0]["lr"] = 7.0
    with pytest.raises(OSError, match="gave up"):
        optimizer.load_state_dict(checkpoint)
    assert_equal(optimizer.state_dict(), before)
    assert not hasattr(base, "loaded") and optimizer.param_groups is base.param_groups
    take_step(optimizer, 1)


# -- state and groups that are assigned or edited --------------------------------------------------


TORCHS: dict[str, Make] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.1),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),
}
each_of_torch = pytest.mark.parametrize("make", TORCHS.values(), ids=TORCHS)


def reset(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def larger_lr(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups = [{**g, "lr": 10 * g["lr"]} for g in optimizer.param_groups]


@pytest.mark.parametrize("edit", [reset, larger_lr])
@pytest.mark.parametrize("hooked", [False, True])
@each_of_torch
def test_what_is_assigned_counts(make: Make, hooked: bool, edit: Callable[..., None]) -> None:
    """For the base optimizer, too, also where it makes its own step; and checkpoints have it."""
    model, twin = linear(), linear()
    optimizer = SAM(model.parameters(), make(model.parameters()), rho=0.3)
    by_hand = ByHand(make(twin.parameters()), 0.3)
    if hooked:
        optimizer.base_optimizer.register_step_post_hook(lambda *_: None)
    for step in range(4):
        if step == 2:
            edit(optimizer)
            edit(by_hand.base)
        take_step(optimizer, step)
        by_hand.step(step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert len(optimizer.state_dict()["state"]) == 4
    assert optimizer.state is optimizer.base_optimizer.state
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups


@each_backend
@each_of_torch
def test_a_plain_dict_as_state(make: Make, backend: str) -> None:
    params = [parameter(1.0, 2.0), parameter(3.0)]
    optimizer = SAM(params, make(params), backend=backend)
    optimizer.state = {}
    take_step(optimizer, 0)
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("spoil", ["step", "amsgrad"])
@each_backend
def test_state_of_adam_that_lacks_something(spoil: str, backend: str) -> None:
    """Edited, or made before amsgrad was switched on: a sentence, and nothing has changed."""
    params = [parameter(1.0, 2.0), parameter(3.0)]
    optimizer = SAM(params, torch.optim.Adam, lr=0.1, backend=backend)
    take_step(optimizer, 0)
    if spoil == "step":
        del optimizer.state[params[1]]["step"]
        text = r"shape \(1,\) has no step: put it there, or remove"
    else:
        optimizer.param_groups[0]["amsgrad"] = True
        text = r"shape \(2,\) has no max_exp_avg_sq: put it there, or remove"
    before = snapshot(params)
    with pytest.raises(ValueError, match=text):
        take_step(optimizer, 1)
    assert unchanged(params, before) and not optimizer.is_perturbed
    for p in params:
        del optimizer.state[p]
    take_step(optimizer, 2)
    assert len(optimizer.state[params[1]]) == (4 if spoil == "amsgrad" else 3)


@pytest.mark.parametrize("steps_before", [0, 1])
@each_backend
@pytest.mark.parametrize("second", [0, 1])
def test_a_parameter_that_comes_to_be_in_two_places(
    second: int, backend: str, steps_before: int
) -> None:
    """It would be perturbed twice."""
    p, q = parameter(1.0, 2.0), parameter(3.0)
    optimizer = SAM([{"params": [p]}, {"params": [q]}], lr=0.1, backend=backend)
    for step in range(steps_before):
        take_step(optimizer, step)
    before = snapshot([p, q])
    optimizer.param_groups[second]["params"].append(p)
    set_gradients([p, q], 3)
    text = rf"params\[0\] of parameter group 0 and params\[1\] of parameter group {second} are the"
    with pytest.raises(ValueError, match=text):
        optimizer.first_step()
    assert unchanged([p, q], before) and not optimizer.is_perturbed


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("wrong", [None, 3])
@each_backend
def test_what_is_no_parameter(wrong: Any, backend: str, steps_before: int) -> None:
    p = parameter(1.0)
    optimizer = SAM([p], lr=0.1, backend=backend)
    for step in range(steps_before):
        take_step(optimizer, step)
    optimizer.param_groups[0]["params"].append(wrong)
    p.grad = torch.ones(1)
    with pytest.raises(TypeError, match=r"params\[1\] of parameter group 0 is (NoneType|int)"):
        optimizer.first_step()


# -- parameters that are let go of -----------------------------------------------------------------


def replace(optimizer: SAM) -> Tensor:
    """As densification does it; returns the old parameter."""
    params = optimizer.param_groups[0]["params"]
    old = params[0]
    params[0] = nn.Parameter(torch.cat([old.detach(), torch.ones(2)]))
    optimizer.state.pop(old, None)
    return old


def remove(optimizer: SAM) -> Tensor:
    old = optimizer.param_groups[0]["params"].pop(0)
    optimizer.state.pop(old, None)
    return old


def remove_the_group(optimizer: SAM) -> Tensor:
    (old,) = optimizer.param_groups.pop()["params"]
    optimizer.state.pop(old, None)
    return old


def freeze_and_remove(optimizer: SAM) -> Tensor:
    old = optimizer.param_groups[0]["params"][0]
    old.requires_grad_(False)
    step_of_trained(optimizer)
    return remove(optimizer)


def step_of_trained(optimizer: SAM) -> None:
    """A step of SAM, in which frozen parameters have no gradient."""
    for half in (optimizer.first_step, optimizer.second_step):
        set_gradients([p for p in parameters_of(optimizer) if p.requires_grad], 0)
        half()
    optimizer.zero_grad()


@each_backend
@pytest.mark.parametrize("edit", [replace, remove, remove_the_group, freeze_and_remove])
@each_of_torch
def test_parameters_are_freed(make: Make, edit: Callable[[SAM], Tensor], backend: str) -> None:
    """With their copies, by the next step."""
    params = [parameter(1.0, 2.0), parameter(3.0), parameter(4.0)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = SAM(groups, make(groups), backend=backend, track_statistics=True)
    del params, groups
    for _ in range(2):
        step_of_trained(optimizer)
        held = weakref.ref(edit(optimizer))
        step_of_trained(optimizer)
        gc.collect()
        assert held() is None
        if edit is remove_the_group or len(parameters_of(optimizer)) < 3:
            break


# -- frozen parameters of any kind -----------------------------------------------------------------

FROZEN: dict[str, Callable[[], Tensor]] = {
    "uint8": lambda: torch.zeros(4, dtype=torch.uint8),
    "int8": lambda: torch.zeros(4, dtype=torch.int8),
    "int64": lambda: torch.zeros(4, dtype=torch.int64),
    "bool": lambda: torch.zeros(4, dtype=torch.bool),
    "float8": lambda: torch.zeros(4).to(torch.float8_e4m3fn),
    "complex": lambda: torch.zeros(4, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "expanded": lambda: torch.zeros(1).expand(4),
    "meta": lambda: torch.zeros(4, device="meta"),
}


@each_of_torch
@pytest.mark.parametrize("kind", FROZEN)
@each_optimizer
def test_frozen_parameters_of_any_kind(cls: type[SAM], kind: str, make: Make) -> None:
    trained = parameter(1.0, 2.0)
    frozen = nn.Parameter(FROZEN[kind](), requires_grad=False)
    optimizer = cls([frozen, trained], make([frozen, trained]))
    optimizer.add_param_group({"params": nn.Parameter(FROZEN[kind](), requires_grad=False)})
    before = snapshot([trained])
    step_of_trained(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_of_trained(optimizer)
    assert not unchanged([trained], before) and optimizer.backends.keys() == {"cpu float32"}


def test_a_frozen_view_of_a_trained_parameter() -> None:
    trained = parameter(1.0, 2.0)
    view = nn.Parameter(trained.detach()[:1], requires_grad=False)
    for optimizer in (SAM([trained, view], lr=0.1), SGDHess([trained, view], lr=0.1)):
        assert len(parameters_of(optimizer)) == 2
    optimizer = SAM([trained, view], lr=0.1)
    step_of_trained(optimizer)
    view.requires_grad_(True)
    set_gradients([trained, view], 0)
    with pytest.raises(ValueError, match=r"params\[1\] and params\[0\] .* overlap in memory"):
        optimizer.first_step()


def test_a_frozen_parameter_is_looked_at_when_it_has_a_gradient() -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.complex64), requires_grad=False)
    optimizer = SAM([parameter(1.0), p], lr=0.1)
    p.requires_grad_(True)
    set_gradients(parameters_of(optimizer)[:1], 0)
    p.grad = torch.ones(4, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"params\[1\] of parameter group 0 .* is torch.complex64"):
        optimizer.first_step()


@each_optimizer
def test_lazy_parameters(cls: type[SAM]) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    optimizer = cls(model.parameters(), lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    x = torch.randn(3, 5)
    for half in (optimizer.first_step, optimizer.second_step):
        model(x).sum().backward()
        half()
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_parameters_of_sgdhess(kind: str) -> None:
    trained = parameter(1.0, 2.0)
    frozen = nn.Parameter(FROZEN[kind](), requires_grad=False)
    optimizer = SGDHess([frozen, trained], lr=0.1)
    optimizer.backward(trained.square().sum())
    optimizer.step()
    assert optimizer.backends.keys() == {"cpu float32"} and trained.tolist() != [1.0, 2.0]


# -- hyperparameters on their way ------------------------------------------------------------------


@each_backend
def test_nesterov_while_momentum_is_zero(backend: str) -> None:
    """As torch.optim.SGD's step: plain until there is momentum, and a dampening that schedules
    give."""
    model, twin = linear(), linear()
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}
    optimizer = SAM(model.parameters(), rho=0.3, backend=backend, **options)
    by_hand = ByHand(torch.optim.SGD(twin.parameters(), **options), 0.3)
    for step, (momentum, dampening) in enumerate([(0.0, 0.0), (0.3, 0.0), (0.9, 0.2), (0.0, 0.0)]):
        for group in (*optimizer.param_groups, *by_hand.base.param_groups):
            group.update(momentum=momentum, dampening=dampening)
        take_step(optimizer, step)
        by_hand.step(step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("lr", [-1e-9, -0.1])
@each_of_torch
@each_backend
def test_an_lr_below_zero(backend: str, make: Make, lr: float) -> None:
    """A step takes it, as those of torch.optim do."""
    model, twin = linear(), linear()
    optimizer = SAM(model.parameters(), make(model.parameters()), rho=0.3, backend=backend)
    by_hand = ByHand(make(twin.parameters()), 0.3)
    for step in range(3):
        if step == 2:
            for group in (*optimizer.param_groups, *by_hand.base.param_groups):
                group["lr"] = lr
        take_step(optimizer, step)
        by_hand.step(step)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_sgdhess_with_momentum_zero_and_an_lr_below_zero() -> None:
    w = parameter(1.0, 2.0)
    optimizer = SGDHess([w], lr=0.1, momentum=0.9, nesterov=True, rho=0.0)
    optimizer.param_groups[0].update(momentum=0.0, lr=-0.5)
    optimizer.backward(w.square().sum())
    optimizer.step()
    assert w.tolist() == [2.0, 4.0]
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="nesterov"):
        SGDHess([w], lr=0.1, nesterov=True)
