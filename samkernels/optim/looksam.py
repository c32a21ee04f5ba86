"""LookSAM: the second pass in every k-th step only."""

from typing import Any

from samkernels.optim._rule import EPS, Combination, Lists, Option, Products, linear, options
from samkernels.optim.sam import SAM


class LookSAM(SAM):
    """SAM that keeps the part gv of g2 that is orthogonal to g1 for the k - 1 steps that follow.

        step % k == 0    u = g2;  gv = g2 - g1.g2 / (n1^2 + 1e-12) * g1
        else             u = g1 + alpha * n1 / (||gv|| + 1e-12) * gv

    Norms are global. For CNNs alpha 0.1 and k 5 are known to be better than the defaults, which are
    those of the other packages. A parameter without gv takes u = g1. k is the same in all groups.

    Source: Liu et al., arXiv:2203.02714.
    """

    positional = ("rho", "k", "alpha", "adaptive")
    default_rho = 0.1
    own_options = options(k=Option(10, 1, is_whole=True), alpha=Option(0.7))
    own_state = ("gv",)
    keeps_g1 = True
    counts_steps = True

    def perturbs(self, options: dict[str, Any], step: int) -> bool:
        return step % options["k"] == 0

    def mix(self, x: Lists, dots: Products) -> Combination:
        x.set("gv", linear(g2=1.0, g1=-dots["g1.g2"] / (dots["g1.g1"] + EPS)))
        return linear(g2=1.0)

    def mix_alone(self, x: Lists, dots: Products) -> Combination:
        _ = dots["g1.gv"]  # one reading gives both norms
        ratio = dots.norm("g1") / (dots.norm("gv") + EPS)
        return linear(g1=1.0) if x.is_new else linear(g1=1.0, gv=x.option("alpha") * ratio)
