"""Scores with controls: what is perfect scores perfectly, what is shuffled scores at chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Chain
from PIL import Image
from test_train import copied_bank

import ATMS_retrieval
import evaluate
import util
from dataset import list_stimuli
from miniworld import eeg, pictures
from modalities import NAMES


def run_of_pictures(folder: Path, chain: Chain, shift: int = 0, source: str = "neutral") -> Path:
    """A run whose pictures are the stimuli themselves, dealt ``shift`` places on."""
    stimuli = list_stimuli(chain.data, "test")
    for row, item in enumerate(stimuli):
        shown = stimuli[(row + shift) % len(stimuli)]
        file = f"{item.folder}/fused.png"
        (folder / item.folder).mkdir(parents=True)
        Image.open(shown.path).save(folder / file)
        util.append_jsonl(
            folder / "images.jsonl",
            {
                "stimulus": item.id,
                "row": row,
                "folder": item.folder,
                "recipe": "fused",
                "file": file,
                "prompt_source": source,
                "control": None,
            },
        )
    return folder


def scores(out: Path) -> dict[str, list[dict[str, object]]]:
    return json.loads((out / "results.json").read_text())


def test_perfect_pictures_score_one_and_swapped_ones_do_not(
    features: Chain, tmp_path: Path
) -> None:
    for name, shift in (("right", 0), ("swapped", 1)):
        images = run_of_pictures(tmp_path / name, features, shift)
        command = [
            "--data_path",
            features.data,
            "--images",
            images,
            "--output_dir",
            tmp_path / f"{name}-scores",
        ]
        assert evaluate.main([str(word) for word in command]) == 0
    right, swapped = (
        scores(tmp_path / f"{name}-scores")["pictures"][0] for name in ("right", "swapped")
    )
    assert right["pixcorr"] == pytest.approx(1) and right["ssim"] == pytest.approx(1)
    assert right["n"] == 6 and right["pixcorr_control"] < 0.9
    assert swapped["pixcorr"] < 0.9 and swapped["ssim"] < 0.9


def test_a_flat_picture_is_counted_as_nan_not_averaged_away(
    features: Chain, tmp_path: Path
) -> None:
    images = run_of_pictures(tmp_path / "images", features)
    victim = sorted(images.glob("*/fused.png"))[0]
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(victim)
    command = [
        "--data_path",
        features.data,
        "--images",
        images,
        "--output_dir",
        tmp_path / "scores",
    ]
    assert evaluate.main([str(word) for word in command]) == 0
    row = scores(tmp_path / "scores")["pictures"][0]
    assert row["pixcorr_nan"] == 1 and math.isnan(row["pixcorr"])


def test_the_table_marks_oracle_pictures(
    features: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = run_of_pictures(tmp_path / "images", features, source="oracle")
    command = [
        "--data_path",
        features.data,
        "--images",
        images,
        "--output_dir",
        tmp_path / "scores",
    ]
    assert evaluate.main([str(word) for word in command]) == 0
    table = capsys.readouterr().out
    assert "ORACLE" in table and "simulated" in table


def test_retrieval_of_all_modalities_and_subjects_beside_its_control(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*chain.evaluate_flags(tmp_path / "scores"), "--model_path", str(chain.model)]
    assert evaluate.main(command) == 0
    rows = scores(tmp_path / "scores")["retrieval"]
    assert {(row["query"], row["subject"]) for row in rows} == {
        (query, subject)
        for query in ("encoder -> image", *(f"prior {name}" for name in NAMES))
        for subject in ("sub-01", "sub-02")
    }
    for row in rows:
        assert row["n"] == row["gallery"] == 6 and row["top1_chance"] == pytest.approx(1 / 6)
        assert row["top1_shuffled"] == pytest.approx(1 / 6, abs=0.06)
    assert "shuffled EEG" in capsys.readouterr().out
    assert evaluate.main(command) == 0  # finished: prints the table again


def test_features_of_another_clip_are_refused(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied_bank(
        chain.features, tmp_path / "bank", clip={"model": "ViT-B-32", "weights": "00"}
    )
    command = [
        *chain.evaluate_flags(tmp_path / "scores"),
        "--model_path",
        str(chain.model),
        "--clip_feature_path",
        str(other),
    ]
    assert evaluate.main(command) == 1
    message = capsys.readouterr().err
    assert "ViT-B-32" in message and "miniature-clip" in message
    assert not (tmp_path / "scores").exists()


def test_pictures_of_other_stimuli_are_refused(
    features: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = run_of_pictures(tmp_path / "images", features)
    util.append_jsonl(
        images / "images.jsonl",
        {
            "stimulus": 1,
            "row": 9,
            "folder": "00009_gone",
            "recipe": "fused",
            "file": "x.png",
            "prompt_source": "neutral",
            "control": None,
        },
    )
    (images / "x.png").write_bytes(b"")
    command = [
        "--data_path",
        features.data,
        "--images",
        images,
        "--output_dir",
        tmp_path / "scores",
    ]
    assert evaluate.main([str(word) for word in command]) == 1
    assert "00009_gone" in capsys.readouterr().err


# ---------------------------------------------------------------- the honest test of the whole idea

N_TEST = 200


def linear_bank(root: Path, features: dict[str, np.ndarray]) -> Path:
    """A bank whose five embeddings are one random projection of what the pictures show."""
    bank = root / "bank"
    bank.mkdir()
    (bank / "DONE").write_text("{}")
    mixing = np.random.default_rng(0).standard_normal((next(iter(features.values())).shape[1], 64))
    for partition, values in features.items():
        rows = torch.from_numpy((values @ mixing).astype(np.float32))
        ids = torch.tensor([item.id for item in list_stimuli(root / "data", partition)])
        util.save_tensors(
            bank / f"{partition}.safetensors",
            {name: rows.clone() for name in NAMES} | {"stimulus": ids},
            {"clip": {"model": "random projection", "weights": "seed 0"}},
        )
    return bank


@pytest.fixture(scope="module")
def trained_on_simulated_eeg(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """200 unseen concepts, simulated EEG, an encoder trained for a minute: (root, its scores)."""
    root = tmp_path_factory.mktemp("simulated")
    scenes = pictures.write_stimuli(root / "data", 96, 2, N_TEST, 0)
    shown = {
        name: [pictures.render(scene, 96) for scene in items] for name, items in scenes.items()
    }
    features = {name: eeg.features_of(shown[name], scenes[name], 0) for name in scenes}
    eeg.write_subject(
        root / "data", "sub-01", features, {"training": 4, "test": 8}, eeg.DEFAULT_SNR, 0
    )
    bank = linear_bank(root, features)
    common = ["--data_path", root / "data", "--clip_feature_path", bank, "--device", "cpu"]
    run = [
        "--output_dir",
        root / "encoder",
        "--epochs",
        30,
        "--batch_size",
        64,
        "--learning_rate",
        1e-3,
        "--text_contrast",
        0,
        "--save_every",
        30,
        "--val_every",
        30,
    ]
    assert ATMS_retrieval.main([str(word) for word in (*common, *run)]) == 0
    score = [
        "--output_dir",
        root / "scores",
        "--model_path",
        root / "encoder",
        "--permutations",
        400,
    ]
    assert evaluate.main([str(word) for word in (*common, *score)]) == 0
    return root, root / "scores"


def binomial_interval(chance: float) -> float:
    """Half width of the 95 % interval of a score of N_TEST queries at chance."""
    return 1.96 * math.sqrt(chance * (1 - chance) / N_TEST)


def test_unseen_concepts_are_told_apart_from_simulated_eeg(
    trained_on_simulated_eeg: tuple[Path, Path],
) -> None:
    row = scores(trained_on_simulated_eeg[1])["retrieval"][0]
    assert row["n"] == row["gallery"] == N_TEST
    assert row["top5_interval"][0] > 0.025 + 4 * binomial_interval(0.025)
    assert row["top1_interval"][0] > row["top1_shuffled_range"][1]


def test_shuffled_eeg_is_at_chance(trained_on_simulated_eeg: tuple[Path, Path]) -> None:
    row = scores(trained_on_simulated_eeg[1])["retrieval"][0]
    for k in (1, 5):
        chance = k / N_TEST
        assert abs(row[f"top{k}_shuffled"] - chance) < binomial_interval(chance)
        low, high = row[f"top{k}_shuffled_range"]
        assert low <= chance <= high


def test_a_model_given_the_eeg_of_another_order_is_at_chance(
    trained_on_simulated_eeg: tuple[Path, Path],
) -> None:
    """The recording itself dealt to other stimuli: the skill is gone."""
    import pickle

    root, _ = trained_on_simulated_eeg
    file = root / "data" / "Preprocessed_data_250Hz" / "sub-01" / "preprocessed_eeg_test.npy"
    content = pickle.loads(file.read_bytes())
    other = root / "data" / "Preprocessed_data_250Hz" / "sub-77"
    other.mkdir()
    order = np.random.default_rng(1).permutation(N_TEST)
    content["preprocessed_eeg_data"] = content["preprocessed_eeg_data"][order]
    (other / file.name).write_bytes(pickle.dumps(content, protocol=4))
    command = [
        "--data_path",
        root / "data",
        "--clip_feature_path",
        root / "bank",
        "--device",
        "cpu",
        "--output_dir",
        root / "shuffled",
        "--model_path",
        root / "encoder",
        "--subjects",
        "sub-77",
    ]
    assert evaluate.main([str(word) for word in command]) == 0
    row = scores(root / "shuffled")["retrieval"][0]
    assert abs(row["top5"] - 0.025) < 2 * binomial_interval(0.025)
