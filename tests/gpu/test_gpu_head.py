"""Both of Triton's ways of a linear head on a GPU, whichever of them the shape would choose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_cases import assert_same, leaves_of, loss_of, on_gpu, results
from helpers.cases import Case, linear_case
from helpers.oracle import assert_follows_definition

pytestmark = [pytest.mark.gpu, pytest.mark.of_triton]

CASES: dict[str, Callable[[], Case]] = {
    "float32": lambda: linear_case(130, 100, width=64, ignored=3, class_weights=True),
    "bfloat16": lambda: linear_case(200, 333, torch.bfloat16, width=48),
    "float16": lambda: linear_case(65, 65, torch.float16, width=33, bias=False),
    "half-features": lambda: linear_case(
        65, 40, torch.bfloat16, weight_dtype=torch.float32, width=20
    ),
    "centred": lambda: linear_case(300, 70, width=65, center=True, reduction="sum"),
    "rows": lambda: linear_case(129, 33, width=17, similarity="projection", reduction="none"),
    "many": lambda: linear_case(20_000, 100, torch.bfloat16, width=64, ignored=100),
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(params=["chunks", "stream"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that all heads go during the test."""
    from introkernels.ops.triton import head

    monkeypatch.setattr(head, "way", lambda call: request.param)
    name: str = request.param
    return name


@every_case
def test_it_follows_the_definition(way: str, name: str) -> None:
    with torch.device("cuda"):
        assert_follows_definition(CASES[name](), rows_may_cancel=True)


@every_case
def test_repeats_give_the_same_bits(way: str, name: str) -> None:
    case = leaves_of(on_gpu(CASES[name]))
    expected = results(case)
    for _ in range(20):
        assert_same(results(case), expected)


@every_case
def test_the_host_never_waits(way: str, name: str) -> None:
    case = leaves_of(on_gpu(CASES[name]))
    results(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bad", [33, -1, 2**40])
def test_a_bad_target_spoils_its_row_alone(way: str, bad: int) -> None:
    good = on_gpu(CASES["rows"])
    target = good["target"].clone()
    target[70] = bad
    others = torch.arange(good.rows, device="cuda") != 70
    # Loss, terms and the gradient of the features; the weight's is a sum over all rows.
    expected = results(leaves_of(good))[:4]
    actual = results(leaves_of(good.with_tensors(target=target)))[:4]
    assert all(tensor[70].isnan().all() for tensor in actual)
    assert_same([t[others] for t in actual], [t[others] for t in expected])


@every_case
def test_both_ways_give_nearly_the_same_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from introkernels.ops.triton import head

    case = on_gpu(CASES[name])
    losses = []
    for chosen in head.WAYS:
        monkeypatch.setattr(head, "way", lambda call, way=chosen: way)
        losses.append(loss_of(case).double())
    torch.testing.assert_close(losses[0], losses[1], rtol=4e-6, atol=0)
