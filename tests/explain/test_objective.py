"""The loss of a training loop: explanations and the loss on them, when, and how much of it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explain_models import CLASSES, cnn, images, token_transformer, tokens
from torch import Tensor, nn

import introkernels as ik
from introkernels.explain import METHODS, class_explanation_stats


def batches(count: int, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(21)
    return [
        (
            torch.randn(rows, 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


def explanations_made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects the keywords of each call of class_explanation_stats that an objective makes."""
    calls: list[Any] = []

    def counted(*args: Any, **keywords: Any) -> Any:
        calls.append(keywords)
        return class_explanation_stats(*args, **keywords)

    monkeypatch.setattr("introkernels.objective.class_explanation_stats", counted)
    return calls


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


CALLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "exact"}, {}),
    ({"method": "exact", "center": True, "top_k": 2, "chunk": 2}, {"label_mode": "split"}),
    ({"method": "exact", "mode": "train"}, {"similarity": "projection"}),
    ({"method": "projection"}, {"similarity": "projection"}),
    ({"method": "sketch", "probes": 3}, {"temperature": 2.0, "kl_weight": 0.6}),
    ({"method": "sketch", "jvp": "double_backward"}, {"ignore_index": 2}),
    ({"method": "sketch", "explainer": "gradient", "at": "4"}, {"label_smoothing": 0.1}),
    ({"method": "sketch", "explainer": "smoothgrad"}, {"non_target_mass": 0.3, "ce_weight": 0.2}),
    ({"method": "head"}, {"reduction": "sum", "similarity_temperature": 0.5}),
    ({"method": "exact"}, {"divergence": "reverse_kl"}),
    ({"method": "sketch", "center": True}, {"divergence": "js", "beta": 0.2}),
]


@pytest.mark.parametrize(("explanation", "loss"), CALLS, ids=str)
def test_is_the_similarity_loss_of_the_explanation_statistics(
    explanation: dict[str, Any], loss: dict[str, Any]
) -> None:
    inputs, target = images()
    model = cnn()
    model[3].p = 0.0
    reference = copy.deepcopy(model)
    ignore_index = loss.get("ignore_index", -100)
    logits, stats = class_explanation_stats(
        reference, inputs, target, generator=seeded(), ignore_index=ignore_index, **explanation
    )
    weight = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
    expected = ik.similarity_loss(logits, target, stats, weight=weight, **loss)
    expected.backward()

    # The projection's similarity is its default.
    keywords = {} if explanation["method"] == "projection" else loss
    objective = ik.IntrospectiveObjective(
        model, weight=weight, generator=seeded(), **explanation, **keywords
    )
    found = objective(inputs, target)
    found.backward()
    assert found.equal(expected)
    for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert got.grad is not None
        assert got.grad.equal(wanted.grad)
    assert objective.logits is not None
    assert objective.logits.equal(logits)
    assert not objective.logits.requires_grad
    assert objective.step == 1
    assert objective.bank is None


def mixed(target: Tensor) -> Tensor:
    """Mixup of each row's class with another row's."""
    classes = F.one_hot(target, CLASSES).double()
    return 0.7 * classes + 0.3 * classes.roll(1, 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("center", "loss"),
    [
        (False, {}),
        (True, {"label_smoothing": 0.1, "reduction": "sum"}),
        (False, {"divergence": "js", "similarity_temperature": 0.5}),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_mixed_targets(method: Any, center: bool, loss: dict[str, Any], weighted: bool) -> None:
    inputs, target = images()
    probabilities = mixed(target)
    model = cnn()
    model[3].p = 0.0
    reference = copy.deepcopy(model)
    keywords: dict[str, Any] = {"method": method, "center": center}
    logits, stats = class_explanation_stats(
        reference, inputs, probabilities, generator=seeded(), **keywords
    )
    row_weight = torch.linspace(0, 2, len(target), dtype=torch.float64) if weighted else None
    objective = ik.IntrospectiveObjective(model, generator=seeded(), **keywords, **loss)
    expected = ik.similarity_loss(
        logits,
        probabilities,
        stats,
        similarity=objective.loss.similarity,
        row_weight=row_weight,
        **loss,
    )
    expected.backward()
    found = objective(inputs, probabilities, row_weight=row_weight)
    found.backward()
    assert found.equal(expected)
    for got, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        assert got.grad is not None
        assert got.grad.equal(wanted.grad)


def test_mixed_targets_between_explained_steps() -> None:
    (inputs, target), (more, others) = batches(2)
    model = cnn().eval()
    objective = ik.IntrospectiveObjective(model, method="exact", every=2)
    objective(inputs, mixed(target))
    torch.testing.assert_close(
        objective(more, mixed(others)), 0.7 * F.cross_entropy(model(more), mixed(others))
    )
    assert objective.step == 2


def test_weights_of_rows() -> None:
    """With classes for targets, in explained steps, between them, and with a bank."""
    inputs, target = images()
    target[1] = -100
    row_weight = torch.linspace(0, 2, len(target), dtype=torch.float64)
    model = cnn().eval()
    logits, stats = class_explanation_stats(model, inputs, target)
    explained = ik.similarity_loss(logits, target, stats, row_weight=row_weight)
    objective = ik.IntrospectiveObjective(model, method="exact", every=2)
    assert objective(inputs, target, row_weight=row_weight).equal(explained)
    live = target != -100
    ce = F.cross_entropy(logits, target, reduction="none") * row_weight
    torch.testing.assert_close(
        objective(inputs, target, row_weight=row_weight),
        0.7 * ce.sum() / row_weight[live].sum(),
    )
    plain, weighted = (
        ik.IntrospectiveObjective(model, method="exact", bank_momentum=0.5) for _ in range(2)
    )
    assert not plain(inputs, target).equal(weighted(inputs, target, row_weight=row_weight))
    assert plain.bank is not None
    assert plain.bank.equal(weighted.bank)


def test_the_default_is_the_sketch_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = explanations_made(monkeypatch)
    inputs, target = images()
    objective = ik.IntrospectiveObjective(cnn())
    objective(inputs, target)
    assert [(call["method"], call["probes"], call["top_k"]) for call in calls] == [
        ("sketch", 8, None)
    ]
    assert objective.loss.keywords() == ik.SimilarityLoss().keywords()


def test_parts_of_the_loss() -> None:
    inputs, target = images()
    keywords: dict[str, Any] = {"method": "head", "return_parts": True, "reduction": "none"}
    objective = ik.IntrospectiveObjective(cnn(), every=2, **keywords)
    explained = objective(inputs, target)
    between = objective(inputs, target)
    assert isinstance(explained, ik.LossParts)
    assert isinstance(between, ik.LossParts)
    assert explained.kl.min() > 0
    # Not that of labels of another kind: there are none.
    assert between.kl.tolist() == [0.0] * len(target)
    torch.testing.assert_close(between.loss, 0.7 * between.ce)


def test_a_tuple_of_inputs_and_tokens() -> None:
    inputs, target = tokens()
    padding = torch.zeros(inputs.shape, dtype=torch.bool)
    padding[:, -1] = True
    model = token_transformer().eval()
    objective = ik.IntrospectiveObjective(model, method="exact", at="embedding", every=2)
    _, stats = class_explanation_stats(model, (inputs, padding), target, at="embedding")
    logits = model(inputs, padding)
    expected = ik.similarity_loss(logits, target, stats)
    torch.testing.assert_close(objective((inputs, padding), target), expected)
    torch.testing.assert_close(
        objective((inputs, padding), target), 0.7 * F.cross_entropy(logits, target)
    )


def test_every_third_step_is_explained_and_the_others_cost_a_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = explanations_made(monkeypatch)
    model = cnn()
    forwards: list[None] = []
    model.register_forward_hook(lambda *_: forwards.append(None))
    objective = ik.IntrospectiveObjective(model, method="exact", every=3)
    seen = []
    for inputs, target in batches(7):
        before = len(calls), len(forwards)
        loss = objective(inputs, target)
        seen.append((len(calls) - before[0], len(forwards) - before[1]))
        if seen[-1][0] == 0:
            assert objective.logits is not None
            torch.testing.assert_close(
                loss.detach(), 0.7 * F.cross_entropy(objective.logits, target)
            )
    assert seen == [(1, 2), (0, 1), (0, 1), (1, 2), (0, 1), (0, 1), (1, 2)]
    assert objective.step == 7


def test_steps_between_train_on_the_cross_entropy() -> None:
    (inputs, target), (more, others) = batches(2)
    model = cnn().eval()
    objective = ik.IntrospectiveObjective(model, method="head", every=2, label_smoothing=0.1)
    objective(inputs, target)
    objective(more, others).backward()
    got = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    (0.7 * F.cross_entropy(model(more), others, label_smoothing=0.1)).backward()
    for gradient, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-14)


def test_warm_up_raises_the_weight_of_the_soft_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = explanations_made(monkeypatch)
    inputs, target = images()
    model = cnn().eval()
    logits, stats = class_explanation_stats(model, inputs, target)
    objective = ik.IntrospectiveObjective(model, method="exact", warmup_steps=4, kl_weight=0.8)
    for weight in (0.0, 0.2, 0.4, 0.6, 0.8, 0.8):
        expected = ik.similarity_loss(logits, target, stats, kl_weight=weight)
        torch.testing.assert_close(objective(inputs, target), expected)
    # Where it is 0 there is nothing to explain.
    assert len(calls) == 5
    # The keyword is the weight at the end.
    assert objective.loss.kl_weight == 0.8


def test_keywords_of_the_loss_may_change_between_steps() -> None:
    inputs, target = images()
    model = cnn().eval()
    objective = ik.IntrospectiveObjective(model, method="exact")
    objective(inputs, target)
    objective.loss.kl_weight = 0.9
    objective.loss.temperature = 2.0
    objective.loss.ignore_index = int(target[0])
    logits, stats = class_explanation_stats(
        model, inputs, target, ignore_index=objective.loss.ignore_index
    )
    expected = ik.similarity_loss(
        logits, target, stats, kl_weight=0.9, temperature=2.0, ignore_index=int(target[0])
    )
    assert objective(inputs, target).equal(expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_validation_counts_no_step(context: Any) -> None:
    inputs, target = images()
    model = cnn()
    objective = ik.IntrospectiveObjective(model, method="exact", every=2, warmup_steps=4)
    for batch in batches(3):
        objective(*batch)
    model.eval()
    with context():
        validated = objective(inputs.clone(), target.clone())
    assert objective.step == 3
    assert not validated.requires_grad
    # Explained also where step 3 would not be, with the weight of step 3.
    logits, stats = class_explanation_stats(model, inputs, target)
    expected = ik.similarity_loss(logits, target, stats, kl_weight=0.3 * 3 / 4)
    torch.testing.assert_close(validated.clone(), expected.detach())


def test_the_model_is_not_part_of_it() -> None:
    model = cnn()
    objective = ik.IntrospectiveObjective(model, weight=torch.ones(CLASSES))
    assert list(objective.parameters()) == []
    assert set(objective.state_dict()) == {"loss.weight", "_extra_state"}
    assert not any(module is model for module in objective.modules())
    objective.eval()
    objective.to(torch.float16)
    objective.requires_grad_(False)
    assert objective.model is model
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert all(parameter.requires_grad for parameter in model.parameters())
    # What moves with it are the class weights.
    assert objective.loss.weight is not None
    assert objective.loss.weight.dtype == torch.float16

    # A model that has its objective as an attribute stays finite.
    model.objective = objective
    assert len(list(model.parameters())) == 8
    assert "method='sketch', every=1, warmup_steps=0, bank_momentum=None" in repr(objective)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_have_a_model_of_their_own(copied: Any) -> None:
    objective = ik.IntrospectiveObjective(cnn(), method="exact", bank_momentum=0.5)
    objective(*images())
    twin = copied(objective)
    assert twin.model is not objective.model
    assert twin.step == 1
    assert twin.bank.equal(objective.bank)
    torch.manual_seed(0)
    expected = objective(*images())
    torch.manual_seed(0)
    assert twin(*images()).equal(expected)
    next(twin.model.parameters()).data.zero_()
    assert next(objective.model.parameters()).ne(0).any()


def run(
    objective: ik.IntrospectiveObjective, optimizer: Any, some: list[tuple[Tensor, Tensor]]
) -> list[float]:
    losses = []
    for inputs, target in some:
        optimizer.zero_grad()
        loss = objective(inputs, target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("bank_momentum", [None, 0.8])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_training_goes_on_from_a_saved_state_to_the_bit(
    bank_momentum: float | None, stop: int
) -> None:
    keywords: dict[str, Any] = {
        "method": "exact",
        "every": 2,
        "warmup_steps": 6,
        "bank_momentum": bank_momentum,
    }

    def fresh() -> tuple[ik.IntrospectiveObjective, Any]:
        model = cnn()
        model[3].p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return ik.IntrospectiveObjective(model, **keywords), optimizer

    some = batches(8)
    objective, optimizer = fresh()
    losses = run(objective, optimizer, some[:stop])
    file = io.BytesIO()
    torch.save([objective.state_dict(), objective.model.state_dict(), optimizer.state_dict()], file)
    losses += run(objective, optimizer, some[stop:])

    file.seek(0)
    of_objective, of_model, of_optimizer = torch.load(file, weights_only=True)
    resumed, optimizer = fresh()
    resumed.load_state_dict(of_objective)
    resumed.model.load_state_dict(of_model)
    optimizer.load_state_dict(of_optimizer)
    assert resumed.step == stop
    assert run(resumed, optimizer, some[stop:]) == losses[stop:]


@pytest.mark.parametrize("method", METHODS)
def test_learning(method: Any) -> None:
    """Ten points that a linear model can tell apart, after some steps with warm-up and bank."""
    torch.manual_seed(1)
    points = torch.randn(10, 8)
    target = torch.arange(10) % 3
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
    objective = ik.IntrospectiveObjective(
        model, method=method, probes=2, every=2, warmup_steps=5, bank_momentum=0.5, kl_weight=0.1
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = run(objective, optimizer, [(points, target)] * 40)
    # The soft labels keep the loss from 0.
    assert losses[-1] < 0.5 * losses[0]
    assert model.eval()(points).argmax(1).equal(target)


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method: Any) -> None:
    inputs, target = images(torch.float32)
    model = cnn(torch.float32)
    objective = ik.IntrospectiveObjective(model, method=method, bank_momentum=0.5, every=2)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(inputs, target)
        assert loss.dtype == torch.float32
        loss.backward()
    assert objective.logits is not None
    assert objective.logits.dtype == torch.bfloat16
    assert objective.bank is not None
    assert objective.bank.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": torch.sin}, TypeError, r"model must be a torch\.nn\.Module, got"),
        ({"method": "lime"}, ValueError, "method must be one of 'exact', .* got 'lime'"),
        ({"mode": "test"}, ValueError, "mode must be one of 'auto', 'eval', 'train', got 'test'"),
        ({"jvp": "reverse"}, ValueError, "jvp must be one of 'auto', .* got 'reverse'"),
        ({"explainer": "lime"}, ValueError, "explainer must be one of 'gradient_x_input'"),
        ({"probes": 0}, ValueError, "probes must be at least 1, got 0"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"center": 1}, TypeError, "center must be True or False, got 1"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, r"every must be an int, got 1\.5"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0, got -1"),
        ({"warmup_steps": True}, TypeError, "warmup_steps must be an int, got True"),
        ({"bank_momentum": 1.0}, ValueError, r"bank_momentum must be in \[0, 1\) or None, got 1"),
        ({"bank_momentum": -0.1}, ValueError, "bank_momentum must be"),
        ({"bank_momentum": float("nan")}, ValueError, "bank_momentum must be"),
        ({"bank_momentum": "0.9"}, TypeError, "bank_momentum must be"),
        (
            {"method": "projection", "similarity": "cosine"},
            ValueError,
            "similarity must be 'projection' with method='projection'.* got 'cosine'",
        ),
        ({"similarity": "angle"}, ValueError, "similarity must be one of 'cosine'"),
        ({"temperature": 0}, ValueError, "temperature must be"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of 'forward_kl'"),
        ({"beta": 1}, ValueError, r"beta must be in \(0, 1\), got 1"),
        ({"reduction": "median"}, ValueError, "reduction must be"),
        ({"weight": [1.0]}, TypeError, "weight must be a torch"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ik.IntrospectiveObjective(**({"model": cnn()} | changes))


def test_bad_calls_count_no_step() -> None:
    inputs, target = images()
    objective = ik.IntrospectiveObjective(cnn(), method="exact", every=2, bank_momentum=0.5)
    with pytest.raises(IndexError, match=r"target\[0\] is 9"):
        objective(inputs, target.fill_(9))
    assert objective.step == 0
    assert objective.bank is None
    objective(*images())
    with pytest.raises(ValueError, match=r"target must have shape \[6\].* got int64\[5\]"):
        objective(inputs, target[:5])
    assert objective.step == 1


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (
            {"bank_momentum": 0.5},
            "bank_momentum must be None where target holds class probabilities, got 0.5",
        ),
        ({"top_k": 2}, "top_k must be None where target holds class probabilities, got 2"),
        (
            {"label_mode": "split"},
            "label_mode must be 'softmax' where target holds class probabilities, got 'split'",
        ),
    ],
)
def test_what_mixed_targets_do_not_go_with(
    steps: int, keywords: dict[str, Any], message: str
) -> None:
    """Refused at each step, also where nothing would be explained."""
    inputs, target = images()
    objective = ik.IntrospectiveObjective(cnn(), method="exact", every=2, **keywords)
    for _ in range(steps):
        objective(inputs, target)
    with pytest.raises(ValueError, match=message):
        objective(inputs, mixed(target))
    assert objective.step == steps


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    ("row_weight", "error", "message"),
    [
        (torch.ones(5), ValueError, r"row_weight must have shape \[6\].*got float32\[5\]"),
        (torch.ones(6, dtype=torch.int64), TypeError, "row_weight must be float64"),
        ([1.0] * 6, TypeError, "row_weight must be a torch"),
    ],
)
def test_bad_weights_of_rows_touch_no_bank(
    steps: int, row_weight: Any, error: type[Exception], message: str
) -> None:
    inputs, target = images()
    objective = ik.IntrospectiveObjective(cnn(), method="exact", bank_momentum=0.5)
    for _ in range(steps):
        objective(inputs, target)
    before = objective.bank
    with pytest.raises(error, match=message):
        objective(inputs, target, row_weight=row_weight)
    assert objective.step == steps
    assert objective.bank is before


@pytest.mark.parametrize("steps", [0, 1])
def test_bad_targets(steps: int) -> None:
    inputs, target = images()
    objective = ik.IntrospectiveObjective(cnn(), method="exact", every=2)
    for _ in range(steps):
        objective(inputs, target)
    for bad, error, message in (
        ([0] * 6, TypeError, "target must be a torch"),
        (target.int(), TypeError, r"target must be int64, got int32\[6\]"),
        (mixed(target)[:, :4], ValueError, r"target must have the shape of logits \[6, 5\]"),
    ):
        with pytest.raises(error, match=message):
            objective(inputs, bad)
    assert objective.step == steps
