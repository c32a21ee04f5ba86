"""Define ResNets for small images: a 3x3 stem with stride 1 and no max-pool.

Source: He et al., arXiv:1512.03385, in the form customary for CIFAR. The initialisation is
torch's default.
"""

from collections.abc import Sequence

from torch import Tensor, nn


def _conv_bn(channels_in: int, channels_out: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    if stride == 1 and channels_in == channels_out:
        return nn.Identity()
    return _conv_bn(channels_in, channels_out, 1, stride)


class BasicBlock(nn.Module):
    """Has two 3x3 convolutions and a shortcut; the first and the shortcut have the stride."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_bn(channels_in, width, 3, stride)
        self.second = _conv_bn(width, width, 3)
        self.shortcut = _shortcut(channels_in, width, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))) + self.shortcut(x))


class Bottleneck(nn.Module):
    """Has convolutions of 1x1, 3x3 (with the stride) and 1x1, the last four times as wide."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_bn(channels_in, width, 1)
        self.second = _conv_bn(width, width, 3, stride)
        self.third = _conv_bn(width, width * self.expansion, 1)
        self.shortcut = _shortcut(channels_in, width * self.expansion, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.second(self.relu(self.first(x))))
        return self.relu(self.third(out) + self.shortcut(x))


class ResNet(nn.Module):
    """Has stages of blocks; every stage but the first halves the image.

    Args:
        block: the residual block; its output has `width * block.expansion` channels.
        depths: the number of blocks of each stage.
        widths: the width of each stage; the stem has the channels of the first.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        channels = widths[0]
        layers: list[nn.Module] = [_conv_bn(in_channels, channels, 3), nn.ReLU()]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for index in range(depth):
                layers.append(block(channels, width, 2 if stage > 0 and index == 0 else 1))
                channels = width * block.expansion
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.head(self.features(x).mean(dim=(2, 3)))


WIDTHS = (64, 128, 256, 512)


def resnet18(shape: Sequence[int], num_classes: int) -> ResNet:
    """Make the CIFAR ResNet-18: 11,220,132 parameters with 3 channels and 100 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), WIDTHS, shape[0], num_classes)


def resnet34(shape: Sequence[int], num_classes: int) -> ResNet:
    """Make the CIFAR ResNet-34: 21,328,292 parameters with 3 channels and 100 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), WIDTHS, shape[0], num_classes)


def resnet50(shape: Sequence[int], num_classes: int) -> ResNet:
    """Make the CIFAR ResNet-50: 23,705,252 parameters with 3 channels and 100 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), WIDTHS, shape[0], num_classes)


def resnet101(shape: Sequence[int], num_classes: int) -> ResNet:
    """Make the CIFAR ResNet-101: 42,697,380 parameters with 3 channels and 100 classes."""
    return ResNet(Bottleneck, (3, 4, 23, 3), WIDTHS, shape[0], num_classes)


def resnet152(shape: Sequence[int], num_classes: int) -> ResNet:
    """Make the CIFAR ResNet-152: 58,341,028 parameters with 3 channels and 100 classes."""
    return ResNet(Bottleneck, (3, 8, 36, 3), WIDTHS, shape[0], num_classes)


def resnet_small(shape: Sequence[int], num_classes: int) -> ResNet:
    """Make four blocks in two stages: about 43,000 parameters, for 8x8 digits on a CPU."""
    return ResNet(BasicBlock, (2, 2), (16, 32), shape[0], num_classes)
