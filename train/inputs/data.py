"""Hold data sets as uint8 tensors on the training device, and augment them there, in batches."""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from train.inputs import noise
from train.settings.config import Config
from train.settings.registry import DATASETS
from train.shared.errors import DataError
from train.shared.folders import has_class_folders, read_class_folders

SPLIT_SEED = 42  # the seed is the report's
# Debian's package dataset-fashion-mnist has its four files there.
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Args:
        images: uint8 (N, C, H, W), unaugmented.
        labels: int64 (N,), the labels to be learnt.
        true_labels: int64 (N,), the right labels, where some of `labels` are wrong.
        positions: int64 (N,), the indices of these images in the files, if they are known.
    """

    images: Tensor
    labels: Tensor
    true_labels: Tensor | None = None
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: Tensor | slice) -> "Split":
        """Return the split of the images that `which` selects."""
        return self._each(lambda tensor: tensor[which])

    def to(self, device: torch.device) -> "Split":
        """Return the split on the device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Split":
        known = {k: change(v) for k, v in vars(self).items() if v is not None}
        return Split(**known)


@dataclass(frozen=True)
class Augmentation:
    """The steps that training images go through; 0 and False leave a step out.

    Args:
        padding: the number of black pixels added on each side before a crop of the image's size.
        flip: whether to mirror each image left to right with probability 0.5.
        cutout: the side of the square that is set to 0 after normalisation, with probability 0.5.
    """

    padding: int = 0
    flip: bool = False
    cutout: int = 0


@dataclass(frozen=True)
class Dataset:
    """The splits of a data set, and the statistics of its pixels.

    mean, std: float32 (1, C, 1, 1), of pixels in [0, 1] (uint8 / 255).

    file_images: the number of images in the files; `positions` of the splits are indices into them.
    noisy_val_labels: int64 (N,), labels of the validation images with the noise of training; they
    show which epoch would be chosen if the right labels were not known.
    """

    train: Split
    val: Split
    test: Split
    num_classes: int
    mean: Tensor
    std: Tensor
    augmentation: Augmentation
    file_images: int = 0
    noisy_val_labels: Tensor | None = None

    def normalise(self, images: Tensor) -> Tensor:
        """Return (images / 255 - mean) / std, float32, bit for bit as ToTensor and Normalize do."""
        return (images.float() / 255 - self.mean) / self.std


@dataclass(frozen=True)
class Draws:
    """The random numbers of an epoch: entry i of each (N,) tensor is for the i-th image visited.

    order: index of the image. top, left: corner of the crop in the padded image. flip: whether to
    mirror the image. cut: whether to apply Cutout. cut_top, cut_left: corner of the Cutout square,
    which may overhang the edge.
    """

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor
    cut: Tensor
    cut_top: Tensor
    cut_left: Tensor

    def slice(self, start: int, stop: int) -> "Draws":
        """Return the draws of the images visited from start to stop."""
        return Draws(**{name: value[start:stop] for name, value in vars(self).items()})


def draw_epoch(dataset: Dataset, seed: int, epoch: int) -> Draws:
    """Draw an epoch's order and augmentation, which depend on the seed and the epoch alone.

    They are drawn on the CPU and moved once per epoch, so that every device sees the same images
    and a resumed run needs no random state.
    """
    count, size = len(dataset.train), dataset.train.images.shape[-1]
    spec = dataset.augmentation
    # The CPU generator uses 32 bits of its seed: the factor keeps neighbouring seeds apart in them.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    draws = Draws(
        order=torch.randperm(count, generator=generator),
        top=integers(0, 2 * spec.padding + 1),
        left=integers(0, 2 * spec.padding + 1),
        flip=integers(0, 2).bool(),
        cut=integers(0, 2).bool(),
        cut_top=integers(-(spec.cutout // 2), size - spec.cutout // 2),
        cut_left=integers(-(spec.cutout // 2), size - spec.cutout // 2),
    )
    device = dataset.train.images.device
    return Draws(**{name: value.to(device) for name, value in vars(draws).items()})


def augment(dataset: Dataset, images: Tensor, draws: Draws) -> Tensor:
    """Crop, flip, normalise and cut out, each image with its own draws.

    Args:
        images: uint8 (B, C, H, W) with H = W.
        draws: the draws of these B images.

    Returns:
        float32 (B, C, H, W), contiguous.
    """
    spec, size = dataset.augmentation, images.shape[-1]
    span = torch.arange(size, device=images.device)
    if spec.padding:
        images = torch.nn.functional.pad(images, [spec.padding] * 4)
    columns = span.expand(len(images), size)
    if spec.flip:
        columns = torch.where(draws.flip[:, None], size - 1 - columns, columns)
    if spec.padding or spec.flip:
        # One gather does both: pixel (i, j) is at row top + i, column left + (j or its mirror).
        which = torch.arange(len(images), device=images.device)[:, None, None]
        rows = (draws.top[:, None] + span)[:, :, None]
        columns = (draws.left[:, None] + columns)[:, None, :]
        images = images[which, :, rows, columns].permute(0, 3, 1, 2)
    out = dataset.normalise(images).contiguous()
    if spec.cutout:
        in_rows = _within(span, draws.cut_top, spec.cutout)[:, :, None]
        in_columns = _within(span, draws.cut_left, spec.cutout)[:, None, :]
        hole = in_rows & in_columns & draws.cut[:, None, None]
        out.masked_fill_(hole[:, None], 0.0)
    return out


def _within(span: Tensor, start: Tensor, length: int) -> Tensor:
    """Say, in a bool tensor (B, size), whether start <= position < start + length."""
    return (span >= start[:, None]) & (span < start[:, None] + length)


def train_batches(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    first: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the augmented batches of an epoch, from batch `first` on; the last may be smaller.

    Args:
        rank, world: the process `rank` of `world` gets its share of each batch; together, the
            processes see what one would. The shares differ by one image at most.
    """
    draws = draw_epoch(dataset, seed, epoch)
    for start, stop in list(_shares(len(dataset.train), batch_size, rank, world))[first:]:
        part = draws.slice(start, stop)
        images = dataset.train.images[part.order]
        yield augment(dataset, images, part), dataset.train.labels[part.order]


def visits(
    dataset: Dataset,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    first: int = 0,
) -> Tensor:
    """Return the indices, int64 (N,), of the images that train_batches yields from `first` on."""
    order = draw_epoch(dataset, seed, epoch).order
    shares = list(_shares(len(dataset.train), batch_size, rank, world))[first:]
    return torch.cat([order[start:stop] for start, stop in shares])


def _shares(count: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[int, int]]:
    """Yield a process's part of each batch, as (start, stop) of the visited images."""
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        yield start + size * rank // world, start + size * (rank + 1) // world


def plain_batches(
    dataset: Dataset, split: Split, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a split in order, normalised, not augmented."""
    for start in range(0, len(split), batch_size):
        stop = start + batch_size
        yield dataset.normalise(split.images[start:stop]), split.labels[start:stop]


def split_indices(count: int, held_out: int, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Return disjoint indices (training, held out), drawn as torch.utils.data.random_split does."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count - held_out], order[count - held_out :]


def canonical_order(split: Split) -> Tensor:
    """Return the order of the images by a hash of pixels and label, int64 (N,).

    With it, a split does not depend on the files that the images came in.
    """
    images = split.images.numpy()
    digests = [
        hashlib.blake2b(b"%d " % label + image.tobytes(), digest_size=16).digest()
        for image, label in zip(images, split.labels.tolist(), strict=True)
    ]
    return torch.tensor(sorted(range(len(digests)), key=digests.__getitem__))


def load_dataset(config: Config, device: torch.device) -> Dataset:
    """Return the data set of the configuration on the device, with its label noise.

    Raises:
        DataError: the data set is neither at hand nor to be downloaded, a file is damaged, or there
            are fewer images than train_samples.
    """
    dataset: Dataset = DATASETS[config.dataset].make(config)
    count = config.train_samples or len(dataset.train)
    if count > len(dataset.train):
        raise DataError(
            f"train_samples={count} is more than {config.dataset} has: allowed 0 (all) to "
            f"{len(dataset.train)}"
        )
    # The training split was drawn at random, so its beginning is a random part of it.
    train, val = dataset.train[:count], dataset.val
    noisy, noisy_val = _noisy_labels(config, replace(dataset, train=train))
    if noisy is not None:
        train = replace(train, labels=noisy, true_labels=train.labels)
    augmentation = dataset.augmentation if config.augmentation else Augmentation()
    return replace(
        dataset,
        train=train.to(device),
        val=val.to(device),
        test=dataset.test.to(device),
        mean=dataset.mean.to(device),
        std=dataset.std.to(device),
        augmentation=augmentation,
        noisy_val_labels=None if noisy_val is None else noisy_val.to(device),
    )


def _noisy_labels(config: Config, dataset: Dataset) -> tuple[Tensor | None, Tensor | None]:
    """Return the labels of the training and the validation images, with noise; None stands for
    labels without noise."""
    train, val, classes = dataset.train, dataset.val, dataset.num_classes
    share = config.label_noise
    if config.label_noise_file:
        given = noise.read_labels(Path(config.label_noise_file), dataset.file_images, classes)
        assert train.positions is not None
        return given[train.positions], None if val.positions is None else given[val.positions]
    if not share:
        return None, None
    if config.label_noise_kind == "asymmetric":
        partner = noise.confused_with(config.dataset, classes)
        return (
            noise.confuse_labels(train.labels, share, partner),
            noise.confuse_labels(val.labels, share, partner, noise.SEED + 1),
        )
    return (
        noise.flip_labels(train.labels, share, classes),
        noise.flip_labels(val.labels, share, classes, noise.SEED + 1),
    )


def digits(config: Config) -> Dataset:
    """Return scikit-learn's 1797 digits, 8x8 pixels in 0..16, stratified into 1000 / 297 / 500."""
    # scikit-learn is imported here: the import takes a second, and CIFAR-100 does not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(
        range(len(labels)), test_size=500, stratify=labels, random_state=SPLIT_SEED
    )
    train, val = train_test_split(
        rest, test_size=297, stratify=labels[rest], random_state=SPLIT_SEED
    )
    pixels = torch.from_numpy(images).to(torch.uint8).view(-1, 1, 8, 8)
    targets = torch.from_numpy(labels).long()
    known = pixels[train].float() / 255
    everything = Split(pixels, targets, positions=torch.arange(len(targets)))
    return Dataset(
        train=everything[torch.tensor(train)],
        val=everything[torch.tensor(val)],
        test=everything[torch.tensor(test)],
        num_classes=10,
        mean=known.mean().view(1, 1, 1, 1),
        std=known.std().view(1, 1, 1, 1),
        # A mirrored digit is another sign, and a hole in 8x8 pixels hides too much.
        augmentation=Augmentation(padding=1),
        file_images=len(everything),
    )


def _hold_out(known: Split, order: Tensor, held_out: int) -> tuple[Split, Split]:
    """Return (training, validation), where the latter has `held_out` images; the random choice is
    made among the images in this order."""
    known = replace(known, positions=torch.arange(len(known)))
    train, val = split_indices(len(known), held_out)
    return known[order[train]], known[order[val]]


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def _wrong_checksum(name: str, root: Path) -> Path | None:
    """Return the first of CIFAR's unpacked files whose checksum is wrong; None if there is none."""
    # torchvision is imported here: the import takes seconds.
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind = {"CIFAR-10": datasets.CIFAR10, "CIFAR-100": datasets.CIFAR100}.get(name)
    if kind is None:
        return None
    for file, checksum in [*kind.train_list, *kind.test_list]:
        path = root / kind.base_folder / file
        if path.exists() and not check_integrity(str(path), checksum):
            return path
    return None


def _missing(name: str, data_root: str, error: Exception, holds: str) -> DataError:
    if (damaged := _wrong_checksum(name, Path(data_root))) is not None:
        return DataError(
            f"'{damaged}' has a wrong checksum: it is damaged, or no file of {name}; put the right "
            "one in its place, or remove it with a network to download it again"
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{name} is not in '{data_root}' and could not be downloaded ({reason}): connect to the "
        f"network, or pass --data_root=DIR where DIR holds {holds}; "
        "`python -m train.study quickstart` needs no download"
    )


def _cifar(config: Config, name: str, folder: str, classes: Sequence[str]) -> tuple[Split, Split]:
    """Read (training, test) of CIFAR-10 or CIFAR-100 from class folders or torchvision's files."""
    root = Path(config.data_root)
    if has_class_folders(root):
        parts = []
        for part in ("train", "test"):
            images, labels, found = read_class_folders(root / part)
            if list(found) != list(classes) or images.shape[1:] != (3, 32, 32):
                raise DataError(
                    f"'{root / part}' is not {name}: allowed are the folders {classes[0]}, "
                    f"{classes[1]}, ... {classes[-1]} with images of 32x32 pixels; other images "
                    "are --dataset=folder"
                )
            parts.append(Split(images, labels))
        return parts[0], parts[1]
    # torchvision is imported here: the import takes seconds, and the digits do not need it.
    from torchvision import datasets

    kind = {"CIFAR-10": datasets.CIFAR10, "CIFAR-100": datasets.CIFAR100}[name]

    def read(train: bool) -> Split:
        try:
            part = kind(config.data_root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            holds = f"the unpacked folder {folder}, or train/CLASS/IMAGE and test/CLASS/IMAGE"
            raise _missing(name, config.data_root, error, holds) from None
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(part.targets))

    return read(train=True), read(train=False)


def cifar100(config: Config) -> Dataset:
    """Return CIFAR-100 as the report uses it: 45,000 / 5,000 / 10,000 images."""
    known, test = _cifar(config, "CIFAR-100", "cifar-100-python", noise.CIFAR100_CLASSES)
    return _cifar_protocol(known, test, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), 100)


def cifar10(config: Config) -> Dataset:
    """Return CIFAR-10 with the protocol of CIFAR-100: 45,000 / 5,000 / 10,000 images."""
    known, test = _cifar(config, "CIFAR-10", "cifar-10-batches-py", noise.CIFAR10_CLASSES)
    return _cifar_protocol(known, test, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 10)


def _cifar_protocol(
    known: Split, test: Split, mean: Sequence[float], std: Sequence[float], num_classes: int
) -> Dataset:
    # A tenth is held out, 5,000 of 50,000, since class folders may have some of the images only.
    train, val = _hold_out(known, canonical_order(known), len(known) // 10)
    return Dataset(
        train=train,
        val=val,
        test=test,
        num_classes=num_classes,
        mean=_channels(mean),
        std=_channels(std),
        # The augmentation is the report's, and suits CIFAR-10 too.
        augmentation=Augmentation(padding=4, flip=True, cutout=16),
        file_images=len(known),
    )


def folder(config: Config) -> Dataset:
    """Read class folders train/ and test/; validation has val/ or else a tenth of train/."""
    root, size = Path(config.data_root), config.image_size
    images, labels, classes = read_class_folders(root / "train", size)
    known = Split(images, labels)

    def other(part: str) -> Split:
        images, labels, found = read_class_folders(root / part, size)
        if found != classes or images.shape[1:] != known.images.shape[1:]:
            width, own = images.shape[-1], known.images.shape[-1]
            raise DataError(
                f"'{root / part}' has {len(found)} classes and images of {width}x{width} pixels, "
                f"'{root / 'train'}' {len(classes)} and {own}x{own}: both must have the same class "
                "folders and sizes (--image_size=N resizes)"
            )
        return Split(images, labels)

    test = other("test")
    if (root / "val").is_dir():
        train, val = replace(known, positions=torch.arange(len(known))), other("val")
        train = train[split_indices(len(known), 0)[0]]  # train_samples takes its beginning
    else:
        train, val = _hold_out(known, canonical_order(known), len(known) // 10)
    if not len(val):
        raise DataError(
            f"'{root / 'train'}' has {len(known)} images, a tenth of which would be for "
            "validation: allowed are 10 or more, or validation images in val/"
        )
    mean, std = _statistics(train.images)
    return Dataset(
        train=train,
        val=val,
        test=test,
        num_classes=len(classes),
        mean=mean,
        std=std,
        augmentation=Augmentation(padding=max(1, images.shape[-1] // 8), flip=True),
        file_images=len(known),
    )


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel, for pixels in [0, 1], in parts to save memory."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for part in images.split(1000):
        for channel, pixels in enumerate(part.transpose(0, 1)):
            counts[channel] += torch.bincount(pixels.flatten().long(), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True)
    mean = (shares * values).sum(1, keepdim=True)
    std = (shares * (values - mean).square()).sum(1).sqrt()
    # A channel with one value has no deviation: divided by 1, its normalised pixels are 0.
    std = torch.where(std > 0, std, 1.0)
    return _channels(mean.flatten().tolist()), _channels(std.tolist())


def fashion(config: Config) -> Dataset:
    """Return Fashion-MNIST: 55,000 / 5,000 / 10,000 images of 28x28 pixels."""
    folder = _fashion_folder(config.data_root)

    def read(part: str) -> Split:
        images = read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte"))
        labels = read_idx(_idx_file(folder, f"{part}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(
                f"the '{part}' files in '{folder}' do not belong together: images of shape "
                f"{tuple(images.shape)}, labels of shape {tuple(labels.shape)}; fetch them again"
            )
        return Split(images[:, None], labels.long())

    known = read("train")
    train, val = _hold_out(known, torch.arange(len(known)), 5000)
    return Dataset(
        train=train,
        val=val,
        test=read("t10k"),
        num_classes=10,
        mean=_channels((0.2860,)),
        std=_channels((0.3530,)),
        # Clothes may be mirrored; a hole of half the width, as in CIFAR, hides too much of them.
        augmentation=Augmentation(padding=4, flip=True),
        file_images=len(known),
    )


FASHION_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def _idx_file(folder: Path, name: str) -> Path:
    """Return the path of the unpacked file if it exists, else that of the .gz file."""
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"


def _fashion_folder(data_root: str) -> Path:
    """Return the folder with the four files; torchvision downloads them if no folder has them."""
    root = Path(data_root)
    places = (root / "FashionMNIST" / "raw", root, root / "fashion-mnist", DEBIAN_FASHION)
    for place in places:
        if all(_idx_file(place, name).exists() for name in FASHION_FILES):
            return place
    # torchvision is imported here: the import takes seconds.
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(data_root, download=True)
    except (OSError, RuntimeError, URLError) as error:
        raise _missing(
            "Fashion-MNIST",
            data_root,
            error,
            "FashionMNIST/raw or the four idx .gz files themselves (Debian: apt install "
            "dataset-fashion-mnist, which is found without --data_root)",
        ) from None
    return places[0]


def read_idx(path: Path) -> Tensor:
    """Read a uint8 tensor from a file in MNIST's idx format, unpacked or .gz.

    (torchvision's reader takes unpacked files only, and checks with `assert`.)

    Raises:
        DataError: the file cannot be read, or is not what its header says.
    """
    try:
        data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        # The header has two zeros, the type (8: uint8), the number of dimensions, and each size.
        zeros, kind, dimensions = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
        if zeros or kind != 8 or len(data) - 4 - 4 * dimensions != int(np.prod(shape)):
            raise ValueError(f"{len(data)} bytes are not what its header says")
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise DataError(
            f"'{path}' is no complete idx file ({' '.join(str(error).split())}): fetch it again"
        ) from None
    pixels = np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions)
    return torch.from_numpy(pixels.reshape(shape).copy())
