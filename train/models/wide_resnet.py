"""Define the WideResNet: residual blocks with the activation before the convolution.

Source: Zagoruyko and Komodakis, arXiv:1605.07146, without dropout. Weights are drawn as there:
normal with deviation sqrt(2 / fan_in), those of batch normalisation uniform in [0, 1).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(channels_in: int, channels_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)


class WideBlock(nn.Module):
    """Has batch norm, ReLU and 3x3 convolution twice; the first and the shortcut have the stride.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first_norm = nn.BatchNorm2d(channels_in)
        self.first = _conv(channels_in, width, 3, stride)
        self.second_norm = nn.BatchNorm2d(width)
        self.second = _conv(width, width, 3)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != width:
            self.shortcut = _conv(channels_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.first_norm(x))
        out = self.second(F.relu(self.second_norm(self.first(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """Has three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times `widen` channels."""

    def __init__(self, depth: int, widen: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = 16
        layers: list[nn.Module] = [_conv(in_channels, channels, 3)]
        for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for index in range((depth - 4) // 6):
                layers.append(WideBlock(channels, width, 2 if stage > 0 and index == 0 else 1))
                channels = width
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.head(self.features(x).mean(dim=(2, 3)))


def wrn28_10(shape: Sequence[int], num_classes: int) -> WideResNet:
    """Make WideResNet-28-10: 36,536,884 parameters with 3 channels and 100 classes."""
    return WideResNet(28, 10, shape[0], num_classes)
