"""Superpixels against scikit-image and a loop over segments."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import numpy as np
import pytest
from PIL import Image

from datafiles import superpixel
from modalities import MODALITIES

LEVELS = {m.name: m.slic for m in MODALITIES if m.slic}


@functools.cache
def _picture(name: str, px: int) -> np.ndarray:
    """uint8 [px, px, 3]: a photograph, or coloured waves with a hard edge."""
    if name == "photo":
        from skimage.data import astronaut

        return np.asarray(Image.fromarray(astronaut()).resize((px, px)))
    y, x = np.mgrid[:px, :px] / px
    waves = np.stack([np.sin(9 * x + 3 * y), np.cos(7 * y), x * y], axis=-1) * 90 + 110
    waves[(x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.05] = (250, 30, 60)
    return waves.clip(0, 255).astype(np.uint8)


def _texture(rgb: np.ndarray) -> np.ndarray:
    from skimage.color import rgb2lab

    return superpixel.texture(rgb2lab(rgb))


def _flat(colour: int | tuple[int, int, int], px: int = 120) -> np.ndarray:
    return np.full((px, px, 3), colour, np.uint8)


# --- segments ---------------------------------------------------------------------------------


def _plain_slic(rgb: np.ndarray, level) -> np.ndarray:
    from skimage.segmentation import slic

    return slic(
        rgb,
        n_segments=level.n_segments,
        compactness=level.compactness,
        sigma=1,
        min_size_factor=0.1,
        max_size_factor=2,
        start_label=0,
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("picture", ["photo", "waves"])
def test_segments_equal_scikit_image_label_for_label(picture, level):
    rgb = _picture(picture, 300)
    labels = superpixel.segment(superpixel.smooth_lab(rgb), LEVELS[level])
    np.testing.assert_array_equal(labels, _plain_slic(rgb, LEVELS[level]))


def test_segments_equal_scikit_image_on_low_contrast():
    """scikit-image stretches the picture before it smooths and clusters."""
    rgb = 100 + _picture("waves", 150) // 8
    level = LEVELS["superpixel_middle"]
    labels = superpixel.segment(superpixel.smooth_lab(rgb), level)
    np.testing.assert_array_equal(labels, _plain_slic(rgb, level))


def test_the_lab_is_shared_only_where_there_is_nothing_to_stretch():
    from skimage.color import rgb2lab

    full, low = _picture("photo", 100), 100 + _picture("photo", 100) // 8
    assert (full.min(), full.max()) == (0, 255)
    for rgb in (full, low):
        found = superpixel.smooth_lab(rgb, rgb2lab(rgb))
        np.testing.assert_array_equal(found, superpixel.smooth_lab(rgb))


def test_levels_grow_from_coarse_to_fine():
    assert [level.n_segments for level in LEVELS.values()] == [100, 500, 2500]
    lab = superpixel.smooth_lab(_picture("waves", 500))
    for level in LEVELS.values():
        labels = superpixel.segment(lab, level)
        count = len(np.unique(labels))
        assert labels.min() == 0 and labels.max() == count - 1
        assert 0.7 * level.n_segments < count < 1.3 * level.n_segments


def test_the_registry_levels_are_the_published_ones():
    found = [dataclasses.astuple(level) for level in LEVELS.values()]
    assert found == [(100, 30, 0.1), (500, 20, 0.3), (2500, 10, 0.5)]


# --- texture and fill -------------------------------------------------------------------------


def test_texture_is_the_chroma_gradient_in_0_to_1():
    grain = _texture(_picture("waves", 100))
    assert (grain.min(), grain.max()) == (0.0, 1.0)
    half = _flat((200, 40, 40), 60)
    half[:, 30:] = (40, 40, 200)
    edge = _texture(half)
    assert (edge[:, 29:31] == 1).all()
    assert edge[:, :28].max() < 1e-6 and edge[:, 32:].max() < 1e-6


@pytest.mark.parametrize("colour", [0, 77, 255, (200, 30, 90)])
def test_texture_of_a_constant_is_zero(colour):
    assert not _texture(_flat(colour, 40)).any()


def test_texture_of_gray_is_zero():
    gray = _picture("photo", 80).mean(2, keepdims=True).astype(np.uint8).repeat(3, axis=2)
    assert gray.std() > 10
    assert not _texture(gray).any()


def _loop_fill(rgb, labels, grain, gain) -> np.ndarray:
    """The definition, one mask per segment."""
    filled = np.zeros(rgb.shape)
    for label in np.unique(labels):
        mask = labels == label
        filled[mask] = rgb[mask].astype(np.float64).mean(0) / 255
    textured = filled * (1 + gain * grain[..., None])
    return (textured.clip(0, 1) * 255).round().astype(np.uint8)


@pytest.mark.parametrize("gain", [0.0, 0.1, 0.5])
def test_fill_equals_a_loop_over_segments(gain):
    rgb = _picture("photo", 64)
    level = dataclasses.replace(LEVELS["superpixel_few"], n_segments=20)
    labels = superpixel.segment(superpixel.smooth_lab(rgb), level)
    grain = _texture(rgb)
    filled = superpixel.fill(rgb, labels, grain, gain)
    expected = _loop_fill(rgb, labels, grain, gain)
    assert np.abs(filled.astype(int) - expected).max() <= 1  # a half may round either way
    assert (filled != expected).mean() < 1e-3
    colours = len(np.unique(filled.reshape(-1, 3), axis=0))
    assert colours <= len(np.unique(labels)) if gain == 0 else colours > len(np.unique(labels))


def test_fill_takes_labels_with_gaps():
    rgb = _picture("photo", 32)
    labels = np.where(np.arange(32)[:, None] < 16, 3, 9).repeat(32, axis=1).reshape(32, 32)
    none = np.zeros((32, 32))
    np.testing.assert_array_equal(
        superpixel.fill(rgb, labels, none, 0.1), _loop_fill(rgb, labels, none, 0.1)
    )


# --- whole pictures ---------------------------------------------------------------------------


def test_levels_of_a_picture_come_closer_to_it():
    rgb = _picture("photo", 500)
    levels = superpixel.superpixels(rgb)
    assert list(levels) == list(LEVELS)
    for filled in levels.values():
        assert (filled.shape, filled.dtype) == ((500, 500, 3), np.uint8)
    detail = [np.abs(np.diff(filled.astype(float), axis=1)).mean() for filled in levels.values()]
    assert detail == sorted(detail) and detail[0] < detail[2]


@pytest.mark.parametrize("contrast", [1, 8])
def test_levels_are_scikit_image_s_segments_filled_by_a_loop(contrast):
    """From the picture to its levels with nothing shared between them."""
    rgb = _picture("photo", 200) // contrast + 255 // contrast * (contrast > 1)
    levels = superpixel.superpixels(rgb)
    for name, level in LEVELS.items():
        expected = _loop_fill(rgb, _plain_slic(rgb, level), _texture(rgb), level.texture_gain)
        assert np.abs(levels[name].astype(int) - expected).max() <= 1
        assert (levels[name] != expected).mean() < 1e-3


@pytest.mark.parametrize("colour", [0, 128, 255, (10, 200, 90)])
def test_constant_pictures_stay_as_they_are(colour):
    rgb = _flat(colour)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        levels = superpixel.superpixels(rgb)
    for filled in levels.values():
        np.testing.assert_array_equal(filled, rgb)


def test_superpixels_are_deterministic():
    rgb = _picture("waves", 120)
    first, again = superpixel.superpixels(rgb), superpixel.superpixels(rgb.copy())
    for name in LEVELS:
        np.testing.assert_array_equal(first[name], again[name])


def test_description_holds_everything_that_determines_the_result(monkeypatch):
    before = superpixel.describe(500)
    assert before["levels"]["superpixel_large"] == [2500, 10.0, 0.5]
    for name in ("SIGMA_PX", "MIN_SIZE_FACTOR", "MAX_SIZE_FACTOR"):
        monkeypatch.setattr(superpixel, name, 7)
        assert superpixel.describe(500) != before
        monkeypatch.undo()
    assert superpixel.describe(256) != before


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 500), (800, 600), (64, 64), (1, 1)])
def test_pictures_are_brought_to_500_px(size):
    image = Image.fromarray(_picture("photo", 128)).resize(size)
    found = superpixel.at_slic_size(image, 500)
    assert (found.shape, found.dtype) == ((500, 500, 3), np.uint8)
    expected = image if size == (500, 500) else image.resize((500, 500), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found, np.asarray(expected))
