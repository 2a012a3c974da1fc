"""Numbers of the emulation have the bits that a GPU gives them."""

from __future__ import annotations

import ctypes
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


def probes(dtype: torch.dtype) -> Tensor:
    """All numbers of a half type, what lies halfway between two, and the neighbours of both."""
    numbers = all_numbers(dtype).float()
    numbers = numbers[numbers.isfinite()].sort().values
    halfway = (numbers[1:] + numbers[:-1]) / 2
    # Beyond the largest number the next power of two counts as its neighbour.
    limit = torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4) * torch.tensor([1.0, -1.0])
    centers = torch.cat([numbers, halfway, limit])
    infinity = torch.tensor(torch.inf)
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])
    random = torch.randn(10_000) * 10 ** (torch.rand(10_000) * 90 - 48)
    return torch.cat(
        [
            *(centers, torch.nextafter(centers, infinity), torch.nextafter(centers, -infinity)),
            *(extremes, random),
        ]
    )


def test_widened_numbers(library) -> None:
    numbers = all_numbers(torch.float16)
    widened = convert(library, "widen_half", numbers.view(torch.int16), torch.float32)
    expected = numbers.float()
    assert torch.equal(widened.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert torch.equal(widened[known].view(torch.int32), expected[known].view(torch.int32))


@pytest.mark.parametrize("name", HALF_TYPES)
def test_rounded_floats(library, name: str) -> None:
    source = probes(HALF_TYPES[name])
    bits = convert(library, f"narrow_{name}", source, torch.int16)
    expected = source.to(HALF_TYPES[name]).view(torch.int16)
    assert torch.equal(bits, torch.where(source.isnan(), NAN_BITS, expected))


FLOAT, DOUBLE, UNSIGNED = ctypes.c_float, ctypes.c_double, ctypes.c_uint


@pytest.mark.parametrize(
    ("name", "result", "arguments", "expected"),
    [
        ("product", FLOAT, (FLOAT(1 + 2**-23), FLOAT(1 + 2**-23)), 1 + 2**-22),
        ("product_of_doubles", DOUBLE, (DOUBLE(1 + 2**-52), DOUBLE(1 + 2**-52)), 1 + 2**-51),
        ("of_bits", FLOAT, (UNSIGNED(0xC0000000),), -2.0),
    ],
)
def test_functions(library, name: str, result: Any, arguments: Any, expected: float) -> None:
    assert library.function(name, result)(*arguments) == pytest.approx(expected, abs=0, nan_ok=True)
