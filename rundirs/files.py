"""Files that are whole or not there: JSON, CSV and JSON lines, and what identifies a file."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from util import DataError

_HASHED_WHOLE = 1 << 28  # files above 256 MiB are identified by their size and samples of them
_END = 1 << 20
# of what lies between both ends: 4 KiB of every 256 KiB
_SAMPLE, _EVERY = 1 << 12, 1 << 18


BEGUN_S = 5.0  # a temporary file that is younger may not have been locked yet


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes began to write in the place of ``path``: see :func:`in_work`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # gone meanwhile, in work, or of somebody else
            if time.time() - left.stat().st_mtime < BEGUN_S:
                continue
            with open(left, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


def in_work(file: IO[Any]) -> None:
    """Keep others from removing a temporary file as long as it is open."""
    with contextlib.suppress(OSError):  # a file system without locks: then nothing is removed
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w", *, exclusive: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; it takes the name only when complete and on disk.

    ``exclusive``: and only if no other file has the name by then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            in_work(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes 0600; colleagues read run directories
        if not (exclusive and _linked(name, path)):
            os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _linked(name: str, path: Path) -> bool:
    """Give a file its name in place of a temporary one, unless another file has it.

    False where the file system knows no hard links.
    """
    try:
        os.link(name, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    os.unlink(name)
    return True


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any, *, exclusive: bool = False) -> None:
    """``exclusive``: of several processes the first one's content stands."""
    with atomic_write(path, exclusive=exclusive) as file:
        json.dump(content, file, indent=1, ensure_ascii=False, default=str)
        file.write("\n")


def read_json(path: Path, pairs: Callable[[list[tuple[str, Any]]], Any] = dict) -> Any:
    """``pairs`` makes an object of its (key, value) pairs.

    Raises DataError for a missing, empty or damaged file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
        return json.loads(text, object_pairs_hook=pairs)
    except FileNotFoundError:
        raise DataError(
            path, "no such file", "a JSON file", "run the stage that writes it first"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(
            path, f"not JSON ({error})", "a JSON file", "delete it and rerun its stage"
        ) from None


def recorded_options(folder: Path) -> dict[str, Any]:
    """Options of the run in a folder; none where no run noted any. Raises DataError."""
    path = folder / "options.json"
    record = read_json(path) if path.is_file() else None
    options = record.get("options") if isinstance(record, dict) else None
    return options if isinstance(options, dict) else {}


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with one column per key of the first row, atomically."""
    import csv

    with atomic_write(path) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a table with a header. Raises DataError for a missing or other file."""
    import csv

    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(
            path, "no such file", "a CSV table", "run the stage that writes it first"
        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            path, f"not CSV ({error})", "a CSV table", "delete it and rerun its stage"
        ) from None


def json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line with a single write, so that a kill leaves at most one torn last line."""
    line = json_line(record)
    with open(path, "ab") as file:
        if file.tell() and not _ends_with_newline(path):
            line = "\n" + line
        file.write(line.encode())


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole records; a line torn by a kill, and what is no record, is skipped."""
    records = []
    if Path(path).exists():
        for line in Path(path).read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def sha256(path: Path) -> str:
    """sha256 of a whole file, however large."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_END), b""):
            digest.update(block)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file; above 256 MiB of samples throughout it (prefix ``sampled:``).

    Of its size, the first and last MiB and 4 KiB of every 256 KiB: what changes a layer of a
    network, or the trials of a picture, is seen; 7 GB take 0.2 s, whole 5.5 s, both from memory.
    """
    path = Path(path)
    size = path.stat().st_size
    if size <= _HASHED_WHOLE:
        return sha256(path)
    with open(path, "rb", buffering=0) as file:
        digest = hashlib.sha256(str(size).encode() + file.read(_END))
        for start in range(_END, size - _END, _EVERY):
            digest.update(os.pread(file.fileno(), _SAMPLE, start))
        file.seek(-_END, os.SEEK_END)
        digest.update(file.read(_END))
    return "sampled:" + digest.hexdigest()


def json_hash(content: Any) -> str:
    """sha256 of JSON-able content, keys sorted. Anything else is a TypeError, never a str."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
