"""Find extreme eigenvalues of a symmetric operator, on the device that its vectors are on."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from train.shared.errors import NumericsError

SUBSPACE = 24  # the subspace has at least so many vectors; ARPACK's own choice is 20
MAX_PRODUCTS = 2000
CHECK_EVERY = 2  # so many products pass from one check of convergence to the next


def extreme_eigenvalues(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    number: int,
    which: str,
    *,
    tolerance: float,
    each: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return some eigenvalues, by Lanczos with full reorthogonalisation and thick restarts.

    The projection of the operator on what the products span has eigenvalues theta with residuals
    r = ||A y - theta y||. The iteration ends when all wanted eigenvalues have

        r <= max(tolerance |theta|, 10 eps max |theta|),

    which is ARPACK's criterion, with a floor for the rounding of the products. Where the start
    vector's products span no more, random vectors fill the subspace, so that an eigenvalue comes
    with its multiplicity.

    Args:
        product: a function that multiplies a vector (N,) by the operator.
        start: a vector (N,), floating point, not 0; a random one is best.
        which: LA: the largest eigenvalues; SA: the smallest; LM: the largest in magnitude.
        each: a function that is called after each product.

    Returns:
        float64 (number,) on the CPU, in ascending order; (N,) where N is less than number.

    Raises:
        NumericsError: a product is not finite, or MAX_PRODUCTS were not enough.

    Source: Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000), 602.
    """
    size = len(start)
    number = min(number, size)
    rows = min(max(SUBSPACE, 2 * number + 4), size)
    keep = number + (rows - number) // 3
    eps = torch.finfo(start.dtype).eps
    basis = start.new_empty(rows + 1, size)
    basis[0] = start / start.norm()
    # Of the columns that Lanczos fills, the upper triangle is that of the projection.
    projection = torch.zeros(rows, rows, dtype=torch.float64)
    done, products = 0, 0
    while True:
        exhausted = False
        for column in range(done, rows):
            vector = product(basis[column])
            products += 1
            each()
            coefficients, norm = _orthogonalise(vector, basis[: column + 1])
            projection[: column + 1, column] = coefficients
            if not math.isfinite(norm):
                raise NumericsError("the Hessian is not finite at these weights: no eigenvalues")
            if norm <= eps**0.6 * float(coefficients.norm()):
                # The products span no more: a random vector reaches the rest of the space.
                exhausted, norm = True, 0.0
                generator = torch.Generator(start.device).manual_seed(column)
                vector.normal_(generator=generator)
                vector /= _orthogonalise(vector, basis[: column + 1])[1]
                basis[column + 1] = vector
            else:
                torch.div(vector, norm, out=basis[column + 1])
            filled = column + 1
            if filled < rows and (filled < number or filled % CHECK_EVERY or exhausted):
                continue
            values, vectors, residuals = _ritz(projection, filled, norm)
            order = _wanted_first(values, which)
            wanted = order[:number]
            allowed = torch.maximum(tolerance * values.abs(), 10 * eps * values.abs().max())
            if filled == size or (residuals <= allowed)[wanted].all():
                return values[wanted].sort().values
        if products >= MAX_PRODUCTS:
            raise NumericsError(
                f"the eigenvalues did not converge in {products} products: residuals "
                f"{residuals[wanted].tolist()} of {values[wanted].tolist()}"
            )
        # Restart with the best Ritz vectors, and with the direction of the last residual.
        kept = order[:keep]
        turn = vectors[:, kept].T.to(start)
        for part in torch.arange(size).split(1 << 22):
            columns = slice(int(part[0]), int(part[-1]) + 1)
            basis[:keep, columns] = turn @ basis[:rows, columns]
        basis[keep] = basis[rows]
        projection.zero_()
        projection[:keep, :keep] = torch.diag(values[kept])
        done = keep


def _orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, float]:
    """Remove from the vector, in place, its part along the basis.

    Returns:
        the coefficients of that part, float64 on the CPU, and the norm of the rest.
    """
    total = torch.zeros(len(basis), dtype=torch.float64)
    before, norm = math.inf, float(vector.norm())
    # This is repeated where much was removed: the rest has the rounding of the whole vector.
    for _ in range(4):
        if norm > 0.5 * before or norm == 0:
            break
        coefficients = basis @ vector
        torch.addmv(vector, basis.T, coefficients, alpha=-1, out=vector)
        total += coefficients.double().cpu()
        before, norm = norm, float(vector.norm())
    return total, norm


def _ritz(projection: Tensor, filled: int, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of the projection, and the residuals of the pairs."""
    upper = projection[:filled, :filled].triu()
    values, vectors = torch.linalg.eigh(upper + upper.triu(1).T)
    return values, vectors, norm * vectors[-1].abs()


def _wanted_first(values: Tensor, which: str) -> Tensor:
    keys = {"LA": -values, "SA": values, "LM": -values.abs()}
    return keys[which].argsort()
