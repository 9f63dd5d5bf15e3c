"""args: defaults < config < command line, each value checked alike and knowing its origin."""

from __future__ import annotations

import json

import pytest
import yaml

import args
from rundirs.directory import RunDirectory

TRAIN = ["--data_path", "D", "--clip_feature_path", "F", "--output_dir", "O"]
FEATURES = ["--data_path", "D", "--output_path", "O"]
GENERATE = [
    *("--eeg_data", "E", "--model_path", "M", "--sd_model_path", "S"),
    *("--ip_adapter_path", "I", "--output_dir", "O"),
]
EVALUATE = ["--data_path", "D", "--output_dir", "O", "--images", "I"]
MINIMAL = {
    "check": ["--data_path", "D"],
    "preprocess": ["--data_path", "D"],
    "features": FEATURES,
    "train": TRAIN,
    "retrieval": TRAIN,
    "generate": GENERATE,
    "evaluate": EVALUATE,
    "report": ["--runs", "R"],
    "world": ["--output_path", "W"],
    "pretrain": ["--output_path", "P"],
    "demo": [],
}


def _config(tmp_path, content, name="c.yaml"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return ["--config", str(path)]


def _refused(capsys, stage, tokens):
    """The message of a refusal with exit code 2 that printed nothing to stdout."""
    with pytest.raises(SystemExit) as stop:
        args.resolve(stage, tokens)
    assert stop.value.code == 2
    told = capsys.readouterr()
    assert not told.out
    return told.err


# --- where a value comes from -------------------------------------------------------------------


def test_precedence_and_provenance(tmp_path):
    config = _config(tmp_path, {"epochs": 7, "seed": 5})
    options = args.resolve("train", [*TRAIN, *config, "--seed", "9"])
    values, origin = options.values, options.provenance
    assert (values.batch_size, values.epochs, values.seed) == (16, 7, 9)
    assert origin["batch_size"] == "default"
    assert origin["epochs"] == f"config {tmp_path / 'c.yaml'}"
    assert origin["seed"] == "command line"
    assert origin.keys() == vars(values).keys()


def test_the_command_line_wins_even_with_the_default_value(tmp_path):
    config = _config(tmp_path, {"epochs": 7, "val_fraction": 0.2})
    options = args.resolve("train", ["--epochs", "100", *config, *TRAIN])
    assert (options.values.epochs, options.values.val_fraction) == (100, 0.2)
    assert options.provenance["epochs"] == "command line"


@pytest.mark.parametrize("name", ["c.yaml", "c.json"])
def test_required_flags_may_come_from_the_config(tmp_path, name):
    content = {"data_path": "D", "clip_feature_path": "F", "output_dir": "O", "learning_rate": 2e-5}
    values = args.resolve("train", _config(tmp_path, json.dumps(content), name)).values
    assert (str(values.data_path), values.learning_rate) == ("D", 2e-5)


def test_missing_required_flags_are_all_named(tmp_path, capsys):
    told = _refused(capsys, "train", _config(tmp_path, {"data_path": "D"}))
    assert "--clip_feature_path" in told
    assert "--output_dir" in told
    assert "--data_path" not in told


def test_every_stage_resolves_and_records_its_options():
    assert MINIMAL.keys() == args.STAGES.keys()
    for stage, tokens in MINIMAL.items():
        options = args.resolve(stage, tokens)
        assert options.stage == stage
        assert set(options.fixed) <= options.recorded().keys()
        assert not {"config", "dry_run", "print_config"} & options.recorded().keys()


def test_what_determines_the_result_is_fixed_and_where_it_lies_is_not():
    fixed = args.resolve("train", TRAIN).fixed
    assert {"epochs", "learning_rate", "seed", "trials", "channels", "val_fraction"} <= set(fixed)
    assert not {"device", "data_path", "output_dir", "epochs_per_call", "cache_dir"} & set(fixed)
    fixed = args.resolve("generate", GENERATE).fixed
    assert {"mode", "seed", "injection", "guidance", "prompt_source"} <= set(fixed)
    assert not {"shard", "batch_size", "device"} & set(fixed)
    fixed = args.resolve("features", FEATURES).fixed
    assert {"precision", "shard_size", "superpixel_size", "target_blur"} <= set(fixed)
    assert not {"shard", "batch_size", "num_workers", "device"} & set(fixed)


# --- misspelt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--epoch", "--epochs_", "--epoch=3"])
def test_a_misspelt_flag_gets_a_suggestion(capsys, flag):
    assert "did you mean --epochs?" in _refused(capsys, "train", [*TRAIN, flag, "3"])


def test_a_misspelt_config_key_gets_a_suggestion(tmp_path, capsys):
    told = _refused(capsys, "train", [*TRAIN, *_config(tmp_path, {"learning_rat": 1})])
    assert "c.yaml" in told
    assert "unknown option learning_rat; did you mean learning_rate?" in told


def test_a_flag_of_another_stage_is_unknown(capsys):
    assert "unknown option --mode" in _refused(capsys, "train", [*TRAIN, "--mode", "fused"])


def test_abbreviations_are_refused(capsys):
    told = _refused(capsys, "train", [*TRAIN, "--learning", "1e-3"])
    assert "unknown option --learning" in told
    assert "--no-dry" in _refused(capsys, "train", [*TRAIN, "--no-dry"])


def test_a_stray_word_is_refused(capsys):
    assert "stray" in _refused(capsys, "train", [*TRAIN, "stray"])


# --- values -------------------------------------------------------------------------------------

WRONG = [
    ("train", "epochs", "2.5"),
    ("train", "epochs", "0"),
    ("train", "epochs", "many"),
    ("train", "seed", "-1"),
    ("train", "seed", "1" + "0" * 400 + ".0"),
    ("train", "learning_rate", "0"),
    ("train", "learning_rate", "nan"),
    ("train", "learning_rate", "inf"),
    ("train", "condition_dropout", "1.5"),
    ("train", "val_fraction", "1"),
    ("train", "trials", "avarage"),
    ("generate", "mode", "fuesd"),
    ("generate", "size", "770"),
    ("generate", "size", "0"),
    ("generate", "shard", "0/3"),
    ("generate", "shard", "4/3"),
    ("generate", "shard", "1"),
    ("generate", "shard", "a/b"),
    ("generate", "shard", "1/2/3"),
    ("generate", "shard", "-1/3"),
    ("features", "shard_size", "0"),
    ("features", "shard", "3/2"),
    ("features", "precision", "fp16"),
]


@pytest.mark.parametrize(("stage", "name", "value"), WRONG)
def test_wrong_values_are_refused_on_the_command_line_and_in_a_config(
    tmp_path, capsys, stage, name, value
):
    told = _refused(capsys, stage, [*MINIMAL[stage], f"--{name}={value}"])
    assert f"--{name}" in told
    config = _config(tmp_path, f"{name}: {value}\n")
    assert f"--{name}" in _refused(capsys, stage, [*MINIMAL[stage], *config])


def test_whole_numbers_may_be_huge():
    assert args.resolve("train", [*TRAIN, "--seed", "9" * 400]).values.seed == int("9" * 400)


@pytest.mark.parametrize("value", ["1/1", "2/3", "10/10"])
def test_shards(value):
    assert args.resolve("generate", [*GENERATE, "--shard", value]).values.shard == value


def test_values_arrive_typed(tmp_path):
    content = {"channels": ["O1", "Pz"], "time_window": [-0.2, 0.5], "subjects": "sub-08"}
    values = args.resolve("train", [*TRAIN, *_config(tmp_path, content)]).values
    assert (values.channels, values.time_window) == (["O1", "Pz"], [-0.2, 0.5])
    assert values.subjects == ["sub-08"]


def test_null_in_a_config_means_the_default(tmp_path):
    config = _config(tmp_path, {"epochs": None, "channels": None})
    options = args.resolve("train", [*TRAIN, *config])
    assert (options.values.epochs, options.values.channels) == (100, None)
    assert options.provenance["epochs"] == "default"


def test_a_text_that_looks_like_a_flag_is_a_text_in_a_config(tmp_path):
    config = _config(tmp_path, {"prompt": "--not a flag"})
    assert args.resolve("generate", [*GENERATE, *config]).values.prompt == "--not a flag"


@pytest.mark.parametrize("window", [("0.5", "0.5"), ("0.6", "0.1")])
def test_a_window_must_run_forwards(tmp_path, capsys, window):
    assert "start" in _refused(capsys, "train", [*TRAIN, "--time_window", *window])
    config = _config(tmp_path, {"time_window": [float(second) for second in window]})
    assert "start" in _refused(capsys, "train", [*TRAIN, *config])
    assert "--time_window" in _refused(capsys, "train", [*TRAIN, "--time_window", "0.1"])


@pytest.mark.parametrize(
    "text", ["a picture", "{}", "{concept} {style}", "{{concept}}", "{concept", "{concept.x}"]
)
def test_a_template_must_hold_the_concept_and_be_fillable(capsys, text):
    told = _refused(capsys, "features", [*FEATURES, "--text_template", text])
    assert "--text_template" in told
    assert "{concept}" in told


def test_a_good_template_passes():
    text = "a photo of {concept}, yes {concept}"
    values = args.resolve("features", [*FEATURES, "--text_template", text]).values
    assert values.text_template == text


@pytest.mark.parametrize(
    ("tokens", "missing"),
    [
        ([], "--model_path"),
        (["--model_path", "M", "--data_path", "D"], "--clip_feature_path"),
        (["--model_path", "M", "--clip_feature_path", "F"], "--data_path"),
        (["--images", "I"], "--truth"),
        (["--model_path", "M", "--clip_feature_path", "F", "--data_path", "D",
          "--control_images", "C"], "--images"),
        (["--images", "I", "--truth", "T", "--occlusion", "time"], "--model_path"),
        (["--images", "I", "--compare", "A", "B"], "--compare"),
    ],
)  # fmt: skip
def test_evaluate_needs_something_to_score(capsys, tokens, missing):
    assert missing in _refused(capsys, "evaluate", ["--output_dir", "O", *tokens])


MODEL = ["--model_path", "M", "--clip_feature_path", "F", "--data_path", "D"]


@pytest.mark.parametrize(
    ("stage", "tokens", "idle"),
    [
        ("evaluate", ["--images", "I", "--truth", "T", "--control", "noise_eeg"], "--control"),
        ("evaluate", ["--images", "I", "--truth", "T", "--subjects", "sub-01"], "--subjects"),
        ("evaluate", ["--images", "I", "--truth", "T", "--permutations", "9"], "--permutations"),
        ("evaluate", [*MODEL, "--truth", "T"], "--truth"),
        ("evaluate", [*MODEL, "--weights_dir", "W"], "--weights_dir"),
        ("evaluate", [*MODEL, "--protocol", "braindiffuser"], "--protocol"),
        ("generate", ["--sweep", "sites", "--injection", "uniform"], "--injection"),
        ("generate", ["--sweep", "sites", "--fusion_weights", "validated"], "--fusion_weights"),
        ("generate", ["--sweep", "scale", "--fusion_strength", "0.5"], "--fusion_strength"),
        ("generate", ["--sweep", "modality", "--mode", "all"], "--mode"),
        ("generate", ["--init_strength", "0.5"], "--init_strength"),
        ("generate", ["--guidance", "1", "--negative_prompt", "x"], "--negative_prompt"),
        ("generate", ["--guidance", "0", "--guidance_interval", "0", ".5"], "--guidance_interval"),
        ("generate", ["--prompt_source", "oracle", "--prompt", "x"], "--prompt"),
        ("generate", ["--prompt_source", "decoded"], "--prompt_source"),
        ("generate", ["--prompt_concepts", "3"], "--prompt_concepts"),
        ("train", ["--mask_span", "9"], "--mask_span"),
        ("train", ["--patience", "3"], "--patience"),
        ("train", ["--epochs", "auto", "--schedule", "cosine"], "--schedule"),
        ("train", ["--epochs", "auto", "--patience", "3", "--val_every", "5"], "--patience"),
        ("train", ["--contrast_weight", "0", "--text_contrast", "0.5"], "--text_contrast"),
        ("train", ["--aligner", "none", "--aligner_skip", "off"], "--aligner_skip"),
        ("train", ["--aligner", "mlp", "--noise_draws", "2"], "--noise_draws"),
        ("train", ["--aligner", "none", "--condition_dropout", "0.3"], "--condition_dropout"),
    ],
)
def test_flags_that_do_nothing_are_refused(capsys, stage, tokens, idle):
    needed = {"evaluate": ["--output_dir", "O"], "generate": GENERATE, "train": TRAIN}[stage]
    assert f"error: {idle} " in _refused(capsys, stage, [*needed, *tokens])


@pytest.mark.parametrize("control", ["mean_embedding", "true_embedding"])
def test_a_control_without_eeg_takes_no_confidence_from_it(capsys, control):
    tokens = [*GENERATE, "--control", control, "--clip_feature_path", "F", "--fusion_weights"]
    assert "read from the EEG" in _refused(capsys, "generate", [*tokens, "confidence"])
    assert args.resolve("generate", [*tokens, "validated"]).values.control == control


def test_other_systems_pictures_and_comparisons_need_no_data_folder():
    for tokens in (["--images", "I", "--truth", "T"], ["--compare", "A", "B"]):
        assert args.resolve("evaluate", ["--output_dir", "O", *tokens]).values.data_path is None


# --- presets ------------------------------------------------------------------------------------


def test_a_preset_sets_what_was_not_given():
    options = args.resolve("generate", [*GENERATE, "--preset", "turbo", "--steps", "2"])
    values = options.values
    assert (values.steps, values.guidance, values.size) == (2, 0.0, 512)
    assert values.timestep_spacing == "trailing"
    assert options.provenance["steps"] == "command line"
    assert options.provenance["guidance"] == "default of --preset turbo"
    plain = args.resolve("generate", GENERATE).values
    assert (plain.steps, plain.guidance, plain.size, plain.scheduler) == (30, 5.0, 768, None)


@pytest.mark.parametrize("preset", args.MODEL_PRESETS)
def test_presets_name_flags_and_schedulers_that_exist(preset):
    import diffusers

    assert args.MODEL_PRESETS[preset].keys() <= args.STAGES["generate"]().actions().keys()
    scheduler = args.MODEL_PRESETS[preset].get("scheduler")
    assert scheduler is None or hasattr(diffusers, scheduler)


def test_a_batch_size_is_a_number_or_auto(capsys):
    for text, found in (("8", 8), ("auto", "auto")):
        values = args.resolve("generate", [*GENERATE, "--batch_size", text]).values
        assert values.batch_size == found
    assert "--batch_size" in _refused(capsys, "generate", [*GENERATE, "--batch_size", "most"])


@pytest.mark.parametrize(
    "tokens", [["--guidance_interval", "0.8", "0.2"], ["--init_strength", "0"], ["--sweep", "all"]]
)
def test_drawing_options_that_cannot_work_are_refused(capsys, tokens):
    assert tokens[0] in _refused(capsys, "generate", [*GENERATE, *tokens])


# --- switches -----------------------------------------------------------------------------------


def test_switches_go_both_ways(tmp_path):
    def saved(*tokens):
        return args.resolve("features", [*FEATURES, *tokens]).values.save_superpixels

    on = _config(tmp_path, {"save_superpixels": True}, "on.yaml")
    off = _config(tmp_path, {"save_superpixels": False}, "off.yaml")
    assert [saved(), saved("--save_superpixels"), saved(*on), saved(*off)] == [0, 1, 1, 0]
    origin = args.resolve("features", [*FEATURES, *off]).provenance["save_superpixels"]
    assert origin == f"config {off[1]}"
    assert saved(*on, "--no-save_superpixels") is False
    assert saved(*off, "--save_superpixels") is True


@pytest.mark.parametrize("value", ['"yes"', "1", '"false"', "[true]"])
def test_a_switch_in_a_config_is_true_or_false(tmp_path, capsys, value):
    told = _refused(capsys, "train", [*TRAIN, *_config(tmp_path, f"dry_run: {value}\n")])
    assert "dry_run" in told
    assert "true or false" in told


def test_a_switch_takes_no_value(capsys):
    assert "--dry_run" in _refused(capsys, "train", [*TRAIN, "--dry_run=False"])


# --- config files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("- epochs\n", "list"),
        ("", "NoneType"),
        ("epochs: [1\n", "not YAML"),
        ("epochs: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("config: other.yaml\n", "unknown option config"),
        ("help: true\n", "unknown option help"),
        ("epochs: [1, 2]\n", "unknown option 2"),
    ],
)
def test_odd_config_files_are_refused(tmp_path, capsys, content, told):
    assert told in _refused(capsys, "train", [*TRAIN, *_config(tmp_path, content)])


def test_absent_and_damaged_config_files_are_named(tmp_path, capsys):
    none = str(tmp_path / "none.yaml")
    assert "none.yaml" in _refused(capsys, "train", [*TRAIN, "--config", none])
    assert "Is a directory" in _refused(capsys, "train", [*TRAIN, "--config", str(tmp_path)])
    (tmp_path / "c.json").write_text("{")
    damaged = ["--config", str(tmp_path / "c.json")]
    assert "c.json: not YAML or JSON" in _refused(capsys, "train", [*TRAIN, *damaged])


CHANGED = ["--epochs", "3", "--channels", "O1", "Pz", "--time_window", "-0.1", "0.5"]


def test_a_runs_options_json_is_a_config(tmp_path):
    first = args.resolve("train", [*TRAIN, *CHANGED, "--learning_rate", "1e-5", "--dry_run"])
    run = RunDirectory(tmp_path / "run", "train")
    run.start(first.recorded(), first.provenance, {}, first.fixed)
    second = args.resolve("train", ["--config", str(run.path / "options.json")])
    assert second.recorded() == first.recorded()
    assert second.values.dry_run is False
    run.check(second.recorded(), {}, second.fixed)


@pytest.mark.parametrize("stage", MINIMAL)
def test_print_config_round_trips(tmp_path, capsys, stage):
    extra = CHANGED if stage == "train" else ["--prompt", 'a "ü" # 1'] * (stage == "generate")
    tokens = [*MINIMAL[stage], *extra]
    with pytest.raises(SystemExit) as stop:
        args.resolve(stage, [*tokens, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    expected = args.resolve(stage, tokens).recorded()
    assert yaml.safe_load(printed).keys() == expected.keys()
    assert "# command line" in printed or not tokens
    again = args.resolve(stage, _config(tmp_path, printed))
    assert again.recorded() == expected


def test_print_config_shows_where_values_come_from(tmp_path, capsys):
    config = _config(tmp_path, {"seed": 4})
    with pytest.raises(SystemExit):
        args.resolve("train", [*TRAIN, *config, "--epochs", "2", "--print_config"])
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["epochs"].endswith("# command line")
    assert lines["seed"].endswith(f"# config {tmp_path / 'c.yaml'}")
    assert lines["batch_size"].endswith("# default")


def test_help_names_every_flag_with_its_default(capsys):
    for stage in args.STAGES:
        with pytest.raises(SystemExit) as stop:
            args.resolve(stage, ["--help"])
        assert stop.value.code == 0
        told = capsys.readouterr().out
        for name, action in args.STAGES[stage]().actions().items():
            assert f"--{name}" in told
            if isinstance(action.default, int | float) and not isinstance(action.default, bool):
                assert f"(default: {action.default})" in " ".join(told.split())
        assert "example:" in told


@pytest.mark.parametrize(
    "content, told",
    [
        ("seed: 1\nepochs: " + "[" * 5000, "brackets"),
        ("a: &a 1\nchannels: [" + "*a, " * 21 + "]\n", "aliases"),
        ("channels: [[O1], [O2]]", "nested values"),
        ("seed: {a: 1}", "nested values"),
        ("seed: !!python/object/apply:os.system ['true']", "not YAML"),
        ("- " * 5000, "not YAML"),
        ("seed: 2001-99-99", "not YAML"),
    ],
)
def test_a_config_cannot_hurt(tmp_path, capsys, content, told):
    assert told in _refused(capsys, "train", [*TRAIN, *_config(tmp_path, content)])
