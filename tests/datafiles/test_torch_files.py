"""Files of torch.save: tensors and arrays as they were, mapped; anything else refused by name."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
import torch

from datafiles.torch_files import read_torch_dict
from util import DataError


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


def repacked(path, change=None, compression=zipfile.ZIP_STORED):
    """The zip again, ``change(name, content)`` giving what an entry holds."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, change(name, content) if change else content)
    return path


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_and_arrays_come_back(tmp_path, protocol):
    content = {
        "tensor": torch.arange(24, dtype=torch.float16).reshape(2, 3, 4),
        "part": torch.arange(100)[10:20],
        "array": np.random.default_rng(0).normal(size=(50, 60)),
        "names": ["a", "b"],
        "nested": {"flag": torch.tensor([True, False])},
        "one": torch.tensor(3.5),
    }
    read = read_torch_dict(saved(tmp_path / "a.pt", content, pickle_protocol=protocol), "x")
    np.testing.assert_array_equal(read["tensor"], content["tensor"].numpy())
    assert read["tensor"].dtype == np.float16
    np.testing.assert_array_equal(read["part"], np.arange(10, 20))
    np.testing.assert_array_equal(read["array"], content["array"])
    assert read["names"] == ["a", "b"] and read["one"] == 3.5
    assert read["nested"]["flag"].tolist() == [True, False]
    assert not read["tensor"].flags.writeable


class Call:
    def __init__(self, function, *given):
        self.made = (function, given)

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    ("content", "told"),
    [({"a": torch.zeros(3, 4).T}, "not contiguous"),
     ({"a": torch.zeros(3, dtype=torch.bfloat16)}, r"torch\.BFloat16Storage"),
     ({"a": Call(torch.load, "x")}, r"torch\.serialization\.load"),
     ({"a": torch.nn.Linear(2, 2)}, r"torch\.nn\.modules"),
     ([1, 2], "a list")],
)  # fmt: skip
def test_what_is_no_array_is_refused(tmp_path, content, told):
    with pytest.raises(DataError, match=told):
        read_torch_dict(saved(tmp_path / "a.pt", content), "x")


def _longer(name, content):
    """The tensor claims ten times the numbers that are stored."""
    return content.replace(b"K\x05\x85", b"K\x32\x85") if name.endswith("data.pkl") else content


def _big_endian(name, content):
    return b"big" if name.endswith("byteorder") else content


@pytest.mark.parametrize(
    ("change", "compression", "told"),
    [(None, zipfile.ZIP_DEFLATED, "compressed"), (_longer, zipfile.ZIP_STORED, "longer than"),
     (_big_endian, zipfile.ZIP_STORED, "big-endian")],
)  # fmt: skip
def test_another_zip_is_refused(tmp_path, change, compression, told):
    file = saved(tmp_path / "a.pt", {"a": torch.zeros(5)})
    assert read_torch_dict(repacked(file), "x")["a"].shape == (5,)
    with pytest.raises(DataError, match=told):
        read_torch_dict(repacked(file, change, compression), "x")


def test_other_files_are_refused(tmp_path):
    whole = saved(tmp_path / "a.pt", {"a": torch.zeros(5000)}).read_bytes()
    for name, content in {
        "cut": whole[: len(whole) // 2], "empty": b"", "old": pickle.dumps({"a": 1}),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_torch_dict(tmp_path / name, "x")
    with pytest.raises(DataError, match="no such file"):
        read_torch_dict(tmp_path / "none", "x")
