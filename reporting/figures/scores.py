"""Bars and histograms of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from modalities import recipes
from reporting.svg import ALERT, INK, LINE, MODALITY_COLOURS, MUTED, Figure, draw_svg, few_ticks
from reporting.words import (
    CONTROL_LABELS,
    HEADLINE_METRICS,
    bracket,
    finite,
    percent,
    plain,
    recipe_labels,
    shown_number,
    spoken_marks,
)


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
    show: Callable[[Any], str] = shown_number,
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
    axes.xaxis.set_major_locator(few_ticks())
    if show is not shown_number:  # shares, written in per cent
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


def said(bars: Sequence[Bar], show: Callable[[Any], str] = shown_number) -> str:
    """The bars in words, for alt texts."""
    return "; ".join(f"{bar.label} {show(bar.value)} {bracket(bar.interval, show)}" for bar in bars)


def bars_figure(
    title: str,
    bars: Sequence[Bar],
    caption: str,
    chance: float | None,
    show: Callable[[Any], str] = shown_number,
) -> Figure:
    alt = f"Bars of {title}: {said(bars, show)}"
    draw = partial(draw_bars, bars=bars, title=title, chance=chance, show=show)
    return Figure(draw_svg(alt, round(22 * bar_places(bars)[-1]) + 84, draw), caption)


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
    oracle = "".join(f"{mark}. " for mark in spoken_marks(rows[0].get("prompt_source"), None))
    caption = (
        f"{about['label']} ({arrow}), {rows[0]['images']}, N = {rows[0]['n']} stimuli, seed "
        f"{results['seed']}. {oracle}“only”: drawn from one modality; 1 to 5: added one "
        "by one."
    )
    bars = [_recipe_bar(row, row["scores"].get(name, {})) for row in [*rows, *beside]]
    return bars_figure(about["label"], bars, caption, about.get("chance"))


def _recipe_bar(row: Mapping[str, Any], score: Mapping[str, Any]) -> Bar:
    values = (
        finite(score.get("value")),
        score.get("interval"),
        finite(score.get("other_stimulus")),
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
            finite(row["top1"]),
            row["top1_interval"],
            finite(row["top1_shuffled"]),
            row["top1_shuffled_range"],
        )
        for row in rows
    ]
    mark = "".join(f"{text}. " for text in spoken_marks(None, results.get("control")))
    caption = (
        f"{mark}Retrieval of the right picture among {rows[0]['gallery']}, top-1, {subject}, "
        f"N = {rows[0]['n']} stimuli, seed {results['seed']}: each prior's sample asks its "
        "own modality's gallery."
    )
    return bars_figure(
        f"retrieval top-1, {subject}", bars, caption, rows[0]["top1_chance"], percent
    )


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
    axes.yaxis.set_major_locator(few_ticks())
    axes.margins(y=0.16)
    axes.grid(axis="y")


def repetition_figures(results: Mapping[str, Any]) -> list[Figure]:
    """Retrieval against the number of repetitions averaged, a line per subject; none without."""
    rows = (results.get("repetitions") or {"rows": []})["rows"]
    if not rows:
        return []
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    parts = [
        f"{row['subject']} {row['repetitions']}: {percent(row['top1'])} "
        f"{bracket(row['top1_interval'], percent)}, shuffled {percent(row['top1_shuffled'])}"
        for row in rows
    ]
    mark = "".join(f"{text}. " for text in spoken_marks(None, results.get("control")))
    caption = (
        f"{mark}Encoder to image, top-1 among {round(1 / rows[0]['top1_chance'])}, "
        f"{', '.join(subjects)}, against how many repetitions of each stimulus were averaged; "
        f"left, single trials. N = {rows[0]['n']} stimuli, seed {results['seed']}; band: 95 % over "
        "stimuli; red: EEG dealt to other stimuli; dashed: chance."
    )
    draw = partial(draw_repetitions, rows=rows)
    return [Figure(draw_svg(f"Repetitions averaged: {'; '.join(parts)}", 240, draw), caption)]


def draw_repetitions(figure: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Top-1 in per cent over a logarithmic axis of repetitions."""
    axes = figure.subplots()
    axes.set_title("retrieval top-1 by repetitions averaged")
    for subject in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == subject]
        counts = [row["repetitions"] for row in own]
        low, high = np.array([row["top1_interval"] for row in own], dtype=float).T * 100
        top1 = [100 * row["top1"] for row in own]
        axes.fill_between(counts, low, high, color=MUTED, alpha=0.25, linewidth=0)
        axes.plot(counts, top1, color=INK, linewidth=1.5, marker="o", markersize=4)
        axes.annotate(subject, (counts[-1], top1[-1]), (6, 0), textcoords="offset points",
                      va="center", fontsize=9.5, color=INK)  # fmt: skip
        shuffled = [100 * row["top1_shuffled"] for row in own]
        axes.plot(counts, shuffled, color=ALERT, linewidth=1.3)
    axes.axhline(100 * rows[0]["top1_chance"], color=MUTED, linestyle=(0, (3, 2)), linewidth=1.2)
    counts = sorted({row["repetitions"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(few_ticks())
    axes.grid(axis="y")
