"""Retrieval that looks at all test queries at once: transductive, never the headline.

A person who looks at one picture gives one query. These scores use that the queries are many, that
none is nearest to everything (centring, CSLS), or even that each picture of the gallery was seen
once (optimal transport): the last is an upper bound of any assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

import metrics
from evaluation.retrieval import Query, retrieval_row

NEIGHBOURS = 10  # of CSLS and of hubness
TEMPERATURE = 0.5  # of the transport plan, in standard deviations of the similarity
ROUNDS = 200  # of Sinkhorn's scaling
HOW_TRANSDUCTIVE = (
    "TRANSDUCTIVE: every score here uses all test queries together, without their labels, which "
    "one look at one picture does not give; not to be set beside the scores above. Centred: the "
    "mean similarity of each gallery picture over the queries is subtracted; CSLS: 2 s - the "
    f"mean of the {NEIGHBOURS} nearest on both sides (Conneau et al. 2018, arXiv:1710.04087); "
    "sinkhorn: the plan of entropic optimal transport between queries and gallery, both uniform "
    "(Cuturi 2013, arXiv:1306.0895), which knows that each picture was seen once: an upper bound. "
    "Hubness: skewness of how often a "
    f"gallery picture is among the {NEIGHBOURS} nearest"
)


def centred(similarity: torch.Tensor) -> torch.Tensor:
    """[N, M] without the mean of each gallery item, whatever is nearest to everything."""
    return similarity - similarity.mean(dim=0)


def csls(similarity: torch.Tensor, neighbours: int = NEIGHBOURS) -> torch.Tensor:
    """Cross-domain similarity local scaling, [N, M] (Conneau et al. 2018, arXiv:1710.04087)."""
    of_query = similarity.topk(min(neighbours, similarity.shape[1]), dim=1).values.mean(dim=1)
    of_item = similarity.topk(min(neighbours, len(similarity)), dim=0).values.mean(dim=0)
    return 2 * similarity - of_query[:, None] - of_item


def sinkhorn(similarity: torch.Tensor) -> torch.Tensor:
    """Log of the transport plan [N, M] between uniform queries and items (Cuturi 2013)."""
    deviation = similarity.std().clamp_min(torch.finfo(similarity.dtype).tiny)
    plan = similarity.double() / (deviation.double() * TEMPERATURE)
    for _ in range(ROUNDS):
        plan = plan - plan.logsumexp(dim=1, keepdim=True)
        plan = plan - plan.logsumexp(dim=0, keepdim=True)
    return plan


METHODS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "centred": centred,
    "csls": csls,
    "sinkhorn": sinkhorn,
}


def hubness(similarity: torch.Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Skewness of the numbers of queries that have an item of [N, M] among their nearest.

    Radovanovic et al. 2010, JMLR 11. 0 where all items are alike.
    """
    nearest = similarity.topk(min(neighbours, similarity.shape[1]), dim=1).indices
    times = torch.bincount(nearest.flatten(), minlength=similarity.shape[1]).double()
    deviation = times - times.mean()
    spread = deviation.square().mean().sqrt()
    return float((deviation**3).mean() / spread**3) if spread else 0.0


def transductive_row(query: Query, method: str, seed: int, permutations: int) -> dict[str, Any]:
    """Scores of a query by one of METHODS, beside the same query's own and their difference."""
    changed = METHODS[method](query.similarity)
    row = retrieval_row(replace(query, similarity=changed, plain=None), seed, permutations)
    hits = [
        metrics.top_k_probability(*metrics.ranks(matrix, query.truth), 1).numpy()
        for matrix in (changed, query.similarity)
    ]
    return row | {
        "method": method,
        "top1_without": float(hits[1].mean()),
        "gain": float((hits[0] - hits[1]).mean()),
        "gain_interval": metrics.bootstrap_interval(hits[0] - hits[1], seed),
        "hubness": hubness(changed),
        "hubness_without": hubness(query.similarity),
    }
