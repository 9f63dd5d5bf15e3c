"""Diffusion priors: EEG embedding -> CLIP embedding, one per modality.

``DiffusionPriorUNet`` is the public ATM prior (REFERENCE: EEG_Image_decode, Li et al., NeurIPS
2024), its parameter names included; ``PriorBank`` holds one for each modality of the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from loss import LossTerms, stacked_prior_loss, terms_of
from modalities import NAMES, QUANTITIES
from subject_layers.dropout import Dropout
from subject_layers.schedule import NOISE_SCHEDULE, TRAIN_STEPS, sampler_named
from subject_layers.skip import EncoderSkip, add_skip
from subject_layers.stacked import keep_separate_state, stacked
from subject_layers.timesteps import TimeEmbedding, distinct_timesteps, timestep_features
from util import WHOLE, Part, generator_for, grouped

Seeds = Sequence[int] | torch.Generator  # of the noise that sampling starts from
MANY_TIMESTEPS = 512  # so many of TRAIN_STEPS repeat enough for sorting them to pay


def _mlp_block(width_in: int, width_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width_in, width_out), nn.LayerNorm(width_out), nn.SiLU(), Dropout(dropout)
    )


class DiffusionPriorUNet(nn.Module):
    """Noise prediction for one vector: x [B, D], t [B], cond [B, C] or None -> [B, D].

    An MLP in the shape of a U-Net: widths shrink and grow again, skips join equal widths, time and
    condition are added before each block. ``cond=None`` leaves the condition out, its bias too.
    Reference state dicts load by name. Raises ValueError for anything but matching 2-D tensors.
    """

    stack: int | None = None  # M of :meth:`stack_of`: x is [M, B, D] and t [M, B] then

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
        self.encode_layers = nn.ModuleList(_mlp_block(a, b, dropout) for a, b in pairwise(down))
        self.decode_time_embedding = nn.ModuleList(
            TimeEmbedding(time_embed_dim, width) for width in up[:-1]
        )
        self.decode_cond_embedding = nn.ModuleList(nn.Linear(cond_dim, width) for width in up[:-1])
        self.decode_layers = nn.ModuleList(_mlp_block(a, b, dropout) for a, b in pairwise(up))
        self.output_layer = nn.Linear(widths[0], embed_dim)

    @classmethod
    def stack_of(cls, priors: Sequence[DiffusionPriorUNet]) -> DiffusionPriorUNet:
        """The priors of one build as one, which are given one condition: see ``stacked.py``."""
        made = stacked(priors)
        made.stack = len(priors)
        return made

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor | None = None,
        keep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``keep_cond`` bool, as t: rows where it is False are computed as with ``cond=None``.

        A stack takes cond [B / n, C] where n rows in turn share a condition.
        """
        self._check(x, t, cond)
        conditions = None
        if cond is not None:
            conditions = self.embed_condition(cond, x.shape[-2] // len(cond))
            if keep_cond is not None:
                conditions = [part * keep_cond[..., None].to(part.dtype) for part in conditions]
        return self.denoise(x, self.embed_time(t, x.dtype), conditions)

    def embed_condition(self, cond: torch.Tensor, rows_each: int = 1) -> list[torch.Tensor]:
        """What cond [B, C] adds before each block, down then up, for ``rows_each`` rows of it."""
        if self.stack:
            cond = cond.expand(self.stack, -1, -1)
        layers = (*self.encode_cond_embedding, *self.decode_cond_embedding)
        parts = [layer(cond) for layer in layers]
        if rows_each == 1:
            return parts
        return [part.repeat_interleave(rows_each, dim=-2) for part in parts]

    def embed_time(self, t: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """What timesteps t add before each block, down then up. Equal ones are embedded once."""
        layers = (*self.encode_time_embedding, *self.decode_time_embedding)
        # a GPU would be waited for until it has sorted them, and embeds them all in that time
        few = t.shape[-1] < MANY_TIMESTEPS or not t.is_cpu or torch.compiler.is_compiling()
        distinct, place = (t, None) if few else distinct_timesteps(t)
        time = timestep_features(distinct, self.time_embed_dim).to(dtype)
        parts = [layer(time) for layer in layers]
        return parts if few else [F.embedding(place, part.flatten(0, -2)) for part in parts]

    def denoise(
        self, x: torch.Tensor, times: list[torch.Tensor], conditions: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """The network's output, given what time and condition add before each block."""
        contexts = iter(
            times if conditions is None else map(torch.add, times, conditions)  # one per block
        )
        x, skips = self.input_layer(x), []
        for layer in self.encode_layers:
            skips.append(x)
            x = layer(x + next(contexts))
        for layer in self.decode_layers:
            x = layer(x + next(contexts)) + skips.pop()
        return self.output_layer(x)

    def _check(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> None:
        stack = [] if self.stack is None else [self.stack]
        if x.ndim != len(stack) + 2 or list(x.shape) != [*stack, x.shape[-2], self.embed_dim]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected {[*stack, 'B', self.embed_dim]}"
            )
        if t.shape != x.shape[:-1]:
            raise ValueError(f"t has shape {tuple(t.shape)}, expected {list(x.shape[:-1])}")
        rows = x.shape[-2]
        if cond is not None and (
            cond.ndim != 2
            or cond.shape[1] != self.cond_dim
            or (rows % len(cond) if self.stack else rows != len(cond))
        ):
            raise ValueError(
                f"cond has shape {tuple(cond.shape)}, expected [{rows}, {self.cond_dim}]"
            )


@dataclass(frozen=True)
class Sampling:
    """How embeddings are predicted: of priors, the mean of ``draws`` samples of ``steps`` steps.

    ``guidance``: 1 = off. ``restore_variance``: see ``aligners.spread_factors``.
    """

    steps: int
    guidance: float
    sampler: str
    draws: int = 1
    restore_variance: bool = False


def mean_and_std(name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per dimension of training features [N, D]. ValueError if they do not vary: a dead ``name``.

    A dimension that never moves is not to be blown up to unit variance: std has a floor.
    """
    std = rows.std(0)
    if not std.max() > 0:
        raise ValueError(f"{name}: all training features are equal, it is dead")
    return rows.mean(0), std.clamp(min=1e-3 * std.max())


class TargetSpace(nn.Module):
    """What every aligner shares: the modalities' embeddings, standardised and back.

    Targets come in and predictions go out as stored: un-normalised CLIP embeddings. In between they
    are standardised per dimension, so that unit noise fits them; mean and std [D] are buffers.

    An aligner has ``losses`` and ``sample`` with the signatures and shapes of :class:`PriorBank`'s,
    and ``config``, from which ``aligners.aligner_from`` builds an empty one.
    """

    kind: ClassVar[str]  # as --aligner names it
    stochastic: ClassVar[bool]  # whether two seeds give two samples
    sample: Callable[..., dict[str, torch.Tensor]]

    def __init__(
        self, embed_dim: int, cond_dim: int, learned_weights: bool, *, skip: bool = False
    ) -> None:
        """``learned_weights``: weight the losses by a learned ``log_variance`` [M], not fixed.

        ``skip``: see :class:`EncoderSkip`.
        """
        super().__init__()
        self.embed_dim, self.cond_dim = embed_dim, cond_dim
        self.skip = EncoderSkip(len(NAMES)) if skip else None
        self.log_variance = nn.Parameter(torch.zeros(len(NAMES))) if learned_weights else None
        for name in NAMES:
            self.register_buffer(f"{name}_mean", torch.zeros(embed_dim))
            self.register_buffer(f"{name}_std", torch.ones(embed_dim))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TargetSpace:
        """An empty aligner from another's ``config``, without its kind."""
        return cls(**config)

    @property
    def config(self) -> dict[str, Any]:
        """What rebuilds an empty aligner of this kind and shape; each kind adds its own."""
        return {
            "kind": self.kind,
            "embed_dim": self.embed_dim,
            "cond_dim": self.cond_dim,
            "learned_weights": self.log_variance is not None,
        }

    def networks(self) -> list[nn.Module]:
        """Where the time of a training step goes: what is worth compiling."""
        return []

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
            mean, std = mean_and_std(name, rows)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(std)

    def standardise(self, name: str, target: torch.Tensor) -> torch.Tensor:
        return (target - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")

    def restore(self, name: str, sample: torch.Tensor) -> torch.Tensor:
        return sample * getattr(self, f"{name}_std") + getattr(self, f"{name}_mean")

    def standardised(self, targets: Mapping[str, torch.Tensor], cond: torch.Tensor) -> torch.Tensor:
        """[M, B, D] of targets {modality: [B, D]}. ValueError unless they fit cond [B, C]."""
        for name in NAMES:
            if targets[name].shape != (len(cond), self.embed_dim):
                raise ValueError(
                    f"{name}: target {tuple(targets[name].shape)} for cond {tuple(cond.shape)}, "
                    "expected [B, D]"
                )
        return torch.stack([self.standardise(name, targets[name]) for name in NAMES])

    def training_targets(
        self, targets: Mapping[str, torch.Tensor], cond: torch.Tensor
    ) -> torch.Tensor:
        """:meth:`standardised`; in training, the skip's gains are fitted to them."""
        clean = self.standardised(targets, cond)
        if self.skip and self.training:
            self.skip.fit(cond, clean)
        return clean

    def check_request(self, cond: torch.Tensor, seeds: Seeds) -> None:
        """Raise ValueError unless there is one seed per row of cond [B, C], or a generator."""
        number = len(cond) if isinstance(seeds, torch.Generator) else len(seeds)
        if cond.ndim != 2 or number != len(cond):
            raise ValueError(
                f"cond {tuple(cond.shape)} and {number} seeds, expected [B, C] and B seeds"
            )


@dataclass(frozen=True)
class PriorTask:
    """``predicts``: what the networks put out; ``loss_on``: what the losses compare.

    Each is one of QUANTITIES, else ValueError. ``condition_dropout``: share of samples that priors
    see without their condition. ``skip``: see :class:`EncoderSkip`.
    """

    condition_dropout: float = 0.1
    loss_on: str = "velocity"
    predicts: str = "velocity"
    skip: bool = False

    def __post_init__(self) -> None:
        if not {self.loss_on, self.predicts} <= set(QUANTITIES):
            named = f"{self.loss_on!r} or {self.predicts!r}"
            raise ValueError(f"{named} is none of {', '.join(QUANTITIES)}")


_VELOCITY = PriorTask()


class PriorBank(TargetSpace):
    """One independent prior per modality, computed together."""

    kind = "prior"
    stochastic = True

    def __init__(
        self,
        embed_dim: int,
        cond_dim: int,
        task: PriorTask = _VELOCITY,
        learned_weights: bool = False,
        *,
        dropout: float = 0.1,
        hidden_dim: Sequence[int] | None = None,
    ) -> None:
        """``dropout``, ``hidden_dim``: as of :class:`DiffusionPriorUNet`."""
        super().__init__(embed_dim, cond_dim, learned_weights, skip=task.skip)
        self.task, self.hidden_dim, self.dropout = task, hidden_dim, dropout
        self.priors = DiffusionPriorUNet.stack_of(
            [DiffusionPriorUNet(embed_dim, cond_dim, hidden_dim, dropout=dropout) for _ in NAMES]
        )
        keep_separate_state(self.priors, NAMES)
        betas = torch.linspace(
            NOISE_SCHEDULE["beta_start"], NOISE_SCHEDULE["beta_end"], TRAIN_STEPS
        )
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0), persistent=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PriorBank:
        """As of every aligner; what priors learn is one."""
        return cls(**grouped(config, "task", PriorTask))

    @property
    def config(self) -> dict[str, Any]:
        own = {"dropout": self.dropout, **asdict(self.task), "hidden_dim": self.hidden_dim}
        return super().config | own

    def networks(self) -> list[nn.Module]:
        return [self.priors]

    def losses(
        self,
        targets: Mapping[str, torch.Tensor],
        cond: torch.Tensor,
        generator: torch.Generator,
        draws: int = 1,
        part: Part = WHOLE,
    ) -> dict[str, LossTerms]:
        """Losses of targets {modality: [B, D]} given cond [B, C]; gradients reach ``cond``.

        Timesteps, noise and the dropped conditions are drawn from ``generator``, ``draws`` times
        per sample, for the batch that this is a ``part`` of. Compared on noise, a row's squared
        error counts a_t times what it counts on velocity: next to nothing at high t, where only
        the condition knows the embedding.
        """
        clean = self.training_targets(targets, cond)
        if draws > 1:
            clean = clean.repeat_interleave(draws, dim=1)
        t, noise, keep = self._draw(clean, generator, part)
        noisy = self.add_noise(clean, noise, t)
        found = self.priors(noisy, t, cond, keep).to(clean.dtype)
        if self.skip:
            estimate = self.skip(cond).repeat_interleave(draws, dim=1) * keep[..., None]
            found = add_skip(found, estimate, self._shares(t, clean), self.task.predicts)
        loss_on = self.task.loss_on
        if loss_on != self.task.predicts:
            found = self.quantity_from(self.velocity_from(found, noisy, t), noisy, t, loss_on)
        true = {"noise": noise, "embedding": clean, "velocity": self.velocity_of(clean, noise, t)}
        return terms_of(stacked_prior_loss(found, true[loss_on]))

    def _draw(
        self, clean: torch.Tensor, generator: torch.Generator, part: Part
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(t [M, B], noise [M, B, D], keep [M, B]) for clean [M, B, D], modality by modality."""
        where, rows, width = generator.device, part.count * clean.shape[1], clean.shape[2]
        drawn = [
            (
                torch.randint(TRAIN_STEPS, (rows,), generator=generator, device=where),
                torch.randn(rows, width, generator=generator, device=where, dtype=clean.dtype),
                torch.rand(rows, generator=generator, device=where) >= self.task.condition_dropout,
            )
            for _ in NAMES
        ]
        t, noise, keep = (
            torch.stack([part.of(rows) for rows in kind]).to(clean.device)
            for kind in zip(*drawn, strict=True)
        )
        return t, noise, keep

    def _shares(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(a_t) and sqrt(1 - a_t) of t [...], as factors of rows [..., D]."""
        kept = self.alphas_cumprod[t][..., None].to(like.dtype)
        return kept.sqrt(), (1 - kept).sqrt()

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """DDPM forward process: sqrt(a_t) clean + sqrt(1 - a_t) noise, per row."""
        kept, lost = self._shares(t, clean)
        return kept * clean + lost * noise

    def velocity_of(
        self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Velocity: sqrt(a_t) noise - sqrt(1 - a_t) clean, per row."""
        return self.add_noise(noise, -clean, t)

    def velocity_from(
        self, output: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """The velocity (Salimans & Ho 2022) that follows from what the networks predict, per row.

        A network that predicts noise itself turns an error e at t = 999 into 157 e in the sample:
        unless x0 is clipped, samples come out many times too large. Hence velocity by default.
        """
        if self.task.predicts == "velocity":
            return output
        kept, lost = self._shares(t, noisy)
        if self.task.predicts == "noise":
            return (output - lost * noisy) / kept
        return (kept * noisy - output) / lost

    def quantity_from(
        self, velocity: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor, quantity: str
    ) -> torch.Tensor:
        """What follows from the velocity, per row: itself, the noise, or the embedding."""
        if quantity == "velocity":
            return velocity
        kept, lost = self._shares(t, noisy)
        if quantity == "noise":
            return kept * velocity + lost * noisy
        return kept * noisy - lost * velocity

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
        """One embedding per modality and row: cond [B, C] -> {modality: [B, D]}, un-normalised.

        ``seeds``: one int per row, so that a row's sample depends on nothing but its own condition
        and seed; or a CPU's generator for all, which is faster. ``guidance``: uncond + g (cond -
        uncond); 1 = off (Ho & Salimans 2022). ``draws``: the mean of so many samples, which is
        nearer to the truth than any one of them. Call in eval mode.
        """
        self.check_request(cond, seeds)
        scheduler = sampler_named(sampler)
        scheduler.set_timesteps(steps)
        conditions = self.priors.embed_condition(cond, draws)  # the same at every step
        known = self.skip(cond).repeat_interleave(draws, dim=1) if self.skip else None
        x = self._start_noise(seeds, len(cond), draws).to(cond)
        for t in scheduler.timesteps:
            times = t.to(x.device).expand(len(NAMES), 1)
            velocity = self._guided(x, times, conditions, guidance, known)
            x = scheduler.step(velocity, t, x).prev_sample
        return {
            name: self.restore(name, rows).unflatten(0, (-1, draws)).mean(dim=1)
            for name, rows in zip(NAMES, x, strict=True)
        }

    def _start_noise(self, seeds: Seeds, rows: int, draws: int) -> torch.Tensor:
        """[M, B * draws, D]; of seeds, a generator of its own for each modality and row."""
        if isinstance(seeds, torch.Generator):
            return torch.randn(len(NAMES), rows * draws, self.embed_dim, generator=seeds)
        shape = (draws, self.embed_dim)
        return torch.stack(
            [
                torch.cat(
                    [torch.randn(shape, generator=generator_for(s, "prior", name)) for s in seeds]
                )
                for name in NAMES
            ]
        )

    def _guided(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        conditions: list[torch.Tensor],
        guidance: float,
        known: torch.Tensor | None,
    ) -> torch.Tensor:
        """Velocity for x [M, B, D] at t [M, 1]; with guidance both branches are one batch."""
        if guidance != 1.0:
            conditions = [torch.cat([part, torch.zeros_like(part)], dim=1) for part in conditions]
            x = torch.cat([x, x], dim=1)
            known = None if known is None else torch.cat([known, torch.zeros_like(known)], dim=1)
        output = self.priors.denoise(x, self.priors.embed_time(t, x.dtype), conditions)
        if known is not None:
            output = add_skip(output, known, self._shares(t, x), self.task.predicts)
        velocity = self.velocity_from(output, x, t)
        if guidance == 1.0:
            return velocity
        given, free = velocity.chunk(2, dim=1)
        return free + guidance * (given - free)
