"""pictures: PNG and JPEG of every kind as upright RGB; all else refused by name, undecoded."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from datafiles import pictures
from datafiles.pictures import PictureError, picture_size, read_picture
from util import DataError


def _ramp(px: int = 64) -> np.ndarray:
    """uint8 [px, px, 3]: no two corners alike."""
    y, x = np.mgrid[:px, :px] * 255 // px
    return np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)


def _saved(folder, name: str, image: Image.Image, **options):
    path = folder / name
    image.save(path, **options)
    return path


def _colour(path) -> list[int]:
    return np.asarray(read_picture(path))[0, 0].tolist()


MODES = {
    "CMYK": (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "a.jpg", (255, 0, 0)),
    "gray": (Image.new("L", (8, 6), 90), "a.png", (90, 90, 90)),
    "gray JPEG": (Image.new("L", (8, 6), 90), "a.jpeg", (90, 90, 90)),
    "bits": (Image.new("1", (8, 6), 1), "a.png", (255, 255, 255)),
    "RGBA": (Image.new("RGBA", (8, 6), (9, 99, 199, 255)), "a.png", (9, 99, 199)),
    "gray with alpha": (Image.new("LA", (8, 6), (60, 255)), "a.png", (60, 60, 60)),
    "palette": (
        Image.new("RGB", (8, 6), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE),
        "a.png",
        (10, 20, 30),
    ),
    "16 bits": (Image.fromarray(np.full((6, 8), 90 * 257, np.uint16)), "a.png", (90, 90, 90)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    image, name, colour = MODES[mode]
    path = _saved(tmp_path, name, image)
    found = read_picture(path)
    assert (found.mode, found.size, picture_size(path)) == ("RGB", (8, 6), (8, 6))
    np.testing.assert_allclose(np.asarray(found), np.broadcast_to(colour, (6, 8, 3)), atol=2)


def test_16_bit_pictures_keep_their_shades(tmp_path):
    """Pillow's own conversion clips them to white."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    found = np.asarray(read_picture(_saved(tmp_path, "a.png", Image.fromarray(ramp))))
    np.testing.assert_array_equal(found[0, :, 1], np.arange(256))


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def _png(width: int, height: int, bits: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG by hand; ``rows``: uncompressed, each with its filter byte."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + body + _chunk(b"IEND", b"")


def test_16_bit_colours_keep_their_upper_8(tmp_path):
    rows = (b"\0" + struct.pack(">3H", 0x10FF, 0x2000, 0xFE01) * 2) * 2
    (tmp_path / "a.png").write_bytes(_png(2, 2, 16, 2, rows))
    assert _colour(tmp_path / "a.png") == [0x10, 0x20, 0xFE]


def test_transparent_parts_lie_over_white(tmp_path):
    half = _saved(tmp_path, "half.png", Image.new("RGBA", (4, 4), (0, 100, 200, 128)))
    np.testing.assert_allclose(_colour(half), [127, 177, 227], atol=1)
    hidden = _saved(tmp_path, "hidden.png", Image.new("LA", (4, 4), (0, 0)))
    assert _colour(hidden) == [255, 255, 255]
    indexed = Image.new("P", (4, 4), 0)
    indexed.putpalette([9, 8, 7, 1, 2, 3])
    path = _saved(tmp_path, "indexed.png", indexed, transparency=0)
    assert _colour(path) == [255, 255, 255]
    keyed = _saved(tmp_path, "k.png", Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert _colour(keyed) == [255, 255, 255]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    pixels = _ramp()[:48]
    turned = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.transpose(1, 0, 2), 6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    name = f"a.{suffix}"
    path = _saved(tmp_path, name, Image.fromarray(pixels), exif=exif, quality=95)
    found = np.asarray(read_picture(path)).astype(int)
    assert found.shape == turned[orientation].shape
    assert np.abs(found - turned[orientation]).mean() < 3


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_exif_that_says_nothing_turns_nothing(tmp_path, value):
    directory = ImageFileDirectory_v2()
    directory[0x0112] = value
    buffer = io.BytesIO()
    directory.save(buffer)
    image = Image.fromarray(_ramp())
    path = _saved(tmp_path, "a.png", image, exif=b"Exif\0\0" + buffer.getvalue())
    np.testing.assert_array_equal(np.asarray(read_picture(path)), _ramp())
    path = _saved(tmp_path, "b.png", image, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(read_picture(path)), _ramp())


# --- refused ------------------------------------------------------------------------------------


def _damaged(folder, kind: str):
    whole = _saved(folder, "whole.png", Image.fromarray(_ramp())).read_bytes()
    path = folder / f"{kind}.png"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        content = {"empty": b"", "text": b"not a picture", "truncated": whole[: len(whole) // 2]}
        path.write_bytes(content[kind])
    return path


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "folder", "missing"])
def test_unreadable_files_are_named(tmp_path, kind):
    with pytest.raises(PictureError, match=f"{kind}.png"):
        read_picture(_damaged(tmp_path, kind))


def test_truncated_jpeg_is_named(tmp_path):
    path = _saved(tmp_path, "cut.jpg", Image.fromarray(_ramp()), quality=95)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(PictureError, match=r"cut\.jpg"):
        read_picture(path)


@pytest.mark.parametrize("side", [8001, 12_000, 20_000])  # our limit, and two of Pillow's own
@pytest.mark.parametrize("read", [read_picture, picture_size])
def test_oversized_pictures_are_named_and_not_decoded(tmp_path, side, read, recwarn):
    path = tmp_path / "huge.png"
    path.write_bytes(_png(side, side, 8, 2, b"\0"))  # nothing there to decode
    with pytest.raises(PictureError, match=r"huge\.png[^?]*pixels") as refused:
        read(path)
    assert str(refused.value).count("huge.png") == 1
    assert not recwarn.list


OTHERS = {
    "GIF": "a GIF", "TIFF": "a TIFF", "BMP": "a BMP", "WEBP": "a WebP", "PDF": "a PDF",
    "EPS": "PostScript", "ICO": "neither", "PPM": "neither",
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_reach_no_decoder_whatever_their_name(tmp_path, kind, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(_ramp()).save(path, format=kind)
    Image.init()
    asked = []
    for name, (_, accept) in list(Image.OPEN.items()):
        if name not in pictures.FORMATS:
            noted = (lambda *given, name=name: asked.append(name), accept)
            monkeypatch.setitem(Image.OPEN, name, noted)
    with pytest.raises(PictureError, match=OTHERS[kind]):
        read_picture(path)
    assert asked == []
    with pytest.raises((OSError, TypeError, AttributeError)):  # it would have been asked
        Image.open(path).load()
    assert asked


def test_an_animation_is_refused_by_the_number_of_its_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    path = _saved(tmp_path, "a.png", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(PictureError, match="an animation of 3 frames"):
        read_picture(path)


def test_the_first_picture_of_an_mpo_counts(tmp_path):
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    path = tmp_path / "a.jpg"
    red.save(path, format="MPO", save_all=True, append_images=[blue])
    np.testing.assert_allclose(_colour(path), [255, 0, 0], atol=3)


def _bombs() -> dict[str, bytes]:
    """100 MB of zeros packed into the metadata of a tiny picture."""
    packed = zlib.compress(bytes(100_000_000))
    rows = b"\0" + bytes(3)
    chunks = {
        "zTXt": _chunk(b"zTXt", b"Comment\0\0" + packed),
        "iTXt": _chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed),
        "iCCP": _chunk(b"iCCP", b"profile\0\0" + packed),
    }
    return {name: _png(1, 1, 8, 2, rows, chunk) for name, chunk in chunks.items()}


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_bombs_in_metadata_are_not_unpacked(tmp_path, kind, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(_bombs()[kind])
    longest = []
    unpack = PngImagePlugin._safe_zlib_decompress

    def noted(packed: bytes) -> bytes:
        text = unpack(packed)
        longest.append(len(text))
        return text

    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", noted)
    with contextlib.suppress(PictureError):
        assert read_picture(tmp_path / "bomb.png").size == (1, 1)
    assert max(longest, default=0) <= PngImagePlugin.MAX_TEXT_CHUNK


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(PictureError, match="not a file"):
        read_picture(tmp_path / "a.png")


def test_the_error_comes_whole_out_of_another_process(tmp_path):
    with pytest.raises(PictureError) as caught:
        read_picture(tmp_path / "none.png")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (PictureError, str(caught.value))
    error = DataError("a", 1, "b", "c")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_jpeg_of_endless_scans_is_not_decoded(tmp_path):
    """Each scan passes over all pixels: 100 kB that would take minutes."""
    path = _saved(tmp_path, "a.jpg", Image.new("RGB", (7000, 7000)), progressive=True, quality=10)
    whole = path.read_bytes()
    assert read_picture(path).size == (7000, 7000)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    path.write_bytes(whole[:-2] + last * 100 + whole[-2:])
    with pytest.raises(PictureError, match="scans of 7000 x 7000 pixels"):
        read_picture(path)
