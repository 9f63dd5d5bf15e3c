"""CLIP's embeddings share a large mean: predictions are ranked by what differs from it."""

from __future__ import annotations

import pytest
import torch

import metrics
from decoder.aligners import Identity
from decoder.decoder import Decoder, make_encoder
from evaluation import tables
from evaluation.retrieval import Query, prior_queries, retrieval_row
from modalities import MODALITIES, NAMES

WIDTH, PICTURES = 32, 80


@pytest.fixture(scope="module")
def offset():
    """A decoder fit to embeddings whose mean alone has a cosine of .6 with each; 80 others."""
    draw = torch.Generator().manual_seed(0)
    mean = {name: torch.randn(WIDTH, generator=draw) for name in NAMES}
    spread = torch.rand(WIDTH, generator=draw) + 0.5  # dimensions differ

    def bank(rows: int) -> dict[str, torch.Tensor]:
        made = {
            name: 0.95 * centre + spread * torch.randn(rows, WIDTH, generator=draw)
            for name, centre in mean.items()
        }
        return {name: torch.nn.functional.normalize(rows, dim=1) for name, rows in made.items()}

    aligner = Identity(WIDTH, WIDTH)
    aligner.fit_targets(bank(2000))
    sizes = {"n_channels": 4, "n_times": 100, "n_subjects": 1, "embed_dim": WIDTH}
    signal = {"channels": ["O1"] * 4, "times": [], "subjects": ["sub-01"]}
    return Decoder(make_encoder("EEGProject", sizes), aligner, signal, {}), bank(PICTURES)


def shrunken(decoder: Decoder, true: dict[str, torch.Tensor], share: float) -> dict:
    """What a regression predicts of weak EEG: near the mean, noise beside the truth."""
    draw = torch.Generator().manual_seed(1)
    found = {}
    for name in NAMES:
        away = decoder.bank.standardise(name, true[name])
        noise = torch.randn(away.shape, generator=draw)
        found[name] = decoder.bank.restore(name, share * (away + noise))
    return found


def scores(decoder: Decoder, predicted, true) -> dict[str, dict]:
    queries = prior_queries(decoder, predicted, true, "sub-01")
    return {query.name: retrieval_row(query, 0, 5) for query in queries}


def test_a_shrunken_prediction_is_ranked_by_its_direction_from_the_mean(offset):
    decoder, true = offset
    near = metrics.cosine_similarity(decoder.bank.image_mean[None], true["image"])
    assert 0.5 < float(near.mean()) < 0.75
    rows = scores(decoder, shrunken(decoder, true, 0.1), true)
    for name in NAMES:
        assert rows[f"prior {name}"]["top1"] > 0.9
        assert rows[f"prior {name}"]["top1_plain"] < 0.5
    assert rows["fused priors"]["top1"] == 1 and rows["fused priors"]["top1_plain"] < 0.6


def test_how_far_a_prediction_shrinks_changes_nothing(offset):
    decoder, true = offset
    strong, weak = (shrunken(decoder, true, share) for share in (1.0, 0.02))
    of = [scores(decoder, predicted, true) for predicted in (strong, weak)]
    for name in of[0]:
        assert of[0][name]["top1"] == pytest.approx(of[1][name]["top1"], abs=0.02)
    assert of[0]["prior image"]["top1_plain"] > of[1]["prior image"]["top1_plain"] + 0.3


def test_the_plain_column_is_the_plain_cosine(offset):
    decoder, true = offset
    predicted = shrunken(decoder, true, 0.3)
    queries = {query.name: query for query in prior_queries(decoder, predicted, true, "s")}
    fused = sum(
        item.gain * metrics.cosine_similarity(predicted[item.name], true[item.name])
        for item in MODALITIES
    )
    torch.testing.assert_close(queries["fused priors"].plain, fused)
    truth = torch.arange(PICTURES)
    plain = metrics.retrieval_topk(predicted["text"], true["text"], truth)
    assert scores(decoder, predicted, true)["prior text"]["top5_plain"] == plain["top5"]


def test_the_table_labels_both_and_leaves_the_encoder_s_open(offset):
    decoder, true = offset
    rows = scores(decoder, shrunken(decoder, true, 0.1), true)
    encoder = retrieval_row(Query("encoder -> image", "sub-01", torch.eye(PICTURES)), 0, 5)
    lines = tables.retrieval_lines([encoder, *rows.values()])
    column = [cell.strip() for cell in lines[0].split("|")].index("plain cosine: top-1 [95 %]")
    cells = [line.split("|")[column].strip() for line in lines[2:]]
    assert cells[0] == "-" and all(cell[0] in "01" for cell in cells[1:])
    assert "plain cosine" not in tables.retrieval_lines([encoder])[0]
