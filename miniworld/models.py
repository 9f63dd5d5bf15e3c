"""Miniatures of CLIP, SDXL and its IP-Adapter: real classes and layouts, seeded random weights.

They hold every site, key and file of the real models at about 1/300 of the size, so that the chain
and its tests run on a CPU core in seconds and without downloads. Their pictures show nothing; they
only depend visibly on everything that real ones depend on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import injection
import util

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from open_clip import CLIP
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

VERSION = 3  # of this file: a change of it makes models of another version anew
CLIP_NAME = "miniature-clip"
CLIP_DIM = 64  # of the random miniature
SHIPPED = Path(__file__).parent / "weights"
_TEXT_WIDTHS = (
    32,
    64,
)  # they must differ: diffusers tells the two encoders of a single file by width


@dataclass(frozen=True)
class Size:
    """What the random and the trained miniatures differ in, beside their weights."""

    clip: Mapping[str, Any]  # open_clip's JSON
    channels: tuple[int, int, int]  # of the U-Net's levels
    heads: tuple[int, int, int]
    vae_channels: tuple[int, int, int, int]
    vae_groups: int
    vae_attention: bool  # none: the VAE is trained on crops, too


def _clip(embed_dim: int, context: int, vision: dict[str, Any], text: dict[str, Any]) -> dict:
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": 64, **vision},
        "text_cfg": {"context_length": context, "vocab_size": 49408, **text},
    }


RANDOM = Size(
    clip=_clip(
        CLIP_DIM,
        77,
        {"patch_size": 8, "width": 128, "head_width": 32, "layers": 3},
        {"width": 64, "heads": 4, "layers": 2},
    ),
    channels=(32, 64, 96),
    heads=(1, 2, 4),
    vae_channels=(16, 24, 32, 48),
    vae_groups=8,
    vae_attention=True,
)
TRAINED = Size(
    clip=_clip(
        128,
        32,
        # convolutions: a ViT needs far more than some thousand steps to tell shapes apart
        {"layers": [1, 1, 1, 1], "patch_size": None, "width": 24, "head_width": 32},
        {"width": 64, "heads": 4, "layers": 2},
    ),
    channels=(64, 128, 192),
    heads=(2, 4, 6),
    vae_channels=(8, 16, 32, 64),
    vae_groups=4,
    vae_attention=False,
)


def build_clip(size: Size) -> CLIP:
    """An open_clip model under the name CLIP_NAME, with torch's random weights."""
    import open_clip

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / f"{CLIP_NAME}.json"
        util.write_json(config, size.clip)
        open_clip.add_model_config(config)
    return open_clip.create_model(CLIP_NAME)


def write_clip(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write ``miniature-clip.json`` and ``.safetensors``. Returns (config, checkpoint).

    To load: ``open_clip.add_model_config(config)``, then
    ``open_clip.create_model_and_transforms(CLIP_NAME, pretrained=str(checkpoint))``.
    """
    config, checkpoint = folder / f"{CLIP_NAME}.json", folder / f"{CLIP_NAME}.safetensors"
    util.write_json(config, RANDOM.clip)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_clip(RANDOM)
    util.save_tensors(checkpoint, model.state_dict(), {"seed": seed, "version": VERSION})
    return config, checkpoint


def build_unet(size: Size) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=size.channels,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=size.heads,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=sum(_TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + _TEXT_WIDTHS[1],
    )


def build_vae(size: Size) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=size.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=size.vae_groups,
        mid_block_add_attention=size.vae_attention,
        sample_size=128,
        scaling_factor=0.13025,
    )


def _text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = [
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=4,
            num_hidden_layers=2,
            projection_dim=width,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
        for width in _TEXT_WIDTHS
    ]
    return CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])


def write_sdxl(folder: Path, seed: int) -> UNet2DConditionModel:
    """Write a diffusers SDXL folder, return its U-Net. 128 px = 16 x 16 latents, all five sites."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    injection.quiet_loading()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae, (text_encoder, text_encoder_2) = build_unet(RANDOM), build_vae(RANDOM), _text_encoders()
        _scale_outputs(unet, vae)
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        unet=unet,
        tokenizer=injection.clip_tokenizer(),
        tokenizer_2=injection.clip_tokenizer("!"),
        scheduler=EulerDiscreteScheduler.from_pretrained(
            injection.SDXL_CONFIG, subfolder="scheduler"
        ),
        add_watermarker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return unet


@torch.no_grad()
def _scale_outputs(unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    """Rescale the last convolutions: noise of standard deviation 1, pixels of 0.5."""
    latents = torch.randn(2, 4, 16, 16)
    text = torch.randn(2, 77, sum(_TEXT_WIDTHS))
    added = {"text_embeds": torch.randn(2, _TEXT_WIDTHS[1]), "time_ids": torch.full((2, 6), 128.0)}
    noise = unet(latents, 500, encoder_hidden_states=text, added_cond_kwargs=added).sample
    for layer, wanted, found in (
        (unet.conv_out, 1.0, noise),
        (vae.decoder.conv_out, 0.5, vae.decode(latents / 0.13025).sample),
    ):
        layer.weight.mul_(wanted / found.std())
        layer.bias.zero_()


def write_ip_adapter(path: Path, unet: UNet2DConditionModel, clip_dim: int, seed: int) -> None:
    """Write an adapter for ``unet`` in the official layout: 4 tokens per CLIP vector."""
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, clip_dim, generator=generator)
        * clip_dim**-0.5,
        "image_proj.proj.bias": 0.1 * torch.randn(4 * width, generator=generator),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    # attn2 of a U-Net comes after attn1, hence the odd numbers of the official files.
    names = [name for name in unet.attn_processors if "attn2" in name]
    for layer, name in enumerate(names):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for kind, gain in (("k", 1.0), ("v", 4.0)):  # 4: seen beside the residual stream
            weight = torch.randn(hidden, width, generator=generator) * gain * width**-0.5
            tensors[f"ip_adapter.{2 * layer + 1}.to_{kind}_ip.weight"] = weight
    util.save_tensors(path, tensors, {"seed": seed, "version": VERSION})


@dataclass(frozen=True)
class Models:
    """Where the miniatures are, as the flags of the stages want them."""

    clip_config: Path
    clip_checkpoint: Path
    sdxl: Path
    ip_adapter: Path


def write_models(folder: Path, seed: int) -> Models:
    """Write CLIP, SDXL and adapter into ``folder``, or find them there; never in part."""
    folder = Path(folder)
    models = Models(
        folder / f"{CLIP_NAME}.json",
        folder / f"{CLIP_NAME}.safetensors",
        folder / "sdxl",
        folder / "ip_adapter.safetensors",
    )
    made = {"seed": seed, "version": VERSION}
    files = (models.clip_config, models.clip_checkpoint, models.sdxl, models.ip_adapter)
    if _manifest(folder) == made and all(file.exists() for file in files):
        return models
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        building = Path(name) / "models"
        write_clip(building, seed)
        unet = write_sdxl(building / "sdxl", seed)
        write_ip_adapter(building / models.ip_adapter.name, unet, CLIP_DIM, seed)
        util.write_json(building / "manifest.json", made)
        if folder.exists():
            shutil.rmtree(folder)
        building.replace(folder)
    return models


def _manifest(folder: Path) -> Mapping[str, Any] | None:
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
