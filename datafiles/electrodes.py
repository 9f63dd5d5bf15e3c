"""Where EEG electrodes sit: positions on the head and the regions their names stand for."""

from __future__ import annotations

import functools
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


def region(channel: str) -> str | None:
    """The region of a channel by its 10-05 name; None for another name (``EOG``, ``Stim``)."""
    letters = channel.upper().rstrip("0123456789Z")
    return next((name for name, prefixes in REGIONS.items() if letters in prefixes), None)


def regions_of(channels: Sequence[str]) -> dict[str, list[str]]:
    """{region: its channels}, front to back; regions without a channel are left out."""
    found = {name: [item for item in channels if region(item) == name] for name in REGIONS}
    return {name: members for name, members in found.items() if members}


@functools.lru_cache(maxsize=1)
def _montage_positions() -> dict[str, np.ndarray]:
    import mne  # slow to import, so only when positions are asked for

    # "standard_1005" was renamed in MNE 1.13: same positions, and the old name is to disappear
    names = ("colin27_1005", "standard_1005")
    name = next(name for name in names if name in mne.channels.get_builtin_montages())
    return mne.channels.make_standard_montage(name).get_positions()["ch_pos"]


def positions(channels: Sequence[str]) -> dict[str, np.ndarray]:
    """{channel: [3] in metres, x right, y front, z up} of the channels that 10-05 knows.

    Names are matched whatever their case, as recorders differ in it (``FP1``, ``Fp1``).
    """
    known = {name.upper(): place for name, place in _montage_positions().items()}
    return {name: known[name.upper()] for name in channels if name.upper() in known}


def standard_names(channels: Sequence[str]) -> dict[str, str]:
    """{channel: its 10-05 spelling} of the channels that 10-05 knows (``FP1`` -> ``Fp1``)."""
    spelling = {name.upper(): name for name in _montage_positions()}
    return {name: spelling[name.upper()] for name in channels if name.upper() in spelling}


FLAT, NOISY = 1e-4, 5.0  # times the median amplitude of the channels


def grade(amplitude: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Flat and noisy channels: by their amplitude beside the median of all."""
    middle = float(np.median(list(amplitude.values()) or [0.0]))
    flat = [name for name, size in amplitude.items() if size <= FLAT * middle]
    return flat, [name for name, size in amplitude.items() if size > NOISY * middle]
