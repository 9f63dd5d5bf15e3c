"""``--draws N --choose eeg``: the noise is chosen by the prediction, never by the stimulus."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import builders
import numpy as np
import pytest
import torch
from conftest import Chain
from PIL import Image

import evaluate
import generate
import report
from datafiles.feature_bank import open_bank
from decoder.decoder import Decoder
from features.clip import load_clip
from rundirs.files import read_json, read_jsonl
from rundirs.tensors import load_tensors

DRAWS = 3


def clip_flags(chain: Chain) -> tuple[str, ...]:
    return (
        "--clip_model", str(chain.models / "miniature-clip.json"),
        "--clip_pretrained", str(chain.models / "miniature-clip.safetensors"),
    )  # fmt: skip


def draw(chain: Chain, out: Path, choose: str, *more: object) -> int:
    own = clip_flags(chain) if choose == "eeg" else ()
    flags = ("--mode", "fused", "--draws", DRAWS, "--choose", choose, *own, *more)
    return generate.main(chain.generate_flags(out, *flags))


@pytest.fixture(scope="module")
def chosen(chain: Chain, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("chosen") / "run"
    assert draw(chain, run, "eeg") == 0
    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_all_draws_are_kept_and_differ_the_first_is_that_of_a_single_one(
    chain: Chain, chosen: Path, tmp_path: Path
) -> None:
    assert generate.main(chain.generate_flags(tmp_path / "one", "--mode", "fused")) == 0
    records = read_jsonl(chosen / "images.jsonl")
    assert len(records) == 2
    for record in records:
        every = [pixels(chosen / file) for file in record["draw_files"]]
        assert len(every) == DRAWS
        assert all(np.abs(a - b).max() > 20 for a, b in pairwise(every))
        single = pixels(tmp_path / "one" / record["folder"] / "fused.png")
        assert np.abs(every[0] - single).max() <= 2
        assert np.array_equal(pixels(chosen / record["file"]), every[record["draw"]])


def test_the_kept_one_agrees_best_with_the_prediction(chain: Chain, chosen: Path) -> None:
    """As an independent reading of the saved pictures finds."""
    _, model, _, weights = clip_flags(chain)
    clip, decoder = (
        load_clip(model, weights, torch.device("cpu")),
        Decoder.load(chain.model, "best"),
    )
    predicted, _ = load_tensors(chosen / "embeddings.safetensors")
    wanted = decoder.bank.standardise("image", predicted["image"])
    for record in read_jsonl(chosen / "images.jsonl"):
        place = predicted["stimulus"].tolist().index(record["stimulus"])
        crops = [clip.transform(Image.open(chosen / file)) for file in record["draw_files"]]
        with torch.no_grad():
            own = clip.model.encode_image(torch.stack(crops), normalize=False)
        own = decoder.bank.standardise("image", own)
        found = torch.cosine_similarity(own, wanted[place][None])
        assert torch.allclose(found, torch.tensor(record["agreements"]), atol=1e-4)
        assert record["draw"] == int(found.argmax())


def test_the_stimulus_is_not_looked_at(chain: Chain, chosen: Path, tmp_path: Path) -> None:
    """Other pictures in test_images/, of the same names: the same are kept."""
    data = tmp_path / "data"
    shutil.copytree(chain.data, data)
    for number, path in enumerate(sorted((data / "test_images").rglob("*.png"))):
        builders.write_picture(path, number * 7)
    subject = data / "Preprocessed_data_250Hz" / "sub-01"
    assert draw(chain, tmp_path / "run", "eeg", "--eeg_data", subject) == 0
    one, other = (read_jsonl(run / "images.jsonl") for run in (chosen, tmp_path / "run"))
    assert [record["draw"] for record in one] == [record["draw"] for record in other]


def test_at_random_is_by_seed_and_stimulus(chain: Chain, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert draw(chain, tmp_path / name, "random", "--max_stimuli", 6) == 0
    one, other = (read_jsonl(tmp_path / name / "images.jsonl") for name in "ab")
    kept = [record["draw"] for record in one]
    assert kept == [record["draw"] for record in other] and len(set(kept)) > 1
    assert all(record["agreements"] == [] for record in one)


def test_a_resumed_run_draws_what_lacks(chain: Chain, chosen: Path, tmp_path: Path) -> None:
    assert draw(chain, tmp_path / "run", "eeg") == 0
    record = read_jsonl(tmp_path / "run" / "images.jsonl")[0]
    (tmp_path / "run" / record["file"]).unlink()
    (tmp_path / "run" / "DONE").unlink()
    assert draw(chain, tmp_path / "run", "eeg") == 0
    again, before = pixels(tmp_path / "run" / record["file"]), pixels(chosen / record["file"])
    assert np.abs(again - before).max() <= 2


def test_it_has_its_own_column_and_its_place_in_the_report(
    chain: Chain, chosen: Path, tmp_path: Path
) -> None:
    assert draw(chain, tmp_path / "lot", "random") == 0
    call = chain.evaluate_flags(tmp_path / "scores", "--images", chosen)
    call += ["--control_images", str(tmp_path / "lot")]
    call = [flag for flag in call if flag not in ("--clip_feature_path", str(chain.features))]
    call = [flag for flag in call if flag not in ("--prior_steps", "3")]
    assert evaluate.main(call) == 0
    rows = read_json(tmp_path / "scores" / "results.json")["pictures"]
    assert {row["choice"] for row in rows} == {f"best of {DRAWS} by the EEG",
                                               f"one of {DRAWS} at random"}  # fmt: skip
    table = (tmp_path / "scores" / "table.md").read_text(encoding="utf-8")
    assert "| drawn |" in table and f"best of {DRAWS} by the EEG" in table
    page = tmp_path / "report.html"
    assert report.main(["--runs", str(chosen), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert f"of {DRAWS} noises each the one" in text and "All draws of" in text


def test_another_clip_is_refused(chain: Chain, tmp_path: Path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    _, _, _, weights = clip_flags(chain)
    state = load_file(weights)
    name = next(key for key, value in state.items() if value.ndim == 2)
    save_file(state | {name: state[name] + 1}, tmp_path / "other.safetensors")
    more = ("--clip_pretrained", tmp_path / "other.safetensors")
    assert draw(chain, tmp_path / "run", "eeg", *more) == 1
    assert "which the model was trained on" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*/fused.png"))
    assert open_bank(chain.features, "test").clip == Decoder.load(chain.model, "best").clip
