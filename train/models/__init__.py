"""Networks by name. A new one is a function here and, where needed, a file beside resnet.py."""

from collections.abc import Callable

from torch import nn

from train.models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152, resnet_small
from train.models.wide_resnet import wrn28_10

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "wrn28_10": wrn28_10,
    "resnet_small": resnet_small,
}


def build_model(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """The network `name` for images with `in_channels` channels; weights from torch's RNG."""
    return MODELS[name](in_channels, num_classes)
