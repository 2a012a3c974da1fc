"""CIFAR-10 and CIFAR-100: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images",
technical report, University of Toronto, 2009.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from introkernels.train.data.images import DataError, Dataset, LabelledImages
from introkernels.train.data.snapshot import read_snapshot


@dataclass(frozen=True)
class _Form:
    """How the files of one of the two are called, and the keys in them."""

    name: str
    title: str
    archive: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str
    snapshot: str


_CIFAR10 = _Form(
    name="cifar10",
    title="CIFAR-10",
    archive="cifar-10-batches-py",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    labels="labels",
    names="label_names",
    snapshot="uoft-cs/cifar10",
)
_CIFAR100 = _Form(
    name="cifar100",
    title="CIFAR-100",
    archive="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    labels="fine_labels",
    names="fine_label_names",
    snapshot="uoft-cs/cifar100",
)


def cifar10(directory: Path) -> Dataset:
    """50000 images of 3 × 32 × 32 pixels (uint8), 10 classes, and 10000 official test images.

    Args:
        directory: holds the unpacked archive ``cifar-10-batches-py``, by itself or in a folder
            ``cifar10``; or, in the latter, a snapshot of the Hugging Face data set in Parquet
            files.

    Raises:
        DataError: it holds neither, or a file is missing or damaged.
    """
    return _load(_CIFAR10, directory)


def cifar100(directory: Path) -> Dataset:
    """50000 images of 3 × 32 × 32 pixels (uint8), 100 classes, and 10000 official test images.

    The classes have their 20 superclasses.

    Args:
        directory: holds the unpacked archive ``cifar-100-python``, by itself or in a folder
            ``cifar100``; or, in the latter, a snapshot of the Hugging Face data set in Parquet
            files.

    Raises:
        DataError: it holds neither, or a file is missing or damaged.
    """
    return _load(_CIFAR100, directory)


def _load(form: _Form, directory: Path) -> Dataset:
    own = directory / form.name
    for folder in (directory / form.archive, own / form.archive):
        if folder.is_dir():
            return _from_batches(form, folder)
    if any(own.rglob("*.parquet")):
        return _from_snapshot(form, own)
    raise DataError(
        f"{form.name}: found neither {directory / form.archive} nor Parquet files in {own}. Put "
        f"there the unpacked archive {form.title} python version "
        "(https://www.cs.toronto.edu/~kriz/cifar.html) with its files "
        f"{', '.join((*form.train, form.test, form.meta))}, or a snapshot of the Hugging Face data "
        f"set {form.snapshot}"
    )


def _from_batches(form: _Form, folder: Path) -> Dataset:
    train = [_unpickle(folder / name) for name in form.train]
    test, meta = _unpickle(folder / form.test), _unpickle(folder / form.meta)
    try:
        data = LabelledImages(
            torch.cat([_pixels(batch) for batch in train]),
            torch.cat([torch.tensor(batch[form.labels.encode()]) for batch in train]),
        )
        official = LabelledImages(_pixels(test), torch.tensor(test[form.labels.encode()]))
        names = tuple(name.decode() for name in meta[form.names.encode()])
        coarse = [torch.tensor(batch.get(b"coarse_labels", [])) for batch in train]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{form.name}: {folder} doesn't hold batches as expected: {error!r}"
        ) from error
    return _dataset(form, data, official, names, torch.cat(coarse))


def _from_snapshot(form: _Form, folder: Path) -> Dataset:
    read = read_snapshot(folder)
    if read.test is None:
        raise DataError(f"{form.name}: {folder} has no part of test images")
    coarse = read.columns.get("coarse_label", torch.empty(0))
    return _dataset(form, read.data, read.test, read.class_names, coarse)


def _dataset(
    form: _Form,
    data: LabelledImages,
    official: LabelledImages,
    names: tuple[str, ...],
    coarse: Tensor,
) -> Dataset:
    """`coarse`: the superclass of each image, or nothing."""
    of_class = dict(zip(data.labels.tolist(), coarse.tolist(), strict=False))
    complete = len(of_class) == len(names)
    return Dataset(
        data,
        names,
        f"{form.title}: {len(data) + len(official)} real photographs of 32 × 32 pixels in "
        f"{len(names)} classes (Krizhevsky, technical report, University of Toronto, 2009).",
        official_test=official,
        superclasses=tuple(of_class[c] for c in range(len(names))) if complete else None,
    )


def _pixels(batch: dict[bytes, Any]) -> Tensor:
    """Rows of 3072 numbers, all red ones first, as images."""
    return torch.from_numpy(batch[b"data"].reshape(-1, 3, 32, 32))


class _ArraysOnly(pickle.Unpickler):
    """Makes numpy arrays and plain values, and nothing else: a pickle can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        reconstruct = np.empty(0).__reduce__()[0]
        known = {
            # numpy 1's name for the module, in which the files were written, and numpy 2's.
            ("numpy.core.multiarray", "_reconstruct"): reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch needs")
        return known[module, name]


def _unpickle(path: Path) -> dict[bytes, Any]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="bytes").load()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; unpack the archive again") from error
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise DataError(f"{path} can't be read: {error!r}; unpack the archive again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected a dictionary")
    return content
