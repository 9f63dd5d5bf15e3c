"""Scores with controls: what is perfect scores perfectly, what is shuffled scores at chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from conftest import Chain
from PIL import Image

import ATMS_retrieval
import evaluate
from datafiles import electrodes
from datafiles.eeg_files import eeg_file
from datafiles.feature_bank import open_bank
from datafiles.stimuli import list_stimuli
from dataset import open_test
from decoder.controls import Prediction
from decoder.decoder import Decoder
from evaluation import occlusion
from evaluation.retrieval import Query, retrieval_row, subject_queries
from miniworld import eeg, pictures
from miniworld.brain_features import SOURCES, brain_features
from modalities import MODALITIES, NAMES
from rundirs.files import append_jsonl, read_csv
from rundirs.tensors import save_tensors
from util import DataError


def run_of_pictures(folder: Path, chain: Chain, shift: int = 0, source: str = "neutral") -> Path:
    """A run whose pictures are the stimuli themselves, dealt ``shift`` places on."""
    stimuli = list_stimuli(chain.data, "test")
    for row, item in enumerate(stimuli):
        shown = stimuli[(row + shift) % len(stimuli)]
        file = f"{item.folder}/fused.png"
        (folder / item.folder).mkdir(parents=True)
        Image.open(shown.path).save(folder / file)
        append_jsonl(
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
    for name in ("pixcorr", "ssim", "lite0"):
        assert right["scores"][name]["value"] == pytest.approx(1)
    assert right["scores"]["lite0_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert right["scores"]["fid_lite0"]["value"] == pytest.approx(0, abs=1e-6)
    assert right["n"] == 6 and right["scores"]["pixcorr"]["other_stimulus"] < 0.9
    for name in ("pixcorr", "ssim", "lite0"):
        assert swapped["scores"][name]["value"] < 0.9
    assert swapped["scores"]["lite0_distance"]["value"] > 0.1


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
    assert row["scores"]["pixcorr"]["nan"] == 1 and math.isnan(row["scores"]["pixcorr"]["value"])
    assert row["scores"]["ssim"]["nan"] == 0 and row["scores"]["ssim"]["value"] < 1


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
        for query in ("encoder -> image", *(f"prior {name}" for name in NAMES), "fused priors")
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
    other = builders.copied_bank(
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
    append_jsonl(
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
        save_tensors(
            bank / f"{partition}.safetensors",
            {name: rows.clone() for name in NAMES} | {"stimulus": ids},
            {"clip": {"model": "random projection", "weights": "seed 0"}},
        )
    return bank


@pytest.fixture(scope="module")
def trained_on_simulated_eeg(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """200 unseen concepts, simulated EEG, an encoder trained for a minute: (root, its scores)."""
    root = tmp_path_factory.mktemp("simulated")
    scenes = pictures.write_stimuli(root / "data", pictures.plan_scenes(96, 2, N_TEST, 0), 0)
    shown = {
        name: [pictures.render(scene, 96) for scene in items] for name, items in scenes.items()
    }
    features = {name: brain_features(shown[name], scenes[name], 0) for name in scenes}
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
        "--channels",  # half of them, for time: every second one, front to back
        *eeg.CHANNELS[::2],
        "--time_window",  # the simulated brain is silent after it
        0,
        0.6,
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


# ---------------------------------------------------------------- what the encoder reads


def test_occlusion_finds_the_simulated_sources(
    trained_on_simulated_eeg: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest drops lie in the channels and at the latencies that the simulator uses."""
    root, _ = trained_on_simulated_eeg
    command = ["--data_path", root / "data", "--clip_feature_path", root / "bank",
               "--model_path", root / "encoder", "--output_dir", tmp_path / "scores",
               "--subjects", "sub-01", "--permutations", 5,
               "--occlusion", "channels", "time"]  # fmt: skip
    assert evaluate.main([str(word) for word in command]) == 0
    rows = scores(tmp_path / "scores")["occlusion"]["rows"]
    read = len(eeg.CHANNELS[::2])
    assert len([row for row in rows if row["kind"] == "channel"]) == read == 32
    assert len([row for row in rows if row["kind"] == "window"]) == 12
    homes = {electrodes.region(name) for source in SOURCES for name in source.channels}
    largest = occlusion.largest(rows, "region")
    (front,) = [row for row in rows if (row["kind"], row["name"]) == ("region", "frontal")]
    assert homes == {"occipital", "parietal", "temporal"} and largest["name"] in homes
    assert front["drops"]["mrr"]["interval"][1] < largest["drops"]["mrr"]["interval"][0]
    assert electrodes.region(occlusion.largest(rows, "channel")["name"]) in homes
    window = occlusion.largest(rows, "window")
    latencies = [source.latency_s for source in SOURCES]
    assert min(latencies) - 0.05 <= window["start_s"] < window["end_s"] <= max(latencies) + 0.05
    assert window["drops"]["mrr"]["interval"][0] > 0
    late = [row for row in rows if row["kind"] == "window" and row["start_s"] >= 0.45]
    assert len(late) == 3
    for row in late:  # the simulated brain has fallen silent
        assert abs(row["drops"]["top5"]["value"]) < 0.05 < window["drops"]["top5"]["value"]
    assert "without" in capsys.readouterr().out


def test_occlusion_takes_away_what_tells_stimuli_apart_and_nothing_else() -> None:
    read = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    part = occlusion.Occluded("window", "x", (0, 2), 2, 5)
    found = occlusion.without(read, part)
    there = torch.zeros(3, 8, dtype=torch.bool)
    there[[0, 2], 2:5] = True
    torch.testing.assert_close(found[:, ~there], read[:, ~there], rtol=0, atol=0)
    assert found[:, there].std(0).max() < 1e-6
    torch.testing.assert_close(found.mean(0), read.mean(0))


def test_windows_cover_every_sample_once() -> None:
    times = [k / 250 for k in range(137)]
    parts = occlusion.window_parts(["O1", "O2"], times)
    covered = [sample for part in parts for sample in range(part.start, part.stop)]
    assert covered == list(range(137)) and parts[1].name == "0.050-0.100 s"
    assert [times[part.start] for part in parts[:3]] == [0, 0.052, 0.1]


# ---------------------------------------------------------------- both directions, fused, ranks


def test_ranks_are_written_for_every_concept_and_agree_with_the_table(
    chain: Chain, tmp_path: Path
) -> None:
    command = [*chain.evaluate_flags(tmp_path / "scores"), "--model_path", str(chain.model)]
    assert evaluate.main(command) == 0
    lines = read_csv(tmp_path / "scores" / "ranks.csv")
    concepts = {item.concept for item in list_stimuli(chain.data, "test")}
    for row in scores(tmp_path / "scores")["retrieval"]:
        own = [line for line in lines
               if (line["query"], line["subject"]) == (row["query"], row["subject"])]  # fmt: skip
        assert {line["concept"] for line in own} == concepts
        rank = np.array([float(line["rank"]) for line in own])
        assert (rank == 1).mean() == pytest.approx(row["top1"])
        assert (1 / rank).mean() == pytest.approx(row["mrr"])
        for line in own:
            assert (line["chosen"] == line["picture"]) == (float(line["rank"]) == 1)


def test_backward_retrieval_is_the_other_direction() -> None:
    """Three queries want picture 0: forwards one is right, backwards picture 0 finds its own."""
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1], [0.7, 0.1, 0.3]])
    row = retrieval_row(Query("q", "s", similarity), 0, 20)
    assert row["top1"] == pytest.approx(1 / 3)
    assert row["back_top1"] == pytest.approx(1)


def test_fused_retrieval_joins_the_five(chain: Chain) -> None:
    decoder = Decoder.load(chain.model, "best")
    bank = open_bank(chain.features, "test")
    test = open_test(
        eeg_file(chain.data, "sub-01", "test"), "sub-01", chain.data, None,
        decoder.reading("sub-01"),
    )  # fmt: skip
    found = subject_queries(decoder, test, bank, Prediction(3, 2.0, "dpm", seed=0))
    of = {query.name: query.similarity for query in found}
    expected = sum(item.gain * of[f"prior {item.name}"] for item in MODALITIES)
    torch.testing.assert_close(of["fused priors"], expected)
    for item in MODALITIES:  # each of the five moves it
        left_out = expected - item.gain * of[f"prior {item.name}"]
        assert (left_out - of["fused priors"]).abs().max() > 0.01


@pytest.mark.parametrize("damaged", ["encoder", "bank"])
def test_a_model_that_predicts_nothing_is_refused(chain: Chain, damaged: str) -> None:
    decoder = Decoder.load(chain.model, "best")
    with torch.no_grad():
        for parameter in getattr(decoder, damaged).parameters():
            parameter.fill_(torch.nan)
    bank = open_bank(chain.features, "test")
    test = open_test(
        eeg_file(chain.data, "sub-01", "test"), "sub-01", chain.data, None,
        decoder.reading("sub-01"),
    )  # fmt: skip
    with pytest.raises(DataError, match="NaN or infinity for"):
        subject_queries(decoder, test, bank, Prediction(3, 2.0, "dpm", seed=0))
