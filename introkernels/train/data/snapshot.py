"""Folders that Hugging Face's `datasets` reads: snapshots in Parquet files, folders of images."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from introkernels.train.data.decoding import PictureError, reading, stack_pictures
from introkernels.train.data.images import DataError, LabelledImages

_LAYOUT = (
    "expected Parquet files with a column of images and one of class labels, or image files in one "
    "folder a class (CLASS/NAME.png)"
)
_TEST_PARTS = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class Snapshot:
    """What was read.

    Attributes:
        data: every image that isn't a test image.
        test: the images of the first part there is of "test", "validation", "valid", "val", if
            there are any others.
        class_names: of the first column of class labels.
        columns: the other columns of class labels ``[N]`` (int64), of `data`, by name.
    """

    data: LabelledImages
    test: LabelledImages | None
    class_names: tuple[str, ...]
    columns: dict[str, Tensor]


def read_snapshot(directory: Path, image_size: int | None = None) -> Snapshot:
    """Read a folder with `datasets`, from its files alone, without a copy in its cache.

    Args:
        directory: Parquet files with columns of images and class labels, in the form in which
            the Hugging Face Hub keeps them, or image files in one folder a class.
        image_size: see `stack_pictures`.

    Raises:
        DataError: `datasets` isn't installed, can't read the folder, or finds no images or no
            class labels in it.
    """
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{directory}: reading it needs the package datasets, which can't be imported "
            f"({error}); `pip install datasets`"
        ) from error
    try:
        parts: dict[str, Any] = dict(library.load_dataset(str(directory), streaming=True))
        features = next(iter(parts.values())).features or {}
        images = [name for name, kind in features.items() if isinstance(kind, library.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, library.ClassLabel)]
        if images and labels:
            # Decoded one by one, where a damaged picture can be named.
            coded = library.Image(decode=False)
            parts = {name: part.cast_column(images[0], coded) for name, part in parts.items()}
            decode = library.Image().decode_example
            return _read(parts, images[0], decode, labels, features[labels[0]].names, image_size)
    except PictureError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{directory}: datasets can't read it: {error}; {_LAYOUT}") from error
    raise DataError(
        f"{directory}: the columns are {', '.join(features) or 'none'}; {_LAYOUT}, of at least two "
        "classes"
    )


def _read(
    parts: dict[str, Any],
    image: str,
    decode: Callable[[dict[str, Any]], Image.Image],
    labels: Sequence[str],
    class_names: Sequence[str],
    image_size: int | None,
) -> Snapshot:
    test_part = next((name for name in _TEST_PARTS if name in parts and len(parts) > 1), None)
    values: dict[str, list[int]] = {name: [] for name in labels}
    sizes = dict.fromkeys(sorted(parts, key=lambda name: name == test_part), 0)

    def pictures() -> Iterator[Image.Image]:
        for part in sizes:
            for row in parts[part]:
                for name in labels:
                    values[name].append(row[name])
                sizes[part] += 1
                with reading(f"{row[image]['path']}, image {sizes[part]} of the part {part},"):
                    picture = decode(row[image])
                yield picture

    stored = stack_pictures(pictures(), image_size)
    columns = {name: torch.tensor(values[name]) for name in labels}
    everything = LabelledImages(stored, columns[labels[0]])
    data = slice(len(everything) - (0 if test_part is None else sizes[test_part]))
    return Snapshot(
        data=everything.part(data),
        test=None if test_part is None else everything.part(slice(data.stop, None)),
        class_names=tuple(class_names),
        columns={name: columns[name][data] for name in labels[1:]},
    )
