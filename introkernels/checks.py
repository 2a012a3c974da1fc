"""Checks of arguments: every bad call ends here, before any kernel runs.

Each message names the argument, what it got and what is allowed. All checks but
:func:`target_in_range` and :func:`class_index_values` look at shapes, dtypes, storages and Python
numbers only, so they never read a tensor's values and never wait for a device.
"""

from __future__ import annotations

import numbers
import os
import reprlib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from introkernels.types import (
    DIVERGENCES,
    LABEL_MODES,
    REDUCTIONS,
    SIMILARITIES,
    TAILS,
    ExplanationStats,
    LinearTeacher,
    TopKTeacher,
)

_LARGEST = sys.float_info.max
_PLAIN = (Tensor, Parameter)
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """A short description of an argument for a message, e.g. ``float32[4, 10] on cpu``."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        # A nested tensor has no shape to ask for.
        shape = "[nested]" if value.is_nested else list(value.shape)
        return f"{dtype}{shape} on {value.device}"
    # A list may hold anything; what it is need not be shown whole.
    shown = reprlib.repr(value) if isinstance(value, (str, list, tuple, dict)) else repr(value)
    return f"{shown} ({type(value).__name__})"


def floating_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a strided tensor of a supported floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    if value.dtype not in _FLOATING:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, got {describe(value)}"
        )
    if value.layout != torch.strided or value.is_nested or type(value) not in _PLAIN:
        _known_kind(name, value)


def int64_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a strided int64 tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {describe(value)}")
    if value.layout != torch.strided or value.is_nested or type(value) not in _PLAIN:
        _known_kind(name, value)


def _known_kind(name: str, value: Tensor) -> None:
    """Raise TypeError for a tensor whose numbers do not lie in one piece of memory, by strides."""
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense (strided) tensor, got a nested one: "
            "join its parts into rows with .values()"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense (strided) tensor, got layout {value.layout}: "
            "convert it with .to_dense()"
        )
    # The class DTensor takes long to import.
    if hasattr(value, "full_tensor"):
        raise TypeError(
            f"{name} must be a tensor of this process, got a {type(value).__name__}: take the "
            "whole with .full_tensor(), or this process's part with .to_local()"
        )


def in_memory(tensors: dict[str, Tensor | None]) -> None:
    """Raise ValueError for a tensor whose memory was given back: to read it ends the process."""
    if is_dynamo_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is None or type(tensor) not in _PLAIN:
            continue
        try:
            held = tensor.untyped_storage().nbytes()
        except NotImplementedError:  # under a torch.func transform
            continue
        if not held and tensor.numel():
            raise ValueError(
                f"{name} must have memory, got {describe(tensor)} whose storage was resized to 0"
            )


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape alone, and no values that could be read."""
    return isinstance(tensor, FakeTensor)


def same_device(first_name: str, first: Tensor, name: str, other: Tensor) -> None:
    """Raise ValueError unless ``other`` lies on the device of ``first``."""
    if other.device != first.device:
        raise ValueError(
            f"{name} must be on the device of {first_name} ({first.device}), got {describe(other)}"
        )


def mixable_dtypes(first_name: str, first: Tensor, name: str, other: Tensor) -> None:
    """Raise TypeError where float64 meets another dtype; float32 and the half types mix."""
    if other.dtype != first.dtype and torch.float64 in (other.dtype, first.dtype):
        raise TypeError(
            f"{name} and {first_name} can't mix float64 with another dtype: got "
            f"{name} {describe(other)} and {first_name} {describe(first)}; "
            "float32, bfloat16 and float16 mix freely"
        )


def _finite(name: str, value: object, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number {allowed}, got {describe(value)}")
    # Comparisons rather than math.isfinite: they can be traced by torch.compile, and take an int
    # that is too large for a float.
    if not -_LARGEST <= value <= _LARGEST:  # type: ignore[operator]  # Real has no order in typing
        raise ValueError(f"{name} must be a finite number {allowed}, got {value!r}")
    return float(value)


def positive(name: str, value: object) -> float:
    """``value`` as a float; raises unless it is a finite number > 0."""
    number = _finite(name, value, "> 0")
    if not number > 0:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return number


def non_negative(name: str, value: object) -> float:
    """``value`` as a float; raises unless it is a finite number >= 0."""
    number = _finite(name, value, ">= 0")
    if not number >= 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return number


def within(name: str, value: object, least: float, most: float) -> float:
    """``value`` as a float; raises unless it lies between two numbers, or is one of them."""
    number = _finite(name, value, f"in [{least}, {most}]")
    if not least <= number <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], got {value!r}")
    return number


def temperature(name: str, value: object) -> float:
    """``value`` as a float; raises unless the losses are accurate at this temperature."""
    return within(name, value, 0.05, 100)


def integer(name: str, value: object) -> int:
    """``value`` as an int; raises TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if not -(2**63) <= value < 2**63:  # type: ignore[operator]
        raise ValueError(f"{name} must be an int of 64 bits, got {value!r}")
    return int(value)


def positive_integer(name: str, value: object) -> int:
    """``value`` as an int of at least 1; raises TypeError or ValueError for anything else."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def flag(name: str, value: object) -> bool:
    """``value`` as a bool; raises TypeError for anything else."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def choice(name: str, value: object, allowed: Sequence[str]) -> int:
    """The position of ``value`` in ``allowed``; raises ValueError if it is not there."""
    if isinstance(value, str) and value in allowed:
        return allowed.index(value)
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def loss_keywords(
    temperature_value: object,
    ce_weight: object,
    kl_weight: object,
    label_smoothing: object,
    ignore_index: object,
    reduction_name: object,
    divergence: object,
    beta: object,
) -> tuple[float, float, float, float, int, int, int, float]:
    """The numbers that every loss takes, checked, as introkernels/options.py orders them."""
    number = _finite("beta", beta, "in (0, 1)")
    if not 0 < number < 1:
        raise ValueError(f"beta must be in (0, 1), got {beta!r}")
    return (
        temperature("temperature", temperature_value),
        non_negative("ce_weight", ce_weight),
        non_negative("kl_weight", kl_weight),
        within("label_smoothing", label_smoothing, 0, 1),
        integer("ignore_index", ignore_index),
        choice("reduction", reduction_name, REDUCTIONS),
        choice("divergence", divergence, DIVERGENCES),
        number,
    )


def label_keywords(
    similarity_temperature: object,
    similarity: object,
    label_mode: object,
    non_target_mass: object,
) -> tuple[float, int, int, float]:
    """The numbers that make teacher logits of statistics, checked, in the same order."""
    return (
        within("similarity_temperature", similarity_temperature, 0.01, 100),
        choice("similarity", similarity, SIMILARITIES),
        choice("label_mode", label_mode, LABEL_MODES),
        within("non_target_mass", non_target_mass, 0, 1),
    )


def logits_and_target(logits: object, target: object, ce_weight: object = 1.0) -> None:
    """Check ``logits [B, C, d1, ...]`` with ``C >= 1`` and their target, on one device.

    ``target`` is int64 ``[B, d1, ...]``, floating with the shape of ``logits``, or None where
    ``ce_weight`` is 0.
    """
    floating_tensor("logits", logits)
    assert isinstance(logits, Tensor)
    if logits.dim() < 2:
        raise ValueError(f"logits must have shape [B, C, d1, ...], got {describe(logits)}")
    if logits.shape[1] == 0:
        raise ValueError(f"logits must have at least one class, got {describe(logits)}")
    if target is None and ce_weight == 0:
        return
    if isinstance(target, Tensor) and target.is_floating_point():
        class_probabilities(target, logits)
        return
    int64_tensor("target", target)
    assert isinstance(target, Tensor)
    rows = [logits.shape[0], *logits.shape[2:]]
    if list(target.shape) != rows:
        raise ValueError(
            f"target must have shape {rows}, one class index for each row of logits "
            f"{list(logits.shape)}, got {describe(target)}"
        )
    same_device("logits", logits, "target", target)


def matrix(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a tensor ``[B, C]``."""
    floating_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 2:
        raise ValueError(
            f"{name} must have shape [B, C], got {describe(value)}; move the class dimension "
            "last and flatten the others into rows"
        )


def class_probabilities(target: Tensor, logits: Tensor) -> None:
    """Check that probabilities of the classes match ``logits`` in shape and device."""
    floating_tensor("target", target)
    if target.shape != logits.shape:
        raise ValueError(
            f"target must have the shape of logits {list(logits.shape)} where it holds class "
            f"probabilities, got {describe(target)}"
        )
    same_device("logits", logits, "target", target)


def probabilities_of_explained(
    target: Tensor, owner_name: str, owner: Tensor, class_index: Tensor | None
) -> None:
    """Check class probabilities ``[B, C]`` of explanations ``[B, K, ...]``."""
    floating_tensor("target", target)
    rows, explained = owner.shape[:2]
    classes = target.shape[1] if target.dim() == 2 and class_index is not None else explained
    if list(target.shape) != [rows, classes]:
        raise ValueError(
            f"target must have shape [{rows}, {explained}] where it holds class probabilities of "
            f"{owner_name} {list(owner.shape)}, got {describe(target)}"
        )
    same_device(owner_name, owner, "target", target)


def row_weight(weight: object, shape: Sequence[int], owner: Tensor) -> None:
    """Check that the weights of rows are None or floating, of the shape of the rows."""
    if weight is None:
        return
    floating_tensor("row_weight", weight)
    assert isinstance(weight, Tensor)
    if list(weight.shape) != list(shape):
        raise ValueError(
            f"row_weight must have shape {list(shape)}, one weight for each row, "
            f"got {describe(weight)}"
        )
    in_memory({"row_weight": weight})
    if weight.device != owner.device:
        raise ValueError(f"row_weight must be on {owner.device}, got {describe(weight)}")


def target_of_rows(target: object, owner_name: str, owner: Tensor) -> None:
    """Check that ``target`` is int64 ``[B]`` with the rows and the device of ``owner``."""
    int64_tensor("target", target)
    assert isinstance(target, Tensor)
    if target.dim() != 1 or target.shape[0] != owner.shape[0]:
        raise ValueError(
            f"target must have shape [{owner.shape[0]}], one class index for each row of "
            f"{owner_name}, got {describe(target)}"
        )
    same_device(owner_name, owner, "target", target)


def probabilities_of_rows(target: Tensor, owner_name: str, owner: Tensor) -> None:
    """Check that class probabilities are ``[B, C]`` with the rows and the device of ``owner``."""
    floating_tensor("target", target)
    rows = owner.shape[0]
    if target.dim() != 2 or target.shape[0] != rows:
        raise ValueError(
            f"target must have shape [{rows}, C] where it holds class probabilities of the rows of "
            f"{owner_name}, got {describe(target)}; class indices are int64 [{rows}]"
        )
    same_device(owner_name, owner, "target", target)


def rows_of(owner_name: str, owner: Tensor, name: str, other: Tensor) -> None:
    """Raise ValueError unless ``other`` has as many rows as ``owner``."""
    if other.shape[0] != owner.shape[0]:
        raise ValueError(
            f"{name} must have {owner.shape[0]} rows, as many as {owner_name} "
            f"{list(owner.shape)}, got {describe(other)}"
        )


def linear_head(
    features: object, weight: object, target: object, bias: object, ce_weight: object = 1.0
) -> None:
    """Check ``features [..., D]``, ``weight [C, D]``, ``target [...]`` and ``bias [C]`` or None.

    ``target`` may be None where ``ce_weight`` is 0.
    """
    floating_tensor("features", features)
    floating_tensor("weight", weight)
    assert isinstance(features, Tensor)
    assert isinstance(weight, Tensor)
    if features.dim() == 0:
        raise ValueError(f"features must have shape [..., D], got {describe(features)}")
    width = features.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(
            f"weight must have shape [C, {width}] with C >= 1, as many columns as features "
            f"{list(features.shape)}, got {describe(weight)}"
        )
    if target is not None or ce_weight != 0:
        int64_tensor("target", target)
        assert isinstance(target, Tensor)
        if target.shape != features.shape[:-1]:
            raise ValueError(
                f"target must have shape {list(features.shape[:-1])}, that of features without the "
                f"last dimension, got {describe(target)}"
            )
        same_device("features", features, "target", target)
    same_device("features", features, "weight", weight)
    mixable_dtypes("features", features, "weight", weight)
    if bias is None:
        return
    floating_tensor("bias", bias)
    assert isinstance(bias, Tensor)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {describe(bias)}")
    same_device("features", features, "bias", bias)
    mixable_dtypes("features", features, "bias", bias)


def class_weight(weight: object, num_classes: int, owner: Tensor, name: str = "weight") -> None:
    """Check that the class weights are None or floating ``[C]`` on the device of ``owner``."""
    if weight is None:
        return
    floating_tensor(name, weight)
    assert isinstance(weight, Tensor)
    if weight.dim() != 1 or weight.shape[0] != num_classes:
        raise ValueError(
            f"{name} must have shape [{num_classes}], one weight for each class, "
            f"got {describe(weight)}"
        )
    if weight.device != owner.device:
        raise ValueError(f"{name} must be on {owner.device}, got {describe(weight)}")


def teacher(
    value: object, owner_name: str, owner: Tensor, shape: Sequence[int], target: object
) -> None:
    """Check a teacher of rows ``shape[:-1]`` and classes ``shape[-1]`` against its student.

    Teacher logits have their classes where the student's ``logits`` have them, in dimension 1; a
    head's ``features`` have none, and theirs are last. The device and the kind of dtype are those
    of ``owner``.
    """
    *rows, classes = shape
    if isinstance(value, ExplanationStats):
        if target is None:
            raise ValueError("target must say which class was explained, got None with statistics")
        if len(rows) != 1:
            raise ValueError(
                f"{owner_name} must be a matrix where teacher holds explanation statistics, "
                f"got {describe(owner)}"
            )
        stats(value, owner_name, owner, classes)
    elif isinstance(value, LinearTeacher):
        of_rows = {"teacher.features": value.features, "teacher.weight": value.weight}
        if value.bias is not None:
            of_rows["teacher.bias"] = value.bias
        _tensors_of_teacher(of_rows, owner_name, owner)
        _linear_teacher(value, rows, classes)
    elif isinstance(value, TopKTeacher):
        int64_tensor("teacher.indices", value.indices)
        in_memory({"teacher.indices": value.indices})
        same_device(owner_name, owner, "teacher.indices", value.indices)
        _tensors_of_teacher({"teacher.log_probs": value.log_probs}, owner_name, owner)
        _top_k_teacher(value, rows, classes)
    elif isinstance(value, Tensor):
        _tensors_of_teacher({"teacher": value}, owner_name, owner)
        dim, expected = (1, list(owner.shape)) if owner_name == "logits" else (-1, list(shape))
        if list(value.shape) != expected:
            _refuse_classes("teacher", value, classes, dim)
            raise ValueError(f"teacher must have shape {expected}, got {describe(value)}")
    else:
        raise TypeError(
            "teacher must be a torch.Tensor of logits, or an introkernels LinearTeacher, "
            f"TopKTeacher or ExplanationStats, got {describe(value)}"
        )


def _tensors_of_teacher(tensors: dict[str, Tensor], owner_name: str, owner: Tensor) -> None:
    for name, tensor in tensors.items():
        floating_tensor(name, tensor)
        mixable_dtypes(owner_name, owner, name, tensor)
        same_device(owner_name, owner, name, tensor)
    in_memory(dict(tensors))


def _refuse_classes(name: str, tensor: Tensor, classes: int, dim: int) -> None:
    """Raise ValueError where student and teacher score different numbers of classes."""
    if tensor.dim() > 1 and tensor.shape[dim] != classes:
        raise ValueError(
            f"{name} must score the student's {classes} classes, got {tensor.shape[dim]} of them "
            f"in {describe(tensor)}: two vocabularies have to be mapped onto each other first"
        )


def _linear_teacher(value: LinearTeacher, rows: list[int], classes: int) -> None:
    if list(value.features.shape[:-1]) != rows:
        raise ValueError(
            f"teacher.features must have shape {[*rows, 'D']}, one row for each of the student's, "
            f"got {describe(value.features)}"
        )
    width = value.features.shape[-1]
    if value.weight.dim() != 2 or value.weight.shape[1] != width:
        raise ValueError(
            f"teacher.weight must have shape [{classes}, {width}], as many columns as "
            f"teacher.features, got {describe(value.weight)}"
        )
    _refuse_classes("teacher.weight", value.weight, classes, 0)
    if value.bias is not None and list(value.bias.shape) != [classes]:
        raise ValueError(f"teacher.bias must have shape [{classes}], got {describe(value.bias)}")


def _top_k_teacher(value: TopKTeacher, rows: list[int], classes: int) -> None:
    choice("teacher.tail", value.tail, TAILS)
    shape = list(value.indices.shape)
    if shape[:-1] != rows or len(shape) != len(rows) + 1 or not 1 <= shape[-1] <= classes:
        raise ValueError(
            f"teacher.indices must have shape {[*rows, 'K']} with 1 <= K <= {classes}, "
            f"got {describe(value.indices)}"
        )
    if list(value.log_probs.shape) != shape:
        raise ValueError(
            f"teacher.log_probs must have the shape of teacher.indices {shape}, "
            f"got {describe(value.log_probs)}"
        )


def classes_of_teacher(indices: Tensor, num_classes: int) -> None:
    """Raise IndexError for a class outside ``[0, num_classes)``, ValueError for one that repeats.

    Where values can't be looked at, their row is NaN.
    """
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or not values_are_readable(indices) or indices.numel() == 0:
        return
    least, largest = indices.aminmax()
    if bool(least < 0) or bool(largest >= num_classes):
        bad = int(least) if bool(least < 0) else int(largest)
        raise IndexError(f"teacher.indices holds {bad}, outside [0, {num_classes})")
    ordered = indices.sort(-1).values
    if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise ValueError("teacher.indices must name each class of a row once")


def class_index(index: object, rows: int, owner: Tensor, name: str = "class_index") -> None:
    """Check that class indices are None or int64 ``[B, K]`` with ``K >= 1``."""
    if index is None:
        return
    int64_tensor(name, index)
    assert isinstance(index, Tensor)
    if index.dim() != 2 or index.shape[0] != rows or index.shape[1] == 0:
        raise ValueError(f"{name} must have shape [{rows}, K] with K >= 1, got {describe(index)}")
    if index.device != owner.device:
        raise ValueError(f"{name} must be on {owner.device}, got {describe(index)}")


def gradients_and_inputs(
    gradients: object, inputs: object, class_index: Tensor | None, num_classes: int | None
) -> None:
    """Check ``gradients [B, K, *S]`` against ``inputs [B, *S]`` and the explained classes."""
    floating_tensor("gradients", gradients)
    floating_tensor("inputs", inputs)
    assert isinstance(gradients, Tensor)
    assert isinstance(inputs, Tensor)
    if gradients.dim() < 2 or inputs.dim() < 1:
        raise ValueError(
            "gradients must have shape [B, C, *S] and inputs [B, *S], got gradients "
            f"{describe(gradients)} and inputs {describe(inputs)}"
        )
    rows, classes = gradients.shape[0], gradients.shape[1]
    if (rows, *gradients.shape[2:]) != tuple(inputs.shape):
        raise ValueError(
            f"inputs must have shape {[rows, *gradients.shape[2:]]}, that of gradients "
            f"{list(gradients.shape)} without its class dimension, got {describe(inputs)}"
        )
    if classes == 0:
        raise ValueError(f"gradients must hold at least one class, got {describe(gradients)}")
    if class_index is not None and class_index.shape[1] != classes:
        raise ValueError(
            f"class_index must have shape [{rows}, {classes}], one class for each of the "
            f"gradients {list(gradients.shape)}, got {describe(class_index)}"
        )
    if class_index is None and num_classes is not None and classes != num_classes:
        raise ValueError(
            f"gradients must hold all {num_classes} classes of logits in dimension 1, got "
            f"{describe(gradients)}; name the classes with class_index where they are fewer"
        )
    same_device("gradients", gradients, "inputs", inputs)
    mixable_dtypes("gradients", gradients, "inputs", inputs)


def stats(value: object, owner_name: str, owner: Tensor, num_classes: int | None) -> None:
    """Check an :class:`ExplanationStats` against the rows and classes it will meet."""
    if not isinstance(value, ExplanationStats):
        raise TypeError(
            f"stats must be an introkernels.ExplanationStats, got {type(value).__name__}"
        )
    floating_tensor("stats.dots", value.dots)
    floating_tensor("stats.sq_norms", value.sq_norms)
    rows = owner.shape[0]
    if value.dots.dim() != 2 or value.dots.shape[0] != rows or value.dots.shape[1] == 0:
        raise ValueError(
            f"stats.dots must have shape [{rows}, K] with K >= 1, got {describe(value.dots)}"
        )
    if value.sq_norms.shape != value.dots.shape:
        raise ValueError(
            f"stats.sq_norms must have the shape of stats.dots {list(value.dots.shape)}, "
            f"got {describe(value.sq_norms)}"
        )
    if value.sq_norms.dtype != value.dots.dtype:
        raise TypeError(
            f"stats.dots and stats.sq_norms must have one dtype, got {describe(value.dots)} "
            f"and {describe(value.sq_norms)}"
        )
    class_index(value.class_index, rows, owner, "stats.class_index")
    classes = value.dots.shape[1]
    if value.class_index is not None and value.class_index.shape[1] != classes:
        raise ValueError(
            f"stats.class_index must have the shape of stats.dots {list(value.dots.shape)}, "
            f"got {describe(value.class_index)}"
        )
    if value.class_index is None and num_classes is not None and classes != num_classes:
        raise ValueError(
            f"stats.dots must hold all {num_classes} classes, got {describe(value.dots)}; "
            "name the classes with stats.class_index where they are fewer"
        )
    same_device(owner_name, owner, "stats.dots", value.dots)
    same_device(owner_name, owner, "stats.sq_norms", value.sq_norms)


def label_mode_of(target: Tensor, label_mode: object) -> None:
    """Raise ValueError where soft labels keep a mass for the target, and target is a mixture."""
    if target.is_floating_point() and label_mode != "softmax":
        raise ValueError(
            "label_mode must be 'softmax' where target holds class probabilities, "
            f"got {label_mode!r}"
        )


def stats_and_target(value: object, target: object) -> None:
    """Check an :class:`ExplanationStats` and the target of its rows, classes or probabilities."""
    if isinstance(value, ExplanationStats):
        floating_tensor("stats.dots", value.dots)
        if value.dots.dim() != 2:
            raise ValueError(f"stats.dots must have shape [B, K], got {describe(value.dots)}")
        if isinstance(target, Tensor) and target.is_floating_point():
            probabilities_of_explained(target, "stats.dots", value.dots, value.class_index)
        else:
            target_of_rows(target, "stats.dots", value.dots)
        stats(value, "stats.dots", value.dots, None)
    else:
        raise TypeError(
            f"stats must be an introkernels.ExplanationStats, got {type(value).__name__}"
        )


def values_are_readable(tensor: Tensor) -> bool:
    """Whether the values of index tensors are checked: always on the CPU, where there are any.

    On a GPU reading them would stall its stream, so it happens only under ``INTROKERNELS_CHECK=1``;
    without it a kernel answers a bad row with NaN.
    """
    if is_fake(tensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get("INTROKERNELS_CHECK") == "1"


def target_in_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise IndexError for a target outside ``[0, num_classes)`` that is not ``ignore_index``."""
    if not values_are_readable(target) or all_are_classes(target, num_classes, ignore_index):
        return
    bad = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise IndexError(
            f"target[{row}] is {int(target[row])}, outside [0, {num_classes}) and not "
            f"ignore_index={ignore_index}"
        )


def all_are_classes(target: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Whether every target is known to lie in ``[0, num_classes)`` and none to be ignored."""
    if target.numel() == 0 or 0 <= ignore_index < num_classes or is_fake(target):
        return False
    least, largest = target.aminmax()
    # Compared as Python's numbers, in a third of the time.
    return least.item() >= 0 and largest.item() < num_classes


def explained_classes(index: Tensor, num_classes: int) -> None:
    """Raise for a mixture's classes ``[B, K]`` that are out of range (IndexError) or repeated."""
    any_class = index[:, 0] if index.numel() else index.new_zeros(len(index))
    class_index_values(index, any_class, num_classes, num_classes)


def class_index_values(
    index: Tensor | None, target: Tensor, num_classes: int | None, ignore_index: int
) -> None:
    """Raise for a row of ``class_index`` that is out of range, repeats a class or lacks its target.

    IndexError for a class outside ``[0, num_classes)``, ValueError for the two others. Ignored
    rows may hold anything.
    """
    if index is None or not values_are_readable(index):
        return
    live = target != ignore_index
    top = num_classes if num_classes is not None else torch.iinfo(torch.int64).max
    outside = ((index < 0) | (index >= top)) & live[:, None]
    if bool(outside.any()):
        row, column = (int(i) for i in outside.nonzero()[0])
        raise IndexError(
            f"class_index[{row}, {column}] is {int(index[row, column])}, "
            f"outside [0, {num_classes if num_classes is not None else 'num_classes'})"
        )
    lacking = live & ~(index == target[:, None]).any(1)
    if bool(lacking.any()):
        row = int(lacking.nonzero()[0, 0])
        raise ValueError(
            f"class_index[{row}] must hold the row's target {int(target[row])}, "
            f"got {index[row].tolist()}"
        )
    ordered = index.sort(1).values
    repeated = live & (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if bool(repeated.any()):
        row = int(repeated.nonzero()[0, 0])
        raise ValueError(f"class_index[{row}] must name each class once, got {index[row].tolist()}")
