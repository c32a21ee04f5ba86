"""Checkpoints: written atomically, read with a clear error, never changed by reading."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train.config import Config
from train.errors import CheckpointError
from train.results import write_atomically

FORMAT = "samkernels training, 1"
LEFT_ALONE = "it was left as it is"


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """torch.save, atomically: whoever is killed here leaves the old file or the new one."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def load_checkpoint(path: Path, needs: tuple[str, ...], device: str | torch.device = "cpu") -> Any:
    """What save_checkpoint wrote.

    Args:
        needs: the entries without which it is no use.

    Raises:
        CheckpointError: the file is missing, damaged or another program's.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint '{path}': give a best.pt or last.pt of a run"
        )
    try:
        # torch.load would take flipped bits for weights: the archive has checksums.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise ValueError(f"wrong checksum of {broken}")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch, zipfile and pickle have many ways to say it
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise CheckpointError(
            f"'{path}' is damaged, or no checkpoint ({reason}); {LEFT_ALONE}: put a copy in its "
            "place, or start over with --overwrite"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"'{path}' is no checkpoint of this version of this program; {LEFT_ALONE}: choose "
            "another --output_dir, or start over with --overwrite"
        )
    lacking = [name for name in needs if name not in content]
    if lacking:
        raise CheckpointError(
            f"'{path}' has no {', '.join(lacking)}; {LEFT_ALONE}: to go on with a run, give its "
            "last.pt"
        )
    return content


def check_same_run(path: Path, config: Config, saved: Mapping[str, Any]) -> None:
    """Refuse results of another configuration.

    Raises:
        CheckpointError: names the keys and both values.
    """
    differences = config.differences(saved)
    if differences:
        raise CheckpointError(
            f"'{path}' is of another configuration ({'; '.join(differences)}); {LEFT_ALONE}: "
            "choose another --output_dir, or start over with --overwrite"
        )
