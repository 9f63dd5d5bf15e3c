"""Embeddings of others become a bank: the right row for each picture, and where they came from."""

from __future__ import annotations

import json

import builders
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ATMS_retrieval
import evaluate
import train
from datafiles.feature_bank import open_bank
from datafiles.stimuli import PARTITIONS, list_stimuli
from dataset import main as check
from rundirs.tensors import load_tensors, tensors_header
from util import DataError

FORMS = ("atm", "by_name", "npy", "safetensors", "ids")


@pytest.fixture
def data(tmp_path):
    builders.write_pictures(tmp_path / "data")
    return tmp_path / "data"


def written(folder, form, items, image, text):
    """The file of a partition; ``text`` [N, D] has one vector per concept."""
    folder.mkdir(exist_ok=True)
    partition = items[0].partition
    first = {item.folder: row for row, item in reversed(list(enumerate(items)))}
    concepts = [first[name] for name in sorted(first)]
    mixed = np.random.default_rng(3).permutation(len(items)).tolist()
    file = folder / f"ViT-H-14_features_{partition}.pt"
    if form == "atm":
        unit = text[concepts] / text[concepts].norm(dim=1, keepdim=True)
        torch.save({"img_features": image, "text_features": unit, "labels": 3}, file)
    elif form == "by_name":
        by_path = {f"/data/images/{items[row].key}": image[row] for row in mixed}
        torch.save(
            {"image": by_path, "text": {items[row].concept: text[row] for row in concepts}}, file
        )
    elif form == "npy":
        file = file.with_suffix(".npy")
        np.save(file, image[mixed].numpy())
        np.save(file.with_name(f"{file.stem}_text.npy"), text[mixed].numpy())
        names = [items[row].key.split("/", 1)[1] for row in mixed]
        file.with_suffix(".txt").write_text("\n".join(names) + "\n")
    else:
        file = file.with_suffix(".safetensors")
        rows = {"image": image[mixed].contiguous(), "text": text[mixed].contiguous()}
        if form == "ids":
            rows["stimulus"] = torch.tensor([items[row].id for row in mixed])
        else:
            file.with_suffix(".txt").write_text("\n".join(items[row].key for row in mixed))
        save_file(rows, file)
    return file


def command(data, files, out):
    flags = ["--data_path", data, "--import_features", *files, "--output_path", out]
    return check([str(flag) for flag in flags])


@pytest.mark.parametrize("form", FORMS)
def test_each_row_is_of_its_picture(data, tmp_path, form, capsys):
    wanted, files = {}, []
    for number, partition in enumerate(PARTITIONS):
        items = list_stimuli(data, partition)
        image, text = (builders.normal(len(items), 4, seed=number + 2 * k) for k in (0, 1))
        same = {item.folder: row for row, item in enumerate(items)}
        text = text[[same[item.folder] for item in items]]  # the same for all of a concept
        wanted[partition] = {"image": image, "text": text}
        files.append(written(tmp_path / "theirs", form, items, image, text))
    assert command(data, files, tmp_path / "bank") == 0
    told = capsys.readouterr().out
    assert ("joined by order" in told) == (form == "atm")
    assert ("unit length" in told) == (form == "atm")
    for partition, file in zip(PARTITIONS, files, strict=True):
        bank = open_bank(tmp_path / "bank", partition, needed=("image", "text"))
        rows = bank.rows_for(list_stimuli(data, partition))
        assert torch.equal(rows["image"], wanted[partition]["image"])
        text = wanted[partition]["text"]
        text = text / text.norm(dim=1, keepdim=True) if form == "atm" else text
        torch.testing.assert_close(rows["text"], text)
        header = tensors_header(bank.path)
        assert header["imported"][partition]["file"] == file.name
        assert header["imported"][partition]["unit_length"]["text"] == (form == "atm")
    assert command(data, files, tmp_path / "bank") == 2
    assert "a new folder" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"(?s)also superpixel_few.*ATMS_retrieval"):
        open_bank(tmp_path / "bank", "training")


def _saved(tmp_path, content):
    file = tmp_path / "theirs.pt"
    torch.save(content, file)
    return file


@pytest.mark.parametrize(
    ("content", "told"),
    [({"text_features": torch.ones(6, 4)}, "no image"),
     ({"img_features": torch.ones(11, 4), "text_features": torch.ones(6, 4)}, "11 rows of img_f"),
     ({"img_features": torch.ones(12, 4), "text_features": torch.ones(7, 4)}, "of texts 6"),
     ({"img_features": torch.ones(12), "text_features": torch.ones(6, 4)}, "rows of numbers"),
     ({"img_features": torch.zeros(12, 4), "text_features": torch.ones(6, 4)}, "rows of zeros"),
     ({"img_features": torch.full((12, 4), torch.nan), "text_features": torch.ones(6, 4)}, "NaN"),
     ({"image": {"a.png": torch.ones(4)}, "text": {}}, "no row of 12 of 12 pictures"),
     ({"image": {"a.png": "x"}, "text": {}}, "other things than tensors"),
     ({"image": {"a": torch.ones(4), "b": torch.ones(5)}, "text": {}}, "of shapes")],
)  # fmt: skip
def test_what_a_file_lacks_is_told(data, tmp_path, content, told, capsys):
    file = _saved(tmp_path, content)
    assert command(data, [file, file], tmp_path / "bank") == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()


def test_two_files_of_different_clips_are_refused(data, tmp_path, capsys):
    files = []
    for partition, width in zip(PARTITIONS, (4, 5), strict=True):
        items = list_stimuli(data, partition)
        rows = builders.normal(len(items), width)
        files.append(written(tmp_path, "safetensors", items, rows, rows))
    assert command(data, files, tmp_path / "bank") == 1
    assert "the same embeddings in both" in capsys.readouterr().err


def test_a_name_of_two_pictures_is_none_of_them(data, tmp_path, capsys):
    """All test pictures are called a.png: their folders tell them apart."""
    items = list_stimuli(data, "test")
    rows = builders.normal(len(items), 4)
    training = written(
        tmp_path, "atm", list_stimuli(data, "training"), *[builders.normal(12, 4)] * 2
    )
    file = written(tmp_path, "safetensors", items, rows, rows)
    file.with_suffix(".txt").write_text("\n".join(["a.png"] * 3))
    assert command(data, [training, file], tmp_path / "bank") == 1
    assert "no row of 3 of 3 pictures" in capsys.readouterr().err


def scores(chain, bank, out):
    flags = ["--model_path", out / "encoder", "--data_path", chain.data, "--clip_feature_path",
             bank, "--permutations", 5, "--device", "cpu", "--output_dir", out / "s"]  # fmt: skip
    assert evaluate.main([str(flag) for flag in flags]) == 0
    return json.loads((out / "s" / "results.json").read_text())["retrieval"]


def test_training_and_scores_are_those_of_the_bank_it_was_made_of(chain, tmp_path, capsys):
    """Through ATMS_retrieval.py and evaluate.py; train.py says what is missing."""
    files = []
    for partition in PARTITIONS:
        rows = load_tensors(chain.features / f"{partition}.safetensors")[0]
        files.append(written(tmp_path / "theirs", "ids", list_stimuli(chain.data, partition),
                             rows["image"], rows["text"]))  # fmt: skip
    assert command(chain.data, files, tmp_path / "bank") == 0
    found = []
    for name, bank in {"own": chain.features, "imported": tmp_path / "bank"}.items():
        flags = ["--data_path", chain.data, "--clip_feature_path", bank, "--epochs", 1,
                 "--val_fraction", 0.2, "--device", "cpu", "--output_dir",
                 tmp_path / name / "encoder"]  # fmt: skip
        assert ATMS_retrieval.main([str(flag) for flag in flags]) == 0
        found.append(scores(chain, bank, tmp_path / name))
    assert found[0] == found[1]
    code = train.main(chain.train_flags(tmp_path / "run", "--clip_feature_path", tmp_path / "bank"))
    assert code == 1 and "run clip_feature_extractor.py" in capsys.readouterr().err


def test_a_bank_of_any_frozen_network_is_trained_on_without_texts(chain, tmp_path, capsys):
    """DINOv2's, say: another width and no texts; the control of wrong rows is at chance."""
    out = tmp_path / "dino"
    out.mkdir()
    files = []
    for partition in PARTITIONS:
        rows = load_tensors(chain.features / f"{partition}.safetensors")[0]
        files.append(out / f"{partition}.npy")
        np.save(files[-1], torch.cat([rows["image"], rows["superpixel_few"]], dim=1).numpy())
    assert command(chain.data, files, tmp_path / "bank") == 0
    assert "image: 6 x" in capsys.readouterr().out
    given = {"data_path": chain.data, "clip_feature_path": tmp_path / "bank", "epochs": 1,
             "val_fraction": 0.2, "device": "cpu", "output_dir": tmp_path / "encoder"}  # fmt: skip
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert ATMS_retrieval.main(flags) == 1
    assert "--text_contrast 0" in capsys.readouterr().err
    assert ATMS_retrieval.main([*flags, "--text_contrast", "0"]) == 0
    for row in scores(chain, tmp_path / "bank", tmp_path):
        assert 1 <= row["median_rank"] <= 6 and row["gallery"] == 6
