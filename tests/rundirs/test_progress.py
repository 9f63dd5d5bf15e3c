"""Progress in a terminal is a bar, in a log a few whole lines."""

from __future__ import annotations

import io

import pytest

from rundirs import progress
from rundirs.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ran(
    file: io.StringIO, monkeypatch: pytest.MonkeyPatch, step_s: float, total: int | None
) -> str:
    """What 100 steps of so many seconds write."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(total=total, desc="training", unit="step", file=file, mininterval=0) as bar:
        for step in range(100):
            now[0] += step_s
            bar.set_postfix_str(f"loss={100 - step}", refresh=False)
            bar.update()
    return file.getvalue()


def test_a_log_gets_whole_lines(monkeypatch) -> None:
    """One every half minute, and the last: 100 s are four."""
    told = ran(io.StringIO(), monkeypatch, 1.0, 100)
    lines = told.split("\n")
    assert lines.pop() == "" and "\r" not in told and "\x1b" not in told
    assert len(lines) == 4
    assert lines[0].startswith("training: 30% 30/100 [") and "loss=71" in lines[0]
    assert lines[-1].startswith("training: 100% 100/100 [")


def test_without_a_total_it_counts(monkeypatch) -> None:
    assert ran(io.StringIO(), monkeypatch, 1.0, None).startswith("training: 30 [")


def test_short_work_leaves_a_log_alone(monkeypatch) -> None:
    assert ran(io.StringIO(), monkeypatch, 0.01, 100) == ""


def test_a_terminal_gets_a_bar(monkeypatch) -> None:
    told = ran(Terminal(), monkeypatch, 0.01, 100)
    assert told.count("\r") > 50 and "100%|" in told
