"""Train data parallel over the processes that torchrun starts; without it, in one process.

Each process gets its share of every batch and of every split that is evaluated. Batch norm uses
the statistics of the whole batch, and the gradients are averaged, so that the number of processes
changes nothing but the rounding. Rank 0 writes.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.shared.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def writes(self) -> bool:
        """Return whether this process writes files and shows progress."""
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def mean_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.world

    def wait(self) -> None:
        """Wait for all other processes."""
        if self.world > 1:
            dist.barrier()


ALONE = Processes()


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Processes]:
    """Join the processes of torchrun, if there are several, by gloo on CPUs and NCCL on GPUs.

    Args:
        device: the device of the configuration; each process takes the GPU of its LOCAL_RANK.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@functools.lru_cache
def own_group(size: int) -> Any:
    """Return the group of `size` processes with neighbouring ranks to which this process belongs.

    Raises:
        ConfigError: the processes do not divide into such groups, or torchrun started none.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % size:
        raise ConfigError(
            f"perturbation_group={size} does not divide {world} processes: allowed are "
            f"{', '.join(str(n) for n in range(1, world + 1) if world % n == 0)}"
        )
    if not dist.is_initialized():
        raise ConfigError(
            "perturbation=group is for several processes: start them with torchrun; allowed here "
            "global"
        )
    return dist.new_subgroups(size)[0]


class _SumOfProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes; every process's loss depends on every summand.

    (torch.distributed.nn.functional has such a sum, but is deprecated, for a private module.)
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes; torch's SyncBatchNorm is for GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise as BatchNorm2d does on all images together."""
        if not self.training:
            return super().forward(x)
        count = torch.tensor([float(x.numel() // x.shape[1])])
        sums = torch.cat([x.sum(dim=(0, 2, 3)), count])
        total = _SumOfProcesses.apply(sums)
        n, mean = total[-1], total[:-1] / total[-1]
        # The squares are around the mean: the difference of two sums of squares would lose digits.
        centred = x - mean[:, None, None]
        variance = _SumOfProcesses.apply(centred.square().sum(dim=(0, 2, 3))) / n
        if self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                assert self.running_var is not None and self.num_batches_tracked is not None
                momentum = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (n / (n - 1)), momentum)
                self.num_batches_tracked += 1
        scale = self.weight / (variance + self.eps).sqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with batch norm over all processes, and the same parameters and names.

    Raises:
        ConfigError: batch norm of this kind cannot be synchronised on a CPU.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"the model has a {type(module).__name__}, and on CPUs only BatchNorm2d itself is "
                "synchronised over processes: train in one process, or on GPUs, or with "
                "perturbation=local"
            )
    return model


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model as a module whose backward averages the gradients."""
    # Batch norm's statistics agree, or are averaged after the epoch: no pass need broadcast them.
    # The warning is about speed, where the gradients of 1x1 convolutions have other strides for the
    # same layout.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    devices = [torch.cuda.current_device()] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def mean_loss(
    logits: Tensor, labels: Tensor, batch: int, world: int, smoothing: float = 0.0
) -> Tensor:
    """Return a process's part of a batch's mean cross-entropy, which is the mean of all parts.

    Args:
        batch: the number of images of the batch in all processes together.
        smoothing: the share of each label that is spread evenly over all classes.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    # The shares of the processes may differ by one image.
    return loss if world == 1 else loss * (len(labels) * world / batch)
