"""NVIDIA's machine code as `cuobjdump -sass` lists it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# What brings numbers from global memory, as loads or straight to shared memory.
LOADS = ("LDG", "LDGSTS")
ATOMICS = ("ATOMG", "ATOM")


@dataclass(frozen=True)
class Instruction:
    """One instruction, with the control bits of its encoding.

    Attributes:
        address: in bytes from the beginning of the kernel.
        guard: the predicate that it is executed under, ``"!P0"``; empty for always.
        opcode: with its modifiers, ``"LDG.E.128"``.
        operands: ``("R4", "desc[UR4][R2.64]")``.
        stall: clocks until its warp may issue the next one.
        sets: the scoreboard that is released when its result is there; None if it sets none.
        sets_read: the scoreboard that is released when it has read its registers, likewise.
        waits: the scoreboards that have to be released before it.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    stall: int = 1
    sets: int | None = None
    sets_read: int | None = None
    waits: tuple[int, ...] = ()

    @cached_property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @cached_property
    def width(self) -> int:
        """Bytes that a load or store moves for a lane."""
        found = re.search(r"\.[US]?(256|128|64|16|8)\b", self.opcode)
        return int(found[1]) // 8 if found else 4

    @property
    def target(self) -> int | None:
        """Where a branch goes. Those of diverged warps alone (``BRA.DIV``) are not followed.

        A call under a condition is a branch: what it calls does not come back.
        """
        is_branch = self.name == "BRA" and not self.opcode.startswith("BRA.DIV")
        if not is_branch and not (self.name == "CALL" and self.guard):
            return None
        return int(self.operands[-1], 16) if self.operands[-1].startswith("0x") else None

    @property
    def condition(self) -> str:
        """What decides on a branch: its guard, its first operand, or both (``"P0 P1"``)."""
        operands = self.operands[:-1] if self.target is not None else ()
        return " ".join((self.guard, *operands)).strip()

    @property
    def leads_away(self) -> bool:
        """Whether what follows it may be left out."""
        away = ("EXIT", "RET", "BRX", "BRXU", "JMP", "KILL")
        return self.name in away or self.target is not None

    @cached_property
    def predicates(self) -> set[str]:
        """The predicates that it may write: results stand first."""
        if self.name == "R2P":
            return {f"P{k}" for k in range(7)}
        return {operand for operand in self.operands[:3] if re.fullmatch(r"U?P\d", operand)}


Code = list[Instruction]


_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);\s*/\* 0x([0-9a-f]{16})"
    r" \*/\s+/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)


def instructions(listing: str) -> list[Instruction]:
    """The instructions of a kernel's listing, whose encodings are two words of 64 bits each.

    The upper one ends with control bits: 4 of stall, 1 of yielding, 3 of the scoreboard set, 3 of
    the one set when registers are read (7 for none), 6 of those waited for.
    """
    found = []
    for address, guard, opcode, operands, _, word in _LINE.findall(listing):
        control = int(word, 16) >> 41
        sets, sets_read = control >> 5 & 7, control >> 8 & 7
        found.append(
            Instruction(
                int(address, 16),
                guard,
                opcode,
                tuple(re.split(r",\s*", operands.strip())),
                max(1, control & 15),
                None if sets == 7 else sets,
                None if sets_read == 7 else sets_read,
                tuple(board for board in range(6) if control >> 11 >> board & 1),
            )
        )
    return found


@dataclass(frozen=True)
class Kernel:
    """A kernel's code, and the registers of a thread and the shared memory of a block it takes."""

    code: tuple[Instruction, ...]
    registers: int
    shared: int = 0


def kernels(cuobjdump: str, cubin: Path) -> dict[str, Kernel]:
    """The kernels of a file by their mangled names; shared memory is what the file knows of."""
    text = subprocess.run(
        [cuobjdump, "-sass", "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    usages = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", text)
    used = {name: (int(registers), int(shared)) for name, registers, shared in usages}
    _, *parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    return {
        name: Kernel(tuple(instructions(code)), *used[name])
        for name, code in zip(parts[::2], parts[1::2], strict=True)
        if name in used
    }


# Of numbers: those of half types also move constants into registers.
_FLOAT = {"FFMA": 1, "FADD": 1, "FMUL": 1, "FFMA2": 2, "FADD2": 2, "FMUL2": 2, "MUFU": 1}
_FLOAT |= {"DFMA": 1, "DADD": 1, "DMUL": 1}


def operations(one: Instruction) -> int:
    """How many operations on float32 or float64 numbers an instruction is for a lane."""
    return _FLOAT.get(one.name, 0)
