"""A training step asks its device for nothing: on the meta device, which has no values, it runs.

Whatever reads a value back (``tolist``, ``item``, ``nonzero``, ``unique``, a branch on a tensor)
raises there, as on a GPU it would wait.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import Chain

import dataset
import train
from datafiles.feature_bank import layer_names
from decoder.aligners import Alignment
from decoder.foundation import EncoderChoice
from loss import Contrast
from masking import Masking, mask_eeg, mask_subject
from subject_layers.subject import SubjectLinear
from training.optimisation import Average
from training.starting import new_decoder

META = torch.device("meta")


@pytest.fixture(autouse=True)
def _meta_knows_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no kind of autocast, not even the one that is off."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _kind: False)
    monkeypatch.setattr(torch, "autocast", lambda *_kind, **_how: contextlib.nullcontext())


PRIOR = Alignment("prior", False, 0.1, "velocity", None)


def step(
    features: Chain, alignment: Alignment, contrast: Contrast, choice: EncoderChoice, layers: list
) -> torch.nn.Module:
    """One step but for the optimiser, on the meta device; returns the model with its gradients."""
    names = layer_names(layers)
    asked = dataset.DataChoice(features.data, features.features, "random", 0.2, 0)
    data = dataset.open_training(asked, names)
    decoder = new_decoder(data, 0, alignment, None, choice, names).to(META)
    average = Average(decoder, 0.9)
    batch = next(data.batches(0, 16)).to(META)
    masking, draw = Masking(0.1, 0.1, 0.1, 5, 0.2), torch.Generator()
    eeg = mask_eeg(batch.eeg, masking, draw)
    subject = mask_subject(batch.subject, masking.subject, draw)
    objective = train.JointObjective(decoder, data, contrast, 1.0, 600)  # so many timesteps repeat
    losses = objective.losses(
        dataset.Batch(eeg, subject, batch.stimulus, batch.targets), torch.Generator()
    )
    losses["loss"].backward()
    torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
    average.update(decoder, 1)
    return decoder


@pytest.mark.parametrize("encoder", ["ATMS", "EEGProject", "NICE", "ATMS+NICE"])
def test_every_encoder(features: Chain, encoder: str) -> None:
    model = step(features, PRIOR, Contrast(0.1), EncoderChoice(encoder), [])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize(
    "alignment",
    [PRIOR, Alignment("prior", True, 0.1, "noise", "embedding"),
     Alignment("mlp", False, 0, "velocity", None)],
    ids=["prior", "uncertainty", "mlp"],
)  # fmt: skip
@pytest.mark.parametrize("layers", [[], [2], [2, "final"]], ids=["plain", "layer", "mixture"])
def test_every_aligner_and_target(features: Chain, alignment: Alignment, layers: list) -> None:
    contrast = Contrast(0.1, "targets", "concept", 0.0 if layers else 0.1)
    step(features, alignment, contrast, EncoderChoice("EEGProject"), layers)


def test_the_meta_device_would_tell() -> None:
    """What this rests on: values cannot be read there."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device=META).sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device=META).nonzero()


@torch.no_grad()
def test_subject_layers_are_the_same_gathered_and_one_by_one() -> None:
    torch.manual_seed(0)
    layer = SubjectLinear(3, 7)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    eeg, subject = torch.randn(6, 4, 7), torch.tensor([2, -1, 0, 0, 1, -1])
    torch.testing.assert_close(layer._gathered(eeg, subject), layer._each(eeg, subject))
