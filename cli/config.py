"""Resolved options and the files that give them: ``--config`` in, ``--print_config`` out."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import yaml

from cli.parser import STEERING, Parser, did_you_mean
from rundirs.yaml_files import read_yaml


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


_Settings = TypeVar("_Settings", bound=_Dataclass)


@dataclass(frozen=True)
class Options:
    """The resolved options of one call. ``values.NAME`` is parsed and range-checked."""

    stage: str
    values: argparse.Namespace
    provenance: dict[str, str]  # option -> "default", "command line" or "config FILE"
    fixed: tuple[str, ...]  # options that determine the result; a resumed run must keep them

    def recorded(self) -> dict[str, Any]:
        """Values for ``options.json``, without the flags that only steer this call."""
        return {key: value for key, value in vars(self.values).items() if key not in STEERING}

    def settings(self, kind: type[_Settings]) -> _Settings:
        """What one part of a stage is asked: a dataclass whose fields are named as flags."""
        asked = {field.name: getattr(self.values, field.name) for field in fields(kind)}
        return kind(**asked)

    def changed(self, part: _Dataclass) -> Options:
        """The same with other :meth:`settings` of one part."""
        own = {field.name: getattr(part, field.name) for field in fields(part)}
        return replace(self, values=argparse.Namespace(**vars(self.values) | own))


def config_tokens(parser: Parser, path: Path) -> list[str]:
    """A config file as command-line tokens."""
    content = _read_config(parser, path)
    actions = parser.actions()
    tokens = []
    for key, value in content.items():
        if key not in actions or key == "config":
            known = [name for name in actions if name != "config"]
            parser.error(f"--config {path}: {did_you_mean(str(key), known)}")
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, (list, dict)) for item in items):
            parser.error(f"--config {path}: {key}: nested values, expected one, or a list of some")
        if isinstance(actions[key], argparse.BooleanOptionalAction):
            if not isinstance(value, bool):
                parser.error(f"--config {path}: {key}: {value!r}, expected true or false")
            tokens.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            tokens += [f"--{key}", *map(str, value)]
        else:
            tokens.append(f"--{key}={value}")
    return tokens


def _read_config(parser: Parser, path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else read_yaml(text)
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        parser.error(f"--config {path}: not YAML or JSON: {error}")
    if isinstance(content, dict) and "options" in content:  # a run's own options.json
        content = content["options"]
    if not isinstance(content, dict):
        parser.error(
            f"--config {path}: expected option names and values, found {type(content).__name__}"
        )
    return content


def as_yaml(options: Options) -> str:
    """One line per option with its provenance; JSON values are YAML too."""
    lines = []
    for key, value in options.recorded().items():
        plain = json.loads(json.dumps(value, default=str))
        lines.append(
            f"{key}: {json.dumps(plain, ensure_ascii=False)}   # {options.provenance[key]}"
        )
    return "\n".join(lines) + "\n"
