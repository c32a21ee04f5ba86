"""Small timings, each of which decides something."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from bench.candidates import Problem, problem
from bench.clock import Work
from bench.gpu.cases import FLOOR, Machine, phases
from bench.gpu.goals import Row
from samkernels import ops

OPTIONS: dict[str, Any] = {"backend": "native"}


def misaligned(machine: Machine, dtype: str, rounds: int) -> list[Row]:
    """ResNet-18's list with addresses that are no multiple of 16 bytes, as gradients that are views
    of a bucket have them: what narrow accesses cost."""
    given = problem(machine.lists()["ResNet-18"], machine.device, getattr(torch, dtype))
    w, g1, g2 = given.weights, given.first_grads, given.second_grads
    of_lists = {
        "aligned": given,
        "gradients misaligned": Problem(w, shifted(g1), shifted(g2)),
        "all misaligned": Problem(shifted(w), shifted(g1), shifted(g2)),
    }
    works = {
        f"{lists}|{phase}": work
        for lists, of in of_lists.items()
        for phase, work in phases(of, "native").items()
    }
    found = machine.medians(works, rounds)
    rows: list[Row] = []
    for lists in of_lists:
        us = {phase: found[f"{lists}|{phase}"] for phase in FLOOR}
        total = sum(us.values())
        first = rows[0]["sum us"] if rows else total
        rows.append({"lists": lists, **us, "sum us": total, "of aligned": first / total})
    return rows


def shifted(tensors: list[Tensor]) -> list[Tensor]:
    """The same values one element further in memory."""
    moved = []
    for t in tensors:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        moved.append(room[1:].view(t.shape).copy_(t))
    return moved


def tiny(machine: Machine, rounds: int) -> list[Row]:
    """Fixed costs: the end of the norm against the number of tensors, and a list on each side of
    the limit of the short table (three lists: 106 tensors)."""

    def ones(n: int) -> list[Tensor]:
        return [torch.ones(7, device=machine.device) for _ in range(n)]

    def norms(n: int) -> Work:
        x = ones(n)
        return lambda: ops.dots(x, **OPTIONS)

    def perturb(n: int) -> Work:
        w, g, old = (ones(n) for _ in range(3))
        square = torch.ones((), dtype=torch.float64, device=machine.device)
        return lambda: ops.perturb_(w, g, old, rho=0.0, square=square, **OPTIONS)

    works = {f"norms of {n}": norms(n) for n in (1, 62, 296, 1000)}
    works |= {f"perturb {n}": perturb(n) for n in (100, 110)}
    found = machine.medians(works, rounds, cold=False)
    return [
        {
            "what": name,
            "device us": us,
            "host us": 1e3 * statistics.median(machine.host_ms(works[name]) for _ in range(rounds)),
        }
        for name, us in found.items()
    ]


def at_random(machine: Machine, rounds: int) -> list[Row]:
    """The perturbation with each kind of rounding, in bfloat16."""
    given = problem(machine.lists()["ResNet-18"], machine.device, torch.bfloat16)
    w, g = given.weights, given.first_grads
    old = [torch.empty_like(x) for x in w]
    square = ops.dots(g, backend="native").total[0]

    def perturb(rounding: str) -> Work:
        how: dict[str, Any] = {"rho": 0.05, "square": square, "rounding": rounding}
        return lambda: ops.perturb_(w, g, old, **how, **OPTIONS)

    found = machine.medians({name: perturb(name) for name in ops.ROUNDINGS}, rounds)
    return [{"rounding": name, "device us": us} for name, us in found.items()]


def replay(machine: Machine, rounds: int) -> list[Row]:
    """A whole native step as a CUDA graph: what the launches themselves cost."""
    rows = []
    for of, shapes in machine.lists().items():
        given = problem(shapes, machine.device)
        params = given.parameters()
        step = given.step_of(machine.candidates()["native"](params), params)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what is made once is made before the capture
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        found = machine.medians({"launched": step, "graph": graph.replay}, rounds)
        rows.append({"list": of, **{f"{how}, device us": us for how, us in found.items()}})
        del graph
    return rows
