"""WSAM: sharpness as a weighted term of its own."""

from samkernels.optim._rule import Combination, Lists, Option, Products, linear, options
from samkernels.optim.sam import SAM


class WSAM(SAM):
    """SAM whose g2 counts alpha = gamma / (1 - gamma) times, apart from the base optimizer's step.

        decouple    the base optimizer steps with u = g1;  then  w -= lr * alpha * (g2 - g1)
        else        u = (1 - alpha) * g1 + alpha * g2

    The second part bypasses momentum, moments and weight decay. Another package's
    WSAM(model, params, base, rho, gamma) is WSAM(params, base, rho, gamma=gamma) here.

    Args:
        gamma: from 0 to below 1; 0.5 is SAM if not decoupled.
        max_norm: g1 and g2 are clipped, each by its own norm, after the perturbation; or None.
            max_grad_norm clips u only: if decoupled, the second part goes by as it is.

    Source: Yue et al., arXiv:2305.15817.
    """

    own_options = options(
        gamma=Option(0.9, 0, 1, below=True),
        decouple=Option(True),
        max_norm=Option(None, 0),
    )
    keeps_g1 = True

    def mix(self, x: Lists, dots: Products) -> Combination:
        alpha = 0.0 if x.option("decouple") else x.option("gamma") / (1 - x.option("gamma"))
        c1, c2 = (dots.clipping(name, x.option("max_norm")) for name in ("g1", "g2"))
        return linear(g1=(1 - alpha) * c1, g2=alpha * c2) if alpha else linear(g1=c1)

    def beside(self, x: Lists, dots: Products) -> Combination | None:
        alpha = x.option("gamma") / (1 - x.option("gamma"))
        c1, c2 = (dots.clipping(name, x.option("max_norm")) for name in ("g1", "g2"))
        return linear(g2=alpha * c2, g1=-alpha * c1) if x.option("decouple") else None
