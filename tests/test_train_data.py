"""Data: splits, label noise, augmentation."""

import dataclasses
import gzip
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from train import data
from train.config import Config
from train.errors import DataError

CPU = torch.device("cpu")


def digits(**keys: Any) -> data.Dataset:
    return data.load_dataset(Config(dataset="digits", **keys), CPU)


def image_set(count: int = 64, size: int = 32, **augmentation: Any) -> data.Dataset:
    """Random images from 1 to 255 (0 is the padding's), which normalisation leaves as they are."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.arange(count) % 10)
    mean, std = torch.zeros(1, 3, 1, 1), torch.full((1, 3, 1, 1), 1 / 255)
    return data.Dataset(split, split, split, 10, mean, std, data.Augmentation(**augmentation))


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


def test_part_of_the_training_images() -> None:
    whole, part = digits(), digits(train_samples=100, label_noise=0.2)
    assert torch.equal(part.train.images, whole.train.images[:100])
    assert (part.train.labels != whole.train.labels[:100]).sum() == 20
    assert part.train.labels.unique().numel() == 10  # not sorted by class
    assert torch.equal(part.val.images, whole.val.images)
    assert len(digits(train_samples=1000).train) == 1000
    with pytest.raises(DataError, match=r"train_samples=1001 is more than digits has: .* to 1000"):
        digits(train_samples=1001)


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
    assert torch.equal(torch.cat(images), dataset.normalise(dataset.train.images[order]))
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
        assert torch.equal(out[i], expected.float() / 255 / dataset.std[0])


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
        expected = dataset.normalise(dataset.train.images[index])[0]
        if draws.cut[i]:
            top, left = int(draws.cut_top[i]), int(draws.cut_left[i])
            expected[:, max(top, 0) : top + 16, max(left, 0) : left + 16] = 0
        assert torch.equal(out[i], expected)


def test_normalisation_comes_before_cutout() -> None:
    dataset = dataclasses.replace(
        image_set(256, cutout=16),
        mean=torch.full((1, 3, 1, 1), 100 / 255),
        std=torch.full((1, 3, 1, 1), 50 / 255),
    )
    out, draws = augmented(dataset)
    plain = dataset.normalise(dataset.train.images[draws.order])
    hole = out != plain
    assert hole.any()
    assert (out[hole] == 0).all()


def test_evaluation_is_plain() -> None:
    dataset = image_set(padding=4, flip=True, cutout=16)
    images = torch.cat([x for x, _ in data.plain_batches(dataset, dataset.test, 24)])
    torch.testing.assert_close(images, dataset.test.images.float())


def test_split_is_random_split_with_seed_42() -> None:
    train, held_out = data.split_indices(50_000, 5000)
    ours = torch.utils.data.random_split(
        range(50_000),  # type: ignore[arg-type]
        [45_000, 5000],
        generator=torch.Generator().manual_seed(42),
    )
    assert train.tolist() == list(ours[0].indices)
    assert held_out.tolist() == list(ours[1].indices)


def test_augmentation_is_torchvisions_and_the_reports_cutout() -> None:
    """Bit for bit, on the same draws, with CIFAR-100's statistics."""
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    dataset = dataclasses.replace(
        image_set(256, padding=4, flip=True, cutout=16),
        mean=torch.tensor(mean).view(1, 3, 1, 1),
        std=torch.tensor(std).view(1, 3, 1, 1),
    )
    out, draws = augmented(dataset)
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    for i, index in enumerate(draws.order.tolist()):
        image = Image.fromarray(dataset.train.images[index].permute(1, 2, 0).numpy())
        # What RandomCrop(32, padding=4) and RandomHorizontalFlip() do once they have drawn.
        image = functional.pad(image, [4])
        image = functional.crop(image, int(draws.top[i]), int(draws.left[i]), 32, 32)
        if draws.flip[i]:
            image = functional.hflip(image)
        expected = normalise(image)
        if draws.cut[i]:
            cutout_as_in_the_report(expected, int(draws.cut_top[i]), int(draws.cut_left[i]))
        assert torch.equal(out[i], expected), i


def cutout_as_in_the_report(image: torch.Tensor, first: int, second: int) -> None:
    """Its arithmetic after its two draws from [-8, 24), one for each axis."""
    size = 16
    end_first = min(image.size(1), first + size)
    end_second = min(image.size(2), second + size)
    image[:, max(0, first) : end_first, max(0, second) : end_second] = 0


def test_random_crop_draws_where_ours_does() -> None:
    """RandomCrop's own draws for a padded 40x40 image are uniform over 0..8, as ours are."""
    torch.manual_seed(0)
    image = torch.zeros(3, 40, 40)
    corners = [transforms.RandomCrop.get_params(image, (32, 32))[:2] for _ in range(2000)]
    assert {value for corner in corners for value in corner} == set(range(9))


@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_several_processes_are_the_batches_of_one(world: int) -> None:
    dataset = image_set(padding=4, flip=True, cutout=16)
    whole = list(data.train_batches(dataset, 24, seed=0, epoch=1))
    parts = [list(data.train_batches(dataset, 24, 0, 1, rank, world)) for rank in range(world)]
    for number, (images, labels) in enumerate(whole):
        sizes = [len(part[number][1]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([part[number][0] for part in parts]), images)
        assert torch.equal(torch.cat([part[number][1] for part in parts]), labels)


CIFAR = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "CIFAR-10"),
    "cifar100": ("CIFAR100", "cifar-100-python", "CIFAR-100"),
}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_protocol(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A stand-in gives the arrays, 4x4 to save time."""

    def fake(root: str, train: bool, download: bool) -> SimpleNamespace:
        count = 50_000 if train else 10_000
        pixels = np.zeros((count, 4, 4, 3), np.uint8)
        pixels[:, 0, 0, :2] = np.arange(count)[:, None] // [256, 1] % 256  # the image's number
        return SimpleNamespace(data=pixels, targets=[i % 10 for i in range(count)])

    monkeypatch.setattr(f"torchvision.datasets.{CIFAR[name][0]}", fake)
    dataset = data.load_dataset(Config(dataset=name, label_noise=0.1), CPU)
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [
        45_000,
        5_000,
        10_000,
    ]
    assert dataset.train.images.shape[1:] == (3, 4, 4)
    assert dataset.num_classes == (10 if name == "cifar10" else 100)

    def numbers(split: data.Split) -> torch.Tensor:
        return split.images[:, 0, 0, 0].long() * 256 + split.images[:, 1, 0, 0]

    together = torch.cat([numbers(dataset.train), numbers(dataset.val)])
    assert sorted(together.tolist()) == list(range(50_000))
    assert torch.equal(dataset.val.labels, numbers(dataset.val) % 10)
    assert (dataset.train.labels != numbers(dataset.train) % 10).sum() == 4500
    assert dataset.augmentation == data.Augmentation(padding=4, flip=True, cutout=16)
    if name == "cifar100":
        torch.testing.assert_close(dataset.mean.view(3), torch.tensor([0.5071, 0.4865, 0.4409]))
        torch.testing.assert_close(dataset.std.view(3), torch.tensor([0.2673, 0.2564, 0.2762]))


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_files_as_they_lie_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """The pickled files, small, read by torchvision itself (without their checksums)."""
    kind, folder, _ = CIFAR[name]
    cls = getattr(torchvision.datasets, kind)
    for attribute in ("train_list", "test_list"):
        files = [(file, None) for file, _ in getattr(cls, attribute)]
        monkeypatch.setattr(cls, attribute, files)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": None})
    monkeypatch.setattr(data, "split_indices", lambda count, held_out: (slice(2, None), slice(2)))
    (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    pixels = {}
    for file, _ in cls.train_list + cls.test_list:
        pixels[file] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = {"labels" if name == "cifar10" else "fine_labels": [0, 1, 2, 9]}
        with (tmp_path / folder / file).open("wb") as stream:
            pickle.dump({"data": pixels[file], **labels}, stream)
    with (tmp_path / folder / cls.meta["filename"]).open("wb") as stream:
        pickle.dump({cls.meta["key"]: [str(i) for i in range(10)]}, stream)

    dataset = data.load_dataset(Config(dataset=name, data_root=str(tmp_path)), CPU)
    known = torch.cat([dataset.val.images, dataset.train.images])
    expected = np.concatenate([pixels[file] for file, _ in cls.train_list])
    assert torch.equal(known, torch.from_numpy(expected.reshape(-1, 3, 32, 32)))
    assert dataset.test.labels.tolist() == [0, 1, 2, 9]
    assert dataset.test.images.shape == (4, 3, 32, 32)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder: Path, suffix: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 5100), ("t10k", 50)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count) % 10
    for name, array in arrays.items():
        write_idx(folder / (name + suffix), array)
    return arrays


@pytest.mark.parametrize(
    ("place", "suffix"),
    [("FashionMNIST/raw", ""), ("FashionMNIST/raw", ".gz"), ("fashion-mnist", ".gz"), (".", ".gz")],
)
def test_fashion_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, suffix: str
) -> None:
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "none")
    arrays = write_fashion(tmp_path / place, suffix)
    dataset = data.load_dataset(Config(dataset="fashion", data_root=str(tmp_path)), CPU)
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [100, 5000, 50]
    train, val = data.split_indices(5100, 5000)
    known = torch.from_numpy(arrays["train-images-idx3-ubyte"]).to(torch.uint8)[:, None]
    assert torch.equal(dataset.train.images, known[train])
    assert torch.equal(dataset.val.labels, val % 10)
    assert torch.equal(dataset.test.labels, torch.arange(50) % 10)


@pytest.mark.parametrize("damage", ["cut", "no gzip", "other type", "labels"])
def test_damaged_fashion_files_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "none")
    write_fashion(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "no gzip":
        path.write_bytes(b"<html>not found</html>")
    elif damage == "other type":
        path.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 13, 1, 4) + bytes(4)))
    else:
        write_idx(path, np.zeros((7, 28, 28)))
    with pytest.raises(DataError, match="train") as caught:
        data.load_dataset(Config(dataset="fashion", data_root=str(tmp_path)), CPU)
    assert "fetch" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_fashion_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(self: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "none")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    with pytest.raises(DataError, match="dataset-fashion-mnist") as caught:
        data.load_dataset(Config(dataset="fashion", data_root=str(tmp_path)), CPU)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.skipif(
    not data.DEBIAN_FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_fashion_of_debian(tmp_path: Path) -> None:
    dataset = data.load_dataset(Config(dataset="fashion", data_root=str(tmp_path)), CPU)
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [
        55_000,
        5_000,
        10_000,
    ]
    assert torch.bincount(dataset.test.labels).tolist() == [1000] * 10
    pixels = dataset.normalise(dataset.train.images)
    assert abs(pixels.mean()) < 0.01 and abs(pixels.std() - 1) < 0.01


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File not found")])
def test_missing_cifar_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, name: str
) -> None:
    def download(self: Any) -> None:
        raise error

    kind, folder, title = CIFAR[name]
    monkeypatch.setattr(getattr(torchvision.datasets, kind), "download", download)
    with pytest.raises(DataError, match=f"^{title} is not in") as caught:
        data.load_dataset(Config(dataset=name, data_root=str(tmp_path)), CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message and "--data_root=" in message and folder in message
    assert caught.value.exit_code == 2
