"""What the numbers of a recording mean: stated units, and amplitudes that no EEG or MEG has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datafiles import electrodes
from datafiles.electrodes import LEAST_T, LEAST_V, MOST_T, MOST_V, OTHER_SCALE
from preprocessing.edf import SUFFIXES as EDF_SUFFIXES
from preprocessing.signals import Sorted
from util import LOG, DataError

if TYPE_CHECKING:
    import mne


@dataclass(frozen=True)
class Quantity:
    """What sensors measure: limits of a recording's amplitude in ``unit``, and what people read.

    ``per_unit``: of ``shown`` in a unit.
    """

    name: str
    unit: str
    least: float
    most: float
    usual: float
    shown: str
    per_unit: float
    cure: str


EEG = Quantity(
    "EEG", "V", LEAST_V, MOST_V, 1e-5, "µV", 1e6,
    "say what its numbers are: --unit V, mV, uV or nV; or export it again",
)  # fmt: skip
MEG = Quantity("MEG", "T", LEAST_T, MOST_T, 1e-12, "fT", 1e15, "export it again, in tesla")
BY_UNIT = {of.unit: of for of in (EEG, MEG)}

VOLTS = {"V": 1.0, "mV": 1e-3, "uV": 1e-6, "nV": 1e-9}  # of --unit
# as MNE's readers know them; whatever else a header says, they take for volts
_MICRO = {"uV": 1e-6, "\u00b5V": 1e-6, "\u03bcV": 1e-6}
_EDF = {**_MICRO, "\x83\xcaV": 1e-6, "mV": 1e-3, "V": 1.0}
_BRAINVISION = {**_MICRO, "mV": 1e-3, "V": 1.0, "nV": 1e-9, "": 1e-6}  # empty: as it defines


def known_units(path: Path) -> Mapping[str, float] | None:
    """{unit: volts} that the reader of this file knows; None for formats with a fixed unit."""
    suffix = path.suffix.lower()
    return _EDF if suffix in EDF_SUFFIXES else _BRAINVISION if suffix == ".vhdr" else None


def in_volts(
    raw: mne.io.BaseRaw, path: Path, stated: Mapping[str, str], channels: Sorted, unit: str | None
) -> Sorted:
    """Scale the EEG in place where ``unit`` says other than the file; what is left is EEG.

    ``stated``: {channel: unit in the header}. A channel of another unit among 10-05 names is no
    voltage; raises DataError where the unit of EEG is unknown and no ``unit`` given.
    """
    known = known_units(path) or {}
    unknown = {
        name: stated[name] for name in channels.eeg if name in stated and stated[name] not in known
    }
    electrodes_of = electrodes.standard_names(channels.eeg)
    if not unit and len(unknown) < len(channels.eeg):
        other = {name: f"in {text!r}" for name, text in unknown.items()}
        channels = channels.without({k: why for k, why in other.items() if k not in electrodes_of})
    unknown = {name: text for name, text in unknown.items() if name in channels.eeg}
    if unknown and not unit:
        name, text = next(iter(unknown.items()))
        raise DataError(
            path,
            f"the unit {text!r} of {name} and {len(unknown) - 1} other channels",
            "V, mV, uV or nV",
            "give --unit uV, or what the numbers in the file are",
        )
    if unit:
        scale(raw, path, stated, channels, unit, known)
    return channels


def scale(
    raw: mne.io.BaseRaw,
    path: Path,
    stated: Mapping[str, str],
    channels: Sorted,
    unit: str,
    known: Mapping[str, float],
) -> None:
    """Take the numbers of the file for ``unit``, in place; the reader took them for another."""
    fixed = 1e-6 if path.suffix.lower() == ".set" else 1.0
    for name in channels.eeg:
        taken = known.get(stated[name], 1.0) if name in stated else fixed
        if taken != VOLTS[unit]:
            raw.load_data(verbose="error")
            factor = VOLTS[unit] / taken
            raw.apply_function(lambda values, by=factor: values * by, [name], verbose="error")
    LOG.info("%s: its numbers are taken for %s, as --unit says", path, unit)


def check_amplitude(
    path: Path, amplitude: float, stated: Mapping[str, str], of: Quantity = EEG
) -> None:
    """Raise DataError for what no EEG, or MEG, has; NaN, where nothing was seen, is accepted."""
    if amplitude < of.least or amplitude > of.most:
        units = sorted({repr(text) for text in stated.values()})
        raise DataError(
            path,
            f"an amplitude of {amplitude:.3g} {of.unit} (median standard deviation of channels), "
            f"its header stating {', '.join(units[:4]) or 'no unit'}",
            f"{of.least:g} to {of.most:g} {of.unit}; {of.name} has about {of.usual:g}",
            of.cure,
        )


def check_alike(amplitudes: Mapping[Path | str, float], unit: str = EEG.unit) -> None:
    """Raise DataError for recordings of one person of which one is in another unit."""
    found = {path: size for path, size in amplitudes.items() if size > 0}
    if not found:
        return
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    if found[high] > OTHER_SCALE * found[low]:
        raise DataError(
            high,
            f"an amplitude of {found[high]:.3g} {unit}, where {low} has {found[low]:.3g} {unit}",
            f"less than {OTHER_SCALE:g} times as much: one unit for all sessions of a person",
            "export them alike, or convert the one whose unit is wrong; --unit is of all of them",
        )
