"""Measure the shipped miniatures and the whole chain on them: tables, and with --json a file.

    python benchmarks/quality.py --output_path OUT --json quality.json     # the shipped weights
    python benchmarks/quality.py --output_path OUT_CHOICE --ablation       # on validation concepts

The EEG is SIMULATED. Stages are run by their public command lines and resume where they stopped.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo
import injection
import metrics
import modalities
import util
from miniworld import judge, models, pictures, quality, renders

COLOURS = ("colour", "background")
# settings beside the demo's own: {name: flags of generate.py}
KNOBS: Mapping[str, Mapping[str, object]] = {
    **{f"fusion_strength_{value}": {"fusion_strength": value} for value in (0.5, 0.75, 1.5)},
    **{
        f"fusion_weights_{value}": {"fusion_weights": value}
        for value in ("validated", "confidence")
    },
    **{f"guidance_{value}": {"guidance": value} for value in (1.0, 3.0, 5.0)},
    **{f"steps_{value}": {"steps": value} for value in (5, 20)},
    **{f"prior_guidance_{value}": {"prior_guidance": value} for value in (1.0, 4.0)},
    **{f"injection_{value}": {"injection": value} for value in ("uniform", "published")},
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


def of_miniatures(weights: models.Models, split: str, n: int, seed: int) -> dict[str, Any]:
    """The models themselves on renders of n unseen concepts."""
    scenes = renders.unseen_scenes(split, n, seed)
    vae = injection.load_sdxl(weights.sdxl, torch.float32, "cpu").vae
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
    results = util.read_json(out / "quality" / "scores" / "results.json")
    row = next(row for row in results["retrieval"] if row["subject"] == demo.SUBJECT)
    return {
        "eeg_retrieval_top1": {"value": row["top1"], "interval": row["top1_interval"],
                               "n": row["n"], "seed": results["seed"]},
        "eeg_retrieval_top1_shuffled": {"value": row["top1_shuffled"],
                                        "interval": row["top1_shuffled_range"],
                                        "n": row["n"], "seed": results["seed"]},
    }  # fmt: skip


def run_chain(out: Path, seed: int, scale: demo.Scale, split: str) -> None:
    """World to scores, all stimuli, with both controls. Exits with the code of a failing stage.

    In the demo's own folder, its world, embeddings and model are found finished.
    """
    modes = {None: "all", "shuffled_eeg": "all", "true_embedding": "fused"}
    plan = [
        *demo.commands(out, seed, scale, split),
        *(
            demo.drawing(
                out, seed, scale.test_concepts, folder(control), mode, **control_of(control)
            )
            for control, mode in modes.items()
        ),
        demo.scoring(out, seed, folder(None), "quality/scores"),
    ]
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


def ablation(out: Path, seed: int, drawn: int) -> str:
    """Fused pictures under every knob, each beside the demo's own settings."""
    settings = {
        "as_is": {},
        **KNOBS,
        **dict(presets_without_and_moved(out / "quality" / "presets")),
    }
    plan = [
        demo.drawing(out, seed, drawn, f"quality/ablation/{name}", "fused", **more)
        for name, more in settings.items()
    ]
    if code := demo.run(plan):
        raise SystemExit(code)
    model = judge.load(models.Models(out / "world" / "models").judge)
    data = out / "world" / "data"
    found = {
        name: quality.judged_run(model, out / "quality" / "ablation" / name, data)["fused"]
        for name in settings
    }
    return quality.judge_table(found, seed)


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
    parser.add_argument("--stimuli", type=int, default=200, help="unseen concepts (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--ablation", action="store_true",
        help="choose settings: all on VALIDATION concepts, then a table of every knob")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    out, seed, n = given.output_path.resolve(), given.seed, given.stimuli
    split = "validation" if given.ablation else "test"
    run_chain(out, seed, replace(demo.FULL, test_concepts=n), split)
    weights, data = models.Models(out / "world" / "models"), out / "world" / "data"
    model = judge.load(weights.judge)
    found = {
        control: quality.judged_run(model, out / folder(control), data)
        for control in (None, "shuffled_eeg", "true_embedding")
    }
    rows = of_miniatures(weights, split, n, seed)
    rows |= of_pictures(found["true_embedding"]["fused"], "ceiling", "", seed)
    rows |= of_retrieval(out)
    rows |= of_pictures(found[None]["fused"], "eeg", "", seed)
    rows |= of_pictures(found["shuffled_eeg"]["fused"], "eeg", "_shuffled", seed)
    chance = {name: 1 / len(values) for name, values in pictures.ATTRIBUTES.items()}
    print(f"\n{n} unseen {split} concepts, SIMULATED EEG of {demo.SUBJECT}; chance {chance}\n")
    print(as_markdown(rows))
    for control, verdicts in found.items():
        print(f"\n{control or 'EEG'}\n\n{quality.judge_table(verdicts, seed)}")
    if given.ablation:
        print(f"\nablation, fused\n\n{ablation(out, seed, n)}")
    if given.json:
        util.write_json(given.json, {"split": split, "simulated": True, "rows": rows,
                                     **util.environment()})  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
