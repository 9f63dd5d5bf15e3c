"""What is drawn of a stimulus: the recipes of a mode, or the grid of a sweep over the injection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modalities import MODALITIES, NAMES, SITES, Recipe, recipes
from sdxl import injection_map

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


@dataclass(frozen=True)
class Variant:
    """One way to draw a stimulus: the modalities that act, and their scales [M, L]."""

    name: str
    label: str
    active: tuple[str, ...]
    scales: torch.Tensor


@dataclass(frozen=True)
class Family:
    """Variants that stand in one row of a sheet."""

    name: str
    variants: tuple[Variant, ...]


def short(name: str) -> str:
    """A recipe's or modality's name as people read it."""
    plain = name.replace("superpixel_", "")
    if plain.startswith("progressive_"):
        step, _, added = plain.removeprefix("progressive_").partition("_")
        return f"step {step}: {'+ ' if step != '1' else ''}{added}"
    return plain.replace("separate_", "only ")


def families(
    mode: str,
    sweep: str | None,
    preset: injection_map.InjectionMap,
    layers: Sequence[injection_map.Layer],
    strength: float,
    gains: torch.Tensor | None = None,
) -> list[Family]:
    """All that is drawn of a stimulus, row by row. ``gains`` [M]: not the registered ones."""
    if sweep == "sites":
        return _sites(layers, strength)
    if sweep == "modality":
        return _modality(preset, layers, strength, gains)
    if sweep == "scale":
        return _scale(preset, layers, gains)
    parts = ("separate", "fused", "progressive") if mode == "all" else (mode,)
    return [
        Family(
            part,
            tuple(
                Variant(
                    recipe.name,
                    short(recipe.name),
                    recipe.active,
                    injection_map.scales(recipe, preset, layers, strength, gains),
                )
                for recipe in recipes(part)
            ),
        )
        for part in parts
    ]


def _sites(layers: Sequence[injection_map.Layer], strength: float) -> list[Family]:
    """Every modality alone at every single site: what does each place of the U-Net make of it?"""
    found = []
    for item in MODALITIES:
        variants = []
        for site in SITES:
            only = injection_map.InjectionMap(site, "", "relative", {item.name: {site: 1.0}})
            recipe = Recipe(f"sweep_{item.name}_at_{site}", (item.name,), apply_gain=False)
            table = injection_map.scales(recipe, only, layers, strength)
            variants.append(Variant(recipe.name, f"at {site}", recipe.active, table))
        found.append(Family(short(item.name), tuple(variants)))
    return found


def _modality(
    preset: injection_map.InjectionMap,
    layers: Sequence[injection_map.Layer],
    strength: float,
    gains: torch.Tensor | None,
) -> list[Family]:
    """All five, each one alone, and all but each one."""
    one = [Recipe(f"sweep_only_{name}", (name,), apply_gain=False) for name in NAMES]
    without = [
        Recipe(f"sweep_without_{name}", tuple(n for n in NAMES if n != name), apply_gain=True)
        for name in NAMES
    ]
    whole = [Recipe("sweep_all", NAMES, apply_gain=True)]
    return [
        Family(
            "modality",
            tuple(
                Variant(
                    recipe.name,
                    short(recipe.name.removeprefix("sweep_").replace("_", " ", 1)),
                    recipe.active,
                    injection_map.scales(recipe, preset, layers, strength, gains),
                )
                for recipe in [*whole, *one, *without]
            ),
        )
    ]


def _scale(
    preset: injection_map.InjectionMap,
    layers: Sequence[injection_map.Layer],
    gains: torch.Tensor | None,
) -> list[Family]:
    """All five fused at growing total scale."""
    (fused,) = recipes("fused")
    variants = tuple(
        Variant(
            f"sweep_scale_{strength}",
            f"scale {strength}",
            fused.active,
            injection_map.scales(fused, preset, layers, strength, gains),
        )
        for strength in STRENGTHS
    )
    return [Family("scale", variants)]


def distinct(variants: Sequence[Variant]) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """(names, scales [M, L]): variants with equal scales are drawn once."""
    found: dict[bytes, tuple[tuple[str, ...], torch.Tensor]] = {}
    for variant in variants:
        key = variant.scales.numpy().tobytes()
        names = found[key][0] if key in found else ()
        found[key] = ((*names, variant.name), variant.scales)
    return list(found.values())
