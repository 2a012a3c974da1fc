"""Labelled images, whole data sets and their parts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


class DataError(ValueError):
    """A data set that can't be loaded, or a division that it can't give."""


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation ``[channels]`` (float32) of pixels in [0, 1]."""

    mean: Tensor
    std: Tensor

    @classmethod
    def measured(cls, batches: Iterable[Tensor]) -> Normalisation:
        """Of all pixels of uint8 images ``[N, channels, height, width]``, with equal weight.

        A channel that doesn't vary gets the standard deviation 1.
        """
        # Counts are exact, so the order and the size of batches don't show in the result.
        counts = sum(
            torch.stack([c.bincount(minlength=256) for c in batch.transpose(0, 1).flatten(1)])
            for batch in batches
        )
        shares = torch.as_tensor(counts, dtype=torch.float64)
        shares = shares / shares.sum(dim=1, keepdim=True)
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean = shares @ levels
        std = (shares * (levels - mean[:, None]) ** 2).sum(dim=1).sqrt()
        return cls(mean.float(), torch.where(std > 0, std, 1.0).float())

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean[:, None, None]) / self.std[:, None, None]

    def inverse(self, images: Tensor) -> Tensor:
        """The pixels in [0, 1] that were normalised to `images`, for showing them."""
        return images * self.std[:, None, None] + self.mean[:, None, None]

    def to(self, device: torch.device) -> Normalisation:
        return Normalisation(self.mean.to(device), self.std.to(device))


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        stored: ``[N, channels, height, width]``; float32 as a network sees them, or uint8, a
            quarter of the memory, from which `images` and indexing make float32.
        labels: ``[N]`` (int64).
        normalisation: what a network's inputs are normalised by; None leaves them as they are.

    Raises:
        ValueError: there are more or fewer labels than images.
    """

    stored: Tensor
    labels: Tensor
    normalisation: Normalisation | None = None

    def __post_init__(self) -> None:
        if len(self.stored) != len(self.labels):
            raise ValueError(f"labels: got {len(self.labels)} for {len(self.stored)} images")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """All images as a network sees them: float32, uint8 divided by 255, normalised.

        Of a set kept as uint8 this makes a copy four times as large; index it to get a batch.
        """
        pixels = self.stored
        if pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(255)
        return pixels if self.normalisation is None else self.normalisation(pixels)

    def __getitem__(self, index: Tensor | slice) -> LabelledImages:
        """Some of the images, as a network sees them."""
        part = self.part(index)
        return LabelledImages(part.images, part.labels)

    def part(self, index: Tensor | slice) -> LabelledImages:
        """Some of the images, stored as they are here."""
        return replace(self, stored=self.stored[index], labels=self.labels[index])

    def to(self, device: torch.device) -> LabelledImages:
        return LabelledImages(
            self.stored.to(device),
            self.labels.to(device),
            None if self.normalisation is None else self.normalisation.to(device),
        )


@dataclass(frozen=True)
class Dataset:
    """A whole data set.

    Attributes:
        data: all images and labels, without those of `official_test`.
        class_names: what each class is called.
        description: one sentence for the report: what the images are and where they come from.
        official_test: the images that the data set's authors set apart for testing.
        superclasses: the superclass of each class, where there are any.
        synthetic: whether the images were generated.
    """

    data: LabelledImages
    class_names: tuple[str, ...]
    description: str
    official_test: LabelledImages | None = None
    superclasses: tuple[int, ...] | None = None
    synthetic: bool = False

    @property
    def input_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.data.stored.shape
        return channels, height, width


@dataclass(frozen=True)
class Splits:
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
