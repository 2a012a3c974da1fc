"""A network without convolutions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from introkernels.train.classifier import Classifier

_WIDTH = 128


class MLP(Classifier):
    """Two hidden layers of 128 units with ReLU over the flattened image."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.hidden1 = nn.Linear(channels * height * width, _WIDTH)
        self.hidden2 = nn.Linear(_WIDTH, _WIDTH)
        self.head = nn.Linear(_WIDTH, classes)

    def features(self, inputs: Tensor) -> Tensor:
        return F.relu(self.hidden2(F.relu(self.hidden1(inputs.flatten(1)))))
