"""Channels as tokens: value embedding over time, positional table over channels, subject token."""

from __future__ import annotations

import math

import torch
from torch import nn

from subject_layers.dropout import Dropout


def positional_table(length: int, width: int) -> torch.Tensor:
    """Sinusoids [length, width]: even columns sin(p w_i), odd cos, w_i = 10000^(-2i / width)."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    frequency = torch.exp(
        torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width)
    )
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)[:, : width // 2]
    return table


class SubjectEmbedding(nn.Module):
    """One learned token per subject and a shared one for people the model has not seen."""

    def __init__(self, n_subjects: int, width: int) -> None:
        super().__init__()
        self.shared_embedding = nn.Parameter(torch.randn(1, width))
        self.subject_embedding = nn.Embedding(n_subjects, width)

    @torch.no_grad()
    def add_subjects(self, count: int) -> None:
        """Further subjects, that begin with the shared token."""
        table = self.subject_embedding.weight
        more = self.shared_embedding.expand(count, -1)
        self.subject_embedding = nn.Embedding.from_pretrained(
            torch.cat([table, more]), freeze=False
        )

    def forward(self, subject: torch.Tensor) -> torch.Tensor:
        """subject: int64 [B], -1 = unknown -> [B, 1, width]. Each row by its own id."""
        own = self.subject_embedding(subject.clamp(min=0))
        return torch.where(subject[:, None] < 0, self.shared_embedding, own)[:, None]


class ReferenceSubjectEmbedding(SubjectEmbedding):
    """As published: ids are table rows; one id beyond the table makes the whole batch shared."""

    def forward(self, subject: torch.Tensor) -> torch.Tensor:
        if (subject >= self.subject_embedding.num_embeddings).any():
            return self.shared_embedding.expand(len(subject), 1, -1)
        return self.subject_embedding(subject)[:, None]


class ChannelEmbedding(nn.Module):
    """EEG [B, C, T] -> tokens [B, 1 + C, width]: the subject token, then one token per channel."""

    def __init__(
        self,
        n_channels: int,
        n_times: int,
        n_subjects: int,
        width: int,
        dropout: float,
        *,
        positional: bool,
        reference: bool,
    ) -> None:
        super().__init__()
        self.value_embedding = nn.Linear(n_times, width)
        kind = ReferenceSubjectEmbedding if reference else SubjectEmbedding
        self.subject_embedding = kind(n_subjects, width)
        self.dropout = Dropout(dropout)
        table = (
            positional_table(n_channels, width) if positional else torch.zeros(n_channels, width)
        )
        self.register_buffer("position", table, persistent=False)

    def forward(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        tokens = self.value_embedding(eeg) + self.position
        return self.dropout(torch.cat([self.subject_embedding(subject), tokens], dim=1))
