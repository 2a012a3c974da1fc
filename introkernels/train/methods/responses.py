"""Changes to the responses that a teacher gives: what is left of them tells what they taught.

Responses are logits or log-probabilities ``[B, C]``; ``kept [B, C]`` marks those that stay as they
are. A permutation of logits is the same permutation of their probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor


def marked(index: Tensor, responses: Tensor) -> Tensor:
    """``[B, C]`` bool: where responses ``[B, C]`` are those of the classes ``index [B]``."""
    return index[:, None] == torch.arange(responses.shape[1], device=responses.device)


def permute_others(responses: Tensor, kept: Tensor) -> Tensor:
    """Put the responses that are not kept in a random order, drawn anew for each row.

    Random numbers come from torch's default generator of the device.
    """
    # Kept classes are sorted to the end on both sides, in order, so that each goes to itself.
    draws = torch.rand(responses.shape, device=responses.device)
    drawn = draws.masked_fill(kept, 2.0).argsort(dim=1, stable=True)
    places = kept.to(torch.uint8).argsort(dim=1, stable=True)
    return torch.empty_like(responses).scatter(1, places, responses.gather(1, drawn))


def share_among_others(log_q: Tensor, kept: Tensor, scores: Tensor) -> Tensor:
    """Give the mass of the classes that are not kept to the same classes, as ``softmax(scores)``.

    Args:
        log_q: ``[B, C]``, logarithms of probabilities; -inf for none.
        kept: ``[B, C]`` bool.
        scores: ``[B, C]``; equal ones share evenly.
    """
    never = float("-inf")
    mass = log_q.masked_fill(kept, never).logsumexp(dim=1, keepdim=True)
    shares = scores.masked_fill(kept, never).log_softmax(dim=1)
    return torch.where(kept, log_q, mass + shares)
