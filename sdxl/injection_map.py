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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import modalities
import util
from rundirs.yaml_files import read_yaml

MAP_FOLDER = util.CHECKOUT / "configs" / "injection"
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


# ---------------------------------------------------------------- presets


GAINS = {  # what becomes of gain x scale at a layer
    "share": "divided by the sum over all modalities: the same in every recipe that has it",
    "relative": "divided by the sum over the recipe's modalities: those that are left get more",
    "absolute": "taken as it is",
}


@dataclass(frozen=True)
class InjectionMap:
    """How strongly each modality enters at each site.

    ``sites``: modality -> {site | attention | layer: scale}, the most specific key wins.
    ``gain``: see GAINS.
    """

    name: str
    description: str
    gain: str
    sites: Mapping[str, Mapping[str, float]]
    allow_dead: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """All that determines the scales, as JSON takes it."""
        sites = {modality: dict(keys) for modality, keys in self.sites.items()}
        return {"gain": self.gain, "sites": sites}

    def scale(self, modality: str, layer: Layer) -> float:
        keys = self.sites.get(modality, {})
        return next((keys[name] for name in layer.names if name in keys), 0.0)


def load_injection(preset_or_file: str) -> InjectionMap:
    """``intent`` (the registry), a preset of configs/injection or a YAML file. Or UserError."""
    if preset_or_file == "intent":
        sites = {modality.name: modality.sites for modality in modalities.MODALITIES}
        return InjectionMap(
            "intent", "each modality at its own depth, as registered", "share", sites
        )
    path = MAP_FOLDER / f"{preset_or_file}.yaml"
    if not path.is_file():
        path = Path(preset_or_file)
    if not path.is_file():
        presets = ["intent", *sorted(file.stem for file in MAP_FOLDER.glob("*.yaml"))]
        raise util.UserError(
            "--injection",
            preset_or_file,
            f"{', '.join(presets)} or a YAML file",
            _suggest(preset_or_file, presets),
        )
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise util.UserError(
            path,
            f"not YAML ({error})",
            "an injection preset",
            f"start from {MAP_FOLDER / 'uniform.yaml'}",
        ) from None
    return _parse_injection(path, content)


def _parse_injection(path: Path, content: object) -> InjectionMap:
    """Check every key and value of a preset. Raises UserError."""
    fields = ("description", "gain", "sites", "allow_dead")
    content = _mapping(path, content, fields)
    gain = content.get("gain")
    if gain not in GAINS:
        raise util.UserError(f"{path}: gain", gain, f"one of {', '.join(GAINS)}", "set one of them")
    sites = _mapping(f"{path}: sites", content.get("sites"), modalities.NAMES)
    known = list(dict.fromkeys(name for layer in sdxl_layers() for name in reversed(layer.names)))
    parsed: dict[str, dict[str, Any]] = {}
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


def _mapping(where: object, content: object, known: Sequence[str]) -> Mapping[str, Any]:
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
    Of a preset with ``gain: share`` a modality enters a layer at its share of ``strength`` among
    all that have a scale there, whichever of them are active: alone it shows what it adds to the
    fused picture. With ``relative`` or ``absolute`` (see GAINS), a recipe without gains takes the
    preset's scales times ``strength``. Raises UserError for an active modality that reaches none of
    ``layers``.
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
        [[injection.scale(name, layer) for layer in layers] for name in modalities.NAMES]
    )
    active = torch.tensor([name in recipe.active for name in modalities.NAMES])[:, None]
    shared = injection.gain == "share"
    table = (table if shared else table * active).expand(*gains.shape, -1)
    if shared or recipe.apply_gain:
        table = table * gains.float().unsqueeze(-1)
        if injection.gain != "absolute":
            total = table.sum(dim=-2, keepdim=True)
            table = table / torch.where(total > 0, total, 1.0)
    return strength * table * active
