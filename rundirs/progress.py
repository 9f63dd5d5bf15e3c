"""Progress that people can read, in a terminal and in a job's log."""

from __future__ import annotations

import time

from tqdm import tqdm

LINE_S = 30.0  # between two lines of a log
_LINE = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} [{elapsed}, {rate_fmt}{postfix}]"


class Progress(tqdm):
    """tqdm's bar in a terminal; in a file a line every :data:`LINE_S` s, and none of short work."""

    disable: bool
    _begun: float | None = None
    _told: float | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.fp.isatty():
            super().display(msg, pos)
            return
        now = time.monotonic()
        self._begun = now if self._begun is None else self._begun
        if now - (self._told or self._begun) >= LINE_S:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        line = _LINE if self.total else _LINE_WITHOUT_TOTAL
        text = self.format_meter(**{**self.format_dict, "bar_format": line, "ncols": None})
        self.fp.write(f"{text.strip()}\n")
        self.fp.flush()

    def close(self) -> None:
        if not self.disable and not self.fp.isatty():
            if self._told is not None:
                self._tell()
            self.disable = True  # else it would write the control characters of a terminal
        super().close()
