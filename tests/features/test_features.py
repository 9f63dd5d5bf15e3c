"""Stage 1 in-process on a miniature CLIP: the features, their manifest, restarts and refusals."""

from __future__ import annotations

import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageFilter
from skimage.color import rgb2lab

import clip_feature_extractor as stage
import util
from datafiles import superpixel
from datafiles.feature_bank import check_clip, open_bank
from datafiles.stimuli import stimulus_id
from features import pieces
from features.clip import load_clip
from features.pieces import encode_piece
from miniworld.models import CLIP_DIM, CLIP_NAME, random_models
from modalities import MODALITIES, NAMES
from rundirs.directory import RunDirectory
from rundirs.files import read_json, write_json
from rundirs.tensors import load_tensors, save_tensors

TRAINING = ("00001_aardvark", "00002_banana_split", "00003_car")
TEST = ("00001_dog", "00002_egg")
PER_CONCEPT = 2


def _picture(seed: int, px: int = 64) -> Image.Image:
    """Soft random blobs: something for SLIC to follow."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((px, px + 8), Image.Resampling.BICUBIC)


def _write_pictures(data) -> None:
    for number, (partition, concepts) in enumerate((("training", TRAINING), ("test", TEST))):
        for row, concept in enumerate(concepts):
            folder = data / f"{partition}_images" / concept
            folder.mkdir(parents=True)
            for index in range(PER_CONCEPT):
                picture = _picture(100 * number + 10 * row + index)
                picture.save(folder / f"{concept[6:]}_{index}.{('png', 'jpg')[index]}")


SLIC_PX = 100  # for time; one test below is at the default size


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """DATA and the miniature CLIP."""
    folder = tmp_path_factory.mktemp("stage1")
    random_models(folder / "models", seed=0)
    _write_pictures(folder / "data")
    return folder


@pytest.fixture
def data(world, tmp_path):
    """A copy of DATA to spoil."""
    return shutil.copytree(world / "data", tmp_path / "data")


def _run(world, output, *more, data=None) -> int:
    flags = {
        "--data_path": data or world / "data",
        "--output_path": output,
        "--clip_model": world / "models" / f"{CLIP_NAME}.json",
        "--clip_pretrained": world / "models" / f"{CLIP_NAME}.safetensors",
        "--shard_size": 2,
        "--batch_size": 2,
        "--num_workers": 0,
        "--superpixel_size": SLIC_PX,
        "--device": "cpu",
    }
    given = dict(zip(more[::2], more[1::2], strict=False)) if len(more) % 2 == 0 else {}
    alone = () if given else more
    return stage.main([*(str(x) for pair in (flags | given).items() for x in pair), *alone])


@pytest.fixture(scope="module")
def bank(world):
    assert _run(world, world / "bank") == 0
    return world / "bank"


def _tensors(bank, partition: str) -> dict[str, torch.Tensor]:
    return load_tensors(bank / f"{partition}.safetensors")[0]


def _assert_same_bank(one, other) -> None:
    for partition in ("training", "test"):
        a, b = _tensors(one, partition), _tensors(other, partition)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def _keys(concepts, partition: str) -> list[str]:
    return [
        f"{partition}_images/{concept}/{concept[6:]}_{index}.{('png', 'jpg')[index]}"
        for concept in concepts
        for index in range(PER_CONCEPT)
    ]


# --- what the features are --------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(world):
    """open_clip itself: (model, validation transform, tokenizer)."""
    model, _, transform = open_clip.create_model_and_transforms(
        CLIP_NAME, pretrained=str(world / "models" / f"{CLIP_NAME}.safetensors")
    )
    return model.eval(), transform, open_clip.get_tokenizer(CLIP_NAME)


@torch.no_grad()
def _encoded(clip, images: list[Image.Image]) -> torch.Tensor:
    model, transform, _ = clip
    return torch.cat([model.encode_image(transform(image)[None]) for image in images])


def _read(world, key: str) -> Image.Image:
    return Image.open(world / "data" / key).convert("RGB")


@pytest.mark.parametrize(("partition", "concepts"), [("training", TRAINING), ("test", TEST)])
def test_image_features_are_open_clip_s(world, bank, clip, partition, concepts):
    expected = _encoded(clip, [_read(world, key) for key in _keys(concepts, partition)])
    torch.testing.assert_close(_tensors(bank, partition)["image"], expected, rtol=1e-4, atol=1e-4)


def test_target_blur_is_of_the_image_alone_and_marks_the_bank(world, bank, clip, tmp_path):
    assert _run(world, tmp_path / "blurred", "--target_blur", 3) == 0
    sharp, blurred = _tensors(bank, "test"), _tensors(tmp_path / "blurred", "test")
    changed = [name for name in NAMES if not torch.equal(sharp[name], blurred[name])]
    assert changed == ["image"]
    pictures = [
        _read(world, key).filter(ImageFilter.GaussianBlur(3)) for key in _keys(TEST, "test")
    ]
    torch.testing.assert_close(blurred["image"], _encoded(clip, pictures), rtol=1e-4, atol=1e-4)
    one, other = open_bank(bank, "test"), open_bank(tmp_path / "blurred", "test")
    assert other.clip == one.clip | {"target_blur_px": 3.0}
    for found, trained_on in ((one, other), (other, one)):
        check_clip(found.clip, found.path, found.clip, tmp_path / "model")
        with pytest.raises(util.DataError, match="target_blur_px"):
            check_clip(found.clip, found.path, trained_on.clip, tmp_path / "model")


def test_several_blurs_are_kept_beside_the_image(world, bank, clip, tmp_path):
    assert _run(world, tmp_path / "several", "--target_blur", 0, 3, 1.5) == 0
    sharp, several = _tensors(bank, "test"), _tensors(tmp_path / "several", "test")
    assert {*several} - {*sharp} == {"image_blur_3", "image_blur_1.5"}
    assert all(torch.equal(sharp[name], several[name]) for name in sharp)
    for px in (3, 1.5):
        pictures = [
            _read(world, key).filter(ImageFilter.GaussianBlur(px)) for key in _keys(TEST, "test")
        ]
        found = several[f"image_blur_{px:g}"]
        torch.testing.assert_close(found, _encoded(clip, pictures), rtol=1e-4, atol=1e-4)
    assert open_bank(tmp_path / "several", "test").clip == open_bank(bank, "test").clip


def test_another_blur_in_the_same_folder_is_refused(world, bank, capsys):
    assert _run(world, bank, "--target_blur", 3) == 2
    assert "--target_blur: [0.0] then, [3.0] now" in capsys.readouterr().err


@pytest.mark.parametrize("modality", [m for m in MODALITIES if m.slic], ids=lambda m: m.name)
def test_superpixel_features_are_open_clip_s(world, bank, clip, modality):
    images = []
    for key in _keys(TEST, "test"):
        rgb = superpixel.at_slic_size(_read(world, key), SLIC_PX)
        labels = superpixel.segment(superpixel.smooth_lab(rgb), modality.slic)
        gain = modality.slic.texture_gain
        grain = superpixel.texture(rgb2lab(rgb))
        images.append(Image.fromarray(superpixel.fill(rgb, labels, grain, gain)))
    found = _tensors(bank, "test")[modality.name]
    torch.testing.assert_close(found, _encoded(clip, images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _texts_encoded(clip, texts: list[str]) -> torch.Tensor:
    model, _, tokenize = clip
    return model.encode_text(tokenize(texts))


def test_text_features_are_open_clip_s(bank, clip):
    texts = [
        f"This picture is {name}"
        for name in ("aardvark", "banana_split", "car")
        for _ in range(PER_CONCEPT)
    ]
    found = _tensors(bank, "training")["text"]
    torch.testing.assert_close(found, _texts_encoded(clip, texts), rtol=1e-4, atol=1e-4)


def test_captions_by_picture_then_by_concept_then_the_template(world, clip, tmp_path):
    first = _keys(TEST, "test")[0]
    captions = {first: "a wet dog", "dog": "any dog"}
    write_json(tmp_path / "captions.json", captions)
    options = ("--captions", tmp_path / "captions.json", "--text_template", "one {concept} here")
    assert _run(world, tmp_path / "bank", *options) == 0
    expected = ["a wet dog", "any dog", "one egg here", "one egg here"]
    rows = read_json(tmp_path / "bank" / "test.json")["rows"]
    assert [row["text"] for row in rows] == expected
    found = _tensors(tmp_path / "bank", "test")["text"]
    torch.testing.assert_close(found, _texts_encoded(clip, expected), rtol=1e-4, atol=1e-4)


def test_nothing_is_normalised_and_no_modality_is_dead(bank):
    tensors = _tensors(bank, "training")
    for name in NAMES:
        norms = tensors[name].norm(dim=1)
        assert ((norms - 1).abs() > 0.01).all()
        assert tensors[name].std(0).max() > 1e-3
    visual = [tensors[name] for name in NAMES if name != "text"]
    for index, one in enumerate(visual):
        assert all((one - other).norm() > 1e-3 for other in visual[index + 1 :])


# --- what is written --------------------------------------------------------------------------


def test_manifest_describes_the_bank(bank):
    header = load_tensors(bank / "training.safetensors")[1]
    manifest = read_json(bank / "training.json")
    assert {key: manifest[key] for key in header} == header
    assert manifest["normalised"] is False
    assert manifest["clip"]["model"] == CLIP_NAME and len(manifest["clip"]["weights"]) == 64
    assert "Crop" in manifest["transform"] and "Random" not in manifest["transform"]
    assert manifest["superpixel"] == superpixel.describe(SLIC_PX)
    assert list(manifest["features"]) == list(NAMES)
    tensors = _tensors(bank, "training")
    for name, described in manifest["features"].items():
        assert described["shape"] == [6, CLIP_DIM] == list(tensors[name].shape)
        assert described["dtype"] == "torch.float32"
        mean_norm = tensors[name].norm(dim=1).mean().item()
        assert described["mean_norm"] == pytest.approx(mean_norm, rel=1e-5)


@pytest.mark.parametrize(("partition", "concepts"), [("training", TRAINING), ("test", TEST)])
def test_rows_are_identified_by_stimulus(bank, partition, concepts):
    keys = _keys(concepts, partition)
    ids = _tensors(bank, partition)["stimulus"].tolist()
    assert ids == [stimulus_id(key) for key in keys]
    assert len(set(ids)) == len(ids)
    rows = read_json(bank / f"{partition}.json")["rows"]
    assert [row["picture"] for row in rows] == keys
    assert [row["stimulus"] for row in rows] == ids
    assert rows[2]["concept"] == concepts[1][6:]


def test_run_directory_explains_itself_and_keeps_no_shards(bank):
    names = {path.name for path in bank.iterdir()}
    records = {"options.json", "env.json", "inputs.json", "log.txt", "DONE"}
    files = {f"{part}.{kind}" for part in ("training", "test") for kind in ("safetensors", "json")}
    assert names == records | files


@pytest.mark.parametrize(
    "changed", [(), ("--num_workers", 1), ("--shard_size", 5), ("--batch_size", 1)]
)
def test_features_do_not_depend_on_how_the_work_is_cut(world, bank, tmp_path, changed):
    assert _run(world, tmp_path / "again", *changed) == 0
    for partition in ("training", "test"):
        one, other = _tensors(bank, partition), _tensors(tmp_path / "again", partition)
        for name in NAMES:
            exact = "--batch_size" not in changed and "--shard_size" not in changed
            tolerance = 0 if exact else 1e-4
            torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


def test_superpixel_pngs_are_written_on_request(world, tmp_path):
    for partition, concept in (("training", TRAINING[0]), ("test", TEST[0])):
        folder = f"{partition}_images/{concept}"
        shutil.copytree(world / "data" / folder, tmp_path / "data" / folder)
    size = ("--superpixel_size", "500", "--save_superpixels")
    assert _run(world, tmp_path / "bank", *size, data=tmp_path / "data") == 0
    for key in _keys(TEST[:1], "test"):
        folder = (tmp_path / "bank" / "superpixels" / key).with_suffix("")
        levels = superpixel.superpixels(superpixel.at_slic_size(_read(world, key), 500))
        assert {path.stem for path in folder.iterdir()} == set(levels)
        for name, rgb in levels.items():
            png = Image.open(folder / f"{name}.png")
            assert (png.format, png.size) == ("PNG", (500, 500))
            np.testing.assert_array_equal(np.asarray(png), rgb)


def test_dry_run_writes_nothing(world, tmp_path, capsys):
    assert _run(world, tmp_path / "bank", "--dry_run") == 0
    assert "encode 6 training pictures" in capsys.readouterr().out
    assert not (tmp_path / "bank").exists()


# --- restarts ---------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def _kill_after_shards(monkeypatch, count: int) -> None:
    """Let ``count`` pieces be encoded, then stop the process's work mid-way."""
    encode, calls = encode_piece, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) > count:
            raise KilledError
        return encode(*arguments)

    monkeypatch.setattr(pieces, "encode_piece", stopping)


@pytest.mark.parametrize("count", [1, 6])  # 3 pieces of text, then 3 + 2 of pictures
def test_a_killed_run_goes_on_after_its_last_shard(world, bank, tmp_path, monkeypatch, count):
    output = tmp_path / "bank"
    _kill_after_shards(monkeypatch, count)
    with pytest.raises(KilledError):
        _run(world, output)
    monkeypatch.undo()
    shards = {path: path.stat().st_mtime_ns for path in (output / "shards").iterdir()}
    assert len(shards) == count and not (output / "DONE").exists()
    monkeypatch.setattr(RunDirectory, "finish", _refuse_to_finish)
    with pytest.raises(KilledError):  # all encoded, not yet marked as finished
        _run(world, output)
    monkeypatch.undo()
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert _run(world, output) == 0
    _assert_same_bank(bank, output)
    assert (output / "DONE").exists() and not (output / "shards").exists()


def _mixed_in(output, path, header_change: dict) -> None:
    """Change the header of a piece, as if it had been made in another way and copied here."""
    tensors, header = load_tensors(output / "shards" / path)
    save_tensors(output / "shards" / path, tensors, {**header, **header_change})


def test_pieces_of_another_precision_are_refused_and_made_again(world, bank, tmp_path, capsys):
    output = tmp_path / "bank"
    assert _run(world, output, "--shard", "1/2") == 0
    clip = load_tensors(output / "shards" / "text-000000.safetensors")[1]["clip"]
    _mixed_in(output, "text-000004.safetensors", {"clip": clip | {"precision": "bfloat16"}})
    assert _run(world, output) == 1
    error = capsys.readouterr().err
    assert "text-000004.safetensors" in error and "'precision': 'bfloat16'" in error
    assert "delete" in error and not (output / "DONE").exists()
    (output / "shards" / "text-000004.safetensors").unlink()
    assert _run(world, output) == 0
    _assert_same_bank(bank, output)


def _refuse_to_finish(*_arguments) -> None:
    raise KilledError


def test_a_finished_run_does_nothing(world, bank, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in bank.glob("*.safetensors")}
    _kill_after_shards(monkeypatch, 0)
    assert _run(world, bank) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_weights_are_refused(world, bank, tmp_path, capsys):
    weights = random_models(tmp_path / "models", seed=1).clip_checkpoint
    assert _run(world, bank, "--clip_pretrained", weights) == 2
    assert "clip_weights" in capsys.readouterr().err


def test_other_options_are_refused(world, bank, capsys):
    assert _run(world, bank, "--text_template", "a {concept}") == 2
    assert "--text_template" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["content", "name", "number"])
def test_other_pictures_are_refused(world, bank, data, tmp_path, capsys, change):
    output = shutil.copytree(bank, tmp_path / "bank")
    path = data / _keys(TEST, "test")[0]
    if change == "content":
        _picture(999).save(path)
    elif change == "name":
        path.rename(path.with_name("other.png"))
    else:
        _picture(999).save(path.with_name("more.png"))
    assert _run(world, output, data=data) == 2
    error = capsys.readouterr().err
    assert "input test_images" in error and "input training_images" not in error


def test_other_captions_are_refused(world, bank, tmp_path, capsys):
    write_json(tmp_path / "captions.json", {"dog": "any dog"})
    assert _run(world, bank, "--captions", tmp_path / "captions.json") == 2
    assert "input captions" in capsys.readouterr().err


# --- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("1/2", "2/2"), ("3/3", "1/3", "2/3")], ids=len)
def test_parts_join_to_the_same_bytes_as_one_run(world, bank, tmp_path, capsys, order):
    output = tmp_path / "bank"
    for part in order:
        assert not (output / "DONE").exists()
        assert _run(world, output, "--shard", part) == 0
    printed = capsys.readouterr().out
    assert printed.count("still missing") == len(order) - 1 and "feature bank" in printed
    for name in ("training.safetensors", "test.safetensors", "training.json", "test.json"):
        assert (output / name).read_bytes() == (bank / name).read_bytes()
    assert (output / "DONE").exists() and not (output / "shards").exists()


def test_parts_keep_layers_of_the_image_side(world, bank, tmp_path):
    for part in ("2/2", "1/2"):
        assert _run(world, tmp_path / "bank", "--image_layers", 1, "--shard", part) == 0
    one, other = _tensors(bank, "training"), _tensors(tmp_path / "bank", "training")
    layer = other.pop("image_layer_1")
    assert layer.dtype == torch.float32 and len(layer) == len(TRAINING) * PER_CONCEPT
    assert len(layer.unique(dim=0)) == len(layer)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_part_that_has_done_its_share_loads_no_model(world, tmp_path, monkeypatch):
    assert _run(world, tmp_path / "bank", "--shard", "2/2") == 0
    monkeypatch.setattr(stage, "load_clip", _refuse_to_finish)
    assert _run(world, tmp_path / "bank", "--shard", "2/2") == 0
    assert not (tmp_path / "bank" / "DONE").exists()


def test_more_parts_than_pieces_leave_some_with_nothing_to_do(world, tmp_path):
    assert _run(world, tmp_path / "bank", "--shard", "99/99") == 0
    assert not (tmp_path / "bank" / "training.safetensors").exists()


def test_a_call_without_a_part_encodes_what_the_parts_left(world, bank, tmp_path, monkeypatch):
    output = tmp_path / "bank"
    assert _run(world, output, "--shard", "1/2") == 0
    made = {path: path.stat().st_mtime_ns for path in (output / "shards").iterdir()}
    assert len(made) == 4
    monkeypatch.setattr(RunDirectory, "finish", _refuse_to_finish)
    with pytest.raises(KilledError):
        _run(world, output)
    monkeypatch.undo()
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert _run(world, output) == 0
    _assert_same_bank(bank, output)


@pytest.mark.parametrize("moment", ["before it looks", "while it reads"])
def test_a_part_that_comes_last_together_with_another_is_no_error(
    world, bank, tmp_path, monkeypatch, moment
):
    """Both find all pieces; the other is faster, joins and removes them."""
    output = tmp_path / "bank"
    assert _run(world, output, "--shard", "1/2") == 0
    module, function = {
        "before it looks": (stage, "finish"),
        "while it reads": (pieces, "read_pieces"),
    }[moment]
    original = getattr(module, function)

    def overtaken(*arguments):
        monkeypatch.undo()
        assert _run(world, output) == 0
        return original(*arguments)

    monkeypatch.setattr(module, function, overtaken)
    assert _run(world, output, "--shard", "2/2") == 0
    _assert_same_bank(bank, output)
    assert not (output / "shards").exists()


# --- texts and precision ----------------------------------------------------------------------


def test_every_distinct_text_is_encoded_once(world, tmp_path, monkeypatch):
    """Counted where open_clip's own text tower reads them."""
    read, load = [], load_clip

    def listening(*given):
        made = load(*given)
        made.model.transformer.register_forward_pre_hook(lambda _, batch: read.append(batch[0]))
        return made

    monkeypatch.setattr(stage, "load_clip", listening)
    write_json(tmp_path / "captions.json", {"car": "a dog", "dog": "a dog"})
    options = ("--captions", tmp_path / "captions.json", "--batch_size", 2)
    assert _run(world, tmp_path / "bank", *options) == 0
    listed = [
        row["text"]
        for partition in ("training", "test")
        for row in read_json(tmp_path / "bank" / f"{partition}.json")["rows"]
    ]
    assert len(listed) == 10 and len(set(listed)) == 4
    assert sum(len(batch) for batch in read) == 4
    texts = torch.cat([_tensors(tmp_path / "bank", name)["text"] for name in ("training", "test")])
    same = torch.tensor([[a == b for b in listed] for a in listed])
    assert torch.equal((texts[:, None] == texts).all(-1), same)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision_marks_the_bank_and_is_close(world, bank, tmp_path, precision):
    assert _run(world, tmp_path / "half", "--precision", precision) == 0
    found = open_bank(tmp_path / "half", "test")
    assert found.clip == open_bank(bank, "test").clip | {"precision": precision}
    header = read_json(tmp_path / "half" / "test.json")
    assert header["clip"]["precision"] == precision
    for name, rows in _tensors(bank, "test").items():
        other = _tensors(tmp_path / "half", "test")[name]
        assert other.dtype == rows.dtype
        if name != "stimulus":
            assert not torch.equal(rows, other)
            assert torch.cosine_similarity(rows, other).min() > 0.999
    with pytest.raises(util.DataError, match="precision"):
        check_clip(found.clip, found.path, open_bank(bank, "test").clip, tmp_path / "model")


def test_another_precision_in_the_same_folder_is_refused(world, bank, capsys):
    assert _run(world, bank, "--precision", "bfloat16") == 2
    assert "--precision: 'float32' then, 'bfloat16' now" in capsys.readouterr().err


# --- damaged data and wrong flags -------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_pictures_are_named(world, data, tmp_path, capsys, workers):
    path = data / _keys(TRAINING, "training")[3]
    path.write_bytes(path.read_bytes()[:-150])
    assert _run(world, tmp_path / "bank", "--num_workers", workers, data=data) == 1
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "bank" / "DONE").exists()
    shutil.copy(world / "data" / _keys(TRAINING, "training")[3], path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--clip_model", "ViT-H-15"),
        ("--clip_model", "no/such.json"),
        ("--clip_pretrained", "laion9b"),
        ("--text_template", "always the same"),
        ("--device", "tpu"),
    ],
)
def test_wrong_flags_are_named(world, tmp_path, capsys, flag, value):
    assert _run(world, tmp_path / "bank", flag, value) == 2
    error = capsys.readouterr().err
    assert flag in error and value in error
    assert not (tmp_path / "bank").exists()


def test_weights_of_another_model_are_refused(world, tmp_path, capsys):
    other = {"logit_scale": torch.zeros(()), "visual.proj": torch.zeros(2, 2)}
    save_tensors(tmp_path / "w.safetensors", other, {})
    assert _run(world, tmp_path / "bank", "--clip_pretrained", tmp_path / "w.safetensors") == 1
    assert "cannot be loaded" in capsys.readouterr().err


def test_test_concepts_among_the_training_concepts_are_refused(world, data, tmp_path, capsys):
    shutil.copytree(data / "test_images" / TEST[0], data / "training_images" / "00009_dog")
    assert _run(world, tmp_path / "bank", data=data) == 1
    assert "dog" in capsys.readouterr().err
    assert not (tmp_path / "bank").exists()


def test_missing_pictures_are_refused(world, tmp_path, capsys):
    assert _run(world, tmp_path / "bank", data=tmp_path / "nowhere") == 1
    assert "training_images" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['["a caption"]', '{"dog": 3}', "{"])
def test_damaged_captions_are_refused(world, tmp_path, capsys, content):
    (tmp_path / "captions.json").write_text(content)
    assert _run(world, tmp_path / "bank", "--captions", tmp_path / "captions.json") == 1
    assert "captions.json" in capsys.readouterr().err
