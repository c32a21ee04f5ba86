"""Define a multilayer perceptron: cheap enough for many seeds, and easily larger than its data."""

import itertools
from collections.abc import Sequence
from math import prod

from torch import nn

HIDDEN = (512, 512)


def mlp(shape: Sequence[int], num_classes: int) -> nn.Sequential:
    """Make linear layers with ReLU between them, without normalisation: 669,706 parameters with
    28x28 pixels and 10 classes (784-512-512-10)."""
    sizes = [prod(shape), *HIDDEN]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))
