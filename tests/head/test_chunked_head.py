"""The head of GPU backends, which is PyTorch on any device, here over the row losses of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cases import Case, linear_case
from helpers.oracle import Outcome, assert_follows_definition, evaluate
from helpers.tolerance import assert_accurate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import introkernels as ik
from introkernels import checks
from introkernels.ops import composite
from introkernels.ops.head import chunks, explanations, operators
from introkernels.ops.head.operators import chunk_loss_of, chunked_linear, register_head
from introkernels.ops.head.products import scale_of
from introkernels.ops.schema import ROW_STATE, define
from introkernels.ops.select import served_by

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "mean", "sum")
# Row losses that come from C++ where it is built.
ROW_LOSS = ("row_loss_forward", "row_loss_backward")
ROWS = chunk_loss_of(*(getattr(torch.ops.introkernels, name) for name in ROW_LOSS))
HEAD = define("introkernels_head_test", composite)
register_head("introkernels_head_test", "CPU", ROWS)


@pytest.fixture(autouse=True)
def _on_the_head() -> Iterator[None]:
    with served_by(HEAD):
        yield


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four rows and blocks of four classes, however few numbers these have."""
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 0)
    monkeypatch.setitem(chunks.FEWEST_ROWS, "cpu", 4)
    monkeypatch.setitem(chunks.PIECE_ROWS, "cpu", 3)
    monkeypatch.setattr(explanations, "BLOCK_BYTES", 0)
    monkeypatch.setattr(explanations, "TILE_ROWS", 4)


def assert_same(actual: Outcome, expected: Outcome) -> None:
    for part in ("loss", "ce", "kl"):
        assert torch.equal(getattr(actual, part), getattr(expected, part)), part
    for name, grad in expected.grads.items():
        assert torch.equal(actual.grads[name], grad), name


@pytest.mark.parametrize("size", [(65, 33, 17), (300, 1003, 40), (1, 1, 1), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_follows_the_definition(dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    rows, classes, width = size
    assert_follows_definition(
        linear_case(rows, classes, dtype, width=width, ignored=min(rows - 1, 2))
    )


@pytest.mark.parametrize("weight_dtype", DTYPES[1:])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_any_two_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    case = linear_case(4, 9, dtype, weight_dtype=weight_dtype, center=dtype == torch.bfloat16)
    assert_follows_definition(case)


OPTIONS: list[dict[str, Any]] = [
    {"center": True},
    {"similarity": "projection", "reduction": "sum"},
    {"label_mode": "split", "non_target_mass": 0.3, "reduction": "none"},
    {"label_smoothing": 0.2, "class_weights": True, "ignored": 2},
    {"reduction": "none", "ignored": 1, "class_weights": True, "center": True},
    {"bias": False, "ce_weight": 0.0, "similarity_temperature": 0.1, "temperature": 1.0},
    {"kl_weight": 0.0, "ignore_index": 3},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_follows_definition(linear_case(7, 19, dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_chunks_add_up(small_chunks: None, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Several chunks, of which the last has fewer rows and one none that is not ignored."""
    case = linear_case(14, 11, dtype, **options)
    case["target"][4:8] = options.get("ignore_index", -100)
    assert_follows_definition(case)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("classes", [10, 32_000, 1_000_000])
def test_chunks_are_bounded_and_whole_tiles(classes: int, device: str) -> None:
    rows = chunks.chunk_rows(1 << 30, classes, 64, 4, device)
    kind = "cpu" if device == "cpu" else "others"
    assert rows % chunks.TILE_ROWS == 0
    if rows > chunks.FEWEST_ROWS[kind]:
        assert chunks.MATRICES * (classes + 64) * 4 * rows <= chunks.CHUNK_BYTES[kind]
    assert chunks.chunk_rows(5, classes, 64, 4, device) == 5


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(reduction: str) -> None:
    case = linear_case(0, 5, width=4, reduction=reduction, class_weights=True)
    outcome = evaluate(case)
    for part in (outcome.loss, outcome.ce, outcome.kl):
        expected = {"none": torch.zeros(0), "mean": torch.tensor(torch.nan), "sum": torch.zeros(())}
        assert torch.equal(part.nan_to_num(7.0), expected[reduction].nan_to_num(7.0))
    for name, grad in outcome.grads.items():
        assert torch.equal(grad, torch.zeros_like(case[name]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_rows_ignored(reduction: str) -> None:
    assert_follows_definition(linear_case(3, 5, ignored=3, reduction=reduction))


def test_masked_classes() -> None:
    """A bias of -inf takes a class away; where it is the target's, the loss is infinite."""
    case = linear_case(5, 20, reduction="none")
    case["target"][:] = torch.tensor([0, 1, 2, 3, 16])
    case["bias"][[1, 7, 17]] = -torch.inf
    outcome = assert_follows_definition(case)
    assert outcome.loss.isinf().tolist() == [False, True, False, False, False]


def test_nothing_of_an_ignored_row_is_seen(small_chunks: None) -> None:
    case = linear_case(6, 5, ignored=2, class_weights=True)
    features = case["features"].clone()
    features[case["target"] == -100] = torch.nan
    assert_same(evaluate(case.with_tensors(features=features)), evaluate(case))


def test_nan_features_spoil_their_row_alone() -> None:
    case = linear_case(4, 5, reduction="none")
    expected = evaluate(case)
    features = case["features"].clone()
    features[1, 3] = torch.nan
    outcome = evaluate(case.with_tensors(features=features))
    assert outcome.loss.isnan().tolist() == [False, True, False, False]
    assert torch.equal(outcome.loss[2:], expected.loss[2:])
    assert outcome.grads["features"][1].isnan().all()
    assert torch.equal(outcome.grads["features"][2:], expected.grads["features"][2:])


def test_an_unknown_target_raises_where_it_can_be_seen() -> None:
    case = linear_case(6, 5)
    case["target"][2] = 5
    with pytest.raises(IndexError, match=r"target\[2\] is 5"):
        evaluate(case)


UNCHECKED = define("introkernels_head_test_unchecked", composite)
register_head("introkernels_head_test_unchecked", "CPU", composite.chunk_loss)


@pytest.mark.parametrize("target", [-1, 5, -(1 << 40), 1 << 40])
def test_an_unknown_target_spoils_its_row_alone(
    target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nobody looks at the values; so do the row losses of the definition."""
    monkeypatch.setattr(checks, "values_are_readable", lambda tensor: False)
    case = linear_case(6, 5, reduction="none", class_weights=True)
    others = torch.arange(6) != 2
    with served_by(UNCHECKED):
        expected = evaluate(case)
        case["target"][2] = target
        outcome = evaluate(case)
    assert outcome.loss[2].isnan()
    assert outcome.grads["features"][2].isnan().all()
    assert torch.equal(outcome.loss[others], expected.loss[others])
    assert torch.equal(outcome.grads["features"][others], expected.grads["features"][others])
    assert outcome.grads["weight"].isnan().all()
    assert outcome.grads["bias"].isnan().all()


@pytest.mark.parametrize("similarity", ["cosine", "projection"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("feature_scale", "weight_scale"),
    [
        (1e-23, 1.0),
        (1.0, 1e-22),
        (1e25, 1e-25),
        (1e-25, 1e25),
        # To both ends of float32's normal numbers.
        (1e37, 3e-37),
        (3e-37, 1e37),
        (0.01, 1e37),
        (1e37, 0.01),
    ],
)
def test_squares_neither_overflow_nor_underflow(
    feature_scale: float, weight_scale: float, center: bool, similarity: str
) -> None:
    features, weight = torch.randn(6, 16) * feature_scale, torch.randn(5, 16) * weight_scale
    target = torch.randint(5, (6,))
    options: dict[str, Any] = {
        "ce_weight": 0.0,
        "kl_weight": 1.0,
        "temperature": 1.0,
        "center": center,
        "similarity": similarity,
    }
    loss = ik.linear_introspective_loss(features, weight, target, **options)
    expected = ik.reference.linear_introspective_loss(
        features.double(), weight.double(), target, **options
    )
    assert_accurate(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_powers_that_keep_squares_in_range(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    largest = torch.tensor([tiny, 1e-20, 1.0, 1.99, 1e20, info.max], dtype=dtype)
    scale = scale_of(largest)
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert scale[0] == 2.0 ** (int(torch.frexp(largest[-1]).exponent) - 1)
    scaled = largest * scale
    assert ((scaled[1:] >= 2**4) & (scaled[1:] < 2**5)).all()
    odd = torch.tensor([0, tiny / 2, torch.inf, torch.nan], dtype=dtype)
    expected = torch.tensor([scale[0], scale[0], 1, 1], dtype=dtype)
    assert torch.equal(scale_of(odd), expected)


def test_a_mean_with_more_digits_than_the_weight(small_chunks: None) -> None:
    """It is summed up some classes at a time: four, where chunks are small."""
    # All products and sums of these logits are float32 numbers. The mean of seven classes is not.
    features = torch.randint(1, 3, (6, 16)) * torch.tensor([1.0, -1.0]).repeat(8)
    weight = 200 + torch.randint(-32, 32, (7, 16)) / 1024
    target = torch.arange(6)
    options: dict[str, Any] = {"ce_weight": 0.0, "kl_weight": 1.0, "center": True}
    loss = ik.linear_introspective_loss(features, weight, target, **options)
    expected = ik.reference.linear_introspective_loss(
        features.double(), weight.double(), target, **options
    )
    assert_accurate(loss, expected)


@pytest.mark.parametrize("center", [False, True])
def test_strides(center: bool) -> None:
    case = linear_case(5, 7, width=6, class_weights=True, center=center)
    strided = case.with_tensors(
        features=case["features"].T.contiguous().T,
        weight=case["weight"].T.repeat_interleave(2, 1).T[::2],
        bias=case["bias"].repeat_interleave(2)[::2],
        target=case["target"].repeat_interleave(3)[::3],
    ).with_keywords(class_weight=case["class_weight"].repeat_interleave(2)[::2])
    assert_follows_definition(strided)


def test_a_row_for_all() -> None:
    """Expanded tensors, which have strides of 0."""
    case = linear_case(3, 7, width=6)
    assert_follows_definition(
        case.with_tensors(
            features=case["features"][:1].expand(3, 6), bias=case["bias"][:1].expand(7)
        )
    )


CASES: dict[str, Callable[[], Case]] = {
    "mean": lambda: linear_case(70, 35, ignored=3, class_weights=True),
    "sum": lambda: linear_case(70, 35, torch.bfloat16, reduction="sum", center=True),
    "none": lambda: linear_case(70, 35, reduction="none", label_smoothing=0.1, bias=False),
    "float64": lambda: linear_case(70, 35, torch.float64, similarity="projection"),
    "float16": lambda: linear_case(70, 35, torch.float16, class_weights=True),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_same_bits_again(small_chunks: None, name: str) -> None:
    case = CASES[name]()
    assert_same(evaluate(case), evaluate(case))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_made_with_the_loss_or_again(
    small_chunks: None, dtype: torch.dtype, reduction: str
) -> None:
    case = linear_case(14, 11, dtype, ignored=2, class_weights=True, reduction=reduction)
    leaves = [case[name].requires_grad_() for name in case.differentiable]
    loss = ik.linear_introspective_loss(*case.arguments(), **case.keywords)
    incoming = torch.tensor(-0.3, dtype=loss.dtype)
    first = torch.autograd.grad(loss, leaves, incoming, retain_graph=True)
    for grad, again in zip(first, torch.autograd.grad(loss, leaves, incoming), strict=True):
        assert torch.equal(grad, again)


def test_gradients_of_each_row_alone_are_those_of_their_sum(small_chunks: None) -> None:
    case = linear_case(14, 11, ignored=2, class_weights=True)
    of_rows, of_sum = (
        evaluate(case.with_keywords(reduction=reduction)).grads for reduction in ("none", "sum")
    )
    for name, grad in of_sum.items():
        assert torch.equal(grad, of_rows[name])


class OperatorCalls(TorchDispatchMode):
    """The calls of a namespace's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "introkernels_head_test":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def operator_calls(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """The operators of a loss and two walks of its graph, with their arguments."""
    leaves = [case[name].requires_grad_() for name in case.differentiable]
    with OperatorCalls() as mode:
        loss = ik.linear_introspective_loss(*case.arguments(), **case.keywords).sum()
        for _ in range(2):
            torch.autograd.grad(loss, leaves, retain_graph=True)
    assert {func.name().split("::")[1] for func, _ in mode.calls} == {"linear"}
    return [
        (func, tuple(a.detach() if isinstance(a, Tensor) else a for a in args))
        for func, args in mode.calls
    ]


@every_case
def test_opcheck(name: str) -> None:
    for func, arguments in operator_calls(CASES[name]()):
        torch.library.opcheck(func, arguments)


@every_case
def test_autocast_changes_nothing(name: str) -> None:
    case = CASES[name]()
    expected = evaluate(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(evaluate(case), expected)


def test_vmap() -> None:
    case = linear_case(6, 5)
    batch = torch.stack([case["features"], 2 * case["features"]])

    def loss(features: Tensor) -> Tensor:
        tensors = case.with_tensors(features=features)
        result = ik.linear_introspective_loss(*tensors.arguments(), **case.keywords)
        assert isinstance(result, Tensor)
        return result

    losses, grads = torch.func.vmap(torch.func.grad_and_value(loss))(batch)[::-1]
    for features, value, grad in zip(batch, losses, grads, strict=True):
        outcome = evaluate(case.with_tensors(features=features))
        assert torch.equal(value, outcome.loss)
        assert torch.equal(grad, outcome.grads["features"])


class HostWaitsError(AssertionError):
    """A host would wait for a number or a shape that its device computes."""


class NeverWaiting(TorchDispatchMode):
    """Refuses operators whose result is a number on the host or has a shape that data decide."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise HostWaitsError(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "work",
    [torch.Tensor.item, torch.Tensor.nonzero, bool, lambda tensor: tensor[None][tensor[None] > 0]],
    ids=["item", "nonzero", "bool", "mask"],
)
def test_what_waits_is_refused(work: Callable[[Tensor], object]) -> None:
    with NeverWaiting(), pytest.raises(HostWaitsError):
        work(torch.ones(()))


@every_case
def test_the_host_never_waits(
    small_chunks: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the dispatcher, under which no mode would see what an operator calls."""
    # As while a CUDA graph is captured: rows that are ignored can't be told from others.
    monkeypatch.setattr(operators, "_rows_that_count", lambda target, ignore_index: None)
    calls = operator_calls(CASES[name]())
    monkeypatch.setattr(checks, "values_are_readable", lambda tensor: False)
    linear = chunked_linear(ROWS)
    for func, arguments in calls:
        with torch.no_grad(), NeverWaiting():
            outputs = linear(*arguments)
        for output, expected in zip(outputs, func(*arguments), strict=True):
            assert torch.equal(output, expected)


def peak_of_tensors(work: Callable[[], object]) -> int:
    """The most bytes that PyTorch had allocated at any time during ``work``, beyond before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.skipif(
    ik.backends.status()["cpu"] != "loaded", reason="the definition takes float64 matrices"
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_memory_is_that_of_a_chunk(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 0)
    monkeypatch.setattr(explanations, "BLOCK_BYTES", 1 << 20)
    width, classes = 8, 32_000
    peaks = {}
    for rows in (512, 1024):
        case = linear_case(rows, classes, width=width, ignored=1, reduction=reduction)
        evaluate(case)
        peaks[rows] = peak_of_tensors(lambda case=case: evaluate(case))
    # The features that are not ignored, their gradient, what a row loss keeps, and a few numbers
    # of each row.
    of_each_row = 2 * 4 * width + 8 * ROW_STATE + 160
    assert peaks[1024] - peaks[512] < (1024 - 512) * of_each_row
    # For the gradient of the bias, a copy of that of the logits in float64.
    of_chunk = chunks.FEWEST_ROWS["cpu"] * classes * 4
    of_piece = chunks.PIECE_ROWS["cpu"] * classes * 4
    assert peaks[1024] < 1.1 * (of_chunk + (chunks.MATRICES + 1) * of_piece)


def test_a_namespace_serves_its_own_row_losses() -> None:
    rows = {name: getattr(torch.ops.introkernels, name) for name in ROW_LOSS}
    operators = define("introkernels_head_test_own", SimpleNamespace(**vars(composite) | rows))
    register_head("introkernels_head_test_own", "CPU")
    with served_by(SimpleNamespace(**vars(operators))):
        assert_follows_definition(linear_case(7, 19))
