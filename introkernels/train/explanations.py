"""What the report shows of a trained model: explanation maps and class similarities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import introkernels as ik
from introkernels.train.classifier import Classifier
from introkernels.train.data import LabelledImages


def explanation_maps(model: Classifier, images: Tensor) -> Tensor:
    """Gradient×input of every class: ``[B, C, *S]`` for images ``[B, *S]``."""
    images = images.detach().requires_grad_()
    logits = model(images)
    return torch.stack(
        [
            torch.autograd.grad(logits[:, c].sum(), images, retain_graph=True)[0] * images.detach()
            for c in range(logits.shape[1])
        ],
        dim=1,
    )


def class_similarity(model: Classifier, data: LabelledImages, classes: int) -> Tensor:
    """Mean similarity ``[C, C]``: row = true class, column = the class it is compared with."""
    _, stats = ik.explain.class_explanation_stats(model, data.images, data.labels, method="exact")
    cosines = ik.explain.similarities(stats, data.labels)
    return torch.stack([cosines[data.labels == c].mean(dim=0) for c in range(classes)])


@dataclass(frozen=True)
class Explained:
    """Images with the explanation of every class.

    Attributes:
        images: ``[B, channels, height, width]``.
        labels: ``[B]``.
        maps: ``[B, C, channels, height, width]``.
        similarity: ``[B, C]``, cosine with the true class's explanation.
        soft_labels: ``[B, C]``.
        predicted: ``[B, C]``, probabilities.
    """

    images: Tensor
    labels: Tensor
    maps: Tensor
    similarity: Tensor
    soft_labels: Tensor
    predicted: Tensor

    def most_similar(self) -> Tensor:
        """The other class ``[B]`` whose explanation is most like the true class's."""
        return self.similarity.scatter(1, self.labels[:, None], -torch.inf).argmax(dim=1)


def explain_first_of_each_class(
    model: Classifier, data: LabelledImages, classes: int, temperature: float
) -> Explained:
    """Explain the first image of each class in `data`: no choosing of pretty ones."""
    first = torch.stack([(data.labels == c).nonzero()[0, 0] for c in range(classes)])
    chosen = data[first]
    logits, stats = ik.explain.class_explanation_stats(
        model, chosen.images, chosen.labels, method="exact"
    )
    return Explained(
        images=chosen.images,
        labels=chosen.labels,
        maps=explanation_maps(model, chosen.images),
        similarity=ik.explain.similarities(stats, chosen.labels),
        soft_labels=ik.soft_labels(stats, chosen.labels, temperature=temperature),
        predicted=logits.detach().softmax(dim=1),
    )
