"""Denoising: prompts, noise, schedulers, guidance and start pictures -> pictures.

A row's picture depends on its own embeddings, scales, noise seed and start only, not on its batch.
B rows, M modalities in registry order, L cross-attention layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdxl.attention import Injector
from sdxl.schedulers import check_not_finite, noise_levels

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

DECODED_PX = (
    256**2
)  # pixels that the VAE decodes at once: small pictures together, large ones alone

# ---------------------------------------------------------------- prompts


@dataclass(frozen=True)
class PromptEmbeds:
    """Encoded prompts: ``text``, ``negative`` [P, 77, W]; ``pooled``, ``negative_pooled`` [P, E].

    P is 1, or the batch for a prompt per row.
    """

    text: torch.Tensor
    negative: torch.Tensor
    pooled: torch.Tensor
    negative_pooled: torch.Tensor

    def check(self, batch: int) -> None:
        """Raise ValueError if it holds neither 1 nor ``batch`` prompts."""
        if len(self.text) not in (1, batch):
            raise ValueError(f"{len(self.text)} prompts for {batch} rows: expected 1 or {batch}")

    def conditions(self, guided: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(text, pooled) of the positive prompts, or of [negative; positive] ones."""
        if not guided:
            return self.text, self.pooled
        return (
            torch.cat([self.negative, self.text]),
            torch.cat([self.negative_pooled, self.pooled]),
        )

    def chosen(self, rows: Sequence[int]) -> PromptEmbeds:
        """The prompts of these rows, where there is one per row."""
        parts = (self.text, self.negative, self.pooled, self.negative_pooled)
        return PromptEmbeds(*(part[list(rows)] for part in parts))


@torch.no_grad()
def encode_prompt(
    pipe: StableDiffusionXLPipeline,
    prompt: str | list[str],
    negative_prompt: str | list[str] | None = None,
) -> PromptEmbeds:
    """Encode once what many batches use. A list: one prompt per row.

    ``negative_prompt`` None: zeros, as SDXL was trained with; "" is encoded like any other text.
    """
    text, negative, pooled, negative_pooled = pipe.encode_prompt(
        prompt,
        device=pipe.device,
        do_classifier_free_guidance=True,
        negative_prompt=negative_prompt,
    )
    return PromptEmbeds(text, negative, pooled, negative_pooled)


# ---------------------------------------------------------------- latents


def _noise(
    pipe: StableDiffusionXLPipeline, generators: Sequence[torch.Generator], size_px: int
) -> torch.Tensor:
    """Start noise [B, 4, h, w], drawn in float32 so that it is the same for every dtype."""
    side = size_px // pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, side, side)
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.cat(noise).to(device=pipe._execution_device, dtype=pipe.unet.dtype)


def _latent_moments(vae: Any) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """(mean, std / scaling_factor) of a VAE's own latents, which the U-Net's are without."""
    mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is None or std is None:
        return 0.0, 1 / vae.config.scaling_factor
    shape = (1, -1, 1, 1)
    return torch.tensor(mean).view(shape), torch.tensor(std).view(shape) / vae.config.scaling_factor


@torch.no_grad()
def picture_latents(pipe: StableDiffusionXLPipeline, pictures: torch.Tensor) -> torch.Tensor:
    """Latents [B, 4, h, w] on the CPU of pictures [B, 3, H, W] in 0..1: the posterior's mode."""
    vae = pipe.vae
    mean, std = _latent_moments(vae)
    found = []
    with _precise(vae):
        for picture in pictures.split(1):
            pixels = (2 * picture - 1).to(device=pipe._execution_device, dtype=vae.dtype)
            encoded = vae.encode(pixels)
            tiny = not hasattr(encoded, "latent_dist")
            latents = encoded.latents if tiny else encoded.latent_dist.mode()
            found.append((latents.float().cpu() - mean) / std)
    return torch.cat(found)


@torch.no_grad()
def decode_latents(pipe: StableDiffusionXLPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Pictures float32 [B, 3, H, W] in 0..1 of latents [B, 4, h, w]."""
    vae = pipe.vae
    mean, std = (
        part.to(latents) if isinstance(part, torch.Tensor) else part
        for part in _latent_moments(vae)
    )
    side = latents.shape[-1] * pipe.vae_scale_factor
    together = max(1, DECODED_PX // side**2)
    with _precise(vae):
        rows = (latents * std + mean).to(vae.dtype).split(together)
        pixels = torch.cat([vae.decode(part).sample.float() for part in rows])
    return (pixels / 2 + 0.5).clamp(0, 1)


class _precise:  # noqa: N801 - reads as what it does: with _precise(vae)
    """SDXL's own VAE overflows in float16: float32 while it works, as its config asks for."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.upcast = vae.dtype == torch.float16 and vae.config.force_upcast

    def __enter__(self) -> None:
        if self.upcast:
            self.vae.to(torch.float32)

    def __exit__(self, *_error: object) -> None:
        if self.upcast:
            self.vae.to(torch.float16)


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Denoising:
    """How pictures are denoised.

    ``guidance`` <= 1: none. ``guidance_interval``: it acts while the noise level, see
    ``schedulers.noise_levels``, is in it (Kynkaanniemi et al. 2024). ``strength``: with a start,
    the share of the way that is left to go; 1 forgets it.
    """

    steps: int
    guidance: float
    size_px: int
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    strength: float = 1.0

    def guided(self, level: float) -> bool:
        low, high = self.guidance_interval
        return self.guidance > 1 and low <= level <= high


@torch.no_grad()
def pictures_of(pipe: StableDiffusionXLPipeline, latents: torch.Tensor) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] of latents [B, 4, h, w]. Raises UserError for NaN."""
    pictures = decode_latents(pipe, latents)
    check_not_finite(latents, pictures, pipe.unet.dtype)
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def denoise(
    pipe: StableDiffusionXLPipeline,
    injector: Injector,
    embeddings: torch.Tensor,
    scales: torch.Tensor,
    noise_seeds: Sequence[int],
    prompt_embeds: PromptEmbeds,
    how: Denoising,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Latents [B, 4, h, w], a picture per row.

    ``embeddings`` [B, M, D] un-normalised; ``scales`` [B, M, L] of injection_map.scales.
    ``noise_seeds``: a row's noise comes from a CPU generator of its own, so that a picture does not
    depend on its batch. ``start`` [B, 4, h, w]: latents to begin from instead of pure noise.
    Raises ValueError for shapes.
    """
    if len(noise_seeds) != len(embeddings):
        raise ValueError(f"{len(noise_seeds)} noise seeds for {len(embeddings)} rows")
    prompt_embeds.check(len(embeddings))
    generators = [torch.Generator().manual_seed(seed) for seed in noise_seeds]
    injector.set(embeddings, scales, how.guidance > 1, pipe._execution_device)
    latents = _denoise(pipe, injector, prompt_embeds, generators, how, start)
    injector.clear()
    return latents


def _denoise(
    pipe: StableDiffusionXLPipeline,
    injector: Injector,
    prompt: PromptEmbeds,
    generators: Sequence[torch.Generator],
    how: Denoising,
    start: torch.Tensor | None,
) -> torch.Tensor:
    """Latents [B, 4, h, w] of SDXL's denoising loop."""
    scheduler = pipe.scheduler
    latents, timesteps = _begin(pipe, _noise(pipe, generators, how.size_px), how, start)
    levels = noise_levels(scheduler)[-len(timesteps) :]
    extra = pipe.prepare_extra_step_kwargs(list(generators), 0.0)
    for timestep, level in zip(timesteps, levels, strict=True):
        guided = how.guided(level)
        injector.guide(guided)
        rows = torch.cat([latents, latents]) if guided else latents
        rows = scheduler.scale_model_input(rows, timestep)
        noise = _predict(pipe, rows, timestep, prompt, how, guided)
        if guided:
            negative, positive = noise.chunk(2)
            noise = negative + how.guidance * (positive - negative)
        latents = scheduler.step(noise, timestep, latents, **extra, return_dict=False)[0]
        latents = latents.to(pipe.unet.dtype)  # some schedulers compute in float32
    return latents


def _begin(
    pipe: StableDiffusionXLPipeline, noise: torch.Tensor, how: Denoising, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(first latents, timesteps to go): from pure noise, or from a start with noise on it."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(how.steps, device=noise.device)
    timesteps = scheduler.timesteps
    if start is None or how.strength >= 1:
        return noise * scheduler.init_noise_sigma, timesteps
    left = max(1, round(how.steps * how.strength))
    first = (how.steps - left) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    begin = timesteps[first : first + 1].expand(len(noise))
    return scheduler.add_noise(start.to(noise), noise, begin), timesteps[first:]


def _predict(
    pipe: StableDiffusionXLPipeline,
    rows: torch.Tensor,
    timestep: torch.Tensor,
    prompt: PromptEmbeds,
    how: Denoising,
    guided: bool,
) -> torch.Tensor:
    """The U-Net's output for [negative; positive] rows, or for the positive ones alone."""
    text, pooled = prompt.conditions(guided)
    # SDXL's size conditioning: original size, crop corner, target size
    size = torch.tensor([how.size_px, how.size_px, 0, 0, how.size_px, how.size_px])
    return pipe.unet(
        rows,
        timestep,
        encoder_hidden_states=text.to(rows),
        added_cond_kwargs={
            "text_embeds": pooled.to(rows).repeat_interleave(len(rows) // len(pooled), dim=0),
            "time_ids": size.to(rows).expand(len(rows), -1),
        },
        return_dict=False,
    )[0]
