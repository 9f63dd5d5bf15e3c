"""Sweeps over the injection, and denoising that starts from a coarse picture read from EEG."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Chain
from PIL import Image

import generate
import train
import util
from datafiles.stimuli import list_stimuli
from dataset import open_test
from decoder import low_level
from decoder.decoder import Decoder
from generation import variants
from generation.sheets import THUMBNAIL_PX
from modalities import NAMES, SITES
from rundirs.files import read_jsonl
from sdxl import injection_map

LAYERS = injection_map.sdxl_layers()


def families(sweep: str | None, mode: str = "fused") -> list[variants.Family]:
    return variants.families(mode, sweep, injection_map.load_injection("intent"), LAYERS, 1.0)


def drawn_variants(sweep: str) -> list[variants.Variant]:
    return [variant for family in families(sweep) for variant in family.variants]


# --- sweeps -------------------------------------------------------------------------------------


def test_a_sweep_of_sites_puts_each_modality_at_each_site_alone():
    found = drawn_variants("sites")
    assert len({variant.name for variant in found}) == len(found) == len(NAMES) * len(SITES)
    for variant in found:
        (name,) = variant.active
        site = variant.name.removeprefix(f"sweep_{name}_at_")
        expected = torch.zeros(len(NAMES), len(LAYERS))
        expected[NAMES.index(name)] = torch.tensor([layer.site == site for layer in LAYERS]).float()
        torch.testing.assert_close(variant.scales, expected)


def test_a_sweep_of_modalities_has_each_alone_and_each_left_out():
    found = {variant.name: variant for variant in drawn_variants("modality")}
    assert len(found) == 1 + 2 * len(NAMES)
    for name in NAMES:
        only, without = found[f"sweep_only_{name}"], found[f"sweep_without_{name}"]
        row = NAMES.index(name)
        assert only.scales[row].any() and not np.delete(only.scales.numpy(), row, 0).any()
        assert not without.scales[row].any()
        assert np.delete(without.scales.numpy(), row, 0).any(axis=1).all()


def test_a_sweep_of_scale_grows():
    totals = [float(variant.scales.sum(0).max()) for variant in drawn_variants("scale")]
    assert totals == pytest.approx(list(variants.STRENGTHS))


def test_equal_variants_are_drawn_once():
    drawn = variants.distinct([v for family in families(None, "all") for v in family.variants])
    names = sorted(len(names) for names, _ in drawn)
    assert len(drawn) == 9 and names == [1] * 7 + [2, 2]  # step 1 = only few, step 5 = fused


@pytest.mark.parametrize(("sweep", "pictures"), [("sites", 25), ("scale", 6)])
def test_a_sweep_makes_one_labelled_sheet(chain: Chain, tmp_path: Path, sweep, pictures) -> None:
    more = (
        "--mode",
        "fused",
        "--sweep",
        sweep,
        "--max_stimuli",
        1,
        "--batch_size",
        "auto",
        "--steps",
        1,
    )
    assert generate.main(chain.generate_flags(tmp_path / "run", *more)) == 0
    records = read_jsonl(tmp_path / "run" / "images.jsonl")
    assert len({record["recipe"] for record in records}) == len(records) == pictures
    assert len(list(tmp_path.glob("run/*/sweep_*.png"))) == pictures
    sheet = Image.open(tmp_path / "run" / "overview.png")
    cell = THUMBNAIL_PX
    rows, columns = (5, 6) if sweep == "sites" else (1, 4 + 6)
    assert sheet.height > rows * cell and sheet.width > columns * cell
    assert not list(tmp_path.glob("run/*/sheet*.png")), "the overview has it all"


def test_more_shards_than_stimuli_leave_some_with_nothing_to_do(chain: Chain, tmp_path) -> None:
    more = ("--max_stimuli", 1, "--mode", "fused", "--shard", "2/2")
    assert generate.main(chain.generate_flags(tmp_path / "run", *more)) == 0
    assert (tmp_path / "run" / "DONE-2-of-2").exists()


# --- the low-level head -------------------------------------------------------------------------


def test_ridge_finds_a_linear_map_and_nothing_in_shuffled_rows():
    draw = util.generator_for(0, "ridge")
    features = torch.randn(300, 40, generator=draw)
    truth = torch.randn(40, 12, generator=draw)
    targets = features @ truth + 0.5 * torch.randn(300, 12, generator=draw) + 3
    train_rows, val_rows = torch.arange(240), torch.arange(240, 300)
    found = low_level.fit_ridge(features, targets, train_rows, val_rows)
    assert found["skill"] > 0.95
    shuffled = features[torch.randperm(300, generator=draw)]
    assert low_level.fit_ridge(shuffled, targets, train_rows, val_rows)["skill"] < 0.02
    none = low_level.fit_ridge(features, targets, train_rows, torch.empty(0, dtype=torch.int64))
    assert float(none["ridge"]) == low_level.RIDGES[-1], "without held-out rows: the most cautious"


def test_ridge_never_reads_the_held_out_rows_to_fit():
    draw = util.generator_for(1, "ridge")
    features, targets = torch.randn(60, 5, generator=draw), torch.randn(60, 3, generator=draw)
    rows = torch.arange(50), torch.arange(50, 60)
    before = low_level.fit_ridge(features, targets, *rows)
    changed = targets.clone()
    changed[50:] = changed[50:].flip(0) * 1.01
    after = low_level.fit_ridge(features, changed, *rows)
    if before["ridge"] == after["ridge"]:
        torch.testing.assert_close(before["weight"], after["weight"])
    torch.testing.assert_close(before["mean"], after["mean"])
    torch.testing.assert_close(before["offset"], after["offset"])


def test_a_coarse_picture_keeps_layout_and_colour(tmp_path: Path) -> None:
    pixels = np.zeros((96, 96, 3), np.uint8)
    pixels[:, :48, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    coarse = low_level.coarse_picture(tmp_path / "half.png")
    assert coarse.shape == (3, low_level.GRID, low_level.GRID)
    assert (coarse[0, :, :7] > 0.99).all() and not coarse[0, :, 9:].any() and not coarse[1:].any()
    large = low_level.enlarged(coarse[None], 64)
    assert large.shape == (1, 3, 64, 64) and large[0, 0, 32, 5] > 0.9 > 0.1 > large[0, 0, 32, 60]


def test_window_means_are_means_of_windows():
    eeg = torch.arange(2 * 3 * 25.0).view(2, 3, 25)
    found = low_level.window_means(eeg, [k / 100 for k in range(25)])
    assert found.shape == (2, 3 * 5)
    torch.testing.assert_close(found[1, 5 * 2 + 4], eeg[1, 2, 20:].mean())


@pytest.fixture(scope="module")
def with_head(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model, to which --low_level adds its head without training again."""
    run = tmp_path_factory.mktemp("low_level") / "model"
    shutil.copytree(chain.model, run)
    model = run / "checkpoints" / "best" / "model.safetensors"
    before = model.read_bytes()
    assert train.main(chain.train_flags(run, "--low_level")) == 0
    assert model.read_bytes() == before
    return run


def test_the_head_belongs_to_each_subject(chain: Chain, with_head: Path) -> None:
    head = low_level.load_head(with_head)
    assert head.subjects == ("sub-01", "sub-02")
    decoder = Decoder.load(with_head, "best")
    file = chain.data / "Preprocessed_data_250Hz" / "sub-01" / "preprocessed_eeg_test.npy"
    test = open_test(file, "sub-01", chain.data, None, decoder.reading("sub-01"))
    features = low_level.test_features(decoder, test, range(3))
    predicted = head.predict(features, "sub-01")
    assert predicted.shape == (3, 3, low_level.GRID, low_level.GRID)
    assert predicted.min() >= 0 and predicted.max() <= 1
    assert (predicted - head.predict(features, "sub-02")).abs().max() > 1e-4
    with pytest.raises(util.UserError, match="no low-level head for sub-09"):
        head.predict(features, "sub-09")


def start_flags(chain: Chain, model: Path, out: Path, *more: object) -> list[str]:
    flags = ("--model_path", model, "--mode", "fused", "--init", "superpixel", *more)
    return chain.generate_flags(out, *flags)


def test_pictures_start_from_the_predicted_coarse_one(
    chain: Chain, with_head: Path, tmp_path: Path
) -> None:
    pictures = {}
    for strength in (0.5, 1.0):
        out = tmp_path / f"{strength}"
        assert generate.main(start_flags(chain, with_head, out, "--init_strength", strength)) == 0
        assert len(list(out.glob("*/start.png"))) == 2
        pictures[strength] = [
            np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*/fused.png"))
        ]
    none = tmp_path / "none"
    assert (
        generate.main(chain.generate_flags(none, "--model_path", with_head, "--mode", "fused")) == 0
    )
    for path, started, forgotten in zip(
        sorted(none.glob("*/fused.png")), pictures[0.5], pictures[1.0], strict=True
    ):
        plain = np.asarray(Image.open(path)).astype(int)
        assert np.abs(plain - started).mean() > 1
        assert np.abs(plain - forgotten).max() <= 1


def test_controls_of_the_start_know_no_eeg_or_everything(
    chain: Chain, with_head: Path, tmp_path: Path
) -> None:
    head, stimuli = low_level.load_head(with_head), list_stimuli(chain.data, "test")
    more = ("--clip_feature_path", chain.features, "--control")
    for control, expected in (
        ("true_embedding", low_level.coarse_pictures(stimuli[:2])),
        ("mean_embedding", head.mean_picture().expand(2, -1, -1, -1)),
    ):
        out = tmp_path / control
        assert generate.main(start_flags(chain, with_head, out, *more, control)) == 0
        for path, coarse in zip(sorted(out.glob(f"*/start_{control}.png")), expected, strict=True):
            shown = np.asarray(Image.open(path)) / 255
            wanted = low_level.enlarged(coarse[None], 64)[0].permute(1, 2, 0).numpy()
            assert np.abs(shown - wanted).max() <= 1 / 255


def test_a_model_without_a_head_is_told_how_to_get_one(chain: Chain, tmp_path, capsys) -> None:
    assert generate.main(start_flags(chain, chain.model, tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert "--low_level" in message and not (tmp_path / "run").exists()
