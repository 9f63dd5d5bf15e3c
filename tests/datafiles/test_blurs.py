"""Blurred targets by lot: what the contrast sees, and what it must not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Chain

import ATMS_retrieval
import dataset
from datafiles.blurs import DRAWN_IMAGE, blurs_of
from decoder.decoder import Decoder, new_encoder
from loss import Contrast


@pytest.fixture(scope="module")
def blurred(features: Chain) -> dataset.TrainingData:
    """The chain's data with two blurs, which tell by a constant which one they are."""
    choice = dataset.DataChoice(features.data, features.features, "random", 0.2, 0)
    data = dataset.open_training(choice)
    image = data.targets["image"]
    return replace(
        data, targets=data.targets | {f"image_blur_{n}": image + 1000 * n for n in (1, 2)}
    )


def test_each_sample_has_one_of_the_versions_by_lot(blurred: dataset.TrainingData) -> None:
    found = {epoch: [*blurred.batches(epoch, 8)] for epoch in (0, 1)}
    drawn = {}
    for epoch, batches in found.items():
        lots = []
        for batch in batches:
            shift = batch.targets[DRAWN_IMAGE] - batch.targets["image"]
            lots += (shift.mean(dim=1) / 1000).round().int().tolist()
            assert torch.allclose(shift, shift[:, :1].expand_as(shift), atol=1e-2)
            assert not {"image_blur_1", "image_blur_2"} & {*batch.targets}
        drawn[epoch] = lots
    assert {*drawn[0]} == {0, 1, 2} and drawn[0] != drawn[1]
    again = [batch.targets[DRAWN_IMAGE] for batch in blurred.batches(0, 8)]
    assert all(
        torch.equal(one.targets[DRAWN_IMAGE], other)
        for one, other in zip(found[0], again, strict=True)
    )
    late = next(blurred.batches(0, 8, first=1))
    assert torch.equal(late.targets[DRAWN_IMAGE], found[0][1].targets[DRAWN_IMAGE])


def test_the_contrast_sees_the_version_that_was_drawn(blurred: dataset.TrainingData) -> None:
    decoder = Decoder(new_encoder(blurred, 0), None, blurred.signal, blurred.clip).eval()
    objective = ATMS_retrieval.ContrastiveObjective(decoder, blurred, Contrast(text_contrast=0.0))
    batch = next(blurred.batches(0, 8))

    def contrast(**changed: torch.Tensor) -> float:
        given = replace(batch, targets=batch.targets | changed)
        return float(objective.losses(given, torch.Generator())["contrast"].detach())

    drawn, image = batch.targets[DRAWN_IMAGE], batch.targets["image"]
    assert contrast(image=image.flip(0)) == contrast()
    assert contrast(**{DRAWN_IMAGE: drawn.flip(0)}) != contrast()


def test_without_blurs_nothing_is_drawn(features: Chain) -> None:
    choice = dataset.DataChoice(features.data, features.features, "random", 0.2, 0)
    data = dataset.open_training(choice)
    assert blurs_of(data.targets) == ["image"]
    assert DRAWN_IMAGE not in next(data.batches(0, 8)).targets
