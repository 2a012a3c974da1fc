"""A program: saves what every operator gives, forward and backward, with the kernels in force.

    python capability_results.py FILE

Two runs whose kernels differ can be compared by the files, a dictionary of tensors by name:
operator, dtype, case, result.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from helpers.cases import (
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    similarity_case,
)
from helpers.oracle import evaluate
from torch import Tensor

import introkernels as ik

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Sizes around the widths of registers, and of blocks of them: remainders of every kind.
CLASSES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 130, 513, 1000, 4099)
LENGTHS = (1, 3, 8, 15, 17, 31, 33, 64, 65, 127, 255, 257, 1023, 1025, 3072, 5001)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"label_smoothing": 0.1, "class_weights": True, "temperature": 1.0},
    {"ignored": 1, "reduction": "sum", "ce_weight": 0.0},
    {"reduction": "none", "kl_weight": 0.0},
)
LABELS: tuple[dict[str, Any], ...] = (
    {},
    {"label_mode": "split", "similarity_temperature": 0.05},
    {"similarity": "projection"},
    {"similarity": "projection", "label_mode": "split"},
)


def sized_cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Every loss at every size, with options in turn."""
    for number, classes in enumerate(CLASSES):
        loss, labels = OPTIONS[number % 4], LABELS[number // 4 % 4]
        name = f"{classes} classes"
        yield name, distillation_case(5, classes, dtype, **loss)
        yield name, similarity_case(5, classes, dtype, **loss, **labels)
        explained = max(1, classes // 2) if number % 3 == 0 else None
        yield (
            name,
            introspective_case(5, classes, dtype, explained=explained, **loss, **labels),
        )
        yield name, linear_case(5, classes, dtype, **loss, **labels)
    for number, length in enumerate(LENGTHS):
        labels = {**LABELS[number % 4], "center": number % 2 == 1}
        name = f"explanations of {length}"
        yield name, introspective_case(3, 11, dtype, shape=(length,), **labels)
        yield name, linear_case(6, 11, dtype, width=length, **labels)


def hard_cases(dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Numbers and layouts where instruction sets are apt to differ."""
    info = torch.finfo(dtype)
    for build in (distillation_case, similarity_case, introspective_case):
        case = build(7, 101, dtype, reduction="none")
        logits = case["logits"].clone()
        logits[0, 3::7] = -torch.inf
        logits[1, 5] = torch.nan
        logits[2, 9] = torch.inf
        logits[3] *= info.max / 64
        logits[4] *= info.tiny
        logits[5, ::2] = 0.0
        # At least one class of the target exists.
        target = case["target"].fill_(1)
        yield "extremes", case.with_tensors(logits=logits, target=target)
        yield "strides", case.with_tensors(logits=logits.t().contiguous().t(), target=target)
        # Gradients that are subnormal, as a mean over many rows makes them.
        yield "faint", build(50, 33, dtype, ce_weight=info.tiny, kl_weight=info.tiny)
        # The exponential over its whole range.
        sweep = torch.linspace(-110.0, 0.0, 4 * 1021, dtype=torch.float64).view(4, 1021)
        for temperature in (1.0, 2.0, 4.0, 5.0):
            swept = build(4, 1021, dtype, temperature=temperature, reduction="none")
            yield f"sweep {temperature:g}", swept.with_tensors(logits=sweep.to(dtype))
    case = introspective_case(4, 9, dtype, shape=(3, 37))
    gradients = case["gradients"]
    exponents = torch.linspace(-1.0, 1.0, gradients.numel(), dtype=torch.float64)
    scaled = gradients * info.max ** (0.2 * exponents.view(gradients.shape))
    yield "scales", case.with_tensors(gradients=scaled.to(dtype))
    transposed = gradients.movedim(2, -1).contiguous().movedim(-1, 2)
    yield "strides", case.with_tensors(gradients=transposed)
    case = linear_case(19, 70, dtype, width=45, ignored=3)
    weight, features = case["weight"], case["features"]
    yield (
        "strides",
        case.with_tensors(
            weight=weight.t().contiguous().t(), features=features.repeat(1, 2)[:, ::2]
        ),
    )
    yield (
        "scales",
        case.with_tensors(weight=weight * info.tiny**0.5, features=features * info.max**0.25),
    )
    yield "blocks", linear_case(300, 1037, dtype, width=529)


def statistics_of(case: Case) -> Iterator[tuple[str, Tensor]]:
    """The statistics of an introspective case, centred and not."""
    for center in (False, True):
        stats = ik.explanation_stats(
            case["gradients"],
            case["inputs"],
            case["target"],
            center=center,
            class_index=case.keywords["class_index"],
        )
        for part in ("dots", "sq_norms"):
            yield f"{part}, center={center}", getattr(stats, part)


def results() -> Iterator[tuple[str, Tensor]]:
    """Every result with its name."""
    for dtype in DTYPES:
        type_name = str(dtype).removeprefix("torch.")
        for cases in (sized_cases, hard_cases):
            torch.manual_seed(zlib.crc32(type_name.encode()))
            for number, (name, case) in enumerate(cases(dtype)):
                title = f"{type_name} {name} {number}"
                outcome = evaluate(case)
                for part in ("loss", "ce", "kl"):
                    yield f"{case.function} {title}: {part}", getattr(outcome, part)
                for argument, grad in outcome.grads.items():
                    yield f"{case.function} {title}: gradient of {argument}", grad
                if case.function == "introspective_loss":
                    for part, tensor in statistics_of(case):
                        yield f"explanation_stats {title}: {part}", tensor


def main() -> None:
    with ik.use_backend("cpu"):
        torch.save(dict(results()), sys.argv[1])


if __name__ == "__main__":
    main()
