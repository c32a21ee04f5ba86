"""FSDP2: sharded parameters are trained as whole ones are. What the processes check is in
tests/fsdp_worker.py; each of them goes through all of it, once for 2 and once for 4 processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed.fsdp", reason="no torch.distributed here")
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("this version of torch has no FSDP2", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as dcp_state

from samkernels import SAMMagnitude
from tests.fsdp_worker import ALL_STEPS, CHECKS, SAVED_AFTER, TOLERANCE, Net, buffers_of, train
from tests.optim_helpers import one_thread

__all__ = ["one_thread"]

ROOT = Path(__file__).parent.parent
SIZES = (2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes left what they found, and their checkpoint."""
    folder = tmp_path_factory.mktemp("fsdp")
    for size in SIZES:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone",
             f"--nproc-per-node={size}", str(ROOT / "tests" / "fsdp_worker.py"), str(folder)],
            cwd=ROOT, capture_output=True, text=True, timeout=600,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        (folder / f"{size}.log").write_text(done.stderr)
        if not (folder / f"{size}-0.json").exists():
            pytest.fail(f"{size} processes did not start: {done.stderr}")
        if done.returncode != 0:
            break  # more processes need what these were to save
    return folder


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CHECKS)
def test_processes(name: str, size: int, folder: Path) -> None:
    outcomes = [
        json.loads(path.read_text()).get(name, "not reached: see the checks before it")
        for path in sorted(folder.glob(f"{size}-*.json"))
    ]
    failures = [outcome for outcome in outcomes if outcome != "passed"]
    assert not failures, "\n".join(failures)
    assert len(outcomes) == size


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to load in a single process")
def test_resuming_on_one_process(folder: Path) -> None:
    """A checkpoint of two processes, in a net that is not sharded."""
    net = Net(seed=1)
    optimizer = SAMMagnitude(net.groups(), granularity="global", lr=9.0, momentum=0.9, rho=9.0)
    model_state, optimizer_state = dcp_state.get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    dcp_state.set_state_dict(
        net, optimizer,
        model_state_dict=state["model"], optim_state_dict=state["optimizer"],
    )  # fmt: skip
    train(net, optimizer, range(SAVED_AFTER, ALL_STEPS))
    result = [t.detach() for t in (*net.parameters(), *buffers_of(net, optimizer))]
    expected = torch.load(folder / "uninterrupted.pt", weights_only=True)
    torch.testing.assert_close(result, expected, **TOLERANCE[torch.float64])
