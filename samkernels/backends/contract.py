"""Define what a backend implements, the values that go in and out, and what most backends share.

A backend is a module with the functions of `Backend`. Its lists are validated by samkernels.ops:
tensor i of every list has the same shape, dtype, device and dense layout, and no two tensors that
are written overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

TensorList = list[Tensor] | tuple[Tensor, ...]


# The functions that Mix computes of each element.
FUNCTIONS = ("linear", "sign", "damp", "product")


class Dots(NamedTuple):
    """Holds sums over all elements of one to three lists x, y, z: float64, on their device.

        x                  x.x
        x, with weights    |T x|^2, x.x                   T = |weights| + eta
        x, y               x.x, x.y, y.y
        x, y, z            x.x, x.y, y.y, z.z, [|y| > |x|], [x * y > 0]

    Sums of the parts of a tensor that lie in several processes add up to those of the whole.

    Attributes:
        total: the sums over all tensors, shape (s,).
        per_tensor: those of each tensor of the lists, shape (n, s).
    """

    total: Tensor
    per_tensor: Tensor


class Mix(NamedTuple):
    """Describes a combination of one or two lists, such as what takes the gradient's place.

        "linear"     a * x + b * y;  a * x without y
        "sign"       a * |x| * sign(y),  sign(0) = 0
        "damp"       a * x where 0 < x / (y + 1e-8) < 1, else x
        "product"    a * x * y

    The result is divided by `divisor` if that is given. a and b are numbers, or tensors of shape ()
    or (n,), one for each tensor of the lists, in float32, or float64 for float64 lists. If
    ascent_square is given and has no finite root in that dtype, or found_inf is given and not 0,
    the step is skipped.
    """

    x: TensorList
    y: TensorList | None = None
    a: float | Tensor = 1.0
    b: float | Tensor = 1.0
    function: str = "linear"
    divisor: Tensor | None = None  # shape (), as all below; of the dtype of a and b
    ascent_square: Tensor | None = None  # float64
    found_inf: Tensor | None = None  # of the dtype of a and b

    def takes_place(self) -> Tensor | None:
        """Return on the device whether the step is made; None if nothing can skip it."""
        takes = None
        if self.ascent_square is not None:
            takes = norm_of(self.ascent_square, self.x[0].dtype).isfinite()
        if self.found_inf is None:
            return takes
        return self.found_inf == 0 if takes is None else takes & (self.found_inf == 0)


def norm_of(square: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the root of a sum of squares, as steps on lists of this dtype take it."""
    return square.sqrt().to(torch.promote_types(dtype, torch.float32))


class SgdOptions(NamedTuple):
    """Holds the hyperparameters of torch.optim.SGD.

    init_momentum says that the buffers hold nothing yet. In a step that is skipped they become 0,
    and the next step is a first one again, with 1 in the place of 1 - dampening.
    """

    # A tensor of shape () on the lists' device, float32 (float64), is read there.
    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    init_momentum: bool
    one_minus_dampening: Tensor | None = None  # as lr; in the place of 1 - dampening


class AdamOptions(NamedTuple):
    """Holds the hyperparameters of torch.optim.Adam and AdamW."""

    lr: float | Tensor  # as in SgdOptions
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool  # weight decay as in AdamW
    maximize: bool


class Backend(Protocol):
    """Names the functions of a backend module; samkernels.ops says what each one computes."""

    def why_unavailable(
        self, device: torch.device, dtype: torch.dtype, dense: bool
    ) -> str | None: ...

    def prepare(self, tensors: TensorList) -> TensorList:
        """Return the list in the form that this backend works with, for several calls. It is good
        for as long as no tensor in it gets other memory."""

    def are_alike(self, first: TensorList, *others: TensorList) -> bool:
        """Say whether tensor i of all lists has the same dtype, device, shape and order in memory.
        False may also mean that strides differ where it does not matter."""

    def gradients_of(
        self, candidates: list[Tensor], params: TensorList
    ) -> tuple[TensorList, TensorList] | None:
        """Return `params`, a prepared list of the last step, as it is now; and its gradients.

        Returns None if anything but addresses may have changed: `params` are not just those of
        `candidates` that have a gradient, a tensor is of a subclass, a gradient is laid out in
        another way than its parameter. The caller looks at each of them then."""

    def state_of(
        self, state: dict[Tensor, Any], params: TensorList, name: str, *, numbers: bool = False
    ) -> TensorList | None:
        """Return state[p][name] of all params, prepared. Return None if one is missing, of a
        subclass or laid out in another way than its parameter; or, if they are numbers, if one is
        not of shape (), not float32 or float64, or on another device."""

    def versions_of(self, tensors: TensorList) -> list[int]:
        """Return the `_version` of each tensor: how often it has been written."""

    def dots(
        self, lists: Sequence[TensorList], weights: TensorList | None = None, eta: float = 0.0
    ) -> Dots:
        """Read each list once. Weights come with one list only."""

    def perturb_(
        self,
        params: TensorList,
        direction: TensorList,
        old_params: TensorList,
        *,
        square: Tensor,  # |T d|^2, float64, shape () or (n,)
        rho: float | Tensor,  # as SgdOptions.lr, or of shape (n,); negative: against d
        eta: float | None,  # T = |w| + eta; None: T = 1
        eps: float,
        rounds_at_random: bool,  # bfloat16 parameters: see rounding.py
        journal: list[bool] | None,
        saves: bool = True,
    ) -> None:
        """Set old_params = w and params = w + rho / (sqrt(square) + eps) * T^2 * d.

        A square that is 0 or has no finite root, as in Mix, moves nothing of its tensor.
        `direction` may be `old_params`. Unless the function `saves`, w is what old_params holds,
        and what params holds is not read. The function need not tell autograd that old_params were
        written: optimizers keep them to themselves.

        The function appends True to the journal when all of old_params holds w: before the first
        parameter moves, or in one go with that. An interrupted caller knows then whether to
        restore."""

    def restore_(self, params: TensorList, old_params: TensorList) -> None: ...

    def mix_(self, out: TensorList, mix: Mix, *, keeps: bool = False) -> None:
        """Set out = u. Where the step is skipped, out stays what it was if the function `keeps`, as
        state of an optimizer has to, and else becomes 0. `out` may be one of the lists that are
        read."""

    def sgd_(
        self,
        params: TensorList,
        old_params: TensorList,
        momentum_buffers: TensorList | None,
        mix: Mix,
        options: SgdOptions,
        journal: list[bool] | None = None,
    ) -> None:
        """Update the lists, as all updates do with a journal: append True to it when everything is
        updated, in one go with that, or append False before the first list is written. An
        interrupted caller knows then whether nothing was (it is empty), everything was (it ends
        with True), or something (False alone)."""

    def sgd_hess_(
        self,
        params: TensorList,
        grads: TensorList,
        hessian_products: TensorList,
        momentum_buffers: TensorList | None,
        rho: float | Tensor,  # as SgdOptions.lr
        options: SgdOptions,
        journal: list[bool] | None = None,
    ) -> None:
        """Update tensors of which `positions_of` is not None."""

    def adam_(
        self,
        params: TensorList,
        old_params: TensorList,
        exp_avgs: TensorList,
        exp_avg_sqs: TensorList,
        steps: TensorList,  # shape (), float32 or float64: of each tensor, before this step
        mix: Mix,
        options: AdamOptions,
        journal: list[bool] | None = None,
    ) -> None: ...


def positions_of(tensor: Tensor) -> tuple[int, int] | None:
    """Return the number of a 4-D tensor's spatial positions, in dimensions 2 and 3, and the stride
    from one to the next; (1, 1) for any other tensor. Return None if there is no such stride, or if
    either number is above int32."""
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


def note(journal: list[bool] | None, is_done: bool) -> None:
    """Append to the journal of an update that Python may interrupt between two instructions."""
    if journal is not None:
        journal.append(is_done)


def prepare(tensors: TensorList) -> TensorList:
    """Implement Backend.prepare for a backend that takes lists as they are."""
    return tensors


def are_alike(first: TensorList, *others: TensorList) -> bool:
    """Implement Backend.are_alike in Python."""
    layouts = [_layout(t) for t in first]
    return all(layouts == [_layout(t) for t in other] for other in others)


def gradients_of(
    candidates: list[Tensor], params: TensorList
) -> tuple[TensorList, TensorList] | None:
    """Implement Backend.gradients_of for a backend that has no quick way to read tensors."""
    return None


def state_of(
    state: dict[Tensor, Any], params: TensorList, name: str, *, numbers: bool = False
) -> TensorList | None:
    """Implement Backend.state_of for such a backend."""
    return None


def versions_of(tensors: TensorList) -> list[int]:
    """Implement Backend.versions_of for such a backend."""
    return [t._version for t in tensors]


def _layout(t: Tensor) -> tuple[object, ...]:
    return t.layout, t.dtype, t.device, t.shape, t.stride()
