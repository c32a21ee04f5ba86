"""What runs will cost."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from train import study
from train.inputs.data import load_dataset
from train.loop import cost
from train.settings.config import Config
from train.shared.errors import DataError

CPU = torch.device("cpu")


def config(**keys: Any) -> Config:
    return Config(
        **{
            "dataset": "digits", "model": "mlp", "epochs": 3, "batch_size": 100, "device": "cpu",
            "threads": 1, "sharpness_samples": 0, **keys,
        }
    )  # fmt: skip


def test_gradient_evaluations_are_counted() -> None:
    """Epochs times images times passes; products with the Hessian by their parts."""
    for opt_name, passes in (("sgd", 1), ("adamw", 1), ("sam", 2), ("samdirection", 2)):
        assert cost.evaluations(config(opt_name=opt_name), 1000) == (passes * 3000, 0)
    assert cost.evaluations(config(opt_name="sgdhess"), 1000)[0] > 2 * 3000
    for keys, passes in (
        ({"opt_name": "msam"}, 1), ({"opt_name": "looksam", "k": 5}, 1.2),
        ({"opt_name": "gsam", "when": "periodic:4"}, 1.25),
        ({"opt_name": "sam", "when": "bernoulli:0"}, 1),
        ({"opt_name": "sam", "when": "from:9"}, 1.7),
        ({"opt_name": "sam", "when": "norm:0:0"}, 2),
    ):  # fmt: skip
        assert cost.evaluations(config(**keys), 1000)[0] == pytest.approx(passes * 3000)
    batches = config(sharpness_batches=40, sharpness_batch_size=256)
    expected = 40 * 256 * cost.PRODUCTS["batch"] * cost.PASSES_PER_PRODUCT
    assert cost.evaluations(batches, 1000)[1] == expected
    trace = config(sharpness_samples=2000, trace_vectors=32)
    expected = 1000 * (cost.PRODUCTS["fixed set"] + 32) * cost.PASSES_PER_PRODUCT
    assert cost.evaluations(trace, 1000)[1] == expected


def test_each_kind_of_pass_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def pretend(config: Config, dataset: Any, device: torch.device) -> float:
        measured.append(config.model)
        assert len(dataset.train) == 100
        return {"mlp": 0.001, "resnet_small": 0.01}[config.model]

    monkeypatch.setattr(cost, "seconds_per_image", pretend)
    total = cost.estimate(
        [
            config(), config(opt_name="sam"), config(seed=1, label_noise=0.4),
            config(model="resnet_small", train_samples=200),
        ]
    )  # fmt: skip
    assert sorted(measured) == ["mlp", "resnet_small"]
    assert total.images == 3000 + 6000 + 3000 + 600
    assert total.seconds == pytest.approx(12.0 + 6.0)


def test_a_pass_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes time, and leaves the random state and the threads of a run alone."""
    monkeypatch.setattr(cost, "MEASURED_SECONDS", 0.01)
    dataset = load_dataset(config(), CPU)
    state = torch.get_rng_state()
    for keys in ({}, {"precision": "bf16", "channels_last": True, "model": "resnet_small"}):
        assert 0 < cost.seconds_per_image(config(**keys), dataset, CPU) < 10
    assert torch.equal(torch.get_rng_state(), state)


def test_a_study_says_its_cost_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cost, "seconds_per_image", lambda *_: 0.001)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "common: {dataset: digits, model: mlp, epochs: 1, batch_size: 250, device: cpu, "
        "threads: 1, sharpness_samples: 0, train_samples: 500}\n"
        "runs: [{opt_name: [sgd, sam]}]\n"
    )
    flags = [str(path), f"--output_dir={tmp_path / 'out'}"]
    said = "2 runs: 1.5e+03 gradients of an image in training; about 2 s on this device alone"
    assert study.main(flags) == 0
    text = capsys.readouterr().out
    assert said in text and text.index(said) < text.index("[1/2]")
    assert study.main(flags) == 0  # all done: nothing to say
    assert not re.search("gradients of an image", capsys.readouterr().out)


def test_missing_data_are_said_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders"):
        cost.describe([config(dataset="folder", data_root=str(tmp_path))])
