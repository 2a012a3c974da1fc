"""The loss of a linear head, explained at its features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from introkernels import checks
from introkernels.autograd import constant
from introkernels.functional.head import HeadCall, head_loss
from introkernels.ops.select import for_divergence, for_label_mode, operators
from introkernels.options import Options
from introkernels.types import Divergence, LabelMode, LossParts, Reduction, Similarity

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from introkernels.functional.keywords import LinearKeywords


@overload
def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **keywords: Unpack[LinearKeywords],
) -> LossParts: ...


@overload
def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **keywords: Unpack[LinearKeywords],
) -> Tensor: ...


@overload
def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    return_parts: bool,
    **keywords: Unpack[LinearKeywords],
) -> Tensor | LossParts: ...


def linear_introspective_loss(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 4.0,
    similarity_temperature: float = 1.0,
    ce_weight: float = 0.7,
    kl_weight: float = 0.3,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    similarity: Similarity = "cosine",
    label_mode: LabelMode = "softmax",
    non_target_mass: float = 0.1,
    center: bool = False,
    class_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The introspective loss of a linear head, explained at its features in closed form.

    The logits ``z = features @ weight.T + bias`` are computed inside, for some rows at a time, and
    ``[N, C]`` never exists as a whole: outside the C++ kernels a chunk of rows takes 1 GiB, or as
    much as 512 rows of 16 bytes a class. The gradient of ``z_c`` in the features is row ``c`` of
    ``weight``, so ``E_c = weight_c * h``, and its statistics are matrix products:
    ``<E_c, E_y> = (h**2 * weight_y) . weight_c`` and ``<E_c, E_c> = h**2 . weight_c**2``.

    Products are as precise as PyTorch's. Outside the C++ kernels, features and a weight of the same
    half type are multiplied in it, on a GPU by its tensor cores, and accumulated in float32: the
    logits are those of a float32 product. What else is multiplied is rounded to the half type once.
    Squares and products with ``weight_y`` leave the statistics an error of ``2**-8`` of their norm
    in bfloat16 and ``2**-11`` in float16, and the gradient of the logits leaves as much in those of
    features and weight. Powers of two keep all of these in range. Squares in float16 lose digits
    where a feature is below ``2**-11`` of the largest in its row, or a weight of the largest of
    all, and are zero below ``2**-16``. Other dtypes are multiplied in float32 (float64 in float64),
    on a GPU as precisely as ``torch.backends.cuda.matmul`` says: IEEE by default; TF32 leaves the
    statistics an error of ``2**-11`` of their norm.

    Explanations are constants; the gradient of ``z`` flows to features, weight and bias. With
    reduction ``"mean"`` or ``"sum"``, those gradients are made along with the loss, where the
    logits are at hand: evaluate under ``torch.no_grad()`` to save that work.

    Args:
        features: ``[..., D]``, the inputs of the head.
        weight: ``[C, D]``, as in ``nn.Linear``.
        target: ``[...]`` int64 class indices, or ``ignore_index``.
        bias: ``[C]`` or None.
        class_weight: ``[C]`` class weights of the cross entropy.
        row_weight: ``[...]``; the gradients are then made by the backward.

    The other keywords, the result and the errors are those of :func:`introspective_loss`;
    ``reduction="none"`` gives a loss, and parts, of the shape of ``target``.
    """
    checks.flag("return_parts", return_parts)
    checks.linear_head(features, weight, target, bias)
    checks.class_weight(class_weight, weight.shape[0], features, "class_weight")
    checks.row_weight(row_weight, target.shape, features)
    checks.in_memory(
        {
            "features": features,
            "weight": weight,
            "target": target,
            "bias": bias,
            "class_weight": class_weight,
        }
    )
    options = Options(
        *checks.loss_keywords(
            temperature,
            ce_weight,
            kl_weight,
            label_smoothing,
            ignore_index,
            reduction,
            divergence,
            beta,
        ),
        *checks.label_keywords(similarity_temperature, similarity, label_mode, non_target_mass),
        center=checks.flag("center", center),
    )
    call = HeadCall(features, weight, target, bias, constant(class_weight), row_weight, options)
    chosen = for_divergence(operators(features.device), options)
    parts = head_loss(for_label_mode(chosen, options.label_mode), call)
    return parts if return_parts else parts.loss
