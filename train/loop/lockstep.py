"""Compare the first steps of a run with the reference backend as they are taken."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from train.shared.errors import DivergedError, VerificationError

TOLERANCE = 1e-5  # the tolerance is some tens of roundings in fp32, far below any wrong formula


@dataclass
class Deviation:
    """The largest deviation so far, and the parameter, step and phase that have it."""

    value: float = 0.0
    parameter: str = ""
    step: int = 0
    phase: str = ""


def relative_deviation(value: Tensor, reference: Tensor) -> float:
    """Return ||value - reference||_2 / ||reference||_2 in float64; the numerator where the
    denominator is 0."""
    difference = (value.double() - reference.double()).norm()
    norm = reference.double().norm()
    return float(difference if norm == 0 else difference / norm)


class Lockstep:
    """A stand-in for an optimizer, which takes each step with a reference twin as well.

    The twin owns copies of the parameters and keeps them over all steps, so errors add up as they
    do in training. Both get the same g1 and g2: the gradients that the real optimizer's weights
    give.

    Args:
        model: its parameters are those of the optimizer.
        optimizer: the optimizer to check.
        make_reference: a function that makes the twin from a list of names and parameters.
        tolerance: the largest relative deviation that each parameter may have.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        make_reference: Callable[[list[tuple[str, nn.Parameter]]], Any],
        tolerance: float = TOLERANCE,
    ) -> None:
        self.optimizer = optimizer
        self.tolerance = tolerance
        self.steps = 0
        self.largest = Deviation()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._params = [p for _, p in named]
        self._twins = [nn.Parameter(p.detach().clone()) for p in self._params]
        self._reference = make_reference(list(zip(self._names, self._twins, strict=True)))

    @contextlib.contextmanager
    def first_pass(self, model: nn.Module) -> Iterator[None]:
        """Enclose the first pass in first_pass() of both optimizers."""
        with self.optimizer.first_pass(model), self._reference.first_pass(model):
            yield

    def first_step(self) -> bool:
        """Perturb both, then compare. Return whether there is a second pass.

        Raises:
            DivergedError: a gradient is not finite.
            VerificationError: a parameter deviates by more than the tolerance, or is not finite,
                or only one of the two wants a second pass.
        """
        self._follow_lr()
        self._copy_gradients()
        has_second_pass = bool(self.optimizer.first_step())
        if bool(self._reference.first_step()) != has_second_pass:
            raise VerificationError(
                f"step {self.steps + 1}: one has a second pass, and the reference backend has not"
                if has_second_pass
                else f"step {self.steps + 1}: the reference backend has a second pass, one has not"
            )
        self._compare("perturbation")
        return has_second_pass

    def second_step(self, zero_grad: bool = False) -> None:
        """Update both, then compare.

        Raises:
            DivergedError, VerificationError: see first_step.
        """
        self._prepare_update()
        self.optimizer.second_step(zero_grad=zero_grad)
        self._reference.second_step(zero_grad=True)
        self._finish_update()

    def backward(self, loss: Tensor) -> None:
        """Let SGDHess compute gradients and Hessian-vector products."""
        self.optimizer.backward(loss)

    def step(self) -> None:
        """Update both after one pass, SGDHess with the same Hessian-vector products; then compare.

        Raises:
            DivergedError, VerificationError: see first_step.
        """
        self._prepare_update()
        products = getattr(self.optimizer, "hessian_products", {})
        for name, param, twin in self._each():
            product = products.get(param)
            if product is not None:
                self._check_finite(f"Hv of '{name}'", product)
                self._reference.hessian_products[twin] = product.clone()
        self.optimizer.step()
        self._reference.step()
        self._reference.zero_grad()
        self._finish_update()

    def zero_grad(self) -> None:
        """Clear the gradients of the real optimizer; the twin's are cleared already."""
        self.optimizer.zero_grad()

    @property
    def needs_second_pass(self) -> bool:
        """Return whether the next step of the real optimizer may have a second pass."""
        return bool(self.optimizer.needs_second_pass)

    def _prepare_update(self) -> None:
        self._follow_lr()
        self._copy_gradients()

    def _follow_lr(self) -> None:
        # The scheduler knows the real optimizer only. Nothing else is copied: a wrong rho or
        # momentum of the real optimizer has to show.
        groups = zip(self._reference.param_groups, self.optimizer.param_groups, strict=True)
        for twin_group, group in groups:
            twin_group["lr"] = group["lr"]

    def _finish_update(self) -> None:
        self._compare("update")
        self.steps += 1

    def restore(self) -> None:
        """Undo the perturbation of both."""
        self.optimizer.restore()
        self._reference.restore()

    def summary(self) -> dict[str, Any]:
        """Return the steps taken, the tolerance, and the largest deviation with its place."""
        return {"steps": self.steps, "tolerance": self.tolerance, **asdict(self.largest)}

    def state(self) -> dict[str, Any]:
        """Return all that a resumed check needs, between steps."""
        return {
            "steps": self.steps,
            "largest": asdict(self.largest),
            "twins": [twin.detach() for twin in self._twins],
            "reference": self._reference.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from what state() returned."""
        self.steps, self.largest = state["steps"], Deviation(**state["largest"])
        for twin, saved in zip(self._twins, state["twins"], strict=True):
            twin.copy_(saved)
        self._reference.load_state_dict(state["reference"])

    def _copy_gradients(self) -> None:
        for name, param, twin in self._each():
            if param.grad is not None:
                self._check_finite(f"the gradient of '{name}'", param.grad)
            twin.grad = None if param.grad is None else param.grad.detach().clone()

    def _check_finite(self, what: str, tensor: Tensor) -> None:
        # A gradient that is not finite is named here: else it would pass for an optimizer's error.
        if not tensor.isfinite().all():
            raise DivergedError(
                f"step {self.steps + 1}: {what} is not finite: the run is stopped; a smaller lr or "
                "rho may help"
            )

    def _each(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        return zip(self._names, self._params, self._twins, strict=True)

    @torch.no_grad()
    def _compare(self, phase: str) -> None:
        step = self.steps + 1
        for name, param, twin in self._each():
            value = relative_deviation(param, twin)
            # The condition is written so that nan fails too.
            if not value <= self.tolerance:
                raise VerificationError(
                    f"step {step}: after the {phase}, parameter '{name}' deviates from the "
                    f"reference backend by {value:.2e} (relative), allowed {self.tolerance:.0e}"
                )
            if value > self.largest.value:
                self.largest = Deviation(value, name, step, phase)
