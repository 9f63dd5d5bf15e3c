"""Names and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from modalities import CONTROLS, PROMPTS, recipes

ORACLE = PROMPTS["oracle"].replace("oracle prompt", "ORACLE PROMPT")
DECODED = PROMPTS["decoded"].replace("decoded prompt", "DECODED PROMPT")
INTERVAL = "95 % bootstrap over stimuli"
HEADLINE_METRICS = ("clip", "inception", "alexnet5", "lite0", "ssim", "pixcorr", "lpips")
CONTROL_LABELS = {
    "shuffled_eeg": "fused, shuffled EEG",
    "noise_eeg": "fused, noise for EEG",
    "mean_embedding": "fused, mean embedding",
    "true_embedding": "fused, true embeddings (ceiling)",
}


def spoken_marks(prompt_source: str | None, control: str | None) -> list[str]:
    """What must be said beside anything that does not show what was decoded from EEG alone."""
    prompts = {"oracle": ORACLE, "decoded": DECODED}
    told = [mark for name, mark in prompts.items() if name in (prompt_source or "")]
    return told + ([CONTROLS.get(control, f"CONTROL: {control}")] if control else [])


def plain(modality: str) -> str:
    """A modality's name as people read it."""
    return modality.removeprefix("superpixel_")


def recipe_labels() -> dict[str, str]:
    """{recipe: what it is called within its own row}."""
    labels = {recipe.name: plain(recipe.active[0]) for recipe in recipes("separate")}
    labels |= {recipe.name: "fused" for recipe in recipes("fused")}
    for step, recipe in enumerate(recipes("progressive")):
        labels[recipe.name] = ("+ " if step else "") + plain(recipe.active[-1])
    return labels


def recipe_title(name: str) -> str:
    """A recipe's name on its own, e.g. in a table."""
    label = recipe_labels().get(name, name)
    kind = name.split("_", 1)[0]
    return f"{kind}: {label}" if label != name and label != kind else label


def finite(value: Any) -> float | None:
    """A finite float, None for anything else (empty, NaN, text)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def shown_number(value: Any, digits: int = 3) -> str:
    """For people: three digits after the point, fewer for large ones; a dash for none or NaN."""
    value = finite(value)
    if value is None:
        return "–"
    kept = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else digits
    return f"{value:.{kept}f}".replace("-", "−")


def percent(value: Any) -> str:
    value = finite(value)
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: Any) -> str:
    """A difference of shares in percentage points."""
    value = finite(value)
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def bracket(interval: Any, show: Callable[[Any], str] = shown_number) -> str:
    """``[low, high]``, empty for None or NaN."""
    if not interval or any(finite(end) is None for end in interval):
        return ""
    return f"[{show(interval[0])}, {show(interval[1])}]".replace(" %", "")


MOST_SUBJECTS = 3  # whose EEG is drawn
