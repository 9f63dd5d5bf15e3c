"""A hook of mkdocs: a page of every stage's flags, made from their parsers, and the pages beside.

make docs
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import args

PAGE = "reference.md"
BESIDE = {  # page: the file that it shows; a README.md would take the place of index.md
    "start.md": "README.md",
    "start.zh-CN.md": "README.zh-CN.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "miniworld/weights/MODEL_CARD.md": "miniworld/weights/MODEL_CARD.md",
}


def reference() -> str:
    """The page: a heading for each stage, a table for each group of its flags."""
    lines = ["# Flags of every stage", "", "Made from the parsers, as `--help` is.", ""]
    for make in args.STAGES.values():
        parser = make()
        lines += [f"## {parser.prog}", "", html.escape(parser.description or ""), ""]
        for group in parser._action_groups:
            rows = [_row(action) for action in group._group_actions if action.dest != "help"]
            if rows:
                head = ["| flag | values | default | meaning |", "|---|---|---|---|"]
                lines += [f"### {parser.prog}: {group.title}", "", *head, *rows, ""]
        lines += ["```", *(parser.epilog or "").splitlines(), "```", ""]
    return "\n".join(lines)


def _row(action: argparse.Action) -> str:
    flags = " ".join(f"`{flag}`" for flag in action.option_strings)
    default = "needed" if action.required else _shown(action.default)
    cells = [flags, _values(action), default, html.escape(action.help or "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(action: argparse.Action) -> str:
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return "a switch"
    metavar = action.metavar or action.dest.upper()
    shown = " ".join(metavar) if isinstance(metavar, tuple) else str(metavar)
    return f"`{shown}`" + (" …" if action.nargs in ("+", "*") else "")


def _shown(default: object) -> str:
    if default is None or default is False:
        return ""
    listed = default if isinstance(default, (list, tuple)) else [default]
    return f"`{' '.join(map(str, listed))}`"


def links(markdown: str, page: str) -> str:
    """Links that lead out of docs/ or into it, as they are on the site."""
    if page in BESIDE:
        markdown = re.sub(r"\]\((?:docs/|\.\./\.\./docs/)", "](/", markdown)
        return markdown.replace("](README", "](start")
    return re.sub(r"\]\(\.\./", "](/", markdown)


# ---------------------------------------------------------------- what mkdocs calls


def _generated(config: Any) -> Iterator[Any]:
    from mkdocs.structure.files import File

    yield File.generated(config, PAGE, content=reference())
    for page, name in BESIDE.items():
        yield File.generated(config, page, abs_src_path=str(ROOT / name))


def on_files(files: Any, config: Any) -> Any:
    for file in _generated(config):
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return links(markdown, page.file.src_uri)
