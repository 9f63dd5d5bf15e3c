"""benchmarks/train.py at its smallest: both sides compute the same, the rows are written.

Nothing timed is asserted.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers_benchmarks import loaded
from torch import nn

from modalities import NAMES
from rundirs.files import read_json
from subject_layers.dropout import Dropout
from unet import PriorBank

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "train.py"
ROWS = (
    "prior_bank_step_b64", "prior_bank_step_b1024", "train_step_b64", "open_ten_subjects_seconds",
    "open_ten_subjects_rss_mb",
)  # fmt: skip
SMALL = {"DIM": 16, "CHANNELS": 4, "SAMPLES": 100, "LARGE": 8, "SOME_ROWS": 20, "CONCEPTS": 4}


@pytest.fixture(scope="module")
def benchmark():
    """With everything small but the layers' number."""
    with loaded(SCRIPT) as module, pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(module, name, value)
        patch.setattr(module, "GROWTH", (1,))
        patch.setattr(module, "machine", lambda: {"flops_per_s": 1e9, "bytes_per_s": 1e9})
        yield module


@torch.no_grad()
def test_the_baseline_is_five_networks_of_the_same_weights(benchmark):
    bank = PriorBank(16, 16).eval()
    five = benchmark.FivePriors(bank).eval()
    torch.manual_seed(0)
    x, t, cond = torch.randn(5, 3, 16), torch.randint(1000, (5, 3)), torch.randn(3, 16)
    ours = bank.priors(x, t, cond)
    for place, name in enumerate(NAMES):
        torch.testing.assert_close(ours[place], five.priors[name](x[place], t[place], cond))
    losses = five.losses(benchmark.random_targets(3), cond)
    assert losses.keys() == set(NAMES) and all(one.total > 0 for one in losses.values())


def test_the_baseline_has_pytorch_s_own_dropout(benchmark):
    plain = benchmark.with_plain_dropout(nn.Sequential(Dropout(0.3), nn.Sequential(Dropout(0.2))))
    kinds = [(type(part), part.p) for part in plain.modules() if hasattr(part, "p")]
    assert kinds == [(nn.Dropout, 0.3), (nn.Dropout, 0.2)]


def test_all_rows_are_written(benchmark, tmp_path, capsys):
    path = tmp_path / "train.json"
    words = ["--batch_size", "4", "--rounds", "2", "--subjects", "2", "--json", str(path)]
    assert benchmark.main(words) == 0
    found = read_json(path)
    assert tuple(found["rows"]) == ROWS and found["machine"]
    for name, row in found["rows"].items():
        assert {"ours", "baseline", "ratio", "unit", "n"} <= row.keys(), name
        assert row["ours"] > 0 and row["baseline"] > 0, name
    growth = found["rows"]["open_ten_subjects_seconds"]["growth"]
    assert list(growth) == [*benchmark.OTHER_FORMS, "1x subjects", "1x trials"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ROWS) and "floor" in printed


def test_only_the_rows_asked_for_are_made(benchmark, tmp_path):
    path = tmp_path / "train.json"
    words = ["--batch_size", "4", "--rounds", "2", "--rows", ROWS[0], "--json", str(path)]
    assert benchmark.main(words) == 0
    assert tuple(read_json(path)["rows"]) == ROWS[:1]
