"""Find of DTensors, as fully_shard (FSDP2) makes them of parameters, the part in this process, and
the process groups that hold the rest. Whatever is no DTensor is a whole by itself.

Nothing here imports torch.distributed.tensor: where nobody else did, there are no DTensors.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

_WHOLE = frozenset((Tensor, nn.Parameter))  # types compared first: a step looks at every tensor


def _dtensor() -> Any:
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(tensor: Tensor) -> bool:
    cls = _dtensor()
    return cls is not None and isinstance(tensor, cls)


def check(name: str, p: Tensor) -> None:
    """Raise ValueError if p is a shard that looks like a whole tensor: norms would be wrong."""
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} belongs to FullyShardedDataParallel (FSDP1), whose shards cannot be told from "
            "whole tensors: shard the model with torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def local(tensor: Tensor) -> Tensor:
    """Return the part that lies here, without a copy."""
    # to_local() of a parameter would make a new view each time, and an autograd node.
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def locals_of(tensors: list[Tensor]) -> list[Tensor]:
    return tensors if _WHOLE.issuperset(map(type, tensors)) else [local(t) for t in tensors]


def process_groups(tensor: Any) -> tuple[Any, ...]:
    """Return the groups that sums over all elements go over in turn: one for every dimension of the
    device mesh along which the tensor is cut, none for those along which it is replicated.

    Raises:
        ValueError: the processes hold addends of the tensor (a Partial placement).
    """
    if not is_dtensor(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} has placements {placements}: give "
            "parameters that are sharded or replicated"
        )
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def are_cut_alike(tensor: Any, p: Any) -> bool:
    """Say whether both are whole, or have their parts in the same places."""
    if not (is_dtensor(tensor) and is_dtensor(p)):
        return is_dtensor(tensor) == is_dtensor(p)
    return tensor.placements == p.placements and tensor.device_mesh == p.device_mesh


def local_pairs(
    params: list[Tensor], grads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return what lies here of both; None if a gradient is cut unlike its parameter."""
    if _WHOLE.issuperset(map(type, params)) and _WHOLE.issuperset(map(type, grads)):
        return params, grads
    if not all(map(are_cut_alike, grads, params)):
        return None
    return locals_of(params), locals_of(grads)


def cut_like(p: Any, grad: Any) -> Tensor:
    """Return the gradient with its parts where the parameter has them.

    Raises:
        ValueError: only one of the two is a DTensor, or they are on different meshes.
    """
    if are_cut_alike(grad, p):
        return grad
    if is_dtensor(grad) and is_dtensor(p) and grad.device_mesh == p.device_mesh:
        return grad.redistribute(p.device_mesh, p.placements)
    raise ValueError(
        f"a parameter of shape {tuple(p.shape)} is {type(p).__name__} and its gradient is "
        f"{type(grad).__name__}: both must be DTensors on one device mesh, or neither"
    )


def as_part_of(p: Any, part: Tensor) -> Tensor:
    """Return what p is, with `part` in the place of p's own: a DTensor or the part itself."""
    if not is_dtensor(p):
        return part
    return _dtensor().from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
