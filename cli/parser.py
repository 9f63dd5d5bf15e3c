"""Range-checked types and the parser that every stage's flags are declared on."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from modalities import AUTO, FINAL

STEERING = ("config", "dry_run", "print_config")


def _number(
    kind: type, low: float, high: float, what: str, *, open_low: bool = False
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        inside = (low < value if open_low else low <= value) and value <= high
        if not inside or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {what}")
        return value

    return parse


positive_int = _number(int, 1, math.inf, "a whole number >= 1")
count = _number(int, 0, math.inf, "a whole number >= 0")
positive = _number(float, 0, math.inf, "a number > 0", open_low=True)
non_negative = _number(float, 0, math.inf, "a number >= 0")
share = _number(float, 0, 1, "a number in 0..1")
proper_share = _number(float, 0, 0.9, "a number in 0..0.9")
seconds = _number(float, -10, 10, "a time in seconds")


def divisible_by_8(text: str) -> int:
    """Pixels; SDXL's VAE halves three times."""
    size = positive_int(text)
    if size % 8:
        raise argparse.ArgumentTypeError(f"{size} px is not a multiple of 8, as the VAE needs")
    return size


def batch_size(text: str) -> int | str:
    """A number of rows, or ``auto``."""
    return AUTO if text == AUTO else positive_int(text)


def epochs(text: str) -> int | str:
    """A number of passes, or ``auto``."""
    return AUTO if text == AUTO else positive_int(text)


def contrast_layer(text: str) -> int | str:
    """A layer's number from 1 on, ``final``, or what else a bank calls its features."""
    if text == FINAL or text.isidentifier():
        return text
    return positive_int(text)


def shard(text: str) -> str:
    """``i/n``, 1-based."""
    parts = text.split("/")
    if (
        len(parts) != 2
        or not all(part.isdigit() for part in parts)
        or not 1 <= int(parts[0]) <= int(parts[1])
    ):
        raise argparse.ArgumentTypeError(f"{text!r}, expected i/n with 1 <= i <= n, e.g. 2/3")
    return text


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults in the help and "did you mean"."""

    def __init__(self, stage: str, description: str, example: str) -> None:
        super().__init__(
            prog=_PROGRAMS[stage],
            description=description,
            epilog=f"example:\n  {example}",
            allow_abbrev=False,
            formatter_class=_Help,
        )
        self.stage, self.source = stage, ""
        self.per_call: set[str] = set(STEERING)

    def flags(self, title: str) -> FlagGroup:
        return FlagGroup(self, self.add_argument_group(title))

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        if unknown:
            flags = [text for action in self._actions for text in action.option_strings]
            wrong = [text.split("=")[0] for text in unknown if text.startswith("-")] or unknown
            self.error("; ".join(did_you_mean(text, flags) for text in wrong))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {self.source}{message}\nSee {self.prog} --help\n")

    def actions(self) -> dict[str, argparse.Action]:
        return {action.dest: action for action in self._actions if action.dest != "help"}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the example's line breaks and appends each flag's default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default not in (None, argparse.SUPPRESS, []) and action.dest != "help":
            text += f" (default: {action.default})".replace("%", "%%")
        return text


class FlagGroup:
    """Adds flags to a titled group. ``per_call``: may differ when a run is resumed."""

    def __init__(self, parser: Parser, group: Any) -> None:
        self._parser, self._group = parser, group

    def add(
        self,
        flag: str,
        *,
        type: Callable[[str], Any] = str,
        help: str,
        metavar: str | None = None,
        default: Any = None,
        required: bool = False,
        per_call: bool = False,
    ) -> None:
        """One value."""
        self._group.add_argument(
            flag, type=type, help=help, metavar=metavar, default=default, required=required
        )
        self._note(flag, per_call)

    def several(
        self,
        flag: str,
        *,
        type: Callable[[str], Any] = str,
        help: str,
        metavar: str | tuple[str, ...],
        default: Any = None,
        required: bool = False,
        per_call: bool = False,
    ) -> None:
        """Several values: as many as ``metavar`` names, or one and more where it is one word."""
        self._group.add_argument(
            flag,
            type=type,
            nargs="+" if isinstance(metavar, str) else len(metavar),
            help=help,
            metavar=metavar,
            default=default,
            required=required,
        )
        self._note(flag, per_call)

    def choose(
        self,
        flag: str,
        *,
        choices: Sequence[str],
        help: str,
        default: str | None = None,
        nargs: str | None = None,
        per_call: bool = False,
    ) -> None:
        """One of a few words; ``nargs``: ``+`` for some of them, ``?`` for one or none."""
        self._group.add_argument(
            flag,
            choices=choices,
            help=help,
            default=default,
            nargs=nargs,
            const=choices[0] if nargs == "?" else None,
        )
        self._note(flag, per_call)

    def switch(
        self, flag: str, *, help: str, default: bool = False, per_call: bool = False
    ) -> None:
        self._group.add_argument(
            flag, action=argparse.BooleanOptionalAction, help=help, default=default
        )
        self._note(flag, per_call)

    def _note(self, flag: str, per_call: bool) -> None:
        if per_call:
            self._parser.per_call.add(flag.removeprefix("--"))


def common_flags(parser: Parser, *, device: bool = True, writes: bool = True) -> None:
    """Flags that every stage takes: how this call is steered, not what it computes."""
    group = parser.flags("this call")
    group.add(
        "--config",
        type=Path,
        metavar="FILE",
        per_call=True,
        help="YAML or JSON with option names as keys, or the options.json of a run",
    )
    if writes:
        group.switch(
            "--dry_run",
            per_call=True,
            help="check everything, say what would be done, write nothing",
        )
    group.switch(
        "--print_config", help="print the resolved options as YAML and stop", per_call=True
    )
    if device:
        group.add(
            "--device",
            default="auto",
            metavar="auto|cpu|cuda[:N]",
            per_call=True,
            help="where to compute",
        )


def did_you_mean(found: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    return f"unknown option {found}" + (f"; did you mean {close[0]}?" if close else "")


_PROGRAMS = {
    "check": "dataset.py",
    "preprocess": "preprocess.py",
    "features": "clip_feature_extractor.py",
    "train": "train.py",
    "retrieval": "ATMS_retrieval.py",
    "generate": "generate.py",
    "evaluate": "evaluate.py",
    "report": "report.py",
    "world": "python -m miniworld",
    "pretrain": "python -m miniworld.pretrain",
    "demo": "demo.py",
}


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` -> (i, n), 1-based. The range was checked with the flag."""
    index, count = text.split("/")
    return int(index), int(count)
