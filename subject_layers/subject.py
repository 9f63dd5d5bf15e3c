"""A linear layer over time for each subject."""

from __future__ import annotations

import torch
from torch import nn


class SubjectLinear(nn.Module):
    """x + x W_s + b_s by the subject of each row; the mean over subjects for an unknown one (-1).

    Starts as the identity, so that a single subject begins where no subject layer would.
    """

    def __init__(self, n_subjects: int, n_times: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_subjects, n_times, n_times))
        self.bias = nn.Parameter(torch.zeros(n_subjects, n_times))

    @torch.no_grad()
    def add_subjects(self, count: int) -> None:
        """Further subjects, that begin with the mean layer."""
        for name in ("weight", "bias"):
            old = getattr(self, name)
            mean = old.mean(0, keepdim=True).expand(count, *old.shape[1:])
            setattr(self, name, nn.Parameter(torch.cat([old, mean])))

    def forward(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        """eeg [B, C, T], subject int64 [B] -> [B, C, T]."""
        return eeg + (self._each(eeg, subject) if eeg.is_cpu else self._gathered(eeg, subject))

    def _gathered(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        """Each row with a copy of its subject's layer: a GPU is never asked who is in a batch."""
        of_row = subject.remainder(len(self.weight) + 1)  # unknown: the last
        weight, bias = (
            torch.cat([own, own.mean(0, keepdim=True)])[of_row] for own in (self.weight, self.bias)
        )
        return (torch.bmm(eeg, weight.to(eeg.dtype)) + bias[:, None]).to(eeg.dtype)

    def _each(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        """One product per subject present, without copies of layers [B, T, T]."""
        change = torch.zeros_like(eeg)
        for index in subject.unique().tolist():
            rows = (subject == index).nonzero().squeeze(1)
            weight, bias = (
                (self.weight.mean(0), self.bias.mean(0))
                if index < 0
                else (self.weight[index], self.bias[index])
            )
            change = change.index_add(0, rows, (eeg[rows] @ weight + bias).to(eeg.dtype))
        return change
