"""The products of a head: their precision, what they leave in memory, and how many there are."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.cases import linear_case
from helpers.oracle import assert_follows_definition
from helpers.tolerance import assert_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import introkernels as ik
from introkernels.ops import composite
from introkernels.ops.head import chunks, explanations
from introkernels.ops.head.operators import chunk_loss_of, chunked_linear, register_head
from introkernels.ops.schema import define
from introkernels.ops.select import served_by
from introkernels.options import Options

HALF_TYPES = (torch.bfloat16, torch.float16)
GIGABYTE = 1 << 30
# Row losses that come from C++ where it is built.
ROW_LOSS = ("row_loss_forward", "row_loss_backward")
ROWS = chunk_loss_of(*(getattr(torch.ops.introkernels, name) for name in ROW_LOSS))
HEAD = define("introkernels_head_products", composite)
register_head("introkernels_head_products", "CPU", ROWS)


@pytest.fixture(autouse=True)
def _on_the_head() -> Iterator[None]:
    with served_by(HEAD):
        yield


class Allocations(TorchDispatchMode):
    """What operators allocate and free, also on tensors without data, and the products they make.

    Attributes:
        live: the bytes that are allocated and not yet freed.
        peak: the most that ever were.
        largest: the most that were allocated at once.
        products: the dtypes of each product's two factors and result, and its multiplications.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.products: list[tuple[tuple[torch.dtype, ...], int]] = []
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.addmm:
            left, right = args[1:3]
            dtypes = (left.dtype, right.dtype, outputs.dtype)
            self.products.append((dtypes, left.numel() * right.shape[1]))
        for output in tree_iter(outputs):
            if isinstance(output, Tensor) and output.untyped_storage() not in self._known:
                self._allocated(output.untyped_storage())
        return outputs

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._freed, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)

    def _freed(self, size: int) -> None:
        self.live -= size


def large_head(
    dtype: torch.dtype, weight_dtype: torch.dtype | None = None, **options: Any
) -> tuple[Allocations, int]:
    """A language model's head on tensors without data, and the bytes of its gradients."""
    rows, classes, width = 4096, 128_256, 4096
    features = torch.empty(rows, width, dtype=dtype, device="meta")
    weight = torch.empty(classes, width, dtype=weight_dtype or dtype, device="meta")
    bias = torch.empty(classes, dtype=dtype, device="meta")
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    needs = dict.fromkeys(("need_features", "need_weight", "need_bias"), True)
    numbers = Options(4.0, 0.7, 0.3, 0.0, -100, 1, **needs, **options)
    linear = chunked_linear(ROWS)
    with torch.no_grad(), Allocations(features, weight, bias, target) as allocations:
        outputs = linear(features, weight, target, bias, None, None, numbers.floats, numbers.ints)
    return allocations, sum(output.nbytes for output in outputs)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
def test_memory_of_a_language_model(dtype: torch.dtype, center: bool) -> None:
    allocations, kept = large_head(dtype, center=center)
    assert allocations.peak - kept < GIGABYTE


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_half_factors_are_multiplied_to_float32(dtype: torch.dtype, center: bool) -> None:
    """Five products, and beside them nothing of the size of the weight but its gradient."""
    allocations, _ = large_head(dtype, center=center)
    assert {dtypes for dtypes, _ in allocations.products} == {(dtype, dtype, torch.float32)}
    assert sum(size for _, size in allocations.products) == 5 * 4096 * 128_256 * 4096
    assert allocations.largest == 4 * 128_256 * 4096


@pytest.fixture
def float16_may_add_up_in_float16() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
        # PyTorch refuses a float32 result there.
        (torch.float16, torch.float16),
    ],
)
def test_other_factors_are_float32(
    dtype: torch.dtype, weight_dtype: torch.dtype, float16_may_add_up_in_float16: None
) -> None:
    allocations, _ = large_head(dtype, weight_dtype)
    assert {dtypes for dtypes, _ in allocations.products} == {(torch.float32,) * 3}


def test_bfloat16_never_adds_up_in_float16(float16_may_add_up_in_float16: None) -> None:
    allocations, _ = large_head(torch.bfloat16)
    assert {dtypes[0] for dtypes, _ in allocations.products} == {torch.bfloat16}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_statistics_are_those_of_rounded_factors(
    dtype: torch.dtype, center: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The definition's row loss of statistics whose factors are rounded once, as they have to be.

    To the digits of float32: what else was rounded would show.
    """
    monkeypatch.setattr(explanations, "BLOCK_BYTES", 0)
    keywords = {
        "ce_weight": 0.0,
        "temperature": 1.0,
        "similarity_temperature": 0.02,
        "reduction": "none",
    }
    case = linear_case(20, 150, dtype, width=4, center=center, bias=False, **keywords)
    features, weight, target = (case[name] for name in ("features", "weight", "target"))
    explained = weight.double()
    if center:
        explained = explained - explained.mean(0)
    squares = features.double().square()

    def rounded(factor: Tensor) -> Tensor:
        return factor.to(dtype).double()

    stats = ik.ExplanationStats(
        rounded(squares * explained[target]) @ rounded(explained).mT,
        rounded(squares) @ rounded(explained.square()).mT,
    )

    expected = ik.reference.similarity_loss(
        features.double() @ weight.double().mT, target, stats, **keywords
    )
    loss = ik.linear_introspective_loss(features, weight, target, **case.keywords)
    assert_accurate(loss, expected)
    exact = ik.reference.linear_introspective_loss(
        features.double(), weight.double(), target, **case.keywords
    )
    assert (expected - exact).norm() > 2e-5 * exact.norm()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("feature_scale", "weight_scale"), [(1e-3, 1e-3), (1e-3, 5e3), (5e3, 1e-3), (3e-5, 1.0)]
)
def test_squares_stay_in_the_range_of_float16(
    feature_scale: float, weight_scale: float, center: bool
) -> None:
    case = linear_case(
        6, 70, torch.float16, width=16, bias=False, ce_weight=0.0, temperature=1.0, center=center
    )
    features = (case["features"] * feature_scale).half()
    weight = (case["weight"].float() * weight_scale / 3).half()
    # Logits of a usual size, whatever the scales.
    case = case.with_tensors(features=features, weight=weight)
    assert features.isfinite().all()
    assert weight.isfinite().all()
    assert_follows_definition(case)


@pytest.mark.parametrize("class_weights", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_small_gradients_of_logits_keep_their_digits_in_float16(
    reduction: str, class_weights: bool
) -> None:
    """Before they are rounded to float16, whose smallest number is larger than most of them."""
    case = linear_case(3000, 40, torch.float16, width=8, class_weights=class_weights)
    incoming = torch.rand(3000) * 1e-6 if reduction == "none" else None
    class_weight = case.keywords["class_weight"]
    numbers = Options(
        4.0, 0.7, 0.3, 0.0, -100, 1 if incoming is None else 0, need_features=True, need_weight=True
    )
    *_, of_features, of_weight, _ = HEAD.linear(
        case["features"],
        case["weight"],
        case["target"],
        case["bias"],
        class_weight,
        incoming,
        numbers.floats,
        numbers.ints,
    )
    exact = case.with_keywords(reduction=reduction).upcast()
    leaves = [exact[name].requires_grad_() for name in ("features", "weight")]
    loss = ik.reference.linear_introspective_loss(*exact.arguments(), **exact.keywords)
    grads = torch.autograd.grad(loss, leaves, None if incoming is None else incoming.double())
    for actual, expected in zip((of_features, of_weight), grads, strict=True):
        assert (actual - expected).norm() < 2**-11 * expected.norm()


def test_chunks_of_a_language_model() -> None:
    assert chunks.chunk_rows(4096, 128_256, 4096, 4) == chunks.FEWEST_ROWS["others"] == 512
    assert chunks.chunk_rows(8192, 32_000, 2048, 4) == 1856
