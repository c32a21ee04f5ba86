"""The compiled core (csrc/bindings.cpp). Addresses are data_ptr(); 0 stands for none."""

import enum

NORMS_SUMS: int
COMPARE_SUMS: int

class DType(enum.Enum):
    float32 = ...
    bfloat16 = ...
    float16 = ...

class Target: ...

class Recombination:
    def __init__(
        self,
        *,
        magnitude: list[int],
        sign: list[int] | None,
        numerator: int,
        denominator: int,
        per_tensor: bool,
        eps: float,
        ascent_norm: int,
    ) -> None: ...

class SgdOptions:
    def __init__(
        self,
        *,
        lr: float,
        momentum: float,
        one_minus_dampening: float,
        weight_decay: float,
        gradient_sign: float,
        nesterov: bool,
        has_momentum: bool,
        init_momentum: bool,
    ) -> None: ...

def build_info() -> dict[str, str]: ...
def why_no_cuda() -> str | None: ...
def cpu(num_threads: int) -> Target: ...
def cuda(stream: int) -> Target: ...
def workspace_bytes(target: Target, numel: list[int], num_sums: int) -> int: ...
def norms(
    target: Target,
    numel: list[int],
    dtype: DType,
    x: list[int],
    weights: list[int] | None,
    workspace: int,
    per_tensor: int,
    total: int,
) -> None: ...
def perturb(
    target: Target,
    numel: list[int],
    dtype: DType,
    params: list[int],
    grads: list[int],
    old_params: list[int],
    norm: int,
    rho: float,
    eps: float,
    adaptive: bool,
    journal: list[bool] | None,
) -> None: ...
def restore(
    target: Target, numel: list[int], dtype: DType, params: list[int], old_params: list[int]
) -> None: ...
def recombine(
    target: Target,
    numel: list[int],
    dtype: DType,
    recombination: Recombination,
    out: list[int],
) -> None: ...
def sgd(
    target: Target,
    numel: list[int],
    dtype: DType,
    recombination: Recombination,
    params: list[int],
    old_params: list[int],
    momentum_buffer: list[int] | None,
    options: SgdOptions,
) -> None: ...
def compare(
    target: Target,
    numel: list[int],
    dtype: DType,
    first_grads: list[int],
    second_grads: list[int],
    workspace: int,
    sums: int,
) -> None: ...
