"""Every op at awkward sizes, in a process of its own, for tools that watch its memory accesses:
AddressSanitizer (tests/test_sanitizers.py) and compute-sanitizer (bench/gpu/plans.py).

    python -m tests.sanitized BACKEND DEVICE [--brief] [--lie read|write|misalign --numel N]

BACKEND is a name, or a module built with -DSAMKERNELS_EMULATION=ON, whose kernels for DEVICE then
work on CPU tensors. Each tensor fills an allocation of its own: one element too far, before or
behind, and the tool notices. With a lie, one op is given a tensor that is not what it says it is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.pop("LD_PRELOAD", None)  # not for the compilers that tests.helpers may start

import torch
from torch import Tensor

from samkernels import ops
from tests import emulated
from tests.helpers import CHUNK_SIZE, LISTS, MIXES, SPATIAL, Slot, make_list, make_mix

SGD_OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "dampening": 0.3, "init_momentum": True},
    {"momentum": 0.9, "nesterov": True},
]
ADAM_OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
]


class Runner:
    """Calls ops on a backend and a device."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device
        self.calls = 0

    def alone(self, slots: Sequence[Slot], dtype: torch.dtype, seed: int) -> list[Tensor]:
        """The tensors of helpers.make_list, each at the end of a storage of its own."""
        tensors = []
        for slot, values in zip(slots, make_list(slots, dtype, seed=seed), strict=True):
            # Filled on the host, and copied as it is: no kernel but ours has to run on the device.
            storage = torch.empty(slot.offset + values.numel(), dtype=dtype)
            storage.as_strided(values.shape, values.stride(), slot.offset).copy_(values)
            storage = storage.to(self.device)
            tensors.append(storage.as_strided(values.shape, values.stride(), slot.offset))
        return tensors

    def call(self, op: str, *lists: Any, **options: Any) -> Any:
        self.calls += 1
        return getattr(ops, op)(*lists, backend=self.backend, **options)

    def every_op(self, slots: Sequence[Slot], dtype: torch.dtype) -> None:
        w, old, g1, g2, buf, v = (self.alone(slots, dtype, seed) for seed in range(6))
        for weights in (None, w):
            self.call("dots", g1, weights=weights)
        self.call("dots", g1, g2)
        self.call("dots", g1, g2, w)
        for eta in (None, 0.1):
            self.call("perturb_", w, g1, old, rho=0.05, eta=eta)
            self.call("perturb_", w, g1, old, rho=0.05, eta=eta, saves=False)
            self.call("restore_", w, old)
        self.call("perturb_", w, old, old, rho=0.05)
        one = torch.tensor(1.0).to(self.device)
        square = torch.tensor(1.0, dtype=torch.float64).to(self.device)
        for name in MIXES:
            mix = make_mix(name, g2, g1, ascent_square=square)
            for options in SGD_OPTIONS:
                self.call("sgd_", w, old, mix, buf, lr=0.1, **options)
            for options in (*ADAM_OPTIONS, {}):
                steps = [torch.zeros(()).to(self.device) for _ in w]
                given = mix if options else mix._replace(found_inf=one)  # the last one is skipped
                self.call("adam_", w, old, given, buf, v, steps, lr=0.1, **options)
            self.call("mix_", g2, mix)
        for options in SGD_OPTIONS:
            self.call("sgd_hess_", w, g1, g2, buf, lr=0.1, rho=0.1, **options)

    def many_tensors(self) -> None:
        """So many that five lists of them need two tables (csrc/cuda/multi_tensor_apply.cuh)."""
        slots = LISTS["thousand"][:700]
        w, old, g1, g2, buf = (self.alone(slots, torch.float32, seed) for seed in range(5))
        mix = make_mix("sign", g1, g2)
        self.call("sgd_", w, old, mix, buf, lr=0.1, momentum=0.9)
        self.call("sgd_hess_", w, g1, g2, buf, lr=0.1, rho=0.1, momentum=0.9)

    def lie(self, lie: str, numel: int) -> None:
        honest = torch.ones(numel).to(self.device)
        if lie == "misalign":  # a tensor that starts within an element
            liar = torch.frombuffer(bytearray(4 * numel + 1), dtype=torch.float32, offset=1)
        else:  # one without the memory of its last element
            liar = torch.ones(numel).to(self.device)
            liar.untyped_storage().resize_(4 * (numel - 1))
        if lie == "write":
            self.call("restore_", [liar], [honest])
        else:
            self.call("dots", [honest], [liar])


def work(brief: bool) -> Iterator[tuple[list[Slot], torch.dtype]]:
    """Sizes and layouts, in every dtype; briefly, the sizes in one dtype only and few of them."""
    short = [slot for slot in LISTS["offsets"] if slot.shape != (CHUNK_SIZE + 1,)]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield LISTS["layouts"], dtype
        yield SPATIAL, dtype
        yield (short if brief else LISTS["offsets"]), dtype
        yield LISTS["empty"], dtype
    yield ([Slot((CHUNK_SIZE + 1,), offset=1)] if brief else LISTS["sizes"]), torch.float32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--lie", choices=["read", "write", "misalign"])
    parser.add_argument("--numel", type=int, default=1)
    arguments = parser.parse_args()
    runner = Runner(arguments.backend, arguments.device)
    if arguments.backend.endswith(".so"):
        core = emulated.load(Path(arguments.backend))
        emulated.add("sanitized", emulated.backend(core, cuda=arguments.device == "cuda"))
        runner = Runner("sanitized", "cpu")
        print("CPU code", core.build_info()["cpu_variant"])
    torch.set_num_threads(2)
    if arguments.lie:
        runner.lie(arguments.lie, arguments.numel)
        if arguments.device == "cuda" and runner.device == "cuda":
            torch.cuda.synchronize()
        return
    for slots, dtype in work(arguments.brief):
        runner.every_op(slots, dtype)
    runner.many_tensors()
    if runner.device == "cuda":
        torch.cuda.synchronize()
    print(f"{runner.calls} calls")


if __name__ == "__main__":
    main()
