"""stimuli: their order, ids and captions; links that stay in DATA."""

from __future__ import annotations

import json
import logging
import unicodedata

import builders
import pytest

from datafiles import stimuli
from datafiles.captions import CAPTION_KEYS, caption, read_captions
from datafiles.stimuli import list_stimuli, stimulus_id
from util import DataError

FIRST, SECOND = (f"training_images/00001_train1/train1_{n}.png" for n in (1, 2))


def _touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_pictures_are_listed_by_folder_then_by_file(tmp_path):
    wanted = ["00001_b/B.JPG", "00001_b/a.png", "00002_a_a/x.jpeg", "00010_c/a_10.Png"]
    noise = ["00001_b/.a.png", "00001_b/notes.txt", ".cache/a.png", "readme.png", "00003_e/x.gif"]
    _touch(tmp_path / "training_images", *reversed(wanted), *noise)
    stimuli = list_stimuli(tmp_path, "training")
    assert [item.key for item in stimuli] == [f"training_images/{name}" for name in wanted]
    assert [item.concept for item in stimuli] == ["b", "b", "a_a", "c"]
    assert all(item.path.is_file() for item in stimuli)


def test_ids_are_of_the_picture_alone(tmp_path):
    names = ["00001_a/1.png", "00002_b/1.png"]
    _touch(tmp_path / "one" / "training_images", *names)
    _touch(tmp_path / "two" / "training_images", "00000_z/0.png", "00001_a/0.png", *names)
    one = {item.key: item.id for item in list_stimuli(tmp_path / "one", "training")}
    two = {item.key: item.id for item in list_stimuli(tmp_path / "two", "training")}
    assert one.items() <= two.items()
    assert len(set(two.values())) == 4
    assert all(0 <= number < 2**63 for number in two.values())
    assert stimulus_id("test_images/00001_a/1.png") not in two.values()


def test_absent_and_empty_stimuli_are_named(tmp_path):
    with pytest.raises(DataError, match="test_images"):
        list_stimuli(tmp_path, "test")
    _touch(tmp_path, "test_images/00001_a/a.txt")
    with pytest.raises(DataError, match="no pictures"):
        list_stimuli(tmp_path, "test")


@pytest.fixture
def data(tmp_path):
    builders.write_pictures(tmp_path, training=2, images=2, test=1)
    return tmp_path


def _write(folder, content: str | bytes, name: str = "c.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _texts(root, captions) -> dict[str, str]:
    return {
        item.key: caption(item, captions, "no {concept}")
        for partition in stimuli.PARTITIONS
        for item in list_stimuli(root, partition)
    }


EXPECTED = {
    FIRST: 'a dog, wet and "new"',
    SECOND: "any dog",
    "training_images/00002_train2/train2_1.png": "no train2",
    "training_images/00002_train2/train2_2.png": "no train2",
    "test_images/00001_test1/a.png": "zwei\nZeilen",
}
ROWS = [(FIRST, '"a dog, wet and ""new"""'), ("train1", " any dog "), ("test1", '"zwei\nZeilen"')]


@pytest.mark.parametrize("column", CAPTION_KEYS)
@pytest.mark.parametrize("separator", [",", "\t", ";"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_of_any_program(data, column, separator, ends, encoding):
    head = separator.join(["n", column.title(), " Caption"])
    lines = [separator.join([str(n), key, text]) for n, (key, text) in enumerate(ROWS)]
    path = _write(data, ends.join([head, *lines, ""]).encode(encoding))
    assert _texts(data, read_captions(path)) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json(data, encoding):
    content = {FIRST: EXPECTED[FIRST], "train1": "any dog", "test1": "zwei\nZeilen"}
    path = _write(data, json.dumps(content).encode(encoding), "c.json")
    assert _texts(data, read_captions(path)) == EXPECTED


@pytest.mark.parametrize("in_folder", ["NFC", "NFD"])
@pytest.mark.parametrize("in_file", ["NFC", "NFD"])
def test_accents_match_however_they_are_composed(tmp_path, in_folder, in_file):
    name = "00001_bär/bär.png"
    builders.write_picture(tmp_path / "training_images" / unicodedata.normalize(in_folder, name))
    (item,) = list_stimuli(tmp_path, "training")
    for key in (f"training_images/{name}", "bär", f"training_images\\{name}".replace("/", "\\")):
        text = unicodedata.normalize(in_file, f"picture,caption\n{key},brown\n")
        captions = read_captions(_write(tmp_path, text), [item])
        assert caption(item, captions, "{concept}") == "brown"


def test_no_file_no_captions():
    assert read_captions(None) == {}


@pytest.mark.parametrize(
    "content, told",
    [
        (f"picture,caption\n{FIRST},one\n{FIRST},two\n", ["line 3", "'two'", "'one'"]),
        (f"picture,caption\n\n\n{FIRST}, \n", ["line 4", "no caption"]),
        ("picture,caption\n,one\n", ["line 2", "no picture or concept"]),
        (f"picture,text\n{FIRST},one\n", ["columns picture, text", "concept"]),
        (f"file,caption\n{FIRST},one\n", ["columns file, caption", "concept"]),
        (f"picture,caption,caption\n{FIRST},one,two\n", ["caption twice"]),
        (f"picture,caption\n{FIRST},a dog, wet\n", ["line 2", "3 cells"]),
        (f'picture,caption\n{FIRST},"never closed\n', ["not CSV"]),
        ("", ["(none)"]),
        (f"picture,caption\n{FIRST},one\n".encode("utf-16"), ["save it as UTF-8"]),
        (b"picture,caption\nx,\xe4\n", ["save it as UTF-8"]),
    ],
)
def test_bad_tables_are_located(tmp_path, content, told):
    with pytest.raises(DataError) as caught:
        read_captions(_write(tmp_path, content))
    for part in ("c.csv", *told):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "content, told",
    [
        ('{"a": "one", "a": "two"}', ["'a'", "'two'", "'one'"]),
        ('{"a": ""}', ["no caption"]),
        ('{"a": 3}', ["'a'", "a int"]),
        ('{"a": {"b": "c"}}', ["'a'"]),
        ('["a"]', ["something else"]),
        ('{"a": "one"', ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ("", ["not JSON"]),
    ],
)
def test_bad_json_is_located(tmp_path, content, told):
    with pytest.raises(DataError) as caught:
        read_captions(_write(tmp_path, content, "c.json"))
    for part in ("c.json", *told):
        assert part in str(caught.value)


def test_the_same_caption_twice_is_one(tmp_path):
    path = _write(tmp_path, "concept,caption\na,one\na,one\n")
    assert read_captions(path) == {"a": "one"}


def test_captions_of_other_stimuli_are_refused_and_of_nothing_told(data, caplog, monkeypatch):
    known = list_stimuli(data, "training")
    path = _write(data, "concept,caption\nlion,a lion\nTrain1,a dog\n")
    with pytest.raises(DataError, match=r"(?s)e\.g\. lion.*train1_1\.png or train1"):
        read_captions(path, known)
    with pytest.raises(DataError, match="no captions"):
        read_captions(_write(data, "concept,caption\n"), known)
    monkeypatch.setattr(logging.getLogger("eeg2image"), "propagate", True)
    read_captions(_write(data, "concept,caption\nlion,a lion\ntrain1,a dog\n"), known)
    assert "1 of 2 captions belong to no picture of DATA, e.g. lion" in caplog.text


# --- links --------------------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    builders.write_picture(folder / "00009_secret" / "a.png")
    return folder


def test_links_out_of_data_are_refused(data, outside):
    for link, target in (
        ("training_images/00001_train1/x.png", outside / "00009_secret/a.png"),
        ("training_images/00009_secret", outside / "00009_secret"),
    ):
        (data / link).symlink_to(target)
        with pytest.raises(DataError, match=r"a link to .*secret"):
            list_stimuli(data, "training")
        (data / link).unlink()
    assert len(list_stimuli(data, "training")) == 4


def test_a_partition_as_a_whole_and_places_inside_data_may_be_links(data, outside):
    (data / "training_images").rename(outside / "shared")
    (data / "training_images").symlink_to(outside / "shared")
    builders.write_picture(data / "store" / "b.png")
    (data / "test_images/00001_test1/b.png").symlink_to(data / "store/b.png")
    (outside / "shared/00003_copy").symlink_to(outside / "shared/00001_train1")
    assert [item.concept for item in list_stimuli(data, "training")].count("copy") == 2
    assert len(list_stimuli(data, "test")) == 2


@pytest.mark.parametrize("kind", ["nothing", "folder"])
def test_a_link_to_nothing_and_a_folder_are_no_pictures(data, kind):
    path = data / "training_images/00001_train1/x.png"
    path.mkdir() if kind == "folder" else path.symlink_to(data / "none.png")
    with pytest.raises(DataError, match=r"x\.png"):
        list_stimuli(data, "training")


def test_only_a_number_is_taken_off_a_concept(tmp_path):
    folders = {"00001_fire_truck": "fire_truck", "fire_truck": "fire_truck", "7_up": "up",
               "b52_bomber": "b52_bomber", "00003": "00003", "12_": "12_"}  # fmt: skip
    _touch(tmp_path / "test_images", *(f"{folder}/a.png" for folder in folders))
    found = {item.folder: item.concept for item in list_stimuli(tmp_path, "test")}
    assert found == folders
