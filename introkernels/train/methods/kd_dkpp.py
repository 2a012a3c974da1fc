"""Dark knowledge with permuted predictions: Furlanello, Lipton, Tschannen, Itti, Anandkumar,
"Born-Again Neural Networks", ICML 2018, arXiv:1805.04770.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from introkernels.train.methods.base import LossOutput, register
from introkernels.train.methods.responses import marked, permute_others
from introkernels.train.methods.teaching import TaughtByNetwork


@register("kd_dkpp")
@dataclass(frozen=True)
class KdDkpp(TaughtByNetwork):
    """Distillation where all but the class that the teacher predicts are permuted at random.

    `kd_permuted` keeps the true class instead; the two differ where the teacher is wrong.
    """

    summary: ClassVar[str] = (
        "distillation where the teacher's probabilities of all classes but the one it predicts are "
        "dealt out among them at random, anew each time"
    )
    source: ClassVar[str] = (
        "Furlanello, Lipton, Tschannen, Itti, Anandkumar, “Born-Again Neural Networks”, ICML 2018, "
        "arXiv:1805.04770 (DKPP)"
    )

    def taught_loss(self, logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LossOutput:
        kept = marked(teacher_logits.argmax(dim=1), teacher_logits)
        return self.distil(logits, permute_others(teacher_logits, kept), target)
