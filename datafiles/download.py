"""One file from the web: it goes on after a cut, and takes its name only when it is whole.

Hugging Face's own client goes on after a cut, but only there; pooch fetches from anywhere, but
begins anew. Half of the data sets are elsewhere, and have files of 8 GB: so it is done here.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import util
from rundirs.files import sha256
from util import DataError

MIRROR = "EEG2IMAGE_MIRROR"  # a server with HOST/PATH of each source, e.g. made by wget -x
HUB, HUB_MIRROR, HUB_TOKEN = "https://huggingface.co", "HF_ENDPOINT", "HF_TOKEN"
TRIES = 5  # without a byte in between
RETRY_S = 0.5  # before the second try; twice as long before each further one
TIMEOUT_S = 60
BLOCK_BYTES = 1 << 20
GOES_ON = "the same command goes on where this one stopped"
_CUTS = (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError,
         ssl.SSLError)  # fmt: skip
_ELSEWHERE = (401, 403, 404, 410, 451)  # answers that no second try changes


@dataclass(frozen=True)
class Remote:
    """A file and its source. ``size`` and ``sha256`` as published, None where nobody states it."""

    path: Path
    url: str
    page: str
    size: int | None = None
    sha256: str | None = None

    @property
    def part(self) -> Path:
        """What has arrived of it."""
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def tag(self) -> Path:
        """Which version of the source that is of."""
        return self.path.with_name(f".{self.path.name}.etag")

    @property
    def arrived(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    @property
    def mirrored(self) -> str:
        """The address that is asked, by the environment."""
        if mirror := os.environ.get(MIRROR):
            return f"{mirror.rstrip('/')}/{self.url.split('://', 1)[1]}"
        if self.url.startswith(f"{HUB}/") and (mirror := os.environ.get(HUB_MIRROR)):
            return mirror.rstrip("/") + self.url.removeprefix(HUB)
        return self.url


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Notes the SHA-256 that Hugging Face states as it sends one to where the bytes are."""

    stated: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):
        self.stated = self.stated or headers.get("X-Linked-Etag")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(wanted: Remote) -> str:
    """Fetch a file; returns its SHA-256. Raises DataError.

    What has arrived stays beside it, as ``.NAME.part``, until all has; bytes that are not the
    published ones do not.
    """
    wanted.path.parent.mkdir(parents=True, exist_ok=True)
    with open(wanted.part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                wanted.part, "another process is fetching it", "one at a time", "wait for it"
            ) from None
        stated = _all_of(wanted, file)
        found, expected = sha256(wanted.part), wanted.sha256 or stated
        wanted.tag.unlink(missing_ok=True)
        if expected in (None, found):
            os.replace(wanted.part, wanted.path)
            return found
        wanted.part.unlink()
    raise DataError(
        wanted.mirrored,
        f"bytes of SHA-256 {found}; they were removed",
        f"SHA-256 {expected}, as " + ("published" if wanted.sha256 else "the server states"),
        f"run it again; if that does not help, see {wanted.page}",
    )


def _all_of(wanted: Remote, file: IO[bytes]) -> str | None:
    """Try until all bytes are there; returns the SHA-256 that the server states, if it does."""
    tries, before = 0, -1
    while True:
        try:
            stated, total = _go_on(wanted, file)
            if total in (None, wanted.arrived):
                return stated
            trouble = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code in _ELSEWHERE:
                raise _refused(wanted, f"{error.code} {error.reason}") from None
            if error.code == 416:  # what has arrived is no beginning of what is there now
                file.truncate(0)
            trouble = f"{error.code} {error.reason}"
        except _CUTS as error:
            trouble = str(getattr(error, "reason", error)) or type(error).__name__
        tries = 0 if wanted.arrived > before >= 0 else tries + 1
        before = wanted.arrived
        if tries >= TRIES:
            raise DataError(
                wanted.mirrored, f"{trouble}; {before / 1e6:,.1f} MB have arrived",
                "a connection", GOES_ON,
            )  # fmt: skip
        util.LOG.warning("%s: %s; trying again", wanted.path.name, trouble)
        time.sleep(RETRY_S * 2**tries)


def _refused(wanted: Remote, answer: str) -> DataError:
    return DataError(
        wanted.mirrored,
        answer,
        "the published file",
        f"see {wanted.page}: it may have moved, or want an account (token in {HUB_TOKEN}); "
        f"{MIRROR} names another server",
    )


def _go_on(wanted: Remote, file: IO[bytes]) -> tuple[str | None, int | None]:
    """(SHA-256 as the server states it, bytes of the whole file as it states them)."""
    request = urllib.request.Request(wanted.mirrored)
    if request.type not in ("http", "https"):
        raise _refused(wanted, f"an address of kind {request.type}")
    if wanted.mirrored.startswith(f"{HUB}/") and (token := os.environ.get(HUB_TOKEN)):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    if wanted.arrived:
        request.add_header("Range", f"bytes={wanted.arrived}-")
        if wanted.tag.is_file() and (version := wanted.tag.read_text()):
            request.add_header("If-Range", version)
    from rundirs.progress import Progress

    redirects = _Redirects()
    with urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_S) as answer:
        total = _check_answer(wanted, answer)
        if answer.status != 206:
            file.truncate(0)
        wanted.tag.write_text(_version(answer))
        with Progress(desc=wanted.path.name, total=total, initial=wanted.arrived, unit="B",
                      unit_scale=True, unit_divisor=1000) as bar:  # fmt: skip
            while block := answer.read(BLOCK_BYTES):
                file.write(block)
                file.flush()
                bar.update(len(block))
    return _as_sha256(redirects.stated or answer.headers.get("X-Linked-Etag")), total


def _check_answer(wanted: Remote, answer: http.client.HTTPResponse) -> int | None:
    """Bytes of the whole file as the server states them. Raises DataError for another file."""
    if answer.headers.get_content_type() == "text/html":
        raise _refused(wanted, "a web page, not the file")
    length = answer.headers.get("Content-Length")
    total = int(length) if length and length.isdecimal() else None
    if answer.status == 206:
        whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
        total = int(whole) if whole.isdecimal() else None
    total = wanted.size if total is None else total
    if wanted.size not in (None, total):
        raise _refused(wanted, f"a file of {total:,} bytes, not of {wanted.size:,} as published")
    check_room(wanted.path, (total or 0) - wanted.arrived)
    return total


def check_room(place: Path, needed: int) -> None:
    """Raise DataError where the disk of a place has no room for so many bytes."""
    there = next(path for path in (place, *place.absolute().parents) if path.is_dir())
    if needed > (free := shutil.disk_usage(there).free):
        raise DataError(
            place, f"{in_bytes(free)} free", f"{in_bytes(needed)} for what is missing",
            f"make room, name another folder, or fewer --subjects; {GOES_ON}",
        )  # fmt: skip


def in_bytes(number: int) -> str:
    """``8.34 GB``, ``75 MB``."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def _version(answer: http.client.HTTPResponse) -> str:
    """What If-Range takes: an ETag unless it is a weak one, else the date; empty without both."""
    tag = answer.headers.get("ETag") or "W/"
    return answer.headers.get("Last-Modified") or "" if tag.startswith("W/") else tag


def _as_sha256(tag: str | None) -> str | None:
    """Of an ETag, where it is one."""
    bare = (tag or "").strip('"').lower()
    return bare if len(bare) == 64 and set(bare) <= set("0123456789abcdef") else None
