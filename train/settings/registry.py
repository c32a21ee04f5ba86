"""Data sets, models and optimizers by name. A new one is a row here, and the function or class that
the row names."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TIMM = "timm:"  # stands before the name of a model of the library timm


@dataclass(frozen=True)
class Entry:
    """A row of DATASETS or MODELS.

    Args:
        title: the name in tables and plots.
        maker: "module:function", which is imported only when it is used, so that a typing error in
            a name is answered before torch is imported.
    """

    title: str
    maker: str

    @property
    def make(self) -> Callable[..., Any]:
        """Return the function."""
        module, _, name = self.maker.partition(":")
        made: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return made


# make(config) returns the Dataset, without label noise.
DATASETS = {
    "cifar100": Entry("CIFAR-100", "train.inputs.data:cifar100"),
    "cifar10": Entry("CIFAR-10", "train.inputs.data:cifar10"),
    "fashion": Entry("Fashion-MNIST", "train.inputs.data:fashion"),
    "digits": Entry("digits", "train.inputs.data:digits"),
    "folder": Entry("class folders", "train.inputs.data:folder"),
}

# make(shape, num_classes) returns the network for images of the shape (C, H, W).
MODELS = {
    "resnet18": Entry("ResNet-18", "train.models.resnet:resnet18"),
    "resnet34": Entry("ResNet-34", "train.models.resnet:resnet34"),
    "resnet50": Entry("ResNet-50", "train.models.resnet:resnet50"),
    "resnet101": Entry("ResNet-101", "train.models.resnet:resnet101"),
    "resnet152": Entry("ResNet-152", "train.models.resnet:resnet152"),
    "wrn28_10": Entry("WRN-28-10", "train.models.wide_resnet:wrn28_10"),
    "resnet_small": Entry("small ResNet", "train.models.resnet:resnet_small"),
    "mlp": Entry("MLP", "train.models.mlp:mlp"),
}


# A step takes so many gradients of the model's loss, each with its forward pass; a Hessian-vector
# product takes about two more.
PASSES = {"plain": 1, "one pass": 1, "hessian": 3, "two passes": 2}


@dataclass(frozen=True)
class OptimizerEntry(Entry):
    """A row of OPTIMIZERS, whose maker is a class.

    Args:
        colour: the colour of the optimizer's lines in plots.
        step: the kind of its steps, a key of PASSES; the steps of "plain" are those of torch's own
            optimizer, which has no reference backend.
        keys: the keys of the configuration that are arguments of this class, by the same name.
        usual: the defaults of keys of the configuration that differ with this optimizer.
        every: the key that says how often there is a second pass: in every tenth step for 10.
        needs_names: whether the class takes named parameters.
    """

    colour: str
    step: str = "two passes"
    keys: tuple[str, ...] = ()
    usual: Mapping[str, Any] = field(default_factory=dict)
    every: str = ""
    needs_names: bool = False


# BAR is not here: it balances the factors of LoRA, and no model here has any.
# The first seven have Okabe and Ito's colours, which colour-blind people tell apart.
OPTIMIZERS = {
    "sgd": OptimizerEntry("SGD", "torch.optim:SGD", "#000000", "plain"),
    "sgdhess": OptimizerEntry("SGDHess", "samkernels:SGDHess", "#cc79a7", "hessian", ("k",)),
    "sam": OptimizerEntry("SAM", "samkernels:SAM", "#0072b2"),
    "samdirection": OptimizerEntry(
        "SAMDirection", "samkernels:SAMDirection", "#e69f00", keys=("granularity",)
    ),
    "sammagnitude": OptimizerEntry(
        "SAMMagnitude", "samkernels:SAMMagnitude", "#009e73", keys=("granularity",)
    ),
    "adamw": OptimizerEntry("AdamW", "torch.optim:AdamW", "#d55e00", "plain"),
    "asam": OptimizerEntry(
        "ASAM", "samkernels:ASAM", "#56b4e9", usual={"rho": 0.5, "eta": 0.01}, needs_names=True
    ),
    "gsam": OptimizerEntry("GSAM", "samkernels:GSAM", "#8c564b", keys=("alpha",)),
    "wsam": OptimizerEntry(
        "WSAM", "samkernels:WSAM", "#7f7f7f", keys=("gamma", "decouple", "max_norm")
    ),
    "gradientnormpenalty": OptimizerEntry(
        "GradientNormPenalty", "samkernels:GradientNormPenalty", "#bcbd22",
        keys=("alpha", "normed"), usual={"rho": 0.1, "alpha": 0.8},
    ),
    "friendlysam": OptimizerEntry(
        "FriendlySAM", "samkernels:FriendlySAM", "#6a3d9a", keys=("sigma", "lmbda")
    ),
    "vasso": OptimizerEntry("VaSSO", "samkernels:VaSSO", "#a6d854", keys=("theta",)),
    "looksam": OptimizerEntry(
        "LookSAM", "samkernels:LookSAM", "#a50026", keys=("k", "alpha"),
        usual={"rho": 0.1, "k": 10, "alpha": 0.7}, every="k",
    ),
    "saner": OptimizerEntry(
        "SANER", "samkernels:SANER", "#35978f", keys=("alpha",), usual={"rho": 0.1, "alpha": 0.5}
    ),
    "xsam": OptimizerEntry(
        "XSAM", "samkernels:XSAM", "#fdae6b", keys=("a",), usual={"rho": 0.15}
    ),
    "msam": OptimizerEntry("MSAM", "samkernels:MSAM", "#1f2f8f", "one pass", usual={"rho": 3.0}),
}  # fmt: skip


def optimizers_with(*, key: str = "", steps: tuple[str, ...] = tuple(PASSES)) -> tuple[str, ...]:
    """Return the names of the optimizers whose step is one of `steps` and whose keys have `key`."""
    return tuple(
        name
        for name, row in OPTIMIZERS.items()
        if row.step in steps and (not key or key in row.keys)
    )
