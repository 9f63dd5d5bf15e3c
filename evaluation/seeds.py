"""Several trainings of one model, told apart by their seeds: mean and spread of their scores.

Published tables mix three numbers: the checkpoint that validation selected, the last one, and the
one that was best on the test set. Only the first is a result; here each has its own column.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import metrics
from evaluation.comparison import HITS, StimulusScores, read_stimulus_scores
from rundirs.checkpoints import BEST, LATEST
from rundirs.environment import environment
from rundirs.files import read_json
from util import DataError, UserError

SEEDS_PROTOCOL = {
    "selected": "the checkpoint that held-out training concepts chose; mean ± standard deviation "
    "over seeds (n - 1), and the 95 % percentile bootstrap over stimuli of their mean, 2000 draws",
    "last": "the checkpoint at the end of training",
    "best on test": "NOT a result: of each seed the better of the two on the test concepts, as "
    "many published tables have it; above both by construction",
}


def over_seeds(runs: Sequence[Path], seed: int) -> dict[str, Any]:
    """All retrieval scores of runs of evaluate.py, as written to ``seeds.json``.

    Raises DataError / UserError for runs that are not of one thing but for seed and checkpoint.
    """
    by_checkpoint: dict[str, dict[int, dict]] = {BEST: {}, LATEST: {}}
    first, chance = None, {}
    for run in runs:
        scores, results = read_stimulus_scores(run), read_json(run / "results.json")
        trained = _training_of(run, results)
        known = by_checkpoint[trained["checkpoint"]]
        if trained["seed"] in known:
            raise _refused(f"{run}: seed {trained['seed']} a second time", "other --seed each")
        first = first or results
        if _tested(results) != _tested(first):
            raise _refused(
                f"{run} was scored on other inputs, or under another control, than {runs[0]}",
                "the same EEG, features and subjects",
            )
        known[trained["seed"]] = scores
        chance |= {(f"{row['subject']} {row['query']}", name): row.get(f"{name}_chance")
                   for row in results["retrieval"] for name in HITS}  # fmt: skip
    number = len(by_checkpoint[BEST])
    if number < 2:
        raise _refused(f"{number} seeds with --checkpoint {BEST}", "two and more")
    rows = [_seed_row(what, by_checkpoint, seed) | {"chance": chance.get(what)}
            for what in next(iter(by_checkpoint[BEST].values()))]  # fmt: skip
    return {
        "runs": [str(run) for run in runs],
        "seeds": {name: sorted(of) for name, of in by_checkpoint.items()},
        "rows": rows,
        "protocol": {**SEEDS_PROTOCOL, "seed": seed},
        **environment(),
    }


def _refused(found: str, expected: str) -> UserError:
    cure = "train with --seeds, and score each model by itself and alike (evaluate.py)"
    return UserError("--over_seeds", found, expected, cure)


def _tested(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a model was scored on."""
    own = {name: of for name, of in results["inputs"].items() if not name.startswith("model")}
    return {"control": results["control"], **own}


def _training_of(run: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The one training whose retrieval a run scored. Raises DataError."""
    trained = results.get("trained") or []
    if len(trained) != 1 or trained[0]["seed"] is None or results["pictures"]:
        raise DataError(
            run,
            f"scores of {len(trained)} trainings with a seed"
            + (", and of pictures" if results["pictures"] else ""),
            "the retrieval of one model",
            "score each model by itself: evaluate.py --model_path RUN, without --images",
        )
    return trained[0]


def _seed_row(
    what: tuple[str, str], by_checkpoint: Mapping[str, Mapping[int, Mapping]], seed: int
) -> dict[str, Any]:
    """One score: of each seed the mean over stimuli, by which checkpoint."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for name, of_seed in by_checkpoint.items():
        for number, scores in of_seed.items():
            values[name][number] = float(np.mean(list(scores[what].values.values())))
    both = sorted(values[BEST].keys() & values[LATEST].keys())
    best = [max(values[BEST][number], values[LATEST][number]) for number in both]
    series: list[StimulusScores] = [of[what] for of in by_checkpoint[BEST].values()]
    of_stimulus = np.mean([list(one.values.values()) for one in series], axis=0)
    return {
        "what": what[0],
        "score": what[1],
        "label": series[0].label,
        "n": len(of_stimulus),
        "selected": spread(list(values[BEST].values())),
        "interval": metrics.bootstrap_interval(of_stimulus, seed),
        "last": spread(list(values[LATEST].values())),
        "best_on_test": spread(best),
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and standard deviation (n - 1) over seeds; of one seed none. None without any."""
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"seeds": len(values), "mean": float(np.mean(values)), "sd": sd}
