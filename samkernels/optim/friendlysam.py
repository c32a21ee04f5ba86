"""Friendly SAM: the perturbation follows what is noise in g1."""

from samkernels.optim._rule import Combination, Lists, Option, linear, options
from samkernels.optim.sam import SAM


class FriendlySAM(SAM):
    """SAM perturbed along g1 without its moving average m.

        d = g1 - sigma * m;  then  m = lmbda * m + (1 - lmbda) * g1

    At first d = g1 and m = g1. The authors' script has lmbda 0.6 and rho 0.2 for CIFAR-100.

    Args:
        sigma: a finite number; 0 is SAM.
        lmbda: from 0 to 1.

    Memory: m, beside SAM's.

    Source: Li et al., arXiv:2403.12350, and the authors' code, whose m starts at g1.
    """

    positional = ("rho", "sigma", "lmbda", "adaptive")
    own_options = options(sigma=Option(1.0), lmbda=Option(0.9, 0, 1))
    own_state = ("m",)

    def direction(self, x: Lists) -> Combination:
        lmbda = 0.0 if x.is_new else x.option("lmbda")
        x.set("m", linear(m=lmbda, g1=1 - lmbda))
        return linear(g1=1.0) if x.is_new else linear(g1=1.0, m=-x.option("sigma"))
