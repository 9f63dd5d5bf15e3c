"""Which channels of a recording are EEG, or MEG: by their type, name, and what is in them.

Readers call nearly every column of EDF and BDF files EEG: triggers, counters, eyes, movement. One
of them tells a decoder which picture was shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datafiles import electrodes

if TYPE_CHECKING:
    import mne

    from preprocessing.recordings import Trials

GLANCE_S = 0.8  # from the onset on, of each trial that is looked at
GLANCED, PAIRED = 32, 8  # trials that are looked at; pictures of which two trials are
FEW_VALUES = 16  # distinct ones; EEG has hundreds
STEADY = 0.9  # share of samples after which a counter or a trigger changes by the same step, or not
ROUNDED = 1e-5  # of the range: formats and units round what was equal
IDENTICAL = 1e-5  # of the signal: difference between two trials of a picture
MASTOIDS = ("A1", "A2", "M1", "M2")  # 10-05 knows them; they are references

# what recorders call everything else; names of the 10-05 system are never compared with it
_ELSEWHERE = re.compile(
    # anywhere in the name: eyes, heart, muscles, skin, pulse, breath, movement, triggers, device
    r".*(E[OCM]G|EKG|GSR|EDA\b|PLET|PPG|PULSE|RESP|THORA|ABDOM|AIRFLOW|SNORE|S[AP]O2|GYRO|ACCEL"
    r"|MAGNETO|AUX|TRIG|MARKER|STATUS|EVENT|COUNTER|PACKET|SAMPLE|INTERPOL|QUALITY|IMPED|BATTERY"
    r"|TIMESTAMP|PHOTO|DIODE|SENSOR|MASTOID|AUDIO|SOUND|JOYSTICK|KEYPAD|EAR ?LOBE).*"
    # the whole name, perhaps numbered
    r"|(EXG|ANA|BIP|ERG|DC|GPIO|EXT|EXTRA|PD|LIGHT|HR|HEART|ACC|MAG|TEMP|MRK|MK|STIM?|TRG|DIN"
    r"|AIN|ADC|DIGI|CNT|COUNT|SYNC|TIME|MIC|EDA|SC|BVP|CQ|RAW_CQ|BAT|POS|POSITION|ANALOG|INPUT|EYE"
    r"|PUPIL|GAZE|LIGHTSENSOR)[ _-]*([A-Z]{0,3}|[A-Z]?\d*)"
    # mastoids and ears
    r"|[LR]_?M(AS(T)?)?|MAS(T)?_?[LR12]|M[LR]|E(AR)?[LR]|[LR]EAR",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sorted:
    """The channels of a recording: EEG, and {channel: why it is left out}."""

    eeg: list[str]
    left: dict[str, str]

    def without(self, more: Mapping[str, str]) -> Sorted:
        """With ``more`` left out."""
        return Sorted([name for name in self.eeg if name not in more], {**self.left, **more})


def sort_by_name(raw: mne.io.BaseRaw, named: Sequence[str] = ()) -> Sorted:
    """By type and name; ``named`` were asked for by name and are EEG, whatever they are called."""
    sensors = meg_type(raw, named)
    if sensors:
        return _sorted_meg(raw, sensors)
    asked = {name.upper() for name in named}
    banks = electrodes.is_banked(raw.ch_names)
    pairs = list(zip(raw.ch_names, raw.get_channel_types(), strict=True))
    left = {
        name: why
        for name, kind in pairs
        if name.upper() not in asked and (why := _other(name, kind, banks))
    }
    rest = [name for name, _ in pairs if name not in left]
    if not banks:
        known = electrodes.standard_names(rest)
        strange = [name for name in rest if name not in known and name.upper() not in asked]
        if len(known) > len(strange):
            why = f"no 10-05 name, as {len(known)} others have"
            left |= dict.fromkeys(strange, why)
    return Sorted([name for name in rest if name not in left], left)


def meg_type(raw: mne.io.BaseRaw, named: Sequence[str] = ()) -> str:
    """``mag`` or ``grad``, whichever a recording has more sensors of; empty for one of EEG.

    Of both, what it has more channels of, or more of those that were ``named``. Reference sensors,
    far from the head, are neither.
    """
    of = dict(zip((name.upper() for name in raw.ch_names), raw.get_channel_types(), strict=True))
    asked = [of[name.upper()] for name in named if name.upper() in of]
    kinds = asked or list(of.values())
    most = max(("mag", "grad"), key=kinds.count)
    return most if kinds.count(most) > kinds.count("eeg") else ""


def _sorted_meg(raw: mne.io.BaseRaw, sensors: str) -> Sorted:
    """Sensors of one type, since another type's numbers are another quantity; all else is left."""
    pairs = list(zip(raw.ch_names, raw.get_channel_types(), strict=True))
    left = {name: f"of type {kind}, beside MEG" for name, kind in pairs if kind != sensors}
    return Sorted([name for name in raw.ch_names if name not in left], left)


def _other(name: str, kind: str, banks: bool) -> str:
    """Why a channel is no EEG; empty if nothing says so."""
    if kind != "eeg":
        return f"of type {kind}"
    if not banks and name.upper() in MASTOIDS:
        return "a mastoid or an ear"
    if (banks and electrodes.is_bank_name(name)) or electrodes.standard_names([name]):
        return ""
    return "named after something else" if _ELSEWHERE.fullmatch(name) else ""


# ---------------------------------------------------------------- what is in them


@dataclass(frozen=True)
class Glance:
    """Some trials as recorded: ``windows`` [n, C, S] in volts or tesla, of ``pictures`` [n]."""

    names: list[str]
    windows: np.ndarray
    pictures: np.ndarray

    @property
    def amplitude(self) -> float:
        """Median over channels of the standard deviation within a trial; NaN without a trial."""
        if not len(self.windows):
            return float("nan")
        return float(np.median(self.windows.std(axis=2).mean(axis=0)))

    def suspects(self) -> dict[str, str]:
        """{channel: why what is in it can be no EEG}; flat channels are a matter of their own."""
        if not len(self.windows):
            return {}
        found = {}
        for index, name in enumerate(self.names):
            why = _steady(self.windows[:, index]) or self._repeated(index)
            if why and np.ptp(self.windows[:, index]):
                found[name] = why
        return found

    def _repeated(self, channel: int) -> str:
        """Noise differs from trial to trial; what a computer writes does not."""
        pairs = []
        for picture in np.unique(self.pictures):
            own = self.windows[self.pictures == picture, channel]
            own = own - own.mean(axis=1, keepdims=True)
            if len(own) > 1:
                pairs.append((np.abs(own[0] - own[1]).max(), np.abs(own[0]).max()))
        same = len(pairs) > 1 and all(differ <= IDENTICAL * size for differ, size in pairs)
        return "identical in all trials of a picture" if same else ""


def _steady(windows: np.ndarray) -> str:
    """Why values [n, S] can be no EEG: too few of them, or a step that repeats."""
    grain = ROUNDED * np.ptp(windows) or 1.0
    values = len(np.unique(np.round(windows / grain)))
    if values <= FEW_VALUES:
        return f"{values} distinct values"
    _, counts = np.unique(np.round(np.diff(windows, axis=1) / grain), return_counts=True)
    if counts.max() > STEADY * counts.sum():
        return "the same step from sample to sample: a trigger or a counter"
    return ""


def glance(raw: mne.io.BaseRaw, names: Sequence[str], trials: Mapping[str, Trials]) -> Glance:
    """Look at some trials along the recording, two of a picture where it was shown twice."""
    length = round(GLANCE_S * raw.info["sfreq"])
    shown: dict[tuple[str, int], list[int]] = {}
    for partition, own in trials.items():
        for onset, picture in zip(own.onsets.tolist(), own.conditions.tolist(), strict=True):
            if 0 <= onset <= raw.n_times - length:
                shown.setdefault((partition, picture), []).append(onset)
    twice = [onsets for onsets in shown.values() if len(onsets) > 1]
    pairs = [(onsets[0], onsets[-1]) for onsets in _spread(twice, PAIRED)]
    single = _spread(sorted(onset for own in shown.values() for onset in own), GLANCED)
    chosen = [(number, onset) for number, pair in enumerate(pairs) for onset in pair]
    chosen += [(len(pairs) + number, onset) for number, onset in enumerate(single)]
    picks = [raw.ch_names.index(name) for name in names]
    windows = (
        [
            raw.get_data(picks=picks, start=onset, stop=onset + length, verbose="error")
            for _, onset in chosen
        ]
        if picks and length > 1
        else []
    )
    return Glance(
        list(names),
        np.array(windows).reshape(len(windows), len(names), -1 if windows else 0),
        np.array([number for number, _ in chosen[: len(windows)]], np.int64),
    )


def _spread(items: Sequence, number: int) -> list:
    """At most so many, evenly along the list."""
    if len(items) <= number:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, number).astype(int)]
