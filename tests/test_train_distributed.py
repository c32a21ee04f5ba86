"""Data parallel: two processes do what one does, up to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from train.loop import distributed, run
from train.settings.config import Config
from train.shared.errors import ConfigError

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def command(folder: Path, **keys: Any) -> list[str]:
    """A run whose batches of 99 images divide into 49 and 50, and whose last one has 10."""
    flags = {
        "dataset": "digits", "model": "resnet_small", "opt_name": "sammagnitude", "rho": 0.1,
        "granularity": "global", "epochs": 2, "batch_size": 99, "device": "cpu", "threads": 1,
        "verify_steps": 3, "sharpness_samples": 0, "statistics_every": 3, "lr": 0.001,
        "output_dir": folder, **keys,
    }  # fmt: skip
    return ["-m", "train", *(f"--{key}={value}" for key, value in flags.items())]


def finish(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    done = finish([sys.executable, *command(tmp_path / "one")])
    assert done.returncode == 0, done.stderr
    done = finish([*TORCHRUN, *command(tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy, %") == 1  # one of them speaks
    one, two = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["verification"]["steps"] == 3 and two["verification"]["value"] <= 1e-5
    first, last = ((one["history"][i], two["history"][i]) for i in (0, -1))
    assert set(first[0]) == set(first[1])
    # Rounding grows in training, and a ReLU at its kink makes a gradient jump: see below for the
    # gradients of one step in double precision.
    for name in ("train_loss", "val_loss"):
        assert first[1][name] == pytest.approx(first[0][name], rel=1e-5)
        assert last[1][name] == pytest.approx(last[0][name], rel=1e-3)
    for name in ("first_grad_norm", "second_grad_norm", "weight_norm", "cosine"):
        assert first[1][name] == pytest.approx(first[0][name], rel=5e-3), name
    test = [r["figures"]["test_loss"] for r in (one, two)]  # sharded, and of the best weights
    assert test[1] == pytest.approx(test[0], rel=1e-3)
    states = [torch.load(tmp_path / n / "best.pt", weights_only=True) for n in ("one", "two")]
    assert states[0]["epoch"] == states[1]["epoch"]
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], value, rtol=1e-2, atol=2e-3, msg=name)


def test_sgdhess_is_for_one_process(tmp_path: Path) -> None:
    done = finish([*TORCHRUN, *command(tmp_path, opt_name="sgdhess")])
    assert done.returncode != 0
    assert "opt_name=sgdhess in 2 processes" in done.stderr
    assert "allowed one process" in done.stderr


@pytest.mark.parametrize(
    ("perturbation", "opt_name"), [("local", "sam"), ("local", "sammagnitude"), ("group", "sam")]
)
def test_processes_perturb_on_their_own(tmp_path: Path, perturbation: str, opt_name: str) -> None:
    """In lockstep with the reference; the weights stay the same in both, those of batch norm too.

    A group of both is the mean over all, and one of one process each is local."""
    groups = {"perturbation_group": 1} if perturbation == "group" else {}
    keys = {"opt_name": opt_name, "perturbation": perturbation, "statistics_every": 0, **groups}
    done = finish([*TORCHRUN, *command(tmp_path, **keys)])
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["verification"]["steps"] == 3 and result["verification"]["value"] <= 1e-5
    assert result["history"][-1]["train_loss"] < result["history"][0]["train_loss"]


def test_groups_divide_the_processes(tmp_path: Path) -> None:
    keys = {"perturbation": "group", "perturbation_group": 3}
    done = finish([*TORCHRUN, *command(tmp_path, **keys)])
    assert done.returncode != 0
    assert "perturbation_group=3 does not divide 2 processes: allowed are 1, 2" in done.stderr
    with pytest.raises(ConfigError, match="perturbation=group is for several processes"):
        distributed.own_group(1)


SCRIPT = """
import torch
import torch.nn.functional as F
from train.loop import distributed
from train.models import build_model

torch.set_num_threads(1)
with distributed.process_group("cpu") as processes:
    torch.manual_seed(0)
    images, labels = torch.randn(9, 1, 8, 8).double(), torch.randint(0, 10, (9,))
    plain = build_model("resnet_small", (1, 8, 8), 10).double()
    shared = build_model("resnet_small", (1, 8, 8), 10).double()
    shared.load_state_dict(plain.state_dict())
    F.cross_entropy(plain(images), labels).backward()
    device = torch.device("cpu")
    network = distributed.parallel(distributed.synchronise_batchnorm(shared, device), device)
    part = slice(0, 4) if processes.rank == 0 else slice(4, 9)
    distributed.mean_loss(network(images[part]), labels[part], 9, 2).backward()
    for (name, ours), theirs in zip(shared.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=name)
    for (name, ours), theirs in zip(shared.named_buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)
"""


def test_gradients_of_uneven_shares_are_those_of_the_batch(tmp_path: Path) -> None:
    """In double precision, so that nothing but rounding is left; batch-norm statistics too."""
    (tmp_path / "step.py").write_text(SCRIPT)
    done = subprocess.run(
        [*TORCHRUN, str(tmp_path / "step.py")], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


DYING = (
    "epoch = run.Training.epoch\n"
    "def dying(self, number, *rest):\n"
    "    if number == 2: os._exit(9)\n"
    "    return epoch(self, number, *rest)\n"
    "run.Training.epoch = dying\n"
)
TERMINATED = (
    "step = run.Training.take_step\n"
    "def signalled(self, *arguments):\n"
    "    if self.done == 5 and self.processes.rank == 1: signal.raise_signal(signal.SIGTERM)\n"
    "    return step(self, *arguments)\n"
    "run.Training.take_step = signalled\n"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes without a break."""
    folder = tmp_path_factory.mktemp("whole")
    done = finish([*TORCHRUN, *command(folder, verify_steps=0, batch_size=250)])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("end", [DYING, TERMINATED], ids=["killed", "terminated"])
def test_two_processes_resume(tmp_path: Path, whole: Path, end: str) -> None:
    """Killed after the first epoch, or one of them told to end within the second: resumed, they do
    bit for bit what two processes do without a break."""
    script = (
        "import os, signal, sys, train.loop.run as run\n"
        f"from train.__main__ import main\n{end}main(sys.argv[1:])\n"
    )
    (tmp_path / "dying.py").write_text(script)
    flags = command(tmp_path / "parts", verify_steps=0, batch_size=250)[2:]
    launch = [*TORCHRUN, str(tmp_path / "dying.py")]
    done = subprocess.run(
        [*launch, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0 and (tmp_path / "parts" / "last.pt").exists(), done.stderr
    state = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)
    assert state["done"] == (4 if end is DYING else 6)
    again = command(tmp_path / "parts", verify_steps=0, batch_size=250, resume="true")
    done = finish([*TORCHRUN, *again])
    assert done.returncode == 0, done.stderr
    histories = [
        json.loads((folder / "result.json").read_text())["history"]
        for folder in (whole, tmp_path / "parts")
    ]
    for entry in [*histories[0], *histories[1]]:
        del entry["seconds"]
    assert histories[0] == histories[1]


def test_a_batch_for_fewer_than_all_processes_is_refused() -> None:
    config = Config(dataset="digits", model="resnet_small", batch_size=333, device="cpu")
    run.Training(Config(**{**vars(config), "batch_size": 332}))  # 1000 = 3 * 332 + 4
    with pytest.raises(ConfigError, match="batch_size=333 leaves a last batch of one image"):
        run.Training(config)


def test_synchronised_batchnorm_of_one_process_is_batchnorm() -> None:
    """World size 1: the arithmetic, its gradients and its statistics against torch's own."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    ours = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    ours.load_state_dict(plain.state_dict())
    distributed.synchronise_batchnorm(ours, torch.device("cpu"))
    assert type(ours[1]) is distributed.CpuSyncBatchNorm
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        for mode in (True, True, False):
            x = 5 + 3 * torch.randn(4, 2, 6, 6)
            outputs = []
            for model in (plain, ours):
                model.train(mode)
                model.zero_grad()
                outputs.append(model(x))
                outputs[-1].pow(3).mean().backward()
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
            pairs = zip(ours.parameters(), plain.parameters(), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
            for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(a, b)
    finally:
        torch.distributed.destroy_process_group()


def test_losses_of_uneven_shares_average_to_the_mean() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    whole = nn.functional.cross_entropy(logits, labels)
    shares = [
        distributed.mean_loss(logits[part], labels[part], 5, 2) for part in (slice(2), slice(2, 5))
    ]
    torch.testing.assert_close(torch.stack(shares).mean(), whole)
