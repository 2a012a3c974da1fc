"""Kernels run in the current stream of their tensors' device, and nothing waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from gpu_cases import CASES, assert_same, case_of, leaves_of, on_gpu, refill, results

import introkernels as ik

pytestmark = pytest.mark.gpu

every_case = pytest.mark.parametrize("name", CASES)

# Some 50 ms of a GPU's clock: longer than the host takes for a whole test.
LONG = 100_000_000


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_case
def test_the_host_never_waits(name: str) -> None:
    case = leaves_of(case_of(name))
    expected = results(case)
    with synchronising_is_an_error():
        actual = results(case)
    assert_same(actual, expected)


def test_statistics_do_not_wait_either() -> None:
    case = case_of("introspective")
    arguments = (case["gradients"], case["inputs"], case["target"])
    expected = ik.explanation_stats(*arguments)
    with synchronising_is_an_error():
        actual = ik.explanation_stats(*arguments)
    assert_same([*actual[:2]], [*expected[:2]])


@every_case
def test_calls_return_while_the_gpu_is_busy(name: str) -> None:
    case = leaves_of(case_of(name))
    results(case)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(LONG)
    results(case)
    done.record()
    assert not done.query()
    done.synchronize()


@every_case
def test_the_current_stream_is_used(name: str) -> None:
    """Inputs come into being late, and in that stream alone."""
    late = leaves_of(case_of(name))
    expected = results(late)
    numbers = case_of(name)
    refill(numbers, late)
    with torch.no_grad():
        for argument in late.differentiable:
            late[argument].fill_(float("nan"))
    torch.cuda.synchronize()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        refill(late, numbers)
        actual = results(late)
    stream.synchronize()
    assert_same(actual, expected)


@every_case
def test_a_graph_of_forward_and_backward_replays_with_other_numbers(name: str) -> None:
    case = leaves_of(case_of(name))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case)

    for _ in range(3):
        other = case_of(name)
        refill(case, other)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        assert_same(replayed, results(leaves_of(other)))
        # Tickets and scratch start anew in every replay.
        graph.replay()
        assert_same(captured, replayed)


@every_case
def test_another_device_than_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here = leaves_of(case_of(name))
    expected = results(here)
    with torch.cuda.device(1):
        there = on_gpu(CASES[name])
    refill(there, here)
    assert torch.cuda.current_device() == 0
    actual = results(leaves_of(there))
    assert torch.cuda.current_device() == 0
    assert {tensor.get_device() for tensor in actual} == {1}
    assert_same([tensor.to("cuda:0") for tensor in actual], expected)
