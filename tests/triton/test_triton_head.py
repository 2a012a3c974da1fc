"""The Triton head's two ways to the same numbers: chunks by the matrix library, and streaming."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from helpers.cases import Case, linear_case
from helpers.oracle import assert_follows_definition, evaluate
from helpers.tolerance import assert_accurate
from torch import Tensor

import introkernels as ik
from introkernels.ops.head import chunks
from introkernels.ops.head import operators as head_operators
from introkernels.ops.head.call import HeadCall, Needs
from introkernels.ops.options import LabelOptions, LossOptions
from introkernels.ops.triton import head, head_stream
from introkernels.ops.triton.kernels.head_products import parts_of
from introkernels.ops.triton.launch import Launch, launch, recording

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = head_stream.LARGE_TILE


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with ik.use_backend("triton"):
        yield


@pytest.fixture(params=["chunks", "stream"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that all heads go during the test."""
    monkeypatch.setattr(head, "way", lambda call: request.param)
    name: str = request.param
    return name


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four rows, however few numbers these have."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 0)
    monkeypatch.setattr(chunks, "FEWEST_ROWS", 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [
        (TILE["M"] + 1, TILE["N"] + 1, TILE["K"] + 1),
        (TILE["M"] - 1, TILE["N"], 2 * TILE["K"]),
        (1, 1, 1),
        (2, 3, 0),
    ],
    ids=str,
)
def test_both_ways_follow_the_definition(
    way: str, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, classes, width = size
    assert_follows_definition(
        linear_case(rows, classes, dtype, width=width, ignored=min(rows - 1, 2)),
        rows_may_cancel=True,
    )


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_two_dtypes(way: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    case = linear_case(4, 9, dtype, weight_dtype=weight_dtype, center=dtype == torch.bfloat16)
    assert_follows_definition(case, rows_may_cancel=True)


@pytest.mark.parametrize(
    "options",
    [
        {"center": True},
        {"similarity": "projection", "reduction": "sum"},
        {"label_smoothing": 0.2, "class_weights": True, "ignored": 2},
        {"reduction": "none", "ignored": 1, "class_weights": True},
        {"bias": False, "ce_weight": 0.0, "similarity_temperature": 0.1, "temperature": 1.0},
        {"kl_weight": 0.0, "ignore_index": 3},
    ],
    ids=str,
)
def test_options(way: str, options: dict[str, Any]) -> None:
    classes = TILE["N"] + 3
    assert_follows_definition(linear_case(7, classes, **options), rows_may_cancel=True)


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
def test_chunks_add_up(small_chunks: None, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Several chunks, of which the last has fewer rows and one none that is not ignored."""
    case = linear_case(14, 11, dtype, ignored=2, **options)
    case["target"][4:8] = -100
    assert_follows_definition(case, rows_may_cancel=True)


def test_no_rows(way: str) -> None:
    case = linear_case(0, 5, width=4, reduction="sum")
    outcome = evaluate(case)
    assert outcome.loss == 0
    for name, grad in outcome.grads.items():
        assert torch.equal(grad, torch.zeros_like(case[name]))


def test_masked_classes(way: str) -> None:
    """A bias of -inf takes a class away; where it is the target's, the loss is infinite."""
    case = linear_case(5, TILE["N"] + 4, reduction="none")
    case["target"][:] = torch.tensor([0, 1, 2, 3, TILE["N"]])
    case["bias"][[1, 7, TILE["N"] + 1]] = -torch.inf
    outcome = assert_follows_definition(case)
    assert outcome.loss.isinf().tolist() == [False, True, False, False, False]


def test_nothing_of_an_ignored_row_is_seen(way: str) -> None:
    case = linear_case(6, 5, ignored=2, class_weights=True)
    expected = evaluate(case)
    features = case["features"].clone()
    features[case["target"] == -100] = torch.nan
    seen = evaluate(case.with_tensors(features=features))
    assert torch.equal(seen.loss, expected.loss)
    for name, grad in seen.grads.items():
        assert torch.equal(grad, expected.grads[name])


@pytest.mark.parametrize("target", [-1, 5, -(1 << 40), 1 << 40])
def test_an_unknown_target_spoils_its_row_alone(
    way: str, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nobody looks at the values beforehand."""
    monkeypatch.setattr(head_operators, "check_indices", lambda *arguments: None)
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


def test_nan_features_spoil_their_row_alone(way: str) -> None:
    case = linear_case(4, 5, reduction="none")
    expected = evaluate(case)
    features = case["features"].clone()
    features[1, 3] = torch.nan
    outcome = evaluate(case.with_tensors(features=features))
    assert outcome.loss.isnan().tolist() == [False, True, False, False]
    assert torch.equal(outcome.loss[2:], expected.loss[2:])
    assert outcome.grads["features"][1].isnan().all()
    assert torch.equal(outcome.grads["features"][2:], expected.grads["features"][2:])


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("feature_scale", "weight_scale"), [(1e-23, 1.0), (1.0, 1e-22), (1e25, 1e-25), (1e-25, 1e25)]
)
def test_squares_neither_overflow_nor_underflow(
    way: str, feature_scale: float, weight_scale: float, center: bool
) -> None:
    features, weight = torch.randn(6, 16) * feature_scale, torch.randn(5, 16) * weight_scale
    target = torch.randint(5, (6,))
    options = {"ce_weight": 0.0, "kl_weight": 1.0, "temperature": 1.0, "center": center}
    loss = ik.linear_introspective_loss(features, weight, target, **options)
    expected = ik.reference.linear_introspective_loss(
        features.double(), weight.double(), target, **options
    )
    assert_accurate(loss, expected)


def test_strides(way: str) -> None:
    case = linear_case(5, 7, width=6, class_weights=True)
    expected = evaluate(case)
    strided = case.with_tensors(
        features=case["features"].T.contiguous().T,
        weight=case["weight"].repeat(1, 2)[:, :6],
        bias=case["bias"].repeat_interleave(2)[::2],
        target=case["target"].repeat_interleave(3)[::3],
    ).with_keywords(class_weight=case["class_weight"].repeat_interleave(2)[::2])
    outcome = evaluate(strided)
    assert_accurate(outcome.loss, expected.loss.double())
    for name, grad in outcome.grads.items():
        assert_accurate(grad, expected.grads[name].double(), name)


def test_a_row_for_all(way: str) -> None:
    """Expanded tensors, which have strides of 0."""
    case = linear_case(3, 7, width=6)
    case = case.with_tensors(
        features=case["features"][:1].expand(3, 6), bias=case["bias"][:1].expand(7)
    )
    assert_follows_definition(case)


def test_same_bits_again(way: str) -> None:
    case = linear_case(TILE["M"] + 6, TILE["N"] + 2, ignored=3)
    first, second = evaluate(case), evaluate(case)
    assert torch.equal(first.loss, second.loss)
    for name, grad in first.grads.items():
        assert torch.equal(grad, second.grads[name])


def test_ways_agree_in_what_they_keep_for_a_backward() -> None:
    call = call_of(linear_case(9, 13, ignored=1))
    kept = [module.forward(call, Needs(False, False, False))[3:5] for module in head.WAYS.values()]
    (of_chunks, totals), (of_stream, same_totals) = kept
    live = call.target != -100
    assert_accurate(of_stream[live].float(), of_chunks[live])
    assert torch.equal(totals, same_totals)


def call_of(case: Case, device: str = "cpu", **labels: Any) -> HeadCall:
    features, weight, target, bias = (
        None if argument is None else argument.to(device) for argument in case.arguments()
    )
    return HeadCall(
        features,
        weight,
        target,
        bias,
        False,
        LossOptions(None, 4.0, 0.7, 0.3, -100, 0.0, labels.get("reduction", 1)),
        LabelOptions(1.0, 0, labels.get("label_mode", 0), 0.1),
    )


@pytest.mark.parametrize(
    ("classes", "dtype", "label_mode", "expected"),
    [
        (10, torch.float32, 0, "chunks"),
        (1_300_000, torch.float32, 0, "chunks"),
        (1_500_000, torch.float32, 0, "stream"),
        (1_500_000, torch.bfloat16, 0, "stream"),
        (1_500_000, torch.float32, 1, "chunks"),
        (1_500_000, torch.float64, 0, "chunks"),
    ],
)
def test_which_way_a_call_goes(
    classes: int, dtype: torch.dtype, label_mode: int, expected: str
) -> None:
    call = call_of(linear_case(3, 2, dtype), label_mode=label_mode)
    weight = torch.empty(classes, call.weight.shape[1], dtype=dtype, device="meta")
    assert head.way(call._replace(weight=weight)) == expected


def launches_of(work: Callable[[], object]) -> list[Launch]:
    found: list[Launch] = []
    with recording(found.append):
        work()
    return found


def test_streaming_holds_no_matrix_of_rows_and_classes() -> None:
    rows, classes, width = 4096, 50_000, 8
    call = call_of(
        Case(
            "linear_introspective_loss",
            {
                "features": torch.empty(rows, width, device="meta"),
                "weight": torch.empty(classes, width, device="meta"),
                "target": torch.empty(rows, dtype=torch.int64, device="meta"),
                "bias": torch.empty(classes, device="meta"),
            },
        ),
        "meta",
    )
    launches = launches_of(lambda: head_stream.forward(call, Needs(True, True, True)))
    names = [launched.kernel.__name__ for launched in launches]
    assert names == [
        "survey_weight",
        "survey_rows",
        "stream_forward",
        "stream_backward",
        "stream_backward",
    ]
    largest = max(
        argument.numel()
        for launched in launches
        for argument in launched.arguments
        if isinstance(argument, Tensor)
    )
    assert largest == classes * width


@triton.jit
def store_parts(x, first, second, third, N: tl.constexpr):
    places = tl.arange(0, N)
    parts = parts_of(tl.load(x + places), 3)
    tl.store(first + places, parts[0].to(tl.float32))
    tl.store(second + places, parts[1].to(tl.float32))
    tl.store(third + places, parts[2].to(tl.float32))


def test_three_bfloat16_numbers_are_a_float32_number() -> None:
    tiny, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    x = torch.randn(64) * torch.logspace(-30, 30, 64)
    x[:5] = torch.tensor([0.0, -largest, largest, 1 + 2.0**-23, 2**20 * tiny])
    parts = [torch.full_like(x, torch.nan) for _ in range(3)]
    launch(store_parts, (1,), x, *parts, N=64)
    for part in parts:
        # The interpreter multiplies them in float32, a GPU in bfloat16: it has to be the same.
        assert torch.equal(part.bfloat16().float(), part)
    assert torch.equal(sum(part.double() for part in parts), x.double())


def test_infinity_and_nan_stay_what_they_are() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    parts = [torch.zeros_like(x) for _ in range(3)]
    launch(store_parts, (1,), x, *parts, N=4)
    assert torch.equal(sum(parts).nan_to_num(7.0, 8.0, 9.0), x.nan_to_num(7.0, 8.0, 9.0))
