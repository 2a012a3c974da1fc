"""Data sets, by name, and their division into training, validation and test images."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from introkernels.train.data.augment import AUGMENTATIONS
from introkernels.train.data.cifar import cifar10, cifar100
from introkernels.train.data.digits import digits
from introkernels.train.data.division import split
from introkernels.train.data.image_folder import image_folder
from introkernels.train.data.images import (
    DataError,
    Dataset,
    LabelledImages,
    Normalisation,
    Splits,
)
from introkernels.train.data.synthetic import synthetic
from introkernels.train.data.tiny_imagenet import tiny_imagenet

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "DEFAULT_DIRECTORY",
    "DataError",
    "Dataset",
    "LabelledImages",
    "Normalisation",
    "Splits",
    "load_dataset",
    "split",
]

DEFAULT_DIRECTORY = Path("data")
"""Where data sets' files are looked for."""

DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "digits": digits,
    "synthetic": synthetic,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny_imagenet": tiny_imagenet,
    "image_folder": image_folder,
}
"""Every data set by name: made from the folder with the data sets' files."""


def load_dataset(
    name: str, directory: Path | None = None, *, image_size: int | None = None
) -> Dataset:
    """A data set, from files on this machine alone. The last one loaded is kept in memory.

    Args:
        name: a key of `DATASETS`.
        directory: the folder that holds the data sets' files; of "image_folder" it is the folder
            of images itself. None means `DEFAULT_DIRECTORY`.
        image_size: height and width that the images of "image_folder" are brought to; the other
            data sets have sizes of their own and want None.

    Raises:
        DataError: the name is unknown, files are missing or can't be read (the message says which
            are expected where), or `image_size` can't be.
    """
    if name not in DATASETS:
        raise DataError(f"dataset: got {name!r}, expected one of {', '.join(DATASETS)}")
    if image_size is not None and name != "image_folder":
        raise DataError(f"image_size: got {image_size}, but only image_folder has a choice of it")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size: got {image_size}, expected at least 1")
    return _load(name, DEFAULT_DIRECTORY if directory is None else directory, image_size)


@lru_cache(maxsize=1)
def _load(name: str, directory: Path, image_size: int | None) -> Dataset:
    if image_size is not None:
        return image_folder(directory, image_size)
    return DATASETS[name](directory)
