"""The gallery: which pictures stand beside each other, and what is said of each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datafiles.stimuli import concept_of_folder
from modalities import recipes
from reporting.material import Drawing, Scores, World
from reporting.thumbnails import Thumbnails
from reporting.words import CONTROL_LABELS, HEADLINE_METRICS, finite, recipe_labels, recipe_title
from rundirs.journal import labels_of
from util import CHECKOUT


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


def scores_per_stimulus(scores: Sequence[Scores], drawing: Drawing) -> dict[str, dict[str, dict]]:
    """{recipe: {metric: {stimulus id: mean score over its pictures}}} of one run's pictures."""
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for item in scores:
        paired = [name for name, about in item.metrics.items() if about.get("paired")]
        wanted = labels_within(item, drawing)
        for row in item.pictures:
            if row["images"] in wanted:
                for metric in paired:
                    value = finite(row.get(metric))
                    if value is not None:
                        found[row["recipe"]][metric][int(row["stimulus"])].append(value)
    return {
        recipe: {
            metric: {stimulus: float(np.mean(values)) for stimulus, values in table.items()}
            for metric, table in metrics.items()
        }
        for recipe, metrics in found.items()
    }


def labels_within(scores: Scores, drawing: Drawing) -> set[str]:
    """What these scores may call this run: by its path where that is recorded, else by its name."""
    options = scores.run.options
    recorded = [options.get("images"), *(options.get("control_images") or [])]
    given = [Path(name) for name in recorded if name]
    paths = [path if path.exists() else CHECKOUT / path for path in given]
    if not any(path.exists() for path in paths):
        return {drawing.run.label, drawing.run.path.resolve().name}
    here = drawing.run.path.resolve()
    labelled = zip(labels_of(paths), paths, strict=True)
    return {label for label, path in labelled if path.resolve() == here}


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
                "number": "".join(re.findall(r"^\d+(?=_)", shown[item])),
                "concept": concept_of_folder(shown[item]).replace("_", " "),
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
            for recipe, metrics in scores_per_stimulus(scores, drawing).items()
        },
    }
