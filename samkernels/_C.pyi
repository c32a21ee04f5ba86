"""The compiled core (csrc/bindings.cpp). Addresses are data_ptr(); 0 stands for none."""

from collections.abc import Sequence

from torch import Tensor

NORMS_SUMS: int
COMPARE_SUMS: int

class Target: ...

class TensorList:
    def __init__(self, tensors: Sequence[Tensor], use_exchange_api: bool = True) -> None: ...
    def is_alike(self, other: TensorList) -> bool: ...

class TensorReader:
    def __init__(self, tensor: type[Tensor], parameter: type[Tensor]) -> None: ...
    def gradients(
        self, candidates: object, params: list[Tensor], known: TensorList
    ) -> tuple[list[Tensor], TensorList, TensorList] | None: ...
    def state(
        self,
        state: object,
        params: list[Tensor],
        name: str,
        like: TensorList,
        numbers: bool = False,
        seen: list[Tensor] | None = None,
    ) -> tuple[list[Tensor], TensorList] | None: ...

class Recombination:
    def __init__(
        self,
        magnitude: TensorList,
        sign: TensorList | None,
        numerator: int,
        denominator: int,
        per_tensor: bool,
        eps: float,
        ascent_norm: int,
        grad_scale: int,
        found_inf: int,
    ) -> None: ...

class SgdOptions:
    def __init__(
        self,
        *,
        lr: float,
        lr_address: int,
        momentum: float,
        one_minus_dampening: float,
        weight_decay: float,
        gradient_sign: float,
        nesterov: bool,
        has_momentum: bool,
        init_momentum: bool,
    ) -> None: ...

class AdamOptions:
    def __init__(
        self,
        *,
        lr: float,
        lr_address: int,
        beta1: float,
        one_minus_beta1: float,
        beta2: float,
        one_minus_beta2: float,
        eps: float,
        weight_decay: float,
        gradient_sign: float,
        decoupled: bool,
    ) -> None: ...

def build_info() -> dict[str, str]: ...
def why_no_cuda() -> str | None: ...
def cpu(num_threads: int) -> Target: ...
def cuda(stream: int) -> Target: ...
def workspace_bytes(target: Target, tensors: TensorList, num_sums: int) -> int: ...
def norms(
    target: Target,
    x: TensorList,
    weights: TensorList | None,
    workspace: int,
    per_tensor: int,
    total: int,
) -> None: ...
def perturb(
    target: Target,
    params: TensorList,
    grads: TensorList,
    old_params: TensorList,
    norm: int,
    rho: float,
    rho_address: int,
    eps: float,
    adaptive: bool,
    rounds_at_random: bool,
    journal: list[bool] | None,
) -> None: ...
def restore(target: Target, params: TensorList, old_params: TensorList) -> None: ...
def recombine(target: Target, recombination: Recombination, out: TensorList) -> None: ...
def sgd(
    target: Target,
    recombination: Recombination,
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    options: SgdOptions,
) -> None: ...
def sgd_hess(
    target: Target,
    params: TensorList,
    grads: TensorList,
    hessian_products: TensorList,
    momentum_buffers: TensorList | None,
    positions: Sequence[tuple[int, int] | None],
    rho: float,
    rho_address: int,
    options: SgdOptions,
) -> None: ...
def adam(
    target: Target,
    recombination: Recombination,
    params: TensorList,
    old_params: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    bias_corrections: int,
    options: AdamOptions,
) -> None: ...
def compare(
    target: Target,
    first_grads: TensorList,
    second_grads: TensorList,
    weights: TensorList,
    workspace: int,
    sums: int,
    per_tensor: int,
    total: int,
) -> None: ...
