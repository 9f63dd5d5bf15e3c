"""Two runs of evaluate.py against each other: differences paired by stimulus, with tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import metrics
from rundirs.environment import environment
from rundirs.files import read_csv, read_json
from rundirs.journal import is_main
from util import DataError, UserError

HITS = {  # from ranks.csv
    "top1": ("top-1", lambda rank: (rank <= 1) * 1.0),
    "top5": ("top-5", lambda rank: (rank <= 5) * 1.0),
    "mrr": ("reciprocal rank", lambda rank: 1 / rank),
}
COMPARISON_PROTOCOL = {
    "pairing": "the same stimulus in both; stimuli that one of them lacks are left out; N = pairs",
    "interval": "95 % percentile bootstrap of the mean difference over stimuli, 2000 draws",
    "p": "two-sided sign-flip permutation test of the mean difference, 10,000 draws",
    "p, Holm": "corrected for the number of rows of this table",
    "left out": "FID, KID and IS, which have no value per stimulus",
}


@dataclass(frozen=True)
class StimulusScores:
    """One score of one run by stimulus: {stimulus id: value}."""

    label: str
    better: str
    values: Mapping[str, float]


def read_stimulus_scores(run: Path) -> dict[tuple[str, str], StimulusScores]:
    """{(what was scored, score): Series} of a finished run of evaluate.py. Raises DataError."""
    if not (run / "DONE").exists():
        raise DataError(
            run,
            "no finished run of evaluate.py",
            "its results.json, ranks.csv and pictures.csv",
            "run evaluate.py with --output_dir " + str(run),
        )
    results = read_json(run / "results.json")
    found: dict[tuple[str, str], StimulusScores] = {}
    if results["retrieval"]:
        found |= dict(_of_ranks(read_csv(run / "ranks.csv")))
    if results["pictures"]:
        rows = [row for row in results["pictures"] if is_main(row)]
        for row in rows:
            if row.get("unfinished"):
                raise DataError(
                    run,
                    f"scores of a part of the pictures; {row['images']}: {row['unfinished']}",
                    "scores of a whole run of generate.py",
                    "finish that run, and score it again to another --output_dir",
                )
        own = {(row["images"], row["recipe"]) for row in rows}
        lines = [
            line
            for line in read_csv(run / "pictures.csv")
            if (line["images"], line["recipe"]) in own
        ]
        found |= dict(_of_pictures(lines, results["metrics"]))
    return found


def _of_ranks(lines: list[dict[str, str]]) -> Iterator[tuple[tuple[str, str], StimulusScores]]:
    for what in dict.fromkeys((line["subject"], line["query"]) for line in lines):
        rank = {
            line["stimulus"]: float(line["rank"])
            for line in lines
            if (line["subject"], line["query"]) == what
        }
        for name, (label, of) in HITS.items():
            values = {stimulus: float(of(value)) for stimulus, value in rank.items()}
            yield (" ".join(what), name), StimulusScores(label, "higher", values)


def _of_pictures(
    lines: list[dict[str, str]], about: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[tuple[str, str], StimulusScores]]:
    for recipe in dict.fromkeys(line["recipe"] for line in lines):
        chosen = [line for line in lines if line["recipe"] == recipe]
        for name, item in about.items():
            if item["paired"]:
                values = {line["stimulus"]: float(line[name]) for line in chosen}
                yield (recipe, name), StimulusScores(item["label"], item["better"], values)


def matched(
    a: Mapping[tuple[str, str], StimulusScores], b: Mapping[tuple[str, str], StimulusScores]
) -> list[tuple[str, StimulusScores, StimulusScores]]:
    """What both have. A run with one recipe only, as of another system, meets every recipe."""
    pairs = [(what, a[what, score], b[what, score]) for what, score in a if (what, score) in b]
    if pairs:
        return pairs
    return [
        (what if what == other else f"{what} against {other}", a[what, score], b[other, score])
        for what, score in a
        for other in dict.fromkeys(key for key, _ in b)
        if (other, score) in b
    ]


def row_of(what: str, a: StimulusScores, b: StimulusScores, seed: int) -> dict[str, Any]:
    """Difference of two series over their shared stimuli. NaNs are counted and make it NaN."""
    shared = [stimulus for stimulus in a.values if stimulus in b.values]
    first, second = (np.array([part.values[item] for item in shared]) for part in (a, b))
    difference = first - second
    return {
        "what": what,
        "label": a.label,
        "better": a.better,
        "n": len(shared),
        "a": float(first.mean()),
        "b": float(second.mean()),
        "difference": float(difference.mean()),
        "interval": metrics.bootstrap_interval(difference, seed),
        "nan": int(np.isnan(difference).sum()),
        "p": metrics.sign_flip_p(difference, seed) if np.isfinite(difference).all() else np.nan,
    }


def comparison(run_a: Path, run_b: Path, seed: int) -> dict[str, Any]:
    """Everything that both runs scored, as written to ``comparison.json``. Raises UserError."""
    pairs = matched(read_stimulus_scores(run_a), read_stimulus_scores(run_b))
    pairs = [(what, a, b) for what, a, b in pairs if set(a.values) & set(b.values)]
    if not pairs:
        raise UserError(
            "--compare",
            f"no score of a stimulus that both {run_a} and {run_b} have",
            "two runs of evaluate.py on the same stimuli",
            "score both against the same --truth or --data_path",
        )
    rows = [row_of(what, a, b, seed) for what, a, b in pairs]
    finite = [row for row in rows if row["p"] == row["p"]]
    for row, p in zip(finite, metrics.holm([row["p"] for row in finite]), strict=True):
        row["p_holm"] = p
    return {
        "a": str(run_a),
        "b": str(run_b),
        "rows": [{"p_holm": float("nan"), **row} for row in rows],
        "protocol": {**COMPARISON_PROTOCOL, "seed": seed},
        **environment(),
    }
