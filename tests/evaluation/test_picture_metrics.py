"""Picture scores against closed forms and against the libraries of the field."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metrics
from evaluation import picture_scores, tables


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- two-way identification and distances -------------------------------------------------------


def test_two_way_of_identity_swap_and_a_known_case():
    eye = torch.eye(5)
    np.testing.assert_array_equal(metrics.two_way(eye, eye), 1)
    np.testing.assert_array_equal(metrics.two_way(eye, eye.roll(1, 0)), 0)
    drawn = torch.tensor([[1, 0.5, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(metrics.two_way(torch.eye(3), drawn), [1, 0, 1])


def test_a_cyclic_shift_of_two_opposites_scores_0():
    truth = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0.1]])
    np.testing.assert_array_equal(metrics.two_way(truth, truth.flip(0)), 0)


def test_identical_pictures_score_half_in_the_right_direction():
    """Swapped rows and columns would score them 0: METRICS' third trap."""
    truth, same = _normal(20, 16), _normal(1, 16, seed=1).expand(20, -1)
    assert metrics.two_way(truth, same).mean() == pytest.approx(0.5)


def test_two_way_is_the_published_loop():
    truth, drawn = _normal(12, 40), _normal(12, 40) + 2 * _normal(12, 40, seed=1)
    corr = np.corrcoef(truth.numpy(), drawn.numpy())[:12, 12:]
    success = corr < np.diag(corr)[None, :]
    np.testing.assert_allclose(metrics.two_way(truth, drawn), success.sum(0) / 11)


def test_two_way_knows_whose_sample_a_picture_is():
    truth = _normal(6, 30)
    owner = torch.tensor([0, 0, 3, 5])
    np.testing.assert_array_equal(metrics.two_way(truth, truth[owner], owner), 1)
    assert metrics.two_way(truth, truth[owner], (owner + 1) % 6).mean() < 0.7


def test_correlations_in_pieces_equal_numpy(monkeypatch):
    truth, drawn = _normal(4, 101) + 5, _normal(3, 101, seed=1) * 9
    expected = np.corrcoef(truth.numpy(), drawn.numpy())[:4, 4:]
    for width in (7, 1 << 14):
        monkeypatch.setattr(metrics, "_DIMENSIONS_AT_ONCE", width)
        found = metrics.correlation_matrix(truth, drawn)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_a_flat_picture_is_nan_not_a_loss():
    truth = _normal(4, 8)
    drawn = truth.clone()
    drawn[2] = 0.5
    found = metrics.two_way(truth, drawn)
    assert np.isnan(found).tolist() == [False, False, True, False]
    assert np.isnan(metrics.correlation_distance(truth, drawn)).tolist() == [
        False, False, True, False]  # fmt: skip


def test_correlation_distance_of_self_negative_and_scipy():
    from scipy.spatial.distance import correlation

    rows, others = _normal(5, 20), _normal(5, 20, seed=1)
    np.testing.assert_allclose(metrics.correlation_distance(rows, rows), 0, atol=1e-12)
    np.testing.assert_allclose(metrics.correlation_distance(rows, -rows), 2, atol=1e-12)
    expected = [correlation(a.double(), b.double()) for a, b in zip(rows, others, strict=True)]
    np.testing.assert_allclose(metrics.correlation_distance(rows, others), expected, atol=1e-12)


def test_psnr_of_a_known_error():
    truth = torch.full((2, 3, 4, 4), 0.5)
    np.testing.assert_allclose(metrics.psnr(truth, truth + 0.1), 20, atol=1e-5)


# --- FID ----------------------------------------------------------------------------------------


def exact_moments(mean: list[float], variances: list[float]) -> torch.Tensor:
    """Rows whose sample mean and unbiased covariance are exactly these, diagonal: [16, d]."""
    signs = np.array([[1 if bits >> k & 1 else -1 for k in range(4)] for bits in range(16)])
    rows = signs * np.sqrt(np.array(variances) * 15 / 16) + np.array(mean)
    return torch.from_numpy(rows)


S1, S2, MU = [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 1.0, 0.5], [1.0, 0.0, -2.0, 0.5]


@pytest.mark.parametrize("padding", [0, 100])
def test_fid_of_exact_moments(padding):
    """22.5 by the closed form, also where rows are fewer than dimensions."""
    truth, drawn = exact_moments([0.0] * 4, S1), exact_moments(MU, S2)
    expected = sum(m * m for m in MU) + sum(
        a + b - 2 * np.sqrt(a * b) for a, b in zip(S1, S2, strict=True)
    )
    zeros = torch.zeros(16, padding, dtype=torch.float64)
    found = metrics.frechet_distance(torch.cat([truth, zeros], 1), torch.cat([drawn, zeros], 1))
    assert found == pytest.approx(expected, rel=1e-9)


def test_fid_oracle_of_the_field():
    """METRICS: s1 = (1, 2, 3, 4), s2 = (2, 2, 1, .5) are deviations: 22.5."""
    squares = [[s * s for s in values] for values in (S1, S2)]
    truth, drawn = exact_moments([0.0] * 4, squares[0]), exact_moments(MU, squares[1])
    assert metrics.frechet_distance(truth, drawn) == pytest.approx(22.5, rel=1e-9)
    assert metrics.frechet_distance(truth, truth) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [(60, 16), (20, 64)])
def test_fid_equals_scipy_torchmetrics_and_torch_fidelity(n, d):
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    truth, drawn = _normal(n, d) + 3, 1.3 * _normal(n, d, seed=1) + 2.8
    found = metrics.frechet_distance(truth, drawn)
    covariances = [np.cov(x.double().numpy().T) for x in (truth, drawn)]
    shift = (truth.double().mean(0) - drawn.double().mean(0)).square().sum()
    trace = np.trace(sum(covariances)) - 2 * np.trace(sqrtm(covariances[0] @ covariances[1]).real)
    assert found == pytest.approx(float(shift + trace), rel=1e-4)
    theirs = FrechetInceptionDistance(feature=_Features(d), input_img_size=(1, 1, d))
    theirs.set_dtype(torch.float64)
    theirs.update(truth.double(), real=True)
    theirs.update(drawn.double(), real=False)
    assert found == pytest.approx(float(theirs.compute()), rel=1e-5)
    statistics = [fid_features_to_statistics(x) for x in (truth, drawn)]
    fidelity = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert found == pytest.approx(fidelity, rel=1e-4)


class _Features(torch.nn.Module):
    """Hands features through, for torchmetrics, which expects a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(-1, self.num_features)


def test_both_ways_to_fid_agree():
    truth, drawn = _normal(50, 30).double(), _normal(40, 30, seed=1).double() * 2
    products = metrics._frechet_of_products(*metrics._products(truth, drawn))
    assert metrics.frechet_distance(truth, drawn) == pytest.approx(products, rel=1e-9)


# --- KID, IS ------------------------------------------------------------------------------------


def test_kid_oracles():
    ones, others = torch.tensor([[1.0, 0.0]] * 5), torch.tensor([[0.0, 1.0]] * 4)
    assert metrics.kernel_distance(ones, others) == pytest.approx(4.75)
    truth = torch.tensor([[0.0, 0], [1, 0], [0, 2]])
    assert metrics.kernel_distance(truth, torch.tensor([[1.0, 1], [2, 0]])) == pytest.approx(
        37 / 24
    )
    assert metrics.kernel_distance(_normal(30, 8), _normal(30, 8)) < 0


def test_kid_equals_torch_fidelity_on_one_whole_subset():
    from torch_fidelity.metric_kid import kid_features_to_metric

    truth, drawn = _normal(40, 12), 1.5 * _normal(40, 12, seed=1)
    theirs = kid_features_to_metric(truth, drawn, kid_subsets=1, kid_subset_size=40, verbose=False)
    assert metrics.kernel_distance(truth, drawn) == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-6
    )


def _confident(classes: torch.Tensor, number: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes, number) * 200.0


def test_inception_score_oracles():
    assert metrics.inception_score(torch.zeros(30, 7), 1) == pytest.approx(1)
    ten = torch.arange(10).repeat(5)
    assert metrics.inception_score(_confident(ten, 10), 1) == pytest.approx(10)
    every = _confident(torch.arange(200), 200)
    assert metrics.inception_score(every, 1) == pytest.approx(200)
    assert metrics.inception_score(every, 10) == pytest.approx(20)
    assert metrics.inception_score_bound(200, 1008, 10) == 20
    two = torch.log(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    assert metrics.inception_score(two, 1) == pytest.approx(1.44493481, abs=1e-8)


def test_inception_score_equals_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * _normal(60, 20)
    for splits in (1, 10):
        theirs = isc_features_to_metric(logits, splits=splits, shuffle=False)
        found = metrics.inception_score(logits, splits)
        assert found == pytest.approx(theirs["inception_score_mean"], rel=1e-5)


def test_the_published_is_cannot_come_from_ten_splits_of_200():
    assert metrics.inception_score_bound(200, 1008, 10) < 31.41


# --- intervals and tests ------------------------------------------------------------------------


def test_intervals_of_distributions_hold_the_value_and_are_seeded():
    truth, drawn = _normal(40, 24), 0.5 + _normal(40, 24, seed=1)
    owner = np.arange(40)
    for score, interval in (
        (metrics.frechet_distance, metrics.frechet_interval),
        (metrics.kernel_distance, metrics.kernel_interval),
    ):
        low, high = interval(truth, drawn, owner, 0)
        assert low < score(truth, drawn) < high
        assert (low, high) == interval(truth, drawn, owner, 0) != interval(truth, drawn, owner, 1)
    logits = 3 * _normal(40, 10)
    low, high = metrics.inception_interval(logits, owner, 1, 0)
    assert low < metrics.inception_score(logits, 1) < high


def test_kid_s_interval_covers_0_for_one_distribution_and_not_for_two():
    same, other = _normal(80, 8, seed=1), 0.7 + _normal(80, 8, seed=2)
    truth, owner = _normal(80, 8), np.arange(80)
    low, high = metrics.kernel_interval(truth, same, owner, 0)
    assert low < 0 < high
    assert metrics.kernel_interval(truth, other, owner, 0)[0] > 0


def test_all_samples_of_a_stimulus_are_resampled_together():
    rng = np.random.default_rng(0)
    owner = np.array([0, 0, 1, 2, 2, 2])
    stimuli, rows = metrics._resampled(owner, 3, rng)
    assert len(stimuli) == 3
    assert sorted(owner[rows].tolist()) == sorted(np.repeat(stimuli, np.bincount(owner)[stimuli]))


def test_sign_flip_p_is_uniform_under_no_difference_and_small_for_one():
    rng = np.random.default_rng(0)
    none = [metrics.sign_flip_p(rng.normal(0, 1, 30), k, 500) for k in range(200)]
    assert np.mean(np.array(none) < 0.05) < 0.1 and 0.4 < np.mean(none) < 0.6
    assert metrics.sign_flip_p(rng.normal(1, 1, 30), 0) < 0.001
    assert metrics.sign_flip_p(np.zeros(30), 0) == 1


def test_sign_flip_p_equals_scipy():
    from scipy.stats import permutation_test

    values = np.random.default_rng(3).normal(0.4, 1, 10)
    exact = permutation_test(
        (values, np.zeros(10)), lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples", n_resamples=np.inf, vectorized=True,
    )  # fmt: skip
    assert metrics.sign_flip_p(values, 0, 20_000) == pytest.approx(exact.pvalue, abs=0.015)


def test_holm_corrects_as_published():
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert metrics.holm([0.9, 0.5]) == [1.0, 1.0]


@pytest.mark.parametrize("name", ["fid", "kid"])
@pytest.mark.parametrize("n", [2, 4, 5, 7, 8])
def test_few_pictures_are_told_instead_of_an_interval_of_nothing(name, n):
    """Among 1000 draws of five stimuli some are one stimulus alone: KID of it is no number."""
    truth, drawn = (torch.randn(n, 3, generator=torch.manual_seed(seed)) for seed in (0, 1))
    row = picture_scores.distribution_row(name, truth, drawn, np.arange(n), 0)
    assert np.isfinite(row["value"])
    if n < 8:
        assert row["interval"] is None
        assert f"N = {n} is too small" in tables._picture_cell(row, paired=False)
    else:
        assert np.isfinite(row["interval"]).all() and "note" not in row
