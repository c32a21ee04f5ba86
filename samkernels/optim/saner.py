"""SANER: SAM, damped where it is prone to noise."""

from samkernels.optim._rule import Combination, Lists, Option, Products, options
from samkernels.optim.sam import SAM


class SANER(SAM):
    """SAM whose update damps the elements that the perturbation has made smaller.

        u = (1 - alpha) * g2 where 0 < g2 / (g1 + 1e-8) < 1, else g2

    alpha rises from 0 over 50 epochs in the paper: write group["alpha"]. The authors' code calls
    1 - alpha alpha; their SANER(params, rho, adaptive, alpha, lr=...) is
    SANER(params, torch.optim.SGD, rho, adaptive, alpha=1 - alpha, lr=...) here.

    Args:
        alpha: a finite number; 0 is SAM.

    Source: Luong et al., arXiv:2411.17132.
    """

    default_rho = 0.1
    own_options = options(alpha=Option(0.5))
    keeps_g1 = True

    def mix(self, x: Lists, dots: Products) -> Combination:
        return Combination("g2", "g1", a=1 - x.option("alpha"), function="damp")
