"""ResNets for small images: a 3x3 stem with stride 1 and no max-pool.

Source: He et al., arXiv:1512.03385, in the form customary for CIFAR. The initialisation is
torch's default.
"""

from collections.abc import Sequence

from torch import Tensor, nn


def _conv_bn(channels_in: int, channels_out: int, size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first convolution and the shortcut stride."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_bn(channels_in, width, 3, stride)
        self.second = _conv_bn(width, width, 3)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != width:
            self.shortcut = _conv_bn(channels_in, width, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of blocks; every stage but the first halves the image.

    Args:
        block: the residual block; its output has `width * block.expansion` channels.
        depths: blocks per stage.
        widths: channels per stage; the stem has the first of them.
    """

    def __init__(
        self,
        block: type[BasicBlock],
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
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.head(self.features(x).mean(dim=(2, 3)))


def resnet18(in_channels: int, num_classes: int) -> ResNet:
    """The CIFAR ResNet-18: 11,220,132 parameters with 3 channels and 100 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), in_channels, num_classes)


def resnet_small(in_channels: int, num_classes: int) -> ResNet:
    """Four blocks in two stages: about 43,000 parameters, for 8x8 digits on a CPU."""
    return ResNet(BasicBlock, (2, 2), (16, 32), in_channels, num_classes)
