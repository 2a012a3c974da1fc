"""Deep mutual learning: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018,
arXiv:1706.00384.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from introkernels.train.methods.base import Learner, LossOutput, Setting, register
from introkernels.train.methods.distilling import Distilling
from introkernels.train.methods.ranges import require_at_least


@register("deep_mutual_learning")
@dataclass(frozen=True)
class DeepMutualLearning(Distilling):
    """Networks trained side by side, each learning from the others; the first is evaluated.

    The loss is the sum over the networks of ``ce_weight * CE + kl_weight * T**2 *
    mean over the others of KL(other || own)``. All networks step at once, on the predictions that
    the others make before the step; in the paper they step in turn.
    """

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from the predictions of networks trained alongside"
    )
    source: ClassVar[str] = (
        "Zhang, Xiang, Hospedales, Lu, “Deep Mutual Learning”, CVPR 2018, arXiv:1706.00384"
    )

    temperature: float = 1.0
    """Softens all predictions before they are compared."""
    ce_weight: float = 1.0
    """Weight of the cross entropy with the true class."""
    kl_weight: float = 1.0
    """Weight of the mean divergence from the other networks."""
    peers: int = 2
    """Networks trained side by side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("deep_mutual_learning.peers", self.peers, 2)

    def learner(self, setting: Setting) -> Learner:
        return _Peers(self, setting)


class _Peers(Learner):
    """Networks that learn from one another."""

    def __init__(self, method: DeepMutualLearning, setting: Setting) -> None:
        super().__init__()
        self.method = method
        self.model = setting.new_model()
        self.others = nn.ModuleList(setting.new_model() for _ in range(method.peers - 1))

    def forward(self, inputs: Tensor, target: Tensor) -> LossOutput:
        responses = [network(inputs) for network in (self.model, *self.others)]
        outputs = [self._loss_of(own, responses, target) for own in range(len(responses))]
        loss = torch.stack([output.loss for output in outputs]).sum()
        return LossOutput(loss, responses[0], outputs[0].parts)

    def _loss_of(self, own: int, responses: list[Tensor], target: Tensor) -> LossOutput:
        """The loss of one network: a mean over the others, as teachers without gradient."""
        lessons = [
            self.method.distil(responses[own], response, target)
            for other, response in enumerate(responses)
            if other != own
        ]
        loss = torch.stack([lesson.loss for lesson in lessons]).mean()
        kl = torch.stack([lesson.parts["kl"] for lesson in lessons]).mean()
        return LossOutput(loss, responses[own], {"ce": lessons[0].parts["ce"], "kl": kl})
