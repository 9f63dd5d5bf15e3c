"""What a page is made of: runs, their records, and the data they were made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import args
from datafiles.datasets import registry
from datafiles.eeg_files import is_simulated, locate_test_eeg
from datafiles.stimuli import IMAGE_FOLDER, Stimulus, leaks_blocks, list_stimuli
from modalities import AUTO
from reporting.words import MOST_SUBJECTS, spoken_marks
from rundirs.files import read_csv, read_json
from rundirs.journal import read_journal, unfinished
from util import CHECKOUT, DataError, UserError

SHOWN_STAGES = ("train", "retrieval", "generate", "evaluate")  # whose runs are shown


# what a page is made from; not env.json, which grows with every start of a finished run
RECORDS = ("options.json", "inputs.json", "DONE*", "metrics.jsonl", "images*.jsonl",
           "results.json", "comparison.json", "ranks.csv", "pictures.csv")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run directory and its own records."""

    path: Path
    label: str
    stage: str
    options: dict[str, Any]
    provenance: dict[str, str]
    starts: list[dict[str, Any]]  # one per start, from env.json
    inputs: dict[str, Any]
    finished: bool


def program(stage: str) -> str:
    return args.STAGES[stage]().prog


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run once, labelled by its folder, or by ``parent/folder`` where two share a name."""
    distinct = list({Path(path).resolve(): Path(path) for path in paths}.values())
    names = Counter(path.resolve().name for path in distinct)
    runs = []
    for path in distinct:
        whole = path.resolve()
        label = whole.name if names[whole.name] == 1 else f"{whole.parent.name}/{whole.name}"
        runs.append(_read_run(path, label))
    return runs


def _read_run(path: Path, label: str) -> Run:
    expected = f"a run directory of {', '.join(map(program, SHOWN_STAGES))}"
    cure = "name the --output_dir that the stage was given"
    if not (path / "options.json").is_file():
        found = "a folder without options.json" if path.is_dir() else "no such folder"
        raise UserError("--runs", f"{path}: {found}", expected, cure)
    recorded = read_json(path / "options.json")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("options"), dict):
        raise DataError(path / "options.json", "something else", "the options of a run", cure)
    stage = recorded.get("stage")
    if stage not in SHOWN_STAGES:
        raise UserError("--runs", f"{path}: a run of {stage!r}", expected, cure)

    def optional(name: str, otherwise: Any) -> Any:
        return read_json(path / name) if (path / name).exists() else otherwise

    return Run(
        path,
        label,
        stage,
        recorded["options"],
        recorded.get("provenance", {}),
        optional("env.json", []),
        optional("inputs.json", {}),
        not unfinished(path) if stage == "generate" else any(path.glob("DONE*")),
    )


@dataclass(frozen=True)
class Drawing:
    """The pictures of a generate.py run. ``files``: (stimulus id, recipe) -> picture."""

    run: Run
    files: dict[tuple[int, str], Path]
    folders: dict[int, str]
    subject: str
    control: str | None
    prompt_source: str
    seed: int

    @property
    def marks(self) -> list[str]:
        return spoken_marks(self.prompt_source, self.control)


def read_drawing(run: Run) -> Drawing | None:
    """What a generate.py run has drawn so far, None before the first picture. Raises DataError."""
    records = read_journal(run.path)
    if not records:
        return None
    files, cure = {}, "remove DONE* and draw again: the same generate.py command goes on"
    for record in records:
        name = Path(record["file"])
        if not (run.path / name).is_file():
            raise DataError(run.path, f"no picture {name}", "the journal's pictures", cure)
        files[record["stimulus"], record["recipe"]] = run.path / name
    about = records[0]
    folders = {record["stimulus"]: record["folder"] for record in records}
    return Drawing(
        run,
        files,
        folders,
        about["subject"],
        about["control"],
        about["prompt_source"],
        about["seed"],
    )


@dataclass(frozen=True)
class Scores:
    """What an evaluate.py run found; ``ranks`` and ``pictures`` are its tables per stimulus."""

    run: Run
    results: dict[str, Any]
    ranks: list[dict[str, str]]
    pictures: list[dict[str, str]]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        return self.results["metrics"]


def read_scores(run: Run) -> Scores | None:
    """None for a run that has scored nothing (yet). Raises DataError for an older version's."""
    path = run.path / "results.json"
    if not path.exists():
        return None
    results = read_json(path)
    old = "metrics" not in results or any("scores" not in row for row in results["pictures"])
    if old:
        raise DataError(
            path,
            "made by an older version",
            "results with metrics, and scores of each picture row",
            "rerun evaluate.py into a new --output_dir",
        )
    return Scores(
        run,
        results,
        _rows_of(run.path / "ranks.csv", ("query", "stimulus", "picture", "rank", "chosen")),
        _rows_of(run.path / "pictures.csv", ("images", "recipe", "stimulus")),
    )


def _rows_of(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a table, [] without one. Raises DataError unless it has ``columns``."""
    rows = read_csv(path) if path.exists() else []
    lost = [name for name in columns if rows and rows[0].get(name) is None]
    if lost:
        raise DataError(path, f"no column {', '.join(lost)}", ", ".join(columns), "rerun evaluate")
    return rows


@dataclass(frozen=True)
class World:
    """DATA, as far as it is at hand. ``eeg``: subject -> its test recording."""

    path: Path | None
    stimuli: list[Stimulus]
    eeg: dict[str, Path]
    simulated: bool
    cache_dir: Path | None = None
    by_id: dict[int, Stimulus] = field(default_factory=dict)


def _recorded_paths(run: Run, name: str) -> Iterator[Path]:
    """A recorded path as it was given, from here and from the checkout, where it exists."""
    value = run.options.get(name)
    if value:
        yield from (path for path in (Path(value), CHECKOUT / value) if path.exists())


def find_data(given: Path | None, runs: Sequence[Run]) -> Path | None:
    """DATA as given, or as the first run recorded it whose folder is still there."""
    if given is not None:
        if not given.is_dir():
            raise UserError("--data_path", f"{given}: no such folder", "DATA", "check the path")
        return given
    for run in runs:
        for path in _recorded_paths(run, "data_path"):
            return path
        for path in _recorded_paths(run, "eeg_data"):
            found = locate_test_eeg(path, run.options.get("subject"), None)[2]
            if found is not None:
                return found
    return None


def open_world(
    given: Path | None,
    cache_dir: Path | None,
    runs: Sequence[Run],
    scores: Sequence[Scores],
    dataset: str = AUTO,
) -> World:
    """Stimuli and the subjects' test recordings. Raises UserError / DataError."""
    data = find_data(given, runs)
    said = any(item.results.get("simulated") for item in scores)
    if data is None:
        return World(None, [], {}, said)
    folder = data / IMAGE_FOLDER["test"]
    stimuli = list_stimuli(data, "test") if folder.is_dir() else []
    named = dict.fromkeys(subjects_of(runs, scores))
    forms = (dataset, *(one.options.get("dataset", AUTO) for one in runs))
    layout = registry.layout_in(data, next((form for form in forms if form != AUTO), AUTO))
    files = {name: layout.file(name, "test") for name in named or layout.subjects()}
    caches = (path for run in runs for path in _recorded_paths(run, "cache_dir"))
    return World(
        data,
        stimuli,
        {name: path for name, path in files.items() if path.is_file()},
        said or is_simulated(data),
        cache_dir or next(caches, None),
        {item.id: item for item in stimuli},
    )


def subjects_of(runs: Sequence[Run], scores: Sequence[Scores]) -> Iterator[str]:
    """The subjects that the runs speak of, those with pictures first."""
    for run in runs:
        if run.stage == "generate":
            drawing = read_drawing(run)
            if drawing:
                yield drawing.subject
    yield from (row["subject"] for item in scores for row in item.results["retrieval"])
    yield from (name for run in runs for name in run.options.get("subjects") or [])


def check_join(drawings: Sequence[Drawing], world: World) -> None:
    """Raise DataError for pictures of stimuli that DATA lacks: they would hang beside others."""
    for drawing in drawings:
        lost = [item for item in drawing.folders if world.stimuli and item not in world.by_id]
        if lost:
            raise DataError(
                drawing.run.path,
                f"pictures of stimuli that {world.path} lacks, e.g. {drawing.folders[lost[0]]}",
                "the same test_images",
                "give --data_path the DATA that the pictures were drawn from",
            )


def shown_eeg(world: World) -> dict[str, Path]:
    return dict(list(world.eeg.items())[:MOST_SUBJECTS])


@dataclass(frozen=True)
class Material:
    """Everything that was read of the runs, before anything is drawn."""

    runs: list[Run]
    drawings: list[Drawing]
    scores: list[Scores]
    world: World

    @property
    def leaks(self) -> bool:
        """Whether the split leaks, as DATA says, or any of the scores."""
        said = any(item.results.get("block_leak") for item in self.scores)
        return said or leaks_blocks(self.world.path)

    @property
    def window(self) -> tuple[float, float] | None:
        """The seconds that a trained model reads, where it does not read all."""
        found = [run.options.get("time_window") for run in self.runs if run.stage == "train"]
        return next((tuple(item) for item in found if item), None)


def gather(
    folders: Sequence[Path], data_path: Path | None, cache_dir: Path | None, dataset: str = AUTO
) -> Material:
    """Read and check all that the page shows, except pictures and EEG. Raises Stage errors.

    ``data_path`` and ``cache_dir`` None, ``dataset`` auto: as the runs in ``folders`` recorded.
    """
    runs = read_runs(folders)
    drawings = [found for run in runs if run.stage == "generate" and (found := read_drawing(run))]
    scores = [found for run in runs if run.stage == "evaluate" and (found := read_scores(run))]
    world = open_world(data_path, cache_dir, runs, scores, dataset)
    check_join(drawings, world)
    return Material(runs, drawings, scores, world)
