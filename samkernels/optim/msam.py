"""MSAM: SAM against the momentum, in one pass."""

from samkernels.optim._onepass import OnePass


class MSAM(OnePass):
    """Momentum SAM: a perturbation against the momentum v, which is known before the gradient.

        e(w) = -rho * T^2 * v / (||T v|| + 1e-12)
        base(gradient at w + e(w)) steps from w

    v is torch.optim.SGD's momentum_buffer, or exp_avg of Adam and AdamW. Weight decay acts on w,
    and the perturbation is taken off as it was put on. adaptive and subset are in the paper's table
    3 without code; T^2 is ours. Between the steps the parameters hold w + e(w): evaluate and save
    the model in `unperturbed()`. The authors' MSAM(params, lr, momentum, ..., rho) is
    MSAM(params, torch.optim.SGD, rho, lr=lr, momentum=momentum) here.

    Source: Becker et al., arXiv:2401.12033.
    """

    default_rho = 3.0
    sign = -1.0
    along = ("momentum_buffer", "exp_avg")

    def move_up_to_momentumAscent(self) -> None:
        """Call `perturb`, by the authors' name of it."""
        self.perturb()

    def move_back_from_momentumAscent(self) -> None:
        """Call `restore`, by the authors' name of it."""
        self.restore()
