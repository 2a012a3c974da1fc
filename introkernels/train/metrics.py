"""Accuracy, negative log-likelihood and calibration error of a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from introkernels.train.classifier import Classifier
from introkernels.train.data import LabelledImages

METRICS = ("accuracy", "nll", "ece")
"""Accuracy: fraction; NLL: nats; ECE: expected calibration error of 15 bins, fraction."""
MEASURED = (*METRICS, "confidence")
"""The metrics, and the mean probability of the predicted class: beside the accuracy it tells
whether a calibration error comes from too much confidence or too little."""


class Evaluator:
    """Measures a model on labelled images, in evaluation mode."""

    def __init__(self, classes: int, device: torch.device, batch_size: int = 1000) -> None:
        self.batch_size = batch_size
        # One process measures all images: there is nothing to gather from others.
        alone: dict[str, Any] = {"sync_on_compute": False}
        self.accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False, **alone)
        self.ece = MulticlassCalibrationError(
            classes, n_bins=15, norm="l1", validate_args=False, **alone
        )
        self.nll = MeanMetric(nan_strategy="disable", **alone)
        self.confidence = MeanMetric(nan_strategy="disable", **alone)
        for name in MEASURED:
            getattr(self, name).to(device)

    @torch.no_grad()
    def __call__(self, model: Classifier, data: LabelledImages) -> dict[str, float]:
        was_training = model.training
        model.eval()
        for start in range(0, len(data), self.batch_size):
            batch = data[start : start + self.batch_size]
            labels = batch.labels
            logits = model(batch.images)
            probabilities = logits.softmax(dim=1)
            self.accuracy.update(probabilities, labels)
            self.ece.update(probabilities, labels)
            self.nll.update(F.cross_entropy(logits, labels, reduction="none"))
            self.confidence.update(probabilities.amax(dim=1))
        model.train(was_training)
        measured = {name: getattr(self, name).compute().item() for name in MEASURED}
        for name in MEASURED:
            getattr(self, name).reset()
        return measured
