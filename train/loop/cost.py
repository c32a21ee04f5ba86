"""Say what runs will cost before they start: gradient evaluations, and time by measured steps."""

import dataclasses
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from train.inputs.data import Dataset, load_dataset
from train.models import build_model
from train.settings.config import Config
from train.settings.registry import OPTIMIZERS
from train.shared.devices import pick_device, set_numerics
from train.shared.progress import duration

# Five eigenvalues of a batch, or one of the fixed set, converge in about so many products, and each
# product costs about so many forward and backward passes of its images: both were measured.
PRODUCTS = {"batch": 20, "fixed set": 10}
PASSES_PER_PRODUCT = 2.5
MEASURED_SECONDS = 1.0
CPU_BATCH = 32  # a measurement takes so many images, at the most


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of some runs.

    Args:
        images: the gradient evaluations of one image that training takes.
        sharpness: the gradient evaluations of one image that eigenvalues, trace and density take.
        seconds: the time of both, on this device with nothing else on it.
    """

    images: float = 0.0
    sharpness: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))


def passes(config: Config, steps: int) -> float:
    """Return the gradients of the model's loss per step, on average over a run of `steps` steps."""
    name, number, *_ = config.policy or ("always", 0.0)
    if name == "from" and OPTIMIZERS[config.opt_name].step == "two passes":
        return 1 + max(0.0, steps - number) / steps
    return config.passes


def evaluations(config: Config, train_images: int) -> tuple[float, float]:
    """Return the gradient evaluations of one image that training takes, and an estimate of those
    that the sharpness takes."""
    steps = config.epochs * config.steps_per_epoch(train_images)
    training = float(passes(config, steps) * config.epochs * train_images)
    fixed = min(config.sharpness_samples, train_images)
    products = config.sharpness_batches * config.sharpness_batch_size * PRODUCTS["batch"]
    lambda_min = PRODUCTS["fixed set"] if config.density_steps else 0
    products += fixed * (
        (PRODUCTS["fixed set"] if fixed else 0)
        + lambda_min
        + config.trace_vectors
        + config.density_steps
    )
    return training, products * PASSES_PER_PRODUCT


def seconds_per_image(config: Config, dataset: Dataset, device: torch.device) -> float:
    """Measure a few forward and backward passes, and return the seconds of one image."""
    set_numerics(config.precision)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = build_model(config.model, dataset.train.images.shape[1:], dataset.num_classes)
    model.to(device)
    count = config.batch_size if device.type == "cuda" else min(CPU_BATCH, config.batch_size)
    images = dataset.normalise(dataset.train.images[:count])
    labels = dataset.train.labels[:count]
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)

    def take() -> None:
        bf16 = config.precision == "bf16"
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        model.zero_grad()

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    take()  # the first pass also sets things up
    began, taken = wait(), 0
    while taken == 0 or time.perf_counter() - began < MEASURED_SECONDS:
        take()
        taken += 1
    return (wait() - began) / (taken * len(labels))


def estimate(configs: Sequence[Config]) -> Cost:
    """Estimate the cost of all runs together. Each kind of pass is measured once.

    Raises:
        ConfigError, DataError: a run itself would raise this error.
    """
    total = Cost()
    parts: dict[object, tuple[int, Dataset]] = {}  # the number of images, and a few of them
    speeds: dict[object, float] = {}
    usual_threads = torch.get_num_threads()
    for config in configs:
        device, threads = pick_device(config.device), config.threads or usual_threads
        torch.set_num_threads(threads)
        files = (config.dataset, config.data_root, config.image_size, config.train_samples)
        if files not in parts:
            plain = dataclasses.replace(config, label_noise=0.0, label_noise_file="")
            dataset = load_dataset(plain, device)
            few = dataclasses.replace(dataset, train=dataset.train[: config.batch_size])
            parts[files] = len(dataset.train), few
        count, few = parts[files]
        shape = few.train.images.shape[1:]
        machine = device, threads, config.precision, config.channels_last
        kind = (config.model, shape, config.batch_size, *machine)
        if kind not in speeds:
            speeds[kind] = seconds_per_image(config, few, device)
        training, sharpness = evaluations(config, count)
        total += Cost(training, sharpness, (training + sharpness) * speeds[kind])
    torch.set_num_threads(usual_threads)
    return total


def describe(configs: Sequence[Config]) -> str:
    """Describe the cost in one line for people."""
    cost = estimate(configs)
    text = f"{len(configs)} runs: {cost.images:.3g} gradients of an image in training"
    if cost.sharpness:
        text += f", about {cost.sharpness:.2g} for sharpness"
    return f"{text}; about {duration(cost.seconds)} on this device alone, by a measured pass"
