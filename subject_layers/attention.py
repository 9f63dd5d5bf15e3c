"""Multi-head self-attention with head width floor(width / heads), as ATM has it (250 / 4 -> 62)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class SelfAttention(nn.Module):
    """Tokens [B, N, width] -> [B, N, width], unmasked."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        inner = heads * (width // heads)
        self.heads, self.dropout = heads, dropout
        self.query_projection = nn.Linear(width, inner)
        self.key_projection = nn.Linear(width, inner)
        self.value_projection = nn.Linear(width, inner)
        self.out_projection = nn.Linear(inner, width)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(
            1, 2
        )  # [B, heads, N, width // heads]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mixed = F.scaled_dot_product_attention(
            self._split(self.query_projection(tokens)),
            self._split(self.key_projection(tokens)),
            self._split(self.value_projection(tokens)),
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out_projection(mixed.transpose(1, 2).flatten(2))
