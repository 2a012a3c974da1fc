"""Triton's interpreter, with the arithmetic of a GPU.

Under ``TRITON_INTERPRET=1`` kernels run on CPU tensors, by NumPy. Triton 3.6 differs there from
what every GPU does in two points that our kernels meet.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def compute_like_a_gpu() -> None:
    """Round float32 to the nearest bfloat16, and let ``maximum(NaN, x)`` be x.

    The interpreter cuts the last digits of a bfloat16 off, which is up to a unit in the last place
    and always to the same side. And ``tl.maximum`` and ``tl.minimum`` give the number where one of
    two is NaN, unless asked to propagate it, which is what the interpreter always does.
    """
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = builder.create_fp_trunc = _cast
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


_cast_as_before = interpreter.InterpreterBuilder.cast_impl


def _cast(builder: Any, source: Any, target_type: Any) -> Any:
    if source.dtype.scalar != tl.float32 or target_type.scalar != tl.bfloat16:
        return _cast_as_before(builder, source, target_type)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
    data = rounded.view(torch.uint16).numpy().reshape(source.data.shape)
    return interpreter.TensorHandle(data, tl.bfloat16)
