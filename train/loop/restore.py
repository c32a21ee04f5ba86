"""Load a checkpoint, with all that it was trained with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from train.inputs.data import Dataset, load_dataset
from train.loop.checkpoint import load_checkpoint
from train.models import build_model
from train.settings.config import Config, known_keys, make_config
from train.shared.devices import pick_device, set_numerics
from train.shared.errors import CheckpointError


def restored(
    path: Path, here: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[Config, Dataset, nn.Module, int]:
    """Return a checkpoint's configuration, its data set, its network and its epoch.

    Args:
        here: keys that override those of the checkpoint.
        flags: keys that override both.

    Raises:
        CheckpointError: the file is no checkpoint, or its weights do not fit its network.
    """
    checkpoint = load_checkpoint(path, ("model", "config", "epoch"))
    own = {"output_dir": str(path.parent), "resume": False, "overwrite": False}
    config = make_config(
        (str(path), {**known_keys(checkpoint["config"]), **own}), ("", here), ("", flags)
    )
    device = pick_device(config.device)
    set_numerics(threads=config.threads)
    # The noise of the labels does not depend on the seed, which may be another one here.
    dataset = load_dataset(config, device)
    model = build_model(config.model, dataset.train.images.shape[1:], dataset.num_classes)
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"'{path}' does not hold a {config.model}: {reason}") from None
    return config, dataset, model.to(device), checkpoint["epoch"]
