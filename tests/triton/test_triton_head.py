"""A head in several chunks on Triton's row losses, which see each chunk as a batch of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cases import linear_case
from helpers.oracle import assert_follows_definition, evaluate

import introkernels as ik
from introkernels import checks
from introkernels.ops.head import chunks


@pytest.fixture(autouse=True)
def _small_chunks_on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of four rows, however few numbers these have."""
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 0)
    monkeypatch.setitem(chunks.FEWEST_ROWS, "cpu", 4)
    with ik.use_backend("triton"):
        yield


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {"label_mode": "split"}),
        (torch.float32, {"class_weights": True, "label_smoothing": 0.1}),
        (torch.float32, {"label_mode": "split", "reduction": "none"}),
        (torch.bfloat16, {"reduction": "sum", "center": True}),
        (torch.float16, {"label_mode": "split", "class_weights": True}),
    ],
    ids=str,
)
def test_chunks_add_up(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Several chunks, of which the last has fewer rows and one none that is not ignored."""
    case = linear_case(14, 11, dtype, ignored=2, **options)
    case["target"][4:8] = -100
    assert_follows_definition(case)


@pytest.mark.parametrize("target", [-1, 5, -(1 << 40), 1 << 40])
def test_an_unknown_target_spoils_its_row_alone(
    target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nobody looks at the values beforehand."""
    monkeypatch.setattr(checks, "values_are_readable", lambda tensor: False)
    case = linear_case(6, 5, reduction="none")
    expected = evaluate(case)
    case["target"][2] = target
    outcome = evaluate(case)
    others = torch.arange(6) != 2
    assert outcome.loss[2].isnan()
    assert outcome.grads["features"][2].isnan().all()
    assert torch.equal(outcome.loss[others], expected.loss[others])
    assert torch.equal(outcome.grads["features"][others], expected.grads["features"][others])
    assert outcome.grads["weight"].isnan().all()
    assert outcome.grads["bias"].isnan().all()
