"""The linear head without a matrix of all classes: programs walk tiles of classes or of rows.

A tile ``[M, N]`` of M rows and N classes is three products (head_products.py), then what any tile
of a row loss is. The forward's programs own rows and walk the classes; the backward makes the tiles
again, once for programs that own rows and once for programs that own classes, so that nobody adds
to what is another's. Labels are of softmax; split ones would need a walk more.
"""

import triton
import triton.language as tl

from introkernels.ops.triton.kernels.head import (
    load_features,
    load_mean,
    load_row_scale,
    load_weight_scale,
    without_mean,
)
from introkernels.ops.triton.kernels.head_products import add_product, parts_of, products_tile
from introkernels.ops.triton.kernels.losses import (
    ROW_STATE,
    float64_options,
    load_row_state,
    load_targets,
    load_weights,
)
from introkernels.ops.triton.kernels.math import NEVER
from introkernels.ops.triton.kernels.reduction import REDUCTION_MEAN, finish_losses
from introkernels.ops.triton.kernels.rows import add_tile, finish_rows, gradient_tile, no_classes
from introkernels.ops.triton.kernels.teachers import as_numbers, load_tile, similarity_logits


@triton.jit(do_not_specialize=["num_parts", "num_rows", "ignore_index"])
def survey_rows(
    features,
    features_strides,
    weight,
    weight_strides,
    mean,
    largest,
    target,
    target_stride,
    scales,
    norms,
    num_parts,
    num_rows,
    num_classes,
    width,
    ignore_index,
    R: tl.constexpr,
    K: tl.constexpr,
):
    """What a tile needs of its rows: two powers of two, and the squared norm of the target.

    A program reads the features of R rows twice and the weight of their targets once; it writes to
    ``scales [B, 2]`` and ``norms [B]``, float32.
    """
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    y, live, known = load_targets(target, target_stride, rows, num_rows, num_classes, ignore_index)
    row_first, row_second = load_row_scale(
        features, features_strides, rows, live, width, R, K, tl.float32
    )
    first, second = load_weight_scale(largest, num_parts, tl.float32)
    total = tl.zeros((R, K), tl.float32)
    for begin in range(0, width, K):
        columns = begin + tl.arange(0, K)
        h = load_features(features, features_strides, rows, live, columns, width, tl.float32)
        mask = known[:, None] & (columns < width)[None, :]
        w = load_tile(weight, weight_strides, y, columns, mask, 0.0, tl.float32)
        if mean is not None:
            w = without_mean(w, load_mean(mean, columns, width))
        h = h * row_first[:, None] * row_second[:, None]
        w = w * first * second
        total += (h * h) * (w * w)
    mask = rows < num_rows
    tl.store(scales + rows * 2, row_first, mask=mask)
    tl.store(scales + rows * 2 + 1, row_second, mask=mask)
    tl.store(norms + rows, tl.sum(total, 1), mask=mask)


@triton.jit
def load_survey(scales, norms, rows, num_rows):
    """What :func:`survey_rows` found of ``rows [M]``: a pair of scales, and norms in float64."""
    mask = rows < num_rows
    scale = (
        tl.load(scales + rows * 2, mask=mask, other=1),
        tl.load(scales + rows * 2 + 1, mask=mask, other=1),
    )
    return scale, tl.load(norms + rows, mask=mask, other=0).to(tl.float64)


@triton.jit
def head_tile(
    head,
    class_weight,
    class_weight_stride,
    rows,
    live,
    y,
    known,
    survey,
    weight_scale,
    classes,
    num_classes,
    width,
    similarity_temperature,
    PROJECTION: tl.constexpr,
    FEATURE_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Logits, teacher logits, where the target is, ``[M, N]``, and class weights ``[1, N]``."""
    features, features_strides, weight, weight_strides, bias, bias_stride, mean = head
    row_scale, sq_norm_target = survey
    z, dots, sq_norms = products_tile(
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
        FEATURE_PARTS,
        WEIGHT_PARTS,
        M,
        N,
        K,
    )
    inside = classes < num_classes
    if bias is not None:
        z += tl.load(bias + classes * bias_stride, mask=inside, other=0).to(tl.float32)[None, :]
    z = tl.where(known[:, None] & inside[None, :], z, NEVER)
    is_target = classes[None, :] == y[:, None]
    t = similarity_logits(
        dots.to(tl.float64),
        sq_norms.to(tl.float64),
        sq_norm_target[:, None],
        similarity_temperature,
        PROJECTION,
        True,
    )
    t = tl.where(is_target, 0, t).to(tl.float32)
    w = load_weights(class_weight, class_weight_stride, classes, inside, tl.float32)[None, :]
    return z, t, is_target, w


@triton.jit(do_not_specialize=["num_parts", "num_rows", "num_programs", "ignore_index"])
def stream_forward(
    features,
    features_strides,
    weight,
    weight_strides,
    bias,
    bias_stride,
    mean,
    largest,
    target,
    target_stride,
    scales,
    norms,
    class_weight,
    class_weight_stride,
    loss,
    ce,
    kl,
    row_state,
    totals,
    terms,
    counter,
    num_parts,
    num_rows,
    num_programs,
    num_classes,
    width,
    ignore_index,
    temperature: "fp64",
    ce_weight: "fp64",
    kl_weight: "fp64",
    label_smoothing: "fp64",
    similarity_temperature: "fp64",
    REDUCTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FEATURE_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    REDUCE: tl.constexpr,
):
    """Loss, ce and kl of a head: a program owns M rows and walks all classes, N at a time.

    It reads the weight once, and its features once for each tile of classes; it writes 104 bytes a
    row.
    """
    temperature, ce_weight, kl_weight, label_smoothing, labels = float64_options(
        temperature, ce_weight, kl_weight, label_smoothing, similarity_temperature, 0.0
    )
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    y, live, known = load_targets(target, target_stride, rows, num_rows, num_classes, ignore_index)
    survey = load_survey(scales, norms, rows, num_rows)
    weight_scale = load_weight_scale(largest, num_parts, tl.float32)
    head = (
        features,
        as_numbers(features_strides),
        weight,
        as_numbers(weight_strides),
        bias,
        bias_stride,
        mean,
    )
    inverse_temperature = 1 / temperature
    state = no_classes(M, tl.float32)
    z_target = tl.zeros((M,), tl.float32)
    for begin in range(0, num_classes, N):
        classes = begin + tl.arange(0, N).to(tl.int64)
        z, t, is_target, w = head_tile(
            head,
            class_weight,
            class_weight_stride,
            rows,
            live,
            y,
            known,
            survey,
            weight_scale,
            classes,
            num_classes,
            width,
            labels[0],
            PROJECTION,
            FEATURE_PARTS,
            WEIGHT_PARTS,
            M,
            N,
            K,
        )
        state = add_tile(state, z, t, is_target, w, inverse_temperature, WEIGHTED, True)
        # One class of a row at most is its target.
        z_target += tl.sum(tl.where(is_target, z, 0), 1)
    w_target = load_weights(class_weight, class_weight_stride, y, known, tl.float32)
    ce_of_rows, kl_of_rows, numbers = finish_rows(
        state, z_target, w_target, label_smoothing, WEIGHTED, False
    )
    unknown = live & ~known
    ce_of_rows = tl.where(unknown, float("nan"), tl.where(live, ce_of_rows, 0))
    kl_of_rows = tl.where(unknown, float("nan"), tl.where(live, kl_of_rows, 0))
    for i in tl.static_range(ROW_STATE):
        number = tl.where(live, numbers[i], 0).to(tl.float64)
        tl.store(row_state + rows * ROW_STATE + i, number, mask=rows < num_rows)
    finish_losses(
        ce_of_rows,
        kl_of_rows,
        w_target,
        live,
        rows,
        num_rows,
        (loss, ce, kl),
        terms,
        totals,
        counter,
        num_programs,
        temperature,
        ce_weight,
        kl_weight,
        REDUCTION,
        REDUCE,
    )


@triton.jit
def load_scales_of_terms(
    grad_loss,
    grad_loss_stride,
    totals,
    class_weight,
    class_weight_stride,
    numbers,
    rows,
    y,
    known,
    temperature,
    ce_weight,
    kl_weight,
    label_smoothing,
    REDUCTION: tl.constexpr,
):
    """What the terms' gradients are multiplied by in each row: cross entropy, target, KL."""
    scale = tl.load(grad_loss + rows * grad_loss_stride, mask=known, other=0).to(tl.float64)
    ce_scale, kl_scale = scale * ce_weight, scale * kl_weight * temperature
    if REDUCTION == REDUCTION_MEAN:
        ce_scale /= tl.load(totals)
        kl_scale /= tl.load(totals + 1)
    # A term of weight 0 is left out, whatever the incoming gradient is; a row without soft labels
    # has no divergence.
    ce_scale = tl.where(ce_weight > 0, ce_scale, 0)
    kl_scale = tl.where(kl_weight > 0, kl_scale, 0)
    kl_scale = tl.where(numbers[4] == 0, 0, kl_scale)
    w_target = load_weights(class_weight, class_weight_stride, y, known, tl.float64)
    target_scale = ce_scale * (1 - label_smoothing) * w_target
    return ce_scale.to(tl.float32), target_scale.to(tl.float32), kl_scale.to(tl.float32)


@triton.jit(do_not_specialize=["num_parts", "num_rows", "ignore_index"])
def stream_backward(
    features,
    features_strides,
    weight,
    weight_strides,
    bias,
    bias_stride,
    mean,
    largest,
    target,
    target_stride,
    scales,
    norms,
    class_weight,
    class_weight_stride,
    row_state,
    totals,
    grad_loss,
    grad_loss_stride,
    grad_features,
    grad_weight,
    grad_bias,
    num_parts,
    num_rows,
    num_classes,
    width,
    ignore_index,
    temperature: "fp64",
    ce_weight: "fp64",
    kl_weight: "fp64",
    label_smoothing: "fp64",
    similarity_temperature: "fp64",
    REDUCTION: tl.constexpr,
    PROJECTION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FEATURE_PARTS: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Gradients of what a program owns, from tiles that it makes again.

    With ``grad_features``, a program owns M rows and walks the classes; else it owns N classes,
    walks the rows and adds to ``grad_weight`` and ``grad_bias``, each of which may be None. What
    is added to stays in memory, ``[B, D]`` or ``[C, D]`` float32: a program adds to its own lines
    once for each tile, in the order of its walk.
    """
    temperature, ce_weight, kl_weight, label_smoothing, labels = float64_options(
        temperature, ce_weight, kl_weight, label_smoothing, similarity_temperature, 0.0
    )
    weight_scale = load_weight_scale(largest, num_parts, tl.float32)
    head = (
        features,
        as_numbers(features_strides),
        weight,
        as_numbers(weight_strides),
        bias,
        bias_stride,
        mean,
    )
    owned = tl.program_id(0).to(tl.int64)
    of_bias = tl.zeros((N,), tl.float64)
    if grad_features is None:
        length, STEP = num_rows, M
    else:
        length, STEP = num_classes, N
    for begin in range(0, length, STEP):
        if grad_features is None:
            rows = begin + tl.arange(0, M).to(tl.int64)
            classes = owned * N + tl.arange(0, N)
        else:
            rows = owned * M + tl.arange(0, M)
            classes = begin + tl.arange(0, N).to(tl.int64)
        y, live, known = load_targets(
            target, target_stride, rows, num_rows, num_classes, ignore_index
        )
        z, t, is_target, w = head_tile(
            head,
            class_weight,
            class_weight_stride,
            rows,
            live,
            y,
            known,
            load_survey(scales, norms, rows, num_rows),
            weight_scale,
            classes,
            num_classes,
            width,
            labels[0],
            PROJECTION,
            FEATURE_PARTS,
            WEIGHT_PARTS,
            M,
            N,
            K,
        )
        # Not before the products, whose registers they would take.
        numbers = load_row_state(row_state, rows, known, tl.float32)
        ce_scale, target_scale, kl_scale = load_scales_of_terms(
            grad_loss,
            grad_loss_stride,
            totals,
            class_weight,
            class_weight_stride,
            numbers,
            rows,
            y,
            known,
            temperature,
            ce_weight,
            kl_weight,
            label_smoothing,
            REDUCTION,
        )
        grad = gradient_tile(
            numbers,
            z,
            t,
            is_target,
            w,
            ce_scale,
            target_scale,
            kl_scale,
            1 / temperature,
            WEIGHTED,
            True,
        )
        unknown = (live & ~known)[:, None] & (classes < num_classes)[None, :]
        grad = tl.where(unknown, float("nan"), grad)
        if grad_features is not None:
            add_rows_gradient(
                grad,
                weight,
                weight_strides,
                grad_features,
                rows,
                classes,
                num_rows,
                num_classes,
                width,
                begin > 0,
                WEIGHT_PARTS,
                M,
                K,
            )
        if grad_weight is not None:
            add_classes_gradient(
                grad,
                features,
                features_strides,
                grad_weight,
                rows,
                live,
                classes,
                num_classes,
                width,
                begin > 0,
                FEATURE_PARTS,
                N,
                K,
            )
        of_bias += tl.sum(grad.to(tl.float64), 0)
    if grad_bias is not None:
        classes = owned * N + tl.arange(0, N)
        tl.store(grad_bias + classes, of_bias.to(tl.float32), mask=classes < num_classes)


@triton.jit
def add_rows_gradient(
    grad,
    weight,
    weight_strides,
    grad_features,
    rows,
    classes,
    num_rows,
    num_classes,
    width,
    is_later,
    WEIGHT_PARTS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """``grad_features [M, D] = or += G W`` for a tile ``G [M, N]``."""
    parts = parts_of(grad, 3)
    for begin in range(0, width, K):
        columns = begin + tl.arange(0, K)
        inside = (columns < width)[None, :]
        mask = (classes < num_classes)[:, None] & inside
        w = load_tile(weight, weight_strides, classes, columns, mask, 0.0, tl.float32)
        place = grad_features + (rows * width)[:, None] + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside
        # What this very program stored for the tile before.
        total = tl.load(place, mask=mask & is_later, other=0)
        tl.store(place, add_product(total, parts, parts_of(w, WEIGHT_PARTS)), mask=mask)
    tl.debug_barrier()


@triton.jit
def add_classes_gradient(
    grad,
    features,
    features_strides,
    grad_weight,
    rows,
    live,
    classes,
    num_classes,
    width,
    is_later,
    FEATURE_PARTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """``grad_weight [N, D] = or += G^T h`` for a tile ``G [M, N]``."""
    parts = parts_of(tl.trans(grad), 3)
    for begin in range(0, width, K):
        columns = begin + tl.arange(0, K)
        h = load_features(features, features_strides, rows, live, columns, width, tl.float32)
        place = grad_weight + (classes * width)[:, None] + columns[None, :]
        mask = (classes < num_classes)[:, None] & (columns < width)[None, :]
        # What this very program stored for the tile before.
        total = tl.load(place, mask=mask & is_later, other=0)
        tl.store(place, add_product(total, parts, parts_of(h, FEATURE_PARTS)), mask=mask)
    tl.debug_barrier()
