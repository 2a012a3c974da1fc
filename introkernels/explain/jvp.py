"""Jacobian-vector products: what a tangent at the explained tensors does to all logits at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from introkernels.explain.explainers import Position, Tensors
from introkernels.explain.forward_mode import LinearLayers
from introkernels.explain.network import Network, plain_attention, sum_over

Jvp = Literal["auto", "forward", "double_backward", "finite_difference"]

JVPS: tuple[Jvp, ...] = get_args(Jvp)

Products = Callable[[Tensors], Tensor]
"""From tangents ``[B, *S]`` of the explained tensors to ``[B, C]``."""


def products(network: Network, positions: list[Position], jvp: Jvp) -> Products:
    """Products with the Jacobian of the logits, averaged over the positions.

    Rows must not be coupled. Each row's tangent is scaled to a largest entry of about 1 on its way
    through the model, so that neither half precision nor a finite difference loses it.
    """
    unscaled = _Automatic(network, positions) if jvp == "auto" else _WAYS[jvp](network, positions)

    def scaled(tangents: Tensors) -> Tensor:
        scale = _scale(tangents)
        ones = tuple(
            (t / _like(scale, t)).to(value.dtype)
            for t, value in zip(tangents, positions[0].values, strict=True)
        )
        return unscaled(ones).to(scale.dtype) * scale[:, None]

    return scaled


class _Automatic:
    """The first way that the model supports, which is said if it is not the usual one."""

    def __init__(self, network: Network, positions: list[Position]) -> None:
        self._network = network
        self._positions = positions
        self._chosen: Products | None = None

    def __call__(self, tangents: Tensors) -> Tensor:
        if self._chosen is not None:
            return self._chosen(tangents)
        failures = []
        for name, way in _WAYS.items():
            try:
                chosen = way(self._network, self._positions)
                result = chosen(tangents)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as failure:
                failures.append(f"{name}: {str(failure).strip().splitlines()[0]}")
                continue
            if failures:
                warnings.warn(
                    f"jvp='auto' takes {name!r} for this model, as the ways before it failed "
                    f"({'; '.join(failures)})",
                    stacklevel=2,
                )
            self._chosen = chosen
            return result
        raise RuntimeError(f"no Jacobian-vector product of this model: {'; '.join(failures)}")


class _Forward:
    """Dual numbers: a forward pass and its tangent for each product."""

    def __init__(self, network: Network, positions: list[Position]) -> None:
        self._network = network
        self._positions = positions
        self._layers = {id(position): LinearLayers() for position in positions}

    def __call__(self, tangents: Tensors) -> Tensor:
        return sum_over(self._positions, lambda position: self._at(position, tangents))

    def _at(self, position: Position, tangents: Tensors) -> Tensor:
        layers = self._layers[id(position)]
        with torch.no_grad(), forward_ad.dual_level(), plain_attention(), layers:
            logits = self._network(
                lambda _: tuple(
                    # Copies, which the model may change in place.
                    forward_ad.make_dual(value.clone(), tangent.clone())
                    for value, tangent in zip(position.values, tangents, strict=True)
                )
            )
            tangent: Tensor | None = forward_ad.unpack_dual(logits).tangent
            return torch.zeros_like(logits) if tangent is None else tangent


class _DoubleBackward:
    """The product with the Jacobian from two with its transpose, exact.

    ``w(u) = J^T u`` is linear in ``u``, so the product of its transposed Jacobian with a tangent is
    ``J t``: one pass and two derivatives for the first product, one more for each other.
    """

    def __init__(self, network: Network, positions: list[Position]) -> None:
        self._graphs = [(position, *self._graph(network, position)) for position in positions]

    @staticmethod
    def _graph(network: Network, position: Position) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        variables = tuple(value.clone().requires_grad_() for value in position.values)
        with torch.enable_grad(), plain_attention():
            logits = network(lambda _: tuple(variable.clone() for variable in variables))
            cotangent = torch.zeros_like(logits, requires_grad=True)
            if not logits.requires_grad:
                return cotangent, ()
            with torch.autocast(logits.device.type, enabled=False):
                transposed = torch.autograd.grad(
                    logits, variables, cotangent, create_graph=True, allow_unused=True
                )
        if _has_once_differentiable(transposed):
            raise RuntimeError("a function of the model is marked with @once_differentiable")
        return cotangent, transposed

    def __call__(self, tangents: Tensors) -> Tensor:
        results = {id(p): self._product(u, w, tangents) for p, u, w in self._graphs}
        return sum_over([p for p, _, _ in self._graphs], lambda position: results[id(position)])

    @staticmethod
    def _product(
        cotangent: Tensor, transposed: tuple[Tensor | None, ...], tangents: Tensors
    ) -> Tensor:
        used = [
            (w, tangent)
            for w, tangent in zip(transposed, tangents, strict=bool(transposed))
            if w is not None and w.requires_grad
        ]
        if not used:
            return torch.zeros_like(cotangent)
        with torch.autocast(cotangent.device.type, enabled=False):
            product: Tensor | None
            (product,) = torch.autograd.grad(
                [w for w, _ in used],
                cotangent,
                [tangent.to(w.dtype) for w, tangent in used],
                retain_graph=True,
                allow_unused=True,
            )
        return torch.zeros_like(cotangent) if product is None else product


class _FiniteDifference:
    """Central differences, for models with neither of the other derivatives.

    The step is ``eps^(1/3)`` of the row's largest value, where the errors of truncation and of
    rounding meet. Autocast is off, as its rounding would drown the difference.
    """

    def __init__(self, network: Network, positions: list[Position]) -> None:
        self._network = network
        self._positions = positions

    def __call__(self, tangents: Tensors) -> Tensor:
        return sum_over(self._positions, lambda position: self._at(position, tangents))

    def _at(self, position: Position, tangents: Tensors) -> Tensor:
        largest = _largest(position.values)
        eps = max(torch.finfo(value.dtype).eps for value in position.values)
        step = eps ** (1 / 3) * torch.where(largest > 0, largest, 1)
        steps = tuple(
            (_like(step, value) * t).to(value.dtype)
            for value, t in zip(position.values, tangents, strict=True)
        )

        def logits_at(sign: int) -> Tensor:
            return self._network(
                lambda _: tuple(v + sign * s for v, s in zip(position.values, steps, strict=True))
            )

        # Without gradients an encoder's fast path computes something else at padding.
        autocast_off = torch.autocast(step.device.type, enabled=False)
        with torch.no_grad(), autocast_off, plain_attention():
            difference: Tensor = logits_at(1).to(step.dtype) - logits_at(-1)
        return difference.div_(2 * step[:, None])


_WAYS: dict[str, Callable[[Network, list[Position]], Products]] = {
    "forward": _Forward,
    "double_backward": _DoubleBackward,
    "finite_difference": _FiniteDifference,
}


def _has_once_differentiable(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the graph has a backward of ``torch.autograd.function.once_differentiable``.

    Its results hang on an error node that leads nowhere: derivatives by an earlier tensor don't
    reach that node, and lack a part instead of raising.
    """
    nodes = [tensor.grad_fn for tensor in tensors if tensor is not None]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)
    return False


def _scale(tangents: Tensors) -> Tensor:
    """Powers of two ``[B]``, which change no bit, next to each row's largest entry; 1 for none."""
    largest = _largest(tangents)
    _, exponent = torch.frexp(largest)
    usual = largest.isfinite() & (largest > 0)
    return torch.ldexp(torch.ones_like(largest), torch.where(usual, exponent, 0))


def _largest(tensors: Tensors) -> Tensor:
    """Each row's largest magnitude ``[B]``, float64 if a tensor is, else float32."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    parts = [t.reshape(len(t), -1) for t in tensors if t.numel()]
    if not parts:
        return tensors[0].new_zeros(len(tensors[0]), dtype=wide)
    return torch.stack([part.abs().amax(1).to(wide) for part in parts]).amax(0)


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """Numbers ``[B]`` in a shape that multiplies the rows of a tensor, and its dtype or float32."""
    return rows.to(torch.promote_types(tensor.dtype, torch.float32)).reshape(
        -1, *(1,) * (tensor.dim() - 1)
    )
