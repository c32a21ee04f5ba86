"""Multiply vectors by the Hessian of the mean cross-entropy."""

import math
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
MEMORY_SHARE = 0.6  # the graphs of gradients may take this share of the free memory


class Hessian:
    """The Hessian H over all images of the batches, for vectors over all trained parameters.

    H v is the gradient of (gradient . v). The gradient is computed once, and its graph kept, where
    memory holds it; otherwise it is computed anew for each product, for as many images at a time as
    memory holds.

    Args:
        model: the network in eval mode, so that images do not depend on each other.
        batches: the images and labels.
        memory: the bytes for graphs; None: MEMORY_SHARE of the free memory.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], memory: int | None = None
    ) -> None:
        self._model = model
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._batches = list(batches)
        self._count = sum(len(labels) for _, labels in self._batches)
        size = sum(p.numel() for p in self._params)
        self.shape, self.device = (size, size), self._params[0].device
        self.dtype = self._params[0].dtype
        memory = int(MEMORY_SHARE * free_memory(self.device)) if memory is None else memory
        fitting = max(1, memory // self._bytes_per_image())
        self._graphs: list[list[Tensor]] | None = None
        if self._count <= fitting:
            self._graphs = [self._gradient(*batch) for batch in self._batches]
        else:
            self._batches = [
                part
                for images, labels in self._batches
                for part in zip(images.split(fitting), labels.split(fitting), strict=True)
            ]

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return H v for a vector (N,), or H times each column of a matrix (N, K)."""
        if vectors.ndim == 2:
            return torch.stack([self @ column for column in vectors.T], dim=1)
        sizes = [p.numel() for p in self._params]
        parts = [v.view_as(p) for v, p in zip(vectors.split(sizes), self._params, strict=True)]
        total = torch.zeros_like(vectors)
        graphs = self._graphs or (self._gradient(*batch) for batch in self._batches)
        for gradient in graphs:
            # A gradient that no parameter changes has no graph, and no second derivatives.
            pairs = [(g, v) for g, v in zip(gradient, parts, strict=True) if g.requires_grad]
            if not pairs:
                continue
            products = torch.autograd.grad(
                [g for g, _ in pairs],
                self._params,
                [v for _, v in pairs],
                retain_graph=self._graphs is not None,
                materialize_grads=True,
            )
            total += torch.cat([p.reshape(-1) for p in products])
        return total

    def _gradient(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(self._model(images), labels, reduction="sum") / self._count
        return list(
            torch.autograd.grad(loss, self._params, create_graph=True, materialize_grads=True)
        )

    def _bytes_per_image(self) -> int:
        """Return the bytes by which the graph of a gradient grows with an image."""
        return max(1, self._bytes(2) - self._bytes(1))

    def _bytes(self, count: int) -> int:
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            return tensor

        images, labels = self._batches[0]
        images, labels = (part[:1].repeat_interleave(count, 0) for part in (images, labels))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = self._gradient(images, labels)
        del held  # the gradients go only now: an address is used again once its memory is free
        return sum(found.values())


def free_memory(device: torch.device) -> float:
    """Return the free bytes of the device; inf where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, AttributeError):
        return math.inf
