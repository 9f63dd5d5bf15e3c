"""SLIC superpixels of a picture at the registry's levels, filled with mean colour and texture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from modalities import MODALITIES, Slic

if TYPE_CHECKING:
    from PIL import Image

SIGMA_PX = 1.0
MIN_SIZE_FACTOR, MAX_SIZE_FACTOR = 0.1, 2.0


def at_slic_size(image: Image.Image, size_px: int) -> np.ndarray:
    """uint8 [size_px, size_px, 3], resized by Lanczos if the picture has another size."""
    if image.size != (size_px, size_px):
        image = image.resize((size_px, size_px), resample=1)  # 1 = Lanczos
    return np.asarray(image)


def stretched(rgb: np.ndarray) -> np.ndarray:
    """uint8 rgb [H, W, 3] as scikit-image's SLIC sees it: float64 whose extremes are 0 and 1."""
    from skimage.util import img_as_float

    image = img_as_float(rgb)
    image -= image.min()
    image /= max(image.max(), np.finfo(np.float64).tiny)
    return image


def smooth_lab(rgb: np.ndarray, lab: np.ndarray | None = None) -> np.ndarray:
    """What SLIC clusters: uint8 rgb [H, W, 3], stretched to 0..1, as smoothed Lab float64.

    ``lab``: the Lab of rgb itself, which is not computed again if there is nothing to stretch.
    """
    from skimage.color import rgb2lab
    from skimage.filters import gaussian

    if lab is None or rgb.min() > 0 or rgb.max() < 255:
        lab = rgb2lab(stretched(rgb))
    return gaussian(lab, sigma=(SIGMA_PX, SIGMA_PX, 0), mode="reflect")


def segment(lab: np.ndarray, level: Slic) -> np.ndarray:
    """SLIC labels (Achanta et al. 2012, scikit-image) of ``smooth_lab``: int64 [H, W] from 0.

    Equal to ``slic(rgb, sigma=1)``, whose preparation is done once for all levels here; only where
    colours are equal to the last bit, as in drawings, may rounding decide ties in another way.
    scikit-image stretches its input to 0..1; dividing compactness by the span keeps the distances
    in Lab units.
    """
    from skimage.segmentation import slic

    span = float(lab.max() - lab.min()) or 1.0
    return slic(
        lab,
        n_segments=level.n_segments,
        compactness=level.compactness / span,
        sigma=0,
        convert2lab=False,
        min_size_factor=MIN_SIZE_FACTOR,
        max_size_factor=MAX_SIZE_FACTOR,
        start_label=0,
    )


def texture(lab: np.ndarray) -> np.ndarray:
    """Chroma texture T of Lab float64 [H, W, 3]: float [H, W] in 0..1.

    Magnitude of the 3x3 Sobel gradients of a and b, min-max normalised; 0 for a picture without
    any.
    """
    from scipy.ndimage import sobel

    chroma = np.ascontiguousarray(np.moveaxis(lab[..., 1:], -1, 0))
    squares = sum(sobel(channel, axis=axis) ** 2 for channel in chroma for axis in (0, 1))
    magnitude = np.sqrt(squares)
    low, high = magnitude.min(), magnitude.max()
    # gray has a, b up to 0.005 in scikit-image, gradients to 0.03; one level of colour gives 1
    return (magnitude - low) / (high - low) if high - low > 0.1 else np.zeros_like(magnitude)


def fill(rgb: np.ndarray, labels: np.ndarray, grain: np.ndarray, gain: float) -> np.ndarray:
    """Each segment in its mean colour x (1 + gain * grain), clipped: uint8 [H, W, 3].

    rgb uint8 [H, W, 3]; labels int [H, W]; grain float [H, W] in 0..1. All segments at once.
    """
    flat = labels.ravel()
    size = np.maximum(np.bincount(flat), 1)
    bright = 1 + gain * grain.ravel()
    filled = np.empty(rgb.shape, np.uint8)
    for channel in range(3):  # in place: at this size, memory costs more than arithmetic
        mean = np.bincount(flat, rgb[..., channel].ravel()) / size / 255
        textured = mean[flat]
        textured *= bright
        np.clip(textured, 0, 1, out=textured)
        textured *= 255
        filled[..., channel] = np.rint(textured, out=textured).reshape(labels.shape)
    return filled


def superpixels(rgb: np.ndarray) -> dict[str, np.ndarray]:
    """The registry's superpixel modalities of a picture: {modality: uint8 [H, W, 3]}."""
    from skimage.color import rgb2lab

    lab = rgb2lab(rgb)
    smooth, grain = smooth_lab(rgb, lab), texture(lab)
    return {
        m.name: fill(rgb, segment(smooth, m.slic), grain, m.slic.texture_gain)
        for m in MODALITIES
        if m.slic is not None
    }


def describe(size_px: int) -> dict[str, object]:
    """Everything that determines the superpixels, for cache keys and manifests."""
    levels = {
        m.name: [m.slic.n_segments, m.slic.compactness, m.slic.texture_gain]
        for m in MODALITIES
        if m.slic is not None
    }
    return {
        "size_px": size_px,
        "sigma_px": SIGMA_PX,
        "min_size_factor": MIN_SIZE_FACTOR,
        "max_size_factor": MAX_SIZE_FACTOR,
        "levels": levels,
    }
