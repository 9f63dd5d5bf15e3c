"""Another VAE than SDXL's own: a folder, a file, or the tiny one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import util
from rundirs.files import read_json
from rundirs.tensors import load_tensors, read_shapes
from sdxl.weight_files import SDXL_CONFIG, checkpoint_kind, refuse_unfilled

LARGEST_HALF = torch.finfo(torch.float16).max
PROBE_SIDE = 16  # latents of a picture of 128 px
VAE_WANTED = "a VAE of SDXL"


def check_vae(path: Path, latent_channels: int, scaling_factor: float) -> None:
    """Raise DataError unless it is a VAE of such latents. Reads JSON and headers only.

    ``scaling_factor``: of the latents that the U-Net was trained on; a file does not tell its own.
    """
    if path.is_dir():
        _check_vae_folder(path, latent_channels, scaling_factor)
        return
    shapes = read_shapes(path, VAE_WANTED)
    tiny, full = "decoder.layers.0.weight", "decoder.conv_in.weight"
    first = [shape for key, shape in shapes.items() if key.endswith((tiny, full))]
    if not first:
        kind = checkpoint_kind(shapes) or "no decoder"
        raise util.DataError(path, kind, VAE_WANTED, "name its file")
    _check_latents(path, first[0][1], latent_channels)


def _check_latents(path: Path, found: int, wanted: int) -> None:
    if found != wanted:
        named = {16: ", as of Stable Diffusion 3 and FLUX", 3: ", as of LDM's VQ models"}
        raise util.DataError(
            path,
            f"a VAE of {found} latent channels{named.get(found, '')}",
            f"{wanted}, as the U-Net makes",
            f"name {VAE_WANTED}",
        )


def _check_vae_folder(path: Path, latent_channels: int, scaling_factor: float) -> None:
    if pair := _taesdxl_pair(path):
        for file in pair.values():
            read_shapes(file, VAE_WANTED)
        return
    folder = _diffusers_folder(path)
    if not (folder / "config.json").is_file():
        raise util.DataError(path, "a folder without config.json", "a diffusers VAE", "name one")
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in ("AutoencoderKL", "AutoencoderTiny"):
        raise util.DataError(folder, f"a {kind}", "AutoencoderKL or AutoencoderTiny", "name one")
    _check_latents(folder, config.get("latent_channels", 4), latent_channels)
    factor = config.get("scaling_factor", 0.18215 if kind == "AutoencoderKL" else 1.0)
    own_moments = config.get("latents_mean") is not None
    if kind == "AutoencoderKL" and not own_moments and abs(factor - scaling_factor) > 1e-3:
        raise util.DataError(
            folder / "config.json",
            f"scaling_factor {factor}{', as of Stable Diffusion 1 and 2' if factor > 0.18 else ''}",
            f"{scaling_factor}, of the latents that the U-Net makes",
            f"name {VAE_WANTED}",
        )
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise util.DataError(
            folder, "no .safetensors file", "the weights as safetensors", "name the whole folder"
        )
    for file in files:
        read_shapes(file, VAE_WANTED)


def _taesdxl_pair(path: Path) -> dict[str, Path]:
    """TAESDXL's own two files in a folder, by their part; {} unless both are there."""
    pair = {part: path / f"taesdxl_{part}.safetensors" for part in ("encoder", "decoder")}
    return pair if all(file.is_file() for file in pair.values()) else {}


def _diffusers_folder(path: Path) -> Path:
    """Where a VAE's config is: in the folder, or in the part of SDXL's."""
    return path / "vae" if (path / "vae").is_dir() else path


@torch.no_grad()
def overflows_half(vae: Any) -> bool:
    """Whether a VAE's decoder leaves the range of float16, as SDXL's own does: by a trial."""
    largest = []

    def seen(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            largest.append(float(output.abs().max()))

    own = next(vae.parameters()).dtype
    shape = (1, vae.config.latent_channels, PROBE_SIDE, PROBE_SIDE)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    vae.to(torch.float32)
    hooks = [module.register_forward_hook(seen) for module in vae.modules()]
    picture = vae.decode(latents / vae.config.scaling_factor).sample
    for hook in hooks:
        hook.remove()
    vae.to(own)
    return not picture.isfinite().all() or max(largest) > LARGEST_HALF


def load_vae(path: Path, dtype: torch.dtype, config: Path = SDXL_CONFIG) -> nn.Module:
    """A VAE that :func:`check_vae` saw: the full one, or TAESDXL for previews. Or DataError."""
    from diffusers import AutoencoderKL

    if path.is_dir():
        return _load_vae_folder(path, dtype)
    shapes = read_shapes(path, VAE_WANTED)
    if any(key.startswith("decoder.layers.") for key in shapes):
        return _tiny_vae(path, load_tensors(path)[0], dtype)
    vae = AutoencoderKL.from_single_file(
        str(path), config=str(config), subfolder="vae", dtype=dtype, local_files_only=True
    )
    refuse_unfilled(path, "vae", vae)
    if dtype == torch.float16:  # SDXL's own config asks for float32, whatever the file is
        vae.register_to_config(force_upcast=overflows_half(vae))
    return vae


def _load_vae_folder(path: Path, dtype: torch.dtype) -> nn.Module:
    """From a diffusers folder, or from TAESDXL's own pair of files."""
    import diffusers

    if pair := _taesdxl_pair(path):
        state = {
            f"{part}.layers.{key}": tensor
            for part, file in pair.items()
            for key, tensor in load_tensors(file)[0].items()
        }
        return _tiny_vae(path, _without_clamp(state), dtype)
    folder = _diffusers_folder(path)
    kind = read_json(folder / "config.json")["_class_name"]
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
