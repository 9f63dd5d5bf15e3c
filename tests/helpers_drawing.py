"""Drawing with the miniatures of conftest.py: inputs, calls, comparisons."""

from __future__ import annotations

import numpy as np
import torch

import modalities
import util
from miniworld import models as miniature
from sdxl import injection_map, sampler
from sdxl.adapter_file import IPAdapterWeights

NAMES = modalities.NAMES
FUSED = modalities.recipes("fused")[0]
STEPS, GUIDANCE, SIZE = 2, 5.0, 64


def embeddings(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        rows, len(NAMES), miniature.CLIP_DIM, generator=util.generator_for(seed, "test")
    )


def unet_inputs(unet, rows: int) -> dict:
    random = util.generator_for(0, "unet inputs")
    width, pooled = unet.config.cross_attention_dim, miniature._TEXT_WIDTHS[1]
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=random),
        "timestep": torch.tensor(400),
        "encoder_hidden_states": torch.randn(rows, 77, width, generator=random),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, pooled, generator=random),
            "time_ids": torch.full((rows, 6), 64.0),
        },
    }


@torch.no_grad()
def predict(injected, vectors: torch.Tensor, scale: torch.Tensor, inputs: dict) -> torch.Tensor:
    pipe, injector = injected
    injector.set(vectors, scale, guidance=False)
    return pipe.unet(**inputs).sample


def five_copies(weights: IPAdapterWeights) -> list[dict]:
    """An adapter in its official layout, once per modality, as diffusers' own route loads it."""
    adapter = {
        "image_proj": dict(weights.projection),
        "ip_adapter": {
            f"{2 * layer + 1}.to_{kind}_ip.weight": tensor
            for layer, pair in enumerate(weights.layers)
            for kind, tensor in zip("kv", pair, strict=True)
        },
    }
    return [adapter] * len(NAMES)


def adapter_processors(pipe) -> list:
    return [processor for name, processor in pipe.unet.attn_processors.items() if "attn2" in name]


def drawn(
    injected,
    prompt,
    rows: int,
    seeds: list[int],
    vectors=None,
    guidance=GUIDANCE,
    start=None,
    steps=STEPS,
    **how,
) -> np.ndarray:
    """Fused pictures of ``rows`` rows; ``how``: further fields of Denoising."""
    pipe, injector = injected
    scale = injection_map.scales(FUSED, layers=injector.layers).expand(rows, -1, -1)
    vectors = embeddings(rows) if vectors is None else vectors
    denoising = sampler.Denoising(steps, guidance, SIZE, **how)
    latents = sampler.denoise(pipe, injector, vectors, scale, seeds, prompt, denoising, start)
    return sampler.pictures_of(pipe, latents)


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other)
