"""What goes wrong at awkward points: the weights come back, and the next step is a whole one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from samkernels import SAM, SAMMagnitude, backends
from samkernels.backends import foreach, native

GRAD = torch.tensor([3.0, -4.0])


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def set_gradients(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = GRAD.clone()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("backend", "module", "name"),
    [
        # Ctrl-C during the C call is raised right after it; in the others, between two tensors.
        ("native", native, "_mark_written"),
        ("interpreted", None, "_mark_written"),
        ("foreach", foreach, "_where"),
        ("reference", torch, "where"),
    ],
)
def test_interrupt_while_perturbing(
    backend: str, module: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [parameter(1.0, 2.0), parameter(3.0, 4.0)]
    # Two groups, so that the second one is interrupted when the first has moved.
    optimizer = SAM([{"params": [p]} for p in params], backend=backend, rho=0.5, lr=0.1)
    module = module or backends.get(backend)
    original: Callable[..., object] = getattr(module, name)
    calls = []

    def second_call_interrupts(*arguments: Tensor) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            interrupt()
        return original(*arguments)

    set_gradients(params)
    monkeypatch.setattr(module, name, second_call_interrupts)
    with pytest.raises(KeyboardInterrupt):
        optimizer.first_step()
    assert len(calls) >= 2
    assert [p.tolist() for p in params] == [[1.0, 2.0], [3.0, 4.0]]
    assert not optimizer.is_perturbed


def test_interrupt_before_anything_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room for old_params holds old values then: it must not be restored from."""
    p = parameter(1.0, 2.0)
    optimizer = SAM([p], rho=0.5, lr=0.0)
    set_gradients([p])
    optimizer.first_step()
    set_gradients([p])
    optimizer.second_step()
    with torch.no_grad():
        p.copy_(torch.tensor([7.0, 8.0]))
    set_gradients([p])
    monkeypatch.setattr(native, "perturb_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.first_step()
    assert p.tolist() == [7.0, 8.0]
    assert not optimizer.is_perturbed


def test_hook_that_raises() -> None:
    p = parameter(1.0, 2.0)
    optimizer = SAM([p], rho=0.5, lr=0.1)
    optimizer.register_step_pre_hook(interrupt)
    set_gradients([p])
    optimizer.first_step()
    set_gradients([p])
    with pytest.raises(KeyboardInterrupt):
        optimizer.second_step()
    assert p.tolist() == [1.0, 2.0]
    assert not optimizer.is_perturbed


@pytest.mark.parametrize("method", ["step", "second_step", "restore", "first_step"])
def test_closure_that_steps_itself(method: str) -> None:
    p = parameter(1.0, 2.0)
    optimizer = SAM([p], rho=0.5, lr=0.1)

    def closure() -> float:
        set_gradients([p])
        getattr(optimizer, method)()
        return 0.0

    with pytest.raises(RuntimeError, match=r"step"):
        optimizer.step(closure)
    assert not optimizer.is_perturbed
    assert p.grad is None


def test_closure_that_fails_leaves_no_gradient_for_the_next_step() -> None:
    p = parameter(1.0, 2.0)
    optimizer = SAM([p], rho=0.5, lr=0.1)
    calls = []

    def closure() -> float:
        calls.append(p.tolist())
        set_gradients([p])
        if len(calls) == 2:
            raise MemoryError
        return float(len(calls))

    with pytest.raises(MemoryError):
        optimizer.step(closure)
    assert p.tolist() == [1.0, 2.0]
    assert optimizer.step(closure) == 3.0
    assert calls[2] == [1.0, 2.0]
    assert len(calls) == 4


def test_memory_that_comes_back_is_restored_later() -> None:
    freed, other = parameter(1.0, 2.0), parameter(3.0, 4.0)
    optimizer = SAM([freed, other], rho=0.5, lr=0.1)
    set_gradients([freed, other])
    optimizer.first_step()
    size = freed.untyped_storage().nbytes()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"shape \(2,\).*lost its memory"):
        optimizer.restore()
    assert other.tolist() == [3.0, 4.0]
    assert optimizer.is_perturbed
    freed.untyped_storage().resize_(size)
    optimizer.restore()
    assert freed.tolist() == [1.0, 2.0]
    assert not optimizer.is_perturbed


def test_hyperparameters_of_all_groups_are_checked_before_the_first_update() -> None:
    params = [parameter(1.0, 2.0), parameter(3.0, 4.0)]
    groups = [{"params": [p]} for p in params]
    optimizer = SAMMagnitude(groups, rho=0.5, lr=0.1, momentum=0.9)
    for _ in range(2):
        set_gradients(params)
        optimizer.first_step()
        set_gradients(params)
        optimizer.second_step()
    weights = [p.tolist() for p in params]
    buffers = [optimizer.state[p]["momentum_buffer"].tolist() for p in params]
    optimizer.param_groups[1]["lr"] = float("nan")
    set_gradients(params)
    optimizer.first_step()
    set_gradients(params)
    with pytest.raises(ValueError, match="lr=nan"):
        optimizer.second_step()
    assert [p.tolist() for p in params] == weights
    assert [optimizer.state[p]["momentum_buffer"].tolist() for p in params] == buffers
