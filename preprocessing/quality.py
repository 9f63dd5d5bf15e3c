"""What a researcher looks at after preprocessing: a line per session, and the evoked response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datafiles import electrodes
from preprocessing.amplitude import BY_UNIT, Quantity
from preprocessing.channels import ChannelReader
from rundirs.files import atomic_write, read_json, write_json
from rundirs.markdown import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from preprocessing.recordings import Recorded

TEXT, FIGURE = "quality.md", "evoked.png"
REGION_COLOURS = {
    "frontal": "#9467bd",
    "temporal": "#8c8c8c",
    "central": "#2ca02c",
    "parietal": "#ff7f0e",
    "occipital": "#d62728",
    None: "#c7c7c7",
}


def record(
    session: str,
    partition: str,
    recorded: Recorded,
    signal: ChannelReader,
    kept: int,
    dropped: Mapping[str, int],
    evoked: np.ndarray,
) -> dict[str, Any]:
    """What there is to know about one partition of a session; JSON-able."""
    return {
        "session": session,
        "partition": partition,
        "recorded_s": signal.samples / signal.rate_hz,
        "rate_hz": signal.rate_hz,
        "kept": kept,
        "dropped": {reason: number for reason, number in dropped.items() if number},
        "flat": signal.flat,
        "noisy": signal.noisy,
        "bad": signal.bad,
        "rebuilt": signal.rebuilt,
        "left_out": dict(recorded.channels.left),
        "warnings": list(recorded.warnings),
        "amplitude": recorded.amplitude,
        "peak": float(np.abs(evoked).max()),
        "unit": recorded.quantity.unit,
    }


def _dropped(row: Mapping[str, Any]) -> str:
    parts = [f"{number} {reason}" for reason, number in row["dropped"].items()]
    return ", ".join(parts) or "none"


def _channels(row: Mapping[str, Any]) -> str:
    named = ((kind, row[kind]) for kind in ("flat", "noisy", "bad", "rebuilt"))
    parts = [f"{kind} {' '.join(names)}" for kind, names in named if names] or ["all good"]
    return "; ".join([*parts, *left_out(row["left_out"])])


def left_out(channels: Mapping[str, str]) -> list[str]:
    """What is no EEG, by reason: ``left out EXG1 EXG2 (named after something else)``."""
    reasons = dict.fromkeys(channels.values())
    return [
        f"left out {' '.join(name for name in channels if channels[name] == why)} ({why})"
        for why in reasons
    ]


def line(row: Mapping[str, Any]) -> str:
    """One line of the log."""
    return (
        f"{row['session']} {row['partition']}: {row['kept']} trials kept, dropped: "
        f"{_dropped(row)}; channels: {_channels(row)}"
    )


def write(
    folder: Path,
    subject: str,
    channels: Sequence[str],
    parts: Mapping[str, Mapping[str, Any]],
    shapes: Mapping[str, Sequence[int]],
    simulated: Path | None,
) -> None:
    """``quality.md``, ``quality.json`` and ``evoked.png`` in a subject's folder.

    ``parts``: {partition: {session: preprocess.Part}}; ``shapes``: of what was written of each.
    """
    files = sorted((folder / "parts").glob("ses-*.json"))
    rows = [row for path in files for row in read_json(path)]
    write_json(folder / "quality.json", rows)
    quantity = BY_UNIT[rows[0]["unit"]]
    mark = f", SIMULATED {quantity.name}" if simulated else ""
    head = ["session", "partition", "minutes", "kept", "dropped", "channels", "peak of the mean"]
    cells = [
        [
            row["session"],
            row["partition"],
            f"{row['recorded_s'] / 60:.1f} at {row['rate_hz']:g} Hz",
            str(row["kept"]),
            _dropped(row),
            _channels(row),
            f"{row['peak'] * quantity.per_unit:.2f} {quantity.shown}",
        ]
        for row in rows
    ]
    written = [written_line(name, shape, parts[name]) for name, shape in shapes.items()]
    lines = [f"# {subject}: {len(channels)} channels{mark}", "", *written, ""]
    lines += table(head, cells)
    told = dict.fromkeys(f"{row['session']}: {text}" for row in rows for text in row["warnings"])
    if told:
        lines += ["", "What the reader warned of:", "", *(f"- {text}" for text in told)]
    with atomic_write(folder / TEXT) as file:
        file.write("\n".join(lines) + "\n")
    draw_quality(folder / FIGURE, f"{subject}{mark}", channels, parts, quantity)


def written_line(partition: str, shape: Sequence[int], parts: Mapping[str, Any]) -> str:
    """What the file holds, and what was left out so that each picture has as many trials."""
    pictures, repetitions, channels, samples = shape
    left = sum(len(part.conditions) for part in parts.values()) - pictures * repetitions
    more = f"; {left} trials left out, as all pictures keep as many as the rarest" if left else ""
    return (
        f"- {partition}: {pictures} pictures x {repetitions} repetitions x {channels} channels x "
        f"{samples} samples{more}"
    )


def draw_quality(
    path: Path,
    title: str,
    channels: Sequence[str],
    parts: Mapping[str, Mapping[str, Any]],
    quantity: Quantity,
) -> None:
    """The mean over all trials: every channel by region, and each session's global field power."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    shown = {name: part for name, part in parts.items() if part}
    first = next(iter(shown))
    _butterfly(left, channels, list(shown[first].values()), quantity.per_unit)
    left.set_title(f"{title}: mean of all {first} trials, before whitening", fontsize=9)
    for partition, style in zip(shown, ("-", "--"), strict=False):
        for number, (session, part) in enumerate(shown[partition].items()):
            power = part.evoked.std(axis=0) * quantity.per_unit
            label = f"{session} {partition}"
            right.plot(part.times, power, style, color=f"C{number % 10}", lw=1, label=label)
    right.set_title("global field power (std over channels)", fontsize=9)
    for axes in (left, right):
        axes.axvline(0, color="black", lw=0.6)
        axes.set_xlabel("s after stimulus onset")
        axes.set_ylabel(quantity.shown)
    right.legend(fontsize=7, frameon=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


def _butterfly(axes: Axes, channels: Sequence[str], parts: Sequence[Any], per_unit: float) -> None:
    evoked = np.mean([part.evoked for part in parts], axis=0) * per_unit
    seen = set()
    regions = electrodes.region_by_channel(channels)
    for name, curve in zip(channels, evoked, strict=True):
        region = regions[name]
        label = None if region in seen else region or "other"
        seen.add(region)
        axes.plot(parts[0].times, curve, color=REGION_COLOURS[region], lw=0.6, label=label)
    axes.legend(fontsize=7, frameon=False)
