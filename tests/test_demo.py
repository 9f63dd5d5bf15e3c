"""The demo speaks the public command lines."""

from __future__ import annotations

import pytest

import args
import demo

PROGRAM_STAGE = {program.split()[-1]: stage for stage, program in args._PROGRAMS.items()}


SCALES = {False: demo.FULL, True: demo.QUICK}


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_of_the_demo_parses(quick: bool, tmp_path) -> None:
    stages = []
    for _, command in demo.plan_of(tmp_path, seed=3, scale=SCALES[quick]):
        words = command[1:] if command[0] == "-m" else command
        stages.append(PROGRAM_STAGE[words[0]])
        args.resolve(stages[-1], words[1:])
    assert stages == ["world", "features", "train", *["generate"] * 3, "evaluate"]


def test_the_seed_reaches_every_stage_that_draws(tmp_path) -> None:
    for _, command in demo.plan_of(tmp_path, seed=3, scale=demo.QUICK):
        stage = PROGRAM_STAGE[command[1] if command[0] == "-m" else command[0]]
        if "seed" in args.STAGES[stage]().actions():
            assert command[command.index("--seed") + 1] == "3"


def test_no_stage_of_the_demo_sees_an_oracle(tmp_path) -> None:
    for _, command in demo.plan_of(tmp_path, seed=0, scale=demo.FULL):
        assert "oracle" not in command


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys) -> None:
    assert demo.main(["--output_path", str(tmp_path / "out"), "--dry_run"]) == 0
    assert capsys.readouterr().out.count("python ") == 7
    assert not (tmp_path / "out").exists()


def test_a_failing_stage_stops_the_demo_with_its_exit_code(tmp_path, capsys) -> None:
    (tmp_path / "out" / "world").mkdir(parents=True)
    (tmp_path / "out" / "world" / "mine.txt").write_text("not a run")
    assert demo.main(["--output_path", str(tmp_path / "out"), "--quick"]) == 2
    assert "stopped" in capsys.readouterr().err
