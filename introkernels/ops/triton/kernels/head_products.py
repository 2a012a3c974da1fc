"""Three products of a tile of rows and a tile of classes, on tensor cores and precise to float32.

Tensor cores multiply bfloat16 numbers exactly and add them up in float32. A float32 number is the
sum of three bfloat16 numbers, which take eight of its 24 bits each, and a bfloat16 number's square
of two. A product of such sums is a sum of products, of which those are left out that lie 2^-24
below the first: six products for two float32 numbers. For bfloat16 features and weight this makes
1 + 3 + 4 products of z, dots and sq_norms instead of 18, where one float32 product without tensor
cores takes as long as 15 (H100) or 16 (A100).
"""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.head import load_features, load_mean, without_mean
from introkernels.ops.triton.kernels.teachers import load_tile

# Triton's interpreter would multiply the bits of bfloat16 numbers, taken as integers.
PART = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def upper_bits(x):
    """float32 numbers cut to the bits that bfloat16 holds."""
    # Cut rather than rounded: the largest numbers would round to infinity.
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def parts_of(x, PARTS: tl.constexpr):
    """bfloat16 numbers whose sum is float32 ``x``, if it has no more than 8 * PARTS bits."""
    first = upper_bits(x)
    # Of infinity, the first part says all.
    rest = tl.where(tl.abs(x) == float("inf"), 0, x - first)
    second = upper_bits(rest)
    if PARTS == 1:
        parts = (first.to(PART),)
    elif PARTS == 2:
        parts = (first.to(PART), second.to(PART))
    else:
        third = rest - second
        parts = (first.to(PART), second.to(PART), third.to(PART))
    return parts


@triton.jit
def transposed(parts):
    """Each part transposed."""
    if len(parts) == 1:
        result = (tl.trans(parts[0]),)
    elif len(parts) == 2:
        result = (tl.trans(parts[0]), tl.trans(parts[1]))
    else:
        result = (tl.trans(parts[0]), tl.trans(parts[1]), tl.trans(parts[2]))
    return result


@triton.jit
def add_product(total, a, b):
    """``total`` plus the product of the sums of parts ``a`` and ``b``."""
    # The products of a block have a sum of their own, which is rounded to nearest when it is added:
    # inside, tensor cores cut, which would add up over long rows. A compiler may put the sum of a
    # block and the total together where the block is a single product.
    block = tl.zeros_like(total)
    for i in tl.static_range(len(a)):
        for j in tl.static_range(len(b)):
            if i + j < 3:
                block = tl.dot(a[i], b[j], block)
    return total + block


@triton.jit
def parts_of_square(x, PARTS: tl.constexpr):
    """Parts of the squares of numbers that have PARTS parts themselves."""
    # Of bfloat16, 8 bits become 16; of float32, 24 are rounded to 24.
    if PARTS == 1:
        parts = parts_of(x * x, 2)
    else:
        parts = parts_of(x * x, 3)
    return parts


@triton.jit
def products_tile(
    features,
    features_strides,
    weight,
    weight_strides,
    mean,
    rows,
    live,
    y,
    known,
    row_scale,
    weight_scale,
    classes,
    num_classes,
    width,
    FEATURE_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """z, dots and sq_norms, ``[M, N]`` float32, of ``rows [M]`` and ``classes [N]``.

    Each tile of the weight is read once for all three. ``y`` are the targets, read where ``known``;
    ``row_scale`` and ``weight_scale`` are pairs of powers of two.
    """
    z = tl.zeros((M, N), tl.float32)
    dots = tl.zeros((M, N), tl.float32)
    sq_norms = tl.zeros((M, N), tl.float32)
    row_first, row_second = row_scale
    first, second = weight_scale
    for begin in range(0, width, K):
        columns = begin + tl.arange(0, K)
        inside = (columns < width)[None, :]
        h = load_features(features, features_strides, rows, live, columns, width, tl.float32)
        mask = (classes < num_classes)[:, None] & inside
        w = load_tile(weight, weight_strides, classes, columns, mask, 0.0, tl.float32)
        of_target = load_tile(
            weight, weight_strides, y, columns, known[:, None] & inside, 0.0, tl.float32
        )
        weight_parts = transposed(parts_of(w, WEIGHT_PARTS))
        z = add_product(z, parts_of(h, FEATURE_PARTS), weight_parts)

        h = h * row_first[:, None] * row_second[:, None]
        squares = h * h
        if mean is None:
            square_parts = transposed(parts_of_square(w * first * second, WEIGHT_PARTS))
        else:
            taken = load_mean(mean, columns, width)
            w = without_mean(w, taken)
            of_target = without_mean(of_target, taken)
            weight_parts = transposed(parts_of(w, 3))
            square_parts = transposed(parts_of_square(w * first * second, 3))
        # The weight is not scaled here, so that its parts serve both products: its target is,
        # twice.
        left = squares * (of_target * first * second) * first * second
        dots = add_product(dots, parts_of(left, 3), weight_parts)
        sq_norms = add_product(sq_norms, parts_of_square(h, FEATURE_PARTS), square_parts)
    return z, dots, sq_norms
