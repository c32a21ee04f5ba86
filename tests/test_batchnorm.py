"""frozen_batchnorm_stats: what belongs to w + e(w) does not enter the running statistics."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy

from samkernels import SAM, frozen_batchnorm_stats
from tests.optim_helpers import ConvNet, images, same_bits

X = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1

# Each as it takes a batch of 6 x 4 x 5 x 5.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "cumulative average": lambda: nn.BatchNorm2d(4, momentum=None),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False),
    "momentum 1": lambda: nn.BatchNorm2d(4, momentum=1.0),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "instance norm without statistics": lambda: nn.InstanceNorm2d(4),
    "3d": lambda: nn.Sequential(nn.Unflatten(3, (1, 5)), nn.BatchNorm3d(4)),
    "1d": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(4)),
    "lazy": lambda: nn.LazyBatchNorm2d(),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d(4)),
    "group norm": lambda: nn.GroupNorm(2, 4),
}


def make(name: str) -> nn.Module:
    layer = LAYERS[name]()
    layer(X)  # statistics that are not the initial ones
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.linspace(0.5, 1.5, p.numel()).view(p.shape))
    return layer


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def same_buffers(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = dict(model.named_buffers())
    return after.keys() == before.keys() and all(
        same_bits(after[name], value) for name, value in before.items()
    )


def settings_of(model: nn.Module) -> list[tuple[object, ...]]:
    return [
        (m.training, getattr(m, "track_running_stats", None), getattr(m, "momentum", None))
        for m in model.modules()
    ]


def output_and_gradients(model: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    output = model(x)
    inputs = [x, *model.parameters()]
    weights = torch.arange(float(output.numel())).view_as(output)
    grads = torch.autograd.grad((output * weights).square().sum(), inputs)
    return [output.detach(), *grads]


@pytest.mark.parametrize("name", LAYERS)
def test_statistics_and_counters_stay(name: str) -> None:
    layer = make(name)
    before, settings = buffers_of(layer), settings_of(layer)
    with frozen_batchnorm_stats(layer):
        layer(X + 3)
        layer(X - 3)
        assert same_buffers(layer, before)
    assert same_buffers(layer, before)
    assert settings_of(layer) == settings
    layer(X + 3)
    assert same_buffers(layer, before) == (not before), "afterwards they are updated again"


@pytest.mark.parametrize("name", LAYERS)
def test_training_mode_normalises_with_the_batch(name: str) -> None:
    """Outputs and gradients are those that there would be without the context."""
    layer = make(name)
    with frozen_batchnorm_stats(layer):
        frozen = output_and_gradients(layer)
    for a, b in zip(frozen, output_and_gradients(layer), strict=True):
        assert torch.equal(a, b)
    if name == "no affine":
        torch.testing.assert_close(frozen[0].mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_eval_mode_uses_the_running_statistics(name: str) -> None:
    """Frozen layers of a model in fine-tuning stay what they are."""
    layer = make(name).eval()
    before = buffers_of(layer)
    expected = output_and_gradients(layer)
    with frozen_batchnorm_stats(layer):
        frozen = output_and_gradients(layer)
    for a, b in zip(frozen, expected, strict=True):
        assert torch.equal(a, b)
    assert same_buffers(layer, before)


def test_layers_in_eval_mode_beside_layers_in_training_mode() -> None:
    model = make("nested")
    model[1].eval()
    before = buffers_of(model)
    expected = output_and_gradients(model)
    assert not same_buffers(model, before)
    model.load_state_dict(before, strict=False)
    with frozen_batchnorm_stats(model):
        frozen = output_and_gradients(model)
    for a, b in zip(frozen, expected, strict=True):
        assert torch.equal(a, b)
    assert same_buffers(model, before)


@pytest.mark.parametrize("name", LAYERS)
def test_switching_modes_inside(name: str) -> None:
    """An evaluation in the middle of a second pass."""
    layer = make(name)
    before = buffers_of(layer)
    expected = layer.eval()(X)
    layer.train()
    with frozen_batchnorm_stats(layer):
        layer(X)
        layer.eval()
        assert torch.equal(layer(X), expected)
        layer.train()
    assert same_buffers(layer, before)


def test_nested_contexts() -> None:
    layer = make("batch norm")
    before = buffers_of(layer)
    with frozen_batchnorm_stats(layer):
        with frozen_batchnorm_stats(layer):
            layer(X)
        layer(X)  # still frozen by the outer one
        assert same_buffers(layer, before)
    layer(X)
    assert not same_buffers(layer, before)


def test_contexts_of_a_part_and_of_the_whole() -> None:
    model = make("nested")
    before = buffers_of(model)
    with frozen_batchnorm_stats(model[1]):
        with frozen_batchnorm_stats(model):
            model(X)
        assert same_buffers(model, before)
        model(X)
        after = buffers_of(model)
        changed = {name for name in before if not same_bits(after[name], before[name])}
        assert changed == {name for name in before if name.startswith("0.")}
    model(X)
    assert not torch.equal(buffers_of(model)["1.running_mean"], before["1.running_mean"])


@pytest.mark.parametrize("name", LAYERS)
def test_again_and_again(name: str) -> None:
    """The usual pair of disable and enable, called twice, leaves momentum 0 for ever."""
    layer = make(name)
    before, settings = buffers_of(layer), settings_of(layer)
    for _ in range(3):
        with frozen_batchnorm_stats(layer):
            layer(X)
    assert same_buffers(layer, before) and settings_of(layer) == settings


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_inside(error: type[BaseException]) -> None:
    layer = make("nested")
    before, settings = buffers_of(layer), settings_of(layer)
    with pytest.raises(error), frozen_batchnorm_stats(layer):
        layer(X)
        raise error
    assert same_buffers(layer, before) and settings_of(layer) == settings
    layer(X)
    assert not same_buffers(layer, before)


def test_as_a_decorator() -> None:
    layer = make("batch norm")
    before = buffers_of(layer)

    @frozen_batchnorm_stats(layer)
    def second_pass() -> Tensor:
        return layer(X)

    outputs = [second_pass(), second_pass()]
    assert same_buffers(layer, before)
    assert torch.equal(*outputs)
    layer(X)
    assert not same_buffers(layer, before)


def test_synchronised_batch_norm() -> None:
    """Without a process group it does what batch norm does, on any device."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make("nested"))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 2
    before, settings = buffers_of(model), settings_of(model)
    with frozen_batchnorm_stats(model):
        frozen = model(X)
    assert same_buffers(model, before) and settings_of(model) == settings
    assert torch.equal(model(X), frozen)
    assert not same_buffers(model, before)


def test_layers_that_are_shared_or_subclassed() -> None:
    class MyNorm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = MyNorm(4)
    model = nn.Sequential(layer, layer)
    before, settings = buffers_of(model), settings_of(model)
    with frozen_batchnorm_stats(model):
        model(X)
    assert same_buffers(model, before) and settings_of(model) == settings


def test_the_state_dict_is_the_same_inside() -> None:
    model = make("nested")
    expected = model.state_dict().keys()
    with frozen_batchnorm_stats(model):
        assert model.state_dict().keys() == expected
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


def test_models_without_normalisation() -> None:
    model = nn.Linear(5, 2)
    with frozen_batchnorm_stats(model):
        assert model(X).shape == (6, 4, 5, 2)


# -- what does not mind track_running_stats: buffers that are put back -----------------------------


class ByHand(nn.BatchNorm2d):
    """Minds momentum and nothing else, as several synchronised ones of users."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.running_mean += self.momentum * (x.mean((0, 2, 3)) - self.running_mean)
            self.num_batches_tracked = self.num_batches_tracked + 1  # another tensor
        return functional.batch_norm(x, None, None, self.weight, self.bias, True)


class Functional(nn.Module):
    """Statistics of its own, which functional.batch_norm updates; beside a matrix, if wanted."""

    def __init__(self, with_matrix: bool = False) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4), persistent=False)
        if with_matrix:
            self.register_buffer("queue", torch.zeros(3, 4))
            self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "queue"):
            self.queue[self.position] = x.detach().mean((0, 2, 3))
            self.position.copy_((self.position + 1) % 3)
        return functional.batch_norm(x, self.running_mean, self.running_var, training=True)


class Whitening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_covariance", torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.transpose(0, 1).flatten(1)
        covariance = flat @ flat.T / flat.shape[1]
        self.running_covariance.lerp_(covariance.detach(), 0.1)
        return torch.einsum("ij,njhw->nihw", covariance, x)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still used
        return torch.jit.script(nn.BatchNorm2d(4))


def traced() -> nn.Module:
    return torch.fx.symbolic_trace(nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True)))


def with_another_forward() -> nn.Module:
    """As libraries wrap the forward of one object."""
    layer = nn.BatchNorm2d(4)

    def forward(x: Tensor) -> Tensor:
        return functional.batch_norm(x, layer.running_mean, layer.running_var, training=True)

    layer.forward = forward  # type: ignore[method-assign]
    return layer


def fake_quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao moves to a package of its own
        from torch.ao.quantization import FakeQuantize, PerChannelMinMaxObserver

    return FakeQuantize(
        PerChannelMinMaxObserver, ch_axis=1, quant_min=0, quant_max=255, dtype=torch.quint8
    )


PUT_BACK: dict[str, Callable[[], nn.Module]] = {
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "minds momentum only": lambda: ByHand(4),
    "functional": Functional,
    "functional beside a matrix": lambda: Functional(with_matrix=True),
    "matrix of statistics": Whitening,
    "scripted": scripted,
    "traced": traced,
    "another forward": with_another_forward,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 2, 3)),
    "spectral norm, older": lambda: nn.utils.spectral_norm(nn.Conv2d(4, 2, 3)),
    "observer": fake_quantized,
    "beside batch norm": lambda: nn.Sequential(nn.BatchNorm2d(4), Functional()),
}


def put_back_layer(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = PUT_BACK[name]()
        layer(X)
    return layer


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in buffers_of(model).items() if not k.endswith(("queue", "position"))}


@pytest.mark.parametrize("name", PUT_BACK)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_buffers_are_put_back(name: str, error: type[BaseException] | None) -> None:
    """The same tensors, in the same memory, with the same bits."""
    layer = put_back_layer(name)
    before, settings = statistics_of(layer), settings_of(layer)
    places = {k: (id(v), v.data_ptr()) for k, v in layer.named_buffers()}
    with contextlib.suppress(KeyboardInterrupt, ValueError), frozen_batchnorm_stats(layer):
        layer(3 * X + 3)
        with frozen_batchnorm_stats(layer):
            layer(3 * X - 3)
        if error:
            raise error
    after = statistics_of(layer)
    assert after.keys() == before.keys()
    assert all(same_bits(after[k], v) for k, v in before.items())
    assert settings_of(layer) == settings
    assert {k: (id(v), v.data_ptr()) for k, v in layer.named_buffers()} == places
    layer(3 * X + 3)
    after = statistics_of(layer)
    assert not all(same_bits(after[k], v) for k, v in before.items()), "updated again"


@pytest.mark.parametrize("name", PUT_BACK)
def test_backward_after_the_context(name: str) -> None:
    """It finds what forward saved, and the gradients are those without the context."""
    layer, twin = put_back_layer(name), put_back_layer(name)
    assert all(map(same_bits, layer.buffers(), twin.buffers()))
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with frozen_batchnorm_stats(layer):
        output = layer(2 * x)
    expected = twin(2 * y)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None and y.grad is not None
    assert torch.equal(x.grad, y.grad)


def test_a_queue_and_its_position_stay_together() -> None:
    """Neither is put back: one without the other would make no sense."""
    layer = Functional(with_matrix=True)
    with frozen_batchnorm_stats(layer):
        layer(X)
    assert layer.position == 1 and layer.queue[0].any()


def test_an_observer_that_has_seen_nothing() -> None:
    observer = fake_quantized().activation_post_process
    before = buffers_of(observer)
    with frozen_batchnorm_stats(observer):
        observer(X)
        assert observer.min_val.shape == (4,)
    assert same_buffers(observer, before) and observer.min_val.shape == (0,)
    observer(X)
    assert observer.min_val.shape == (4,)


def test_lazy_layers_that_have_seen_nothing() -> None:
    layer = nn.LazyInstanceNorm2d(track_running_stats=True)
    with frozen_batchnorm_stats(layer):
        layer(X)
    assert type(layer) is nn.InstanceNorm2d


def test_buffers_of_other_kinds() -> None:
    """Several dtypes, none at all, on no device."""

    class Counters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("seen", torch.zeros(1, 4, 1, 1, dtype=torch.bool))
            self.register_buffer("mean", torch.zeros(4, dtype=torch.bfloat16))
            self.register_buffer("nothing", None)
            self.register_buffer("abstract", torch.zeros(4, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.seen |= True
            self.mean = (self.mean + x.mean((0, 2, 3))).bfloat16()
            return x

    layer = Counters()
    with frozen_batchnorm_stats(layer):
        layer(X)
        assert layer.count == 1 and layer.mean.all()
    assert layer.count == 0 and not layer.seen.any() and not layer.mean.any()


@pytest.mark.parametrize("model", [None, "model", [nn.BatchNorm2d(4)], nn.BatchNorm2d])
def test_what_is_no_module(model: object) -> None:
    with (
        pytest.raises(TypeError, match=r"model is \w+: give a torch\.nn\.Module"),
        frozen_batchnorm_stats(model),  # type: ignore[arg-type]
    ):
        pass


def test_a_hundred_steps_of_sam_count_a_hundred_batches() -> None:
    """And the statistics are those of the first passes alone."""
    model, twin = ConvNet(), ConvNet()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.05, momentum=0.9)
    for step in range(100):
        x, y = images(step % 5)
        twin.load_state_dict(dict(model.named_parameters()), strict=False)
        twin(x)
        cross_entropy(model(x), y).backward()
        optimizer.first_step()
        with frozen_batchnorm_stats(model):
            cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        assert same_buffers(model, buffers_of(twin))
    assert model.norm1.num_batches_tracked == model.norm2.num_batches_tracked == 100
    assert (model.norm1.momentum, model.norm2.momentum) == (0.1, 0.1)


def test_as_a_context_of_the_closure() -> None:
    """step(closure) calls once at w and once at w + e(w): the closure can tell by is_perturbed."""
    model = ConvNet()
    optimizer = SAM(model.parameters(), lr=0.05)
    x, y = images(0)

    def closure() -> Tensor:
        if optimizer.is_perturbed:
            with frozen_batchnorm_stats(model):
                loss = cross_entropy(model(x), y)
        else:
            loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert model.norm1.num_batches_tracked == 3
