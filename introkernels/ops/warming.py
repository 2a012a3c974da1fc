"""What a call would launch, found out on tensors without data; and its compilation in advance."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from introkernels.ops.select import served_by
from introkernels.types import LossParts

if TYPE_CHECKING:
    from introkernels.ops.triton.launch import Launch


def record(
    kernels: Any, function: Callable[..., Any], arguments: Sequence[Any], keywords: dict[str, Any]
) -> list[Launch]:
    """The launches that ``function(*arguments, **keywords)`` needs, each specialisation once.

    They are those of a forward without a gradient, of one with it, and of its backward, for an
    incoming gradient that has memory of its own and for one that is a single number expanded.

    Args:
        kernels: the module of Triton's operators.
        function: a loss, a module, or any function that calls them.
        arguments: its arguments, of which only shapes, strides and dtypes are looked at.
        keywords: its keywords, likewise.
    """
    # Not before it is used: whoever sets TRITON_INTERPRET imports Triton with this package.
    from introkernels.ops.triton.launch import recording

    if isinstance(function, nn.Module):
        # Its buffers have to lie where the arguments lie.
        function = copy.deepcopy(function).to("meta")
    everything = _tensors((*arguments, *keywords.values()))
    as_they_are = any(tensor.requires_grad for tensor in everything)
    found: dict[Any, Launch] = {}

    def note(launch: Launch) -> None:
        found.setdefault(_specialisation(launch), launch)

    def call() -> Any:
        def bare(value: Any) -> Any:
            return _without_data(value, as_they_are)

        return function(*map(bare, arguments), **{name: bare(v) for name, v in keywords.items()})

    with served_by(kernels), recording(note):
        with torch.no_grad():
            call()
        for expanded in (False, True):
            with torch.enable_grad():
                result = call()
            loss = result.loss if isinstance(result, LossParts) else result
            if isinstance(loss, Tensor) and loss.requires_grad:
                gradient = torch.ones_like(loss)
                loss.backward(gradient[:1].expand_as(loss) if expanded and loss.dim() else gradient)
    return list(found.values())


def compile_all(launches: Sequence[Launch], progress: Callable[[int, int, str], None]) -> int:
    """Compile what ``launches`` need for the current device; returns how many kernels that is."""
    compiled = set()
    for done, launch in enumerate(launches):
        progress(done, len(launches), launch.kernel.__name__)
        kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        compiled.add(id(kernel))
    progress(len(launches), len(launches), "")
    return len(compiled)


def show_progress(done: int, total: int, name: str) -> None:
    """One line on the standard error, which moves on a terminal and stays elsewhere."""
    if sys.stderr.isatty():
        text = f"kernel {done + 1} of {total}: {name}" if name else f"{total} kernels are ready"
        end = "" if name else "\n"
        print(f"\r\033[Kintrokernels: {text}", end=end, file=sys.stderr, flush=True)
    elif done == 0:
        print(f"introkernels: getting {total} Triton kernels ready", file=sys.stderr, flush=True)


def device_of(values: Iterable[Any]) -> int:
    """The number of the GPU of the first tensor that lies on one; -1 (no change) without any."""
    return next((tensor.get_device() for tensor in _tensors(values) if tensor.is_cuda), -1)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _without_data(value: Any, as_they_are: bool) -> Any:
    """A tensor of the same shape, strides and dtype that has no memory; in tuples too."""
    if isinstance(value, Tensor):
        bare = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta", layout=value.layout
        )
        needs = value.requires_grad if as_they_are else value.is_floating_point()
        return bare.requires_grad_(needs)
    if isinstance(value, tuple):
        items = [_without_data(item, as_they_are) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _specialisation(launch: Launch) -> Any:
    """What a kernel is compiled for, as far as it can be told without asking Triton.

    Triton tells tensors apart by dtype (and alignment, which tensors without data share), and
    integers by width, by being 1 and by being divisible by 16.
    """

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype
        if isinstance(value, tuple):
            return tuple(map(kind, value))
        if isinstance(value, bool) or not isinstance(value, int):
            return value if value is None else type(value)
        return "int", -(2**31) <= value < 2**31, value < 2**63, value == 1, value % 16 == 0

    return launch.kernel, kind(launch.arguments), tuple(sorted(map(repr, launch.options.items())))
