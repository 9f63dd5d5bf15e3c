"""Several encoders of EEG in one model, which read the same recording side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from decoder.encoders import Encoder

TOGETHER = "+"  # between the names of --encoder


class Ensemble(Encoder):
    """The embeddings of several encoders, added with learned weights that sum to 1.

    The weights are the softmax of ``logits`` [K] and begin equal; with all of the weight on one
    encoder it is that one, to the bit. Subject layers and tokens are each encoder's own.
    """

    def __init__(self, members: Sequence[Encoder]) -> None:
        first = members[0]
        super().__init__(
            first.n_channels, first.n_times, first.n_subjects, first.embed_dim, subject_layer=False
        )
        self.config["members"] = [[member.name, member.config] for member in members]
        for member in members:
            member.logit_scale.requires_grad_(False)  # that of all of them scales the cosines
        self.members = nn.ModuleList(members)
        self.logits = nn.Parameter(torch.zeros(len(members)))

    @classmethod
    def built(
        cls, config: Mapping[str, Any], make: Callable[[str, Mapping[str, Any]], Encoder]
    ) -> Ensemble:
        """A fresh one of another's ``config``; ``make``: an encoder by name and config."""
        return cls([make(name, of) for name, of in config["members"]])

    @property
    def name(self) -> str:
        return TOGETHER.join(name for name, _ in self.config["members"])

    def _each(self) -> list[Encoder]:
        return [member for member in self.members if isinstance(member, Encoder)]

    def _embed(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        parts = zip(self._each(), self.logits.softmax(dim=0), strict=True)
        return torch.stack([weight * one(eeg, subject) for one, weight in parts]).sum(dim=0)

    def add_subjects(self, count: int) -> None:
        """As of every encoder, to each of them, whose configs this one's holds."""
        for member in self._each():
            member.add_subjects(count)
        self.n_subjects += count
        self.config["n_subjects"] = self.n_subjects

    def subject_parameters(self) -> list[nn.Parameter]:
        """As of every encoder, of all of them."""
        return [own for member in self._each() for own in member.subject_parameters()]
