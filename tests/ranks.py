"""What each process of tests/test_optim_ranks.py does: `python -m tests.ranks RANK WORLD FOLDER`.

Every case is run by all processes, and what it returns goes to FOLDER/RANK.pt; the test compares.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from samkernels import SAM, SAMDirection, SAMMagnitude, frozen_batchnorm_stats
from tests.by_hand import RHO, SGD, STEPS, share
from tests.optim_helpers import ConvNet, images, linear, snapshot
from tests.optimizers import ALL_VARIANTS

VARIANTS = {str(v): (v.info.cls, v.options) for v in ALL_VARIANTS}
PERTURBATIONS = ("global", "local", "group")


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": params[:1], "rho": 0.3, "granularity": "global"},
        {"params": params[1:], "granularity": "tensor", "lr": 0.1},
    ]


class Branches(nn.Module):
    """In the first pass of step s a rank uses branch s, in the second both; `always` in each."""

    def __init__(self) -> None:
        super().__init__()
        self.always = linear(torch.float64)
        self.branches = nn.ModuleList(linear(torch.float64, seed=i) for i in (1, 2))

    def forward(self, x: Tensor, used: Iterable[int]) -> Tensor:
        return self.always(x) + sum(self.branches[i](x) for i in used)


class LateWork:
    """dist.all_reduce whose result is not there before wait()."""

    def __init__(self, tensor: Tensor, **options: Any) -> None:
        self.tensor, self.result = tensor, tensor.clone()
        self.work = dist.distributed_c10d.all_reduce(self.result, **options)

    def wait(self) -> None:
        self.work.wait()
        self.tensor.copy_(self.result)


class Rank:
    """One process among `world`, and the steps that it makes."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.pair, _ = dist.new_subgroups(2)

    def options(self, perturbation: str) -> dict[str, Any]:
        group = {"process_group": self.pair} if perturbation == "group" else {}
        return {"perturbation": perturbation, **group}

    def train(
        self,
        variant: str,
        perturbation: str,
        base: type[torch.optim.Optimizer] = torch.optim.SGD,
        base_options: dict[str, Any] = SGD,
        dtype: torch.dtype = torch.float64,
        parallel: dict[str, Any] | None = None,
        groups: Callable[[nn.Module], Any] = nn.Module.parameters,
        parts: int = 1,
        first_scale: Callable[[int, int], float] = lambda step, rank: 1.0,
        prime: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """Steps of a tiny network: the weights at which the second passes were made, and those
        after each step.

        Args:
            parallel: options of DistributedDataParallel.
            parts: of each rank's share, for optimizer.parts.
            first_scale: of step and rank: factor of the first loss.
            prime: make a backward pass before training.
        """
        model = linear(dtype)
        network = DistributedDataParallel(model, **parallel or {})
        cls, of_variant = VARIANTS[variant]
        optimizer = cls(
            groups(model), base, RHO, **of_variant, **self.options(perturbation), **base_options,
            **options,
        )  # fmt: skip
        if prime:
            network(share(0, 0, dtype)[0]).sum().backward()
            optimizer.zero_grad()
        perturbed, weights, statistics = [], [], []
        for step in range(STEPS):
            numbers = range(self.rank * parts, (self.rank + 1) * parts)
            for number in optimizer.parts(numbers):
                x, y = share(step, number, dtype)
                with optimizer.first_pass(network):
                    loss = cross_entropy(network(x), y)
                    (first_scale(step, self.rank) * loss).backward()
                optimizer.first_step()
                perturbed.append(snapshot(model.parameters()))
                cross_entropy(network(x), y).backward()
            optimizer.second_step(zero_grad=True)
            weights.append(snapshot(model.parameters()))
            if optimizer.statistics:
                statistics.append(torch.stack(list(optimizer.statistics)))
        return {"perturbed": perturbed, "weights": weights, "statistics": statistics}

    def trajectory(self, variant: str, perturbation: str) -> Any:
        return self.train(variant, perturbation)

    # -- special cases, in two processes -----------------------------------------------------------

    def native(self, variant: str) -> Any:
        return self.train(variant, "local", dtype=torch.float32, backend="native")

    def bfloat16(self) -> Any:
        return self.train("SAMDirection-tensor", "local", dtype=torch.bfloat16)

    def adam(self) -> Any:
        return self.train("SAMMagnitude-element", "local", torch.optim.Adam, {"lr": 0.01})

    def adaptive_groups(self) -> Any:
        return self.train("SAMDirection-element", "local", groups=two_groups, adaptive=True)

    def clipped(self) -> Any:
        return self.train("SAMDirection-element", "local", max_grad_norm=0.1)

    def with_statistics(self) -> Any:
        return self.train("SAM", "local", track_statistics=True)

    def parts_of_ranks(self, variant: str) -> Any:
        return self.train(variant, "local", parts=2)

    def parallel_options(self, perturbation: str, **parallel: Any) -> Any:
        prime = "static_graph" in parallel
        return self.train("SAMMagnitude-tensor", perturbation, parallel=parallel, prime=prime)

    def overflow(self, variant: str, perturbation: str) -> Any:
        """The first gradient of the last rank overflows in the second step."""
        return self.train(
            variant,
            perturbation,
            first_scale=lambda step, rank: torch.inf if (step, rank) == (1, 1) else 1.0,
        )

    def late(self, perturbation: str) -> Any:
        """What the optimizer asks of other ranks arrives when it waits for it, and not before."""
        with mock.patch.object(dist, "all_reduce", LateWork):
            return self.train("SAMDirection-global", perturbation)

    def trap(self) -> Any:
        """Only the backward pass in no_sync: averages all the same."""
        model = linear(torch.float64)
        network = DistributedDataParallel(model)
        optimizer = SAM(model.parameters(), torch.optim.SGD, RHO, **SGD)
        for step in range(STEPS):
            x, y = share(step, self.rank)
            loss = cross_entropy(network(x), y)
            with network.no_sync():
                loss.backward()
            optimizer.first_step()
            cross_entropy(network(x), y).backward()
            optimizer.second_step(zero_grad=True)
        return snapshot(model.parameters())

    def unused(self, variant: str, perturbation: str) -> Any:
        """Ranks use different branches in the first pass."""
        model = Branches()
        network = DistributedDataParallel(model, find_unused_parameters=True)
        cls, of_variant = VARIANTS[variant]
        options = self.options(perturbation)
        optimizer = cls(model.parameters(), rho=RHO, **of_variant, **options, **SGD)
        weights, perturbed = [], []
        for step in range(STEPS):
            x, y = share(step, self.rank)
            with optimizer.first_pass(network):
                cross_entropy(network(x, [(step + self.rank) % 2]), y).backward()
            optimizer.first_step()
            perturbed.append(snapshot(model.parameters()))
            cross_entropy(network(x, [0, 1]), y).backward()
            optimizer.second_step(zero_grad=True)
            weights.append(snapshot(model.parameters()))
        return {"perturbed": perturbed, "weights": weights, "statistics": []}

    def batchnorm(self) -> Any:
        """Buffers are broadcast before the first pass, and belong to it alone."""
        model = ConvNet().double()
        network = DistributedDataParallel(model)
        optimizer = SAM(model.parameters(), rho=RHO, **self.options("local"), **SGD)
        for step in range(STEPS):
            x, y = images(10 * step + self.rank)
            with optimizer.first_pass(network):
                cross_entropy(network(x.double()), y).backward()
            optimizer.first_step()
            with frozen_batchnorm_stats(network):
                cross_entropy(network(x.double()), y).backward()
            optimizer.second_step(zero_grad=True)
        return {"weights": snapshot(model.parameters()), "buffers": snapshot(model.buffers())}

    def accumulation(self) -> Any:
        """A share as two micro-batches in each pass."""
        model = linear(torch.float64)
        network = DistributedDataParallel(model)
        optimizer = SAMDirection(model.parameters(), rho=RHO, **self.options("local"), **SGD)
        for step in range(STEPS):
            micro_batches = [share(step, 2 * self.rank + i) for i in range(2)]
            for x, y in micro_batches:
                with optimizer.first_pass(network):
                    (cross_entropy(network(x), y) / 2).backward()
            optimizer.first_step()
            for i, (x, y) in enumerate(micro_batches):
                waits: AbstractContextManager[Any] = network.no_sync() if i == 0 else nullcontext()
                with waits:
                    (cross_entropy(network(x), y) / 2).backward()
            optimizer.second_step(zero_grad=True)
        return snapshot(model.parameters())

    def closure(self) -> Any:
        model = linear(torch.float64)
        network = DistributedDataParallel(model)
        optimizer = SAM(model.parameters(), rho=RHO, **self.options("local"), **SGD)
        for step in range(STEPS):
            x, y = share(step, self.rank)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = cross_entropy(network(x), y)
                loss.backward()
                return loss

            with optimizer.first_pass(network):
                closure()
            optimizer.step(closure)
        return snapshot(model.parameters())

    def scaler(self, passes: Sequence[str]) -> Any:
        """The loss of one rank overflows in the second step, in these passes."""
        model = linear()
        network = DistributedDataParallel(model)
        optimizer = SAMMagnitude(model.parameters(), rho=RHO, **self.options("local"), **SGD)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        weights, scales = [], []
        for step in range(STEPS):
            x, y = share(step, self.rank, torch.float32)
            factors = [
                1e38 if (step, self.rank) == (1, 1) and name in passes else 1.0
                for name in ("first", "second")
            ]
            with optimizer.first_pass(network):
                scaler.scale(factors[0] * cross_entropy(network(x), y)).backward()
            optimizer.first_step()
            scaler.scale(factors[1] * cross_entropy(network(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            weights.append(snapshot(model.parameters()))
            scales.append(scaler.get_scale())
        return weights, scales

    def interrupted(self) -> Any:
        """Restored between the steps, while g1 is on its way; then steps as if it had not been."""
        model = linear(torch.float64)
        network = DistributedDataParallel(model)
        optimizer = SAMDirection(model.parameters(), rho=RHO, **self.options("local"), **SGD)
        before = snapshot(model.parameters())
        with optimizer.first_pass(network):
            cross_entropy(network(share(5, self.rank)[0]), share(5, self.rank)[1]).backward()
        optimizer.first_step()
        messages = [message_of(optimizer.state_dict)]
        optimizer.restore()
        restored = snapshot(model.parameters())
        for step in range(STEPS):
            x, y = share(step, self.rank)
            with optimizer.first_pass(network):
                cross_entropy(network(x), y).backward()
            optimizer.first_step()
            cross_entropy(network(x), y).backward()
            optimizer.second_step(zero_grad=True)
        return {
            "before": before,
            "restored": restored,
            "weights": snapshot(model.parameters()),
            "messages": messages,
        }

    def copies(self) -> Any:
        """Copies of an optimizer go on perturbing as it does."""
        found = []
        for perturbation in PERTURBATIONS:
            model = linear(torch.float64)
            optimizer = SAM(model.parameters(), rho=RHO, lr=0.1, **self.options(perturbation))
            ours = copy.deepcopy(optimizer)._ranks
            found.append((ours.perturbation, ours.process_group is optimizer._ranks.process_group))
        return found

    def misuse(self) -> dict[str, str]:
        model = linear(torch.float64)
        network = DistributedDataParallel(model)
        x, y = share(0, self.rank)
        messages = {}
        for name, perturbation in (("local", "local"), ("group", "group")):
            optimizer = SAM(model.parameters(), rho=RHO, lr=0.1, **self.options(perturbation))
            before = snapshot(model.parameters())
            cross_entropy(network(x), y).backward()
            messages[f"{name}, no first_pass"] = message_of(optimizer.first_step)
            optimizer.zero_grad()

            loss = cross_entropy(network(x), y)

            def outside(optimizer: SAM = optimizer, loss: Tensor = loss) -> None:
                with optimizer.first_pass(network):
                    loss.backward()

            messages[f"{name}, forward outside"] = message_of(outside)
            messages[f"{name}, and then"] = message_of(optimizer.first_step)
            optimizer.zero_grad()

            def closure() -> Tensor:
                loss = cross_entropy(network(x), y)
                loss.backward()
                return loss

            messages[f"{name}, closure"] = message_of(optimizer.step, closure)
            messages[f"{name}, plain"] = message_of(optimizer.first_pass(model).__enter__)
            assert all(map(torch.equal, before, model.parameters()))
            assert not optimizer.is_perturbed
        static = DistributedDataParallel(linear(torch.float64), static_graph=True)
        optimizer = SAM(static.parameters(), rho=RHO, lr=0.1, perturbation="local")
        messages["static_graph"] = message_of(optimizer.first_pass(static).__enter__)
        pairs = [dist.new_group([rank]) for rank in range(self.world)]
        other = pairs[1 - self.rank]
        messages["not in the group"] = message_of(
            lambda: SAM(model.parameters(), lr=0.1, perturbation="group", process_group=other)
        )
        return messages


def message_of(function: Callable[..., Any], *args: Any) -> str:
    """ "RuntimeError: what it says"; "" if nothing is raised."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


SPECIAL: dict[str, Callable[[Rank], Any]] = {
    **{f"native {v}": lambda r, v=v: r.native(v) for v in VARIANTS},
    "bfloat16": Rank.bfloat16,
    "adam": Rank.adam,
    "adaptive groups": Rank.adaptive_groups,
    "clipped": Rank.clipped,
    "statistics": Rank.with_statistics,
    **{
        f"parts {v}": lambda r, v=v: r.parts_of_ranks(v)
        for v in ("SAM", "SAMDirection-global", "SAMMagnitude-element")
    },
    **{
        f"{perturbation} {option}": lambda r, p=perturbation, o=option: r.parallel_options(
            p, **{o: True}
        )
        for perturbation in PERTURBATIONS
        for option in ("gradient_as_bucket_view", "static_graph", "find_unused_parameters")
    },
    **{
        f"overflow {v} {p}": lambda r, v=v, p=p: r.overflow(v, p)
        for v, p in itertools.product(("SAM", "SAMDirection-element"), ("local", "group"))
    },
    **{f"late {p}": lambda r, p=p: r.late(p) for p in ("local", "group")},
    "trap": Rank.trap,
    **{
        f"unused {v} {p}": lambda r, v=v, p=p: r.unused(v, p)
        for v, p in itertools.product(VARIANTS, ("local", "group"))
    },
    "batchnorm": Rank.batchnorm,
    "accumulation": Rank.accumulation,
    "closure": Rank.closure,
    **{
        f"scaler {' '.join(passes)}": lambda r, passes=passes: r.scaler(passes)
        for passes in (("first", "second"), ("first",), ("second",))
    },
    "interrupted": Rank.interrupted,
    "copies": Rank.copies,
    "misuse": Rank.misuse,
}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    this = Rank(rank, world)
    results: dict[str, Any] = {
        f"{variant} {perturbation}": this.trajectory(variant, perturbation)
        for variant, perturbation in itertools.product(VARIANTS, PERTURBATIONS)
    }
    if world == 2:
        results |= {name: case(this) for name, case in SPECIAL.items()}
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()  # or the last one finds the store gone
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
