"""Print versions, how the core was built, and what each backend can do: `python -m samkernels`."""

from __future__ import annotations

import platform

import torch

from samkernels import __version__, backends
from samkernels.backends import native


def main() -> None:
    """Print the report."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"samkernels {__version__}, {versions}")
    print(f"core:      {_core()}")
    devices = [torch.device("cpu"), torch.device("cuda")]
    for name in backends.BACKENDS:
        if name == "auto":
            continue
        for device in devices:
            reason = backends.why_unavailable(name, device) or _why_no_device(device)
            print(f"{name:10} {device.type:5} {f'no: {reason}' if reason else 'available'}")
    for device in devices:
        if not _why_no_device(device):
            print(f"auto       {device.type:5} takes {backends.choose('auto', device)[0]}")


def _core() -> str:
    if native.IMPORT_ERROR is not None:
        return "none"
    info = native.build_info()
    threads = info["threads"] or "no OpenMP (one thread)"
    cuda = f"CUDA {info['cuda']} for {info['cuda_archs']}" if info["cuda"] else "no CUDA"
    return f"built with {info['compiler']}; {threads}; CPU code {info['cpu_variant']}; {cuda}"


def _why_no_device(device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


if __name__ == "__main__":
    main()
