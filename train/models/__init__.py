"""Make networks by name: train/settings/registry.py has the names."""

from collections.abc import Sequence

from torch import nn

from train.settings.registry import MODELS, TIMM
from train.shared.errors import ConfigError


def build_model(name: str, shape: Sequence[int], num_classes: int) -> nn.Module:
    """Make the network `name` for images of the shape (C, H, W); its weights are from torch's RNG.

    Raises:
        ConfigError: timm, which has to make the model, is not installed, does not know it, or
            cannot make it for images of this size.
    """
    if name.startswith(TIMM):
        return _from_timm(name.removeprefix(TIMM), shape, num_classes)
    model: nn.Module = MODELS[name].make(shape, num_classes)
    return model


def _from_timm(name: str, shape: Sequence[int], num_classes: int) -> nn.Module:
    try:
        import timm  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError(
            f"model=timm:{name} needs the package timm ({error}): pip install timm"
        ) from None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('.')[0][:8]}*")[:5]
        raise ConfigError(
            f"model=timm:{name} is not known to timm {timm.__version__}: allowed is what "
            f"timm.list_models() has{f', such as {near}' if near else ''}"
        )
    options = {"num_classes": num_classes, "in_chans": shape[0]}
    model: nn.Module
    try:
        try:  # a transformer is made for one size of images
            model = timm.create_model(name, pretrained=False, img_size=shape[1], **options)
        except TypeError:  # a convolutional network takes any size
            model = timm.create_model(name, pretrained=False, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model=timm:{name} cannot be made for images of {shape[1]}x{shape[2]} pixels: {reason}"
        ) from None
    return model
