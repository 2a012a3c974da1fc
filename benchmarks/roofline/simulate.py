"""One multiprocessor that runs the same kernel block after block, clock by clock.

A warp issues its instructions in order: behind the stall that the compiler put after the last one,
and once the scoreboards that it waits for are released. Each of four schedulers issues one
instruction a clock, whichever was ready first; a unit takes one as often as its rate allows; memory
answers after its latency, and no faster than its share of a copy's bandwidth.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from roofline import machine
from roofline.machine import SCHEDULERS, Gpu
from roofline.sass import LOADS, Instruction

# What is run at least, and how often each block that fits: a fresh one takes the place of one that
# ended so many clocks later.
STEPS = 60_000
ROUNDS = 2.5
NEXT_BLOCK = 300


class Step(NamedTuple):
    """An instruction as the simulation knows it; the fields of ``Instruction``, and clocks."""

    unit: str
    busy: float
    latency: float
    moved: float
    is_store: bool
    is_barrier: bool
    stall: int
    sets: int | None
    sets_read: int | None
    waits: tuple[int, ...]


class _Warp:
    """Where a warp of a block stands in its program, and when its scoreboards are released."""

    def __init__(self, block: int, scheduler: int, program: list[Step]) -> None:
        self.block, self.scheduler, self.program = block, scheduler, program
        self.at = 0
        self.boards = [0.0] * 6
        self.has_unit = False

    def begin(self) -> None:
        self.at = 0
        self.boards = [0.0] * 6


def carries(one: Instruction, width: int) -> bool:
    """Whether an instruction moves a kernel's tensors: loads and stores of so many bytes a lane."""
    return one.name in (*LOADS, "STG") and one.width >= width


def steps_of(code: Sequence[Instruction], gpu: Gpu, width: int, scale: float) -> list[Step]:
    """The steps of a warp.

    Args:
        code: what it executes.
        gpu: where.
        width: of the loads and stores that move the kernel's tensors.
        scale: bytes that these move for each byte of theirs.
    """
    known: dict[tuple[int, bool], Step] = {}
    narrow = 0
    found = []
    for one in code:
        moves = carries(one, width)
        # Loads one by one: all but the first of 16 bytes find the line of their neighbours.
        is_hit = False
        if one.name == "LDG" and not moves and one.width <= 4:
            is_hit = narrow % (16 // one.width) != 0
            narrow += 1
        key = id(one), is_hit
        if key not in known:
            known[key] = Step(
                machine.unit_of(one),
                machine.clocks_of(one, gpu),
                machine.HIT if is_hit else machine.latency_of(one, gpu),
                one.width * machine.LANES * scale if moves else 0.0,
                one.name == "STG",
                one.name == "BAR",
                one.stall,
                one.sets,
                one.sets_read,
                one.waits,
            )
        found.append(known[key])
    return found


def bytes_a_clock(programs: Sequence[Sequence[Step]], gpu: Gpu, blocks: int) -> float:
    """Bytes that a multiprocessor moves in a clock.

    Args:
        programs: of the warps of a block.
        gpu: whose multiprocessor it is.
        blocks: that it holds at a time.
    """
    unique = {id(program): list(program) for program in programs}
    warps = [
        _Warp(block, (block * len(programs) + number) % SCHEDULERS, unique[id(program)])
        for block in range(blocks)
        for number, program in enumerate(programs)
    ]
    latency = gpu.latency * gpu.clock
    # Blocks don't run in step: they begin one after the other.
    alone = latency + max(sum(step.stall for step in program) for program in programs)
    begins = [alone * block / blocks for block in range(blocks)]
    left = max(STEPS, ROUNDS * blocks * sum(map(len, programs)))
    scheduler_free = [0.0] * SCHEDULERS
    unit_free: dict[tuple[str, int], float] = defaultdict(float)
    memory_free = 0.0
    waiting: dict[int, list[int]] = defaultdict(list)
    active = [len(programs)] * blocks
    moved = now = 0.0
    events = [(begins[warp.block], number) for number, warp in enumerate(warps)]
    heapq.heapify(events)

    while left > 0:
        now, number = heapq.heappop(events)
        warp = warps[number]
        step = warp.program[warp.at]
        unit = step.unit, 0 if step.unit == "LSU" else warp.scheduler
        if step.busy and not warp.has_unit and unit_free[unit] > now:
            # Its turn comes when those before it are through.
            warp.has_unit = True
            heapq.heappush(events, (unit_free[unit], number))
            unit_free[unit] += step.busy
            continue
        # Stores wait while so much is before them that queues are full.
        if step.is_store and memory_free - latency > now:
            heapq.heappush(events, (memory_free - latency, number))
            continue
        start = max(now, scheduler_free[warp.scheduler])
        scheduler_free[warp.scheduler] = start + 1
        if step.busy and not warp.has_unit:
            unit_free[unit] = start + step.busy
        warp.has_unit = False
        answer = start + step.latency
        if step.moved:
            memory_free = max(memory_free, start) + step.moved / gpu.bytes_a_clock
            answer = max(answer, memory_free + latency)
            if start >= begins[-1]:
                moved += step.moved
        boards = warp.boards
        if step.sets is not None:
            boards[step.sets] = max(boards[step.sets], answer)
        if step.sets_read is not None:
            boards[step.sets_read] = max(boards[step.sets_read], start + machine.READ)
        warp.at += 1
        left -= 1

        ready, released = start + step.stall, [number]
        if warp.at == len(warp.program):
            released = []
            active[warp.block] -= 1
            if not active[warp.block]:
                active[warp.block] = len(programs)
                first = warp.block * len(programs)
                released = list(range(first, first + len(programs)))
                ready = start + NEXT_BLOCK
                for other in released:
                    warps[other].begin()
        elif step.is_barrier:
            waiting[warp.block].append(number)
            released = []
        if len(waiting[warp.block]) == active[warp.block]:
            released, waiting[warp.block] = waiting[warp.block], []
            ready = start + machine.BARRIER
        for other in released:
            boards = warps[other].boards
            waits = warps[other].program[warps[other].at].waits
            heapq.heappush(events, (max([ready, *(boards[board] for board in waits)]), other))
    return moved / (now - begins[-1])
