"""benchmarks/superpixels.py and benchmarks/features.py at their smallest: their rows are written.

Nothing timed is asserted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_benchmarks import loaded
from PIL import Image
from skimage.data import astronaut

import util
from features.clip import Clip
from miniworld import models
from rundirs.files import read_json

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--n", "2", "--size", "60", "--repeats", "1"]


@pytest.fixture(scope="module")
def superpixels():
    with loaded(BENCHMARKS / "superpixels.py") as module:
        yield module


@pytest.fixture(scope="module")
def features():
    with loaded(BENCHMARKS / "features.py") as module:
        yield module


@pytest.fixture
def photos(tmp_path):
    """Two files of other sizes than are asked for, one of them in a folder."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    picture = Image.fromarray(astronaut())
    picture.resize((90, 70)).save(tmp_path / "photos" / "a.jpg")
    picture.resize((64, 64)).save(tmp_path / "photos" / "more" / "b.png")
    return tmp_path / "photos"


def _rows(module, path, *flags) -> dict:
    assert module.main([*SMALL, *map(str, flags), "--json", str(path)]) == 0
    written = read_json(path)
    assert {"versions", "commit", "command"} <= written.keys()
    for row in written["rows"].values():
        assert {"ours", "baseline", "ratio", "unit", "n"} <= row.keys()
        assert row["ours"] > 0 and row["baseline"] > 0 and row["n"] >= 1
    return written["rows"]


@pytest.mark.parametrize("given", [True, False], ids=["photos", "renders"])
def test_superpixels_are_the_first_implementation_s(superpixels, photos, tmp_path, given):
    flags = ("--pictures", photos) if given else ()
    rows = _rows(superpixels, tmp_path / "rows.json", *flags)
    assert tuple(rows) == ("superpixels_one_process", "superpixels_two_processes")
    one = rows["superpixels_one_process"]
    assert one["labels_agree_least"] >= superpixels.AGREEMENT
    assert one["largest_difference_of_255"] <= 1


def test_other_labels_end_the_run(superpixels, photos, tmp_path, monkeypatch):
    segment = superpixels.superpixel.segment
    monkeypatch.setattr(superpixels.superpixel, "segment", lambda *given: segment(*given) + 1)
    with pytest.raises(SystemExit, match="labels agree in"):
        superpixels.main([*SMALL, "--pictures", str(photos)])


def _mini_clip() -> tuple[str, str]:
    return "--clip_model", str(models.Models(models.SHIPPED).clip_config)


@pytest.mark.parametrize("workers", [0, 1])
def test_stage_1_makes_the_bare_model_s_features(features, photos, tmp_path, workers):
    flags = (*_mini_clip(), "--batch_size", 1, "--num_workers", workers, "--pictures", photos)
    row = _rows(features, tmp_path / "rows.json", *flags)["features_vs_forward"]
    assert (row["pictures"], row["crops_per_picture"], row["num_workers"]) == (2, 4, workers)
    assert row["ratio"] == pytest.approx(row["ours"] / row["baseline"])
    assert row["processes_per_forward"] >= 1


def test_other_features_end_the_run(features, photos, monkeypatch):
    encode = Clip.encode_pictures
    monkeypatch.setattr(Clip, "encode_pictures", lambda self, crops: encode(self, crops) + 1)
    with pytest.raises(SystemExit, match="differ by"):
        features.main([*SMALL, *_mini_clip(), "--num_workers", "0", "--pictures", str(photos)])


@pytest.mark.parametrize("flags", ["--n 0", "--repeats 0", "--siz 9"])
@pytest.mark.parametrize("name", ["superpixels", "features"])
def test_wrong_flags_are_refused(name, flags, capsys, request):
    with pytest.raises(SystemExit) as stop:
        request.getfixturevalue(name).parse(flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err


def test_too_few_pictures_are_refused(superpixels, photos):
    with pytest.raises(util.DataError, match="2 pictures"):
        superpixels.main([*SMALL, "--n", "3", "--pictures", str(photos)])
