"""SAMDirection: the direction of g2 with the magnitude of g1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from samkernels.optim.sam import SAM


class SAMDirection(SAM):
    """SAM that takes the direction of g2, the gradient at w + e(w), and the magnitude of g1, the
    one at w.

        granularity           u
        "element"             |g1| * sign(g2),  sign(0) = 0
        "tensor", "global"    n1 / (n2 + 1e-12) * g2

    n1 and n2 are the L2 norms of g1 and g2, per tensor or over all parameters.

    Everything else is as in `SAM`, granularity beside it: it may differ between parameter groups,
    and the norms of "global" span them all. A parameter that has only one of the two gradients is
    not updated.

    The report's tables were made with "element". Its public code has the names of SAMDirection and
    SAMMagnitude swapped; here they are as in its prose.

    Memory: as SAM, and g1 is kept until the second step.

    Source: the report that this package implements (see README); perturbation: Foret et al.,
    arXiv:2010.01412.
    """

    _rule = "samdirection"

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        *,
        granularity: str = "element",
        backend: str = "auto",
        track_statistics: bool = False,
        max_grad_norm: float | None = None,
        perturbation: str = "global",
        process_group: Any = None,
        **base_options: Any,
    ) -> None:
        self._init(
            params,
            base_optimizer,
            {"rho": rho, "adaptive": adaptive, "granularity": granularity},
            base_options,
            backend=backend,
            track_statistics=track_statistics,
            max_grad_norm=max_grad_norm,
            perturbation=perturbation,
            process_group=process_group,
        )
