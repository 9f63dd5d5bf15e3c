"""Markdown tables of what evaluate.py measured: every score beside its interval and controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datafiles.stimuli import LEAKS
from modalities import TRANSDUCTIVE
from rundirs.markdown import number, table, with_interval

Row = Mapping[str, Any]
ARROWS = {"higher": "↑", "lower": "↓"}


# ---------------------------------------------------------------- retrieval


def retrieval_lines(rows: Sequence[Row]) -> list[str]:
    """One line per query and subject; shuffled EEG and chance beside top-1 and top-5."""
    ways = [key for key in rows[0] if key.endswith("-way")]
    head = ["query", "subject", "N"]
    for k in (1, 5):
        head += [f"top-{k} [95 %]", "shuffled EEG", "chance"]
    plain = any("top1_plain" in row for row in rows)
    head += ["plain cosine: top-1 [95 %]", "plain cosine: top-5 [95 %]"] if plain else []
    lines = []
    for row in rows:
        cells = [row["query"], row["subject"], f"{row['n']}"]
        for k in (1, 5):
            least, most = row[f"top{k}_shuffled_range"]
            cells += [
                with_interval(row[f"top{k}"], row[f"top{k}_interval"]),
                f"{row[f'top{k}_shuffled']:.3f} ({least:.3f}..{most:.3f})",
                f"{row[f'top{k}_chance']:.3f}",
            ]
        for k in (1, 5) if plain else ():
            value = row.get(f"top{k}_plain")
            interval = row.get(f"top{k}_plain_interval")
            cells.append("-" if value is None else with_interval(value, interval))
        cells += [number(row[way]) for way in ways] + [number(row["mrr"])]
        cells.append(f"{row['median_rank']:g}" if "median_rank" in row else "-")
        for k in (1, 5):
            cells.append(with_interval(row[f"back_top{k}"], row[f"back_top{k}_interval"]))
        varied = row.get("effective_rank")
        true = number(row.get("effective_rank_true"), 1)
        lines.append([*cells, "-" if varied is None else f"{number(varied, 1)} of {true}"])
    head += [
        *ways,
        "MRR",
        "median rank",
        "back: top-1 [95 %]",
        "back: top-5 [95 %]",
        "effective rank",
    ]
    return table(head, lines)


ACROSS_SUBJECTS = {  # score of a retrieval row -> its column where subjects are averaged
    "top1": "top-1", "top1_shuffled": "shuffled EEG", "top1_chance": "chance",
    "top5": "top-5", "top5_shuffled": "shuffled EEG", "top5_chance": "chance",
    "mrr": "MRR", "back_top1": "back: top-1", "back_top5": "back: top-5",
}  # fmt: skip


def across_subjects_table(rows: Sequence[Row]) -> list[str]:
    """One line per query: mean ± standard error over subjects, controls beside it."""
    lines = [
        [row["query"], f"{row['subjects']}"]
        + [
            f"{number(score['mean'])} ± {number(score['se'])}"
            if not name.endswith("_chance")
            else number(score["mean"])
            for name, score in ((name, row["scores"][name]) for name in ACROSS_SUBJECTS)
        ]
        for row in rows
    ]
    return table(["query", "subjects", *ACROSS_SUBJECTS.values()], lines)


# ---------------------------------------------------------------- pictures


def picture_lines(rows: Sequence[Row], about: Mapping[str, Row], *, paired: bool) -> list[str]:
    """One line per recipe. ``paired``: scores with a value per picture, or of distributions."""
    names = [name for name, item in about.items() if item["paired"] == paired]
    if not names:
        return []
    chosen = any(row.get("choice") for row in rows)
    head = ["pictures", "recipe", "prompt", *["drawn"] * chosen, "N"]
    head += [
        f"{about[name]['label']} {ARROWS[about[name]['better']]} [95 %]"
        + (" · other stimulus" if paired else "")
        for name in names
    ]
    lines = []
    for row in rows:
        source = row["prompt_source"]
        cells = [
            f"{row['images']}: **{row['mark']}**" if row["mark"] else row["images"],
            row["recipe"],
            f"**{source.upper()}**" if source == "oracle" else source,
            *[row.get("choice") or "once"] * chosen,
            f"{row['n']}" if row["samples"] == row["n"] else f"{row['n']} ({row['samples']})",
        ]
        lines.append([*cells, *(_picture_cell(row["scores"].get(name), paired) for name in names)])
    return table([*head, "NaN"], [[*cells, f"{_nans(row, names)}"] for cells, row in
                                  zip(lines, rows, strict=True)])  # fmt: skip


def _picture_cell(score: Row | None, paired: bool) -> str:
    if score is None:
        return "-"
    cell = with_interval(score["value"], score["interval"])
    if paired:
        return f"{cell} · {number(score['other_stimulus'])}"
    if "note" in score:
        cell += f" ({score['note']})"
    if "bound" in score:  # what IS can reach at most, and what the stimuli themselves reach
        cell += f" of at most {score['bound']:.0f}; stimuli {number(score.get('stimuli'))}"
    return cell


def _nans(row: Row, names: Sequence[str]) -> int:
    return sum(row["scores"][name]["nan"] for name in names if name in row["scores"])


def literature_table(
    literature: Mapping[str, Sequence[Row]], labels: Mapping[str, str]
) -> list[str]:
    """Published figures, the original's first, in the order of ``labels`` {score: label}."""
    rows = [*literature["original"], *literature["field"]]
    names = [name for name in labels if any(name in row for row in rows)]
    lines = [
        [row["system"], row["what"], row["source"], *(number(row.get(name)) for name in names)]
        for row in rows
    ]
    return table(["system", "what", "source", *(labels[name] for name in names)], lines)


def skipped_lines(skipped: Sequence[Row]) -> list[str]:
    """What was left out for want of weights, a line per file."""
    files: dict[tuple[str, str], list[str]] = {}
    for item in skipped:
        files.setdefault((item["file"], item["source"]), []).append(item["metric"])
    return [
        f"- {', '.join(metrics)}: needs {file} in --weights_dir, from {source}"
        for (file, source), metrics in files.items()
    ]


# ---------------------------------------------------------------- occlusion, comparison


def occlusion_lines(rows: Sequence[Row], largest: int = 8) -> list[str]:
    """The parts whose loss costs most, per kind and subject."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for subject in dict.fromkeys(row["subject"] for row in rows):
            chosen = [row for row in rows if (row["kind"], row["subject"]) == (kind, subject)]
            chosen.sort(key=lambda row: -row["drops"]["mrr"]["value"])
            lines += [
                [kind, row["name"], subject, f"{row['n']}"]
                + [with_interval(drop["value"], drop["interval"]) for drop in row["drops"].values()]
                for row in chosen[:largest]
            ]
    head = ["without", "which", "subject", "N"]
    return table([*head, *(f"drop of {name} [95 %]" for name in rows[0]["drops"])], lines)


def repetition_lines(rows: Sequence[Row]) -> list[str]:
    """A line per subject and number of repetitions averaged."""
    lines = [
        [
            row["subject"], f"{row['repetitions']}", f"{row['n']}", f"{row['groups']}",
            with_interval(row["top1"], row["top1_interval"]), number(row["top1_shuffled"]),
            number(row["top1_chance"]), with_interval(row["top5"], row["top5_interval"]),
            number(row["top5_chance"]), f"{row['median_rank']:g}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["subject", "repetitions", "N", "groups", "top-1 [95 %]", "shuffled EEG", "chance"]
    return table([*head, "top-5 [95 %]", "chance", "median rank"], lines)


def transductive_lines(rows: Sequence[Row]) -> list[str]:
    """A line per query, person and method, beside the same query's own score."""
    lines = [
        [
            row["query"], row["subject"], f"**{row['method']}**", f"{row['n']}",
            with_interval(row["top1"], row["top1_interval"]), number(row["top1_without"]),
            with_interval(row["gain"], row["gain_interval"]), number(row["top1_shuffled"]),
            number(row["top1_chance"]), with_interval(row["top5"], row["top5_interval"]),
            f"{number(row['hubness'], 2)} ({number(row['hubness_without'], 2)})",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["query", "subject", "method", "N", "top-1 [95 %]", "without", "difference [95 %]"]
    return table([*head, "shuffled EEG", "chance", "top-5 [95 %]", "hubness (without)"], lines)


def neuralbench_lines(rows: Sequence[Row]) -> list[str]:
    """A line per person and way of averaging, everybody's last."""
    lines = [
        [
            row["level"], row["subject"], f"{row['queries']:,}", f"{row['n']}",
            with_interval(row["inverse_rank"], row["inverse_rank_interval"]),
            number(row["inverse_rank_shuffled"]), with_interval(row["top5"], row["top5_interval"]),
            number(row["top5_shuffled"]), number(row["top5_chance"]),
            number(row["inverse_rank_median"]), f"{row['median_rank']:g}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["queries", "subject", "number", "N", "inverse rank [95 %]", "shuffled EEG"]
    more = ["top-5 [95 %]", "shuffled EEG", "chance", "median inverse rank", "median rank"]
    return table([*head, *more], lines)


def authenticity_lines(rows: Sequence[Row], most: int = 10) -> list[str]:
    """A line per recipe and space, then the pictures that are taken for copies."""
    lines = [
        [
            row["images"], row["recipe"], row["space"], f"{row['samples']}", f"{row['training']}",
            number(row["nearest"]), number(row["to_stimulus"]), number(row["stimuli_nearest"]),
            number(row["nearer_than_stimulus"]), number(row["below"]), f"{len(row['copies'])}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["images", "recipe", "space", "pictures", "training", "to nearest training picture"]
    head += ["to own stimulus", "stimuli: to nearest training", "share nearer to training"]
    found = [
        f"- **COPY** {row['images']}, {row['recipe']}, {one['drawn']} ({one['picture']}): "
        f"{one['nearest']}, {row['space']} {number(one['distance'])}"
        for row in rows
        for one in row["copies"][:most]
    ]
    return [*table([*head, "nearest of a stimulus", "copies"], lines), *([""] if found else []),
            *found]  # fmt: skip


def comparison_lines(rows: Sequence[Row]) -> list[str]:
    head = ["what", "score", "N", "A", "B", "A - B [95 %]", "p", "p, Holm"]
    lines = [
        [
            row["what"],
            f"{row['label']} {ARROWS[row['better']]}",
            f"{row['n']}",
            number(row["a"]),
            number(row["b"]),
            with_interval(row["difference"], row["interval"]),
            number(row["p"], 4),
            number(row["p_holm"], 4),
        ]
        for row in rows
    ]
    return table(head, lines)


# ---------------------------------------------------------------- the whole page


def _explained(
    title: str, found: Row | None, lines_of: Callable[[Sequence[Row]], list[str]]
) -> list[str]:
    """A section of rows with what they mean; nothing where there are none."""
    return [f"## {title}", "", found["how"], "", *lines_of(found["rows"]), ""] if found else []


def as_table(results: Row) -> str:
    """``table.md`` of a scoring run."""
    lines = ["# Scores", ""]
    if results["control"]:
        lines += [f"**{results['mark']}** (retrieval)", ""]
    told = {"simulated": "The EEG is simulated", "block_leak": LEAKS}
    lines += [f"**{text}.**\n" for key, text in told.items() if results.get(key)]
    if strangers := results.get("aligned_by_test"):
        lines += [f"**{TRANSDUCTIVE}: {', '.join(strangers)}.**\n"]
    if results["retrieval"]:
        lines += ["## Retrieval", "", *retrieval_lines(results["retrieval"]), ""]
    if results["across_subjects"]:
        means = across_subjects_table(results["across_subjects"])
        lines += ["## Retrieval over subjects, mean ± SE", "", *means, ""]
    lines += _explained("Repetitions averaged", results["repetitions"], repetition_lines)
    lines += _explained("Transductive", results.get("transductive"), transductive_lines)
    lines += _explained("NeuralBench", results.get("neuralbench"), neuralbench_lines)
    lacking = {row["images"]: row.get("unfinished") for row in results["pictures"]}
    lines += [f"**{images}: {lacks}.**\n" for images, lacks in lacking.items() if lacks]
    for title, paired in (("Pictures", True), ("Distributions of pictures", False)):
        found = picture_lines(results["pictures"], results["metrics"], paired=paired)
        lines += [f"## {title}", "", *found, ""] if found else []
    lines += _explained("Occlusion", results["occlusion"], occlusion_lines)
    lines += _explained("Authenticity", results.get("authenticity"), authenticity_lines)
    if results["skipped"]:
        lines += ["## Left out, for want of weights", "", *skipped_lines(results["skipped"]), ""]
    if results["pictures"]:
        published = literature_table(results["literature"], results["labels"])
        lines += ["## Published figures, not run again here", "", *published, ""]
    lines += [
        "## Protocol",
        "",
        *(f"- {key}: {text}" for key, text in results["protocol"].items()),
        f"- seed: {results['seed']}; shuffles: {results['permutations']}",
    ]
    return "\n".join(lines) + "\n"


def as_comparison(comparison: Row) -> str:
    """``table.md`` of a comparison."""
    lines = [
        "# Comparison",
        "",
        f"A = {comparison['a']}, B = {comparison['b']}",
        "",
        *comparison_lines(comparison["rows"]),
        "",
        *(f"- {key}: {text}" for key, text in comparison["protocol"].items()),
    ]
    return "\n".join(lines) + "\n"


def as_seeds(found: Row) -> str:
    """``table.md`` of several seeds."""
    lines = [
        [
            row["what"], row["label"], f"{row['n']}", with_spread(row["selected"]),
            f"{number(row['interval'][0])}, {number(row['interval'][1])}",
            with_spread(row["last"]), with_spread(row["best_on_test"]), number(row["chance"]),
        ]
        for row in found["rows"]
    ]  # fmt: skip
    head = ["what", "score", "N", "selected by validation", "[95 %]", "last"]
    head += ["best on test (not a result)", "chance"]
    told = [f"{name}: {', '.join(map(str, of)) or 'none'}" for name, of in found["seeds"].items()]
    page = ["# Over seeds", "", f"Seeds: {'; '.join(told)}", "", *table(head, lines), ""]
    page += [f"- {key}: {text}" for key, text in found["protocol"].items()]
    return "\n".join(page) + "\n"


def with_spread(of: Row | None) -> str:
    """``0.271 ± 0.012 (3)``."""
    return "-" if of is None else f"{number(of['mean'])} ± {number(of['sd'])} ({of['seeds']})"
