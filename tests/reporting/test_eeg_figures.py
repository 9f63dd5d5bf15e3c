"""The report's EEG figures carry the unit of what they show."""

from __future__ import annotations

import numpy as np
import pytest

from reporting.figures.eeg import erp_figure, scalp_figures

CHANNELS = ["Fz", "Cz", "Pz", "Oz", "O1", "O2"]
TIMES = np.arange(-0.1, 0.4, 0.02)


@pytest.mark.parametrize(
    ("unit", "told", "factor"),
    [("whitened", "whitened units", 1), ("V", "µV", 1e6), ("", "units of the file", 1)],
)
def test_units_follow_what_was_done_to_the_eeg(unit, told, factor):
    eeg = np.zeros((4, len(CHANNELS), len(TIMES)))
    eeg[:, 3] = 2.0 / factor * np.exp(-(((TIMES - 0.2) / 0.05) ** 2))
    evoked = erp_figure(eeg, CHANNELS, TIMES, "sub-01", "about", None, unit)
    maps = scalp_figures(eeg.mean(axis=0), CHANNELS, TIMES, "about", unit)
    for figure in (evoked, *maps):
        assert told in figure.caption
        assert ("hitened" in figure.caption) == (unit == "whitened")
    # the response's peak, 2 in the shown unit, over the occipital region's three channels
    assert "occipital peaks at 0.20 s (+0.67)" in str(evoked.svg)
    assert told in str(evoked.svg) and len(maps) == 1
