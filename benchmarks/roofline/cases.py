"""The launches that are predicted, and how they are shared out among blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from roofline.machine import Gpu
from roofline.predict import Work

ELEMENT = {"bfloat16": 2, "float32": 4}
# What a forward of the row loss keeps of a row for its backward.
STATE_BYTES = 72
CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc/cuda"


@dataclass(frozen=True)
class Case:
    """A launch.

    Attributes:
        kernel: an operator, or a direction of it.
        shape: ``(B, C)``, or ``(B, K, D)`` of explanations.
        dtype: of its tensors.
    """

    kernel: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def goal(self) -> float:
        """The share of a copy that it is meant to reach on an H200."""
        return 0.6 if self.shape[1:] == (100,) else 0.85

    @property
    def element(self) -> int:
        """Bytes of a number."""
        return ELEMENT[self.dtype]

    def work(
        self,
        blocks: int,
        warps: int,
        lanes: int,
        *,
        turns: int = 1,
        shared: int = 0,
        is_dealt: bool = False,
    ) -> Work:
        """What so many blocks of so many warps do; see ``Work``."""
        if len(self.shape) == 2:
            B, C = self.shape
            numbers, read, written = 2, 2 * B * C, B * C * (self.kernel == "row_loss_backward")
            besides = B * STATE_BYTES
        else:
            B, K, D = self.shape
            # The inputs are read beside the main loop.
            numbers, read, written, besides = 1, B * K * D, B * D, 0
        return Work(
            blocks,
            warps,
            (read + written) * self.element,
            read * self.element,
            self.element,
            lanes,
            numbers=numbers,
            turns=turns,
            shared=shared,
            besides=besides,
            is_dealt=is_dealt,
            is_split=len(self.shape) == 3 and blocks > B,
        )


CASES = (
    *(
        Case(f"row_loss_{direction}", shape, dtype)
        for direction in ("forward", "backward")
        for shape in ((8192, 32000), (4096, 1000), (65536, 100))
        for dtype in ELEMENT
    ),
    *(
        Case(kernel, shape, "bfloat16")
        for kernel in ("explanation_stats", "introspective_forward")
        for shape in ((256, 100, 3072), (128, 16, 150528))
    ),
)

# The names of kernels in csrc/cuda, and patterns of the template arguments that a dtype gets.
CUDA_KERNELS = {
    "row_loss_forward": ("row_loss_forward", r"{0}, {0}, float, \d+, false"),
    "row_loss_backward": ("row_loss_backward", r"{0}, {0}, float, \d+, false"),
    "explanation_stats": ("explanation_stats", r"{0}, true, false"),
    "introspective_forward": ("introspective", r"{0}, true, false"),
}
CUDA_TYPES = {"bfloat16": "BFloat16", "float32": "float"}
# By the names of Triton's kernels.
TRITON_KERNELS = {
    "loss_forward": "row_loss_forward",
    "loss_backward": "row_loss_backward",
    "explanation_stats_kernel": "explanation_stats",
    "introspective_forward_kernel": "introspective_forward",
}


def is_cuda_kernel(case: Case, name: str, arguments: str) -> bool:
    """Whether a kernel of csrc/cuda, by its name and its template's arguments, serves a case."""
    wanted, pattern = CUDA_KERNELS[case.kernel]
    return name == wanted and bool(re.fullmatch(pattern.format(CUDA_TYPES[case.dtype]), arguments))


def cuda_work(case: Case, gpu: Gpu) -> Work:
    """How csrc/cuda shares a case out: by ``plan_rows``, ``launch_backward``, ``plan_statistics``.

    All blocks have 256 threads.
    """
    if len(case.shape) == 2:
        B, C = case.shape
        lanes = 4
        while lanes < 32 and 16 * lanes < C:
            lanes *= 2
        if C > 64 * 32:
            lanes = 256
        blocks = _ceil(B, 256 // lanes)
        if case.kernel == "row_loss_backward" and lanes == 256:
            blocks *= _ceil(C * case.element // 16, 256 * _constant("kVectorsOfThread"))
        return case.work(blocks, 8, lanes)
    B, K, D = case.shape
    slices = _ceil(D * case.element, 32 * 32)
    wanted = _ceil(8 * gpu.multiprocessors, B)
    turns = _ceil(slices, min(wanted, max(1, slices // max(1, 32 // K))))
    return case.work(B * _ceil(slices, turns), 8, 256, turns=turns, is_dealt=True)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _constant(name: str) -> int:
    """A number in csrc/cuda."""
    text = "".join(file.read_text() for file in sorted(CUDA_SOURCES.glob("*.[ch]*")))
    found = re.search(rf"\bconstexpr \w+ {name} = (\d+);", text)
    if found is None:
        raise LookupError(f"csrc/cuda has no number {name}, which cuda_work goes by")
    return int(found[1])
