"""Make labels wrong, the same ones for everybody: they belong to the data set, not to the run."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.shared.errors import DataError

SEED = 42

# These are CIFAR-100's classes by superclass; in alphabetical order, they have the labels 0 to 99.
CIFAR100_SUPERCLASSES = (
    "beaver dolphin otter seal whale",
    "aquarium_fish flatfish ray shark trout",
    "orchid poppy rose sunflower tulip",
    "bottle bowl can cup plate",
    "apple mushroom orange pear sweet_pepper",
    "clock keyboard lamp telephone television",
    "bed chair couch table wardrobe",
    "bee beetle butterfly caterpillar cockroach",
    "bear leopard lion tiger wolf",
    "bridge castle house road skyscraper",
    "cloud forest mountain plain sea",
    "camel cattle chimpanzee elephant kangaroo",
    "fox porcupine possum raccoon skunk",
    "crab lobster snail spider worm",
    "baby boy girl man woman",
    "crocodile dinosaur lizard snake turtle",
    "hamster mouse rabbit shrew squirrel",
    "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "bicycle bus motorcycle pickup_truck train",
    "lawn_mower rocket streetcar tank tractor",
)
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR100_CLASSES = sorted(" ".join(CIFAR100_SUPERCLASSES).split())
# The images of all other classes keep their labels.
CIFAR10_CONFUSED = {
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}


def flip_labels(labels: Tensor, share: float, num_classes: int, seed: int = SEED) -> Tensor:
    """Return a copy in which round(share * N) labels are another class, each equally likely."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % num_classes
    return noisy


def confused_with(dataset: str, num_classes: int) -> Tensor:
    """Return for each class the class that asymmetric noise makes of it: a class that is never
    confused stays itself.

    CIFAR-10 has pairs of classes that look alike; in CIFAR-100, a class becomes the next of its
    superclass, and the last becomes the first (both: Patrini et al., arXiv:1609.03683). In other
    data sets, a class becomes the next one.
    """
    if dataset == "cifar10":
        number = CIFAR10_CLASSES.index
        found = torch.arange(10)
        for name, other in CIFAR10_CONFUSED.items():
            found[number(name)] = number(other)
        return found
    if dataset == "cifar100":
        number = CIFAR100_CLASSES.index
        found = torch.arange(100)
        for members in map(str.split, CIFAR100_SUPERCLASSES):
            for name, other in zip(members, members[1:] + members[:1], strict=True):
                found[number(name)] = number(other)
        return found
    return (torch.arange(num_classes) + 1) % num_classes


def confuse_labels(labels: Tensor, share: float, partner: Tensor, seed: int = SEED) -> Tensor:
    """Return a copy in which round(share * N) of the N labels with a partner become the partner."""
    generator = torch.Generator().manual_seed(seed)
    able = (partner[labels] != labels).nonzero()[:, 0]
    chosen = able[torch.randperm(len(able), generator=generator)[: round(share * len(able))]]
    noisy = labels.clone()
    noisy[chosen] = partner[labels[chosen]]
    return noisy


def read_labels(path: Path, count: int, num_classes: int) -> Tensor:
    """Read labels, int64 (count,), from a .npy file or from a text with whole numbers.

    Raises:
        DataError: the file cannot be read, or does not hold `count` labels of these classes.
    """
    try:
        if path.suffix == ".npy":
            labels = np.load(path, allow_pickle=False)
        else:
            labels = np.loadtxt(path, dtype=np.int64, ndmin=1)
        if labels.dtype.kind not in "iu":
            raise ValueError(f"dtype {labels.dtype}, which is no integer")
    except (OSError, ValueError) as error:
        raise DataError(
            f"label_noise_file={path} cannot be read ({' '.join(str(error).split())}): give a .npy "
            "file or text, with one whole number for each image"
        ) from None
    if labels.shape != (count,):
        raise DataError(
            f"label_noise_file={path} has labels of shape {labels.shape}: there are {count} "
            f"images in the files that training images come from; allowed is ({count},)"
        )
    if not 0 <= labels.min() <= labels.max() < num_classes:
        raise DataError(
            f"label_noise_file={path} has labels from {labels.min()} to {labels.max()}: allowed 0 "
            f"to {num_classes - 1}"
        )
    return torch.from_numpy(labels.astype(np.int64))
