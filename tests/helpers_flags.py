"""A stage's command, and what it writes, for tests that change its flags one by one."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import args
from rundirs.files import read_jsonl
from rundirs.tensors import load_tensors

# how a call computes or is steered, not what: other tests hold that the result is the same
HOW = {
    "config", "print_config", "dry_run", "device", "compile", "offload", "num_workers", "n_jobs",
    "data_on_device", "cache_dir", "score_cache", "report_to", "epochs_per_call", "batch_size",
    "shard", "shard_size", "save_every", "accumulate", "leave_out",
}  # fmt: skip
RECORDS = {"log.txt", "env.json", "options.json", "inputs.json", "state.pt", "DONE", "index.json"}
NOWHERE = "/proc/nowhere/at/all"  # where nothing can be made, either


def digest_of(out: Path) -> dict[str, str]:
    """{file: hash} of what a stage wrote, without what tells when and by whom."""
    found = {}
    for path in sorted(out.rglob("*") if out.is_dir() else [out]):
        name = path.relative_to(out).as_posix() if out.is_dir() else path.name
        inside = path.is_file() and not path.is_symlink() and "/." not in f"/{name}"
        if not inside or path.name.startswith(("DONE", "events.out")) or path.name in RECORDS:
            continue
        found[name] = hashlib.sha256(content_of(path)).hexdigest()
    return found


def content_of(path: Path) -> bytes:
    """What a file says, whatever its header tells of the time it was made."""
    if path.suffix == ".safetensors":
        return b"".join(k.encode() + v.numpy().tobytes() for k, v in load_tensors(path)[0].items())
    if path.suffix == ".jsonl":
        dropped = ("seconds", "options", "time")
        lines = [{k: v for k, v in x.items() if k not in dropped} for x in read_jsonl(path)]
        return json.dumps(lines).encode()
    if path.suffix == ".png":
        return np.asarray(Image.open(path)).tobytes()
    if path.name == "results.json":
        kept = (
            "retrieval", "pictures", "occlusion", "repetitions", "metrics", "skipped", "mark",
        )  # fmt: skip
        return json.dumps([json.loads(path.read_text())[name] for name in kept]).encode()
    return path.read_bytes()


class Stage:
    """A stage's command on the tiny world, and other values for its flags.

    ``other``: {flag: a value, words, or (words, words) of a flag that needs others: with the first
    ones alone and with both}.
    """

    def __init__(
        self, name: str, main: Callable[..., int], out: str, base: list[Any], other: dict[str, Any]
    ) -> None:
        self.name, self.main, self.out, self.base, self.other = name, main, out, base, other

    def run(self, out: Path, *more: object) -> tuple[int, dict[str, str]]:
        command = [str(word) for word in (*self.base, f"--{self.out}", out, *more)]
        code = self.main(command)
        return code, digest_of(out) if code == 0 else {}

    def changed(self, flag: str, action: argparse.Action) -> Any:
        """Words that change a flag; None for one that needs a value of its own."""
        if flag in self.other:
            given = self.other[flag]
            return given if isinstance(given, list | tuple) else [f"--{flag}", given]
        if isinstance(action, argparse.BooleanOptionalAction):
            return [f"--no-{flag}" if action.default else f"--{flag}"]
        if action.choices:
            return [f"--{flag}", next(c for c in action.choices if c != action.default)]
        if action.type is Path:
            return [f"--{flag}", NOWHERE]
        if isinstance(action.default, (int, float)):
            return [f"--{flag}", action.default + 1]
        return None


def idle_flags(stage: Stage, folder: Path, page: str = "") -> tuple[list[str], list[str]]:
    """(flags that change nothing, flags that need a value of their own) of a stage."""
    code, plain = stage.run(folder / "plain" / page)
    assert code == 0 and plain
    idle, without_value = [], []
    for flag, action in args.STAGES[stage.name]().actions().items():
        if flag in HOW or flag == stage.out:
            continue
        words, before = stage.changed(flag, action), plain
        if words is None:
            without_value.append(flag)
            continue
        if isinstance(words, tuple):
            _, before = stage.run(folder / f"{flag}_without" / page, *words[0])
            words = [*words[0], *words[1]]
        code, changed = stage.run(folder / flag / page, *words)
        if changed == before and (code == 0 or before != plain):
            idle.append(flag)
    return idle, without_value
