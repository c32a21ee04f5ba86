"""Measure how much of SAM's perturbation survives in bfloat16 weights: `python -m
bench.bf16_perturbation`.

Weights and gradients are normal; the standard deviation of the weights is 0.02, as in transformers.
"""

from __future__ import annotations

import torch

from samkernels import ops

NUMEL = (10**6, 10**7)
RADII = (0.05, 0.1, 0.2, 0.5)
STD = 0.02


def survival(numel: int, rho: float, rounding: str) -> tuple[float, float, float]:
    """The weights move by d, where e is asked for: the share of d != 0, d.e / |e|^2, |d| / |e|."""
    generator = torch.Generator().manual_seed(0)
    w = (STD * torch.randn(numel, generator=generator)).bfloat16()
    g = torch.randn(numel, generator=generator).bfloat16()
    moved, old = w.clone(), torch.empty_like(w)
    ops.perturb_([moved], [g], [old], rho=rho, rounding=rounding)
    e = rho * g.double() / g.double().norm()
    d = moved.double() - w.double()
    return (d != 0).double().mean().item(), (d @ e / rho**2).item(), d.norm().item() / rho


def main() -> None:
    print("| parameters | rho | rounding | elements moved | along e(w) | length |")
    print("| --- | --- | --- | --- | --- | --- |")
    for numel in NUMEL:
        for rho in RADII:
            for rounding in ops.ROUNDINGS:
                share, along, length = survival(numel, rho, rounding)
                row = (f"{numel:.0e}", rho, rounding, f"{share:.0%}", f"{along:.3f}")
                print("|", *(f"{cell} |" for cell in row), f"{length:.2f} |")


if __name__ == "__main__":
    main()
