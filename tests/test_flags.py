"""Every flag of every stage changes what is written or planned, or is refused: none is idle.

A tiny world is taken through each stage once as it is, and once with each flag changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Chain
from helpers_flags import HOW, NOWHERE, Stage, idle_flags

import args
import ATMS_retrieval
import clip_feature_extractor
import dataset
import evaluate
import generate
import report
import train
from rundirs.tensors import load_tensors, save_tensors


def with_another_latest(chain: Chain, root: Path) -> Path:
    """The trained model with a low-level head, whose latest checkpoint is not its best."""
    run = root / "model"
    shutil.copytree(chain.model, run, symlinks=True)
    assert train.main(chain.train_flags(run, "--low_level")) == 0
    best = run / "checkpoints" / "best" / "model.safetensors"
    latest = run / "checkpoints" / "step-99999999"
    tensors, header = load_tensors(best)
    changed = {name: value + 0.1 for name, value in tensors.items()}
    save_tensors(latest / best.name, changed, header)
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / "latest").symlink_to(latest.name)
    return run


def stages(chain: Chain, root: Path) -> Iterator[Stage]:
    """All that take data; ``world``, ``pretrain`` and ``demo`` have tests of their own."""
    learn = {
        "dataset": "ubp",
        "subjects": "sub-01", "subject_dropout": 0.5, "val_fraction": 0.4, "lr_eeg": 0.1,
        "channels": "Oz", "time_window": ["--time_window", 0, 0.5], "encoder": "EEGProject",
        "seeds": 7, "minutes": 5,
        "epochs": 2, "grad_clip": 0.001, "ema_decay": 0.9, "mask_channel": 0.5, "mask_time": 0.5,
        "mask_patch": 0.5, "contrast_layer": 2, "text_contrast": 0.5, "condition_dropout": 0.5,
        "weight_decay": 0.9, "trials": "single", "align": "euclidean",
        "init_from": NOWHERE, "adapt_from": NOWHERE,
        "prior_loss": "noise", "warmup_steps": 9, "target_mse": 0.5,
        "contrast_weight": 0.2, "learning_rate": 0.1, "mask_span": (["--mask_time", 0.5],
                                                                    ["--mask_span", 3]),
        "val_every": (["--epochs", 2], ["--val_every", 2]),
        "patience": (["--epochs", "auto", "--learning_rate", 0.1, "--patience", 1],
                     ["--patience", 2]),
    }  # fmt: skip
    tiny = chain.train_flags(root)[: chain.train_flags(root).index("--output_dir")]
    tiny += ["--epochs", 1, "--batch_size", 16, "--val_fraction", 0.2, "--device", "cpu"]
    yield Stage("train", train.main, "output_dir", tiny, learn)
    yield Stage("retrieval", ATMS_retrieval.main, "output_dir", tiny, learn)
    yield Stage(
        "features", clip_feature_extractor.main, "output_path",
        ["--data_path", chain.data, "--device", "cpu", "--batch_size", 8, "--num_workers", 1,
         "--clip_model", chain.models / "miniature-clip.json", "--superpixel_size", 64,
         "--clip_pretrained", chain.models / "miniature-clip.safetensors"],
        {"text_template": "a {concept}", "clip_model": "ViT-B-32", "clip_pretrained": NOWHERE,
         "target_blur": 2, "image_layers": 2, "superpixel_size": 32},
    )  # fmt: skip
    yield Stage("report", report.main, "output", ["--runs", chain.model], {"dataset": "ubp"})
    model = with_another_latest(chain, root)
    drawing = chain.generate_flags(root, "--mode", "fused", "--max_stimuli", 1, "--steps", 2)
    at = drawing.index("--output_dir")
    clip = ["--clip_model", chain.models / "miniature-clip.json",
            "--clip_pretrained", chain.models / "miniature-clip.safetensors"]  # fmt: skip
    yield Stage(
        "generate", generate.main, "output_dir",
        [*drawing[:at], *drawing[at + 2 :], "--model_path", model],
        {"subject": "sub-02", "max_stimuli": 2, "prompt": "x", "negative_prompt": "x",
         "fusion_strength": 0.2, "size": 128, "scheduler": "DDIMScheduler", "sweep": "scale",
         "guidance_interval": ["--guidance_interval", 0, 0.3], "injection": "published",
         "vae_path": NOWHERE, "sd_model_path": NOWHERE, "control": "shuffled_eeg",
         "timestep_spacing": "trailing", "steps": 3, "precision": "bf16", "preset": "turbo",
         "prior_steps": 2, "prior_sampler": "ddim", "superpixel_size": 20, "data_path": NOWHERE,
         "averaging": "weighted", "test_views": 2,
         "clip_feature_path": (["--control", "mean_embedding", "--clip_feature_path",
                                chain.features], ["--clip_feature_path", NOWHERE]),
         "draws": (["--draws", 2, "--choose", "random"], ["--draws", 3]),
         "choose": (["--draws", 2, *clip], ["--choose", "random"]),
         "clip_model": (["--draws", 2, *clip], ["--clip_model", NOWHERE]),
         "clip_pretrained": (["--draws", 2, *clip], ["--clip_pretrained", NOWHERE]),
         "prompt_concepts": (["--prompt_source", "decoded", "--clip_feature_path",
                              chain.features], ["--prompt_concepts", 2]),
         "init_strength": (["--init", "superpixel"], ["--init_strength", 0.5])},
    )  # fmt: skip
    scoring = [
        "--model_path", model, "--data_path", chain.data, "--prior_steps", 3, "--device",
        "cpu", "--clip_feature_path", chain.features, "--permutations", 5,
    ]  # fmt: skip
    yield Stage(
        "evaluate", evaluate.main, "output_dir", scoring,
        {"dataset": "ubp", "subjects": "sub-01",
         "occlusion": "time", "average": 1, "transductive": "csls", "averaging": "weighted",
         "test_views": 2,
         "control": "shuffled_eeg", "permutations": 9,
         "compare": ["--compare", NOWHERE, NOWHERE], "over_seeds": NOWHERE,
         "truth": NOWHERE, "weights_dir": NOWHERE,
         "prior_sampler": "ddim", "prior_steps": 2},
    )  # fmt: skip


NAMES_OF = ("train", "retrieval", "generate", "evaluate", "features", "report")


@pytest.mark.parametrize("name", NAMES_OF)
def test_no_flag_is_idle(name: str, chain: Chain, tmp_path: Path) -> None:
    stage = next(one for one in stages(chain, tmp_path) if one.name == name)
    found = idle_flags(stage, tmp_path, "page.html" if name == "report" else "")
    assert found == ([], []), "idle, or without another value in stages()"


@pytest.mark.parametrize(
    ("flag", "value"),
    [("check", "full"), ("subjects", "sub-09"), ("dataset", "ubp"), ("captions", NOWHERE),
     ("export", "ubp"), ("output_path", NOWHERE), ("import_features", NOWHERE),
     ("join_features", NOWHERE),
     ("blocks", NOWHERE), ("split", "random"), ("seed", "3"), ("fetch", "sdxl"),
     ("clip_feature_path", NOWHERE), ("data_path", NOWHERE)],
)  # fmt: skip
def test_no_flag_of_the_check_is_idle(chain: Chain, capsys, monkeypatch, flag, value) -> None:
    monkeypatch.setenv("EEG2IMAGE_MIRROR", "nowhere://")  # of --fetch
    told = []
    for more in ([], [f"--{flag}", value]):
        dataset.main(["--data_path", str(chain.data), *more])
        told.append(capsys.readouterr())
    assert told[0] != told[1]


def test_every_stage_is_walked() -> None:
    own = {"world", "pretrain", "demo"}  # by tests/miniworld and tests/test_demo.py
    elsewhere = {"check", "preprocess"}  # above, and by tests/preprocessing
    assert args.STAGES.keys() == {*NAMES_OF, *own, *elsewhere}
    given = set(args.STAGES["check"]().actions()) - HOW
    assert given == {
        "check", "subjects", "dataset", "captions", "clip_feature_path", "data_path", "export",
        "output_path", "import_features", "blocks", "split", "allow_block_leak", "seed", "fetch",
        "join_features",
    }  # fmt: skip
