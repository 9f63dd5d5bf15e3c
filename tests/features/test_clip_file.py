"""A CLIP's file is looked at before the first picture is: what is it, if not that?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Chain
from safetensors.torch import save_file

import clip_feature_extractor
from features.clip import check_clip_file, check_pretrained
from util import DataError, UserError

NAME = "ViT-H-14"
WIDTH = 1024
OWN = {"logit_scale": torch.zeros(()), "text_projection": torch.zeros(2, WIDTH),
       "visual.proj": torch.zeros(2, WIDTH)}  # fmt: skip


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_an_open_clip_file_of_the_model_is_taken(tmp_path: Path) -> None:
    save_file(OWN, tmp_path / "open_clip_model.safetensors")
    check_clip_file(NAME, tmp_path / "open_clip_model.safetensors")
    torch.save(OWN, tmp_path / "open_clip_pytorch_model.bin")
    check_clip_file(NAME, tmp_path / "open_clip_pytorch_model.bin")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"vision_model.embeddings.class_embedding": (WIDTH,)}, "image_encoder of an IP-Adapter"),
        ({"text_model.final_layer_norm.weight": (8,)}, "transformers' layout"),
        ({"ip_adapter.1.to_k_ip.weight": (8, 8)}, "an IP-Adapter"),
        ({"model.diffusion_model.out.0.weight": (8,)}, "a Stable Diffusion checkpoint"),
        ({"logit_scale": (), "text_projection": (768, 768)}, "embeddings of 768"),
        ({"backbone.weight": (8,)}, "backbone.weight"),
    ],
)
def test_other_models_are_named(tmp_path: Path, keys, told) -> None:
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=told) as refused:
        check_clip_file(NAME, tmp_path / "w.safetensors")
    assert "open_clip" in str(refused.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<html><body>login</body></html>", "a web page"),
        (b"", "an empty file"),
    ],
)
def test_what_lies_in_its_place_is_named(tmp_path: Path, name, content, told) -> None:
    with pytest.raises(DataError, match=told):
        check_clip_file(NAME, written(tmp_path / name, content))


def test_a_cut_file_is_seen_in_both_formats(tmp_path: Path) -> None:
    torch.save({"logit_scale": torch.zeros(9999)}, tmp_path / "whole.bin")
    cut = written(tmp_path / "cut.bin", (tmp_path / "whole.bin").read_bytes()[:9999])
    with pytest.raises(DataError, match="cut short"):
        check_clip_file(NAME, cut)
    save_file(OWN, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    with pytest.raises(DataError, match="unreadable as safetensors"):
        check_clip_file(NAME, written(tmp_path / "cut.safetensors", whole[:-9]))


def test_of_a_folder_the_file_is_named(tmp_path: Path) -> None:
    save_file(OWN, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"name the file: .*open_clip_model\.safetensors"):
        check_pretrained(NAME, str(tmp_path))


def test_a_dry_run_sees_it(features: Chain, tmp_path: Path, capsys) -> None:
    page = written(tmp_path / "clip.safetensors", b"<!doctype html>")
    command = [
        "--data_path", features.data, "--output_path", tmp_path / "bank", "--device", "cpu",
        "--clip_model", features.models / "miniature-clip.json", "--clip_pretrained", page,
        "--dry_run",
    ]  # fmt: skip
    assert clip_feature_extractor.main([str(word) for word in command]) == 1
    assert "a web page" in capsys.readouterr().err
