"""Values at the ends of what the losses take: finite, and as accurate as anywhere else.

Where float64 itself would cancel, the oracle is arithmetic with 50 digits.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.bounds import bounds_of
from helpers.cases import (
    BUILDERS,
    HEADS,
    Case,
    distillation_case,
    introspective_case,
    linear_case,
    random_target,
    similarity_case,
)
from helpers.oracle import assert_follows_definition, defined, evaluate, exact_distillation
from helpers.tolerance import assert_accurate, assert_within
from torch import Tensor

import introkernels as ik

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_TYPES = (torch.bfloat16, torch.float16)
TEMPERATURES = (0.05, 1.0, 4.0, 100.0)

every_loss = pytest.mark.parametrize("loss", BUILDERS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)


def assert_finite(case: Case) -> None:
    """The oracle is finite, the backend is, and both agree."""
    result = assert_follows_definition(case)
    assert result.loss.isfinite().all()
    assert all(grad.isfinite().all() for grad in result.grads.values())


def assert_follows_exact(case: Case) -> None:
    """Hold a distillation case of reduction "none" against arithmetic with 50 digits."""
    result, bounds = evaluate(case), bounds_of(case, None)
    losses, grads = exact_distillation(case)
    assert_within(result.loss, losses, bounds.loss, "loss")
    assert_within(result.grads["logits"], grads, bounds.grads["logits"], "gradient")


def losses_of(logits: Tensor, target: Tensor, **keywords: float | str) -> list[Case]:
    """The two losses on given logits, with soft labels of ordinary size.

    Of labels like exp(-60), which weigh the divergence of huge logits, rounding ``t / T`` alone
    takes 60 units in the last place.
    """
    rows, classes = logits.shape
    temperature = keywords["temperature"]
    distillation = distillation_case(
        rows, classes, logits.dtype, scale=min(3.0, 3 * temperature), **keywords
    )
    similarity = similarity_case(
        rows, classes, logits.dtype, similarity_temperature=max(1.0, 1 / temperature), **keywords
    )
    explained = ik.reference.explanation_stats(
        torch.randn(rows, classes, 8, dtype=torch.float64),
        torch.randn(rows, 8, dtype=torch.float64),
        target,
    )
    return [
        distillation.with_tensors(logits=logits, target=target),
        similarity.with_tensors(
            logits=logits,
            target=target,
            dots=explained.dots.to(similarity["dots"].dtype),
            sq_norms=explained.sq_norms.to(similarity["dots"].dtype),
        ),
    ]


def spread_logits(largest: float, dtype: torch.dtype) -> Tensor:
    """Rows whose logits reach ``largest`` in size on either side."""
    return torch.tensor(
        [
            [largest, -largest, 0.0, 1.0, -1.0, largest / 2],
            [-largest] * 5 + [largest],
            [largest] * 6,
            [-largest] * 6,
            [largest, largest, largest / 3, -largest, 0.0, 0.0],
        ],
        dtype=torch.float64,
    ).to(dtype)


@every_dtype
@every_temperature
def test_gradients_of_logits_over_the_whole_range(
    backend: str, dtype: torch.dtype, temperature: float
) -> None:
    # The loss of such logits may well be infinite in its dtype. Its gradient is not.
    largest = min(torch.finfo(dtype).max, 1e300)
    logits = spread_logits(largest, dtype)
    for target in (torch.tensor([0, 5, 1, 2, 1]), torch.tensor([1, 0, 3, 4, 3])):
        for case in losses_of(logits, target, temperature=temperature, reduction="sum"):
            grad = evaluate(case).grads["logits"]
            assert grad.isfinite().all()
            assert_accurate(grad, defined(case).grads["logits"], case.function)


@every_dtype
@every_temperature
def test_losses_of_logits_over_the_representable_range(
    backend: str, dtype: torch.dtype, temperature: float
) -> None:
    # Losses of half types are float32, which holds all that float16 logits can give.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = min(torch.finfo(wide).max, 1e300) / (40 * max(temperature, 1 / temperature))
    logits = spread_logits(min(torch.finfo(dtype).max, bound), dtype)
    for target in (torch.tensor([0, 5, 1, 2, 1]), torch.tensor([1, 0, 3, 4, 3])):
        for reduction in ("none", "mean"):
            for case in losses_of(logits, target, temperature=temperature, reduction=reduction):
                assert_finite(case)


@every_dtype
def test_teacher_logits_over_the_whole_range(backend: str, dtype: torch.dtype) -> None:
    largest = min(torch.finfo(dtype).max, 1e300)
    case = distillation_case(5, 6, dtype, reduction="none", temperature=2.0)
    assert_finite(case.with_tensors(teacher_logits=spread_logits(largest, dtype)))


@every_dtype
@every_temperature
@pytest.mark.parametrize("loss", ["distillation_loss", "similarity_loss"])
def test_ordinary_logits_at_extreme_temperatures(
    backend: str, loss: str, dtype: torch.dtype, temperature: float
) -> None:
    for scale in (1.0, 30.0):
        assert_finite(
            BUILDERS[loss](6, 33, dtype, scale=scale, temperature=temperature, reduction="none")
        )


@every_dtype
@pytest.mark.parametrize("label_mode", ["softmax", "split"])
@pytest.mark.parametrize("similarity", ["cosine", "projection"])
def test_extreme_similarity_temperatures(
    backend: str, dtype: torch.dtype, similarity: str, label_mode: str
) -> None:
    for temperature, similarity_temperature in itertools.product(
        (0.05, 4.0, 100.0), (0.01, 1.0, 100.0)
    ):
        keywords = {
            "temperature": temperature,
            "similarity_temperature": similarity_temperature,
            "similarity": similarity,
            "label_mode": label_mode,
        }
        assert_finite(similarity_case(4, 9, dtype, **keywords))
        for builder in (introspective_case, linear_case):
            assert_finite(builder(4, 9, dtype, **keywords))


@every_dtype
@pytest.mark.parametrize("one_minus_p", [1e-3, 1e-9, 1e-12])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 5.0])
def test_cross_entropy_of_a_nearly_sure_row(
    backend: str, dtype: torch.dtype, temperature: float, one_minus_p: float
) -> None:
    # Both log(p) and p - 1 cancel, and may: they are held to the size of what they are made of.
    margin = math.log((1 - one_minus_p) / one_minus_p * 4)
    logits = torch.tensor([[0.0, margin, 0.0, 0.0, 0.0], [margin, 0.0, 0.0, 0.0, 0.0]]).to(dtype)
    case = distillation_case(
        2, 5, dtype, temperature=temperature, ce_weight=1.0, kl_weight=0.0, reduction="none"
    ).with_tensors(logits=logits, target=torch.tensor([1, 0]))
    assert_follows_exact(case)


def test_loss_of_a_surer_row_does_not_rise(backend: str) -> None:
    logits = torch.stack([torch.arange(1, 80, dtype=torch.float32), torch.zeros(79)], 1)
    case = distillation_case(79, 2, ce_weight=1.0, kl_weight=0.0, reduction="none")
    result = evaluate(case.with_tensors(logits=logits, target=torch.zeros(79, dtype=torch.int64)))
    assert (result.loss.diff() <= 0).all()
    assert (result.loss >= 0).all()
    assert (result.grads["logits"][:, 0] <= 0).all()


@every_dtype
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("temperature", [0.5, 3.0, 4.0])
@pytest.mark.parametrize("offset", [0.0, 1e5, -1e6])
def test_divergence_of_nearly_equal_distributions(
    backend: str, dtype: torch.dtype, distance: float, temperature: float, offset: float
) -> None:
    # Logits around 1/2 .. 2: the smallest differences that float32 holds are 1e-7 of them. Half
    # types have no neighbours as near, but their teacher may be float32. What all its logits have
    # in common is no distance, but has to be taken off without a loss.
    logits = (torch.rand(2, 39) + 0.5).to(dtype)
    teacher_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    teacher = logits.to(teacher_dtype) + distance * torch.randn(2, 39, dtype=teacher_dtype)
    case = Case(
        "distillation_loss",
        {"logits": logits, "teacher_logits": teacher + offset, "target": random_target(2, 39)},
        {"temperature": temperature, "ce_weight": 0.0, "kl_weight": 1.0, "reduction": "none"},
    )
    assert_follows_exact(case)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("gap", [10.0, 16.0, 20.0])
def test_divergence_where_both_sides_are_sure_of_one_class(
    backend: str, temperature: float, gap: float
) -> None:
    # There p and q are 1 but for e^-gap. Every class has its row: what a backend reads first has to
    # serve for classes that come later, too.
    classes = 41
    case = distillation_case(
        classes,
        classes,
        torch.float32,
        temperature=temperature,
        ce_weight=0.0,
        kl_weight=1.0,
        reduction="none",
    )
    moved = {}
    for name in ("logits", "teacher_logits"):
        sure = gap * temperature * torch.eye(classes)
        offset = 10 * torch.randn(classes, 1)
        moved[name] = (0.3 * temperature * torch.rand(classes, classes) + sure + offset).float()
    assert_follows_exact(case.with_tensors(**moved))


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, -1, -0x3FFFFF, 0x7FFFFFFF])
@pytest.mark.parametrize("name", ["logits", "teacher_logits"])
@pytest.mark.parametrize("classes", [5, 40])
def test_every_nan_spoils_its_row(backend: str, bits: int, name: str, classes: int) -> None:
    # NaN has many bit patterns, and torch makes one of them only.
    case = distillation_case(3, classes, torch.float32, temperature=2.0, reduction="none")
    for column in (int(case["target"][1]), (int(case["target"][1]) + 1) % classes):
        spoiled = case[name].clone()
        spoiled.view(torch.int32)[1, column] = bits
        assert spoiled.isnan().sum() == 1
        result = evaluate(case.with_tensors(**{name: spoiled}))
        assert result.loss.isnan().tolist() == [False, True, False]
        spoiled_grads = result.grads["logits"].isnan()
        assert spoiled_grads.all(1).tolist() == [False, True, False]
        assert spoiled_grads.any(1).tolist() == [False, True, False]


@every_dtype
def test_equal_distributions_have_no_divergence(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 9).to(dtype)
    case = distillation_case(5, 9, dtype, ce_weight=0.0, kl_weight=1.0, reduction="none")
    case = case.with_tensors(logits=logits, teacher_logits=logits.clone())
    assert (defined(case).loss.abs() < 1e-14).all()
    assert_follows_definition(case)


@every_dtype
@every_loss
def test_uniform_distributions(backend: str, loss: str, dtype: torch.dtype) -> None:
    case = BUILDERS[loss](4, 10, dtype, reduction="none")
    if loss in HEADS:
        case = case.with_tensors(
            weight=torch.zeros_like(case["weight"]), bias=torch.zeros_like(case["bias"])
        )
    else:
        case = case.with_tensors(logits=torch.full_like(case["logits"], 3.0))
    result = assert_follows_definition(case)
    assert_accurate(result.ce, torch.full((4,), math.log(10), dtype=torch.float64))


class TestDegenerateExplanations:
    """Explanations so short that their squares underflow, and those of no length."""

    KEYWORDS = pytest.mark.parametrize(
        ("similarity", "label_mode"),
        list(itertools.product(("cosine", "projection"), ("softmax", "split"))),
    )

    @KEYWORDS
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_explanations_around_1e_18(
        self, backend: str, dtype: torch.dtype, similarity: str, label_mode: str
    ) -> None:
        # |E|^2 = 1e-36 is a float32 number, the product of two of them is not.
        keywords = {"similarity": similarity, "label_mode": label_mode, "temperature": 1.0}
        case = introspective_case(4, 6, dtype, shape=(16,), **keywords)
        small = case.with_tensors(gradients=case["gradients"] * 1e-9, inputs=case["inputs"] * 1e-9)
        assert_finite(small)
        stats = ik.explanation_stats(small["gradients"], small["inputs"], small["target"])
        assert (stats.sq_norms > 0).all()
        assert_finite(
            Case(
                "similarity_loss",
                {
                    "logits": case["logits"],
                    "target": case["target"],
                    "dots": stats.dots,
                    "sq_norms": stats.sq_norms,
                    "stats_index": None,
                },
                keywords,
            )
        )
        # Twice as many binary places do not change what a cosine or a projection is.
        scaled = 2.0**-30
        same = case.with_tensors(
            gradients=case["gradients"] * scaled, inputs=case["inputs"] * scaled
        )
        assert_accurate(evaluate(same).loss, defined(case).loss, "loss")

    @KEYWORDS
    @every_dtype
    def test_explanations_that_underflow_give_numbers(
        self, backend: str, dtype: torch.dtype, similarity: str, label_mode: str
    ) -> None:
        keywords = {"similarity": similarity, "label_mode": label_mode}
        for size in (torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal ** 0.5, 1e-30):
            introspective = introspective_case(4, 6, dtype, **keywords)
            linear = linear_case(4, 6, dtype, **keywords)
            for case in (
                introspective.with_tensors(
                    gradients=introspective["gradients"] * size,
                    inputs=introspective["inputs"] * size,
                ),
                linear.with_tensors(
                    features=linear["features"] * size, weight=linear["weight"] * size
                ),
            ):
                result = evaluate(case)
                assert result.loss.isfinite()
                assert all(grad.isfinite().all() for grad in result.grads.values())

    @KEYWORDS
    @every_dtype
    def test_no_explanation_is_like_the_target_and_the_target_is_like_itself(
        self, backend: str, dtype: torch.dtype, similarity: str, label_mode: str
    ) -> None:
        keywords = {
            "similarity": similarity,
            "label_mode": label_mode,
            "temperature": 1.0,
            "similarity_temperature": 0.5,
        }
        case = introspective_case(4, 6, dtype, **keywords, reduction="none")
        nothing = case.with_tensors(inputs=torch.zeros_like(case["inputs"]))
        assert_finite(nothing)
        is_target = F.one_hot(case["target"], 6).bool()
        s = is_target.double()
        split = label_mode == "split"
        q = 0.9 * s + 0.1 / 5 * (1 - s) if split else torch.softmax(s / 0.5, 1)
        kl = F.kl_div(F.log_softmax(case["logits"].double(), 1), q, reduction="none").sum(1)
        assert_accurate(evaluate(nothing).kl, kl, "kl")

    @every_dtype
    def test_a_class_or_a_target_without_explanation(
        self, backend: str, dtype: torch.dtype
    ) -> None:
        case = introspective_case(4, 6, dtype, reduction="none", temperature=1.0)
        gradients = case["gradients"].clone()
        rows = torch.arange(4)
        gradients[rows, (case["target"] + 1) % 6] = 0
        gradients[3, case["target"][3]] = 0
        assert_finite(case.with_tensors(gradients=gradients))

    @pytest.mark.parametrize("similarity", ["cosine", "projection"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_statistics_of_no_length(
        self, backend: str, dtype: torch.dtype, similarity: str
    ) -> None:
        case = similarity_case(4, 6, dtype, similarity=similarity, reduction="none")
        dots, sq_norms = case["dots"].clone(), case["sq_norms"].clone()
        other = (case["target"][0] + 1) % 6
        dots[0, other] = sq_norms[0, other] = 0
        dots[1], sq_norms[1, case["target"][1]] = 0, 0
        dots[2], sq_norms[2] = 0, 0
        assert_finite(case.with_tensors(dots=dots, sq_norms=sq_norms))

    @every_dtype
    def test_features_of_zeros(self, backend: str, dtype: torch.dtype) -> None:
        case = linear_case(4, 6, dtype, reduction="none")
        assert_finite(case.with_tensors(features=torch.zeros_like(case["features"])))
        assert_finite(case.with_tensors(weight=torch.zeros_like(case["weight"])))

    @pytest.mark.parametrize("similarity", ["cosine", "projection"])
    def test_similarities_beyond_one_are_clamped(self, backend: str, similarity: str) -> None:
        case = similarity_case(
            3, 5, torch.float64, similarity=similarity, temperature=1.0, reduction="none"
        )
        target = case["target"]
        dots = torch.tensor([7.0, -7.0, 1e30, -1e30, 0.5], dtype=torch.float64).repeat(3, 1)
        sq_norms = torch.ones(3, 5, dtype=torch.float64)
        clamped = dots.clamp(-1, 1)
        teacher = clamped.scatter(1, target[:, None], 1.0)
        distilled = Case(
            "distillation_loss",
            {"logits": case["logits"], "teacher_logits": teacher, "target": target},
            {"temperature": 1.0, "reduction": "none"},
        )
        result = evaluate(case.with_tensors(dots=dots, sq_norms=sq_norms))
        assert_accurate(result.loss, evaluate(distilled).loss, "loss")
        assert_accurate(result.grads["logits"], evaluate(distilled).grads["logits"], "gradient")


class TestNothingToReduce:
    """Empty batches and batches of ignored rows, as torch treats them."""

    @every_loss
    @every_dtype
    def test_no_rows(self, backend: str, loss: str, dtype: torch.dtype) -> None:
        theirs = F.cross_entropy(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))
        assert theirs.isnan()
        for reduction, expected in (
            ("mean", torch.tensor(float("nan"))),
            ("sum", torch.tensor(0.0)),
            ("none", torch.empty(0)),
        ):
            result = evaluate(BUILDERS[loss](0, 5, dtype, reduction=reduction))
            for part in (result.loss, result.ce, result.kl):
                assert_accurate(part, expected.double(), reduction)
            for name, grad in result.grads.items():
                # Sums over no rows.
                assert (grad == 0).all(), name

    @every_loss
    @every_dtype
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_all_rows_ignored(
        self, backend: str, loss: str, dtype: torch.dtype, reduction: str
    ) -> None:
        case = BUILDERS[loss](4, 5, dtype, ignored=4, reduction=reduction, class_weights=True)
        result = evaluate(case)
        for part in (result.loss, result.ce, result.kl):
            assert part.isnan().all() if reduction == "mean" else (part == 0).all()
        for name, grad in result.grads.items():
            assert (grad == 0).all(), name

    @every_loss
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_class_weights_of_zero(self, backend: str, loss: str, reduction: str) -> None:
        case = BUILDERS[loss](4, 5, torch.float64, reduction=reduction, class_weights=True)
        name = "class_weight" if loss in HEADS else "weight"
        weight = case[name].clone()
        weight[case["target"][0]] = 0
        assert_follows_definition(case.with_keywords(**{name: weight}))
        nothing = evaluate(case.with_keywords(**{name: torch.zeros(5).double()}))
        if reduction == "mean":
            # 0 / 0, as F.cross_entropy has it.
            assert nothing.ce.isnan()
        else:
            assert (nothing.ce == 0).all()

    @every_loss
    @pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
    def test_a_mean_over_targets_of_weight_zero_is_that_of_torch(
        self, backend: str, loss: str, label_smoothing: float
    ) -> None:
        """Smoothing gives these rows a cross entropy, and there is no weight to divide it by."""
        case = BUILDERS[loss](
            *(4, 5, torch.float64),
            ignored=1,
            class_weights=True,
            label_smoothing=label_smoothing,
            ce_weight=1.0,
            kl_weight=0.0,
        )
        name = "class_weight" if loss in HEADS else "weight"
        weight = case[name].clone()
        weight[case["target"][case["target"] >= 0]] = 0
        case = case.with_keywords(**{name: weight})

        leaves = {leaf: case[leaf].clone().requires_grad_() for leaf in case.differentiable}
        logits = leaves["logits"] if "logits" in leaves else F.linear(*leaves.values())
        theirs = F.cross_entropy(logits, case["target"], weight, label_smoothing=label_smoothing)
        theirs.backward()
        ours = evaluate(case)
        torch.testing.assert_close(ours.loss, theirs.detach(), equal_nan=True)
        for leaf, tensor in leaves.items():
            torch.testing.assert_close(ours.grads[leaf], tensor.grad, equal_nan=True)
        # What is switched off can't spoil the rest.
        kept = evaluate(case.with_keywords(ce_weight=0.0, kl_weight=1.0))
        assert kept.loss.isfinite()
        assert all(grad.isfinite().all() for grad in kept.grads.values())
