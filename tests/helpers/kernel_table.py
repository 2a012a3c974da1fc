"""What compilers make of kernels: the figures read out of machine code, and the table of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What became of one kernel on one target.

    Attributes:
        name: what it was compiled for: a call, or the arguments of its template.
        kernel: its own name.
        target: the architecture.
        registers: of a thread; vector and accumulator registers on AMD.
        spills: bytes, or loads and stores, of registers that don't fit; or bytes of a stack.
        shared: bytes of shared memory that are known at compile time.
        instructions: of the machine code.
        wide_loads: those of them that load 128 bits or more a thread from global memory.
        wide_stores: those that store as much.
        failure: the compiler's last word where it failed, and nothing else is known.
    """

    name: str
    kernel: str
    target: str
    registers: str = ""
    spills: int = 0
    shared: int = 0
    instructions: int = 0
    wide_loads: int = 0
    wide_stores: int = 0
    failure: str = ""


COLUMNS = (
    *(("registers", 9), ("spills", 6), ("shared", 7)),
    *(("instructions", 12), ("wide_loads", 10), ("wide_stores", 11)),
)
HEADING = (
    f"{'target':<7}  {'kernel':<26}  "
    + "  ".join(f"{name.replace('_', ' '):>{width}}" for name, width in COLUMNS)
    + "  for"
)


def row(result: Result) -> str:
    if result.failure:
        return f"{result.target:<7}  {result.kernel:<26}  {result.name}: {result.failure}"
    cells = [f"{getattr(result, name)!s:>{width}}" for name, width in COLUMNS]
    return "  ".join((f"{result.target:<7}", f"{result.kernel:<26}", *cells, result.name))


def complaints(results: Sequence[Result]) -> list[str]:
    """One line for each result that is not good enough."""
    return [
        f"{result.kernel} for {result.name} on {result.target} "
        + (result.failure or f"spills registers ({result.spills})")
        for result in results
        if result.failure or result.spills
    ]


def instructions(listing: str) -> list[str]:
    """The instructions in NVIDIA's listing of machine code, ``["LDG.E.128", …]``, in order."""
    return re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?(\w[\w.]*)", listing, re.MULTILINE
    )


def nvidia_figures(code: Sequence[str]) -> dict[str, int]:
    """The figures of a result that these instructions tell."""
    return {
        "instructions": len(code),
        "wide_loads": count(code, r"LDG\..*\b(128|256)\b"),
        "wide_stores": count(code, r"STG\..*\b(128|256)\b"),
    }


def count(code: Sequence[str], pattern: str) -> int:
    """How many instructions begin with a pattern."""
    matcher = re.compile(pattern)
    return sum(1 for instruction in code if matcher.match(instruction))
