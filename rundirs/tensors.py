"""Tensors on disk: safetensors with a JSON header, and torch files without running anything."""

from __future__ import annotations

import contextlib
import json
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from rundirs.files import atomic_write
from util import DataError


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]
) -> None:
    """Write safetensors atomically, ``header`` as one JSON string in the file's own metadata."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path, "wb") as file:
        file.write(save(whole, metadata={"header": json.dumps(header, default=str)}))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read safetensors and its JSON header ({} if it has none). Raises DataError."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _header(file)


def tensors_header(path: Path) -> dict[str, Any]:
    """The JSON header alone. Raises DataError."""
    with _opened(path) as file:
        return _header(file)


def _header(file: Any) -> dict[str, Any]:
    header = json.loads((file.metadata() or {}).get("header", "{}"))
    if not isinstance(header, dict):
        raise ValueError("a header of another kind")
    return header


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise DataError(
            path, "no such file", "a safetensors file", "run the stage that writes it"
        ) from None
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise DataError(
            path,
            f"unreadable ({error})",
            "a complete safetensors file",
            "it was cut short or is of another kind: copy or make it again",
        ) from None


_UNLOADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
    pickle.UnpicklingError,
    struct.error,
)


LONGEST_WORD = 4096  # characters without a blank
_PICKLES = 5  # of a file from before torch 1.6: magic number, protocol, system, content, keys


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """What of a file of ``torch.save`` is a pickle, opened at its beginning, one by one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    with archive.open(name) as file:
                        yield file
        return
    with open(path, "rb") as file:
        for _ in range(_PICKLES):
            yield file


def longest_word(path: Path) -> int:
    """Of all texts in a file of ``torch.save``, as far as it can be read.

    torch looks for reasons in its own complaints with patterns that take the square of a word's
    length: 15,000 characters are three seconds, a million are hours.
    """
    longest = 0
    with contextlib.suppress(*_UNLOADABLE, zipfile.BadZipFile, zlib.error, NotImplementedError):
        for file in _pickles(path):
            for _, value, _ in pickletools.genops(file):
                if isinstance(value, str | bytes) and len(value) > LONGEST_WORD:
                    longest = max(longest, *map(len, value.split()), 0)
    return longest


def load_torch(path: Path, expected: str, cure: str) -> dict[Any, Any]:
    """A dict that ``torch.save`` wrote, on the CPU; nothing in it is run. Raises DataError."""
    if (word := longest_word(path)) > LONGEST_WORD:
        raise DataError(path, f"unreadable (a name of {word} characters)", expected, cure)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNLOADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # whose message advises to run the file
            reason = "it holds more than tensors and plain values, or is damaged"
        raise DataError(path, f"unreadable ({reason})", expected, cure) from None
    if not isinstance(content, dict):
        raise DataError(path, f"a {type(content).__name__}", expected, cure)
    return content


def save_torch(path: Path, content: Mapping[str, Any]) -> None:
    """What :func:`load_torch` reads; whole or not at all. OSError for a full disk."""
    try:
        with atomic_write(path, "wb") as file:
            torch.save(dict(content), file)
    except RuntimeError as error:  # torch complains of its half-written archive instead
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


# ---------------------------------------------------------------- weights of others


def read_shapes(path: Path, expected: str) -> dict[str, tuple[int, ...]]:
    """{key: shape} of a safetensors file, from its header alone. Raises DataError."""
    from safetensors import SafetensorError, safe_open

    cure = "name the complete file; a download that was cut short has to be made again"
    if not path.exists():
        raise DataError(
            path,
            "a link to a file that is not there" if path.is_symlink() else "no such file",
            expected,
            "give a local path: nothing is downloaded here",
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        found = what_lies_there(path) or f"unreadable as safetensors ({error})"
        raise DataError(path, found, expected, cure) from None


def what_lies_there(path: Path) -> str:
    """What takes the place of weights: a folder, a pointer, a web page, another format; or ""."""
    if path.is_dir():
        return "a folder"
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    known = {
        "an empty file": not start,
        "a git-lfs pointer, not the weights": start.startswith(b"version https://git-lfs"),
        "a git-annex pointer, not the weights": b"/annex/objects/" in start,
        "a web page, not the weights: the link asks for a login, or leads to a page": text[:1]
        == b"<",
        "JSON, not weights": text[:1] == b"{",
        "a GGUF file": start.startswith(b"GGUF"),
        "a pickle of torch.save, whatever its name says": start.startswith((b"PK", b"\x80")),
    }
    return next((what for what, so in known.items() if so), "")
