"""Diffusion priors: EEG embedding -> CLIP embedding, one per modality.

``DiffusionPriorUNet`` is the public ATM prior (REFERENCE: EEG_Image_decode, Li et al., NeurIPS
2024), its parameter names included; ``PriorBank`` holds one for each modality of the registry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from loss import LossTerms, prior_loss
from modalities import NAMES
from util import generator_for

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

TRAIN_STEPS = 1000  # DDPM: linear betas 1e-4 .. 2e-2 over 1000 steps
NOISE_SCHEDULE = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",  # see PriorBank.noise_from
}


def timestep_features(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoids of integer timesteps t [B] -> float32 [B, width]: cosines first, then sines."""
    half = width // 2
    frequency = torch.exp(
        torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(1e4) / half)
    )
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Timestep features [B, width_in] -> [B, width]."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


def _block(width_in: int, width_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width_in, width_out), nn.LayerNorm(width_out), nn.SiLU(), nn.Dropout(dropout)
    )


class DiffusionPriorUNet(nn.Module):
    """Noise prediction for one vector: x [B, D], t [B], cond [B, C] or None -> [B, D].

    An MLP in the shape of a U-Net: widths shrink and grow again, skips join equal widths, time and
    condition are added before each block. ``cond=None`` leaves the condition out, its bias too.
    Reference state dicts load by name. Raises ValueError for anything but matching 2-D tensors.
    """

    def __init__(
        self,
        embed_dim: int = 1024,
        cond_dim: int = 1024,
        hidden_dim: Sequence[int] | None = None,
        time_embed_dim: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        # 1024, 512, 256, 128, 64 as published; small embeddings keep room for the condition
        widths = list(hidden_dim or (max(embed_dim, 512) // 2**i for i in range(5)))
        self.embed_dim, self.cond_dim, self.time_embed_dim = embed_dim, cond_dim, time_embed_dim
        self.input_layer = nn.Sequential(
            nn.Linear(embed_dim, widths[0]), nn.LayerNorm(widths[0]), nn.SiLU()
        )
        down, up = widths, widths[::-1]
        self.encode_time_embedding = nn.ModuleList(
            TimeEmbedding(time_embed_dim, width) for width in down[:-1]
        )
        self.encode_cond_embedding = nn.ModuleList(
            nn.Linear(cond_dim, width) for width in down[:-1]
        )
        self.encode_layers = nn.ModuleList(_block(a, b, dropout) for a, b in pairwise(down))
        self.decode_time_embedding = nn.ModuleList(
            TimeEmbedding(time_embed_dim, width) for width in up[:-1]
        )
        self.decode_cond_embedding = nn.ModuleList(nn.Linear(cond_dim, width) for width in up[:-1])
        self.decode_layers = nn.ModuleList(_block(a, b, dropout) for a, b in pairwise(up))
        self.output_layer = nn.Linear(widths[0], embed_dim)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor | None = None,
        keep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``keep_cond`` bool [B]: rows where it is False are computed as with ``cond=None``."""
        self._check(x, t, cond)
        time = timestep_features(t, self.time_embed_dim).to(x.dtype)

        def context(embed_time: nn.Module, embed_cond: nn.Module) -> torch.Tensor:
            if cond is None:
                return embed_time(time)
            condition = embed_cond(cond)
            if keep_cond is not None:
                condition = condition * keep_cond[:, None].to(condition.dtype)
            return embed_time(time) + condition

        x, skips = self.input_layer(x), []
        for layer, *embed in zip(
            self.encode_layers, self.encode_time_embedding, self.encode_cond_embedding, strict=True
        ):
            skips.append(x)
            x = layer(x + context(*embed))
        for layer, *embed in zip(
            self.decode_layers, self.decode_time_embedding, self.decode_cond_embedding, strict=True
        ):
            x = layer(x + context(*embed)) + skips.pop()
        return self.output_layer(x)

    def _check(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.embed_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [B, {self.embed_dim}]")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {tuple(t.shape)}, expected [{len(x)}]")
        if cond is not None and cond.shape != (len(x), self.cond_dim):
            raise ValueError(
                f"cond has shape {tuple(cond.shape)}, expected [{len(x)}, {self.cond_dim}]"
            )


@dataclass(frozen=True)
class Sampling:
    """How priors are sampled: ``steps``, ``guidance`` (1 = off), ``sampler``, mean of ``draws``."""

    steps: int
    guidance: float
    sampler: str
    draws: int = 1


def sampler_named(name: str) -> SchedulerMixin:
    """A diffusers scheduler on the training schedule: ``dpm`` (DPM-Solver++ 2M) or ``ddim``.

    x0 is not clipped: un-normalised CLIP vectors, even standardised, leave [-1, 1].
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if name == "ddim":
        return DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    if name == "dpm":
        return DPMSolverMultistepScheduler(
            **NOISE_SCHEDULE,
            algorithm_type="dpmsolver++",
            timestep_spacing="trailing",
            final_sigmas_type="zero",
        )
    raise ValueError(f"unknown prior sampler {name!r}; expected dpm or ddim")


class PriorBank(nn.Module):
    """One independent prior per modality, with the modality's target mean and std [D] as buffers.

    Targets come in and samples go out as stored: un-normalised CLIP embeddings. In between they are
    standardised per dimension, so that unit noise fits them.
    """

    def __init__(
        self,
        embed_dim: int,
        cond_dim: int,
        dropout: float = 0.1,
        condition_dropout: float = 0.1,
        learned_weights: bool = False,
        loss_on: str = "velocity",
    ) -> None:
        """``learned_weights``: weight the losses by a learned ``log_variance`` [M], not fixed.

        ``loss_on``: what the losses compare, ``velocity`` or ``noise``.
        """
        super().__init__()
        self.embed_dim, self.cond_dim = embed_dim, cond_dim
        self.dropout, self.condition_dropout = dropout, condition_dropout
        self.loss_on = loss_on
        self.priors = nn.ModuleDict(
            {name: DiffusionPriorUNet(embed_dim, cond_dim, dropout=dropout) for name in NAMES}
        )
        self.log_variance = nn.Parameter(torch.zeros(len(NAMES))) if learned_weights else None
        for name in NAMES:
            self.register_buffer(f"{name}_mean", torch.zeros(embed_dim))
            self.register_buffer(f"{name}_std", torch.ones(embed_dim))
        betas = torch.linspace(
            NOISE_SCHEDULE["beta_start"], NOISE_SCHEDULE["beta_end"], TRAIN_STEPS
        )
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0), persistent=False)

    @property
    def config(self) -> dict[str, float | bool | str]:
        """What rebuilds an empty bank of this shape."""
        return {
            "embed_dim": self.embed_dim,
            "cond_dim": self.cond_dim,
            "dropout": self.dropout,
            "condition_dropout": self.condition_dropout,
            "learned_weights": self.log_variance is not None,
            "loss_on": self.loss_on,
        }

    def fit_targets(self, features: Mapping[str, torch.Tensor]) -> None:
        """Set mean and std from training features {modality: [N, D]}.

        Raises ValueError if a modality does not vary at all: it could teach nothing.
        """
        for name in NAMES:
            rows = features[name].float()
            if rows.ndim != 2 or rows.shape[1] != self.embed_dim:
                raise ValueError(
                    f"{name}: features {tuple(rows.shape)}, expected [N, {self.embed_dim}]"
                )
            std = rows.std(0)
            if not std.max() > 0:
                raise ValueError(f"{name}: all training features are equal, the modality is dead")
            getattr(self, f"{name}_mean").copy_(rows.mean(0))
            # a dimension that never moves is not blown up to unit variance
            getattr(self, f"{name}_std").copy_(std.clamp(min=1e-3 * std.max()))

    def standardise(self, name: str, target: torch.Tensor) -> torch.Tensor:
        return (target - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")

    def restore(self, name: str, sample: torch.Tensor) -> torch.Tensor:
        return sample * getattr(self, f"{name}_std") + getattr(self, f"{name}_mean")

    def losses(
        self,
        targets: Mapping[str, torch.Tensor],
        cond: torch.Tensor,
        generator: torch.Generator,
        draws: int = 1,
    ) -> dict[str, LossTerms]:
        """Losses of targets {modality: [B, D]} given cond [B, C]; gradients reach ``cond``.

        Timesteps, noise and the dropped conditions are drawn from ``generator`` (CPU), ``draws``
        times per sample. Compared on noise, a row's squared error counts a_t times what it counts
        on velocity: next to nothing at high t, where only the condition knows the embedding.
        """
        losses = {}
        conditions = cond.repeat_interleave(draws, dim=0)
        for name, prior in self.priors.items():
            clean = self.standardise(name, targets[name])
            if clean.ndim != 2 or len(clean) != len(cond):
                raise ValueError(
                    f"{name}: target {tuple(clean.shape)} for cond {tuple(cond.shape)}, "
                    "expected [B, D]"
                )
            clean = clean.repeat_interleave(draws, dim=0)
            rows = len(clean)
            t = torch.randint(TRAIN_STEPS, (rows,), generator=generator).to(cond.device)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            keep = (torch.rand(rows, generator=generator) >= self.condition_dropout).to(cond.device)
            noisy = self.add_noise(clean, noise, t)
            velocity = prior(noisy, t, conditions, keep)
            if self.loss_on == "noise":
                losses[name] = prior_loss(self.noise_from(velocity, noisy, t), noise)
            else:
                losses[name] = prior_loss(velocity, self.velocity_of(clean, noise, t))
        return losses

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """DDPM forward process: sqrt(a_t) clean + sqrt(1 - a_t) noise, per row."""
        kept = self.alphas_cumprod[t][:, None].to(clean.dtype)
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def velocity_of(
        self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Velocity, which the networks learn: sqrt(a_t) noise - sqrt(1 - a_t) clean, per row."""
        return self.add_noise(noise, -clean, t)

    def noise_from(
        self, velocity: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The predicted noise, from a network that predicts velocity (Salimans & Ho 2022), per row.

        A network that predicts noise itself turns an error e at t = 999 into 157 e in the sample:
        unless x0 is clipped, samples come out many times too large.
        """
        kept = self.alphas_cumprod[t][:, None].to(noisy.dtype)
        return kept.sqrt() * velocity + (1 - kept).sqrt() * noisy

    @torch.no_grad()
    def sample(
        self,
        cond: torch.Tensor,
        steps: int,
        guidance: float,
        seeds: Sequence[int],
        sampler: str = "dpm",
        draws: int = 1,
    ) -> dict[str, torch.Tensor]:
        """One embedding per modality and row: cond [B, C] -> {modality: [B, D]}, un-normalised.

        ``seeds``: one int per row, so that a row's sample depends on nothing but its own condition
        and seed. ``guidance``: uncond + g (cond - uncond); 1 = off. ``draws``: the mean of so many
        samples, which is nearer to the truth than any one of them. Call in eval mode.
        """
        if cond.ndim != 2 or len(seeds) != len(cond):
            raise ValueError(
                f"cond {tuple(cond.shape)} and {len(seeds)} seeds, expected [B, C] and B seeds"
            )
        samples = {}
        cond = cond.repeat_interleave(draws, dim=0)
        for name, prior in self.priors.items():
            scheduler = sampler_named(sampler)
            scheduler.set_timesteps(steps)
            x = torch.cat(
                [
                    torch.randn(draws, self.embed_dim, generator=generator_for(seed, "prior", name))
                    for seed in seeds
                ]
            ).to(cond)
            for t in scheduler.timesteps:
                velocity = guided(prior, x, t.expand(len(x)).to(x.device), cond, guidance)
                x = scheduler.step(velocity, t, x).prev_sample
            samples[name] = self.restore(name, x).unflatten(0, (-1, draws)).mean(dim=1)
        return samples


def guided(
    prior: DiffusionPriorUNet, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) for x [B, D]; both branches in one batch."""
    if guidance == 1.0:
        return prior(x, t, cond)
    keep = torch.arange(2 * len(x), device=x.device) < len(x)
    both = prior(x.repeat(2, 1), t.repeat(2), cond.repeat(2, 1), keep)
    given, free = both.chunk(2)
    return free + guidance * (given - free)
