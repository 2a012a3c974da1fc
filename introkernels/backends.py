"""What serves the losses here: the compiled backends, their state and their build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from introkernels._version import __version__
from introkernels.ops import loader, warming


def status() -> dict[str, str]:
    """For each of ``"cpu"``, ``"cuda"`` and ``"triton"``: ``"loaded"``, or the reason why not."""
    return dict(loader.STATUS)


def cpu_capability() -> str | None:
    """The instruction set of the C++ kernels here: ``"avx512"``, ``"avx2"`` or ``"baseline"``.

    It is the best that the machine has, or what the environment variable
    ``INTROKERNELS_CPU_CAPABILITY`` asks for. None without the C++ kernels.

    Raises:
        ValueError: the variable asks for one that does not exist or that the machine lacks, as the
            kernels themselves raise it.
    """
    return loader.cpu_capability()


def warm_up(
    function: Callable[..., Any],
    *arguments: Any,
    progress: Callable[[int, int, str], None] = warming.show_progress,
    **keywords: Any,
) -> int:
    """Compile the Triton kernels that a call needs, so that no step of a training waits for them.

    Call it as ``function`` would be called, once for each shape that differs in more than the size
    of the batch::

        logits = torch.empty(256, 100, device="meta", dtype=torch.bfloat16)
        gradients = torch.empty(256, 100, 3072, device="meta", dtype=torch.bfloat16)
        target = torch.empty(256, device="meta", dtype=torch.int64)
        ik.backends.warm_up(ik.introspective_loss, logits, target, gradients, gradients[:, 0])

    The kernels of the forward without a gradient, with one, and of the backward are compiled for
    the GPU of the first tensor that lies on one, or else for the current GPU. Triton keeps them on
    disk: a second process finds them there. Nothing is computed, and nothing of the tensors' sizes
    is allocated.

    Args:
        function: a loss of this package, one of its modules, or any function that calls them.
        arguments: its arguments. Tensors lend their shape, strides, dtype and ``requires_grad``
            (where none requires a gradient, all floating-point ones do); on ``device="meta"`` they
            take no memory.
        progress: called as ``progress(done, total, name)`` before each kernel and once at the end,
            with an empty name. By default a line on the standard error.
        keywords: its keywords.

    Returns:
        How many kernels the call needs; those compiled earlier are counted too.

    Raises:
        RuntimeError: Triton can't be used here, or interprets its kernels; the message says why.
        ValueError: ``function`` launches no Triton kernel.
    """
    if loader.STATUS["triton"] != loader.LOADED:
        raise RuntimeError(f"backend 'triton' can't be used: {loader.STATUS['triton']}")
    if loader.INTERPRETED:
        raise RuntimeError("nothing to compile: TRITON_INTERPRET is set, kernels are interpreted")
    launches = warming.record(loader.TRITON_KERNELS, function, arguments, keywords)
    if not launches:
        raise ValueError(f"{function!r} launches no Triton kernel for these arguments")
    with torch.cuda.device(warming.device_of((*arguments, *keywords.values()))):
        return warming.compile_all(launches, progress)


def build_info() -> dict[str, Any]:
    """What this install was built with.

    Always ``version``, ``torch`` (the one running) and ``backends`` (as :func:`status`). A compiled
    install adds what its build recorded: compiler, flags, the torch it was built against, the
    stable ABI it targets, the libraries built, and for CUDA's its compiler and its architectures
    (``"sm_90a"``: machine code for an H100; ``"compute_100"``: what the driver compiles further).
    """
    return {
        **loader.build_record().get("build", {}),
        "version": __version__,
        "torch": str(torch.__version__),
        "backends": status(),
    }
