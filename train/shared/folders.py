"""Find images in class folders, FOLDER/CLASS/IMAGE, as torchvision's ImageFolder does."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.shared.errors import DataError


def has_class_folders(root: Path) -> bool:
    """Return whether `root` has train/ and test/, each with folders in it."""
    return all(any(path.is_dir() for path in (root / part).glob("*")) for part in ("train", "test"))


# The three parts of a data set (train, test, val) stay in memory for the next run of a study.
@functools.lru_cache(maxsize=3)
def read_class_folders(folder: Path, image_size: int = 0) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Read the images of a folder, sorted by class and, within a class, by file name.

    Args:
        image_size: the number of pixels that the shorter side is resized to, before the square in
            the middle is taken; 0: all images are squares of one size already.

    Returns:
        uint8 (N, 3, S, S), int64 (N,) labels, and the names of the classes in alphabetical order.

    Raises:
        DataError: there are no class folders, one of them is empty, or an image cannot be read or
            has another size.
    """
    # These are imported here: torchvision takes seconds to import.
    from PIL import Image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import functional

    try:
        listing = ImageFolder(str(folder))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"'{folder}' holds no class folders with images ({' '.join(str(error).split())}): give "
            "--data_root=FOLDER with FOLDER/train/CLASS/IMAGE and FOLDER/test/CLASS/IMAGE"
        ) from None
    images: np.ndarray | None = None
    for number, (path, _) in enumerate(listing.samples):
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all of these
            raise DataError(f"'{path}' cannot be read ({error}): replace or remove it") from None
        if image_size:
            image = functional.center_crop(functional.resize(image, [image_size]), [image_size])
        pixels = np.asarray(image).transpose(2, 0, 1)
        if images is None:
            images = np.empty((len(listing.samples), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:] or pixels.shape[1] != pixels.shape[2]:
            raise DataError(
                f"'{path}' has {image.width}x{image.height} pixels, the first image "
                f"{images.shape[3]}x{images.shape[2]}: all must be squares of one size, or "
                "--image_size=N makes them so"
            )
        images[number] = pixels
    return torch.from_numpy(images), torch.tensor(listing.targets), tuple(listing.classes)
