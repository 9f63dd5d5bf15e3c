"""Miniatures of CLIP, SDXL and its IP-Adapter: real classes, keys and files at 1/300 of the size.

``TRAINED`` ones draw what they are told to; ``python -m miniworld.pretrain`` made their weights,
which lie in ``miniworld/weights``. ``RANDOM`` ones are smaller still and made from a seed: their
pictures show nothing and only depend visibly on everything that real ones depend on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rundirs.files import file_hash, write_json
from rundirs.tensors import save_tensors
from sdxl.loading import clip_tokenizer, quiet_loading
from sdxl.weight_files import SDXL_CONFIG

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from open_clip import CLIP
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

VERSION = 3  # of the random miniatures: a change of it makes models of another version anew
CLIP_NAME = "miniature-clip"
SHIPPED = Path(__file__).parent / "weights"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SIZE_PX, CLIP_PX = 128, 64
# they must differ: diffusers tells the two encoders of a single file by width
_TEXT_WIDTHS = (32, 64)


@dataclass(frozen=True)
class Size:
    """What the random and the trained miniatures differ in, beside their weights."""

    clip: Mapping[str, Any]  # open_clip's JSON
    channels: tuple[int, int, int]  # of the U-Net's levels
    heads: tuple[int, int, int]
    vae_channels: tuple[int, int, int, int]
    vae_attention: bool  # none: the VAE is trained on crops, too
    merges: int | None  # of the tokenizer's vocabulary; None: all that CLIP has
    prompt_tokens: int  # 77 in the real ones


def _clip_config(embed_dim: int, context: int, vision: dict[str, Any]) -> dict[str, Any]:
    """The real vocabulary: open_clip's tokenizer knows no other."""
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": CLIP_PX, **vision},
        "text_cfg": {
            "context_length": context,
            "vocab_size": 49408,
            "width": 64,
            "heads": 4,
            "layers": 2,
        },
    }


CLIP_DIM = 64  # of the random miniature
RANDOM = Size(
    clip=_clip_config(CLIP_DIM, 77, {"patch_size": 8, "width": 128, "head_width": 32, "layers": 3}),
    channels=(32, 64, 96),
    heads=(1, 2, 4),
    vae_channels=(16, 24, 32, 48),
    vae_attention=True,
    merges=None,
    prompt_tokens=77,
)
TRAINED = Size(
    # convolutions: a ViT needs far more than some thousand steps to tell shapes apart
    clip=_clip_config(
        128, 32, {"layers": [1, 1, 1, 1], "patch_size": None, "width": 24, "head_width": 32}
    ),
    channels=(48, 80, 128),
    heads=(2, 2, 4),
    vae_channels=(8, 24, 64, 96),
    vae_attention=False,
    merges=6000,
    prompt_tokens=24,
)


# ---------------------------------------------------------------- the parts


def build_clip(size: Size) -> CLIP:
    """An open_clip model under the name CLIP_NAME, with torch's random weights."""
    import open_clip

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / f"{CLIP_NAME}.json"
        write_json(config, dict(size.clip))
        open_clip.add_model_config(config)
    return open_clip.create_model(CLIP_NAME)


def build_unet(size: Size) -> UNet2DConditionModel:
    """SDXL's five sites on 16 x 16 latents, with its ``text_time`` conditioning."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE_PX // 8,
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
        norm_num_groups=8,
        mid_block_add_attention=size.vae_attention,
        sample_size=SIZE_PX,
        scaling_factor=0.13025,
    )


def _tokenizer(size: Size, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    tokenizer = clip_tokenizer(pad_token, size.merges)
    tokenizer.model_max_length = size.prompt_tokens
    return tokenizer


@torch.no_grad()
def build_text_encoders(size: Size) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Never trained: SDXL reads its next-to-last layer, where a token is still itself.

    Tokens of unit length per column make up for the final norm that comes after that layer.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = [
        CLIPTextConfig(
            vocab_size=len(_tokenizer(size)),
            max_position_embeddings=size.prompt_tokens,
            hidden_size=width,
            intermediate_size=2 * width,
            num_attention_heads=4,
            num_hidden_layers=2,
            projection_dim=width,
            bos_token_id=0,
            eos_token_id=2,  # = the end is the largest id, as in SDXL's own configs
            pad_token_id=1,
        )
        for width in _TEXT_WIDTHS
    ]
    encoders = CLIPTextModel(configs[0]), CLIPTextModelWithProjection(configs[1])
    for encoder in encoders:
        tokens = encoder.get_input_embeddings().weight
        tokens.div_(tokens.std())
    return encoders


def adapter_tensors(
    unet: UNet2DConditionModel, clip_dim: int, seed: int, value_gain: float
) -> dict[str, torch.Tensor]:
    """Random IP-Adapter weights for ``unet`` in the official layout: 4 tokens per CLIP vector."""
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
        for kind, gain in (("k", 1.0), ("v", value_gain)):
            weight = torch.randn(hidden, width, generator=generator) * gain * width**-0.5
            tensors[f"ip_adapter.{2 * layer + 1}.to_{kind}_ip.weight"] = weight
    return tensors


def trained_scheduler() -> SchedulerMixin:
    """Zero terminal SNR, v-prediction, trailing steps (arXiv:2305.08891).

    With SDXL's own schedule a trace of the mean colour survives to the last noise level, and flat
    pictures get the colours of the initial noise.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def assemble(
    size: Size, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: SchedulerMixin
) -> StableDiffusionXLPipeline:
    """SDXL's pipeline around these parts, with untrained text encoders."""
    from diffusers import StableDiffusionXLPipeline

    quiet_loading()
    text_encoder, text_encoder_2 = build_text_encoders(size)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        unet=unet,
        tokenizer=_tokenizer(size),
        tokenizer_2=_tokenizer(size, "!"),
        scheduler=scheduler,
        add_watermarker=False,
    )


# ---------------------------------------------------------------- folders of models


@dataclass(frozen=True)
class Models:
    """Where the miniatures are, as the flags of the stages want them."""

    folder: Path

    @property
    def clip_config(self) -> Path:
        return self.folder / f"{CLIP_NAME}.json"

    @property
    def clip_checkpoint(self) -> Path:
        """To load: ``open_clip.add_model_config(clip_config)``, then ``pretrained=`` this."""
        return self.folder / f"{CLIP_NAME}.safetensors"

    @property
    def sdxl(self) -> Path:
        return self.folder / "sdxl"

    @property
    def ip_adapter(self) -> Path:
        return self.folder / "ip_adapter.safetensors"

    @property
    def judge(self) -> Path:
        """Only beside trained miniatures."""
        return self.folder / "judge.safetensors"


def random_models(folder: Path, seed: int) -> Models:
    """Write RANDOM miniatures into ``folder``, or find them there; never in part."""
    from diffusers import EulerDiscreteScheduler

    made = {"seed": seed, "version": VERSION}

    def write(new: Models) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            clip, unet, vae = build_clip(RANDOM), build_unet(RANDOM), build_vae(RANDOM)
            _scale_outputs(unet, vae)
            scheduler = EulerDiscreteScheduler.from_pretrained(SDXL_CONFIG, subfolder="scheduler")
            pipe = assemble(RANDOM, unet, vae, scheduler)
        write_json(new.clip_config, dict(RANDOM.clip))
        save_tensors(new.clip_checkpoint, clip.state_dict(), made)
        pipe.save_pretrained(new.sdxl, safe_serialization=True)
        # 4: seen beside the residual stream
        save_tensors(new.ip_adapter, adapter_tensors(unet, CLIP_DIM, seed, 4.0), made)

    return _filled(Models(Path(folder)), made, write)


def trained_models(folder: Path) -> Models:
    """Copy the shipped TRAINED miniatures into ``folder``, or find them there; never in part."""
    made = {"shipped": file_hash(SHIPPED / "sdxl" / "unet" / WEIGHTS_FILE)}

    def write(new: Models) -> None:
        shutil.copytree(SHIPPED, new.folder)

    return _filled(Models(Path(folder)), made, write)


def _filled(models: Models, made: Mapping[str, Any], write: Callable[[Models], None]) -> Models:
    """``models``, written beside their place and then moved there, unless they are those."""
    files = (models.clip_config, models.clip_checkpoint, models.sdxl, models.ip_adapter)
    if _manifest(models.folder) == made and all(file.exists() for file in files):
        return models
    parent = models.folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{models.folder.name}.") as name:
        new = Models(Path(name) / "models")
        write(new)
        write_json(new.folder / "manifest.json", dict(made))
        if models.folder.exists():
            shutil.rmtree(models.folder)
        new.folder.replace(models.folder)
    return models


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


def _manifest(folder: Path) -> Mapping[str, Any] | None:
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
