"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]


def number(value: float | None, digits: int = 3) -> str:
    """Three digits after the point, fewer for large numbers; ``-`` for none, ``NaN`` said so."""
    if value is None:
        return "-"
    if value != value:
        return "NaN"
    return f"{value:.{digits if abs(value) < 100 else 1}f}"


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None or value != value:
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"
