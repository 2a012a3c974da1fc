"""The loops of a kernel, and the ways that its warps take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from roofline.sass import ATOMICS, Code, Instruction, operations

TABLES = ("BRX", "BRXU")
# Of more ways to a block, predicates are forgotten: some dozens are usual.
MOST_STATES = 1000
# More than all else that weighs.
MUCH = 10**9


@dataclass(frozen=True)
class Loop:
    """A natural loop: the block that all others of it are entered through, and all its blocks."""

    head: int
    blocks: frozenset[int]


class Graph:
    """The basic blocks of a kernel, numbered by their addresses.

    Attributes:
        blocks: their instructions.
        after: the blocks that each may go on to; a call goes on behind itself.
        order: the blocks that are reached, each behind those before it but for the ends of loops.
    """

    def __init__(self, code: Sequence[Instruction]) -> None:
        begins = {one.target for one in code}
        self.blocks: list[Code] = []
        ended = True
        for one in code:
            if ended or one.address in begins:
                self.blocks.append([])
            self.blocks[-1].append(one)
            ended = one.leads_away
        at = {block[0].address: number for number, block in enumerate(self.blocks)}
        self.after: list[list[int]] = []
        for number, block in enumerate(self.blocks):
            last = block[-1]
            falls = not last.leads_away or last.condition
            self.after.append([number + 1] if falls and number + 1 < len(self.blocks) else [])
            if last.target in at:
                self.after[-1].append(at[last.target])
        self._follow_tables()
        self.order = self._ordered()
        self._dominators = self._dominated()

    def _follow_tables(self) -> None:
        """Tables of jumps lead to what nothing else names, up to the next one of them."""
        tables = [number for number, code in enumerate(self.blocks) if code[-1].name in TABLES]
        named = {operand for code in self.blocks for one in code for operand in one.operands}
        reached = {to for some in self.after for to in some}
        for table, end in pairwise([*tables, len(self.blocks)]):
            self.after[table] = [
                number
                for number in range(table + 1, end + 1)
                if number < len(self.blocks)
                and number not in reached
                and hex(self.blocks[number][0].address) not in named
            ]

    def _ordered(self) -> list[int]:
        seen, done = {0}, []
        stack = [(0, iter(self.after[0]))]
        while stack:
            block, rest = stack[-1]
            to = next((to for to in rest if to not in seen), None)
            if to is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(to)
                stack.append((to, iter(self.after[to])))
        return done[::-1]

    def _dominated(self) -> dict[int, set[int]]:
        """Of each block, those on every way to it, itself among them."""
        before: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for to in self.after[block]:
                before[to].append(block)
        self._before = before
        found = {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                new = set.intersection(*(found[b] for b in before[block] if b in found)) | {block}
                changed |= found.get(block) != new
                found[block] = new
        return found

    def goes_back(self, block: int, to: int) -> bool:
        """Whether this step leads to a block that lies on every way to where it comes from."""
        return to in self._dominators[block]

    def _has_fence(self, block: int) -> bool:
        return any(one.name == "MEMBAR" for one in self.blocks[block])

    @cached_property
    def fenced(self) -> set[int]:
        """The blocks that some way leads to through a fence."""
        found: set[int] = set()
        todo = [to for block in self.order if self._has_fence(block) for to in self.after[block]]
        while todo:
            block = todo.pop()
            if block not in found:
                found.add(block)
                todo += self.after[block]
        return found

    def _goes_around_a_fence(self, block: int, to: int) -> bool:
        """Whether a branch passes by what one thread does for all."""
        return any(
            to in self.after[other] and self._has_fence(other) for other in self.after[block]
        )

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops; those of one head count as one."""
        found: dict[int, set[int]] = {}
        for block in self.order:
            for head in self.after[block]:
                if self.goes_back(block, head):
                    body, todo = found.setdefault(head, {head}), [block]
                    while todo:
                        one = todo.pop()
                        if one not in body:
                            body.add(one)
                            todo += self._before[one]
        return [Loop(head, frozenset(body)) for head, body in sorted(found.items())]

    def way(
        self,
        begins: Iterable[int],
        is_end: Callable[[int, int], bool],
        weight: Callable[[Instruction], int],
        *,
        inside: Iterable[int] | None = None,
        least_work: int = 0,
        barriers: int | None = None,
        is_first: bool = True,
        is_alone: bool = False,
        around: Set[int] = frozenset(),
    ) -> list[int]:
        """The blocks of the shortest of the heaviest ways from some block on.

        A way passes loops once, and takes branches on a predicate that it has not written since the
        last one as it took that. Behind a fence (``MEMBAR``) nothing weighs but the first atomic
        operation: what follows that is for the last block of several alone.

        Args:
            begins: one of these is the first block.
            is_end: whether a step from a block to another one, -1 for the kernel's end, is the
                last. The other one is no part of the way.
            weight: of an instruction.
            inside: all blocks that the way may take.
            least_work: before weight counts that it has so many operations on float32 or float64
                numbers, or as many of these as there are.
            barriers: before all else counts that it has so many barriers.
            is_first: whether it is that of a block's first warp, which does what is left behind a
                barrier: for the others nothing weighs there.
            is_alone: whether barriers come after its first store and not before where it can
                choose, as for warps that have rows of their own.
            around: blocks that it goes around where it can.
        """
        allowed = set(self.order if inside is None else inside)
        # What may still matter of a way to a block, its cost, and its last block and state.
        State = tuple[frozenset[str], int, bool, int, int]
        Known = dict[State, tuple[tuple[int, int], tuple[int, "State"] | None]]
        start: State = (frozenset(), 0, False, 0, 0)
        known: dict[int, Known] = {begin: {start: ((0, 0), None)} for begin in begins}
        ends: list[tuple[tuple[int, ...], int, State]] = []
        for block in self.order:
            if block not in known:
                continue
            code = self.blocks[block]
            written = set().union(*(one.predicates for one in code))
            heavy = sum(map(weight, code))
            work = sum(map(operations, code))
            num_barriers = sum(one.name == "BAR" for one in code)
            is_fence = self._has_fence(block)
            stores = any(one.name == "STG" for one in code)
            atomics = sum(one.name in ATOMICS for one in code)
            for state, ((lightness, length), _) in list(known[block].items()):
                taken, stage, has_stored, work_before, barriers_before = state
                lightness -= (heavy + atomics, atomics, 0)[stage]
                lightness += MUCH * (block in around)
                if is_alone and not stage:
                    lightness += MUCH * num_barriers * (-1 if has_stored else 1)
                cost = (lightness, length + len(code))
                stage = max(stage, int(is_fence))
                if (stage and atomics) or (num_barriers and not is_first):
                    stage = 2
                decided = {one for one in taken if one.lstrip("!") not in written}
                for to, condition in self._steps(block):
                    if _opposite(condition) in decided:
                        continue
                    new: State = (
                        frozenset(decided | {condition} if _ONE.fullmatch(condition) else decided),
                        max(stage, 2 * self._goes_around_a_fence(block, to)),
                        has_stored or stores,
                        min(least_work, work_before + work),
                        barriers_before + num_barriers if barriers is not None else 0,
                    )
                    if is_end(block, to):
                        wrong = 0 if barriers is None else abs(barriers - new[4])
                        ends.append(((wrong, -new[3], *cost), block, state))
                    elif to in allowed and not self.goes_back(block, to):
                        others = known.setdefault(to, {})
                        if len(others) > MOST_STATES:
                            new = (frozenset(), *new[1:])
                        if new not in others or cost < others[new][0]:
                            others[new] = (cost, (block, state))
        if not ends:
            return []
        _, block, state = min(ends, key=lambda end: end[0])
        path = [block]
        while (step := known[block][state][1]) is not None:
            block, state = step
            path.append(block)
        return path[::-1]

    def _steps(self, block: int) -> list[tuple[int, str]]:
        """The blocks that a block may go on to, -1 for the end, and what has to hold for each."""
        last, after = self.blocks[block][-1], self.after[block]
        if last.name == "EXIT":
            after = [*after, -1]
        if not last.leads_away or not last.condition:
            return [(to, "") for to in after]
        falls, *jumps = after
        return [(falls, _opposite(last.condition)), *((to, last.condition) for to in jumps)]

    def code(self, path: Iterable[int]) -> Code:
        """The instructions of blocks, one behind the other."""
        return [one for block in path for one in self.blocks[block]]


_ONE = re.compile(r"!?U?P\d")


def _opposite(condition: str) -> str:
    return condition.removeprefix("!") if condition.startswith("!") else f"!{condition}"
