"""Figures of the report: SVGs whose colours are the page's, with a text for those who see none."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import args
from datafiles import electrodes
from modalities import NAMES, SITES, recipes
from sdxl import injection_map

# ---------------------------------------------------------------- names and numbers


ORACLE = args.MARKS["oracle"].replace("oracle prompt", "ORACLE PROMPT")
INTERVAL = "95 % bootstrap over stimuli"
HEADLINE_METRICS = ("clip", "inception", "alexnet5", "lite0", "ssim", "pixcorr", "lpips")
CONTROL_LABELS = {
    "shuffled_eeg": "fused, shuffled EEG",
    "noise_eeg": "fused, noise for EEG",
    "mean_embedding": "fused, mean embedding",
    "true_embedding": "fused, true embeddings (ceiling)",
}


def marks_of(prompt_source: str | None, control: str | None) -> list[str]:
    """What must be said beside anything that does not show what was decoded from EEG alone."""
    oracle = [ORACLE] if "oracle" in (prompt_source or "") else []
    return oracle + ([args.CONTROLS.get(control, f"CONTROL: {control}")] if control else [])


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


def as_number(value: Any) -> float | None:
    """A finite float, None for anything else (empty, NaN, text)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def number(value: Any, digits: int = 3) -> str:
    """For people: three digits after the point, fewer for large ones; a dash for none or NaN."""
    value = as_number(value)
    if value is None:
        return "–"
    kept = 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else digits
    return f"{value:.{kept}f}".replace("-", "−")


def percent(value: Any) -> str:
    value = as_number(value)
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: Any) -> str:
    """A difference of shares in percentage points."""
    value = as_number(value)
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def bracket(interval: Any, show: Callable[[Any], str] = number) -> str:
    """``[low, high]``, empty for None or NaN."""
    if not interval or any(as_number(end) is None for end in interval):
        return ""
    return f"[{show(interval[0])}, {show(interval[1])}]".replace(" %", "")


# ---------------------------------------------------------------- an SVG in the page's colours


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


def _few_ticks(most: int = 5) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most)


# ---------------------------------------------------------------- bars


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart. ``control``: the same under the control; ``span``: its range."""

    label: str
    colour: str
    value: float | None
    interval: Sequence[float] | None = None
    control: float | None = None
    span: Sequence[float] | None = None
    group: int = 0  # a gap stands between groups
    pale: bool = False  # a control itself


def bar_places(bars: Sequence[Bar]) -> list[float]:
    """Vertical places of the bars, 1 apart, half as much again between groups."""
    starts = [index and bar.group != bars[index - 1].group for index, bar in enumerate(bars)]
    return [index + 0.5 * sum(starts[: index + 1]) for index in range(len(bars))]


def draw_bars(
    figure: Any,
    bars: Sequence[Bar],
    title: str,
    chance: float | None,
    show: Callable[[Any], str] = number,
) -> None:
    """Horizontal bars with 95 % intervals, control ticks and the chance line."""
    axes = figure.subplots()
    axes.set_title(title)
    places = bar_places(bars)
    ends = [0.0, chance or 0.0]
    for place, bar in zip(places, bars, strict=True):
        ends += _draw_bar(axes, place, bar, show)
    if chance is not None:
        axes.axvline(chance, color=MUTED, linestyle=(0, (3, 2)), linewidth=1.2)
    axes.axvline(0, color=LINE, linewidth=1)
    axes.set_yticks(places, [bar.label for bar in bars])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.set_xlim(min(ends) * 1.1, max(ends) * 1.24 or 1)
    axes.xaxis.set_major_locator(_few_ticks())
    if show is not number:  # shares, written in per cent
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}")
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)


def _draw_bar(axes: Any, place: float, bar: Bar, show: Callable[[Any], str]) -> list[float]:
    """One bar with all that belongs to it; the values it takes in."""
    if bar.value is None:
        axes.text(0, place, " –", va="center", color=MUTED)
        return []
    axes.barh(place, bar.value, 0.66, color=bar.colour, alpha=0.4 if bar.pale else 0.9)
    ends = [bar.value, 0.0]
    if bracket(bar.interval):
        axes.plot(bar.interval, [place] * 2, color=INK, linewidth=1.2, solid_capstyle="butt")
        ends += bar.interval
    if bar.span:
        axes.plot(bar.span, [place + 0.42] * 2, color=MUTED, linewidth=3, solid_capstyle="butt")
    if bar.control is not None:
        axes.plot([bar.control] * 2, [place - 0.45, place + 0.45], color=ALERT, linewidth=1.6)
        ends.append(bar.control)
    axes.annotate(show(bar.value), (max(ends), place), (5, 0), textcoords="offset points",
                  va="center", fontsize=10, color=INK)  # fmt: skip
    return ends


def said(bars: Sequence[Bar], show: Callable[[Any], str] = number) -> str:
    """The bars in words, for alt texts."""
    return "; ".join(f"{bar.label} {show(bar.value)} {bracket(bar.interval, show)}" for bar in bars)


def bars_figure(
    title: str,
    bars: Sequence[Bar],
    caption: str,
    chance: float | None,
    show: Callable[[Any], str] = number,
) -> Figure:
    alt = f"Bars of {title}: {said(bars, show)}"
    draw = partial(draw_bars, bars=bars, title=title, chance=chance, show=show)
    return Figure(draw_svg(alt, round(22 * bar_places(bars)[-1]) + 84, draw), caption)


# ---------------------------------------------------------------- what each modality contributes


def contribution_figures(results: Mapping[str, Any]) -> list[Figure]:
    """One bar chart per chosen metric and run of pictures, controls and other systems below."""
    rows, known = results["pictures"], recipe_labels()
    aside = [row for row in rows if row.get("control") or row["recipe"] not in known]
    beside = [row for row in aside if row["recipe"] == "fused" or row["recipe"] not in known]
    figures = []
    for label in dict.fromkeys(row["images"] for row in rows if row not in aside):
        own = [row for row in rows if row["images"] == label and row not in aside]
        wanted = [name for name in HEADLINE_METRICS if any(name in row["scores"] for row in own)]
        figures += [_recipe_bars(results, name, own, beside) for name in wanted[:6]]
    return figures


def _recipe_bars(
    results: Mapping[str, Any],
    name: str,
    rows: Sequence[Mapping[str, Any]],
    beside: Sequence[Mapping[str, Any]],
) -> Figure:
    """One metric: each modality alone, all fused, one by one, then what stands ``beside``."""
    about = results["metrics"][name]
    order = {recipe.name: place for place, recipe in enumerate(recipes("all"))}
    rows = sorted(rows, key=lambda row: order[row["recipe"]])
    arrow = "↑ higher is better" if about["better"] == "higher" else "↓ lower is better"
    oracle = "".join(f"{mark}. " for mark in marks_of(rows[0].get("prompt_source"), None))
    caption = (
        f"{about['label']} ({arrow}), {rows[0]['images']}, N = {rows[0]['n']} stimuli, seed "
        f"{results['seed']}. {oracle}“only”: drawn from one modality; 1 to 5: added one "
        "by one."
    )
    bars = [_recipe_bar(row, row["scores"].get(name, {})) for row in [*rows, *beside]]
    return bars_figure(about["label"], bars, caption, about.get("chance"))


def _recipe_bar(row: Mapping[str, Any], score: Mapping[str, Any]) -> Bar:
    values = (
        as_number(score.get("value")),
        score.get("interval"),
        as_number(score.get("other_stimulus")),
    )
    control, added = row.get("control"), {item.name: item.active[-1] for item in recipes("all")}
    if control or row["recipe"] not in added:
        label = CONTROL_LABELS.get(control or "", row["images"]).replace(" (ceiling)", "")
        return Bar(label, MUTED, *values, group=3, pale=True)
    kind, label = row["recipe"].split("_", 1)[0], recipe_labels()[row["recipe"]]
    if kind == "fused":
        return Bar(label, MUTED, *values, group=1)
    colour = MODALITY_COLOURS[added[row["recipe"]]]
    if kind == "separate":
        return Bar(f"only {label}", colour, *values, group=0)
    return Bar(f"{row['recipe'].split('_')[1]}: {label}", colour, *values, group=2)


def asked_subjects(results: Mapping[str, Any]) -> list[str]:
    """Whose retrieval was scored."""
    return list(dict.fromkeys(row["subject"] for row in results["retrieval"]))


def retrieval_bars(results: Mapping[str, Any], subject: str) -> Figure:
    """Retrieval by each query of one subject, with shuffled EEG and chance."""
    rows = [row for row in results["retrieval"] if row["subject"] == subject]
    bars = [
        Bar(
            plain(row["query"].removeprefix("prior ")).replace("encoder -> image", "encoder"),
            MODALITY_COLOURS.get(row["query"].removeprefix("prior "), MUTED),
            as_number(row["top1"]),
            row["top1_interval"],
            as_number(row["top1_shuffled"]),
            row["top1_shuffled_range"],
        )
        for row in rows
    ]
    mark = "".join(f"{text}. " for text in marks_of(None, results.get("control")))
    caption = (
        f"{mark}Retrieval of the right picture among {rows[0]['gallery']}, top-1, {subject}, "
        f"N = {rows[0]['n']} stimuli, seed {results['seed']}: each prior's sample asks its "
        "own modality's gallery."
    )
    return bars_figure(
        f"retrieval top-1, {subject}", bars, caption, rows[0]["top1_chance"], percent
    )


# ---------------------------------------------------------------- ranks


RANK_BINS = ((1, 1), (2, 5), (6, 10), (11, 20), (21, 50), (51, 100), (101, 200), (201, 10**9))


def rank_counts(ranks: Sequence[Mapping[str, str]], gallery: int) -> list[tuple[str, int, float]]:
    """(bin, how many ranks are in it, how many would be by chance) up to the gallery's size."""
    values = np.array([float(row["rank"]) for row in ranks])  # ties lie between two ranks
    found = []
    for low, high in RANK_BINS:
        if low > gallery:
            break
        high = min(high, gallery)
        label = str(low) if low == high else f"{low}–{high}"
        inside = int(((values >= low) & (values < high + 1)).sum())
        found.append((label, inside, len(values) * (high - low + 1) / gallery))
    return found


def rank_figures(results: Mapping[str, Any], ranks: Sequence[Mapping[str, str]]) -> list[Figure]:
    """A histogram of the right picture's rank per query, over all subjects."""
    gallery = {row["query"]: row["gallery"] for row in results["retrieval"]}
    figures = []
    for query in dict.fromkeys(row["query"] for row in ranks):
        rows = [row for row in ranks if row["query"] == query]
        counts = rank_counts(rows, gallery[query])
        subjects = sorted({row["subject"] for row in rows})
        colour = MODALITY_COLOURS.get(query.removeprefix("prior "), MUTED)
        title = plain(query.removeprefix("prior ")).replace("->", "→")
        alt = f"Ranks of the right picture, {query}: " + "; ".join(
            f"rank {label}: {found} (chance {expected:.1f})" for label, found, expected in counts
        )
        draw = partial(draw_histogram, counts=counts, title=title, colour=colour)
        caption = (
            f"{query.replace('->', '→')}: N = {len(rows)} ({', '.join(subjects)}), gallery of "
            f"{gallery[query]}, seed {results['seed']}."
        )
        figures.append(Figure(draw_svg(alt, 190, draw), caption))
    return figures


def draw_histogram(
    figure: Any, counts: Sequence[tuple[str, int, float]], title: str, colour: str
) -> None:
    """Bars of how often, red steps of how often by chance."""
    axes = figure.subplots()
    axes.set_title(title)
    places, top = np.arange(len(counts)), max(max(row[1:]) for row in counts)
    axes.bar(places, [found for _, found, _ in counts], 0.8, color=colour, alpha=0.9)
    for place, (_, found, expected) in zip(places, counts, strict=True):
        axes.plot([place - 0.46, place + 0.46], [expected] * 2, color=ALERT, linewidth=2)
        hidden = 0 <= expected - found < 0.12 * top  # the label would lie across the step
        axes.annotate(str(found), (place, expected if hidden else found), (0, 3),
                      textcoords="offset points", ha="center", fontsize=10)  # fmt: skip
    axes.set_xticks(places, [label for label, _, _ in counts])
    axes.tick_params(axis="x", length=0, labelsize=9.5)
    axes.yaxis.set_major_locator(_few_ticks())
    axes.margins(y=0.16)
    axes.grid(axis="y")


# ---------------------------------------------------------------- training curves


# title, key of the training loss, key of the held-out value, what it is
CURVES = (
    ("prior loss", "prior_{}", "val_prior_{}",
     "Loss of each prior: line training, dots held-out training concepts."),
    ("skill of each prior", "", "val_{}_skill",
     "Cosine of predicted and true embedding, standardised, on held-out training concepts: "
     "0 knows only the mean."),
    ("retrieval top-1", "", "val_{}_top1",
     "By the encoder's output among {gallery} pictures of held-out training concepts; dashed: "
     "chance."),
)  # fmt: skip


def training_figures(
    label: str, options: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> list[Figure]:
    """Losses and held-out scores per modality over the epochs, the ``records`` of metrics.jsonl."""
    chosen = [record["epoch"] for record in records if record.get("best_so_far")]
    subjects = ", ".join(options.get("subjects") or ["all subjects"])
    about = f"{label}: {records[-1]['epoch']} epochs, seed {options.get('seed')}, {subjects}."
    gallery = next((int(r["val_gallery"]) for r in records if "val_gallery" in r), None)
    figures = []
    for title, train, held_out, caption in CURVES:
        keys = [key.format(name) for key in (train, held_out) if key for name in NAMES]
        if not any(key in record for record in records for key in keys):
            continue
        draw = partial(
            draw_curves,
            records=records,
            title=title,
            train=train,
            held_out=held_out,
            chance=1 / gallery if gallery and "top1" in held_out else None,
            chosen=chosen[-1] if chosen else None,
        )
        svg = draw_svg(_curve_alt(label, title, held_out, records), 230, draw)
        figures.append(Figure(svg, f"{caption.format(gallery=gallery)} {about}"))
    first, last = (number(record["loss"]) for record in (records[0], records[-1]))
    svg = draw_svg(
        f"{label}, total loss: from {first} to {last}", 230, partial(draw_totals, records=records)
    )
    caption = "What is minimised, and its contrastive part: line training, dots held-out concepts."
    return [*figures, Figure(svg, f"{caption} {about}")]


def _curve_alt(label: str, title: str, pattern: str, records: Sequence[Mapping[str, Any]]) -> str:
    last = [record for record in records if pattern.format(NAMES[0]) in record][-1:]
    ends = [
        f"{plain(name)} {number(record.get(pattern.format(name)))}"
        for record in last
        for name in NAMES
    ]
    return f"{label}, {title} over epochs; at the last validation: {', '.join(ends)}"


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [(r["epoch"], as_number(r[key])) for r in records if as_number(r.get(key)) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def draw_curves(
    figure: Any,
    records: Sequence[Mapping[str, Any]],
    title: str,
    train: str,
    held_out: str,
    chance: float | None,
    chosen: int | None,
) -> None:
    """One curve per modality; dots with lines where there was a validation."""
    axes = figure.subplots()
    axes.set_title(title)
    for name, marker in zip(NAMES, "os^Dv", strict=True):
        colour = MODALITY_COLOURS[name]
        if train:
            axes.plot(*_series(records, train.format(name)), color=colour, linewidth=1.4)
        axes.plot(
            *_series(records, held_out.format(name)), color=colour, marker=marker, markersize=5,
            linewidth=0 if train else 1.6, label=plain(name),
        )  # fmt: skip
    if chance is not None:
        axes.axhline(chance, color=MUTED, linestyle=(0, (3, 2)), linewidth=1.2)
    if chosen is not None:
        axes.axvline(chosen, color=LINE, linewidth=1, zorder=0)
    axes.set_xlabel("epoch")
    axes.set_xlim(0, records[-1]["epoch"] * 1.03)
    axes.xaxis.set_major_locator(_few_ticks())
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=5, columnspacing=0.9, handletextpad=0.2)


def draw_totals(figure: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """The total loss and its contrastive part."""
    axes = figure.subplots()
    axes.set_title("total loss")
    for key, colour in (("loss", INK), ("contrast", MUTED)):
        if key in records[0]:
            axes.plot(*_series(records, key), color=colour, linewidth=1.6, label=key)
            axes.plot(*_series(records, f"val_{key}"), color=colour, marker="o", linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(_few_ticks())
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=5, columnspacing=0.9)


# ---------------------------------------------------------------- injection map


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


# ---------------------------------------------------------------- EEG


UNITS = "Whitened units (dimensionless)"  # as THINGS-EEG2's preprocessing leaves them
TOPOMAP_TIMES_S = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over stimuli of values [N, T] and half the 95 % band: 1.96 standard errors."""
    error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0
    return values.mean(axis=0), 1.96 * error * np.ones(values.shape[1])


def erp_figure(
    eeg: np.ndarray,
    channels: Sequence[str],
    times: np.ndarray,
    subject: str,
    about: str,
    window: Sequence[float] | None,
) -> Figure:
    regions = {
        name: band(eeg[:, [channels.index(item) for item in members]].mean(axis=1))
        for name, members in electrodes.regions_of(channels).items()
    }
    power = eeg.mean(axis=0).std(axis=0)
    peaks = [
        f"{name} peaks at {times[np.abs(mean).argmax()]:.2f} s ({mean[np.abs(mean).argmax()]:+.2f})"
        for name, (mean, _) in regions.items()
    ]
    alt = f"Evoked responses, {subject}: {'; '.join(peaks)}; whitened units"
    shade = "Shaded: what the model reads. " if window else ""
    caption = (
        "Evoked response per region (mean over its channels and stimuli; band: 95 %, ±1.96 "
        f"standard errors over stimuli) and global field power. {shade}{about}. {UNITS}."
    )
    draw = partial(draw_erp, regions=regions, power=power, times=times, window=window)
    rows = (len(regions) + 2) // 2
    return Figure(draw_svg(alt, 118 * rows + 20, draw), caption)


def draw_erp(
    figure: Any,
    regions: Mapping[str, tuple[np.ndarray, np.ndarray]],
    power: np.ndarray,
    times: np.ndarray,
    window: Sequence[float] | None,
) -> None:
    """A panel per region, with one scale for all of them, then global field power."""
    rows = (len(regions) + 2) // 2
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False).ravel()
    limit = max([float((np.abs(mean) + half).max()) for mean, half in regions.values()] or [1.0])
    for axes, (name, (mean, half)) in zip(panels, regions.items(), strict=False):
        axes.fill_between(times, mean - half, mean + half, color=MUTED, alpha=0.35, linewidth=0)
        axes.plot(times, mean, color=INK, linewidth=1.3)
        axes.axhline(0, color=LINE, linewidth=1)
        axes.set(title=name, ylim=(-1.08 * limit, 1.08 * limit))
    last = panels[len(regions)]
    last.plot(times, power, color=INK, linewidth=1.5)
    last.set(title="global field power", ylim=(0, None))
    for axes in panels[: len(regions) + 1]:
        axes.title.set(fontsize=10.5, fontweight="normal")
        axes.axvline(0, color=LINE, linewidth=1)
        axes.tick_params(labelsize=9.5)
        axes.xaxis.set_major_locator(_few_ticks(4))
        axes.yaxis.set_major_locator(_few_ticks(3))
        if window:
            axes.axvspan(*window, color=LINE, alpha=0.35, linewidth=0, zorder=0)
    for axes in panels[len(regions) + 1 :]:
        axes.axis("off")
    figure.supxlabel("seconds after onset", fontsize=10.5)


def placed(channels: Sequence[str]) -> tuple[list[str], Any]:
    """The channels whose place is known, and an mne.Info of them; None for fewer than four."""
    import mne

    places = electrodes.positions(channels)
    if len(places) < 4:
        return [], None
    info = mne.create_info(list(places), 250.0, "eeg", verbose="ERROR")
    info.set_montage(mne.channels.make_dig_montage(places, coord_frame="head"), verbose="ERROR")
    return list(places), info


def draw_topomap(
    axes: Any, values: np.ndarray, info: Any, limit: float, names: Sequence[str] | None = None
) -> Any:
    """A scalp map of values [C]; returns its image. Lines take the page's colours."""
    import mne

    image, _ = mne.viz.plot_topomap(
        values, info, axes=axes, show=False, cmap="RdBu_r", vlim=(-limit, limit), contours=0,
        sensors=True, names=names, extrapolate="local" if len(values) < 32 else "head", res=72,
    )  # fmt: skip
    for line in axes.lines:
        line.set(color=OUTLINE, markersize=1.6, linewidth=1.1 if len(line.get_xdata()) > 2 else 0.9)
    return image


def scalp_figures(
    mean: np.ndarray, channels: Sequence[str], times: np.ndarray, about: str
) -> list[Figure]:
    """Maps of the mean response [C, T] over time; none where channels have no known place."""
    names, info = placed(channels)
    moments = [t for t in TOPOMAP_TIMES_S if times[0] <= t <= times[-1]]
    if info is None or not moments:
        return []
    rows = [channels.index(name) for name in names]
    columns = [int(np.abs(times - moment).argmin()) for moment in moments]
    maps = mean[rows][:, columns]
    limit = float(np.abs(maps).max()) or 1.0
    strongest = [
        f"{t:.2f} s: {names[int(np.abs(m).argmax())]}" for t, m in zip(moments, maps.T, strict=True)
    ]
    alt = f"Scalp maps over time, {about}; strongest channel at {', '.join(strongest)}"
    caption = f"Scalp topography of the mean response; {len(names)} channels. {about}. {UNITS}."

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, 4, squeeze=False).ravel()
        for axes, moment, values in zip(panels, moments, maps.T, strict=False):
            image = draw_topomap(axes, values, info, limit)
            axes.set_title(f"{moment:.2f} s", fontsize=10.5, fontweight="normal", loc="center")
        for axes in panels[len(moments) :]:
            axes.axis("off")
        colour_bar(figure, image, panels.tolist(), "whitened units")

    return [Figure(draw_svg(alt, 290, draw), caption)]


def colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.6, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9.5, length=2)
    bar.ax.xaxis.set_major_locator(_few_ticks())
    bar.set_label(label, fontsize=10)


# ---------------------------------------------------------------- occlusion


MOST_SUBJECTS = 3  # whose EEG is drawn


def occlusion_figures(results: Mapping[str, Any], key: str = "top1") -> list[Figure]:
    """What retrieval loses when a channel, a region or a time window is taken away."""
    found = results.get("occlusion") or {"rows": []}
    figures = []
    for subject in list(dict.fromkeys(row["subject"] for row in found["rows"]))[:MOST_SUBJECTS]:
        kinds = defaultdict(list)
        for row in found["rows"]:
            if row["subject"] == subject and key in row["drops"]:
                kinds[row["kind"]].append(row)
        about = f"{subject}, N = {found['rows'][0]['n']} stimuli, seed {results['seed']}"
        if kinds["region"]:
            bars = [
                Bar(
                    row["name"],
                    MUTED,
                    as_number(row["drops"][key]["value"]),
                    row["drops"][key]["interval"],
                )
                for row in kinds["region"]
            ]
            caption = f"Loss of top-1 without a region's channels, with {INTERVAL}. {about}."
            figures.append(bars_figure(f"without a region, {subject}", bars, caption, None, points))
        if kinds["window"]:
            figures.append(_window_figure(kinds["window"], key, subject, about))
        if kinds["channel"]:
            figures += _channel_figure(kinds["channel"], key, about)
    return figures


def _window_figure(rows: Sequence[Mapping[str, Any]], key: str, subject: str, about: str) -> Figure:
    rows = sorted(rows, key=lambda row: row["start_s"])
    edges = [row["start_s"] for row in rows] + [rows[-1]["end_s"]]
    drops = [row["drops"][key] for row in rows]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_title(f"without a time window, {subject}")
        axes.axhline(0, color=LINE, linewidth=1)
        values = [100 * (as_number(drop["value"]) or 0) for drop in drops]
        axes.stairs(values, edges, color=INK, linewidth=1.8, baseline=None)
        for row, drop in zip(rows, drops, strict=True):
            if bracket(drop["interval"]):
                low, high = (100 * end for end in drop["interval"])
                axes.fill_between(
                    [row["start_s"], row["end_s"]], low, high, color=MUTED, alpha=0.35, linewidth=0
                )
        axes.set(xlabel="seconds after onset", ylabel="points of top-1 lost")
        axes.grid(axis="y")

    entries = "; ".join(f"{row['name']} {points(row['drops'][key]['value'])}" for row in rows)
    caption = f"Loss of top-1 without a time window; band: {INTERVAL}. {about}."
    return Figure(
        draw_svg(f"{subject}, loss of top-1 by time window: {entries}", 230, draw), caption
    )


def _channel_figure(rows: Sequence[Mapping[str, Any]], key: str, about: str) -> list[Figure]:
    drops = {row["channels"][0]: 100 * (as_number(row["drops"][key]["value"]) or 0) for row in rows}
    names, info = placed(list(drops))
    if info is None:
        return []
    values = np.array([drops[name] for name in names])
    limit = float(np.abs(values).max()) or 1.0
    order = np.argsort(-values)[:5]
    labels = [name if place in order else "" for place, name in enumerate(names)]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        image = draw_topomap(axes, values, info, limit, labels)
        for text in axes.texts:
            text.set(color="black", fontsize=9.5, va="bottom")  # on the map, light in both themes
            text.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1})
        axes.set_title("without a channel")
        colour_bar(figure, image, axes, "points of top-1 lost")

    most = ", ".join(f"{names[i]} {values[i]:+.1f}" for i in order)
    caption = f"Loss of top-1 without one channel; most: {most} points. {about}."
    return [Figure(draw_svg(f"Scalp map of losses: {most}. {about}", 300, draw), caption)]
