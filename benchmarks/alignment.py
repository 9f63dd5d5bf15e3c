"""Compare aligners, losses and encoders on the miniature world: training and scores, no pictures.

    python benchmarks/alignment.py --output_path OUT --json alignment.json       # everything
    python benchmarks/alignment.py --output_path OUT --variants aligner_ restore # some of it
    python benchmarks/alignment.py --output_path OUT --encoders EEGProject NICE  # encoders, too
    python benchmarks/alignment.py --output_path OUT --difficulty things-eeg2    # as hard as that

The EEG is SIMULATED. Scores are of validation concepts, which are neither trained on nor tested
on: choose settings by them. Trainings and scores in OUT are found again by a later call.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import args
import demo
import metrics
from datafiles.eeg_files import eeg_file, list_subjects
from datafiles.feature_bank import Bank, open_bank
from dataset import TestEEG, open_test
from decoder import controls
from decoder.decoder import Decoder, model_file
from modalities import FINAL, NAMES
from rundirs.closing import flags
from rundirs.environment import environment
from rundirs.files import file_hash, read_json, write_json
from unet import Sampling

LAYERS = (2, 3, 4, 5)  # of the miniature CLIP: the stages of its ResNet
BLURS_PX = (0, 4, 8)  # of pictures of 256 px
BLURRED = "clip_features_blurred"  # a bank of these, beside the plain one
PLAIN = "clip_features"
# one person with the repetitions of THINGS-EEG2 and an eighth of its pictures, at the SNR where
# ATMS retrieves of validation concepts about what is published of the test set (27 % and 58 %)
HARD = replace(
    demo.FULL, subjects=1, training_concepts=1000, training_repetitions=4, test_repetitions=80,
    snr=0.031,
)  # fmt: skip
DIFFICULTY = {"demo": demo.FULL, "quick": demo.QUICK, "things-eeg2": HARD}
BASE = "as_is"  # the demo's own settings, which all others are compared with
GUIDANCE = args.STAGES["generate"]().actions()["prior_guidance"].default


@dataclass(frozen=True)
class Variant:
    """Flags of train.py beside the demo's own, and how its model predicts."""

    train: Mapping[str, object] = field(default_factory=dict)
    guidance: float = GUIDANCE
    bank: str = PLAIN
    views: int = 1
    restore_variance: bool = False

    def training(self) -> str:
        """What its training is called; variants that differ in prediction only share it."""
        words = [f"{flag}_{value}" for flag, value in self.train.items()]
        words += [self.bank] if self.bank != PLAIN else []
        return "".join("-".join(words or [BASE]).replace(", ", "_").split("'"))

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            demo.PRIOR_STEPS, self.guidance, "dpm", demo.PRIOR_DRAWS, self.restore_variance
        )


VARIANTS: Mapping[str, Variant] = {
    BASE: Variant(),
    "restore_variance": Variant(restore_variance=True),
    "guidance_1": Variant(guidance=1.0),
    **{f"aligner_{kind}": Variant({"aligner": kind}) for kind in ("mlp", "none")},
    "aligner_alone": Variant({"aligner_skip": "off"}),
    "aligner_mlp_alone": Variant({"aligner": "mlp", "aligner_skip": "off"}),
    "aligner_mlp_restore_variance": Variant({"aligner": "mlp"}, restore_variance=True),
    **{f"predicts_{what}": Variant({"prior_predicts": what}) for what in ("noise", "embedding")},
    **{f"loss_{what}": Variant({"prior_loss": what}) for what in ("noise", "embedding")},
    "contrast_targets": Variant({"contrast_normalise": "targets"}),
    "contrast_concept": Variant({"contrast_positives": "concept"}),
    "contrast_targets_concept": Variant(
        {"contrast_normalise": "targets", "contrast_positives": "concept"}
    ),
    "contrast_off": Variant({"contrast_weight": 0.0}),
    **{f"layer_{layer}": Variant({"contrast_layer": layer}) for layer in (*LAYERS, FINAL)},
    "layers_mixed": Variant({"contrast_layer": (*LAYERS[1:], FINAL)}),
    "blurs": Variant(bank=BLURRED),
    "views_8": Variant(views=8),
    "schedule_cosine": Variant({"schedule": "cosine"}),
    **{f"ema_{decay}": Variant({"ema_decay": decay}) for decay in (0.0, 0.9, 0.999)},
    **{f"rate_{rate}": Variant({"learning_rate": rate}) for rate in (3e-4, 3e-3)},
    "masked": Variant({"mask_channel": 0.1, "mask_time": 0.1}),
    "weight_decay_0.1": Variant({"weight_decay": 0.1}),
    **{f"target_mse_{weight}": Variant({"target_mse": weight}) for weight in (0.1, 1.0)},
}
TOP1 = ("top1_image", "top1_encoder")
CHANCES = {"top1_image": 1, "top1_encoder": 1, "top5_encoder": 5}  # over the gallery; cosines': 0
SCORES = (*TOP1, "top5_encoder", *(f"cosine_{name}" for name in NAMES), "variance")
MEANING = (
    "top1_image: retrieval of the predicted image embedding among all validation pictures, by the "
    "cosine of standardised embeddings; "
    "top1_encoder, top5_encoder: of the EEG embedding; cosine: of standardised prediction and "
    "truth; variance: of standardised predictions, 1 = as training targets"
)


def scores_of(
    decoder: Decoder, test: TestEEG, bank: Bank, sampling: Sampling, seed: int, control: str | None
) -> dict[str, np.ndarray]:
    """Each of SCORES [N], by stimulus, of one subject's EEG or of a control's."""
    everything, gallery = range(len(test.eeg)), bank.rows_for(test.stimuli)
    read, truth = controls.controlled_eeg(test, control, seed), torch.arange(len(test.eeg))
    predicted = decoder.predict(read, everything, sampling, seed)
    encoded = decoder.condition(read, everything)
    seen, found = decoder.gallery(gallery, decoder.subject_index(test.subject)), {}
    standard = [decoder.standardised(of) for of in (predicted, gallery)]
    asked = ([of["image"] for of in standard], (encoded, seen))
    for name, pair in zip(TOP1, asked, strict=True):
        similarity = metrics.cosine_similarity(*pair)
        ranks = metrics.ranks(similarity, truth)
        found[name] = metrics.top_k_probability(*ranks, 1)
    found["top5_encoder"] = metrics.top_k_probability(*ranks, 5)  # the encoder's come last
    deviations = []
    for name in NAMES:
        made, true = (of[name] for of in standard)
        found[f"cosine_{name}"] = F.cosine_similarity(made, true, dim=1)
        deviations.append((made - made.mean(dim=0)).square().mean(dim=1))
    found["variance"] = torch.stack(deviations).mean(dim=0)
    return {name: values.double().numpy() for name, values in found.items()}


def score_run(out: Path, run: Path, variant: Variant, file: Path, seed: int) -> dict[str, Any]:
    """{"eeg" or "shuffled_eeg": {score: [N]}}, means over subjects; read from ``file`` if there."""
    key = {"model": file_hash(model_file(run, "best")), "seed": seed, "scores": [*SCORES]}
    key |= asdict(variant.sampling) | {"views": variant.views}
    if file.exists() and (record := read_json(file))["key"] == key:
        return record["scores"]
    decoder, data = Decoder.load(run, "best"), out / "world" / "data"
    decoder.test_views = variant.views
    bank = open_bank(out / PLAIN, "test", decoder.layers)
    tests = [
        open_test(eeg_file(data, name, "test"), name, data, None, decoder.reading(name))
        for name in list_subjects(data, None)
    ]
    scores = {}
    for control in (None, "shuffled_eeg"):
        of = [scores_of(decoder, one, bank, variant.sampling, seed, control) for one in tests]
        scores[control or "eeg"] = {
            name: np.mean([found[name] for found in of], axis=0).tolist() for name in SCORES
        }
    write_json(file, {"key": key, "scores": scores})
    return scores


def crossed_interval(values: np.ndarray, seed: int, draws: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean of values [seeds, N], resampling seeds and stimuli."""
    draw = np.random.default_rng(seed)
    means = [
        values[draw.integers(0, values.shape[0], values.shape[0])][
            :, draw.integers(0, values.shape[1], values.shape[1])
        ].mean()
        for _ in range(draws)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def row(own: np.ndarray, shuffled: np.ndarray, base: np.ndarray, seed: int) -> dict[str, Any]:
    """One score of a variant, all [seeds, N]; ``difference`` from the base is paired by both."""
    low, high = crossed_interval(own, seed)
    return {
        "value": float(own.mean()), "low": low, "high": high, "n": own.shape[1],
        "seeds": own.shape[0], "seed": seed, "control": float(shuffled.mean()),
        "difference": float((own - base).mean()),
        "difference_interval": crossed_interval(own - base, seed),
    }  # fmt: skip


def rows_of(found: Mapping[str, Sequence[Mapping[str, Any]]], seed: int) -> dict[str, Any]:
    """{"variant/score": row} of {variant: what ``score_run`` gave for each seed}."""

    def of(variant: str, control: str, score: str) -> np.ndarray:
        return np.array([scores[control][score] for scores in found[variant]])

    return {
        f"{name}/{score}": row(
            of(name, "eeg", score), of(name, "shuffled_eeg", score), of(BASE, "eeg", score), seed
        )
        | {"chance": CHANCES.get(score, 0) / of(name, "eeg", score).shape[1]}
        for name in found
        for score in SCORES
    }


def as_markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per variant: value [95 %] and, after a slash, the same with shuffled EEG."""
    lines = [f"| variant | {' | '.join(SCORES)} |", "|---" * (len(SCORES) + 1) + "|"]
    for name in dict.fromkeys(key.split("/")[0] for key in rows):
        cells = []
        for score in SCORES:
            found = rows[f"{name}/{score}"]
            low, high = found["difference_interval"]
            mark = " +" if low > 0 else " -" if high < 0 else ""
            cells.append(
                f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] / "
                f"{found['control']:.3f}{mark}"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chosen_variants(wanted: Sequence[str], encoders: Sequence[str]) -> dict[str, Variant]:
    """The base and those whose name starts as ``wanted``, or all; and one per encoder."""
    for start in wanted:
        if not any(name.startswith(start) for name in VARIANTS):
            raise SystemExit(f"--variants: none starts with {start}; choose of {[*VARIANTS]}")
    if encoders and "encoder" not in args.STAGES["train"]().actions():
        raise SystemExit("--encoders: train.py has no --encoder here, there is one encoder only")
    chosen = {
        name: variant
        for name, variant in VARIANTS.items()
        if name == BASE or name.startswith(tuple(wanted)) or not (wanted or encoders)
    }
    return chosen | {f"encoder_{name}": Variant({"encoder": name}) for name in encoders}


def run_all(
    out: Path, variants: Mapping[str, Variant], seeds: Sequence[int], scale: demo.Scale
) -> dict[str, list[dict[str, Any]]]:
    """Train what is not trained yet, score it: {variant: scores per seed}. Exits as a stage does.

    Variants that differ in prediction only share their trainings.
    """
    world, (what, features) = demo.commands(out, seeds[0], scale, "validation")[:2]
    banks = [(what, [*features, *flags(image_layers=LAYERS)])]
    if any(variant.bank == BLURRED for variant in variants.values()):
        banks.append((what, [*features, *flags(output_path=out / BLURRED, target_blur=BLURS_PX)]))
    if code := demo.run([world, *banks]):
        raise SystemExit(code)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    jobs = [(seed, name) for seed in seeds for name in variants]
    for seed, name in tqdm(jobs, desc="variants x seeds", unit="run"):
        variant = variants[name]
        run = f"alignment/{variant.training()}-seed{seed}"
        asked = {**variant.train, "clip_feature_path": out / variant.bank}
        if not (out / run / "DONE").exists() and (
            code := demo.run([demo.training(out, seed, scale, run, **asked)])
        ):
            raise SystemExit(code)
        file = out / "alignment" / "scores" / f"{name}-seed{seed}.json"
        found[name].append(score_run(out, out / run, variant, file, seed))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_path", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--variants", nargs="+", default=[], metavar="START",
        help="only those whose name starts like this, and the base (default: all)")  # fmt: skip
    parser.add_argument("--encoders", nargs="+", default=[], metavar="NAME",
        help="also encoders, as train.py --encoder names them")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N",
        help="trainings of each, from --seed on (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--difficulty", choices=tuple(DIFFICULTY), default="demo",
        help="the demo's world, its quick one, or one person at the SNR where ATMS retrieves what "
        "is published of it on THINGS-EEG2 (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    out, seeds = demo.seen_from_here(given.output_path), range(given.seed, given.seed + given.seeds)
    variants = chosen_variants(given.variants, given.encoders)
    found = run_all(out, variants, seeds, DIFFICULTY[given.difficulty])
    rows = rows_of(found, given.seed)
    some = rows[f"{BASE}/{TOP1[0]}"]
    print(
        f"\nSIMULATED EEG, {some['n']} validation concepts, {some['seeds']} trainings each. "
        "Value [95 % over seeds and stimuli] / the same with shuffled EEG; + or -: differs from "
        f"{BASE}, paired. Chance: {some['chance']:.3f} of top1, 0 of cosines. {MEANING}.\n"
    )
    print(as_markdown(rows))
    if given.json:
        write_json(given.json, {"simulated": True, "rows": rows, **environment()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
