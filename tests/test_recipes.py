"""Published settings as configs: each runs on the tiny world and sets what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import Chain

import args
import train
from rundirs.files import read_json

RECIPES = sorted(Path(train.__file__).with_name("configs").joinpath("recipes").glob("*.yaml"))


def test_all_are_there_and_name_their_source_and_what_is_not_kept() -> None:
    assert {recipe.stem for recipe in RECIPES} == {"atm", "ubp", "nice", "cogcap", "neurobridge"}
    for recipe in RECIPES:
        text = recipe.read_text(encoding="utf-8")
        assert "github.com/" in text and "# Features: " in text and "# Not kept: " in text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_trains_by_its_settings(recipe: Path, chain: Chain, tmp_path: Path) -> None:
    command = chain.train_flags(tmp_path)
    base = [word for word in command[: command.index("--epochs")] if word != str(tmp_path)]
    base = [*base[: base.index("--output_dir")], "--config", str(recipe), "--device", "cpu"]
    wanted = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    given = vars(args.resolve("train", [*base, "--output_dir", "OUT"]).values)
    assert {name: given[name] for name in wanted} == wanted
    small = ("--epochs", "1", "--batch_size", "16", "--val_fraction", "0.2")
    out = tmp_path / "model"
    assert train.main([*base, *small, "--output_dir", str(out)]) == 0
    trained = read_json(out / "options.json")["options"]
    assert {name: trained[name] for name in wanted if f"--{name}" not in small} == {
        name: value for name, value in wanted.items() if f"--{name}" not in small
    }
    assert (out / "checkpoints" / "best" / "model.safetensors").is_file()
