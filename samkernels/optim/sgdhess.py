"""Define SGDHess: make Hessian-vector products, keep them, and hand them over to samkernels.ops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from samkernels import backends, checks, ops
from samkernels.backends import SgdOptions
from samkernels.optim import _checkpoints, _shards, _wrapping
from samkernels.optim._bases import sgd_options
from samkernels.optim._compile import keep_out_of_graphs
from samkernels.optim._lists import Place, Slots, fits, laid_out_like, refuse_capture
from samkernels.optim._random import random_bits

SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
# These are the same in all parameter groups: there is one v for all of them.
SHARED = ("k", "seed", "step")

_COMPILED = "leave out torch.compile, whose networks have none"
# What helps where there are no second derivatives, by what autograd says then.
CURES = {
    "attention": (
        "make the forward pass in `with torch.nn.attention.sdpa_kernel("
        "torch.nn.attention.SDPBackend.MATH):`, since fused attention has none"
    ),
    "aot_autograd": _COMPILED,
    "donated buffer": _COMPILED,
    "is not implemented": (
        "replace the function that has none by others, or take SAM, which needs none"
    ),
}


@contextlib.contextmanager
def _cures(*of: str) -> Iterator[None]:
    """Say with what autograd says of second derivatives, if it is one of these, what helps."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError, too
        cure = next((CURES[what] for what in of if what in str(error)), None)
        if cure is None:
            raise
        raise RuntimeError(f"SGDHess needs second derivatives: {cure}. ({error})") from error


@dataclass
class Part:
    """Holds parameters of one group and place that all have momentum buffers, or all have none."""

    place: Place
    rho: float | Tensor
    options: SgdOptions
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)  # empty without momentum
    journal: list[bool] = field(default_factory=list)  # the backend writes it

    def update(self, state: dict[Tensor, Any]) -> None:
        """Make the call; after an interrupt, do what was not done."""
        if not self.journal:
            ops.sgd_hess_with(
                self.place.ops,
                self.params,
                self.grads,
                self.products,
                self.buffers or None,
                self.rho,
                self.options,
                self.journal,
            )
        for p, buffer in zip(self.params, self.buffers, strict=False):
            state[p]["momentum_buffer"] = buffer


class SGDHess(Optimizer):
    """SGD that scales each gradient by an estimate of the curvature there, with a fused kernel.

        D = |H v|, for 4-D weights (convolutions) its mean over the two spatial dimensions
        u = g * (1 + rho * D)

    u takes the gradient's place in torch.optim.SGD's step.

    H is the Hessian of the loss over all parameters of the optimizer, v a Rademacher vector (each
    element -1 or 1), new in every k-th step; D serves until then, without moving average. D is the
    absolute value of one sample v * Hv of Hutchinson's estimator, whose mean is diag(H). The mean
    of the absolute value is not |diag(H)|: element i is of the size of row i, E[D_i^2] = ||H_i||^2.

    Usage:

        optimizer = SGDHess(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, rho=0.05)
        for x, y in batches:
            optimizer.backward(loss_fn(model(x), y))  # in the place of loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    loss.backward(create_graph=True) in the place of optimizer.backward(loss) gives the same step;
    PyTorch then warns of the reference cycles that step() breaks, and where `needs_graph` is False
    the graph is made in vain. Either may be called several times before step(): gradients and
    Hessian-vector products add up. step(closure) calls the closure, which does one of the two.

    maximize=True maximizes the loss: u = -g * (1 + rho * D). A gradient or Hv that is not finite
    goes into the weights, as a gradient does in torch.optim.SGD. A parameter that had no gradient
    when v was renewed has D = 0 until the next time, and one without gradient is left alone.

    v is drawn for each parameter by itself from (seed, number of steps, position of the parameter):
    it takes nothing from PyTorch's generators, and a run that goes on from a state_dict gives the
    same bits as one without a break.

    Fused attention has no second derivatives: make the forward pass in
    torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which makes it of functions that have.

    Not for torch.compile'd networks, which have none either; torch.amp.GradScaler, which is
    refused; and DistributedDataParallel, which would not average Hv over the processes, nor what
    backward(loss) finds.

    Memory: Hv from backward() to step(), and with k > 1 always; the momentum.

    Args:
        params: parameters or parameter groups; a group may set its own lr, rho and whatever
            torch.optim.SGD knows, but not k and seed.
        lr, momentum, weight_decay, dampening, nesterov, maximize: as in torch.optim.SGD.
        rho: weight of D, >= 0. Like lr, it may be a tensor of one element: on the parameters'
            device it is read there.
        k: steps from one v to the next, >= 1.
        seed: of v, 0 to 2^63 - 1; None draws one from PyTorch's default generator.
        backend: "auto" takes, per device and dtype, the fastest that can serve (see `backends`);
            "native", "triton", "foreach" or "reference" insists on one.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; the message names
            it.
        RuntimeError: the backend that was named cannot serve a parameter.

    Source: the report that this package implements (see README); D: Yao et al., arXiv:2006.00719
    (AdaHessian).
    """

    # By this, torch.amp.GradScaler.step() tells of itself: see step.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rho: float | Tensor = 0.05,
        k: int = 1,
        seed: int | None = None,
        *,
        dampening: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        backends.check_name(backend)
        if seed is None:
            drawn = torch.randint(2**63 - 1, (), device="cpu")
            seed = (
                int(drawn) if checks.has_address(drawn) else 0
            )  # nobody sees bits of fake tensors
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "rho": rho,
            "k": k,
            "seed": seed,
            "step": 0,
        }
        _check_options(defaults, "")
        checks.check_sgd_options(**{name: defaults[name] for name in SGD_OPTIONS})
        self._backend = backend
        self._slots = Slots(backend, {}, {})
        self._products: dict[Tensor, Tensor] = {}
        self._is_constructed = False
        super().__init__(params, defaults)
        self._check_disjoint()  # once, not for each group
        self._is_constructed = True

    # -- the step ----------------------------------------------------------------------------------

    @property
    def needs_graph(self) -> bool:
        """Say whether the next step renews v: loss.backward() needs create_graph=True then."""
        group = self.param_groups[0]
        return group["step"] % group["k"] == 0

    def backward(self, loss: Tensor) -> None:
        """Do as loss.backward() for the parameters of this optimizer; where v is due, find Hv, too.

        Gradients are added to `.grad`. They have a graph only where v is due, and none is left.

        Args:
            loss: shape ().

        Raises:
            TypeError: the loss is no tensor.
            RuntimeError: autograd cannot differentiate the loss (twice, where v is due); for fused
                attention and the like, the message says what to do. It does not tell of functions
                marked once_differentiable: their derivative counts as constant.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss is {type(loss).__name__}: give a torch.Tensor of shape ()")
        params = [p for p in self._all_params() if p.requires_grad]
        is_due = self.needs_graph
        with _cures("donated buffer"):  # what else is missing is a first derivative
            found = torch.autograd.grad(loss, params, create_graph=is_due, allow_unused=True)
        grads = {p: g for p, g in zip(params, found, strict=True) if g is not None}
        self._check_gradients(grads)
        products = self._hessian_products(grads) if is_due else {}
        for p, g in grads.items():
            if p.grad is None:
                self._products.pop(p, None)  # its gradient was thrown away
                # This is a copy: autograd may give one gradient to several parameters.
                p.grad = laid_out_like(p, g.detach())
            else:
                p.grad = p.grad + g.detach()
            if is_due:
                self._add_product(p, products[p])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update, and leave detached gradients in `.grad`.

        Args:
            closure: computes the loss, calls backward(loss) of this optimizer, returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: v is due, and neither was backward(loss) called nor has any gradient a
                graph; autograd cannot differentiate the gradients, as in backward(); or a
                torch.amp.GradScaler scaled the loss.
            TypeError, ValueError: an option of a group or a gradient is wrong. Raised before
                anything is written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_grad_scaler()
        for index, group in enumerate(self.param_groups):
            _check_options(group, f" of parameter group {index}")
        grads = {p: p.grad for p in self._all_params() if p.grad is not None}
        self._check_gradients(grads)
        if not grads:
            return loss

        is_due = self.needs_graph
        has_graph = any(g.requires_grad for g in grads.values())
        if is_due and not has_graph and not self._products:
            raise RuntimeError(
                "step() needs Hv, and no gradient has a graph: call optimizer.backward(loss) in "
                "the place of loss.backward(), or loss.backward(create_graph=True)"
            )
        try:
            if is_due and has_graph:
                for p, product in self._hessian_products(grads).items():
                    self._add_product(p, product)
            self._update(grads, is_due)
        finally:
            # The graph of a gradient holds its parameter, and with it the gradient.
            for p, g in grads.items():
                if g.requires_grad:
                    p.grad = g.detach()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients as in torch.optim, and forget what backward() found."""
        self._products.clear()
        super().zero_grad(set_to_none)

    @property
    def hessian_products(self) -> dict[Tensor, Tensor]:
        """Return Hv by parameter, between backward(loss) and step(). It may be written to."""
        return self._products

    @property
    def backends(self) -> dict[str, str]:
        """Say which backend serves which tensors, such as {"cuda:0 float32": "native"}."""
        served = {}
        for p in filter(_wrapping.is_trained, self._all_params()):
            dtype = str(p.dtype).removeprefix("torch.")
            served[f"{p.device} {dtype}"] = self._slots.place_of(p).backend
        return served

    # -- groups and checkpoints --------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch.optim; it may set its own lr, rho and so on, but not k and seed.

        Raises:
            TypeError, ValueError: an option or a parameter is of the wrong kind; the message names
                it.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is {type(param_group).__name__}: give a dict")
        index = len(self.param_groups)
        shared = self.param_groups[0] if self.param_groups else self.defaults
        for name in SHARED:
            if param_group.setdefault(name, shared[name]) != shared[name]:
                raise ValueError(
                    f"{name}={param_group[name]!r} of parameter group {index}: all groups have "
                    f"{name}={shared[name]}; leave it out"
                )
        _check_options({**self.defaults, **param_group}, f" of parameter group {index}")
        super().add_param_group(param_group)
        try:
            for i, p in enumerate(param_group["params"]):
                if _shards.is_dtensor(p):
                    raise ValueError(
                        f"params[{i}] of parameter group {index} is a DTensor: SGDHess takes whole "
                        "tensors, since FSDP2 computes no second derivatives"
                    )
                if _wrapping.is_trained(p):
                    checks.check_tensor(f"params[{i}] of parameter group {index}", p)
                    self._slots.place_of(p)
            if self._is_constructed:
                self._check_disjoint()
        except Exception:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return that of torch.optim; its groups hold k, seed and the number of steps, too."""
        packed = super().state_dict()
        for group in packed["param_groups"]:  # these may differ after an interrupt
            group["step"] = self.param_groups[0]["step"]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or of torch.optim.SGD: rho, k, seed and step stay then.

        Raises:
            TypeError, ValueError: the state_dict is no optimizer's, or does not fit the
                parameters, or an option is out of range. The optimizer is as it was.
        """
        groups, state = _checkpoints.read(state_dict)
        saved = [index for group in groups for index in group["params"]]
        for i, (group, own) in enumerate(zip(groups, self.param_groups, strict=False)):
            for name, value in own.items():
                group.setdefault(name, value)
            where = f" of parameter group {i} in state_dict"
            _check_options(group, where)
            for p in own["params"][:1]:
                checks.hyperparameter(f"rho{where}", group["rho"], p)
                sgd_options(*[group[name] for name in SGD_OPTIONS], like=p)
            for name in SHARED:
                if group[name] != groups[0][name]:
                    raise ValueError(f"state_dict: parameter groups 0 and {i} differ in {name}")
        for i, (index, p) in enumerate(zip(saved, self._all_params(), strict=False)):
            for name in ("momentum_buffer", "hessian_product"):
                value = dict(state.get(index, {})).get(name)
                if value is not None and getattr(value, "shape", None) != p.shape:
                    raise ValueError(
                        f"state_dict: the {name} of parameter {i} does not have its shape, "
                        f"{tuple(p.shape)}: load the checkpoint of the same model"
                    )
        with _checkpoints.undone_on_failure(self):
            super().load_state_dict({**state_dict, "param_groups": groups})
        self._products.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # PyTorch puts it there
        self.__dict__.setdefault("_is_constructed", True)
        self.__dict__.setdefault("_slots", Slots(self._backend, {}, {}))
        self.__dict__.setdefault("_products", {})

    # -- private -----------------------------------------------------------------------------------

    def _patch_step_function(self) -> None:  # called by torch.optim when step gets its hooks
        super()._patch_step_function()
        keep_out_of_graphs(type(self), ("backward", "step", "zero_grad"))

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _check_disjoint(self) -> None:
        checks.check_disjoint("params", list(filter(_wrapping.is_trained, self._all_params())))

    def _check_gradients(self, grads: dict[Tensor, Tensor]) -> None:
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p in grads and grads[p].layout is not torch.strided:
                    checks.check_tensor(f"params[{i}].grad of parameter group {index}", grads[p])

    def _refuse_grad_scaler(self) -> None:
        given = [self.__dict__.pop(name, None) for name in ("grad_scale", "found_inf")]
        if any(value is not None for value in given):
            # GradScaler.step() deletes them when step() has returned.
            raise RuntimeError(
                "SGDHess does not work with torch.amp.GradScaler: Hv would stay scaled. Train in "
                "float32, or in bfloat16, which needs no scaling"
            )

    def _hessian_products(self, grads: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return Hv by parameter, from gradients with a graph; those without one are constant."""
        directions = self._directions()
        differentiable = {p: g for p, g in grads.items() if g.requires_grad}
        products: Iterable[Tensor | None] = [None] * len(grads)
        if differentiable:
            with _cures(*CURES):
                products = torch.autograd.grad(
                    list(differentiable.values()),
                    list(grads),
                    [directions(p) for p in differentiable],
                    allow_unused=True,
                )
        return {
            p: torch.zeros_like(p) if product is None else product.detach()
            for p, product in zip(grads, products, strict=True)
        }

    def _directions(self) -> Callable[[Tensor], Tensor]:
        """Return v of this step, parameter by parameter."""
        group = self.param_groups[0]
        positions = {p: i for i, p in enumerate(self._all_params())}
        return lambda p: rademacher(p, group["seed"], group["step"], positions[p])

    def _add_product(self, p: Tensor, product: Tensor) -> None:
        known = self._products.get(p)
        self._products[p] = product if known is None else known + product

    def _update(self, grads: dict[Tensor, Tensor], is_due: bool) -> None:
        # All groups come first, so that what is wrong is found before any is updated.
        parts = [part for group in self.param_groups for part in self._parts(group, grads, is_due)]
        count = self.param_groups[0]["step"] + 1
        kept = {}
        if self.param_groups[0]["k"] > 1:
            kept = {p: hv for p, hv in self._products.items() if p in grads}
        try:
            self._make(parts, count, kept if is_due else None)
        except BaseException:
            # Make all or nothing, unless a backend that is no single call was interrupted midway.
            journals = [part.journal for part in parts]
            if any(journals) and [False] not in journals:
                self._make(parts, count, kept if is_due else None)
            raise

    def _make(
        self, parts: list[Part], count: int, new_products: dict[Tensor, Tensor] | None
    ) -> None:
        for part in parts:
            part.update(self.state)
        for group in self.param_groups:
            group["step"] = count
        if new_products is None:
            return
        for p in self._all_params():
            if p in new_products:
                self.state[p]["hessian_product"] = new_products[p]
            elif p in self.state:
                self.state[p].pop("hessian_product", None)
        self._products.clear()

    def _parts(
        self, group: dict[str, Any], grads: dict[Tensor, Tensor], is_due: bool
    ) -> list[Part]:
        """Make the lists that go to one call each."""
        parts: dict[tuple[Place, bool], Part] = {}
        for p in group["params"]:
            if p not in grads:
                continue
            state = self.state[p] if p in self.state else {}
            product = self._products.get(p) if is_due else state.get("hessian_product")
            buffer = state.get("momentum_buffer")
            key = (self._slots.place_of(p), buffer is None)
            if key not in parts:
                if buffer is None and group["momentum"] != 0:
                    refuse_capture()
                options = sgd_options(*[group[name] for name in SGD_OPTIONS], like=p)
                options = options._replace(init_momentum=buffer is None)
                parts[key] = Part(key[0], checks.hyperparameter("rho", group["rho"], p), options)
            part = parts[key]
            part.params.append(p)
            part.grads.append(_fitting(grads[p].detach(), p))
            part.products.append(torch.zeros_like(p) if product is None else _fitting(product, p))
            if group["momentum"] != 0:
                empty = torch.empty_like(p, requires_grad=False)
                part.buffers.append(empty if buffer is None else _fitting(buffer, p))
        return list(parts.values())


def rademacher(like: Tensor, *key: int) -> Tensor:
    """Draw -1 or 1 for each element, from the key alone: the same in every memory format."""
    device = "cpu" if like.is_meta else like.device  # nobody will see bits of meta tensors
    generator = torch.Generator(device).manual_seed(random_bits(*key))
    bits = torch.randint(2, like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return bits.mul_(2).sub_(1)


def _fitting(tensor: Tensor, p: Tensor) -> Tensor:
    """Return the tensor, or a copy of it that is laid out like p."""
    return tensor if fits(tensor, p) and not tensor.is_neg() else laid_out_like(p, tensor)


def _check_options(options: dict[str, Any], where: str) -> None:
    checks.check_sgd_options(**{name: options[name] for name in SGD_OPTIONS}, in_step=True)
    checks.check_hyperparameter(f"rho{where}", options["rho"])
    for name, low in (("k", 1), ("seed", 0), ("step", 0)):
        checks.check_whole(name, options[name], low, bits=63, where=where)
