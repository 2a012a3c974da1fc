"""The operators: every contender computes what the definition says; bytes; inputs."""

from __future__ import annotations

import pytest
import torch
from bench_cases import DISTILLATION_CASE, TINY, in_dtype

import introkernels as ik
from introkernels.bench import accuracy
from introkernels.bench.contenders import CPP, EAGER, REFERENCE
from introkernels.bench.model import DTYPES, Case, Contender
from introkernels.bench.suites import SUITES

CONTENDERS = [EAGER, REFERENCE] + [CPP] * (ik.backends.status()["cpu"] == "loaded")
PAIRS = [
    pytest.param(case, contender, id=f"{case.operator.name}-{contender.name}")
    for case in TINY
    for contender in (*CONTENDERS, *case.operator.contenders)
    if contender.role != "floor"
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("case", "contender"), PAIRS)
def test_contenders_are_right(case: Case, contender: Contender, dtype: str) -> None:
    case = in_dtype(case, dtype)
    tensors = case.draw(seed=3)
    with contender.context():
        result = case.operator.run(contender.prepare(case.operator), tensors)
    found = case.operator.outcome(result, tensors)
    expected = accuracy.expected_outcome(case, tensors)
    assert found.keys() == expected.keys()
    errors = accuracy.errors(found, expected)
    assert accuracy.is_right(errors, accuracy.tolerances(found, expected)), errors


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.operator.name)
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
        # features 5*33 and weight 7*33, and a gradient of each; targets; loss
        ("head", "float32", 2 * (165 + 231) * 4 + 40 + 4),
    ],
)
def test_bytes_match_a_count_by_hand(operator: str, dtype: str, by_hand: int) -> None:
    (case,) = (case for case in TINY if case.operator.name == operator)
    assert in_dtype(case, dtype).bytes_moved == by_hand


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.operator.name)
def test_bytes_are_those_of_all_inputs_and_outputs(case: Case, dtype: str) -> None:
    case = in_dtype(case, dtype)
    tensors = case.draw(seed=0)
    result = case.operator.run(case.operator.compute, tensors)
    handed_out = case.operator.outcome(result, tensors).values()
    assert case.bytes_moved == sum(t.nbytes for t in (*tensors.values(), *handed_out))


def test_a_head_costs_five_products_of_matrices() -> None:
    (case,) = (case for case in TINY if case.operator.name == "head")
    assert case.flops == 5 * 2 * 5 * 7 * 33


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.operator.name)
def test_inputs_repeat_by_seed_and_are_nothing_special(case: Case) -> None:
    first, again, other = case.draw(seed=1), case.draw(seed=1), case.draw(seed=2)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
        if tensor.is_floating_point():
            assert tensor.isfinite().all()
            assert tensor.std() > 0
            assert tensor.requires_grad == (name in case.operator.differentiable)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_suites_are_consistent(suite: object) -> None:
    names = [case.name for case in suite.cases]
    assert len(set(names)) == len(names)
    for case in suite.cases:
        assert len(case.shape) == len(case.operator.dims)
        assert case.operator.dims[0] == "B"
        assert case.dtype in DTYPES
        contenders = [contender.name for contender in suite.contenders_of(case)]
        assert len(set(contenders)) == len(contenders)
        assert not {"sum", "read", "copy"} & set(contenders)
