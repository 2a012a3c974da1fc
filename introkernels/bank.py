"""A memory of which classes a model finds alike: soft labels that don't hang on one example."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from introkernels import checks
from introkernels.teachers import similarities
from introkernels.types import ExplanationStats, Similarity


class SimilarityBank:
    """A class-by-class exponential moving average of similarities.

    The entry of a true class and another one is ``m * entry + (1 - m) * mean`` over the rows of a
    batch that show the two; the first mean is taken as it is. A pair that was never seen counts as
    not alike. Nothing waits for a GPU, and sums have a fixed order.

    Args:
        momentum: ``m``, in [0, 1).
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self._mean: Tensor | None = None
        self._seen: Tensor | None = None

    @property
    def matrix(self) -> Tensor | None:
        """``[C, C]`` float32 (float64 for such statistics), row = true class; None before the first
        update."""
        return self._mean

    def update(
        self,
        stats: ExplanationStats,
        target: Tensor,
        num_classes: int,
        *,
        similarity: Similarity,
        ignore_index: int,
        group: ProcessGroup | None = None,
    ) -> None:
        """Take in a batch.

        Args:
            stats: statistics ``[B, K]``.
            target: ``[B]`` int64; rows with ``ignore_index`` or no class have no part.
            num_classes: C.
            similarity: what is averaged; `introkernels.explain.similarities` defines it.
            ignore_index: see ``target``.
            group: the processes whose batches make up one.

        Raises:
            ValueError: the bank holds another number of classes.
        """
        if self._mean is not None and len(self._mean) != num_classes:
            raise ValueError(
                f"the similarity bank must have one row for each of the model's {num_classes} "
                f"classes, got {checks.describe(self._mean)}"
            )
        found = similarities(stats, target, similarity=similarity)
        live = (target != ignore_index) & (target >= 0) & (target < num_classes)
        usable = found.isfinite() & live[:, None]
        with torch.autocast(target.device.type, enabled=False), torch.no_grad():
            self._update(
                torch.where(usable, found, 0), usable, stats.class_index, target, num_classes, group
            )

    def _update(
        self,
        found: Tensor,
        usable: Tensor,
        class_index: Tensor | None,
        target: Tensor,
        num_classes: int,
        group: ProcessGroup | None,
    ) -> None:
        dtype = found.dtype
        # Float32 products may be set to round their factors (TF32); those of float64 never do.
        found, usable = found.double(), usable.double()
        if class_index is not None:
            nothing = found.new_zeros(len(found), num_classes)
            found = nothing.scatter(1, class_index, found)
            usable = nothing.scatter(1, class_index, usable)
        # A product with one-hot rows, as index_add would add in any order on a GPU.
        rows = (torch.arange(num_classes, device=target.device)[:, None] == target).to(found.dtype)
        sums = torch.stack([rows @ found, rows @ usable])
        if group is not None:
            all_reduce(sums, group=group)
        total, count = sums
        if self._mean is None or self._seen is None:
            self._mean = torch.eye(num_classes, dtype=dtype, device=target.device)
            self._seen = torch.zeros_like(self._mean, dtype=torch.bool)
        self._move(target.device)
        before = self._mean.to(dtype)
        mean = (total / count.clamp(min=1)).to(dtype)
        moved = torch.where(self._seen, torch.lerp(mean, before, self.momentum), mean)
        self._mean = torch.where(count > 0, moved, before)
        self._seen = self._seen | (count > 0)

    def similarities(self, target: Tensor) -> Tensor:
        """The rows ``[B, C]`` of the targets; a target that is no class gets any.

        Raises:
            RuntimeError: before the first update.
        """
        if self._mean is None:
            raise RuntimeError("the similarity bank is empty before its first update")
        self._move(target.device)
        known = (target >= 0) & (target < len(self._mean))
        return self._mean[torch.where(known, target, 0)]

    def _move(self, device: torch.device) -> None:
        """Follow the targets: a state may have been loaded to another device."""
        if self._mean is not None and self._seen is not None:
            self._mean, self._seen = self._mean.to(device), self._seen.to(device)

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes; empty before the first update."""
        if self._mean is None or self._seen is None:
            return {}
        return {"mean": self._mean, "seen": self._seen}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self._mean, self._seen = state.get("mean"), state.get("seen")
