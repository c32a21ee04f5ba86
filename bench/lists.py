"""List the parameters that are benchmarked: those of real networks, and a thousand tiny tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from train.models.resnet import resnet18

Shapes = list[torch.Size]


def resnet18_shapes() -> Shapes:
    """The CIFAR ResNet-18 with 100 classes: 62 tensors, 11.2 M elements."""
    return [p.shape for p in resnet18((3, 32, 32), num_classes=100).parameters()]


def wrn_28_10_shapes() -> Shapes:
    """WideResNet-28-10 with 100 classes: 36.5 M elements."""
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3)]
    channels = 16
    for width in (160, 320, 640):
        for _ in range(4):
            shapes += [(channels,)] * 2 + [(width, channels, 3, 3)]
            shapes += [(width,)] * 2 + [(width, width, 3, 3)]
            if channels != width:
                shapes += [(width, channels, 1, 1)]
            channels = width
    shapes += [(channels,)] * 2 + [(100, channels), (100,)]
    return [torch.Size(shape) for shape in shapes]


def vit_shapes(layers: int, dim: int) -> Shapes:
    """A vision transformer for patches of 16 and 1000 classes."""
    shapes: list[tuple[int, ...]] = [(1, 1, dim), (1, 197, dim), (dim, 3, 16, 16), (dim,)]
    for _ in range(layers):
        shapes += [(dim,)] * 2 + [(3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
        shapes += [(dim,)] * 2 + [(4 * dim, dim), (4 * dim,), (dim, 4 * dim), (dim,)]
    shapes += [(dim,)] * 2 + [(1000, dim), (1000,)]
    return [torch.Size(shape) for shape in shapes]


def vit_base_shapes() -> Shapes:
    """ViT-B/16: 86.6 M elements."""
    return vit_shapes(layers=12, dim=768)


def vit_large_shapes() -> Shapes:
    """ViT-L/16: 304 M elements."""
    return vit_shapes(layers=24, dim=1024)


def tiny_shapes() -> Shapes:
    """A thousand tensors of 1 to 64 elements: what counts is the cost per tensor."""
    return [torch.Size((1 + i % 64,)) for i in range(1000)]


def equal_shapes(tensors: int, numel: int) -> Shapes:
    """About `numel` elements, in tensors of one size."""
    return [torch.Size((max(1, numel // tensors),))] * tensors


LISTS: dict[str, Callable[[], Shapes]] = {
    "ResNet-18": resnet18_shapes,
    "WRN-28-10": wrn_28_10_shapes,
    "ViT-B": vit_base_shapes,
    "1000 tiny tensors": tiny_shapes,
}


def numel_of(shapes: Sequence[torch.Size]) -> int:
    return sum(shape.numel() for shape in shapes)
