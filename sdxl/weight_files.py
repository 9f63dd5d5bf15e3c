"""Weight files by their shapes alone: what they are, before they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

import util

SDXL_CONFIG = util.CHECKOUT / "configs" / "sdxl"  # SDXL-base's own, without weights


SDXL_WANTED = "SDXL-base: sd_xl_base_1.0.safetensors or a diffusers folder of it"


# Key prefix -> what the file is; the first that occurs names it.
_KINDS = {
    "ip_adapter.": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
    "control_model.": "a ControlNet",
    "cond_stage_model.transformer.": "a Stable Diffusion 1.x checkpoint",
    "cond_stage_model.model.": "a Stable Diffusion 2.x checkpoint",
    "conditioner.embedders.1.model.": "an SDXL-base checkpoint",
    "conditioner.embedders.0.model.": "an SDXL refiner checkpoint",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "model.diffusion_model.double_blocks.": "a FLUX checkpoint",
    "model.diffusion_model.": "a U-Net without its text encoders",
    "input_blocks.": "a U-Net without its text encoders",
    "down_blocks.": "a diffusers U-Net alone",
    "vision_model.": "a CLIP image encoder",
    "visual.": "an open_clip model",
    "encoder.": "a VAE alone",
}
_LORA = ("lora_", ".lora", "hada_w1", "lokr_w1")  # wherever in a key, by any of its trainers
CURES = {
    "a LoRA": "merge it into SDXL-base first: pipe.load_lora_weights, fuse_lora and "
    "save_pretrained of diffusers; then name that folder",
    "a U-Net without its text encoders": "name a whole checkpoint, or a diffusers folder of "
    "SDXL-base with this as its unet/",
    "a diffusers U-Net alone": "copy a diffusers folder of SDXL-base, and this to its unet/",
}


def checkpoint_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a file is, by its keys; None for unknown ones."""
    if any(mark in key for key in shapes for mark in _LORA):
        return "a LoRA"
    return next(
        (kind for prefix, kind in _KINDS.items() if any(key.startswith(prefix) for key in shapes)),
        None,
    )


def refuse_unfilled(path: Path, part: str, module: nn.Module) -> None:
    """diffusers leaves a parameter that the file lacks on the meta device without a word."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise util.DataError(
            path,
            f"no {part} weights for {', '.join(empty[:3])}",
            SDXL_WANTED,
            "the file is incomplete or of another model",
        )
