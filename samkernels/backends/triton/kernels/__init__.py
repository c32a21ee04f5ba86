"""The Triton kernels. They are imported when they are needed: importing triton takes a tenth of a
second.

A kernel works on lists of tensors. Program p has chunk p, a part of one tensor, the same part in
every list:

    plan        int64 [chunks, 5]: the chunk's tensor, its first element and number of elements,
                and of that tensor the first chunk and the number of chunks; a tensor without
                elements has one chunk
    addresses   int64 [tensors, LISTS]: where each tensor begins; some kernels have numbers of each
                tensor in further columns

Loads and stores are of 16 bytes where a block of a chunk is whole and all its addresses allow it,
and masked elsewhere. Arithmetic is in float32, in the order of the reference, and rounded once,
when it is stored; launches forbid its contraction into fused multiply-adds. `/` would be
approximate: div_rn is not. Sums are in float64 and of a fixed order.

What is None at a launch is None when a kernel is compiled.
"""

from __future__ import annotations

import triton as triton
import triton.language as tl

from .adam import adam_step, count_steps
from .mixes import mix
from .sgd import INIT_MOMENTUM, NO_MOMENTUM, RUNNING_MOMENTUM, sgd_hess_step, sgd_step
from .sums import dots
from .weights import perturb, restore

__all__ = [
    "INIT_MOMENTUM",
    "INTERPRETED",
    "NO_MOMENTUM",
    "RUNNING_MOMENTUM",
    "adam_step",
    "count_steps",
    "dots",
    "mix",
    "perturb",
    "restore",
    "sgd_hess_step",
    "sgd_step",
    "tl",
]

# Says whether all this is for Triton's interpreter (TRITON_INTERPRET), and takes CPU tensors.
INTERPRETED = not isinstance(restore, triton.JITFunction)
