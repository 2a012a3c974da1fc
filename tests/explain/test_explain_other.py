"""Another network's explanations: taken as its own would be, while it stays as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from explain_models import CLASSES, cnn, images, resnet, token_transformer, tokens
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import introkernels as ik
from introkernels.explain import METHODS, class_explanation_stats

ALL_METHODS = pytest.mark.parametrize("method", METHODS)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(41)


def state_of(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]


def assert_untouched(model: nn.Module, before: list[Tensor], flags: list[bool]) -> None:
    assert all(a.equal(b) for a, b in zip(state_of(model), before, strict=True))
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


@ALL_METHODS
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("explainer", ["gradient_x_input", "smoothgrad"])
def test_statistics_are_the_others_and_logits_the_models(
    method: Any, training: bool, explainer: str
) -> None:
    inputs, target = images()
    model, plain = cnn(), cnn()
    other = resnet().train(training)
    other[3].eval()
    before, flags = state_of(other), [module.training for module in other.modules()]
    keywords: dict[str, Any] = {"method": method, "explainer": explainer}
    _, expected = class_explanation_stats(
        resnet().eval(), inputs, target, generator=seeded(), **keywords
    )
    torch.manual_seed(5)
    logits, stats = class_explanation_stats(
        model, inputs, target, explained=other, generator=seeded(), **keywords
    )
    torch.testing.assert_close(stats.dots, expected.dots, rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.sq_norms, expected.sq_norms, rtol=1e-12, atol=0)
    # A training forward with its own dropout mask, statistics and graph, and no other.
    torch.manual_seed(5)
    assert logits.equal(plain(inputs))
    for name, value in plain.state_dict().items():
        assert model.state_dict()[name].equal(value), name
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_untouched(other, before, flags)


def test_the_explained_classes_are_the_others_own() -> None:
    inputs, target = images()
    _, expected = class_explanation_stats(resnet().eval(), inputs, target, top_k=2)
    _, own = class_explanation_stats(cnn().eval(), inputs, target, top_k=2)
    _, stats = class_explanation_stats(cnn(), inputs, target, explained=resnet(), top_k=2)
    assert stats.class_index is not None
    assert expected.class_index is not None
    assert own.class_index is not None
    assert stats.class_index.equal(expected.class_index)
    assert not stats.class_index.equal(own.class_index)


def test_the_model_itself_is_explained_in_eval_mode() -> None:
    """By the head too, which looks at the training forward where no other module is named."""
    inputs, target = images()
    for method in ("exact", "head"):
        model = cnn()
        _, expected = class_explanation_stats(cnn(), inputs, target, method=method, mode="eval")
        _, stats = class_explanation_stats(model, inputs, target, method=method, explained=model)
        torch.testing.assert_close(stats.dots, expected.dots)
        assert model.training


def trained(steps: int, average: AveragedModel, model: nn.Module, loss: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        average.update_parameters(model)


@ALL_METHODS
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_the_weights(method: Any, use_buffers: bool) -> None:
    inputs, target = images()
    model = cnn()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=use_buffers)
    objective = ik.IntrospectiveObjective(
        model, explained=average, method=method, generator=seeded(), kl_weight=0.5
    )
    assert objective.model is model
    assert objective.explained is average
    trained(3, average, model, lambda: objective(inputs, target))
    assert average.n_averaged == 3
    assert not next(average.parameters()).equal(next(model.parameters()))
    assert all(parameter.grad is None for parameter in average.parameters())

    alone = copy.deepcopy(average).eval()
    before, flags = state_of(average), [module.training for module in average.modules()]
    model.eval()
    keywords: dict[str, Any] = {"method": method, "generator": seeded()}
    _, stats = class_explanation_stats(alone, inputs, target, **keywords)
    objective = ik.IntrospectiveObjective(
        model, explained=average, method=method, generator=seeded(), kl_weight=0.5
    )
    expected = ik.similarity_loss(
        model(inputs), target, stats, kl_weight=0.5, similarity=objective.loss.similarity
    )
    found = objective(inputs, target)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    assert_untouched(average, before, flags)


def test_at_names_a_module_of_the_other() -> None:
    inputs, target = tokens()
    model = token_transformer()
    average = AveragedModel(model)
    _, expected = class_explanation_stats(model.eval(), inputs, target, at="embedding")
    objective = ik.IntrospectiveObjective(
        model, explained=average, method="exact", at="module.embedding"
    )
    torch.testing.assert_close(
        objective(inputs, target), ik.similarity_loss(model(inputs), target, expected)
    )
    with pytest.raises(ValueError, match=r"at must name .* such as 'module\.embedding'"):
        class_explanation_stats(model, inputs, target, explained=average, at="embedding")


def test_the_other_is_not_part_of_an_objective() -> None:
    model, other = cnn(), resnet()
    objective = ik.IntrospectiveObjective(model, explained=other)
    assert list(objective.parameters()) == []
    assert set(objective.state_dict()) == {"_extra_state"}
    assert not any(module is other for module in objective.modules())
    objective.eval()
    objective.requires_grad_(False)
    assert other.training
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert ik.IntrospectiveObjective(model).explained is model
    # Such a state may be loaded by an objective that explains another network, or none.
    ik.IntrospectiveObjective(model).load_state_dict(objective.state_dict())
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert isinstance(twin.explained[0], nn.Conv2d)
        assert twin.explained is not other


def test_a_bank_remembers_the_others_similarities() -> None:
    inputs, target = images()
    other = resnet().eval()
    banks = []
    for model, explained in ((cnn().eval(), other), (other, None)):
        objective = ik.IntrospectiveObjective(
            model, explained=explained, method="exact", bank_momentum=0.5
        )
        objective(inputs, target)
        banks.append(objective.bank)
    assert banks[0] is not None
    assert banks[1] is not None
    torch.testing.assert_close(banks[0], banks[1], rtol=1e-12, atol=0)


class Counting(nn.Module):
    """Writes to its buffer in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = cnn()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        assert isinstance(self.count, Tensor)
        self.count += 1
        return self.plain(inputs)


@ALL_METHODS
def test_buffers_that_its_forward_writes_stay(method: Any) -> None:
    inputs, target = images()
    other = Counting().eval()
    class_explanation_stats(cnn(), inputs, target, explained=other, method=method)
    assert other.count == 0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"explained": torch.sin},
            TypeError,
            r"explained must be a torch\.nn\.Module or None, got",
        ),
        (
            {"mode": "train"},
            ValueError,
            "mode must be 'auto' or 'eval' where another module is explained.*got 'train'",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs, target = images()
    keywords = {"explained": resnet(), **changes}
    with pytest.raises(error, match=message):
        class_explanation_stats(cnn(), inputs, target, **keywords)
    with pytest.raises(error, match=message):
        ik.IntrospectiveObjective(cnn(), **keywords)


@ALL_METHODS
def test_other_classes(method: Any) -> None:
    inputs, target = images()
    other = resnet(classes=CLASSES + 2)
    with pytest.raises(
        ValueError, match=r"explained must score the model's 5 classes, got logits float64\[6, 7\]"
    ):
        class_explanation_stats(cnn(), inputs, target, explained=other, method=method)


def test_a_lazy_module() -> None:
    inputs, target = images()
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES))
    with pytest.raises(ValueError, match="lazy parameter"):
        class_explanation_stats(cnn(), inputs, target, explained=lazy)
