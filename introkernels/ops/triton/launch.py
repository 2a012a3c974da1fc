"""The one door through which kernels are started, so that a launch can also be recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A kernel with the arguments of one launch.

    Attributes:
        kernel: what ``triton.jit`` made.
        grid: the number of programs in each direction.
        arguments: tensors and numbers, in the kernel's order.
        options: compile-time constants, ``num_warps`` and the like, by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


# All the registers that a thread may have. Left to itself, ptxas goes for the next higher occupancy
# and spills the few numbers that it lacks for it. A launch that knows better says ``maxnreg``.
MOST_REGISTERS = 255
# What AMD's compiler doesn't know.
NVIDIA_OPTIONS = ("maxnreg",)

_recorder: Callable[[Launch], None] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start ``kernel`` on the device of its first argument, in the current stream of that device.

    A grid without programs starts nothing.
    """
    options.setdefault("maxnreg", MOST_REGISTERS)
    if torch.version.hip is not None:
        for name in NVIDIA_OPTIONS:
            del options[name]
    if _recorder is not None:
        _recorder(Launch(kernel, grid, arguments, options))
        return
    if 0 in grid:
        return
    first: Tensor = arguments[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


@contextmanager
def recording(recorder: Callable[[Launch], None]) -> Iterator[None]:
    """Hand launches to ``recorder`` instead of making them.

    Operators called on meta tensors tell in this way which kernels a shape needs, and how they are
    specialised, without any data or device.
    """
    global _recorder
    previous, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = previous
