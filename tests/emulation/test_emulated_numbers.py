"""Numbers of the emulation have the bits that a GPU gives them."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor

HALF_TYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}
# A GPU makes every NaN that it rounds into this one.
NAN_BITS = 0x7FFF


def convert(library, name: str, source: Tensor, result: torch.dtype) -> Tensor:
    """What the function of that name makes of each number."""
    out = torch.zeros(source.shape, dtype=result)
    pointers = (ctypes.c_void_p(source.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    library.function(name)(pointers[0], ctypes.c_int(source.numel()), pointers[1])
    return out


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every number of a half type."""
    return torch.arange(-(2**15), 2**15).short().view(dtype)


def probes(dtype: torch.dtype, wide: torch.dtype) -> Tensor:
    """All numbers of a half type, what lies halfway between two, and the neighbours of both."""
    numbers = all_numbers(dtype).to(wide)
    numbers = numbers[numbers.isfinite()].sort().values
    halfway = (numbers[1:] + numbers[:-1]) / 2
    # Beyond the largest number the next power of two counts as its neighbour.
    limit = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4) * torch.tensor([1.0, -1.0])
    centers = torch.cat([numbers, halfway, limit.to(wide)])
    infinity = torch.tensor(torch.inf, dtype=wide)
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan], dtype=wide)
    random = torch.randn(10_000, dtype=wide) * 10 ** (torch.rand(10_000, dtype=wide) * 90 - 48)
    return torch.cat(
        [
            *(centers, torch.nextafter(centers, infinity), torch.nextafter(centers, -infinity)),
            *(extremes, random.to(wide)),
        ]
    )


@pytest.mark.parametrize("name", HALF_TYPES)
def test_widened_numbers(library, name: str) -> None:
    numbers = all_numbers(HALF_TYPES[name])
    widened = convert(library, f"widen_{name}", numbers.view(torch.int16), torch.float32)
    expected = numbers.float()
    assert torch.equal(widened.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(widened[known].view(torch.int32), expected[known].view(torch.int32))


@pytest.mark.parametrize("name", HALF_TYPES)
def test_rounded_floats(library, name: str) -> None:
    source = probes(HALF_TYPES[name], torch.float32)
    bits = convert(library, f"narrow_{name}", source, torch.int16)
    expected = source.to(HALF_TYPES[name]).view(torch.int16)
    assert torch.equal(bits, torch.where(source.isnan(), NAN_BITS, expected))


@pytest.mark.parametrize("name", HALF_TYPES)
def test_rounded_doubles(library, name: str) -> None:
    """Once, and not to float32 before, which makes ties of what lies next to them."""
    dtype = HALF_TYPES[name]
    source = probes(dtype, torch.float64)
    bits = convert(library, f"narrow_double_{name}", source, torch.int16)
    # A float that is rounded to odd, where a double is no float, keeps its side of every tie.
    narrow = source.float()
    wide = narrow.double()
    off = wide != source
    even = off & (narrow.view(torch.int32) % 2 == 0)
    toward = torch.where(source > wide, torch.inf, -torch.inf).float()
    to_odd = torch.where(even & narrow.isfinite(), torch.nextafter(narrow, toward), narrow)
    expected = to_odd.to(dtype).view(torch.int16)
    assert torch.equal(bits, torch.where(source.isnan(), NAN_BITS, expected))


FLOAT, INT, UNSIGNED = ctypes.c_float, ctypes.c_int, ctypes.c_uint
NAN = math.nan


@pytest.mark.parametrize(
    ("name", "result", "arguments", "expected"),
    [
        # A NaN is left out where there is a number.
        ("larger", FLOAT, (FLOAT(1), FLOAT(2)), 2.0),
        ("larger", FLOAT, (FLOAT(NAN), FLOAT(2)), 2.0),
        ("larger", FLOAT, (FLOAT(1), FLOAT(NAN)), 1.0),
        ("larger", FLOAT, (FLOAT(NAN), FLOAT(NAN)), NAN),
        ("smaller", FLOAT, (FLOAT(1), FLOAT(2)), 1.0),
        ("smaller", FLOAT, (FLOAT(NAN), FLOAT(2)), 2.0),
        ("smaller", FLOAT, (FLOAT(NAN), FLOAT(NAN)), NAN),
        ("reciprocal_root", FLOAT, (FLOAT(4),), 0.5),
        ("reciprocal_root", FLOAT, (FLOAT(0),), math.inf),
        ("high_product", UNSIGNED, (UNSIGNED(2**31), UNSIGNED(6)), 3),
        ("first_bit", INT, (INT(0),), 0),
        ("first_bit", INT, (INT(8),), 4),
        ("leading_zeros", INT, (INT(0),), 32),
        ("leading_zeros", INT, (INT(1),), 31),
        ("bits_of", UNSIGNED, (FLOAT(-2),), 0xC0000000),
    ],
)
def test_functions(library, name: str, result: Any, arguments: Any, expected: float) -> None:
    assert library.function(name, result)(*arguments) == pytest.approx(expected, abs=0, nan_ok=True)
