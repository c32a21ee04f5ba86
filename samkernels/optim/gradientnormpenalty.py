"""GradientNormPenalty: the norm of the gradient as a penalty."""

from samkernels.optim._rule import EPS, Combination, Lists, Option, Products, linear, options
from samkernels.optim.sam import SAM


class GradientNormPenalty(SAM):
    """A penalty on ||g1||, whose gradient is a finite difference along g1.

        u = (1 - alpha) * g1 + alpha * g2

    rho is the paper's r, alpha its lambda / r; 0.1 and 0.8 are for CIFAR, rho 0.05 for ImageNet.

    Args:
        alpha: a finite number; 1 is SAM, 0 is the base optimizer.
        normed: (1 - alpha) * g1 / (n1 + 1e-12) in the place of the first term, as the authors' code
            has it by default (norm_perturbations): another trajectory.

    Source: Zhao et al., arXiv:2202.03599.
    """

    default_rho = 0.1
    own_options = options(alpha=Option(0.8), normed=Option(False))
    keeps_g1 = True

    def mix(self, x: Lists, dots: Products) -> Combination:
        alpha = x.option("alpha")
        share = (
            (1 - alpha) * dots.scale / (dots.norm("g1") + EPS) if x.option("normed") else 1 - alpha
        )
        return linear(g1=share, g2=alpha)
