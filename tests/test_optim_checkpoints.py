"""What is saved, what is loaded, and that training goes on as if nothing had happened."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from samkernels import SAM, SAMMagnitude
from tests import earlier
from tests.optim_helpers import (
    ConvNet,
    assert_equal,
    images,
    linear,
    parameter,
    parameters_of,
    set_gradients,
    snapshot,
    take_step,
    through_a_file,
    unchanged,
)
from tests.optimizers import (
    BACKENDS,
    INFO,
    OPTIMIZER_TABLE,
    Variant,
    each_backend,
    each_cls_and_variant,
    each_optimizer,
    each_variant,
)

SGD_OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
BASES = [
    pytest.param(torch.optim.SGD, SGD_OPTIONS, id="SGD"),
    pytest.param(torch.optim.SGD, {"lr": 0.1}, id="SGD without momentum"),
    pytest.param(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05}, id="AdamW"),
    pytest.param(torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}, id="RMSprop"),
]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[::2], "rho": 0.3}, {"params": params[1::2], "weight_decay": 0.0}]


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two state_dicts are equal, tensors bit for bit."""
    if a["param_groups"] != b["param_groups"] or a["state"].keys() != b["state"].keys():
        return False
    return all(
        unchanged([v for v in state.values() if v is not None], other.values())
        if all(isinstance(v, torch.Tensor) for v in state.values())
        else state == other
        for state, other in zip(a["state"].values(), b["state"].values(), strict=True)
    )


# -- of earlier commits ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written_earlier() -> dict[str, Any]:
    return torch.load(Path(__file__).parent / "data" / "9ba4230.pt", weights_only=True)


def goes_on_as_then(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    earlier.train(optimizer, range(earlier.SAVED_AFTER, earlier.STEPS))
    for p, then in zip(earlier.params_of(optimizer), saved["later_weights"], strict=True):
        torch.testing.assert_close(p.detach(), then, rtol=1e-6, atol=1e-6)


@each_backend
@pytest.mark.parametrize("name", earlier.CASES)
def test_a_checkpoint_of_an_earlier_commit(
    name: str, backend: str, written_earlier: dict[str, Any]
) -> None:
    saved = copy.deepcopy(written_earlier[name])
    options = {"backend": backend, "lr": 3.0, "rho": 2.0}  # which the checkpoint has
    if "granularity" in earlier.CASES[name][2]:
        options["granularity"] = "element"
    optimizer = earlier.new(name, **options)
    with torch.no_grad():
        for p, then in zip(earlier.params_of(optimizer), saved["weights"], strict=True):
            p.copy_(then)
    optimizer.load_state_dict(saved["state_dict"])
    goes_on_as_then(optimizer, saved)


@pytest.mark.parametrize("name", earlier.CASES)
def test_an_optimizer_that_an_earlier_commit_has_pickled(
    name: str, written_earlier: dict[str, Any]
) -> None:
    optimizer = pickle.loads(written_earlier[name]["pickled"])
    again = pickle.loads(pickle.dumps(optimizer))
    for of in (optimizer, again):
        goes_on_as_then(of, written_earlier[name])


# -- layout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SGD_OPTIONS, {"lr": 0.1}], ids=["momentum", "plain"])
@each_backend
@each_optimizer
def test_layout_is_that_of_torch_sgd(
    cls: type[SAM], backend: str, options: dict[str, float]
) -> None:
    """The same keys, plus rho and the like; no old_param, no g1, no norms."""
    model, twin = linear(), linear()
    optimizer = cls(model.parameters(), backend=backend, track_statistics=True, **options)
    sgd = torch.optim.SGD(twin.parameters(), **options)
    for step in range(2):
        take_step(optimizer, step)
        set_gradients(twin.parameters(), step)
        sgd.step()
    ours, theirs = optimizer.state_dict(), sgd.state_dict()
    assert ours.keys() == theirs.keys()
    own_options = INFO[cls].group_options
    for group, their_group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert {k: v for k, v in group.items() if k not in own_options} == their_group
        assert own_options <= group.keys()
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        assert state.keys() == theirs["state"][index].keys() == {"momentum_buffer"}
        buffer, their_buffer = state["momentum_buffer"], theirs["state"][index]["momentum_buffer"]
        assert (buffer.shape, buffer.dtype) == (their_buffer.shape, their_buffer.dtype)
        assert not buffer.requires_grad


@each_optimizer
def test_a_checkpoint_is_as_large_as_that_of_torch_sgd(cls: type[SAM]) -> None:
    model = nn.Linear(100, 100)
    optimizer = cls(model.parameters(), **SGD_OPTIONS)
    take_step(optimizer, 0)
    set_gradients(model.parameters(), 1)
    sgd = torch.optim.SGD(model.parameters(), **SGD_OPTIONS)
    sgd.step()
    ours, theirs = (len(pickle.dumps(o.state_dict())) for o in (optimizer, sgd))
    assert ours - theirs < 200
    assert len(pickle.dumps(optimizer)) < 1.1 * len(pickle.dumps((sgd, sgd)))


# -- resuming --------------------------------------------------------------------------------------


class Training:
    """A model with batch norm, its optimizer and a scheduler, on a fixed stream of batches."""

    def __init__(
        self,
        cls: type[SAM],
        variant: dict[str, Any],
        base: type[torch.optim.Optimizer],
        options: dict[str, Any],
        backend: str = "auto",
    ) -> None:
        self.model = ConvNet()
        groups = groups_of(self.model)
        self.optimizer = cls(groups, base, backend=backend, **variant, **options)
        self.scheduler = lr_scheduler.StepLR(self.optimizer, 3, 0.5)

    def train(self, steps: range) -> None:
        for step in steps:
            x, y = images(step)
            for make_step in (self.optimizer.first_step, self.optimizer.second_step):
                cross_entropy(self.model(x), y).backward()
                make_step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])


@pytest.mark.parametrize(("base", "options"), BASES)
@each_cls_and_variant
def test_resuming_is_bit_exact(
    cls: type[SAM],
    variant: dict[str, Any],
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
) -> None:
    """Ten steps, or five, a checkpoint through a file, and five in new objects."""
    whole = Training(cls, variant, base, options)
    whole.train(range(10))

    first_half = Training(cls, variant, base, options)
    first_half.train(range(5))
    checkpoint = through_a_file(first_half.state_dict())
    # Options that the checkpoint has to correct.
    second_half = Training(cls, {}, base, {**options, "rho": 9.0, "adaptive": True, "lr": 9.0})
    second_half.load_state_dict(checkpoint)
    second_half.train(range(5, 10))

    assert unchanged(second_half.model.state_dict().values(), whole.model.state_dict().values())
    assert same_state(second_half.optimizer.state_dict(), whole.optimizer.state_dict())
    assert second_half.scheduler.state_dict() == whole.scheduler.state_dict()
    assert not unchanged(whole.model.parameters(), snapshot(first_half.model.parameters()))


def test_without_the_momentum_resuming_is_not_exact() -> None:
    """The comparison above would notice state that is missing."""
    whole = Training(SAM, {}, torch.optim.SGD, SGD_OPTIONS)
    whole.train(range(2))
    checkpoint = through_a_file(whole.state_dict())
    checkpoint["optimizer"]["state"] = {}
    resumed = Training(SAM, {}, torch.optim.SGD, SGD_OPTIONS)
    resumed.load_state_dict(checkpoint)
    for training in (whole, resumed):
        training.train(range(2, 4))
    assert not unchanged(resumed.model.parameters(), snapshot(whole.model.parameters()))


@pytest.mark.parametrize(("base", "options"), [BASES[0], BASES[2]])
@pytest.mark.parametrize("after", BACKENDS)
@pytest.mark.parametrize("before", BACKENDS)
@each_cls_and_variant
def test_loading_across_backends(
    cls: type[SAM],
    variant: dict[str, Any],
    before: str,
    after: str,
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
) -> None:
    """Backends differ by roundings only, and a checkpoint does not know which one made it."""
    results = []
    for first, second in ((before, after), ("reference", "reference")):
        model = linear()
        optimizer = cls(groups_of(model), base, backend=first, **options, **variant)
        take_step(optimizer, 0)
        take_step(optimizer, 1)
        resumed = cls(groups_of(model), base, backend=second, **options, **variant)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        assert resumed.backends == {"cpu float32": second}
        take_step(resumed, 2)
        results.append(snapshot(model.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_resuming_in_half_precision(dtype: torch.dtype) -> None:
    model = linear(dtype)
    optimizer = SAMMagnitude(groups_of(model), **SGD_OPTIONS)
    take_step(optimizer, 0)
    twin = linear(dtype)
    twin.load_state_dict(through_a_file(model.state_dict()))
    resumed = SAMMagnitude(groups_of(twin), **SGD_OPTIONS)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert all(resumed.state[p]["momentum_buffer"].dtype is dtype for p in twin.parameters())
    for o in (optimizer, resumed):
        take_step(o, 1)
        take_step(o, 2)
    assert unchanged(twin.parameters(), snapshot(model.parameters()))


@pytest.mark.parametrize("after", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
@pytest.mark.parametrize(("base", "options"), BASES)
@each_optimizer
def test_loading_across_dtypes(
    cls: type[SAM],
    base: type[torch.optim.Optimizer],
    options: dict[str, Any],
    before: torch.dtype,
    after: torch.dtype,
) -> None:
    """State takes its parameter's dtype, but for the count of steps; training goes on from that."""
    saved = linear(before)
    optimizer = cls(groups_of(saved), base, **options)
    take_step(optimizer, 0)
    models = [copy.deepcopy(saved).to(after) for _ in range(2)]
    resumed, by_hand = (cls(groups_of(model), base, **options) for model in models)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(parameters_of(by_hand), parameters_of(optimizer), strict=True):
        for name, value in optimizer.state[q].items():
            by_hand.state[p][name] = value.clone() if name == "step" else value.to(after, copy=True)
    assert same_state(resumed.state_dict(), by_hand.state_dict())
    for step in (1, 2):
        take_step(resumed, step)
        take_step(by_hand, step)
    assert all(p.dtype is after for p in models[0].parameters())
    assert unchanged(models[0].parameters(), snapshot(models[1].parameters()))


def test_a_whole_training_is_copied() -> None:
    """The scheduler of the copy drives the optimizer of the copy."""
    training = Training(SAMMagnitude, {}, torch.optim.SGD, SGD_OPTIONS)
    training.train(range(2))
    for duplicate in (copy.deepcopy(training), pickle.loads(pickle.dumps(training))):
        before = snapshot(training.model.parameters())
        duplicate.train(range(2, 5))
        assert unchanged(training.model.parameters(), before)
        expected = copy.deepcopy(training)
        expected.train(range(2, 5))
        assert duplicate.optimizer.param_groups[0]["lr"] == SGD_OPTIONS["lr"] / 2
        assert unchanged(
            duplicate.model.state_dict().values(), expected.model.state_dict().values()
        )


def test_a_checkpoint_of_another_memory_layout() -> None:
    """Momentum saved with channels_last weights, loaded for contiguous ones."""
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        model = ConvNet().to(memory_format=layout)
        optimizer = SAM(model.parameters(), backend="native", **SGD_OPTIONS)
        take_step(optimizer, 0)
        twin = ConvNet()
        twin.load_state_dict(through_a_file(model.state_dict()))
        resumed = SAM(twin.parameters(), backend="native", **SGD_OPTIONS)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        take_step(resumed, 1)
        take_step(resumed, 2)
        results.append(snapshot(twin.parameters()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# -- checkpoints of others -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SGD_OPTIONS, {"lr": 0.1}], ids=["momentum", "plain"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("backend", ["foreach", "reference"])
def test_a_torch_sgd_checkpoint(backend: str, nesterov: bool, options: dict[str, Any]) -> None:
    """The groups' own rho is kept, and with rho = 0 SGD's trajectory goes on."""
    options = {**options, "nesterov": nesterov and "momentum" in options}
    model, twin = linear().double(), linear().double()
    sgd = torch.optim.SGD(twin.parameters(), **options)
    for step in range(3):
        set_gradients(twin.parameters(), step)
        sgd.step()
    model.load_state_dict(twin.state_dict())
    optimizer = SAM(model.parameters(), rho=0.0, lr=9.0, backend=backend)
    optimizer.load_state_dict(through_a_file(sgd.state_dict()))
    (group,) = optimizer.param_groups
    assert (group["rho"], group["adaptive"]) == (0.0, False)
    assert {k: group[k] for k in options} == options
    for step in range(3, 6):
        set_gradients(twin.parameters(), step)
        sgd.step()
        set_gradients(model.parameters(), 99)
        optimizer.first_step()
        set_gradients(model.parameters(), step)
        optimizer.second_step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}, {"nesterov": True}])
@each_backend
@each_cls_and_variant
def test_a_torch_sgd_checkpoint_in_each_optimizer(
    cls: type[SAM], variant: dict[str, Any], backend: str, flags: dict[str, Any]
) -> None:
    """Where g1 = g2, u is the gradient: SGD's trajectory goes on."""
    model, twin = linear(), linear()
    sgd = torch.optim.SGD(twin.parameters(), **SGD_OPTIONS, **flags)
    for step in range(3):
        set_gradients(twin.parameters(), step)
        sgd.step()
    model.load_state_dict(twin.state_dict())
    optimizer = cls(model.parameters(), rho=0.3, lr=9.0, backend=backend, **variant)
    optimizer.load_state_dict(through_a_file(sgd.state_dict()))
    group = optimizer.param_groups[0]
    expected = {"rho": 0.3, **variant, **SGD_OPTIONS, **flags}
    assert {name: group[name] for name in expected} == expected
    for step in range(3, 6):
        set_gradients(twin.parameters(), step)
        sgd.step()
        for make_step in (optimizer.first_step, optimizer.second_step):
            set_gradients(model.parameters(), step)
            make_step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@each_optimizer
def test_a_torch_sgd_checkpoint_keeps_the_options_that_it_does_not_know(cls: type[SAM]) -> None:
    sgd = torch.optim.SGD(linear().parameters(), **SGD_OPTIONS)
    variant = INFO[cls].variants[-1]
    optimizer = cls(linear().parameters(), rho=0.7, adaptive=True, lr=9.0, **variant)
    optimizer.load_state_dict(through_a_file(sgd.state_dict()))
    expected = {"rho": 0.7, "adaptive": True, **variant, **SGD_OPTIONS}
    assert {k: optimizer.param_groups[0][k] for k in expected} == expected
    take_step(optimizer, 0)


def test_an_old_torch_sgd_checkpoint() -> None:
    """Before PyTorch 2, groups had fewer options, and plain SGD saved empty momentum buffers."""
    optimizer = SAM([parameter(0.0)], rho=0.0, lr=9.0)
    group = {"lr": 0.5, "momentum": 0, "dampening": 0, "weight_decay": 0, "params": [0]}
    checkpoint = {"state": {0: {"momentum_buffer": None}}, "param_groups": [group]}
    optimizer.load_state_dict(checkpoint)
    optimizer.param_groups[0]["momentum"] = 0.5
    (p,) = parameters_of(optimizer)
    for expected in (-0.5, -1.25):
        p.grad = torch.ones(1)
        optimizer.first_step()
        p.grad = torch.ones(1)
        optimizer.second_step()
        assert p.item() == expected


def test_a_sam_checkpoint_in_torch_sgd() -> None:
    """The way back."""
    model, twin = linear(), linear()
    optimizer = SAM(model.parameters(), rho=0.0, **SGD_OPTIONS)
    take_step(optimizer, 0)
    twin.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(twin.parameters(), lr=9.0)
    sgd.load_state_dict(through_a_file(optimizer.state_dict()))
    set_gradients(twin.parameters(), 3)
    sgd.step()
    take_step(optimizer, 1)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@each_variant
def test_a_sam_checkpoint_in_another_optimizer(variant: Variant) -> None:
    """rho and momentum are taken over; how u is made is the new optimizer's."""
    model = linear()
    sam = SAM(model.parameters(), rho=0.3, adaptive=True, **SGD_OPTIONS)
    take_step(sam, 0)
    checkpoint = through_a_file(sam.state_dict())
    twins = [copy.deepcopy(model), copy.deepcopy(model)]
    loaded = variant(twins[0].parameters(), rho=7.0, lr=9.0)
    loaded.load_state_dict(checkpoint)
    group = loaded.param_groups[0]
    expected = {"rho": 0.3, "adaptive": True, **variant.options}
    assert {name: group[name] for name in expected} == expected

    by_hand = variant(twins[1].parameters(), **SGD_OPTIONS, rho=0.3, adaptive=True)
    for p, q in zip(twins[1].parameters(), model.parameters(), strict=True):
        by_hand.state[p]["momentum_buffer"] = sam.state[q]["momentum_buffer"].clone()
    for optimizer in (loaded, by_hand):
        take_step(optimizer, 1)
        take_step(optimizer, 2)
    assert unchanged(twins[0].parameters(), snapshot(twins[1].parameters()))


@pytest.mark.parametrize("flags", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}])
@each_backend
@each_cls_and_variant
def test_an_adamw_checkpoint(
    cls: type[SAM], variant: dict[str, Any], backend: str, flags: dict[str, Any]
) -> None:
    options = {"lr": 0.01, "weight_decay": 0.05, **flags}
    model, twin = linear(), linear()
    adamw = torch.optim.AdamW(twin.parameters(), **options)
    for step in range(3):
        set_gradients(twin.parameters(), step)
        adamw.step()
    model.load_state_dict(twin.state_dict())
    optimizer = cls(model.parameters(), torch.optim.AdamW, 0.3, lr=9.0, backend=backend, **variant)
    optimizer.load_state_dict(through_a_file(adamw.state_dict()))
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0.3, 0.01)
    assert same_state(
        {**optimizer.state_dict(), "param_groups": []}, {**adamw.state_dict(), "param_groups": []}
    )
    # g1 = g2: u is g2 for each of the elementwise rules, and up to rounding for the others.
    set_gradients(model.parameters(), 3)
    optimizer.first_step()
    set_gradients(model.parameters(), 3)
    optimizer.second_step()
    set_gradients(twin.parameters(), 3)
    adamw.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (lambda o: o.state_dict(), "state_dict between first_step and second_step"),
        (lambda o: o.load_state_dict({"state": {}, "param_groups": []}), "load_state_dict between"),
        (copy.deepcopy, "copying or pickling between"),
        (copy.copy, "copying or pickling between"),
        (pickle.dumps, "copying or pickling between"),
    ],
)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
@each_optimizer
def test_nothing_is_saved_or_loaded_while_perturbed(
    cls: type[SAM],
    base: type[torch.optim.Optimizer],
    act: Callable[[SAM], object],
    text: str,
) -> None:
    model = linear()
    optimizer = cls(model.parameters(), base, lr=0.1)
    before = snapshot(model.parameters())
    set_gradients(model.parameters(), 0)
    optimizer.first_step()
    perturbed = snapshot(model.parameters())
    with pytest.raises(RuntimeError, match=rf"{text}.*second_step\(\) or restore\(\)"):
        act(optimizer)
    assert optimizer.is_perturbed and unchanged(model.parameters(), perturbed)
    optimizer.restore()
    assert unchanged(model.parameters(), before)


def wrong_number_of_groups(checkpoint: dict[str, Any]) -> None:
    checkpoint["param_groups"].append(copy.deepcopy(checkpoint["param_groups"][0]))


def wrong_size_of_a_group(checkpoint: dict[str, Any]) -> None:
    checkpoint["param_groups"][1]["params"].append(4)


def wrong_shape(checkpoint: dict[str, Any]) -> None:
    checkpoint["state"][1]["momentum_buffer"] = torch.zeros(2, 2)


def transposed(checkpoint: dict[str, Any]) -> None:
    buffer = checkpoint["state"][0]["momentum_buffer"]
    checkpoint["state"][0]["momentum_buffer"] = buffer.t().contiguous()


def group_option(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(checkpoint: dict[str, Any]) -> None:
        checkpoint["param_groups"][1][name] = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (wrong_number_of_groups, ValueError, "different number of parameter groups"),
        (wrong_size_of_a_group, ValueError, "size of optimizer's group"),
        (wrong_shape, ValueError, r"momentum_buffer of parameter 1 has shape \(2, 2\)"),
        (transposed, ValueError, r"momentum_buffer of parameter 0 has shape \(4, 8\)"),
        (group_option("rho", -1.0), ValueError, r"rho of parameter group 1 in state_dict=-1\.0"),
        (
            group_option("rho", float("nan")),
            ValueError,
            "rho of parameter group 1 in state_dict=nan",
        ),
        (group_option("rho", "big"), TypeError, "rho of parameter group 1 in state_dict is str"),
        (group_option("adaptive", 1), TypeError, "adaptive of parameter group 1 in state_dict"),
        (group_option("lr", float("nan")), ValueError, "parameter group 1 in state_dict: lr=nan"),
        (group_option("lr", torch.tensor(float("nan"))), ValueError, "lr=tensor.nan"),
        (group_option("lr", "big"), TypeError, "parameter group 1 in state_dict: lr is str"),
        (group_option("weight_decay", 1e39), ValueError, r"weight_decay=1e\+39"),
        (group_option("momentum", -0.1), ValueError, r"momentum=-0\.1"),
        (group_option("nesterov", 1), TypeError, "nesterov is int"),
    ],
)
@each_optimizer
def test_checkpoints_that_do_not_fit(
    cls: type[SAM],
    spoil: Callable[[dict[str, Any]], None],
    error: type[Exception],
    text: str,
) -> None:
    model = linear()
    optimizer = cls(groups_of(model), **SGD_OPTIONS)
    take_step(optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    other = cls(groups_of(linear(seed=1)), rho=0.4, lr=0.3, momentum=0.5)
    take_step(other, 1)
    checkpoint = through_a_file(other.state_dict())
    spoil(checkpoint)
    with pytest.raises(error, match=text):
        optimizer.load_state_dict(checkpoint)
    assert same_state(optimizer.state_dict(), state)
    take_step(optimizer, 2)


@pytest.mark.parametrize(
    "cls", [info.cls for info in OPTIMIZER_TABLE if "granularity" in info.group_options]
)
def test_a_checkpoint_with_another_granularity(cls: type[SAM]) -> None:
    optimizer = cls(groups_of(linear()), **SGD_OPTIONS)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][1]["granularity"] = "layer"
    with pytest.raises(ValueError, match="granularity of parameter group 1"):
        optimizer.load_state_dict(checkpoint)
    assert optimizer.param_groups[1]["granularity"] == "element"


@pytest.mark.parametrize(
    ("base", "spoil", "text"),
    [
        (torch.optim.Adam, group_option("betas", (0.9,)), r"betas=\(0\.9,\): give 2 numbers"),
        (torch.optim.Adam, group_option("betas", (0.9, 1.5)), r"betas\[1\]=1\.5"),
        (torch.optim.Adam, group_option("eps", 1e39), r"eps=1e\+39"),
        (torch.optim.Adam, group_option("amsgrad", True), "parameter 2 has no max_exp_avg_sq"),
        (torch.optim.NAdam, group_option("lr", float("nan")), "lr=nan"),
        (torch.optim.NAdam, group_option("betas", (0.9,)), "give 2 numbers"),
        (torch.optim.NAdam, group_option("betas", (0.9, 1.5)), "beta parameter at index 1: 1.5"),
        (torch.optim.NAdam, group_option("weight_decay", float("inf")), "weight_decay=inf"),
        (torch.optim.Adadelta, group_option("rho", 1.5), "rho value: 1.5"),
    ],
)
def test_checkpoints_that_do_not_fit_the_base_optimizer(
    base: type[torch.optim.Optimizer], spoil: Callable[[dict[str, Any]], None], text: str
) -> None:
    """A step with them would fail, or spoil the weights."""

    def build() -> SAM:
        model = linear()
        groups = [{k: v for k, v in g.items() if k == "params"} for g in groups_of(model)]
        return SAM(model.parameters(), base(groups, lr=0.1))

    optimizer, other = build(), build()
    take_step(optimizer, 0)
    take_step(other, 1)
    state = copy.deepcopy(optimizer.state_dict())
    checkpoint = through_a_file(other.state_dict())
    spoil(checkpoint)
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(checkpoint)
    assert_equal(optimizer.state_dict(), state)
    take_step(optimizer, 2)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_a_checkpoint_of_the_last_step_of_a_decay(base: type[torch.optim.Optimizer]) -> None:
    """Schedules end a hair below zero."""
    optimizer = SAM(linear().parameters(), base, lr=0.1)
    optimizer.param_groups[0]["lr"] = -1e-18
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == -1e-18


def test_loading_does_not_keep_a_hold_on_the_checkpoint() -> None:
    model = linear()
    optimizer = SAM(model.parameters(), **SGD_OPTIONS)
    take_step(optimizer, 0)
    checkpoint = optimizer.state_dict()
    kept = copy.deepcopy(checkpoint)
    other = SAM(linear().parameters(), **SGD_OPTIONS)
    other.load_state_dict(copy.deepcopy(checkpoint))
    other.param_groups[0]["rho"] = 0.9
    take_step(other, 1)
    assert same_state(checkpoint, kept)


# -- state that torch.distributed.checkpoint has the optimizer make --------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(("base", "options"), BASES)
@each_optimizer
def test_distributed_checkpoint_of_a_new_optimizer(
    cls: type[SAM], base: type[torch.optim.Optimizer], options: dict[str, Any], flat: bool
) -> None:
    """What is loaded into it is what was saved; the weights do not move."""
    dcp_options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, twin = linear(), linear()
    optimizer = cls(groups_of(model), base, **options)
    take_step(optimizer, 0)
    resumed = cls(groups_of(twin), base, **{**options, "rho": 9.0, "lr": 9.0})
    before = snapshot(twin.parameters())
    empty = get_optimizer_state_dict(twin, resumed, options=dcp_options)
    saved = get_optimizer_state_dict(model, optimizer, options=dcp_options)
    assert empty.keys() == saved.keys()
    set_optimizer_state_dict(twin, resumed, through_a_file(saved), options=dcp_options)
    assert unchanged(twin.parameters(), before) and not resumed.is_perturbed
    assert all(p.grad is None for p in twin.parameters())
    loaded = resumed.state_dict()
    loaded["state"] = {k: v for k, v in loaded["state"].items() if v}  # of SGD without momentum
    assert same_state(loaded, optimizer.state_dict())
    twin.load_state_dict(model.state_dict())
    for o in (optimizer, resumed):
        take_step(o, 1)
    assert unchanged(twin.parameters(), snapshot(model.parameters()))


@pytest.mark.parametrize(("base", "options"), BASES[:3])
def test_saving_before_the_first_step_changes_nothing(
    base: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    """The momentum is zero then, not weight_decay * w as after a step of torch.optim.SGD; and
    nothing counts as a step of AdamW."""
    results = []
    for saves in (False, True):
        model = linear()
        optimizer = SAM(groups_of(model), base, **options)
        if saves:
            get_optimizer_state_dict(model, optimizer)
        take_step(optimizer, 0)
        take_step(optimizer, 1)
        results.append(snapshot(model.parameters()))
    assert unchanged(*results)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_a_forgotten_first_step_is_still_an_error(
    base: type[torch.optim.Optimizer], lr: float, gradient: float
) -> None:
    """Unless lr and gradients are zero before any other step: then a step only makes state."""
    p = parameter(1.0, 2.0)
    optimizer = SAM([p], base, lr=lr)
    p.grad = torch.tensor([0.0, gradient])
    if lr == gradient == 0:
        optimizer.step()
        assert p.tolist() == [1.0, 2.0]
    else:
        with pytest.raises(RuntimeError, match=r"SAM\.step\(\) needs two gradients"):
            optimizer.step()
        assert not optimizer.state
    take_step(optimizer, 0)
    if base is torch.optim.AdamW:  # SGD without momentum has no state
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        p.grad = torch.zeros(2)
        with pytest.raises(RuntimeError, match=r"SAM\.step\(\) needs two gradients"):
            optimizer.step()


def test_a_step_without_gradients_is_still_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"SAM\.step\(\) needs two gradients"):
        SAM([parameter(1.0)], lr=0.0).step()
