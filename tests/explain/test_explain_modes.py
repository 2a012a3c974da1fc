"""Which forward passes a call makes, and in which state of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explain_models import CLASSES, assert_close, cnn, dense_explanations, dense_stats, images
from torch import Tensor, nn

from introkernels import ExplanationStats
from introkernels.explain import METHODS, class_explanation_stats, similarities

PRODUCTS = {"exact": 0, "projection": 1, "sketch": 3, "head": 0}
"""Passes for Jacobian-vector products, with 2 probes."""


def passes(model: nn.Module, **keywords: Any) -> list[bool]:
    """Whether the model was in training mode, for each forward pass of a call."""
    inputs, target = images()
    found: list[bool] = []
    handle = model.register_forward_hook(lambda module, *_: found.append(module.training))
    class_explanation_stats(model, inputs, target, probes=2, **keywords)
    handle.remove()
    return found


def plain() -> nn.Sequential:
    """A model that is the same in both modes; training."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.LayerNorm([4, 4, 4]), nn.Flatten(), nn.Linear(64, CLASSES)
    ).double()


@pytest.mark.parametrize("method", METHODS)
def test_mode_train_explains_the_training_forward(method: Any) -> None:
    assert passes(plain(), method=method, mode="train") == [True] * (1 + PRODUCTS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [plain, cnn])
def test_mode_eval_takes_a_pass_of_its_own(make: Callable[[], nn.Module], method: Any) -> None:
    expected = [False] * (1 + PRODUCTS[method]) + [True]
    assert passes(make(), method=method, mode="eval") == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["auto", "eval", "train"])
def test_a_model_in_eval_mode_is_shared_too(method: Any, mode: Any) -> None:
    assert passes(cnn().eval(), method=method, mode=mode) == [False] * (1 + PRODUCTS[method])


def test_by_default_only_head_explains_the_training_forward() -> None:
    assert passes(cnn(), method="exact") == [False, True]
    assert passes(cnn(), method="head") == [True]
    assert passes(cnn(), method="exact", mode="train") == [True]


def test_one_module_in_training_mode_is_enough_for_a_pass_of_its_own() -> None:
    model = cnn().eval()
    assert len(passes(model, mode="eval")) == 1
    model[3].train()
    assert len(passes(model, mode="eval")) == 2
    assert model[3].training


def dropped(module: nn.Module, inputs: Tensor) -> Tensor:
    """A helper in which a module's own code doesn't name its flag."""
    return F.dropout(inputs, 0.5, module.training)


class InForward(nn.Flatten):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.dropout(super().forward(inputs), 0.5, self.training)


class InHelper(nn.Flatten):
    def forward(self, inputs: Tensor) -> Tensor:
        return dropped(self, super().forward(inputs))


class InFunctional(nn.Flatten):
    """Has the function that its forward calls from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.last_step: Callable[[Tensor], Tensor] = lambda inputs: dropped(self, inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last_step(super().forward(inputs))


def patched() -> nn.Module:
    model = nn.Flatten()
    original = model.forward
    model.forward = lambda inputs: dropped(model, original(inputs))  # type: ignore[method-assign]
    return model


def hooked() -> nn.Module:
    model = nn.Flatten()
    model.register_forward_hook(lambda module, _, output: dropped(module, output))
    return model


@pytest.mark.parametrize("make", [InForward, InHelper, InFunctional, patched, hooked])
@pytest.mark.parametrize("method", METHODS)
def test_mode_eval_has_no_dropout_wherever_the_flag_is_read(
    make: Callable[[], nn.Module], method: Any
) -> None:
    inputs, target = images()
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(72, CLASSES)).double()

    def explained() -> tuple[Tensor, ExplanationStats]:
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2) if method == "sketch" else None
        return class_explanation_stats(
            model, inputs, target, method=method, mode="eval", generator=generator
        )

    model.eval()
    plain_logits, wanted = explained()
    model.train()
    logits, stats = explained()
    torch.manual_seed(1)
    assert logits.equal(model(inputs))
    assert not logits.equal(plain_logits)
    assert stats.dots.equal(wanted.dots)
    assert stats.sq_norms.equal(wanted.sq_norms)


def test_a_shared_pass_gives_the_explanation_and_the_training_graph() -> None:
    inputs, target = images()
    model, reference = plain(), plain()
    expected = reference(inputs)
    F.cross_entropy(expected, target).backward()
    for method in METHODS:
        logits, stats = class_explanation_stats(model, inputs, target, method=method, mode="train")
        assert logits.equal(expected)
        model.zero_grad()
        F.cross_entropy(logits, target).backward()
        for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
            assert got.grad is not None
            assert got.grad.equal(wanted.grad)
        if method != "head":
            dense = dense_stats(dense_explanations(model, inputs), target)
            assert_close(stats._replace(sq_norms=dense.sq_norms), dense, 1e-12)


def test_products_of_the_training_forward_see_its_dropout_mask() -> None:
    inputs, target = images()
    model = nn.Sequential(nn.Dropout(0.5), plain(), nn.Dropout(0.3))
    found = {}
    for method in ("exact", "projection", "sketch"):
        torch.manual_seed(4)
        found[method] = class_explanation_stats(
            model, inputs, target, method=method, mode="train", probes=64
        )
    logits, exact = found["exact"]
    for method in ("projection", "sketch"):
        assert found[method][0].equal(logits)
        assert_close(found[method][1]._replace(sq_norms=exact.sq_norms), exact, 1e-12)


class WithoutRunningStatistics(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(2, track_running_stats=False), plain())


class CentredBatch(nn.Module):
    """Mixes the rows of a batch, and has no layer that is known to."""

    def forward(self, inputs: Tensor) -> Tensor:
        logits = inputs.flatten(1)[:, :CLASSES]
        return (logits - logits.mean(0)).exp()


@pytest.mark.parametrize("method", ["projection", "sketch"])
@pytest.mark.parametrize(
    ("make", "mode", "message"),
    [
        (
            cnn,
            "train",
            "BatchNorm2d '1' computes with the statistics of the batch: use mode='eval'",
        ),
        (WithoutRunningStatistics, "eval", "BatchNorm2d '0' computes with the statistics"),
        (CentredBatch, "eval", "must depend on that row alone.*method='exact'"),
    ],
)
def test_rows_that_are_coupled_are_refused(
    method: Any, make: Callable[[], nn.Module], mode: Any, message: str
) -> None:
    inputs, target = images()
    model = make().double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        class_explanation_stats(model, inputs, target, method=method, mode=mode)
    for name, value in before.items():
        assert model.state_dict()[name].equal(value), name
    class_explanation_stats(model, inputs, target, mode=mode)


STATS = ExplanationStats(
    torch.tensor([[4.0, 3.0, -8.0, 0.0], [0.5, 1.0, 0.0, 2.0]]),
    torch.tensor([[4.0, 9.0, 16.0, 0.0], [4.0, 1.0, 0.0, 1.0]]),
)


def test_similarities_by_hand() -> None:
    target = torch.tensor([0, 1])
    cosine = similarities(STATS, target)
    # 3 / (3 * 2), and -8 / (4 * 2); a norm of zero is like nothing; 2 / 1 is clamped.
    assert cosine.tolist() == [[1, 0.5, -1, 0], [0.25, 1, 0, 1]]
    projection = similarities(STATS, target, similarity="projection")
    assert projection.tolist() == [[1, 0.75, -1, 0], [0.5, 1, 0, 1]]
    assert cosine.dtype == projection.dtype == torch.float32


def test_similarities_of_chosen_classes_stand_in_their_columns() -> None:
    index = torch.tensor([[2, 0, 5, 1], [3, 7, 0, 1]])
    target = torch.tensor([2, 7])
    found = similarities(STATS._replace(class_index=index), target)
    assert found.equal(similarities(STATS, torch.tensor([0, 1])))


def test_similarities_are_the_teacher_of_the_soft_labels() -> None:
    inputs, target = images()
    _, stats = class_explanation_stats(cnn(), inputs, target, top_k=3)
    found = similarities(stats, target)
    explanations = dense_explanations(cnn(), inputs)
    assert stats.class_index is not None
    own = explanations[torch.arange(len(target)), target]
    cosines = torch.cosine_similarity(explanations, own[:, None], dim=2)
    torch.testing.assert_close(found, cosines.gather(1, stats.class_index), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"similarity": "angle"}, ValueError, "similarity must be one of 'cosine', 'projection'"),
        ({"target": torch.tensor([0])}, ValueError, r"target must have shape \[2\]"),
        ({"target": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "target must be int64"),
        ({"stats": STATS.dots}, TypeError, "stats must be"),
    ],
)
def test_similarities_refuse(changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        similarities(**({"stats": STATS, "target": torch.tensor([0, 1])} | changes))
