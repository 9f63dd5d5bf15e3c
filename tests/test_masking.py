"""masking: what is hidden, how often, and that the rest stays."""

from __future__ import annotations

import pytest
import torch
from builders import normal

from masking import Masking, keep_mask, mask_eeg


def _drawn(masking: Masking, shape=(400, 20, 100), seed: int = 0) -> torch.Tensor:
    return ~keep_mask(shape, masking, torch.Generator().manual_seed(seed))


def test_channels_are_masked_whole_and_as_often_as_stated():
    masked = _drawn(Masking(channel=0.3))
    assert masked.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(masked.all(2), masked.any(2))
    assert 0 < masked[0, :, 0].float().mean() < 1  # drawn per sample and channel


def test_spans_are_masked_in_all_channels():
    masked = _drawn(Masking(time=0.4, span=25))
    assert masked.float().mean().item() == pytest.approx(0.4, abs=0.04)
    assert torch.equal(masked.all(1), masked.any(1))
    tiles = masked[:, 0].unflatten(1, (4, 25))
    assert torch.equal(tiles.all(2), tiles.any(2))
    assert not torch.equal(tiles[:, 0], tiles[:, 1])


def test_patches_are_masked_in_one_channel():
    masked = _drawn(Masking(patch=0.2, span=10))
    assert masked.float().mean().item() == pytest.approx(0.2, abs=0.02)
    tiles = masked.unflatten(2, (10, 10))
    assert torch.equal(tiles.all(3), tiles.any(3))
    assert not torch.equal(tiles[:, 0], tiles[:, 1])


def test_masks_combine_independently():
    masked = _drawn(Masking(channel=0.2, time=0.3, patch=0.1, span=20))
    assert masked.float().mean().item() == pytest.approx(1 - 0.8 * 0.7 * 0.9, abs=0.03)


@pytest.mark.parametrize("times", [1, 24, 26, 250])
def test_spans_fit_any_length(times):
    masked = _drawn(Masking(time=0.5), (3, 2, times))
    assert masked.shape == (3, 2, times)


@pytest.mark.parametrize("kind", ["channel", "time", "patch"])
def test_mask_puts_zeros_and_leaves_its_input(kind):
    eeg = 1 + normal(50, 8, 100).abs()
    before = eeg.clone()
    masked = mask_eeg(eeg, Masking(**{kind: 0.5}), torch.Generator().manual_seed(0))
    assert torch.equal(eeg, before)
    zero = masked == 0
    assert 0.3 < zero.float().mean() < 0.7
    assert torch.equal(masked[~zero], eeg[~zero])


def test_extreme_probabilities():
    eeg = 1 + normal(4, 3, 60).abs()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(mask_eeg(eeg, Masking(), generator), eeg)
    assert not Masking().active
    for kind in ("channel", "time", "patch"):
        assert not mask_eeg(eeg, Masking(**{kind: 1.0}), generator).any()


def test_masks_are_seeded():
    masking = Masking(channel=0.5, patch=0.5)
    assert torch.equal(_drawn(masking, seed=3), _drawn(masking, seed=3))
    assert not torch.equal(_drawn(masking, seed=3), _drawn(masking, seed=4))


@pytest.mark.parametrize("wrong", [{"channel": -0.1}, {"time": 1.1}, {"patch": 2}, {"span": 0}])
def test_impossible_masks_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Masking(**wrong)


def test_mask_wants_batches():
    with pytest.raises(ValueError, match=r"\[B, C, T\]"):
        mask_eeg(torch.zeros(8, 100), Masking(channel=0.5), torch.Generator())
