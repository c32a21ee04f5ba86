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

from train.inputs import data, noise
from train.settings.config import Config
from train.shared.errors import DataError

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
    wrong = noise.flip_labels(torch.zeros(9000, dtype=torch.int64), 1.0, 10)
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
    # All for training, in the order of the files.
    monkeypatch.setattr(data, "split_indices", lambda n, held_out: (torch.arange(n), slice(0)))
    monkeypatch.setattr(data, "canonical_order", lambda split: torch.arange(len(split)))
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
    known = dataset.train.images
    expected = np.concatenate([pixels[file] for file, _ in cls.train_list])
    assert torch.equal(known, torch.from_numpy(expected.reshape(-1, 3, 32, 32)))
    assert dataset.test.labels.tolist() == [0, 1, 2, 9]
    assert dataset.test.images.shape == (4, 3, 32, 32)


def write_class_folders(folder: Path, images: np.ndarray, names: list[str]) -> None:
    """Images (N, S, S, 3), image i in folder names[i]; files are named in no order."""
    for number, (pixels, name) in enumerate(zip(images, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{number * 7919 % 1000:03d}.png")


def write_official_cifar100(
    monkeypatch: pytest.MonkeyPatch, root: Path, parts: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Its pickles, of images (N, 32, 32, 3) and labels; torchvision does not look at checksums."""
    cls = torchvision.datasets.CIFAR100
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(cls, attribute, [(f, None) for f, _ in getattr(cls, attribute)])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": None})
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, (images, labels) in parts.items():
        flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {"data": np.ascontiguousarray(flat), "fine_labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": noise.CIFAR100_CLASSES}))


def test_cifar100_is_the_same_from_either_kind_of_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Same splits in the same order, and the same wrong labels."""
    rng = np.random.default_rng(0)
    parts = {}
    for name, each in (("train", 2), ("test", 1)):
        labels = rng.permutation(np.repeat(np.arange(100), each))
        parts[name] = rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8), labels
        names = [noise.CIFAR100_CLASSES[label] for label in labels]
        write_class_folders(tmp_path / "folders" / name, parts[name][0], names)
    write_official_cifar100(monkeypatch, tmp_path / "official", parts)
    for keys in ({}, {"label_noise": 0.5}, {"label_noise": 0.5, "label_noise_kind": "asymmetric"}):
        official, folders = (
            data.load_dataset(Config(data_root=str(tmp_path / place), **keys), CPU)
            for place in ("official", "folders")
        )
        for ours, theirs in (
            (official.train, folders.train), (official.val, folders.val)
        ):  # fmt: skip
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
        assert [len(part) for part in (folders.train, folders.val, folders.test)] == [180, 20, 100]
        assert folders.num_classes == 100
        if keys:
            assert torch.equal(official.noisy_val_labels, folders.noisy_val_labels)
            assert (folders.train.labels != folders.train.true_labels).sum() == 90
    # Not in the order of the files, nor of the classes, nor of brightness.
    positions = folders.train.positions
    assert positions is not None and not torch.equal(positions.sort().values, positions)
    assert folders.train.labels[:50].unique().numel() > 20


def test_foreign_class_folders_are_not_cifar(tmp_path: Path) -> None:
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    for part in ("train", "test"):
        write_class_folders(tmp_path / part, pixels, ["cat", "dog", "cat", "dog"])
    with pytest.raises(
        DataError, match=r"is not CIFAR-100: .*apple, aquarium_fish.*dataset=folder"
    ):
        data.load_dataset(Config(data_root=str(tmp_path)), CPU)


def test_superclasses_are_a_partition() -> None:
    assert len(set(noise.CIFAR100_CLASSES)) == 100 == len(noise.CIFAR100_CLASSES)
    assert [len(members.split()) for members in noise.CIFAR100_SUPERCLASSES] == [5] * 20


def folder_set(root: Path, **keys: Any) -> data.Dataset:
    return data.load_dataset(Config(dataset="folder", data_root=str(root), **keys), CPU)


def test_class_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 24, 24, 3), dtype=np.uint8)
    names = [("bee", "ant", "cow")[i % 3] for i in range(60)]
    write_class_folders(tmp_path / "train", images, names)
    write_class_folders(tmp_path / "test", images[:6], names[:6])
    dataset = folder_set(tmp_path)
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [54, 6, 6]
    assert dataset.num_classes == 3
    assert dataset.augmentation == data.Augmentation(padding=3, flip=True)
    # ant, bee, cow: the images of a label are those of its folder.
    for label, first in ((0, 1), (1, 0), (2, 2)):
        known = torch.cat(
            [part.images[part.labels == label] for part in (dataset.train, dataset.val)]
        )
        expected = images[first::3].transpose(0, 3, 1, 2)
        assert sorted(known.flatten(1).tolist()) == sorted(expected.reshape(20, -1).tolist())
    pixels = dataset.train.images.double() / 255
    torch.testing.assert_close(dataset.mean.flatten().double(), pixels.mean((0, 2, 3)))
    std = pixels.transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(dataset.std.flatten().double(), std)
    assert folder_set(tmp_path, augmentation=False).augmentation == data.Augmentation()


def test_validation_images_of_their_own_and_sizes(tmp_path: Path) -> None:
    wide = np.zeros((4, 20, 40, 3), np.uint8)
    wide[:, :, 10:30] = 200  # the square in the middle
    for part in ("train", "val", "test"):
        write_class_folders(tmp_path / part, wide, ["a", "b", "a", "b"])
    dataset = folder_set(tmp_path, image_size=10)
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [4, 4, 4]
    assert dataset.train.images.shape == (4, 3, 10, 10)
    assert dataset.train.images[:, :, :, 2:-2].min() == 200
    assert dataset.val.positions is None and dataset.noisy_val_labels is None
    with pytest.raises(DataError, match=r"has 40x20 pixels.*--image_size=N makes them so"):
        folder_set(tmp_path)
    write_class_folders(tmp_path / "val", wide[:1], ["c"])
    with pytest.raises(DataError, match=r"val' has 3 classes .*train' 2 .*same class folders"):
        folder_set(Path(str(tmp_path) + "/."), image_size=11)


def test_unusable_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no class folders with images.*FOLDER/train/CLASS/IMAGE"):
        folder_set(tmp_path)
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    write_class_folders(tmp_path / "train", pixels, ["a", "b", "a", "b"])
    with pytest.raises(DataError, match="test' holds no class folders"):
        folder_set(tmp_path)
    write_class_folders(tmp_path / "test", pixels[:2], ["a", "b"])
    with pytest.raises(DataError, match=r"has 4 images, a tenth .*10 or more, or .*val/"):
        folder_set(tmp_path)
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken.png' cannot be read .*: replace or remove it"):
        folder_set(Path(str(tmp_path) + "/."), image_size=8)


# -- wrong labels ----------------------------------------------------------------------------------


def test_asymmetric_noise_of_cifar10_is_between_classes_that_look_alike() -> None:
    labels = torch.arange(10).repeat(1000)
    noisy = noise.confuse_labels(labels, 0.4, noise.confused_with("cifar10", 10))
    pairs = {(3, 5), (5, 3), (2, 0), (4, 7), (9, 1)}  # cat dog, bird plane, deer horse, truck car
    wrong = labels != noisy
    assert {
        tuple(p) for p in torch.stack([labels, noisy], 1)[wrong].unique(dim=0).tolist()
    } == pairs
    assert wrong.sum() == 0.4 * 5000


def test_asymmetric_noise_of_cifar100_stays_in_the_superclass() -> None:
    partner = noise.confused_with("cifar100", 100)
    names = noise.CIFAR100_CLASSES
    taken_for = {names[i]: names[int(p)] for i, p in enumerate(partner)}
    assert taken_for["beaver"] == "dolphin" and taken_for["whale"] == "beaver"
    assert taken_for["tractor"] == "lawn_mower" and sorted(taken_for.values()) == names


def test_asymmetric_noise_of_others_is_the_next_class() -> None:
    clean, noisy = digits(), digits(label_noise=0.3, label_noise_kind="asymmetric")
    wrong = noisy.train.labels != clean.train.labels
    assert wrong.sum() == 300
    assert torch.equal(noisy.train.labels[wrong], (clean.train.labels[wrong] + 1) % 10)
    assert noisy.train.true_labels is not None and noisy.noisy_val_labels is not None
    assert torch.equal(noisy.train.true_labels, clean.train.labels)
    assert (noisy.noisy_val_labels != noisy.val.labels).sum() == round(0.3 * 297)


@pytest.mark.parametrize("suffix", [".npy", ".txt"])
def test_labels_from_a_file(tmp_path: Path, suffix: str) -> None:
    """For the images in the order of the files; the splits take theirs."""
    from sklearn.datasets import load_digits

    images, true = load_digits(return_X_y=True)
    labels = (true + (np.arange(len(true)) % 3 == 0)) % 10
    path = tmp_path / f"labels{suffix}"
    np.save(path, labels) if suffix == ".npy" else np.savetxt(path, labels, "%d")
    given = {
        tuple(image): int(label) for image, label in zip(images.astype(int), labels, strict=True)
    }
    dataset = digits(label_noise_file=str(path), train_samples=500)
    train = dataset.train
    expected = [given[tuple(image)] for image in train.images.flatten(1).tolist()]
    assert train.labels.tolist() == expected
    assert train.true_labels is not None and 100 < (train.labels != train.true_labels).sum() < 250
    val = [given[tuple(image)] for image in dataset.val.images.flatten(1).tolist()]
    assert dataset.noisy_val_labels is not None and dataset.noisy_val_labels.tolist() == val


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (np.zeros(5, np.int64), r"shape \(5,\): there are 1797 .*allowed is \(1797,\)"),
        (np.full(1797, 10), "labels from 10 to 10: allowed 0 to 9"),
        (np.zeros(1797), "dtype float64, which is no integer"),
        (None, "cannot be read .*give a .npy file or text"),
    ],
)
def test_unusable_label_files_are_said(
    tmp_path: Path, content: np.ndarray | None, says: str
) -> None:
    path = tmp_path / "labels.npy"
    if content is not None:
        np.save(path, content)
    with pytest.raises(DataError, match=f"label_noise_file=.*{says}"):
        digits(label_noise_file=str(path))


def test_visits_are_what_the_batches_go_through() -> None:
    dataset = image_set(padding=4, flip=True)
    for rank, world in ((0, 1), (1, 3)):
        visited = data.visits(dataset, 24, 0, 1, rank, world)
        labels = [labels for _, labels in data.train_batches(dataset, 24, 0, 1, rank, world)]
        assert torch.equal(dataset.train.labels[visited], torch.cat(labels))
        later = data.visits(dataset, 24, 0, 1, rank, world, first=2)
        assert torch.equal(dataset.train.labels[later], torch.cat(labels[2:]))


def test_batches_from_a_later_one_on_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those before it are not augmented."""
    dataset = image_set(padding=4, flip=True, cutout=8)
    whole = list(data.train_batches(dataset, 24, 0, 1))
    augment, made = data.augment, []
    monkeypatch.setattr(data, "augment", lambda *of: made.append(1) or augment(*of))
    later = list(data.train_batches(dataset, 24, 0, 1, first=2))
    assert len(later) == len(made) == len(whole) - 2
    for (images, labels), (same, own) in zip(whole[2:], later, strict=True):
        assert torch.equal(images, same) and torch.equal(labels, own)


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


@pytest.mark.parametrize("name", CIFAR)
def test_a_wrong_checksum_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """torchvision would download again: without a network, that is not what is wrong."""
    kind, folder, title = CIFAR[name]
    cls = getattr(torchvision.datasets, kind)

    def download(self: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(cls, "download", download)
    (tmp_path / folder).mkdir()
    damaged = tmp_path / folder / cls.train_list[-1][0]
    damaged.write_bytes(b"not the file")
    with pytest.raises(DataError) as caught:
        data.load_dataset(Config(dataset=name, data_root=str(tmp_path)), CPU)
    message = str(caught.value)
    assert message.startswith(f"'{damaged}' has a wrong checksum") and title in message
    assert "\n" not in message and "network" in message
