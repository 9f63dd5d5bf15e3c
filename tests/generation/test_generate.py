"""From EEG to pictures: recipes, resume, shards, row independence, and no leaked caption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Chain
from PIL import Image

import generate
import train
from datafiles.eeg_files import locate_test_eeg
from dataset import open_test
from decoder.decoder import Decoder
from generation import renderer, series
from modalities import NAMES, recipes
from rundirs.files import read_jsonl
from rundirs.tensors import load_tensors
from sdxl import sampler
from unet import Sampling

RECIPES = [recipe.name for recipe in recipes("all")]


@pytest.fixture(scope="module")
def drawn(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures") / "run"
    assert generate.main(chain.generate_flags(out)) == 0
    return out


def pixels(run: Path) -> dict[str, np.ndarray]:
    """Every drawn picture of a run by its path below it."""
    return {
        str(path.relative_to(run)): np.asarray(Image.open(path)).astype(int)
        for path in sorted(run.glob("*/*.png"))
        if not path.name.startswith("sheet")
    }


def assert_same_pictures(a: Path, b: Path, tolerance: int) -> None:
    one, two = pixels(a), pixels(b)
    assert one.keys() == two.keys() and one
    assert max(np.abs(one[name] - two[name]).max() for name in one) <= tolerance


def test_every_recipe_of_every_stimulus_is_on_disk(drawn: Path) -> None:
    folders = sorted(path.name for path in drawn.iterdir() if path.is_dir())
    assert len(folders) == 2
    for folder in folders:
        assert {path.stem for path in (drawn / folder).glob("*.png")} == {*RECIPES, "sheet"}
    assert all(picture.shape == (64, 64, 3) for picture in pixels(drawn).values())
    assert (drawn / "overview.png").exists() and (drawn / "DONE").exists()


def test_the_journal_says_what_each_picture_is(drawn: Path) -> None:
    records = read_jsonl(drawn / "images.jsonl")
    assert sorted((record["row"], record["recipe"]) for record in records) == sorted(
        (row, name) for row in range(2) for name in RECIPES
    )
    assert {record["prompt_source"] for record in records} == {"neutral"}
    fused = next(record for record in records if record["recipe"] == "fused")
    assert fused["active"] == list(NAMES) and (drawn / fused["file"]).exists()


def test_modalities_and_stimuli_make_different_pictures(drawn: Path) -> None:
    for folder in {name.split("/")[0] for name in pixels(drawn)}:
        separate = [pixels(drawn)[f"{folder}/separate_{name}.png"] for name in NAMES]
        for one in range(len(separate)):
            for other in range(one):
                assert np.abs(separate[one] - separate[other]).max() > 2, (NAMES[one], NAMES[other])


def test_equal_recipes_are_drawn_once_and_saved_under_both_names(drawn: Path) -> None:
    pictures = pixels(drawn)
    for folder in {name.split("/")[0] for name in pictures}:
        assert np.array_equal(
            pictures[f"{folder}/fused.png"], pictures[f"{folder}/progressive_5_image.png"]
        )


def test_batch_size_and_shards_do_not_change_a_picture(
    chain: Chain, drawn: Path, tmp_path: Path
) -> None:
    assert generate.main(chain.generate_flags(tmp_path / "ones", "--batch_size", 1)) == 0
    assert_same_pictures(drawn, tmp_path / "ones", 1)
    for shard in ("2/2", "1/2"):
        assert generate.main(chain.generate_flags(tmp_path / "shards", "--shard", shard)) == 0
    assert_same_pictures(drawn, tmp_path / "shards", 1)
    assert {path.name for path in (tmp_path / "shards").glob("DONE*")} == {
        "DONE-1-of-2",
        "DONE-2-of-2",
    }


def refuse_more_than(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Drawing more pictures at once fails as on a GPU that is too small. Returns what was asked."""
    denoise, asked = sampler.denoise, []

    def small(pipe, injector, embeddings, *rest):
        asked.append(len(embeddings))
        if len(embeddings) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return denoise(pipe, injector, embeddings, *rest)

    monkeypatch.setattr(sampler, "denoise", small)
    return asked


def test_batches_are_halved_until_they_fit(
    chain: Chain, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refuse_more_than(monkeypatch, 2)
    monkeypatch.setattr(series, "fitting_batch", lambda *_: 8)  # of too hopeful an estimate
    assert generate.main(chain.generate_flags(tmp_path / "run", "--batch_size", "auto")) == 0
    assert asked[:3] == [8, 4, 2] and set(asked[3:]) <= {1, 2}
    assert_same_pictures(drawn, tmp_path / "run", 1)


def test_a_given_batch_size_that_does_not_fit_is_an_error(
    chain: Chain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse_more_than(monkeypatch, 2)
    assert generate.main(chain.generate_flags(tmp_path / "run", "--batch_size", 3)) == 2
    assert "--batch_size auto" in capsys.readouterr().err


def test_a_lost_picture_is_drawn_again_and_nothing_else(
    chain: Chain, drawn: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn, run)
    lost = sorted(run.glob("*/separate_text.png"))[0]
    lost.unlink()
    (run / "DONE").unlink()
    before = {
        path: path.stat().st_mtime_ns
        for path in run.glob("*/*.png")
        if not path.name.startswith("sheet")
    }
    assert generate.main(chain.generate_flags(run)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same_pictures(drawn, run, 1)


def test_a_finished_run_loads_no_model(
    chain: Chain, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("SDXL was loaded for nothing")

    monkeypatch.setattr(renderer, "load_sdxl", forbidden)
    assert generate.main(chain.generate_flags(drawn)) == 0


def spy_on_prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects all that reaches SDXL's text encoders, which still do their work."""
    seen: list[str] = []
    encode = sampler.encode_prompt

    def noted(pipe: object, prompt: list[str], negative: list[str]) -> sampler.PromptEmbeds:
        seen.extend([*prompt, *negative])
        return encode(pipe, prompt, negative)

    monkeypatch.setattr(sampler, "encode_prompt", noted)
    return seen


def caption_words(chain: Chain) -> set[str]:
    captions = json.loads((chain.data / "captions.json").read_text())
    tests = [text for key, text in captions.items() if key.startswith("test_images/")]
    assert tests
    return {word for text in tests for word in text.split() if len(word) > 3}


def test_no_caption_reaches_sdxl(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spy_on_prompts(monkeypatch)
    flags = ("--mode", "fused", "--captions", chain.data / "captions.json")
    assert generate.main(chain.generate_flags(tmp_path / "run", *flags)) == 0
    assert seen and caption_words(chain).isdisjoint(" ".join(seen).split())


def test_the_oracle_is_marked_in_every_output(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, run = spy_on_prompts(monkeypatch), tmp_path / "run"
    flags = (
        "--mode",
        "fused",
        "--captions",
        chain.data / "captions.json",
        "--prompt_source",
        "oracle",
    )
    assert generate.main(chain.generate_flags(run, *flags)) == 0
    assert not caption_words(chain).isdisjoint(" ".join(seen).split())
    assert {record["prompt_source"] for record in read_jsonl(run / "images.jsonl")} == {"oracle"}
    for path in run.glob("*/*.png"):
        assert "oracle" in path.name
    assert all(
        "oracle" in Image.open(path).text["Comment"] for path in run.glob("*/fused_oracle.png")
    )


def predicted(
    chain: Chain, change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    decoder = Decoder.load(chain.model, "best")
    file, subject, data = locate_test_eeg(
        chain.data / "Preprocessed_data_250Hz" / "sub-01", None, None
    )
    test = open_test(file, subject, data, None, decoder.reading(subject))
    changed = type(test)(
        change(test.eeg.clone()), test.subject, test.stimuli, test.hash, test.source
    )
    return decoder.predict(changed, range(len(test.eeg)), Sampling(3, 2.0, "dpm"), 0)


def test_another_row_of_eeg_changes_that_row_of_embeddings_only(chain: Chain) -> None:
    def third_is_first(eeg: torch.Tensor) -> torch.Tensor:
        eeg[2] = eeg[0]
        return eeg

    plain, changed = predicted(chain, lambda eeg: eeg), predicted(chain, third_is_first)
    for name in NAMES:
        moved = (plain[name] - changed[name]).abs().amax(1)
        assert moved[2] > 1e-4, name
        assert max(moved[:2].max(), moved[3:].max()) < 1e-5, name


def test_the_embeddings_are_kept_with_their_stimuli(drawn: Path) -> None:
    tensors, header = load_tensors(drawn / "embeddings.safetensors")
    ids = [
        record["stimulus"]
        for record in read_jsonl(drawn / "images.jsonl")
        if record["recipe"] == "fused"
    ]
    assert tensors["stimulus"].tolist() == ids and header["normalised"] is False
    assert {name: tuple(tensors[name].shape) for name in NAMES} == dict.fromkeys(NAMES, (2, 64))


def test_eeg_without_pictures_is_drawn_all_the_same(chain: Chain, tmp_path: Path) -> None:
    eeg = tmp_path / "own" / "preprocessed_eeg_test.npy"
    eeg.parent.mkdir()
    shutil.copy(chain.data / "Preprocessed_data_250Hz" / "sub-01" / eeg.name, eeg)
    flags = chain.generate_flags(tmp_path / "run", "--mode", "fused", "--max_stimuli", 1)
    assert generate.main([*flags, "--eeg_data", str(eeg)]) == 0
    assert [path.name for path in (tmp_path / "run").glob("*/fused.png")] == ["fused.png"]


def test_an_encoder_without_priors_is_refused(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ATMS_retrieval

    assert ATMS_retrieval.main(chain.train_flags(tmp_path / "encoder", "--epochs", 1)) == 0
    flags = [*chain.generate_flags(tmp_path / "run"), "--model_path", str(tmp_path / "encoder")]
    assert generate.main(flags) == 2
    assert "--init_from" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value", "code", "told"),
    [
        ("--model_path", "nowhere", 1, "model.safetensors"),
        ("--sd_model_path", "nowhere.safetensors", 1, "nowhere.safetensors"),
        ("--ip_adapter_path", "nowhere.safetensors", 1, "nowhere.safetensors"),
        ("--eeg_data", "nowhere.npy", 2, "nowhere.npy"),
        ("--injection", "intend", 2, "intent"),
        ("--mode", "fuesd", 2, ""),
        ("--size", "100", 2, ""),
        ("--shard", "3/2", 2, ""),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    chain: Chain,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
    code: int,
    told: str,
) -> None:
    assert generate.main([*chain.generate_flags(tmp_path / "run"), flag, value]) == code
    message = capsys.readouterr().err
    assert told in message and message
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(chain: Chain, tmp_path: Path) -> None:
    assert generate.main(chain.generate_flags(tmp_path / "run", "--dry_run")) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_users_own_command_finds_what_train_saved(chain: Chain, tmp_path: Path) -> None:
    """train.py's output goes into generate.py without any step between (it once did not)."""
    run = tmp_path / "model"
    assert train.main(chain.train_flags(run, "--epochs", 1)) == 0
    flags = [
        *chain.generate_flags(tmp_path / "images", "--mode", "separate"),
        "--model_path",
        str(run),
    ]
    assert generate.main(flags) == 0
    assert len(list((tmp_path / "images").glob("*/separate_*.png"))) == 10
