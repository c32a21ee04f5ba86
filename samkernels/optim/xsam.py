"""XSAM: an angle between the perturbation and g2."""

import torch

from samkernels.optim._rule import EPS, Combination, Lists, Option, Products, linear, options
from samkernels.optim.sam import SAM


class XSAM(SAM):
    """SAM whose u, as long as g2, is turned between the directions of g1 and of g2, or beyond it.

        u = n2 * (sin((1 - a) t) * g1 / n1 + sin(a t) * g2 / n2) / sin(t),  t = angle(g1, g2)

    a = 1 is SAM, a = 0 has the direction of g1. The paper searches a once an epoch, by forward
    passes: write group["a"].

    Args:
        a: a finite number, from 0 to about 2.

    Source: arXiv:2603.10048.
    """

    default_rho = 0.15
    own_options = options(a=Option(1.0))
    keeps_g1 = True

    def mix(self, x: Lists, dots: Products) -> Combination:
        product, a = dots["g1.g2"], x.option("a")  # first: one reading gives all three
        n1, n2 = dots.norm("g1"), dots.norm("g2")
        t = torch.arccos((product / (n1 * n2 + EPS)).clamp(-1, 1))
        sine = torch.sin(t)
        first = torch.where(sine > 1e-6, torch.sin((1 - a) * t) / sine, 1.0 - a)
        second = torch.where(sine > 1e-6, torch.sin(a * t) / sine, a)
        return linear(g1=first * n2 / (n1 + EPS), g2=second)
