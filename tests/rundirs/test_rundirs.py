"""util: files survive kills, hashes see content, run directories refuse to become another run."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import resource
import stat
import time
import zipfile

import numpy as np
import pytest
import torch

import util
from cli.parser import parse_shard
from rundirs.directory import RunDirectory
from rundirs.files import (
    _umask,
    append_jsonl,
    atomic_write,
    file_hash,
    in_work,
    json_hash,
    read_json,
    read_jsonl,
    write_json,
)
from rundirs.tensors import load_tensors, load_torch, save_tensors, save_torch
from util import DataError, UserError

# --- atomic writes ------------------------------------------------------------------------------


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write("half of the new")
        file.flush()
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_finished_write_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "b" / "c" / "a.bin"
    for content in (b"first, longer", b"second"):
        with atomic_write(path, "wb") as file:
            file.write(content)
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["a.bin"]


def test_who_has_the_old_file_open_keeps_reading_it(tmp_path):
    write_json(tmp_path / "a.json", ["old"])
    with open(tmp_path / "a.json", encoding="utf-8") as reader:
        write_json(tmp_path / "a.json", ["new"])
        assert json.load(reader) == ["old"]
    assert read_json(tmp_path / "a.json") == ["new"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_permissions_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    _umask.cache_clear()
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
        _umask.cache_clear()
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


# --- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}x', b"\xff\xfe\x00"])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(path)


def test_missing_json_is_named_and_good_json_read(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "a.json")
    write_json(tmp_path / "a.json", {"ß": [1, None], "path": tmp_path})
    assert read_json(tmp_path / "a.json") == {"ß": [1, None], "path": str(tmp_path)}


def test_jsonl_appends_in_order_and_keeps_every_character(tmp_path):
    path = tmp_path / "m.jsonl"
    records = [{"step": 1}, {"name": "line\u2028and\x85paragraph\nbreaks"}, {"step": 3}]
    for record in records:
        append_jsonl(path, record)
    assert read_jsonl(path) == records
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"name": "gr\xc3'])
def test_a_torn_line_is_skipped_and_does_not_swallow_the_next(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"step": 1})
    with open(path, "ab") as file:
        file.write(torn)
    assert read_jsonl(path) == [{"step": 1}]
    append_jsonl(path, {"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]


# --- tensors ------------------------------------------------------------------------------------


def test_tensors_and_header_come_back(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {
        "view": torch.arange(12.0).view(3, 4).t(),
        "ids": torch.tensor([2**62, -1]),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    header = {"clip": {"model": "tiny"}, "step": 3, "text": "ü"}
    save_tensors(path, tensors, header)
    loaded, found = load_tensors(path)
    assert found == header
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_a_file_without_header_is_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    assert load_tensors(tmp_path / "t.safetensors")[1] == {}


def test_damaged_safetensors_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(50)}, {"step": 1})
    whole = path.read_bytes()
    garbage = np.random.default_rng(0).bytes(300)
    for content in (b"", whole[:4], whole[:40], whole[:-1], garbage, b"not a tensor file"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"t\.safetensors"):
            load_tensors(path)
    with pytest.raises(DataError, match="no such file"):
        load_tensors(tmp_path / "none.safetensors")


# --- hashes and seeds ---------------------------------------------------------------------------


def test_file_hash_sees_every_byte(tmp_path):
    path = tmp_path / "a"
    content = bytearray(3 << 20)
    hashes = set()
    for place in (None, 0, 1 << 20, len(content) - 1):
        if place is not None:
            content[place] ^= 1
        path.write_bytes(content)
        hashes.add(file_hash(path))
    assert len(hashes) == 4
    content[0] ^= 1
    content[1 << 20] ^= 1
    content[-1] ^= 1
    (tmp_path / "b").write_bytes(content)
    assert file_hash(tmp_path / "b") in hashes  # content, not name or time


def _sparse_hash(path, size, place=None):
    """Hash of ``size`` zeros, with a 1 at ``place``."""
    with open(path, "wb") as file:
        file.truncate(size)
        if place is not None:
            file.seek(place)
            file.write(b"\1")
    return file_hash(path)


def test_huge_files_are_known_by_size_and_samples_throughout(tmp_path):
    path, size = tmp_path / "sparse", (1 << 28) + 1
    zeros = _sparse_hash(path, size)
    others = [_sparse_hash(path, size, 0), _sparse_hash(path, size, size - 1)]
    others.append(_sparse_hash(path, size + 1))
    assert len({zeros, *others}) == 4
    assert all(value.startswith("sampled:") for value in (zeros, *others))


def _merged_hash(path, size, start, length):
    """Hash of ``size`` zeros, of which a stretch is changed."""
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(start)
        file.write(b"\1" * length)
    return file_hash(path)


def test_a_changed_layer_in_the_middle_of_a_huge_file_is_seen(tmp_path):
    """As a merged LoRA changes: one matrix of 640 x 640 halves, wherever it lies."""
    path, size, layer = tmp_path / "sparse", (1 << 28) + 99, 2 * 640 * 640
    zeros = _sparse_hash(path, size)
    for start in (3 << 20, (100 << 20) + 777, size - (2 << 20) - layer):
        assert _merged_hash(path, size, start, layer) != zeros


def test_json_hash_ignores_key_order_and_refuses_what_is_not_json(tmp_path):
    assert json_hash({"a": 1, "b": [2]}) == json_hash({"b": [2], "a": 1})
    assert json_hash({"a": 1}) != json_hash({"a": 2})
    for content in (tmp_path, {1, 2}, torch.ones(1), {"a": object()}):
        with pytest.raises(TypeError):
            json_hash(content)


def test_seeds_depend_on_their_arguments_only():
    assert util.seed_for(0, "a/b") != util.seed_for(0, "a", "b")
    seed = util.seed_for(0, "sdxl", 137)
    torch.manual_seed(1)
    np.random.seed(1)
    torch.rand(3)
    assert util.seed_for(0, "sdxl", 137) == seed == 7271604927801011292
    seeds = [util.seed_for(s, kind, n) for s in (0, 1) for kind in "ab" for n in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds)
    assert max(seeds) > 2**62  # uses all of them


def test_generators_repeat_their_sample():
    for make, draw in (
        (util.generator_for, lambda g: torch.randn(4, generator=g).tolist()),
        (util.numpy_generator_for, lambda g: g.random(4).tolist()),
    ):
        assert draw(make(0, "x", 1)) == draw(make(0, "x", 1))
        assert draw(make(0, "x", 1)) != draw(make(0, "x", 2))


# --- run directories ----------------------------------------------------------------------------

OPTIONS = {"epochs": 3, "lr": 1e-4, "device": "cpu", "window": (0.0, 0.5)}
FIXED = ("epochs", "lr", "window")


def _begin(path, stage="train", inputs=None, shared=False, **changes):
    run = RunDirectory(path, stage)
    options = OPTIONS | changes
    start = (options, dict.fromkeys(options, "default"), inputs or {"eeg": "aa"}, FIXED)
    run.start(*start, shared=shared)
    return run


def _start(path, *how, **changes):
    run = _begin(path, *how, **changes)
    util._close_log()
    return run


def _snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_explains_itself(tmp_path):
    run = _start(tmp_path / "deep" / "run")
    recorded = read_json(run.path / "options.json")
    assert recorded["stage"] == "train"
    assert recorded["options"] == json.loads(json.dumps(OPTIONS))
    assert recorded["provenance"]["lr"] == "default"
    assert read_json(run.path / "inputs.json") == {"eeg": "aa"}
    (start,) = read_json(run.path / "env.json")
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"python", "commit", "host", "command", "slurm"} <= start.keys()
    assert "train" in (run.path / "log.txt").read_text()
    assert not run.finished


def _keep_started(path, begun):
    _begin(path)
    begun.set()
    time.sleep(600)


def test_a_run_is_one_process_at_a_time_until_that_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(util, "CLAIM_SECONDS", 1)
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    other = context.Process(target=_keep_started, args=(tmp_path / "run", begun))
    other.start()
    try:
        assert begun.wait(120)
        with pytest.raises(UserError, match="another process at work"):
            _start(tmp_path / "run")
        assert len(read_json(tmp_path / "run" / "env.json")) == 1
    finally:
        other.kill()
        other.join()
    _start(tmp_path / "run")


def test_shards_of_a_stage_share_a_run(tmp_path):
    first = _begin(tmp_path / "run", shared=True)  # its log is open
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.starmap(_start_shared, [(first.path,)] * 2)
    assert len(read_json(first.path / "env.json")) == 3
    util._close_log()


def _start_shared(path):
    _start(path, shared=True)


def _race(path, gate, number):
    """Whether this process may start the run with options of its own; what it is told if not."""
    gate.wait()
    try:
        _begin(path, epochs=number)
    except UserError as refused:
        return str(refused)
    time.sleep(1)  # at work
    util._close_log()
    return None


@pytest.mark.parametrize("locks", [True, False])
def test_of_processes_with_different_options_one_gets_the_folder(tmp_path, locks):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(4, None if locks else _without_locks) as pool:
        for attempt in range(1):
            path, gate = tmp_path / f"run{attempt}", manager.Barrier(4)
            told = pool.starmap(_race, [(path, gate, number) for number in range(4)], 1)
            assert told.count(None) == 1
            assert all("--epochs" in text for text in told if text)
            winner = told.index(None)
            assert read_json(path / "options.json")["options"]["epochs"] == winner


def _without_locks():
    def unknown(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = unknown


def test_where_locks_are_unknown_a_run_starts_all_the_same(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert _start(tmp_path / "run").path.exists()


def test_finishing_is_recorded(tmp_path):
    run = _start(tmp_path / "run")
    run.finish({"step": 12})
    assert run.finished
    assert RunDirectory(run.path, "train").finished
    assert read_json(run.path / "DONE")["step"] == 12
    part = RunDirectory(run.path, "train", part="2of3")
    assert not part.finished
    part.finish({})
    assert (run.path / "DONE-2of3").exists()


def test_the_same_command_goes_on_and_is_counted(tmp_path):
    run = _start(tmp_path / "run")
    first = (run.path / "options.json").read_bytes()
    _start(run.path, device="cuda")  # may differ per call
    assert (run.path / "options.json").read_bytes() == first
    assert len(read_json(run.path / "env.json")) == 2
    assert len((run.path / "log.txt").read_text().splitlines()) == 2


def test_a_changed_option_is_refused_with_both_values(tmp_path):
    run = _start(tmp_path / "run")
    before = _snapshot(run.path)
    with pytest.raises(UserError) as caught:
        _start(run.path, epochs=7, window=(0.0, 0.6))
    for text in ("--epochs: 3 then, 7 now", "--window", "0.5", "0.6", str(run.path)):
        assert text in str(caught.value)
    assert "--lr" not in str(caught.value)
    assert _snapshot(run.path) == before


@pytest.mark.parametrize("inputs", [{"eeg": "bb"}, {"eeg": "aa", "bank": "cc"}, {"bank": "aa"}])
def test_changed_inputs_are_refused(tmp_path, inputs):
    run = _start(tmp_path / "run")
    with pytest.raises(UserError, match=r"input (eeg|bank): .* then, .* now"):
        _start(run.path, inputs=inputs)


def test_another_stage_is_refused(tmp_path):
    run = _start(tmp_path / "run")
    with pytest.raises(UserError, match="a run of train"):
        _start(run.path, stage="generate")


def test_a_foreign_folder_or_file_is_refused_untouched(tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="no run of this project"):
        _start(foreign)
    assert _snapshot(foreign) == {"chapter.tex": b"years of work"}
    with pytest.raises(UserError, match=r"chapter\.tex"):
        _start(foreign / "chapter.tex")
    with pytest.raises(UserError, match=r"chapter\.tex"):
        _start(foreign / "chapter.tex" / "below")
    assert _snapshot(foreign) == {"chapter.tex": b"years of work"}


def test_a_kill_during_the_first_records_does_not_lock_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".options.json.x1.tmp").write_text('{"sta')
    run = _start(tmp_path / "run")
    (run.path / "inputs.json").unlink()  # killed between the two records
    _start(run.path)
    with pytest.raises(UserError, match="input eeg"):
        _start(run.path, inputs={"eeg": "bb"})


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    """Up to 8 GB each; but never what another process is writing at this moment."""
    (left, other, fresh, used) = (
        tmp_path / name
        for name in (".a.npy.k1.tmp", ".b.npy.k1.tmp", ".a.npy.k2.tmp", ".a.npy.k3.tmp")
    )
    for path in (left, other, fresh, used):
        path.write_text("half")
        if path != fresh:
            os.utime(path, (time.time() - 60, time.time() - 60))
    with open(used) as file:
        in_work(file)
        with atomic_write(tmp_path / "a.npy") as written:
            written.write("whole")
    assert [path.exists() for path in (left, other, fresh, used)] == [False, True, True, True]
    assert (tmp_path / "a.npy").read_text() == "whole"


def test_checking_writes_nothing(tmp_path):
    RunDirectory(tmp_path / "run", "train").check(OPTIONS, {}, FIXED)
    assert not list(tmp_path.iterdir())


# --- exit codes and devices ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("--epochs", "x", "y", "z"), 2),
        (DataError("file", "x", "y", "z"), 1),
        (util.Preempted("saved"), 75),
        (SystemExit(0), 0),
        (SystemExit(2), 2),
        (SystemExit("text"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(raised, code):
    @util.command
    def main(argv=None):
        raise raised

    assert main([]) == code


def test_success_passes_through_and_a_bug_is_not_hidden():
    assert util.command(lambda argv=None: 0)([]) == 0

    @util.command
    def main(argv=None):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main([])


def test_an_error_says_where_found_expected_and_cure(capsys, tmp_path):
    @util.command
    def main(argv=None):
        if argv:
            util.start_log(tmp_path / "log.txt")
        raise DataError("bank.safetensors", "NaN", "numbers", "make it again")

    assert main([]) == 1
    assert main(["--logged"]) == 1
    told = capsys.readouterr()
    assert not told.out
    for text in (told.err, (tmp_path / "log.txt").read_text()):
        for part in ("bank.safetensors", "found:", "NaN", "numbers", "make it again"):
            assert part in text
    assert told.err.count("make it again") == 2  # once per call, log handlers were closed
    assert not [item for item in util.LOG.handlers if type(item) is logging.FileHandler]


def test_devices():
    assert util.pick_device("cpu") == torch.device("cpu")
    assert util.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="--device"):
        util.pick_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_an_absent_gpu_is_refused(name):
    with pytest.raises(UserError, match="--device cpu"):
        util.pick_device(name)


def test_shards_parse():
    assert parse_shard("2/3") == (2, 3)


@pytest.mark.parametrize(
    "number, told",
    [(errno.ENOSPC, "make room"), (errno.EROFS, "another folder"), (errno.EFBIG, "ulimit")],
)
def test_what_no_program_can_mend_is_told_without_a_traceback(number, told, capsys):
    @util.command
    def main(argv=None):
        raise OSError(number, os.strerror(number), "the/file")

    assert main() == 1
    error = capsys.readouterr().err
    assert "the/file" in error and os.strerror(number) in error and told in error


def test_other_failures_of_the_system_stay_loud():
    @util.command
    def main(argv=None):
        raise FileNotFoundError(errno.ENOENT, "a mistake of ours", "x")

    with pytest.raises(FileNotFoundError):
        main()


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"stage": "train"}', '{"stage": "train", "options": 1}']
)
def test_records_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "options.json").write_text(content)
    with pytest.raises((DataError, UserError), match=str(tmp_path)):
        RunDirectory(tmp_path, "train").check({"a": 1}, {}, ["a"])


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff", b"", b"{"])
def test_json_of_any_damage_is_a_data_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="not JSON"):
        read_json(tmp_path)


def test_a_disk_that_fills_up_while_torch_saves_is_told_as_that(tmp_path):
    """torch itself raises a RuntimeError about its archive; what was there before stays."""
    path = tmp_path / "state.pt"
    save_torch(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_torch(path, {"step": 2, "weights": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_torch(path, "", "") == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("form", ["bare", "zip"])
def test_an_endless_name_in_a_torch_file_is_refused_at_once(tmp_path, form):
    """torch's own complaint of it takes the square of its length: hours for these."""
    path, name = tmp_path / "a.pt", b"9" * 1_000_000
    content = b"\x80\x02c" + name + b"\nsystem\n."
    if form == "bare":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    with pytest.raises(DataError, match="1000000 characters"):
        load_torch(path, "", "")


def test_long_texts_of_words_in_a_torch_file_are_read(tmp_path):
    text = "a setting of the run " * 5000
    for legacy in (False, True):
        torch.save(
            {"told": text, "weight": torch.ones(2)},
            tmp_path / "a.pt",
            _use_new_zipfile_serialization=not legacy,
        )
        found = load_torch(tmp_path / "a.pt", "", "")
        assert found["told"] == text and found["weight"].tolist() == [1, 1]
