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
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

VERSION = 2  # of this file: a change of it makes models of another version anew
CLIP_NAME = "miniature-clip"
CLIP_DIM = 64
# they must differ: diffusers tells the two encoders of a single file by width
_TEXT_WIDTHS = (32, 64)


def clip_config() -> dict[str, Any]:
    """open_clip's JSON for the miniature: 64 px, embeddings of CLIP_DIM, the real vocabulary."""
    return {
        "embed_dim": CLIP_DIM,
        "vision_cfg": {
            "image_size": 64,
            "patch_size": 8,
            "width": 128,
            "head_width": 32,
            "layers": 3,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 4,
            "layers": 2,
        },
    }


def write_clip(folder: Path, seed: int) -> tuple[Path, Path]:
    """Write ``miniature-clip.json`` and ``.safetensors``. Returns (config, checkpoint).

    To load: ``open_clip.add_model_config(config)``, then
    ``open_clip.create_model_and_transforms(CLIP_NAME, pretrained=str(checkpoint))``.
    """
    import open_clip

    config, checkpoint = folder / f"{CLIP_NAME}.json", folder / f"{CLIP_NAME}.safetensors"
    util.write_json(config, clip_config())
    open_clip.add_model_config(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(CLIP_NAME)
    util.save_tensors(checkpoint, model.state_dict(), {"seed": seed, "version": VERSION})
    return config, checkpoint


def _unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(32, 64, 96),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        cross_attention_dim=sum(_TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + _TEXT_WIDTHS[1],
    )


def _vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 24, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
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
        unet, vae, (text_encoder, text_encoder_2) = _unet(), _vae(), _text_encoders()
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
