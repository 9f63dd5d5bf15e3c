"""A run directory: options, inputs, log and ``DONE``; the same command again resumes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rundirs.environment import environment
from rundirs.files import read_json, write_json
from util import LOG, DataError, UserError, claim_log, release_log, start_log


def _alone(value: Any) -> Any:
    """What a list of one holds: as flags were recorded before they took several values."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _changes(
    kind: str, before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]
) -> list[str]:
    return [
        f"{kind}{name}: {before.get(name)!r} then, {now.get(name)!r} now"
        for name in names
        if _alone(now.get(name)) != _alone(before.get(name))
    ]


class RunDirectory:
    """A directory that explains itself and refuses to become another run.

    ``options.json`` (values and where each came from), ``env.json`` (one entry per start),
    ``inputs.json`` (hashes), ``log.txt``, and ``DONE`` last. The same command resumes; changed
    options or inputs are an error that names them.
    """

    def __init__(self, path: Path, stage: str, *, part: str = "") -> None:
        self.path, self.stage = Path(path), stage
        self.suffix = f"-{part}" if part else ""  # of this part's files
        self._done = self.path / f"DONE{self.suffix}"

    @property
    def finished(self) -> bool:
        return self._done.exists()

    def check(
        self, options: Mapping[str, Any], inputs: Mapping[str, Any], fixed: Sequence[str]
    ) -> None:
        """Raise UserError if this directory holds another run. Writes nothing.

        ``fixed``: options that determine the result; the rest may change between calls.
        """
        if not (self.path / "options.json").exists():
            if not self.path.exists() or _unused(self.path):
                return
            if (self.path / "options.json").exists():  # another shard has just begun it
                return self.check(options, inputs, fixed)
            raise UserError(
                self.path,
                "files that no run of this project wrote",
                "a new or empty directory",
                "name another output directory",
            )
        recorded = self._recorded("options.json")
        if recorded.get("stage") != self.stage:
            raise UserError(
                self.path,
                f"a run of {recorded.get('stage')}",
                f"a run of {self.stage}",
                "name another output directory",
            )
        before = self._recorded("options.json", "options")
        known = (self.path / "inputs.json").exists()
        earlier = self._recorded("inputs.json") if known else _plain(inputs)
        changes = _changes("--", before, _plain(options), fixed) + _changes(
            "input ", earlier, _plain(inputs), sorted({*inputs, *earlier})
        )
        if changes:
            raise UserError(
                self.path,
                "a run with other settings:\n            " + "\n            ".join(changes),
                "the same command, which resumes",
                "name another output directory, or go back to the recorded options",
            )

    def _recorded(self, name: str, key: str | None = None) -> dict[str, Any]:
        """What a run wrote, or the part of it under ``key``. Raises DataError for other content."""
        content = read_json(self.path / name)
        part = content.get(key) if key and isinstance(content, dict) else content
        if not isinstance(part, dict):
            raise DataError(
                self.path / name, "something else", "the record of a run", "name another directory"
            )
        return part

    def start(
        self,
        options: Mapping[str, Any],
        provenance: Mapping[str, str],
        inputs: Mapping[str, Any],
        fixed: Sequence[str],
        *,
        shared: bool = False,
    ) -> None:
        """Check, create the directory, open the log and write the records, one process at a time.

        Unless several processes may share the run, raises UserError where another is at work.
        """
        self.check(options, inputs, fixed)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            start_log(self.path / "log.txt")
            # again: another process may have begun meanwhile
            claim_log(lambda: self.check(options, inputs, fixed))
            self.check(options, inputs, fixed)
            self._write_records(options, provenance, inputs)
            self.check(options, inputs, fixed)  # where locks are unknown the first records stand
        except BlockingIOError:
            raise UserError(
                self.path,
                "another process at work, with the same options",
                "one at a time",
                "wait for it, or stop it: the same command then goes on where it was",
            ) from None
        except OSError as error:
            raise UserError(
                self.path, str(error), "a directory that can be written", "name another one"
            ) from None
        if shared:
            release_log()
        LOG.info("%s: %s", self.stage, self.path)

    def _write_records(
        self, options: Mapping[str, Any], provenance: Mapping[str, str], inputs: Mapping[str, Any]
    ) -> None:
        """What the run was asked and given, and by whom; a kill may have come between them."""
        asked = {"options": _plain(options), "provenance": dict(provenance)}
        records = {"options.json": {"stage": self.stage, **asked}, "inputs.json": _plain(inputs)}
        for name, content in records.items():
            if not (self.path / name).exists():
                write_json(self.path / name, content, exclusive=True)
        starts = read_json(self.path / "env.json") if (self.path / "env.json").exists() else []
        write_json(self.path / "env.json", [*starts, environment()])

    def finish(self, summary: Mapping[str, Any]) -> None:
        write_json(self._done, {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **summary})


def _unused(path: Path) -> bool:
    """An empty folder, or one in which a run was killed, or is at work, before its records."""
    return path.is_dir() and all(
        item.name == "log.txt" or (item.name.startswith(".") and item.suffix == ".tmp")
        for item in path.iterdir()
    )


class Resolved(Protocol):
    """The options of a call, as ``args.resolve`` gives them."""

    stage: str
    values: Any
    provenance: dict[str, str]
    fixed: tuple[str, ...]

    def recorded(self) -> dict[str, Any]: ...


def open_run(
    options: Resolved,
    path: Path,
    inputs: Mapping[str, Any],
    plan: Iterable[str],
    part: str = "",
    *,
    shared: bool = False,
) -> RunDirectory:
    """How every stage begins, once its inputs are checked: refuse another run, or start or resume.

    With ``--dry_run`` tell the ``plan`` and end with exit code 0, nothing written. ``part``: a
    shard. ``shared``: several processes may work at it at the same time.
    """
    run = RunDirectory(path, options.stage, part=part)
    run.check(options.recorded(), inputs, options.fixed)
    if options.values.dry_run:
        lines = "".join(f"  - {line}\n" for line in [*plan, f"write to {path}"])
        sys.stdout.write(f"dry run, nothing was written. Would:\n{lines}")
        raise SystemExit(0)
    run.start(options.recorded(), options.provenance, inputs, options.fixed, shared=shared)
    if run.finished:
        LOG.info("already finished, nothing to do")
    return run


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give it back, so that then and now compare equal."""
    return json.loads(json.dumps(dict(values), default=str))
