"""The page: its identity, its parts, and the template that joins them."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import util
from datafiles.eeg_files import (
    average_trials,
    cache_folder,
    check_rows,
    open_recording,
    select_signal,
    unit_of,
)
from datafiles.stimuli import LEAKS, leaks_blocks
from modalities import NAMES, SITES, TRANSDUCTIVE
from reporting.figures.eeg import erp_figure, occlusion_figures, scalp_figures
from reporting.figures.injection_map import map_figure, site_scales
from reporting.figures.scores import (
    asked_subjects,
    contribution_figures,
    rank_figures,
    repetition_figures,
    retrieval_bars,
)
from reporting.figures.training import training_figures
from reporting.gallery import gallery_data, gallery_pictures, main_and_controls
from reporting.material import (
    RECORDS,
    Drawing,
    Material,
    Run,
    Scores,
    World,
    program,
    shown_eeg,
    subjects_of,
)
from reporting.tables import (
    authenticity_table,
    comparison_table,
    concept_in_key,
    confusion_pictures,
    confusions,
    headlines,
    literature_tables,
    neuralbench_table,
    occlusion_table,
    picture_table,
    retrieval_table,
    skipped,
)
from reporting.thumbnails import Thumbnails, data_uri, encode_picture, open_picture
from reporting.words import INTERVAL, MOST_SUBJECTS, plain, shown_number, spoken_marks
from rundirs.files import file_hash, json_hash, read_jsonl
from sdxl import injection_map
from util import CHECKOUT, StageError, UserError

TEMPLATES = CHECKOUT / "reporting" / "templates"
GENERATOR = "eeg2image report.py"
DRAWS_PX, DRAWS_QUALITY = 1400, 80  # of the sheet of all draws


def page_hash(
    runs: Sequence[Run], world: World, pictures: Mapping[Path, str], labels: Sequence[str]
) -> str:
    """sha256 over everything the page shows and the code that shows it."""
    beside = ("report", "args", "modalities", "sdxl/injection_map", "datafiles/electrodes")
    code = [CHECKOUT / f"{name}.py" for name in beside]
    code += sorted((CHECKOUT / "reporting").rglob("*.py"))
    code += sorted([*TEMPLATES.iterdir(), *injection_map.MAP_FOLDER.glob("*.yaml")])
    records = {
        run.label: {
            str(path.relative_to(run.path)): file_hash(path)
            for pattern in RECORDS
            for path in sorted(run.path.glob(pattern))
        }
        for run in runs
    }
    return json_hash(
        {
            "code": {str(path.relative_to(CHECKOUT)): file_hash(path) for path in code},
            "runs": records,
            "labels": list(labels),
            "pictures": sorted(["/".join(path.parts[-3:]), of] for path, of in pictures.items()),
            "stimuli": [item.key for item in world.stimuli],
            "eeg": {name: file_hash(path) for name, path in shown_eeg(world).items()},
            "simulated": world.simulated,
            "block_leak": leaks_blocks(world.path),
        }
    )


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
            tables = site_scales(preset, strength)
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
                "figures": [map_figure(preset.name, kind, table) for kind, table in tables.items()],
                "tables": {
                    kind: [
                        (plain(n), [shown_number(v) for v in row])
                        for n, row in zip(NAMES, table, strict=True)
                    ]
                    for kind, table in tables.items()
                },
            }
        )
    return maps


def open_responses(path: Path, world: World) -> tuple[np.ndarray, list[str], np.ndarray, int, str]:
    """One test recording: mean over trials [N, C, T], channels, times [T] in s, trials, unit."""
    cache = cache_folder(world.path, world.cache_dir)
    recording = open_recording(path, cache, world.stimuli)
    if world.stimuli:
        check_rows(recording, world.stimuli)
    signal = select_signal(recording, None)
    eeg = average_trials(recording, signal).numpy()
    times, trials = np.asarray(recording.times), int(np.median(recording.trial_counts))
    return eeg, list(recording.channels), times, trials, unit_of(recording)


def eeg_views(world: World, window: Sequence[float] | None) -> list[dict[str, Any]]:
    """Evoked responses per region and scalp maps over time, per subject."""
    views = []
    for subject, path in shown_eeg(world).items():
        eeg, channels, times, trials, unit = open_responses(path, world)
        about = f"{subject}, N = {len(eeg)} test stimuli, mean of {trials} trials each"
        evoked = erp_figure(eeg, channels, times, subject, about, window, unit)
        maps = scalp_figures(eeg.mean(axis=0), channels, times, about, unit)
        views.append({"subject": subject, "figures": [evoked, *maps]})
    return views


MISSING = {  # what fills a section that has nothing to show
    "gallery": "No pictures among these runs: python generate.py … --mode all draws them.",
    "scores": "No scores among these runs: python evaluate.py … --images OUT/images writes them.",
    "contribution": "No scores among these runs: python evaluate.py … --images OUT/images, of "
    "pictures drawn with --mode all, tells what each modality contributes.",
    "ranks": "No retrieval among these runs: python evaluate.py … --model_path OUT/model does it.",
    "training": "No training among these runs: python train.py … writes its curves.",
    "injection": "No pictures among these runs: generate.py … --injection PRESET uses a map.",
    "eeg": "No test EEG at hand: give --data_path the DATA with Preprocessed_data_250Hz/.",
    "authenticity": "Not looked for: python evaluate.py … --images OUT/images --authenticity does.",
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
        "marks": spoken_marks(run.options.get("prompt_source"), run.options.get("control")),
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


def wanted_pictures(material: Material) -> tuple[dict[Path, str], set[Path]]:
    """{picture file: hash} of all that the page shows, and those shown large."""
    wanted = gallery_pictures(material.drawings, material.world)
    for item in material.scores:
        for path in confusion_pictures(confusions(item.ranks), material.world).values():
            wanted.setdefault(path, False)
    hashes = {path: file_hash(path) for path in wanted}
    return hashes, {path for path, large in wanted.items() if large}


def score_parts(item: Scores, world: World, thumbs: Thumbnails) -> dict[str, Any]:
    """All that the page shows of one evaluate.py run."""
    found = confusions(item.ranks)
    places = {key: thumbs.places[path] for key, path in confusion_pictures(found, world).items()}

    def shown(key: str) -> dict[str, Any]:
        return {"concept": concept_in_key(key), "picture": places.get(key)}

    return {
        "label": item.run.label,
        "results": item.results,
        "marks": spoken_marks(None, item.results.get("control")) + aligned_by_test(item),
        "skipped": skipped(item),
        "pictures": picture_table(item),
        "retrieval": retrieval_table(item),
        "contribution": [
            [retrieval_bars(item.results, subject) for subject in asked_subjects(item.results)],
            contribution_figures(item.results),
        ],
        "ranks": rank_figures(item.results, item.ranks),
        "repetitions": repetition_figures(item.results),
        "neuralbench": neuralbench_table(item),
        "confusions": found
        | {
            "pairs": [(shown(a), shown(b), count) for a, b, count in found["pairs"]],
            "hubs": [(shown(key), count) for key, count in found["hubs"]],
        },
        "occlusion": occlusion_figures(item.results),
        "occlusion_table": occlusion_table(item),
        "authenticity": authenticity_table(item),
    }


def draws_of(drawing: Drawing) -> dict[str, Any] | None:
    """The sheet of all draws of a run that kept one of several; None of other runs."""
    sheets = sorted(drawing.run.path.glob("draws*.png"))
    if not sheets:
        return None
    picture = open_picture(sheets[0], DRAWS_PX)
    content = encode_picture(picture, DRAWS_PX, DRAWS_QUALITY)
    options = drawing.run.options
    how = "agrees best with the predicted image embedding"
    how = how if options.get("choose") == "eeg" else "was drawn by lot"
    return {
        "label": drawing.run.label,
        "src": data_uri(content),
        "caption": f"{drawing.run.label}, {drawing.subject}: of {options.get('draws')} noises each "
        f"the one is kept that {how}; numbers: that agreement. Seed {drawing.seed}.",
        "marks": drawing.marks,
    }


def aligned_by_test(item: Scores) -> list[str]:
    """What is said of people whose EEG was aligned by the recording that is scored."""
    people = item.results.get("aligned_by_test")
    return [f"{TRANSDUCTIVE}: {', '.join(people)}"] if people else []


def facts(material: Material) -> list[tuple[str, str]]:
    """The first lines of the page: what this is about."""
    mains, controls = main_and_controls(material.drawings)
    stimuli = {item for drawing in mains for item in drawing.folders}
    found = [("runs", ", ".join(f"{run.label} ({program(run.stage)})" for run in material.runs))]
    subjects = dict.fromkeys(subjects_of(material.runs, material.scores))
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
    marks = [mark for item in mains for mark in item.marks] + [f"{LEAKS}."] * material.leaks
    return {
        "generator": GENERATOR,
        "title": "EEG → image: report",
        "simulated": world.simulated,
        "facts": facts(material),
        "marks": list(dict.fromkeys(marks)),
        "headlines": headlines(material.scores),
        "gallery": bool(drawings),
        "data": embedded_json(gallery_data(drawings, material.scores, world, thumbs)),
        "draws": [found for item in drawings if (found := draws_of(item))],
        "legend": [plain(name) for name in NAMES],
        "scores": [score_parts(item, world, thumbs) for item in material.scores],
        "literature": literature_tables(material.scores),
        "comparisons": [found for run in material.runs if (found := comparison_table(run))],
        "training": [
            training_figures(run.label, run.options, records)
            for run in material.runs
            if run.stage in ("train", "retrieval")
            and (records := read_jsonl(run.path / "metrics.jsonl"))
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
