"""What ``introkernels.autograd._apply`` saves of ``Function.apply``: forward and backward together.

    python benchmarks/apply.py

Distillation of logits ``[8, 10]`` on one thread, where the kernels take next to nothing. The two
ways take turns in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from introkernels.autograd import RowLossFunction, _apply
from introkernels.ops.select import operators
from introkernels.options import Options

TURNS = 5000


def main() -> None:
    """Print the median time of each way in microseconds."""
    torch.set_num_threads(1)
    logits = torch.randn(8, 10, requires_grad=True)
    inputs = (
        operators(logits.device),
        logits,
        torch.randn(8, 10),
        torch.randint(10, (8,)),
        None,
        Options(4.0, 0.7, 0.3, 0.0, -100, 1),
    )
    ways: dict[str, Callable[[], Any]] = {
        "Function.apply": lambda: RowLossFunction.apply(*inputs),
        "_apply": lambda: _apply(RowLossFunction, inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            started = time.perf_counter()
            torch.autograd.grad(way()[0], logits)
            times[name].append(time.perf_counter() - started)
    for name, measured in times.items():
        print(f"{name:15}{1e6 * statistics.median(measured):6.1f} us")


if __name__ == "__main__":
    main()
