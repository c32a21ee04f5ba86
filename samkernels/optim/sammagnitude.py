"""SAMMagnitude: the magnitude of g2 with the direction of g1."""

from __future__ import annotations

from samkernels.optim.samdirection import SAMDirection


class SAMMagnitude(SAMDirection):
    """SAM that takes the magnitude of g2, the gradient at w + e(w), and the direction of g1, the
    one at w.

        granularity           u
        "element"             |g2| * sign(g1),  sign(0) = 0
        "tensor", "global"    n2 / (n1 + 1e-12) * g1

    n1 and n2 are the L2 norms of g1 and g2, per tensor or over all parameters.

    Arguments, memory and everything else are as in `SAMDirection`.

    Source: the report that this package implements (see README); perturbation: Foret et al.,
    arXiv:2010.01412.
    """

    _rule = "sammagnitude"
