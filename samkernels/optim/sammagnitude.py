"""SAMMagnitude: the magnitude of g2 with the direction of g1."""

from samkernels.optim._rule import Combination, Lists, Products
from samkernels.optim.samdirection import SAMDirection, with_direction


class SAMMagnitude(SAMDirection):
    """SAM that takes the magnitude of g2, the gradient at w + e(w), and the direction of g1, the
    one at w.

        granularity           u
        "element"             |g2| * sign(g1),  sign(0) = 0
        "tensor", "global"    n2 / (n1 + 1e-12) * g1

    Everything else is as in `SAMDirection`.

    Source: the report that this package implements (see README).
    """

    compares_scales = False
    has_norm_of = "g2"

    def mix(self, x: Lists, dots: Products) -> Combination:
        return with_direction("g1", "g2", x, dots)
