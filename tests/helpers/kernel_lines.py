"""Which lines of the Triton kernels have run in the interpreter.

The interpreter rewrites each kernel before it runs it; here every statement gets a note of its line
on that occasion. A tracer such as coverage.py's would see the same, but it is called at each of the
interpreter's own functions too, which more than doubles the time of a run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from triton.runtime.interpreter import FunctionRewriter

FOLDER = Path(__file__).resolve().parents[2] / "introkernels/ops/triton"
_NOTE = "_introkernels_line_ran"

_ran: dict[Path, set[int]] = {}


def watch() -> None:
    """From now on, note the lines of kernels that run."""
    transform: Callable[..., ast.Module] = FunctionRewriter._transform_ast

    def with_notes(self: Any, source: str) -> ast.Module:
        tree = transform(self, source)
        file = Path(self.filename).resolve()
        if FOLDER in file.parents:
            # A kernel's globals are those of its file.
            self.fn.__globals__[_NOTE] = _ran.setdefault(file, set()).add
            for body in list(_bodies(tree)):
                body[:] = [part for node in body for part in (*_note_of(node), node)]
        return tree

    FunctionRewriter._transform_ast = with_notes


def ran() -> dict[str, list[int]]:
    """For each file that holds kernels, the lines of them that ran, as plain values."""
    return {str(file): sorted(lines) for file, lines in _ran.items()}


def add(lines_of_files: dict[str, list[int]]) -> None:
    """Take in what :func:`ran` told in another process."""
    for file, lines in lines_of_files.items():
        _ran.setdefault(Path(file), set()).update(lines)


def missing() -> dict[Path, list[int]]:
    """For each file that holds kernels, the lines of them that never ran."""
    gaps = {}
    for file in sorted(FOLDER.rglob("*.py")):
        lines = lines_of_kernels(file.read_text(encoding="utf-8"))
        gaps[file] = sorted(lines - _ran.get(file, set()))
    return {file: lines for file, lines in gaps.items() if lines}


def lines_of_kernels(source: str) -> set[int]:
    """Where the statements of functions under ``triton.jit`` begin."""
    return {
        node.lineno
        for function in ast.walk(ast.parse(source))
        if isinstance(function, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        for body in _bodies(function)
        for node in body
        if _runs(node)
    }


def _bodies(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements inside, but not the list that holds the functions themselves."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module):
            for field in ("body", "orelse"):
                body = getattr(node, field, None)
                if isinstance(body, list):
                    yield body


def _runs(node: ast.stmt) -> bool:
    """Whether it is anything but a docstring."""
    return not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _note_of(node: ast.stmt) -> Iterator[ast.stmt]:
    if _runs(node):
        call = ast.Call(ast.Name(_NOTE, ast.Load()), [ast.Constant(node.lineno)], [])
        yield ast.fix_missing_locations(ast.copy_location(ast.Expr(call), node))
