"""Write and read results, with what they were made with."""

import contextlib
import io
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from matplotlib.figure import Figure

import samkernels
from train.shared.errors import CheckpointError, StorageError
from train.shared.machine import commit, processor


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Give `write` a temporary file in the same folder, then put it in the place of `path`.

    Whoever reads `path` finds the old file or the new one, never a part.

    Raises:
        StorageError: the disk is full, or refuses for another reason.
    """
    # tempfile would leave the result readable by its owner only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            # The content comes in one piece: torch.save would hide the file's error behind its own.
            content = io.BytesIO()
            write(content)
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StorageError(
                f"'{path}' could not be written ({error.strerror or error}); what was there before "
                "is as it was: make room, then go on with --resume (a study: with the same command)"
            ) from None
        raise


def versions() -> dict[str, str]:
    """Return the versions of the software that the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "samkernels": samkernels.__version__,
        "commit": commit() or "unknown",
    }


def describe_device(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, threads: {torch.get_num_threads()}"


def _finite(value: Any) -> Any:
    """Return the value with None in place of nan and inf, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON, atomically."""
    write_text(path, json.dumps(_finite(dict(content)), indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a line of JSON for each mapping, atomically."""
    texts = (json.dumps(_finite(dict(line)), allow_nan=False) + "\n" for line in lines)
    write_text(path, "".join(texts))


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def read_result(path: Path) -> dict[str, Any]:
    """Read a result.json.

    Raises:
        CheckpointError: the file cannot be read, or is no result of a run.
    """
    what = "result of a run"
    return _read(path, "figures", what, "it was left as it is; move it away to run again")


def read_diverged(path: Path) -> dict[str, Any]:
    """Read a diverged.json.

    Raises:
        CheckpointError: the file cannot be read, or is no record of a run.
    """
    return _read(path, "error", "record of a run", "move it away")


def _read(path: Path, outcome: str, what: str, cure: str) -> dict[str, Any]:
    """Read the record of a run; it has the key `outcome`, and the keys that all records have."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = content["name"], content["config"]["opt_name"], content[outcome], content["history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is no {what} ({type(error).__name__}: {error}): {cure}"
        ) from None
    return content


def of_all_batches(eigenvalues: Iterable[Iterable[float]]) -> dict[str, float]:
    """Return the largest of the eigenvalues of all batches, and the share of negative ones."""
    pooled = [value for values in eigenvalues for value in values]
    return {
        "largest_eigenvalue": max(pooled),
        "negative_share": sum(value < 0 for value in pooled) / len(pooled),
    }


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
