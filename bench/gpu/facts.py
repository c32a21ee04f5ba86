"""What a figure has to come with.

    python -m bench.gpu.facts machine|core FOLDER [--rehearse]

`machine` asks the system and needs no torch; `core` asks torch, and whether the compiled core
serves the GPU: it fails if not, so that the core is built. Both write into FOLDER.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.runner import NO_DEVICE

PACKAGES = (
    "torch", "triton", "numpy", "torchvision", "pytest", "pytest-benchmark", "pytest-xdist",
    "hypothesis", "setuptools", "pybind11", "rich", "scipy",
)  # fmt: skip
TOOLS = ("nvcc", "cmake", "ninja", "ncu", "compute-sanitizer")
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,clocks.sm"
REHEARSAL = "none: a rehearsal on the CPU, whose figures mean nothing"


def machine() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "GPU": output_of(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]),
        "packages": ", ".join(f"{name} {version_of(name)}" for name in PACKAGES),
        "tools that are missing": ", ".join(t for t in TOOLS if not shutil.which(t)) or "none",
    }
    nvcc = re.findall(r"release (\S+),", output_of(["nvcc", "--version"]) or "")
    facts["nvcc"] = nvcc[0] if nvcc else None
    return facts


def core(rehearse: bool) -> tuple[dict[str, Any], int]:
    """The facts, and the exit status."""
    import torch

    from bench.side_by_side import environment
    from samkernels import backends
    from samkernels.backends import native

    facts = environment()
    facts["commit"] = os.environ.get("SAMKERNELS_COMMIT") or facts["commit"]
    facts["cuda of torch"] = torch.version.cuda
    if native.IMPORT_ERROR is None:
        facts |= {f"core: {name}": value for name, value in native.build_info().items()}
    device = torch.device("cuda")
    for name in ("native", "triton"):
        why_not = backends.why_unavailable(name, device)
        facts[f"{name} on cuda"] = why_not or "available"
    if rehearse:
        facts["device"] = REHEARSAL
        return facts, int(native.IMPORT_ERROR is not None)
    if not torch.cuda.is_available():
        facts["device"] = "none: PyTorch sees no CUDA device; --rehearse takes the steps without"
        return facts, NO_DEVICE
    properties = torch.cuda.get_device_properties(0)
    facts["device"] = properties.name
    facts["compute capability"] = f"{properties.major}.{properties.minor}"
    facts["multiprocessors"] = properties.multi_processor_count
    facts["L2 MB"] = round(getattr(properties, "L2_cache_size", 0) / 1e6, 1)
    facts["memory GB"] = round(properties.total_memory / 1e9, 1)
    return facts, int(facts["native on cuda"] != "available")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def output_of(command: Sequence[str]) -> str | None:
    """None if there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("of", choices=["machine", "core"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    facts, status = (machine(), 0) if arguments.of == "machine" else core(arguments.rehearse)
    (arguments.folder / f"{arguments.of}.json").write_text(json.dumps(facts, indent=1) + "\n")
    for name, value in facts.items():
        print(f"{name}: {value}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
