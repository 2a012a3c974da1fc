"""The operators of the linear head, and the choice between two ways to the same numbers."""

from __future__ import annotations

from introkernels.ops.head.call import HeadCall
from introkernels.ops.head.chunks import least_bytes
from introkernels.ops.head.operators import Way, linear_operators
from introkernels.ops.triton import head_chunks, head_stream

# What the matrices of a chunk may take at most.
MOST_CHUNK_BYTES = 2 << 30

WAYS: dict[str, Way] = {"chunks": head_chunks, "stream": head_stream}


def way(call: HeadCall) -> str:
    """Which way a call goes: ``"chunks"`` of rows by the matrix library, or ``"stream"``.

    With gradients, the library way computes 5 products of B * C * D, as it has the logits at hand,
    where streaming kernels compute 11, because both of their backwards make the tiles again. Of a
    loss alone both compute 3, the library faster; only for heads so small that launches are all
    they cost would a streaming forward win, and then a loss would not be the same, to the bit, with
    and without its gradient. So the library is the way as long as its memory is bounded: products
    of fewer than 128 rows would wait for the weight, and the matrices of as many grow with the
    classes. From 1.4 million classes on they would take more than 2 GiB, and calls are streamed
    where there are kernels for them. None of this has been measured.
    """
    num_classes, width = call.weight.shape
    if least_bytes(num_classes, width) <= MOST_CHUNK_BYTES:
        return "chunks"
    return "stream" if head_stream.serves(call) else "chunks"


linear_forward, linear_backward = linear_operators(lambda call: WAYS[way(call)])
