"""Small pictures inside the page, within a budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import util
from datafiles.pictures import read_picture

PICTURE_BUDGET = 11_000_000  # characters of data URIs; the whole page is to stay below 15 MB


# pixels and WebP quality, tried from the left until the budget holds
ENCODINGS = ((256, 82), (192, 78), (160, 74), (144, 72), (128, 70), (116, 68), (104, 64),
             (96, 60), (80, 54), (64, 46), (48, 40), (40, 24), (32, 10))  # fmt: skip


@dataclass(frozen=True)
class Thumbnails:
    """Data URIs, each once, and the place of each picture file among them."""

    uris: list[str]
    places: dict[Path, int]
    px: int


def encode_picture(picture: Any, px: int, quality: int) -> bytes:
    """A PIL picture, at most ``px`` wide and high, as WebP, or JPEG where Pillow has none."""
    from PIL import features

    small = picture.copy()
    small.thumbnail((px, px), resample=1)  # 1 = Lanczos; never enlarges
    buffer = io.BytesIO()
    if features.check("webp"):
        small.save(buffer, format="WEBP", quality=quality, method=4)
    else:
        small.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    kind = "webp" if content[:4] == b"RIFF" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def open_picture(path: Path, px: int) -> Any:
    """A PIL picture, reduced to ``px``. Raises PictureError."""
    picture = read_picture(path)
    picture.thumbnail((px, px), resample=1)
    return picture


def choose_encoding(paths: Sequence[Path], large: set[Path]) -> int:
    """The first of ENCODINGS that holds the budget, judged by 40 pictures spread over all."""
    sample = paths[:: max(1, len(paths) // 40)]
    most = ENCODINGS[0][0] * 3 // 2
    opened = [(path in large, open_picture(path, most)) for path in sample]
    weight = [len(large.intersection(paths)), len(paths) - len(large.intersection(paths))]
    for choice, (px, quality) in enumerate(ENCODINGS):
        sizes: dict[bool, list[int]] = {True: [], False: []}
        for _, picture in opened:
            for big in (True, False):
                side = px * 3 // 2 if big else px
                sizes[big].append(len(data_uri(encode_picture(picture, side, quality))))
        means = [float(np.mean(sizes[big])) for big in (True, False)]
        if sum(np.multiply(weight, means)) < 0.92 * PICTURE_BUDGET:
            return choice
    return len(ENCODINGS) - 1


def make_thumbnails(hashes: Mapping[Path, str], large: set[Path]) -> Thumbnails:
    """Every picture of ``hashes`` {file: hash} once, half as large again where ``large``."""
    first: dict[str, Path] = {}
    for path in sorted(hashes, key=lambda path: path not in large):  # large ones represent others
        first.setdefault(hashes[path], path)
    distinct = list(first.values())
    start = choose_encoding(distinct, large) if distinct else 0
    for px, quality in ENCODINGS[start:]:
        uris = []
        for path in distinct:
            side = px * 3 // 2 if path in large else px
            uris.append(data_uri(encode_picture(open_picture(path, side), side, quality)))
        if sum(map(len, uris)) <= PICTURE_BUDGET:
            break
        util.LOG.info("pictures of %d px take too much room, making them smaller", px)
    places = {digest: place for place, digest in enumerate(first)}
    return Thumbnails(uris, {path: places[digest] for path, digest in hashes.items()}, px)
