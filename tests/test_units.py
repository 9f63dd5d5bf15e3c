"""Recordings in volts or tesla decode as whitened ones do; MEG goes through all stages."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Chain

import dataset
import evaluate
import generate
import report
import train
from datafiles import eeg_files, electrodes
from datafiles.eeg_files import Recording, Signal
from decoder.decoder import Decoder
from rundirs.files import read_json
from util import DataError

# some of THINGS-MEG's 271, of every lobe, with the system's number as in the recordings
SENSORS = [f"M{side}{lobe}1{n}-1609" for lobe in "FTCPO" for side in "LR" for n in (1, 2)]
TESLA = 1e-13
SUBJECT = "sub-01"


def contents(chain: Chain, scale: float, channels: list[str]) -> dict[str, dict[str, object]]:
    """{partition: a published dict} of a subject's first channels, renamed and in another unit."""
    found = {}
    for partition in ("training", "test"):
        file = eeg_files.eeg_file(chain.data, SUBJECT, partition)
        content = pickle.loads(file.read_bytes())
        eeg = content["preprocessed_eeg_data"][:, :, -len(channels) :]
        named = {"preprocessed_eeg_data": eeg * scale, "ch_names": channels}
        found[partition] = content | named
    return found


def write_world(root: Path, chain: Chain, scale: float, meg: bool = True) -> Path:
    """DATA with the tiny world's pictures and one subject in the form of THINGS-MEG or -EEG2."""
    for folder in ("training_images", "test_images"):
        shutil.copytree(chain.data / folder, root / folder)
    below = root / ("preprocessed_npy" if meg else "Preprocessed_data_250Hz") / SUBJECT
    below.mkdir(parents=True)
    names = {"training": "preprocessed_meg_training.pkl", "test": "preprocessed_meg_zs_test.pkl"}
    for partition, content in contents(chain, scale, SENSORS).items():
        if meg:
            content = {"meg_data": content.pop("preprocessed_eeg_data"), **content}
        name = names[partition] if meg else f"preprocessed_eeg_{partition}.npy"
        (below / name).write_bytes(pickle.dumps(content, protocol=4))
    return root


def trained(data: Path, chain: Chain, out: Path, *more: object) -> dict[str, object]:
    """The losses of a short training."""
    command = ["--data_path", data, "--clip_feature_path", chain.features, "--output_dir", out,
               "--epochs", 2, "--batch_size", 16, "--val_fraction", 0.2, "--device", "cpu",
               *more]  # fmt: skip
    assert train.main([str(word) for word in command]) == 0
    return Decoder.load(out, "best").signal


def scored(data: Path, chain: Chain, model: Path, out: Path, *more: object) -> dict[str, object]:
    command = ["--model_path", model, "--data_path", data, "--clip_feature_path", chain.features,
               "--output_dir", out, "--permutations", 5, "--prior_steps", 2, "--device", "cpu",
               *more]  # fmt: skip
    assert evaluate.main([str(word) for word in command]) == 0
    return read_json(out / "results.json")


@pytest.fixture(scope="module")
def meg(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("meg")
    write_world(root / "data", chain, TESLA)
    trained(root / "data", chain, root / "model")
    return root


def test_meg_goes_through_all_stages(meg: Path, chain: Chain, capsys) -> None:
    data, model = meg / "data", meg / "model"
    assert dataset.main(["--data_path", str(data)]) == 0
    told = capsys.readouterr().out
    assert "licence: CC0" in told and "known of this form: tesla" in told
    results = scored(data, chain, model, meg / "scores", "--occlusion", "channels", "--average", 1)
    parts = {(row["kind"], row["name"]) for row in results["occlusion"]["rows"]}
    assert {name for kind, name in parts if kind == "region"} == set(electrodes.REGIONS)
    assert {name for kind, name in parts if kind == "channel"} == set(SENSORS)
    drawn = chain.generate_flags(meg / "images", "--mode", "fused", "--max_stimuli", 1)
    changed = {"--eeg_data": data / "preprocessed_npy" / SUBJECT, "--model_path": model}
    for flag, value in changed.items():
        drawn[drawn.index(flag) + 1] = str(value)
    assert generate.main(drawn) == 0
    page = meg / "report.html"
    runs = [str(meg / name) for name in ("model", "images", "scores")]
    assert report.main(["--runs", *runs, "--data_path", str(data), "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "Scalp topography of the mean response; 20 channels, fT" in text
    assert "units of the file" not in text


@pytest.mark.parametrize("scale", [TESLA, 1e-5])
def test_the_unit_changes_nothing(meg: Path, chain: Chain, tmp_path: Path, scale: float) -> None:
    """A thousandth of what a network resolves, and the same scores: values are scaled first."""
    whole = write_world(tmp_path / "one", chain, 1.0, meg=False)
    small = write_world(tmp_path / "small", chain, scale, meg=False)
    signals = [trained(data, chain, data / "model") for data in (whole, small)]
    assert "scale" not in signals[0] and signals[1]["scale"] == pytest.approx(1 / scale)
    rows = [
        scored(data, chain, data / "model", data / "scores")["retrieval"][0]
        for data in (whole, small)
    ]
    for name in ("top1", "top5", "mrr"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-6)


def test_a_model_refuses_recordings_of_another_unit(meg: Path, chain: Chain, tmp_path) -> None:
    volts = write_world(tmp_path / "volts", chain, 1e-5)
    command = ["--model_path", meg / "model", "--data_path", volts, "--device", "cpu",
               "--clip_feature_path", chain.features, "--output_dir", tmp_path / "s"]  # fmt: skip
    assert evaluate.main([str(word) for word in command]) == 1
    assert not (tmp_path / "s").exists()
    other = tmp_path / "volts" / "preprocessed_npy"
    (other / SUBJECT).rename(other / "sub-02")
    adapt = ["--adapt_from", meg / "model", "--subjects", "sub-02", "--data_path", volts,
             "--clip_feature_path", chain.features, "--output_dir", tmp_path / "m",
             "--epochs", 1, "--val_fraction", 0, "--device", "cpu"]  # fmt: skip
    assert train.main([str(word) for word in adapt]) == 2


def recording(deviation: float, name: str = "a") -> tuple[Recording, Signal]:
    eeg = np.random.default_rng(0).normal(0, deviation, (6, 2, 3, 20)).astype(np.float32)
    channels, times = ["Fz", "Cz", "Oz"], [i / 100 for i in range(20)]
    return Recording(eeg, channels, times, "", Path(name)), Signal(channels, times, [0, 1, 2], 0)


def test_scales_are_powers_of_ten_for_what_is_small_alone() -> None:
    for deviation, expected in ((1.0, 1), (0.05, 1), (30, 1), (1.2e-5, 1e5), (2e-13, 1e13)):
        item, signal = recording(deviation)
        assert eeg_files.common_scale([item], [signal]) == pytest.approx(expected)
    (volts, a), (whitened, b) = recording(1e-5, "volts"), recording(1.0, "whitened")
    with pytest.raises(DataError, match=r"1e-05 in volts|of one unit"):
        eeg_files.common_scale([volts, whitened], [a, b])
    assert eeg_files.common_scale([recording(0.0)[0]], [a]) == 1  # nothing to go by


def test_sensors_of_ctf_have_lobes_and_places() -> None:
    assert electrodes.is_meg(SENSORS) and not electrodes.is_meg(["Fz", "Cz", "MLC11"])
    assert electrodes.regions_of(SENSORS).keys() == electrodes.REGIONS.keys()
    places = electrodes.sensor_places([*SENSORS, "MEG001"])
    assert list(places) == SENSORS
    for name, (x, y) in places.items():
        assert np.hypot(x, y) <= 1.001 * electrodes.HEAD_M
        assert (x < 0) == (name[1] == "L"), name
    front, back = (np.mean([at[1] for n, at in places.items() if n[2] == lobe]) for lobe in "FO")
    assert front > 0 > back
