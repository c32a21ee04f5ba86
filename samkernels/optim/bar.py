"""BAR: balancing the factors of LoRA."""

from typing import Any

import torch

from samkernels.optim._axes import partners
from samkernels.optim._rule import Combination, Lists, Option, Products, linear, options
from samkernels.optim.sam import SAM


class BAR(SAM):
    """Balancedness-aware regularisation of pairs (x, y) such as LoRA's, in one pass.

        x <- (1 + s * alpha * lr) * x;  y <- (1 - s * alpha * lr) * y;  then base(g)
        s = sign(||gx|| - ||gy||) for kind "n", sign(||y|| - ||x||) for kind "o"

    Without pairs of parameters, lora_A and lora_B are found in the names of named_parameters(),
    also in groups that are added later.

    Source: Li et al., arXiv:2410.14802.
    """

    positional = ("alpha", "pairs", "kind")
    own_options = options(alpha=Option(0.05, 0), kind=Option("n", choices=("n", "o")))
    own_arguments = options(pairs=None)
    own_attributes = ("partners",)
    axes = options(base_optimizer=torch.optim.AdamW)
    moves = False
    pairs: Any

    def _check_selections(self) -> None:
        self.partners = partners(self.pairs, self.param_groups)
        self.pairs = None if self.pairs is None else self.partners

    def before(self, x: Lists, dots: Products) -> Combination:
        pair, sign = ("g1.g1", -1.0) if x.option("kind") == "n" else ("w.w", 1.0)
        excess = dots.per_tensor(pair, x) - dots.of_partners(pair, x, self.partners)
        return linear(w=sign * x.option("alpha") * excess.sign())
