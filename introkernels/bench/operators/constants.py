"""Settings of the losses that are compared, and sizes that count bytes."""

from __future__ import annotations

TEMPERATURE = 4.0
CE_WEIGHT = 0.7
KL_WEIGHT = 0.3

# Targets are int64; a loss and a statistic are float32 for float32 and half inputs.
INDEX_BYTES = 8
LOSS_BYTES = 4
STATISTIC_BYTES = 4
