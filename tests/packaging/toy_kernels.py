"""A kernel that is as it should be, one that spills, and one that does not compile.

Read by tests/compile_kernels.py in place of the package's operators and calls.
"""

import os
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

from introkernels.ops import select
from introkernels.ops.triton.launch import launch


@triton.jit(do_not_specialize=["rows"])
def copy(out, x, strides, rows, scale: "fp64", BLOCK: tl.constexpr):  # noqa: F821
    columns = tl.program_id(0).to(tl.int64) * strides[0] + tl.arange(0, BLOCK) * strides[1]
    value = tl.load(x + columns, mask=tl.program_id(0) < rows)
    tl.store(out + columns, value * tl.full((), scale, tl.float64).to(tl.float32))


@triton.jit
def spill(out, x, BLOCK: tl.constexpr):
    # One warp whose threads hold 512 numbers each until all are there.
    rows = tl.arange(0, BLOCK)
    tile = tl.load(x + rows[:, None] * BLOCK + rows[None, :])
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], tile / tl.sum(tl.exp(tile)))


@triton.jit
def fail(out, x):
    tl.store(out, tl.load(x) + no_such_name)  # noqa: F821


def _copy(x: torch.Tensor) -> None:
    grid = (len(x),)
    launch(copy, grid, x, x, x.stride(), len(x), 0.5, BLOCK=x.shape[1], num_warps=4)


def _spill(x: torch.Tensor) -> None:
    launch(spill, (1,), x, x, BLOCK=128, num_warps=1)


def _fail(x: torch.Tensor) -> None:
    launch(fail, (1,), x, x)


kernels = SimpleNamespace(copy=_copy, spill=_spill, fail=_fail)


def calls():
    def through_the_choice(name):
        return lambda x: getattr(select.operators(x.device), name)(x)

    # Another number of rows is the same kernel; rows that are not aligned are another.
    for rows, columns in ((7, 1024), (1000, 1024), (7, 512)):
        x = torch.empty(rows, columns, device="meta")
        yield f"copy of {rows} times {columns}", (through_the_choice("copy"), (x,), {})
    unaligned = torch.empty(7, 1025, device="meta")[:, :1024]
    yield "copy of unaligned", (through_the_choice("copy"), (unaligned,), {})
    for name in os.environ.get("TOYS", "").split():
        yield f"a toy that should {name}", (through_the_choice(name), (x,), {})
