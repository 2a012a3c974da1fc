"""Handwritten digits."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from introkernels.train.data.images import Dataset, LabelledImages


def digits(_directory: Path) -> Dataset:
    """1797 images of 1 × 8 × 8 pixels in [0, 1] (float32), 10 classes; no files are needed."""
    bunch = load_digits()
    # Scaled to [0, 1], not centred: an empty pixel stays 0, and gradient×input is 0 there.
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze_(1)
    return Dataset(
        LabelledImages(images, torch.from_numpy(bunch.target).long()),
        tuple(str(name) for name in bunch.target_names),
        "The digits that ship with scikit-learn: 1797 real handwritten digits of 8 × 8 pixels "
        "(Alpaydin & Kaynak, UCI Machine Learning Repository, 1998).",
    )
