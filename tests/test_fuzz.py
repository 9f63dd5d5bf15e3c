"""Every reader of files from elsewhere, on damaged and hostile ones: an error of ours, or a value.

Nothing in a file is run, none takes 2 s or a gigabyte. ``--fuzz 10000`` tries that many for each.
"""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import builders
import helpers_raw
import mne
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from helpers_fuzz import (
    MOST_BYTES,
    Call,
    Watch,
    damaged,
    forget_peak,
    peak_bytes,
    pickled,
    programs,
    watched,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from scipy.io import savemat

import args
from datafiles import eeg_files, feature_bank, pictures, stimuli
from datafiles.captions import read_captions
from datafiles.datasets import registry, things_eeg2
from datafiles.datasets.block_design import read_blocks
from datafiles.feature_import import read_features
from preprocessing import alljoined_raw, epochs_file, events, reading, recordings, timeline
from preprocessing.epochs_parquet import open_parquet
from preprocessing.hints import explained
from preprocessing.own_recordings import OwnTake
from rundirs.directory import RunDirectory
from rundirs.files import json_line, read_json, read_jsonl, write_json
from rundirs.tensors import load_tensors
from sdxl import injection_map
from sdxl.adapter_file import _read_pickled
from training.checkpoints import Checkpoints
from util import StageError

CANARY = "canary"
SWEPT = 20  # files, after which what is left of them is swept away
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is watched in /proc")


@dataclass(frozen=True)
class Reader:
    """``read`` opens the file at ``place``, below a folder that ``seeds`` may fill first.

    ``slow``: how many times fewer files are tried, where each takes a process of its own;
    ``sweeps``: objects of MNE are cycles, which Python forgets late: here thousands, there one.
    """

    place: str
    seeds: Callable[[Path], Sequence[bytes]]
    read: Callable[[Path], object]
    others: st.SearchStrategy[bytes] | None = None
    errors: tuple[type[BaseException], ...] = (StageError,)
    slow: int = 1
    sweeps: bool = False


# --- valid files, to be damaged -----------------------------------------------------------------


def _hostile() -> list[object]:
    return [
        Call(os.system, f"touch {CANARY}"),
        Call(subprocess.check_call, ["touch", CANARY]),
        Call(exec, f"open({CANARY!r}, 'w').close()"),
    ]


def _np_saved(content: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(content, dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _published(_: Path) -> list[bytes]:
    small = builders.published(rows=2, repetitions=2, samples=4)
    long = builders.published(rows=12, repetitions=4, samples=20)  # its array stays in the file
    hostile = [pickled(small | {"info": item}, 4) for item in _hostile()]
    return [pickled(small, number) for number in range(6)] + [
        _np_saved(small), pickled(long, 4), _np_saved(long), *hostile
    ]  # fmt: skip


def _torch(_: Path) -> list[bytes]:
    small = builders.published(rows=2, repetitions=2, samples=4)
    eeg = small.pop("preprocessed_eeg_data")
    content = small | {"eeg": eeg, "img": [f"train_images/00001_a/{n}.jpg" for n in range(2)]}
    tensors = content | {"eeg": torch.from_numpy(eeg), "label": torch.arange(9).reshape(3, 3)}
    hostile = [content | {"info": item} for item in _hostile()]
    return [_torch_saved(item) for item in (content, tensors, *hostile)]


def _torch_saved(content: Any, protocol: int = 5) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def _torch_zipped(program: bytes) -> bytes:
    """A pickle in the place of that of torch.save, beside a storage."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/data/0", bytes(64))
    return buffer.getvalue()


def _neurobridge(folder: Path) -> list[bytes]:
    info = {"ch_names": list(builders.CHANNELS), "times": [n / 100 for n in range(4)]}
    (folder / "info.json").write_text(json.dumps(info))
    saved = io.BytesIO()
    np.save(saved, builders.eeg_values(0, 4, 2, builders.CHANNELS, 4).reshape(2, 2, 2, 5, 4))
    return [saved.getvalue()]


def _table(folder: Path) -> list[bytes]:
    """The table of Alljoined, beside a recording of three trials."""
    eeg = {"preprocessed_eeg_data": np.ones((3, 2, 4)), "ch_names": ["Oz", "Cz"],
           "times": np.arange(4) / 100}  # fmt: skip
    (folder / "preprocessed_eeg_test_flat.npy").write_bytes(pickled(eeg, 4))
    rows = [{"partition": "stim_test", "dropped": False, "image_path": f"{n}.jpg"} for n in "aab"]
    saved = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), saved)
    return [saved.getvalue()]


def _vectors(_: Path) -> list[bytes]:
    """Embeddings of two test pictures: ATM's form, ENIGMA's, and hostile ones."""
    rows = {"img_features": torch.ones(2, 4), "text_features": torch.ones(2, 4)}
    named = {"image": {"a.png": torch.ones(4)}, "text": {"test1": torch.ones(1, 4)}}
    hostile = [rows | {"info": item} for item in _hostile()]
    return [_torch_saved(item, 2) for item in (rows, named, *hostile)]


def _blocks(_: Path) -> list[bytes]:
    """A block design of two trials, as a zip and as older torch wrote it, and hostile ones."""
    listed = [{"eeg": torch.ones(2, 9), "image": n, "label": 0, "subject": n + 1} for n in range(2)]
    content = {"dataset": listed, "images": ["a_1", "a_2"], "labels": ["a"]}
    legacy = io.BytesIO()
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    hostile = [content | {"info": item} for item in _hostile()]
    return [_torch_saved(content, 2), legacy.getvalue(), *(_torch_saved(one, 2) for one in hostile)]


def _array(folder: Path) -> list[bytes]:
    saved = io.BytesIO()
    np.save(saved, np.ones((2, 4), np.float32))
    (folder / "v_text.npy").write_bytes(saved.getvalue())
    return [saved.getvalue()]


TWO_STIMULI = [
    stimuli.Stimulus(f"test_images/0000{n}_test{n}/a.png", Path("a.png")) for n in (1, 2)
]


def _read_vectors(path: Path) -> object:
    return read_features(path, TWO_STIMULI)


def _raw(_: Path) -> list[bytes]:
    raw, onsets = helpers_raw.simulate([1, 2, 99999, 1], ("Fz", "Cz"), rate_hz=50.0)
    content = helpers_raw.published_raw(raw, onsets)
    return [pickled(content, 2), pickled(content, 4), _np_saved(content)]


CAPTIONS = {"training_images/00001_train1/train1_1.png": "a wet dog, running", "test1": "ein Öl"}


def _captions_json(folder: Path) -> list[bytes]:
    builders.write_pictures(folder, training=2, images=1, test=1)
    return [json.dumps(CAPTIONS, ensure_ascii=plain).encode() for plain in (True, False)]


def _captions_csv(folder: Path) -> list[bytes]:
    builders.write_pictures(folder, training=2, images=1, test=1)
    lines = [f'{key},"{text}"' for key, text in CAPTIONS.items()]
    whole = "\r\n".join(["picture,caption", *lines, ""])
    return [whole.encode(), whole.encode("utf-8-sig"), whole.replace(",", "\t").encode()]


def _events(folder: Path) -> list[bytes]:
    builders.write_pictures(folder, training=2, images=1, test=1)
    rows = ["train1_1.png", "test_images/00001_test1/a.png", "n/a", "00002_train2\\train2_1.png"]
    tables = [
        [f"{kind}{by}stimulus{by}note"] + [f"{n}{by}{row}{by}x" for n, row in enumerate(rows)]
        for kind, by in (("onset", ","), ("sample", "\t"), ("marker", ";"))
    ]
    return ["\n".join(lines).encode() for lines in tables]


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pictures(_: Path) -> list[bytes]:
    y, x = np.mgrid[:24, :32] * 8
    rgb = Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    deep = Image.fromarray((x * 200).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    told = PngImagePlugin.PngInfo()
    told.add_text("Comment", "x" * 500, zip=True)
    told.add_itxt("Title", "ü" * 300, zip=True)
    more = {"exif": exif, "icc_profile": bytes(200)}
    return [
        _saved(rgb, "PNG", pnginfo=told, **more),
        _saved(rgb.convert("P"), "PNG", transparency=3),
        _saved(rgb.convert("RGBA"), "PNG"),
        _saved(deep, "PNG"),
        _saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]),
        _saved(rgb, "JPEG", **more),
        _saved(rgb, "JPEG", progressive=True),
        _saved(rgb.convert("CMYK"), "JPEG"),
        _saved(rgb.convert("L"), "JPEG"),
        _saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        _saved(rgb, "GIF"),
    ]


def _bank(folder: Path) -> list[bytes]:
    builders.write_pictures(folder, training=2, images=1, test=1)
    path = builders.write_bank(folder / "bank", folder) / "training.safetensors"
    return [path.read_bytes()]


def _checkpoint(folder: Path) -> list[bytes]:
    tensor = torch.arange(6.0).reshape(2, 3)
    state = {"step": 3, "optimiser": {"state": {0: {"exp_avg": tensor}}, "lr": [0.1]}}
    kept = Checkpoints(folder / "checkpoints")
    kept.save(3, {"weight": tensor}, {"options": {}}, state, best=True)
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    hostile = [pickled(item, 2) for item in _hostile()]
    return [(folder / "checkpoints/latest/state.pt").read_bytes(), old.getvalue(), *hostile]


def _config(_: Path) -> list[bytes]:
    content = {"data_path": "D", "epochs": 3, "channels": ["O1", "O2"], "low_level": True,
               "learning_rate": 1e-4, "time_window": [0.0, 0.5], "seed": 2}  # fmt: skip
    return [yaml.safe_dump(content).encode(), json.dumps({"options": content}).encode()]


def _run_folder(folder: Path) -> list[bytes]:
    write_json(folder / "inputs.json", {"a": "b"})
    return [json.dumps({"stage": "train", "options": {"epochs": 3}, "provenance": {}}).encode()]


def _journal(_: Path) -> list[bytes]:
    return [b"".join(json_line({"epoch": n, "loss": 0.5}).encode() for n in range(3))]


def _copy(folder: Path, suffix: str) -> list[bytes]:
    path = builders.write_published(folder / "sub-01" / "a.npy", builders.published(rows=2))
    eeg_files.open_recording(path, folder / "cache")
    (copy,) = (folder / "cache").glob(f"*{suffix}")
    copy.rename(folder / f"found{suffix}")
    (folder / f"found{suffix}").with_suffix(f"{suffix}.name").write_text(copy.name)
    return [(folder / f"found{suffix}").read_bytes()]


def _presets(_: Path) -> list[bytes]:
    paths = sorted((Path(injection_map.__file__).parents[1] / "configs/injection").glob("*.yaml"))
    return [path.read_bytes() for path in paths]


def _own(folder: Path) -> tuple[mne.io.BaseRaw, np.ndarray]:
    """Four pictures, their table, and a recording of them, to be saved in some format."""
    builders.write_pictures(folder, training=2, images=1, test=1)
    rows = ["1.5,train1_1.png", "3.0,train2_1.png", "4.5,00001_test1/a.png"]
    helpers_raw.write_events(folder / "t.csv", "onset,stimulus", rows)
    noise = np.eye(3) * 1e-6
    return helpers_raw.simulate([1, 2, 3], ("Fz", "Cz", "Pz"), noise, rate_hz=100.0)


def _edf(folder: Path) -> list[bytes]:
    raw, _ = _own(folder)
    kinds = ({}, {"pauses": {}}, {"note_text": "Öl".encode("latin-1")}, {"units": "mV"})
    return [helpers_raw.write_edf(folder / "e.edf", raw, **kind).read_bytes() for kind in kinds]


def _vhdr(folder: Path) -> list[bytes]:
    return [helpers_raw.write_brainvision(folder, *_own(folder)).read_bytes()]


def _vmrk(folder: Path) -> list[bytes]:
    _vhdr(folder)
    return [(folder / "a.vmrk").read_bytes()]


def _set(folder: Path) -> list[bytes]:
    raw, _ = _own(folder)
    places = np.array([(name,) for name in raw.ch_names], dtype=[("labels", object)])
    events = np.array([("boundary", 50.0), ("a", 70.0)], [("type", object), ("latency", float)])
    eeg = {
        "nbchan": 3.0, "trials": 1.0, "pnts": float(raw.n_times), "srate": 100.0, "xmin": 0.0,
        "xmax": raw.times[-1], "data": raw.get_data() * 1e6, "chanlocs": places, "event": events,
        "icawinv": [], "icaweights": [], "icasphere": [],
    }  # fmt: skip
    savemat(folder / "s.set", {"EEG": eeg}, appendmat=False)
    return [(folder / "s.set").read_bytes()]


def _fif(folder: Path) -> list[bytes]:
    raw, _ = _own(folder)
    raw.set_annotations(mne.Annotations([1.0, 2.0], [0.5, 0.0], ["BAD_x", "boundary"]))
    raw.save(folder / "f_raw.fif", verbose="error")
    return [(folder / "f_raw.fif").read_bytes()]


KNOWN_AND_NOT = ["train1_1.png", "train2_1.png", "a.png", "x"]


def _markers(folder: Path) -> list[bytes]:
    one = {"label": "stim_train", "value": 12, "startDatetime": "2024-11-05T10:00:00.5Z"}
    return [json.dumps({"Markers": [one, {**one, "label": "behav"}]}).encode()]


def _trials_table(folder: Path) -> list[bytes]:
    builders.write_picture(folder / "training_images" / "00001_a" / "nsd00012.png", 0)
    eeg = 1e-5 * np.random.default_rng(0).standard_normal((64, 5))
    rows = [{"EEG": eeg.tolist(), "subject_id": 1, "coco_id": 5, "73k_id": 12}] * 3
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return [(folder / "t.parquet").read_bytes()]


def _epochs(folder: Path) -> list[bytes]:
    """Four trials of three channels, of three pictures and of none."""
    builders.write_pictures(folder, training=2, images=1, test=1)
    info, names = mne.create_info(["Oz", "O1", "O2"], 100, "eeg"), KNOWN_AND_NOT
    when = np.c_[np.arange(4) * 30, np.zeros(4), np.arange(4) + 1].astype(int)
    codes = {name: place + 1 for place, name in enumerate(names)}
    eeg = 1e-6 * np.random.default_rng(0).standard_normal((4, 3, 20))
    cut = mne.EpochsArray(eeg, info, when, 0.0, codes, verbose="error")
    cut.save(folder / "e-epo.fif", verbose="error")
    return [(folder / "e-epo.fif").read_bytes()]


def _adapter(_: Path) -> list[bytes]:
    whole = io.BytesIO()
    torch.save({"image_proj": {"proj.weight": torch.zeros(4, 2)}, "ip_adapter": {}}, whole)
    return [whole.getvalue()]


# --- how they are read --------------------------------------------------------------------------


def _read_captions(path: Path) -> None:
    known = [*stimuli.list_stimuli(path.parent, "training")]
    read_captions(path, known)


def _read_events(path: Path) -> None:
    table = events.read_table(path)
    known = events.pictures_by_partition(path.parent)
    for event in table.shown:
        known.find(event, table)
        if table.kind != "marker":
            events.onset_of(event, table)


def _open_own(path: Path, header: str | None = None) -> None:
    """A recording whose table is good; then its events, gaps and some of its signal."""
    recording = path if header is None else path.with_name(header)
    known = events.pictures_by_partition(path.parent)
    recorded = OwnTake(recording, path.parent / "t.csv", known).open()
    with explained(recording):
        timeline.interruptions(recorded.raw)
        timeline.trigger_codes(recorded.raw)


def _open_table(path: Path) -> None:
    one = open_parquet(path, "sub-01", events.pictures_by_partition(path.parent))
    for number in range(len(one.shown)):
        one.trial(number)


def _open_epochs(path: Path) -> None:
    """Trials that are cut, all of which are read."""
    known = events.pictures_by_partition(path.parent)
    one = epochs_file.open_epochs(path, known)
    for number in range(len(one.shown)):
        one.trial(number)


def _read_picture(path: Path) -> None:
    width, height = pictures.picture_size(path)
    assert width * height <= pictures.MAX_PIXELS
    image = pictures.read_picture(path)
    assert image.mode == "RGB" and set(image.size) == {width, height}


def _resolve(path: Path) -> None:
    args.resolve("train", ["--clip_feature_path", "F", "--output_dir", "O", "--config", str(path)])


def _read_copy(path: Path) -> None:
    name = path.with_suffix(f"{path.suffix}.name").read_text()
    (path.parent / "cache" / name).write_bytes(path.read_bytes())
    source = path.parent / "sub-01" / "a.npy"
    eeg = eeg_files.open_recording(source, path.parent / "cache")
    eeg_files.select_signal(eeg, None)


def _check_run(path: Path) -> None:
    RunDirectory(path.parent, "train").check({"epochs": 3}, {"a": "b"}, ["epochs"])


READERS = {
    "published": Reader("a.npy", _published, things_eeg2.parse_published, programs()),
    "torch": Reader("t.pt", _torch, registry.parse, programs().map(_torch_zipped)),
    "neurobridge": Reader("n.npy", _neurobridge, registry.parse),
    "parquet": Reader(
        "experiment_metadata.parquet",
        _table,
        lambda p: registry.parse(p.with_name("preprocessed_eeg_test_flat.npy")),
    ),
    "blocks": Reader("b.pth", _blocks, read_blocks, programs().map(_torch_zipped)),
    "vectors": Reader("v.pt", _vectors, _read_vectors, programs().map(_torch_zipped)),
    "vectors.npy": Reader("v.npy", _array, _read_vectors),
    "raw": Reader("r.npy", _raw, lambda p: recordings.PublishedTake(p, "test").open(), programs()),
    "captions.json": Reader("c.json", _captions_json, _read_captions),
    "captions.csv": Reader("c.csv", _captions_csv, _read_captions),
    "events": Reader("e.tsv", _events, _read_events),
    "pictures": Reader("p.png", _pictures, _read_picture),
    "safetensors": Reader("bank/training.safetensors", _bank, load_tensors),
    "bank": Reader(
        "bank/training.safetensors", _bank, lambda p: feature_bank.open_bank(p.parent, "training")
    ),
    "checkpoint": Reader(
        "checkpoints/step-00000003/state.pt",
        _checkpoint,
        lambda p: Checkpoints(p.parent.parent).load(),
        programs(),
    ),
    "adapter.bin": Reader("a.bin", _adapter, _read_pickled, programs()),
    "config": Reader("c.yaml", _config, _resolve, errors=(SystemExit,)),
    "config.json": Reader("c.json", lambda f: _config(f)[::-1], _resolve, errors=(SystemExit,)),
    "json": Reader("a.json", _run_folder, read_json),
    "run": Reader("options.json", _run_folder, _check_run),
    "journal": Reader("a.jsonl", _journal, read_jsonl),
    "copy": Reader("found.npy", lambda folder: _copy(folder, ".npy"), _read_copy),
    "copy.json": Reader("found.json", lambda folder: _copy(folder, ".json"), _read_copy),
    "injection": Reader("i.yaml", _presets, lambda p: injection_map.load_injection(str(p))),
    "vhdr": Reader("a.vhdr", _vhdr, _open_own, sweeps=True),
    "vmrk": Reader("a.vmrk", _vmrk, lambda p: _open_own(p, "a.vhdr"), sweeps=True),
    "edf": Reader("a.edf", _edf, _open_own, sweeps=True),
    "set": Reader("a.set", _set, _open_own, slow=20, sweeps=True),
    "fif": Reader("a_raw.fif", _fif, _open_own, sweeps=True),
    "epochs": Reader("a-epo.fif", _epochs, _open_epochs, slow=2, sweeps=True),
    "recorder": Reader("m.json", _markers, alljoined_raw.recorder_marks),
    "epochs.parquet": Reader("a.parquet", _trials_table, _open_table),
}


@pytest.mark.parametrize("name", READERS)
def test_no_file_hurts(tmp_path, name, pytestconfig, monkeypatch, capsys):
    reader, watch, count = READERS[name], Watch(), pytestconfig.getoption("--fuzz")
    count = max(5, count // reader.slow)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "TRIAL_S", 1.0)
    seeds = reader.seeds(tmp_path)
    files = damaged(seeds) if reader.others is None else st.one_of(damaged(seeds), reader.others)
    path = tmp_path / reader.place

    def read(content: bytes) -> bool:
        path.write_bytes(content)
        with watched(tmp_path, watch):
            try:
                reader.read(path)
            except reader.errors as error:
                assert len(str(error)) < 20_000
                return False
        return True

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(files)
    def attempt(content: bytes) -> None:
        watch.accepted += read(content)
        if reader.sweeps and not watch.inputs % SWEPT:
            gc.collect()
        assert not (tmp_path / CANARY).exists(), "something was run"

    assert read(seeds[0]), "the file was refused before it was damaged"
    forget_peak()
    begin = peak_bytes()
    attempt()
    grown = peak_bytes() - begin
    with capsys.disabled():
        if count > 100:
            print(f"\n{name}: {watch}, {grown / 1e6:.0f} MB")
    assert grown < MOST_BYTES


def test_the_watch_would_bark(tmp_path):
    """What the fuzzed readers must never do is noticed."""
    for deed in (lambda: os.system("true"), lambda: open("/dev/full", "w").close()):
        with pytest.raises(AssertionError), watched(tmp_path, Watch()):
            deed()
    with pytest.raises(MemoryError), watched(tmp_path, Watch()):
        bytearray(6 * MOST_BYTES)
