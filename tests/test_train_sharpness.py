"""Sharpness against a dense Hessian."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call

from tests.train_helpers import quiet
from train import sharpness
from train.inputs.data import load_dataset
from train.loop import run
from train.loop.checkpoint import locked
from train.settings.config import Config
from train.shared.errors import CheckpointError, ConfigError, InUseError, NumericsError
from train.spectrum import curvature
from train.spectrum.curvature import eigenvalues, lambda_max, report_sharpness
from train.spectrum.hessian import Batch, Hessian
from train.spectrum.lanczos import extreme_eigenvalues


def tiny(dtype: torch.dtype) -> tuple[nn.Module, list[Batch]]:
    """41 parameters, batch norm included; two batches of different size."""
    torch.manual_seed(0)
    layers = (nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1, bias=False))
    model = nn.Sequential(*layers, nn.Linear(1, 2)).to(dtype)
    images = 3 * torch.randn(12, 4, dtype=dtype)
    model(images)  # in training mode: running statistics that are not the initial ones
    labels = torch.randint(0, 2, (12,))
    return model, [(images[:8], labels[:8]), (images[8:], labels[8:])]


def dense_hessian(model: nn.Module, batches: list[Batch]) -> np.ndarray:
    names, params = zip(*model.named_parameters(), strict=True)
    images = torch.cat([x for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    sizes = [p.numel() for p in params]

    def loss(flat: Tensor) -> Tensor:
        pieces = [x.view_as(p) for x, p in zip(flat.split(sizes), params, strict=True)]
        return F.cross_entropy(
            functional_call(model, dict(zip(names, pieces, strict=True)), (images,)), labels
        )

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    return torch.autograd.functional.hessian(loss, flat).numpy()


def test_hessian_vector_products_are_the_dense_ones() -> None:
    model, batches = tiny(torch.float64)
    model.eval()
    dense = dense_hessian(model, batches)
    for memory in (None, 1, 4000):  # graphs kept; one image at a time; some
        operator = Hessian(model, batches, memory)
        product = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
        np.testing.assert_allclose(product, dense, rtol=1e-10, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_graphs_of_gradients_are_kept_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they do not, as many images at a time as fit, each product anew."""
    model, batches = tiny(torch.float32)  # 8 and 4 images
    model.eval()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _m, inputs: passes.append(len(inputs[0])))
    operator = Hessian(model, batches)
    per_image = operator._bytes_per_image()
    vector = torch.ones(operator.shape[0])
    passes.clear()
    _ = operator @ vector, operator @ vector
    assert passes == []
    for images, expected in ((12, []), (11, [8, 4]), (7, [7, 1, 4]), (3, [3, 3, 2, 3, 1])):
        operator = Hessian(model, batches, images * per_image)
        passes.clear()
        _ = operator @ vector
        assert passes == expected
    monkeypatch.setattr("train.spectrum.hessian.free_memory", lambda _: 5 * per_image / 0.6 + 1)
    operator = Hessian(model, batches)
    passes.clear()
    _ = operator @ vector
    assert passes == [5, 3, 4]


def test_bytes_of_a_graph_are_counted() -> None:
    """A linear layer's double backward keeps its input and its output's gradient, at the least."""
    model = nn.Sequential(nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 10))
    operator = Hessian(model, [(torch.randn(3, 100), torch.zeros(3, dtype=torch.int64))])
    assert 4 * (100 + 50 + 50) < operator._bytes_per_image() < 4 * 10 * (100 + 50 + 10)


def test_what_is_linear_has_no_second_derivatives() -> None:
    """A parameter that is not used, and one that only adds to all logits alike."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2))
            self.scale = nn.Parameter(torch.tensor([1.0, -1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    batch = (torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
    operator = Hessian(Odd(), [batch])
    product = operator @ torch.eye(4)
    p = float(torch.softmax(torch.tensor([1.0, -2.0]), 0)[0])
    expected = p * (1 - p) * torch.tensor([[1.0, -2.0], [-2.0, 4.0]])
    torch.testing.assert_close(product[2:, 2:], expected)
    assert not product[:2].any() and not product[:, :2].any()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-3), (torch.float32, 1e-3)])
def test_lambda_max_is_the_dense_one(dtype: torch.dtype, rtol: float) -> None:
    model, batches = tiny(dtype)
    model.eval()
    eigenvalues = np.linalg.eigvalsh(dense_hessian(model, batches))
    assert eigenvalues[-1] > 0 and eigenvalues[-1] > eigenvalues[-2] + 1e-3
    np.testing.assert_allclose(lambda_max(model, batches), eigenvalues[-1], rtol=rtol)


def test_the_largest_not_the_largest_in_magnitude() -> None:
    """Eigenvalues -10, 0 and 1: the loss of logits (s, 0) with label 0 has slope -1/2 at s = 0."""

    class Saddle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            s = 10 * self.w[0] ** 2 - self.w[1] ** 2
            return torch.stack([s.expand(len(x)), torch.zeros(len(x))], dim=1)

    batches = [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))]
    np.testing.assert_allclose(lambda_max(Saddle(), batches), 1.0, rtol=1e-3)


def test_model_is_left_as_it_was() -> None:
    model, batches = tiny(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lambda_max(model, batches)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_extreme_eigenvalues_of_each_kind() -> None:
    model, batches = tiny(torch.float64)
    model.eval()
    dense = np.linalg.eigvalsh(dense_hessian(model, batches))
    operator = Hessian(model, batches)
    products: list[int] = []
    for which, expected in (
        ("LA", dense[-2:]),
        ("SA", dense[:2]),
        ("LM", np.sort(dense[np.argsort(-abs(dense))[:2]])),
    ):
        found = eigenvalues(operator, 2, which, each=lambda: products.append(1))
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert products


SPECTRA = {
    "as of a network": [50.0, 30, 20, 10, 9, 8, 7, 6, -3, -2],
    "each several times": [5.0, 5, 4, -6, -6, 3, 2],
    "close together": [10.0, 9.99, 9.98, 9.97, 9.96, -9.95, -9.94],
}


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("number", [1, 5])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_lanczos_against_the_spectrum(spectrum: str, number: int, which: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, generator=generator, dtype=torch.float64) * 1e-2
    if spectrum == "each several times":
        values[:] = 1.0
    values[: len(SPECTRA[spectrum])] = torch.tensor(SPECTRA[spectrum], dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))
    matrix = ((turn * values) @ turn.T).float()
    start = torch.randn(300, generator=generator)
    products: list[int] = []
    found = extreme_eigenvalues(
        lambda v: matrix @ v, start, number, which, tolerance=1e-3, each=lambda: products.append(1)
    )
    keys = {"LA": -values, "SA": values, "LM": -values.abs()}[which]
    expected = values[keys.argsort()[:number]].sort().values
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert len(products) <= 150


def test_lanczos_of_a_small_operator_has_all_its_eigenvalues() -> None:
    matrix = torch.diag(torch.tensor([3.0, -1.0, 0.5]))
    start = torch.tensor([1.0, 2.0, 3.0])
    found = extreme_eigenvalues(lambda v: matrix @ v, start, 5, "LM", tolerance=1e-3)
    expected = torch.tensor([-1.0, 0.5, 3.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_lanczos_that_does_not_converge_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.spectrum.lanczos.MAX_PRODUCTS", 20)
    values = torch.linspace(-1, 1, 500)
    with pytest.raises(NumericsError, match=r"did not converge in \d+ products: residuals"):
        extreme_eigenvalues(lambda v: values * v, torch.ones(500), 5, "LM", tolerance=1e-6)


def test_eigenvalues_are_of_the_contiguous_network() -> None:
    """Memory formats do not change them, and the trained network keeps its own."""
    config = settings(
        sharpness_batches=1, sharpness_batch_size=20, channels_last=True, model="resnet_small"
    )
    dataset = load_dataset(config, torch.device("cpu"))
    torch.manual_seed(0)
    model = run.build_model("resnet_small", (1, 8, 8), 10)
    plain = curvature.measure(model, dataset, settings(**CONTIGUOUS), quiet())
    model.to(memory_format=torch.channels_last)
    found = curvature.measure(model, dataset, config, quiet())
    assert found["eigenvalues"] == plain["eigenvalues"]
    weight = next(p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)


CONTIGUOUS: dict[str, Any] = {"sharpness_batches": 1, "sharpness_batch_size": 20}


def test_weights_that_are_not_finite_are_said() -> None:
    model, batches = tiny(torch.float32)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite"):
        lambda_max(model, batches)


def test_the_reports_figure_is_the_mean_of_the_positive_values() -> None:
    assert report_sharpness([[4.0, -9.0, 1.0], [0.0, 1.0]]) == 2.0
    assert report_sharpness([[-1.0]]) is None


def settings(**keys: Any) -> Config:
    return Config(**{"dataset": "digits", "model": "resnet_small", "sharpness_samples": 0, **keys})


def test_batches_are_full_augmented_and_go_on_into_further_epochs() -> None:
    dataset = load_dataset(settings(), torch.device("cpu"))
    batches = list(curvature.training_batches(dataset, 5, 400, seed=3))  # 2 full ones per epoch
    assert [len(labels) for _, labels in batches] == [400] * 5
    epochs = [list(curvature.train_batches(dataset, 400, 3, epoch)) for epoch in range(3)]
    expected = [*epochs[0][:2], *epochs[1][:2], epochs[2][0]]
    for (images, labels), (right_images, right_labels) in zip(batches, expected, strict=True):
        assert torch.equal(images, right_images) and torch.equal(labels, right_labels)
    with pytest.raises(ConfigError, match="sharpness_batch_size=1001"):
        next(curvature.training_batches(dataset, 1, 1001, seed=0))


class Shallow(nn.Module):
    """110 parameters for digits of 8x8 pixels: small enough for a dense Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.head = nn.Linear(4, 10)
        self.scale = nn.Parameter(torch.ones(58))  # used, and linear: rows of zeros in places

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(self.norm(x), 2).flatten(1).tanh()
        return self.head(pooled) * self.scale[:10]


def test_the_whole_protocol_against_dense_hessians() -> None:
    """Every figure of measure(), each from its own definition."""
    config = settings(
        sharpness_batches=2, sharpness_batch_size=100, sharpness_samples=300, trace_vectors=100,
        density_steps=30,
    )  # fmt: skip
    dataset = load_dataset(config, torch.device("cpu"))
    torch.manual_seed(0)
    model = Shallow()
    for images, _ in curvature.train_batches(dataset, 250, 0, 7):
        model(images)
    state = torch.get_rng_state()
    found = curvature.measure(model, dataset, config, quiet())
    assert torch.equal(torch.get_rng_state(), state) and model.training

    model.eval()
    pooled = []
    for batch in curvature.training_batches(dataset, 2, 100, seed=0):
        dense = np.linalg.eigvalsh(dense_hessian(model, [batch]))
        pooled.append(np.sort(dense[np.argsort(-abs(dense))[:5]]))
    np.testing.assert_allclose(found["eigenvalues"], pooled, rtol=1e-2, atol=1e-4)
    positive = np.concatenate(pooled)
    np.testing.assert_allclose(found["sharpness"], positive[positive > 0].mean(), rtol=2e-3)
    np.testing.assert_allclose(found["largest_eigenvalue"], positive.max(), rtol=2e-3)
    assert found["negative_share"] == np.mean(np.array(found["eigenvalues"]) < 0)

    fixed = (dataset.normalise(dataset.train.images[:300]), dataset.train.labels[:300])
    hessian_matrix = dense_hessian(model, [fixed])
    dense = np.linalg.eigvalsh(hessian_matrix)
    np.testing.assert_allclose(found["lambda_max"], dense[-1], rtol=2e-3)
    np.testing.assert_allclose(found["lambda_min"], dense[0], rtol=2e-3, atol=1e-5)
    assert found["trace_error"] < 0.2 * np.trace(hessian_matrix)
    assert abs(found["trace"] - np.trace(hessian_matrix)) < 4 * found["trace_error"]
    values, density = (np.array(found["density"][name]) for name in ("values", "density"))
    width = values[1] - values[0]
    assert (density.sum() * width) == pytest.approx(1, abs=0.02)  # it is a density
    # One random vector weighs eigenvalues unequally: the mass at zero, of most of them, is near.
    near_zero = density[abs(values) < 0.1 * dense[-1]].sum() * width
    assert near_zero == pytest.approx((abs(dense) < 0.1 * dense[-1]).mean(), abs=0.2)


def test_every_part_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.shared.progress.LINE_EVERY", 0.0)
    config = settings(
        sharpness_batches=1, sharpness_batch_size=20, sharpness_samples=20, trace_vectors=2,
        density_steps=3,
    )  # fmt: skip
    dataset = load_dataset(config, torch.device("cpu"))
    shown = io.StringIO()
    curvature.measure(Shallow(), dataset, config, Console(file=shown, width=200))
    text = shown.getvalue()
    for part in ("batch 1/1", "lambda_max", "lambda_min"):
        assert re.search(rf"{part} .*products 2\n", text), part
    assert "trace  mean" in text and "spectral density  products 3  0 s left" in text
    assert "nan" not in text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = settings(
        epochs=1, batch_size=100, threads=1, device="cpu", output_dir=str(folder), label_noise=0.1
    )
    run.run(config, quiet())
    return folder


def test_command_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--sharpness_batches=1", "--sharpness_batch_size=8", "--sharpness_samples=8",
        "--trace_vectors=2", "--density_steps=3", f"--output_dir={tmp_path}", "--device=cpu",
    ]  # fmt: skip
    before = (trained / "best.pt").read_bytes()
    assert sharpness.main([str(trained / "best.pt"), *flags]) == 0
    assert (trained / "best.pt").read_bytes() == before
    found = json.loads((tmp_path / "sharpness.json").read_text())
    output = capsys.readouterr().out
    assert f"sharpness: {found['sharpness']:.4g}" in output
    assert len(found["eigenvalues"]) == 1 and len(found["eigenvalues"][0]) == 5
    assert found["lambda_max"] > 0 and found["trace_error"] > 0 and found["epoch"] == 1
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")
    # What it is: the trained weights, and the noisy labels of the run.
    config = settings(label_noise=0.1)
    dataset = load_dataset(config, torch.device("cpu"))
    model = run.build_model("resnet_small", (1, 8, 8), 10)
    model.load_state_dict(torch.load(trained / "best.pt", weights_only=True)["model"])
    fixed = (dataset.normalise(dataset.train.images[:8]), dataset.train.labels[:8])
    assert found["lambda_max"] == pytest.approx(lambda_max(model, [fixed]), rel=1e-3)


def test_the_folder_of_a_run_under_way_is_left_alone(trained: Path, tmp_path: Path) -> None:
    flags = ["--sharpness_batches=0", "--sharpness_samples=8", f"--output_dir={tmp_path}"]
    with locked(tmp_path), pytest.raises(InUseError, match="in use by process"):
        sharpness.main([str(trained / "best.pt"), *flags])
    assert not list(tmp_path.iterdir())
    assert sharpness.main([str(trained / "best.pt"), *flags]) == 0


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--lr=1"], "lr is settled by the checkpoint"),
        (["--sharpness_batchs=1"], "did you mean 'sharpness_batches'"),
        (["--density_steps=1"], "density_steps=1"),
    ],
)
def test_command_line_errors(trained: Path, flags: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        sharpness.main([str(trained / "best.pt"), *flags])


def test_foreign_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        sharpness.main([str(tmp_path / "best.pt")])
    torch.save({"model": {}}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="no checkpoint of this version"):
        sharpness.main([str(tmp_path / "best.pt")])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert sharpness.main(["--help"]) == 0
    assert "--trace_vectors=32" in capsys.readouterr().out
