"""Make optimizers whose signatures name the options of their base, for LightningCLI, jsonargparse,
and others who read signatures.

SAM and its kin take those options as **base_options, which a parser of command lines cannot see
into. A class for another base optimizer takes two lines: see ExplicitOptions.
"""

from __future__ import annotations

import inspect
from inspect import Parameter
from typing import Any

from torch.optim import SGD, Adam, AdamW
from torch.optim.optimizer import Optimizer

from samkernels.optim import SAM, SAMDirection, SAMMagnitude


class ExplicitOptions:
    """Gives a subclass of SAM or of a variant the signature that it has with one base optimizer.

    It has the arguments of the class and, in the place of **base_options, those of the base with
    their types and defaults; all but params are keywords. In all else it is the class that it
    derives from.

    Usage:

        class SAMWithRMSprop(ExplicitOptions, SAM, base_optimizer=torch.optim.RMSprop):
            pass

        SAMWithRMSprop(model.parameters(), rho=0.05, lr=1e-3, alpha=0.9)

    Raises:
        TypeError: when the class is made: the base optimizer has an option of the name of one of
            SAM's, as torch.optim.Adadelta has a rho.
    """

    def __init_subclass__(
        cls, base_optimizer: type[Optimizer] | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if base_optimizer is None:  # a subclass of such a class
            return
        init: Any = super().__init__
        own = _options(init)
        of_base = _options(base_optimizer.__init__)
        if both := own.keys() & of_base.keys():
            raise TypeError(
                f"{cls.__name__}: {base_optimizer.__name__} has an option called {min(both)}, as "
                "SAM has: their options cannot stand side by side"
            )

        def __init__(self: Any, params: Any, **options: Any) -> None:
            init(self, params, base_optimizer, **options)

        first = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", "params")]
        options = [*own.values(), *of_base.values()]
        __init__.__signature__ = inspect.Signature([*first, *options])  # type: ignore[attr-defined]
        cls.__init__ = __init__  # type: ignore[assignment, method-assign]


def _options(init: Any) -> dict[str, Parameter]:
    try:
        signature = inspect.signature(init, eval_str=True)
    except NameError:  # a type that is imported for type checkers only
        signature = inspect.signature(init)
    return {
        name: parameter.replace(kind=Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name not in ("self", "params", "base_optimizer")
        and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    }


class SAMWithSGD(ExplicitOptions, SAM, base_optimizer=SGD):
    """SAM around torch.optim.SGD."""


class SAMWithAdam(ExplicitOptions, SAM, base_optimizer=Adam):
    """SAM around torch.optim.Adam."""


class SAMWithAdamW(ExplicitOptions, SAM, base_optimizer=AdamW):
    """SAM around torch.optim.AdamW."""


class SAMDirectionWithSGD(ExplicitOptions, SAMDirection, base_optimizer=SGD):
    """SAMDirection around torch.optim.SGD."""


class SAMDirectionWithAdam(ExplicitOptions, SAMDirection, base_optimizer=Adam):
    """SAMDirection around torch.optim.Adam."""


class SAMDirectionWithAdamW(ExplicitOptions, SAMDirection, base_optimizer=AdamW):
    """SAMDirection around torch.optim.AdamW."""


class SAMMagnitudeWithSGD(ExplicitOptions, SAMMagnitude, base_optimizer=SGD):
    """SAMMagnitude around torch.optim.SGD."""


class SAMMagnitudeWithAdam(ExplicitOptions, SAMMagnitude, base_optimizer=Adam):
    """SAMMagnitude around torch.optim.Adam."""


class SAMMagnitudeWithAdamW(ExplicitOptions, SAMMagnitude, base_optimizer=AdamW):
    """SAMMagnitude around torch.optim.AdamW."""
