"""That a line of a kernel counts as run if it ran, and only then."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import kernel_lines

TOYS = Path(__file__).resolve().parents[1] / "packaging/toy_kernels.py"

SOURCE = '''
import triton

@triton.jit(do_not_specialize=["n"])
def kernel(
    x,
    n,
):
    """Not a statement."""
    if n > 1:
        return
    else:
        x = (
            1
        )
    for i in range(n):
        x += i

def host(x):
    return x
'''


def test_lines_are_those_of_statements_in_kernels() -> None:
    assert kernel_lines.lines_of_kernels(SOURCE) == {10, 11, 13, 16, 17}


def test_a_line_that_ran_is_told_from_one_that_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_lines, "FOLDER", TOYS.parent)
    spec = importlib.util.spec_from_file_location("toys_under_watch", TOYS)
    assert spec is not None
    assert spec.loader is not None
    toys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toys)
    text = TOYS.read_text().splitlines()

    def never_ran() -> str:
        return "\n".join(text[line - 1] for line in kernel_lines.missing().get(TOYS, []))

    before = never_ran()
    assert "value * tl.full" in before
    x = torch.arange(32.0).reshape(2, 16)
    expected = x / 2
    toys._copy(x)
    assert torch.equal(x, expected)
    assert "value * tl.full" not in never_ran()
    assert "no_such_name" in never_ran()
