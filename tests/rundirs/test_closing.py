"""What a stage says last: where, how long, and a next command that works as it stands."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import args
import evaluate
import train
from cli.parser import _PROGRAMS
from rundirs.closing import IN_CHAIN, call, in_words, tell_end


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"),
     (7500, "2 h 05 min")],
)  # fmt: skip
def test_times_are_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_paths_are_quoted_and_flags_without_a_value_left_out(capsys) -> None:
    command = call("train.py", data_path=Path("my data"), output_dir=None, runs=("a", "b"))
    tell_end({"model": Path("m")}, [command])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "model: m" and told[1].startswith("took: ")
    assert told[2] == "next: python train.py --data_path 'my data' --runs a b"


def test_within_a_chain_nothing_else_is_next(capsys, monkeypatch) -> None:
    monkeypatch.setenv(IN_CHAIN, "1")
    tell_end({"model": Path("m")}, [call("train.py")])
    assert "next:" not in capsys.readouterr().out


def following(told: str) -> list[list[str]]:
    lines = [line.removeprefix("next: ") for line in told.splitlines() if line.startswith("next:")]
    return [shlex.split(line) for line in lines]


def test_what_comes_next_has_the_user_s_own_paths(chain, tmp_path, capsys) -> None:
    """Each command parses; that of evaluate.py runs, and says which page to make."""
    assert train.main(chain.train_flags(tmp_path / "run", "--epochs", 1)) == 0
    found = following(capsys.readouterr().out)
    program_stage = {program: stage for stage, program in _PROGRAMS.items()}
    for _, program, *flags in found:
        args.resolve(program_stage[program], flags)
    _, _, *scoring = found[1]
    fast = ["--permutations", "3", "--prior_steps", "2", "--device", "cpu"]
    assert evaluate.main([*scoring, *fast]) == 0
    assert (tmp_path / "scores" / "table.md").exists()
    (report,) = following(capsys.readouterr().out)
    run, scores = str(tmp_path / "run"), str(tmp_path / "scores")
    assert report == ["python", "report.py", "--runs", run, scores]
