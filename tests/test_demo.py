"""The demo speaks the public command lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import args
import demo
import util
from cli.parser import _PROGRAMS
from rundirs.files import read_json

PROGRAM_STAGE = {program.split()[-1]: stage for stage, program in _PROGRAMS.items()}


SCALES = {False: demo.FULL, True: demo.QUICK}


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_of_the_demo_parses(quick: bool, tmp_path) -> None:
    stages = []
    for _, command in demo.plan_of(tmp_path, seed=3, scale=SCALES[quick]):
        words = command[1:] if command[0] == "-m" else command
        stages.append(PROGRAM_STAGE[words[0]])
        args.resolve(stages[-1], words[1:])
    assert stages == ["world", "features", "train", *["generate"] * 3, "evaluate", "report"]


def test_the_seed_reaches_every_stage_that_draws(tmp_path) -> None:
    for _, command in demo.plan_of(tmp_path, seed=3, scale=demo.QUICK):
        stage = PROGRAM_STAGE[command[1] if command[0] == "-m" else command[0]]
        if "seed" in args.STAGES[stage]().actions():
            assert command[command.index("--seed") + 1] == "3"


def test_given_flags_replace_the_demos_own(tmp_path) -> None:
    _, (_, *trained) = demo.training(tmp_path, 0, demo.QUICK, "other", epochs=1)
    _, (_, *drawn) = demo.drawing(tmp_path, 0, 2, "other", "fused", guidance=2.0)
    assert trained.count("--epochs") == drawn.count("--guidance") == 1
    values = args.resolve("train", trained).values
    assert (values.epochs, values.output_dir) == (1, tmp_path / "other")
    assert args.resolve("generate", drawn).values.guidance == 2.0


def test_no_stage_of_the_demo_sees_an_oracle(tmp_path) -> None:
    for _, command in demo.plan_of(tmp_path, seed=0, scale=demo.FULL):
        assert "oracle" not in command


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys) -> None:
    assert demo.main(["--output_path", str(tmp_path / "out"), "--dry_run"]) == 0
    assert capsys.readouterr().out.count("python ") == 8
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of `demo.py --quick`, run as a user does."""
    out = tmp_path_factory.mktemp("quick") / "out"
    command = [sys.executable, "demo.py", "--quick", "--output_path", str(out)]
    done = subprocess.run(
        command,
        cwd=util.CHECKOUT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_the_quick_demo_decodes_simulated_eeg(quick_demo) -> None:
    results = read_json(quick_demo[0] / "scores" / "results.json")
    row = next(row for row in results["retrieval"] if row["query"] == "encoder -> image")
    assert row["n"] == demo.QUICK.test_concepts
    assert row["top1_interval"][0] > row["top1_shuffled_range"][1]


def test_the_quick_demo_ends_with_pictures_tables_and_the_next_command(quick_demo) -> None:
    out, printed = quick_demo
    assert (out / "images" / "overview.png").exists()
    assert len(list(out.glob("images/*/sheet.png"))) == demo.QUICK.drawn
    table = (out / "scores" / "judge.md").read_text(encoding="utf-8")
    assert table in printed and "SIMULATED" in printed
    for row in ("| fused |", "| fused, shuffled_eeg |", "| fused, true_embedding |"):
        assert row in table
    assert printed.rstrip().splitlines()[-1].strip().startswith("python generate.py")
    page = (out / demo.REPORT).read_text(encoding="utf-8")
    assert str(out / demo.REPORT) in printed and "SIMULATED" in page


def test_the_quick_demo_scores_its_controls_and_explains_its_encoder(quick_demo) -> None:
    results = read_json(quick_demo[0] / "scores" / "results.json")
    fused = {
        row["control"]: row["scores"] for row in results["pictures"] if row["recipe"] == "fused"
    }
    assert set(fused) == {None, *demo.DRAWN_CONTROLS}
    for scores in fused.values():
        assert {"pixcorr", "ssim", "lite0", "lite0_distance"} <= set(scores)
    ceiling, shuffled = (
        fused[name]["ssim"]["value"] for name in ("true_embedding", "shuffled_eeg")
    )
    assert ceiling > shuffled
    kinds = {row["kind"] for row in results["occlusion"]["rows"]}
    assert kinds == {"channel", "region", "window"}


def test_a_failing_stage_stops_the_demo_with_its_exit_code(tmp_path, capsys) -> None:
    (tmp_path / "out" / "world").mkdir(parents=True)
    (tmp_path / "out" / "world" / "mine.txt").write_text("not a run")
    assert demo.main(["--output_path", str(tmp_path / "out"), "--quick"]) == 2
    assert "stopped" in capsys.readouterr().err


def test_the_rest_is_told_at_the_pace_so_far() -> None:
    """Never faster than measured: a second call answers at once, and then begins to work."""
    seconds = (20, 40, 120, 60)
    assert demo.time_left(seconds, 0, 0.0) == "about 4 min left"
    assert demo.time_left(seconds, 2, 120.0) == "about 6 min left"
    assert demo.time_left(seconds, 2, 1.0) == "about 3 min left"
    assert demo.time_left(seconds, 3, 180.0) == "about 60 s left"
    for scale in (demo.FULL, demo.QUICK):
        assert len(scale.seconds) == len(demo.plan_of(Path("out"), 0, scale))
