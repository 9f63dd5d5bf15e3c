"""SDXL from a single file or a diffusers folder, offline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import util
from rundirs.files import read_json
from rundirs.tensors import read_shapes
from sdxl.schedulers import check_scheduler, honour_markers
from sdxl.vae import check_vae, load_vae
from sdxl.weight_files import CURES, SDXL_CONFIG, SDXL_WANTED, checkpoint_kind, refuse_unfilled

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer


def check_sdxl(path: str | Path, config: Path = SDXL_CONFIG) -> None:
    """Raise DataError if ``path`` is not SDXL-base, a diffusers folder or one .safetensors file.

    Reads JSON and safetensors headers only. ``config``: the model that a single file has to be.
    """
    path = Path(path)
    if path.is_dir():
        _check_sdxl_folder(path)
    else:
        check_sdxl_file(path, config)


def check_sdxl_file(path: str | Path, config: Path = SDXL_CONFIG) -> None:
    """As :func:`check_sdxl`, for a single file."""
    path, cure = Path(path), "name SDXL-base with --sd_model_path"
    if path.exists() and path.suffix != ".safetensors":
        raise util.DataError(
            path,
            f"a {path.suffix or 'nameless'} file",
            SDXL_WANTED,
            "take the .safetensors file: others are pickles, which can run code",
        )
    shapes = read_shapes(path, SDXL_WANTED)
    kind = checkpoint_kind(shapes) or f"a file with keys like {sorted(shapes)[:2]}"
    if kind != "an SDXL-base checkpoint":
        raise util.DataError(path, kind, SDXL_WANTED, CURES.get(kind, cure))
    refuse_markers(path, shapes)
    unet = "model.diffusion_model."
    keys = [
        shape
        for key, shape in shapes.items()
        if key.startswith(unet) and key.endswith("attn2.to_k.weight")
    ]
    wanted = read_json(config / "unet" / "config.json")
    count, width = _attention_count(wanted), wanted["cross_attention_dim"]
    if len(keys) != count or {shape[-1] for shape in keys} != {width}:
        raise util.DataError(
            path,
            f"{len(keys)} cross-attention layers of {sorted({s[-1] for s in keys})} columns",
            f"{count} layers of {width} columns",
            cure,
        )
    channels = shapes.get(f"{unet}input_blocks.0.0.weight", (0, 0))[1]
    if channels != wanted["in_channels"]:
        raise util.DataError(
            path,
            f"a U-Net of {channels} input channels (9: inpainting, 8: pix2pix)",
            f"{wanted['in_channels']} input channels",
            cure,
        )
    if not any(key.startswith("first_stage_model.decoder.") for key in shapes):
        raise util.DataError(path, "no VAE in it (first_stage_model.*)", SDXL_WANTED, cure)


def _attention_count(unet: Mapping[str, Any]) -> int:
    """Cross-attention layers of a U-Net config whose up path mirrors its down path."""
    depths = unet["transformer_layers_per_block"]
    down = sum(
        depth
        for kind, depth in zip(unet["down_block_types"], depths, strict=True)
        if "CrossAttn" in kind
    )
    return (2 * unet["layers_per_block"] + 1) * down + depths[-1]


def refuse_markers(path: Path, keys: Collection[str]) -> None:
    """Raise DataError for keys beside the weights that change what these mean."""
    what = {
        "weights scaled to float8 (scale_weight), which would be read many times too large": any(
            key.endswith((".scale_weight", ".weight_scale", "scaled_fp8")) for key in keys
        ),
        "a model for EDM's noise levels (edm_*)": any(
            key.split(".")[0].startswith("edm_") for key in keys
        ),
        "a U-Net that reads the guidance (cond_proj), as LCM-distilled ones do": any(
            "time_embed.cond_proj" in key or "time_embedding.cond_proj" in key for key in keys
        ),
    }
    for found, there in what.items():
        if there:
            raise util.DataError(
                path, found, SDXL_WANTED, "name the model in float16 or float32, not distilled"
            )


def _check_sdxl_folder(path: Path) -> None:
    cure = "name the folder that StableDiffusionXLPipeline.save_pretrained wrote, complete"
    if not (path / "model_index.json").is_file():
        raise util.DataError(path, "a folder without model_index.json", SDXL_WANTED, cure)
    kind = read_json(path / "model_index.json").get("_class_name")
    if kind != "StableDiffusionXLPipeline":
        raise util.DataError(path, f"a {kind}", "a StableDiffusionXLPipeline", cure)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        _check_part(path / part, cure)
    for part in ("tokenizer", "tokenizer_2"):
        if not any(
            all((path / part / name).is_file() for name in names)
            for names in (("vocab.json", "merges.txt"), ("tokenizer.json",))
        ):
            expected = "vocab.json and merges.txt, or tokenizer.json"
            raise util.DataError(path / part, "no vocabulary", expected, cure)
    if not (path / "scheduler" / "scheduler_config.json").is_file():
        raise util.DataError(path / "scheduler", "no scheduler_config.json", "one", cure)
    _check_unet_config(path)


def _check_part(folder: Path, cure: str) -> None:
    """Config and weights of a part of a folder, all its shards."""
    if not (folder / "config.json").is_file():
        raise util.DataError(folder, "no config.json", "the config of this part", cure)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise util.DataError(folder, "no .safetensors file", "the weights as safetensors", cure)
    for index in folder.glob("*.safetensors.index*.json"):
        named = set(read_json(index).get("weight_map", {}).values())
        lost = sorted(named - {file.name for file in files})
        if lost:
            raise util.DataError(
                folder, f"no {', '.join(lost)}", f"all files of {index.name}", cure
            )
    for file in files:
        refuse_markers(file, read_shapes(file, f"the {folder.name} of SDXL-base"))


def _check_unet_config(path: Path) -> None:
    """What of a U-Net's config this project has no answer to."""
    unet = read_json(path / "unet" / "config.json")
    texts = [read_json(path / part / "config.json") for part in ("text_encoder", "text_encoder_2")]
    width = sum(text.get("hidden_size", 0) for text in texts)
    wrong = {
        "time_cond_proj_dim": (unet.get("time_cond_proj_dim"), None),
        "addition_embed_type": (unet.get("addition_embed_type"), "text_time"),
        "cross_attention_dim": (unet.get("cross_attention_dim"), width),
    }
    for name, (found, wanted) in wrong.items():
        if found != wanted:
            raise util.DataError(
                path / "unet" / "config.json",
                f"{name} {found}{', of an LCM-distilled U-Net' if name.startswith('time') else ''}",
                f"{wanted}, as of SDXL-base with these text encoders",
                "name SDXL-base with --sd_model_path",
            )


def check_weights(path: str | Path, vae_path: str | None, config: Path = SDXL_CONFIG) -> Path:
    """What is loaded, by its headers: SDXL, and another VAE. Returns the folder of its configs.

    Raises DataError before anything is loaded.
    """
    check_sdxl(path, config)
    root = Path(path) if Path(path).is_dir() else config
    if vae_path is not None:
        channels = read_json(root / "unet" / "config.json")["in_channels"]
        factor = read_json(root / "vae" / "config.json").get("scaling_factor", 0.18215)
        check_vae(Path(vae_path), channels, factor)
    return root


def check_drawing(path: str | Path, vae_path: str | None, scheduler: str | None) -> None:
    """Everything that drawing opens: :func:`check_weights`, and the scheduler's name.

    Raises UserError and DataError.
    """
    root = check_weights(path, vae_path)
    own = read_json(root / "scheduler" / "scheduler_config.json").get("_class_name", "")
    check_scheduler(own, scheduler)


def clip_tokenizer(pad_token: str = "<|endoftext|>", merges: int | None = None) -> CLIPTokenizer:
    """transformers' CLIP tokenizer, from the vocabulary that open_clip carries: no download.

    SDXL's first tokenizer pads with ``<|endoftext|>``, its second with ``!`` (id 0). ``merges``:
    keep the first so many of the vocabulary's merges, for miniatures; rarer words fall in pieces.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    source = SimpleTokenizer()
    ordered = sorted(source.bpe_ranks, key=source.bpe_ranks.__getitem__)
    kept = ordered[: len(ordered) if merges is None else merges]
    letters = len(source.encoder) - len(ordered) - 2  # before the merges; two marks come last
    tokens = [*sorted(source.encoder, key=source.encoder.__getitem__)[: letters + len(kept)],
              "<|startoftext|>", "<|endoftext|>"]  # fmt: skip
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=kept,
        pad_token=pad_token,
        model_max_length=source.context_length,
    )


def load_sdxl(
    path: str | Path,
    dtype: torch.dtype,
    device: torch.device | str,
    vae_path: str | None = None,
    config: Path = SDXL_CONFIG,
) -> StableDiffusionXLPipeline:
    """SDXL from a diffusers folder or a single .safetensors file, without network.

    ``vae_path``: folder or file of another VAE, e.g. the one repaired for float16. ``config``:
    folder of the configs of a single file. Raises DataError.
    """
    check_weights(path, vae_path, config)
    path = Path(path)
    quiet_loading()
    # Without this, pictures depend on whether the package invisible-watermark is installed.
    options = {"dtype": dtype, "local_files_only": True, "add_watermarker": False}
    if vae_path is not None:
        options["vae"] = load_vae(Path(vae_path), dtype, config)
    try:
        pipe = _load_folder(path, options) if path.is_dir() else _load_file(path, config, options)
    except (KeyError, ValueError, OSError, NotImplementedError) as error:  # of diffusers
        raise util.DataError(
            path,
            f"weights that do not fit ({error})",
            SDXL_WANTED,
            "the file is incomplete or of another model",
        ) from error
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        refuse_unfilled(path, part, getattr(pipe, part))
    if path.is_file():
        honour_markers(pipe, set(read_shapes(path, SDXL_WANTED)))
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae):  # convolutions are faster so, on CPUs and GPUs
        part.to(memory_format=torch.channels_last)
    return pipe.to(device)


def quiet_loading() -> None:
    """No progress bars: they fill the logs of batch jobs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _load_folder(path: Path, options: Mapping[str, object]) -> StableDiffusionXLPipeline:
    from diffusers import StableDiffusionXLPipeline

    halves = all(".fp16" in file.name for file in (path / "unet").glob("*.safetensors"))
    return StableDiffusionXLPipeline.from_pretrained(
        str(path), use_safetensors=True, variant="fp16" if halves else None, **options
    )


def _load_file(
    path: Path, config: Path, options: Mapping[str, object]
) -> StableDiffusionXLPipeline:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_single_file(
        str(path),
        config=str(config),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer("!"),
        **options,
    )
