"""What torch.compile makes of a whole training step: the optimizer's part stays as it is."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def keep_out_of_graphs(cls: type, names: Iterable[str]) -> None:
    """Each of these methods runs as it stands, and is one graph break for whoever is compiled.

    Not by a decorator where they are defined: torch.optim wraps `step` when the first optimizer of
    its class is made, and that has to stay out, too; and what it takes to compile is imported then.
    """
    for name in names:
        owner = next(c for c in cls.__mro__ if name in vars(c))
        method = vars(owner)[name]
        if not getattr(method, "is_kept_out", False):
            kept_out = torch.compiler.disable(method)
            kept_out.is_kept_out = True
            setattr(owner, name, kept_out)
