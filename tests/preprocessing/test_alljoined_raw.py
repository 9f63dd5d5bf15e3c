"""Alljoined's EDF blocks: pictures by number, and several of them on one time stamp."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_own import CODES, PICTURES, recording, run, save, write_data
from helpers_raw import CAP_32, write_edf

import preprocess
from datafiles.datasets import things_eeg2
from datafiles.eeg_files import eeg_file
from preprocessing import quality

NUMBER = (411, 412, 16641, 200)  # of PICTURES
BEGUN = datetime(2024, 11, 5, 10, 0, tzinfo=timezone.utc)  # by the recorder's clock
DELAY_S = 3.25  # of the EDF's beginning after that


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(quality, "draw_quality", lambda *_: None)
    return write_data(tmp_path)


def write_table(data: Path) -> Path:
    """The person's table, pictures by their place in DATA; two of them are not there."""
    rows = []
    for key, number in zip(PICTURES, NUMBER, strict=True):
        partition, folder, file = key.split("/")
        within = sorted(path.name for path in (data / partition / folder).iterdir()).index(file)
        at = {"category_num": int(folder[:5]) - 1, "category_name": folder[6:],
              "category_img_num": within}  # fmt: skip
        row = {"partition": "stim_test" if "test" in partition else "stim_train",
               "dropped": False, "image_path": f"images/{number:05d}.jpg", **at}  # fmt: skip
        rows += [row, row]
    rows.append({**rows[0], "image_path": "images/00999.jpg", "category_name": "zebra"})
    table = data / "preprocessed_eeg" / "sub-01" / "experiment_metadata_categories.parquet"
    table.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), table)
    return table


def mark(code: int) -> tuple[str, int]:
    return ("stim_test" if code == 4 else "stim_train"), NUMBER[code - 1]


def write_block(data: Path, block: int, codes=CODES, merged: int | None = None, prefix: str = ""):
    """An EDF and the recorder's list; (folder, lines of the plain table).

    ``merged``: a place whose picture has the time stamp of the next one in the EDF.
    """
    raw, _, lines = recording(CAP_32[:8], codes=codes)
    raw._data[:] += 1e-8 * block  # another recording
    folder = data / "raw_eeg" / "sub-01" / "session_1" / f"block_{block}"
    folder.mkdir(parents=True)
    onsets = [onset for onset, _ in lines]
    stamps = list(onsets)
    if merged is not None:
        stamps[merged] = stamps[merged + 1]
    notes = [(0.5, "behav,1,-1,1")]
    for number, (stamp, code) in enumerate(zip(stamps, codes, strict=True)):
        label, image = mark(code)
        notes.append((stamp, f"{prefix}{label},{image},-1,{number}"))
    write_edf(folder / "b.edf", raw, notes=notes)
    listed = [
        {"label": label, "value": image, "index": number,
         "startDatetime": (BEGUN + timedelta(seconds=onset + DELAY_S)).isoformat()}
        for number, (onset, (label, image)) in enumerate(
            zip(onsets, map(mark, codes), strict=True))
    ]  # fmt: skip
    listed.insert(0, {"label": "behav", "value": 3, "index": 0, "startDatetime": "x"})
    (folder / "b.json").write_text(json.dumps({"Markers": listed}), encoding="utf-8")
    return folder, lines


def call(data: Path, *flags: object) -> int:
    tokens = ["--data_path", data, "--raw", data / "raw_eeg", "--no-whiten", *flags]
    return preprocess.main([str(token) for token in tokens])


def content(data: Path, partition: str) -> np.ndarray:
    return np.asarray(things_eeg2.parse_published(eeg_file(data, "sub-01", partition))[0])


def plain(data: Path, lines) -> dict[str, np.ndarray]:
    """The same recording with a table of events, as users bring it."""
    (data / "Preprocessed_data_250Hz").rename(data / "of_alljoined")
    raw, *_ = recording(CAP_32[:8])
    raw._data[:] += 1e-8
    assert run(data, *save(data, raw, lines)) == 0
    return {partition: content(data, partition) for partition in ("training", "test")}


@pytest.mark.parametrize("form", [{}, {"prefix": "session_1,block_1,"}, {"merged": 4}])
def test_a_block_holds_the_pictures_that_its_numbers_mean(data, form):
    """As named by a plain table; pictures on one stamp are where the recorder's list has them."""
    write_table(data)
    _, lines = write_block(data, 1, **form)
    assert call(data) == 0
    found = {partition: content(data, partition) for partition in ("training", "test")}
    for partition, eeg in plain(data, lines).items():
        np.testing.assert_allclose(found[partition], eeg, atol=0.02 * np.abs(eeg).max())


def test_without_the_list_pictures_on_one_stamp_are_left_out(data, capsys):
    write_table(data)
    folder, _ = write_block(data, 1, CODES * 2, merged=4)
    (folder / "b.json").unlink()
    assert call(data) == 0
    text = next(data.rglob("quality.md")).read_text(encoding="utf-8")
    assert "2 on one time stamp with another picture" in text


def test_all_blocks_of_a_person_in_their_order(data):
    write_table(data)
    for block in (10, 2):
        write_block(data, block)
    assert call(data, "--subjects", "sub-01") == 0
    assert content(data, "training").shape[1] == 6
    text = next(data.rglob("quality.md")).read_text(encoding="utf-8")
    assert text.index("ses-01") < text.index("ses-02")
    assert call(data, "--subjects", "sub-07") == 2


@pytest.mark.parametrize("fault", ["late", "fewer", "broken"])
def test_a_list_of_another_recording_is_refused(data, capsys, fault):
    write_table(data)
    folder, _ = write_block(data, 1, CODES * 2, merged=4)
    listed = json.loads((folder / "b.json").read_text(encoding="utf-8"))["Markers"]
    if fault == "late":
        listed[9]["startDatetime"] = (BEGUN + timedelta(hours=1)).isoformat()
    text = json.dumps({"Markers": listed[:-2] if fault == "fewer" else listed})
    (folder / "b.json").write_text(text[:-9] if fault == "broken" else text, encoding="utf-8")
    assert call(data) == 1
    assert "b.json" in capsys.readouterr().err
    assert not list(data.rglob("preprocessed_eeg_*.npy"))


def test_without_the_persons_table_numbers_mean_nothing(data, capsys):
    write_block(data, 1)
    assert call(data) == 1
    assert "experiment_metadata_categories.parquet" in capsys.readouterr().err


def test_a_changed_table_is_another_input(data):
    table = write_table(data)
    write_block(data, 1)
    assert call(data) == 0
    rows = pq.read_table(table).to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[0]]), table)
    assert call(data) != 0
