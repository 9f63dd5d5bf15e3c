"""Pictures from anyone: PNG and JPEG files, read as upright RGB or refused by name.

What a picture becomes: its first bytes must be those of a PNG or a JPEG, whatever its name, so that
no other decoder of Pillow ever sees it. Transparent parts lie over white. 16 bits keep their upper
8, CMYK and palettes are converted, EXIF's orientation is applied. Of a JPEG that holds several
pictures (MPO: previews, gain maps) the first counts; an animation is refused, as nobody can say
which of its frames was shown. Colour profiles and all other metadata are ignored.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from util import DataError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000  # a picture that unpacks to more is refused, not decoded
MAX_SCANNED = 1_000_000_000  # pixels times scans of a progressive JPEG, each of which takes time
FORMATS = ("PNG", "JPEG")
_ORIENTATION = 0x0112
_SIGNATURES = {
    b"GIF8": "a GIF", b"RIFF": "a WebP", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"BM": "a BMP",
    b"8BPS": "a Photoshop file", b"%!PS": "PostScript", b"%PDF": "a PDF", b"<": "a page or an SVG",
    b"\0\0\0\x0cjP": "a JPEG 2000", b"version https://git-lfs": "a Git LFS pointer",
}  # fmt: skip
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


class PictureError(DataError):
    """A picture file that cannot be read as an RGB picture."""

    def __init__(self, path: Path, found: object) -> None:
        super().__init__(
            path,
            found,
            f"a whole, still PNG or JPEG picture of at most {MAX_PIXELS:,} pixels",
            "replace it by a readable one, or remove it with its EEG rows",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.where, self.found)


def _named_by_its_bytes(path: Path) -> str:
    """What a file is that is neither PNG nor JPEG. May raise OSError."""
    with open(path, "rb") as file:
        begin = file.read(32)
    if not begin:
        return "an empty file"
    if begin[4:8] == b"ftyp":
        return "a HEIC, AVIF or film"
    kinds = (kind for bytes_, kind in _SIGNATURES.items() if begin.startswith(bytes_))
    return f"{next(kinds, 'neither PNG nor JPEG')}, or damaged in its first bytes"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture's header, checked; decoding it may raise PictureError, too."""
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():  # a pipe or a device would be waited for
        raise PictureError(path, "no such file" if not Path(path).exists() else "not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of oversized ones, which are refused here
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(path, f"{image.width} x {image.height} pixels")
            if image.format == "PNG" and (frames := getattr(image, "n_frames", 1)) > 1:
                raise PictureError(path, f"an animation of {frames} frames")
            yield image
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(path, _named_by_its_bytes(path)) from None
    except Image.DecompressionBombError as error:
        raise PictureError(path, f"too many pixels ({error})") from None
    except _DAMAGED as error:
        raise PictureError(path, f"unreadable ({error or type(error).__name__})") from None


def read_picture(path: Path) -> Image.Image:
    """An RGB picture at its own size. Raises PictureError, before decoding what is too large."""
    from PIL import Image

    with _opened(path) as image:
        if image.format != "PNG":
            _refuse_many_scans(path, image)
        image.load()
        turned = _upright(image)
        if turned.mode.startswith("I"):  # 16 bits: Pillow's convert would clip them to white
            turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
        if "A" in turned.getbands() or "transparency" in turned.info:
            return _over_white(turned.convert("RGBA"))
        return turned.convert("RGB")


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) as stored, from the header alone. Raises PictureError."""
    with _opened(path) as image:
        return image.size


def _refuse_many_scans(path: Path, image: Image.Image) -> None:
    """Raise PictureError for a small file that would be decoded for minutes."""
    scans = Path(path).read_bytes().count(b"\xff\xda")
    if scans * image.width * image.height > MAX_SCANNED:
        raise PictureError(path, f"{scans} scans of {image.width} x {image.height} pixels")


def _upright(image: Image.Image) -> Image.Image:
    """As EXIF says that it should be turned; EXIF that is damaged says nothing."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    with contextlib.suppress(*_DAMAGED), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF
        orientation = image.getexif().get(_ORIENTATION)
        if isinstance(orientation, int) and orientation in turns:
            return image.transpose(turns[orientation])
    return image


def _over_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    page = Image.new("RGB", image.size, "white")
    page.paste(image, mask=image)
    return page


def read_pixels(path: Path) -> np.ndarray:
    """A picture file as uint8 [H, W, 3]. Raises PictureError."""
    return np.asarray(read_picture(path))
