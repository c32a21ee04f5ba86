"""What each process of tests/test_fsdp.py does: `python -m tests.fsdp_worker RANK SIZE FOLDER`.

All processes run every check; most compare with a twin that is not sharded.
"""

from __future__ import annotations

import copy
import datetime
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from samkernels import SAM, SAMDirection, SAMMagnitude, SGDHess, ops
from samkernels.optim import _shards
from tests import recipes
from tests.optim_helpers import count_calls
from tests.optimizers import ALL_VARIANTS, OPTIMIZERS

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "rho": 0.3}
VARIANTS = [(v.info.cls, v.options) for v in ALL_VARIANTS]
FEW_VARIANTS = [VARIANTS[0], VARIANTS[1], VARIANTS[2], VARIANTS[6]]  # each granularity once
# Sums in another order: an ulp of the norms in each step, and what training makes of it.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
}
BATCH = 8
# Of the runs that are interrupted.
SAVED_AFTER, ALL_STEPS = 3, 6
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, OPTIONS),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.05, "rho": 0.3}),
}


class Scale(nn.Module):
    """One element: its shards are empty in all processes but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Net(nn.Sequential):
    """Of 2 processes the shards are uneven; of 4 the last one has no row of the last layer."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(nn.Linear(5, 7), nn.Tanh(), Scale(), nn.Linear(7, 3))
        self.to(dtype)

    def groups(self) -> list[dict[str, Any]]:
        params = list(self.parameters())
        return [
            {"params": [p for p in params if p.dim() > 1]},
            {"params": [p for p in params if p.dim() == 1], "rho": 0.7, "weight_decay": 0.0},
        ]


@dataclass
class World:
    rank: int
    size: int
    mesh: DeviceMesh
    folder: Path


def sharded(world: World, net: Net, **options: Any) -> Net:
    """The net, each layer sharded on its own and the root with what is left: Scale."""
    options.setdefault("mesh", world.mesh)
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(net, **options)


def loss_of(
    net: nn.Module, step: int, part: slice = slice(None), dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 5, generator=generator, dtype=dtype)
    y = torch.randn(BATCH, 3, generator=generator, dtype=dtype)
    return (net(x[part]) - y[part]).square().mean()


def share_of(rank: int, size: int) -> slice:
    return slice(BATCH * rank // size, BATCH * (rank + 1) // size)


def train(
    net: nn.Module, optimizer: SAM, steps: range, part: slice = slice(None), **options: Any
) -> None:
    for step in steps:
        loss_of(net, step, part, **options).backward()
        optimizer.first_step()
        loss_of(net, step, part, **options).backward()
        optimizer.second_step(zero_grad=True)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def all_of(net: nn.Module, optimizer: SAM) -> list[dict[str, Tensor]]:
    """Each parameter with its state: momentum, moments, step counts."""
    return [
        {"weights": full(p), **{name: full(t) for name, t in optimizer.state[p].items()}}
        for p in net.parameters()
    ]


def assert_equal(ours: nn.Module, optimizer: SAM, theirs: nn.Module, their_optimizer: SAM) -> None:
    """Parameters and state, of the sharded net and of its twin."""
    expected = all_of(theirs, their_optimizer)
    tolerance = TOLERANCE[expected[0]["weights"].dtype]
    torch.testing.assert_close(all_of(ours, optimizer), expected, **tolerance)


def compared(
    world: World,
    cls: type[SAM] = SAM,
    base: type[torch.optim.Optimizer] = torch.optim.SGD,
    *,
    steps: int = 2,
    shard: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Net, SAM]:
    """Some steps, with a part of the batch in each process, and by the twin with all of it."""
    options = {**OPTIONS, "track_statistics": True, **options}
    if base is not torch.optim.SGD:
        del options["momentum"]
        options["lr"] = 1e-3
    net, twin = sharded(world, Net(), **(shard or {})), Net()
    optimizer = cls(net.groups(), base, **options)
    their_optimizer = cls(twin.groups(), base, **options)
    for step in range(steps):
        train(net, optimizer, range(step, step + 1), share_of(world.rank, world.size))
        train(twin, their_optimizer, range(step, step + 1))
        assert_equal(net, optimizer, twin, their_optimizer)
        if optimizer.track_statistics:
            assert optimizer.statistics is not None and their_optimizer.statistics is not None
            for name, theirs in their_optimizer.statistics._asdict().items():
                ours = getattr(optimizer.statistics, name)
                # float32 holds them, and a share is a whole number of elements.
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, msg=name)
    return net, optimizer


def same_everywhere(world: World, tensor: Tensor) -> bool:
    """Whether all processes have the same bits."""
    all_of_them = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(all_of_them, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in all_of_them)


def raises(error: type[Exception], text: str, function: Callable[[], object]) -> None:
    try:
        function()
    except error as caught:
        assert text in str(caught), caught
    else:
        raise AssertionError(f"no {error.__name__}")


# -- the step --------------------------------------------------------------------------------------


def check_trajectories(world: World) -> None:
    if world.size > 2:
        for cls, variant in FEW_VARIANTS:
            compared(world, cls, **variant)
        return
    for cls, variant in VARIANTS:
        compared(world, cls, **variant)
    compared(world, SAM, adaptive=True)
    compared(world, SAMMagnitude, adaptive=True, granularity="global")
    compared(world, SAMDirection, adaptive=True, granularity="tensor", maximize=True)


def check_trajectories_without_statistics(world: World) -> None:
    """n2 comes from elsewhere then."""
    for cls, variant in VARIANTS[1:]:
        compared(world, cls, steps=2, track_statistics=False, nesterov=True, **variant)


def check_clipping(world: World) -> None:
    """By the norm of the whole gradient; g2 of some parameters is clipped with no g1 to compare."""
    for cls, variant in (VARIANTS[0], VARIANTS[1], VARIANTS[4], VARIANTS[6]):
        for track_statistics in (False, True):
            compared(
                world, cls, max_grad_norm=0.05, track_statistics=track_statistics, **variant
            )  # fmt: skip
    results = []
    for shards in (True, False):
        net = sharded(world, Net()) if shards else Net()
        optimizer = SAM(net.groups(), max_grad_norm=0.05, track_statistics=True, **OPTIONS)
        part = share_of(world.rank, world.size) if shards else slice(None)
        for make_step in (optimizer.first_step, optimizer.second_step):
            loss_of(net, 0, part).backward()
            if make_step == optimizer.first_step:
                net[0].weight.grad = None
            make_step()
        results.append((net, optimizer))
    assert_equal(*results[0], *results[1])
    torch.testing.assert_close(*(list(o.statistics) for _, o in results))


def check_parts(world: World) -> None:
    """m-sharpness of the parts of a batch that all processes make together."""
    for cls, variant in (VARIANTS[0], VARIANTS[2], VARIANTS[3], VARIANTS[6]):
        results = []
        for shards in (True, False):
            net = sharded(world, Net()) if shards else Net()
            optimizer = cls(net.groups(), track_statistics=True, **OPTIONS, **variant)
            part = share_of(world.rank, world.size) if shards else slice(None)
            for step in range(2):
                for micro_batch in optimizer.parts(range(3)):
                    loss_of(net, 10 * step + micro_batch, part).backward()
                    optimizer.first_step()
                    loss_of(net, 10 * step + micro_batch, part).backward()
                optimizer.second_step(zero_grad=True)
            results.append((net, optimizer))
        assert_equal(*results[0], *results[1])
        torch.testing.assert_close(*(list(o.statistics) for _, o in results))


def check_a_missing_reduction_is_noticed(world: World) -> None:
    """Each norm and each sum, were it that of the shards here."""
    whole = ops.all_reduce
    for call, variants in (
        (0, VARIANTS),  # in the first step: n and n1
        (1, [*VARIANTS[2:4], *VARIANTS[5:]]),  # in the second: n2
    ):
        for cls, variant in variants:
            calls: list[int] = []

            def without_one(
                measured: Any, groups: Any, call: int = call, calls: Any = calls
            ) -> Any:
                calls.append(len(calls))
                return list(measured) if calls[-1] == call else whole(measured, groups)

            ops.all_reduce = without_one
            try:
                compared(world, cls, track_statistics=False, steps=1, **variant)
            except AssertionError:
                continue
            finally:
                ops.all_reduce = whole
            raise AssertionError(f"{cls.__name__} {variant}, call {call}: not noticed")


def check_bit_equal_without_a_norm(world: World) -> None:
    """With rho=0 no sum enters an elementwise rule: the fused kernels see the same numbers, cut
    another way. All processes have the same batch, so that the mean of their gradients is exact."""
    for cls in OPTIMIZERS:
        for options in ({"nesterov": True}, {"momentum": 0.0, "maximize": True}):
            net, twin = sharded(world, Net(dtype=torch.float32)), Net(dtype=torch.float32)
            results = []
            for model in (net, twin):
                kwargs = {**OPTIONS, "rho": 0.0, "backend": "native", **options}
                optimizer = cls(model.parameters(), **kwargs)
                assert optimizer.backends == {"cpu float32": "native"}
                train(model, optimizer, range(3), dtype=torch.float32)
                results.append([full(p) for p in model.parameters()])
            assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def check_fused_kernels(world: World) -> None:
    """In float32, on the backend that "auto" takes, and on the reference."""
    variants = [("native", *variant) for variant in VARIANTS]
    for backend, cls, variant in [*variants, ("reference", *VARIANTS[2])]:
        net, twin = sharded(world, Net(dtype=torch.float32)), Net(dtype=torch.float32)
        optimizers = []
        for model in (net, twin):
            optimizer = cls(model.groups(), backend=backend, **OPTIONS, **variant)
            train(model, optimizer, range(2), dtype=torch.float32)
            optimizers.append(optimizer)
        assert optimizers[0].backends == {"cpu float32": backend}
        assert_equal(net, optimizers[0], twin, optimizers[1])


def check_norms_have_the_same_bits_everywhere(world: World) -> None:
    net = sharded(world, Net(dtype=torch.float32))
    optimizer = SAMDirection(
        net.groups(), granularity="global", adaptive=True, track_statistics=True, **OPTIONS
    )
    part = share_of(world.rank, world.size)
    reduced: list[ops.Dots] = []
    right = ops.all_reduce

    def all_reduce(*arguments: Any) -> list[ops.Dots]:
        dots = right(*arguments)
        reduced.extend(dots)
        return dots

    with mock.patch.object(ops, "all_reduce", all_reduce):
        for step in range(3):
            loss_of(net, step, part, torch.float32).backward()
            optimizer.first_step()
            perturbation = optimizer._perturbation
            in_first = len(reduced)
            assert in_first and same_everywhere(world, perturbation.ascent_square)
            loss_of(net, step, part, torch.float32).backward()
            optimizer.second_step(zero_grad=True)
            assert len(reduced) > in_first
            for dots in reduced:
                assert same_everywhere(world, dots.total)
                assert same_everywhere(world, dots.per_tensor)
            assert all(same_everywhere(world, value) for value in optimizer.statistics)
            reduced.clear()


def check_one_reduction_for_all_norms(world: World) -> None:
    """Of all groups and tensors, and none for an elementwise second step."""
    for cls, variant, expected in (
        (SAM, {}, (1, 0)),
        (SAM, {"track_statistics": True}, (1, 1)),
        (SAM, {"max_grad_norm": 1.0}, (1, 1)),
        (SAMDirection, {"granularity": "element"}, (1, 0)),
        (SAMDirection, {"granularity": "tensor", "adaptive": True}, (1, 1)),
        (SAMMagnitude, {"granularity": "global", "track_statistics": True}, (1, 1)),
    ):
        net = sharded(world, Net())
        optimizer = cls(net.groups(), **OPTIONS, **variant)
        numbers = []
        all_reduce = dist.all_reduce
        for make_step in (optimizer.first_step, optimizer.second_step):
            loss_of(net, 0).backward()
            dist.all_reduce, calls = count_calls(all_reduce)
            try:
                make_step()
            finally:
                dist.all_reduce = all_reduce
            numbers.append(len(calls))
        assert tuple(numbers) == expected, (cls, variant, numbers)


def check_a_process_that_has_only_empty_shards(world: World) -> None:
    results = []
    for shards in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Linear(5, 1).double()
        if shards:
            fully_shard(net, mesh=world.mesh)
            assert all(p.to_local().numel() == 0 for p in net.parameters()) == (world.rank > 0)
        optimizer = SAMDirection(
            net.parameters(), granularity="global", track_statistics=True, **OPTIONS
        )
        part = share_of(world.rank, world.size) if shards else slice(None)
        x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(0)).double()[part]
        for _ in range(3):
            for make_step in (optimizer.first_step, optimizer.second_step):
                net(x).square().mean().backward()
                make_step()
            optimizer.zero_grad()
        results.append((net, optimizer))
    (net, optimizer), (twin, their_optimizer) = results
    assert_equal(net, optimizer, twin, their_optimizer)
    torch.testing.assert_close(list(optimizer.statistics), list(their_optimizer.statistics))


def check_fused_adam(world: World) -> None:
    """Moments are sharded; step counts are in all processes, those with empty shards too."""
    for cls, variant in FEW_VARIANTS[2:] if world.size > 2 else VARIANTS:
        net, optimizer = compared(world, cls, torch.optim.AdamW, track_statistics=False, **variant)
        assert all(isinstance(optimizer.state[p]["exp_avg"], DTensor) for p in net.parameters())
        assert {optimizer.state[p]["step"].item() for p in net.parameters()} == {2.0}
    if world.size == 2:
        compared(world, SAM, torch.optim.Adam, adaptive=True, max_grad_norm=0.05)


def check_other_base_optimizers(world: World) -> None:
    for cls, variant in (VARIANTS[0], VARIANTS[3]):
        compared(world, cls, torch.optim.RMSprop, **variant)
        compared(world, cls, torch.optim.AdamW, amsgrad=True, **variant)


def check_gradients_are_taken_over_without_a_copy(world: World) -> None:
    """FSDP2 makes new memory in each backward: g1 stays what it was."""
    net = sharded(world, Net())
    optimizer = SAMDirection(net.parameters(), **OPTIONS)
    loss_of(net, 0).backward()
    grads = [p.grad.to_local() for p in net.parameters()]
    values = [g.clone() for g in grads]
    optimizer.first_step()
    assert all(p.grad is None for p in net.parameters())
    kept = list(optimizer._perturbation.first_grads.values())
    assert [g.data_ptr() for g in kept] == [g.data_ptr() for g in grads]
    loss_of(net, 0).backward()
    assert all(torch.equal(g, value) for g, value in zip(kept, values, strict=True))
    optimizer.second_step()


def check_restore(world: World) -> None:
    net = sharded(world, Net(dtype=torch.float32))
    optimizer = SAM(net.parameters(), **OPTIONS)
    before = [p.to_local().detach().clone() for p in net.parameters()]
    addresses = [p.to_local().data_ptr() for p in net.parameters()]
    loss_of(net, 0, dtype=torch.float32).backward()
    optimizer.first_step()
    pairs = zip(net.parameters(), Net(dtype=torch.float32).parameters(), strict=True)
    distance = sum((full(p) - q).square().sum() for p, q in pairs).sqrt()
    torch.testing.assert_close(distance.item(), OPTIONS["rho"], rtol=1e-4, atol=0)
    optimizer.restore()
    assert all(torch.equal(p.to_local(), b) for p, b in zip(net.parameters(), before, strict=True))
    assert [p.to_local().data_ptr() for p in net.parameters()] == addresses


def check_one_inf_skips_the_step_everywhere(world: World) -> None:
    for base in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop):
        net = sharded(world, Net())
        optimizer = SAM(net.groups(), base, lr=0.1, weight_decay=0.0)
        train(net, optimizer, range(1))
        before = [p.to_local().detach().clone() for p in net.parameters()]
        loss_of(net, 1).backward()
        if world.rank == 0:
            next(net.parameters()).grad.to_local()[0, 0] = torch.inf
        optimizer.first_step()
        now = [p.to_local() for p in net.parameters()]
        assert all(torch.equal(p, b) for p, b in zip(now, before, strict=True))
        loss_of(net, 1).backward()
        optimizer.second_step(zero_grad=True)
        assert optimizer._perturbation is None
        if base is not torch.optim.RMSprop:  # which steps with u = 0
            assert all(torch.equal(p, b) for p, b in zip(now, before, strict=True))
            assert all(state.get("step", 1) == 1 for state in optimizer.state.values())


def check_a_gradient_that_is_missing_in_one_pass(world: World) -> None:
    """The norms of the others are still those of whole tensors."""
    for granularity in ("tensor", "global"):
        results = []
        for shards in (True, False):
            net = sharded(world, Net()) if shards else Net()
            optimizer = SAMDirection(net.parameters(), granularity=granularity, **OPTIONS)
            part = share_of(world.rank, world.size) if shards else slice(None)
            for missing in ((None, 1), (2, None), (None, None)):
                for index, make_step in zip(
                    missing, (optimizer.first_step, optimizer.second_step), strict=True
                ):
                    loss_of(net, 0, part).backward()
                    if index is not None:
                        list(net.parameters())[index].grad = None
                    make_step()
                optimizer.zero_grad()
            results.append((net, optimizer))
        assert_equal(*results[0], *results[1])


def check_grad_scaler(world: World) -> None:
    """torch.amp.GradScaler reduces found_inf over the shards of DTensors."""
    for base, options in BASES.values():
        results = []
        for shards in (True, False):
            net = sharded(world, Net(dtype=torch.float32)) if shards else Net(dtype=torch.float32)
            optimizer = SAMMagnitude(net.groups(), base, granularity="global", **options)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
            overflows = {(1, 2), (3, 1)}  # of step and pass, in one process
            for step in range(6):
                for number in (1, 2):
                    scaler.scale(loss_of(net, step, dtype=torch.float32)).backward()
                    if (step, number) in overflows and (not shards or world.rank == 0):
                        grad = net[0].weight.grad
                        (grad.to_local() if shards else grad)[0, 0] = torch.inf
                    if number == 1:
                        optimizer.first_step()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            results.append((net, optimizer, scaler.get_scale()))
        assert results[0][2] == results[1][2] == 512.0  # halved twice, and doubled once
        assert_equal(*results[0][:2], *results[1][:2])


# -- ways to shard ---------------------------------------------------------------------------------


def check_reshard_after_forward(world: World) -> None:
    for reshard_after_forward in (True, False):
        compared(world, SAMMagnitude, granularity="global",
                 shard={"reshard_after_forward": reshard_after_forward})  # fmt: skip


def check_weights_that_stay_gathered_have_to_be_resharded(world: World) -> None:
    """FSDP2 computes with what it gathered before the optimizer wrote, if it still has that: the
    perturbation is not seen, as an update would not be. reshard() is the way out."""
    twin = Net()
    optimizer = SAM(twin.parameters(), **OPTIONS)
    loss_of(twin, 0).backward()
    optimizer.first_step()
    expected = loss_of(twin, 0).item()
    for reshards in (False, True):
        for evaluates in (False, True):
            net = sharded(world, Net())
            net.set_reshard_after_backward(evaluates)
            optimizer = SAM(net.parameters(), **OPTIONS)
            loss_of(net, 0).backward()
            if evaluates:  # gathers, and with no backward after it the root keeps its parameters
                with torch.no_grad():
                    loss_of(net, 0)
            optimizer.first_step()
            if reshards:
                for module in net.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()
            assert (abs(loss_of(net, 0).item() - expected) < 1e-9) == reshards


def check_gradient_accumulation(world: World) -> None:
    """Micro-batches without communication, and the last one with it."""
    results = []
    for shards in (True, False):
        net = sharded(world, Net()) if shards else Net()
        optimizer = SAMDirection(net.parameters(), granularity="tensor", **OPTIONS)
        part = share_of(world.rank, world.size) if shards else slice(None)
        for step in range(2):
            for make_step in (optimizer.first_step, optimizer.second_step):
                for micro_batch in range(3):
                    if shards:
                        net.set_requires_gradient_sync(micro_batch == 2)
                    loss_of(net, 10 * step + micro_batch, part).backward()
                make_step()
            optimizer.zero_grad()
        results.append((net, optimizer))
    assert_equal(*results[0], *results[1])


def check_hybrid_sharding(world: World) -> None:
    """Sharded over one dimension of the mesh, replicated over the other."""
    mesh = init_device_mesh("cpu", (2, world.size // 2), mesh_dim_names=("replicate", "shard"))
    for cls, variant in (VARIANTS[0], VARIANTS[2], VARIANTS[6]):
        net, optimizer = compared(world, cls, shard={"mesh": mesh}, **variant)
        assert next(net.parameters()).placements == (Replicate(), Shard(0))
        groups = optimizer._slots.place_of(next(net.parameters())).process_groups
        assert groups == ((mesh.get_group("shard"),) if world.size > 2 else ())
        for p in net.parameters():  # the replicas may not drift apart
            here = p.to_local().detach()
            replicas = [torch.empty_like(here) for _ in range(2)]
            dist.all_gather(replicas, here, group=mesh.get_group("replicate"))
            assert torch.equal(*replicas)


def check_two_sharded_dimensions(world: World) -> None:
    """As FSDP2 with tensor parallelism makes them: sums go over both dimensions."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    w, g1, g2 = (torch.randn(3, 2, 7, 5, dtype=torch.float64)[:, 0]).unbind(0)
    placements = [(Shard(0), Shard(1)), (Replicate(), Shard(0)), (Replicate(), Replicate())]
    for cls, variant in VARIANTS:
        nets = []
        for shards in (True, False):
            params = [
                nn.Parameter(distribute_tensor(w.clone(), mesh, where) if shards else w.clone())
                for where in placements
            ]
            optimizer = cls(params, track_statistics=True, **OPTIONS, **variant)
            for grad, make_step in ((g1, optimizer.first_step), (g2, optimizer.second_step)):
                for i, (p, where) in enumerate(zip(params, placements, strict=True)):
                    value = (i + 1) * grad
                    p.grad = distribute_tensor(value, mesh, where) if shards else value
                if shards:  # a gradient that is still to be added up over one dimension
                    addend = 0.5 * 3 * grad
                    params[2].grad = DTensor.from_local(addend, mesh, (Replicate(), Partial()))
                make_step()
            nets.append((nn.ParameterList(params), optimizer))
        assert_equal(*nets[0], *nets[1])
        torch.testing.assert_close(list(nets[0][1].statistics), list(nets[1][1].statistics))


def check_some_parameters_are_whole(world: World) -> None:
    """Those that FSDP2 ignores: in the same group as sharded ones, and in one of their own."""
    for cls, variant in VARIANTS[2:4]:
        for own_group in (False, True):
            results = []
            for shards in (True, False):
                net = Net()
                if shards:
                    fully_shard(net, mesh=world.mesh, ignored_params=set(net[3].parameters()))
                groups: Any = list(net.parameters())
                if own_group:
                    groups = [{"params": groups[:3]}, {"params": groups[3:], "rho": 0.9}]
                optimizer = cls(groups, track_statistics=True, **OPTIONS, **variant)
                part = share_of(world.rank, world.size) if shards else slice(None)
                for step in range(2):
                    for make_step in (optimizer.first_step, optimizer.second_step):
                        loss_of(net, step, part).backward()
                        if shards:
                            for p in net[3].parameters():
                                dist.all_reduce(p.grad)
                                p.grad /= world.size
                        make_step()
                    optimizer.zero_grad()
                results.append((net, optimizer))
            assert isinstance(results[0][0][0].weight, DTensor)
            assert not isinstance(results[0][0][3].weight, DTensor)
            assert_equal(*results[0], *results[1])
            torch.testing.assert_close(*(list(o.statistics) for _, o in results))


def check_mixed_precision(world: World) -> None:
    """Computed in bfloat16, and all that the optimizer sees is float32."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    net = sharded(world, Net(dtype=torch.float32), mp_policy=policy)
    optimizer = SAMMagnitude(net.groups(), granularity="global", **OPTIONS)
    losses = []
    for _ in range(4):
        loss = loss_of(net, 0, dtype=torch.float32)
        loss.backward()
        grads = [full(p.grad) for p in net.parameters()]
        optimizer.first_step()
        n = torch.cat([g.flatten() for g in grads]).norm()
        square = optimizer._perturbation.ascent_square
        torch.testing.assert_close(square.sqrt().to(n), n, rtol=1e-6, atol=0)
        loss_of(net, 0, dtype=torch.float32).backward()
        optimizer.second_step(zero_grad=True)
        losses.append(loss.item())
    assert all(p.dtype is torch.float32 for p in net.parameters())
    assert optimizer.backends == {"cpu float32": "native"} and losses[-1] < losses[0]


def check_cpu_offload(world: World) -> None:
    compared(world, SAMDirection, granularity="global",
             shard={"offload_policy": CPUOffloadPolicy(pin_memory=False)})  # fmt: skip


def check_the_recipe(world: World) -> None:
    """As it is printed; all processes have its one stream of batches."""
    start, dist.init_process_group = dist.init_process_group, lambda *_: None
    os.environ["TORCHELASTIC_RUN_ID"] = "as if torchrun had started this process"
    try:
        result = recipes.run("FSDP2")
    finally:
        dist.init_process_group = start
        del os.environ["TORCHELASTIC_RUN_ID"]
    assert all(isinstance(p, DTensor) for p in result.model.parameters())
    whole = [full(p) for p in result.model.parameters()]
    recipes.assert_close(SimpleNamespace(model=nn.ParameterList(whole)),
                         recipes.weights(recipes.run("The loop")))  # fmt: skip


# -- checkpoints -----------------------------------------------------------------------------------


def check_momentum_is_sharded_as_in_torch_sgd(world: World) -> None:
    net, twin = sharded(world, Net()), sharded(world, Net())
    optimizer = SAM(net.parameters(), **OPTIONS)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, range(1))
    loss_of(twin, 0).backward()
    sgd.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[p].keys() == {"momentum_buffer"}
        ours, theirs = optimizer.state[p]["momentum_buffer"], sgd.state[q]["momentum_buffer"]
        assert isinstance(ours, DTensor) and not ours.requires_grad
        assert ours._spec == theirs._spec
        assert ours.to_local().shape == theirs.to_local().shape == p.to_local().shape


def interrupted_run(net: Net, base: str, **options: Any) -> SAM:
    cls, of_base = BASES[base]
    return SAMMagnitude(net.groups(), cls, granularity="global", **{**of_base, **options})


def check_saving(world: World) -> None:
    """Goes on after it has saved: to compare with those that resume."""
    for base in BASES:
        net, part = sharded(world, Net()), share_of(world.rank, world.size)
        optimizer = interrupted_run(net, base)
        train(net, optimizer, range(SAVED_AFTER), part)
        model_state, optimizer_state = dcp_state.get_state_dict(net, optimizer)
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state},
            checkpoint_id=world.folder / base,
        )
        train(net, optimizer, range(SAVED_AFTER, ALL_STEPS), part)
        result = all_of(net, optimizer)
        if world.rank == 0:
            torch.save(result, world.folder / f"{base}.pt")


def resume(net: Net, base: str, folder: Path) -> SAM:
    """A new optimizer, with what was saved in it."""
    optimizer = interrupted_run(net, base, lr=9.0, rho=9.0)
    model_state, optimizer_state = dcp_state.get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / base)
    dcp_state.set_state_dict(
        net, optimizer,
        model_state_dict=state["model"], optim_state_dict=state["optimizer"],
    )  # fmt: skip
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.7]
    assert {group["lr"] for group in optimizer.param_groups} == {BASES[base][1]["lr"]}
    return optimizer


def check_resuming(world: World) -> None:
    """Bit for bit on as many processes; on more, up to rounding."""
    for base in BASES:
        net = sharded(world, Net(seed=1))
        optimizer = resume(net, base, world.folder)
        train(net, optimizer, range(SAVED_AFTER, ALL_STEPS), share_of(world.rank, world.size))
        expected = torch.load(world.folder / f"{base}.pt", weights_only=True)
        tolerance = {"rtol": 0, "atol": 0} if world.size == 2 else TOLERANCE[torch.float64]
        torch.testing.assert_close(all_of(net, optimizer), expected, **tolerance)


def check_full_state_dicts(world: World) -> None:
    """From sharded to whole, and from whole to sharded."""
    for base in BASES:
        _full_state_dicts(world, base)


def _full_state_dicts(world: World, base: str) -> None:
    options = dcp_state.StateDictOptions(full_state_dict=True)
    net = sharded(world, Net())
    optimizer = interrupted_run(net, base)
    train(net, optimizer, range(2))
    model_state, optimizer_state = dcp_state.get_state_dict(net, optimizer, options=options)
    # A copy, since load_state_dict takes tensors over, such as the step counts.
    optimizer_state = copy.deepcopy(optimizer_state)
    whole = Net(seed=1)
    whole_optimizer = interrupted_run(whole, base, lr=9.0)
    dcp_state.set_state_dict(
        whole, whole_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )
    again = sharded(world, Net(seed=2))
    again_optimizer = interrupted_run(again, base, lr=9.0)
    dcp_state.set_state_dict(
        again, again_optimizer, options=options,
        model_state_dict=whole.state_dict(),
        optim_state_dict=copy.deepcopy(dcp_state.get_optimizer_state_dict(whole, whole_optimizer)),
    )  # fmt: skip
    for model, o in ((net, optimizer), (whole, whole_optimizer), (again, again_optimizer)):
        train(model, o, range(2, 4))
    assert_equal(net, optimizer, whole, whole_optimizer)
    assert_equal(again, again_optimizer, whole, whole_optimizer)


def check_what_is_refused(world: World) -> None:
    for base, name in (("AdamW", "exp_avg"), ("SGD", "momentum_buffer")):
        net, whole = sharded(world, Net()), Net()
        optimizer, whole_optimizer = interrupted_run(net, base), interrupted_run(whole, base)
        train(net, optimizer, range(1))
        train(whole, whole_optimizer, range(1))
        before = all_of(net, optimizer)
        raises(
            ValueError, f"{name} of parameter 0 is not sharded as the parameter is",
            lambda o=optimizer, w=whole_optimizer: o.load_state_dict(w.state_dict()),
        )  # fmt: skip
        torch.testing.assert_close(all_of(net, optimizer), before, rtol=0, atol=0)
    for use_orig_params in (False, True):
        flat = FullyShardedDataParallel(
            Net(), device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        raises(ValueError, "fully_shard (FSDP2)", lambda f=flat: SAM(f.parameters(), lr=0.1))
    for perturbation, group in (("local", None), ("group", dist.group.WORLD)):
        raises(
            ValueError, "params[0] of parameter group 0, a DTensor",
            lambda p=perturbation, g=group: SAM(
                net.parameters(), lr=0.1, perturbation=p, process_group=g
            ),
        )  # fmt: skip
    loss_of(net, 1).backward()
    optimizer.first_step()
    raises(
        RuntimeError, "state_dict between first_step and second_step",
        lambda: dcp_state.get_optimizer_state_dict(net, optimizer),
    )  # fmt: skip
    optimizer.restore()
    addends = DTensor.from_local(torch.ones(3), world.mesh, (Partial(),))
    raises(
        ValueError, "give parameters that are sharded", lambda: SAM([nn.Parameter(addends)], lr=1)
    )
    gaps = DTensor.from_local(torch.ones(3, 4)[:, ::2], world.mesh, (Shard(0),))
    raises(ValueError, "shard with gaps", lambda: SAM([nn.Parameter(gaps)], lr=1))
    p = nn.Parameter(distribute_tensor(torch.ones(4), world.mesh, (Shard(0),)))
    raises(ValueError, "SGDHess takes whole tensors", lambda: SGDHess([p]))
    raises(ValueError, "both must be DTensors", lambda: _shards.cut_like(p, torch.ones(4)))


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}
# What four processes do as two do, but in more time, is left to two.
ONLY_IN_TWO = {
    "trajectories_without_statistics", "clipping", "parts", "a_missing_reduction_is_noticed",
    "bit_equal_without_a_norm", "fused_kernels", "one_reduction_for_all_norms",
    "other_base_optimizers", "gradients_are_taken_over_without_a_copy", "restore",
    "one_inf_skips_the_step_everywhere", "a_gradient_that_is_missing_in_one_pass", "grad_scaler",
    "reshard_after_forward", "weights_that_stay_gathered_have_to_be_resharded",
    "gradient_accumulation", "mixed_precision", "cpu_offload", "the_recipe",
    "momentum_is_sharded_as_in_torch_sgd", "saving", "full_state_dicts", "what_is_refused",
}  # fmt: skip
ONLY_IN_FOUR = {"two_sharded_dimensions"}


def names_of_checks(size: int) -> list[str]:
    left_out = ONLY_IN_FOUR if size == 2 else ONLY_IN_TWO
    return [name for name in CHECKS if name not in left_out]


def main(rank: int, size: int, folder: Path) -> None:
    """Writes what became of each check, and stops at the first that failed: the processes would not
    meet in the collectives of the next."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / f'store-{size}'}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    world = World(rank, size, init_device_mesh("cpu", (size,)), folder)
    outcomes: dict[str, str] = {}
    for name in names_of_checks(size):
        try:
            CHECKS[name](world)
            outcomes[name] = "passed"
        except Exception:
            outcomes[name] = f"process {rank}: {traceback.format_exc()}"
        (folder / f"{size}-{rank}.json").write_text(json.dumps(outcomes))
        if outcomes[name] != "passed":
            raise SystemExit(1)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
