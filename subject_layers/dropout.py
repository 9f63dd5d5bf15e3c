"""Dropout whose mask is drawn 16 bits at a time: on CPUs PyTorch's own takes five times as long."""

from __future__ import annotations

import torch
from torch import nn

_BITS = 16


class Dropout(nn.Dropout):
    """``nn.Dropout``; ``p`` is met to 1 / 65536, and what is kept is scaled by its true share."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        dropped = round(self.p * 2**_BITS)
        if x.device.type != "cpu" or torch.compiler.is_compiling() or dropped == 2**_BITS:
            return super().forward(x)  # GPUs draw fast
        lots = torch.empty(-(-x.numel() * _BITS // 64), dtype=torch.int64)
        lots = lots.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        kept = torch.where(lots >= dropped - 2 ** (_BITS - 1), x, 0.0)
        return kept.mul_(2**_BITS / (2**_BITS - dropped))
