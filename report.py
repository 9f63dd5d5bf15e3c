"""Stage 5: one self-contained HTML page that shows what any set of runs did and found.

A view, not a run: it reads run directories and writes one file, which opens from disk without any
network. The file carries a hash of everything it was made from; while that holds, it is left alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("report")

import numpy as np

import dataset
import util
from datafiles.pictures import read_picture
from datafiles.stimuli import Stimulus
from evaluation import picture_scores
from modalities import NAMES, SITES, recipes
from reporting import svg
from reporting.svg import (
    CONTROL_LABELS,
    HEADLINE_METRICS,
    INTERVAL,
    MOST_SUBJECTS,
    as_number,
    bracket,
    marks_of,
    number,
    percent,
    plain,
    recipe_labels,
    recipe_title,
)
from sdxl import injection_map
from util import DataError, StageError, UserError

HERE = Path(__file__).resolve().parent
TEMPLATES = HERE / "reporting" / "templates"
GENERATOR = "eeg2image report.py"
STAGES = ("train", "retrieval", "generate", "evaluate")  # whose runs are shown
# what a page is made from; not env.json, which grows with every start of a finished run
RECORDS = ("options.json", "inputs.json", "DONE*", "metrics.jsonl", "images*.jsonl",
           "results.json", "comparison.json", "ranks.csv", "pictures.csv")  # fmt: skip
PICTURE_BUDGET = 11_000_000  # characters of data URIs; the whole page is to stay below 15 MB
# pixels and WebP quality, tried from the left until the budget holds
ENCODINGS = ((256, 82), (192, 78), (160, 74), (144, 72), (128, 70), (116, 68), (104, 64),
             (96, 60), (80, 54), (64, 46), (48, 40), (40, 24), (32, 10))  # fmt: skip


# ---------------------------------------------------------------- runs


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
    expected = f"a run directory of {', '.join(map(program, STAGES))}"
    cure = "name the --output_dir that the stage was given"
    if not (path / "options.json").is_file():
        found = "a folder without options.json" if path.is_dir() else "no such folder"
        raise UserError("--runs", f"{path}: {found}", expected, cure)
    recorded = util.read_json(path / "options.json")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("options"), dict):
        raise DataError(path / "options.json", "something else", "the options of a run", cure)
    stage = recorded.get("stage")
    if stage not in STAGES:
        raise UserError("--runs", f"{path}: a run of {stage!r}", expected, cure)

    def optional(name: str, otherwise: Any) -> Any:
        return util.read_json(path / name) if (path / name).exists() else otherwise

    return Run(
        path,
        label,
        stage,
        recorded["options"],
        recorded.get("provenance", {}),
        optional("env.json", []),
        optional("inputs.json", {}),
        any(path.glob("DONE*")),
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
        return marks_of(self.prompt_source, self.control)


def read_drawing(run: Run) -> Drawing | None:
    """What a generate.py run has drawn so far, None before the first picture. Raises DataError."""
    records = picture_scores.read_journal(run.path)
    if not records:
        return None
    files, cure = {}, "draw it again: the same generate.py command goes on where it stopped"
    for record in records:
        name = Path(record["file"])
        if name.is_absolute() or ".." in name.parts or not (run.path / name).is_file():
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
    results = util.read_json(path)
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
    rows = util.read_csv(path) if path.exists() else []
    lost = [name for name in columns if rows and rows[0].get(name) is None]
    if lost:
        raise DataError(path, f"no column {', '.join(lost)}", ", ".join(columns), "rerun evaluate")
    return rows


# ---------------------------------------------------------------- the data behind them


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
        yield from (path for path in (Path(value), HERE / value) if path.exists())


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
            found = dataset.locate_test_eeg(path, run.options.get("subject"), None)[2]
            if found is not None:
                return found
    return None


def open_world(
    given: Path | None, cache_dir: Path | None, runs: Sequence[Run], scores: Sequence[Scores]
) -> World:
    """Stimuli and the subjects' test recordings. Raises UserError / DataError."""
    data = find_data(given, runs)
    said = any(item.results.get("simulated") for item in scores)
    if data is None:
        return World(None, [], {}, said)
    folder = data / dataset.IMAGE_FOLDER["test"]
    stimuli = dataset.list_stimuli(data, "test") if folder.is_dir() else []
    named = dict.fromkeys(_subjects(runs, scores))
    if not named and (data / dataset.EEG_FOLDER).is_dir():
        named = dict.fromkeys(dataset.list_subjects(data, None))
    files = {name: dataset.eeg_file(data, name, "test") for name in named}
    caches = (path for run in runs for path in _recorded_paths(run, "cache_dir"))
    return World(
        data,
        stimuli,
        {name: path for name, path in files.items() if path.is_file()},
        said or dataset.is_simulated(data),
        cache_dir or next(caches, None),
        {item.id: item for item in stimuli},
    )


def _subjects(runs: Sequence[Run], scores: Sequence[Scores]) -> Iterator[str]:
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


# ---------------------------------------------------------------- identity of a page


def page_hash(
    runs: Sequence[Run], world: World, pictures: Mapping[Path, str], labels: Sequence[str]
) -> str:
    """sha256 over everything the page shows and the code that shows it."""
    beside = ("report", "args", "modalities", "sdxl/injection_map", "datafiles/electrodes")
    code = [HERE / f"{name}.py" for name in beside]
    code += sorted((HERE / "reporting").rglob("*.py"))
    code += sorted([*TEMPLATES.iterdir(), *injection_map.PRESETS.glob("*.yaml")])
    records = {
        run.label: {
            str(path.relative_to(run.path)): util.file_hash(path)
            for pattern in RECORDS
            for path in sorted(run.path.glob(pattern))
        }
        for run in runs
    }
    return util.json_hash(
        {
            "code": {str(path.relative_to(HERE)): util.file_hash(path) for path in code},
            "runs": records,
            "labels": list(labels),
            "pictures": sorted(["/".join(path.parts[-3:]), of] for path, of in pictures.items()),
            "stimuli": [item.key for item in world.stimuli],
            "eeg": {name: util.file_hash(path) for name, path in shown_eeg(world).items()},
            "simulated": world.simulated,
        }
    )


def shown_eeg(world: World) -> dict[str, Path]:
    return dict(list(world.eeg.items())[:MOST_SUBJECTS])


def recorded_hash(output: Path) -> str | None:
    """What an earlier page was made from, None without one. UserError for a foreign file."""
    if not output.exists():
        return None
    head = output.read_bytes()[:4096].decode("utf-8", "replace") if output.is_file() else ""
    match = re.search(r'<meta name="inputs" content="([0-9a-f]{64})">', head)
    if f'content="{GENERATOR}"' not in head or not match:
        raise UserError(
            "--output",
            f"{output}: something that report.py did not write",
            "a new file or an earlier report",
            "name another file",
        )
    return match[1]


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Thumbnails:
    """Data URIs, each once, and the place of each picture file among them."""

    uris: list[str]
    places: dict[Path, int]
    px: int


def encode_picture(picture: Any, px: int, quality: int) -> bytes:
    """A PIL picture, at most ``px`` wide and high, as WebP, or JPEG where Pillow has none."""
    from PIL import features

    small = picture.copy()
    small.thumbnail((px, px), resample=1)  # 1 = Lanczos; never enlarges
    buffer = io.BytesIO()
    if features.check("webp"):
        small.save(buffer, format="WEBP", quality=quality, method=4)
    else:
        small.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    kind = "webp" if content[:4] == b"RIFF" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def open_picture(path: Path, px: int) -> Any:
    """A PIL picture, reduced to ``px``. Raises PictureError."""
    picture = read_picture(path)
    picture.thumbnail((px, px), resample=1)
    return picture


def choose_encoding(paths: Sequence[Path], large: set[Path]) -> int:
    """The first of ENCODINGS that holds the budget, judged by 40 pictures spread over all."""
    sample = paths[:: max(1, len(paths) // 40)]
    most = ENCODINGS[0][0] * 3 // 2
    opened = [(path in large, open_picture(path, most)) for path in sample]
    weight = [len(large.intersection(paths)), len(paths) - len(large.intersection(paths))]
    for choice, (px, quality) in enumerate(ENCODINGS):
        sizes: dict[bool, list[int]] = {True: [], False: []}
        for _, picture in opened:
            for big in (True, False):
                side = px * 3 // 2 if big else px
                sizes[big].append(len(data_uri(encode_picture(picture, side, quality))))
        means = [float(np.mean(sizes[big])) for big in (True, False)]
        if sum(np.multiply(weight, means)) < 0.92 * PICTURE_BUDGET:
            return choice
    return len(ENCODINGS) - 1


def make_thumbnails(hashes: Mapping[Path, str], large: set[Path]) -> Thumbnails:
    """Every picture of ``hashes`` {file: hash} once, half as large again where ``large``."""
    first: dict[str, Path] = {}
    for path in sorted(hashes, key=lambda path: path not in large):  # large ones represent others
        first.setdefault(hashes[path], path)
    distinct = list(first.values())
    start = choose_encoding(distinct, large) if distinct else 0
    for px, quality in ENCODINGS[start:]:
        uris = []
        for path in distinct:
            side = px * 3 // 2 if path in large else px
            uris.append(data_uri(encode_picture(open_picture(path, side), side, quality)))
        if sum(map(len, uris)) <= PICTURE_BUDGET:
            break
        util.LOG.info("pictures of %d px take too much room, making them smaller", px)
    places = {digest: place for place, digest in enumerate(first)}
    return Thumbnails(uris, {path: places[digest] for path, digest in hashes.items()}, px)


# ---------------------------------------------------------------- gallery


def main_and_controls(drawings: Sequence[Drawing]) -> tuple[list[Drawing], list[Drawing]]:
    """The runs to look at, and the controls shown beside them; controls alone are looked at."""
    mains = [item for item in drawings if item.control is None]
    if not mains:
        return list(drawings), []
    return mains, [item for item in drawings if item.control is not None]


SHORT_CONTROLS = {
    "shuffled_eeg": "shuffled EEG",
    "noise_eeg": "noise",
    "mean_embedding": "mean",
    "true_embedding": "ceiling",
}


def control_label(drawing: Drawing, subject: str) -> str:
    text = CONTROL_LABELS.get(drawing.control or "", f"fused, {drawing.control}")
    return text if drawing.subject == subject else f"{text}, {drawing.subject}"


def gallery_pictures(drawings: Sequence[Drawing], world: World) -> dict[Path, bool]:
    """{picture file: whether it is shown large} of all that the gallery shows."""
    mains, controls = main_and_controls(drawings)
    wanted: dict[Path, bool] = {}
    for drawing in mains:
        for (stimulus, recipe), path in drawing.files.items():
            wanted[path] = recipe == "fused"
            if stimulus in world.by_id:
                wanted[world.by_id[stimulus].path] = True
    for drawing in controls:
        wanted |= {path: False for (_, name), path in drawing.files.items() if name == "fused"}
    return wanted


def per_stimulus(scores: Sequence[Scores], drawing: Drawing) -> dict[str, dict[str, dict]]:
    """{recipe: {metric: {stimulus id: mean score over its pictures}}} of one run's pictures."""
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for item in scores:
        paired = [name for name, about in item.metrics.items() if about.get("paired")]
        for row in item.pictures if belongs(item, drawing) else []:
            if row["images"] in (drawing.run.label, drawing.run.path.resolve().name):
                for metric in paired:
                    value = as_number(row.get(metric))
                    if value is not None:
                        found[row["recipe"]][metric][int(row["stimulus"])].append(value)
    return {
        recipe: {
            metric: {stimulus: float(np.mean(values)) for stimulus, values in table.items()}
            for metric, table in metrics.items()
        }
        for recipe, metrics in found.items()
    }


def belongs(scores: Scores, drawing: Drawing) -> bool:
    """Whether these scores are of this run: by its path where it is recorded, else by its name."""
    options = scores.run.options
    recorded = [options.get("images"), *(options.get("control_images") or [])]
    recorded = [name for name in recorded if name]
    paths = {path.resolve() for one in recorded for path in (Path(one), HERE / one)}
    existing = {path for path in paths if path.exists()}
    return not existing or drawing.run.path.resolve() in existing


def gallery_data(
    drawings: Sequence[Drawing], scores: Sequence[Scores], world: World, thumbs: Thumbnails
) -> dict[str, Any]:
    """What the page's script draws the gallery from; stimuli by their place in ``stimuli``."""
    mains, controls = main_and_controls(drawings)
    shown = {item: drawing.folders[item] for drawing in mains for item in drawing.folders}
    order = [item.id for item in world.stimuli if item.id in shown] or list(shown)
    place = {item: index for index, item in enumerate(order)}
    metrics = {name: about for item in scores for name, about in item.metrics.items()}
    return {
        "pictures": thumbs.uris,
        "stimuli": [
            {
                "number": shown[item].split("_", 1)[0],
                "concept": shown[item].split("_", 1)[-1].replace("_", " "),
                "picture": thumbs.places.get(world.by_id[item].path)
                if item in world.by_id
                else None,
            }
            for item in order
        ],
        "runs": [_gallery_run(item, controls, scores, thumbs, place) for item in mains],
        "labels": recipe_labels(),
        "rows": {kind: [recipe.name for recipe in recipes(kind)] for kind in GALLERY_ROWS},
        "titles": {name: recipe_title(name) for name in recipe_labels()},
        "brief": [name for name in HEADLINE_METRICS if metrics.get(name, {}).get("paired")][:4],
        "metrics": [
            {"key": name, "label": about["label"], "better": about["better"]}
            for name, about in metrics.items()
            if about.get("paired")
        ],
    }


GALLERY_ROWS = ("separate", "progressive")


def _beside(
    drawing: Drawing, controls: Sequence[Drawing], thumbs: Thumbnails, place: Mapping[int, int]
) -> Iterator[dict[str, Any]]:
    """The fused pictures of control runs that show stimuli of ``drawing``."""
    for item in controls:
        pictures = {
            place[stimulus]: thumbs.places[path]
            for (stimulus, recipe), path in item.files.items()
            if recipe == "fused" and stimulus in place
        }
        if pictures:
            yield {
                "label": control_label(item, drawing.subject),
                "what": "; ".join(item.marks).split(": ", 1)[-1],
                "short": SHORT_CONTROLS.get(item.control or "", item.control),
                "pictures": pictures,
            }


def _gallery_run(
    drawing: Drawing,
    controls: Sequence[Drawing],
    scores: Sequence[Scores],
    thumbs: Thumbnails,
    place: Mapping[int, int],
) -> dict[str, Any]:
    cards: dict[int, dict[str, int]] = defaultdict(dict)
    for (stimulus, recipe), path in drawing.files.items():
        cards[place[stimulus]][recipe] = thumbs.places[path]
    return {
        "name": drawing.run.label,
        "subject": drawing.subject,
        "marks": drawing.marks,
        "about": f"{drawing.subject} · injection {drawing.run.options.get('injection')} · "
        f"N = {len(cards)} stimuli · noise seed {drawing.seed}",
        "cards": cards,
        "controls": list(_beside(drawing, controls, thumbs, place)),
        "scores": {
            recipe: {
                metric: {
                    place[stimulus]: round(value, 5)
                    for stimulus, value in table.items()
                    if stimulus in place
                }
                for metric, table in metrics.items()
            }
            for recipe, metrics in per_stimulus(scores, drawing).items()
        },
    }


# ---------------------------------------------------------------- numbers and tables


def _apart(
    name: str, row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], higher: bool
) -> bool:
    """Whether a row's interval lies on the better side of every other row's."""
    own = row["scores"].get(name, {}).get("interval")
    others = [other["scores"].get(name, {}).get("interval") for other in rows if other is not row]
    if (
        not own
        or not bracket(own)
        or not others
        or not all(item and bracket(item) for item in others)
    ):
        return False
    return all(own[0] > item[1] if higher else own[1] < item[0] for item in others)


def table_cell(
    text: str, interval: str = "", notes: Sequence[str] = (), best: bool = False
) -> dict[str, Any]:
    """What the template's ``cell`` shows: a number, its interval and what stands below."""
    return {"text": text, "interval": interval, "notes": list(notes), "best": best}


def _score_cell(row: Mapping[str, Any], name: str, best: bool) -> dict[str, Any]:
    score = row["scores"].get(name)
    if score is None:
        return table_cell("")
    notes = []
    if as_number(score.get("other_stimulus")) is not None:
        notes.append(f"other: {number(score['other_stimulus'])}")
    if as_number(score.get("bound")) is not None:  # of IS: what N pictures can reach at most
        notes.append(f"at most {number(score['bound'])}; stimuli {number(score.get('stimuli'))}")
    if score.get("nan"):
        notes.append(f"NaN: {score['nan']} of {score.get('n', row['n'])}")
    known = as_number(score["value"]) is not None
    interval = bracket(score.get("interval")) if known else ""
    return table_cell(number(score["value"]), interval, notes, best)


def picture_table(scores: Scores) -> dict[str, Any]:
    """Rows of recipes, columns of metrics; controls last and marked."""
    rows = scores.results["pictures"]
    names = [name for name in scores.metrics if any(name in row["scores"] for row in rows)]
    plainly = [row for row in rows if not marks_of(row.get("prompt_source"), row.get("control"))]
    table = []
    order = {recipe.name: place for place, recipe in enumerate(recipes("all"))}
    for row in sorted(rows, key=lambda row: (row not in plainly, order.get(row["recipe"], 99))):
        table.append(
            {
                "name": recipe_title(row["recipe"]),
                "images": row["images"],
                "marks": marks_of(row.get("prompt_source"), row.get("control")),
                "n": row["n"],
                "samples": row.get("samples"),
                "cells": [
                    _score_cell(
                        row,
                        name,
                        row in plainly
                        and _apart(name, row, plainly, scores.metrics[name]["better"] == "higher"),
                    )
                    for name in names
                ],
            }
        )
    columns = [
        {**scores.metrics[name], "key": name, "up": scores.metrics[name]["better"] == "higher"}
        for name in names
    ]
    several = len({row["images"] for row in rows}) > 1
    return {"columns": columns, "rows": table, "several": several}


def retrieval_table(scores: Scores) -> dict[str, Any]:
    """Rows of queries and subjects, with shuffled EEG and chance below each top-k."""
    rows = scores.results["retrieval"]
    ways = [key for key in rows[0] if key.endswith("-way")] if rows else []

    def top(row: Mapping[str, Any], k: int, way: str = "") -> dict[str, Any]:
        key, notes = f"{way}top{k}", []
        if not way:
            low, high = (percent(end).removesuffix(" %") for end in row[f"{key}_shuffled_range"])
            notes.append(f"shuffled EEG: {percent(row[f'{key}_shuffled'])} ({low}–{high})")
        notes.append(f"chance: {percent(row[f'top{k}_chance'])}")
        interval = bracket(row.get(f"{key}_interval"), percent)
        return table_cell(percent(row.get(key)), interval, notes)

    table = [
        {
            "name": row["query"].replace("superpixel_", "").replace("->", "→"),
            "subject": row["subject"],
            "n": f"{row['n']} / {row['gallery']}",
            "cells": [
                *(top(row, k) for k in (1, 5)),
                *(table_cell(percent(row.get(way))) for way in ways),
                table_cell(number(row.get("mrr"))),
                *(top(row, k, "back_") for k in (1, 5)),
            ],
        }
        for row in rows
    ]
    titles = ["top-1", "top-5", *ways, "MRR", "image → EEG top-1", "image → EEG top-5"]
    return {"columns": titles, "rows": table}


def literature_tables(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """Published figures, as evaluate.py recorded them: for orientation, under other protocols."""
    found = next((item for item in scores if item.results.get("literature")), None)
    if found is None:
        return []
    known = {name: about["label"] for name, about in found.metrics.items()}
    labels = {**known, **found.results.get("labels", {}), "top1": "top-1", "top5": "top-5"}
    tables = []
    for kind, rows in found.results["literature"].items():
        names = [name for name in labels if any(name in row for row in rows)]
        body = [
            {
                **{key: row.get(key, "") for key in ("system", "what", "source")},
                "cells": [number(row[name]) if name in row else "" for name in names],
            }
            for row in rows
        ]
        tables.append({"kind": kind, "columns": [labels[name] for name in names], "rows": body})
    return tables


def skipped(scores: Scores) -> list[tuple[str, str, str]]:
    """(metrics, the file they need, where it comes from) of what was not scored."""
    files = defaultdict(list)
    for item in scores.results.get("skipped") or []:
        files[item["file"], item["source"]].append(item["metric"])
    return [(", ".join(metrics), *file) for file, metrics in files.items()]


def comparison_table(run: Run) -> dict[str, Any] | None:
    """Two runs of evaluate.py against each other, as ``--compare`` wrote it; None for others."""
    if not (run.path / "comparison.json").exists():
        return None
    found = util.read_json(run.path / "comparison.json")
    rows = [
        {
            "name": f"{row['what']}: {row['label']}",
            "cells": [
                table_cell(str(row["n"])),
                table_cell(number(row["a"])),
                table_cell(number(row["b"])),
                table_cell(number(row["difference"]), bracket(row["interval"])),
                table_cell(number(row["p"], 4)),
                table_cell(number(row["p_holm"], 4)),
            ],
        }
        for row in found["rows"]
    ]
    return {"label": run.label, "a": found["a"], "b": found["b"], "rows": rows,
            "protocol": found["protocol"]}  # fmt: skip


def headlines(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """A few numbers, each with its interval, control and chance; first subject, fused pictures."""
    found = []
    for item in scores:
        if item.results.get("control"):
            continue
        for row in item.results["retrieval"][:1]:
            query = row["query"].replace("->", "→")
            for k in (1, 5):
                found.append(
                    {
                        "title": f"retrieval top-{k}",
                        "value": percent(row[f"top{k}"]),
                        "interval": bracket(row[f"top{k}_interval"], percent),
                        "control": f"shuffled EEG {percent(row[f'top{k}_shuffled'])}",
                        "chance": f"chance {percent(row[f'top{k}_chance'])}",
                        "about": f"{query}, {row['subject']}, N = {row['n']} of {row['gallery']}",
                    }
                )
        found += _picture_headlines(item)
    return found[:6]


def _picture_headlines(scores: Scores) -> Iterator[dict[str, Any]]:
    rows = scores.results["pictures"]
    fused = [row for row in rows if row["recipe"] == "fused" and not row.get("control")]
    shuffled = next((row for row in rows if row.get("control") == "shuffled_eeg"), None)
    for row in fused[:1]:
        for name in [name for name in HEADLINE_METRICS if name in row["scores"]][:4]:
            score, about = row["scores"][name], scores.metrics[name]
            control = shuffled["scores"].get(name, {}) if shuffled else {}
            text = (
                f"shuffled EEG {number(control['value'])}"
                if as_number(control.get("value")) is not None
                else f"other stimulus {number(score.get('other_stimulus'))}"
            )
            chance = about.get("chance")
            yield {
                "title": f"{about['label']} {'↑' if about['better'] == 'higher' else '↓'}",
                "value": number(score["value"]),
                "interval": bracket(score.get("interval")),
                "control": text,
                "chance": "" if chance is None else f"chance {number(chance)}",
                "about": f"fused pictures, N = {row['n']}"
                + "".join(f" · {mark}" for mark in marks_of(row.get("prompt_source"), None)),
            }


# ---------------------------------------------------------------- confusions


def confusions(ranks: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The most frequent wrong answers (seen, retrieved, count), and who is retrieved most often."""
    wrong = [row for row in ranks if float(row["rank"]) > 1 and row["chosen"] != row["picture"]]
    pairs = Counter((row["picture"], row["chosen"]) for row in wrong)
    hubs = Counter(row["chosen"] for row in wrong)
    asked = {(row["query"], row["subject"]) for row in ranks}
    return {
        "pairs": [(seen, chosen, count) for (seen, chosen), count in pairs.most_common(12)],
        "hubs": hubs.most_common(8),
        "wrong": len(wrong),
        "total": len(ranks),
        "asked": len(asked),
        "expected": len(wrong) / max(1, len({row["picture"] for row in ranks})),
    }


def confusion_pictures(found: Mapping[str, Any], world: World) -> dict[str, Path]:
    """{stimulus key: file} of the pictures that the confusions show."""
    keys = {key for seen, chosen, _ in found["pairs"] for key in (seen, chosen)}
    keys |= {key for key, _ in found["hubs"]}
    return {item.key: item.path for item in world.stimuli if item.key in keys}


def concept_of(key: str) -> str:
    return key.split("/")[1].split("_", 1)[-1].replace("_", " ") if "/" in key else key


# ---------------------------------------------------------------- where it enters, and the EEG


def injection_maps(drawings: Sequence[Drawing]) -> list[dict[str, Any]]:
    """The map of every preset and strength in use, drawn on the U-Net, and as a table."""
    used = defaultdict(list)
    for drawing in drawings:
        options = drawing.run.options
        used[options.get("injection", "intent"), options.get("fusion_strength", 1.0)].append(
            drawing
        )
    maps = []
    for (name, strength), items in used.items():
        runs = ", ".join(item.run.label for item in items)
        try:
            preset = injection_map.load_injection(str(name))
            tables = svg.site_scales(preset, strength)
        except StageError as error:  # a preset file that is not here, or not as it was
            maps.append({"name": name, "runs": runs, "missing": f"{error.where}: {error.found}"})
            continue
        weights = {item.run.options.get("fusion_weights", "fixed") for item in items} - {"fixed"}
        maps.append(
            {
                "name": preset.name,
                "runs": runs,
                "about": preset.description,
                "gain": preset.gain,
                "strength": strength,
                "weights": ", ".join(sorted(weights)),
                "figures": [
                    svg.map_figure(preset.name, kind, table) for kind, table in tables.items()
                ],
                "tables": {
                    kind: [
                        (plain(n), [number(v) for v in row])
                        for n, row in zip(NAMES, table, strict=True)
                    ]
                    for kind, table in tables.items()
                },
            }
        )
    return maps


def open_responses(path: Path, world: World) -> tuple[np.ndarray, list[str], np.ndarray, int]:
    """One test recording: mean over trials [N, C, T], channels, times [T] in s, trials each."""
    cache = dataset.cache_folder(world.path, world.cache_dir)
    recording = dataset.open_recording(path, cache)
    signal = dataset.select_signal(recording, None)
    eeg = dataset.average_trials(recording, signal).numpy()
    return eeg, list(recording.channels), np.asarray(recording.times), recording.eeg.shape[1]


def eeg_views(world: World, window: Sequence[float] | None) -> list[dict[str, Any]]:
    """Evoked responses per region and scalp maps over time, per subject."""
    views = []
    for subject, path in shown_eeg(world).items():
        eeg, channels, times, trials = open_responses(path, world)
        about = f"{subject}, N = {len(eeg)} test stimuli, mean of {trials} trials each"
        evoked = svg.erp_figure(eeg, channels, times, subject, about, window)
        maps = svg.scalp_figures(eeg.mean(axis=0), channels, times, about)
        views.append({"subject": subject, "figures": [evoked, *maps]})
    return views


def occlusion_table(scores: Scores) -> list[dict[str, Any]]:
    rows = (scores.results.get("occlusion") or {"rows": []})["rows"]
    return [
        {
            "kind": row["kind"],
            "name": row["name"],
            "subject": row["subject"],
            "n": row["n"],
            "drops": {
                key: (number(drop["value"]), bracket(drop["interval"]))
                for key, drop in row["drops"].items()
            },
        }
        for row in rows
    ]


# ---------------------------------------------------------------- the page


MISSING = {  # what fills a section that has nothing to show
    "gallery": "No pictures among these runs: python generate.py … --mode all draws them.",
    "scores": "No scores among these runs: python evaluate.py … --images OUT/images writes them.",
    "contribution": "No scores among these runs: python evaluate.py … --images OUT/images, of "
    "pictures drawn with --mode all, tells what each modality contributes.",
    "ranks": "No retrieval among these runs: python evaluate.py … --model_path OUT/model does it.",
    "training": "No training among these runs: python train.py … writes its curves.",
    "injection": "No pictures among these runs: generate.py … --injection PRESET uses a map.",
    "eeg": "No test EEG at hand: give --data_path the DATA with Preprocessed_data_250Hz/.",
    "occlusion": "Nothing was occluded: python evaluate.py … --model_path OUT/model --occlusion "
    "channels time tells which channels and times matter.",
}


def run_details(run: Run) -> dict[str, Any]:
    """What a run recorded about itself, as (name, text) pairs."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    last = run.starts[-1] if run.starts else {}
    about = {
        "commit": last.get("commit"),
        "started": ", ".join(str(start.get("started")) for start in run.starts),
        "python": last.get("python"),
        "host": last.get("host"),
        "command": " ".join(map(str, last.get("command") or [])),
        "SLURM": last.get("slurm") or None,
        **{f"{name} version": version for name, version in (last.get("versions") or {}).items()},
    }
    return {
        "label": run.label,
        "program": program(run.stage),
        "finished": run.finished,
        "seed": run.options.get("seed"),
        "marks": marks_of(run.options.get("prompt_source"), run.options.get("control")),
        "options": [
            (name, text(value), run.provenance.get(name, "")) for name, value in run.options.items()
        ],
        "about": [(name, text(value)) for name, value in about.items() if value],
        "inputs": [(name, text(value)) for name, value in run.inputs.items()],
    }


def embedded_json(content: Any) -> str:
    """JSON for a script element: no markup in it, NaN as null."""

    def finite(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {str(key): finite(item) for key, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, list | tuple) else value

    text = json.dumps(finite(content), ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


@dataclass(frozen=True)
class Material:
    """Everything that was read of the runs, before anything is drawn."""

    runs: list[Run]
    drawings: list[Drawing]
    scores: list[Scores]
    world: World

    @property
    def window(self) -> tuple[float, float] | None:
        """The seconds that a trained model reads, where it does not read all."""
        found = [run.options.get("time_window") for run in self.runs if run.stage == "train"]
        return next((tuple(item) for item in found if item), None)


def gather(values: Any) -> Material:
    """Read and check all that the page shows, except pictures and EEG. Raises Stage errors."""
    runs = read_runs(values.runs)
    drawings = [found for run in runs if run.stage == "generate" and (found := read_drawing(run))]
    scores = [found for run in runs if run.stage == "evaluate" and (found := read_scores(run))]
    world = open_world(values.data_path, values.cache_dir, runs, scores)
    check_join(drawings, world)
    return Material(runs, drawings, scores, world)


def wanted_pictures(material: Material) -> tuple[dict[Path, str], set[Path]]:
    """{picture file: hash} of all that the page shows, and those shown large."""
    wanted = gallery_pictures(material.drawings, material.world)
    for item in material.scores:
        for path in confusion_pictures(confusions(item.ranks), material.world).values():
            wanted.setdefault(path, False)
    hashes = {path: util.file_hash(path) for path in wanted}
    return hashes, {path for path, large in wanted.items() if large}


def score_parts(item: Scores, world: World, thumbs: Thumbnails) -> dict[str, Any]:
    """All that the page shows of one evaluate.py run."""
    found = confusions(item.ranks)
    places = {key: thumbs.places[path] for key, path in confusion_pictures(found, world).items()}

    def shown(key: str) -> dict[str, Any]:
        return {"concept": concept_of(key), "picture": places.get(key)}

    return {
        "label": item.run.label,
        "results": item.results,
        "marks": marks_of(None, item.results.get("control")),
        "skipped": skipped(item),
        "pictures": picture_table(item),
        "retrieval": retrieval_table(item),
        "contribution": [
            [
                svg.retrieval_bars(item.results, subject)
                for subject in svg.asked_subjects(item.results)
            ],
            svg.contribution_figures(item.results),
        ],
        "ranks": svg.rank_figures(item.results, item.ranks),
        "confusions": found
        | {
            "pairs": [(shown(a), shown(b), count) for a, b, count in found["pairs"]],
            "hubs": [(shown(key), count) for key, count in found["hubs"]],
        },
        "occlusion": svg.occlusion_figures(item.results),
        "occlusion_table": occlusion_table(item),
    }


def facts(material: Material) -> list[tuple[str, str]]:
    """The first lines of the page: what this is about."""
    mains, controls = main_and_controls(material.drawings)
    stimuli = {item for drawing in mains for item in drawing.folders}
    found = [("runs", ", ".join(f"{run.label} ({program(run.stage)})" for run in material.runs))]
    subjects = dict.fromkeys(_subjects(material.runs, material.scores))
    if subjects:
        found.append(("subjects", ", ".join(subjects)))
    if mains:
        pictures = sum(len(item.files) for item in material.drawings)
        found.append(("pictures", f"{pictures} of N = {len(stimuli)} stimuli"))
    if controls:
        found.append(("controls", "; ".join(dict.fromkeys(m for d in controls for m in d.marks))))
    seeds = {str(run.options["seed"]) for run in material.runs if "seed" in run.options}
    if seeds:
        found.append(("seeds", ", ".join(sorted(seeds))))
    return found


def page_context(material: Material, thumbs: Thumbnails) -> dict[str, Any]:
    """Everything the template fills in; it escapes all but the SVGs and the embedded JSON."""
    world, drawings = material.world, material.drawings
    util.LOG.info("drawing figures")
    mains, _ = main_and_controls(drawings)
    return {
        "generator": GENERATOR,
        "title": "EEG → image: report",
        "simulated": world.simulated,
        "facts": facts(material),
        "marks": list(dict.fromkeys(mark for item in mains for mark in item.marks)),
        "headlines": headlines(material.scores),
        "gallery": bool(drawings),
        "data": embedded_json(gallery_data(drawings, material.scores, world, thumbs)),
        "legend": [plain(name) for name in NAMES],
        "scores": [score_parts(item, world, thumbs) for item in material.scores],
        "literature": literature_tables(material.scores),
        "comparisons": [found for run in material.runs if (found := comparison_table(run))],
        "training": [
            svg.training_figures(run.label, run.options, records)
            for run in material.runs
            if run.stage in ("train", "retrieval")
            and (records := util.read_jsonl(run.path / "metrics.jsonl"))
        ],
        "injection": injection_maps(drawings),
        "sites": list(SITES),
        "eeg": eeg_views(world, material.window),
        "more_subjects": max(0, len(world.eeg) - MOST_SUBJECTS),
        "runs": [run_details(run) for run in material.runs],
        "missing": MISSING,
        "interval": INTERVAL,
        "picture_px": thumbs.px,
    }


def render_page(context: Mapping[str, Any], inputs: str) -> str:
    """The page, with the script's hash in its content policy: no other script can run in it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        **context,
        inputs=inputs,
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        script=Markup(script),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    )


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or nothing when it shows the same already. Prints its path."""
    values = args.resolve("report", argv).values
    material = gather(values)
    output = values.output or Path(values.runs[0]).resolve().parent / "report.html"
    earlier = recorded_hash(output)
    hashes, large = wanted_pictures(material)
    inputs = page_hash(material.runs, material.world, hashes, [run.label for run in material.runs])
    if values.dry_run:
        print(
            "dry run, nothing was written. Would:\n"
            f"  - show {len(material.runs)} runs, {len(hashes)} pictures and the EEG of "
            f"{len(shown_eeg(material.world))} subjects\n  - write to {output}"
        )
        return 0
    if earlier == inputs:
        print(f"already up to date: {output}")
        return 0
    util.start_log(None)
    util.LOG.info("encoding %d pictures", len(hashes))
    thumbs = make_thumbnails(hashes, large)
    page = render_page(page_context(material, thumbs), inputs)
    with util.atomic_write(output) as file:
        file.write(page)
    print(f"report: {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
