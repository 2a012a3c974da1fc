"""The division of a data set into training, validation and test images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import Tensor

from introkernels.train.data.images import (
    DataError,
    Dataset,
    LabelledImages,
    Normalisation,
    Splits,
)

_MEASURED_AT_ONCE = 10_000


def split(
    dataset: Dataset,
    *,
    train_size: int | None,
    validation_size: int,
    test_size: int | None,
    split_seed: int,
    subset_seed: int,
    label_noise: float = 0.0,
) -> Splits:
    """Divide a data set, every part with the class shares of the whole.

    Test and validation images depend on `split_seed` alone, so every run is judged on the same
    images; the training images are drawn from what is left, the training pool, with
    `subset_seed`. Test images are drawn from the official test images where the data set has
    any, and these are used for nothing else.

    Images that are kept as uint8 get a normalisation in all three parts: mean and standard
    deviation of each channel over the training pool, so that it is the same for every
    `subset_seed` and knows nothing of validation and test images. Other images have none.

    Args:
        train_size: training images; None takes all of the training pool.
        validation_size: validation images.
        test_size: test images; None takes all official ones.
        label_noise: the share of training labels, in [0, 1), that are replaced by another class
            drawn uniformly: symmetric noise, of exactly ``round(label_noise · train_size)``
            labels. Which ones, and what they become, depends on `subset_seed` and the number of
            training images; a greater share replaces the same ones in the same way, and more.
            Labels of validation and test images stay as they are.

    Raises:
        DataError: the data set has too few images, a part is smaller than the class count, or
            `label_noise` is out of range.
    """
    if not 0 <= label_noise < 1:
        raise DataError(f"label_noise: got {label_noise}, expected at least 0 and below 1")
    _check_sizes(dataset, train_size, validation_size, test_size)
    labels = dataset.data.labels.numpy()
    rest, official = np.arange(len(labels)), dataset.official_test
    if official is not None:
        test = _taken(official, test_size, len(dataset.class_names), split_seed)
    elif test_size is None:
        raise DataError("test_size: None takes the official test images, but there are none here")
    else:
        rest, chosen = _stratified(labels, rest, test_size, len(dataset.class_names), split_seed)
        test = dataset.data.part(torch.from_numpy(chosen))
    pool, chosen = _stratified(labels, rest, validation_size, len(dataset.class_names), split_seed)
    validation = dataset.data.part(torch.from_numpy(chosen))
    if train_size is None or train_size == len(pool):
        chosen = pool
    else:
        _, chosen = _stratified(labels, pool, train_size, len(dataset.class_names), subset_seed)
    train = dataset.data.part(torch.from_numpy(chosen))
    noisy = _noisy(train.labels, len(dataset.class_names), label_noise, subset_seed)
    train = replace(train, labels=noisy)

    if dataset.data.stored.dtype != torch.uint8:
        return Splits(train, validation, test)
    normalisation = Normalisation.measured(
        dataset.data.stored[part] for part in torch.from_numpy(pool).split(_MEASURED_AT_ONCE)
    )
    return Splits(
        *(replace(part, normalisation=normalisation) for part in (train, validation, test))
    )


def _check_sizes(
    dataset: Dataset, train_size: int | None, validation_size: int, test_size: int | None
) -> None:
    sizes = {"train_size": train_size, "validation_size": validation_size, "test_size": test_size}
    given = {name: size for name, size in sizes.items() if size is not None}
    classes = len(dataset.class_names)
    for name, size in given.items():
        if size < classes:
            raise DataError(f"{name}: got {size}, expected at least {classes}, one a class")
    if dataset.official_test is not None:
        wanted, there = given.pop("test_size", 0), len(dataset.official_test)
        if wanted > there:
            raise DataError(f"test_size: got {wanted}, but there are {there} official test images")
    if sum(given.values()) > len(dataset.data):
        terms = " + ".join(f"{name} {size}" for name, size in given.items())
        raise DataError(
            f"{terms} = {sum(given.values())}, but the data set has {len(dataset.data)} images"
        )


def _taken(official: LabelledImages, size: int | None, classes: int, seed: int) -> LabelledImages:
    """Some of the official test images, or all."""
    if size is None or size == len(official):
        return official
    everything = np.arange(len(official))
    _, chosen = _stratified(official.labels.numpy(), everything, size, classes, seed)
    return official.part(torch.from_numpy(chosen))


def _stratified(
    labels: NDArray[np.int64], indices: NDArray[np.int64], size: int, classes: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rest of `indices`, and `size` of them."""
    if len(indices) - size < classes:
        raise DataError(
            f"taking {size} of {len(indices)} images leaves fewer than one for each of "
            f"{classes} classes; make the parts smaller"
        )
    try:
        rest, taken = train_test_split(
            indices, test_size=size, stratify=labels[indices], random_state=seed
        )
    except ValueError as error:
        raise DataError(
            f"{size} of {len(indices)} images can't be taken with equal class shares: {error}"
        ) from error
    return rest, taken


def _noisy(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """The labels, a share of them replaced by another class."""
    # Not torch's generator: with the same seed it would order images in training as it does here.
    generator = np.random.default_rng(seed)
    replaced = torch.from_numpy(generator.permutation(len(labels)))[: round(share * len(labels))]
    steps = torch.from_numpy(generator.integers(1, max(classes, 2), len(labels)))
    noisy = labels.clone()
    noisy[replaced] = (labels[replaced] + steps[replaced]) % classes
    return noisy
