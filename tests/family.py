"""The SAM family in plain PyTorch: each variant in one to three lines, on all parameters as one
vector in float64. Written from the papers' formulas; calls nothing of samkernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-12
Gradient = Callable[[Tensor, int], Tensor]  # of all weights, and of the number of the step


class Network(nn.Module):
    """Two layers with a normalisation of its own: 66 weights in 6 tensors, in two groups."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int, scale: float = 0.5) -> nn.Parameter:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(scale * values)

        self.weight1, self.bias1 = parameter(5, 8), parameter(8, scale=0.1)
        self.norm_weight, self.norm_bias = parameter(8), parameter(8, scale=0.1)
        self.weight2, self.scale = parameter(8, 2), parameter()

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.weight1 + self.bias1)
        hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.std(1, keepdim=True) + 0.1)
        return (hidden * self.norm_weight + self.norm_bias) @ self.weight2 * (1 + self.scale)


def batch(step: int, half: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (6,), generator=generator)
    return (x, y) if half is None else (x.chunk(2)[half], y.chunk(2)[half])


def loss(model: nn.Module, step: int, half: int | None = None) -> Tensor:
    x, y = batch(step, half)
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x.to(dtype)), y)


@dataclass
class Run:
    """A run of a rule: w, the base optimizer on a copy of it, and what the rule keeps.

    Args:
        groups: for each parameter the options of its group, rho and lr among them.
        base: makes the base optimizer of parameters or groups.
        is_moved, is_scaled: for each parameter, whether it is perturbed and whether T acts on it.
        axes: adaptive or scaling, eta, norm, mask (a vector).
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    base: torch.optim.Optimizer
    is_moved: list[bool]
    is_scaled: list[bool]
    axes: dict[str, Any]
    t: int = 0
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = list(self.model.parameters())
        self.sizes = [p.numel() for p in self.params]
        self.owner = torch.arange(len(self.params)).repeat_interleave(torch.tensor(self.sizes))
        self.moved = torch.tensor(self.is_moved)[self.owner].double()
        self.scaled = torch.tensor(self.is_scaled)[self.owner]

    # -- vectors -----------------------------------------------------------------------------------

    @property
    def w(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.params])

    def option(self, name: str) -> Tensor:
        """An option of the groups, for each weight."""
        values = torch.tensor([float(group[name]) for group in self.groups], dtype=torch.float64)
        return values[self.owner]

    def per_tensor(self, x: Tensor) -> Tensor:
        """The norm of the tensor that each weight is in."""
        squares = torch.zeros(len(self.sizes), dtype=torch.float64)
        return squares.index_add(0, self.owner, x * x).sqrt()[self.owner]

    def grad(self, at: Tensor | None = None, half: int | None = None) -> Tensor:
        """The gradient of this step's batch, or of a half of it, at w or elsewhere."""
        before = self.w
        self.set(before if at is None else at)
        grads = torch.autograd.grad(loss(self.model, self.t, half), self.params)
        self.set(before)
        return torch.cat([g.flatten() for g in grads])

    @torch.no_grad()
    def set(self, w: Tensor) -> None:
        for p, part in zip(self.params, w.split(self.sizes), strict=True):
            p.copy_(part.reshape(p.shape))

    def up(self, d: Tensor) -> Tensor:
        """w + e(w) along d, with all axes."""
        axes, w = self.axes, self.w
        scaling = axes.get("scaling") or ("elementwise" if axes.get("adaptive") else "none")
        scale = {
            "none": torch.ones_like(w),
            "elementwise": w.abs() + axes.get("eta", 0.0),
            "tensor": self.per_tensor(w),
        }[scaling]
        scale = torch.where(self.scaled, scale, 1.0)
        norm = axes.get("norm", "global")
        if norm == "global":
            n = (scale * d * self.moved).norm()
        elif norm == "tensor":
            n = self.per_tensor(scale * d)
        masked = d * axes.get("mask", 1.0) * self.moved
        by_norm = 1.0 if norm is None else torch.where(n > 0, 1 / (n + EPS), torch.zeros_like(n))
        return w + self.option("rho") * scale**2 * masked * by_norm

    def step(self, u: Tensor) -> None:
        """The base optimizer's step with u in the gradient's place."""
        for p, part in zip(self.params, u.split(self.sizes), strict=True):
            p.grad = part.reshape(p.shape).clone()
        self.base.step()

    def keep(self, **state: Tensor) -> None:
        self.state.update(state)

    def momentum(self, name: str) -> Tensor | None:
        states = [self.base.state[p].get(name) for p in self.params]
        return None if None in states else torch.cat([s.flatten() for s in states])


class Halves(Run):
    """Each half of a batch perturbs along its own g1: weights of both halves are two rows."""

    def up(self, d: Tensor) -> Tensor:
        return torch.stack([super(Halves, self).up(self.grad(half=half)) for half in (0, 1)])

    def grad(self, at: Tensor | None = None, half: int | None = None) -> Tensor:
        if at is None or at.dim() == 1:
            return super().grad(at, half)
        return (super().grad(at[0], 0) + super().grad(at[1], 1)) / 2


# -- the rules -------------------------------------------------------------------------------------


def sam(r: Run) -> None:
    r.step(r.grad(r.up(r.grad())))


def samdirection(r: Run) -> None:
    g1 = r.grad()
    g2 = r.grad(r.up(g1))
    r.step(g1.norm() / (g2.norm() + EPS) * g2)


def sammagnitude(r: Run) -> None:
    g1 = r.grad()
    g2 = r.grad(r.up(g1))
    r.step(g2.norm() / (g1.norm() + EPS) * g1)


def gsam(r: Run) -> None:
    g1 = r.grad()
    g2 = r.grad(r.up(g1))
    c = (g1 @ g2) / (g1.norm() * g2.norm() + EPS) * g1.norm() / (g2.norm() + EPS)
    r.step(g2 - r.option("alpha") * (g1 - c * g2))


def wsam(r: Run) -> None:
    """With max_norm: both gradients are clipped, after the perturbation."""
    g1 = r.grad()
    g2 = r.grad(r.up(g1))
    g1, g2 = (g * (r.option("max_norm") / (g.norm() + 1e-6)).clamp(max=1) for g in (g1, g2))
    alpha = r.option("gamma") / (1 - r.option("gamma"))
    r.step(g1)
    r.set(r.w - r.option("lr") * alpha * (g2 - g1))


def wsam_coupled(r: Run) -> None:
    g1 = r.grad()
    alpha = r.option("gamma") / (1 - r.option("gamma"))
    r.step((1 - alpha) * g1 + alpha * r.grad(r.up(g1)))


def penalty(r: Run) -> None:
    g1 = r.grad()
    r.step((1 - r.option("alpha")) * g1 + r.option("alpha") * r.grad(r.up(g1)))


def penalty_normed(r: Run) -> None:
    g1 = r.grad()
    r.step((1 - r.option("alpha")) * g1 / (g1.norm() + EPS) + r.option("alpha") * r.grad(r.up(g1)))


def friendly(r: Run) -> None:
    g1 = r.grad()
    m, lmbda = r.state.get("m"), r.option("lmbda")
    d = g1 if m is None else g1 - r.option("sigma") * m
    r.keep(m=g1 if m is None else lmbda * m + (1 - lmbda) * g1)
    r.step(r.grad(r.up(d)))


def vasso(r: Run) -> None:
    g1 = r.grad()
    m, theta = r.state.get("m"), r.option("theta")
    r.keep(m=g1 if m is None else (1 - theta) * m + theta * g1)
    r.step(r.grad(r.up(r.state["m"])))


def look(r: Run) -> None:
    g1, gv = r.grad(), r.state.get("gv")
    if r.t % int(r.groups[0]["k"]) == 0:
        g2 = r.grad(r.up(g1))
        r.keep(gv=g2 - (g1 @ g2) / (g1 @ g1 + EPS) * g1)
        r.step(g2)
    else:
        r.step(g1 + r.option("alpha") * g1.norm() / (gv.norm() + EPS) * gv)


def saner(r: Run) -> None:
    g1 = r.grad()
    g2 = r.grad(r.up(g1))
    ratio = g2 / (g1 + 1e-8)
    r.step(torch.where((ratio > 0) & (ratio < 1), 1 - r.option("alpha"), 1.0) * g2)


def xsam(r: Run) -> None:
    g1, a = r.grad(), r.option("a")
    g2 = r.grad(r.up(g1))
    t = torch.arccos((g1 @ g2) / (g1.norm() * g2.norm()))
    v0, v1 = g1 / g1.norm(), g2 / g2.norm()
    r.step(g2.norm() * (torch.sin((1 - a) * t) * v0 + torch.sin(a * t) * v1) / torch.sin(t))


def msam(r: Run) -> None:
    v = r.momentum("momentum_buffer" if isinstance(r.base, torch.optim.SGD) else "exp_avg")
    r.step(r.grad() if v is None else r.grad(r.up(-v)))


def bar(r: Run) -> None:
    g, lr = r.grad(), r.option("lr")
    n = r.per_tensor(g if r.axes["kind"] == "n" else r.w)
    a, b = (r.owner == i for i in r.axes["pair"])
    s = torch.sign(n[a][0] - n[b][0]) * (1 if r.axes["kind"] == "n" else -1)
    r.set(r.w * (1 + r.option("alpha") * lr * s * (a.double() - b.double())))
    r.step(g)


def plain(r: Run) -> None:
    r.step(r.grad())
