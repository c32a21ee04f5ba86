"""Measure the curvature at a network's weights: sharpness, eigenvalues, trace and spectral density.

Everything is about the Hessian H of the mean cross-entropy, without weight decay, in eval mode and
fp32, over all parameters.
"""

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from train.inputs.data import Dataset, plain_batches, train_batches
from train.settings.config import Config
from train.shared.errors import ConfigError
from train.shared.progress import WorkProgress
from train.shared.results import of_all_batches
from train.spectrum.hessian import Batch, Hessian
from train.spectrum.lanczos import extreme_eigenvalues

BATCH = 256  # the fixed set is summed over batches of so many images
EIGENVALUES = 5  # the report takes so many eigenvalues of each batch
TOLERANCE = 1e-3  # eigenvalues have this relative tolerance, which is the report's
DRAWS_OF_EPOCH = 0  # training begins with epoch 1: it never sees this order and augmentation
SETTINGS = (
    "sharpness_batches", "sharpness_batch_size", "sharpness_samples", "trace_vectors",
    "density_steps",
)  # fmt: skip


def curvlinops() -> Any:
    """Import and return the library: only measuring needs it, training alone does not."""
    with warnings.catch_warnings():
        # torch.jit.script is deprecated, and still in use: by one of the library's dependencies,
        # and by torch itself when the first jvp is taken.
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))
        import curvlinops as library
        import curvlinops.papyan2020traces.spectrum
    return library


def eigenvalues(
    operator: Hessian,
    number: int,
    which: str,
    *,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    each: Callable[[], object] = lambda: None,
) -> list[float]:
    """Return extreme_eigenvalues of the Hessian; the seed gives the random start vector."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(operator.shape[0], generator=generator).to(operator.device, operator.dtype)
    found = extreme_eigenvalues(
        operator.__matmul__, start, number, which, tolerance=tolerance, each=each
    )
    values: list[float] = found.tolist()
    return values


def lambda_max(model: nn.Module, batches: Sequence[Batch], **options: Any) -> float:
    """Return the largest (not largest in magnitude) eigenvalue of the Hessian, in eval mode.

    Args:
        model: the network; its mode is put back, its weights and gradients are not touched.
        batches: normalised images and labels; the loss is their mean cross-entropy.
        options: the keyword arguments of eigenvalues().
    """
    with _EvalMode(model):
        return eigenvalues(Hessian(model, batches), 1, "LA", **options)[0]


def report_sharpness(eigenvalues: Sequence[Sequence[float]]) -> float | None:
    """Return the report's figure: the mean of the positive eigenvalues of all batches."""
    positive = [value for values in eigenvalues for value in values if value > 0]
    return statistics.fmean(positive) if positive else None


def check_batch_size(dataset: Dataset, size: int) -> None:
    """Raise ConfigError if the training split has no full batch of this size."""
    count = len(dataset.train)
    if size > count:
        raise ConfigError(
            f"sharpness_batch_size={size} is more than the {count} training images: "
            f"allowed 1 to {count}; nearest {count}"
        )


def training_batches(dataset: Dataset, number: int, size: int, seed: int) -> Iterator[Batch]:
    """Yield the first `number` full augmented batches, of several epochs if one has too few.

    Raises:
        ConfigError: the training split has no full batch.
    """
    check_batch_size(dataset, size)
    left = number
    for epoch in count(DRAWS_OF_EPOCH):
        for images, labels in train_batches(dataset, size, seed, epoch):
            if left == 0:
                return
            if len(labels) == size:
                left -= 1
                yield images, labels


class _EvalMode:
    def __init__(self, model: nn.Module) -> None:
        self._model, self._training = model, model.training

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._model.train(self._training)


def measure(model: nn.Module, dataset: Dataset, config: Config, console: Console) -> dict[str, Any]:
    """Measure what the configuration asks for; all other figures are None.

    Returns:
        of the augmented batches: sharpness (the report's figure), eigenvalues (a list for each
        batch), and largest_eigenvalue and negative_share of them all; of the first
        sharpness_samples training images, not augmented, with the labels that were trained on:
        lambda_max, lambda_min, trace with its standard error trace_error, and density (values and
        density, which integrates to 1); and settings, the keys that say how all was measured.
    """
    found: dict[str, Any] = dict.fromkeys(
        (
            "sharpness", "eigenvalues", "largest_eigenvalue", "negative_share", "lambda_max",
            "lambda_min", "trace", "trace_error", "density",
        )
    )  # fmt: skip
    if config.channels_last:  # on a CPU, second derivatives take longer in this format
        model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    with _EvalMode(model):
        if config.sharpness_batches:
            found["eigenvalues"] = _batch_eigenvalues(model, dataset, config, console)
            found["sharpness"] = report_sharpness(found["eigenvalues"])
            found |= of_all_batches(found["eigenvalues"])
        if config.sharpness_samples:
            found |= _fixed_set(model, dataset, config, console)
    return {**found, "settings": {name: getattr(config, name) for name in SETTINGS}}


def _batch_eigenvalues(
    model: nn.Module, dataset: Dataset, config: Config, console: Console
) -> list[list[float]]:
    number = config.sharpness_batches
    batches = training_batches(dataset, number, config.sharpness_batch_size, config.seed)
    rows: list[list[float]] = []
    products = 0
    with WorkProgress(console, f"{config.run_name}: sharpness", number) as progress:

        def each() -> None:
            nonlocal products
            products += 1
            mean = report_sharpness(rows)
            state = f"batch {len(rows) + 1}/{number}" + (f" mean {mean:.2f}" if mean else "")
            progress.show(len(rows), f"{state} products {products}")

        for batch in batches:
            operator = Hessian(model, [batch])
            rows.append(eigenvalues(operator, EIGENVALUES, "LM", seed=config.seed, each=each))
    return rows


def _fixed_set(
    model: nn.Module, dataset: Dataset, config: Config, console: Console
) -> dict[str, Any]:
    part = dataset.train[: config.sharpness_samples]
    operator = Hessian(model, list(plain_batches(dataset, part, BATCH)))
    found: dict[str, Any] = {}

    def extreme(name: str, which: str) -> float:
        with _Products(console, f"{config.run_name}: {name}", None) as bar:
            return eigenvalues(operator, 1, which, seed=config.seed, each=bar.each)[0]

    found["lambda_max"] = extreme("lambda_max", "LA")
    # The library draws vectors by torch's global generator, whose state is put back.
    devices = [part.images.device] if part.images.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(config.seed)
        if config.trace_vectors:
            samples: list[float] = []
            with WorkProgress(console, f"{config.run_name}: trace", config.trace_vectors) as bar:
                for _ in range(config.trace_vectors):
                    # Vectors are drawn one at a time: together they would fill the memory.
                    samples.append(float(curvlinops().hutchinson_trace(operator, 1)))
                    bar.show(len(samples), f"mean {statistics.fmean(samples):.1f}")
            found["trace"] = statistics.fmean(samples)
            if len(samples) > 1:
                found["trace_error"] = statistics.stdev(samples) / math.sqrt(len(samples))
        if config.density_steps:
            found["lambda_min"] = extreme("lambda_min", "SA")
            steps = min(config.density_steps, operator.shape[0] - 1)
            spectrum = curvlinops().papyan2020traces.spectrum
            with _Products(console, f"{config.run_name}: spectral density", steps) as bar:
                lanczos = spectrum.fast_lanczos(_Watched(operator, bar.each), steps)
            values, density = spectrum.lanczos_approximate_spectrum_from_iter(
                lanczos,
                (found["lambda_min"], found["lambda_max"]),
                num_points=512,
                kappa=3.0,
                margin=0.05,
            )
            found["density"] = {"values": values.tolist(), "density": density.tolist()}
    return found


class _Products(WorkProgress):
    """A view of how many Hessian-vector products were taken."""

    def __init__(self, console: Console, title: str, total: int | None) -> None:
        super().__init__(console, title, total)
        self._products = 0

    def each(self) -> None:
        self._products += 1
        self.show(self._products, f"products {self._products}")


class _Watched:
    """A Hessian as fast_lanczos needs it, which calls `each` after each product."""

    def __init__(self, operator: Hessian, each: Callable[[], object]) -> None:
        self._operator, self._each = operator, each
        self.shape, self.device, self.dtype = operator.shape, operator.device, operator.dtype

    def __matmul__(self, vector: Tensor) -> Tensor:
        product = self._operator @ vector
        self._each()
        return product
