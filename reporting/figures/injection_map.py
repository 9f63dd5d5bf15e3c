"""Where each modality enters the U-Net."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from modalities import NAMES, SITES, recipes
from reporting.svg import INK, LINE, MODALITY_COLOURS, MUTED, WIDTH_PX, Figure, draw_svg
from reporting.words import plain
from sdxl import injection_map


def site_scales(preset: injection_map.InjectionMap, strength: float) -> dict[str, np.ndarray]:
    """{"alone" | "together": mean scale over each site's layers [M, sites]}, in registry order.

    alone: a modality drawn by itself; together: in the fused recipe, gains applied.
    """
    layers = injection_map.sdxl_layers()
    columns = [[n for n, layer in enumerate(layers) if layer.site == site] for site in SITES]

    def means(recipe: Any) -> np.ndarray:
        table = injection_map.scales(recipe, preset, layers, strength).numpy()
        return np.stack([table[:, rows].mean(axis=1) for rows in columns], axis=1)

    alone = np.zeros((len(NAMES), len(SITES)))
    for row, recipe in enumerate(recipes("separate")):
        alone[row] = means(recipe)[row]
    return {"alone": alone, "together": means(recipes("fused")[0])}


def map_figure(name: str, kind: str, table: np.ndarray) -> Figure:
    entries = [
        f"{plain(modality)} at {site} {table[row, column]:.2f}"
        for row, modality in enumerate(NAMES)
        for column, site in enumerate(SITES)
        if table[row, column]
    ]
    what = {
        "alone": "each modality drawn alone (separate)",
        "together": "all five together (fused), shared by their gains",
    }[kind]
    alt = f"Injection map {name} on SDXL's U-Net, {what}: {'; '.join(entries)}"
    caption = (
        f"Preset {name}, {what}: IP-Adapter scale, mean over the site's cross-attention layers."
    )
    return Figure(
        draw_svg(alt, 400, partial(draw_unet, table=table, title=what.split(" (")[0])), caption
    )


# site -> left edge and top of its box, px; boxes without cross-attention have no bars
_BOX = {"down.0": (4, 26), "up.2": (188, 26), "down.1": (4, 66), "up.1": (188, 66),
        "down.2": (4, 182), "up.0": (188, 182), "mid": (96, 298)}  # fmt: skip
_BOX_WIDTH, _BOX_HEIGHT = 168, 98


def draw_unet(figure: Any, table: np.ndarray, title: str) -> None:
    """The U: down on the left, up on the right, mid below; in each site a bar per modality."""
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH_PX), ylim=(400, 0))
    axes.axis("off")
    axes.text(4, 13, title, fontweight="bold", fontsize=12, va="center")
    arrow = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 1.2}
    for start, end in (
        ("down.0", "down.1"),
        ("down.1", "down.2"),
        ("up.0", "up.1"),
        ("up.1", "up.2"),
    ):
        (x, y0), (_, y1) = _BOX[start], _BOX[end]
        down = y1 > y0
        height = _BOX_HEIGHT if start in SITES else 26
        other = _BOX_HEIGHT if end in SITES else 26
        ends = (
            ((x + 84, y0 + height), (x + 84, y1)) if down else ((x + 84, y0), (x + 84, y1 + other))
        )
        axes.annotate("", ends[1], ends[0], arrowprops=arrow)
    axes.annotate("", (110, 298), (88, 280), arrowprops=arrow)
    axes.annotate("", (272, 280), (250, 298), arrowprops=arrow)
    for y in (39, 115, 231):  # skip connections
        axes.plot([172, 188], [y, y], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2)
    top = max(float(table.max()), 1e-9)
    for site, (x, y) in _BOX.items():
        _draw_site(axes, site, x, y, table, top)


def _draw_site(axes: Any, site: str, x: int, y: int, table: np.ndarray, top: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    height = _BOX_HEIGHT if site in SITES else 26
    axes.add_patch(
        FancyBboxPatch(
            (x, y), _BOX_WIDTH, height, boxstyle="round,pad=0,rounding_size=6", fill=False,
            edgecolor=LINE, linewidth=1.2,
        )
    )  # fmt: skip
    if site not in SITES:
        axes.text(
            x + 8, y + 13, f"{site}  no cross-attention", fontsize=10, color=MUTED, va="center"
        )
        return
    attentions, depth = SITES[site]
    axes.text(x + 8, y + 12, site, fontweight="bold", fontsize=11, va="center")
    axes.text(x + 160, y + 12, f"{attentions} × {depth} layers", fontsize=9.5, color=MUTED,
              va="center", ha="right")  # fmt: skip
    column = list(SITES).index(site)
    for row, name in enumerate(NAMES):
        scale, level = float(table[row, column]), y + 28 + 15 * row
        shade = INK if scale else MUTED
        axes.text(x + 8, level, plain(name), fontsize=10, va="center", color=shade)
        axes.plot([x + 54, x + 128], [level] * 2, color=LINE, linewidth=1)
        if scale:
            end = x + 54 + 74 * scale / top
            axes.plot([x + 54, end], [level] * 2, color=MODALITY_COLOURS[name], linewidth=8,
                      solid_capstyle="butt")  # fmt: skip
        axes.text(x + 160, level, f"{scale:.2f}" if scale else "0", fontsize=10, va="center",
                  ha="right", color=shade)  # fmt: skip
