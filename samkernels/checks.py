"""Check arguments before anything is written. Errors name the argument, the tensor's index and what
to do."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from samkernels.backends.contract import FUNCTIONS, Mix, TensorList

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_sgd_options(
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    in_step: bool = False,
) -> None:
    """Raise TypeError or ValueError unless these are hyperparameters of SGD; in_step: or what
    schedules may make of them, which torch.optim.SGD's step takes, but not its constructor."""
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        check_non_negative(name, value)
    check_hyperparameter("lr", lr, signed=in_step)
    check_number("dampening", dampening)
    for name, flag in (("nesterov", nesterov), ("maximize", maximize)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {type(flag).__name__}: give True or False")
    if nesterov and (momentum == 0 or dampening != 0) and not in_step:
        raise ValueError("nesterov=True: momentum must be above 0 and dampening 0")


def check_adam_options(
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
    in_step: bool = False,
) -> None:
    """Raise TypeError or ValueError unless these are hyperparameters of Adam; in_step: lr may be
    below 0, as `check_sgd_options` says."""
    check_hyperparameter("lr", lr, signed=in_step)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas is {betas!r}: give a pair of numbers")
    for i, beta in enumerate(betas):
        check_non_negative(f"betas[{i}]", beta)
        if beta >= 1:
            raise ValueError(f"betas[{i}]={beta}: give a number below 1")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        check_non_negative(name, value)
    flags = {"decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is {type(flag).__name__}: give True or False")


def signed_rho(rho: float | Tensor, maximize: bool, *, like: Tensor) -> float | Tensor:
    """Return rho as backends take it: negative to go against the gradient. Raise as
    `hyperparameter` does."""
    rho = hyperparameter("rho", rho, like)
    return -rho if maximize else rho


def hyperparameter(
    name: str, value: float | Tensor, like: Tensor, *, signed: bool = False
) -> float | Tensor:
    """Return a number as backends take it: a float, or a tensor of shape () beside `like`."""
    check_hyperparameter(name, value, signed=signed)
    if not isinstance(value, Tensor):
        _check_range(name, value, like)
        return float(value)
    if value.device.type == "cpu" and like.device.type != "cpu":
        return value.item()
    if value.device != like.device:
        raise ValueError(
            f"{name} is on {value.device}: give a number, or a tensor on {like.device}"
        )
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    return value.detach().resolve_neg().reshape(()).to(dtype)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless value is one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(map(repr, allowed))}")


def check_number(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless this is a finite number."""
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        raise TypeError(f"{name} is {type(value).__name__}: give a number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: give a finite number")


def check_whole(
    name: str, value: int, low: float, bits: int | None = None, where: str = ""
) -> None:
    """Raise TypeError or ValueError unless this is an int from `low` that so many bits hold;
    `where` says where it was found."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}{where} is {type(value).__name__}: give a whole number")
    if value < low or (bits is not None and value >= 2**bits):
        limit = "" if bits is None else f" to 2^{bits} - 1"
        raise ValueError(f"{name}={value}{where}: give a whole number from {low}{limit}")


def check_non_negative(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless this is a finite number >= 0."""
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name}={value}: give a finite number >= 0")


def _check_range(name: str, value: float, like: Tensor) -> None:
    if abs(value) > torch.finfo(torch.float32).max and like.dtype is not torch.float64:
        raise ValueError(f"{name}={value}: give a number that float32 can hold")


def check_hyperparameter(name: str, value: float | Tensor, *, signed: bool = False) -> None:
    """Raise TypeError or ValueError unless this is a finite number >= 0 (any one, if it is signed),
    or a tensor of one element; what is on a device is not looked at."""
    check = check_number if signed else check_non_negative
    if not isinstance(value, Tensor):
        return check(name, value)
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(
            f"{name} is a tensor of shape {tuple(value.shape)} and {value.dtype}: give a number or "
            "a floating-point tensor of one element"
        )
    if value.device.type == "cpu" and has_address(value):
        check(name, value.item())


def check_positive(name: str, value: float) -> None:
    """Raise TypeError or ValueError unless this is a finite number > 0."""
    check_non_negative(name, value)
    if value == 0:
        raise ValueError(f"{name}=0: give a finite number > 0")


def check_scalar(
    name: str,
    value: object,
    tensors: TensorList,
    *,
    per_tensor: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise TypeError or ValueError unless this is a tensor of shape (), or (n,) where there may be
    one number for each of the tensors, on their device; of the dtype of their arithmetic if none
    is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}: give a torch.Tensor")
    if dtype is None:
        dtype = torch.float64 if tensors[0].dtype is torch.float64 else torch.float32
    shapes: list[tuple[int, ...]] = [(), (len(tensors),)] if per_tensor else [()]
    if value.shape not in shapes or value.dtype is not dtype or value.device != tensors[0].device:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, {value.dtype} on {value.device}: give shape "
            f"{' or '.join(map(str, shapes))}, {dtype} on {tensors[0].device}"
        )
    if value.is_neg():
        raise ValueError(f"{name} is negated when it is read: give {name}.resolve_neg()")


def lists_of(mix: Mix) -> dict[str, TensorList]:
    """Return the lists of a mix by name. Raise TypeError or ValueError if it lacks one."""
    if not isinstance(mix, Mix):
        raise TypeError(f"mix is {type(mix).__name__}: give samkernels.ops.Mix(gradients)")
    check_choice("mix.function", mix.function, FUNCTIONS)
    if mix.y is not None:
        return {"mix.x": mix.x, "mix.y": mix.y}
    if mix.function != "linear":
        raise ValueError(f'mix.y is missing: function="{mix.function}" takes two lists')
    return {"mix.x": mix.x}


def check_scalars_of(mix: Mix) -> None:
    """Raise TypeError or ValueError unless the numbers of a mix suit its lists."""
    for name, value in (("mix.a", mix.a), ("mix.b", mix.b)):
        if isinstance(value, Tensor):
            check_scalar(name, value, mix.x, per_tensor=True)
        else:
            check_number(name, value)
            _check_range(name, value, mix.x[0])
    if (mix.y is None or mix.function != "linear") and (
        isinstance(mix.b, Tensor) or mix.b != Mix._field_defaults["b"]
    ):
        raise ValueError('mix.b is given: only function="linear" with mix.y reads it')
    for name in ("divisor", "found_inf"):
        if getattr(mix, name) is not None:
            check_scalar(f"mix.{name}", getattr(mix, name), mix.x)
    if mix.ascent_square is not None:
        check_scalar("mix.ascent_square", mix.ascent_square, mix.x, dtype=torch.float64)


def check_steps(steps: TensorList, params: TensorList) -> None:
    """Raise TypeError or ValueError unless these are step counts, one for each parameter."""
    if not isinstance(steps, (list, tuple)):
        raise TypeError(f"steps is {type(steps).__name__}: give a list of tensors")
    if len(steps) != len(params):
        raise ValueError(
            f"steps has {len(steps)} tensors and params has {len(params)}: give lists of equal "
            "length"
        )
    for i, step in enumerate(steps):
        check_step(f"steps[{i}]", step, params[i])
    check_disjoint("steps", steps)


def check_step(name: str, step: object, param: Tensor) -> None:
    """Raise TypeError or ValueError unless this is a step count that lies beside a parameter."""
    if not isinstance(step, Tensor):
        raise TypeError(f"{name} is {type(step).__name__}: give a torch.Tensor")
    fits = step.shape == () and step.dtype in (torch.float32, torch.float64)
    if not fits or step.device != param.device:
        raise ValueError(
            f"{name} has shape {tuple(step.shape)}, {step.dtype} on {step.device}: give shape (), "
            f"torch.float32 on {param.device}"
        )


def check_lists(lists: Mapping[str, TensorList], written: Sequence[str]) -> None:
    """Raise TypeError or ValueError unless the lists go together (see the top of samkernels.ops)
    and no tensor of those that are `written` shares memory with another one."""
    first_name, first_list = next(iter(lists.items()))
    for name, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} is {type(tensors).__name__}: give a list of tensors")
        if len(tensors) != len(first_list):
            raise ValueError(
                f"{name} has {len(tensors)} tensors and {first_name} has {len(first_list)}: "
                "give lists of equal length"
            )
        for i, tensor in enumerate(tensors):
            check_tensor(f"{name}[{i}]", tensor)
    if not first_list:
        raise ValueError(f"{first_name} is empty: give at least one tensor")

    for i, expected in enumerate(first_list):
        if expected.device != first_list[0].device or expected.dtype != first_list[0].dtype:
            raise ValueError(
                f"{first_name}[{i}] is {expected.dtype} on {expected.device} and {first_name}[0] "
                f"is {first_list[0].dtype} on {first_list[0].device}: call once per device and "
                "dtype"
            )
        for name, tensors in lists.items():
            check_matches(f"{name}[{i}]", tensors[i], f"{first_name}[{i}]", expected)
    _check_overlap(lists, written)


def check_tensor(name: str, tensor: object) -> None:
    """Raise unless `tensor` is a strided tensor of a supported dtype without overlap inside."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}: give a torch.Tensor")
    shape = tuple(tensor.shape)
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} of shape {shape} is sparse ({tensor.layout}): only dense tensors are "
            "supported; for an embedding, set sparse=False"
        )
    if tensor.dtype not in DTYPES:
        allowed = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name} of shape {shape} is {tensor.dtype}: give one of {allowed}")
    if overlaps_itself(tensor):
        raise ValueError(
            f"{name} of shape {shape} and strides {tensor.stride()} overlaps itself in memory: "
            "give a copy (.contiguous())"
        )


def check_disjoint(name: str, tensors: TensorList) -> None:
    """Raise ValueError if two of the tensors share memory, or are the same."""
    _check_overlap({name: tensors}, (name,))


def check_matches(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless shape, dtype, device and layout are those of another tensor."""
    for what, value, expected in (
        ("shape", tuple(tensor.shape), tuple(other.shape)),
        ("dtype", tensor.dtype, other.dtype),
        ("device", tensor.device, other.device),
    ):
        if value != expected:
            raise ValueError(
                f"{name} has {what} {value} and {other_name} has {expected}: they must agree "
                f"(shape {tuple(tensor.shape)})"
            )
    if not same_layout(tensor, other):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()} and "
            f"{other_name} has {other.stride()}: they must agree "
            f"(torch.empty_like({other_name}).copy_(..) makes them)"
        )


def _check_overlap(lists: Mapping[str, TensorList], written: Sequence[str]) -> None:
    """Raise ValueError if a tensor that is written shares memory with another one.

    A tensor that is read may be the very tensor at the same index of a list that is written.
    Tensors with gaps (slices) are told apart by their first address only: their ranges may
    interleave.
    """
    ranges: dict[tuple[int, int, int], tuple[str, bool]] = {}
    for list_name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            start = tensor.data_ptr() if has_address(tensor) else 0
            size = tensor.numel() if is_dense(tensor) else min(1, tensor.numel())
            if size == 0 or start == 0:
                continue
            key = (start, start + size * tensor.element_size(), i)
            name, is_written = f"{list_name}[{i}]", list_name in written
            other_name, other_written = ranges.get(key, (name, False))
            if is_written and other_written:
                _raise_overlap(other_name, name, tensor)
            ranges[key] = (name, is_written or other_written)

    end_of_any = end_of_written = 0
    last_any = last_written = ""
    for (start, end, i), (name, is_written) in sorted(ranges.items()):
        if start < end_of_written:
            _raise_overlap(last_written, name, next(iter(lists.values()))[i])
        if is_written and start < end_of_any:
            _raise_overlap(last_any, name, next(iter(lists.values()))[i])
        if end > end_of_any:
            end_of_any, last_any = end, name
        if is_written and end > end_of_written:
            end_of_written, last_written = end, name


def _raise_overlap(name: str, other_name: str, tensor: Tensor) -> None:
    raise ValueError(
        f"{name} and {other_name} (shape {tuple(tensor.shape)}) overlap in memory: "
        "give tensors of their own"
    )


def overlaps_itself(tensor: Tensor) -> bool:
    """Say whether two of its elements share memory."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def has_address(tensor: Tensor) -> bool:
    """Say whether its elements lie where data_ptr() says.

    They do not in meta and fake tensors, which have none, nor in wrappers such as DTensor, whose
    elements lie in the tensors they wrap.
    """
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor.device.type != "meta"
    if is_traceable_wrapper_subclass(tensor) or tensor.untyped_storage().device.type == "meta":
        return False
    return tensor.data_ptr() != 0 or tensor.numel() == 0


def is_dense(tensor: Tensor) -> bool:
    """Say whether the elements fill their memory without gaps or overlap, in whatever order of
    dimensions.

    Tensors without address do not, nor do views that PyTorch negates when it reads them.
    """
    if tensor.is_neg() or not has_address(tensor):
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors of equal shape keep their elements in the same order. The strides of
    dimensions of size 1 are moot."""
    if a.stride() == b.stride() or a.numel() == 0:
        return True
    pairs = zip(a.stride(), b.stride(), a.shape, strict=True)
    return all(stride_a == stride_b or size == 1 for stride_a, stride_b, size in pairs)
