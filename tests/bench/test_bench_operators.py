"""The operators: every contender computes what the definition says; bytes; inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bench_cases import DISTILLATION_CASE, TINY, in_dtype
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import introkernels as ik
from introkernels.bench import accuracy
from introkernels.bench.contenders import CPP, EAGER, REFERENCE
from introkernels.bench.model import Case, Contender, Suite
from introkernels.bench.operators.distillation import DISTILLATION
from introkernels.bench.operators.explanations import EXPLANATIONS
from introkernels.bench.operators.linear_losses import HEAD_CROSS_ENTROPY, HEAD_DIVERGENCE
from introkernels.bench.operators.network import Network
from introkernels.bench.operators.row_losses import (
    CONFIDENT_FORWARD,
    DISTILLATION_BACKWARD,
    DISTILLATION_FORWARD,
    SIMILARITY_BACKWARD,
    SIMILARITY_FORWARD,
    TOP_PROBABILITY,
)

CONTENDERS = (EAGER, REFERENCE) + (CPP,) * (ik.backends.status()["cpu"] == "loaded")
HALF_TYPES = (
    *(case for case in TINY if case is not DISTILLATION_CASE),
    Case(DISTILLATION, "tiny", "a tiny case", (5, 7)),
    Case(HEAD_CROSS_ENTROPY, "tiny", "a tiny case", (5, 7, 33)),
    Case(HEAD_DIVERGENCE, "tiny", "a tiny case", (5, 7, 33)),
    Case(DISTILLATION_FORWARD, "tiny", "a tiny case", (5, 7)),
    Case(DISTILLATION_BACKWARD, "tiny", "a tiny case", (5, 7)),
    Case(SIMILARITY_FORWARD, "tiny", "a tiny case", (5, 7)),
    Case(CONFIDENT_FORWARD, "tiny", "a tiny case", (5, 7)),
)
# Its bytes are not those of its inputs: statistics are read in the forward.
SIMILARITY_BACK = Case(SIMILARITY_BACKWARD, "tiny", "a tiny case", (5, 7))
EXPLAINED = Case(EXPLANATIONS, "tiny", "a tiny case", (5, 7, 9))
CASES = (*HALF_TYPES, SIMILARITY_BACK, EXPLAINED)
# Convolutions in a half type round as they like.
DTYPES_OF = dict.fromkeys(CASES, ("float32", "bfloat16", "float16")) | {EXPLAINED: ("float32",)}
TRIPLES = [
    pytest.param(case, contender, dtype, id=f"{case.operator.name}-{contender.name}-{dtype}")
    for case in CASES
    for contender in Suite("tiny", CASES, CONTENDERS).contenders_of(case)
    for dtype in DTYPES_OF[case]
    if contender.role != "floor" and contender.missing() is None
]


@pytest.mark.parametrize(("case", "contender", "dtype"), TRIPLES)
def test_contenders_are_right(case: Case, contender: Contender, dtype: str) -> None:
    if contender.name == "orda" and dtype != "float32":
        pytest.skip("it rounds logits to the half type: refused, as it should be")
    case = in_dtype(case, dtype)
    tensors = case.draw(seed=3)
    with contender.context():
        result = case.operator.run(contender.prepare(case.operator), tensors)
    found = case.operator.outcome(result, tensors)
    expected = accuracy.expected_outcome(case, tensors)
    assert found.keys() == expected.keys()
    errors = accuracy.errors(found, expected)
    assert accuracy.is_right(errors, accuracy.tolerances(found, expected)), errors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator.name)
def test_the_definition_row_by_row_is_the_definition(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = case.draw(seed=4)
    whole = accuracy.expected_outcome(case, tensors)
    monkeypatch.setattr(accuracy, "_NUMBERS_AT_ONCE", 1)
    for name, value in accuracy.expected_outcome(case, tensors).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-15)


def test_the_expected_loss_is_the_public_one_in_float64() -> None:
    tensors = DISTILLATION_CASE.draw(seed=5)
    expected = accuracy.expected_outcome(DISTILLATION_CASE, tensors)
    exact = [
        tensor.detach().double() if tensor.is_floating_point() else tensor
        for tensor in tensors.values()
    ]
    torch.testing.assert_close(expected["loss"], ik.distillation_loss(*exact), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("operator", "dtype", "by_hand"),
    [
        # gradients 5*7*33, inputs 5*33, logits 5*7; targets 5*8; loss 4
        ("introspective", "float32", (1155 + 165 + 35) * 4 + 40 + 4),
        ("introspective", "bfloat16", (1155 + 165 + 35) * 2 + 40 + 4),
        # gradients, inputs; targets; two statistics of 5*7 classes
        ("statistics", "float32", (1155 + 165) * 4 + 40 + 280),
        # logits, teacher's logits, gradient; targets; loss
        ("distillation", "float32", 3 * 35 * 4 + 40 + 4),
        ("distillation", "bfloat16", 3 * 35 * 2 + 40 + 4),
        # logits and gradient; two float32 statistics; targets; loss
        ("similarity", "float32", 2 * 35 * 4 + 2 * 35 * 4 + 40 + 4),
        ("similarity", "bfloat16", 2 * 35 * 2 + 2 * 35 * 4 + 40 + 4),
        # logits, teacher's logits; targets; loss, or the gradient
        ("distillation-forward", "bfloat16", 2 * 35 * 2 + 40 + 4),
        ("distillation-backward", "bfloat16", 3 * 35 * 2 + 40),
        # logits and two float32 statistics, or their teacher logits and the gradient
        ("similarity-forward", "bfloat16", 35 * 2 + 2 * 35 * 4 + 40 + 4),
        ("similarity-backward", "bfloat16", 2 * 35 * 2 + 35 * 4 + 40),
        # features 5*33 and weight 7*33, and a gradient of each; targets; loss
        ("head", "float32", 2 * (165 + 231) * 4 + 40 + 4),
        ("head-ce", "bfloat16", 2 * (165 + 231) * 2 + 40 + 4),
        # features and weight, a gradient of each, the teacher's features and weight
        ("head-kl", "float32", 3 * (165 + 231) * 4 + 40 + 4),
        # images 5*3*9*9; weights 16*3*9, 32*16*9 and 7*32; targets; two statistics of 5*7 classes
        ("explanations", "float32", (1215 + 432 + 4608 + 224) * 4 + 40 + 280),
    ],
)
def test_bytes_match_a_count_by_hand(operator: str, dtype: str, by_hand: int) -> None:
    (case,) = (case for case in CASES if case.operator.name == operator)
    assert in_dtype(case, dtype).bytes_moved == by_hand


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", HALF_TYPES, ids=lambda case: case.operator.name)
def test_bytes_are_those_of_all_inputs_and_outputs(case: Case, dtype: str) -> None:
    case = in_dtype(case, dtype)
    tensors = case.draw(seed=0)
    result = case.operator.run(case.operator.compute, tensors)
    handed_out = case.operator.outcome(result, tensors).values()
    assert case.bytes_moved == sum(t.nbytes for t in (*tensors.values(), *handed_out))


def test_confident_rows_are_sure_of_their_targets() -> None:
    tensors = Case(CONFIDENT_FORWARD, "tiny", "a tiny case", (5, 700)).draw(seed=0)
    for name in ("logits", "teacher_logits"):
        top, where = tensors[name].softmax(1).max(1)
        torch.testing.assert_close(top, torch.full((5,), TOP_PROBABILITY))
        assert torch.equal(where, tensors["target"])


@pytest.mark.skipif(ik.backends.status()["cpu"] != "loaded", reason="needs two backends")
def test_a_backward_alone_makes_its_forward_once_for_each_backend() -> None:
    case = Case(DISTILLATION_BACKWARD, "tiny", "a tiny case", (5, 7))
    tensors = case.draw(seed=0)
    compute = DISTILLATION_BACKWARD.compute
    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace.startswith("introkernels"):
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Seen():
        for backend in ("cpu", "composite", "cpu"):
            with ik.use_backend(backend):
                compute(*tensors.values())
    assert seen == [
        "introkernels.row_loss_forward.default",
        "introkernels.row_loss_backward.default",
        "introkernels_composite.row_loss_forward.default",
        "introkernels_composite.row_loss_backward.default",
        "introkernels.row_loss_backward.default",
    ]


def test_a_head_costs_five_products_of_matrices() -> None:
    (case,) = (case for case in TINY if case.operator.name == "head")
    assert case.flops == 5 * 2 * 5 * 7 * 33


@pytest.mark.parametrize(("operator", "products"), [("head-ce", 3), ("head-kl", 4)])
def test_other_losses_of_a_head_cost_fewer_products(operator: str, products: int) -> None:
    (case,) = (case for case in CASES if case.operator.name == operator)
    assert case.flops == products * 2 * 5 * 7 * 33


@pytest.mark.parametrize("side", [8, 9])
def test_explanations_cost_the_convolutions_once_and_once_for_each_class(side: int) -> None:
    case = Case(EXPLANATIONS, "tiny", "a tiny case", (5, 7, side))
    tensors = case.draw(seed=0)
    network = Network(tensors["conv1"], tensors["conv2"], tensors["head"])
    with FlopCounterMode(display=False) as counter:
        network(tensors["images"])
    forward = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert case.flops == (1 + 7) * forward


def test_explanations_of_a_linear_network_are_those_of_its_head() -> None:
    """Without negative numbers rectifiers do nothing: the gradient is a product of matrices."""
    tensors = {name: tensor.abs() for name, tensor in EXPLAINED.draw(seed=6).items()}
    tensors = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    images, target, head = tensors["images"], tensors["target"], tensors["head"]
    network = Network(tensors["conv1"], tensors["conv2"], torch.eye(32, dtype=torch.float64))
    pixels = torch.eye(images[0].numel(), dtype=torch.float64).view(-1, *images.shape[1:])
    gradients = (network(pixels) @ head.T).T.view(len(head), *images.shape[1:])
    explanations = (gradients * images[:, None]).flatten(2)
    dots = torch.stack([one @ one[label] for one, label in zip(explanations, target, strict=True)])
    found = EXPLAINED.operator.definition(*tensors.values())
    torch.testing.assert_close(found[0], dots)
    torch.testing.assert_close(found[1], explanations.square().sum(-1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.operator.name)
def test_inputs_repeat_by_seed_and_are_nothing_special(case: Case) -> None:
    first, again, other = case.draw(seed=1), case.draw(seed=1), case.draw(seed=2)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        if tensor.is_floating_point():
            assert tensor.isfinite().all()
            assert tensor.std() > 0
            assert tensor.requires_grad == (name in case.operator.differentiable)
