"""One person's recordings, written in every published form."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from datafiles.datasets.registry import FORMS
from datafiles.stimuli import PARTITIONS, list_stimuli

IMAGES_OF = {"training": 2, "test": 1}  # pictures of a concept in the tests' DATA
Content = Mapping[str, Any]


def _pickled(names: Mapping[str, str]) -> Callable[[Path, Content, str, list[str]], None]:
    def write(file: Path, content: Content, partition: str, keys: list[str]) -> None:
        file.write_bytes(pickle.dumps({names.get(key, key): content[key] for key in content}))

    return write


def _ubp(file: Path, content: Content, partition: str, keys: list[str]) -> None:
    eeg = content["preprocessed_eeg_data"]
    named = [key.replace("training_images", "train_images") for key in keys]
    saved = {
        "eeg": eeg,
        "img": np.tile(np.array(named)[:, None], (1, eeg.shape[1])),
        "session": np.zeros(eeg.shape[:2]),
        "ch_names": content["ch_names"],
        "times": content["times"],
    }
    torch.save(saved, file, pickle_protocol=5)


def _neurobridge(file: Path, content: Content, partition: str, keys: list[str]) -> None:
    eeg = content["preprocessed_eeg_data"]
    np.save(file, eeg.reshape(-1, IMAGES_OF[partition], *eeg.shape[1:]))
    times = np.asarray(content["times"]).tolist()
    info = {"ch_names": list(content["ch_names"]), "times": times, "sfreq": 250}
    (file.parent.parent / "info.json").write_text(json.dumps(info))


def _alljoined(file: Path, content: Content, partition: str, keys: list[str]) -> None:
    """Trials of all pictures mixed, with rows of dropped ones and of the other partition."""
    eeg = content["preprocessed_eeg_data"]
    order = np.random.default_rng(5).permutation(eeg.shape[0] * eeg.shape[1])
    order = order[np.argsort(order % eeg.shape[1], kind="stable")]  # repetitions in their order
    shown = [keys[place // eeg.shape[1]] for place in order]
    write_flat(file, content, partition, shown, eeg.reshape(-1, *eeg.shape[2:])[order])


def write_flat(
    file: Path, content: Content, partition: str, shown: list[str], eeg: np.ndarray
) -> None:
    """Trials [M, C, T] of the pictures ``shown``; the table is that of both partitions."""
    table = file.parent / "experiment_metadata.parquet"
    before = pq.read_table(table).to_pylist() if table.exists() else []
    mine = {"training": "stim_train", "test": "stim_test"}[partition]
    rows = [
        {"partition": mine, "dropped": False, "image_path": name.split("/", 1)[1],
         "subject": 1 + int(file.parent.name != "sub-01")}
        for name in shown
    ]  # fmt: skip
    rows.insert(1, rows[0] | {"dropped": True, "image_path": rows[-1]["image_path"]})
    rows.append(rows[0] | {"subject": 9})
    pq.write_table(pa.Table.from_pylist([*rows, *before]), table)
    flat = dict(content) | {"preprocessed_eeg_data": eeg}
    file.write_bytes(pickle.dumps(flat))


WRITERS = {
    "things-eeg2": _pickled({}),
    "ubp": _ubp,
    "neurobridge": _neurobridge,
    "things-meg": _pickled({"preprocessed_eeg_data": "meg_data"}),
    "alljoined": _alljoined,
}


def write_as(form: str, data: Path, subject: str, contents: Mapping[str, Content]) -> list[Path]:
    """{partition: what a published THINGS-EEG2 file holds}, written as ``form`` in DATA."""
    pattern = next(one for one in FORMS[form].folders if one != ".")
    folder = data / pattern.replace("*", "_250Hz_whiten") / subject
    folder.mkdir(parents=True)
    files = []
    for partition in PARTITIONS:
        keys = [item.key for item in list_stimuli(data, partition)]
        file = folder / FORMS[form].files[partition]
        WRITERS[form](file, contents[partition], partition, keys)
        files.append(file)
    return files
