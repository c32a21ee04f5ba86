"""Find out whether a Triton can serve, and load its kernels."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from types import ModuleType

import torch

# Leads to the names of Triton's dtypes.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MIN_CAPABILITY = (8, 0)  # what Triton supports
# From here on, launchers take all arguments, constants too: see launching.run_over.
MIN_VERSION = (3, 3)


def why_unavailable(device: torch.device, dtype: torch.dtype, dense: bool) -> str | None:
    """Say why the Triton kernels cannot serve such tensors, or None if they can."""
    if device.type not in ("cpu", "cuda"):
        return f"there are no Triton kernels for {device.type} tensors"
    if dtype not in DTYPES:
        return f"there are no Triton kernels for {dtype}"
    if not dense:
        return "the Triton kernels take tensors that fill their memory without gaps or overlap"
    if device.type == "cpu":
        if is_interpreted():
            return None
        return "Triton compiles for GPUs (its interpreter, TRITON_INTERPRET=1, serves CPU tensors)"
    return why_no_triton() or why_no_gpu(device)


def is_interpreted() -> bool:
    """Say whether the kernels run in Triton's interpreter, a debugger, which cuts float32 off to
    bfloat16 where a GPU rounds. The function does not import triton to say no."""
    asked = bool(os.environ.get("TRITON_INTERPRET"))
    return asked and why_no_triton() is None and load_kernels().INTERPRETED


@lru_cache(maxsize=1)
def why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed (pip install "samkernels[triton]")'
    try:
        version = load_kernels().triton.__version__
    except Exception as error:  # whatever a broken installation raises
        return f"Triton could not be imported: {error}"
    if tuple(map(int, version.split(".")[:2])) < MIN_VERSION:
        return f"Triton {version} is too old: 3.3 or newer is needed"
    return None


@lru_cache(maxsize=16)
def why_no_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if is_interpreted():
        return "Triton's interpreter (TRITON_INTERPRET is set) serves CPU tensors only"
    if torch.version.cuda is None:
        return "the Triton kernels were written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"Triton needs compute capability 8.0 or higher, and this GPU has {found}"
    return None


@lru_cache(maxsize=1)
def load_kernels() -> ModuleType:
    """Import the kernels at the first use: triton takes a tenth of a second."""
    from . import kernels

    return kernels
