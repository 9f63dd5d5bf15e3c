"""Files of the IP-Adapter: what they hold, checked before the first layer is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

import util
from rundirs.tensors import load_tensors, load_torch, read_shapes
from sdxl.weight_files import checkpoint_kind

_Any = TypeVar("_Any")
_ADAPTER_WANTED = (
    "an IP-Adapter for SDXL that reads one CLIP vector, as ip-adapter_sdxl_vit-h.safetensors"
)


def _adapter_kind(shapes: Mapping[str, tuple[int, ...]], clip_dim: int | None) -> str | None:
    """What is wrong with {key: shape} as an SDXL IP-Adapter, None if nothing."""
    if not any(key.startswith("ip_adapter.") for key in shapes):
        return checkpoint_kind(shapes) or "a file without ip_adapter.* keys"
    others = {
        "image_proj.latents": "an IP-Adapter Plus, which reads 257 CLIP patch tokens",
        "image_proj.perceiver_resampler.proj_in.weight": "an IP-Adapter FaceID Plus",
        "image_proj.proj.3.weight": "an IP-Adapter Full Face, which reads 257 CLIP patch tokens",
        "image_proj.proj.0.weight": "an IP-Adapter FaceID, which reads face recognition vectors",
    }
    for key, kind in others.items():
        if key in shapes:
            return kind
    keys = (
        "image_proj.proj.weight",
        "image_proj.proj.bias",
        "image_proj.norm.weight",
        "image_proj.norm.bias",
    )
    missing = [key for key in keys if key not in shapes]
    if missing:
        return f"an adapter without {', '.join(missing)}"
    out, read = shapes["image_proj.proj.weight"]
    (width,) = shapes["image_proj.norm.weight"]
    if width == 768:
        return "an IP-Adapter for Stable Diffusion 1.5 (token width 768)"
    if clip_dim is not None and read != clip_dim:
        model = ": the ViT-bigG one, ip-adapter_sdxl.safetensors" if read == 1280 else ""
        return (
            f"an IP-Adapter for {read}-d CLIP vectors{model}; the embeddings here are {clip_dim}-d"
        )
    return (
        _adapter_layers_wrong(shapes, width)
        if out % width == 0
        else f"image_proj of {out} outputs, not n*{width}"
    )


def layer_key(layer: int, kind: str) -> str:
    """Official key of the ``layer``-th cross-attention's ``k`` or ``v``; even numbers are attn1."""
    return f"ip_adapter.{2 * layer + 1}.to_{kind}_ip.weight"


def _adapter_layers_wrong(shapes: Mapping[str, tuple[int, ...]], width: int) -> str | None:
    """What is wrong with ``ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight``, None if nothing."""
    found = {key for key in shapes if key.startswith("ip_adapter.")}
    count = max(len(found) // 2, 1)
    wanted = {layer_key(layer, kind) for layer in range(count) for kind in "kv"}
    if found != wanted:
        return f"an adapter with keys {sorted(found ^ wanted)[:3]} too many or missing"
    wrong = [key for key in sorted(found) if len(shapes[key]) != 2 or shapes[key][1] != width]
    return (
        f"{wrong[0]} of shape {shapes[wrong[0]]}, which does not read {width} columns"
        if wrong
        else None
    )


@dataclass(frozen=True)
class IPAdapterWeights:
    """One adapter copy.

    ``projection``: {proj.weight [T*W, D], proj.bias, norm.weight [W], norm.bias}. ``layers``:
    (to_k_ip, to_v_ip), each [hidden, W], in the order of the U-Net's cross-attention.
    """

    path: Path
    projection: Mapping[str, torch.Tensor]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @classmethod
    def from_tensors(cls, path: Path, tensors: Mapping[str, torch.Tensor]) -> IPAdapterWeights:
        """Of the keys of an official file, which were checked."""
        prefix = "image_proj."
        projection = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        count = (len(tensors) - len(projection)) // 2
        layers = tuple(
            (tensors[layer_key(layer, "k")], tensors[layer_key(layer, "v")])
            for layer in range(count)
        )
        return cls(path, projection, layers)

    @property
    def clip_dim(self) -> int:
        return self.projection["proj.weight"].shape[1]

    @property
    def width(self) -> int:
        return self.projection["norm.weight"].shape[0]

    @property
    def tokens(self) -> int:
        return self.projection["proj.weight"].shape[0] // self.width


PICKLED = (".bin", ".pt", ".pth", ".ckpt")
AS_TRAINED = {  # how the training scripts of IP-Adapter name what the official files hold
    "image_proj_model.": "image_proj.",
    "adapter_modules.": "ip_adapter.",
}
IN_A_FOLDER = ("*.safetensors", "*.bin", "*.pt")  # the first kind that is there


def adapter_file(path: str | Path) -> Path:
    """The file of an adapter, where a folder is named: a checkpoint of its training, say.

    Raises DataError unless the folder holds one.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    kinds = [sorted(path.glob(kind)) for kind in IN_A_FOLDER]
    found = next(filter(None, kinds), [])
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "no file of weights"
        raise util.DataError(
            path, f"a folder with {names}", _ADAPTER_WANTED, "name the file with --ip_adapter_path"
        )
    return found[0]


def _official_name(key: str) -> str | None:
    """The official key of a tensor of any layout; None for one of the frozen U-Net."""
    key = key.removeprefix("module.")
    for trained, official in AS_TRAINED.items():
        if key.startswith(trained):
            return official + key.removeprefix(trained)
    return None if key.startswith("unet.") else key


def _officially(named: Mapping[str, _Any]) -> dict[str, _Any]:
    """What a file holds by key, by official keys; a file that was not trained so stays as it is."""
    keys = {key: _official_name(key) for key in named}
    if not any(key.removeprefix("module.").startswith(tuple(AS_TRAINED)) for key in named):
        return dict(named)
    return {name: named[key] for key, name in keys.items() if name is not None}


def check_ip_adapter(path: str | Path, clip_dim: int | None = None) -> None:
    """Raise DataError if ``path`` is no SDXL IP-Adapter. Of safetensors only the header is read.

    ``clip_dim``: width of the embeddings it has to read; None accepts any.
    """
    path = adapter_file(path)
    shapes = (
        _officially(read_shapes(path, _ADAPTER_WANTED))
        if path.suffix not in PICKLED
        else {key: tuple(tensor.shape) for key, tensor in _read_pickled(path).items()}
    )
    if kind := _adapter_kind(shapes, clip_dim):
        raise util.DataError(path, kind, _ADAPTER_WANTED, "name that file with --ip_adapter_path")


def read_ip_adapter(path: str | Path, clip_dim: int | None = None) -> IPAdapterWeights:
    """Read an adapter, of its official file or of its training, to CPU in its own dtype.

    A .safetensors file, one of torch.save, or a folder with one of them. Raises DataError.
    """
    path = adapter_file(path)
    check_ip_adapter(path, clip_dim)
    pickled = path.suffix in PICKLED
    tensors = _read_pickled(path) if pickled else _officially(load_tensors(path)[0])
    return IPAdapterWeights.from_tensors(path, tensors)


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by official keys, of {"image_proj": {...}, "ip_adapter": {...}} or of flat keys."""
    if not path.is_file():
        raise util.DataError(
            path, "no such file", _ADAPTER_WANTED, "give a local path: nothing is downloaded here"
        )
    content = load_torch(path, _ADAPTER_WANTED, "take the .safetensors file, complete")
    flat: dict[str, torch.Tensor] = {}
    for part, value in content.items():
        nested = value if isinstance(value, dict) else None
        inner = {part: value} if nested is None else {f"{part}.{k}": v for k, v in nested.items()}
        flat |= {str(key): of for key, of in inner.items() if isinstance(of, torch.Tensor)}
    return _officially(flat)
