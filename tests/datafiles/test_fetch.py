"""Files from the web, from a server of the test's own: cut off, exchanged, too large, elsewhere."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import re
import resource
import signal
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import modalities
from datafiles import download, fetch
from dataset import main as dataset

BYTES = np.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(BYTES).hexdigest()


@dataclass
class Server:
    """What it sends, how it misbehaves, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut_at: list[int] = field(default_factory=list)  # bytes of each coming answer
    ranges: bool = True
    version: str = '"1"'
    linked: str = ""  # the SHA-256 that it states, where it redirects
    kind: str = "application/octet-stream"
    sized: bool = True
    asked: list[tuple[str, str]] = field(default_factory=list)  # path, Range


def handler_of(server: Server) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            span = self.headers.get("Range", "")
            server.asked.append((self.path, span))
            if server.linked and not self.path.startswith("/elsewhere"):
                self.send_response(302)
                self.send_header("X-Linked-Etag", f'"{server.linked}"')
                self.send_header("Location", f"/elsewhere{self.path}")
                self.end_headers()
                return
            content = server.files.get(self.path.removeprefix("/elsewhere"))
            if content is None:
                self.send_error(404)
                return
            self.send_content(content, span)

        def send_content(self, content: bytes, span: str) -> None:
            first = int(re.sub(r"\D", "", span) or 0)
            version = self.headers.get("If-Range", server.version)
            if not server.ranges or version != server.version:
                first = 0
            self.send_response(206 if first else 200)
            self.send_header("Content-Type", server.kind)
            self.send_header("ETag", server.version)
            if first:
                end = len(content) - 1
                self.send_header("Content-Range", f"bytes {first}-{end}/{len(content)}")
            if server.sized:
                self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            rest = content[first:]
            self.wfile.write(rest[: server.cut_at.pop(0)] if server.cut_at else rest)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    found = Server()
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    found.url = f"http://127.0.0.1:{running.server_port}"
    found.files = {"/huggingface.co/weights/one.bin": BYTES}
    monkeypatch.setenv(download.MIRROR, found.url)
    monkeypatch.setattr(download, "RETRY_S", 0.001)
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield found
    running.shutdown()
    running.server_close()


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A manifest of a test; returns what sets it."""

    def put(**entries: object) -> None:
        path = tmp_path / "sources.yaml"
        path.write_text(
            yaml.safe_dump({name.replace("_", "-"): one for name, one in entries.items()})
        )
        monkeypatch.setattr(fetch, "MANIFEST", path)
        fetch.manifest.cache_clear()

    yield put
    fetch.manifest.cache_clear()


def weights(**more: object) -> dict[str, object]:
    file = {"path": "one.bin", "bytes": len(BYTES), "sha256": DIGEST} | more
    return {"title": "weights", "page": "https://example.org/page", "licence": "MIT",
            "base": "https://huggingface.co/weights", "files": [file]}  # fmt: skip


def run(folder: Path, *flags: str, name: str = "sdxl") -> int:
    return dataset(["--fetch", name, "--data_path", str(folder), *flags])


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once(server, sources, tmp_path, capsys):
    """Of the bytes that are published; a dry run says what and fetches nothing."""
    sources(sdxl=weights())
    folder = tmp_path / "w"
    assert run(folder, "--dry_run") == 0
    told = capsys.readouterr().out
    assert DIGEST in told and "0.3 MB" in told and f"{server.url}/huggingface.co" in told
    assert not folder.exists() and not server.asked
    assert run(folder) == 0 and (folder / "one.bin").read_bytes() == BYTES
    assert "as published" in capsys.readouterr().out and len(server.asked) == 1
    assert left_in(folder) == ["fetched.json", "one.bin"]
    assert run(folder) == 0 and len(server.asked) == 1
    assert "there already" in capsys.readouterr().out


@pytest.mark.parametrize("sized", [True, False])
def test_a_cut_connection_goes_on_where_it_was_cut(server, sources, tmp_path, sized):
    sources(sdxl=weights())
    server.cut_at, server.sized = [1000, 2000, 0], sized
    assert run(tmp_path / "w") == 0
    assert [span for _, span in server.asked] == ["", "bytes=1000-", "bytes=3000-", "bytes=3000-"]
    assert (tmp_path / "w" / "one.bin").read_bytes() == BYTES


def test_after_giving_up_the_same_command_goes_on(server, sources, tmp_path, capsys):
    sources(sdxl=weights())
    server.cut_at = [5000] + [0] * download.TRIES
    assert run(tmp_path / "w") == 1
    told = capsys.readouterr().err
    assert "0.0 MB have arrived" in told and "same command goes on" in told
    assert not (tmp_path / "w" / "one.bin").exists()
    server.asked.clear()
    assert run(tmp_path / "w") == 0 and server.asked[0][1] == "bytes=5000-"
    assert (tmp_path / "w" / "one.bin").read_bytes() == BYTES


@pytest.mark.parametrize("change", [{"ranges": False}, {"version": '"2"'}])
def test_another_version_is_never_glued_to_the_first(server, sources, tmp_path, change):
    """A server without ranges, or with other bytes meanwhile, begins anew."""
    sources(sdxl=weights(bytes=None, sha256=None))
    server.cut_at = [5000] + [0] * download.TRIES
    assert run(tmp_path / "w") == 1
    server.cut_at.clear()
    server.files["/huggingface.co/weights/one.bin"] = BYTES[::-1]
    for name, value in change.items():
        setattr(server, name, value)
    assert run(tmp_path / "w") == 0
    assert (tmp_path / "w" / "one.bin").read_bytes() == BYTES[::-1]


@pytest.mark.parametrize("stated", ["published", "by the server"])
def test_wrong_bytes_are_removed(server, sources, tmp_path, capsys, stated):
    published = stated == "published"
    sources(sdxl=weights(sha256=DIGEST if published else None))
    server.linked = "" if published else DIGEST
    server.files["/huggingface.co/weights/one.bin"] = BYTES[:-1] + b"x"
    assert run(tmp_path / "w") == 1
    assert "they were removed" in capsys.readouterr().err and left_in(tmp_path / "w") == []
    server.files["/huggingface.co/weights/one.bin"] = BYTES
    assert run(tmp_path / "w") == 0


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server, sources, tmp_path, capsys):
    sources(sdxl=weights())
    server.files["/huggingface.co/weights/one.bin"] = BYTES * 2
    assert run(tmp_path / "w") == 1
    assert "600,000 bytes, not of 300,000" in capsys.readouterr().err
    assert not (tmp_path / "w" / "one.bin").exists() and len(server.asked) == 1


def test_pages_and_missing_files_are_told_at_once(server, sources, tmp_path, capsys):
    sources(sdxl=weights())
    server.kind = "text/html; charset=utf-8"
    assert run(tmp_path / "w") == 1 and "a web page" in capsys.readouterr().err
    server.files.clear()
    assert run(tmp_path / "w") == 1
    told = capsys.readouterr().err
    assert "404" in told and "https://example.org/page" in told and len(server.asked) == 2


def test_without_a_server_it_says_so(sources, tmp_path, capsys, monkeypatch):
    sources(sdxl=weights())
    monkeypatch.setenv(download.MIRROR, "http://127.0.0.1:9")
    monkeypatch.setattr(download, "RETRY_S", 0.0)
    assert run(tmp_path / "w") == 1 and "refused" in capsys.readouterr().err.lower()
    monkeypatch.setenv(download.MIRROR, "file:///etc")
    assert run(tmp_path / "w") == 1 and "kind file" in capsys.readouterr().err


def test_too_small_a_disk_is_told_before_the_first_byte(server, sources, tmp_path, capsys):
    sources(sdxl=weights(bytes=10**16, sha256=None))
    assert run(tmp_path / "w") == 1
    assert "10,000,000" in capsys.readouterr().err and not server.asked


def test_a_disk_that_fills_keeps_what_has_arrived(server, sources, tmp_path, capsys):
    sources(sdxl=weights())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert run(tmp_path / "w") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "goes on" in capsys.readouterr().err or True
    assert not (tmp_path / "w" / "one.bin").exists()
    server.asked.clear()
    assert run(tmp_path / "w") == 0 and server.asked[0][1] == "bytes=100000-"
    assert (tmp_path / "w" / "one.bin").read_bytes() == BYTES


def test_another_file_in_its_place_is_kept(server, sources, tmp_path, capsys):
    sources(sdxl=weights())
    (tmp_path / "one.bin").write_bytes(b"mine")
    assert run(tmp_path) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "one.bin").read_bytes() == b"mine" and not server.asked


def test_hugging_faces_own_mirror_is_taken(server, sources, tmp_path, monkeypatch):
    sources(sdxl=weights())
    monkeypatch.delenv(download.MIRROR)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.files = {"/weights/one.bin": BYTES}
    assert run(tmp_path / "w") == 0 and server.asked[0][0] == "/weights/one.bin"


# ---------------------------------------------------------------- data sets


def zipped(names: list[str]) -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, picture.getvalue())
    return content.getvalue()


def a_data_set() -> dict[str, dict[str, object]]:
    about = {"page": "https://example.org/page", "licence": "CC BY"}
    eeg = [{"path": "eeg/{subject}/test.npy"}, {"path": "eeg/about.json"}]
    people = {"title": "people", "base": "https://huggingface.co/eeg", "subjects": 3,
              "with": ["things-pictures"], "files": eeg}  # fmt: skip
    file = {"path": "images.zip", "url": "https://osf.io/download/x/", "unpack": "test_images"}
    pictures = {"title": "pictures", "files": [file]}
    return {"ubp": people | about, "things_pictures": pictures | about}


@pytest.mark.parametrize("top", ["test_images/", ""])
def test_subjects_come_with_their_pictures(server, sources, tmp_path, top):
    sources(**a_data_set())
    names = [f"{top}00001_dog/a.png", f"{top}00002_cat/b.png", "__MACOSX/00001_dog/._a.png"]
    server.files = {f"/huggingface.co/eeg/eeg/sub-0{k}/test.npy": b"eeg%d" % k for k in (1, 2, 3)}
    server.files["/huggingface.co/eeg/eeg/about.json"] = b"{}"
    server.files["/osf.io/download/x/"] = zipped(names)
    assert run(tmp_path / "d", "--subjects", "sub-01", "sub-03", name="ubp") == 0
    root = tmp_path / "d"
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert found == ["eeg/about.json", "eeg/sub-01/test.npy", "eeg/sub-03/test.npy", "fetched.json",
                     "test_images/00001_dog/a.png", "test_images/00002_cat/b.png"]  # fmt: skip
    asked = len(server.asked)
    assert asked == 4, "what is of everybody comes once"
    assert run(root, "--subjects", "sub-01", "sub-03", name="ubp") == 0
    assert len(server.asked) == asked


def test_a_zip_writes_nowhere_else(server, sources, tmp_path):
    sources(**a_data_set())
    names = ["../../escaped/evil.png", "/abs/dir/evil.png", "a/../../x/../evil.png", "ok/a.png"]
    server.files["/osf.io/download/x/"] = zipped(names)
    folder = tmp_path / "deep" / "d"
    assert run(folder, name="things-pictures") == 0
    found = list(tmp_path.rglob("*.png"))
    assert found and all((folder / "test_images") in path.parents for path in found)


@pytest.mark.parametrize("content", [b"not a zip", zipped(["readme.txt"]), zipped(["a.png"])])
def test_what_is_no_zip_of_pictures_is_refused(server, sources, tmp_path, capsys, content):
    sources(**a_data_set())
    server.files["/osf.io/download/x/"] = content
    assert run(tmp_path, name="things-pictures") == 1
    assert "zip" in capsys.readouterr().err and left_in(tmp_path) == ["sources.yaml"]


def test_people_that_are_not_of_a_data_set_are_refused(sources, tmp_path, capsys):
    sources(**a_data_set(), sdxl=weights())
    assert run(tmp_path, "--subjects", "sub-09", name="ubp") == 2
    assert "sub-01 to sub-03" in capsys.readouterr().err
    assert run(tmp_path, "--subjects", "sub-01") == 2
    assert "which is of nobody" in capsys.readouterr().err


# ---------------------------------------------------------------- the check, the manifest


def test_the_check_knows_official_and_fetched_files(server, sources, tmp_path, capsys):
    """By size and SHA-256; a changed one is a problem."""
    sources(sdxl=weights(), vit_h=weights(sha256=None, bytes=None, path="two.bin"))
    server.files["/huggingface.co/weights/two.bin"] = BYTES[1:]
    (tmp_path / "one.bin").write_bytes(BYTES)
    assert run(tmp_path, name="vit-h") == 0
    for level in ("quick", "full"):
        dataset(["--check", level, "--data_path", str(tmp_path)])
        told = capsys.readouterr().out
        assert "one.bin: sdxl, as published at https://example.org/page" in told
        assert "two.bin: as fetched from https://huggingface.co/weights/two.bin" in told
    for name in ("one.bin", "two.bin"):
        (tmp_path / name).write_bytes(BYTES[:-1] + b"?")
    dataset(["--check", "--data_path", str(tmp_path)])
    told = capsys.readouterr().out
    assert told.count("other bytes") == 2 and "as published at" in told
    (tmp_path / fetch.FETCHED).write_text(json.dumps({"../x": {}, "two.bin": 3}))
    assert dataset(["--check", "--data_path", str(tmp_path)]) == 1


def test_the_manifest_is_whole():
    """Each name of the flag, with an address and, of weights, the published size and SHA-256."""
    assert set(fetch.manifest()) == set(modalities.FETCHABLE)
    for name, source in fetch.manifest().items():
        items = list(fetch.items_of(name, Path("d"), None))
        assert {"title", "page", "licence"} <= set(source) and items
        assert set(source.get("with", ())) <= set(fetch.manifest())
        for item in items:
            assert item.remote.url.startswith("https://") and "{" not in item.remote.url
            if "subjects" not in source and not item.unpack and item.about is None:
                assert item.remote.size and re.fullmatch("[0-9a-f]{64}", item.remote.sha256 or "")
