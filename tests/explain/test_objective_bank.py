"""The class-by-class moving average of similarities as the source of soft labels."""

from __future__ import annotations

import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from explain_models import CLASSES, cnn, images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import introkernels as ik
from introkernels.explain import class_explanation_stats, similarities
from introkernels.types import ExplanationStats

Stats = tuple[ExplanationStats, Tensor]


def expected_bank(updates: list[Stats], momentum: float, similarity: Any = "cosine") -> Tensor:
    """The bank one number at a time."""
    bank: dict[tuple[int, int], float] = {}
    for stats, target in updates:
        found = similarities(stats, target, similarity=similarity)
        batch: dict[tuple[int, int], list[float]] = {}
        for row, true in enumerate(target.tolist()):
            if true == -100:
                continue
            for column in range(found.shape[1]):
                index = stats.class_index
                other = column if index is None else int(index[row, column])
                value = float(found[row, column])
                if value == value:
                    batch.setdefault((true, other), []).append(value)
        for pair, values in batch.items():
            mean = sum(values) / len(values)
            bank[pair] = momentum * bank[pair] + (1 - momentum) * mean if pair in bank else mean
    result = torch.eye(CLASSES, dtype=torch.float64)
    for pair, entry in bank.items():
        result[pair] = entry
    return result


def batches(targets: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(22)
    return [
        (
            torch.randn(len(some), 2, 6, 6, generator=generator, dtype=torch.float64),
            torch.tensor(some),
        )
        for some in targets
    ]


# Repeated and missing classes; class 4 comes late, class 0 goes.
TARGETS = [[0, 0, 0, 1, 2], [1, 1, 3, 0, -100], [4, 4, 1, 2, 2], [-100, -100, 3, 3, 3], [4]]


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize(
    "keywords",
    [
        {"method": "exact"},
        {"method": "exact", "top_k": 1},
        {"method": "exact", "similarity": "projection", "top_k": 2, "center": True},
        {"method": "projection"},
        {"method": "head", "top_k": 3},
    ],
    ids=str,
)
def test_against_a_bank_of_plain_numbers(momentum: float, keywords: dict[str, Any]) -> None:
    model = cnn().eval()
    objective = ik.IntrospectiveObjective(model, bank_momentum=momentum, **keywords)
    of_explanation = {k: v for k, v in keywords.items() if k != "similarity"}
    similarity = objective.loss.similarity
    assert objective.bank is None
    updates: list[Stats] = []
    for inputs, target in batches(TARGETS):
        loss = objective(inputs, target)
        logits, stats = class_explanation_stats(model, inputs, target, **of_explanation)
        updates.append((stats, target))
        expected = expected_bank(updates, momentum, similarity)
        assert objective.bank is not None
        torch.testing.assert_close(objective.bank, expected, rtol=0, atol=1e-12)
        # The bank knows the batch that it gives labels to.
        rows = expected[target.clamp(min=0)]
        from_bank = ExplanationStats(rows, torch.ones_like(rows))
        wanted = ik.similarity_loss(logits, target, from_bank, similarity=similarity)
        torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("ignore_index", [255, 2])
def test_rows_that_the_loss_ignores_have_no_part(ignore_index: int) -> None:
    model = cnn().eval()
    objective = ik.IntrospectiveObjective(
        model, method="exact", bank_momentum=0.5, ignore_index=ignore_index
    )
    updates: list[Stats] = []
    for inputs, target in batches([[0, ignore_index, 3, ignore_index, 1], [ignore_index, 4, 1]]):
        objective(inputs, target)
        live = target != ignore_index
        _, stats = class_explanation_stats(model, inputs[live], target[live])
        updates.append((stats, target[live]))
    assert objective.bank is not None
    torch.testing.assert_close(objective.bank, expected_bank(updates, 0.5), rtol=0, atol=1e-12)


def test_a_pair_that_was_never_seen_is_not_alike() -> None:
    objective = ik.IntrospectiveObjective(cnn().eval(), method="exact", bank_momentum=0.9)
    ((inputs, target),) = batches([[1, 3, 1]])
    objective(inputs, target)
    assert objective.bank is not None
    for absent in (0, 2, 4):
        assert objective.bank[absent].equal(torch.eye(CLASSES, dtype=torch.float64)[absent])
    for present in (1, 3):
        assert objective.bank[present, present] == 1
        assert objective.bank[present].count_nonzero() == CLASSES


@pytest.mark.parametrize("keywords", [{}, {"top_k": 2}])
def test_a_row_of_nan_does_not_poison_it(keywords: dict[str, Any]) -> None:
    model = cnn().eval()
    objective = ik.IntrospectiveObjective(model, method="exact", bank_momentum=0.5, **keywords)
    ((inputs, target),) = batches([[1, 1, 3, 0]])
    spoilt = inputs.clone()
    spoilt[[1, 3]] = torch.nan
    loss = objective(spoilt, target)
    assert loss.isnan()
    _, stats = class_explanation_stats(model, inputs[[0, 2]], target[[0, 2]], **keywords)
    assert objective.bank is not None
    expected = expected_bank([(stats, target[[0, 2]])], 0.5)
    torch.testing.assert_close(objective.bank, expected, rtol=0, atol=1e-12)
    objective(inputs, target)
    assert objective.bank.isfinite().all()


def test_it_labels_the_steps_between_and_those_of_validation() -> None:
    model = cnn().eval()
    objective = ik.IntrospectiveObjective(
        model, method="exact", every=2, warmup_steps=4, bank_momentum=0.5
    )
    (first, target), (second, others) = batches([[0, 1, 2, 3], [4, 1, 1, 2]])
    explained = objective(first, target)
    # Explained for the bank's sake, where the soft labels have no weight yet.
    torch.testing.assert_close(
        explained,
        ik.similarity_loss(
            model(first), target, class_explanation_stats(model, first, target)[1], kl_weight=0.0
        ),
    )
    bank = objective.bank
    assert bank is not None
    stats = ExplanationStats(bank[others], torch.ones(4, CLASSES, dtype=torch.float64))
    expected = ik.similarity_loss(model(second), others, stats, kl_weight=0.3 / 4)
    with torch.no_grad():
        torch.testing.assert_close(objective(second, others), expected.detach())
    between = objective(second, others)
    torch.testing.assert_close(between, expected)
    assert objective.bank is bank
    objective(second, others)
    assert objective.bank is not bank


def test_validation_before_the_first_step_explains_and_leaves_it_empty() -> None:
    inputs, target = images()
    model = cnn().eval()
    objective = ik.IntrospectiveObjective(model, method="exact", bank_momentum=0.5)
    with torch.no_grad():
        loss = objective(inputs, target)
    logits, stats = class_explanation_stats(model, inputs, target)
    torch.testing.assert_close(loss, ik.similarity_loss(logits, target, stats).detach())
    assert objective.bank is None
    assert objective.step == 0


def test_states_before_and_after_the_first_step() -> None:
    inputs, target = images()

    def make() -> ik.IntrospectiveObjective:
        return ik.IntrospectiveObjective(cnn().eval(), method="exact", bank_momentum=0.5, top_k=2)

    objective = make()
    empty = objective.state_dict()
    objective(inputs, target)
    file = io.BytesIO()
    torch.save(objective.state_dict(), file)
    file.seek(0)
    filled = torch.load(file, weights_only=True)
    assert objective.bank is not None
    before = objective.bank.clone()
    kept = objective.state_dict()
    objective(inputs, target.flip(0))
    # A state is a snapshot: later steps don't reach it.
    other = make()
    other.load_state_dict(kept)
    assert other.bank is not None
    assert other.bank.equal(before)

    other = make()
    other.load_state_dict(filled)
    assert other.bank is not None
    assert other.bank.equal(before)
    assert other.step == 1
    # What has been seen is known too: an entry seen before moves, another one is set.
    other(inputs, target.flip(0))
    assert other.bank.equal(objective.bank)
    other.load_state_dict(empty)
    assert other.bank is None
    assert other.step == 0

    without = ik.IntrospectiveObjective(cnn())
    with pytest.raises((ValueError, RuntimeError), match="bank_momentum must be given to load"):
        without.load_state_dict(filled)


@pytest.mark.parametrize("target", [[2, 2, 2, 2], [-100, -100, -100, -100]])
def test_targets_of_one_class_and_of_none(target: list[int]) -> None:
    ((inputs, targets),) = batches([target])
    objective = ik.IntrospectiveObjective(
        cnn().eval(), method="exact", bank_momentum=0.5, reduction="sum"
    )
    loss = objective(inputs, targets)
    assert objective.bank is not None
    others = [c for c in range(CLASSES) if c != target[0]]
    identity = torch.eye(CLASSES, dtype=torch.float64)
    assert objective.bank[others].equal(identity[others])
    assert loss.isfinite()


PROCESSES = 2


def distributed_objective() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model and batches for all processes together; the second process lacks some classes."""
    return cnn().eval(), batches([[0, 1, 2, 3, 1, 1], [4, 4, 0, 2, 2, -100]])


def train_in_parallel(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    model, some = distributed_objective()
    parallel = DistributedDataParallel(model)
    objective = ik.IntrospectiveObjective(parallel, method="exact", top_k=2, bank_momentum=0.5)
    banks = []
    for inputs, target in some:
        share = slice(rank * 3, rank * 3 + 3)
        objective(inputs[share], target[share]).backward()
        banks.append(objective.bank)
    torch.save(banks, f"{results}.{rank}")
    # See tests/losses/test_distributed.py.
    dist.barrier()
    del parallel, model, objective
    gc.collect()
    dist.destroy_process_group()


def test_processes_share_one_bank(tmp_path: Path) -> None:
    results = str(tmp_path / "banks")
    torch.multiprocessing.start_processes(
        train_in_parallel,
        (str(tmp_path / "store"), results),
        nprocs=PROCESSES,
        start_method="spawn",
    )
    model, some = distributed_objective()
    alone = ik.IntrospectiveObjective(model, method="exact", top_k=2, bank_momentum=0.5)
    first, second = (torch.load(f"{results}.{rank}") for rank in range(PROCESSES))
    for (inputs, target), one, other in zip(some, first, second, strict=True):
        alone(inputs, target)
        assert one.equal(other)
        torch.testing.assert_close(one, alone.bank, rtol=0, atol=1e-12)
