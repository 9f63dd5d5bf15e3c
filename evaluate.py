"""Stage 4: retrieval and picture scores on the test concepts, each beside its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("evaluate")

import numpy as np
import torch
import yaml

import metrics
import util
from ATMS_retrieval import Decoder, model_file
from datafiles.eeg_files import eeg_file, list_subjects
from datafiles.feature_bank import Bank, open_bank
from datafiles.stimuli import Stimulus, list_stimuli
from dataset import TestEEG, check_clip, is_simulated, open_test
from decoder import controls
from evaluation import comparison, networks, occlusion, picture_scores, tables
from modalities import MODALITIES, NAMES
from training import loop
from unet import PriorBank, Sampling
from util import UserError

LITERATURE = Path(__file__).parent / "configs" / "literature.yaml"
PROTOCOL = {
    "retrieval": "cosine, whole test gallery, EEG averaged over repetitions; "
    "k-way = exact expectation over distractors; MRR = mean reciprocal rank; back = from the "
    "gallery to the EEG; fused priors = cosines of the five, weighted by the registry's gains",
    "intervals": "95 % percentile bootstrap over stimuli, 2000 draws",
    "control": "retrieval: EEG of the test stimuli shuffled, mean and 95 % range over shuffles; "
    "pictures: each scored against another stimulus (one seeded cyclic shift)",
}
PICTURE_PROTOCOL = {
    "mindeye": "256 px, then the score's own size, bilinear antialiased, no crop; PixCorr and SSIM "
    "at 425 px, SSIM gray, Gaussian sigma 1.5; LPIPS at 256 px; EffNet-B1 with V2 weights; mean "
    "over the samples of a stimulus, then over stimuli",
    "braindiffuser": "Pillow on 8 bits: 425 px bicubic for PixCorr and SSIM (gray, Gaussian sigma "
    "1.5), 224 px bilinear for networks, 256 px for LPIPS; EffNet-B1 with V1 weights; mean over "
    "the samples of a stimulus, then over stimuli",
}
NETWORK_PROTOCOL = {
    "two-way": "share of the other stimuli whose features correlate less with the picture; ties "
    "lose; chance .5. EffNet and SwAV: 1 - Pearson r of features",
    "distributions": "FID and Frechet: unbiased covariances; KID and Kernel: cubic, unbiased, all "
    "pictures once; IS: logits without bias, pictures in the order of the stimuli; their "
    "intervals are moved onto the value, as resampling biases them (200 draws; Kernel 1000)",
}


# ---------------------------------------------------------------- retrieval


@dataclass(frozen=True)
class Query:
    """Similarity [N, N] of what was predicted from EEG with a gallery, truth on the diagonal."""

    name: str
    subject: str
    similarity: torch.Tensor

    @property
    def truth(self) -> torch.Tensor:
        return torch.arange(len(self.similarity))


def retrieval_row(query: Query, seed: int, permutations: int) -> dict[str, Any]:
    """Scores of a query in both directions, with intervals, shuffled EEG and chance."""
    similarity, truth = query.similarity, query.truth
    row: dict[str, Any] = {
        "query": query.name,
        "subject": query.subject,
        **metrics.retrieval_scores(similarity, truth),
    }
    ways = {"": metrics.ranks(similarity, truth), "back_": metrics.ranks(similarity.T, truth)}
    for k in (1, 5):
        for prefix, ranked in ways.items():
            hits = metrics.top_k_probability(*ranked, k).numpy()
            row[f"{prefix}top{k}"] = float(hits.mean())
            row[f"{prefix}top{k}_interval"] = metrics.bootstrap_interval(hits, seed)
        row[f"top{k}_chance"] = k / len(similarity)
        shuffled = shuffled_top_k(similarity, truth, k, seed, permutations)
        row[f"top{k}_shuffled"] = float(shuffled.mean())
        row[f"top{k}_shuffled_range"] = np.percentile(shuffled, [2.5, 97.5]).tolist()
    return row


def across_subjects(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per query of two subjects or more: mean of every score, and the standard error over them."""
    found = []
    for query in dict.fromkeys(row["query"] for row in rows):
        own = [row for row in rows if row["query"] == query]
        if len(own) < 2:
            continue
        scores = {}
        for name in tables.ACROSS_SUBJECTS:
            values = np.array([row[name] for row in own])
            error = values.std(ddof=1) / np.sqrt(len(values))
            scores[name] = {"mean": float(values.mean()), "se": float(error)}
        found.append({"query": query, "subjects": len(own), "scores": scores})
    return found


def shuffled_top_k(
    similarity: torch.Tensor, truth: torch.Tensor, k: int, seed: int, permutations: int
) -> np.ndarray:
    """top-k [permutations] with EEG dealt to other stimuli: rows of similarity [Q, G] permuted."""
    draw = util.numpy_generator_for(seed, "shuffled EEG")
    scores = []
    for _ in range(permutations):
        order = torch.from_numpy(draw.permutation(len(similarity)))
        scores.append(
            float(metrics.top_k_probability(*metrics.ranks(similarity[order], truth), k).mean())
        )
    return np.array(scores)


def subject_queries(
    decoder: Decoder, test: TestEEG, bank: Bank, sampling: Sampling, seed: int, control: str | None
) -> list[Query]:
    """What one subject's EEG retrieves with: the encoder's output, each prior, the five fused."""
    everything, true = range(len(test.eeg)), bank.rows_for(test.stimuli)
    found = {}
    if control not in args.WITHOUT_EEG:
        read = controls.controlled_eeg(test, control, seed)
        encoded = decoder.condition(read, everything)
        gallery = decoder.gallery(true)
        found["encoder -> image"] = metrics.cosine_similarity(encoded, gallery)
    if decoder.bank is not None:
        samples = controls.predict(
            decoder, test, everything, sampling, seed, control, bank.path.parent
        )
        of = {name: metrics.cosine_similarity(samples[name], true[name]) for name in NAMES}
        found |= {f"prior {name}": similarity for name, similarity in of.items()}
        found["fused priors"] = sum(item.gain * of[item.name] for item in MODALITIES)
    return [Query(name, test.subject, similarity) for name, similarity in found.items()]


def rank_lines(query: Query, stimuli: Sequence[Stimulus]) -> list[dict[str, Any]]:
    """A line of ``ranks.csv`` per stimulus: its rank (1 = right), and what was put first."""
    better, tied = metrics.ranks(query.similarity, query.truth)
    rank = (1 + better + tied / 2).tolist()
    cosine, first = query.similarity.max(dim=1)
    return [
        {
            "subject": query.subject,
            "query": query.name,
            "stimulus": item.id,
            "picture": item.key,
            "concept": item.concept,
            "rank": rank[row],
            "chosen": stimuli[first[row]].key,
            "chosen_concept": stimuli[first[row]].concept,
            "chosen_similarity": round(float(cosine[row]), 6),
        }
        for row, item in enumerate(stimuli)
    ]


# ---------------------------------------------------------------- the stage


@dataclass
class Opened:
    """All that is scored, found and checked before anything is computed."""

    bank: Bank | None = None
    models: dict[str, Decoder] = field(default_factory=dict)  # of each subject, or one for all
    hashes: dict[str, str] = field(default_factory=dict)  # of the models' files
    tests: list[TestEEG] = field(default_factory=list)
    groups: list[picture_scores.Group] = field(default_factory=list)
    weights: dict[str, Path] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def plan(self) -> list[str]:
        lines = [f"score the retrieval of {test.subject}" for test in self.tests]
        lines += [
            f"score {len(group.pictures)} pictures of {len(group.stimuli)} stimuli: "
            f"{group.images}, {group.recipe}"
            for group in self.groups
        ]
        return lines + [line.removeprefix("- ") for line in tables.skipped_lines(self.skipped)]


def runs_of(model_path: Path, subjects: Sequence[str] | None) -> dict[str | None, Path]:
    """{subject: run trained without it} below a ``--leave_out each`` folder, else {None: run}.

    Raises UserError for a subject without a run.
    """
    runs = {
        folder.name.removeprefix(loop.WITHOUT): folder
        for folder in sorted(model_path.glob(f"{loop.WITHOUT}*"))
    }
    lost = [name for name in subjects or [] if name not in runs]
    if runs and lost:
        raise UserError(
            "--subjects",
            f"no {loop.WITHOUT}{lost[0]} in {model_path}",
            f"some of {', '.join(runs)}",
            "choose among them, or train that fold",
        )
    return {name: runs[name] for name in subjects or runs} if runs else {None: model_path}


def open_retrieval(values: Any, opened: Opened) -> None:
    """Models, gallery and test EEG, checked against each other. Raises UserError / DataError."""
    runs = runs_of(values.model_path, values.subjects)
    decoders = {name: Decoder.load(run, values.checkpoint) for name, run in runs.items()}
    layers = {decoder.layer for decoder in decoders.values()}
    opened.bank = open_bank(values.clip_feature_path, "test", layers)
    for left_out, run in runs.items():
        decoder = decoders[left_out]
        check_clip(opened.bank.clip, opened.bank.path, decoder.clip, run)
        wanted = [left_out] if left_out else values.subjects or decoder.signal["subjects"]
        key = f"model_{left_out}" if left_out else "model"
        opened.hashes[key] = util.file_hash(model_file(run, values.checkpoint))
        for name in list_subjects(values.data_path, wanted):
            opened.models[name] = decoder
            opened.tests.append(
                open_test(
                    eeg_file(values.data_path, name, "test"),
                    name,
                    values.data_path,
                    values.cache_dir,
                    decoder.signal["channels"],
                    decoder.signal["times"],
                )
            )


def check_folder(flag: str, folder: Path, expected: str) -> None:
    """Raise UserError unless the folder is there."""
    if not folder.is_dir():
        raise UserError(flag, f"{folder}: no such folder", expected, "check the path")


def open_pictures(values: Any, opened: Opened) -> None:
    """Pictures paired with stimuli, and the weights that are at hand. Raises as above."""
    folders = {"--images": [values.images], "--control_images": values.control_images or []}
    for flag, named in folders.items():
        for folder in named:
            check_folder(flag, folder, "a run of generate.py or a folder of pictures")
    if values.weights_dir:
        check_folder("--weights_dir", values.weights_dir, "a folder of weight files")
    if values.truth:
        check_folder("--truth", values.truth, "the pictures that were seen")
        stimuli = picture_scores.list_pictures(values.truth)
    else:
        stimuli = list_stimuli(values.data_path, "test")
    opened.groups = picture_scores.pair(list(chain(*folders.values())), stimuli)
    found = picture_scores.available(values.protocol, values.weights_dir)
    opened.weights, opened.skipped = found


def identities(values: Any, opened: Opened) -> dict[str, Any]:
    """Hashes of everything that is scored."""
    inputs: dict[str, Any] = {}
    if opened.models:
        inputs |= {**opened.hashes, "clip_features": opened.bank.hash}
        inputs |= {f"eeg_{test.subject}": test.hash for test in opened.tests}
    shown = {item.key: item.path for group in opened.groups for item in group.stimuli}
    drawn = [path for group in opened.groups for path in group.pictures]
    if opened.groups:
        inputs["stimuli"] = util.json_hash(
            [[key, util.file_hash(path)] for key, path in sorted(shown.items())]
        )
        inputs["pictures"] = util.json_hash(
            [[group.images, group.recipe, list(group.owner)] for group in opened.groups]
            + [util.file_hash(path) for path in drawn]
        )
        inputs["networks"] = sorted(opened.weights)
    return inputs


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


def protocol_of(values: Any, opened: Opened) -> dict[str, str]:
    """What the numbers mean, for the table's foot."""
    protocol = dict(PROTOCOL)
    kinds = {model.bank.kind for model in opened.models.values() if model.bank is not None}
    if kinds - {PriorBank.kind}:
        protocol["prior"] = f"here what the model's own aligner predicts: {', '.join(kinds)}"
    layers = {model.layer for model in opened.models.values()} - {None}
    if layers:
        protocol["encoder"] = f"images as CLIP's {', '.join(layers)}, projected by the model"
    if not opened.groups:
        return protocol
    protocol["pictures"] = f"{values.protocol}: {PICTURE_PROTOCOL[values.protocol]}"
    protocol |= NETWORK_PROTOCOL
    smallest = min(len(group.stimuli) for group in opened.groups)
    if smallest < 2048:
        protocol["mostly bias"] = (
            f"at N = {smallest}, fewer than the features' dimensions, FID and Frechet are mostly "
            "bias (two samples of one distribution are far apart): compare them at equal N and by "
            "the same code only, and look at KID or Kernel, which have no bias"
        )
    return protocol


def score(run: Path, values: Any, opened: Opened, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Score everything that was asked for; write the tables of single stimuli to ``run``.

    Returns the content of ``results.json``.
    """
    retrieval, occluded, pictures = [], [], []
    if opened.models:
        retrieval, lines, occluded = score_retrieval(values, opened)
        util.write_csv(run / "ranks.csv", lines)
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
        util.write_csv(run / "pictures.csv", lines)
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
        "mark": args.CONTROLS.get(values.control or "", ""),
        "simulated": is_simulated(values.data_path)
        or any(group.simulated for group in opened.groups),
        "inputs": dict(inputs),
        "weights": {name: networks.weights_hash(path) for name, path in opened.weights.items()},
        **util.environment(),
    }


def run_scores(options: args.Options) -> Path:
    """Score pictures and retrieval; returns the run's folder."""
    values, opened = options.values, Opened()
    if values.images:
        open_pictures(values, opened)
    if values.model_path:
        open_retrieval(values, opened)
    inputs = identities(values, opened)
    run = util.open_run(options, values.output_dir, inputs, opened.plan())
    if not run.finished:
        results = score(run.path, values, opened, inputs)
        util.write_json(run.path / "results.json", results)
        with util.atomic_write(run.path / "table.md") as file:
            file.write(tables.as_table(results))
        run.finish({})
    return run.path


def run_comparison(options: args.Options) -> Path:
    """Compare two finished runs of this stage; returns the run's folder."""
    values = options.values
    found = comparison.comparison(*values.compare, values.seed)
    inputs = {
        side: util.file_hash(folder / "results.json")
        for side, folder in zip("AB", values.compare, strict=True)
    }
    plan = [f"compare {len(found['rows'])} scores"]
    run = util.open_run(options, values.output_dir, inputs, plan)
    if not run.finished:
        util.write_json(run.path / "comparison.json", found)
        with util.atomic_write(run.path / "table.md") as file:
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
