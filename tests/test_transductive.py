"""Retrieval by all queries together: against plain NumPy, planted hubs, and shuffled EEG."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import metrics
from evaluation.retrieval import Query
from evaluation.transductive import METHODS, csls, hubness, sinkhorn, transductive_row


def similarities(seed: int = 0, rows: int = 120, hubs: int = 0) -> torch.Tensor:
    """Cosines of noisy queries with 120 items, some of which lie near everything."""
    draw = np.random.default_rng(seed)
    items = draw.normal(size=(rows, 24))
    queries = items + 1.5 * draw.normal(size=items.shape)
    common = draw.normal(size=24)
    queries += common
    items[:hubs] += 2 * common
    return metrics.cosine_similarity(torch.from_numpy(queries), torch.from_numpy(items))


def csls_by_numpy(similarity: np.ndarray, k: int) -> np.ndarray:
    found = np.empty_like(similarity)
    for i, row in enumerate(similarity):
        for j, column in enumerate(similarity.T):
            near = np.sort(row)[-k:].mean() + np.sort(column)[-k:].mean()
            found[i, j] = 2 * similarity[i, j] - near
    return found


def skewness_by_numpy(similarity: np.ndarray, k: int) -> float:
    counts = np.zeros(similarity.shape[1])
    for row in similarity:
        counts[np.argsort(-row)[:k]] += 1
    return float(((counts - counts.mean()) ** 3).mean() / counts.std() ** 3)


def test_as_in_numpy():
    similarity = similarities()
    expected = csls_by_numpy(similarity.numpy(), 10)
    assert np.abs(csls(similarity).numpy() - expected).max() < 1e-6
    assert abs(hubness(similarity) - skewness_by_numpy(similarity.numpy(), 10)) < 1e-6
    plan = sinkhorn(similarity).exp()
    assert torch.allclose(plan.sum(0), torch.ones(120).double(), atol=1e-6)
    assert torch.allclose(plan.sum(1), torch.ones(120).double(), atol=1e-3)


def test_the_plan_of_two_by_two_is_the_assignment():
    """Both queries prefer the first item; only one can have it."""
    similarity = torch.tensor([[0.9, 0.1], [0.8, 0.7]])
    assert similarity.argmax(1).tolist() == [0, 0]
    assert sinkhorn(similarity).argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_planted_hubs_lose_their_pull(method):
    similarity = similarities(hubs=6)
    row = transductive_row(Query("q", "sub-01", similarity), method, 0, 50)
    assert row["hubness"] < row["hubness_without"] - 0.5
    assert row["gain_interval"][0] > 0
    assert row["top1"] - row["top1_without"] == pytest.approx(row["gain"])


@pytest.mark.parametrize("method", METHODS)
def test_queries_of_other_stimuli_stay_at_chance(method):
    """No method knows the labels: with shuffled EEG nothing is gained."""
    similarity = similarities(hubs=6)
    order = torch.from_numpy(np.random.default_rng(1).permutation(120))
    shuffled = transductive_row(Query("q", "sub-01", similarity[order]), method, 0, 50)
    assert shuffled["top1"] < 0.1
    again = transductive_row(Query("q", "sub-01", similarity), method, 0, 50)
    assert again["top1_shuffled"] < 0.05 < 0.2 < again["top1"]


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_queries_and_items_changes_nothing(method):
    similarity = similarities(hubs=6)
    order = torch.from_numpy(np.random.default_rng(2).permutation(120))
    moved = METHODS[method](similarity[order][:, order])
    assert torch.allclose(moved, METHODS[method](similarity)[order][:, order], atol=1e-6)
