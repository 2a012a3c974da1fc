"""Online label smoothing: Zhang, Jiang, Hou, Wei, Han, Li, Cheng, "Delving Deep into Label
Smoothing", IEEE Transactions on Image Processing 30, 2021, arXiv:2011.12562.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from introkernels.train.methods.base import Learner, LossOutput, Method, Setting, register
from introkernels.train.methods.distilling import distil
from introkernels.train.methods.ranges import require_share
from introkernels.train.methods.responses import marked


@register("online_label_smoothing")
@dataclass(frozen=True)
class OnlineLabelSmoothing(Method):
    """Cross entropy with the true class and with what was predicted for it in the last epoch.

    The soft labels of a class are the mean of the predictions, while training, for those of its
    images that were classified rightly. They are uniform in the first epoch, which is our reading,
    and after one without any such image, as in the authors' code. The second cross entropy is
    taken as a divergence, which differs by a constant.
    """

    summary: ClassVar[str] = (
        "cross entropy, plus the divergence from the mean right prediction for the class in the "
        "epoch before"
    )
    source: ClassVar[str] = (
        "Zhang, Jiang, Hou, Wei, Han, Li, Cheng, “Delving Deep into Label Smoothing”, IEEE "
        "Transactions on Image Processing 30, 2021, arXiv:2011.12562"
    )

    ce_weight: float = 0.5
    """Weight of the cross entropy with the true class; the soft labels have the rest of 1."""

    def __post_init__(self) -> None:
        require_share("online_label_smoothing.ce_weight", self.ce_weight)

    def learner(self, setting: Setting) -> Learner:
        return _OnlineSmoothed(self, setting)


class _OnlineSmoothed(Learner):
    """A network, the soft labels of this epoch, and what makes those of the next."""

    soft_labels: Tensor

    def __init__(self, method: OnlineLabelSmoothing, setting: Setting) -> None:
        super().__init__()
        self.method = method
        self.model = setting.new_model()
        classes = setting.classes
        # Row = true class.
        self.register_buffer("soft_labels", torch.full((classes, classes), 1 / classes))
        # Sums over rightly classified images: of their predictions, and of their number. No
        # buffers, which DistributedDataParallel would overwrite with those of the first process at
        # every step; between epochs, when checkpoints are made, they are empty.
        self._sums: Tensor | None = None

    def forward(self, inputs: Tensor, target: Tensor) -> LossOutput:
        logits = self.model(inputs)
        self._remember(logits.detach(), target)
        return distil(
            logits,
            self.soft_labels[target].log(),
            target,
            temperature=1.0,
            ce_weight=self.method.ce_weight,
            kl_weight=1 - self.method.ce_weight,
        )

    def _remember(self, logits: Tensor, target: Tensor) -> None:
        right = (logits.argmax(dim=1) == target)[:, None]
        members = (marked(target, logits) & right).to(self.soft_labels.dtype)
        with torch.autocast(logits.device.type, enabled=False):
            predictions = F.softmax(logits.to(members.dtype), dim=1)
            counted = torch.cat([predictions, torch.ones_like(predictions[:, :1])], dim=1)
            # A product with one-hot rows, as index_add would add in any order on a GPU.
            sums = members.T @ counted
        self._sums = sums if self._sums is None else self._sums + sums

    def end_epoch(self) -> None:
        sums, self._sums = self._sums, None
        if sums is None:
            return
        if distributed.is_initialized():
            distributed.all_reduce(sums)
        total, count = sums[:, :-1], sums[:, -1:]
        mean = total / count.clamp(min=1)
        self.soft_labels.copy_(torch.where(count > 0, mean, 1 / mean.shape[1]))
