"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs_and_its_loss_has_a_gradient(example: str) -> None:
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["loss"].grad_fn is not None
    trained = names.get("head", names.get("model"))
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.parameters())


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2
