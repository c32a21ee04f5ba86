"""Decide which ranks of data parallel training perturb alike, and let them exchange g1."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samkernels import checks, ops

PERTURBATIONS = ("global", "local", "group")


@dataclass
class Exchange:
    """Holds what the second step needs of all ranks' g1, on its way while the second pass runs."""

    ascent_square: Tensor  # sum of the ranks' squares: its root is not finite if one is not
    first_grads: dict[Tensor, Tensor]  # from parameters to the means of g1, if somebody reads g1
    works: list[Any] = field(default_factory=list)

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works.clear()


class Ranks:
    """Says how the ranks of DistributedDataParallel perturb; see SAM.first_pass."""

    def __init__(self, perturbation: str, process_group: Any) -> None:
        checks.check_choice("perturbation", perturbation, PERTURBATIONS)
        if (process_group is not None) != (perturbation == "group"):
            raise ValueError(
                f'process_group={process_group} with perturbation="{perturbation}": give '
                'perturbation="group" and the group of ranks that perturb alike, or neither'
            )
        if process_group is not None and dist.get_rank(process_group) < 0:
            raise ValueError(
                "process_group: this rank is not in it; give every rank the group that it is in "
                "(torch.distributed.new_subgroups returns it first)"
            )
        self.perturbation = perturbation
        self.process_group = process_group
        self._all_ranks: Any = None  # the group that averages g2, from first_pass to first_step

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return Ranks(self.perturbation, self.process_group)  # nobody can copy a group

    @property
    def differ(self) -> bool:
        """Say whether ranks may be at different weights in the second pass."""
        if self.perturbation == "global" or not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size() > 1

    def check_shards(self, name: str) -> None:
        """Raise ValueError if DTensors, such as the parameter of this name, cannot be served."""
        if self.perturbation != "global":
            raise ValueError(
                f'perturbation="{self.perturbation}" with {name}, a DTensor: the processes '
                "share one copy of the weights and cannot be at different ones. Leave perturbation "
                "out; parts() is m-sharpness that needs no copies"
            )

    @contextlib.contextmanager
    def first_pass(self, model: nn.Module) -> Iterator[None]:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}: give a torch.nn.Module")
        if not self.differ:
            yield
            return
        # It may lie inside of what torch.compile made, or of a module of several.
        parallel = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        if not parallel:
            raise TypeError(
                f"model is {type(model).__name__} without a DistributedDataParallel inside: "
                f'perturbation="{self.perturbation}" needs the module that averages the gradients'
            )
        with contextlib.ExitStack() as stack:
            for module in parallel:
                if module.static_graph and not module._static_graph_delay_allreduce_enqueued:
                    raise RuntimeError(
                        "DistributedDataParallel(static_graph=True) has to average the gradients "
                        "of its very first backward: call loss.backward() and zero_grad() once "
                        "before training, or leave static_graph out"
                    )
                stack.enter_context(module.no_sync())
            yield
            # In its forward the module decides, and says so, whether its backward averages.
            if all(module.require_forward_param_sync for module in parallel):
                raise RuntimeError(
                    "the forward pass was made outside of first_pass(model), so backward has "
                    "averaged the gradients: make forward and backward inside. No step was made."
                )
        self._all_ranks = parallel[0].process_group

    def begin_step(self, param_groups: list[dict[str, Any]], needs_second_pass: bool) -> Any:
        """Average `.grad` within the group, if that was asked for.

        Returns:
            the group of all ranks; None if no rank differs from the others.

        Raises:
            RuntimeError: g1 was averaged in a step that perturbs by rank, or was not in another.
        """
        if not needs_second_pass and self._all_ranks is not None:
            self._all_ranks = None
            raise RuntimeError(
                "first_pass() in a step that has no second pass, whose gradient all ranks share: "
                "make an ordinary pass where needs_second_pass is False. No step was made."
            )
        if not (needs_second_pass and self.differ):
            return None
        all_ranks, self._all_ranks = self._all_ranks, None
        if all_ranks is None:
            raise RuntimeError(
                f'perturbation="{self.perturbation}": make the first forward and backward pass in '
                "`with optimizer.first_pass(model):`, or they average the gradients over all "
                "ranks; step(closure) then takes the gradients that it finds for g1"
            )
        if self.perturbation == "group":
            params = [p for group in param_groups for p in group["params"]]
            means, works = _start_mean(params, self.process_group)
            for work in works:
                work.wait()
            for p, mean in means.items():
                if p.grad is None or p.grad.dtype is mean.dtype:
                    p.grad = mean
                else:
                    p.grad.copy_(mean)
        return all_ranks


def start_exchange(
    params: Sequence[Tensor], ascent_square: Tensor | None, all_ranks: Any
) -> Exchange:
    """Begin to average the `.grad` of params, which may be changed afterwards."""
    assert ascent_square is not None
    total = ascent_square.clone()
    first_grads, works = _start_mean(params, all_ranks)
    works.append(dist.all_reduce(total, group=all_ranks, async_op=True))
    return Exchange(total, first_grads, works)


def _start_mean(params: Sequence[Tensor], group: Any) -> tuple[dict[Tensor, Tensor], list[Any]]:
    """Begin to average each parameter's gradient over the ranks; one that is missing counts as 0:
    every rank has to send the same amount, and does not know whether others have the gradient."""
    trained = [p for p in params if p.requires_grad]
    grads = [p.grad for p in trained]
    # Division comes first, as in DistributedDataParallel: a sum of float16 might overflow.
    blocks, means = ops.pack(grads, trained, divisor=dist.get_world_size(group))
    works = [dist.all_reduce(block, group=group, async_op=True) for block in blocks]
    return dict(zip(trained, means, strict=True)), works
