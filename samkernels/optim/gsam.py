"""GSAM: surrogate gap guided SAM."""

from samkernels.optim._rule import EPS, Combination, Lists, Option, Products, linear, options
from samkernels.optim.sam import SAM


class GSAM(SAM):
    """SAM whose update leaves out a share of the part of g1 that is orthogonal to g2.

        u = g2 - alpha * (g1 - c * g2),  c = g1.g2 / (n1 n2 + 1e-12) * n1 / (n2 + 1e-12)

    With adaptive=True only the perturbation is scaled. The paper lets rho follow lr: give a
    `ProportionScheduler` as rho. The authors' GSAM(params, base, model, gsam_alpha, rho_scheduler)
    is GSAM(params, base, rho=rho_scheduler, alpha=gsam_alpha) here.

    Args:
        alpha: a finite number; 0 is SAM.

    Source: Zhuang et al., arXiv:2203.08065.
    """

    own_options = options(alpha=Option(0.4))
    keeps_g1 = True

    def mix(self, x: Lists, dots: Products) -> Combination:
        product = dots["g1.g2"]  # first: one reading gives all three
        n1, n2 = dots.norm("g1"), dots.norm("g2")
        c = product / (n1 * n2 + EPS) * n1 / (n2 + EPS)
        alpha = x.option("alpha")
        return linear(g2=1 + alpha * c, g1=-alpha)
