"""Fused kernels for Sharpness-Aware Minimization.

`SAM`, `SAMDirection` and `SAMMagnitude` are optimizers in torch.optim's style; samkernels.ops has
the operations on lists of tensors that they are made of. `python -m samkernels` tells what this
installation can do.
"""

from samkernels import ops
from samkernels.batchnorm import frozen_batchnorm_stats
from samkernels.optim import SAM, SAMDirection, SAMMagnitude

__all__ = ["SAM", "SAMDirection", "SAMMagnitude", "frozen_batchnorm_stats", "ops"]
__version__ = "0.1.0"
