"""Channels are rebuilt from where they are: the file's places, a known cap, or not at all."""

from __future__ import annotations

import mne
import numpy as np
import pytest
from helpers_own import PICTURES, run, save, write_data
from helpers_raw import RATE_HZ

from datafiles import electrodes
from datafiles.datasets.things_eeg2 import parse_published
from datafiles.eeg_files import eeg_file


def banks(letters: str, pins: int = 32) -> list[str]:
    return [f"{letter}{pin}" for letter in letters for pin in range(1, pins + 1)]


def smooth(places: dict[str, np.ndarray], names: list[str], flat: str):
    """A recording of a smooth field over the head, different at each event; ``flat`` is zero."""
    at = np.array([places[name] for name in names])
    at = at / np.linalg.norm(at, axis=1, keepdims=True)
    field = 1e-5 * (at @ np.array([0.3, -1.0, 0.6]))
    step, shown = round(1.5 * RATE_HZ), [*range(4)] * 3
    signal = np.zeros((len(names), step * (len(shown) + 2)))
    lines = []
    for number, picture in enumerate(shown):
        onset = step * (number + 1)
        signal[:, onset + 50 : onset + 250] += (picture + 1) * field[:, None]
        lines.append((onset / RATE_HZ, PICTURES[picture]))
    signal += np.random.default_rng(0).normal(scale=1e-8, size=signal.shape)
    signal[names.index(flat)] = 0
    raw = mne.io.RawArray(signal, mne.create_info(names, RATE_HZ, "eeg"), verbose="error")
    return raw, lines, field


def rebuilt(root, name: str) -> np.ndarray:
    """[picture] the mean of the channel while the field is there, in the training pictures."""
    eeg, names, times = parse_published(eeg_file(root, "sub-01", "training"))[:3]
    inside = (np.asarray(times) > 0.15) & (np.asarray(times) < 0.45)
    return eeg[:, :, names.index(name)][..., inside].mean(axis=(1, 2))


def check_rebuilt(tmp_path, names: list[str], places, flat: str, montage: bool) -> None:
    data = write_data(tmp_path)
    raw, lines, field = smooth(places, names, flat)
    if montage:
        raw.set_montage(mne.channels.make_dig_montage(places, coord_frame="head"))
    assert run(data, *save(data, raw, lines), "--interpolate_missing") == 0
    expected = np.arange(1, 4) * field[names.index(flat)]
    assert np.abs(rebuilt(data, flat) - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("letters", ["A", "AB", "ABCD"])
@pytest.mark.parametrize("flat", ["A1", "A25"])
def test_a_biosemi_cap_is_known_by_its_pins(tmp_path, letters, flat):
    """A1 of 10-05 is the left ear."""
    names = banks(letters)
    check_rebuilt(tmp_path, names, electrodes.positions(names), flat, montage=False)


def test_the_places_of_the_file_win(tmp_path):
    """Names of 10-05 at other places: a cap that was wired otherwise."""
    names = ["Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2", "Cz", "Oz"]
    known = electrodes.positions(names)
    order = np.random.default_rng(1).permutation(len(names))
    moved = {name: known[names[place]] for name, place in zip(names, order, strict=True)}
    check_rebuilt(tmp_path, names, moved, "Cz", montage=True)


def test_pins_of_no_known_cap_are_not_rebuilt(tmp_path, capsys):
    names = banks("A", 20)
    places = dict(zip(names, electrodes.positions(banks("A")).values(), strict=False))
    data = write_data(tmp_path)
    raw, lines, _ = smooth(places, names, "A1")
    flags = save(data, raw, lines)
    assert run(data, *flags, "--interpolate_missing") == 1
    assert "A1 to rebuild from 0 channels of known place" in capsys.readouterr().err
    raw.set_montage(mne.channels.make_dig_montage(places, coord_frame="head"))
    assert run(data, *save(data, raw, lines), "--interpolate_missing") == 0


def test_pins_are_no_places_of_10_05():
    names = banks("ABCD")
    assert electrodes.regions_of(names) == {} and electrodes.standard_names(names) == {}
    assert electrodes.regions_of(["C3", "O1"]) == {"central": ["C3"], "occipital": ["O1"]}
    assert electrodes.positions(banks("AB"))["A1"][1] > 0.08  # Fp1
    assert electrodes.positions(["A1", *banks("A")[1:31]]) == {}  # no cap has 31
