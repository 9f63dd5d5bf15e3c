"""Stage 4: retrieval and picture scores on the test concepts, each beside its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("evaluate")

import numpy as np
import torch

import controls
import metrics
import superpixel
import util
from ATMS_retrieval import Decoder, model_file
from dataset import (
    Bank,
    TestEEG,
    check_clip,
    eeg_file,
    list_stimuli,
    list_subjects,
    open_bank,
    open_test,
)
from modalities import NAMES
from unet import Sampling
from util import DataError, UserError

PROTOCOL = {
    "retrieval": "cosine, whole test gallery, EEG averaged over repetitions; "
    "k-way = exact expectation over distractors",
    "pictures": "mindeye: 256 px, then 425 px bilinear antialiased; SSIM gray, Gaussian sigma 1.5; "
    "mean over stimuli",
    "intervals": "95 % percentile bootstrap over stimuli, 2000 draws",
    "control": "retrieval: EEG of the test stimuli shuffled, mean and 95 % range over shuffles; "
    "pictures: each scored against another stimulus (one seeded cyclic shift)",
}


# ---------------------------------------------------------------- retrieval


def retrieval_row(
    name: str,
    subject: str,
    query: torch.Tensor,
    gallery: torch.Tensor,
    truth: torch.Tensor,
    seed: int,
    permutations: int,
) -> dict[str, Any]:
    """Scores of queries [N, D] against gallery [N, D], with interval, shuffled EEG and chance."""
    similarity = metrics.cosine_similarity(query, gallery)
    better, tied = metrics.ranks(similarity, truth)
    row: dict[str, Any] = {
        "query": name,
        "subject": subject,
        **metrics.retrieval_topk(query, gallery, truth),
    }
    for k in (1, 5):
        hits = metrics.top_k_probability(better, tied, k).numpy()
        row[f"top{k}_interval"] = metrics.bootstrap_interval(hits, seed)
        row[f"top{k}_chance"] = k / len(gallery)
        shuffled = shuffled_top_k(similarity, truth, k, seed, permutations)
        row[f"top{k}_shuffled"] = float(shuffled.mean())
        row[f"top{k}_shuffled_range"] = np.percentile(shuffled, [2.5, 97.5]).tolist()
    return row


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


def subject_rows(
    decoder: Decoder,
    test: TestEEG,
    bank: Bank,
    sampling: Sampling,
    seed: int,
    permutations: int,
    control: str | None,
) -> list[dict[str, Any]]:
    """Retrieval of one subject: by the encoder's output, and by each prior from its own gallery."""
    gallery = bank.rows_for(test.stimuli)
    truth = torch.arange(len(test.stimuli))
    everything = range(len(test.eeg))
    queries = []
    if control not in args.WITHOUT_EEG:
        read = controls.controlled_eeg(test, control, seed)
        queries += [("encoder -> image", decoder.condition(read, everything), gallery["image"])]
    if decoder.bank is not None:
        samples = controls.predict(
            decoder, test, everything, sampling, seed, control, bank.path.parent
        )
        queries += [(f"prior {name}", samples[name], gallery[name]) for name in NAMES]
    return [
        retrieval_row(name, test.subject, query, features, truth, seed, permutations)
        for name, query, features in queries
    ]


# ---------------------------------------------------------------- pictures


def read_run(images: Path) -> tuple[list[dict[str, Any]], str]:
    """The journal of a generate.py run and what it was drawn from. Raises DataError."""
    records = [
        record for path in sorted(images.glob("images*.jsonl")) for record in util.read_jsonl(path)
    ]
    records = list({(record["stimulus"], record["recipe"]): record for record in records}.values())
    if not records:
        raise DataError(
            images,
            "no pictures",
            "the output of generate.py",
            "run that stage; it goes on where it stopped",
        )
    sources = {record["prompt_source"] for record in records}
    control = {record["control"] for record in records} - {None}
    return records, " and ".join((*sorted(sources), *(args.CONTROLS[name] for name in control)))


def load_for_scores(path: Path) -> torch.Tensor:
    """A picture as the protocol wants it: float32 [3, 425, 425] in 0..1. Raises DataError."""
    try:
        pixels = np.asarray(superpixel.read_picture(path))
    except superpixel.PictureError as error:
        raise DataError(
            path, str(error), "a whole picture", "draw it again with generate.py"
        ) from None
    return metrics.to_mindeye(pixels[None])[0]


def picture_row(
    recipe: str, prompt_source: str, truth: torch.Tensor, drawn: torch.Tensor, seed: int
) -> dict[str, Any]:
    """Scores of one recipe: [N, 3, 425, 425] twice. NaNs (flat pictures) are counted and kept."""
    shift = 1 + util.seed_for(seed, "picture control") % max(1, len(truth) - 1)
    others = truth.roll(shift, dims=0)
    row: dict[str, Any] = {"recipe": recipe, "prompt_source": prompt_source, "n": len(truth)}
    for name, score in (("pixcorr", metrics.pix_corr), ("ssim", metrics.ssim)):
        scores, control = score(truth, drawn), score(others, drawn)
        row[name], row[f"{name}_nan"] = float(scores.mean()), int(np.isnan(scores).sum())
        row[f"{name}_interval"] = metrics.bootstrap_interval(scores, seed)
        row[f"{name}_control"] = float(control.mean()) if len(truth) > 1 else None
    return row


def score_pictures(images: Path, data_path: Path, seed: int) -> list[dict[str, Any]]:
    """PixCorr and SSIM per recipe, paired by stimulus id."""
    from tqdm import tqdm

    records, prompt_source = read_run(images)
    stimuli = {item.id: item for item in list_stimuli(data_path, "test")}
    lost = [record["folder"] for record in records if record["stimulus"] not in stimuli]
    if lost:
        raise DataError(
            images,
            f"pictures of stimuli that {data_path} lacks, e.g. {lost[0]}",
            "the same test_images",
            "give --data_path the DATA that the pictures were drawn from",
        )
    shown = {
        stimulus: load_for_scores(stimuli[stimulus].path)
        for stimulus in {r["stimulus"] for r in records}
    }
    rows = []
    for recipe in tqdm(
        dict.fromkeys(record["recipe"] for record in records), desc="scoring", unit="recipe"
    ):
        chosen = [record for record in records if record["recipe"] == recipe]
        truth = torch.stack([shown[record["stimulus"]] for record in chosen])
        drawn = torch.stack([load_for_scores(images / record["file"]) for record in chosen])
        rows.append(picture_row(recipe, prompt_source, truth, drawn, seed))
    return rows


# ---------------------------------------------------------------- tables


def retrieval_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: one line per query and subject, the control beside each score."""
    ways = [key for key in rows[0] if key.endswith("-way")]
    lines = [
        "| query -> gallery | subject | N | top-1 [95 %] | shuffled EEG | chance "
        "| top-5 [95 %] | shuffled EEG | chance |" + "".join(f" {way} |" for way in ways),
        "|" + "---|" * (9 + len(ways)),
    ]
    for row in rows:
        cells = [row["query"], row["subject"], f"{row['n']}"]
        for k in (1, 5):
            low, high = row[f"top{k}_interval"]
            least, most = row[f"top{k}_shuffled_range"]
            cells += [
                f"{row[f'top{k}']:.3f} [{low:.3f}, {high:.3f}]",
                f"{row[f'top{k}_shuffled']:.3f} ({least:.3f}..{most:.3f})",
                f"{row[f'top{k}_chance']:.3f}",
            ]
        lines.append("| " + " | ".join([*cells, *(f"{row[way]:.3f}" for way in ways)]) + " |")
    return lines


def picture_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| recipe | prompt | N | PixCorr [95 %] | other stimulus "
        "| SSIM [95 %] | other stimulus | NaN |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["recipe"],
            row["prompt_source"].upper()
            if "oracle" in row["prompt_source"]
            else row["prompt_source"],
            str(row["n"]),
        ]
        for name in ("pixcorr", "ssim"):
            low, high = row[f"{name}_interval"]
            control = row[f"{name}_control"]
            cells += [
                f"{row[name]:.3f} [{low:.3f}, {high:.3f}]",
                "-" if control is None else f"{control:.3f}",
            ]
        cells.append(str(row["pixcorr_nan"] + row["ssim_nan"]))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def as_table(results: Mapping[str, Any]) -> str:
    lines = ["# Scores", ""]
    if results["control"]:
        lines += [f"**{args.CONTROLS[results['control']]}** (retrieval)", ""]
    if results["simulated"]:
        lines += ["**The EEG is simulated.**", ""]
    if results["retrieval"]:
        lines += ["## Retrieval", "", *retrieval_table(results["retrieval"]), ""]
    if results["pictures"]:
        lines += ["## Pictures", "", *picture_table(results["pictures"]), ""]
    lines += [
        "## Protocol",
        "",
        *(f"- {key}: {text}" for key, text in PROTOCOL.items()),
        f"- seed: {results['seed']}; shuffles: {results['permutations']}",
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the stage


def open_retrieval(values: Any) -> tuple[Decoder, Bank, list[TestEEG]]:
    """Model, gallery and test EEG, checked against each other. Raises UserError / DataError."""
    decoder = Decoder.load(values.model_path, values.checkpoint)
    bank = open_bank(values.clip_feature_path, "test")
    check_clip(bank, decoder.clip, values.model_path)
    names = list_subjects(values.data_path, values.subjects or decoder.signal["subjects"])
    tests = [
        open_test(
            eeg_file(values.data_path, name, "test"),
            name,
            values.data_path,
            values.cache_dir,
            decoder.signal["channels"],
            decoder.signal["times"],
        )
        for name in names
    ]
    return decoder, bank, tests


def is_simulated(data_path: Path) -> bool:
    """Whether the EEG folder carries the simulator's own note."""
    return any(Path(data_path).glob("*/sub-*/simulated.json"))


def identities(values: Any, opened: tuple[Decoder, Bank, list[TestEEG]] | None) -> dict[str, str]:
    """Hashes of everything that is scored."""
    stimuli = list_stimuli(values.data_path, "test")
    inputs = {"stimuli": util.json_hash([item.key for item in stimuli])}
    if opened:
        _, bank, tests = opened
        model = model_file(values.model_path, values.checkpoint)
        inputs |= {"model": util.file_hash(model), "clip_features": bank.hash}
        inputs |= {f"eeg_{test.subject}": test.hash for test in tests}
    if values.images:
        files = [record["file"] for record in read_run(values.images)[0]]
        inputs["pictures"] = util.json_hash(
            [[file, util.file_hash(values.images / file)] for file in files]
        )
    return inputs


def score(
    values: Any, opened: tuple[Decoder, Bank, list[TestEEG]] | None, inputs: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that was asked for, as written to ``results.json``."""
    retrieval, pictures = [], []
    if opened:
        opened[0].to(util.pick_device(values.device))
        decoder, bank, tests = opened
        sampling = Sampling(
            values.prior_steps, values.prior_guidance, values.prior_sampler, values.prior_draws
        )
        for test in tests:
            util.LOG.info("retrieval: %s", test.subject)
            retrieval += subject_rows(
                decoder, test, bank, sampling, values.seed, values.permutations, values.control
            )
    if values.images:
        pictures = score_pictures(values.images, values.data_path, values.seed)
    return {
        "retrieval": retrieval,
        "pictures": pictures,
        "protocol": PROTOCOL,
        "seed": values.seed,
        "permutations": values.permutations,
        "control": values.control,
        "simulated": is_simulated(values.data_path),
        "inputs": dict(inputs),
        **util.environment(),
    }


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Score what was given, write results.json and table.md, print the table."""
    options = args.resolve("evaluate", argv)
    values = options.values
    if values.images and not values.images.is_dir():
        raise UserError(
            "--images", f"{values.images}: no such folder", "a run of generate.py", "check the path"
        )
    opened = open_retrieval(values) if values.model_path else None
    inputs = identities(values, opened)
    plan = [f"score the retrieval of {test.subject}" for test in (opened[2] if opened else [])]
    plan += [f"score the pictures of {values.images}"] if values.images else []
    run = util.open_run(options, values.output_dir, inputs, plan)
    if not run.finished:
        results = score(values, opened, inputs)
        util.write_json(run.path / "results.json", results)
        with util.atomic_write(run.path / "table.md") as file:
            file.write(as_table(results))
        run.finish({})
    print((run.path / "table.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
