"""What hyperparameters may be; the errors name the method, its field and what is allowed."""

from __future__ import annotations

import math


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``0 < value < inf``."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a finite number above 0")


def require_non_negative(name: str, value: float) -> None:
    """Raise ValueError unless ``0 <= value < inf``."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a finite number of at least 0")


def require_share(name: str, value: float) -> None:
    """Raise ValueError unless ``0 <= value <= 1``."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")


def require_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError unless ``value >= least``."""
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
