"""What is measured on drawn pictures: the right stimulus, the right place, honest tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from miniworld import judge, models, pictures, quality, renders
from modalities import NAMES, recipes
from rundirs.files import append_jsonl, write_json
from rundirs.tensors import save_tensors

SCENES = renders.unseen_scenes("validation", 12, seed=0)
PICTURES = np.stack([pictures.render(scene, models.SIZE_PX) for scene in SCENES])


def test_an_object_in_its_place_has_no_error() -> None:
    assert quality.place_errors(PICTURES, SCENES).max() < 0.03


def test_a_moved_object_is_as_far_as_it_was_moved() -> None:
    scene = dataclasses.replace(SCENES[0], shape="circle", pattern="plain", x=0.3, y=0.5, size=0.4)
    moved = dataclasses.replace(scene, x=0.6)
    drawn = pictures.render(moved, 128)[None]
    assert quality.place_errors(drawn, [scene])[0] == pytest.approx(0.3, abs=0.01)


def test_a_picture_without_the_object_has_no_place() -> None:
    scene = SCENES[0]
    empty = np.full((1, 64, 64, 3), pictures.COLOURS[scene.background], np.uint8)
    assert np.isnan(quality.place_errors(empty, [scene])[0])


def write_run(images: Path, data: Path, drawn: np.ndarray) -> None:
    """A generate.py run whose i-th stimulus was drawn as ``drawn[i]``."""
    truth = {}
    for row, scene in enumerate(SCENES):
        folder = f"{row + 1:05d}_{pictures.concept_name(scene)}"
        truth[f"test_images/{folder}/x.png"] = dataclasses.asdict(scene)
        (images / folder).mkdir(parents=True)
        Image.fromarray(drawn[row]).save(images / folder / "fused.png")
        record = {"stimulus": row, "recipe": "fused", "folder": folder,
                  "file": f"{folder}/fused.png", "prompt_source": "neutral",
                  "control": None}  # fmt: skip
        append_jsonl(images / "images.jsonl", record)
    data.mkdir()
    write_json(data / "scenes.json", {"scenes": truth})


@pytest.mark.parametrize(("shift", "right"), [(0, True), (1, False)])
def test_pictures_are_judged_against_their_own_stimulus(tmp_path, shift: int, right: bool) -> None:
    write_run(tmp_path / "images", tmp_path / "data", np.roll(PICTURES, shift, axis=0))
    model = judge.load(models.Models(models.SHIPPED).judge)
    found = quality.judged_run(model, tmp_path / "images", tmp_path / "data")["fused"]
    assert set(found) == {*pictures.ATTRIBUTES, "place"}
    for name, hits in found.items():
        assert len(hits) == len(SCENES)
        assert bool(hits.mean() > 0.6) is right, name


def test_the_table_says_n_and_interval_beside_every_rate() -> None:
    hits = {name: np.arange(20) < 15 for name in (*pictures.ATTRIBUTES, "place")}
    table = quality.judge_table({"fused": hits}, seed=0)
    row = next(line for line in table.splitlines() if line.startswith("| fused"))
    assert row.startswith("| fused | 20 |") and row.count("0.75 [") == 5
    assert "chance" in table and f"{1 / len(pictures.SHAPES):.2f}" in table


def test_what_is_above_a_control_is_paired_by_stimulus() -> None:
    """Of the same two rates, the difference is certain only where the same stimuli improve."""
    eeg = {"a": np.arange(40) < 30, "b": np.arange(40) < 30}
    control = {"a": np.arange(40) < 10, "b": np.arange(40) >= 30}
    row = quality.above_table({"fused": eeg}, {"fused": control}, seed=0).splitlines()[2]
    paired, crossed = row.split(" | ")[2:]
    assert paired.startswith("0.50 [0.3") and crossed.startswith("0.50 [0.2")


def test_progress_is_the_change_with_each_modality() -> None:
    """Step k is right about k of 5 fifths of the stimuli, in every attribute."""
    found = {
        recipe.name: dict.fromkeys(pictures.ATTRIBUTES, np.arange(50) < 10 * len(recipe.active))
        for recipe in recipes("progressive")
    }
    rows = quality.progress_table(found, seed=0).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| + {name}" for name in NAMES[1:]]
    assert all(row.split(" | ")[2].startswith("0.20 [") for row in rows)


def test_a_saved_judge_is_the_judge(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = judge.Judge().eval()
    save_tensors(tmp_path / "judge.safetensors", model.state_dict(), {})
    loaded = judge.load(tmp_path / "judge.safetensors")
    for name, seen in judge.verdicts(model, PICTURES, SCENES).items():
        np.testing.assert_array_equal(seen, judge.verdicts(loaded, PICTURES, SCENES)[name])
