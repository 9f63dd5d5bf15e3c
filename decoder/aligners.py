"""Aligners: what turns the EEG embedding into the five CLIP embeddings, by the name of --aligner.

``prior``: a diffusion prior per modality (``unet.PriorBank``). ``mlp``: a regression with a shared
trunk. ``none``: the encoder's output itself. All are called alike, see ``unet.TargetSpace``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import util
from loss import LossTerms, stacked_prior_loss, terms_of
from modalities import NAMES
from subject_layers.dropout import Dropout
from subject_layers.stacked import keep_separate_state, stacked
from unet import PriorBank, Sampling, Seeds, TargetSpace
from util import WHOLE, Part

HELD_OUT_ROWS = 64  # a spread over so many stimuli and all dimensions is known to a few per cent


class Regression(TargetSpace):
    """An aligner that predicts one embedding per condition: no noise, no steps, no guidance."""

    stochastic = False

    def predict(self, cond: torch.Tensor) -> torch.Tensor:
        """Standardised embeddings [M, B, D] of conditions [B, C]."""
        raise NotImplementedError

    def losses(
        self,
        targets: Mapping[str, torch.Tensor],
        cond: torch.Tensor,
        generator: torch.Generator,
        draws: int = 1,
        part: Part = WHOLE,
    ) -> dict[str, LossTerms]:
        """0.7 MSE + 0.3 (1 - cos) on standardised targets {modality: [B, D]}, given cond [B, C].

        ``generator``, ``draws`` and ``part`` are the priors': here nothing is drawn.
        """
        clean = self.training_targets(targets, cond)
        return terms_of(stacked_prior_loss(self.predict(cond).to(clean.dtype), clean))

    @torch.no_grad()
    def sample(
        self,
        cond: torch.Tensor,
        steps: int,
        guidance: float,
        seeds: Seeds,
        sampler: str = "dpm",
        draws: int = 1,
    ) -> dict[str, torch.Tensor]:
        """{modality: [B, D]}, un-normalised, of cond [B, C], whatever the sampling asked for."""
        self.check_request(cond, seeds)
        predicted = zip(NAMES, self.predict(cond), strict=True)
        return {name: self.restore(name, rows) for name, rows in predicted}


class SharedMLP(Regression):
    """A trunk for all modalities and a linear head for each: [B, C] -> [M, B, D].

    Small, because 16,540 pictures over-fit larger ones; after CognitionCapturerPro's shared trunk.
    """

    kind = "mlp"

    def __init__(
        self,
        embed_dim: int,
        cond_dim: int,
        learned_weights: bool = False,
        hidden_dim: int | None = None,
        dropout: float = 0.1,
        skip: bool = False,
    ) -> None:
        """``hidden_dim``: width of the trunk, by default that of the embeddings, at least 512.

        ``skip``: see ``EncoderSkip``; the heads then begin at 0.
        """
        super().__init__(embed_dim, cond_dim, learned_weights, skip=skip)
        self.hidden_dim, self.dropout = hidden_dim or max(embed_dim, 512), dropout
        self.trunk = nn.Sequential(
            nn.Linear(cond_dim, self.hidden_dim),
            nn.LayerNorm(self.hidden_dim),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(self.hidden_dim, self.hidden_dim),
            nn.GELU(),
            Dropout(dropout),
        )
        self.heads = stacked([nn.Linear(self.hidden_dim, embed_dim) for _ in NAMES])
        if skip:
            for parameter in self.heads.parameters():
                nn.init.zeros_(parameter)
        keep_separate_state(self.heads, NAMES)

    @property
    def config(self) -> dict[str, Any]:
        own = {"hidden_dim": self.hidden_dim, "dropout": self.dropout}
        return super().config | own | {"skip": self.skip is not None}

    def networks(self) -> list[nn.Module]:
        return [self.trunk, self.heads]

    def predict(self, cond: torch.Tensor) -> torch.Tensor:
        """The five heads are one batched product."""
        found = self.heads(self.trunk(cond).expand(len(NAMES), -1, -1))
        return found + self.skip(cond) if self.skip else found


class Identity(Regression):
    """The encoder's output, taken for the standardised embedding of every modality."""

    kind = "none"

    def __init__(self, embed_dim: int, cond_dim: int, learned_weights: bool = False) -> None:
        super().__init__(embed_dim, cond_dim, learned_weights)
        if embed_dim != cond_dim:
            raise ValueError(f"conditions of width {cond_dim}, expected {embed_dim}")

    def predict(self, cond: torch.Tensor) -> torch.Tensor:
        return cond.expand(len(NAMES), -1, -1)


ALIGNERS: Mapping[str, type[TargetSpace]] = {
    aligner.kind: aligner for aligner in (PriorBank, SharedMLP, Identity)
}


def aligner_from(config: Mapping[str, Any]) -> TargetSpace:
    """An empty aligner from another's ``config``; without a ``kind``, as once written, a prior.

    Raises DataError for a kind that is not known here.
    """
    given = dict(config)
    kind = given.pop("kind", PriorBank.kind)
    if kind not in ALIGNERS:
        raise util.DataError(
            "aligner",
            kind,
            f"one of {', '.join(ALIGNERS)}",
            "the model is from another version: train again or use that version",
        )
    return ALIGNERS[kind].from_config(given)


@dataclass(frozen=True)
class Alignment:
    """What to train: the flags of ``args.py``, in short.

    ``skip``: of the priors and the regression, where the widths allow it. The three before: of the
    priors.
    """

    kind: str
    learned_weights: bool
    condition_dropout: float
    predicts: str
    loss_on: str | None  # None: what the priors predict
    skip: bool = False


def new_aligner(embed_dim: int, cond_dim: int, how: Alignment, seed: int) -> TargetSpace:
    """A freshly initialised aligner, seeded. Raises UserError for widths that do not fit."""
    if how.kind == Identity.kind and embed_dim != cond_dim:
        raise util.UserError(
            f"--aligner {how.kind}",
            f"an encoder's output of width {cond_dim}",
            f"{embed_dim}, the width of the CLIP embeddings it is taken for",
            "train with --aligner mlp, or with an encoder of that width",
        )
    config = {
        "kind": how.kind,
        "embed_dim": embed_dim,
        "cond_dim": cond_dim,
        "learned_weights": how.learned_weights,
    }
    if how.kind != Identity.kind:
        config["skip"] = how.skip and embed_dim == cond_dim
    if how.kind == PriorBank.kind:
        config |= {
            "condition_dropout": how.condition_dropout,
            "predicts": how.predicts,
            "loss_on": how.loss_on or how.predicts,
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(util.seed_for(seed, "priors"))
        return aligner_from(config)


def held_out_rows(embeddings: torch.Tensor) -> list[list[float]]:
    """At most HELD_OUT_ROWS of EEG embeddings [N, C], evenly spaced, as a header holds them."""
    rows = torch.linspace(0, len(embeddings) - 1, min(len(embeddings), HELD_OUT_ROWS)).long()
    return [[round(value, 4) for value in row] for row in embeddings[rows].tolist()]


def spread_factors(
    aligner: TargetSpace, held_out: torch.Tensor, sampling: Sampling, seed: int
) -> dict[str, float]:
    """Per modality, by how much predictions are to be stretched to spread as training targets do.

    Means of samples and regressions shrink towards the mean, the more the less the EEG says. By how
    much depends on ``sampling``, too, so that it is measured with that: on the EEG embeddings
    ``held_out`` [n, C] of held-out training stimuli, which training leaves in the model. The
    standard deviation of standardised training targets is 1.
    """
    seeds = [util.seed_for(seed, "spread", row) for row in range(len(held_out))]
    found = aligner.sample(
        held_out, sampling.steps, sampling.guidance, seeds, sampling.sampler, sampling.draws
    )
    return {
        name: 1 / float(aligner.standardise(name, rows).var(dim=0).mean().sqrt().clamp(min=1e-3))
        for name, rows in found.items()
    }


def predict_from_condition(
    aligner: TargetSpace,
    cond: torch.Tensor,
    seeds: Sequence[int],
    sampling: Sampling,
    seed: int,
    held_out: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Embeddings {modality: [B, D]}, un-normalised, of EEG embeddings cond [B, C].

    With ``sampling.restore_variance`` stretched about the training mean by
    :func:`spread_factors`. Raises UserError where the model has no held-out rows for that.
    """
    samples = aligner.sample(
        cond, sampling.steps, sampling.guidance, seeds, sampling.sampler, sampling.draws
    )
    if not sampling.restore_variance:
        return samples
    if held_out is None or len(held_out) < 2:
        raise util.UserError(
            "--restore_variance",
            "a model that was trained without held-out concepts",
            "EEG embeddings of at least two held-out stimuli in the checkpoint",
            "train with --val_fraction > 0",
        )
    factors = spread_factors(aligner, held_out.to(cond), sampling, seed)
    return {
        name: aligner.restore(name, factors[name] * aligner.standardise(name, rows))
        for name, rows in samples.items()
    }
