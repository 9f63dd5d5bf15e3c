"""Measure the shipped miniatures and the whole chain on them: tables, and with --json a file.

    python benchmarks/quality.py --output_path OUT --json quality.json     # the shipped weights
    python benchmarks/quality.py --output_path OUT_CHOICE --ablation       # on validation concepts
    python benchmarks/quality.py --output_path OUT_CHOICE --ablation fusion_ steps_  # some knobs
    python benchmarks/quality.py --output_path OUT --rules separate     # both rules of shares

The EEG is SIMULATED. Stages are run by their public command lines and resume where they stopped.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
import metrics
import modalities
from datafiles.stimuli import list_stimuli
from evaluation import picture_scores
from evaluation.pairing import pair
from miniworld import judge, models, pictures, quality, renders
from rundirs.environment import environment
from rundirs.files import read_json, write_json
from sdxl.loading import load_sdxl

COLOURS = ("colour", "background")
# models trained otherwise: {name: flags of train.py}
TRAINING_KNOBS: Mapping[str, Mapping[str, object]] = {
    "loss_weights_uncertainty": {"loss_weights": "uncertainty"},
    **{f"aligner_{value}": {"aligner": value} for value in ("mlp", "none")},
    "aligner_alone": {"aligner_skip": "off"},
    "align_euclidean": {"align": "euclidean"},
}
# settings beside the demo's own: {name: flags of generate.py}
KNOBS: Mapping[str, Mapping[str, object]] = {
    **{f"fusion_strength_{value}": {"fusion_strength": value} for value in (0.5, 0.75, 1.5)},
    **{
        f"fusion_weights_{value}": {"fusion_weights": value}
        for value in ("validated", "confidence")
    },
    **{f"guidance_{value}": {"guidance": value} for value in (1.0, 3.0, 5.0)},
    **{f"steps_{value}": {"steps": value} for value in (5, 20)},
    **{f"prior_guidance_{value}": {"prior_guidance": value} for value in (1.0, 1.5, 4.0)},
    "prior_draws_1": {"prior_draws": 1},
    "restore_variance": {"restore_variance": True},
    **{
        f"init_superpixel_{value}": {"init": "superpixel", "init_strength": value}
        for value in (0.6, 0.8, 0.9)
    },
    **{
        f"guidance_interval_{low}_{high}": {"guidance_interval": (low, high)}
        for low, high in ((0.0, 0.8), (0.2, 0.8), (0.2, 1.0))
    },
    **{
        f"injection_{value}": {"injection": value}
        for value in ("uniform", "redistributed", "published")
    },
    **{f"prompt_{value}": {"prompt_source": value} for value in ("decoded", "oracle")},
    "prompt_decoded_3": {"prompt_source": "decoded", "prompt_concepts": 3},
    "draws_8_random": {"draws": 8, "choose": "random"},
}


def summary(values: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean, 95 % bootstrap interval over stimuli, N."""
    values = np.asarray(values, dtype=float)
    return {
        "value": float(values.mean()),
        "interval": metrics.bootstrap_interval(values, seed),
        "n": len(values),
        "seed": seed,
    }


def of_miniatures(weights: models.Models, n: int, seed: int) -> dict[str, Any]:
    """The models themselves on renders of n test concepts."""
    scenes = renders.unseen_scenes("test", n, seed)
    vae = load_sdxl(weights.sdxl, torch.float32, "cpu").vae
    verdicts = quality.judge_accuracy(judge.load(weights.judge), scenes)
    rows = {"vae_psnr": summary(quality.vae_psnr(vae, scenes), seed)}
    for name, hits in quality.clip_retrieval(weights, scenes).items():
        key = "clip_retrieval_200" if name == "image" else f"clip_retrieval_200_{name}"
        rows[key] = summary(hits, seed)
    rows["judge_shape"] = summary(verdicts["shape"], seed)
    colours = np.mean([verdicts[name] for name in COLOURS], axis=0)
    return rows | {"judge_colour": summary(colours, seed)}


def of_pictures(
    verdicts: Mapping[str, np.ndarray], prefix: str, suffix: str, seed: int
) -> dict[str, Any]:
    """What the judge sees in pictures: {prefix}_shape{suffix} and so on."""
    names = {"shape": "shape", "colour": "object_colour", "background": "background_colour",
             "pattern": "pattern", "place": "place"}  # fmt: skip
    return {
        f"{prefix}_{names[attribute]}{suffix}": summary(hits, seed)
        for attribute, hits in verdicts.items()
    }


def of_retrieval(out: Path) -> dict[str, Any]:
    """Encoder -> image of the demo's first subject, from evaluate.py."""
    results = read_json(out / "quality" / "scores" / "results.json")
    row = next(row for row in results["retrieval"] if row["subject"] == demo.SUBJECT)
    return {
        "eeg_retrieval_top1": {"value": row["top1"], "interval": row["top1_interval"],
                               "n": row["n"], "seed": results["seed"]},
        "eeg_retrieval_top1_shuffled": {"value": row["top1_shuffled"],
                                        "interval": row["top1_shuffled_range"],
                                        "n": row["n"], "seed": results["seed"]},
    }  # fmt: skip


def run_chain(out: Path, seed: int, drawn: int) -> None:
    """World to scores, with shuffled EEG for every recipe and true embeddings for the fused one.

    In the demo's own folder, its world, embeddings and model are found finished.
    """
    modes = {None: "all", "shuffled_eeg": "all", "true_embedding": "fused"}
    plan = [
        *demo.commands(out, seed, demo.FULL),
        *(
            demo.drawing(out, seed, drawn, folder(control), mode, **control_of(control))
            for control, mode in modes.items()
        ),
        demo.scoring(out, seed, folder(None), "quality/scores"),
    ]
    run(plan)


def run(plan: list[tuple[str, list[str]]]) -> None:
    """Exits with the code of a failing stage."""
    if code := demo.run(plan):
        raise SystemExit(code)


def folder(control: str | None) -> str:
    """Where the pictures of a control, or of the EEG itself, lie."""
    return f"quality/{control or 'eeg'}"


def control_of(control: str | None) -> dict[str, object]:
    return {"control": control} if control else {}


def presets_without_and_moved(where: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Injection files: each modality left out, and each at every single other site."""
    where.mkdir(parents=True, exist_ok=True)
    sites = {item.name: dict(item.sites) for item in modalities.MODALITIES}
    changes = [(f"without_{name}", name, {}) for name in sites]
    changes += [
        (f"{name}_at_{site}", name, {site: 1.0})
        for name, site in itertools.product(sites, modalities.SITES)
        if sites[name].keys() != {site}
    ]
    for label, name, moved in changes:
        path = where / f"{label}.yaml"
        content = {
            "description": label,
            "gain": "relative",
            "sites": sites | {name: moved},
            "allow_dead": [name] if not moved else [],
        }
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        yield label, {"injection": path}


def ablation(out: Path, seed: int, drawn: int, wanted: Sequence[str]) -> str:
    """Fused pictures of validation concepts under every knob whose name starts as ``wanted``."""
    presets = dict(presets_without_and_moved(out / "quality" / "presets"))
    weights = models.Models(out / "world" / "models")
    knobs = {
        **KNOBS,
        **{name: {"model_path": out / "quality" / "models" / name} for name in TRAINING_KNOBS},
        **presets,
        "prompt_decoded_without_text": presets["without_text"] | {"prompt_source": "decoded"},
        "draws_8_eeg": {
            "draws": 8,
            "clip_model": weights.clip_config,
            "clip_pretrained": weights.clip_checkpoint,
        },
    }
    for start in wanted:
        if not any(name.startswith(start) for name in knobs):
            raise SystemExit(f"--ablation: no knob starts with {start}; choose of {sorted(knobs)}")
    chosen = [name for name in knobs if not wanted or name.startswith(tuple(wanted))]
    settings = {"as_is": {}} | {name: knobs[name] for name in chosen}
    train = [
        demo.training(out, seed, demo.FULL, f"quality/models/{name}", **TRAINING_KNOBS[name])
        for name in chosen
        if name in TRAINING_KNOBS
    ]
    draw = [
        demo.drawing(out, seed, drawn, f"quality/ablation/{name}", "fused", **more)
        for name, more in settings.items()
    ]
    world = demo.commands(out, seed, demo.FULL, "validation")
    if any(name.startswith("init_superpixel") for name in chosen):  # on the trained model
        train.append(demo.training(out, seed, demo.FULL, low_level=True))
    run([*world, *train, *draw])
    model = judge.load(weights.judge)
    data = out / "world" / "data"
    found = {
        name: quality.judged_run(model, out / "quality" / "ablation" / name, data)["fused"]
        for name in settings
    }
    above = quality.above_table(found, dict.fromkeys(found, found["as_is"]), seed)
    pixels = {name: pixel_scores(out / "quality" / "ablation" / name, data) for name in settings}
    return (
        f"{quality.judge_table(found, seed)}\nabove as_is, paired by stimulus\n\n{above}\n"
        f"pixels\n\n{quality.score_table(pixels, seed)}"
    )


RULES = ("intent", "redistributed")  # a modality's share among all five, or among the recipe's


def compare_rules(out: Path, seed: int, drawn: int, mode: str) -> str:
    """What the judge sees in each recipe of a mode under both rules of shares; N = ``drawn``."""
    names = {rule: f"quality/rules/{rule}_{mode}" for rule in RULES}
    draw = [demo.drawing(out, seed, drawn, names[rule], mode, injection=rule) for rule in RULES]
    run([*demo.commands(out, seed, demo.FULL), *draw])
    model = judge.load(models.Models(out / "world" / "models").judge)
    found = {
        f"{recipe}, {rule}": verdicts
        for rule in RULES
        for recipe, verdicts in quality.judged_run(
            model, out / names[rule], out / "world" / "data"
        ).items()
    }
    return quality.judge_table(dict(sorted(found.items())), seed)


def pixel_scores(images: Path, data: Path) -> dict[str, np.ndarray]:
    """PixCorr and SSIM of the fused pictures of a run, by stimulus."""
    (group,) = pair(images, [], list_stimuli(data, "test"))
    values = picture_scores.pixel_values(group, metrics.PROTOCOLS[0], 0)
    return {name: found.own for name, found in values.items()}


def as_markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| what | value [95 %] | N | seed |", "|---|---|---|---|"]
    for name, row in rows.items():
        low, high = row["interval"]
        value = f"{row['value']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {name} | {value} | {row['n']} | {row['seed']} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_path", type=Path, required=True, help="where the stages write")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--stimuli", type=int, default=demo.FULL.test_concepts, metavar="N",
        help="draw the first N of the unseen concepts (default: all %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--ablation", nargs="*", metavar="KNOB",
        help="instead, choose settings: fused pictures of VALIDATION concepts under every knob, or "
        "those whose names start like this")  # fmt: skip
    parser.add_argument("--rules", choices=modalities.MODES, metavar="MODE",
        help="instead, judge the recipes of a mode under both rules of sharing a site: "
        f"{', '.join(modalities.MODES)}")  # fmt: skip
    given = parser.parse_args(argv)
    if given.json and (given.rules or given.ablation is not None):
        parser.error("--json holds the test concepts' table; --ablation and --rules print others")
    return given


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    out, seed, n = demo.seen_from_here(given.output_path), given.seed, given.stimuli
    if given.ablation is not None:
        print(f"\n{n} validation concepts, SIMULATED EEG of {demo.SUBJECT}, fused\n")
        print(ablation(out, seed, n, given.ablation))
        return 0
    if given.rules:
        print(f"\n{n} unseen concepts, SIMULATED EEG of {demo.SUBJECT}\n")
        print(compare_rules(out, seed, n, given.rules))
        return 0
    run_chain(out, seed, n)
    weights, data = models.Models(out / "world" / "models"), out / "world" / "data"
    model = judge.load(weights.judge)
    found = {
        control: quality.judged_run(model, out / folder(control), data)
        for control in (None, "shuffled_eeg", "true_embedding")
    }
    rows = of_miniatures(weights, demo.FULL.test_concepts, seed)
    rows |= of_pictures(found["true_embedding"]["fused"], "ceiling", "", seed)
    rows |= of_retrieval(out)
    rows |= of_pictures(found[None]["fused"], "eeg", "", seed)
    rows |= of_pictures(found["shuffled_eeg"]["fused"], "eeg", "_shuffled", seed)
    chance = {name: 1 / len(values) for name, values in pictures.ATTRIBUTES.items()}
    print(f"\nunseen test concepts, SIMULATED EEG of {demo.SUBJECT}; chance {chance}\n")
    print(as_markdown(rows))
    for control, verdicts in found.items():
        print(f"\n{control or 'EEG'}\n\n{quality.judge_table(verdicts, seed)}")
    above = quality.above_table(found[None], found["shuffled_eeg"], seed)
    print(f"\nEEG above shuffled_eeg, paired by stimulus\n\n{above}")
    print(f"\nprogressive: what each modality adds\n\n{quality.progress_table(found[None], seed)}")
    if given.json:
        write_json(given.json, {"simulated": True, "rows": rows, **environment()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
