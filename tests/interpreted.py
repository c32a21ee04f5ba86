"""The Triton kernels as a backend on CPU tensors: in Triton's interpreter, registered as
"interpreted"."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from samkernels import backends
from samkernels.backends import triton
from tests.stand_ins import load_module


def backend() -> ModuleType:
    """A second instance of the Triton backend. The one that everybody else imports is compiled, and
    never sees TRITON_INTERPRET."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        module = load_module("samkernels.backends.interpreted", Path(triton.__file__))
        kernels = module.availability.load_kernels()
    assert kernels.INTERPRETED
    run = module.launching.run

    def interpret(*arguments: Any, **options: Any) -> None:
        with mended_interpreter():
            run(*arguments, **options)

    vars(module.availability).update(is_interpreted=lambda: True)
    vars(module.launching).update(run=interpret)
    return module


def register() -> None:
    """Make `backend="interpreted"` known to samkernels. One of the last: "auto" never takes it.

    Raises what the interpreter does where it does not work: that of Triton 3.6 asks of arrays what
    NumPy 2.5 refuses."""
    if "interpreted" not in backends.BACKENDS:
        module = backend()
        module.dots([[torch.ones(1)]])
        backends._MODULES["interpreted"] = module
        backends.BACKENDS = (*backends.BACKENDS, "interpreted")


@contextlib.contextmanager
def mended_interpreter() -> Iterator[None]:
    """Triton's interpreter cuts float32 off to bfloat16, where a GPU rounds; its reductions are
    there only if triton was imported under TRITON_INTERPRET; NumPy warns of every overflow."""
    builder = interpreter.InterpreterBuilder
    cast, set_grid_idx = builder.cast_impl, builder.set_grid_idx
    patch_lang = interpreter._patch_lang

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        kinds = (source.dtype.scalar, to.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_rounded_to_bfloat16(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            wide = source.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(wide.view(np.float32), tl.float32)
        return cast(self, source, to)

    def in_another_order(self: Any, x: int, y: int, z: int) -> None:
        # As on a GPU, the last program is not the last one to finish.
        programs = self.grid_dim[0]
        set_grid_idx(self, (x * 7919 + programs // 2) % programs, y, z)

    def sum_(x: Any, axis: int) -> Any:
        return tl.reduce(x, axis, tl.standard._sum_combine)

    patches: list[Any] = []

    def patch_lang_once(function: Any) -> Any:
        # The interpreter patches triton.language again in every call of a helper function, which
        # takes longer than all that the kernels do.
        if not patches:
            patches.append(patch_lang(function))
            patches[0].set_attr(tl, "multiple_of", checked_multiple_of)
        return patches[0]

    def checked_multiple_of(x: Any, factor: Any) -> Any:
        # A GPU would fault at an address of another alignment.
        assert (x.handle.data % tl.constexpr(factor).value == 0).all()
        return x

    with (
        mock.patch.multiple(builder, cast_impl=cast_impl, set_grid_idx=in_another_order),
        mock.patch.object(interpreter, "_patch_lang", patch_lang_once),
        mock.patch.object(tl, "sum", sum_),
        np.errstate(all="ignore"),
    ):
        yield


def _rounded_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of the bits of float32 numbers, rounded to the nearest, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)
