"""Evoked responses, scalp maps, and what the encoder reads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from datafiles import electrodes
from reporting.figures.scores import Bar, bars_figure
from reporting.svg import INK, LINE, MUTED, OUTLINE, Figure, draw_svg, few_ticks
from reporting.words import INTERVAL, MOST_SUBJECTS, bracket, finite, points

UNITS = {  # of datafiles.eeg_files.stored_unit: what is shown, and by what it is multiplied
    "whitened": ("whitened units", 1.0),
    "V": ("µV", 1e6),
    "T": ("fT", 1e15),
    "": ("units of the file, which says nothing of them", 1.0),
}
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
    unit: str,
) -> Figure:
    """``eeg`` [N, C, T] of ``times`` [T] in s, in ``unit``: see UNITS."""
    shown, factor = UNITS[unit]
    eeg = eeg * factor
    regions = {
        name: band(eeg[:, [channels.index(item) for item in members]].mean(axis=1))
        for name, members in electrodes.regions_of(channels).items()
    }
    power = eeg.mean(axis=0).std(axis=0)
    peaks = [
        f"{name} peaks at {times[np.abs(mean).argmax()]:.2f} s ({mean[np.abs(mean).argmax()]:+.2f})"
        for name, (mean, _) in regions.items()
    ]
    alt = f"Evoked responses, {subject}: {'; '.join(peaks)}; {shown}"
    shade = "Shaded: what the model reads. " if window else ""
    caption = (
        "Evoked response per region (mean over its channels and stimuli; band: 95 %, ±1.96 "
        f"standard errors over stimuli) and global field power, in {shown}. {shade}{about}."
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
        axes.xaxis.set_major_locator(few_ticks(4))
        axes.yaxis.set_major_locator(few_ticks(3))
        if window:
            axes.axvspan(*window, color=LINE, alpha=0.35, linewidth=0, zorder=0)
    for axes in panels[len(regions) + 1 :]:
        axes.axis("off")
    figure.supxlabel("seconds after onset", fontsize=10.5)


def placed(channels: Sequence[str]) -> tuple[list[str], Any]:
    """The channels whose place is known, and an mne.Info of them, or of MEG places [C, 2].

    None for fewer than four.
    """
    import mne

    if electrodes.is_meg(channels):
        sensors = electrodes.sensor_places(channels)
        return list(sensors), np.stack(list(sensors.values())) if len(sensors) >= 4 else None
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
    mean: np.ndarray, channels: Sequence[str], times: np.ndarray, about: str, unit: str
) -> list[Figure]:
    """Maps of the mean response [C, T] over time; none where channels have no known place."""
    shown, factor = UNITS[unit]
    mean = mean * factor
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
    caption = f"Scalp topography of the mean response; {len(names)} channels, {shown}. {about}."

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, 4, squeeze=False).ravel()
        for axes, moment, values in zip(panels, moments, maps.T, strict=False):
            image = draw_topomap(axes, values, info, limit)
            axes.set_title(f"{moment:.2f} s", fontsize=10.5, fontweight="normal", loc="center")
        for axes in panels[len(moments) :]:
            axes.axis("off")
        colour_bar(figure, image, panels.tolist(), shown)

    return [Figure(draw_svg(alt, 290, draw), caption)]


def colour_bar(figure: Any, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", shrink=0.6, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9.5, length=2)
    bar.ax.xaxis.set_major_locator(few_ticks())
    bar.set_label(label, fontsize=10)


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
                    finite(row["drops"][key]["value"]),
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
        values = [100 * (finite(drop["value"]) or 0) for drop in drops]
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
    drops = {row["channels"][0]: 100 * (finite(row["drops"][key]["value"]) or 0) for row in rows}
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
