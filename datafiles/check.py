"""What is there, missing or inconsistent in a data folder, found in seconds: dataset.py --check.

Only headers and samples are read: arrays are mapped, so that 40 GB cost what is looked at.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datafiles import electrodes
from datafiles.captions import read_captions
from datafiles.datasets import registry
from datafiles.eeg_files import (
    RAW_FOLDER,
    SIMULATED_NOTE,
    Recording,
    check_rows,
    list_subjects,
    parsed_recording,
    unit_of,
)
from datafiles.electrodes import LEAST_V, MOST_V, OTHER_SCALE, grade
from datafiles.feature_bank import open_bank
from datafiles.fetch import check_official
from datafiles.findings import NAMED, Findings, some, spaced
from datafiles.pictures import PictureError, picture_size, read_picture
from datafiles.stimuli import IMAGE_FOLDER, PARTITIONS, Stimulus, check_disjoint, list_stimuli
from modalities import AUTO
from rundirs.files import file_hash
from util import DataError

SAMPLED_TRIALS = 512  # of a file, whose every value is looked at
COMPARED_TRIALS = 4000  # of a file, of which three channels' first samples are
SAMPLED_PICTURES = 500  # of a partition, whose headers are read
# standard deviations: of volts as where they are preprocessed; of files of an unknown unit from
# there to the same in microvolts
SCALES = {
    "V": (LEAST_V, MOST_V),
    "T": (1e-15, 1e-10),
    "": (LEAST_V, 1e6 * MOST_V),
    "whitened": (1e-2, 1e2),
}
OTHER_PICTURES = (".gif", ".webp", ".tif", ".tiff", ".bmp", ".heic", ".avif")
Stimuli = dict[str, list[Stimulus]]
Recordings = dict[str, dict[str, Recording]]  # subject -> partition


# ---------------------------------------------------------------- pictures


def check_pictures(data_path: Path, full: bool, findings: Findings) -> Stimuli:
    """The pictures of both partitions, whichever can be listed."""
    stimuli: Stimuli = {}
    for partition in PARTITIONS:
        items = findings.attempt(list_stimuli, data_path, partition)
        if items:
            stimuli[partition] = items
            _count(data_path, partition, items, findings)
            _check_readable(partition, items, full, findings)
    if len(stimuli) == len(PARTITIONS):
        findings.attempt(check_disjoint, stimuli["training"], stimuli["test"])
        _check_copies(stimuli, findings)
    return stimuli


def _count(data_path: Path, partition: str, items: Sequence[Stimulus], findings: Findings) -> None:
    sizes: dict[str, int] = defaultdict(int)
    for item in items:
        sizes[item.folder] += 1
    each = sorted(set(sizes.values()))
    number = f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}"
    root = Path(data_path) / IMAGE_FOLDER[partition]
    findings.facts.append(
        f"{root.name}/: {len(items):,} pictures of {len(sizes):,} concepts, {number} of each"
    )
    if len(each) > 1:
        usual = max(each, key=list(sizes.values()).count)
        odd = [f"{name} ({count})" for name, count in sizes.items() if count != usual]
        findings.notes.append(
            f"{root.name}: other than {usual} pictures in {some(odd)}: is one lost?"
        )
    ignored = [
        f"{folder.name}/{name}"
        for folder in sorted({item.path.parent for item in items})
        for name in sorted(os.listdir(folder))
        if Path(name).suffix.lower() in OTHER_PICTURES
    ]
    if ignored:
        findings.notes.append(f"{root.name}: neither PNG nor JPEG, so ignored: {some(ignored)}")


def _check_readable(
    partition: str, items: Sequence[Stimulus], full: bool, findings: Findings
) -> None:
    """Headers of a sample, or all pictures whole."""
    from rundirs.progress import Progress

    places = range(len(items)) if full else spaced(len(items), SAMPLED_PICTURES)
    bad: list[PictureError] = []
    for place in Progress(places, desc=f"{partition} pictures", unit="picture", leave=False):
        try:
            read_picture(items[place].path) if full else picture_size(items[place].path)
        except PictureError as error:
            bad.append(error)
    if bad:
        findings.problems += bad[:NAMED]
    if len(bad) > NAMED:
        findings.notes.append(
            f"{IMAGE_FOLDER[partition]}: {len(bad)} of the {len(places)} pictures that were looked "
            "at cannot be read"
        )


def _check_copies(stimuli: Stimuli, findings: Findings) -> None:
    """Test pictures that are training pictures, byte for byte."""
    sizes = {item.path.stat().st_size for item in stimuli["test"]}
    known = {
        file_hash(item.path): item.key
        for item in stimuli["training"]
        if item.path.stat().st_size in sizes
    }
    same = ((item.key, known.get(file_hash(item.path))) for item in stimuli["test"])
    leaked = [f"{key} = {other}" for key, other in same if other]
    if leaked:
        findings.problem(
            IMAGE_FOLDER["test"],
            f"pictures that are training pictures, too: {some(leaked)}",
            "test pictures that training never sees",
            "take them out of one of the two, with their EEG rows",
        )


# ---------------------------------------------------------------- recordings


def _about(layout: registry.Layout) -> list[str]:
    """What is known of a form before a file of it is opened."""
    form = layout.form
    return [
        f"{form.title} ({form.name}) in {layout.folder}; licence: {form.licence}",
        f"order of the rows: {form.order}",
        *(f"known of this form: {trap}" for trap in form.traps),
    ]


def check_recordings(
    data_path: Path,
    wanted: Sequence[str] | None,
    stimuli: Stimuli,
    full: bool,
    findings: Findings,
    dataset: str,
) -> Recordings:
    """The EEG of all subjects, whichever can be read, each by itself. Raises UserError."""
    from rundirs.progress import Progress

    raw = sorted((Path(data_path) / RAW_FOLDER).glob("sub-*"))
    if raw:
        findings.facts.append(f"{RAW_FOLDER}/: {len(raw)} subjects' raw recordings")
    layout = registry.layout_in(data_path, dataset)
    if not layout.folder.is_dir():
        if not raw:
            findings.problem(
                layout.folder,
                "no such folder",
                "sub-XX/preprocessed_eeg_training.npy and preprocessed_eeg_test.npy",
                "unpack the preprocessed EEG there, or make it of recordings (preprocess.py)",
            )
        return {}
    findings.facts += _about(layout)
    names = findings.attempt(list_subjects, data_path, wanted, dataset) or []
    found: Recordings = {}
    for name in Progress(names, desc="recordings", unit="subject", leave=False):
        own = {}
        for partition in PARTITIONS:
            path = layout.file(name, partition)
            read = findings.attempt(parsed_recording, path, stimuli.get(partition))
            if read is not None:
                own[partition] = read
        if own:
            found[name] = own
            _check_subject(name, own, stimuli, full, findings)
    return found


def _check_subject(
    name: str, own: dict[str, Recording], stimuli: Stimuli, full: bool, findings: Findings
) -> None:
    folder = next(iter(own.values())).path.parent
    _describe(name, own, (folder / SIMULATED_NOTE).exists(), findings)
    _check_row_counts(name, own, stimuli, findings)
    for recording in own.values():
        _check_times(recording, findings)
        _check_values(recording, full, findings)
        if recording.path.resolve().parent != recording.path.parent.resolve():
            findings.notes.append(f"{recording.path} is a link to {recording.path.resolve()}")
    _check_twice(own, full, findings)


def _describe(name: str, own: dict[str, Recording], simulated: bool, findings: Findings) -> None:
    parts = [
        f"{partition} {len(item.eeg):,} pictures x {_repetitions(item)} trials"
        for partition, item in own.items()
    ]
    one = next(iter(own.values()))
    rate = f" at {rate_hz(one.times):.5g} Hz" if len(one.times) > 1 else ""
    mark = "; SIMULATED" if simulated else ""
    findings.facts.append(
        f"{name}: {', '.join(parts)}; {len(one.channels)} channels; {one.times[0]:.3f} to "
        f"{one.times[-1]:.3f} s{rate}; {one.eeg.dtype}{mark}"
    )
    regions = electrodes.region_by_channel(one.channels)
    strange = [channel for channel, region in regions.items() if region is None]
    if strange:
        findings.notes.append(f"{name}: channels without a known region: {some(strange)}")
    if len(own) == len(PARTITIONS) and own["test"].eeg.shape[1] < own["training"].eeg.shape[1]:
        findings.notes.append(
            f"{name}: fewer trials of a test picture than of a training picture: exchanged files?"
        )


def _repetitions(item: Recording) -> str:
    """``4``, or ``2 to 4`` where some trials were dropped."""
    least, most = int(item.trial_counts.min()), int(item.trial_counts.max())
    return f"{most}" if least == most else f"{least} to {most}"


def rate_hz(times: Sequence[float]) -> float:
    return (len(times) - 1) / (times[-1] - times[0])


def _check_row_counts(
    name: str, own: dict[str, Recording], stimuli: Stimuli, findings: Findings
) -> None:
    rows = {partition: len(item.eeg) for partition, item in own.items()}
    counts = {partition: len(items) for partition, items in stimuli.items()}
    exchanged = {"training": counts.get("test"), "test": counts.get("training")}
    if rows == exchanged and rows != counts:
        findings.problem(
            own["training"].path.parent,
            f"{rows['training']} training and {rows['test']} test conditions, for "
            f"{counts['training']} training and {counts['test']} test pictures",
            "training EEG of the training pictures",
            "training and test are exchanged: rename the two files, or the picture folders",
        )
        return
    for partition, item in own.items():
        if partition in stimuli:
            findings.attempt(check_rows, item, stimuli[partition])


def _check_times(recording: Recording, findings: Findings) -> None:
    steps = np.diff(recording.times)
    if len(steps) and np.abs(steps - np.median(steps)).max() > 0.02 * np.median(steps):
        findings.problem(
            recording.path,
            f"times in steps of {steps.min():.4g} to {steps.max():.4g} s",
            "one sampling rate",
            "preprocess the recording again",
        )


def _check_values(recording: Recording, full: bool, findings: Findings) -> None:
    """NaN, flat channels and absurd amplitudes in a sample of the rows, or in all."""
    eeg = recording.eeg
    rows = range(len(eeg)) if full else spaced(len(eeg), max(4, SAMPLED_TRIALS // eeg.shape[1]))
    bad, deviations = [], []
    for row in rows:
        trials = np.asarray(recording.trials(row), np.float64)
        if not len(trials):
            continue
        if np.isfinite(trials).all():
            deviations.append(trials.std(axis=2).mean(axis=0))
        else:
            repetition, channel, _ = np.argwhere(~np.isfinite(trials))[0]
            name = recording.channels[channel]
            bad.append(f"condition {row}, repetition {repetition}, channel {name}")
    if bad:
        short = "; float16 holds nothing above 65,504" if eeg.dtype.itemsize == 2 else ""
        findings.problem(
            recording.path,
            f"NaN or infinity in {len(bad)} of the {len(rows)} conditions that were looked at: "
            f"{'; '.join(bad[:NAMED])}{short}",
            "finite values",
            "preprocess the recording again",
        )
    if deviations:
        _judge_amplitude(recording, np.mean(deviations, axis=0), findings)


def _judge_amplitude(recording: Recording, deviations: np.ndarray, findings: Findings) -> None:
    """``deviations`` [C]: mean standard deviation over time within a trial."""
    middle = float(np.median(deviations))
    flat, noisy = grade(dict(zip(recording.channels, deviations.tolist(), strict=True)))
    if noisy:
        findings.notes.append(f"{recording.path}: noisy channels: {some(noisy)}")
    if flat:
        findings.problem(
            recording.path,
            f"flat channels: {some(flat)}",
            "a signal in every channel",
            "leave them out of --channels, or rebuild them (preprocess.py --interpolate_missing)",
        )
    unit = unit_of(recording)
    low, high = SCALES[unit]
    if not low <= middle <= high:
        findings.problem(
            recording.path,
            f"a standard deviation of {middle:.3g}{f' {unit}' if unit in ('V', 'T') else ''}",
            "about 1 (whitened), 1e-5 (volts), 10 (microvolts) or, of MEG, 1e-13 (tesla)",
            "check the unit that the recording was exported in",
        )


def _check_twice(own: dict[str, Recording], full: bool, findings: Findings) -> None:
    """Trials that are there twice, in one partition or in both."""
    first: dict[bytes, tuple[str, int, int]] = {}
    twice = []
    for partition, item in own.items():
        rows, repetitions, channels, _ = item.eeg.shape
        chosen = range(rows) if full else spaced(rows, max(4, COMPARED_TRIALS // repetitions))
        few = item.eeg[:, :, :: max(1, channels // 2), :16]  # three channels: three pages of a file
        for row in chosen:
            for repetition in range(repetitions):
                place = (partition, row, repetition)
                other = first.setdefault(few[row, repetition].tobytes(), place)
                if other != place and _same(own, place, other):
                    twice.append(f"{_trial(place)} = {_trial(other)}")
    if twice:
        findings.problem(
            next(iter(own.values())).path.parent,
            f"trials that are there twice: {some(twice)}",
            "each trial once; in training and test they give the answer away",
            "preprocess the recording again",
        )


def _same(own: dict[str, Recording], one: tuple[str, int, int], two: tuple[str, int, int]) -> bool:
    """Whether two trials are equal; constant ones are told of as flat channels."""
    a, b = (own[partition].eeg[row, repetition] for partition, row, repetition in (one, two))
    return bool(np.array_equal(a, b)) and bool((a != a.flat[0]).any())


def _trial(place: tuple[str, int, int]) -> str:
    return f"{place[0]} condition {place[1]}, repetition {place[2]}"


def compare_recordings(recordings: Recordings, findings: Findings) -> None:
    """All files beside the first: channels, times, trials."""
    files = [item for own in recordings.values() for item in own.values()]
    for item in files[1:]:
        _compare_channels(item, files[0], findings)
        _compare_times(item, files[0], findings)
    orders = {
        item.path.parent.name
        for item in files
        if item.channels != files[0].channels and set(item.channels) == set(files[0].channels)
    }
    if orders:
        findings.notes.append(
            f"channels in another order in {some(sorted(orders))}: they are found by name"
        )
    for partition in PARTITIONS:
        counts = {own[partition].eeg.shape[1] for own in recordings.values() if partition in own}
        if len(counts) > 1:
            findings.notes.append(f"{partition}: {sorted(counts)} trials of a picture by subject")


def _compare_channels(item: Recording, first: Recording, findings: Findings) -> None:
    differ = sorted(set(item.channels) ^ set(first.channels))
    if differ:
        findings.problem(
            item.path,
            f"{len(item.channels)} channels, {len(first.channels)} in {first.path}; not in both: "
            f"{some(differ)}",
            "the same channels in every file",
            "give --channels with those that all have, or preprocess them alike",
        )


def _compare_times(item: Recording, first: Recording, findings: Findings) -> None:
    alike = len(item.times) == len(first.times)
    if not alike or np.abs(np.subtract(item.times, first.times)).max() > 1e-3:
        findings.problem(
            item.path,
            f"{_window(item)}; {_window(first)} in {first.path}",
            "the same samples in every file",
            "preprocess them alike (--rate, --epoch)",
        )


def _window(item: Recording) -> str:
    rate = f" at {rate_hz(item.times):.5g} Hz" if len(item.times) > 1 else ""
    return f"{len(item.times)} samples from {item.times[0]:.3f} s{rate}"


def compare_scales(recordings: Recordings, findings: Findings) -> None:
    """Files in another unit than the first, judged by a few of their trials."""
    sizes = {}
    for item in (item for own in recordings.values() for item in own.values()):
        values = np.asarray(item.eeg[0, :4], np.float64)
        if np.isfinite(values).all() and np.ptp(values) > 0:
            sizes[item.path] = float(values.std())
    middle = float(np.median(list(sizes.values()) or [1.0]))
    for path, size in sizes.items():
        if not 1 / OTHER_SCALE < size / middle < OTHER_SCALE:
            findings.problem(
                path,
                f"a standard deviation of {size:.3g}, where the other files have {middle:.3g}",
                "one unit for all",
                "preprocess them alike",
            )


# ---------------------------------------------------------------- features


def check_bank(folder: Path, stimuli: Stimuli, findings: Findings) -> None:
    """Whether a feature bank is whole and belongs to the pictures."""
    for partition, items in stimuli.items():
        bank = findings.attempt(open_bank, folder, partition)
        if bank is None:
            continue
        findings.facts.append(
            f"{bank.path}: {len(bank.ids):,} pictures, CLIP {bank.clip.get('model')}"
        )
        rows = findings.attempt(bank.rows_for, items)
        if rows is not None and len(bank.ids) > len(items):
            findings.notes.append(
                f"{bank.path}: features of {len(bank.ids) - len(items)} pictures that are not there"
            )


# ---------------------------------------------------------------- all


def next_command(
    data_path: Path, recordings: Recordings, bank: Path | None, findings: Findings
) -> str:
    if findings.problems:
        return f"mend them, and again: python dataset.py --check --data_path {data_path}"
    if not recordings:
        return f"python preprocess.py --data_path {data_path}"
    if bank is None:
        return (
            f"python clip_feature_extractor.py --data_path {data_path} "
            "--output_path OUT/clip_features"
        )
    return (
        f"python train.py --data_path {data_path} --clip_feature_path {bank} --output_dir OUT/model"
    )


def examine(
    data_path: Path,
    subjects: Sequence[str] | None,
    captions: Path | None,
    bank: Path | None,
    full: bool,
    dataset: str = AUTO,
) -> Findings:
    """Look at everything below DATA; writes nothing.

    Raises DataError where there is no DATA, UserError where it is not clear which recordings.
    """
    if not Path(data_path).is_dir():
        raise DataError(
            data_path,
            "no such folder",
            "a folder with the recordings, training_images/ and test_images/",
            "check --data_path",
        )
    findings = Findings()
    stimuli = check_pictures(data_path, full, findings)
    recordings = check_recordings(data_path, subjects, stimuli, full, findings, dataset)
    check_official(data_path, full, findings)
    compare_recordings(recordings, findings)
    compare_scales(recordings, findings)
    if captions is not None:
        everything = [item for items in stimuli.values() for item in items]
        read = findings.attempt(read_captions, captions, everything)
        findings.facts += [f"{captions}: {len(read):,} captions"] if read else []
    if bank is not None:
        check_bank(bank, stimuli, findings)
    findings.facts.append(
        "every picture and trial was read"
        if full
        else f"at most {SAMPLED_PICTURES} pictures of a folder and {SAMPLED_TRIALS} trials of a "
        "file were read: --check full reads all"
    )
    findings.next = next_command(data_path, recordings, bank, findings)
    return findings
