"""What a backend implements, the values that go in and out, and what most backends share.

A backend is a module with the functions of `Backend`. Its lists are validated by samkernels.ops:
tensor i of every list has the same shape, dtype, device and dense layout, and no two tensors that
are written overlap.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

TensorList = list[Tensor] | tuple[Tensor, ...]


class Norms(NamedTuple):
    """L2 norms of a list of n tensors, on their device: float32, or float64 for float64 tensors.

    Attributes:
        total: shape ()
        per_tensor: shape (n,)
    """

    total: Tensor
    per_tensor: Tensor


class Comparison(NamedTuple):
    """Sums over all elements of two lists of gradients and of the weights, on their device.

    Attributes:
        sums: float64, shape (6,): g1^2, g2^2, g1 * g2, [|g2| > |g1|], [g1 * g2 > 0], w^2
        numel: number of elements
        second_norms: norms of g2
    """

    sums: Tensor
    numel: int
    second_norms: Norms


class Recombination(NamedTuple):
    """What takes the gradient's place in the update.

    u = |magnitude| * sign(sign)                                   if `sign` is given, else
    u = (numerator / (denominator + eps)) * magnitude              if `numerator` is given, else
    u = magnitude

    u is divided by grad_scale if that is given. If ascent_norm is given and not finite, or
    found_inf is given and not 0, the step is skipped.
    """

    magnitude: TensorList
    sign: TensorList | None = None
    numerator: Tensor | None = None  # norms: shape () or (n,)
    denominator: Tensor | None = None
    eps: float = 1e-12
    ascent_norm: Tensor | None = None  # shape (), as all below
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def takes_place(self) -> Tensor | None:
        """Whether the step is not skipped, on the device; None if nothing can make it so."""
        takes = None if self.ascent_norm is None else self.ascent_norm.isfinite()
        if self.found_inf is None:
            return takes
        return self.found_inf == 0 if takes is None else takes & (self.found_inf == 0)


class SgdOptions(NamedTuple):
    """The hyperparameters of torch.optim.SGD; init_momentum: the buffers hold nothing yet."""

    # A tensor of shape () on the lists' device, float32 (float64), is read there.
    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    init_momentum: bool


class AdamOptions(NamedTuple):
    """The hyperparameters of torch.optim.Adam and AdamW."""

    lr: float | Tensor  # as in SgdOptions
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool  # weight decay as in AdamW
    maximize: bool


class Backend(Protocol):
    """The functions of a backend module; samkernels.ops documents what each one computes."""

    def why_unavailable(
        self, device: torch.device, dtype: torch.dtype, dense: bool
    ) -> str | None: ...

    def prepare(self, tensors: TensorList) -> TensorList:
        """The list in the form that this backend works with, for a list that several calls take.
        Good for as long as no tensor in it gets other memory."""

    def are_alike(self, first: TensorList, *others: TensorList) -> bool:
        """Whether tensor i of all lists has the same dtype, device, shape and order in memory.
        False may also mean that strides differ where it does not matter."""

    def gradients_of(
        self, candidates: list[Tensor], params: TensorList
    ) -> tuple[TensorList, TensorList] | None:
        """`params`, a prepared list of the last step, as it is now; and the gradients, prepared.

        None if anything but addresses may have changed: `params` are not just those of `candidates`
        that have a gradient, a tensor is of a subclass, a gradient is laid out in another way than
        its parameter. Whoever asks looks at each of them then."""

    def state_of(
        self, state: dict[Tensor, Any], params: TensorList, name: str, *, numbers: bool = False
    ) -> TensorList | None:
        """state[p][name] of all params, prepared; None if one is missing, of a subclass or laid out
        in another way than its parameter: or, if they are numbers, not of shape (), not float32 or
        float64 or on another device."""

    def norms(self, tensors: TensorList) -> Norms: ...

    def weighted_norms(self, tensors: TensorList, weights: TensorList) -> tuple[Norms, Norms]: ...

    def perturb_(
        self,
        params: TensorList,
        grads: TensorList,
        old_params: TensorList,
        *,
        norm: Tensor,
        rho: float | Tensor,  # as SgdOptions.lr; negative: away from the gradient
        adaptive: bool,
        eps: float,
        rounds_at_random: bool,  # bfloat16 parameters: see rounding.py
        journal: list[bool] | None,
    ) -> None:
        """Need not tell autograd that old_params were written: optimizers keep them to themselves.

        Appends True to the journal when all of old_params holds w: before the first parameter
        moves, or in one go with that. Whoever is interrupted knows then whether to restore."""

    def restore_(self, params: TensorList, old_params: TensorList) -> None: ...

    def recombine_(self, out: TensorList, recombination: Recombination) -> None: ...

    def sgd_(
        self,
        params: TensorList,
        old_params: TensorList,
        momentum_buffers: TensorList | None,
        recombination: Recombination,
        options: SgdOptions,
    ) -> None: ...

    def sgd_hess_(
        self,
        params: TensorList,
        grads: TensorList,
        hessian_products: TensorList,
        momentum_buffers: TensorList | None,
        rho: float | Tensor,  # as SgdOptions.lr
        options: SgdOptions,
    ) -> None:
        """`positions_of` is not None for any of the tensors."""

    def adam_(
        self,
        params: TensorList,
        old_params: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        steps: TensorList,  # shape (), float32 or float64: of each tensor, before this step
        recombination: Recombination,
        options: AdamOptions,
    ) -> None: ...

    def compare(
        self, first_grads: TensorList, second_grads: TensorList, weights: TensorList
    ) -> Comparison: ...


def positions_of(tensor: Tensor) -> tuple[int, int] | None:
    """Of a 4-D tensor the number of its spatial positions, in dimensions 2 and 3, and the stride
    from one to the next; (1, 1) of any other. None if there is no such stride, or if either number
    is above int32."""
    if tensor.dim() != 4 or tensor.numel() == 0:
        return 1, 1
    height, width = tensor.shape[2:]
    down, right = tensor.stride()[2:]
    count = height * width
    if count == 1:
        return 1, 1
    if height > 1 and width > 1 and down != width * right:
        return None
    stride = down if width == 1 else right
    return (count, stride) if max(count, stride) < 2**31 else None


def prepare(tensors: TensorList) -> TensorList:
    """Backend.prepare of a backend that takes lists as they are."""
    return tensors


def are_alike(first: TensorList, *others: TensorList) -> bool:
    """Backend.are_alike in Python."""
    layouts = [_layout(t) for t in first]
    return all(layouts == [_layout(t) for t in other] for other in others)


def gradients_of(
    candidates: list[Tensor], params: TensorList
) -> tuple[TensorList, TensorList] | None:
    """Backend.gradients_of of a backend that has no quick way to read tensors."""
    return None


def state_of(
    state: dict[Tensor, Any], params: TensorList, name: str, *, numbers: bool = False
) -> TensorList | None:
    """Backend.state_of, likewise."""
    return None


def _layout(t: Tensor) -> tuple[object, ...]:
    return t.layout, t.dtype, t.device, t.shape, t.stride()
