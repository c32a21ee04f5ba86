"""FSDP2: sharded parameters are trained as whole ones are. What the processes check is in
tests/fsdp_worker.py; they run once as 2 and once as 4 processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed.fsdp", reason="no torch.distributed here")
if not hasattr(torch.distributed.fsdp, "fully_shard"):
    pytest.skip("this version of torch has no FSDP2", allow_module_level=True)

from tests import fsdp_worker
from tests.fsdp_worker import ALL_STEPS, BASES, SAVED_AFTER, TOLERANCE, Net, all_of, train
from tests.processes import run_ranks

SIZES = (2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes left what they found, and their checkpoints."""
    folder = tmp_path_factory.mktemp("fsdp")
    for size in SIZES:
        codes, errors = run_ranks("tests.fsdp_worker", size, size, folder)
        if not (folder / f"{size}-0.json").exists():
            pytest.fail(f"{size} processes did not start: {errors[0]}")
        if any(codes):
            break  # more processes need what these were to save
    return folder


@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size in SIZES for name in fsdp_worker.names_of_checks(size)]
)
def test_processes(name: str, size: int, folder: Path) -> None:
    outcomes = [
        json.loads(path.read_text()).get(name, "not reached: see the checks before it")
        for path in sorted(folder.glob(f"{size}-*.json"))
    ]
    failures = [outcome for outcome in outcomes if outcome != "passed"]
    assert not failures, "\n".join(failures)
    assert len(outcomes) == size


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to load in a single process")
@pytest.mark.parametrize("base", BASES)
def test_resuming_on_one_process(base: str, folder: Path) -> None:
    """A checkpoint of two processes, in a net that is not sharded."""
    net = Net(seed=1)
    optimizer = fsdp_worker.resume(net, base, folder)
    train(net, optimizer, range(SAVED_AFTER, ALL_STEPS))
    expected = torch.load(folder / f"{base}.pt", weights_only=True)
    torch.testing.assert_close(all_of(net, optimizer), expected, **TOLERANCE[torch.float64])
