"""Pictures are joined with their stimuli by name, samples are averaged, runs are compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from evaluation import comparison, networks
from evaluation.pairing import pair_folder, stimuli_below
from rundirs.files import append_jsonl, read_csv
from rundirs.journal import labels_of
from util import DataError

NAMES = ("aircraft_carrier", "bear", "canoe", "drum", "egg", "fan")


def photo(seed: int) -> np.ndarray:
    """A smooth random picture, uint8 [64, 64, 3]."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC))


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def truth(tmp_path) -> Path:
    """Six stimuli as THINGS lays them out."""
    for row, name in enumerate(NAMES):
        write(tmp_path / "test_images" / f"{row + 1:05d}_{name}" / f"{name}_07s.png", photo(row))
    return tmp_path / "test_images"


def scored(tmp_path: Path, images: Path, truth: Path, *more: object, name: str = "out") -> dict:
    out = tmp_path / name
    flags = ["--images", images, "--truth", truth, "--output_dir", out, "--device", "cpu", *more]
    assert evaluate.main([str(flag) for flag in flags]) == 0
    return json.loads((out / "results.json").read_text())


def spoiled(pixels: np.ndarray, sigma: float, seed: int = 9) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 255 * sigma, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


# --- any folder against any folder --------------------------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        "{number:05d}_{name}.png",
        "{name}_07s.jpg",
        "deep/er/{number:05d}_{name}/{name}_07s.png",
        "{number:05d}_{name}/generated.png",
        "{name}_07s/0.png",
    ],
)
def test_another_system_s_pictures_are_found_by_name(tmp_path, truth, named):
    """Written in reverse order: a join by position would pair them all wrongly."""
    images = tmp_path / "theirs"
    for row in reversed(range(6)):
        write(images / named.format(number=row + 1, name=NAMES[row]), photo(row))
    (row,) = scored(tmp_path, images, truth)["pictures"]
    assert (row["n"], row["samples"], row["prompt_source"]) == (6, 6, "unknown")
    assert row["scores"]["pixcorr"]["value"] > 0.99 and row["scores"]["lite0"]["value"] == 1
    assert row["scores"]["pixcorr"]["other_stimulus"] < 0.5


def test_a_swapped_pair_is_seen(tmp_path, truth):
    for row, name in enumerate(NAMES):
        shown = {0: 1, 1: 0}.get(row, row)
        write(tmp_path / "theirs" / f"{name}_07s.png", photo(shown))
    scored(tmp_path, tmp_path / "theirs", truth)
    lines = read_csv(tmp_path / "out" / "pictures.csv")
    wrong = [line["concept"] for line in lines if float(line["pixcorr"]) < 0.9]
    assert wrong == ["aircraft_carrier", "bear"]


def test_samples_of_a_stimulus_are_averaged_never_the_best(tmp_path, truth):
    for row, name in enumerate(NAMES):
        folder = tmp_path / "theirs" / f"{row + 1:05d}_{name}"
        write(folder / "0.png", photo(row))
        write(folder / "1.png", spoiled(photo(row), 0.5))
        write(tmp_path / "second" / f"{row + 1:05d}_{name}.png", spoiled(photo(row), 0.5))
    (both,) = scored(tmp_path, tmp_path / "theirs", truth)["pictures"]
    (second,) = scored(tmp_path, tmp_path / "second", truth, name="other")["pictures"]
    assert (both["n"], both["samples"]) == (6, 12)
    for name in ("pixcorr", "ssim"):
        mean = (1 + second["scores"][name]["value"]) / 2
        assert both["scores"][name]["value"] == pytest.approx(mean, abs=1e-6)
    assert both["scores"]["fid_lite0"]["pictures"] == 12


def test_names_that_fit_no_stimulus_are_refused(tmp_path, truth, capsys):
    for row in range(6):
        write(tmp_path / "theirs" / f"{row}.png", photo(row))
    flags = ["--images", tmp_path / "theirs", "--truth", truth, "--output_dir", tmp_path / "out"]
    assert evaluate.main([str(flag) for flag in flags]) == 1
    message = capsys.readouterr().err
    assert "6 of 6" in message and "0.png" in message and "00001_aircraft_carrier" in message
    assert not (tmp_path / "out").exists()


def test_a_name_of_two_stimuli_pairs_with_neither(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / "truth" / folder / "same.png", photo(0))
    stimuli = stimuli_below(tmp_path / "truth")
    write(tmp_path / "theirs" / "same.png", photo(0))
    with pytest.raises(DataError, match="named after no stimulus"):
        pair_folder(tmp_path / "theirs", stimuli)


def test_a_part_of_the_stimuli_is_scored_as_that_many(tmp_path, truth):
    for row, name in enumerate(NAMES[:4]):
        write(tmp_path / "theirs" / f"{name}_07s.png", photo(row))
    (row,) = scored(tmp_path, tmp_path / "theirs", truth)["pictures"]
    assert row["n"] == 4 and row["scores"]["lite0"]["value"] == 1


def test_control_folders_stand_beside(tmp_path, truth):
    for row, name in enumerate(NAMES):
        write(tmp_path / "theirs" / f"{name}_07s.png", photo(row))
        write(tmp_path / "shuffled" / f"{name}_07s.png", photo((row + 1) % 6))
    rows = scored(tmp_path, tmp_path / "theirs", truth, "--control_images", tmp_path / "shuffled")[
        "pictures"
    ]
    assert [row["images"] for row in rows] == ["theirs", "shuffled"]
    values = [row["scores"]["lite0"]["value"] for row in rows]
    assert values[0] == 1 and values[1] < 0.8


def test_a_protocol_changes_the_numbers_and_is_written_down(tmp_path, truth):
    for row, name in enumerate(NAMES):
        write(tmp_path / "theirs" / f"{name}_07s.png", spoiled(photo(row), 0.2))
    found = {
        protocol: scored(
            tmp_path, tmp_path / "theirs", truth, "--protocol", protocol, name=protocol
        )
        for protocol in ("mindeye", "braindiffuser")
    }
    for protocol, results in found.items():
        assert results["protocol"]["pictures"].startswith(f"{protocol}: ")
    ssim = [results["pictures"][0]["scores"]["ssim"]["value"] for results in found.values()]
    assert abs(ssim[0] - ssim[1]) > 1e-3


def test_missing_weights_are_named_in_the_table_and_the_rest_is_scored(tmp_path, truth, capsys):
    write(tmp_path / "theirs" / f"{NAMES[0]}_07s.png", photo(0))
    write(tmp_path / "theirs" / f"{NAMES[1]}_07s.png", photo(1))
    (tmp_path / "weights").mkdir()
    results = scored(tmp_path, tmp_path / "theirs", truth, "--weights_dir", tmp_path / "weights")
    assert "lite0" in results["pictures"][0]["scores"]
    table = capsys.readouterr().out
    for name, network in networks.NETWORKS.items():
        assert (network.file in table) == (name != "efficientnet_b1_v1"), "of the other protocol"
    assert "88.03" in table and "0.217" in table, "the original's figures stand beside"


def test_changed_pictures_are_not_the_same_run(tmp_path, truth, capsys):
    for row, name in enumerate(NAMES):
        write(tmp_path / "theirs" / f"{name}_07s.png", photo(row))
    scored(tmp_path, tmp_path / "theirs", truth)
    write(tmp_path / "theirs" / f"{NAMES[0]}_07s.png", photo(5))
    flags = ["--images", tmp_path / "theirs", "--truth", truth, "--output_dir", tmp_path / "out"]
    assert evaluate.main([str(flag) for flag in flags]) == 2
    assert "pictures" in capsys.readouterr().err


# --- two runs against each other ----------------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path, truth) -> tuple[Path, Path]:
    for sigma, name in ((0.05, "good"), (0.6, "bad")):
        for row, concept in enumerate(NAMES):
            write(tmp_path / name / f"{concept}_07s.png", spoiled(photo(row), sigma))
        scored(tmp_path, tmp_path / name, truth, name=f"{name}_scores")
    return tmp_path / "good_scores", tmp_path / "bad_scores"


def compared(tmp_path: Path, a: Path, b: Path, name: str) -> dict[str, dict]:
    flags = ["--compare", str(a), str(b), "--output_dir", str(tmp_path / name)]
    assert evaluate.main(flags) == 0
    rows = json.loads((tmp_path / name / "comparison.json").read_text())["rows"]
    return {row["label"]: row for row in rows}


def test_a_better_run_is_better_by_a_paired_test(tmp_path, two_runs, capsys):
    rows = compared(tmp_path, *two_runs, "comparison")
    for label in ("PixCorr", "SSIM"):
        row = rows[label]
        assert row["n"] == 6 and row["difference"] > 0.05 and row["interval"][0] > 0
        # of 2^6 sign patterns two are as extreme
        assert row["p"] == pytest.approx(2 / 64, abs=0.01) and row["p_holm"] >= row["p"]
    assert rows["EffNet-Lite0 distance"]["difference"] < 0
    assert "A - B" in capsys.readouterr().out
    backwards = compared(tmp_path, *reversed(two_runs), "backwards")
    assert backwards["SSIM"]["difference"] == pytest.approx(-rows["SSIM"]["difference"])


def test_a_run_does_not_differ_from_itself(tmp_path, two_runs):
    for row in compared(tmp_path, two_runs[0], two_runs[0], "same").values():
        assert row["difference"] == 0 and row["p"] == 1


def test_only_shared_stimuli_are_compared(tmp_path, truth, two_runs):
    for row, concept in enumerate(NAMES[:3]):
        write(tmp_path / "few" / f"{concept}_07s.png", photo(row))
    scored(tmp_path, tmp_path / "few", truth, name="few_scores")
    rows = compared(tmp_path, tmp_path / "few_scores", two_runs[1], "comparison")
    assert rows["PixCorr"]["n"] == 3 and rows["PixCorr"]["a"] == pytest.approx(1)


def test_a_system_with_one_recipe_meets_each_of_ours():
    ours = {
        (recipe, "ssim"): comparison.StimulusScores("SSIM", "higher", {"1": 0.5})
        for recipe in ("fused", "x")
    }
    theirs = {("pictures", "ssim"): comparison.StimulusScores("SSIM", "higher", {"1": 0.4})}
    found = [what for what, _, _ in comparison.matched(ours, theirs)]
    assert found == ["fused against pictures", "x against pictures"]


def test_runs_of_other_stimuli_cannot_be_compared(tmp_path, truth, two_runs, capsys):
    write(tmp_path / "others" / "zebra.png", photo(7))
    write(tmp_path / "others" / "yak.png", photo(8))
    scored(tmp_path, tmp_path / "others", tmp_path / "others", name="other_scores")
    flags = ["--compare", two_runs[0], tmp_path / "other_scores", "--output_dir", tmp_path / "c"]
    assert evaluate.main([str(flag) for flag in flags]) == 2
    assert "no score of a stimulus that both" in capsys.readouterr().err
    flags[2] = tmp_path / "nowhere"
    assert evaluate.main([str(flag) for flag in flags]) == 1


def test_unmarked_controls_are_not_compared_in_place_of_the_pictures(tmp_path, truth, two_runs):
    """Another person's pictures, say: nothing but the flag tells them from --images."""
    for row, name in enumerate(NAMES):
        write(tmp_path / "own" / "images" / f"{name}_07s.png", spoiled(photo(row), 0.05))
        write(tmp_path / "other" / "images" / f"{name}_07s.png", spoiled(photo(row), 0.6))
    images, beside = tmp_path / "own" / "images", tmp_path / "other" / "images"
    results = scored(tmp_path, images, truth, "--control_images", beside, name="both_scores")
    assert [row["images"] for row in results["pictures"]] == ["own/images", "other/images"]
    rows = compared(tmp_path, tmp_path / "both_scores", two_runs[1], "comparison")
    value = results["pictures"][0]["scores"]["pixcorr"]["value"]
    assert rows["PixCorr"]["a"] == pytest.approx(value) and rows["PixCorr"]["difference"] > 0.05


def test_folders_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / end for end in ("a/x/images", "b/x/images", "c/images", "c/images")]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    labels = labels_of(paths)
    assert labels == ["a/x/images", "b/x/images", f"{tmp_path.name}/c/images",
                      f"{tmp_path.name}/c/images (2)"]  # fmt: skip
    assert labels_of(paths[:1]) == ["images"]


# --- names that disagree ------------------------------------------------------------------------


def numbered(tmp_path: Path) -> Path:
    """Stimuli in folders of their own, one of whose files is called 1."""
    for row, name in enumerate(NAMES[:3]):
        file = "1.png" if not row else f"{name}.png"
        write(tmp_path / "truth" / f"{row + 1:05d}_{name}" / file, photo(row))
    return tmp_path / "truth"


def test_a_folder_named_after_a_stimulus_says_more_than_a_number(tmp_path):
    stimuli = stimuli_below(numbered(tmp_path))
    for row, name in enumerate(NAMES[:3]):
        write(tmp_path / "theirs" / f"{row + 1:05d}_{name}" / "1.png", photo(row))
    group = pair_folder(tmp_path / "theirs", stimuli)
    assert [group.stimuli[row].concept for row in group.owner] == list(NAMES[:3])


def test_files_and_folders_named_after_different_stimuli_are_refused(tmp_path):
    for name in ("1", "2", "3"):
        write(tmp_path / "truth" / f"{name}.png", photo(int(name)))
    stimuli = stimuli_below(tmp_path / "truth")
    for sample in ("1", "2"):
        write(tmp_path / "theirs" / sample / "3.png", photo(3))
    with pytest.raises(DataError, match=r"2 of 2 .*/1/3.png: truth/1.png, truth/3.png"):
        pair_folder(tmp_path / "theirs", stimuli)
    for folder, file in (("00001_aircraft_carrier", "00002_bear"), ("00002_bear/00003_canoe", "")):
        theirs = tmp_path / f"of{file}" / "theirs"
        write(theirs / folder / f"{file or 'x'}.png", photo(1))
        places = [tmp_path / "things" / f"{n + 1:05d}_{NAMES[n]}" / "a.png" for n in range(3)]
        things = [write(place, photo(0)) for place in places]
        with pytest.raises(DataError, match="different stimuli"):
            pair_folder(theirs, stimuli_below(things[0].parents[1]))


# --- runs that are not whole --------------------------------------------------------------------


@pytest.fixture
def half_drawn(tmp_path, truth) -> Path:
    """A run of two parts, one of which was interrupted."""
    run = tmp_path / "run"
    for row, stimulus in enumerate(stimuli_below(truth)[:4]):
        append_jsonl(
            run_part(run, row % 2),
            {"stimulus": stimulus.id, "recipe": "fused", "file": f"{row}.png", "control": None,
             "folder": stimulus.folder, "prompt_source": "neutral"},
        )  # fmt: skip
        write(run / f"{row}.png", photo(row))
    (run / "DONE-1-of-2").write_text("{}")
    return run


def run_part(run: Path, index: int) -> Path:
    run.mkdir(exist_ok=True)
    return run / f"images-{index + 1}-of-2.jsonl"


def test_an_unfinished_run_is_told_and_not_compared(tmp_path, truth, half_drawn, two_runs, capsys):
    results = scored(tmp_path, half_drawn, truth, name="half")
    told = "unfinished (1 of 2 parts are done)"
    assert [row["unfinished"] for row in results["pictures"]] == [told]
    shown = capsys.readouterr()
    assert f"**run: {told}.**" in shown.out and told in shown.err
    flags = ["--compare", tmp_path / "half", two_runs[0], "--output_dir", tmp_path / "c"]
    assert evaluate.main([str(flag) for flag in flags]) == 1
    assert told in capsys.readouterr().err and not (tmp_path / "c").exists()
    (half_drawn / "DONE-2-of-2").write_text("{}")
    assert scored(tmp_path, half_drawn, truth, name="whole")["pictures"][0]["unfinished"] == ""
    assert compared(tmp_path, tmp_path / "whole", two_runs[0], "d")["PixCorr"]["n"] == 4


def test_pictures_that_are_gone_are_told(tmp_path, truth, half_drawn, capsys):
    (half_drawn / "DONE").write_text("{}")
    (half_drawn / "2.png").unlink()
    (row,) = scored(tmp_path, half_drawn, truth, name="three")["pictures"]
    assert row["n"] == 3 and row["unfinished"] == "1 of its 4 pictures are gone, e.g. 2.png"
    for path in half_drawn.glob("*.png"):
        path.unlink()
    flags = ["--images", half_drawn, "--truth", truth, "--output_dir", tmp_path / "none"]
    assert evaluate.main([str(flag) for flag in flags]) == 1
    assert "no pictures" in capsys.readouterr().err
