"""Keep the optimizer's part of a training step out of what torch.compile makes of the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def keep_out_of_graphs(cls: type, names: Iterable[str]) -> None:
    """Let each of these methods run as it stands, by one graph break in a caller that is compiled.

    A decorator where they are defined would not do: torch.optim wraps `step` when the first
    optimizer of its class is made, and the wrapper has to stay out, too; and the decorator would
    import the compiler with the package.
    """
    for name in names:
        owner = next(c for c in cls.__mro__ if name in vars(c))
        method = vars(owner)[name]
        if not getattr(method, "is_kept_out", False):
            kept_out = torch.compiler.disable(method)
            kept_out.is_kept_out = True
            setattr(owner, name, kept_out)
