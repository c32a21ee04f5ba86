"""Data sets as uint8 tensors on the training device, and their augmentation in batches there."""

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor

from train.config import Config
from train.errors import DataError

SPLIT_SEED = 42  # the report's
NOISE_SEED = 42  # the same wrong labels whatever the seed of the run
# Where Debian's package dataset-fashion-mnist has its four files.
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, C, H, W), unaugmented; labels: int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Augmentation:
    """What training images go through; 0 and False leave a step out.

    Args:
        padding: black pixels on each side, from which a crop of the image's size is taken.
        flip: mirror every second image (probability 0.5) left to right.
        cutout: side of the square that is set to 0 after normalisation (probability 0.5).
    """

    padding: int = 0
    flip: bool = False
    cutout: int = 0


@dataclass(frozen=True)
class Dataset:
    """mean, std: float32 (1, C, 1, 1), of pixels in [0, 1] (uint8 / 255)."""

    train: Split
    val: Split
    test: Split
    num_classes: int
    mean: Tensor
    std: Tensor
    augmentation: Augmentation

    def normalise(self, images: Tensor) -> Tensor:
        """(images / 255 - mean) / std, float32: bit for bit torchvision's ToTensor, Normalize."""
        return (images.float() / 255 - self.mean) / self.std


@dataclass(frozen=True)
class Draws:
    """The random numbers of an epoch: entry i of each (N,) tensor is for the i-th image visited.

    order: index of the image. top, left: corner of the crop in the padded image. flip, cut:
    whether to. cut_top, cut_left: corner of the Cutout square, which may hang over the edge.
    """

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor
    cut: Tensor
    cut_top: Tensor
    cut_left: Tensor

    def slice(self, start: int, stop: int) -> "Draws":
        """Those of the images visited from start to stop."""
        return Draws(**{name: value[start:stop] for name, value in vars(self).items()})


def draw_epoch(dataset: Dataset, seed: int, epoch: int) -> Draws:
    """Draw an epoch's order and augmentation; a function of the seed and the epoch alone.

    Drawn on the CPU and moved once per epoch, so that every device sees the same images and a
    resumed run needs no random state.
    """
    count, size = len(dataset.train), dataset.train.images.shape[-1]
    spec = dataset.augmentation
    # The CPU generator uses 32 bits of its seed, so the two share them: neighbours stay apart.
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
        images: uint8 (B, C, H, W) with H = W; draws: those of these B images.

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
    """(B, size): start <= position < start + length."""
    return (span >= start[:, None]) & (span < start[:, None] + length)


def train_batches(
    dataset: Dataset, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented batches of an epoch; the last one may be smaller.

    Args:
        rank, world: of each batch, the process `rank` of `world` gets its share: together they see
            what one process would. The shares differ by one image at most.
    """
    draws = draw_epoch(dataset, seed, epoch)
    for start in range(0, len(dataset.train), batch_size):
        count = min(batch_size, len(dataset.train) - start)
        part = draws.slice(start + count * rank // world, start + count * (rank + 1) // world)
        images = dataset.train.images[part.order]
        yield augment(dataset, images, part), dataset.train.labels[part.order]


def plain_batches(
    dataset: Dataset, split: Split, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a split in order, normalised, not augmented."""
    for start in range(0, len(split), batch_size):
        stop = start + batch_size
        yield dataset.normalise(split.images[start:stop]), split.labels[start:stop]


def flip_labels(labels: Tensor, share: float, num_classes: int, seed: int = NOISE_SEED) -> Tensor:
    """A copy in which round(share * N) labels are wrong: another class, each equally likely."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % num_classes
    return noisy


def split_indices(count: int, held_out: int, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """(training, held out): disjoint, as torch.utils.data.random_split takes them."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count - held_out], order[count - held_out :]


def load_dataset(config: Config, device: torch.device) -> Dataset:
    """The data set of the configuration on the device, with its label noise.

    Raises:
        DataError: it is neither at hand nor to be downloaded, a file is damaged, or it has fewer
            than train_samples.
    """
    dataset = LOADERS[config.dataset](config.data_root)
    count = config.train_samples or len(dataset.train)
    if count > len(dataset.train):
        raise DataError(
            f"train_samples={count} is more than {config.dataset} has: allowed 0 (all) to "
            f"{len(dataset.train)}"
        )
    # The training split was drawn at random: its beginning is a random part of it.
    known = Split(dataset.train.images[:count], dataset.train.labels[:count])
    noisy = flip_labels(known.labels, config.label_noise, dataset.num_classes)

    def moved(images: Tensor, labels: Tensor) -> Split:
        return Split(images.to(device), labels.to(device))

    return replace(
        dataset,
        train=moved(known.images, noisy),
        val=moved(dataset.val.images, dataset.val.labels),
        test=moved(dataset.test.images, dataset.test.labels),
        mean=dataset.mean.to(device),
        std=dataset.std.to(device),
    )


def _digits(data_root: str) -> Dataset:
    """scikit-learn's 1797 digits of 8x8 pixels in 0..16: 1000 / 297 / 500, stratified."""
    # Here, because scikit-learn takes a second to import and CIFAR-100 does not need it.
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
    return Dataset(
        train=Split(pixels[train], targets[train]),
        val=Split(pixels[val], targets[val]),
        test=Split(pixels[test], targets[test]),
        num_classes=10,
        mean=known.mean().view(1, 1, 1, 1),
        std=known.std().view(1, 1, 1, 1),
        # A mirrored digit is another sign, and a hole in 8x8 pixels hides too much.
        augmentation=Augmentation(padding=1),
    )


def _hold_out(
    known: Split,
    test: Split,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augmentation: Augmentation,
) -> Dataset:
    """A data set whose validation split is 5,000 of the training images, as in the report."""
    train, val = split_indices(len(known), held_out=5000)
    return Dataset(
        train=Split(known.images[train], known.labels[train]),
        val=Split(known.images[val], known.labels[val]),
        test=test,
        num_classes=num_classes,
        mean=torch.tensor(mean).view(1, -1, 1, 1),
        std=torch.tensor(std).view(1, -1, 1, 1),
        augmentation=augmentation,
    )


def _missing(name: str, data_root: str, error: Exception, holds: str) -> DataError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{name} is not in '{data_root}' and could not be downloaded ({reason}): connect to the "
        f"network, or pass --data_root=DIR where DIR holds {holds}; "
        "`python -m train.study quickstart` needs no download"
    )


def _cifar(data_root: str, name: str, folder: str) -> tuple[Split, Split]:
    """(training, test) of CIFAR-10 or CIFAR-100, from torchvision's files."""
    # Here, because torchvision takes seconds to import and the digits do not need it.
    from torchvision import datasets

    kind = {"CIFAR-10": datasets.CIFAR10, "CIFAR-100": datasets.CIFAR100}[name]

    def read(train: bool) -> Split:
        try:
            part = kind(data_root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise _missing(name, data_root, error, f"the unpacked folder {folder}") from None
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(part.targets))

    return read(train=True), read(train=False)


# The report's, which suits CIFAR-10 too.
CIFAR_AUGMENTATION = Augmentation(padding=4, flip=True, cutout=16)


def _cifar100(data_root: str) -> Dataset:
    """CIFAR-100 as the report uses it: 45,000 / 5,000 / 10,000."""
    return _hold_out(
        *_cifar(data_root, "CIFAR-100", "cifar-100-python"),
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        augmentation=CIFAR_AUGMENTATION,
    )


def _cifar10(data_root: str) -> Dataset:
    """CIFAR-10 with the protocol of CIFAR-100: 45,000 / 5,000 / 10,000."""
    return _hold_out(
        *_cifar(data_root, "CIFAR-10", "cifar-10-batches-py"),
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augmentation=CIFAR_AUGMENTATION,
    )


def _fashion(data_root: str) -> Dataset:
    """Fashion-MNIST: 55,000 / 5,000 / 10,000 images of 28x28 pixels."""
    folder = _fashion_folder(data_root)

    def read(part: str) -> Split:
        images = read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte"))
        labels = read_idx(_idx_file(folder, f"{part}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(
                f"the '{part}' files in '{folder}' do not belong together: images of shape "
                f"{tuple(images.shape)}, labels of shape {tuple(labels.shape)}; fetch them again"
            )
        return Split(images[:, None], labels.long())

    return _hold_out(
        read("train"),
        read("t10k"),
        num_classes=10,
        mean=(0.2860,),
        std=(0.3530,),
        # Clothes may be mirrored; a hole of half the width, as in CIFAR, hides too much of them.
        augmentation=Augmentation(padding=4, flip=True),
    )


FASHION_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def _idx_file(folder: Path, name: str) -> Path:
    """The file, unpacked or as .gz; the latter if there is neither."""
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"


def _fashion_folder(data_root: str) -> Path:
    """The folder that has the four files; downloads them with torchvision if there is none."""
    root = Path(data_root)
    places = (root / "FashionMNIST" / "raw", root, root / "fashion-mnist", DEBIAN_FASHION)
    for place in places:
        if all(_idx_file(place, name).exists() for name in FASHION_FILES):
            return place
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
    """A uint8 tensor from a file in MNIST's idx format, unpacked or .gz.

    (torchvision's reader takes unpacked files only, and checks with `assert`.)

    Raises:
        DataError: the file cannot be read, or is not what its header says.
    """
    try:
        data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        # Two zeros, the type (8: uint8), the number of dimensions; then each size.
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


LOADERS: dict[str, Callable[[str], Dataset]] = {
    "cifar100": _cifar100,
    "cifar10": _cifar10,
    "fashion": _fashion,
    "digits": _digits,
}
