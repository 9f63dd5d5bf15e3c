"""loss: contrast and priors against other implementations and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import normal

from loss import (
    Contrast,
    LossTerms,
    check_pair,
    clip_loss,
    contrastive_total,
    embedding_losses,
    first_non_finite,
    prior_loss,
    prior_total,
)
from modalities import MODALITIES, NAMES


def test_prior_loss_is_its_formula():
    predicted, noise = normal(7, 5), normal(7, 5, seed=1)
    terms = prior_loss(predicted, noise)
    a, b = predicted.double().numpy(), noise.double().numpy()
    mse = ((a - b) ** 2).mean()
    cosine = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    assert terms.mse.item() == pytest.approx(mse, rel=1e-5)
    assert terms.cosine.item() == pytest.approx(cosine, rel=1e-5)
    assert terms.total.item() == pytest.approx(0.7 * mse + 0.3 * (1 - cosine), rel=1e-5)


def test_prior_loss_is_zero_for_the_noise_and_sees_swapped_rows():
    noise = normal(6, 9)
    assert prior_loss(noise, noise).total.item() == pytest.approx(0, abs=1e-6)
    assert prior_loss(noise.roll(1, 0), noise).total > 0.5


@pytest.mark.parametrize(
    ("a", "b"), [((4, 3), (4, 1, 3)), ((4, 1, 3), (4, 1, 3)), ((4, 3), (1, 3)), ((4, 3), (3,))]
)
def test_shapes_that_would_broadcast_are_refused(a, b):
    for loss in (prior_loss, check_pair, lambda x, y: clip_loss(x, y, torch.tensor(1.0))):
        with pytest.raises(ValueError, match=r"expected the same \[B, D\]"):
            loss(torch.zeros(a), torch.zeros(b))


def test_prior_total_uses_the_published_weights():
    weights = dict(zip(NAMES, (0.1, 0.1, 0.2, 0.3, 0.3), strict=True))
    assert {m.name: m.loss_weight for m in MODALITIES} == weights
    zero = torch.zeros(())
    for name in NAMES:
        terms = {n: LossTerms(torch.tensor(float(n == name)), zero, zero) for n in NAMES}
        assert prior_total(terms).item() == pytest.approx(weights[name])


def test_clip_loss_equals_open_clip_s():
    from open_clip.loss import ClipLoss

    eeg, features, scale = normal(8, 6), 40 * normal(8, 6, seed=1), torch.tensor(14.3)
    expected = ClipLoss()(F.normalize(eeg, dim=1), F.normalize(features, dim=1), scale)
    torch.testing.assert_close(clip_loss(eeg, features, scale), expected)
    torch.testing.assert_close(clip_loss(3 * eeg, features / 7, scale), expected)


def test_clip_loss_prefers_the_right_pairing():
    features, scale = normal(8, 32), torch.tensor(20.0)
    aligned = clip_loss(features, features, scale)
    assert aligned < 0.1 < clip_loss(features.roll(1, 0), features, scale)
    uniform = clip_loss(torch.ones(8, 32), torch.ones(8, 32), scale)
    assert uniform.item() == pytest.approx(math.log(8), rel=1e-5)


def test_contrastive_total_weighs_images_and_texts():
    eeg, scale = normal(5, 4), torch.tensor(10.0)
    targets = {name: normal(5, 4, seed=i) for i, name in enumerate(NAMES, start=1)}
    image, text = (clip_loss(eeg, targets[name], scale) for name in ("image", "text"))
    for share, expected in ((0.0, image), (1.0, text), (0.01, 0.99 * image + 0.01 * text)):
        found = contrastive_total(eeg, targets, scale, Contrast(share), None)
        torch.testing.assert_close(found, expected)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("normalise", ["both", "targets"])
@pytest.mark.parametrize("groups", [None, [0, 1, 2, 3, 4, 5], [3, 3, 7, 3, 7, 1]])
def test_clip_loss_variants_are_their_formula(normalise, groups):
    """Also: groups of one row each are the plain loss."""
    eeg, features = 3 * normal(6, 4), 40 * normal(6, 4, seed=1)
    a, b = eeg.double().numpy(), features.double().numpy()
    a = a / (np.linalg.norm(a, axis=1, keepdims=True) if normalise == "both" else 2)  # sqrt(4)
    logits = 2.5 * a @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    ids = np.arange(6) if groups is None else np.array(groups)
    truth = (ids[:, None] == ids).astype(float)
    truth /= truth.sum(axis=1, keepdims=True)
    expected = -sum((truth * _log_softmax(way)).sum(1).mean() for way in (logits, logits.T)) / 2
    given = None if groups is None else torch.tensor(groups)
    found = clip_loss(eeg, features, torch.tensor(2.5), normalise, given)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    shuffled = clip_loss(features.roll(1, 0), features, torch.tensor(2.5), normalise, given)
    assert shuffled > clip_loss(features, features, torch.tensor(2.5), normalise, given) + 0.5


def test_only_lengths_that_are_not_normalised_count():
    eeg, features, scale = normal(5, 4), normal(5, 4, seed=1), torch.tensor(5.0)
    for normalise, counts in (("both", False), ("targets", True)):
        change = clip_loss(2 * eeg, features, scale, normalise) - clip_loss(
            eeg, features, scale, normalise
        )
        assert (change.abs() > 1e-3) == counts
        torch.testing.assert_close(
            clip_loss(eeg, 9 * features, scale, normalise),
            clip_loss(eeg, features, scale, normalise),
        )


def test_rows_with_one_target_need_no_group():
    """Why there are no ``stimulus`` positives: the loss and its gradients would be the same."""
    features, scale = normal(6, 4, seed=1)[[0, 0, 1, 2, 3, 3]], torch.tensor(5.0)
    found = []
    for groups in (None, torch.tensor([0, 0, 1, 2, 3, 3])):
        eeg = normal(6, 4).requires_grad_()
        loss = clip_loss(eeg, features, scale, "both", groups)
        found.append((loss, *torch.autograd.grad(loss, eeg)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_one_group_draw_each_other_instead_of_pushing():
    """Gradient of row 0 along row 1's target, from logits of 0: (1 / B) (1 / B - truth)."""
    features, scale = torch.eye(4), torch.tensor(2.0)  # scale / sqrt(4) = 1
    for groups, truth in ((None, 0.0), (torch.tensor([5, 5, 6, 7]), 0.5)):
        eeg = torch.zeros(4, 4, requires_grad=True)
        clip_loss(eeg, features, scale, "targets", groups).backward()
        assert eeg.grad[0, 1].item() == pytest.approx((0.25 - truth) / 4)
        assert eeg.grad[0, 2].item() == pytest.approx(0.25 / 4), "others are negatives"


def test_embedding_losses_weigh_the_contrast_and_the_mse_to_the_stored_image():
    eeg, scale = normal(5, 4), torch.tensor(10.0)
    targets = {name: 3 * normal(5, 4, seed=i) for i, name in enumerate(NAMES, start=1)}
    contrast = contrastive_total(eeg, targets, scale, Contrast(0.1), None)
    plain = embedding_losses(eeg, targets, scale, Contrast(0.1), None, 0.5)
    assert plain.keys() == {"contrast", "loss"}
    torch.testing.assert_close(plain["loss"], 0.5 * contrast)
    both = embedding_losses(eeg, targets, scale, Contrast(0.1, target_mse=2.0), None, 0.5)
    mse = (eeg - targets["image"]).square().mean()
    torch.testing.assert_close(both["target_mse"], mse)
    torch.testing.assert_close(both["loss"], 0.5 * contrast + 2 * mse)


def test_first_non_finite_names_the_part():
    parts = {"a": torch.tensor(1.0), "b": torch.tensor(torch.inf), "c": torch.tensor(torch.nan)}
    assert first_non_finite(parts) == "b"
    assert first_non_finite({"c": parts["c"]}) == "c"
    assert first_non_finite({"a": parts["a"]}) is None
