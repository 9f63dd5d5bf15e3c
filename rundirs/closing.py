"""What a stage says last: what it wrote, how long it took, and what comes next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import util

IN_CHAIN = "EEG2IMAGE_CHAIN"  # set where a program knows itself what comes next, as demo.py does


def in_words(seconds: float) -> str:
    """``12 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def flags(**values: object) -> list[str]:
    """``--name value`` of each, ``--name a b`` of tuples; True is a switch, None no flag at all."""
    words = []
    for name, value in values.items():
        several = value if isinstance(value, tuple) else (value,)
        if value is not None:
            words += [f"--{name}", *(str(one) for one in several if one is not True)]
    return words


def call(program: str, **values: object) -> list[str]:
    """``python PROGRAM --name value ...``, as :func:`flags`."""
    return ["python", program, *flags(**values)]


def tell_end(wrote: Mapping[str, Path], following: Sequence[Sequence[str]]) -> None:
    """Print it. ``wrote``: {what: where}; ``following``: commands, as :func:`call` makes them."""
    for what, path in wrote.items():
        print(f"{what}: {path}")
    print(f"took: {in_words(util.seconds_so_far())}")
    for command in following if IN_CHAIN not in os.environ else ():
        print(f"next: {shlex.join(command)}")
