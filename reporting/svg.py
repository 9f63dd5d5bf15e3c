"""Figures of the report: SVGs whose colours are the page's, with a text for those who see none."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modalities import NAMES
from reporting.words import plain

# Colours of a figure are names: the page's style sheet says what they are, in light and in dark.
INK, MUTED, LINE, ALERT, OUTLINE = "#010203", "#010204", "#010205", "#010206", "#010207"
MODALITY_COLOURS = {name: f"#01021{place}" for place, name in enumerate(NAMES)}
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ALERT: "alert", OUTLINE: "outline"} | {
    colour: plain(name) for name, colour in MODALITY_COLOURS.items()
}
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with dollar signs is a name
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
}
WIDTH_PX = 360  # of a figure: what a phone shows at full size


@dataclass(frozen=True)
class Figure:
    """An SVG to put into the page, and the sentence below it."""

    svg: str
    caption: str


def draw_svg(
    alt: str, height_px: int, draw: Callable[[Any], None], width_px: int = WIDTH_PX
) -> str:
    """What ``draw(figure)`` draws, as inline SVG with the page's own colours and fonts."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    matplotlib.use("Agg")
    salt = hashlib.sha256(alt.encode()).hexdigest()[:8]
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        canvas = Canvas(figsize=(width_px / 72, height_px / 72), layout="constrained")
        draw(canvas)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), salt, alt, width_px)


def _inline(svg: str, salt: str, alt: str, width_px: int) -> str:
    """Matplotlib's file as a part of a page: no prologue, own ids, variables for colours."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    body = svg[svg.index(">") + 1 :]
    box = re.search(r'viewBox="([^"]+)"', svg)[1]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    used = set(re.findall(r"#([\w-]+)[\")]", body))

    def own_id(found: re.Match[str]) -> str:
        """Ids that are pointed to, once each: matplotlib repeats equal definitions."""
        if found[1] not in used:
            return ""
        used.remove(found[1])
        return f' id="{salt}{found[1]}"'

    body = re.sub(r' id="([\w.-]+)"', own_id, body)
    body = re.sub(r'(href="#|url\(#)([\w-]+)', rf"\g<1>{salt}\g<2>", body)
    for colour, name in _VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"\n\s*", "\n", body)
    head = f'<svg viewBox="{box}" style="max-width:{round(width_px * 1.25)}px" role="img" '
    return f'{head}aria-label="{escape(alt)}">{body}'


def few_ticks(most: int = 5) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most)
