"""Another VAE than SDXL's own: a folder, a file, or the tiny one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import util
from rundirs.files import read_json
from rundirs.tensors import load_tensors
from sdxl.weight_files import SDXL_CONFIG, checkpoint_kind, read_shapes, refuse_unfilled


def load_vae(path: Path, dtype: torch.dtype, config: Path = SDXL_CONFIG) -> nn.Module:
    """A VAE of SDXL from a folder or file: the full one, or TAESDXL for previews. Or DataError."""
    from diffusers import AutoencoderKL

    if path.is_dir():
        return _load_vae_folder(path, dtype)
    shapes = read_shapes(path, "a VAE of SDXL")
    if any(key.startswith("decoder.layers.") for key in shapes):
        return _tiny_vae(path, load_tensors(path)[0], dtype)
    if not any(key.endswith("decoder.conv_out.weight") for key in shapes):
        raise util.DataError(
            path, checkpoint_kind(shapes) or "no decoder", "a VAE of SDXL", "name its file"
        )
    vae = AutoencoderKL.from_single_file(
        str(path), config=str(config), subfolder="vae", dtype=dtype, local_files_only=True
    )
    refuse_unfilled(path, "vae", vae)
    return vae


def _load_vae_folder(path: Path, dtype: torch.dtype) -> nn.Module:
    """From a diffusers folder, or from TAESDXL's own pair of files."""
    import diffusers

    pair = {part: path / f"taesdxl_{part}.safetensors" for part in ("encoder", "decoder")}
    if all(file.is_file() for file in pair.values()):
        state = {
            f"{part}.layers.{key}": tensor
            for part, file in pair.items()
            for key, tensor in load_tensors(file)[0].items()
        }
        return _tiny_vae(path, _without_clamp(state), dtype)
    folder = path / "vae" if (path / "vae").is_dir() else path
    if not (folder / "config.json").is_file():
        raise util.DataError(
            path, "a folder without config.json", "a diffusers VAE", "name a VAE of SDXL"
        )
    kind = read_json(folder / "config.json").get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise util.DataError(folder, f"a {kind}", "AutoencoderKL or AutoencoderTiny", "name one")
    return getattr(diffusers, kind).from_pretrained(
        str(folder), dtype=dtype, local_files_only=True, use_safetensors=True
    )


def _without_clamp(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TAESDXL's own decoder counts its input clamp as layer 0; diffusers does not keep it."""
    moved = {}
    for key, tensor in state.items():
        part, layers, index, rest = key.split(".", 3)
        number = int(index) - (part == "decoder")
        moved[f"{part}.{layers}.{number}.{rest}"] = tensor
    return moved


def _tiny_vae(path: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny()  # its defaults are TAESDXL's
    try:
        vae.load_state_dict(state)
    except RuntimeError as error:
        raise util.DataError(
            path, f"another tiny autoencoder ({error})", "TAESDXL", "name taesdxl's files"
        ) from None
    return vae.to(dtype).eval()
