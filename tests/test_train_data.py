"""Data: splits, label noise, augmentation."""

import dataclasses
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from train import data
from train.config import Config
from train.errors import DataError

CPU = torch.device("cpu")


def digits(**keys: Any) -> data.Dataset:
    return data.load_dataset(Config(dataset="digits", **keys), CPU)


def image_set(count: int = 64, size: int = 32, **augmentation: Any) -> data.Dataset:
    """Random images from 1 to 255 (0 is the padding's), mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.arange(count) % 10)
    zeros, ones = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    return data.Dataset(
        split, split, split, 10, zeros, ones, data.Augmentation(**augmentation)
    )  # fmt: skip


def augmented(dataset: data.Dataset, seed: int = 0) -> tuple[torch.Tensor, data.Draws]:
    draws = data.draw_epoch(dataset, seed=seed, epoch=1)
    return data.augment(dataset, dataset.train.images[draws.order], draws), draws


def test_digits_split_sizes_and_strata() -> None:
    dataset = digits()
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [1000, 297, 500]
    assert dataset.train.images.shape == (1000, 1, 8, 8)
    assert dataset.train.images.dtype == torch.uint8
    for part in (dataset.train, dataset.val, dataset.test):
        shares = torch.bincount(part.labels, minlength=10) / len(part)
        assert (shares - 0.1).abs().max() < 0.01
    pixels = dataset.normalise(dataset.train.images)
    torch.testing.assert_close(pixels.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_digits_splits_are_a_partition() -> None:
    from sklearn.datasets import load_digits

    dataset = digits()
    parts = [part.images.flatten(1) for part in (dataset.train, dataset.val, dataset.test)]
    ours = sorted(map(tuple, torch.cat(parts).tolist()))
    assert ours == sorted(map(tuple, load_digits().data.astype(int).tolist()))


def test_noise_is_exact_and_on_training_labels_only() -> None:
    clean, noisy = digits(), digits(label_noise=0.2)
    assert (clean.train.labels != noisy.train.labels).sum() == 200
    assert noisy.train.labels.min() >= 0 and noisy.train.labels.max() <= 9
    assert torch.equal(clean.train.images, noisy.train.images)
    assert torch.equal(clean.val.labels, noisy.val.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    # The wrong labels belong to the data set, not to the run.
    assert torch.equal(noisy.train.labels, digits(label_noise=0.2, seed=7).train.labels)


def test_wrong_labels_are_spread_over_the_other_classes() -> None:
    wrong = data.flip_labels(torch.zeros(9000, dtype=torch.int64), 1.0, 10)
    counts = torch.bincount(wrong, minlength=10)
    assert counts[0] == 0
    assert (counts[1:] - 1000).abs().max() < 150  # about five standard deviations


def test_epochs_are_reproducible_by_seed() -> None:
    dataset = image_set(padding=4, flip=True, cutout=16)

    def batches(seed: int, epoch: int) -> list[torch.Tensor]:
        return [images for images, _ in data.train_batches(dataset, 24, seed, epoch)]

    first = batches(0, 1)
    assert [len(batch) for batch in first] == [24, 24, 16]
    assert all(torch.equal(a, b) for a, b in zip(first, batches(0, 1), strict=True))
    assert not torch.equal(first[0], batches(0, 2)[0])
    assert not torch.equal(first[0], batches(1, 1)[0])


def test_every_image_comes_once_per_epoch_with_its_label() -> None:
    dataset = image_set()
    images, labels = zip(*data.train_batches(dataset, 24, seed=0, epoch=1), strict=True)
    order = data.draw_epoch(dataset, seed=0, epoch=1).order
    assert sorted(order.tolist()) == list(range(64))
    assert torch.equal(torch.cat(images), dataset.train.images[order].float())
    assert torch.equal(torch.cat(labels), dataset.train.labels[order])


def test_crop_and_flip_against_slicing() -> None:
    dataset = image_set(padding=4, flip=True)
    out, draws = augmented(dataset)
    assert out.is_contiguous() and out.dtype == torch.float32
    for i, index in enumerate(draws.order.tolist()):
        padded = torch.nn.functional.pad(dataset.train.images[index], [4] * 4)
        top, left = int(draws.top[i]), int(draws.left[i])
        expected = padded[:, top : top + 32, left : left + 32]
        if draws.flip[i]:
            expected = expected.flip(-1)
        assert torch.equal(out[i], expected.float())


def test_draws_cover_their_ranges() -> None:
    draws = data.draw_epoch(image_set(4096, 8, padding=4, flip=True, cutout=4), seed=0, epoch=1)
    for corner in (draws.top, draws.left):
        assert (corner.min(), corner.max()) == (0, 8)
    for corner in (draws.cut_top, draws.cut_left):
        assert (corner.min(), corner.max()) == (-2, 5)  # [-cutout/2, size - cutout/2)
    for coin in (draws.flip, draws.cut):
        assert abs(float(coin.float().mean()) - 0.5) < 0.04  # about five standard deviations


def test_cutout_is_a_square_of_zeros_that_may_hang_over() -> None:
    dataset = image_set(256, cutout=16)
    out, draws = augmented(dataset)
    assert draws.cut.any() and not draws.cut.all()
    assert (draws.cut_top < 0).any() and (draws.cut_top > 16).any()
    for i, index in enumerate(draws.order.tolist()):
        expected = dataset.train.images[index].float()
        if draws.cut[i]:
            top, left = int(draws.cut_top[i]), int(draws.cut_left[i])
            expected[:, max(top, 0) : top + 16, max(left, 0) : left + 16] = 0
        assert torch.equal(out[i], expected)


def test_normalisation_comes_before_cutout() -> None:
    dataset = dataclasses.replace(
        image_set(256, cutout=16),
        mean=torch.full((1, 3, 1, 1), 100.0),
        std=torch.full((1, 3, 1, 1), 50.0),
    )
    out, draws = augmented(dataset)
    plain = (dataset.train.images[draws.order].float() - 100) / 50
    hole = out != plain
    assert hole.any()
    assert (out[hole] == 0).all()


def test_evaluation_is_plain() -> None:
    dataset = image_set(padding=4, flip=True, cutout=16)
    images = torch.cat([x for x, _ in data.plain_batches(dataset, dataset.test, 24)])
    assert torch.equal(images, dataset.test.images.float())


def test_split_is_random_split_with_seed_42() -> None:
    train, held_out = data.split_indices(50_000, 5000)
    ours = torch.utils.data.random_split(
        range(50_000),  # type: ignore[arg-type]
        [45_000, 5000],
        generator=torch.Generator().manual_seed(42),
    )
    assert train.tolist() == list(ours[0].indices)
    assert held_out.tolist() == list(ours[1].indices)


def test_cifar100_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are torchvision's business: a stand-in gives the arrays, 4x4 to save time."""

    def fake(root: str, train: bool, download: bool) -> SimpleNamespace:
        count = 50_000 if train else 10_000
        pixels = np.zeros((count, 4, 4, 3), np.uint8)
        pixels[:, 0, 0, :2] = np.arange(count)[:, None] // [256, 1] % 256  # the image's number
        return SimpleNamespace(data=pixels, targets=[i % 100 for i in range(count)])

    monkeypatch.setattr("torchvision.datasets.CIFAR100", fake)
    dataset = data.load_dataset(Config(label_noise=0.1), CPU)
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [
        45_000,
        5_000,
        10_000,
    ]
    assert dataset.train.images.shape[1:] == (3, 4, 4)

    def numbers(split: data.Split) -> torch.Tensor:
        return split.images[:, 0, 0, 0].long() * 256 + split.images[:, 1, 0, 0]

    together = torch.cat([numbers(dataset.train), numbers(dataset.val)])
    assert sorted(together.tolist()) == list(range(50_000))
    assert torch.equal(dataset.val.labels, numbers(dataset.val) % 100)
    assert (dataset.train.labels != numbers(dataset.train) % 100).sum() == 4500
    assert dataset.augmentation == data.Augmentation(padding=4, flip=True, cutout=16)
    torch.testing.assert_close(dataset.mean.view(3) / 255, torch.tensor([0.5071, 0.4865, 0.4409]))
    torch.testing.assert_close(dataset.std.view(3) / 255, torch.tensor([0.2673, 0.2564, 0.2762]))


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File not found")])
def test_missing_cifar_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, error: Exception
) -> None:
    from torchvision.datasets import CIFAR100

    def download(self: Any) -> None:
        raise error

    monkeypatch.setattr(CIFAR100, "download", download)
    with pytest.raises(DataError) as caught:
        data.load_dataset(Config(data_root=str(tmp_path)), CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message and "--data_root=" in message and "cifar-100-python" in message
    assert caught.value.exit_code == 2
