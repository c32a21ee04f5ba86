"""Networks: sizes and shapes."""

import math

import pytest
import torch
from torch import nn

from train.config import FIELDS
from train.models import MODELS, build_model

# With 3 channels and 100 classes: as published for the customary CIFAR ResNets (11.22, 21.33,
# 23.71, 42.70, 58.34 M: weiaicunzai/pytorch-cifar100) and WRN-28-10 (36.5 M: arXiv:1605.07146).
PARAMETERS = {
    "resnet18": (11_220_132, 62),
    "resnet34": (21_328_292, 110),
    "resnet50": (23_705_252, 161),
    "resnet101": (42_697_380, 314),
    "resnet152": (58_341_028, 467),
    "wrn28_10": (36_536_884, 80),
    "resnet_small": (46_196, 32),
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(name: str, channels: int, classes: int) -> nn.Module:
    """Shapes without memory."""
    with torch.device("meta"):
        return build_model(name, channels, classes)


def test_choices_and_models_agree() -> None:
    assert set(FIELDS["model"].metadata["choices"]) == set(MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    model = on_meta(name, 3, 100)
    assert (count(model), len(list(model.parameters()))) == PARAMETERS[name]


def test_parameter_counts_with_10_classes() -> None:
    # 36.479194 M: what the WideResNet repositories list for CIFAR-10.
    assert count(on_meta("wrn28_10", 3, 10)) == 36_479_194
    assert count(on_meta("resnet_small", 1, 10)) == 42_938


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("resnet18", (512, 4, 4)),
        ("resnet50", (2048, 4, 4)),
        ("wrn28_10", (640, 8, 8)),
        ("resnet_small", (32, 16, 16)),
    ],
)
def test_stem_keeps_the_resolution(name: str, features: tuple[int, int, int]) -> None:
    model = on_meta(name, 3, 100)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert (convolutions[0].kernel_size, convolutions[0].stride) == ((3, 3), (1, 1))
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())
    images = torch.zeros(2, 3, 32, 32, device="meta")
    assert model.get_submodule("features")(images).shape == (2, *features)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_3x3_convolutions_stride(name: str) -> None:
    """1x1 convolutions that stride are shortcuts: striding elsewhere would lose pixels."""
    for path, module in on_meta(name, 3, 100).named_modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            assert module.kernel_size == (3, 3) or "shortcut" in path


# The deep ones have the blocks of resnet50; their shapes are checked above without the arithmetic.
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wrn28_10", "resnet_small"])
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (3, 16, 100)])
def test_models_give_logits_and_gradients(
    name: str, channels: int, size: int, classes: int
) -> None:
    torch.manual_seed(0)
    model = build_model(name, channels, classes)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, classes)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_wide_resnet_is_drawn_as_published() -> None:
    torch.manual_seed(0)
    model = build_model("wrn28_10", 3, 100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 100_000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
        if isinstance(module, nn.BatchNorm2d) and module.num_features >= 160:
            assert 0 <= module.weight.min() < 0.1 and 0.9 < module.weight.max() < 1
            assert not module.bias.any()


def test_the_wide_block_activates_before_its_shortcut() -> None:
    """As in the paper's code: where the shape changes, both branches see the activated input."""
    torch.manual_seed(0)
    block = build_model("wrn28_10", 3, 100).get_submodule("features.1")
    x = torch.randn(2, 16, 4, 4)
    active = block.get_submodule("first_norm")(x).relu()
    second = block.get_submodule("second_norm")(block.get_submodule("first")(active)).relu()
    expected = block.get_submodule("second")(second) + block.get_submodule("shortcut")(active)
    torch.testing.assert_close(block(x), expected)


def test_weights_come_from_the_seed() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(build_model("resnet_small", 1, 10).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    assert not torch.equal(weights(0)[0], weights(1)[0])
