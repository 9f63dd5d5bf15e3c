"""Trials that somebody else has cut: what each shows, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class CutTrials:
    """A file of trials: ``shown``: each as (partition, row of DATA), or None.

    ``read``: number of a trial -> float [C, T] in volts or tesla; it may raise DataError.
    """

    path: Path
    channels: Sequence[str]
    times: Sequence[float]
    shown: Sequence[tuple[str, int] | None]
    read: Callable[[int], np.ndarray]

    def trial(self, number: int) -> np.ndarray:
        """float32 [C, T]."""
        return np.ascontiguousarray(self.read(number), np.float32)

    def of(self, partition: str) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the trials of a partition, their rows of it), int64 [n] each."""
        found = [(number, shown[1]) for number, shown in enumerate(self.shown)
                 if shown is not None and shown[0] == partition]  # fmt: skip
        numbers, rows = np.array(found, np.int64).reshape(-1, 2).T
        return numbers, rows
