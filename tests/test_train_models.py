"""Networks: sizes and shapes."""

import pytest
import torch
from torch import nn

from train.config import FIELDS
from train.models import MODELS, build_model


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnet18_is_the_cifar_form() -> None:
    model = build_model("resnet18", 3, 100)
    assert count(model) == 11_220_132
    assert len(list(model.parameters())) == 62
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert (convolutions[0].kernel_size, convolutions[0].stride) == ((3, 3), (1, 1))
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())
    features = model.get_submodule("features")
    assert features(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 4, 4)


def test_small_model_is_small() -> None:
    model = build_model("resnet_small", 1, 10)
    assert count(model) == 42_938
    assert model.get_submodule("features")(torch.zeros(2, 1, 8, 8)).shape == (2, 32, 4, 4)


@pytest.mark.parametrize("name", FIELDS["model"].metadata["choices"])
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (3, 32, 100)])
def test_every_model_gives_logits_and_gradients(
    name: str, channels: int, size: int, classes: int
) -> None:
    torch.manual_seed(0)
    model = build_model(name, channels, classes)
    logits = model(torch.randn(4, channels, size, size))
    assert logits.shape == (4, classes)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_weights_come_from_the_seed() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(build_model("resnet_small", 1, 10).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    assert not torch.equal(weights(0)[0], weights(1)[0])


def test_choices_and_models_agree() -> None:
    assert set(FIELDS["model"].metadata["choices"]) == set(MODELS)
