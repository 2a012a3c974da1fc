"""Teachers that are no matrix of logits: other heads, strongest classes, explanation statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerance import assert_accurate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import introkernels as ik
from introkernels.ops import composite
from introkernels.ops.select import served_by
from introkernels.types import LossParts, Teacher

ROWS, CLASSES, WIDTH, KEPT = 6, 9, 5, 4
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIVERGENCES = ("forward_kl", "reverse_kl", "js")
REDUCTIONS = ("none", "mean", "sum")


def top_k_of(logits: Tensor, kept: int, tail: Any = "bucket") -> ik.TopKTeacher:
    log_probs, indices = torch.log_softmax(logits, -1).topk(kept)
    return ik.TopKTeacher(indices.flip(-1), log_probs.flip(-1), tail)


def statistics(dtype: torch.dtype) -> ik.ExplanationStats:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gradients = torch.randn(ROWS, CLASSES, 8) + 0.7 * torch.randn(ROWS, 1, 8)
    target = torch.arange(ROWS) % CLASSES
    stats = ik.reference.explanation_stats(
        gradients.to(wide), torch.randn(ROWS, 8).to(wide), target
    )
    return ik.ExplanationStats(stats.dots, stats.sq_norms)


TEACHERS: dict[str, Callable[[torch.dtype], Teacher]] = {
    "logits": lambda dtype: (3 * torch.randn(ROWS, CLASSES)).to(dtype),
    "linear": lambda dtype: ik.LinearTeacher(
        torch.randn(ROWS, 7).to(dtype), torch.randn(CLASSES, 7).to(dtype)
    ),
    "linear-bias": lambda dtype: ik.LinearTeacher(
        torch.randn(ROWS, 3).to(dtype),
        torch.randn(CLASSES, 3).to(dtype),
        torch.randn(CLASSES).to(dtype),
    ),
    "bucket": lambda dtype: top_k_of(torch.randn(ROWS, CLASSES).to(dtype), KEPT),
    "renormalize": lambda dtype: top_k_of(
        torch.randn(ROWS, CLASSES).to(dtype), KEPT, "renormalize"
    ),
    "statistics": statistics,
}


def in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [in_double(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def call(functions: Any, tensors: tuple[Tensor, ...], *arguments: Any, **keywords: Any) -> Any:
    """The loss of logits, or of a head's features, weight and bias, and its gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    teacher, target = arguments
    if len(leaves) == 1:
        parts = functions.distillation_loss(
            leaves[0], teacher, target, return_parts=True, **keywords
        )
    else:
        features, weight, bias = leaves
        parts = functions.linear_distillation_loss(
            features, weight, teacher, target, bias, return_parts=True, **keywords
        )
    incoming = torch.linspace(0.5, 2, parts.loss.numel()).reshape(parts.loss.shape)
    return parts, torch.autograd.grad(parts.loss, leaves, incoming.to(parts.loss.dtype))


def student_of(kind: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if kind == "logits":
        return ((3 * torch.randn(ROWS, CLASSES)).to(dtype),)
    shapes = ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def targets() -> Tensor:
    target = torch.arange(ROWS) % CLASSES
    target[2] = -100
    return target


@pytest.mark.parametrize("student", ["logits", "head"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_teacher(
    backend: str, student: str, teacher: str, divergence: str, reduction: str, dtype: torch.dtype
) -> None:
    tensors, source = student_of(student, dtype), TEACHERS[teacher](dtype)
    keywords = {
        "divergence": divergence,
        "reduction": reduction,
        "row_weight": torch.rand(ROWS) if dtype != torch.float32 else None,
        "label_smoothing": 0.1,
    }
    parts, grads = call(ik, tensors, source, targets(), **keywords)
    expected, exact = call(
        ik.reference, in_double(tensors), in_double(source), targets(), **keywords
    )
    # The gradient of half logits is rounded once on its way to a head's.
    factor = 4.0 if student == "logits" or dtype not in DTYPES[2:] else 2000.0
    for part, of_definition in zip(parts, expected, strict=True):
        assert_accurate(part, of_definition, factor=4.0)
    for grad, of_definition in zip(grads, exact, strict=True):
        assert_accurate(grad, of_definition, "gradient", factor=factor)


@pytest.mark.parametrize("student", ["logits", "head"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_numerical_gradients(backend: str, student: str, teacher: str, divergence: str) -> None:
    source = TEACHERS[teacher](torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        keywords: dict[str, Any] = {"divergence": divergence, "reduction": "none"}
        if len(tensors) == 1:
            return ik.distillation_loss(tensors[0], source, targets(), **keywords)
        features, weight, bias = tensors
        return ik.linear_distillation_loss(features, weight, source, targets(), bias, **keywords)

    leaves = [tensor.requires_grad_() for tensor in student_of(student, torch.float64)]
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("student", ["logits", "head"])
def test_all_classes_are_what_logits_give(
    backend: str, student: str, divergence: str, tail: str
) -> None:
    tensors, logits = student_of(student, torch.float64), torch.randn(ROWS, CLASSES).double()
    keywords = {"divergence": divergence, "temperature": 2.5}
    dense = call(ik, tensors, logits, targets(), **keywords)
    named = call(ik, tensors, top_k_of(logits, CLASSES, tail), targets(), **keywords)
    for part, of_logits in zip([*named[0], *named[1]], [*dense[0], *dense[1]], strict=True):
        assert_accurate(part, of_logits)


def by_hand(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """The forward KL of rows at a temperature of 1, with the other classes as one."""
    p, q = torch.softmax(student, 1), torch.softmax(teacher, 1)
    named = torch.zeros_like(p, dtype=torch.bool).scatter(1, kept, True)
    joined = [
        torch.cat([x.gather(1, kept), x.masked_fill(named, 0).sum(1, True)], 1) for x in (p, q)
    ]
    return F.kl_div(joined[0].log(), joined[1], reduction="none").sum(1)


def test_the_bucket_by_hand(backend: str) -> None:
    logits, of_teacher = torch.randn(2, ROWS, CLASSES, dtype=torch.float64)
    teacher = top_k_of(of_teacher, KEPT)
    keywords = {"temperature": 1.0, "reduction": "none", "return_parts": True}
    parts = ik.distillation_loss(logits, teacher, torch.arange(ROWS), **keywords)
    assert isinstance(parts, LossParts)
    assert_accurate(parts.kl, by_hand(logits, of_teacher, teacher.indices))


@given(
    seed=st.integers(0, 2**16),
    kept=st.integers(1, CLASSES),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.floats(0.1, 10),
    scale=st.floats(0.1, 20),
)
def test_the_bucket_is_never_negative(
    seed: int, kept: int, divergence: Any, temperature: float, scale: float
) -> None:
    """A divergence of two distributions is not; one of parts of distributions may be."""
    torch.manual_seed(seed)
    logits, of_teacher = scale * torch.randn(2, ROWS, CLASSES, dtype=torch.float64)
    parts = ik.distillation_loss(
        logits,
        top_k_of(of_teacher, kept),
        None,
        ce_weight=0.0,
        temperature=temperature,
        divergence=divergence,
        reduction="none",
        return_parts=True,
    )
    assert isinstance(parts, LossParts)
    assert (parts.kl > -1e-12 * (1 + scale / temperature)).all()


@pytest.mark.parametrize("student", ["logits", "head"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_missing_mass_of_zero_and_one(backend: str, student: str, dtype: torch.dtype) -> None:
    """All of the probability is among the classes that are named, more than all, or none of it."""
    tensors = student_of(student, dtype)
    indices = torch.stack([torch.randperm(CLASSES)[:2] for _ in range(ROWS)])
    log_probs = torch.tensor([[0.25, 0.75], [0.5, 0.5000001], [1, 0], [0, 0], [0.5, 0], [0, 1]])
    teacher = ik.TopKTeacher(indices, log_probs.log().to(dtype))
    parts, grads = call(ik, tensors, teacher, targets(), reduction="none", temperature=1.0)
    exact, of_definition = call(
        ik.reference, in_double(tensors), in_double(teacher), targets(), reduction="none",
        temperature=1.0,
    )  # fmt: skip
    for part, expected in zip([*parts, *grads], [*exact, *of_definition], strict=True):
        assert part.isfinite().all()
        assert_accurate(part, expected, factor=4.0)
    if student == "logits":
        p = torch.softmax(tensors[0].double(), 1)
        others = 1 - p[3].index_select(0, indices[3]).sum()
        torch.testing.assert_close(parts.kl[3].double(), -others.log(), rtol=1e-5, atol=1e-6)


def test_masked_classes_in_the_bucket(backend: str) -> None:
    logits = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    teacher = top_k_of(torch.randn(ROWS, CLASSES, dtype=torch.float64), KEPT)
    # One class of the bucket of the first row, all of the second's.
    named = torch.zeros(ROWS, CLASSES, dtype=torch.bool).scatter(1, teacher.indices, True)
    logits[0, int((~named[0]).nonzero()[0])] = -torch.inf
    logits[1].masked_fill_(~named[1], -torch.inf)
    target = teacher.indices[:, 0].contiguous()
    parts, grads = call(ik, (logits,), teacher, target, reduction="none")
    exact, of_definition = call(ik.reference, (logits,), teacher, target, reduction="none")
    assert parts.loss[[0, *range(2, ROWS)]].isfinite().all()
    for part, expected in zip([*parts, *grads], [*exact, *of_definition], strict=True):
        assert_accurate(part, expected)


@pytest.mark.parametrize("student", ["logits", "head"])
def test_classes_that_a_teacher_names_wrongly(student: str) -> None:
    tensors = student_of(student, torch.float32)
    log_probs = torch.full((ROWS, 2), -1.0)
    for bad in (-1, CLASSES, 1 << 40):
        indices = torch.tensor([[0, 1]] * (ROWS - 1) + [[0, bad]])
        with pytest.raises(IndexError, match=rf"teacher.indices holds {bad}, outside \[0, 9\)"):
            call(ik, tensors, ik.TopKTeacher(indices, log_probs), targets())
    with pytest.raises(ValueError, match="must name each class of a row once"):
        indices = torch.zeros(ROWS, 2, dtype=torch.int64)
        call(ik, tensors, ik.TopKTeacher(indices, log_probs), targets())
    with pytest.raises(ValueError, match="tail must be one of 'bucket', 'renormalize', got 'drop'"):
        call(ik, tensors, ik.TopKTeacher(indices, log_probs, "drop"), targets())


def test_teachers_of_sequences(backend: str) -> None:
    """``[B, L, …]`` as language models have them is the same as rows."""
    hidden, weight = torch.randn(2, 3, WIDTH), torch.randn(CLASSES, WIDTH)
    target = torch.tensor([[0, 1, -100], [4, -100, 2]])
    teachers: list[tuple[Teacher, Teacher]] = []
    logits = torch.randn(2, 3, CLASSES)
    teachers.append((logits, logits.flatten(0, 1)))
    of_head = torch.randn(2, 3, 7), torch.randn(CLASSES, 7)
    teachers.append(
        (ik.LinearTeacher(*of_head), ik.LinearTeacher(of_head[0].flatten(0, 1), of_head[1]))
    )
    top = top_k_of(logits, KEPT)
    flat = ik.TopKTeacher(top.indices.flatten(0, 1), top.log_probs.flatten(0, 1))
    teachers.append((top, flat))
    for of_sequences, of_rows in teachers:
        sequences = ik.linear_distillation_loss(
            hidden, weight, of_sequences, target, reduction="none", row_weight=torch.ones(2, 3)
        )
        rows = ik.linear_distillation_loss(
            hidden.flatten(0, 1), weight, of_rows, target.flatten(), reduction="none"
        )
        assert sequences.shape == (2, 3)
        torch.testing.assert_close(sequences.flatten(), rows)


def test_student_and_teacher_may_share_a_weight(backend: str) -> None:
    """The weight's gradient is the student's."""
    hidden, of_teacher = torch.randn(2, ROWS, WIDTH)
    weight = torch.randn(CLASSES, WIDTH, requires_grad=True)
    shared = ik.linear_distillation_loss(
        hidden, weight, ik.LinearTeacher(of_teacher, weight), targets()
    )
    (grad,) = torch.autograd.grad(shared, weight)
    copy = weight.detach().clone()
    apart = ik.linear_distillation_loss(
        hidden, weight, ik.LinearTeacher(of_teacher, copy), targets()
    )
    assert torch.equal(torch.autograd.grad(apart, weight)[0], grad)


def test_no_target_of_a_head(backend: str) -> None:
    features, weight, bias = student_of("head", torch.float32)
    parts = ik.linear_distillation_loss(
        features, weight, torch.zeros(ROWS, CLASSES), None, bias, ce_weight=0.0, return_parts=True
    )
    assert isinstance(parts, LossParts)
    assert parts.loss.isfinite()
    assert parts.ce.isnan()
    with pytest.raises(TypeError, match="target must be a torch.Tensor, got None"):
        ik.linear_distillation_loss(features, weight, torch.zeros(ROWS, CLASSES), None, bias)


def test_what_is_no_teacher() -> None:
    with pytest.raises(
        TypeError, match="teacher must be a torch.Tensor of logits, or an introkern"
    ):
        call(ik, student_of("logits", torch.float32), "gpt", targets())


class Products(TorchDispatchMode):
    """The rows of the products of matrices, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket._qualified_op_name == "aten::addmm":
            left, right = args[1:3]
            self.rows += left.shape[0] * left.shape[1] * right.shape[1] // (WIDTH * 5000)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ignored", [0, 300, 400])
def test_rows_that_are_ignored_are_left_out(ignored: int) -> None:
    """Of all four products, the teacher's among them; whatever these rows hold."""
    rows, classes = 400, 5000
    features, of_teacher = torch.randn(2, rows, WIDTH)
    weight = torch.randn(classes, WIDTH)
    target = torch.randint(classes, (rows,))
    target[torch.randperm(rows)[:ignored]] = -100
    features[target == -100] = torch.nan
    of_teacher[target == -100] = torch.nan
    features.requires_grad_()
    weight.requires_grad_()
    teacher = ik.LinearTeacher(of_teacher, weight.detach())
    with served_by(composite), Products() as products:
        loss = ik.linear_distillation_loss(features, weight, teacher, target, reduction="sum")
        loss.backward()
    assert products.rows == 4 * (rows - ignored)
    assert loss.isfinite()
    assert features.grad is not None
    assert torch.equal(features.grad.ne(0).any(1), target != -100)


def test_whatever_ignored_rows_hold(backend: str) -> None:
    logits = torch.randn(3, CLASSES, dtype=torch.float64)
    logits[1] = torch.nan
    indices = torch.tensor([[0, 1], [-1, -1], [2, 3]])
    log_probs = torch.tensor([[-1.0, -2.0], [torch.nan, torch.nan], [-0.5, -3.0]]).double()
    target = torch.tensor([0, -100, 2])
    for tail in ("bucket", "renormalize"):
        teacher = ik.TopKTeacher(indices, log_probs, tail)
        parts, grads = call(ik, (logits,), teacher, target)
        exact, of_definition = call(ik.reference, (logits,), teacher, target)
        for part, expected in zip([*parts, *grads], [*exact, *of_definition], strict=True):
            assert part.isfinite().all()
            assert_accurate(part, expected)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", ["logits", "head"])
def test_compiled(backend: str, student: str, teacher: str) -> None:
    tensors, source = student_of(student, torch.float32), TEACHERS[teacher](torch.float32)

    def loss(*leaves: Tensor) -> Tensor:
        if len(leaves) == 1:
            return ik.distillation_loss(leaves[0], source, target)
        features, weight, bias = leaves
        return ik.linear_distillation_loss(features, weight, source, target, bias)

    target = torch.arange(ROWS) % CLASSES
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, loss(*leaves))
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled, leaves), expected)


def test_statistics_need_a_class_and_a_matrix() -> None:
    stats = ik.ExplanationStats(torch.ones(12, 6), torch.ones(12, 6))
    with pytest.raises(ValueError, match="logits must be a matrix where teacher holds expl"):
        ik.distillation_loss(torch.zeros(2, 6, 3), stats, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="target must say which class was explained, got None"):
        ik.distillation_loss(torch.zeros(12, 6), stats, None, ce_weight=0.0)
    with pytest.raises(ValueError, match="target must say which class was explained, got None"):
        ik.linear_distillation_loss(
            torch.zeros(12, 4), torch.zeros(6, 4), stats, None, ce_weight=0.0
        )
