"""The Python examples of the README and of the guides run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run_one_after_the_other_and_losses_have_gradients(page: Path) -> None:
    names: dict[str, Any] = {}
    for example in examples(page):
        names.pop("loss", None)
        exec(compile(example, page.name, "exec"), names)
        if "loss" in names:
            assert names["loss"].grad_fn is not None
            trained = next(names[name] for name in ("head", "model", "student") if name in names)
            assert all(parameter.grad.abs().sum() > 0 for parameter in trained.parameters())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_there_are_examples(page: Path) -> None:
    assert len(examples(page)) >= 2


def test_links_within_the_project_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
