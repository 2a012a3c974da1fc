"""Views that bring the tensors of a call into the shapes of the operators."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def flatten_explanations(gradients: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, K, *S]`` and ``[B, *S]`` as ``[B, K, D]`` and ``[B, D]``.

    Inner products don't care about the order of the D dimensions as long as both tensors share it,
    so they are flattened in the order in which the gradients lie in memory: a channels-last
    gradient is read in place, and only the ``K`` times smaller inputs may be copied. Gradients
    whose dimensions ``*S`` have gaps between them (``g[..., ::2, ::2]``, an expanded dimension)
    have no single stride and are copied.
    """
    spatial = gradients.dim() - 2
    if spatial == 0:
        return gradients.unsqueeze(-1), inputs.unsqueeze(-1)
    if spatial > 1:
        order = _by_falling_stride(gradients, range(2, spatial + 2))
        gradients = gradients.permute(0, 1, *order).flatten(2)
        inputs = inputs.permute(0, *(dim - 1 for dim in order)).flatten(1)
    return gradients, inputs


def _by_falling_stride(tensor: Tensor, dims: Iterable[int]) -> list[int]:
    """An insertion sort: torch.compile can't trace ``sorted`` where strides are symbolic."""
    order: list[int] = []
    for dim in dims:
        place = len(order)
        while place > 0 and tensor.stride(order[place - 1]) < tensor.stride(dim):
            place -= 1
        order.insert(place, dim)
    return order


def flatten_rows(features: Tensor) -> Tensor:
    """``[..., D]`` as ``[N, D]``; a single row for ``[D]``."""
    return features.unsqueeze(0) if features.dim() == 1 else features.flatten(0, -2)
