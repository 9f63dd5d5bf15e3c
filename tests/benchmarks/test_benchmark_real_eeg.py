"""benchmarks/real_eeg.py: it learns what generalises over people, and honestly fails to otherwise.

The recordings are SIMULATED, in the layout of the real file, which is tried where it is at hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers_benchmarks import loaded

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "real_eeg.py"


@pytest.fixture(scope="module")
def benchmark():
    with loaded(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """15 people x 3 categories x 6 channels x 90 samples at 80 Hz, amplitudes that differ."""
    draw = np.random.default_rng(0)
    signal = draw.standard_normal((1, 3, 6, 90))
    amplitude = draw.uniform(0.2, 4.0, (15, 1, 1, 1))
    eeg = amplitude * (signal + 2 * draw.standard_normal((15, 3, 6, 90)))
    path = tmp_path_factory.mktemp("erps") / "erps.npz"
    np.savez(
        path,
        eeg=eeg.astype(np.float32),
        category=np.array(["animal", "food", "tool"]),
        ch_names=np.array(["Fz", "Pz", "O1", "Oz", "O2", "POz"]),
        times=np.arange(-8, 82) / 80,
    )
    return path


def test_it_is_cut_to_the_first_second_and_scaled(benchmark, simulated) -> None:
    erps = benchmark.read_erps(simulated)
    assert erps.eeg.shape == (15, 3, 6, 80) and erps.eeg.dtype == np.float32
    assert (erps.times[0], erps.times[-1]) == (0.0, pytest.approx(79 / 80))
    assert np.allclose(erps.eeg.std(axis=(2, 3)), 1.0, atol=1e-4)


def test_every_person_is_left_out_once_and_never_trained_on_then(benchmark) -> None:
    pairs = list(benchmark.folds(30, seed=3))
    assert sorted(np.concatenate([left_out for _, left_out in pairs]).tolist()) == list(range(30))
    for training, left_out in pairs:
        assert sorted([*training, *left_out]) == list(range(30))


def test_labels_are_permuted_within_each_person(benchmark, simulated) -> None:
    eeg = benchmark.read_erps(simulated).eeg
    shuffled = benchmark.permuted(eeg, seed=0)
    assert np.array_equal(np.sort(eeg, axis=1), np.sort(shuffled, axis=1))
    moved = (eeg != shuffled).any(axis=(2, 3))
    assert moved.mean() > 0.3


def test_ridge_is_its_primal_formula(benchmark, simulated) -> None:
    eeg = benchmark.read_erps(simulated).eeg.astype(float)
    fit, new = eeg[:10], eeg[10:]
    mean, deviation = fit.mean((0, 1)), fit.std((0, 1))
    x, y = (((rows - mean) / deviation).reshape(-1, 480) for rows in (fit, new))
    truth = np.tile(np.eye(3), (10, 1)) - 1 / 3
    weights = np.linalg.solve(x.T @ x + 50.0 * np.eye(480), x.T @ truth)
    expected = (y @ weights).argmax(1).reshape(5, 3)
    assert np.array_equal(benchmark.ridge(fit, new, "standardised", 50.0), expected)


def test_small_run_above_chance_with_controls_at_it(benchmark, simulated, tmp_path, capsys) -> None:
    written = tmp_path / "rows.json"
    flags = ["--data", str(simulated), "--json", str(written), "--epochs", "3"]
    assert benchmark.main([*flags, "--encoders", "EEGProject", "NICE"]) == 0
    rows = json.loads(written.read_text())["rows"]
    assert list(rows) == ["ridge", "EEGProject", "NICE"]
    for row in rows.values():
        assert row["low"] <= row["value"] <= row["high"] and (row["n"], row["seed"]) == (15, 0)
    for name in ("ridge", "EEGProject"):
        assert rows[name]["low"] > rows[name]["control"] + 0.3 > 1 / 3
    assert rows["ridge"]["above_ridge"] == 0.0
    told = capsys.readouterr().out
    assert "erps.npz: 15 people x 3 categories" in told and "| EEGProject | " in told


def test_missing_and_other_files_are_refused(benchmark, tmp_path, capsys) -> None:
    assert benchmark.main(["--data", str(tmp_path / "none.npz")]) == 1
    assert "none.npz" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", eeg=np.zeros(3))
    assert benchmark.main(["--data", str(tmp_path / "other.npz")]) == 1
    assert "category" in capsys.readouterr().err
    (tmp_path / "torn.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:100])
    assert benchmark.main(["--data", str(tmp_path / "torn.npz")]) == 1
    assert benchmark.main(["--data", "none.npz", "--encoders", "ATM"]) == 2


def test_ridge_on_the_real_file(benchmark) -> None:
    from test_real_data import DATA

    file = DATA / "things_eeg1" / "things_eeg1_category_erp.npz"
    if not file.exists():
        pytest.skip(f"no {file}: real EEG is not distributed")
    erps = benchmark.read_erps(file)
    assert erps.eeg.shape == (30, 5, 63, 250)
    found = [
        (benchmark.ridge(erps.eeg[fit], erps.eeg[out], "standardised", 1e4) == range(5)).mean()
        for fit, out in benchmark.folds(30, seed=0)
    ]
    assert 0.65 < np.mean(found) < 0.9
