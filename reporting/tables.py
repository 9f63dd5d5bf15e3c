"""Tables of the page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datafiles.stimuli import concept_of_folder
from modalities import recipes
from reporting.material import Run, Scores, World
from reporting.words import (
    HEADLINE_METRICS,
    bracket,
    finite,
    percent,
    recipe_title,
    shown_number,
    spoken_marks,
)
from rundirs.files import read_json
from rundirs.journal import is_main


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
    if finite(score.get("other_stimulus")) is not None:
        notes.append(f"other: {shown_number(score['other_stimulus'])}")
    if finite(score.get("bound")) is not None:  # of IS: what N pictures can reach at most
        notes.append(
            f"at most {shown_number(score['bound'])}; stimuli {shown_number(score.get('stimuli'))}"
        )
    if score.get("nan"):
        notes.append(f"NaN: {score['nan']} of {score.get('n', row['n'])}")
    known = finite(score["value"]) is not None
    interval = bracket(score.get("interval")) if known else ""
    return table_cell(shown_number(score["value"]), interval, notes, best)


def picture_table(scores: Scores) -> dict[str, Any]:
    """Rows of recipes, columns of metrics; controls last and marked."""
    rows = scores.results["pictures"]
    names = [name for name in scores.metrics if any(name in row["scores"] for row in rows)]
    plainly = [
        row for row in rows if not spoken_marks(row.get("prompt_source"), row.get("control"))
    ]
    table = []
    order = {recipe.name: place for place, recipe in enumerate(recipes("all"))}
    for row in sorted(rows, key=lambda row: (row not in plainly, order.get(row["recipe"], 99))):
        table.append(
            {
                "name": recipe_title(row["recipe"]),
                "images": row["images"],
                "marks": _said_of(row),
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

    def plain(row: Mapping[str, Any], k: int) -> dict[str, Any]:
        key = f"top{k}_plain"
        if key not in row:
            return table_cell("")
        return table_cell(percent(row[key]), bracket(row.get(f"{key}_interval"), percent))

    unlike = any("top1_plain" in row for row in rows)
    table = [
        {
            "name": row["query"].replace("superpixel_", "").replace("->", "→"),
            "subject": row["subject"],
            "n": f"{row['n']} / {row['gallery']}",
            "cells": [
                *(top(row, k) for k in (1, 5)),
                *(plain(row, k) for k in (1, 5) if unlike),
                *(table_cell(percent(row.get(way))) for way in ways),
                table_cell(shown_number(row.get("mrr"))),
                *(top(row, k, "back_") for k in (1, 5)),
            ],
        }
        for row in rows
    ]
    by_plain = ["plain cosine top-1", "plain cosine top-5"] if unlike else []
    titles = ["top-1", "top-5", *by_plain, *ways, "MRR", "image → EEG top-1", "image → EEG top-5"]
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
                "cells": [shown_number(row[name]) if name in row else "" for name in names],
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
    found = read_json(run.path / "comparison.json")
    rows = [
        {
            "name": f"{row['what']}: {row['label']}",
            "cells": [
                table_cell(str(row["n"])),
                table_cell(shown_number(row["a"])),
                table_cell(shown_number(row["b"])),
                table_cell(shown_number(row["difference"]), bracket(row["interval"])),
                table_cell(shown_number(row["p"], 4)),
                table_cell(shown_number(row["p_holm"], 4)),
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


def _said_of(row: Mapping[str, Any]) -> list[str]:
    """Marks of a row of pictures, and what lacks of them."""
    marks = spoken_marks(row.get("prompt_source"), row.get("control"))
    return [*marks, row["unfinished"]] if row.get("unfinished") else marks


def _picture_headlines(scores: Scores) -> Iterator[dict[str, Any]]:
    rows = scores.results["pictures"]
    fused = [row for row in rows if row["recipe"] == "fused" and is_main(row)]
    shuffled = next((row for row in rows if row.get("control") == "shuffled_eeg"), None)
    for row in fused[:1]:
        for name in [name for name in HEADLINE_METRICS if name in row["scores"]][:4]:
            score, about = row["scores"][name], scores.metrics[name]
            control = shuffled["scores"].get(name, {}) if shuffled else {}
            text = (
                f"shuffled EEG {shown_number(control['value'])}"
                if finite(control.get("value")) is not None
                else f"other stimulus {shown_number(score.get('other_stimulus'))}"
            )
            chance = about.get("chance")
            yield {
                "title": f"{about['label']} {'↑' if about['better'] == 'higher' else '↓'}",
                "value": shown_number(score["value"]),
                "interval": bracket(score.get("interval")),
                "control": text,
                "chance": "" if chance is None else f"chance {shown_number(chance)}",
                "about": f"fused pictures, N = {row['n']}"
                + "".join(f" · {mark}" for mark in _said_of(row)),
            }


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


def concept_in_key(key: str) -> str:
    return concept_of_folder(key.split("/")[1]).replace("_", " ") if "/" in key else key


def authenticity_table(scores: Scores) -> list[dict[str, Any]]:
    """Rows of what was drawn, in words; those of controls, too."""
    rows = (scores.results.get("authenticity") or {"rows": []})["rows"]
    distances = ("nearest", "to_stimulus", "stimuli_nearest", "nearer_than_stimulus")
    return [
        {
            "of": f"{row['images']}, {row['recipe'].replace('_', ' ')}", "space": row["space"],
            "n": row["samples"], "training": row["training"],
            "values": [shown_number(row[key]) for key in distances],
            "copies": [(one["drawn"], one["picture"], one["nearest"]) for one in row["copies"]],
        }
        for row in rows
    ]  # fmt: skip


def neuralbench_table(scores: Scores) -> list[dict[str, Any]]:
    """A row per person and way of averaging, in words."""
    rows = (scores.results.get("neuralbench") or {"rows": []})["rows"]
    return [
        {
            "level": row["level"], "subject": row["subject"], "queries": row["queries"],
            "n": row["n"], "median": f"{row['median_rank']:g}",
            "scores": [
                (shown_number(row[name]), bracket(row[f"{name}_interval"]),
                 shown_number(row[f"{name}_shuffled"]), shown_number(chance))
                for name, chance in (("inverse_rank", 0.5), ("top5", row["top5_chance"]))
            ],
        }
        for row in rows
    ]  # fmt: skip


def occlusion_table(scores: Scores) -> list[dict[str, Any]]:
    rows = (scores.results.get("occlusion") or {"rows": []})["rows"]
    return [
        {
            "kind": row["kind"],
            "name": row["name"],
            "subject": row["subject"],
            "n": row["n"],
            "drops": {
                key: (shown_number(drop["value"]), bracket(drop["interval"]))
                for key, drop in row["drops"].items()
            },
        }
        for row in rows
    ]
