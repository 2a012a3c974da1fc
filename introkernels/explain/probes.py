"""Random numbers of explanations, which leave those of the training alone."""

from __future__ import annotations

import torch
from torch import Tensor

_OWN: dict[torch.device, tuple[int, torch.Generator]] = {}


def own_generator(device: torch.device) -> torch.Generator:
    """The package's generator of a device: it starts from the seed of ``torch.manual_seed``.

    Setting another seed starts it anew.
    """
    seed = torch.initial_seed()
    if _OWN.get(device, (None,))[0] != seed:
        generator = torch.Generator(device)
        generator.manual_seed(seed)
        _OWN[device] = seed, generator
    return _OWN[device][1]


def random_signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent +1 and -1 with equal chance, in the shape, dtype and place of a tensor."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return bits.to(like.dtype).mul_(2).sub_(1)
