"""Fused kernels for Sharpness-Aware Minimization.

`SAM`, `SAMDirection`, `SAMMagnitude` and `SGDHess` are optimizers in torch.optim's style;
samkernels.ops has the operations on lists of tensors that they are made of. `python -m samkernels`
tells what this installation can do.
"""

from samkernels import ops
from samkernels.batchnorm import frozen_batchnorm_stats
from samkernels.optim import SAM, SAMDirection, SAMMagnitude, SGDHess

__all__ = ["SAM", "SAMDirection", "SAMMagnitude", "SGDHess", "frozen_batchnorm_stats", "ops"]
__version__ = "0.1.0"
