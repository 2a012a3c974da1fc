"""The statistics of explanations given as gradients."""

from __future__ import annotations

from torch import Tensor

from introkernels import checks
from introkernels.ops.select import for_target, operators
from introkernels.types import ExplanationStats


def explanation_stats(
    gradients: Tensor,
    inputs: Tensor,
    target: Tensor,
    *,
    center: bool = False,
    class_index: Tensor | None = None,
    ignore_index: int = -100,
) -> ExplanationStats:
    """Statistics of the explanations ``E_c = g_c * x``: all that the losses need of them.

    ``E_c`` is gradient times input (Captum's ``InputXGradient``), flattened to ``D`` numbers; none
    of it is stored.

    Args:
        gradients: ``[B, C, *S]``; with ``class_index``, ``[B, K, *S]``.
        inputs: ``[B, *S]``.
        target: ``[B]`` int64 class indices, or ``ignore_index``; or class probabilities ``y``
            ``[B, C]``: ``dots`` are then inner products with ``sum_k y_k E_k``, of the explained
            classes.
        center: take the mean explanation of the classes given away from each.
        class_index: ``[B, K]`` int64, the classes explained, each once and the target among them.
        ignore_index: a target of this value leaves zeros in its row.

    Returns:
        ``dots`` and ``sq_norms`` ``[B, C or K]``, float64 for float64 arguments, else float32;
        they carry no graph.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        IndexError: a target outside ``[0, C)``, or a ``class_index`` below 0.
    """
    checks.floating_tensor("gradients", gradients)
    if gradients.dim() < 2:
        raise ValueError(f"gradients must have shape [B, C, *S], got {checks.describe(gradients)}")
    if isinstance(target, Tensor) and target.is_floating_point():
        checks.probabilities_of_explained(target, "gradients", gradients, class_index)
    else:
        checks.target_of_rows(target, "gradients", gradients)
    checks.class_index(class_index, gradients.shape[0], gradients)
    checks.gradients_and_inputs(gradients, inputs, class_index, None)
    checks.in_memory(
        {"gradients": gradients, "inputs": inputs, "target": target, "class_index": class_index}
    )
    dots, sq_norms = for_target(operators(gradients.device), target).explanation_stats(
        gradients.detach(),
        inputs.detach(),
        target.detach(),
        class_index,
        checks.flag("center", center),
        checks.integer("ignore_index", ignore_index),
    )
    return ExplanationStats(dots, sq_norms, class_index)
