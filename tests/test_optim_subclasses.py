"""Parameters whose elements lie elsewhere, as those of float8 training do, or nowhere: wrapper
subclasses, also inside of DTensors, meta tensors and fake ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only

from samkernels import SAM, SAMDirection, SGDHess, frozen_batchnorm_stats
from tests.optim_helpers import set_gradients, snapshot, take_step, unchanged
from tests.optimizers import ADAM, ADAMW, AMSGRAD, INFO, PLAIN, SGD, Base, Variant, each_variant

# Its import would freeze the flags of torch.backends for everybody else.
with mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.testing._internal.two_tensor import TwoTensor

RMSPROP = Base("RMSprop", torch.optim.RMSprop, {"lr": 0.01}, is_fused=False)
each_base = pytest.mark.parametrize("base", [PLAIN, SGD, ADAM, ADAMW, AMSGRAD, RMSPROP], ids=str)
each_backend = pytest.mark.parametrize("backend", ["auto", "reference"])


class Wrapper(Tensor):
    """Like the weights of float8 training: what is computed of it is a plain tensor, but for what
    has to stay a wrapper."""

    KEPT = (
        torch.ops.aten.detach.default,
        torch.ops.aten.clone.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.copy_.default,
        torch.ops.aten.view.default,
    )
    copies = True
    wrapped: Tensor

    @staticmethod
    def __new__(cls, wrapped: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, wrapped.shape, wrapped.stride(), dtype=wrapped.dtype, device=wrapped.device
        )

    def __init__(self, wrapped: Tensor) -> None:
        self.wrapped = wrapped

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["wrapped"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Wrapper:
        return Wrapper(inner["wrapped"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and not cls.copies:
            raise NotImplementedError("no copy_")
        plain = tree_map_only(Wrapper, lambda x: x.wrapped, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        if func is torch.ops.aten.copy_.default:
            return args[0]
        return tree_map_only(Tensor, cls, out) if func in cls.KEPT else out


class Memory(Tensor):
    """No wrapper: it has memory of its own."""


class NoCopy(Wrapper):
    copies = False


class NoCopyOfItsKind(Wrapper):
    KEPT = tuple(op for op in Wrapper.KEPT if op is not torch.ops.aten.empty_like.default)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of two processes, one of which is not there: sums over both are those of this one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def plain_parameters(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((4, 3), (5,))]


Wrap = Callable[..., Tensor]  # of what lies in it


def parameters(wrap: Wrap, *seeds: int) -> list[nn.Parameter]:
    lists = [plain_parameters(seed) for seed in seeds]
    return [nn.Parameter(wrap(*each)) for each in zip(*lists, strict=True)]


def set_grads(params: Sequence[Tensor], wrap: Wrap, seeds: Sequence[int], step: int) -> None:
    lists = [plain_parameters(1000 + 100 * seed + step) for seed in seeds]
    for p, *each in zip(params, *lists, strict=True):
        p.grad = wrap(*each)


def train(
    variant: Variant,
    base: Base,
    wrap: Wrap,
    of: Callable[[Any], Tensor],
    seeds: Sequence[int] = (0,),
    wrap_grad: Wrap | None = None,
    **options: Any,
) -> list[Tensor]:
    """What is in the weights after three steps, each of which comes after two that are undone: w
    has to be back then, bit for bit."""
    params = parameters(wrap, *seeds)
    optimizer = variant(params, base, **options)

    def set_gradients(step: int) -> None:
        set_grads(params, wrap_grad or wrap, seeds, step)

    for step in range(3):
        before = snapshot(map(of, params))
        set_gradients(2 * step)
        optimizer.first_step()
        assert not unchanged(map(of, params), before)
        optimizer.restore()
        assert unchanged(map(of, params), before)
        set_gradients(2 * step)
        with contextlib.suppress(KeyboardInterrupt), optimizer.perturbed():
            raise KeyboardInterrupt
        assert unchanged(map(of, params), before) and not optimizer.is_perturbed
        set_gradients(2 * step)
        optimizer.first_step()
        set_gradients(2 * step + 1)
        optimizer.second_step(zero_grad=True)
        assert not unchanged(map(of, params), before)
    return snapshot(map(of, params))


def itself(x: Tensor) -> Tensor:
    return x


# -- wrappers --------------------------------------------------------------------------------------


@each_backend
@each_base
@each_variant
def test_two_tensors_are_trained_as_each_of_them(
    variant: Variant, base: Base, backend: str
) -> None:
    def joined(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a.reshape(-1), b.reshape(-1)])

    of_plain = "foreach" if backend == "auto" else backend
    trained = train(variant, base, TwoTensor, lambda p: joined(p.a, p.b), (0, 1), backend=backend)
    expected = (train(variant, base, itself, Tensor.detach, (i,), backend=of_plain) for i in (0, 1))
    assert unchanged(trained, list(map(joined, *expected)))


@each_backend
@each_base
@each_variant
def test_wrappers_whose_gradients_are_plain(variant: Variant, base: Base, backend: str) -> None:
    of = attrgetter("wrapped")
    trained = train(variant, base, Wrapper, of, wrap_grad=itself, backend=backend)
    of_plain = "foreach" if backend == "auto" else backend
    assert unchanged(trained, train(variant, base, itself, Tensor.detach, backend=of_plain))


@each_base
@each_variant
def test_wrappers_inside_of_shards(variant: Variant, base: Base, mesh: Any) -> None:
    def shard(x: Tensor) -> Tensor:
        return DTensor.from_local(x, mesh, [Shard(0)], run_check=False)

    local = attrgetter("_local_tensor")
    plain = train(variant, base, shard, local, backend="foreach")
    for wrap, of, wrap_grad in (
        (lambda x: TwoTensor(x, x.clone()), attrgetter("a"), None),
        (Wrapper, attrgetter("wrapped"), shard),
    ):
        trained = train(
            variant,
            base,
            lambda x, wrap=wrap: shard(wrap(x)),
            lambda p, of=of: of(local(p)),
            wrap_grad=wrap_grad,
        )
        assert unchanged(trained, plain)


def test_statistics_and_clipping_of_wrappers() -> None:
    options: dict[str, Any] = {"track_statistics": True, "max_grad_norm": 0.5}
    variant = Variant(INFO[SAMDirection], {"granularity": "global"})
    of = attrgetter("wrapped")
    trained = train(variant, SGD, Wrapper, of, wrap_grad=itself, **options)
    plain = train(variant, SGD, itself, Tensor.detach, backend="foreach", **options)
    assert unchanged(trained, plain)


@pytest.mark.parametrize(
    ("cls", "why"), [(NoCopy, "no copy_"), (NoCopyOfItsKind, "empty_like gives a plain tensor")]
)
def test_a_wrapper_without_copies_is_refused_before_anything_moves(
    cls: type[Wrapper], why: str
) -> None:
    """Frozen it may lie beside the others, as quantized weights do."""
    plain, wrapped = nn.Parameter(torch.ones(3)), nn.Parameter(cls(torch.ones(3)))
    optimizer = SAM([plain, wrapped], rho=0.5, lr=0.1)
    before = snapshot([plain, wrapped.wrapped])
    plain.grad, wrapped.grad = torch.ones(3), torch.ones(3)
    message = rf"params\[1\] of parameter group 0 is {cls.__name__}, which cannot be copied.*{why}"
    with pytest.raises(TypeError, match=message):
        optimizer.first_step()
    assert unchanged([plain, wrapped.wrapped], before) and not optimizer.is_perturbed
    for _ in range(2):
        plain.grad, wrapped.grad = torch.ones(3), None
        optimizer.first_step()
        plain.grad = torch.ones(3)
        optimizer.step()
    assert unchanged([wrapped.wrapped], before[1:]) and not unchanged([plain], before)


@pytest.mark.parametrize("subclass", [Tensor, Memory])
def test_memory_that_is_lost_between_the_steps(subclass: type[Tensor]) -> None:
    """Nothing is copied to where there is none; and if it comes back, so does w."""
    p = nn.Parameter(torch.ones(3).as_subclass(subclass))
    optimizer = SAM([p], rho=0.5, lr=0.1)
    p.grad = torch.ones(3).as_subclass(subclass)
    optimizer.first_step()
    p.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="lost its memory"):
        optimizer.restore()
    p.untyped_storage().resize_(12)
    optimizer.restore()
    assert torch.equal(p.detach().as_subclass(Tensor), torch.ones(3))


# -- tensors without elements ----------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "statistics": {"track_statistics": True, "max_grad_norm": 1.0},
    "adaptive": {"adaptive": True},
}

few_bases = pytest.mark.parametrize("base", [SGD, ADAMW, RMSPROP], ids=str)


def train_abstractly(variant: Variant, base: Base, **options: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = variant(model.parameters(), base, **options)
    x = torch.randn(3, 8)

    def closure() -> Tensor:
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        closure()
        optimizer.first_step()
        with frozen_batchnorm_stats(model):
            closure()
        optimizer.second_step(zero_grad=True)
    closure()
    optimizer.first_step()
    optimizer.restore()
    optimizer.zero_grad()
    loss = optimizer.step(closure)
    assert loss is not None and loss.shape == ()
    state = optimizer.state_dict()["state"]
    assert len(state) == 6
    for i, p in enumerate(model.parameters()):
        assert all(
            value.shape in (p.shape, ()) and type(value) in (Tensor, type(p.detach()))
            for value in state.get(i, {}).values()
        )


@pytest.mark.parametrize("options", OPTIONS)
@each_backend
@few_bases
@each_variant
def test_fake_tensors(variant: Variant, base: Base, backend: str, options: str) -> None:
    """Warnings are errors: nobody may ask them for an address."""
    with FakeTensorMode():
        train_abstractly(variant, base, backend=backend, **OPTIONS[options])


@pytest.mark.parametrize("options", OPTIONS)
@each_backend
@few_bases
@each_variant
def test_meta_tensors(variant: Variant, base: Base, backend: str, options: str) -> None:
    with torch.device("meta"):
        train_abstractly(variant, base, backend=backend, **OPTIONS[options])


@each_backend
@pytest.mark.parametrize("where", ["fake", "meta"])
def test_sgdhess_on_fake_and_meta_tensors(where: str, backend: str) -> None:
    with FakeTensorMode() if where == "fake" else torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
        optimizer = SGDHess(model.parameters(), lr=0.1, momentum=0.9, k=2, backend=backend)
        for _ in range(3):
            optimizer.backward(model(torch.randn(2, 2, 4, 4)).square().sum())
            optimizer.step()
            optimizer.zero_grad()
    assert {name for s in optimizer.state.values() for name in s} == {
        "momentum_buffer",
        "hessian_product",
    }


def test_hyperparameters_that_are_fake() -> None:
    with FakeTensorMode():
        lr, rho = torch.tensor(0.1), torch.tensor(0.05)
        variant = Variant(INFO[SAM])
        train_abstractly(variant, Base("", torch.optim.SGD, {"lr": lr, "momentum": 0.9}), rho=rho)


def test_a_model_that_is_initialised_later() -> None:
    """Made and traced without memory; trained where it has some, as one that had it at once."""
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    optimizer = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=0.1)
    set_gradients(model.parameters(), 0)
    optimizer.first_step()
    set_gradients(model.parameters(), 1)
    optimizer.step()
    model.to_empty(device="cpu")
    twin = nn.Linear(3, 2)
    model.load_state_dict(twin.state_dict())
    optimizers = [SAM(m.parameters(), torch.optim.AdamW, rho=0.05, lr=0.1) for m in (model, twin)]
    for one in optimizers:
        take_step(one, 0)
    assert unchanged(model.parameters(), snapshot(twin.parameters()))
