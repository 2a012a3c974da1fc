"""Divergences of soft labels ``q`` and probabilities ``p``, with their gradients in closed form.

With ``s = z / T``, so that ``p = softmax(s)``, and ``m = beta * q + (1 - beta) * p``:

    forward KL:  sum_c q_c (log q_c - log p_c)                      d/ds = p - q
    reverse KL:  sum_c p_c r_c,  r_c = log p_c - log q_c            d/ds = p (r - sum_k p_k r_k)
    JS:          beta KL(q || m) + (1 - beta) KL(p || m)            d/ds as reverse KL's, with
                                                         r_c = (1 - beta) (log p_c - log m_c)

A term whose factor is zero is zero. Each function takes ``log p``, which is finite, and ``log q``
``[B, C]``, both of which it may overwrite, and gives the divergence ``[B, 1]`` and its gradient
``[B, C]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from introkernels.options import Options
from introkernels.types import DIVERGENCES


def divergence(log_p: Tensor, log_q: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The divergence that the options name, and its gradient."""
    name = DIVERGENCES[options.divergence]
    if name == "forward_kl":
        return _forward_kl(log_p, log_q)
    if name == "reverse_kl":
        return _reverse_kl(log_p, log_q)
    return _js(log_p, log_q, options.beta)


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    value = _finite(log_q).sub_(log_p).mul_(q).sum(1, keepdim=True)
    return value, log_p.exp_().sub_(q)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    ratio = log_p.sub_(log_q)
    value = _only_where(p, ratio * p).sum(1, keepdim=True)
    return value, _only_where(p, ratio.sub_(value).mul_(p))


def _js(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    log_q = _finite(log_q)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    of_q = log_q.sub_(log_m).mul_(q).sum(1, keepdim=True)
    ratio = log_p.sub_(log_m).mul_(1 - beta)
    of_p = (ratio * p).sum(1, keepdim=True)
    return of_p.add(of_q, alpha=beta), ratio.sub_(of_p).mul_(p)


def _finite(logarithm: Tensor) -> Tensor:
    """``logarithm``, overwritten so that it can be multiplied by a probability of zero."""
    return logarithm.clamp_(min=torch.finfo(logarithm.dtype).min)


def _only_where(probability: Tensor, terms: Tensor) -> Tensor:
    return terms.masked_fill_(probability == 0, 0)
