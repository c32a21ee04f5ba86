"""SAMMagnitude: the magnitude of g2 with the direction of g1."""

from __future__ import annotations

from samkernels.optim.samdirection import SAMDirection


class SAMMagnitude(SAMDirection):
    """SAM that takes the magnitude of g2, the gradient at w + e(w), and the direction of g1, the
    one at w.

    granularity "element":  u = |g2| * sign(g1), with sign(0) = 0
    "tensor", "global":     u = n2 / (n1 + 1e-12) * g1, with L2 norms n1 of g1 and n2 of g2
                            per tensor or over all parameters

    Arguments, memory and everything else are as in `SAMDirection`.

    Source: the report that this package implements (see README); perturbation: Foret et al.,
        arXiv:2010.01412.
    """

    _rule = "sammagnitude"
