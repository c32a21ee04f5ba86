"""The compiled core (csrc/bindings.cpp). Addresses are data_ptr(); 0 stands for none."""

from collections.abc import Sequence

from torch import Tensor

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
    def versions(self, tensors: list[Tensor]) -> list[int]: ...

class Mix:
    def __init__(
        self,
        x: TensorList,
        y: TensorList | None,
        a: float,
        a_address: int,
        a_stride: int,
        b: float,
        b_address: int,
        b_stride: int,
        function: int,
        divisor: int,
        ascent_square: int,
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
        one_minus_dampening_address: int,
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

INTERFACE: str  # the SHA-256 of this file where the core was built

def build_info() -> dict[str, str]: ...
def why_no_cuda() -> str | None: ...
def cpu(num_threads: int) -> Target: ...
def cuda(stream: int) -> Target: ...
def workspace_bytes(target: Target, tensors: TensorList, num_sums: int) -> int: ...
def num_dots(num_lists: int, weighted: bool) -> int: ...
def dots(
    target: Target,
    x: TensorList,
    y: TensorList | None,
    z: TensorList | None,
    weights: TensorList | None,
    eta: float,
    workspace: int,
    per_tensor: int,
    total: int,
) -> None: ...
def perturb(
    target: Target,
    params: TensorList,
    direction: TensorList,
    old_params: TensorList,
    square: int,
    square_stride: int,
    rho: float,
    rho_address: int,
    rho_stride: int,
    eta: float | None,
    eps: float,
    rounds_at_random: bool,
    saves: bool,
    journal: list[bool] | None,
) -> None: ...
def restore(target: Target, params: TensorList, old_params: TensorList) -> None: ...
def mix(target: Target, mix: Mix, out: TensorList, keeps: bool) -> None: ...
def sgd(
    target: Target,
    mix: Mix,
    params: TensorList,
    old_params: TensorList,
    momentum_buffers: TensorList | None,
    options: SgdOptions,
    journal: list[bool] | None,
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
    journal: list[bool] | None,
) -> None: ...
def adam(
    target: Target,
    mix: Mix,
    params: TensorList,
    old_params: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    bias_corrections: int,
    options: AdamOptions,
    journal: list[bool] | None,
) -> None: ...
