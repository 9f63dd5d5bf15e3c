"""Stage 0 on THINGS-EEG2's layout: published values, known responses, options, resuming."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from pathlib import Path

import mne
import numpy as np
import pytest
import scipy.linalg
from helpers_preprocess import NOISE, read, run
from helpers_raw import (
    RATE_HZ,
    published_raw,
    response,
    session_file,
    shuffled_codes,
    simulate,
    write_raw,
    write_subject,
)
from sklearn.discriminant_analysis import _cov
from sklearn.utils import shuffle

import args
from datafiles import pickles, stimuli
from datafiles.eeg_files import eeg_file, is_simulated
from preprocessing import quality, sessions, whitening
from preprocessing.channels import POSTERIOR, THINGS_CHANNELS
from preprocessing.sessions import extract

SEED = 20200220


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> Path:
    """DATA with one subject of two noisy sessions, preprocessed as published."""
    root = write_subject(tmp_path_factory.mktemp("noisy"), noise=NOISE)
    assert run(root) == 0
    return root


@pytest.fixture(autouse=True)
def no_figures(monkeypatch) -> None:
    """Drawing is two thirds of so small a run; test_preprocess.noisy draws for all."""
    monkeypatch.setattr(quality, "draw_quality", lambda *_: None)


# --- as published -------------------------------------------------------------------------------


def _reference_epochs(root: Path, session: int, partition: str, repetitions: int):
    """Trials [N, R, C, T] as the first implementation makes them: everything at once."""
    content = np.load(session_file(root, "sub-01", session, partition), allow_pickle=True).item()
    info = mne.create_info(content["ch_names"], content["sfreq"], content["ch_types"])
    raw = mne.io.RawArray(content["raw_eeg_data"], info, verbose="error")
    events = mne.find_events(raw, stim_channel="stim", verbose="error")
    raw.pick(list(THINGS_CHANNELS), verbose="error")
    raw.reorder_channels(list(THINGS_CHANNELS))
    events = events[events[:, 2] != 99999]
    epochs = mne.Epochs(
        raw, events, tmin=-0.2, tmax=1.0, baseline=(None, 0), preload=True, verbose="error"
    ).resample(250, verbose="error")
    data, codes = epochs.get_data(copy=False), epochs.events[:, 2]
    rows = [
        data[shuffle(np.where(codes == code)[0], random_state=SEED, n_samples=repetitions)]
        for code in np.unique(codes)
    ]
    return np.stack(rows)[..., 50:], epochs.times


def _reference_whitener(training: np.ndarray) -> np.ndarray:
    sigma = np.mean(
        [[_cov(trial.T, shrinkage="auto") for trial in trials] for trials in training], axis=(0, 1)
    )
    return scipy.linalg.fractional_matrix_power(sigma, -0.5)


def test_the_files_are_those_of_the_reference_method(noisy):
    merged: dict[str, list[np.ndarray]] = {"training": [], "test": []}
    for session in (1, 2):
        training, times = _reference_epochs(noisy, session, "training", 2)
        test, _ = _reference_epochs(noisy, session, "test", 20)
        matrix = _reference_whitener(training)
        for name, trials in (("training", training), ("test", test)):
            merged[name].append((trials.swapaxes(2, 3) @ matrix).swapaxes(2, 3))
    for name, recorded in merged.items():
        joined = np.concatenate(recorded, axis=1)
        joined = joined[:, shuffle(np.arange(joined.shape[1]), random_state=SEED)]
        eeg, channels, _ = read(noisy, name)
        assert eeg.shape == joined.shape and eeg.dtype == np.float64
        assert channels == list(THINGS_CHANNELS)
        np.testing.assert_allclose(eeg, joined, rtol=1e-7, atol=1e-9)
        content = pickles.read_pickled_dict(eeg_file(noisy, "sub-01", name))
        assert set(content) == {"preprocessed_eeg_data", "ch_names", "times"}
        np.testing.assert_array_equal(content["times"], times)
        assert len(times) == 300 and times[50] == 0


def test_the_file_is_a_plain_pickle_of_protocol_4(noisy):
    path = eeg_file(noisy, "sub-01", "test")
    assert path.read_bytes()[:2] == b"\x80\x04"
    plain = pickle.loads(path.read_bytes())
    assert type(plain["preprocessed_eeg_data"]) is np.ndarray
    assert plain["preprocessed_eeg_data"].flags.c_contiguous
    np.testing.assert_array_equal(plain["preprocessed_eeg_data"], read(noisy, "test")[0])
    assert plain["ch_names"] == list(THINGS_CHANNELS)


def test_covariance_is_scikit_learns():
    trial = np.random.default_rng(1).normal(size=(9, 40)) * np.arange(1, 10)[:, None]
    np.testing.assert_allclose(
        whitening.trial_covariance(trial), _cov(trial.T, shrinkage="auto"), rtol=1e-12
    )


def test_covariance_counts_conditions_alike_whatever_their_repetitions():
    weights = whitening.condition_weights(np.array([3, 3, 3, 1]))
    np.testing.assert_allclose(weights, [1 / 6, 1 / 6, 1 / 6, 1 / 2])


# --- what is known comes back -------------------------------------------------------------------


def test_known_responses_come_back(tmp_path):
    write_subject(tmp_path, sessions=1)
    assert run(tmp_path, "--no-whiten", sessions=1) == 0
    for partition, pictures in (("training", 4), ("test", 2)):
        eeg, _, times = read(tmp_path, partition)
        assert len(eeg) == pictures
        assert times == pytest.approx(np.arange(250) / 250)
        for picture in range(pictures):
            known = response(picture + 1, 63, np.asarray(times))
            close = np.abs(eeg[picture] - known).max() / np.abs(known).max()
            assert close < 0.02, "resampling rings a little at the half-sine's corners"


def test_whitened_noise_has_identity_covariance(tmp_path):
    draw = np.random.default_rng(3)
    correlated = np.eye(17) + 0.1 * draw.normal(size=(17, 17))
    mix = draw.uniform(1, 3, (17, 1)) * correlated * 1e-6  # channels differ in loudness, too
    write_subject(tmp_path, sessions=1, training=40, noise=mix, names=POSTERIOR, height_v=0)
    flags = ("--channels", "posterior", "--rate", RATE_HZ)
    assert run(tmp_path, *flags, sessions=1) == 0
    assert run(tmp_path, *flags, "--no-whiten", "--output_path", tmp_path / "raw", sessions=1) == 0

    def error(root: Path) -> float:
        """Distance of the noise's covariance from the identity, scale left out."""
        eeg = read(root, "test")[0]
        noise = eeg.transpose(2, 0, 1, 3).reshape(17, -1)
        sigma = np.cov(noise) * 17 / np.trace(np.cov(noise))
        return float(np.abs(sigma - np.eye(17)).max())

    assert error(tmp_path) < 0.1
    assert error(tmp_path / "raw") > 1
    assert read(tmp_path, "test")[0].std() == pytest.approx(1, abs=0.1)


def test_the_test_partition_does_not_whiten(tmp_path):
    """Louder noise in the test recording must not change how training trials are whitened."""
    results = []
    for loud in (1, 5):
        root = write_subject(tmp_path / str(loud), sessions=1, noise=NOISE)
        codes = shuffled_codes(2, 20, 5)
        raw, events = simulate(codes, THINGS_CHANNELS, NOISE * loud, 5)
        write_raw(session_file(root, "sub-01", 1, "test"), published_raw(raw, events))
        assert run(root, sessions=1) == 0
        results.append(read(root, "training")[0])
    np.testing.assert_array_equal(*results)


# --- options ------------------------------------------------------------------------------------


def test_options_change_what_they_say(tmp_path):
    noisy = write_subject(tmp_path, sessions=1, training=2, test=1, noise=NOISE)

    def made(name: str, *flags: object):
        out = ("--output_path", tmp_path / name)
        assert run(noisy, *out, "--no-whiten", *flags, sessions=1) == 0
        return read(tmp_path / name, "training")

    plain, _, times = made("plain")
    single, *_ = made("single", "--dtype", "float32", "--n_jobs", 2)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, plain, rtol=1e-5, atol=1e-12)
    average, *_ = made("average", "--reference", "average")
    np.testing.assert_allclose(average.mean(axis=2), 0, atol=1e-18)
    few, names, _ = made("few", "--channels", "posterior", "--reference", "cz")
    assert names == list(POSTERIOR) and len(names) == 17
    index = [THINGS_CHANNELS.index(name) for name in names]
    cz = plain[:, :, [THINGS_CHANNELS.index("Cz")]]
    np.testing.assert_allclose(few, plain[:, :, index] - cz, atol=1e-15)
    slow, _, slow_times = made("slow", "--rate", 100, "--epoch", -0.1, 0.4)
    assert slow.shape[-1] == 40
    assert slow_times == pytest.approx(np.arange(40) / 100)
    low, *_ = made("low", "--band_pass", 0, 20)
    power = np.abs(np.fft.rfft(low - low.mean(axis=-1, keepdims=True))) ** 2
    hertz = np.fft.rfftfreq(250, 1 / 250)
    before = np.abs(np.fft.rfft(plain - plain.mean(axis=-1, keepdims=True))) ** 2
    assert power[..., hertz > 40].mean() < 0.05 * before[..., hertz > 40].mean()
    assert len(times) == 250


def test_a_missing_channel_is_rebuilt_from_its_neighbours(tmp_path):
    """Smooth scalp activity, Cz left out: the spline finds it again."""
    from datafiles import electrodes

    at = electrodes.positions(THINGS_CHANNELS)
    wave = np.array([at[name][1] for name in THINGS_CHANNELS]) * 1e-4  # front to back
    names = [name for name in THINGS_CHANNELS if name != "Cz"]
    for partition, pictures, repetitions in (("training", 2, 2), ("test", 1, 20)):
        raw, events = simulate(shuffled_codes(pictures, repetitions, 1), names)
        shape = np.sin(np.arange(raw.n_times) / 20)
        kept = np.array([wave[THINGS_CHANNELS.index(name)] for name in names])
        raw._data[:] = kept[:, None] * shape
        write_raw(session_file(tmp_path, "sub-01", 1, partition), published_raw(raw, events))
    assert run(tmp_path, "--interpolate_missing", "--no-whiten", sessions=1) == 0
    eeg, channels, _ = read(tmp_path, "training")
    assert channels == list(THINGS_CHANNELS)
    around = eeg[:, :, [channels.index("FCz"), channels.index("CPz")]].mean(axis=2)
    rebuilt = eeg[:, :, channels.index("Cz")]
    largest = np.abs(eeg).max()
    assert np.abs(rebuilt - around).max() < 0.05 * largest
    text = (tmp_path / "Preprocessed_data_250Hz/sub-01/quality.md").read_text()
    assert "rebuilt Cz" in text


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--epoch", 0, 1), "must begin before the onset"),
        (("--band_pass", 30, 3), "LOW_HZ must be below HIGH_HZ"),
        (("--rate", 0), "a number > 0"),
        (("--events", "e.csv"), "name them with --raw"),
        (("--raw", "a", "b", "--events", "e.csv"), "one each"),
    ],
)
def test_flags_that_cannot_work_are_refused(capsys, flags, told):
    with pytest.raises(SystemExit) as stop:
        args.resolve("preprocess", ["--data_path", "D", *map(str, flags)])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_what_later_stages_would_refuse_is_refused_here(noisy, capsys):
    flags = ("--channels", "posterior", "--rate", 100)
    assert run(noisy, *flags) == 2
    assert "17 channels x 100 samples" in capsys.readouterr().err


# --- runs ---------------------------------------------------------------------------------------


def test_a_finished_subject_is_left_alone_and_other_options_are_refused(noisy, capsys):
    path = eeg_file(noisy, "sub-01", "training")
    before = path.stat().st_mtime_ns
    assert run(noisy, "--n_jobs", 2) == 0
    assert path.stat().st_mtime_ns == before
    assert "# sub-01" in capsys.readouterr().out
    assert run(noisy, "--rate", 200) == 2
    assert "--rate: 250.0 then, 200.0 now" in capsys.readouterr().err
    assert path.stat().st_mtime_ns == before


def test_what_a_researcher_looks_at(noisy):
    folder = noisy / "Preprocessed_data_250Hz" / "sub-01"
    text = (folder / "quality.md").read_text()
    assert text.count("2 target") == 4 and "| ses-02 | test |" in text
    assert (folder / "evoked.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((folder / "quality.json").read_text())
    assert [row["kept"] for row in rows] == [8, 40, 8, 40]
    assert not list(folder.glob("parts"))


def test_dry_run_writes_nothing(tmp_path, capsys):
    write_subject(tmp_path, sessions=1)
    assert run(tmp_path, "--dry_run", sessions=1) == 0
    assert "63 channels x 250 samples at 250 Hz" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["Raw_data"]


def test_an_interrupted_run_goes_on_and_makes_the_same_file(noisy, tmp_path, monkeypatch):
    """Killed in the second session: the first is not cut again, and the bytes are the same."""
    cut, calls = extract, []

    def killed(*given, **named):
        calls.append(given[-1])
        if len(calls) == 3:
            (tmp_path / "out/Preprocessed_data_250Hz/sub-01/parts/.left.tmp").touch()
            raise KeyboardInterrupt
        return cut(*given, **named)

    monkeypatch.setattr(sessions, "extract", killed)
    assert run(noisy, "--output_path", tmp_path / "out") == 130
    assert not list(tmp_path.rglob("preprocessed_eeg_*"))
    assert run(noisy, "--output_path", tmp_path / "out") == 0
    assert calls[3:] == ["sub-01 ses-02 training", "sub-01 ses-02 test"]
    for partition in stimuli.PARTITIONS:
        once, again = (
            eeg_file(root, "sub-01", partition).read_bytes() for root in (noisy, tmp_path / "out")
        )
        assert once == again
    assert not list(tmp_path.rglob("*.tmp"))


def test_published_files_are_never_overwritten(tmp_path, capsys):
    write_subject(tmp_path, sessions=1)
    folder = tmp_path / "Preprocessed_data_250Hz" / "sub-01"
    folder.mkdir(parents=True)
    (folder / "preprocessed_eeg_training.npy").write_bytes(b"downloaded")
    assert run(tmp_path, sessions=1) == 2
    assert "files that no run of this project wrote" in capsys.readouterr().err
    assert (folder / "preprocessed_eeg_training.npy").read_bytes() == b"downloaded"


def test_simulated_recordings_stay_called_simulated(tmp_path, capsys):
    write_subject(tmp_path, sessions=1)
    (tmp_path / "Raw_data/sub-01/simulated.json").write_text("{}")
    assert run(tmp_path, sessions=1) == 0
    assert "SIMULATED EEG" in capsys.readouterr().out
    assert is_simulated(tmp_path)


def test_the_slurm_script_processes_its_tasks_subject(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$ASKED"\n')
    python.chmod(0o755)
    asked = tmp_path / "asked"
    environment = os.environ | {
        "VENV": str(tmp_path),
        "ASKED": str(asked),
        "DATA": "/my data",
        "SUBJECTS": "sub-01 sub-02",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_CPUS_PER_TASK": "3",
        "PREPROCESS_FLAGS": "--dtype float32",
    }
    script = ["bash", "slurm/preprocess.sbatch"]
    root = Path(__file__).parents[2]
    subprocess.run(script, cwd=root, env=environment, check=True, capture_output=True)
    program, *tokens = asked.read_text().splitlines()
    values = args.resolve("preprocess", tokens).values
    assert program == "preprocess.py" and str(values.data_path) == "/my data"
    assert (values.subjects, values.n_jobs, values.dtype) == (["sub-02"], 3, "float32")
