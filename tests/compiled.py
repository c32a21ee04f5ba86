"""The Triton kernels compiled for GPUs that are not there: Triton's own path up to the launch,
which is recorded."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CACHE = Path(__file__).parents[1] / "build" / "triton"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass
class Launched:
    name: str
    handle: Any
    programs: int
    arguments: tuple[Any, ...]
    enter_hook: Any


@dataclass
class Gpu:
    """What Triton asks its driver. Kernels are compiled for `arch`, and launches are recorded."""

    arch: int
    launches: list[Launched] = field(default_factory=list)
    compilations: list[str] = field(default_factory=list)
    fails_to_launch: bool = False

    def get_current_device(self) -> int:
        return 1000 + self.arch  # Triton keeps what it compiled by device: none that exists

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(
            x: int, y: int, z: int, stream: int, handle: Any, packed: Any, *rest: Any
        ) -> None:
            metadata_of_launch, enter_hook, _, *arguments = rest
            assert (y, z, stream) == (1, 1, 0)
            assert len(arguments) == len(source.fn.params)
            if enter_hook is not None:
                enter_hook(metadata_of_launch)
            if self.fails_to_launch:
                raise RuntimeError("no launch")
            self.launches.append(
                Launched(source.fn.__name__, handle, x, tuple(arguments), enter_hook)
            )

        return launch

    class utils:
        unload_module = staticmethod(lambda *_: None)
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 160 * 1024})

        @staticmethod
        def load_binary(name: str, binary: bytes, *_: Any) -> tuple[Any, ...]:
            return None, binary, 0, 0, 1024  # the binary stands for the function's handle


@contextlib.contextmanager
def gpu(arch: int) -> Iterator[Gpu]:
    """A GPU of this compute capability is what Triton finds."""
    fake = Gpu(arch)

    def count(**compilation: Any) -> None:
        fake.compilations.append(compilation["fn"].name)

    with (
        mock.patch.object(driver, "_active", fake),
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(CACHE)),
        knobs.runtime.scope(),
    ):
        knobs.runtime.jit_post_compile_hook = count
        yield fake


@dataclass
class Code:
    """What a kernel was compiled to."""

    ptx: str
    local_bytes: int  # stack, spills and arrays per thread

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\s{re.escape(instruction)}\s", self.ptx))


def code_of(kernel: Any) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((stack, local),) = re.findall(r"REG:\d+ STACK:(\d+) .*LOCAL:(\d+)", usage)
    return Code(kernel.asm["ptx"], int(stack) + int(local))


def kernel_of(module: Any, launched: Launched, arch: int) -> Any:
    """Triton's CompiledKernel."""
    kernels = getattr(module, launched.name).device_caches[1000 + arch][0].values()
    (kernel,) = (kernel for kernel in kernels if kernel.function is launched.handle)
    return kernel
