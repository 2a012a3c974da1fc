"""A program's share of the statistics: a slice of a row's dimensions, for some of its classes."""

import triton
import triton.language as tl


@triton.jit
def target_position(target, class_index, index_stride, num_classes):
    """Where ``target`` stands among a row's classes, int32; -1 where it is none of them.

    ``class_index`` points to the row's first class, or is None where the row has all classes.
    """
    if class_index is None:
        known = (target >= 0) & (target < num_classes)
        position = tl.where(known, target, -1).to(tl.int32)
    else:
        BLOCK: tl.constexpr = 256
        found = tl.full((BLOCK,), -1, tl.int32)
        for first in tl.range(0, num_classes, BLOCK):
            classes = first + tl.arange(0, BLOCK)
            inside = classes < num_classes
            named = tl.load(class_index + classes.to(tl.int64) * index_stride, mask=inside, other=0)
            found = tl.maximum(found, tl.where(inside & (named == target), classes, -1))
        position = tl.max(found, axis=0)
    return position


@triton.jit
def _offsets(index, sizes, strides):
    """Where the vectors ``index`` of an explanation lie, in vectors."""
    offsets = tl.zeros_like(index)
    for i in tl.static_range(len(sizes) - 1):
        last: tl.constexpr = len(sizes) - 1 - i
        offsets += index % sizes[last] * strides[last]
        index = index // sizes[last]
    return offsets + index * strides[0]


@triton.jit
def _load_classes(
    gradients, offsets, in_slice, first, end, stride, BLOCK_K: tl.constexpr, LAST: tl.constexpr
):
    """A tile ``[WIDTH, BLOCK_K, CHUNKS]`` of the classes from ``first`` on, zeros from ``end`` on.

    ``LAST`` says that nobody reads these gradients again.
    """
    classes = first + tl.arange(0, BLOCK_K)
    begins = gradients + classes.to(tl.int64) * stride
    return tl.load(
        begins[None, :, None] + offsets[:, None, :],
        mask=in_slice[:, None, :] & (classes < end)[None, :, None],
        other=0.0,
        eviction_policy="evict_first" if LAST else "",
    )


@triton.jit
def _store_sums(explained, of_target, known, dots, sq_norms, first, end, BLOCK_K: tl.constexpr):
    """Inner products of a tile of explanations with the target's and with themselves."""
    # First over the chunks, which a thread has for itself, then over the lanes of a warp.
    dot = tl.sum(tl.sum(explained * of_target, axis=2), axis=0)
    sq_norm = tl.sum(tl.sum(explained * explained, axis=2), axis=0)
    dot = tl.where(known, dot, float("nan"))
    # As many columns as lanes, of which one stores: a class's sums are stored by the warp that has
    # them, where a tensor [BLOCK_K] would be handed to other warps first, behind a barrier.
    COLUMNS: tl.constexpr = 32
    lane = tl.arange(0, COLUMNS)[None, :]
    classes = (first + tl.arange(0, BLOCK_K))[:, None]
    stores = (classes < end) & (lane == 0)
    dot = dot.to(dots.dtype.element_ty)[:, None].broadcast_to(BLOCK_K, COLUMNS)
    sq_norm = sq_norm.to(sq_norms.dtype.element_ty)[:, None].broadcast_to(BLOCK_K, COLUMNS)
    tl.store(dots + (classes + lane), dot, mask=stores)
    tl.store(sq_norms + (classes + lane), sq_norm, mask=stores)


@triton.jit
def slice_statistics(
    gradients,
    inputs,
    position,
    dots,
    sq_norms,
    slice_number,
    first_class,
    end_class,
    num_classes,
    sizes,
    strides,
    class_stride,
    SHAPE: tl.constexpr,
):
    """The statistics that a slice of a row's dimensions gives for a range of its classes.

    ``gradients`` and ``inputs`` point to the row, ``dots`` and ``sq_norms`` to where the sums of
    class 0 go; those of the others follow. ``position`` is that of the target among the classes, or
    -1, which makes dots NaN.

    Reads the gradients of its classes and slice once, a tile ahead of the one worked on, beside the
    inputs and the target's gradients; centring more classes than fit a tile reads them twice.
    """
    NUMBER: tl.constexpr = tl.float64 if gradients.dtype.element_ty == tl.float64 else tl.float32
    # An attribute in a tuple would be no compile-time constant to Triton.
    WIDTH: tl.constexpr = SHAPE.width
    BLOCK_K: tl.constexpr = SHAPE.block_k
    CHUNKS: tl.constexpr = SHAPE.chunks
    BLOCK: tl.constexpr = CHUNKS * WIDTH // SHAPE.vector
    INDEX: tl.constexpr = tl.int64 if SHAPE.wide else tl.int32
    num_vectors = tl.full((), 1, tl.int64)
    for i in tl.static_range(len(sizes)):
        num_vectors *= sizes[i]
    start = slice_number.to(tl.int64) * BLOCK

    # Counted in vectors, so that the compiler sees whole vectors inside or outside of the slice.
    chunk = tl.arange(0, CHUNKS)[None, :]
    lane = tl.arange(0, WIDTH)[:, None]
    local = chunk * (WIDTH // SHAPE.vector) + lane // SHAPE.vector
    in_slice = local < tl.minimum(num_vectors - start, BLOCK).to(tl.int32)
    if len(sizes) == 1:
        gradients += start * strides[0] * SHAPE.vector
        offsets = local.to(INDEX) * strides[0]
    else:
        offsets = _offsets(start.to(INDEX) + local, sizes, strides)
    offsets = offsets * SHAPE.vector + lane % SHAPE.vector
    stride = class_stride.to(tl.int64) * SHAPE.vector

    # Before anything waits: the first tile of classes is on its way from memory while the rest is
    # prepared, and further on the next tile while this one is worked on.
    tile = _load_classes(
        gradients,
        offsets,
        in_slice,
        first_class,
        end_class,
        stride,
        BLOCK_K,
        SHAPE.one_tile or not SHAPE.center,
    )
    known = position >= 0
    of_target = gradients + tl.maximum(position, 0).to(tl.int64) * stride + offsets
    of_inputs = inputs + start * SHAPE.vector + (chunk * WIDTH + lane)
    g_y = tl.load(of_target[:, None, :], mask=in_slice[:, None, :], other=0.0).to(NUMBER)
    x = tl.load(of_inputs[:, None, :], mask=in_slice[:, None, :], other=0.0).to(NUMBER)

    if SHAPE.center:
        # Counted from the target's gradient, what all classes have in common is gone before
        # anything is rounded: g_c - mean_k g_k = (g_c - g_y) - mean_k (g_k - g_y).
        share_of_mean = 1.0 / num_classes.to(NUMBER)
        if SHAPE.one_tile:
            inside = (tl.arange(0, BLOCK_K) < num_classes)[None, :, None]
            apart = tl.where(inside, tile.to(NUMBER) - g_y, 0.0)
            mean = tl.sum(apart, axis=1)[:, None, :] * share_of_mean
            _store_sums(
                (apart - mean) * x, -mean * x, known, dots, sq_norms, 0, num_classes, BLOCK_K
            )
        else:
            total = tl.zeros((WIDTH, BLOCK_K, CHUNKS), NUMBER)
            for first in tl.range(0, num_classes, BLOCK_K):
                after = _load_classes(
                    gradients,
                    offsets,
                    in_slice,
                    first + BLOCK_K,
                    num_classes,
                    stride,
                    BLOCK_K,
                    False,
                )
                inside = (first + tl.arange(0, BLOCK_K) < num_classes)[None, :, None]
                total += tl.where(inside, tile.to(NUMBER) - g_y, 0.0)
                tile = after
            mean = tl.sum(total, axis=1)[:, None, :] * share_of_mean
            e_y = -mean * x
            tile = _load_classes(
                gradients, offsets, in_slice, 0, num_classes, stride, BLOCK_K, True
            )
            for first in tl.range(0, num_classes, BLOCK_K):
                after = _load_classes(
                    gradients,
                    offsets,
                    in_slice,
                    first + BLOCK_K,
                    num_classes,
                    stride,
                    BLOCK_K,
                    True,
                )
                explained = (tile.to(NUMBER) - g_y - mean) * x
                _store_sums(explained, e_y, known, dots, sq_norms, first, num_classes, BLOCK_K)
                tile = after
    else:
        # The product of gradient and input is formed first: it may be moderate where they aren't.
        e_y = g_y * x
        for first in tl.range(first_class, end_class, BLOCK_K):
            after = _load_classes(
                gradients, offsets, in_slice, first + BLOCK_K, end_class, stride, BLOCK_K, True
            )
            explained = tile.to(NUMBER) * x
            _store_sums(explained, e_y, known, dots, sq_norms, first, end_class, BLOCK_K)
            tile = after
