"""Sharpness against a dense Hessian."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from train.sharpness import Batch, hessian_operator, lambda_max


def tiny(dtype: torch.dtype) -> tuple[nn.Module, list[Batch]]:
    """41 parameters, batch norm included; two batches of different size."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1, bias=False))
    model = nn.Sequential(*layers, nn.Linear(1, 2)).to(dtype)
    images = 3 * torch.randn(12, 4, dtype=dtype)
    model(images)  # in training mode: running statistics that are not the initial ones
    labels = torch.randint(0, 2, (12,))
    return model, [(images[:8], labels[:8]), (images[8:], labels[8:])]


def dense_hessian(model: nn.Module, batches: list[Batch]) -> np.ndarray:
    names, params = zip(*model.named_parameters(), strict=True)
    images = torch.cat([x for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    sizes = [p.numel() for p in params]

    def loss(flat: Tensor) -> Tensor:
        pieces = [x.view_as(p) for x, p in zip(flat.split(sizes), params, strict=True)]
        return F.cross_entropy(
            functional_call(model, dict(zip(names, pieces, strict=True)), (images,)), labels
        )

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    return torch.autograd.functional.hessian(loss, flat).numpy()


def test_hessian_vector_products_are_the_dense_ones() -> None:
    model, batches = tiny(torch.float64)
    model.eval()
    dense = dense_hessian(model, batches)
    operator = hessian_operator(model, batches)
    product = operator.matmat(np.eye(operator.shape[0]))
    np.testing.assert_allclose(product, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-3), (torch.float32, 1e-3)])
def test_lambda_max_is_the_dense_one(dtype: torch.dtype, rtol: float) -> None:
    model, batches = tiny(dtype)
    model.eval()
    eigenvalues = np.linalg.eigvalsh(dense_hessian(model, batches))
    assert eigenvalues[-1] > 0 and eigenvalues[-1] > eigenvalues[-2] + 1e-3
    np.testing.assert_allclose(lambda_max(model, batches), eigenvalues[-1], rtol=rtol)


def test_the_largest_not_the_largest_in_magnitude() -> None:
    """Eigenvalues -10, 0 and 1: the loss of logits (s, 0) with label 0 has slope -1/2 at s = 0."""

    class Saddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            s = 10 * self.w[0] ** 2 - self.w[1] ** 2
            return torch.stack([s.expand(len(x)), torch.zeros(len(x))], dim=1)

    batches = [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))]
    np.testing.assert_allclose(lambda_max(Saddle(), batches), 1.0, rtol=1e-3)


def test_model_is_left_as_it_was() -> None:
    model, batches = tiny(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lambda_max(model, batches)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
