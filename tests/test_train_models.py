"""Networks: sizes and shapes."""

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from train.models import build_model
from train.settings.config import FIELDS, Config
from train.settings.registry import DATASETS, MODELS
from train.shared.errors import ConfigError

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
    "mlp": (1_887_332, 6),
}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(name: str, channels: int, classes: int) -> nn.Module:
    """Shapes without memory."""
    with torch.device("meta"):
        return build_model(name, (channels, 32, 32), classes)


def test_every_row_of_the_registry_is_a_choice_and_can_be_made() -> None:
    assert FIELDS["model"].metadata["choices"] == (*MODELS, "timm:NAME")
    assert FIELDS["dataset"].metadata["choices"] == tuple(DATASETS)
    assert set(MODELS) == set(PARAMETERS)
    assert all(callable(entry.make) for entry in (*MODELS.values(), *DATASETS.values()))


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


def test_the_mlp_is_784_512_512_10() -> None:
    model = build_model("mlp", (1, 28, 28), 10)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(784, 512), (512, 512), (512, 10)]
    assert count(model) == 669_706


def test_models_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library: what it is asked for, and what users are told."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def create_model(name: str, **options: Any) -> nn.Module:
        if name == "net" and "img_size" in options:
            raise TypeError("unexpected keyword argument 'img_size'")
        if name == "vit" and options["img_size"] % 16:
            raise AssertionError("size is no multiple of the patch")
        asked.append((name, options))
        return nn.Identity()

    fake = SimpleNamespace(
        create_model=create_model, is_model=lambda name: name in ("net", "vit"), __version__="1",
        list_models=lambda pattern: ["net"],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "timm", fake)
    config = Config(model="timm:vit")
    build_model(config.model, (3, 32, 32), 100)
    build_model("timm:net", (1, 28, 28), 10)
    common: dict[str, Any] = {"pretrained": False}
    assert asked == [
        ("vit", {**common, "num_classes": 100, "in_chans": 3, "img_size": 32}),
        ("net", {**common, "num_classes": 10, "in_chans": 1}),
    ]
    with pytest.raises(ConfigError, match="timm:vit cannot be made for images of 28x28 pixels: si"):
        build_model("timm:vit", (1, 28, 28), 10)
    with pytest.raises(ConfigError, match=r"timm:nett is not known to timm 1: .*such as \['net'\]"):
        build_model("timm:nett", (1, 28, 28), 10)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"needs the package timm .*: pip install timm"):
        build_model("timm:net", (1, 28, 28), 10)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_3x3_convolutions_stride(name: str) -> None:
    """1x1 convolutions that stride are shortcuts: striding elsewhere would lose pixels."""
    for path, module in on_meta(name, 3, 100).named_modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            assert module.kernel_size == (3, 3) or "shortcut" in path


# The deep ones have the blocks of resnet50; their shapes are checked above without the arithmetic.
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wrn28_10", "resnet_small", "mlp"])
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (3, 16, 100)])
def test_models_give_logits_and_gradients(
    name: str, channels: int, size: int, classes: int
) -> None:
    torch.manual_seed(0)
    model = build_model(name, (channels, size, size), classes)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, classes)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_wide_resnet_is_drawn_as_published() -> None:
    torch.manual_seed(0)
    model = build_model("wrn28_10", (3, 32, 32), 100)
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
    block = build_model("wrn28_10", (3, 32, 32), 100).get_submodule("features.1")
    x = torch.randn(2, 16, 4, 4)
    active = block.get_submodule("first_norm")(x).relu()
    second = block.get_submodule("second_norm")(block.get_submodule("first")(active)).relu()
    expected = block.get_submodule("second")(second) + block.get_submodule("shortcut")(active)
    torch.testing.assert_close(block(x), expected)


def test_weights_come_from_the_seed() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(build_model("resnet_small", (1, 8, 8), 10).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    assert not torch.equal(weights(0)[0], weights(1)[0])
