"""Where EEG electrodes sit: positions on the head and the regions their names stand for."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

# Regions by the letters before the electrode's number in the 10-05 naming system: the five that
# ATM's ablation of regions uses.
REGIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "frontal": ("FP", "AF", "AFF", "F"),
        "temporal": ("FT", "FTT", "T", "TTP", "TP"),
        "central": ("FC", "FCC", "C", "CCP", "CP"),
        "parietal": ("CPP", "P", "PPO"),
        "occipital": ("PO", "POO", "O", "I"),
    }
)


# CTF's helmets: M, left, right or midline, the lobe, the sensor's number, perhaps the system's
_SENSOR = re.compile(r"M[LRZ]([FTCPO])\d\d(-\d+)?")
_LOBES = {name[0].upper(): name for name in REGIONS}
HEAD_M = 0.095  # radius of the circle that maps are drawn in


def is_meg(channels: Sequence[str]) -> bool:
    """Whether most channels are gradiometers of CTF's helmets: ``MLC11``, ``MZO03-1609``."""
    return 2 * sum(_SENSOR.fullmatch(name) is not None for name in channels) > len(channels)


def sensor_places(channels: Sequence[str]) -> dict[str, np.ndarray]:
    """{sensor: [2] in metres} of CTF's sensors on the flattened helmet of 275, nose up."""
    import mne

    layout = mne.channels.read_layout("CTF-275")
    flat = layout.pos[:, :2] + layout.pos[:, 2:] / 2
    flat = flat - (flat.min(axis=0) + flat.max(axis=0)) / 2
    flat *= HEAD_M / np.linalg.norm(flat, axis=1).max()  # all within the head's circle
    known = {name.split("-")[0]: at for name, at in zip(layout.names, flat, strict=True)}
    short = {name: name.split("-")[0] for name in channels}
    return {name: known[own] for name, own in short.items() if own in known}


def region(channel: str) -> str | None:
    """The region of a channel by its 10-05 or CTF name; None for another (``EOG``, ``Stim``)."""
    sensor = _SENSOR.fullmatch(channel)
    if sensor:
        return _LOBES[sensor[1]]
    letters = channel.upper().rstrip("0123456789Z")
    return next((name for name, prefixes in REGIONS.items() if letters in prefixes), None)


def region_by_channel(channels: Sequence[str]) -> dict[str, str | None]:
    """{channel: its region, or None}; banks' names (``C3`` of BioSemi) tell no region."""
    banks = is_banked(channels)
    return {name: None if banks else region(name) for name in channels}


def regions_of(channels: Sequence[str]) -> dict[str, list[str]]:
    """{region: its channels}, front to back; regions without a channel are left out."""
    of = region_by_channel(channels)
    found = {name: [item for item in channels if of[item] == name] for name in REGIONS}
    return {name: members for name, members in found.items() if members}


@functools.cache
def _montage_positions(name: str = "") -> dict[str, np.ndarray]:
    """Of a montage of MNE, in its order; of the 10-05 system without a name."""
    import mne  # slow to import, so only when positions are asked for

    # "standard_1005" was renamed in MNE 1.13: same positions, and the old name is to disappear
    names = (name,) if name else ("colin27_1005", "standard_1005")
    found = next(name for name in names if name in mne.channels.get_builtin_montages())
    return mne.channels.make_standard_montage(found).get_positions()["ch_pos"]


# ---------------------------------------------------------------- BioSemi's banks

BANK_PINS = 32
LEAST_BANKED = 8  # names that no other system has, before C3 and F4 are taken for banks' names
# {channels: letters of the banks, MNE's montage}; the montages list the places bank by bank
CAPS = {
    16: ("A", "biosemi16"),
    32: ("A", "biosemi32"),
    64: ("AB", "biosemi64"),
    128: ("ABCD", "biosemi128"),
    160: ("ABCDE", "biosemi160"),
    256: ("ABCDEFGH", "biosemi256"),
}


def is_bank_name(channel: str) -> bool:
    """Whether it may be a pin of BioSemi's cables: ``A1`` to ``H32``."""
    return re.fullmatch(r"[A-H]([1-9]|[12]\d|3[0-2])", channel) is not None


def is_banked(channels: Sequence[str]) -> bool:
    """Whether channels bear the names of BioSemi's cables: ``C3`` is then no 10-05 name."""
    own = {name for name in channels if is_bank_name(name)}
    known = {name.upper() for name in _montage_positions()}
    sure = {name for name in own - known if name[0] != "E"}  # E1, E2, ... are EGI's
    return len(sure) >= LEAST_BANKED and 2 * len(own) > len(channels)


def _cap_positions(channels: Sequence[str]) -> dict[str, np.ndarray]:
    """Places of the cap that has just these pins; none where no cap has."""
    own = [name for name in channels if is_bank_name(name)]
    if len(own) not in CAPS:
        return {}
    letters, montage = CAPS[len(own)]
    pins = [f"{letter}{pin}" for letter in letters for pin in range(1, BANK_PINS + 1)][: len(own)]
    if set(pins) != set(own):
        return {}
    return dict(zip(pins, _montage_positions(montage).values(), strict=True))


def cap_names(channels: int) -> list[str]:
    """The electrodes of a whole cap by their 10-05 names, in the order of its pins."""
    return list(_montage_positions(CAPS[channels][1]))


# ---------------------------------------------------------------- places and names


def positions(channels: Sequence[str]) -> dict[str, np.ndarray]:
    """{channel: [3] in metres, x right, y front, z up} of the channels whose places are known.

    By the 10-05 system, whatever the case, as recorders differ in it (``FP1``, ``Fp1``); by
    BioSemi's caps, where the names are those of its cables.
    """
    if is_banked(channels):
        return _cap_positions(channels)
    known = {name.upper(): place for name, place in _montage_positions().items()}
    return {name: known[name.upper()] for name in channels if name.upper() in known}


def standard_names(channels: Sequence[str]) -> dict[str, str]:
    """{channel: its 10-05 spelling} of the channels that 10-05 knows (``FP1`` -> ``Fp1``)."""
    if is_banked(channels):
        return {}
    spelling = {name.upper(): name for name in _montage_positions()}
    return {name: spelling[name.upper()] for name in channels if name.upper() in spelling}


FLAT, NOISY = 1e-4, 5.0  # times the median amplitude of the channels
LEAST_V, MOST_V = 1e-9, 1e-2  # a recording's amplitude; EEG has some 1e-5 V
LEAST_T, MOST_T = 1e-16, 1e-9  # MEG has some 1e-12 T, or T/m * 0.1 m
OTHER_SCALE = 100.0  # times another file's: another unit


def grade(amplitude: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Flat and noisy channels: by their amplitude beside the median of all."""
    middle = float(np.median(list(amplitude.values()) or [0.0]))
    flat = [name for name, size in amplitude.items() if size <= FLAT * middle]
    return flat, [name for name, size in amplitude.items() if size > NOISY * middle]
