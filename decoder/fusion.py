"""Fusion weights: how much each modality counts where several meet, fixed or by its skill.

A modality's skill on a stimulus is the cosine of its predicted and its true embedding, both
standardised by the training targets: 0 for a prediction that knows nothing but the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

import util
from modalities import NAMES
from unet import Sampling, Seeds, TargetSpace

SAMPLES = 8  # of a stochastic aligner, whose agreement is the confidence
SAMPLING = Sampling(steps=5, guidance=1.0, sampler="ddim")  # cheap: done at each validation
CALIBRATION_ROWS = 1024  # of held-out stimuli: a mean cosine over so many is known to 0.005
LEAST_GAIN = 0.01  # no modality is silenced altogether


def sample_count(bank: TargetSpace) -> int:
    """K: SAMPLES, or 1 where all samples are the same one."""
    return SAMPLES if bank.stochastic else 1


def repeated_samples(
    bank: TargetSpace, condition: torch.Tensor, seeds: Seeds
) -> dict[str, torch.Tensor]:
    """Standardised samples {modality: [K, n, D]} of conditions [n, C]. ``seeds``: of all K n."""
    number = sample_count(bank)
    drawn = bank.sample(
        condition.repeat(number, 1), SAMPLING.steps, SAMPLING.guidance, seeds, SAMPLING.sampler
    )
    return {
        name: bank.standardise(name, rows).unflatten(0, (number, -1)).cpu()
        for name, rows in drawn.items()
    }


def calibration_rows(count: int) -> torch.Tensor:
    """Which of ``count`` held-out rows :func:`calibrate` sees: at most CALIBRATION_ROWS, evenly."""
    return torch.linspace(0, count - 1, min(count, CALIBRATION_ROWS)).round().long()


def agreement(samples: torch.Tensor) -> torch.Tensor:
    """Mean cosine of all pairs of samples [K, n, D]: [n], 1 where the aligner is certain.

    One sample agrees with itself everywhere: confidence then knows no more than mean skill.
    """
    count = len(samples)
    if count == 1:
        return samples.new_ones(samples.shape[1])
    unit = F.normalize(samples, dim=-1)
    return (unit.sum(dim=0).square().sum(dim=-1) - count) / (count * (count - 1))


def calibrate(
    samples: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    """Per modality, from ``n`` held-out rows: mean ``skill``, and the line from agreement to skill.

    ``samples`` {modality: [K, n, D]} and ``truth`` {modality: [n, D]}, standardised. The line is
    least squares; where more agreement does not go with more skill it is flat.
    """
    found = {}
    for name, drawn in samples.items():
        skill = F.cosine_similarity(drawn.mean(dim=0), truth[name], dim=-1)
        x = agreement(drawn)
        spread = (x - x.mean()).square().sum()
        slope = float(((x - x.mean()) * (skill - skill.mean())).sum() / spread.clamp(min=1e-6))
        slope = max(slope, 0.0)
        found[name] = {
            "n": len(skill),
            "skill": float(skill.mean()),
            "slope": slope,
            "intercept": float(skill.mean()) - slope * float(x.mean()),
        }
    return found


def validated_gains(calibration: Mapping[str, Mapping[str, float]]) -> torch.Tensor:
    """Gains [M] in registry order: each modality's skill on held-out training concepts."""
    return torch.tensor([calibration[name]["skill"] for name in NAMES]).clamp(min=LEAST_GAIN)


def confident_gains(
    calibration: Mapping[str, Mapping[str, float]], samples: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Gains [n, M]: the skill that each stimulus' agreement of samples [K, n, D] promises."""
    columns = [
        calibration[name]["intercept"] + calibration[name]["slope"] * agreement(samples[name])
        for name in NAMES
    ]
    return torch.stack(columns, dim=1).clamp(min=LEAST_GAIN)


def gains_for(
    kind: str,
    calibration: Mapping[str, Mapping[str, float]] | None,
    bank: TargetSpace,
    condition: torch.Tensor,
    stimuli: Sequence[int],
    seed: int,
) -> torch.Tensor:
    """Gains [n, M] of ``validated`` or ``confidence``.

    ``condition`` [n, C]: the EEG's embeddings of these stimuli. Raises UserError for a model that
    was trained without held-out concepts.
    """
    if calibration is None:
        raise util.UserError(
            f"--fusion_weights {kind}",
            "a model that was trained without held-out concepts",
            "a calibration in the checkpoint",
            "train with --val_fraction > 0, or use --fusion_weights fixed",
        )
    if kind == "validated":
        return validated_gains(calibration).expand(len(stimuli), -1)
    repetitions = range(sample_count(bank))
    seeds = [util.seed_for(seed, "agreement", k, item) for k in repetitions for item in stimuli]
    return confident_gains(calibration, repeated_samples(bank, condition, seeds))
