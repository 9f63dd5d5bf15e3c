"""benchmarks/quality.py: every knob is a command that its stage accepts, and changes something."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers_benchmarks import loaded

import args
import demo

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "quality.py"


def settled(command: tuple[str, list[str]]) -> dict[str, object]:
    """The flags' values as the stage settles them; exits where it refuses."""
    stage, *words = command[1]
    return vars(args.resolve(Path(stage).stem, words).values)


@pytest.mark.parametrize("of", ["train", "generate"])
def test_every_knob_is_a_command_unlike_the_demo_s(of: str) -> None:
    out = Path("O")
    with loaded(SCRIPT) as quality:
        made = {
            "train": [demo.training(out, 0, demo.FULL, "m", **more)
                      for more in ({}, *quality.TRAINING_KNOBS.values())],
            "generate": [demo.drawing(out, 0, 4, "d", "fused", **more)
                         for more in ({}, *quality.KNOBS.values())],
        }[of]  # fmt: skip
    values = [settled(command) for command in made]
    assert all(one not in values[:place] for place, one in enumerate(values))


def test_the_rules_of_shares_are_commands_that_differ_in_the_rule_alone() -> None:
    with loaded(SCRIPT) as quality:
        made = [
            settled(demo.drawing(Path("O"), 0, 4, "d", "separate", injection=rule))
            for rule in quality.RULES
        ]
    assert [name for name in made[0] if made[0][name] != made[1][name]] == ["injection"]
