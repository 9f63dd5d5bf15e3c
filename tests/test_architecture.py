"""The rules of the code base, read from its syntax trees and from fresh interpreters."""

from __future__ import annotations

import ast
import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import args
import modalities
from sdxl import injection_map

ROOT = Path(__file__).resolve().parents[1]
# Who may import whom: each room of the house, and what it may read. Rooms on one floor stay apart
# unless they are named here.
FLOOR = {"modalities", "masking", "metrics", "util", "subject_layers"}
GROUND = FLOOR | {"rundirs", "cli", "args", "unet", "loss"}
DATA = GROUND | {"datafiles", "dataset", "features", "sdxl"}
MODEL = DATA | {"decoder"}
STAGES = {
    "preprocess": {"preprocessing"},
    "clip_feature_extractor": {"features"},
    "train": {"training"},
    "ATMS_retrieval": {"training"},
    "generate": {"generation"},
    "evaluate": {"evaluation"},
    "report": {"reporting"},
}
MAY_IMPORT: dict[str, set[str]] = {
    "modalities": set(),
    "masking": set(),
    "metrics": set(),
    "util": set(),
    "subject_layers": {"util"},
    "rundirs": {"util", "modalities"},
    "cli": {"modalities", "rundirs"},
    "args": {"modalities", "cli"},
    "loss": FLOOR,
    "unet": FLOOR | {"loss"},
    "datafiles": FLOOR | {"rundirs"},
    "sdxl": FLOOR | {"rundirs"},
    "features": FLOOR | {"rundirs", "datafiles"},
    "dataset": FLOOR | {"rundirs", "args", "datafiles"},
    "decoder": MODEL - {"args", "cli", "sdxl", "features"},
    "training": MODEL - {"sdxl", "features"},
    "generation": MODEL - {"args", "cli", "features"},
    "evaluation": MODEL - {"args", "cli", "sdxl", "features"},
    "preprocessing": FLOOR | {"rundirs", "datafiles"},
    "reporting": MODEL,
    "miniworld": MODEL | {"training"},
    **{stage: MODEL | own for stage, own in STAGES.items()},
    "demo": MODEL | {"miniworld"},
}
PACKAGES = tuple(sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))
PROGRAMS = {stage: stage_parser().prog for stage, stage_parser in args.STAGES.items()}


def _sources() -> list[Path]:
    """Every module of the project, without tests and benchmarks."""
    inside = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    return sorted(ROOT.glob("*.py")) + inside


def _everything() -> list[Path]:
    return _sources() + sorted((ROOT / "benchmarks").glob("*.py"))


def _module(path: Path) -> str:
    """The room: of the file, or of its package."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _imports(tree: ast.AST) -> set[str]:
    """Top-level names that a tree imports, wherever in it: functions and TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def _calls(path: Path) -> list[tuple[str, ast.Call]]:
    """(dotted name as written, call) of every call in a file."""
    calls = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in calls]


def _where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def _keyword(call: ast.Call, name: str) -> object:
    for keyword in call.keywords:
        if keyword.arg == name and isinstance(keyword.value, ast.Constant):
            return keyword.value.value
    return None


# --- who may import whom ------------------------------------------------------------------------


def _forbidden(room: str, tree: ast.AST) -> set[str]:
    """Rooms that a file of this one imports and may not."""
    return (_imports(tree) & MAY_IMPORT.keys()) - MAY_IMPORT[room] - {room}


def test_every_room_is_in_the_table():
    assert {_module(path) for path in _sources()} == MAY_IMPORT.keys()


def test_the_table_has_one_direction():
    """Rooms can be put into an order in which each reads earlier ones only."""
    left = dict(MAY_IMPORT)
    while left:
        free = {room for room, read in left.items() if not (read - {room}) & left.keys()}
        assert free, f"in a circle: {sorted(left)}"
        left = {room: read for room, read in left.items() if room not in free}


def test_imports_follow_the_table():
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _sources()
        for name in sorted(_forbidden(_module(path), _tree(path)))
    ]
    assert found == []


def test_relative_imports_cannot_leave_a_package():
    for path in _sources():
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and path.parent.name in PACKAGES, _where(path, node)


def test_nothing_is_imported_by_a_computed_name():
    names = ("__import__", "importlib.import_module", "import_module", "exec", "eval")
    found = [
        _where(path, call) for path in _sources() for name, call in _calls(path) if name in names
    ]
    assert found == []


def test_the_rules_would_see_a_hidden_import():
    hidden = "def f():\n    from generate import draw\nif TYPE_CHECKING:\n    import train.x\n"
    assert _forbidden("unet", ast.parse(hidden)) == {"generate", "train"}


def test_the_registry_is_standard_library_only():
    assert _imports(_tree(ROOT / "modalities.py")) <= sys.stdlib_module_names
    light = sys.stdlib_module_names | {"yaml", "modalities", "cli", "rundirs"}
    for path in (ROOT / "args.py", *(ROOT / "cli").glob("*.py")):
        assert _imports(_tree(path)) <= light


# --- patterns that are not written here ---------------------------------------------------------


def test_flags_are_declared_in_args_only():
    found = [
        _where(path, call)
        for path in _sources()
        for name, call in _calls(path)
        if name.endswith("add_argument") or name.endswith("ArgumentParser")
    ]
    assert [place for place in found if not place.startswith(("args.py:", "cli/parser.py:"))] == []


def test_no_bool_flags():
    found = [
        _where(path, call)
        for path in _everything()
        for _, call in _calls(path)
        for keyword in call.keywords
        if keyword.arg == "type" and ast.unparse(keyword.value) == "bool"
    ]
    assert found == []


AROUND_READERS = ("hints.py",)  # of preprocessing: MNE's readers raise anything


def _raises_from_it(handler: ast.ExceptHandler) -> bool:
    """All that it does is to raise an error of ours, with the other as its cause."""
    (step,) = handler.body if len(handler.body) == 1 else (None,)
    return (
        isinstance(step, ast.Raise) and ast.unparse(step.cause or ast.Constant(0)) == handler.name
    )


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    """A bare or blanket handler; BaseException is allowed where it cleans up and raises again."""
    caught = ast.unparse(handler.type).strip("()").split(", ") if handler.type else [""]
    if "BaseException" in caught:
        last = handler.body[-1]
        return not (isinstance(last, ast.Raise) and last.exc is None)
    return "Exception" in caught or "" in caught


def test_no_blanket_handlers():
    found = [
        _where(path, node)
        for path in _everything()
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ExceptHandler)
        and _catches_everything(node)
        and not (path.name in AROUND_READERS and _raises_from_it(node))
    ]
    found += [
        _where(path, call)
        for path in _everything()
        for name, call in _calls(path)
        if name.endswith("suppress")
        and {ast.unparse(item) for item in call.args} & {"Exception", "BaseException"}
    ]
    assert found == []


def test_no_file_is_unpickled_freely():
    unsafe = []
    for path in _everything():
        for name, call in _calls(path):
            if name == "torch.load" and _keyword(call, "weights_only") is not True:
                unsafe.append(_where(path, call))
            if name in ("pickle.load", "pickle.loads", "joblib.load"):
                unsafe.append(_where(path, call))
            if any(keyword.arg == "allow_pickle" for keyword in call.keywords):
                unsafe += [_where(path, call)] * (_keyword(call, "allow_pickle") is not False)
    assert unsafe == []


# --- scripts answer before torch is loaded ------------------------------------------------------

_ASK = """
import contextlib, io, json, runpy, sys
program, cases = json.loads(sys.argv[1])
answers = []
for tokens in cases:
    sys.argv, out, err, code = [program, *tokens], io.StringIO(), io.StringIO(), None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if program.startswith("-m "):
                runpy.run_module(program[3:], run_name="__main__")
            else:
                runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    answers.append([code, out.getvalue(), err.getvalue()])
heavy = sorted({"torch", "numpy", "diffusers", "open_clip", "skimage"} & set(sys.modules))
print(json.dumps([answers, heavy]))
"""


def _fresh(code: str, *tokens: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *tokens],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _required(stage: str) -> list[str]:
    tokens = ["--images", "I", "--truth", "T"] if stage == "evaluate" else []
    for name, action in args.STAGES[stage]().actions().items():
        tokens += [f"--{name}", "X"] if action.required else []
    return tokens


@pytest.mark.parametrize("stage", args.STAGES)
def test_quick_questions_cost_no_torch(stage, tmp_path):
    program = PROGRAMS[stage].removeprefix("python ")
    script = program if program.startswith("-m ") else str(ROOT / program)
    cases = [["--help"], [*_required(stage), "--print_config"], [*_required(stage), "--sed", "1"]]
    done = _fresh(_ASK, json.dumps([script, cases]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (helped, printed, refused), heavy = json.loads(done.stdout)
    assert helped[0] == 0 and helped[1].startswith(f"usage: {PROGRAMS[stage]}")
    assert printed[0] == 0 and "# default" in printed[1]
    assert refused[0] == 2 and "unknown option --sed" in refused[2]
    assert heavy == []
    assert not list(tmp_path.iterdir())


# --- importing does nothing ---------------------------------------------------------------------

_IMPORT = """
import importlib, os, sys
names, root = sys.argv[1].split(","), sys.argv[2] + os.sep
sys.argv = ["program", "--no_such_flag"]
opened = []
def watch(event, given):
    if event == "open" and isinstance(given[0], str) and given[0].startswith(root):
        if ".venv" not in given[0] and not given[0].endswith((".py", ".pyc")):
            if ".pyc." not in given[0]:  # Python writes its own caches that way
                opened.append(given[0])
sys.addaudithook(watch)
for name in names:
    importlib.import_module(name)
heavy = {"open_clip", "diffusers", "transformers", "skimage", "mne", "matplotlib", "lpips"}
assert not opened, f"files opened: {opened}"
assert not heavy & set(sys.modules), f"heavy imports: {sorted(heavy & set(sys.modules))}"
"""


def test_importing_any_module_does_nothing(tmp_path):
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in _sources()]
    names = [name.removesuffix(".__init__") for name in names]
    done = _fresh(_IMPORT, ",".join(names), str(ROOT), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# --- what users were promised -------------------------------------------------------------------

COMMANDS = r"""
python clip_feature_extractor.py --data_path DATA --output_path OUT/clip_features --batch_size 32
python train.py    --data_path DATA --clip_feature_path OUT/clip_features --output_dir OUT/model \
                   --epochs 100 --batch_size 16 --learning_rate 1e-4
python generate.py --eeg_data EEG --model_path OUT/model --sd_model_path sd_xl_base_1.0.safetensors \
                   --ip_adapter_path ip-adapter_sdxl_vit-h.safetensors --output_dir OUT/images --mode all
"""  # noqa: E501 - verbatim


def _commands() -> list[list[str]]:
    return [shlex.split(line) for line in COMMANDS.replace("\\\n", " ").strip().splitlines()]


@pytest.mark.parametrize("command", _commands(), ids=lambda command: command[1])
def test_the_users_commands_parse_as_written(command):
    stage = {program: stage for stage, program in PROGRAMS.items()}[command[1]]
    options = args.resolve(stage, command[2:])
    typed = command[2:]
    for flag, value in zip(typed[::2], typed[1::2], strict=True):
        found = getattr(options.values, flag.removeprefix("--"))
        assert str(found) == value or found == float(value)
        assert options.provenance[flag.removeprefix("--")] == "command line"


def test_every_stage_has_its_script_and_main():
    for program in PROGRAMS.values():
        module = program.removeprefix("python -m ").removesuffix(".py").replace(".", "/")
        package = (ROOT / module).is_dir() and program.startswith("python")
        path = ROOT / (f"{module}/__main__.py" if package else f"{module}.py")
        assert "main" in {getattr(node, "name", "") for node in _tree(path).body}


def test_the_entry_points_are_documented_and_wired():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme and "make test" in readme
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\ndemo:" in makefile and "\ntest:" in makefile
    ci = ROOT / ".ci" / "run"
    assert "make test" in ci.read_text(encoding="utf-8").splitlines()
    assert os.access(ci, os.X_OK)


def _presets() -> list[str]:
    return ["intent", *sorted(path.stem for path in (ROOT / "configs/injection").glob("*.yaml"))]


@pytest.mark.parametrize("preset", _presets())
def test_injection_presets_load_and_reach_a_layer(preset):
    assert preset in args.STAGES["generate"]().actions()["injection"].help
    loaded = injection_map.load_injection(preset)
    layers = injection_map.sdxl_layers()
    assert len(layers) == 70
    total = sum(loaded.scale(name, layer) for name in modalities.NAMES for layer in layers)
    assert total > 0


def _listed(text: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return sorted(line for line in lines if line)


def test_the_dependencies_are_those_that_are_installed():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("dependencies = [", 1)[1].split("]\n", 1)[0]
    stated = [name.strip().strip(",").strip('"') for name in _listed(block)]
    assert stated == _listed((ROOT / "requirements.txt").read_text(encoding="utf-8"))


ROOT_MODULES = {
    *(program for program in PROGRAMS.values() if program.endswith(".py")),
    *(
        f"{name}.py"
        for name in ("args", "loss", "masking", "metrics", "modalities", "unet", "util")
    ),
}


def test_the_root_holds_the_users_names_and_the_stages_only():
    assert {path.name for path in ROOT.glob("*.py")} == ROOT_MODULES


LONGEST_FILE = 500
LONGER = {"args.py": 750}  # flags: data, not logic


def test_files_are_short():
    found = []
    for path in _sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        name = path.relative_to(ROOT).as_posix()
        if lines > LONGER.get(name, LONGEST_FILE):
            found.append(f"{name}: {lines} lines")
    assert found == []


LONGEST_FUNCTION, MOST_PARAMETERS = 40, 8


def _functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(_tree(path)) if isinstance(node, kinds)]


def test_functions_are_short_and_take_few_parameters():
    found = []
    for path in _sources():
        for function in _functions(path):
            name = f"{path.relative_to(ROOT).as_posix()}:{function.name}"
            taken = len(_parameters(function))
            lines = function.end_lineno - function.lineno + 1
            if lines > LONGEST_FUNCTION or taken > MOST_PARAMETERS:
                found.append(f"{name}: {lines} lines, {taken} parameters")
    assert found == []


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return function.args.posonlyargs + function.args.args + function.args.kwonlyargs


# They begin a run, as the scripts do; all else gets a dataclass of its part: Options.settings.
OPENERS = {
    "rundirs/directory.py:open_run",
    "training/loop.py:train",
    "training/processes.py:open_together",
}


def _takes_flags(parameter: ast.arg) -> str:
    """``namespace`` for argparse's, ``options`` for what holds it, "" for anything else."""
    kind = ast.unparse(parameter.annotation) if parameter.annotation else ""
    if kind in ("Options", "Resolved"):
        return "options"
    named = parameter.arg in ("values", "options", "flags", "namespace") and kind in ("", "Any")
    return "namespace" if named or "Namespace" in kind else ""


def test_the_namespace_ends_at_main_and_the_opener():
    scripts = set(PROGRAMS.values())
    found = []
    for path in _sources():
        file = path.relative_to(ROOT).as_posix()
        for function in _functions(path) if file != "args.py" and _module(path) != "cli" else ():
            opener = file in scripts or f"{file}:{function.name}" in OPENERS
            kinds = {_takes_flags(parameter) for parameter in _parameters(function)} - {""}
            if kinds - ({"options"} if opener else set()):
                found.append(f"{_where(path, function)} {function.name}")
    assert found == []


def _defined(tree: ast.Module) -> set[str]:
    """Names that a module defines at its top, other than for itself alone."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_name_means_one_thing():
    homes: dict[str, list[str]] = {}
    for path in _sources():
        for name in _defined(_tree(path)) - {"main"}:
            homes.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}
