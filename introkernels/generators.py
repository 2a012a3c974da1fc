"""Random numbers that a training run can stop in the middle of, and go on from."""

from __future__ import annotations

from typing import Any

import torch

from introkernels import checks


class ResumableGenerator:
    """The caller's generator, or one that starts from the seed that ``torch.manual_seed`` set.

    Args:
        given: the caller's, or None.

    Raises:
        TypeError: it is neither.
    """

    def __init__(self, given: torch.Generator | None) -> None:
        if given is not None and not isinstance(given, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {checks.describe(given)}")
        self._is_given = given is not None
        self._generator = given
        self._loaded: dict[str, Any] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator. The caller's may be on another device, for its user to refuse."""
        if not self._is_given and (self._generator is None or self._generator.device != device):
            self._generator = torch.Generator(device)
            self._generator.manual_seed(torch.initial_seed())
        assert self._generator is not None
        loaded, self._loaded = self._loaded, {}
        # Generators of other kinds of devices have other states: there it starts from the seed.
        if loaded and loaded["device"] == self._generator.device.type:
            # A state is read on the CPU, wherever the file was loaded to.
            self._generator.set_state(loaded["state"].cpu())
        return self._generator

    def state(self) -> dict[str, Any]:
        """What `restore` takes; empty before the first use of a generator of its own."""
        if self._loaded or self._generator is None:
            return self._loaded
        return {
            "device": self._generator.device.type,
            "state": self._generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state, when the generator is next used."""
        if not self._is_given:
            self._generator = None
        self._loaded = state
