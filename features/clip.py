"""The CLIP that reads the pictures, and its identity."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import util
from datafiles.feature_bank import layer_name
from rundirs.tensors import read_shapes, what_lies_there
from util import DataError, UserError


@dataclass(frozen=True)
class Clip:
    """An open_clip model in eval mode, its deterministic validation transform and its identity."""

    model: nn.Module
    transform: Any
    tokenize: Any
    identity: dict[str, str | float]
    dtype: torch.dtype | None = None  # of the products; None: float32

    @torch.no_grad()
    def encode_pictures(self, crops: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] after the transform -> un-normalised float32 [B, D] on the model's device.

        A GPU is not waited for: it computes while the caller makes the next crops.
        """
        with self.products():
            encoded = self.model.encode_image(util.sent(crops, self.device), normalize=False)
        return encoded.float()

    @torch.no_grad()
    def encode_layers(self, crops: torch.Tensor, layers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Image layers, counted from 1, averaged over the picture: {name: float32 [B, W]}.

        On the model's device, as :meth:`encode_pictures`.
        """
        if not layers:
            return {}
        order = sorted(set(layers))
        indices = [layer - 1 for layer in order]
        with self.products():
            found = self.model.visual.forward_intermediates(
                util.sent(crops, self.device), indices, stop_early=True, intermediates_only=True
            )["image_intermediates"]  # [B, W, h, w] each
        return {
            layer_name(layer): maps.float().mean(dim=(2, 3))
            for layer, maps in zip(order, found, strict=True)
        }

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Un-normalised float32 [B, D] on the model's device."""
        with self.products():
            encoded = self.model.encode_text(
                self.tokenize(list(texts)).to(self.device), normalize=False
            )
        return encoded.float()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def products(self) -> torch.autocast:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)


def model_name(clip_model: str) -> str:
    """An open_clip model name; a JSON config is registered under its own name. Raises UserError."""
    import open_clip

    if clip_model.endswith(".json"):
        if not Path(clip_model).is_file():
            raise UserError(
                "--clip_model",
                f"{clip_model}: no such file",
                "an open_clip model config",
                "check the path",
            )
        open_clip.add_model_config(clip_model)
        return Path(clip_model).stem
    if clip_model not in open_clip.list_models():
        raise UserError(
            "--clip_model",
            clip_model,
            f"one of {len(open_clip.list_models())} open_clip models or a JSON",
            "see open_clip.list_models(); the default is ViT-H-14",
        )
    return clip_model


def load_clip(clip_model: str, clip_pretrained: str, device: torch.device) -> Clip:
    """Load any open_clip model with a tag or a local weight file. Raises UserError / DataError."""
    import open_clip

    name = model_name(clip_model)
    check_pretrained(name, clip_pretrained)
    try:
        model, transform = open_clip.create_model_from_pretrained(
            name, pretrained=clip_pretrained, device=device
        )
    except (RuntimeError, OSError, KeyError) as error:
        raise DataError(
            f"--clip_pretrained {clip_pretrained}",
            f"cannot be loaded into {name}: {error}",
            f"weights of {name}",
            "without internet, download the file elsewhere and name it here",
        ) from None
    identity = {"model": name, "weights": weights_hash(model)}
    return Clip(model.eval(), transform, open_clip.get_tokenizer(name), identity)


def adjusted(clip: Clip, blur_px: float, precision: str) -> Clip:
    """``clip`` in this precision, with all that changes features in its identity.

    Models and banks of another blur or precision do not mix.
    """
    marks: dict[str, str | float] = {}
    if blur_px:  # without: as before there was a blur
        marks["target_blur_px"] = blur_px
    if util.PRECISIONS[precision] is not None:  # float32: as before there were others
        marks["precision"] = precision
    return replace(clip, identity=clip.identity | marks, dtype=util.PRECISIONS[precision])


def check_pretrained(name: str, clip_pretrained: str) -> None:
    """Raise UserError unless this is a file or a tag that open_clip knows for the model."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if not Path(clip_pretrained).is_file() and clip_pretrained not in tags:
        raise UserError(
            "--clip_pretrained",
            f"{clip_pretrained}: no such file, nor a tag of {name}",
            f"a weight file, or one of {', '.join(tags) or '(no tags)'}",
            _folder_cure(Path(clip_pretrained)) or "check the path or the tag",
        )
    if Path(clip_pretrained).is_file():
        check_clip_file(name, Path(clip_pretrained))


def _folder_cure(path: Path) -> str:
    """Which file of a folder to name; "" where none is known."""
    known = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    found = [path / name for name in known if (path / name).is_file()]
    return f"name the file: {found[0]}" if found else ""


_NOT_OPEN_CLIP = {  # key prefix: what the file is
    "vision_model.": "transformers' layout of CLIP, or the image_encoder of an IP-Adapter",
    "text_model.": "transformers' layout of CLIP's text side",
    "ip_adapter.": "an IP-Adapter",
    "model.diffusion_model.": "a Stable Diffusion checkpoint",
}


def check_clip_file(name: str, path: Path) -> None:
    """Raise DataError unless it is, by its header, a file of the open_clip model ``name``."""
    cure = f"name open_clip's own file of {name}, e.g. open_clip_model.safetensors, complete"
    expected = f"weights of {name} in open_clip's layout"
    if path.suffix != ".safetensors":
        found = "" if zipfile.is_zipfile(path) else what_lies_there(path)
        if found and not found.startswith("a pickle"):
            raise DataError(path, found, expected, cure)
        if found and _begins(path, b"PK"):
            raise DataError(path, "a file that was cut short", expected, cure)
        return
    shapes = read_shapes(path, expected)
    for prefix, kind in _NOT_OPEN_CLIP.items():
        if any(key.startswith(prefix) for key in shapes):
            raise DataError(path, kind, expected, cure)
    wanted = open_clip_width(name)
    projection = shapes.get("text_projection", shapes.get("text.text_projection"))
    if "logit_scale" not in shapes or (projection and projection[-1] != wanted):
        found = f"embeddings of {projection[-1]}" if projection else f"keys {sorted(shapes)[:2]}"
        raise DataError(path, found, f"{expected}, of width {wanted}", cure)


def _begins(path: Path, mark: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark


def open_clip_width(name: str) -> int:
    """Of the embeddings of an open_clip model."""
    import open_clip

    return open_clip.get_model_config(name)["embed_dim"]


def check_layers(name: str, layers: Sequence[int]) -> None:
    """Raise UserError for layers that the image side of an open_clip model does not have."""
    import open_clip

    built = open_clip.get_model_config(name)["vision_cfg"].get("layers", 0)  # timm's have no number
    depth = built if isinstance(built, int) else 1 + len(built)  # a ResNet's stem and its stages
    if max(layers, default=0) > depth:
        raise UserError(
            "--image_layers",
            str(max(layers)),
            f"1 to {depth}, the layers of {name}" if depth else "a ViT or ResNet of open_clip",
            "choose among them" if depth else f"leave it out: {name} is built by timm",
        )


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and bytes of the loaded weights: the same for a tag and for its file."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(
            name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
