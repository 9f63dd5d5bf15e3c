"""Weight files by their shapes alone: what they are, before they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

import util

SDXL_CONFIG = util.CHECKOUT / "configs" / "sdxl"  # SDXL-base's own, without weights


def read_shapes(path: Path, expected: str) -> dict[str, tuple[int, ...]]:
    """{key: shape} of a safetensors file, from its header alone. Raises DataError."""
    from safetensors import SafetensorError, safe_open

    cure = "name the complete file; a download that was cut short has to be made again"
    if not path.exists():
        raise util.DataError(
            path, "no such file", expected, "give a local path: nothing is downloaded here"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        start = path.read_bytes()[:64] if path.is_file() and path.stat().st_size < 4096 else b""
        found = (
            "a git-lfs pointer, not the weights"
            if start.startswith(b"version https://git-lfs")
            else f"unreadable as safetensors ({error})"
        )
        raise util.DataError(path, found, expected, cure) from None


SDXL_WANTED = "SDXL-base: sd_xl_base_1.0.safetensors or a diffusers folder of it"


# Key prefix -> what the file is; the first that occurs names it.
_KINDS = {
    "ip_adapter.": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
    "lora_": "a LoRA",
    "control_model.": "a ControlNet",
    "cond_stage_model.transformer.": "a Stable Diffusion 1.x checkpoint",
    "cond_stage_model.model.": "a Stable Diffusion 2.x checkpoint",
    "conditioner.embedders.1.model.": "an SDXL-base checkpoint",
    "conditioner.embedders.0.model.": "an SDXL refiner checkpoint",
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 checkpoint",
    "model.diffusion_model.double_blocks.": "a FLUX checkpoint",
    "model.diffusion_model.": "a U-Net without its text encoders",
    "down_blocks.": "a diffusers U-Net alone",
    "vision_model.": "a CLIP image encoder",
    "visual.": "an open_clip model",
    "encoder.": "a VAE alone",
}


def checkpoint_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
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
