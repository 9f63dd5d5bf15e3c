"""Captions of the stimuli: the user's own, or the template's."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datafiles.stimuli import STIMULUS_COLUMNS, Stimulus
from datafiles.user_tables import first_of, read_columns
from rundirs.files import read_json
from util import LOG, DataError

CAPTION_KEYS = (*STIMULUS_COLUMNS, "concept")
_CAPTIONS = f"columns caption and {' or '.join(CAPTION_KEYS)}, or a JSON object of the same"
_CAPTIONS_CURE = "see docs/own_recordings.md, Captions"


def composed(text: str) -> str:
    """One spelling of what looks the same: macOS decomposes letters with accents."""
    return unicodedata.normalize("NFC", text)


def read_captions(path: Path | None, stimuli: Sequence[Stimulus] = ()) -> dict[str, str]:
    """Captions by picture key or by concept from a JSON object or a table, {} without a file.

    Raises DataError, also if none of them belongs to any of ``stimuli``.
    """
    if path is None:
        return {}
    read = _json_captions if Path(path).suffix.lower() == ".json" else _table_captions
    captions: dict[str, str] = {}
    for where, key, text in read(Path(path)):
        if not key or not text:
            lacks = "caption" if key else "picture or concept"
            raise DataError(
                where, f"no {lacks}", "a picture or concept, and its caption", "complete it"
            )
        if captions.setdefault(key, text) != text:
            raise DataError(
                where,
                f"another caption of {key}: {text!r}, after {captions[key]!r}",
                "one caption of each",
                "keep one of them",
            )
    if stimuli:
        _check_belonging(path, captions, stimuli)
    return captions


def _key(text: str) -> str:
    return composed(text.strip().replace("\\", "/")).removeprefix("./")


def _table_captions(path: Path) -> Iterator[tuple[str, str, str]]:
    """(where it stands, key, caption) of each row."""
    rows = read_columns(path, "captions", _CAPTIONS_CURE)
    _, head = next(rows, (1, {}))
    column = first_of(CAPTION_KEYS, head)
    if column is None or "caption" not in head:
        raise DataError(path, f"columns {', '.join(head) or '(none)'}", _CAPTIONS, _CAPTIONS_CURE)
    for line, cells in rows:
        yield f"{path}, line {line}", _key(cells[column]), cells["caption"]


def _json_captions(path: Path) -> Iterator[tuple[str, str, str]]:
    pairs = read_json(path, pairs=_Pairs)
    if not isinstance(pairs, _Pairs):
        raise DataError(path, "something else", _CAPTIONS, _CAPTIONS_CURE)
    for key, text in pairs:
        if not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f"{path}, {key!r:.80}", f"a {kind}", "a caption", "write one")
        yield f"{path}, {key!r}", _key(key), text.strip()


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands in the file: a dict would drop all but the last of equal keys."""


def _check_belonging(path: Path, captions: Mapping[str, str], stimuli: Sequence[Stimulus]) -> None:
    """Warn of captions of nothing. Raises DataError if all are."""
    known = {composed(name) for item in stimuli for name in (item.key, item.concept)}
    strangers = [key for key in captions if key not in known]
    example = f"{stimuli[0].key} or {stimuli[0].concept}"
    if len(strangers) == len(captions):
        raise DataError(
            path,
            f"captions of other stimuli, e.g. {strangers[0]}" if strangers else "no captions",
            f"captions of pictures of DATA, as {example}",
            "name pictures by their path below DATA, or concepts by their folder's name without "
            "its number",
        )
    if strangers:
        LOG.warning(
            "%s: %d of %d captions belong to no picture of DATA, e.g. %s; expected names as %s",
            path, len(strangers), len(captions), strangers[0], example,
        )  # fmt: skip


def caption(stimulus: Stimulus, captions: Mapping[str, str], template: str) -> str:
    """The caption of the picture, else of its concept, else the template."""
    found = captions.get(composed(stimulus.key)) or captions.get(composed(stimulus.concept))
    return found or template.format(concept=stimulus.concept)
