"""What an objective remembers from step to step: random numbers, and a bank for what it holds."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from explain_models import CLASSES, cnn, images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import introkernels as ik
from introkernels.explain import class_explanation_stats


def make(**keywords: Any) -> ik.IntrospectiveObjective:
    """An objective of a model whose losses change with the explanation alone."""
    model = cnn().eval()
    torch.manual_seed(5)
    return ik.IntrospectiveObjective(model, **({"probes": 2} | keywords))


def losses(objective: ik.IntrospectiveObjective, steps: int) -> list[Tensor]:
    return [objective(*images()).detach() for _ in range(steps)]


@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("generator_given", [False, True])
@pytest.mark.parametrize(
    "keywords",
    [{}, {"method": "exact", "explainer": "smoothgrad"}, {"bank_momentum": 0.5}],
    ids=str,
)
def test_random_numbers_go_on_from_a_saved_state(
    stop: int, generator_given: bool, keywords: dict[str, Any]
) -> None:
    def fresh() -> ik.IntrospectiveObjective:
        generator = torch.Generator().manual_seed(8) if generator_given else None
        return make(generator=generator, **keywords)

    objective = fresh()
    losses(objective, stop)
    file = io.BytesIO()
    torch.save(objective.state_dict(), file)
    expected = losses(objective, 3)
    # Each step has numbers of its own, so that a repeat of the first ones would be noticed.
    assert len({float(loss) for loss in expected}) == 3

    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = fresh()
    resumed.load_state_dict(state)
    # What was loaded may be saved again before it is used.
    again = fresh()
    again.load_state_dict(resumed.state_dict())
    for other in (resumed, again):
        assert all(a.equal(b) for a, b in zip(losses(other, 3), expected, strict=True))


def test_loading_the_state_of_no_step_starts_anew() -> None:
    objective = make()
    start = objective.state_dict()
    expected = losses(objective, 2)
    objective.load_state_dict(start)
    assert all(a.equal(b) for a, b in zip(losses(objective, 2), expected, strict=True))


def test_a_state_from_another_kind_of_device_starts_from_the_seed() -> None:
    objective = make()
    expected = losses(objective, 1)
    state = objective.state_dict()
    # What a generator of a GPU saves: a seed and an offset.
    state["_extra_state"]["generator"] = {
        "device": "cuda",
        "state": torch.zeros(16, dtype=torch.uint8),
    }
    other = make()
    other.load_state_dict(state)
    assert losses(other, 1)[0].equal(expected[0])


@pytest.mark.parametrize("generator_given", [False, True])
def test_validation_leaves_the_random_numbers_of_the_training(generator_given: bool) -> None:
    def fresh() -> ik.IntrospectiveObjective:
        return make(generator=torch.Generator().manual_seed(8) if generator_given else None)

    expected = losses(fresh(), 3)
    objective = fresh()
    for step in range(3):
        with torch.no_grad():
            validated = objective(*images())
        # It sees what the next step will: the model is the same.
        assert validated.equal(expected[step])
        assert losses(objective, 1)[0].equal(expected[step])


def test_random_numbers_of_others_stay_as_they_are() -> None:
    objective = make()
    before = torch.get_rng_state()
    losses(objective, 2)
    assert torch.get_rng_state().equal(before)


def test_a_generator_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got 7 \(int\)"):
        make(generator=7)


def test_soft_labels_without_weight_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def counted(*args: Any, **keywords: Any) -> Any:
        calls.append(None)
        return class_explanation_stats(*args, **keywords)

    monkeypatch.setattr("introkernels.objective.class_explanation_stats", counted)
    inputs, target = images()
    objective = make(method="exact", kl_weight=0.0)
    found = objective(inputs, target)
    with torch.no_grad():
        objective(inputs, target)
    assert calls == []
    expected = 0.7 * nn.functional.cross_entropy(objective.model(inputs), target)
    torch.testing.assert_close(found, expected)
    objective.loss.kl_weight = 0.3
    objective(inputs, target)
    assert len(calls) == 1
    objective.loss.kl_weight = -1.0
    with pytest.raises(ValueError, match=r"kl_weight must be a finite number >= 0, got -1\.0"):
        objective(inputs, target)
    # A bank is kept up to date for the time when they have weight.
    with_bank = make(method="exact", kl_weight=0.0, bank_momentum=0.5)
    with_bank(inputs, target)
    assert with_bank.bank is not None


def test_the_bank_follows_the_similarity_of_the_loss() -> None:
    inputs, target = images()
    objective = make(method="exact", bank_momentum=0.0)
    projection = make(method="exact", bank_momentum=0.0, similarity="projection")
    projection(inputs, target)
    objective(inputs, target)
    assert objective.bank is not None
    assert projection.bank is not None
    assert not objective.bank.equal(projection.bank)
    objective.loss.similarity = "projection"
    objective(inputs, target)
    assert objective.bank.equal(projection.bank)


def test_an_ignored_class_is_not_seen_by_the_bank() -> None:
    inputs, _ = images()
    target = torch.tensor([2, 2, 0, 1, 3, 4])
    objective = make(method="exact", bank_momentum=0.5, ignore_index=2)
    objective(inputs, target)
    objective.loss.ignore_index = -100
    objective(inputs, target)
    expected = make(method="exact", bank_momentum=0.5)
    expected(inputs, target)
    assert objective.bank is not None
    assert expected.bank is not None
    # Its first mean is taken as it is, not averaged with zeros from the time it was ignored.
    assert objective.bank[2].equal(expected.bank[2])


def test_a_bank_of_another_number_of_classes_is_refused() -> None:
    objective = make(method="exact", bank_momentum=0.5)
    objective(*images())
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES + 2)).double()
    other = ik.IntrospectiveObjective(model, method="exact", bank_momentum=0.5)
    other.load_state_dict(objective.state_dict())
    with pytest.raises(ValueError, match=r"one row for each of the model's 7 .*float64\[5, 5\]"):
        other(*images())


@pytest.mark.usefixtures("process_group")
def test_compiled_processes_share_one_bank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []
    monkeypatch.setattr("introkernels.bank.all_reduce", lambda _, group: groups.append(group))
    parallel = DistributedDataParallel(cnn().eval())
    compiled = torch.compile(parallel, backend="eager")
    objective = ik.IntrospectiveObjective(compiled, method="head", bank_momentum=0.5)
    objective(*images())
    assert groups == [parallel.process_group]
