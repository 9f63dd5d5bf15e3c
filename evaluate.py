"""Stage 4: retrieval and picture scores on the test concepts, each beside its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("evaluate")

import yaml

import util
from cli.config import Options
from datafiles.eeg_files import is_simulated
from evaluation import comparison, networks, occlusion, picture_scores, tables
from evaluation.opening import Opened, identities, open_pictures, open_retrieval
from evaluation.protocol import LITERATURE, protocol_of
from evaluation.retrieval import across_subjects, rank_lines, retrieval_row, subject_queries
from modalities import CONTROLS
from rundirs.directory import open_run
from rundirs.environment import environment
from rundirs.files import atomic_write, file_hash, write_csv, write_json
from unet import Sampling


def score_retrieval(values: Any, opened: Opened) -> tuple[list[dict[str, Any]], ...]:
    """(rows for results.json, lines of ranks.csv, rows of occlusion) of every subject."""
    bank, device = opened.bank, util.pick_device(values.device)
    sampling = Sampling(
        values.prior_steps,
        values.prior_guidance,
        values.prior_sampler,
        values.prior_draws,
        values.restore_variance,
    )
    rows, lines, occluded = [], [], []
    for test in opened.tests:
        util.LOG.info("retrieval: %s", test.subject)
        decoder = opened.models[test.subject].to(device)
        found = subject_queries(decoder, test, bank, sampling, values.seed, values.control)
        rows += [retrieval_row(query, values.seed, values.permutations) for query in found]
        lines += [line for query in found for line in rank_lines(query, test.stimuli)]
        if values.occlusion:
            gallery = decoder.gallery(bank.rows_for(test.stimuli))
            occluded += occlusion.occlusion_rows(
                decoder, test, gallery, values.occlusion, values.seed
            )
    return rows, lines, occluded


def score(run: Path, values: Any, opened: Opened, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Score everything that was asked for; write the tables of single stimuli to ``run``.

    Returns the content of ``results.json``.
    """
    retrieval, occluded, pictures = [], [], []
    if opened.models:
        retrieval, lines, occluded = score_retrieval(values, opened)
        write_csv(run / "ranks.csv", lines)
    if opened.groups:
        pictures, lines = picture_scores.score_groups(
            opened.groups,
            opened.weights,
            values.protocol,
            util.pick_device(values.device),
            values.batch_size,
            values.score_cache or values.output_dir.resolve().parent / "score_cache",
            values.seed,
        )
        write_csv(run / "pictures.csv", lines)
    return {
        "retrieval": retrieval,
        "across_subjects": across_subjects(retrieval),
        "pictures": pictures,
        "metrics": picture_scores.described(pictures, values.protocol),
        "occlusion": {"how": occlusion.HOW, "rows": occluded} if occluded else None,
        "skipped": opened.skipped,
        "labels": {name: item.label for name, item in picture_scores.SCORES.items()},
        "literature": yaml.safe_load(LITERATURE.read_text(encoding="utf-8")),
        "protocol": protocol_of(values, opened),
        "seed": values.seed,
        "permutations": values.permutations,
        "control": values.control,
        "mark": CONTROLS.get(values.control or "", ""),
        "simulated": is_simulated(values.data_path)
        or any(group.simulated for group in opened.groups),
        "inputs": dict(inputs),
        "weights": {name: networks.weight_file_hash(path) for name, path in opened.weights.items()},
        **environment(),
    }


def run_scores(options: Options) -> Path:
    """Score pictures and retrieval; returns the run's folder."""
    values, opened = options.values, Opened()
    if values.images:
        open_pictures(values, opened)
    if values.model_path:
        open_retrieval(values, opened)
    inputs = identities(values, opened)
    run = open_run(options, values.output_dir, inputs, opened.plan())
    if not run.finished:
        results = score(run.path, values, opened, inputs)
        write_json(run.path / "results.json", results)
        with atomic_write(run.path / "table.md") as file:
            file.write(tables.as_table(results))
        run.finish({})
    return run.path


def run_comparison(options: Options) -> Path:
    """Compare two finished runs of this stage; returns the run's folder."""
    values = options.values
    found = comparison.comparison(*values.compare, values.seed)
    inputs = {
        side: file_hash(folder / "results.json")
        for side, folder in zip("AB", values.compare, strict=True)
    }
    plan = [f"compare {len(found['rows'])} scores"]
    run = open_run(options, values.output_dir, inputs, plan)
    if not run.finished:
        write_json(run.path / "comparison.json", found)
        with atomic_write(run.path / "table.md") as file:
            file.write(tables.as_comparison(found))
        run.finish({})
    return run.path


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Score or compare what was given, write the results and their tables, print the table."""
    options = args.resolve("evaluate", argv)
    run = run_comparison(options) if options.values.compare else run_scores(options)
    print((run / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
