"""ASAM as its authors wrote it."""

from samkernels.optim._rule import options
from samkernels.optim.sam import SAM


def is_weight(name: str) -> bool:
    """Say whether the authors' code scales a parameter of this name."""
    return "weight" in name


class ASAM(SAM):
    """SAM scaled by |w| + eta where the parameter's name has "weight", and by 1 elsewhere.

        e(w) = rho * T^2 * g1 / (||T g1|| + 1e-12),  T = |w| + eta, or 1

    It needs model.named_parameters(), unless `scaled` says which parameters are scaled. The other
    convention, davda54's, scales all parameters by |w|: SAM(..., adaptive=True). The authors' call
    ASAM(optimizer, model, rho, eta) is ASAM(model.named_parameters(), optimizer, rho, eta) here.

    rho 0.5 is for CIFAR-10, 1 for CIFAR-100; the authors' script has eta 0, their class 0.01.

    Source: Kwon et al., arXiv:2102.11600.
    """

    positional = ("rho", "eta")
    default_rho = 0.5
    axes = options(scaling="elementwise", eta=0.01, scaled=is_weight)
