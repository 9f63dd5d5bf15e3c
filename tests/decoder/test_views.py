"""Views of test EEG: what they change, their mean, and that no row depends on its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Chain

import evaluate
from decoder.decoder import Decoder
from decoder.views import DROPPED, shifted, views_of
from rundirs.files import read_json

EEG = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("samples", [0, 3, -3])
def test_a_shift_moves_time_and_repeats_the_edge(samples: int) -> None:
    found = shifted(EEG, samples)
    for time in range(50):
        source = min(max(time - samples, 0), 49)
        assert torch.equal(found[..., time], EEG[..., source])


def test_the_first_view_is_the_recording_and_the_others_differ() -> None:
    views = list(views_of(EEG, 60, 250.0))
    assert torch.equal(views[0], EEG) and len(views) == 60
    lost = torch.stack([(view == 0).all(dim=2).float().mean() for view in views[1:]])
    assert lost.mean() == pytest.approx(DROPPED, abs=0.03)
    shifts = set()
    for view in views[1:]:
        kept = (~(view == 0).all(dim=2)[0]).nonzero()[0]
        fits = [n for n in range(-5, 6) if torch.equal(view[:, kept], shifted(EEG, n)[:, kept])]
        shifts |= {*fits}
    assert shifts == {*range(-5, 6)}  # 20 ms of 250 Hz
    fewer = list(views_of(EEG[:1], 3, 250.0))
    assert all(torch.equal(one, view[:1]) for one, view in zip(fewer, views[:3], strict=True))


def test_embeddings_are_the_mean_over_views(chain: Chain) -> None:
    decoder = Decoder.load(chain.model, "best")
    shape = (5, len(decoder.signal["channels"]), len(decoder.signal["times"]))
    eeg = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    subject = torch.tensor([0, 1, -1, 0, 1])
    once = decoder.embed(eeg, subject)
    decoder.test_views = 4
    rate_hz = 1 / (decoder.signal["times"][1] - decoder.signal["times"][0])
    with torch.no_grad():
        each = [decoder.encoder(view, subject) for view in views_of(eeg, 4, rate_hz)]
    torch.testing.assert_close(decoder.embed(eeg, subject), torch.stack(each).mean(dim=0))
    torch.testing.assert_close(each[0], once)
    torch.testing.assert_close(
        decoder.embed(eeg, subject, batch_size=2), decoder.embed(eeg, subject), rtol=1e-4, atol=1e-5
    )


def test_scores_are_of_the_views_and_say_so(chain: Chain, tmp_path: Path) -> None:
    told = {}
    for views in (1, 3):
        out = tmp_path / str(views)
        flags = chain.evaluate_flags(out, "--model_path", chain.model, "--test_views", views)
        assert evaluate.main(flags) == 0
        told[views] = read_json(out / "results.json")["protocol"].get("views")
    assert told[1] is None and "read 3 times" in told[3]
