"""Stage 4: retrieval and picture scores on the test concepts, each beside its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("evaluate")

import yaml

import util
from cli.config import Options
from datafiles.eeg_files import is_simulated
from datafiles.stimuli import leaks_blocks, list_stimuli
from decoder.controls import Prediction
from evaluation import (
    authenticity,
    comparison,
    networks,
    neuralbench,
    occlusion,
    picture_scores,
    repetitions,
    seeds,
    tables,
    transductive,
)
from evaluation.opening import (
    Opened,
    PictureChoice,
    RetrievalChoice,
    identities,
    open_pictures,
    open_retrieval,
)
from evaluation.protocol import LITERATURE, protocol_of
from evaluation.retrieval import across_subjects, rank_lines, retrieval_row, subject_queries
from modalities import CONTROLS
from rundirs.closing import call, tell_end
from rundirs.directory import open_run
from rundirs.environment import environment
from rundirs.files import atomic_write, file_hash, write_csv, write_json


@dataclass(frozen=True)
class Scoring:
    """How what was opened is scored; names as the flags of ``args.py``."""

    protocol: str
    permutations: int
    occlusion: list[str] | None
    average: list[int] | None
    transductive: list[str] | None
    authenticity: bool
    control: str | None
    data_path: Path | None
    output_dir: Path
    score_cache: Path | None
    batch_size: int
    device: str
    seed: int

    @property
    def cache(self) -> Path:
        """Where the stimuli's features live."""
        return self.score_cache or self.output_dir.resolve().parent / "score_cache"


def score_retrieval(
    opened: Opened, how: Scoring, prediction: Prediction
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what results.json says of retrieval, lines of ranks.csv)."""
    bank, device = opened.bank, util.pick_device(how.device)
    rows, lines, occluded, averaged, together = [], [], [], [], []
    for test in opened.tests:
        util.LOG.info("retrieval: %s", test.subject)
        decoder = opened.models[test.subject].to(device)
        decoder.tell_stranger(test.subject)
        found = subject_queries(decoder, test, bank, prediction)
        rows += [retrieval_row(query, how.seed, how.permutations) for query in found]
        lines += [line for query in found for line in rank_lines(query, test.stimuli)]
        together += [
            transductive.transductive_row(query, method, how.seed, how.permutations)
            for query in found
            for method in how.transductive or ()
        ]
        index = decoder.subject_index(test.subject)
        gallery = decoder.gallery(bank.rows_for(test.stimuli), index)
        if how.occlusion:
            occluded += occlusion.occlusion_rows(decoder, test, gallery, how.occlusion, how.seed)
        averaged += [
            repetitions.repetition_row(
                decoder, test, gallery, count, how.control, how.seed, how.permutations
            )
            for count in sorted(set(how.average or ()))
        ]
    benched = neuralbench.score_neuralbench(
        opened.models, opened.tests, bank, how.seed, how.permutations
    ) if how.protocol == neuralbench.NEURALBENCH else []  # fmt: skip
    return {
        "retrieval": rows,
        "across_subjects": across_subjects(rows),
        "aligned_by_test": [test.subject for test in opened.tests if test.transductive],
        "occlusion": with_words(occlusion.HOW, occluded),
        "repetitions": with_words(repetitions.HOW_AVERAGED, averaged),
        "transductive": with_words(transductive.HOW_TRANSDUCTIVE, together),
        "neuralbench": with_words(neuralbench.HOW_BENCHED, benched),
    }, lines


def score_pictures(opened: Opened, how: Scoring) -> tuple[list[dict[str, Any]], ...]:
    """(rows for results.json, lines of pictures.csv) of every group of pictures."""
    return picture_scores.score_groups(
        opened.groups,
        opened.weights,
        how.protocol,
        util.pick_device(how.device),
        how.batch_size,
        how.cache,
        how.seed,
    )


def score_authenticity(opened: Opened, how: Scoring) -> tuple[list[dict[str, Any]], ...]:
    """(rows for results.json, lines of authenticity.csv) of every group of pictures."""
    name = next((name for name in authenticity.READ_BY if name in opened.weights), None)
    eye = networks.Eye.load(
        name, opened.weights[name], how.protocol, util.pick_device(how.device), how.batch_size
    ) if name else None  # fmt: skip
    compared = authenticity.spaces(eye, how.cache)
    return authenticity.authenticity_rows(opened.groups, opened.training, compared)


def with_words(how: str, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Rows with what they mean; None where there are none."""
    return {"how": how, "rows": rows} if rows else None


def score(
    run: Path, opened: Opened, how: Scoring, prediction: Prediction, inputs: Mapping[str, Any]
) -> dict[str, Any]:
    """Score everything that was asked for; write the tables of single stimuli to ``run``.

    Returns the content of ``results.json``.
    """
    pictures, authentic, lines = [], [], {}
    retrieval, ranks = score_retrieval(opened, how, prediction)
    if opened.models:
        lines["ranks"] = ranks
    if opened.groups:
        pictures, lines["pictures"] = score_pictures(opened, how)
    if how.authenticity:
        authentic, lines["authenticity"] = score_authenticity(opened, how)
    for name, of in lines.items():
        write_csv(run / f"{name}.csv", of)
    return {
        **retrieval,
        "pictures": pictures,
        "metrics": picture_scores.described(pictures, how.protocol),
        "authenticity": with_words(authenticity.HOW_AUTHENTIC, authentic),
        "skipped": opened.skipped,
        "labels": {name: item.label for name, item in picture_scores.SCORES.items()},
        "literature": yaml.safe_load(LITERATURE.read_text(encoding="utf-8")),
        "protocol": protocol_of(opened, how.protocol),
        "trained": opened.trained,
        "seed": how.seed,
        "permutations": how.permutations,
        "control": how.control,
        "mark": CONTROLS.get(how.control or "", ""),
        "simulated": is_simulated(how.data_path) or any(group.simulated for group in opened.groups),
        "block_leak": leaks_blocks(how.data_path) or any(g.block_leak for g in opened.groups),
        "inputs": dict(inputs),
        "weights": {name: networks.weight_file_hash(path) for name, path in opened.weights.items()},
        **environment(),
    }


def run_scores(options: Options) -> Path:
    """Score pictures and retrieval; returns the run's folder."""
    values, opened = options.values, Opened()
    util.pick_device(values.device)
    if values.images:
        open_pictures(options.settings(PictureChoice), opened)
        opened.training = list_stimuli(values.data_path, "training") if values.authenticity else []
    if values.model_path:
        open_retrieval(options.settings(RetrievalChoice), opened)
        for test in opened.tests if values.average else ():
            repetitions.check_average(test, values.average)
    inputs = identities(opened)
    run = open_run(options, values.output_dir, inputs, opened.plan())
    if not run.finished:
        for images, lacks in opened.unfinished.items():
            util.LOG.warning("%s: %s: scored as it is", images, lacks)
        how, prediction = options.settings(Scoring), options.settings(Prediction)
        results = score(run.path, opened, how, prediction, inputs)
        write_json(run.path / "results.json", results)
        with atomic_write(run.path / "table.md") as file:
            file.write(tables.as_table(results))
        run.finish({})
    return run.path


def run_comparison(options: Options) -> Path:
    """Compare finished runs of this stage, two or those of several seeds; the run's folder."""
    values = options.values
    if values.compare:
        found = comparison.comparison(*values.compare, values.seed)
        page, runs = tables.as_comparison(found), dict(zip("AB", values.compare, strict=True))
    else:
        found = seeds.over_seeds(values.over_seeds, values.seed)
        page, runs = tables.as_seeds(found), dict(enumerate(values.over_seeds))
    inputs = {str(side): file_hash(folder / "results.json") for side, folder in runs.items()}
    plan = [f"compare {len(found['rows'])} scores"]
    run = open_run(options, values.output_dir, inputs, plan)
    if not run.finished:
        name = "comparison.json" if values.compare else "seeds.json"
        write_json(run.path / name, found)
        with atomic_write(run.path / "table.md") as file:
            file.write(page)
        run.finish({})
    return run.path


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Score or compare what was given, write the results and their tables, print the table."""
    options = args.resolve("evaluate", argv)
    values = options.values
    compares = values.compare or values.over_seeds
    run = run_comparison(options) if compares else run_scores(options)
    print((run / "table.md").read_text(encoding="utf-8"))
    shown = tuple(one for one in (values.model_path, values.images, run) if one)
    tell_end({"scores": run}, [] if compares else [call("report.py", runs=shown)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
