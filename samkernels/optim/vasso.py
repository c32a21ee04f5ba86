"""VaSSO: the perturbation follows a moving average of g1."""

from samkernels.optim._rule import Lists, Option, linear, options
from samkernels.optim.sam import SAM


class VaSSO(SAM):
    """SAM perturbed along a moving average of g1, which is less noisy than g1.

        m = (1 - theta) * m + theta * g1;  then  d = m

    At first m = g1. theta weighs the new gradient. Order and meaning of the arguments are those of
    the authors' VASSO.

    Args:
        theta: from 0 to 1; 1 is SAM.

    Memory: m, beside SAM's.

    Source: Li and Giannakis, arXiv:2309.15639.
    """

    positional = ("rho", "theta", "adaptive")
    own_options = options(theta=Option(0.9, 0, 1))
    own_state = ("m",)

    def direction(self, x: Lists) -> str:
        theta = 1.0 if x.is_new else x.option("theta")
        return x.moved("m", linear(m=1 - theta, g1=theta))
