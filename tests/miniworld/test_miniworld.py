"""The embedded world: pictures show what they claim, simulated EEG carries it and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

import util
from miniworld import eeg, pictures
from miniworld.__main__ import main as build_world
from miniworld.brain_features import SOURCES, brain_features, feature_slices

SEED = 3
SNR = 0.3


# --- pictures -----------------------------------------------------------------------------------


def _scenes(n: int) -> list[pictures.Scene]:
    rng = np.random.default_rng(0)
    training, _ = pictures.sample_concepts(n, 0, SEED)
    return [pictures.sample_scene(concept, rng) for concept in training]


def test_vocabulary_is_rich_and_colours_differ():
    assert len(pictures.SHAPES) >= 16
    assert len(pictures.COLOURS) >= 10
    assert len(pictures.PATTERNS) >= 5
    for a, b in itertools.combinations(pictures.COLOURS.values(), 2):
        assert np.linalg.norm(np.subtract(a, b)) > 60
    for object_colour, background in itertools.permutations(pictures.COLOURS, 2):
        tone = pictures.second_tone(background)
        assert np.linalg.norm(tone - pictures.COLOURS[object_colour]) > 35


@pytest.mark.parametrize(("n_training", "seed"), [(16, 0), (16, 1), (16, 2), (300, 3)])
def test_concepts_are_disjoint_and_training_shows_every_attribute(n_training, seed):
    training, test = pictures.sample_concepts(n_training, 60, seed)
    assert (len(training), len(test)) == (n_training, 60)
    assert len(set(training + test)) == n_training + 60
    assert {c.shape for c in training} == set(pictures.SHAPES)
    assert {c.colour for c in training} == set(pictures.COLOURS)
    assert {c.background for c in training} == set(pictures.COLOURS)
    assert {c.pattern for c in training} == set(pictures.PATTERNS)
    assert all(c.colour != c.background for c in training + test)


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="invisible"):
        pictures.Concept("star", "red", "red", "dots")
    with pytest.raises(ValueError, match="'sphere'"):
        pictures.Concept("sphere", "red", "blue", "dots")
    with pytest.raises(util.UserError, match=r"--training_concepts\n  found:    15"):
        pictures.sample_concepts(15, 5, SEED)
    with pytest.raises(util.UserError, match=r"--images_per_concept\n  found:    100"):
        pictures.plan_scenes(16, 100, 5, SEED)


@pytest.mark.parametrize("flag", ["--training_concepts", "--test_concepts"])
def test_a_world_that_cannot_be_is_refused_before_anything_is_written(flag, tmp_path, capfd):
    assert build_world(["--output_path", str(tmp_path / "world"), flag, "100000"]) == 2
    assert flag in capfd.readouterr().err
    assert not (tmp_path / "world").exists()


def test_words():
    star = pictures.Concept("star", "red", "blue", "stripes")
    assert pictures.concept_name(star) == "red_star_on_blue_stripes"
    assert pictures.scene_caption(star) == "a red star on blue stripes"
    plain = pictures.Concept("half_disc", "orange", "grey", "plain")
    assert pictures.scene_caption(plain) == "an orange half disc on a plain grey background"


def test_scenes_of_one_concept_differ_in_place_only():
    concept = pictures.Concept("heart", "pink", "black", "waves")
    rng = np.random.default_rng(1)
    scenes = [pictures.sample_scene(concept, rng) for _ in range(10)]
    assert len({(s.x, s.y, s.size, s.rotation) for s in scenes}) == 10
    assert {pictures.concept_name(s) for s in scenes} == {pictures.concept_name(concept)}


def test_rendering_is_deterministic_and_every_picture_differs():
    scenes = _scenes(48)
    images = [pictures.render(scene, 64) for scene in scenes]
    assert all((i.dtype, i.shape) == (np.uint8, (64, 64, 3)) for i in images)
    assert len({i.tobytes() for i in images}) == 48
    assert all((pictures.render(s, 64) == i).all() for s, i in zip(scenes, images, strict=True))


@pytest.mark.parametrize("shape", list(pictures.SHAPES))
def test_object_is_visible_inside_and_antialiased(shape):
    scene = pictures.Scene(shape, "red", "white", "checks", x=0.55, y=0.45, size=0.4, rotation=0.3)
    image, mask = pictures.render(scene, 128), pictures.object_coverage(scene, 128)
    red = (image == pictures.COLOURS["red"]).all(axis=2)
    assert (red == (mask == 1)).all()
    assert 0.02 < red.mean() < 0.14  # the bounding circle covers 0.126 of the picture
    assert ((mask > 0.1) & (mask < 0.9)).sum() > 20  # soft edge
    assert not np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any()
    if shape not in ("ring", "crescent", "chevron"):  # these are open in the middle
        assert red[58, 70]


def test_shapes_stay_distinguishable_when_rotated():
    def outline(shape: str, rotation: float) -> np.ndarray:
        scene = pictures.Scene(shape, "red", "white", "plain", 0.5, 0.5, 0.8, rotation)
        return pictures.object_coverage(scene, 48) > 0.5

    angles = np.linspace(-pictures.MAX_ROTATION_RAD, pictures.MAX_ROTATION_RAD, 5)
    for a, b in itertools.combinations(pictures.SHAPES, 2):
        reference = outline(a, 0.0)
        turned = [outline(b, angle) for angle in angles]
        overlap = max((reference & t).sum() / (reference | t).sum() for t in turned)
        assert overlap < 0.9, f"{a} and {b} look alike"


def test_written_stimuli_sort_into_scene_order(tmp_path):
    scenes = pictures.write_stimuli(tmp_path, pictures.plan_scenes(16, 2, 3, SEED), SEED)
    assert (len(scenes["training"]), len(scenes["test"])) == (32, 3)
    captions = json.loads((tmp_path / "captions.json").read_text())
    truth = json.loads((tmp_path / "scenes.json").read_text())
    assert "SIMULATED" in truth["note"]
    for partition, expected in scenes.items():
        folders = sorted((tmp_path / f"{partition}_images").iterdir())
        files = [file for folder in folders for file in sorted(folder.iterdir())]
        assert len(files) == len(expected)
        assert [int(f.name[:5]) for f in folders] == list(range(1, len(folders) + 1))
        for file, scene in zip(files, expected, strict=True):
            key = file.relative_to(tmp_path).as_posix()
            assert file.parent.name[6:] == pictures.concept_name(scene)
            assert captions[key] == pictures.scene_caption(scene)
            assert truth["scenes"][key] == dataclasses.asdict(scene)
            assert (np.asarray(Image.open(file)) == pictures.render(scene)).all()


def test_stimuli_of_another_world_are_not_mixed_in(tmp_path):
    stranger = tmp_path / "test_images" / "00001_old" / "old_01.png"
    stranger.parent.mkdir(parents=True)
    stranger.touch()
    with pytest.raises(util.DataError, match=r"old_01\.png"):
        pictures.write_stimuli(tmp_path, pictures.plan_scenes(16, 1, 1, SEED), SEED)


# --- simulated EEG ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    """Features [400, D] of 400 pictures."""
    scenes = _scenes(400)
    return brain_features((pictures.render(s, 96) for s in scenes), scenes, SEED)


@pytest.fixture(scope="module")
def trials(features) -> np.ndarray:
    """Simulated trials [400, 4, 63, 250] of subject 1."""
    return _simulate(features)


def _simulate(features: np.ndarray, subject: int = 1, first: int = 0) -> np.ndarray:
    return eeg.simulate(
        features,
        subject=subject,
        partition="training",
        repetitions=4,
        snr=SNR,
        seed=SEED,
        first_condition=first,
    )


def _decode(eeg_mean: np.ndarray, target: np.ndarray) -> float:
    """Held-out correlation of a ridge regression from [n, 63, 250] to target [n, k], mean of k."""
    x = eeg_mean[:, :, :125].reshape(len(eeg_mean), 63, 25, 5).mean(axis=3)
    x = x.reshape(len(x), -1)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    train, test = slice(0, 300), slice(300, None)
    dual = np.linalg.solve(x[train] @ x[train].T + 1000 * np.eye(300), target[train])
    predicted = x[test] @ (x[train].T @ dual)
    pairs = zip(predicted.T, target[test].T, strict=True)
    return float(np.mean([np.corrcoef(p, t)[0, 1] for p, t in pairs]))


def test_channels_and_times_are_the_published_ones():
    assert len(set(eeg.CHANNELS)) == 63
    assert "Fz" not in eeg.CHANNELS
    times = eeg.times()
    assert (len(times), times[0], times[50], times[-1]) == (300, -0.2, 0.0, 0.996)
    directions = dict(zip(eeg.CHANNELS, eeg.channel_directions(), strict=True))
    assert directions["O2"][0] > 0 > directions["O1"][0]  # x is right
    assert directions["Oz"][1] < -0.8  # y is front
    assert directions["Cz"][2] > 0.9  # z is up


def test_no_feature_and_no_source_is_dead(features):
    assert (features.std(axis=0) > 0.5).all()
    assert np.abs(features.mean(axis=0)).max() < 0.5
    assert 60 <= features.shape[1] <= 100
    assert len(SOURCES) >= 8
    assert all(0.08 <= source.latency_s <= 0.4 for source in SOURCES)
    for name, columns in feature_slices().items():
        only = np.zeros_like(features[:20])
        only[:, columns] = features[:20, columns]
        response = eeg.evoked(only, subject=1, snr=SNR, seed=SEED)
        assert response.std(axis=0).max() > 0.1 * SNR, f"source {name} is silent"


def test_retinotopy_is_crossed():
    grid = next(source for source in SOURCES if source.name == "luminance_grid")
    x, _, z = eeg.source_directions(grid).reshape(4, 4, 3).transpose(2, 0, 1)
    assert (x[:, 0] > 0).all() and (x[:, -1] < 0).all()  # left field, right hemisphere
    assert (z[0] < z[-1]).all()  # upper field below


def test_simulation_is_deterministic_and_independent_of_its_pieces(features, trials):
    assert trials.dtype == np.float32
    assert trials.shape == (400, 4, 63, 250)
    assert (_simulate(features[:3]) == trials[:3]).all()
    assert (_simulate(features[7:9], first=7) == trials[7:9]).all()
    assert not np.allclose(_simulate(features[7:9], first=8), trials[7:9])
    other = eeg.simulate(
        features[:1], subject=1, partition="test", repetitions=4, snr=SNR, seed=SEED
    )
    assert not np.allclose(other, trials[:1])


def test_snr_is_what_the_flag_says_and_noise_std_is_one(features, trials):
    evoked = eeg.evoked(features, subject=1, snr=SNR, seed=SEED)
    signal_std = (evoked - evoked.mean(axis=0)).std()
    residual = trials - trials.mean(axis=1, keepdims=True)
    noise_std = residual.std() * np.sqrt(4 / 3)  # 4 trials lose one degree of freedom
    assert noise_std == pytest.approx(1, abs=0.05)
    assert signal_std / noise_std == pytest.approx(SNR, rel=0.1)
    bias = (trials.mean(axis=(0, 1)) - evoked.mean(axis=0))[:, 15:]
    assert np.abs(bias).mean() < 0.05  # averaging gives the evoked response back


def test_noise_has_a_falling_spectrum_and_posterior_alpha(features):
    noise = eeg.simulate(
        features[:40] * 0, subject=2, partition="test", repetitions=4, snr=0.0, seed=SEED
    )
    power = (np.abs(np.fft.rfft(noise, axis=-1)) ** 2).mean(axis=(0, 1))  # bins of 1 Hz
    assert power[:, 2:6].mean() > 3 * power[:, 40:60].mean()
    frontal, occipital = eeg.CHANNELS.index("AFz"), eeg.CHANNELS.index("POz")
    alpha = power[:, 8:13].mean(axis=1) / power[:, 20:30].mean(axis=1)
    assert alpha[occipital] > 2 * alpha[frontal]
    correlation = np.corrcoef(noise.transpose(2, 0, 1, 3).reshape(63, -1))
    names = eeg.CHANNELS.index
    assert correlation[names("C1"), names("C3")] > 0.3
    assert abs(correlation[names("F8"), names("P7")]) < 0.1


def test_response_comes_after_the_onset_and_before_half_a_second(features):
    evoked = eeg.evoked(features, subject=1, snr=SNR, seed=SEED)
    std = (evoked - evoked.mean(axis=0)).std(axis=(0, 1))
    assert std[:12].max() < 0.01 * std.max()  # 0-44 ms: still baseline
    assert 0.08 <= std.argmax() / eeg.SAMPLING_HZ <= 0.25
    assert (std[20:100] ** 2).sum() > 0.95 * (std**2).sum()  # 80-400 ms
    by_channel = (evoked - evoked.mean(axis=0)).std(axis=(0, 2))
    back = [eeg.CHANNELS.index(c) for c in ("O1", "Oz", "O2", "PO7", "PO8")]
    front = [eeg.CHANNELS.index(c) for c in ("Fp1", "Fp2", "AFz", "F1", "F2")]
    assert by_channel[back].min() > 5 * by_channel[front].max()


def test_subjects_share_the_code_but_not_the_head(features):
    first, second = (eeg.subject_model(s, SNR, SEED) for s in (1, 2))
    rows = zip(first.topographies, second.topographies, strict=True)
    similarity = np.array([np.corrcoef(a, b)[0, 1] for a, b in rows])
    assert 0.3 < np.median(similarity) < 0.95
    delays = first.kernels.argmax(axis=1) - second.kernels.argmax(axis=1)
    assert delays.any() and np.abs(delays).max() <= 11  # samples of 4 ms
    with pytest.raises(ValueError, match="snr is -1"):
        eeg.subject_model(1, -1.0, SEED)


def test_stimulus_information_is_decodable_and_gone_when_shuffled(features, trials):
    mean = trials.mean(axis=1)
    order = np.random.default_rng(0).permutation(len(features))
    for name in ("luminance_grid", "red_green_grid", "shape", "object_colour"):
        target = features[:, feature_slices()[name]]
        assert _decode(mean, target) > 0.4, name
        assert abs(_decode(mean, target[order])) < 0.15, name


def test_information_is_where_and_when_the_sources_are(features, trials):
    luminance = features[:, feature_slices()["luminance_grid"]]
    mean = trials.mean(axis=1)
    late, posterior_only = mean.copy(), mean.copy()
    late[:, :, :50] = np.random.default_rng(0).standard_normal((400, 63, 50))  # 0-200 ms
    front = [i for i, c in enumerate(eeg.CHANNELS) if c[0] in "AF"]
    posterior_only[:, front] = np.random.default_rng(1).standard_normal((400, len(front), 250))
    full = _decode(mean, luminance)
    assert _decode(late, luminance) < full - 0.2
    assert _decode(posterior_only, luminance) > full - 0.05


def test_written_subject_has_the_published_format(tmp_path):
    plan = pictures.plan_scenes(16, 1, 2, SEED)
    scenes = {partition: list(part.values()) for partition, part in plan.items()}
    features = {
        name: brain_features([pictures.render(scene, 96) for scene in items], items, SEED)
        for name, items in scenes.items()
    }
    repetitions = {"training": 2, "test": 3}
    eeg.write_subject(tmp_path, "sub-02", features, repetitions, SNR, SEED)
    folder = tmp_path / "Preprocessed_data_250Hz" / "sub-02"
    assert sorted(p.name for p in folder.iterdir()) == [
        "preprocessed_eeg_test.npy",
        "preprocessed_eeg_training.npy",
        "simulated.json",
    ]
    for partition, shape in (("training", (16, 2, 63, 250)), ("test", (2, 3, 63, 250))):
        with (folder / f"preprocessed_eeg_{partition}.npy").open("rb") as stream:
            content = pickle.load(stream)
        assert set(content) == {"preprocessed_eeg_data", "ch_names", "times"}
        assert content["preprocessed_eeg_data"].shape == shape
        assert content["preprocessed_eeg_data"].dtype == np.float64
        assert content["ch_names"] == list(eeg.CHANNELS)
        assert len(content["times"]) == 300
    assert "SIMULATED" in json.loads((folder / "simulated.json").read_text())["note"]
    with pytest.raises(ValueError, match="sub-01"):
        eeg.write_subject(tmp_path, "subject2", features)
