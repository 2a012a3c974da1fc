"""First weights of convolutions."""

from __future__ import annotations

from torch import nn


def initialise_convolutions(network: nn.Module) -> None:
    """Draw the weights of every convolution by He et al., "Delving Deep into Rectifiers", ICCV
    2015, arXiv:1502.01852: normal with variance ``2 / (out_channels · kernel pixels)``.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
