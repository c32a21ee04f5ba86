"""What callgrind watches for test_cpu_code.py: sgd_hess on one tensor. Without torch, whose import
would take most of the time: the core reads what looks like a tensor.

    valgrind --tool=callgrind ... python linear_time.py CORE NUMEL COUNT STRIDE
"""

from __future__ import annotations

import array
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any


class Tensor:
    """As much of a tensor as the core looks at."""

    dtype = "torch.float32"
    device = SimpleNamespace(type="cpu", index=None)

    def __init__(self, numel: int) -> None:
        self.shape = (numel,)
        self.memory = array.array("f", bytes(4 * numel))

    def stride(self) -> tuple[int, ...]:
        return (1,)

    def data_ptr(self) -> int:
        return self.memory.buffer_info()[0]


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("samkernels._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path: str, numel: int, count: int, stride: int) -> None:
    core = load(path)
    options = core.SgdOptions(
        lr=0.1,
        lr_address=0,
        momentum=0.9,
        one_minus_dampening=1.0,
        one_minus_dampening_address=0,
        weight_decay=0.1,
        gradient_sign=1.0,
        nesterov=False,
        has_momentum=True,
        init_momentum=False,
    )
    tensors = [Tensor(numel) for _ in range(4)]  # alive while the core knows addresses only
    lists = [core.TensorList([t], use_exchange_api=False) for t in tensors]
    core.sgd_hess(core.cpu(1), *lists, [(count, stride)], 0.1, 0, options, None)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
