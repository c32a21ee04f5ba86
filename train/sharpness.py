"""Sharpness: the largest eigenvalue of the Hessian of the training loss."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def hessian_operator(model: nn.Module, batches: Sequence[Batch]) -> LinearOperator:
    """v -> H v, where H is the Hessian of the mean cross-entropy over all images of the batches.

    By double backward, one batch at a time; all parameters that require gradients, in the order
    of model.parameters(). The model's mode (train or eval) is the caller's business.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    count = sum(len(labels) for _, labels in batches)
    size = sum(p.numel() for p in params)

    def matvec(vector: np.ndarray) -> np.ndarray:
        flat = torch.from_numpy(vector.ravel().copy()).to(params[0])
        parts = flat.split([p.numel() for p in params])
        pieces = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
        product = torch.zeros_like(flat)
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels, reduction="sum") / count
            grads = torch.autograd.grad(loss, params, create_graph=True)
            slope = torch.stack([(g * v).sum() for g, v in zip(grads, pieces, strict=True)]).sum()
            # A parameter in which the slope is linear has no path to it: its product is 0.
            rows = torch.autograd.grad(slope, params, materialize_grads=True)
            product += torch.cat([row.reshape(-1) for row in rows])
        return product.cpu().numpy()

    dtype = torch.empty(0, dtype=params[0].dtype).numpy().dtype
    return LinearOperator((size, size), matvec=matvec, dtype=dtype)


def lambda_max(
    model: nn.Module, batches: Sequence[Batch], tolerance: float = 1e-3, seed: int = 0
) -> float:
    """The largest (not largest in magnitude) eigenvalue of the Hessian, in eval mode.

    Args:
        model: its mode is put back afterwards; weights and gradients are not touched.
        batches: normalised images and labels; the loss is their mean cross-entropy, without
            weight decay.
        tolerance: relative, of the eigenvalue (scipy.sparse.linalg.eigsh).
        seed: of the start vector.
    """
    training = model.training
    model.eval()
    try:
        operator = hessian_operator(model, batches)
        rng = np.random.default_rng(seed)
        start = rng.standard_normal(operator.shape[0]).astype(operator.dtype)
        values = eigsh(
            operator, k=1, which="LA", tol=tolerance, v0=start, return_eigenvectors=False
        )
    finally:
        model.train(training)
    return float(values[0])
