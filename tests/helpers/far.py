"""Tensors whose elements lie too far apart for 32-bit offsets, in memory that nobody touches."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

FAR = (1 << 30) + 8
# Of Linux: the pages that are never touched count for nothing.
NO_RESERVE = 0x4000


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """The same numbers in bfloat16, ``FAR`` elements apart along ``dim``, of size 3.

    The last lies 2^31 elements from the first, which 32 bits don't count. A kernel that counts with
    them reads zeros elsewhere in the same pages.
    """
    assert tensor.shape[dim] == 3
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    pages = mmap.mmap(-1, (2 << 32) + 4096, flags=flags)
    strides = [*torch.empty(tensor.shape, device="meta").stride()]
    strides[dim] = FAR
    storage = torch.frombuffer(pages, dtype=torch.bfloat16)
    view = storage.as_strided(tensor.shape, strides, 1 << 31)
    return view.copy_(tensor)
