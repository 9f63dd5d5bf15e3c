"""Scores of real EEG embeddings and real photographs, where those files are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
from datafiles.pictures import read_pixels
from evaluation import networks
from sdxl.vae import load_vae

DATA = Path(os.environ.get("EEG2IMAGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
EMBEDDINGS = DATA / "things_eeg2" / "sub08_atms_embeddings.npz"
PHOTOS, WEIGHTS = DATA / "imagenet_sample_256", DATA / "weights"

needs_embeddings = pytest.mark.skipif(
    not EMBEDDINGS.exists(), reason=f"no {EMBEDDINGS}: real EEG embeddings are not distributed"
)
needs_photos = pytest.mark.skipif(
    not (PHOTOS.exists() and WEIGHTS.exists()), reason=f"no photographs and weights in {DATA}"
)


@needs_embeddings
def test_retrieval_of_real_conditions_equals_five_lines_of_numpy():
    with np.load(EMBEDDINGS) as file:
        query, gallery = file["eeg_embedding"], file["clip_vith14_image"]
    n = len(query)
    found = metrics.retrieval_topk(
        torch.from_numpy(query), torch.from_numpy(gallery), torch.arange(n)
    )
    a, b = (x.astype(float) / np.linalg.norm(x.astype(float), axis=1)[:, None]
            for x in (query, gallery))  # fmt: skip
    similarity = a @ b.T
    rank = (similarity > np.diag(similarity)[:, None]).sum(1)
    assert found["n"] == found["gallery"] == n == 120
    assert found["top1"] == pytest.approx((rank < 1).mean(), abs=1e-12)
    assert found["top5"] == pytest.approx((rank < 5).mean(), abs=1e-12)
    assert found["2-way"] == pytest.approx(((n - 1 - rank) / (n - 1)).mean(), abs=1e-12)
    assert found["mrr"] == pytest.approx((1 / (1 + rank)).mean(), abs=1e-12)
    assert found["top1"] > 0.2 and found["2-way"] > 0.9, "far above chance: real EEG"
    shuffled = metrics.retrieval_topk(
        torch.from_numpy(np.roll(query, 1, 0)), torch.from_numpy(gallery), torch.arange(n)
    )
    assert shuffled["top1"] < 0.05


@pytest.fixture(scope="module")
def decoded(tmp_path_factory) -> tuple[list[Path], list[Path]]:
    """20 photographs at 256 px, and what the tiny autoencoder of SDXL's latents makes of them."""
    vae = load_vae(WEIGHTS, torch.float32)
    vae = vae.to(memory_format=torch.channels_last)  # several times faster on CPUs
    photos, folder = sorted(PHOTOS.glob("*.jpg"))[::40], tmp_path_factory.mktemp("taesdxl")
    made = []
    for path in photos:
        pixels = torch.from_numpy(read_pixels(path).copy()).permute(2, 0, 1)[None] / 255
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            back = vae.decode(vae.encode(pixels * 2 - 1).latents).sample.clamp(-1, 1) / 2 + 0.5
        made.append(folder / f"{path.stem}.png")
        Image.fromarray((back[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(made[-1])
    return photos, made


@needs_photos
def test_photographs_through_sdxl_s_tiny_autoencoder_have_the_known_psnr(decoded):
    pairs = [
        [torch.from_numpy(read_pixels(p).copy()).permute(2, 0, 1) / 255 for p in paths]
        for paths in decoded
    ]
    found = metrics.psnr(*(torch.stack(part) for part in pairs))
    assert found.mean() == pytest.approx(24.5, abs=1.0)


@needs_photos
def test_two_way_of_photographs_falls_with_noise(decoded, tmp_path):
    photos, made = decoded
    path = networks.find_weights("lite0", None)
    eye = networks.Eye.load("lite0", path, "mindeye", torch.device("cpu"), 16)
    truth = eye.features(photos)["avgpool"]
    rng, scores = np.random.default_rng(0), []
    for sigma in (0.0, 0.3, 0.6, 1.2):
        drawn = []
        for source in made:
            pixels = read_pixels(source) / 255
            noisy = np.clip(pixels + sigma * rng.standard_normal(pixels.shape), 0, 1)
            drawn.append(tmp_path / f"{sigma}_{source.name}")
            Image.fromarray((noisy * 255).round().astype(np.uint8)).save(drawn[-1])
        scores.append(metrics.two_way(truth, eye.features(drawn)["avgpool"]).mean())
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)
    assert scores[0] > 0.99 and scores[-1] < 0.7
