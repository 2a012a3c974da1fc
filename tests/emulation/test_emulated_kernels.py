"""Kernels without a fault give the right results under the emulation, in every order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

INT_TYPES = {"int": torch.int32, "long": torch.int64}
FLOAT_TYPES = {"float": torch.float32, "double": torch.float64}


@pytest.mark.parametrize("threads", [32, 96, 1024])
@pytest.mark.parametrize("columns", [1, 31, 1000])
def test_sums_over_a_block(library, order: str, columns: int, threads: int) -> None:
    x = torch.randint(-100, 100, (7, columns)).float()
    out = torch.full((7,), torch.nan)
    library.row_sums(x, 7, columns, threads, out)
    # Sums of small integers are exact in any order.
    assert torch.equal(out, x.sum(1))


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (45, 70), (100, 3)])
def test_transpose_through_shared_memory(library, order: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    out = torch.full((shape[1], shape[0]), torch.nan)
    library.transpose(x, *shape, out)
    assert torch.equal(out, x.T)


@pytest.mark.parametrize("blocks", [1, 2, 13])
def test_last_block_to_take_a_ticket_sees_all_others(library, order: str, blocks: int) -> None:
    x = torch.randint(-100, 100, (3001,)).float()
    ticket = torch.zeros(1, dtype=torch.int32)
    partial, out = torch.full((blocks,), torch.nan), torch.full((1,), torch.nan)
    library.sum_by_tickets(x, x.numel(), blocks, partial, ticket, out)
    assert out.item() == x.sum().item()
    assert ticket.item() == blocks


def source_lane(lane: int, lane_mask: int, width: int) -> int:
    """Where CUDA takes a lane's value from: its own where the source is out of reach."""
    source = lane ^ lane_mask % 32
    # Parts of the warp that come before can be reached.
    return source if source < lane // width * width + width else lane


@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_shuffles(library, width: int) -> None:
    values = torch.randn(32)
    for lane_mask in (0, 1, 2, 5, 7, 16, 31, 32, 33):
        out = torch.full((32,), torch.nan)
        library.shuffle_float(values, lane_mask, width, out)
        sources = [source_lane(lane, lane_mask, width) for lane in range(32)]
        assert torch.equal(out, values[sources]), lane_mask


@pytest.mark.parametrize("name", [*INT_TYPES, *FLOAT_TYPES])
def test_shuffles_of_each_type(library, order: str, name: str) -> None:
    dtype = (INT_TYPES | FLOAT_TYPES)[name]
    # Every byte counts.
    values = torch.randint(-(2**31), 2**31, (32 * dtype.itemsize // 4,)).int().view(dtype)
    out = torch.zeros_like(values)
    getattr(library, f"shuffle_{name}")(values, 9, 32, out)
    expected = values[[lane ^ 9 for lane in range(32)]]
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


def test_groups_of_a_warp_go_their_own_ways(library, order: str) -> None:
    out = torch.full((64,), -1, dtype=torch.int32)
    library.groups(out)
    lane = torch.arange(32)
    rounds = lane // 8 + 1
    # Each round adds one and swaps neighbours.
    expected = (lane ^ rounds % 2) + rounds
    assert torch.equal(out.long(), expected.repeat(2))


def turns(library, blocks: int = 5, threads: int = 96) -> Tensor:
    """When each thread came by: ``[blocks, 2, threads]``, before and after a barrier."""
    clock = torch.zeros(1, dtype=torch.int32)
    noted = torch.full((blocks, threads, 2), -1, dtype=torch.int32)
    library.note_turns(blocks, threads, clock, noted)
    assert sorted(noted.flatten().tolist()) == list(range(2 * blocks * threads))
    return noted.transpose(1, 2)


@pytest.mark.parametrize("named", [None, "", "ascending", "descending"])
def test_order_of_blocks_warps_and_lanes(
    library, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    if named is not None:
        monkeypatch.setenv("INTROKERNELS_EMULATION_ORDER", named)
    noted = turns(library)
    if named == "descending":
        noted = noted.flip(0, 2)
    assert torch.equal(noted.flatten(), torch.arange(noted.numel(), dtype=torch.int32))


def test_shuffled_orders(library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTROKERNELS_EMULATION_ORDER", "shuffled:1")
    launches = torch.stack([turns(library) for _ in range(6)])
    # Blocks by when their first thread came: 5 of them have 20 orders here.
    assert len({tuple(launch[:, 0].amin(1).argsort().tolist()) for launch in launches}) > 1
    # Threads by when they came, in each launch, in each block, and on each side of a barrier.
    orders = launches.argsort(3).flatten(0, 2)
    assert len({tuple(order) for order in orders.tolist()}) == len(orders)
    # Lanes of a warp are shuffled, and so are warps.
    assert (orders.diff() != 1).any(1).all()
    assert set((orders[:, 0] // 32).tolist()) == {0, 1, 2}


def test_unknown_order_is_refused(library, monkeypatch: pytest.MonkeyPatch) -> None:
    for order in ("random", "shuffled:", "shuffled:x", "shuffled:-1", "Ascending"):
        monkeypatch.setenv("INTROKERNELS_EMULATION_ORDER", order)
        with pytest.raises(RuntimeError, match=f"INTROKERNELS_EMULATION_ORDER is '{order}'; known"):
            library.nothing(1, 32, 0)


def test_each_block_finds_its_shared_memory_unwritten(library, order: str) -> None:
    out = torch.zeros(3 * 52, dtype=torch.uint8)
    library.copy_shared(3, 52, out)
    assert (out == 0xFF).all()


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes", "reason"),
    [
        (0, 32, 0, r"no grid is \(0, 1, 1\) blocks large"),
        (1, 0, 0, r"no block is \(0, 1, 1\) threads large"),
        (1, 1056, 0, r"no block is \(1056, 1, 1\) threads large"),
        (1, 32, 49_153, "no block has 49153 bytes of shared memory"),
    ],
)
def test_launches_that_no_gpu_takes(
    library, grid: int, threads: int, shared_bytes: int, reason: str
) -> None:
    with pytest.raises(RuntimeError, match=f"kernel nothing can't be launched: {reason}"):
        library.nothing(grid, threads, shared_bytes)
