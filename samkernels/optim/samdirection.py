"""SAMDirection: the direction of g2 with the magnitude of g1."""

from samkernels.optim._rule import EPS, Combination, Lists, Option, Products, linear, options
from samkernels.optim.sam import SAM

GRANULARITIES = ("element", "tensor", "global")


def with_direction(direction: str, magnitude: str, x: Lists, dots: Products) -> Combination:
    """Return one gradient with the magnitude of the other, as the group's granularity says."""
    granularity = x.option("granularity")
    if granularity == "element":
        return Combination(magnitude, direction, function="sign")
    pairs = [f"{name}.{name}" for name in (magnitude, direction)]
    squares = [dots[p] if granularity == "global" else dots.per_tensor(p, x) for p in pairs]
    return linear(**{direction: squares[0].sqrt() / (squares[1].sqrt() + EPS)})


class SAMDirection(SAM):
    """SAM that takes the direction of g2, the gradient at w + e(w), and the magnitude of g1, the
    one at w.

        granularity           u
        "element"             |g1| * sign(g2),  sign(0) = 0
        "tensor", "global"    n1 / (n2 + 1e-12) * g2

    n1 and n2 are the L2 norms of g1 and g2, per tensor or over all parameters. "global" is Stable
    SAM (arXiv:2401.07250). A parameter that has only one of the two gradients is not updated. The
    report's tables were made with "element"; its public code has the names of SAMDirection and
    SAMMagnitude swapped, here they are as in its prose.

    Source: the report that this package implements (see README).
    """

    own_options = options(granularity=Option("element", choices=GRANULARITIES))
    keeps_g1 = True
    has_norm_of = "g1"

    def mix(self, x: Lists, dots: Products) -> Combination:
        return with_direction("g2", "g1", x, dots)
