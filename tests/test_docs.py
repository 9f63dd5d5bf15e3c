"""What the documents tell people to type is understood, and their links lead somewhere."""

from __future__ import annotations

import html
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import args
from util import CHECKOUT

README, CHINESE = CHECKOUT / "README.md", CHECKOUT / "README.zh-CN.md"
PAGES = [README, CHINESE, *sorted((CHECKOUT / "docs").glob("*.md"))]
STAGE_OF = {
    "preprocess.py": "preprocess", "clip_feature_extractor.py": "features", "train.py": "train",
    "ATMS_retrieval.py": "retrieval", "generate.py": "generate", "evaluate.py": "evaluate",
    "report.py": "report", "dataset.py": "check",
}  # fmt: skip
SHORTENED = ("…", "...", "$")  # of a command that is not told in full


def commands(page: Path) -> list[str]:
    """The calls of stages in a page's blocks of code, lines joined."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    found = (re.match(r"\s*python (\w+\.py) (.*)", line) for line in lines)
    calls = [one for one in found if one and one[1] in STAGE_OF]
    return [one[0].strip() for one in calls if not any(sign in one[0] for sign in SHORTENED)]


CALLS = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), CALLS)
def test_every_command_is_understood(page: str, command: str) -> None:
    """All flags are known, all values allowed, all needed ones given."""
    _, script, *tokens = shlex.split(command, comments=True)
    args.resolve(STAGE_OF[script], tokens)


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    """docs/.site/reference.py, as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location("site", CHECKOUT / "docs/.site/reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_flag_of_every_stage(hook: ModuleType) -> None:
    parts = re.split(r"^## ", hook.reference(), flags=re.MULTILINE)[1:]
    assert len(parts) == len(args.STAGES)
    for part, make in zip(parts, args.STAGES.values(), strict=True):
        rows = [line for line in part.splitlines() if line.startswith("| `-")]
        for name, action in make().actions().items():
            (row,) = (row for row in rows if f"`--{name}`" in row.split("|")[1])
            assert (action.help or "").split()[0] in html.unescape(row)
            assert ("| needed |" in row) == action.required
            # no cell is torn by what stands in it
            assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_the_site_is_built_without_a_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="make docs installs it; the site is tried where it is")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    assert "--clip_feature_path" in page
    assert (tmp_path / "site" / "start.html").exists()


def test_the_quick_path_of_the_readme_is_whole() -> None:
    told = [command for page, command in CALLS if page == "README.md"]
    for script in ("dataset.py", "clip_feature_extractor.py", "train.py", "generate.py",
                   "evaluate.py", "report.py"):  # fmt: skip
        assert any(f"python {script} " in command for command in told), script
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 120


def blocks(page: Path) -> list[str]:
    """Lines of a page's blocks of code, without what a shell does not read."""
    found = re.findall(r"```[a-z]*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [re.sub(r"\s+#.*", "", line) for block in found for line in block.splitlines()]


def table_rows(page: Path) -> list[tuple[int, list[str]]]:
    """Of each row of a page's tables: the number of cells, the code and the figures in them."""
    lines = re.findall(r"^\|.*\|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    told = r"`[^`]+`|(?<![\w.])\d*[.,]?\d+|\]\([^)]+\)"
    return [(line.count("|"), re.findall(told, line)) for line in lines]


def test_the_chinese_readme_says_the_same() -> None:
    """Commands line by line, tables by their figures and names, links, headings by their number."""
    assert blocks(CHINESE) == blocks(README)
    for theirs, ours in zip(table_rows(CHINESE), table_rows(README), strict=True):
        assert (theirs[0], sorted(theirs[1])) == (ours[0], sorted(ours[1]))
    pages = [page.read_text(encoding="utf-8") for page in (CHINESE, README)]
    links = [{*re.findall(r"\]\(([^)]+)\)", text)} - {README.name, CHINESE.name} for text in pages]
    assert links[0] == links[1]
    flags = [sorted(re.findall(r"`--[^`]+`", text)) for text in pages]
    assert flags[0] == flags[1]
    levels = [re.findall(r"^#+ ", text, re.MULTILINE) for text in pages]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http", "#")):
            path, _, heading = link.partition("#")
            target = page.parent / path
            assert target.exists(), link
            if heading:
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
                assert heading in slugs, link
