"""The optimizers."""

from samkernels.optim.sam import SAM
from samkernels.optim.samdirection import SAMDirection
from samkernels.optim.sammagnitude import SAMMagnitude
from samkernels.optim.sgdhess import SGDHess

__all__ = ["SAM", "SAMDirection", "SAMMagnitude", "SGDHess"]
