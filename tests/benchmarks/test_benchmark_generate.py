"""benchmarks/generate.py at its smallest: the routes draw the same pictures, the rows are written.

Nothing timed is asserted.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_benchmarks import loaded

from modalities import recipes
from rundirs.files import read_json
from sdxl.attention import InjectedAttention

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "generate.py"
ROWS = (
    "mode_all_vs_published", "mode_all_vs_stock_batched", "adapter_parameters", "peak_memory",
    "ip_attention_b2_n4096", "ip_attention_b2_n1024", "ip_attention_b8_n1024",
)  # fmt: skip
SMALL = ["--stimuli", "2", "--steps", "2", "--size", "64", "--repeats", "1", "--batch_size", "5"]


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module; its name is taken by the stage."""
    with loaded(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def written(benchmark, tmp_path_factory):
    """What a small run writes. Its processes for memory run in this one, attention has 8 rows."""
    path = tmp_path_factory.mktemp("benchmark") / "generate.json"

    run = subprocess.run

    def in_this_process(command, **named):
        if command[:2] != [sys.executable, str(SCRIPT)]:
            return run(command, **named)  # git, for the environment
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert benchmark.main(command[2:]) == 0
        return SimpleNamespace(stdout=out.getvalue())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.subprocess, "run", in_this_process)
        patch.setattr(benchmark, "ATTENTION", dict.fromkeys(benchmark.ATTENTION, (2, 8, 64, 2)))
        patch.setattr(benchmark, "ATTENTION_ROUNDS", 2)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for tensors this small, others only wait for one another
        assert benchmark.main([*SMALL, "--json", str(path)]) == 0
        torch.set_num_threads(threads)
    return read_json(path)


def test_every_row_of_the_contract_is_written(written):
    assert tuple(written["rows"]) == ROWS
    assert {"versions", "commit", "command"} <= written.keys()
    for row in written["rows"].values():
        assert {"ours", "baseline", "ratio", "unit", "n"} <= row.keys()
        assert row["ours"] > 0 and row["baseline"] > 0 and row["n"] >= 1


def test_all_routes_draw_the_same_pictures(benchmark, written):
    for name in ROWS[:2]:
        row = written["rows"][name]
        assert row["pictures"] == 2 * len(recipes("all"))
        assert row["largest_difference_of_255"] <= benchmark.LEVELS_APART
    for name in ROWS[4:]:
        assert written["rows"][name]["largest_difference"] < 1e-4


def test_parameters_are_a_fifth(written):
    assert written["rows"]["adapter_parameters"]["ratio"] == 0.2


def test_shares_add_up(written):
    row = written["rows"]["mode_all_vs_published"]
    for shares in (row["ours_shares"], row["ours_unet_parts"]):
        assert sum(shares.values()) == pytest.approx(1)


def test_other_pictures_end_the_run(benchmark):
    black = {(0, "fused"): np.zeros((2, 2, 3), np.uint8)}
    grey = {(0, "fused"): np.full((2, 2, 3), benchmark.LEVELS_APART + 1, np.uint8)}
    assert benchmark.levels_apart({"ours": black, "stock": black}) == 0
    with pytest.raises(SystemExit, match="stock and ours draw other pictures"):
        benchmark.levels_apart({"ours": black, "stock": grey})
    with pytest.raises(SystemExit, match="stock drew 0 pictures"):
        benchmark.levels_apart({"ours": black, "stock": {}})


def test_other_attention_ends_the_run(benchmark, monkeypatch):
    monkeypatch.setattr(InjectedAttention, "injected", lambda self, q: torch.zeros_like(q))
    with pytest.raises(SystemExit, match="differs from diffusers'"):
        benchmark.ip_attention(2, 8, 64, 2, rounds=1, seed=0)


def test_sides_take_turns(benchmark):
    turns = []

    def unit(name, number):
        return lambda: turns.append(name) or {(number, name): None}

    sides = {name: [unit(name, i) for i in range(n)] for name, n in (("a", 4), ("b", 2))}
    _, drawn = benchmark.interleaved(sides)
    assert turns == ["a", "b", "a", "a", "b", "a"]
    assert len(drawn["a"]) == 4 and len(drawn["b"]) == 2


@pytest.mark.parametrize("flags", ["--guidance 1", "--size 100", "--stimuli 0", "--stim 2"])
def test_wrong_flags_are_refused(benchmark, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse(flags.split())
    assert stop.value.code == 2 and capsys.readouterr().err
