"""Post-norm transformer encoder over channel tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from subject_layers.attention import SelfAttention
from subject_layers.dropout import Dropout
from subject_layers.embedding import ChannelEmbedding


def pointwise(convolution: nn.Conv1d, tokens: torch.Tensor) -> torch.Tensor:
    """A 1x1 convolution on tokens [B, N, width], as the linear layer that it is: no transposes."""
    return F.linear(tokens, convolution.weight.squeeze(2), convolution.bias)


@dataclass(frozen=True)
class LayerSizes:
    """Of an encoder layer: ``width`` of tokens, ``hidden`` of the feed-forward between them."""

    width: int = 250
    hidden: int = 256
    heads: int = 4
    dropout: float = 0.25


class EncoderLayer(nn.Module):
    """Attention and a two-layer feed-forward (1x1 convolutions), each followed by its LayerNorm."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        self.attention = SelfAttention(sizes.width, sizes.heads, sizes.dropout)
        self.conv1 = nn.Conv1d(sizes.width, sizes.hidden, 1)
        self.conv2 = nn.Conv1d(sizes.hidden, sizes.width, 1)
        self.norm1 = nn.LayerNorm(sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.dropout = Dropout(sizes.dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.norm1(tokens + self.dropout(self.attention(tokens)))
        hidden = self.dropout(F.gelu(pointwise(self.conv1, tokens)))
        return self.norm2(tokens + self.dropout(pointwise(self.conv2, hidden)))


class LayerStack(nn.Module):
    """Encoder layers in turn, then a final LayerNorm."""

    def __init__(self, layers: list[EncoderLayer], width: int) -> None:
        super().__init__()
        self.attn_layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for layer in self.attn_layers:
            tokens = layer(tokens)
        return self.norm(tokens)


class ChannelTransformer(nn.Module):
    """EEG [B, C, T] -> one token per channel [B, C, width].

    ``reference`` keeps the published slice 0..C-1, in which the subject token takes the first place
    and the last channel (O2) is lost; otherwise the channels' own tokens 1..C are returned.
    """

    def __init__(
        self,
        n_channels: int,
        n_times: int,
        n_subjects: int,
        sizes: LayerSizes,
        *,
        positional: bool,
        reference: bool,
    ) -> None:
        super().__init__()
        self.enc_embedding = ChannelEmbedding(
            n_channels,
            n_times,
            n_subjects,
            sizes.width,
            sizes.dropout,
            positional=positional,
            reference=reference,
        )
        self.encoder = LayerStack([EncoderLayer(sizes)], sizes.width)
        self.first = 0 if reference else 1

    def forward(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder(self.enc_embedding(eeg, subject))
        return tokens[:, self.first : self.first + eeg.shape[1]]
