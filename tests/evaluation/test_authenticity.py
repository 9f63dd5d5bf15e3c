"""Pictures that are training pictures are named, others are not; directions are counted."""

from __future__ import annotations

import json
import re
import shutil

import builders
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import metrics
import report
from evaluation.authenticity import cosine_distance, root_mean_square
from rundirs.files import read_csv


@pytest.fixture
def data(tmp_path):
    """Pictures of noise, no two alike: 6 to train on, 4 that were seen."""
    draw = np.random.default_rng(0)
    for folder, number in (("training_images", 6), ("test_images", 4)):
        for place in range(number):
            path = tmp_path / "data" / folder / f"{place:05d}_{folder[:2]}{place}" / "a.png"
            path.parent.mkdir(parents=True)
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(path)
    return tmp_path / "data"


@pytest.fixture
def drawn(data, tmp_path):
    """One near its stimulus, one of noise, two copies of training pictures, one as JPEG."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    seen, known = (sorted((data / name).glob("*/*")) for name in ("test_images",
                                                                   "training_images"))  # fmt: skip
    near = np.asarray(Image.open(seen[0]), np.int16) + 20
    Image.fromarray(near.clip(0, 255).astype(np.uint8)).save(folder / f"{seen[0].parent.name}.png")
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{seen[1].parent.name}.png")
    Image.open(known[4]).save(folder / f"{seen[2].parent.name}.png")
    Image.open(known[2]).save(folder / f"{seen[3].parent.name}.jpg", quality=90)
    return folder


def score(data, drawn, out, *more):
    flags = ["--images", drawn, "--data_path", data, "--authenticity", "--device", "cpu",
             "--output_dir", out, *more]  # fmt: skip
    assert evaluate.main([str(flag) for flag in flags]) == 0
    return json.loads((out / "results.json").read_text())["authenticity"]["rows"]


def test_planted_copies_are_named_and_nothing_else(data, drawn, tmp_path, capsys):
    rows = score(data, drawn, tmp_path / "s")
    assert [row["space"] for row in rows] == ["pixels", "EffNet-Lite0"]
    for row in rows:
        assert row["training"] == 6 and row["samples"] == 4
    planted = {"00002_te2": "training_images/00004_tr4/a.png",
               "00003_te3": "training_images/00002_tr2/a.png"}  # fmt: skip
    found = [{one["picture"].split("/")[1]: one["nearest"] for one in row["copies"]}
             for row in rows]  # fmt: skip
    assert found[0] == planted
    # of noise, JPEG changes most of what a network sees
    assert found[1].items() <= planted.items() and "00002_te2" in found[1]
    page = capsys.readouterr().out
    assert "## Authenticity" in page and page.count("**COPY**") == sum(map(len, found))
    lines = {(line["picture"], line["space"]): line
             for line in read_csv(tmp_path / "s" / "authenticity.csv")}  # fmt: skip
    near = lines["test_images/00000_te0/a.png", "pixels"]
    assert float(near["to_stimulus"]) < float(near["distance"]) and near["copy"] == "False"
    assert float(lines["test_images/00003_te3/a.png", "pixels"]["distance"]) < 0.05


def test_by_hand(data, drawn, tmp_path):
    row = score(data, drawn, tmp_path / "s")[0]

    def small(path):
        picture = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
        return np.asarray(picture, np.float64) / 255

    def distance(one, other):
        return np.sqrt(np.mean((one - other) ** 2))

    known = [small(path) for path in sorted((data / "training_images").glob("*/*"))]
    seen = [small(path) for path in sorted((data / "test_images").glob("*/*"))]
    mine = [small(path) for path in sorted(drawn.iterdir())]
    nearest = [min(distance(one, other) for other in known) for one in mine]
    true = [distance(one, other) for one, other in zip(mine, seen, strict=True)]
    of_seen = [min(distance(one, other) for other in known) for one in seen]
    assert row["nearest"] == pytest.approx(np.mean(nearest), abs=1e-3)
    assert row["to_stimulus"] == pytest.approx(np.mean(true), abs=1e-3)
    assert row["stimuli_nearest"] == pytest.approx(np.mean(of_seen), abs=1e-3)
    assert row["below"] == pytest.approx(min(of_seen), abs=1e-3)
    nearer = np.mean([one < other for one, other in zip(nearest, true, strict=True)])
    assert row["nearer_than_stimulus"] == nearer


def test_the_report_names_them(data, drawn, tmp_path):
    score(data, drawn, tmp_path / "s")
    page = tmp_path / "report.html"
    flags = ["--runs", tmp_path / "s", "--data_path", data, "--output", page]
    assert report.main([str(flag) for flag in flags]) == 0
    text = re.sub(r"<[^>]+>", " ", page.read_text())
    assert "COPIES" in text and "training_images/00004_tr4/a.png" in text
    shutil.rmtree(tmp_path / "s")
    for copy in ("00002_te2.png", "00003_te3.jpg"):
        (drawn / copy).unlink()
    score(data, drawn, tmp_path / "s")
    assert report.main([str(flag) for flag in flags]) == 0
    assert "COPIES" not in page.read_text() and "copied from training" in page.read_text()


@pytest.mark.parametrize("flags", [["--truth", "t"], ["--model_path", "m"]])
def test_it_needs_pictures_and_where_training_is(flags, capsys):
    images, retrieval = ["--images", "i"], ["--data_path", "d", "--clip_feature_path", "f"]
    others = images if flags[0] == "--truth" else retrieval
    assert evaluate.main([*flags, *others, "--authenticity", "--output_dir", "o"]) == 2
    assert "--authenticity" in capsys.readouterr().err


def test_distances_are_those_of_numpy():
    one, other = (np.random.default_rng(k).normal(size=(3 + k, 5)) for k in (0, 1))
    for row, column in np.ndindex(3, 4):
        a, b = one[row], other[column]
        assert root_mean_square(one, other)[row, column] == pytest.approx(
            np.sqrt(np.mean((a - b) ** 2))
        )
        cosine = a @ b / np.sqrt(a @ a * (b @ b))
        assert cosine_distance(one, other)[row, column] == pytest.approx(1 - cosine)


def test_effective_rank_counts_directions():
    assert metrics.effective_rank(builders.normal(50, 1) * builders.normal(1, 8)) == pytest.approx(
        1, abs=1e-4
    )
    four = torch.eye(8)[[0, 1, 2, 3]].repeat(2, 1) * torch.tensor([1.0] * 4 + [-1.0] * 4)[:, None]
    assert metrics.effective_rank(four + 7) == pytest.approx(4)
    weights = np.array([3.0, 1.0]) / 4
    two = torch.tensor([[3.0, 0], [-3.0, 0], [0, 1.0], [0, -1.0]])
    assert metrics.effective_rank(two) == pytest.approx(np.exp(-(weights * np.log(weights)).sum()))
    assert metrics.effective_rank(torch.ones(3, 4)) == pytest.approx(1)
