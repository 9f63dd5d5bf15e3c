"""metrics: retrieval, pictures and intervals by hand and against other implementations."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import normal
from PIL import Image

import metrics


def _ranked(ranks: list[int], gallery: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query, gallery, truth) in which query i finds its true item, i, at rank ``ranks[i]``."""
    angles = torch.empty(len(ranks), gallery, dtype=torch.float64)
    for row, rank in enumerate(ranks):
        order = [item for item in range(gallery) if item != row]
        order.insert(rank - 1, row)
        angles[row, order] = torch.arange(gallery, 0, -1, dtype=torch.float64)
    # cosines with an orthonormal gallery are the normalised scores themselves
    return angles, torch.eye(gallery, dtype=torch.float64), torch.arange(len(ranks))


def test_retrieval_of_ranks_one_to_ten():
    scores = metrics.retrieval_topk(*_ranked(list(range(1, 11)), 10), ks=(2, 4, 10, 50))
    assert scores["top1"] == pytest.approx(0.1)
    assert scores["top5"] == pytest.approx(0.5)
    assert scores["mrr"] == pytest.approx(0.29290, abs=1e-5)
    for k in (2, 4, 10):
        assert scores[f"{k}-way"] == pytest.approx(1 / k)
    assert "50-way" not in scores
    assert (scores["n"], scores["gallery"]) == (10, 10)


@pytest.mark.parametrize("gallery", [10, 200])
def test_constant_similarity_is_chance(gallery):
    query, features = torch.ones(7, 4), torch.ones(gallery, 4)
    scores = metrics.retrieval_topk(query, features, torch.arange(7), ks=(2, 4, 10))
    assert scores["top1"] == pytest.approx(1 / gallery)
    assert scores["top5"] == pytest.approx(5 / gallery)
    for k in (2, 4, 10):
        assert scores[f"{k}-way"] == pytest.approx(1 / k)


def test_perfect_and_worst_retrieval():
    perfect = metrics.retrieval_topk(*_ranked([1] * 6, 12), ks=(2, 12))
    worst = metrics.retrieval_topk(*_ranked([12] * 6, 12), ks=(2, 12))
    for key in ("top1", "top5", "2-way", "12-way"):
        assert (perfect[key], worst[key]) == (1.0, 0.0)
    assert perfect["mrr"] == 1.0
    assert worst["mrr"] == pytest.approx(1 / 12)


def _brute_k_way(similarity: np.ndarray, own: int, k: int) -> float:
    """Top-1 chance over every set of k - 1 distractors, ties shared."""
    others = [value for index, value in enumerate(similarity) if index != own]
    wins = []
    for drawn in itertools.combinations(others, k - 1):
        better = sum(value > similarity[own] for value in drawn)
        tied = sum(value == similarity[own] for value in drawn)
        wins.append(0.0 if better else 1 / (1 + tied))
    return float(np.mean(wins))


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_k_way_is_the_mean_over_all_distractor_sets(k):
    similarity = np.random.default_rng(0).integers(0, 5, (6, 8)).astype(np.float32)
    better, tied = metrics.ranks(torch.from_numpy(similarity), torch.arange(6))
    assert tied.sum() > 2
    found = metrics.k_way_probability(better, tied, 8, k)
    expected = [_brute_k_way(similarity[row], row, k) for row in range(6)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("k", [2, 10, 50])
def test_k_way_agrees_with_sampling_and_the_hypergeometric_formula(k):
    gallery, rng = 200, np.random.default_rng(1)
    for rank in (0, 3, 40):
        chance = metrics.k_way_probability(torch.tensor([rank]), torch.tensor([0]), gallery, k)
        exact = math.comb(199 - rank, k - 1) / math.comb(199, k - 1)
        assert chance.item() == pytest.approx(exact, rel=1e-9)
        draws = rng.random((3000, 199)).argsort(1)[:, : k - 1]
        assert (draws >= rank).all(1).mean() == pytest.approx(exact, abs=0.04)


def test_top_k_shares_ties():
    better, tied = torch.tensor([0, 0, 3, 5, 4]), torch.tensor([0, 3, 3, 0, 1])
    top5 = metrics.top_k_probability(better, tied, 5)
    np.testing.assert_allclose(top5.numpy(), [1, 1, 0.5, 0, 0.5])
    top1 = metrics.top_k_probability(better, tied, 1)
    np.testing.assert_allclose(top1.numpy(), [1, 0.25, 0, 0, 0])


def test_swapped_rows_lower_retrieval():
    features = normal(60, 32)
    query = features + 0.5 * normal(60, 32, seed=1)
    right = metrics.retrieval_topk(query, features, torch.arange(60))
    wrong = metrics.retrieval_topk(query.roll(1, 0), features, torch.arange(60))
    assert right["top1"] > 0.9 and right["2-way"] > 0.99
    assert wrong["top1"] < 0.1 and wrong["2-way"] < 0.65


def test_truth_names_gallery_rows_and_lengths_do_not_count():
    features, order = normal(20, 8), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    length = torch.linspace(0.1, 50, 20)[:, None]
    scores = metrics.retrieval_topk(features[order] * 3, features * length, order)
    assert scores["top1"] == 1.0


def test_equal_rows_tie():
    row = normal(1, 1024)
    cosines = metrics.cosine_similarity(normal(3, 1024, seed=1), row.repeat(50, 1))
    assert (cosines == cosines[:, :1]).all()


def test_wrong_retrieval_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[Q, D\] and \[G, D\]"):
        metrics.cosine_similarity(torch.zeros(3, 4), torch.zeros(3, 1, 4))
    with pytest.raises(ValueError, match=r"\[Q, G\] and \[Q\]"):
        metrics.ranks(torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="11-way"):
        metrics.k_way_probability(torch.zeros(1), torch.zeros(1), 10, 11)


def _pictures(n: int = 3, px: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed))


def test_pix_corr_of_affine_negative_and_flat_pictures():
    truth = _pictures()
    np.testing.assert_allclose(metrics.pix_corr(truth, 0.3 * truth + 0.2), 1, atol=1e-6)
    np.testing.assert_allclose(metrics.pix_corr(truth, 1 - truth), -1, atol=1e-6)
    flat = torch.full_like(truth, 0.37)
    assert np.isnan(metrics.pix_corr(truth, flat)).all()
    assert np.isnan(metrics.pix_corr(flat, truth)).all()


def test_pix_corr_equals_numpy_and_keeps_pairs():
    truth, drawn = _pictures(), _pictures(seed=1)
    drawn[1] = truth[1]
    expected = [
        np.corrcoef(a.flatten().double(), b.flatten().double())[0, 1]
        for a, b in zip(truth, drawn, strict=True)
    ]
    found = metrics.pix_corr(truth, drawn)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found.argmax() == 1


def test_ssim_of_constants_is_the_closed_form():
    quarter, most = torch.full((1, 3, 32, 32), 0.25), torch.full((1, 3, 32, 32), 0.75)
    assert metrics.ssim(quarter, most)[0] == pytest.approx(0.60006399, abs=1e-6)
    np.testing.assert_allclose(metrics.ssim(_pictures(), _pictures()), 1, atol=1e-6)


def test_ssim_equals_scikit_image_s():
    from skimage.color import rgb2gray
    from skimage.metrics import structural_similarity

    truth, drawn = _pictures(2).double(), _pictures(2, seed=1).double()
    for row in range(2):
        a, b = (rgb2gray(x[row].permute(1, 2, 0).numpy()) for x in (drawn, truth))
        expected = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
        )
        assert metrics.ssim(truth, drawn)[row] == pytest.approx(expected, abs=1e-12)


def test_noise_lowers_both_scores():
    truth = metrics.prepared(_gradient(), 425, "mindeye")[None]
    drawn = [(truth + s * normal(*truth.shape)).clamp(0, 1) for s in (0.02, 0.1, 0.5)]
    for score in (metrics.pix_corr, metrics.ssim):
        values = [score(truth, noisy)[0] for noisy in drawn]
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1] + 0.1


def _gradient() -> np.ndarray:
    return np.asarray(Image.linear_gradient("L").convert("RGB"))


def test_mindeye_scales_to_425_by_way_of_256():
    picture = np.random.default_rng(0).integers(0, 256, (500, 300, 3), dtype=np.uint8)
    found = metrics.prepared(picture, 425, "mindeye")
    assert (found.shape, found.dtype) == ((3, 425, 425), torch.float32)
    assert found.min() >= 0 and found.max() <= 1
    small = np.asarray(Image.fromarray(picture).resize((256, 256), Image.Resampling.BILINEAR))
    direct = torch.tensor(small).permute(2, 0, 1)[None].float() / 255
    direct = F.interpolate(direct, (425, 425), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[None], direct, atol=0.01, rtol=0)


def test_mindeye_resizes_as_torchvision_does():
    from torchvision.transforms.functional import resize

    picture = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    start = resize(torch.tensor(picture).permute(2, 0, 1).float() / 255, [256, 256], antialias=True)
    for size in (224, 256, 342):
        found = metrics.prepared(picture, size, "mindeye")
        torch.testing.assert_close(found, resize(start, [size, size], antialias=True))


def test_braindiffuser_resizes_8_bits_by_pillow():
    picture = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    image = Image.fromarray(picture)
    for network, kind in ((True, Image.Resampling.BILINEAR), (False, Image.Resampling.BICUBIC)):
        found = metrics.prepared(picture, 224, "braindiffuser", for_network=network)
        expected = np.asarray(image.resize((224, 224), kind)) / np.float32(255)
        np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)
    mindeye = metrics.prepared(picture, 224, "mindeye")
    assert (found - mindeye).abs().max() > 0.05, "the two protocols are different numbers"


def test_prepared_takes_pil_arrays_in_silence():
    array = np.asarray(Image.new("RGB", (32, 32), (255, 0, 51)))
    assert not array.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.prepared(array, 425, "mindeye")
    torch.testing.assert_close(found[:, 200, 200], torch.tensor([1.0, 0.0, 0.2]))


@pytest.mark.parametrize(
    "picture",
    [np.zeros((8, 8, 3)), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((3, 8, 8), np.uint8)],
)
def test_other_arrays_are_refused(picture):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        metrics.prepared(picture, 425, "mindeye")


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="mindeye, braindiffuser"):
        metrics.prepared(np.zeros((8, 8, 3), np.uint8), 425, "best")


def test_bootstrap_interval_covers_the_mean_as_often_as_stated():
    rng, hits, widths = np.random.default_rng(0), 0, []
    for trial in range(200):
        low, high = metrics.bootstrap_interval(rng.normal(3, 2, 50), trial, draws=400)
        hits += low <= 3 <= high
        widths.append(high - low)
    assert 0.88 <= hits / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / 50**0.5, rel=0.1)


def test_bootstrap_interval_is_seeded_and_zero_wide_for_constants():
    values = np.random.default_rng(0).random(30)
    assert metrics.bootstrap_interval(values, 1) == metrics.bootstrap_interval(values, 1)
    assert metrics.bootstrap_interval(values, 1) != metrics.bootstrap_interval(values, 2)
    assert metrics.bootstrap_interval(np.full(9, 0.5), 0) == (0.5, 0.5)


def test_a_prediction_of_nothing_is_no_hit():
    """No item is above NaN: as a number it would be the best of all."""
    similarity = torch.eye(4)
    similarity[2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        metrics.ranks(similarity, torch.arange(4))
