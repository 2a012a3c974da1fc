"""What a kernel reaches of a plain copy, from its main loop and the program of each warp."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from roofline import machine, simulate
from roofline.graph import Graph, Loop
from roofline.machine import LANES, SCHEDULERS, UNITS, Gpu
from roofline.sass import LOADS, Code, Instruction, Kernel, operations

Weight = Callable[[Instruction], int]


@dataclass(frozen=True)
class Work:
    """What a launch does, as far as its code doesn't tell.

    Attributes:
        blocks: of the launch.
        warps: of a block.
        moved: bytes that have to be read and written in all: the same as a copy would move.
        read: those of them that the main loops read.
        element: bytes of a number.
        lanes: that work on a row; sums go around among as many.
        numbers: that are read for each class (logits and teacher logits: 2).
        turns: how often a block comes to its main loop.
        shared: bytes of shared memory of a block, beside those that its code knows of.
        besides: bytes that it moves and a copy wouldn't.
        is_dealt: whether warps get iterations one by one, so that some may have none; otherwise all
            take part in each, or have rows of their own.
        is_split: whether a row has several blocks.
    """

    blocks: int
    warps: int
    moved: int
    read: int
    element: int
    lanes: int
    numbers: int = 1
    turns: int = 1
    shared: int = 0
    besides: int = 0
    is_dealt: bool = False
    is_split: bool = False


@dataclass(frozen=True)
class Prediction:
    """What machine code tells of a launch on a GPU.

    Attributes:
        instructions: of the main loop for each class, or each number of statistics.
        by_unit: these, by what executes them.
        issue: the share of a copy that slots of issue allow, all code counted.
        units: the share that each unit allows.
        share: what a simulated multiprocessor reaches.
    """

    instructions: float
    by_unit: dict[str, float]
    issue: float
    units: dict[str, float]
    share: float

    @property
    def cap(self) -> float:
        """What instructions allow, however many warps there are."""
        return min(self.issue, *self.units.values())

    @property
    def bound(self) -> str:
        """The scarcest of slots and units."""
        caps = {"issue": self.issue, **self.units}
        return min(caps, key=lambda name: caps[name])


def _loaded(code: Sequence[Instruction], width: int) -> int:
    """Bytes of a lane that loads of a width or more bring."""
    return sum(one.width for one in code if one.name in LOADS and one.width >= width)


class Walk:
    """A kernel's main loop, and what is around it.

    The main loop is the innermost one that loads most, by the widest loads, and not behind a fence,
    where the last block of a launch adds up what all have found. The loop around it is passed as
    often as a block comes to it, others that load are gone around, and the rest is passed once;
    but sums that go around among lanes, one step at a time, take as many steps as there are.

    Attributes:
        loop: the instructions of an iteration; empty where nothing is loaded in a loop.
        width: bytes of a lane that its loads bring at a time.
    """

    def __init__(self, kernel: Kernel, element: int, lanes: int) -> None:
        self._graph = Graph(kernel.code)
        self._shuffles = max(1, int(math.log2(min(lanes, LANES))))
        self._is_alone = lanes <= LANES
        self._loops: list[Loop] = []
        candidates = []
        for loop in self._graph.loops:
            if loop.head in self._graph.fenced:
                continue
            path = self._iteration(loop, element)
            code = self._graph.code(path)
            width = max((one.width for one in code if one.name in LOADS), default=0)
            if width:
                candidates.append((width, _loaded(code, width), len(code), loop, path))
        self.width = 0
        self.loop: Code = []
        for width, loaded, length, loop, path in candidates:
            inner = [
                other
                for other in candidates
                if other[3].blocks < loop.blocks and other[0] == width and 3 * other[1] >= loaded
            ]
            # Of two loops over the same, the shorter is the common way.
            if not inner and (width, loaded, -length) > (
                self.width,
                _loaded(self.loop, self.width),
                -len(self.loop),
            ):
                self.width, self.loop = width, self._graph.code(path)
                self._loops = [loop]
        if self._loops:
            around = [one for one in self._graph.loops if self._loops[0].blocks < one.blocks]
            self._loops += sorted(around, key=lambda one: len(one.blocks))
        else:
            self.width = max((one.width for one in kernel.code if one.name in LOADS), default=4)
        # Parts to merge, rows that need a second look.
        self._others = {
            block
            for loop in self._graph.loops
            if loop not in self._loops and _loaded(self._graph.code(loop.blocks), 0)
            for block in loop.blocks
        }
        self._others.difference_update(*(loop.blocks for loop in self._loops[:1]))

    def _iteration(self, loop: Loop, element: int) -> list[int]:
        """An iteration that loads most and computes with what it loads."""
        graph = self._graph
        code = graph.code(loop.blocks)
        width = max((one.width for one in code if one.name in LOADS), default=0)
        return graph.way(
            [loop.head],
            _is_end(loop.head),
            lambda one: _loaded([one], width),
            inside=loop.blocks,
            least_work=_loaded(code, width) // element,
        )

    def programs(self, iterations: Sequence[int], turns: int, *, is_split: bool) -> list[Code]:
        """What each warp of a block executes, with its number of iterations of the main loop.

        Before the loop that is the way that loads and computes most, behind it the one that stores,
        loads and computes most, or, of a block that is one of several of a row, the one through the
        fence where all but the last of them are at their end. What comes behind a barrier is up to
        the first warp: the others take the shortest way from there on with the same barriers.
        """
        end = _parted if is_split else _finished
        first = self._program(iterations[0], turns, end, None)
        barriers = sum(one.name == "BAR" for one in first)
        of = cache(lambda number: self._program(number, turns, end, barriers))
        return [first, *map(of, iterations[1:])]

    def _program(self, iterations: int, turns: int, weight: Weight, barriers: int | None) -> Code:
        """Of a warp: what weighs behind its loops, and how many barriers it passes."""
        graph, program = self._graph, self.loop * iterations
        if not self._loops:
            return self._passed(graph.way([0], _is_end(-1), weight, barriers=barriers))
        inner, *outer = self._loops
        if outer:
            head, blocks = outer[0].head, outer[0].blocks
            there = graph.way([head], _is_end(inner.head), self._loads, inside=blocks)
            back = graph.way(self._exits(inner), _is_end(head), _shuffled, inside=blocks)
            program = (self._passed(there) + program + self._passed(back)) * turns
        outermost = outer[0] if outer else inner
        begin = self._passed(
            graph.way([0], _is_end(outermost.head), self._computes, around=self._others)
        )
        if barriers is not None:
            barriers -= sum(one.name == "BAR" for one in begin + program)
        exits = self._exits(outermost)
        end = graph.way(
            exits,
            _is_end(-1),
            weight,
            barriers=barriers,
            is_first=barriers is None,
            is_alone=self._is_alone,
            around=self._others,
        )
        return begin + program + self._passed(end)

    def _loads(self, one: Instruction) -> int:
        return (one.name in LOADS) * (_MORE if one.width >= self.width else 1)

    def _computes(self, one: Instruction) -> int:
        is_wide = one.name in LOADS and one.width >= self.width
        return _MORE if is_wide else operations(one)

    def _exits(self, loop: Loop) -> set[int]:
        return {to for block in loop.blocks for to in self._graph.after[block]} - loop.blocks

    def _passed(self, path: Sequence[int]) -> Code:
        """The instructions of a path, with all steps of sums that go around among lanes."""
        graph, result = self._graph, []
        around = [
            loop.blocks - self._loops[0].blocks if self._loops else loop.blocks
            for loop in graph.loops
            if sum(one.name == "SHFL" for one in graph.code(loop.blocks)) > 0
            and not any(other.head == loop.head for other in self._loops)
        ]
        for block in path:
            times = self._shuffles if any(block in blocks for blocks in around) else 1
            result += graph.blocks[block] * times
        return result


# What counts before all else: a load of a vector before those of single numbers.
_MORE = 1000


def _is_end(end: int) -> Callable[[int, int], bool]:
    return lambda block, to: to == end


def _finished(one: Instruction) -> int:
    return _MORE * one.width if one.name in (*LOADS, "STG", "SHFL") else operations(one)


def _parted(one: Instruction) -> int:
    return int(one.name == "MEMBAR")


def _shuffled(one: Instruction) -> int:
    return int(one.name == "SHFL")


def predict(kernel: Kernel, work: Work, gpu: Gpu) -> Prediction:
    """The prediction for a launch."""
    walk = Walk(kernel, work.element, work.lanes)
    of_block = work.moved / work.blocks
    iteration = _loaded(walk.loop, walk.width) * LANES
    iterations = work.read / work.blocks / work.turns / iteration if iteration else 0
    if work.is_dealt:
        rounds = [max(0, math.ceil((iterations - warp) / work.warps)) for warp in range(work.warps)]
    else:
        rounds = [math.ceil(iterations / work.warps)] * work.warps
    programs = walk.programs(rounds, work.turns, is_split=work.is_split)
    issued = sum(
        one.width * LANES
        for program in programs
        for one in program
        if simulate.carries(one, walk.width)
    )
    scale = (of_block + work.besides / work.blocks) / issued
    made = {id(program): simulate.steps_of(program, gpu, walk.width, scale) for program in programs}
    steps = [made[id(program)] for program in programs]
    blocks = gpu.resident(kernel.registers, kernel.shared + work.shared, work.warps)
    rate = simulate.bytes_a_clock(steps, gpu, blocks) / gpu.bytes_a_clock
    classes = _loaded(walk.loop, walk.width) / work.element / work.numbers
    counts = Counter(map(machine.unit_of, walk.loop))
    by_unit = {unit: counts[unit] / classes for unit in UNITS if counts[unit]}
    busy: dict[str, float] = defaultdict(float)
    for program in steps:
        for step in program:
            busy[step.unit] += step.busy / (1 if step.unit == "LSU" else SCHEDULERS)
    clocks = of_block / gpu.bytes_a_clock
    return Prediction(
        sum(by_unit.values()),
        by_unit,
        clocks * SCHEDULERS / sum(map(len, steps)),
        {unit: clocks / busy[unit] for unit in UNITS if busy[unit]},
        min(1.0, rate * work.moved / (work.moved + work.besides)),
    )
