"""What the report shows of a trained model: explanation maps and class similarities.

An explanation costs a backward pass for each class and image. All that is explained here is
bounded, so that the report of a data set with thousands of classes is no dearer than that of one
with dozens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import introkernels as ik
from introkernels.train.classifier import Classifier
from introkernels.train.data import LabelledImages

MOST_CLASSES = 20
"""Classes whose similarity is measured, at most."""
MOST_IMAGES = 32
"""Images of each class that it is measured on, at most."""
MOST_EXAMPLES = 10
"""Images that are shown, and classes that each is explained for, at most."""
_JUDGED_AT_ONCE = 100


@torch.no_grad()
def confused_pairs(model: Classifier, data: LabelledImages) -> Tensor:
    """Pairs of classes ``[P, 2]`` that a model takes for each other, the most confused ones first.

    Each image speaks for one pair, its class and the likeliest other one, with the probability of
    the latter; a pair is as confused as these probabilities sum up to. No pair of classes without
    a say is listed, so there are no more pairs than images.
    """
    pairs, probabilities = [], []
    for start in range(0, len(data), _JUDGED_AT_ONCE):
        batch = data[start : start + _JUDGED_AT_ONCE]
        others = model(batch.images).softmax(dim=1).scatter(1, batch.labels[:, None], -1)
        probability, other = others.max(dim=1)
        probabilities.append(probability.cpu().double())
        pairs.append(torch.stack([batch.labels, other], dim=1).sort(dim=1).values.cpu())
    listed: Tensor
    listed, which = torch.cat(pairs).unique(dim=0, return_inverse=True)
    confusion = which.bincount(torch.cat(probabilities))
    return listed[confusion.argsort(descending=True, stable=True)]


def chosen_classes(pairs: Tensor, count: int, most: int) -> Tensor:
    """All of `count` classes, or the `most` that come first in `pairs` ``[P, 2]``; ascending."""
    if count <= most:
        return torch.arange(count)
    by_confusion = dict.fromkeys(pairs.flatten().tolist())
    return torch.tensor(sorted([*by_confusion][:most]))


def class_similarity(
    model: Classifier,
    data: LabelledImages,
    classes: Tensor,
    on_class: Callable[[], None] = lambda: None,
) -> Tensor:
    """Mean similarity ``[K, K]`` of classes ``[K]`` over the first images of each.

    Row: true class; column: the class it is compared with. The row of a class without images is
    NaN. `on_class` is called after each row.
    """
    among = _Among(model, classes.to(data.labels.device)).eval()
    matrix = torch.full((len(classes), len(classes)), torch.nan)
    for row, c in enumerate(classes.tolist()):
        images = data[(data.labels == c).nonzero()[:MOST_IMAGES, 0]]
        if len(images):
            target = torch.full_like(images.labels, row)
            with torch.no_grad():
                _, stats = ik.explain.class_explanation_stats(
                    among, images.images, target, method="exact"
                )
            matrix[row] = ik.explain.similarities(stats, target).mean(dim=0).cpu()
        on_class()
    return matrix


@dataclass(frozen=True)
class Explained:
    """Images with the explanations of their class and of the likeliest others.

    Attributes:
        pictures: ``[B, channels, height, width]``, the images to look at, in [0, 1].
        classes: ``[B, K]``, the classes explained: each image's own, then the others by falling
            probability.
        maps: ``[B, K, channels, height, width]``.
        similarity: ``[B, K]``, cosine with the explanation of the image's own class.
        soft_labels: ``[B, K]``, over these classes.
    """

    pictures: Tensor
    classes: Tensor
    maps: Tensor
    similarity: Tensor
    soft_labels: Tensor

    @property
    def labels(self) -> Tensor:
        return self.classes[:, 0]

    def most_similar(self) -> Tensor:
        """The column ``[B]`` of the other class whose explanation is most like the true class's."""
        return self.similarity[:, 1:].argmax(dim=1) + 1


def explain_first_of_each_class(
    model: Classifier, data: LabelledImages, classes: Tensor, temperature: float
) -> Explained:
    """Explain the first image of each of `classes` ``[N]`` in `data`: no choosing of pretty ones.

    Classes without images are left out. Explained are an image's own class and the likeliest
    others, `MOST_EXAMPLES` in all.
    """
    of_class = [(data.labels == c).nonzero() for c in classes.tolist()]
    chosen = data.part(torch.cat([indices[0] for indices in of_class if len(indices)]))
    images, labels = chosen.images, chosen.labels
    explained, gradients = _likeliest_classes(model, images, labels)
    stats = ik.explanation_stats(gradients, images, labels, class_index=explained)
    return Explained(
        pictures=_pictures(chosen.stored).cpu(),
        classes=explained.cpu(),
        maps=(gradients * images[:, None]).cpu(),
        similarity=ik.explain.similarities(stats, labels).cpu(),
        soft_labels=ik.soft_labels(stats, labels, temperature=temperature).cpu(),
    )


def _likeliest_classes(model: Classifier, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classes ``[B, K]`` to explain, and the gradients ``[B, K, *S]`` of their logits."""
    images = images.detach().requires_grad_()
    logits = model(images)
    own = labels[:, None]
    others = logits.detach().scatter(1, own, -torch.inf)
    count = min(MOST_EXAMPLES, logits.shape[1])
    classes = torch.cat([own, others.topk(count - 1).indices], dim=1)
    gradients = [
        torch.autograd.grad(column.sum(), images, retain_graph=True)[0]
        for column in logits.gather(1, classes).unbind(dim=1)
    ]
    return classes, torch.stack(gradients, dim=1)


def _pictures(stored: Tensor) -> Tensor:
    """Images ``[B, channels, height, width]`` as they are shown, in [0, 1].

    Pixels keep their brightness; of other numbers, each image's range is brought to [0, 1].
    """
    if stored.dtype == torch.uint8:
        return stored / 255
    low, high = stored.amin((1, 2, 3), keepdim=True), stored.amax((1, 2, 3), keepdim=True)
    return (stored - low) / (high - low).clamp_min(torch.finfo(stored.dtype).tiny)


class _Among(nn.Module):
    """A model that knows some of its classes only."""

    def __init__(self, model: Classifier, classes: Tensor) -> None:
        super().__init__()
        self.model = model
        self.classes = classes

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs)[:, self.classes]
        return logits
