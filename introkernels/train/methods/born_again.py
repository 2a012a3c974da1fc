"""Born-again networks: Furlanello, Lipton, Tschannen, Itti, Anandkumar, "Born-Again Neural
Networks", ICML 2018, arXiv:1805.04770.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from introkernels.train.methods.base import Teacher, register
from introkernels.train.methods.ranges import require_at_least
from introkernels.train.methods.standard import Standard
from introkernels.train.methods.teaching import Taught


@register("born_again")
@dataclass(frozen=True)
class BornAgain(Taught):
    """Networks of one kind that teach one another in turn; the last is the one evaluated."""

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from the predictions of the same network of the "
        "generation before"
    )
    source: ClassVar[str] = (
        "Furlanello, Lipton, Tschannen, Itti, Anandkumar, “Born-Again Neural Networks”, ICML 2018, "
        "arXiv:1805.04770"
    )

    temperature: float = 1.0
    """Softens the predictions of both generations alike before they are compared."""
    ce_weight: float = 0.5
    """Weight of the cross entropy with the true class."""
    kl_weight: float = 0.5
    """Weight of the divergence from the generation before."""
    generations: int = 2
    """Networks that are taught; the first one's teacher is trained with cross entropy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("born_again.generations", self.generations, 1)

    def teacher(self) -> Teacher:
        if self.generations == 1:
            return Teacher(Standard())
        return Teacher(dataclasses.replace(self, generations=self.generations - 1))
