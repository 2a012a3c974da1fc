"""Tiny ImageNet: Le & Yang, "Tiny ImageNet Visual Recognition Challenge", CS 231N report, Stanford,
2015; photographs of ImageNet (Deng et al., CVPR 2009).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from introkernels.train.data.decoding import PictureError, reading, stack_pictures
from introkernels.train.data.images import DataError, Dataset, LabelledImages
from introkernels.train.data.snapshot import read_snapshot

_ARCHIVE = "tiny-imagenet-200"
_SIDE = 64


def tiny_imagenet(directory: Path) -> Dataset:
    """100000 images of 3 × 64 × 64 pixels (uint8), 200 classes, and 10000 for testing.

    The labels of its test images are not public: as usual, the validation images stand in for
    them, as official test images.

    Args:
        directory: holds the unpacked archive ``tiny-imagenet-200``, by itself or in a folder
            ``tiny_imagenet``; or, in the latter, a snapshot of the Hugging Face data set in
            Parquet files.

    Raises:
        DataError: it holds neither, or a file is missing or damaged.
    """
    own = directory / "tiny_imagenet"
    for folder in (directory / _ARCHIVE, own / _ARCHIVE):
        if folder.is_dir():
            return _from_archive(folder)
    if any(own.rglob("*.parquet")):
        read = read_snapshot(own, _SIDE)
        if read.test is None:
            raise DataError(f"tiny_imagenet: {own} has no part of validation images")
        return _dataset(read.data, read.test, read.class_names)
    raise DataError(
        f"tiny_imagenet: found neither {directory / _ARCHIVE} nor Parquet files in {own}. Put "
        f"there the unpacked archive {_ARCHIVE}.zip (http://cs231n.stanford.edu) with its "
        "wnids.txt, words.txt, train/WNID/images/*.JPEG, val/images/*.JPEG and "
        "val/val_annotations.txt, or a snapshot of the Hugging Face data set zh-plus/tiny-imagenet"
    )


def _from_archive(folder: Path) -> Dataset:
    try:
        synsets = sorted((folder / "wnids.txt").read_text().split())
        words = dict(
            line.split("\t", 1) for line in (folder / "words.txt").read_text().splitlines()
        )
        train = [
            (path, label)
            for label, synset in enumerate(synsets)
            for path in sorted((folder / "train" / synset / "images").glob("*.JPEG"))
        ]
        annotations = (folder / "val" / "val_annotations.txt").read_text().splitlines()
        validation = [
            (folder / "val" / "images" / name, synsets.index(synset))
            for name, synset, *_box in (line.split("\t") for line in annotations)
        ]
        names = tuple(words[synset].split(",")[0] for synset in synsets)
        return _dataset(_read(train), _read(validation), names)
    except PictureError:
        raise
    except (KeyError, OSError, ValueError) as error:
        raise DataError(
            f"tiny_imagenet: {folder} is not as expected: {error}; unpack the archive again"
        ) from error


def _read(files: Sequence[tuple[Path, int]]) -> LabelledImages:
    def pictures() -> Iterator[Image.Image]:
        for path, _ in files:
            with reading(str(path)), Image.open(path) as picture:
                picture.load()
            yield picture

    labels = torch.tensor([label for _, label in files])
    return LabelledImages(stack_pictures(pictures(), _SIDE), labels)


def _dataset(data: LabelledImages, test: LabelledImages, names: tuple[str, ...]) -> Dataset:
    return Dataset(
        data,
        names,
        f"Tiny ImageNet: {len(data)} real photographs of 64 × 64 pixels in {len(names)} classes, "
        f"and the {len(test)} validation images for testing (Le & Yang, CS 231N report, Stanford, "
        "2015).",
        official_test=test,
    )
