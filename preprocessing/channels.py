"""The channels of a recording: found by name, rebuilt where missing, re-referenced, filtered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datafiles import electrodes
from datafiles.electrodes import grade
from preprocessing.hints import explained
from util import DataError, UserError, repeated

if TYPE_CHECKING:
    import mne

    from preprocessing.recordings import Recorded

# fmt: off
THINGS_CHANNELS = (
    "Fp1", "Fp2", "AF7", "AF3", "AFz", "AF4", "AF8", "F7", "F5", "F3", "F1", "F2", "F4", "F6", "F8",
    "FT9", "FT7", "FC5", "FC3", "FC1", "FCz", "FC2", "FC4", "FC6", "FT8", "FT10", "T7", "C5", "C3",
    "C1", "Cz", "C2", "C4", "C6", "T8", "TP9", "TP7", "CP5", "CP3", "CP1", "CPz", "CP2", "CP4",
    "CP6", "TP8", "TP10", "P7", "P5", "P3", "P1", "Pz", "P2", "P4", "P6", "P8", "PO7", "PO3", "POz",
    "PO4", "PO8", "O1", "Oz", "O2",
)
# fmt: on
POSTERIOR = tuple(name for name in THINGS_CHANNELS if re.match("O|P", name))
_OLD_NAMES = {"T3": "T7", "T4": "T8", "T5": "P7", "T6": "P8"}
GROUPS = {"things": THINGS_CHANNELS, "posterior": POSTERIOR}
ALL = "all"
SURVEY_S = 10.0  # stretches whose mean is left out of a channel's amplitude: drifts are not noise


def plain_name(name: str) -> str:
    """A recorder's channel name without its ornaments, T3-T6 by their newer names."""
    short = re.sub(r"^EEG[ _-]+|[-_ ](REF|LE|AVG)$|\.+$", "", name.strip(), flags=re.IGNORECASE)
    return _OLD_NAMES.get(short.upper(), short)


def check_unique(path: Path, names: Sequence[str]) -> None:
    """Raise DataError for channels of one name, or that MNE has numbered for having one."""
    known = set(names)
    twice = repeated(
        name[:-2] if {f"{name[:-2]}-0", f"{name[:-2]}-1"} <= known else name for name in names
    )
    if twice:
        raise DataError(
            path,
            f"duplicate channel names: {', '.join(twice)}",
            "a name of its own for each channel",
            "rename them in the recording",
        )


def rename_channels(raw: mne.io.BaseRaw, path: Path) -> dict[str, str]:
    """Give EEG channels their 10-05 names: ``EEG FP1-REF`` and ``Fp1.`` -> ``Fp1``; new by old."""
    check_unique(path, raw.ch_names)
    kinds = zip(raw.ch_names, raw.get_channel_types(), strict=True)
    plain = {name: plain_name(name) for name, kind in kinds if kind == "eeg"}
    standard = electrodes.standard_names(list(plain.values()))
    new = {name: standard.get(short, short) for name, short in plain.items()}
    check_unique(path, [*new.values(), *(name for name in raw.ch_names if name not in new)])
    raw.rename_channels(new, verbose="error")
    return new


def by_name(choice: Sequence[str] | None) -> tuple[str, ...]:
    """The channels that ``--channels`` names one by one; none for a group or all."""
    if not choice or (len(choice) == 1 and choice[0] in (ALL, *GROUPS)):
        return ()
    return tuple(choice)


def wanted_channels(choice: Sequence[str], available: Sequence[str]) -> list[str]:
    """The names that ``--channels`` means, spelled as 10-05 does. Raises UserError."""
    if list(choice) == [ALL]:
        return list(available)
    named = list(GROUPS.get(choice[0], choice)) if len(choice) == 1 else list(choice)
    standard = electrodes.standard_names(named)
    own = {name.upper(): name for name in available}
    named = [standard.get(name, own.get(name.upper(), name)) for name in named]
    twice = repeated(named)
    if twice:
        raise UserError("--channels", f"{', '.join(twice)} twice", "each once", "name it once")
    return named


@dataclass(frozen=True)
class ChannelReader:
    """The wanted channels of a recording, read stretch by stretch.

    ``flat``, ``noisy``, ``bad`` (marked so in the file), ``rebuilt``: names, for people.
    """

    raw: mne.io.BaseRaw
    path: Path
    names: list[str]
    picks: list[int]
    flat: list[str]
    noisy: list[str]
    bad: list[str]
    rebuilt: list[str]

    @property
    def rate_hz(self) -> float:
        return float(self.raw.info["sfreq"])

    @property
    def samples(self) -> int:
        return int(self.raw.n_times)

    def read(self, start: int, stop: int) -> np.ndarray:
        """float64 [C, stop - start] in volts or tesla."""
        with explained(self.path):
            return self.raw.get_data(picks=self.picks, start=start, stop=stop, verbose="error")


def prepare(
    recorded: Recorded,
    wanted: Sequence[str],
    interpolate: bool,
    reference: Sequence[str] | None,
    band_hz: Sequence[float] | None,
) -> ChannelReader:
    """Match channels by name; rebuild, re-reference and filter as asked. Raises DataError.

    Without any of the latter the recording is neither copied nor loaded.
    """
    raw, path, eeg = recorded.raw, recorded.path, recorded.channels.eeg
    refuse_of_meg(recorded, interpolate, reference)
    actual = {name.upper(): name for name in eeg}
    lost = [name for name in wanted if name.upper() not in actual]
    read = [actual[name.upper()] for name in wanted if name.upper() in actual]
    with explained(path):
        flat, noisy = grade(survey(raw, path, read))
    strange = {name: why for name, why in recorded.suspects.items() if name in read}
    if not interpolate:
        refuse_missing(recorded, wanted, lost)
        refuse_flat(path, flat)
        refuse_strange(path, strange)
    bad = [name for name in raw.info["bads"] if name in read]
    rebuilt = [*lost, *dict.fromkeys([*flat, *bad, *strange])] if interpolate else []
    if rebuilt or reference or band_hz:
        useless = [name for name in raw.info["bads"] if name not in read]
        raw = raw.copy().pick([name for name in eeg if name not in useless], verbose="error")
        with explained(path):
            raw.load_data(verbose="error")
    if rebuilt:
        raw = rebuild(raw, path, lost, rebuilt)
    if reference:
        rereference(raw, path, reference)
    if band_hz:
        band_pass(raw, path, band_hz)
    picks = [raw.ch_names.index(actual.get(name.upper(), name)) for name in wanted]
    return ChannelReader(raw, path, list(wanted), picks, flat, noisy, bad, rebuilt)


def refuse_of_meg(recorded: Recorded, interpolate: bool, reference: Sequence[str] | None) -> None:
    """Raise UserError for what is done to electrodes, asked of a recording of MEG."""
    asked = {"--interpolate_missing": interpolate, "--reference": reference}
    flag = next((name for name, value in asked.items() if value), None)
    if flag and recorded.quantity.name == "MEG":
        raise UserError(
            flag, f"given, and MEG in {recorded.path.name}", "electrodes",
            "leave it out; name the sensors to keep with --channels",
        )  # fmt: skip


def refuse_missing(recorded: Recorded, wanted: Sequence[str], lost: Sequence[str]) -> None:
    """Raise DataError if there are ``lost`` channels."""
    if lost:
        eeg, left = recorded.channels.eeg, recorded.channels.left
        others = "; ".join(f"{name} ({why})" for name, why in list(left.items())[:8])
        raise DataError(
            recorded.path,
            f"no channel {', '.join(lost)}; it has {', '.join(eeg) or 'no EEG'}"
            + (f"; no EEG are {others}" if left else ""),
            f"the {len(wanted)} channels of --channels",
            "choose others with --channels, or rebuild them with --interpolate_missing",
        )


def refuse_strange(path: Path, strange: Mapping[str, str]) -> None:
    """Raise DataError for channels with an electrode's name that hold something else."""
    if strange:
        raise DataError(
            path,
            f"channels that hold no EEG: {', '.join(f'{n} ({w})' for n, w in strange.items())}",
            "a signal of an electrode in every channel",
            "leave them out with --channels, or rebuild them with --interpolate_missing; who names "
            "them one by one in --channels keeps them",
        )


def refuse_flat(path: Path, flat: Sequence[str]) -> None:
    """Raise DataError if there are ``flat`` channels."""
    if flat:
        raise DataError(
            path,
            f"flat channels: {', '.join(flat)}",
            "a signal in every channel",
            "leave them out with --channels, or rebuild them with --interpolate_missing",
        )


def survey(raw: mne.io.BaseRaw, path: Path, names: Sequence[str]) -> dict[str, float]:
    """{channel: standard deviation in volts, within stretches of 10 s}. DataError for NaN."""
    step = max(1, round(SURVEY_S * raw.info["sfreq"]))
    picks = [raw.ch_names.index(name) for name in names]
    total = np.zeros(len(picks))
    for start in range(0, raw.n_times if picks else 0, step):
        stop = min(start + step, raw.n_times)
        data = raw.get_data(picks=picks, start=start, stop=stop, verbose="error")
        if not np.isfinite(data).all():
            channel, sample = np.argwhere(~np.isfinite(data))[0]
            raise DataError(
                path,
                f"NaN or infinity in channel {names[channel]} at sample {start + sample}",
                "finite values",
                "export the recording again, or leave the channel out with --channels",
            )
        total += data.var(axis=1) * (stop - start)
    return dict(zip(names, np.sqrt(total / raw.n_times).tolist(), strict=True))


def places_of(raw: mne.io.BaseRaw, lost: Sequence[str]) -> dict[str, np.ndarray]:
    """{channel: [3] in metres}: as the file has them if it has all, else by their names.

    A channel that is not in the file has no place there, so that all are taken by name.
    """
    montage = raw.get_montage()
    own = {} if montage is None else montage.get_positions()["ch_pos"]
    own = {name: place for name, place in own.items() if np.isfinite(place).all()}
    spread = len({tuple(np.round(place, 6)) for place in own.values()}) == len(own)
    if not lost and spread and all(name in own for name in raw.ch_names):
        return own
    return electrodes.positions([*raw.ch_names, *lost])


def rebuild(
    raw: mne.io.BaseRaw, path: Path, lost: Sequence[str], rebuilt: Sequence[str]
) -> mne.io.BaseRaw:
    """Interpolate channels by spherical splines from the others' places. Raises DataError."""
    import mne

    known = places_of(raw, lost)
    usable = [name for name in raw.ch_names if name in known and name not in rebuilt]
    homeless = [name for name in rebuilt if name not in known]
    if homeless or len(usable) < len(rebuilt):
        raise DataError(
            path,
            f"{', '.join(homeless or rebuilt)} to rebuild from {len(usable)} channels of known "
            "place",
            "places in the file, names of the 10-05 system or of a whole BioSemi cap, and no more "
            "rebuilt than recorded channels",
            "choose fewer channels with --channels, or save the places in the recording",
        )
    whole = raw.copy().pick([name for name in raw.ch_names if name in known], verbose="error")
    if lost:
        info = mne.create_info(list(lost), raw.info["sfreq"], "eeg", verbose="error")
        empty = mne.io.RawArray(np.zeros((len(lost), raw.n_times)), info, verbose="error")
        whole.add_channels([empty], force_update_info=True)
    whole.set_montage(mne.channels.make_dig_montage(known, coord_frame="head"), verbose="error")
    whole.info["bads"] = list(rebuilt)
    whole.interpolate_bads(reset_bads=True, verbose="error")
    strange = [name for name in raw.ch_names if name not in known]
    if strange:
        whole.add_channels([raw.copy().pick(strange, verbose="error")], force_update_info=True)
    return whole


def rereference(raw: mne.io.BaseRaw, path: Path, reference: Sequence[str]) -> None:
    """Subtract the average, or the mean of the named channels, in place. Raises DataError."""
    actual = {name.upper(): name for name in raw.ch_names}
    average = [name.lower() for name in reference] == ["average"]
    lost = [] if average else [name for name in reference if name.upper() not in actual]
    if lost:
        raise DataError(
            path,
            f"no channel {', '.join(lost)}; it has {', '.join(raw.ch_names)}",
            "average, or channels of the recording",
            "mend --reference",
        )
    channels = "average" if average else [actual[name.upper()] for name in reference]
    raw.set_eeg_reference(channels, verbose="error")


def band_pass(raw: mne.io.BaseRaw, path: Path, band_hz: Sequence[float]) -> None:
    """Zero-phase FIR filter of all channels of a recording, in place. Raises DataError."""
    low, high = band_hz
    if high >= raw.info["sfreq"] / 2:
        raise DataError(
            path,
            f"{raw.info['sfreq']:g} Hz, which holds nothing above {raw.info['sfreq'] / 2:g} Hz",
            f"a rate of more than {2 * high:g} Hz for --band_pass {low:g} {high:g}",
            "choose a lower HIGH_HZ",
        )
    raw.filter(low or None, high, picks="all", verbose="error")
