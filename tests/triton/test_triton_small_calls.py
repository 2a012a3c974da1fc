"""What small calls launch and allocate, held to the table in benchmarks/README.md."""

from __future__ import annotations

import pytest
from helpers.small_calls import CASES, assert_in_table, directions

from introkernels.ops import loader
from introkernels.ops.triton.launch import Launch, recording


@pytest.mark.parametrize("name", CASES)
def test_small_calls_are_those_of_the_table(name: str) -> None:
    launches: list[Launch] = []
    with recording(launches.append):
        counts = directions(name, loader.TRITON_KERNELS, {}, launches)
    assert_in_table(name, "Triton", *counts)
