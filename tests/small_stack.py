"""Every op of a backend in a thread with a small stack, for test_cpu_code.py.

python -m tests.small_stack BACKEND
"""

from __future__ import annotations

import os
import sys
import threading

os.environ["OMP_STACKSIZE"] = "64K"  # of the core's own threads; read when OpenMP starts

import torch

from tests.helpers import CHUNK_SIZE, LAYOUTS, SPATIAL, Slot
from tests.sanitized import Runner

STACK_BYTES = 64 << 10
SLOTS = [*LAYOUTS, *SPATIAL, Slot((3 * CHUNK_SIZE,))]  # enough for a second thread


def main(backend: str) -> None:
    torch.set_num_threads(2)
    runner = Runner(backend, "cpu")
    failures: list[BaseException] = []

    def run() -> None:
        try:
            if backend == "native":
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    runner.every_op(SLOTS, dtype)
            runner.many_tensors()
        except BaseException as error:
            failures.append(error)

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    print(f"{runner.calls} calls")


if __name__ == "__main__":
    main(sys.argv[1])
