"""Write checkpoints atomically, read them with a clear error and without changing them, and lock
the folder in which they lie."""

import contextlib
import fcntl
import os
import platform
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from train.settings.config import Config
from train.shared.errors import CheckpointError, ConfigError, InUseError
from train.shared.results import write_atomically

FORMAT = "samkernels training, 1"
LEFT_ALONE = "it was left as it is"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if it is missing, and keep other processes of this program out of it.

    The operating system unlocks it when the process ends, however it ends. A folder that was made
    here and is empty in the end is removed.

    Raises:
        ConfigError: the folder cannot be made or written.
        InUseError: another process has the folder; the message names the process.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(folder / ".lock")
    except InUseError:
        raise
    except OSError as error:
        raise ConfigError(f"output_dir={folder} cannot be written: {error}") from None
    try:
        for leftover in folder.glob(".*.[0-9]*"):  # a process that was killed as it wrote left it
            leftover.unlink(missing_ok=True)
        yield
    finally:
        # The file goes before its lock: whoever opened it meanwhile finds it gone, and tries again.
        (folder / ".lock").unlink(missing_ok=True)
        os.close(file)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _lock(path: Path) -> int:
    """Lock the file, write into it which process has it, and return its descriptor."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 1000).decode(errors="replace") or "another process"
            os.close(file)
            raise InUseError(
                f"'{path.parent}' is in use by {owner}; {LEFT_ALONE}: wait for it, or choose "
                "another --output_dir"
            ) from None
        except OSError:  # this file system has no locks: work without
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
                return file
        os.close(file)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Save by torch.save, atomically: whoever is killed here leaves the old file or the new one."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def load_checkpoint(path: Path, needs: tuple[str, ...], device: str | torch.device = "cpu") -> Any:
    """Return what save_checkpoint wrote.

    Args:
        needs: the entries without which the checkpoint is of no use.

    Raises:
        CheckpointError: the file is missing, damaged, another program's or without these entries.
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
    except Exception as error:  # torch, zipfile and pickle raise many types
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
        CheckpointError: the configurations differ; the message names the keys and both values.
    """
    differences = config.differences(saved)
    if differences:
        raise CheckpointError(
            f"'{path}' is of another configuration ({'; '.join(differences)}); {LEFT_ALONE}: "
            "choose another --output_dir, or start over with --overwrite"
        )
