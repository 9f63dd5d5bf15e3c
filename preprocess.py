"""Stage 0: raw EEG -> ``Preprocessed_data_250Hz/sub-XX``, session by session."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import args

if __name__ == "__main__":
    args.answer_quick_questions("preprocess")


import util
from datafiles.datasets.form import OSF_SHAPE
from datafiles.datasets.things_eeg2 import EEG_FOLDER
from datafiles.eeg_files import SIMULATED_NOTE
from datafiles.stimuli import IMAGE_FOLDER, list_stimuli
from preprocessing import quality
from preprocessing.amplitude import check_alike
from preprocessing.channels import THINGS_CHANNELS, refuse_missing, wanted_channels
from preprocessing.epochs_file import EpochsChoice, convert_epochs
from preprocessing.merging import check_counts, merge_subject
from preprocessing.own_recordings import own_subjects
from preprocessing.recordings import Recorded, RecordingSource, Subject, Take, published_subjects
from preprocessing.sessions import Settings, check_distances, process_session, refuse_rare
from rundirs.closing import call, tell_end
from rundirs.directory import RunDirectory, open_run
from rundirs.files import file_hash, json_hash, read_json, write_json
from util import LOG, DataError, UserError


def find_subjects(source: RecordingSource) -> list[Subject]:
    """Whose recordings they are. Raises UserError / DataError."""
    return own_subjects(source) if source.raw else published_subjects(source)


def find_channels(
    asked: Settings, source: RecordingSource, subjects: Sequence[Subject]
) -> list[str]:
    """The channels of the file; headers, events and tables are checked on the way."""
    choice = asked.channels or [subjects[0].default_channels]
    read: dict[str, Path] = {}
    every = [one for subject in subjects for one in look(subject, asked, source.data_path, read)]
    if not source.raw:
        return wanted_channels(choice, THINGS_CHANNELS)
    holding_none = {name for recorded in every for name in recorded.channels.left}
    names = [name for name in every[0].channels.eeg if name not in holding_none]
    names = wanted_channels(choice, names)
    if not asked.interpolate_missing:
        for recorded in every:
            has = {name.upper() for name in recorded.channels.eeg}
            refuse_missing(recorded, names, [name for name in names if name.upper() not in has])
    return names


def look(
    subject: Subject, asked: Settings, data_path: Path, read: dict[str, Path]
) -> list[Recorded]:
    """A subject's recordings, opened; what their headers and events have wrong is refused.

    ``read``: {content: file} of the recordings that were looked at before.
    """
    shown: dict[str, Counter[int]] = {}
    found = []
    for take in (take for session in subject.sessions for take in session.takes):
        recorded = take.open()
        check_distances(recorded, asked)
        refuse_twice(take, read)
        for partition, trials in recorded.trials.items():
            own = Counter(trials.conditions.tolist())
            most = subject.repetitions.get(partition)
            refuse_rare(own, most, recorded.path)
            shown.setdefault(partition, Counter()).update(
                own if most is None else dict.fromkeys(own, most)
            )
        found.append(recorded)
    unit = found[0].quantity.unit
    check_alike({recorded.path: recorded.amplitude for recorded in found}, unit)
    if subject.rows:
        check_all_shown(subject, shown, data_path)
    else:
        for partition, counts in shown.items():
            where = f"{subject.name}: {partition} trials of all sessions"
            check_counts(counts, None, bool(subject.repetitions), where)
    return found


def refuse_twice(take: Take, read: dict[str, Path]) -> None:
    """Raise DataError for a subject's recording that is another one's copy; note it in ``read``."""
    content = json_hash(sorted(file_hash(file) for file in take.signal_files()))
    if content in read:
        raise DataError(
            take.path,
            f"the same signal as {read[content]}",
            "each recording once",
            "name it once: its trials would stand in two places",
        )
    read[content] = take.path


def check_all_shown(
    subject: Subject, shown: Mapping[str, Mapping[int, int]], data_path: Path
) -> None:
    """Raise DataError for pictures that no event shows: a row of EEG belongs to each."""
    for partition, pictures in subject.rows.items():
        lost = sorted(set(range(pictures)) - shown.get(partition, {}).keys())
        if lost:
            keys = [item.key for item in list_stimuli(data_path, partition)]
            raise DataError(
                f"{subject.name}: events",
                f"none for {len(lost)} of {len(keys)} {partition} pictures, e.g. {keys[lost[0]]}",
                "at least one trial of each picture",
                f"complete the table, or take those pictures out of {IMAGE_FOLDER[partition]}/",
            )


def session_settings(
    asked: Settings, source: RecordingSource, subjects: Sequence[Subject]
) -> Settings:
    """With the channels found. Raises UserError for what later stages take for another file."""
    settings = replace(asked, channels=find_channels(asked, source, subjects))
    if (len(settings.channels), settings.kept) == OSF_SHAPE:
        raise UserError(
            "--channels, --rate, --epoch",
            "17 channels x 100 samples, which later stages refuse as the files of the OSF page",
            "another number of channels or samples",
            "give --rate 250, the default, or --epoch -0.2 0.8",
        )
    if not settings.kept:
        raise UserError(
            "--rate", f"{settings.rate:g} Hz: no sample in --epoch", "some", "give more"
        )
    return settings


def process_subject(subject: Subject, settings: Settings, run: RunDirectory) -> None:
    """All sessions, those that are done already left alone; then the subject's two files."""
    folder = run.path / "parts"
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".*.tmp"):  # by a kill
        left.unlink()
    if subject.simulated:
        write_json(run.path / SIMULATED_NOTE, read_json(subject.simulated))
    for number, session in enumerate(subject.sessions):
        if (folder / f"{session.name}.json").exists():
            LOG.info("%s %s: already cut", subject.name, session.name)
            continue
        process_session(subject, session, settings, folder, len(subject.sessions) - number)
        for record in read_json(folder / f"{session.name}.json"):
            LOG.info("%s %s", subject.name, quality.line(record))
    merge_subject(subject, settings, run)
    run.finish({"sessions": len(subject.sessions), "channels": len(settings.channels)})
    shutil.rmtree(folder)


def forget_if_fresh(run: RunDirectory) -> None:
    """Remove a run whose first session failed, so that it can be begun with mended flags."""
    if not any((run.path / "parts").glob("ses-*.json")):
        shutil.rmtree(run.path)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Preprocess all subjects, or go on, or do nothing for those that are finished."""
    options = args.resolve("preprocess", argv)
    if options.values.epochs_file:
        print(*convert_epochs(options.settings(EpochsChoice)), sep="\n")
        return 0
    source = options.settings(RecordingSource)
    root = Path(options.values.output_path or source.data_path) / EEG_FOLDER
    with util.foreign_errors_logged(root / "log.txt"):
        subjects = find_subjects(source)
        settings = session_settings(options.settings(Settings), source, subjects)
        inputs = {subject.name: subject.inputs() for subject in subjects}
    plan = [
        f"{subject.name}: cut {len(subject.sessions)} sessions to {len(settings.channels)} "
        f"channels x {settings.kept} samples at {settings.rate:g} Hz, {settings.dtype}"
        for subject in subjects
    ]
    for subject in subjects:  # refuse before the first hour of work
        earlier = RunDirectory(root / subject.name, options.stage)
        earlier.check(options.recorded(), inputs[subject.name], options.fixed)
    for subject in subjects:
        run = open_run(options, root / subject.name, inputs[subject.name], plan)
        if not run.finished:
            try:
                process_subject(subject, settings, run)
            except util.StageError:
                forget_if_fresh(run)
                raise
        print((run.path / quality.TEXT).read_text(encoding="utf-8"), end="")
    data = options.values.output_path or source.data_path
    features = call(
        "clip_feature_extractor.py", data_path=data, output_path=data.parent / "clip_features"
    )
    tell_end({"trials": root}, [features])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
