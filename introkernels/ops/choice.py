"""Which backend is chosen in the current context: a stack of blocks in a context variable.

A generator's or a task's block may be left in another order than it was entered, in another
context than it was entered in (an async generator that the event loop finishes), or while copies of
its context live on. So leaving a block closes it wherever it stands, in every context that has it;
what stands around it stays in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

# A backend's name, or the functions that serve all devices in place of a backend.
Choice = Any


class Block:
    """What a choice holds for; closed for good once it's left."""

    __slots__ = ("is_open",)

    def __init__(self) -> None:
        self.is_open = True


Entry = tuple[Block, Choice]

# Innermost last. The first entry belongs to no block, and is never closed.
_stack: ContextVar[tuple[Entry, ...]] = ContextVar(
    "introkernels_backend", default=((Block(), "auto"),)
)


def current() -> Choice:
    """The choice of the innermost open block."""
    stack = _stack.get()
    block, choice = stack[-1]
    return choice if block.is_open else _open(stack)[-1][1]


def __getattr__(name: str) -> Choice:
    """``chosen`` is :func:`current`, for compiled code.

    Dynamo can't trace a context variable. An attribute of a module it reads as it is, and guards on
    by reading it again before each call: in the context of that call.
    """
    if name == "chosen":
        return current()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def replace(choice: Choice) -> tuple[Entry, Entry]:
    """Change the choice of the innermost open block; returns the entries before and after."""
    *outer, before = _open(_stack.get())
    after = before if before[1] == choice else (before[0], choice)
    _stack.set((*outer, after))
    return before, after


def undo(before: Entry, after: Entry) -> None:
    """Take a replacement back, unless another one followed."""
    _stack.set(tuple(before if entry is after else entry for entry in _stack.get()))


def enter(choice: Choice) -> Block:
    """Open a block within those that are open."""
    block = Block()
    _stack.set((*_open(_stack.get()), (block, choice)))
    return block


def leave(block: Block) -> None:
    """Close a block."""
    block.is_open = False
    _stack.set(_open(_stack.get()))


def innermost(blocks: Sequence[Block]) -> Block:
    """The one of ``blocks`` that was entered last in this context; the last without any."""
    return next((block for block, _ in reversed(_stack.get()) if block in blocks), blocks[-1])


def _open(stack: tuple[Entry, ...]) -> tuple[Entry, ...]:
    return tuple(entry for entry in stack if entry[0].is_open)
