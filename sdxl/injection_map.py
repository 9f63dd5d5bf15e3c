"""Layer-wise IP-Adapter: where each modality enters SDXL, the attention there, loading, offline.

One adapter copy serves all modalities. Per cross-attention layer (IP-Adapter, arXiv:2308.06721):
``out = Attn(q, K_text, V_text) + sum_m scale[b, m] * Attn(q, K_ip(e_m), V_ip(e_m))``.
Shapes: B rows, M modalities in registry order, L cross-attention layers, T image tokens per
modality, W token width, D CLIP width.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import nn

import args
import modalities
import util

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.models.attention_processor import Attention
    from transformers import CLIPTokenizer

PRESETS = Path(__file__).parents[1] / "configs" / "injection"
SDXL_CONFIG = (
    Path(__file__).parents[1] / "configs" / "sdxl"
)  # SDXL-base's own configs, without weights
_ATTENTION = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)"
    r"\.transformer_blocks\.(\d+)\.attn2\.processor"
)


# ---------------------------------------------------------------- sites and layers


@dataclass(frozen=True)
class Layer:
    """A cross-attention layer: transformer block ``layer`` of the ``attention``-th at ``site``."""

    site: str
    attention: int
    layer: int

    @property
    def names(self) -> tuple[str, str, str]:
        """Its names in presets, most specific first: ``down.2.1.3``, ``down.2.1``, ``down.2``."""
        attention = f"{self.site}.{self.attention}"
        return f"{attention}.{self.layer}", attention, self.site


@functools.cache
def sdxl_layers() -> tuple[Layer, ...]:
    """The 70 layers of SDXL-base, in the order of its attention processors (= of adapter files)."""
    # diffusers registers mid_block after up_blocks, so mid comes last here though not in depth.
    sites = sorted(modalities.SITES, key=lambda site: site == "mid")
    return tuple(
        Layer(site, attention, layer)
        for site in sites
        for attention in range(modalities.SITES[site][0])
        for layer in range(modalities.SITES[site][1])
    )


def layers_of(unet: UNet2DConditionModel) -> tuple[Layer, ...]:
    """The cross-attention layers of ``unet`` in processor order. UserError if it lacks a site."""
    return tuple(_cross_attention(unet).values())


def _cross_attention(unet: UNet2DConditionModel) -> dict[str, Layer]:
    """Processor name -> layer, of attn2 only."""
    found = {}
    for name in unet.attn_processors:
        if match := _ATTENTION.fullmatch(name):
            path, block, attention, layer = match.groups()
            site = f"{path}.{block}" if path else "mid"
            found[name] = Layer(site, int(attention), int(layer))
    sites = list(dict.fromkeys(layer.site for layer in found.values()))
    if set(sites) != set(modalities.SITES):
        raise util.UserError(
            "U-Net",
            f"cross-attention at {', '.join(sites) or 'no block'}",
            f"cross-attention at {', '.join(modalities.SITES)}",
            "name an SDXL-base model: Stable Diffusion 1.5 and 2 and the refiner have other blocks",
        )
    return found


# ---------------------------------------------------------------- presets


@dataclass(frozen=True)
class InjectionMap:
    """How strongly each modality enters at each site.

    ``sites``: modality -> {site | attention | layer: scale}, the most specific key wins.
    ``gain``: "relative" shares a layer among the active modalities, "absolute" multiplies gain and
    scale.
    """

    name: str
    description: str
    gain: str
    sites: Mapping[str, Mapping[str, float]]
    allow_dead: tuple[str, ...] = ()

    def scale(self, modality: str, layer: Layer) -> float:
        keys = self.sites.get(modality, {})
        return next((keys[name] for name in layer.names if name in keys), 0.0)


def load_injection(preset_or_file: str) -> InjectionMap:
    """``intent`` (the registry), a preset of configs/injection or a YAML file. Or UserError."""
    if preset_or_file == "intent":
        sites = {modality.name: modality.sites for modality in modalities.MODALITIES}
        return InjectionMap(
            "intent", "each modality at its own depth, as registered", "relative", sites
        )
    path = PRESETS / f"{preset_or_file}.yaml"
    if not path.is_file():
        path = Path(preset_or_file)
    if not path.is_file():
        presets = ["intent", *sorted(file.stem for file in PRESETS.glob("*.yaml"))]
        raise util.UserError(
            "--injection",
            preset_or_file,
            f"{', '.join(presets)} or a YAML file",
            _suggest(preset_or_file, presets),
        )
    try:
        content = args.read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise util.UserError(
            path,
            f"not YAML ({error})",
            "an injection preset",
            f"start from {PRESETS / 'uniform.yaml'}",
        ) from None
    return _parse_injection(path, content)


def _parse_injection(path: Path, content: object) -> InjectionMap:
    """Check every key and value of a preset. Raises UserError."""
    fields = ("description", "gain", "sites", "allow_dead")
    content = _mapping(path, content, fields)
    gain = content.get("gain")
    if gain not in ("relative", "absolute"):
        raise util.UserError(f"{path}: gain", gain, "relative or absolute", "set one of the two")
    sites = _mapping(f"{path}: sites", content.get("sites"), modalities.NAMES)
    known = list(dict.fromkeys(name for layer in sdxl_layers() for name in reversed(layer.names)))
    parsed = {}
    for modality, keys in sites.items():
        keys = _by_layer(f"{path}: {modality}", keys)
        parsed[modality] = dict(_mapping(f"{path}: {modality}", keys, known))
        for key, scale in parsed[modality].items():
            number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
            if not number or not 0 <= scale < math.inf:
                raise util.UserError(
                    f"{path}: {modality}: {key}", scale, "a scale >= 0", "correct it"
                )
    allowed = tuple(
        _mapping(
            f"{path}: allow_dead", dict.fromkeys(content.get("allow_dead") or ()), modalities.NAMES
        )
    )
    made = InjectionMap(path.stem, str(content.get("description", "")), gain, parsed, allowed)
    _refuse_dead(path, made, modalities.NAMES, sdxl_layers())
    return made


def _by_layer(where: str, scales: object) -> object:
    """A list of one number per layer, in the adapter's own order, as {layer: scale}.

    Anything else as it is. Raises UserError for a list of another length.
    """
    if not isinstance(scales, list):
        return scales
    if len(scales) != len(sdxl_layers()):
        raise util.UserError(
            where,
            f"{len(scales)} numbers",
            f"{len(sdxl_layers())}, one per layer, or a mapping from sites",
            "complete the list",
        )
    return {layer.names[0]: scale for layer, scale in zip(sdxl_layers(), scales, strict=True)}


def _mapping(where: object, content: object, known: Sequence[str]) -> Mapping[str, object]:
    """``content`` if it maps keys of ``known`` only. Raises UserError with "did you mean"."""
    if not isinstance(content, Mapping):
        raise util.UserError(
            where, content, f"a mapping with keys of {', '.join(known[:9])}", "correct it"
        )
    for key in content:
        if key not in known:
            raise util.UserError(
                where, f"key {key!r}", f"one of {', '.join(known[:9])}", _suggest(key, known)
            )
    return content


def _suggest(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "name one of these"


def _refuse_dead(
    where: object, injection: InjectionMap, names: Iterable[str], layers: Sequence[Layer]
) -> None:
    """Raise UserError if a modality reaches no layer and the preset does not say that it may."""
    for name in names:
        if name not in injection.allow_dead and not any(
            injection.scale(name, layer) for layer in layers
        ):
            raise util.UserError(
                where,
                f"{name} is injected nowhere",
                f"a scale > 0 for {name}",
                f"give {name} a site, or list it under allow_dead if that is meant",
            )


def scales(
    recipe: modalities.Recipe,
    preset: InjectionMap | str = "intent",
    layers: Sequence[Layer] | None = None,
    strength: float = 1.0,
    gains: torch.Tensor | None = None,
) -> torch.Tensor:
    """IP-Adapter scales of a recipe, float32 [M, L] in registry order; [B, M, L] for gains per row.

    ``layers``: default SDXL-base's 70. ``gains``: [M] or [B, M] instead of the registered ones.
    A recipe without gains takes the preset's scales times ``strength``. One with gains shares
    ``strength`` among its modalities at every layer where one of them enters (gain: relative), so
    that the sum there is ``strength``, or multiplies gain, scale and strength (gain: absolute).
    Raises UserError for an active modality that reaches none of ``layers``.
    """
    injection = load_injection(preset) if isinstance(preset, str) else preset
    layers = sdxl_layers() if layers is None else layers
    _refuse_dead(f"--injection {injection.name}", injection, recipe.active, layers)
    if gains is None:
        gains = torch.tensor([modality.gain for modality in modalities.MODALITIES])
    if gains.shape[-1:] != (len(modalities.NAMES),) or not bool((gains >= 0).all()):
        raise ValueError(
            f"gains must be >= 0 and [{len(modalities.NAMES)}] or "
            f"[B, {len(modalities.NAMES)}], found {tuple(gains.shape)}"
        )
    table = torch.tensor(
        [
            [injection.scale(name, layer) if name in recipe.active else 0.0 for layer in layers]
            for name in modalities.NAMES
        ]
    )
    table = table.expand(*gains.shape, -1)
    if recipe.apply_gain:
        table = table * gains.float().unsqueeze(-1)
        if injection.gain == "relative":
            total = table.sum(dim=-2, keepdim=True)
            table = table / torch.where(total > 0, total, 1.0)
    return strength * table


# ---------------------------------------------------------------- files


def _read_shapes(path: Path, expected: str) -> dict[str, tuple[int, ...]]:
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


_ADAPTER_WANTED = (
    "an IP-Adapter for SDXL that reads one CLIP vector, as ip-adapter_sdxl_vit-h.safetensors"
)


def _adapter_kind(shapes: Mapping[str, tuple[int, ...]], clip_dim: int | None) -> str | None:
    """What is wrong with {key: shape} as an SDXL IP-Adapter, None if nothing."""
    if not any(key.startswith("ip_adapter.") for key in shapes):
        return _checkpoint_kind(shapes) or "a file without ip_adapter.* keys"
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


def _layer_key(layer: int, kind: str) -> str:
    """Official key of the ``layer``-th cross-attention's ``k`` or ``v``; even numbers are attn1."""
    return f"ip_adapter.{2 * layer + 1}.to_{kind}_ip.weight"


def _adapter_layers_wrong(shapes: Mapping[str, tuple[int, ...]], width: int) -> str | None:
    """What is wrong with ``ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight``, None if nothing."""
    found = {key for key in shapes if key.startswith("ip_adapter.")}
    count = max(len(found) // 2, 1)
    wanted = {_layer_key(layer, kind) for layer in range(count) for kind in "kv"}
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
            tuple(tensors[_layer_key(layer, kind)] for kind in "kv") for layer in range(count)
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


def check_ip_adapter(path: str | Path, clip_dim: int | None = None) -> None:
    """Raise DataError if ``path`` is no SDXL IP-Adapter. Of safetensors only the header is read.

    ``clip_dim``: width of the embeddings it has to read; None accepts any.
    """
    path = Path(path)
    shapes = (
        _read_shapes(path, _ADAPTER_WANTED)
        if path.suffix != ".bin"
        else {key: tuple(tensor.shape) for key, tensor in _read_bin(path).items()}
    )
    if kind := _adapter_kind(shapes, clip_dim):
        raise util.DataError(path, kind, _ADAPTER_WANTED, "name that file with --ip_adapter_path")


def read_ip_adapter(path: str | Path, clip_dim: int | None = None) -> IPAdapterWeights:
    """Read an adapter (.safetensors or .bin) to CPU in its own dtype. Raises DataError."""
    path = Path(path)
    check_ip_adapter(path, clip_dim)
    tensors = _read_bin(path) if path.suffix == ".bin" else util.load_tensors(path)[0]
    return IPAdapterWeights.from_tensors(path, tensors)


def _read_bin(path: Path) -> dict[str, torch.Tensor]:
    """{"image_proj": {...}, "ip_adapter": {...}} of a .bin file, keys joined by dots."""
    if not path.is_file():
        raise util.DataError(
            path, "no such file", _ADAPTER_WANTED, "give a local path: nothing is downloaded here"
        )
    nested = util.load_torch(path, _ADAPTER_WANTED, "take the .safetensors file, complete")
    return {
        f"{part}.{key}": tensor
        for part, tensors in nested.items()
        if isinstance(tensors, dict)
        for key, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


# ---------------------------------------------------------------- modules


class ImageProjection(nn.Module):
    """CLIP vectors -> image tokens. [B, M, D] -> [B, M, T, W] in the dtype of the weights.

    Submodules are named as in the adapter file. A zero vector does not give zero tokens: there is
    a bias.
    """

    def __init__(self, clip_dim: int, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(clip_dim, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        tokens = self.proj(embeddings.to(self.proj.weight.dtype))
        return self.norm(tokens.unflatten(-1, (self.tokens, -1)))


class InjectedAttention(nn.Module):
    """Attention processor: ONE to_k_ip / to_v_ip for all modalities, a scale per row and modality.

    The text part is diffusers' AttnProcessor2_0. K and V of the image tokens do not depend on the
    timestep: :meth:`set_tokens` makes them once per image.
    """

    def __init__(self, to_k_ip: torch.Tensor, to_v_ip: torch.Tensor, heads: int) -> None:
        """``to_k_ip``, ``to_v_ip``: [heads * d, W]."""
        super().__init__()
        self.to_k_ip, self.to_v_ip = _frozen_linear(to_k_ip), _frozen_linear(to_v_ip)
        self.heads = heads
        self.clear()

    def clear(self) -> None:
        """Forget the image tokens; a forward pass is then an error."""
        self._batch: int | None = None
        self._first = 0  # row of the first one that the U-Net is given
        self._active = 0  # modalities with a scale > 0 in some row
        self._key: torch.Tensor | None = None  # [B, heads, active * T, d], divided by sqrt(d)
        self._value: torch.Tensor | None = None  # [B, heads, active * T, d], times the scale

    def rows_from(self, first: int) -> None:
        """The U-Net is given the rows from this one on: without the negative ones, say."""
        self._first = first

    def set_tokens(
        self, tokens: torch.Tensor, scale: torch.Tensor, device: torch.device | None = None
    ) -> None:
        """``tokens`` [B, M, T, W] where the weights are, in their dtype; ``scale`` [B, M] on CPU.

        ``device``: where the U-Net computes; None: where the weights are.
        """
        if tokens.ndim != 4 or scale.shape != tokens.shape[:2]:
            raise RuntimeError(
                f"image tokens {tuple(tokens.shape)} with scale {tuple(scale.shape)}: "
                "expected [B, M, T, W] and [B, M]"
            )
        self.clear()
        self._batch = len(tokens)
        # On CPU, so that choosing the modalities of 70 layers does not synchronise with the GPU.
        active = scale.ne(0).any(dim=0).nonzero().flatten()
        self._active = len(active)
        if not self._active:
            return
        tokens = tokens[:, active.to(tokens.device)]
        weight = scale[:, active].to(tokens)[:, :, None, None]
        key = self.to_k_ip(tokens).flatten(1, 2).unflatten(-1, (self.heads, -1))
        value = (self.to_v_ip(tokens) * weight).flatten(1, 2).unflatten(-1, (self.heads, -1))
        self._key = (key.transpose(1, 2).contiguous() * key.shape[-1] ** -0.5).to(device=device)
        self._value = value.transpose(1, 2).contiguous().to(device=device)

    def injected(self, query: torch.Tensor) -> torch.Tensor:
        """sum_m scale_m * Attn(query, K_m, V_m). [B, heads, S, d] -> the same."""
        # 4 keys per modality are too few for the fused kernels, which want a copy of the query for
        # each: one product over all tokens, softmax per modality, took a third of the time or less
        # (CPU, M=5). Tokens come before positions, so that the softmax runs along long rows.
        key, value = self._key[self._first :], self._value[self._first :]
        scores = key @ query.contiguous().transpose(-1, -2)
        shares = scores.unflatten(-2, (self._active, -1)).softmax(dim=-2).flatten(-3, -2)
        return shares.transpose(-1, -2) @ value

    def forward(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``hidden_states`` [B, S, C] or [B, C, h, w]; ``encoder_hidden_states`` [P, N, W].

        P prompts for B / P rows each, in their order: B for a prompt per row. diffusers calls this.
        Raises RuntimeError without image tokens for exactly these rows.
        """
        if self._batch is None or len(hidden_states) != self._batch - self._first:
            state = (
                "set_tokens was not called"
                if self._batch is None
                else f"image tokens are for {self._batch - self._first} rows"
            )
            raise RuntimeError(
                f"{state}, the U-Net has {len(hidden_states)}: Injector.set must be given "
                "the rows that are drawn, with guidance if the U-Net gets negative rows"
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        hidden_states = self._attend(attn, hidden_states, encoder_hidden_states, attention_mask)
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))  # projection, dropout
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _attend(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        text: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Text attention plus the injected one, [B, S, C] -> [B, S, inner]."""
        text_or_self = hidden_states if text is None else text
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, text_or_self.shape[1], len(hidden_states))
            mask = mask.view(len(hidden_states), attn.heads, -1, mask.shape[-1])
        if text is not None and attn.norm_cross:
            text_or_self = attn.norm_encoder_hidden_states(text)
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (
                attn.to_q(hidden_states),
                attn.to_k(text_or_self),
                attn.to_v(text_or_self),
            )
        )
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if len(key) != len(query):  # a prompt's K and V are made once, not for each of its rows
            rows_each = _rows_per_prompt(len(query), len(key))
            key, value = (part.repeat_interleave(rows_each, dim=0) for part in (key, value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if self._active:
            attended = attended + self.injected(query)
        return attended.transpose(1, 2).flatten(2).to(query.dtype)


def _rows_per_prompt(rows: int, prompts: int) -> int:
    if rows % prompts:
        raise RuntimeError(f"{prompts} prompts for {rows} rows: expected a divisor of them")
    return rows // prompts


def _frozen_linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class Injector:
    """The adapter in a U-Net: :meth:`install` once, :meth:`set` for each batch of images."""

    def __init__(
        self,
        layers: tuple[Layer, ...],
        processors: Sequence[InjectedAttention],
        projection: ImageProjection,
    ) -> None:
        self.layers = layers
        self.processors = tuple(processors)
        self.projection = projection
        self._guided_rows = 0  # negative rows, which come first

    @classmethod
    def install(cls, unet: UNet2DConditionModel, weights: IPAdapterWeights) -> Injector:
        """Put processors on the cross-attention of ``unet``; others stay. Raises DataError."""
        found = _cross_attention(unet)
        attentions = [unet.get_submodule(name.removesuffix(".processor")) for name in found]
        expected = [tuple(attention.to_k.weight.shape) for attention in attentions]
        shapes = [tuple(key.shape) for key, _ in weights.layers]
        if shapes != expected:
            first = next(
                (
                    i
                    for i, pair in enumerate(zip(shapes, expected, strict=False))
                    if pair[0] != pair[1]
                ),
                min(len(shapes), len(expected)),
            )
            raise util.DataError(
                weights.path,
                f"{len(shapes)} layers, number {first}: {shapes[first : first + 1]}",
                f"{len(expected)} layers, number {first}: {expected[first : first + 1]}",
                "take the IP-Adapter made for this U-Net: ip-adapter_sdxl_vit-h for SDXL-base",
            )
        where = {"device": unet.device, "dtype": unet.dtype}
        processors = [
            InjectedAttention(key.to(**where), value.to(**where), attention.heads)
            for (key, value), attention in zip(weights.layers, attentions, strict=True)
        ]
        unet.set_attn_processor(
            {**unet.attn_processors, **dict(zip(found, processors, strict=True))}
        )
        projection = ImageProjection(weights.clip_dim, weights.width, weights.tokens)
        projection.load_state_dict(weights.projection)
        return cls(tuple(found.values()), processors, projection.to(**where).requires_grad_(False))

    def set(
        self,
        embeddings: torch.Tensor,
        scales: torch.Tensor,
        guidance: bool,
        device: torch.device | None = None,
    ) -> None:
        """What to draw next: ``embeddings`` [B, M, D] un-normalised, ``scales`` [B, M, L].

        ``guidance``: the U-Net will get [negative; positive] rows. The negative ones read the
        projection of a ZERO embedding, as in the adapter's training, with the same scales.
        ``device``: where the U-Net computes; None: where its weights are, which with CPU offload
        is another place. Raises ValueError for other shapes.
        """
        wanted = (*embeddings.shape[:2], len(self.layers))
        clip_dim = self.projection.proj.in_features
        if (
            embeddings.ndim != 3
            or embeddings.shape[-1] != clip_dim
            or tuple(scales.shape) != wanted
        ):
            raise ValueError(
                f"embeddings {tuple(embeddings.shape)} and scales {tuple(scales.shape)}: expected "
                f"[B, M, {clip_dim}] and [B, M, {len(self.layers)}]"
            )
        weight = self.processors[0].to_k_ip.weight
        device = weight.device if device is None else device
        # Offloaded weights wait on the CPU, or nowhere until accelerate's hooks bring them in.
        there = device if weight.is_meta else weight.device
        self.projection.to(device=there, dtype=weight.dtype)  # the U-Net may have moved since
        embeddings, scales = embeddings.to(there), scales.float().cpu()
        if guidance:
            embeddings = torch.cat([torch.zeros_like(embeddings), embeddings])
            scales = torch.cat([scales, scales])
        tokens = self.projection(embeddings)
        for layer, processor in enumerate(self.processors):
            processor.set_tokens(tokens, scales[:, :, layer], device)
        self._guided_rows = len(embeddings) // 2 if guidance else 0

    def guide(self, on: bool) -> None:
        """After :meth:`set` with guidance: whether the U-Net gets the negative rows, too."""
        for processor in self.processors:
            processor.rows_from(0 if on else self._guided_rows)

    def state(self) -> dict[str, torch.Tensor]:
        """The weights in the keys of an official file."""
        tensors = {
            f"image_proj.{name}": tensor for name, tensor in self.projection.state_dict().items()
        }
        for layer, processor in enumerate(self.processors):
            tensors[_layer_key(layer, "k")] = processor.to_k_ip.weight.detach()
            tensors[_layer_key(layer, "v")] = processor.to_v_ip.weight.detach()
        return tensors

    def clear(self) -> None:
        """Free the keys and values; drawing before the next :meth:`set` is an error."""
        for processor in self.processors:
            processor.clear()


# ---------------------------------------------------------------- SDXL, offline

_SDXL_WANTED = "SDXL-base: sd_xl_base_1.0.safetensors or a diffusers folder of it"
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


def _checkpoint_kind(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    return next(
        (kind for prefix, kind in _KINDS.items() if any(key.startswith(prefix) for key in shapes)),
        None,
    )


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
            _SDXL_WANTED,
            "take the .safetensors file: others are pickles, which can run code",
        )
    shapes = _read_shapes(path, _SDXL_WANTED)
    kind = _checkpoint_kind(shapes) or f"a file with keys like {sorted(shapes)[:2]}"
    if kind != "an SDXL-base checkpoint":
        raise util.DataError(path, kind, _SDXL_WANTED, cure)
    unet = "model.diffusion_model."
    keys = [
        shape
        for key, shape in shapes.items()
        if key.startswith(unet) and key.endswith("attn2.to_k.weight")
    ]
    wanted = util.read_json(config / "unet" / "config.json")
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
        raise util.DataError(path, "no VAE in it (first_stage_model.*)", _SDXL_WANTED, cure)


def _attention_count(unet: Mapping[str, object]) -> int:
    """Cross-attention layers of a U-Net config whose up path mirrors its down path."""
    depths = unet["transformer_layers_per_block"]
    down = sum(
        depth
        for kind, depth in zip(unet["down_block_types"], depths, strict=True)
        if "CrossAttn" in kind
    )
    return (2 * unet["layers_per_block"] + 1) * down + depths[-1]


def _check_sdxl_folder(path: Path) -> None:
    cure = "name the folder that StableDiffusionXLPipeline.save_pretrained wrote, complete"
    if not (path / "model_index.json").is_file():
        raise util.DataError(path, "a folder without model_index.json", _SDXL_WANTED, cure)
    kind = util.read_json(path / "model_index.json").get("_class_name")
    if kind != "StableDiffusionXLPipeline":
        raise util.DataError(path, f"a {kind}", "a StableDiffusionXLPipeline", cure)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        files = sorted((path / part).glob("*.safetensors"))
        if not files:
            raise util.DataError(
                path / part, "no .safetensors file", "the weights as safetensors", cure
            )
        for file in files:
            _read_shapes(file, f"the {part} of SDXL-base")


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
    vae_path: str | Path | None = None,
    config: Path = SDXL_CONFIG,
) -> StableDiffusionXLPipeline:
    """SDXL from a diffusers folder or a single .safetensors file, without network.

    ``vae_path``: folder or file of another VAE, e.g. the one repaired for float16. ``config``:
    folder of the configs of a single file. Raises DataError.
    """
    check_sdxl(path, config)
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
            _SDXL_WANTED,
            "the file is incomplete or of another model",
        ) from error
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        _refuse_unfilled(path, part, getattr(pipe, part))
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


def load_vae(path: Path, dtype: torch.dtype, config: Path = SDXL_CONFIG) -> nn.Module:
    """A VAE of SDXL from a folder or file: the full one, or TAESDXL for previews. Or DataError."""
    from diffusers import AutoencoderKL

    if path.is_dir():
        return _load_vae_folder(path, dtype)
    shapes = _read_shapes(path, "a VAE of SDXL")
    if any(key.startswith("decoder.layers.") for key in shapes):
        return _tiny_vae(path, util.load_tensors(path)[0], dtype)
    if not any(key.endswith("decoder.conv_out.weight") for key in shapes):
        raise util.DataError(
            path, _checkpoint_kind(shapes) or "no decoder", "a VAE of SDXL", "name its file"
        )
    vae = AutoencoderKL.from_single_file(
        str(path), config=str(config), subfolder="vae", dtype=dtype, local_files_only=True
    )
    _refuse_unfilled(path, "vae", vae)
    return vae


def _load_vae_folder(path: Path, dtype: torch.dtype) -> nn.Module:
    """From a diffusers folder, or from TAESDXL's own pair of files."""
    import diffusers

    pair = {part: path / f"taesdxl_{part}.safetensors" for part in ("encoder", "decoder")}
    if all(file.is_file() for file in pair.values()):
        state = {
            f"{part}.layers.{key}": tensor
            for part, file in pair.items()
            for key, tensor in util.load_tensors(file)[0].items()
        }
        return _tiny_vae(path, _without_clamp(state), dtype)
    folder = path / "vae" if (path / "vae").is_dir() else path
    if not (folder / "config.json").is_file():
        raise util.DataError(
            path, "a folder without config.json", "a diffusers VAE", "name a VAE of SDXL"
        )
    kind = util.read_json(folder / "config.json").get("_class_name")
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


def _refuse_unfilled(path: Path, part: str, module: nn.Module) -> None:
    """diffusers leaves a parameter that the file lacks on the meta device without a word."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise util.DataError(
            path,
            f"no {part} weights for {', '.join(empty[:3])}",
            _SDXL_WANTED,
            "the file is incomplete or of another model",
        )
