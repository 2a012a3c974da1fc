"""How long the host is busy with a small call, whatever its kernels take.

    python benchmarks/host_time.py [seconds]

Losses of logits ``[128, 10]`` on one thread, beside PyTorch's own operations. No GPU is needed:
Triton's kernels are compiled and started as on an H200, by a driver that starts nothing, so that
the launch itself (3 to 5 microseconds) is left out, and so is PyTorch's look for the device. The
C++ kernels are those of the CPU, and compute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import introkernels as ik
from introkernels.bench.timing import Member, measure
from introkernels.ops import loader, schema, select
from introkernels.ops.triton import losses, operators, statistics

ROWS, CLASSES, DIMS = 128, 10, 64
SECONDS = 20.0
MICRO = 1e-6
PLAIN = "logits + logits"


class IdleDriver:
    """A driver of an H200 that starts nothing."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *kernel: (object(), 0, 0, 0, 1024),
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, *kernel: Any) -> Callable[..., None]:
        return lambda *arguments: None


def serve_on_the_host() -> None:
    """Let Triton serve tensors of the CPU, whose indices nobody looks at, as on a GPU."""
    triton.runtime.driver.set_active(IdleDriver())
    defined = schema.define("introkernels_host", operators)
    select.SERVING["triton"] = select.Serving(defined, ("cpu",))
    loader.STATUS["triton"] = loader.LOADED
    for module in (losses, statistics):
        module.check_indices = lambda *arguments: None


def members() -> list[Member]:
    """Forwards and backwards to be timed, of PyTorch's and of ours."""
    logits = torch.randn(ROWS, CLASSES, requires_grad=True)
    constant = logits.detach()
    teacher, target = torch.randn(ROWS, CLASSES), torch.randint(CLASSES, (ROWS,))
    gradients, inputs = torch.randn(ROWS, CLASSES, DIMS), torch.randn(ROWS, DIMS)
    losses_of_logits: dict[str, Callable[[Tensor], Tensor]] = {
        "F.cross_entropy": lambda z: F.cross_entropy(z, target),
        "distillation_loss": lambda z: ik.distillation_loss(z, teacher, target),
        "introspective_loss": lambda z: ik.introspective_loss(z, target, gradients, inputs),
    }
    incoming = torch.ones(())
    found = [Member(PLAIN, lambda: constant + constant)]
    for name, compute in losses_of_logits.items():
        for backend in ("cpu",) if name.startswith("F.") else ("triton", "cpu"):
            chosen = partial(ik.use_backend, backend)
            with chosen():
                loss = compute(logits)
            backward = partial(torch.autograd.grad, loss, logits, incoming, retain_graph=True)
            where = f"{name} on {backend}"
            found += [
                Member(f"{where}, forward alone", partial(compute, constant), chosen),
                Member(f"{where}, forward with a graph", partial(compute, logits), chosen),
                Member(f"{where}, backward", backward, chosen),
            ]
    return found


def main() -> None:
    """Print medians in microseconds, and in times of a plain operation."""
    torch.set_num_threads(1)
    serve_on_the_host()
    seconds = float(sys.argv[1]) if sys.argv[1:] else SECONDS
    medians = {name: times.median for name, times in measure(members(), seconds).items()}
    for name, median in medians.items():
        print(f"{name:50} {median / MICRO:6.1f} us {median / medians[PLAIN]:6.1f} x")


if __name__ == "__main__":
    main()
