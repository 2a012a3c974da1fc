"""Data sets and their division into training, validation and test images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


class DataError(ValueError):
    """A division that the data set can't give."""


@dataclass(frozen=True)
class LabelledImages:
    """Images ``[N, channels, height, width]`` (float32) and their classes ``[N]`` (int64)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> LabelledImages:
        return LabelledImages(self.images.to(device), self.labels.to(device))

    def __getitem__(self, index: Tensor) -> LabelledImages:
        return LabelledImages(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A whole data set.

    Attributes:
        data: all images and labels.
        class_names: what each class is called.
        description: one sentence for the report: what the images are and where they come from.
    """

    data: LabelledImages
    class_names: tuple[str, ...]
    description: str

    @property
    def input_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.data.images.shape
        return channels, height, width


@dataclass(frozen=True)
class Splits:
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages


def _digits() -> Dataset:
    bunch = load_digits()
    # Scaled to [0, 1], not centred: an empty pixel stays 0, and gradient×input is 0 there.
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze_(1)
    return Dataset(
        LabelledImages(images, torch.from_numpy(bunch.target).long()),
        tuple(str(name) for name in bunch.target_names),
        "The digits that ship with scikit-learn: 1797 real handwritten digits of 8 × 8 pixels "
        "(Alpaydin & Kaynak, UCI Machine Learning Repository, 1998).",
    )


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": _digits}
"""Every data set by name."""


@lru_cache(maxsize=1)
def load_dataset(name: str) -> Dataset:
    return DATASETS[name]()


def split(
    dataset: Dataset,
    *,
    train_size: int,
    validation_size: int,
    test_size: int,
    split_seed: int,
    subset_seed: int,
) -> Splits:
    """Divide a data set, every part with the class shares of the whole.

    Test and validation images depend on `split_seed` alone, so every run is judged on the same
    images; the training images are drawn from what is left with `subset_seed`.

    Raises:
        DataError: the data set has too few images, or a part is smaller than the class count.
    """
    total, classes = len(dataset.data), len(dataset.class_names)
    sizes = {"train_size": train_size, "validation_size": validation_size, "test_size": test_size}
    for name, size in sizes.items():
        if size < classes:
            raise DataError(f"{name}: got {size}, expected at least {classes}, one a class")
    if sum(sizes.values()) > total:
        wanted = " + ".join(f"{name} {size}" for name, size in sizes.items())
        raise DataError(f"{wanted} = {sum(sizes.values())}, but the data set has {total} images")

    rest, test = _stratified(dataset, np.arange(total), test_size, split_seed)
    pool, validation = _stratified(dataset, rest, validation_size, split_seed)
    if train_size == len(pool):
        train = pool
    else:
        _, train = _stratified(dataset, pool, train_size, subset_seed)
    return Splits(*(dataset.data[torch.from_numpy(part)] for part in (train, validation, test)))


def _stratified(
    dataset: Dataset, indices: NDArray[np.int64], size: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rest of `indices`, and `size` of them."""
    labels = dataset.data.labels.numpy()[indices]
    if len(indices) - size < len(dataset.class_names):
        raise DataError(
            f"taking {size} of {len(indices)} images leaves fewer than one for each of "
            f"{len(dataset.class_names)} classes; make the parts smaller"
        )
    rest, taken = train_test_split(indices, test_size=size, stratify=labels, random_state=seed)
    return rest, taken
