"""What the shared tests can't ask of the loss kernels: far offsets, and targets unchecked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.cases import BUILDERS, Case, distillation_case
from helpers.far import far_apart
from helpers.oracle import assert_follows_definition, evaluate

import introkernels as ik
from introkernels import checks
from introkernels.ops.triton import losses


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with ik.use_backend("triton"):
        yield


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["logits", "teacher_logits"])
def test_distillation_of_far_rows_and_classes(name: str, dim: int) -> None:
    case = distillation_case(3, 3, torch.bfloat16, reduction="none")
    assert_follows_definition(case.with_tensors(**{name: far_apart(case[name], dim)}))


def test_far_class_weights() -> None:
    case = distillation_case(
        5, 3, torch.bfloat16, class_weights=True, label_smoothing=0.1, reduction="none"
    )
    assert_follows_definition(case.with_keywords(weight=far_apart(case["weight"], 0)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_more_programs_than_the_last_one_adds_up_at_once(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "SUMS_OF_A_THREAD", 1)
    # 43 programs of two rows, whose last one adds up 32 at once.
    tile = losses.Tiles(lanes=1, vector=1, rows=2, chunks=4, num_warps=1)
    monkeypatch.setattr(losses, "tiles", lambda *arguments: tile)
    case = distillation_case(85, 3, ignored=9, class_weights=True, reduction=reduction)
    assert_follows_definition(case)


def with_targets_outside(case: Case) -> Case:
    """The case with rows 1 and 3 of unknown classes, and row 4 ignored."""
    target = case["target"].clone()
    target[1], target[3], target[4] = 1 << 40, -1, -100
    return case.with_tensors(target=target)


@pytest.mark.parametrize("loss", BUILDERS)
@pytest.mark.parametrize("class_weights", [False, True])
def test_target_that_is_no_class_spoils_its_row_alone(
    loss: str, class_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nobody has checked it: nothing is read outside of any tensor."""
    case = BUILDERS[loss](6, 7, reduction="none", class_weights=class_weights)
    outside = with_targets_outside(case)
    others = case.with_tensors(
        target=outside["target"].clamp(-100, 6).where(outside["target"] != -1, 0)
    )
    monkeypatch.setattr(checks, "values_are_readable", lambda tensor: False)
    result, clean = evaluate(outside), evaluate(others)
    bad, good = [1, 3], [0, 2, 5]
    for part in ("loss", "ce", "kl"):
        actual = getattr(result, part)
        assert actual[bad].isnan().all(), part
        assert torch.equal(actual[good], getattr(clean, part)[good]), part
        assert actual[4] == 0, part
    name = case.differentiable[0]
    grad = result.grads[name]
    assert grad[bad].isnan().all()
    assert torch.equal(grad[good], clean.grads[name][good])
    assert not grad[4].any()
    reduced = evaluate(outside.with_keywords(reduction="mean"))
    assert reduced.loss.isnan()


@pytest.mark.parametrize("loss", ["similarity_loss", "introspective_loss"])
@pytest.mark.parametrize("entry", ["target missing", "class beyond", "class below"])
def test_explained_classes_that_do_not_fit_spoil_their_row_alone(
    loss: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BUILDERS[loss](4, 7, explained=3, reduction="none")
    name = "stats_index" if loss == "similarity_loss" else "class_index"
    index, target = case[name].clone(), case["target"]
    if entry == "target missing":
        index[2] = torch.tensor([c for c in range(7) if c != target[2]][:3])
    else:
        other = int((index[2] != target[2]).nonzero()[0, 0])
        index[2, other] = 1 << 40 if entry == "class beyond" else -1
    changed = (
        case.with_tensors(stats_index=index)
        if loss == "similarity_loss"
        else case.with_keywords(class_index=index)
    )
    clean = evaluate(case)
    monkeypatch.setattr(checks, "values_are_readable", lambda tensor: False)
    result = evaluate(changed)
    assert result.loss.isnan().tolist() == [False, False, True, False]
    assert result.grads["logits"].isnan().all(1).tolist() == [False, False, True, False]
    good = [0, 1, 3]
    assert torch.equal(result.loss[good], clean.loss[good])
    assert torch.equal(result.grads["logits"][good], clean.grads["logits"][good])
