"""The optimizers."""

from samkernels.optim._axes import norm_parameters
from samkernels.optim.asam import ASAM
from samkernels.optim.bar import BAR
from samkernels.optim.friendlysam import FriendlySAM
from samkernels.optim.gradientnormpenalty import GradientNormPenalty
from samkernels.optim.gsam import GSAM
from samkernels.optim.looksam import LookSAM
from samkernels.optim.msam import MSAM
from samkernels.optim.sam import SAM
from samkernels.optim.samdirection import SAMDirection
from samkernels.optim.sammagnitude import SAMMagnitude
from samkernels.optim.saner import SANER
from samkernels.optim.schedule import ProportionScheduler
from samkernels.optim.sgdhess import SGDHess
from samkernels.optim.vasso import VaSSO
from samkernels.optim.when import Bernoulli, FromStep, GradientNormPolicy, Periodic
from samkernels.optim.wsam import WSAM
from samkernels.optim.xsam import XSAM

__all__ = [
    "ASAM",
    "BAR",
    "GSAM",
    "MSAM",
    "SAM",
    "SANER",
    "WSAM",
    "XSAM",
    "Bernoulli",
    "FriendlySAM",
    "FromStep",
    "GradientNormPenalty",
    "GradientNormPolicy",
    "LookSAM",
    "Periodic",
    "ProportionScheduler",
    "SAMDirection",
    "SAMMagnitude",
    "SGDHess",
    "VaSSO",
    "norm_parameters",
]
