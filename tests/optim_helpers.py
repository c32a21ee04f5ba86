"""What the tests of the optimizers share: the optimizers, small models, gradients on demand."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from samkernels import SAM, SGDHess

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """A copy of the elements as integers: nan equals nan, and 0.0 differs from -0.0."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copy.view(INTEGERS[copy.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def snapshot(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def unchanged(params: Iterable[Tensor], before: Sequence[Tensor]) -> bool:
    return all(same_bits(p, b) for p, b in zip(params, before, strict=True))


class ConvNet(nn.Module):
    """Convolutions, batch norm and a linear layer: 372 parameters in 8 tensors."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
            self.norm1 = nn.BatchNorm2d(4)
            self.conv2 = nn.Conv2d(4, 6, 3, stride=2, bias=False)
            self.norm2 = nn.BatchNorm2d(6)
            self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))

    def groups(self) -> list[list[nn.Parameter]]:
        """Weights, and what usually gets another weight decay: normalisation and biases."""
        parameters = list(self.parameters())
        return [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]]


def images(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 5, 5, generator=generator)
    return x, torch.randint(4, (size,), generator=generator)


def linear(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """58 parameters in 4 tensors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return model.to(dtype)


def set_gradients(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> list[Tensor]:
    """Random gradients in `.grad`, instead of a backward pass; returns copies of them."""
    generator = torch.Generator().manual_seed(seed)
    copies = []
    for p in params:
        grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
        p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)
        copies.append(p.grad.clone())
    return copies


def backward(optimizer: SAM | SGDHess, loss: Tensor) -> None:
    optimizer.backward(loss) if isinstance(optimizer, SGDHess) else loss.backward()


def take_step(optimizer: SAM | SGDHess, seed: int) -> None:
    """A whole step with random gradients for all parameters."""
    params = parameters_of(optimizer)
    if isinstance(optimizer, SGDHess):
        factors = [factor.detach() for factor in set_gradients(params, seed)]
        optimizer.zero_grad()
        # Random numbers and w for a gradient, v for a Hessian-vector product.
        losses = [(p * (f + p / 2)).sum() for p, f in zip(params, factors, strict=True)]
        optimizer.backward(torch.stack([loss.double() for loss in losses]).sum())
        optimizer.step()
        optimizer.zero_grad()
        return
    set_gradients(params, 2 * seed)
    optimizer.first_step()
    set_gradients(params, 2 * seed + 1)
    optimizer.second_step(zero_grad=True)


def assert_equal(a: Any, b: Any) -> None:
    """Of state_dicts and the like: the same, tensors bit for bit and in the same dtype."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert same_bits(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def parameter(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def through_a_file(content: Any) -> Any:
    """What a checkpoint goes through."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def count_calls(function: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """The function, and a list that grows by one with each call."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        return function(*args, **kwargs)

    return counted, calls


def plain_sam_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    compute: Callable[[], Any],
    rho: float,
    recombine: Callable[[Tensor, Tensor], Tensor] = lambda g1, g2: g2,
) -> None:
    """A step of SAM as its paper writes it, with nothing of samkernels: `compute` makes a forward
    and a backward pass, and the optimizer is the base optimizer. A group may have its own rho, or
    sam_rho."""
    rhos = {
        p: group.get("sam_rho", group.get("rho", rho))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    model.zero_grad()
    compute()
    grads = {p: p.grad for p in rhos if p.grad is not None}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm() + 1e-12
    old = {p: p.detach().clone() for p in grads}
    with torch.no_grad():
        for p, grad in grads.items():
            p.add_(grad / norm, alpha=rhos[p])
    model.zero_grad()
    compute()
    with torch.no_grad():
        for p, grad in grads.items():
            p.copy_(old[p])
            p.grad = recombine(grad, p.grad)
    optimizer.step()
    model.zero_grad()
