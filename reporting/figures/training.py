"""Curves of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from modalities import NAMES
from reporting.svg import INK, LINE, MODALITY_COLOURS, MUTED, Figure, draw_svg, few_ticks
from reporting.words import finite, plain, shown_number

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
    first, last = (shown_number(record["loss"]) for record in (records[0], records[-1]))
    svg = draw_svg(
        f"{label}, total loss: from {first} to {last}", 230, partial(draw_totals, records=records)
    )
    caption = "What is minimised, and its contrastive part: line training, dots held-out concepts."
    return [*figures, Figure(svg, f"{caption} {about}")]


def _curve_alt(label: str, title: str, pattern: str, records: Sequence[Mapping[str, Any]]) -> str:
    last = [record for record in records if pattern.format(NAMES[0]) in record][-1:]
    ends = [
        f"{plain(name)} {shown_number(record.get(pattern.format(name)))}"
        for record in last
        for name in NAMES
    ]
    return f"{label}, {title} over epochs; at the last validation: {', '.join(ends)}"


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    pairs = [(r["epoch"], finite(r[key])) for r in records if finite(r.get(key)) is not None]
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
    axes.xaxis.set_major_locator(few_ticks())
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
    axes.xaxis.set_major_locator(few_ticks())
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=5, columnspacing=0.9)
