"""Matrix products of the library in full float32, whatever the user chose for theirs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_users = 0
_chosen = "none"


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep TF32 out of the float32 products that this thread starts.

    PyTorch holds the choice for all threads in one place, where TF32 may stand because the user
    wants the products of a model fast; eleven bits are too few for the statistics of explanations.
    The first of several threads saves the choice and the last one restores it. Products that other
    threads start meanwhile are as precise, no less. This costs two assignments on the host.
    """
    global _users, _chosen
    matmul = torch.backends.cuda.matmul
    with _lock:
        if _users == 0:
            _chosen = matmul.fp32_precision
            matmul.fp32_precision = "ieee"
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                matmul.fp32_precision = _chosen
