"""A folder of one's own images."""

from __future__ import annotations

from pathlib import Path

from introkernels.train.data.images import DataError, Dataset
from introkernels.train.data.snapshot import read_snapshot


def image_folder(directory: Path, image_size: int | None = None) -> Dataset:
    """The images of a folder, as RGB (uint8); the classes are its subfolders by name.

    Where there are parts train/ and test/ (or val/), the latter holds the official test images.

    Args:
        directory: the folder.
        image_size: height and width that every image is brought to. None keeps images that all
            have one size, and means 64 for others; see `stack_pictures`.

    Raises:
        DataError: there is no such folder, or it can't be read.
    """
    if not directory.is_dir():
        raise DataError(
            f"image_folder: {directory} is not a folder; expected image files in one folder a "
            "class (CLASS/NAME.png), these perhaps in train/ and test/, or a snapshot of a Hugging "
            "Face data set in Parquet files"
        )
    read = read_snapshot(directory, image_size)
    return Dataset(
        read.data,
        read.class_names,
        f"The images in the folder {directory.resolve().name}.",
        official_test=read.test,
    )
