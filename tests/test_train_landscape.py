"""Loss landscapes: directions, the losses along them, the command."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.train_helpers import quiet
from train import landscape
from train.inputs.data import Split, load_dataset
from train.loop import run
from train.settings.config import Config
from train.shared.errors import ConfigError

CPU = torch.device("cpu")


def test_filters_of_a_direction_have_the_norms_of_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    with torch.no_grad():
        model[0].weight[1].zero_()
    found = landscape.direction(model, seed=1)
    for p, d in zip(model.parameters(), found, strict=True):
        assert d.shape == p.shape
        norms = p.detach().flatten(1).norm(dim=1) if p.ndim > 1 else torch.zeros(len(p))
        lengths = d.flatten(1).norm(dim=1) if p.ndim > 1 else d
        torch.testing.assert_close(lengths, norms)
    again, other = landscape.direction(model, seed=1), landscape.direction(model, seed=2)
    assert torch.equal(found[0], again[0]) and not torch.equal(found[0], other[0])


def test_losses_are_those_of_the_moved_weights() -> None:
    dataset = load_dataset(Config(dataset="digits"), CPU)
    split = dataset.train[:50]
    torch.manual_seed(0)
    model = run.build_model("mlp", (1, 8, 8), 10)
    before = [p.detach().clone() for p in model.parameters()]
    first, second = (landscape.direction(model, seed) for seed in (0, 1))
    found = landscape.loss_at(model, dataset, split, [(0.5, first), (-2.0, second)])
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        for p, a, b in zip(model.parameters(), first, second, strict=True):
            p += 0.5 * a - 2.0 * b
        logits = model(dataset.normalise(split.images))
        expected = nn.functional.cross_entropy(logits, split.labels)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_weights_are_put_back_whatever_happens() -> None:
    dataset = load_dataset(Config(dataset="digits"), CPU)
    model = run.build_model("mlp", (1, 8, 8), 10)
    before = [p.detach().clone() for p in model.parameters()]
    wrong = Split(torch.zeros(3, 1, 5, 5, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        landscape.loss_at(model, dataset, wrong, [(1.0, landscape.direction(model, 0))])
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


def test_command_line(tmp_path: Path) -> None:
    paths = []
    for seed in (0, 1):
        config = Config(
            dataset="digits", model="mlp", epochs=1, batch_size=250, device="cpu", threads=1,
            sharpness_samples=0, seed=seed, output_dir=str(tmp_path / f"seed{seed}"),
        )  # fmt: skip
        run.run(config, quiet())
        paths.append(str(tmp_path / f"seed{seed}" / "best.pt"))
    flags = ["--points=5", "--grid=3", "--extent=0.5", "--sharpness_samples=40"]
    assert landscape.main([*paths, *flags, f"--output_dir={tmp_path}"]) == 0
    runs = json.loads((tmp_path / "landscape.json").read_text())["runs"]
    assert [entry["name"] for entry in runs] == ["seed0", "seed1"]
    for entry in runs:
        line, plane = entry["line"], entry["plane"]
        assert line["at"] == [-0.5, -0.25, 0.0, 0.25, 0.5] and plane["at"] == [-0.5, 0.0, 0.5]
        # The first direction is in both: the plane's middle row is the line.
        assert plane["loss"][1] == pytest.approx([line["loss"][i] for i in (0, 2, 4)])
        assert min(line["loss"]) > 0
    assert (tmp_path / "landscape.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--points=0"], "points=0 with grid=0 leave nothing to do"),
        (["--points=many"], "points=many is no number: default 25"),
        (["--extent=-1"], "extent=-1 is below 0"),
        (["--lr=1"], "lr is settled by the checkpoint: allowed points, grid, extent"),
    ],
)
def test_command_line_errors(tmp_path: Path, flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        landscape.main([str(tmp_path / "best.pt"), *flags])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert landscape.main(["--help"]) == 0
    assert "--points=25" in capsys.readouterr().out
