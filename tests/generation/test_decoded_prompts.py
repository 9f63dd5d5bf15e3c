"""``--prompt_source decoded``: captions of training pictures, by what was read from the EEG."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Chain
from PIL import Image

import generate
from datafiles.feature_bank import open_bank
from decoder.decoder import Decoder
from generation.prompts import decoded_prompts, training_captions
from rundirs.files import read_json, read_jsonl, write_json
from rundirs.tensors import load_tensors
from sdxl import sampler


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that SDXL's encoders get."""
    texts: list[str] = []
    encode = sampler.encode_prompt

    def spy(pipe, prompts, negative):
        texts.extend(prompts)
        return encode(pipe, prompts, negative)

    monkeypatch.setattr("generation.renderer.sampler.encode_prompt", spy)
    return texts


def decoded(chain: Chain, out: Path, *more: object) -> int:
    flags = ("--mode", "fused", "--prompt_source", "decoded")
    features = ("--clip_feature_path", chain.features)
    return generate.main(chain.generate_flags(out, *flags, *features, *more))


def texts_of(chain: Chain, partition: str) -> set[str]:
    return {row["text"] for row in read_json(chain.features / f"{partition}.json")["rows"]}


def test_a_prompt_is_a_training_caption_and_never_the_stimulus_own(
    chain: Chain, tmp_path: Path, seen: list[str]
) -> None:
    assert decoded(chain, tmp_path / "run") == 0
    told = read_json(tmp_path / "run" / "prompts.json")
    assert told and set(told.values()) <= texts_of(chain, "training")
    assert not set(told.values()) & texts_of(chain, "test")
    assert set(told.values()) <= set(seen)
    assert not set(seen) & texts_of(chain, "test")


def test_it_is_the_one_nearest_to_the_predicted_text(chain: Chain, tmp_path: Path) -> None:
    assert decoded(chain, tmp_path / "run") == 0
    embeddings, _ = load_tensors(tmp_path / "run" / "embeddings.safetensors")
    decoder, bank = Decoder.load(chain.model, "best"), open_bank(chain.features, "training")
    rows = read_json(chain.features / "training.json")["rows"]
    of = {row["stimulus"]: row["text"] for row in rows}
    query = decoder.bank.standardise("text", embeddings["text"])
    gallery = decoder.bank.standardise("text", bank.features["text"])
    nearest = torch.cosine_similarity(query[:, None], gallery, dim=2).argmax(dim=1)
    expected = [of[bank.ids[place]] for place in nearest.tolist()]
    assert list(read_json(tmp_path / "run" / "prompts.json").values()) == expected


def test_the_true_embedding_of_a_training_text_is_its_own_caption(chain: Chain) -> None:
    decoder = Decoder.load(chain.model, "best")
    captions, embeddings = training_captions(decoder, chain.features)
    assert len(captions) == len(set(captions)) > 3
    assert decoded_prompts(decoder, embeddings, captions, embeddings, 1) == captions
    (three,) = decoded_prompts(decoder, embeddings[:1], captions, embeddings, 3)
    assert three.startswith(captions[0] + ", ") and three.count("This picture is") == 1
    assert three.count(", ") == 2


def test_it_is_marked_in_every_output(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert decoded(chain, run) == 0
    assert {record["prompt_source"] for record in read_jsonl(run / "images.jsonl")} == {"decoded"}
    pictures = list(run.glob("*/fused_decoded.png"))
    assert pictures and not list(run.glob("*/fused.png"))
    assert all("decoded prompt" in Image.open(path).text["Comment"] for path in pictures)


def test_another_prediction_other_words(chain: Chain, tmp_path: Path) -> None:
    """What is predicted decides: from the stimuli's own embeddings, which a ceiling run reads."""
    assert decoded(chain, tmp_path / "run", "--control", "true_embedding") == 0
    decoder, bank = Decoder.load(chain.model, "best"), open_bank(chain.features, "test")
    known = training_captions(decoder, chain.features)
    expected = decoded_prompts(decoder, bank.features["text"], *known, 1)
    told = list(read_json(tmp_path / "run" / "prompts.json").values())
    assert told == expected[: len(told)] and len(set(expected)) > 1


def test_a_shard_has_the_prompts_of_its_own_rows(chain: Chain, tmp_path: Path) -> None:
    assert decoded(chain, tmp_path / "whole") == 0
    for shard in ("1/2", "2/2"):
        assert decoded(chain, tmp_path / "parts", "--shard", shard) == 0
    parts = {}
    for path in (tmp_path / "parts").glob("prompts*.json"):
        parts |= read_json(path)
    assert parts == read_json(tmp_path / "whole" / "prompts.json")
    for path in (tmp_path / "whole").glob("*/fused_decoded.png"):
        twin = tmp_path / "parts" / path.relative_to(tmp_path / "whole")
        one, other = (np.asarray(Image.open(file)).astype(int) for file in (path, twin))
        assert np.abs(one - other).max() <= 2


def test_what_it_needs_is_asked_for_first(chain: Chain, tmp_path: Path, capsys) -> None:
    features = tmp_path / "features"
    shutil.copytree(chain.features, features)
    noted = read_json(features / "training.json")
    write_json(features / "training.json", {**noted, "rows": noted["rows"][1:]})
    assert decoded(chain, tmp_path / "run", "--clip_feature_path", features) == 1
    assert "no caption of 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_bank_is_another_run(chain: Chain, tmp_path: Path) -> None:
    features = tmp_path / "features"
    shutil.copytree(chain.features, features)
    assert decoded(chain, tmp_path / "run", "--clip_feature_path", features) == 0
    noted = read_json(features / "training.json")
    for row in noted["rows"]:
        row["text"] += " indeed"
    write_json(features / "training.json", noted)
    assert decoded(chain, tmp_path / "run", "--clip_feature_path", features) != 0
