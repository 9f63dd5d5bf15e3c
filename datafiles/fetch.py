"""Published data sets and weights from the internet: dataset.py --fetch, and nothing else."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from datafiles.download import Remote, check_room, download, in_bytes
from datafiles.findings import Findings
from datafiles.stimuli import PICTURES
from rundirs.files import file_hash, read_json, sha256, write_json
from rundirs.yaml_files import read_yaml
from util import CHECKOUT, DataError, UserError

MANIFEST = CHECKOUT / "datafiles" / "sources.yaml"
FETCHED = "fetched.json"  # in DATA: what came from where
SPARE = 1 << 28  # bytes that stay free


@dataclass(frozen=True)
class Fetch:
    """What is fetched where to; names as the flags of ``args.py``."""

    data_path: Path
    fetch: Sequence[str]
    subjects: Sequence[str] | None
    dry_run: bool


@dataclass(frozen=True)
class Item:
    """One file of a source. ``about``: bytes, where nobody states them, None where unknown."""

    key: str  # below DATA
    remote: Remote
    about: int | None
    unpack: str | None  # folder that a zip holds

    @property
    def place(self) -> Path:
        """Where it is in the end."""
        return self.remote.path.with_name(self.unpack) if self.unpack else self.remote.path

    @property
    def length(self) -> int | None:
        return self.remote.size or self.about

    @property
    def size(self) -> str:
        if self.length is None:
            return "size not stated"
        return ("" if self.remote.size else "about ") + in_bytes(self.length)


@cache
def manifest() -> Mapping[str, Mapping[str, Any]]:
    return read_yaml(MANIFEST.read_text(encoding="utf-8"))


def items_of(name: str, data_path: Path, subjects: Sequence[str] | None) -> Iterator[Item]:
    """The files of a source, without those of the sources it goes with. Raises UserError."""
    source = manifest()[name]
    people = [f"sub-{number + 1:02d}" for number in range(source.get("subjects", 0))]
    if people and (unknown := sorted(set(subjects or ()) - set(people))):
        raise UserError(
            "--subjects",
            ", ".join(unknown),
            f"of {name}: {people[0]} to {people[-1]}",
            "correct it",
        )
    for who in [one for one in people if not subjects or one in subjects] or [""]:
        for file in source["files"]:
            key = file["path"].format(subject=who)
            url = file.get("url") or f"{source['base']}/{key}"
            size, digest = file.get("bytes"), file.get("sha256")
            remote = Remote(data_path / key, url, source["page"], size, digest)
            yield Item(key, remote, file.get("about"), file.get("unpack"))


def wanted_items(asked: Fetch) -> list[Item]:
    """All that is asked for, each once. Raises UserError."""
    names = list(dict.fromkeys(
        one for name in asked.fetch for one in (name, *manifest()[name].get("with", ()))
    ))  # fmt: skip
    if asked.subjects and not any("subjects" in manifest()[name] for name in names):
        raise UserError(
            "--subjects", f"with --fetch {' '.join(asked.fetch)}, which is of nobody",
            "a data set of people", "leave --subjects out",
        )  # fmt: skip
    items = (item for name in names for item in items_of(name, asked.data_path, asked.subjects))
    return list({item.key: item for item in items}.values())


def fetch(asked: Fetch) -> Iterator[str]:
    """Fetch what is not there, a line for each file. Raises DataError / UserError."""
    items = wanted_items(asked)
    for name in dict.fromkeys(asked.fetch):
        source = manifest()[name]
        yield f"{source['title']}; {source['page']}; licence: {source['licence']}"
    missing = [item for item in items if not _there(item)]
    yield from (f"  there already: {item.place}" for item in items if item not in missing)
    needed = sum((item.length or 0) - item.remote.arrived for item in missing)
    check_room(asked.data_path, needed + SPARE if needed > 0 else 0)
    for item in missing:
        if asked.dry_run:
            stated = f"SHA-256 {item.remote.sha256 or 'not stated'}"
            yield f"  {item.place}: {item.size}, {stated}, from {item.remote.mirrored}"
        else:
            digest = _fetched(asked.data_path, item)
            published = ", as published" if item.remote.sha256 else ""
            yield f"  fetched {item.place}: SHA-256 {digest}{published}"
    if asked.dry_run:
        known = [item.length for item in missing if item.length is not None]
        more = f", {len(missing) - len(known)} of unknown size" if len(known) < len(missing) else ""
        yield f"would fetch {len(missing)} of {len(items)} files: {in_bytes(sum(known))}{more}"


def _fetched(data_path: Path, item: Item) -> str:
    """Put a file, or the folder of a zip, in its place; returns the SHA-256 of what was sent."""
    path = item.remote.path
    digest = sha256(path) if path.is_file() else download(item.remote)  # a zip not unpacked yet
    if item.unpack:
        _unpack(item)
    else:
        _note(data_path, item, digest)
    return digest


def _there(item: Item) -> bool:
    """Whether it is there. Raises DataError where something else is in its place."""
    place, size = item.place, item.remote.size
    if item.unpack:
        return place.is_dir()
    if place.is_file() and size is not None and place.stat().st_size != size:
        raise DataError(
            place, f"{place.stat().st_size:,} bytes", f"the published file of {size:,} bytes",
            "move it away: nothing is overwritten",
        )  # fmt: skip
    return place.is_file()


def _unpack(item: Item) -> None:
    """Put the folder that a zip holds in its place, whole, and remove the zip. Raises DataError."""
    from rundirs.progress import Progress

    path, name = item.remote.path, item.place.name
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}.") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                check_room(path, SPARE + sum(one.file_size for one in archive.infolist()))
                for one in Progress(archive.infolist(), desc=name, unit="file", leave=False):
                    place = _place_in(folder, name, one)
                    if place is not None:
                        place.parent.mkdir(parents=True, exist_ok=True)
                        with archive.open(one) as source, open(place, "wb") as file:
                            shutil.copyfileobj(source, file)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, EOFError) as error:
            raise _no_pictures(item, f"no zip that can be read ({error})") from None
        inside = Path(folder) / name
        if not inside.is_dir():
            raise _no_pictures(item, "a zip without CONCEPT/PICTURE.jpg")
        inside.rename(item.place)
    path.unlink()


def _no_pictures(item: Item, found: str) -> DataError:
    item.remote.path.unlink()
    return DataError(
        item.remote.mirrored, f"{found}; it was removed", f"a zip of {item.place.name}/",
        f"run it again; if that does not help, see {item.remote.page}",
    )  # fmt: skip


def _place_in(folder: str, name: str, one: zipfile.ZipInfo) -> Path | None:
    """Where a zip's picture goes, by its last two names; None for anything else."""
    path = PurePosixPath(one.filename.replace("\\", "/"))
    parts = path.parts
    if len(parts) < 2 or path.suffix.lower() not in PICTURES or "__MACOSX" in parts:
        return None
    if any(part.startswith(".") for part in parts[-2:]):
        return None
    if one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{path} is compressed otherwise than by deflate")
    return Path(folder) / name / parts[-2] / parts[-1]


# ---------------------------------------------------------------- what was fetched


def _note(data_path: Path, item: Item, digest: str) -> None:
    """Remember what a file was, so that a check tells whether it still is."""
    known = _records(data_path)
    known[item.key] = {
        "url": item.remote.url, "bytes": item.remote.path.stat().st_size, "sha256": digest,
        "identity": file_hash(item.remote.path),
    }  # fmt: skip
    write_json(data_path / FETCHED, known)


def _records(data_path: Path) -> dict[str, Any]:
    path = data_path / FETCHED
    records = read_json(path) if path.is_file() else {}
    return records if isinstance(records, dict) else {}


def check_official(data_path: Path, full: bool, findings: Findings) -> None:
    """Files of DATA that were fetched, or are published: whether they are still what they were.

    By size and SHA-256; of what was fetched by samples of it unless ``full``.
    """
    fetched = _records(data_path)
    for key, record in fetched.items():
        path = data_path / key
        if isinstance(record, dict) and ".." not in path.parts and path.is_file():
            of = "sha256" if full else "identity"
            same = (sha256 if full else file_hash)(path) == record.get(of)
            _tell_official(key, path, f"as fetched from {record.get('url')}", same, findings)
    for name in manifest():
        for item in items_of(name, data_path, None):
            path, size = item.remote.path, item.remote.size
            if item.key not in fetched and size is not None and path.is_file():
                same = path.stat().st_size == size and sha256(path) == item.remote.sha256
                what = f"{name}, as published at {item.remote.page}"
                _tell_official(item.key, path, what, same, findings)


def _tell_official(key: str, path: Path, what: str, same: bool, findings: Findings) -> None:
    if same:
        findings.facts.append(f"{key}: {what}")
    else:
        cure = "if that was not on purpose, move it away and fetch it again (--fetch)"
        findings.problem(path, "other bytes, by its size or SHA-256", what, cure)
