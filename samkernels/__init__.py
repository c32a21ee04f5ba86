"""Fused kernels for Sharpness-Aware Minimization.

`SAM`, its variants and `SGDHess` are optimizers in torch.optim's style. samkernels.ops has the
operations on lists of tensors that they are made of. `python -m samkernels` tells what this
installation can do.
"""

from samkernels import ops, optim
from samkernels.batchnorm import frozen_batchnorm_stats
from samkernels.optim import *  # noqa: F403

__all__ = [*optim.__all__, "frozen_batchnorm_stats", "ops"]
__version__ = "0.2.0.dev0"
