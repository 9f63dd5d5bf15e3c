"""SIMULATED EEG: a linear forward model from pictures to 63 channels, plus realistic noise.

picture + scene -> features [n, D] -> sources on the scalp sphere (a topography and a smooth
kernel per feature) -> evoked response [n, 63, 250] -> trials with noise [n, reps, 63, 250].

Units follow the published recordings, which are whitened by multivariate noise normalisation:
every channel has a single-trial noise std of about 1 (dimensionless), correlations between
channels are weak, and the spectrum still falls with frequency. `snr` is the std of the
condition-specific evoked signal over conditions, channels and times, in those units.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from datafiles import electrodes
from datafiles.eeg_files import SIMULATED_NOTE
from datafiles.stimuli import PARTITIONS
from miniworld.brain_features import SOURCES, Source, feature_slices, reference_statistics
from rundirs.files import atomic_write, write_json

# fmt: off
CHANNELS = (
    "Fp1", "Fp2", "AF7", "AF3", "AFz", "AF4", "AF8", "F7", "F5", "F3", "F1", "F2", "F4", "F6",
    "F8", "FT9", "FT7", "FC5", "FC3", "FC1", "FCz", "FC2", "FC4", "FC6", "FT8", "FT10", "T7",
    "C5", "C3", "C1", "Cz", "C2", "C4", "C6", "T8", "TP9", "TP7", "CP5", "CP3", "CP1", "CPz",
    "CP2", "CP4", "CP6", "TP8", "TP10", "P7", "P5", "P3", "P1", "Pz", "P2", "P4", "P6", "P8",
    "PO7", "PO3", "POz", "PO4", "PO8", "O1", "Oz", "O2",
)
# fmt: on
SAMPLING_HZ = 250
N_TIMES = 250  # 0 .. 0.996 s after picture onset
N_TIMES_STORED = 300  # the published `times` also has the 50 baseline samples the EEG lacks
DEFAULT_SNR = 0.16
DEFAULT_REPETITIONS: Mapping[str, int] = MappingProxyType({"training": 4, "test": 20})

ONSET_S = 0.052  # no kernel starts earlier: the retina-to-cortex delay
SPREAD_RAD = 0.5  # angular width of a source on the scalp
RETINOTOPIC_SPREAD = 0.9  # shift of a source across the visual field, in sphere radii
PADDED = 320  # length of the FFT; longer than N_TIMES so that no trial wraps around
TRIAL_LATENCY_SD_S = 0.006
TRIAL_GAIN_SD = 0.25
ALPHA_SHARE = 0.4  # share of the noise variance that is alpha where alpha is strongest


COMMON_SOURCES = (  # the same for every picture: the visually evoked P1, N1 and P2
    Source("common_p1", 1, 0.100, 0.016, ("Oz",), 1.0),
    Source("common_n1_left", 1, 0.165, 0.024, ("PO7",), 1.0),
    Source("common_n1_right", 1, 0.165, 0.024, ("PO8",), 1.2),
    Source("common_p2", 1, 0.240, 0.045, ("POz",), 0.8),
)


def times() -> list[float]:
    """The published 300 sample times in seconds, -0.2 .. 0.996; times()[50] is exactly 0."""
    return [(i - 50) / SAMPLING_HZ for i in range(N_TIMES_STORED)]


# --- forward model ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def channel_directions() -> np.ndarray:
    """Unit vectors [63, 3] of CHANNELS from the sphere centre: x right, y front, z up."""
    places = electrodes.positions(CHANNELS)
    points = np.array([places[name] for name in CHANNELS])
    # least-squares sphere: |p|^2 = 2 p.c + (r^2 - |c|^2) is linear in the centre c
    design = np.column_stack([2 * points, np.ones(len(points))])
    centre = np.linalg.lstsq(design, (points**2).sum(axis=1), rcond=None)[0][:3]
    return _unit(points - centre)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def source_directions(source: Source) -> np.ndarray:
    """Unit vectors [n_features, 3] of the places a source's features come from.

    Grids are retinotopic: the left visual field is on the right, the upper field below.
    """
    anchors = channel_directions()[[CHANNELS.index(name) for name in source.channels]]
    centres = anchors[np.arange(source.n_features) % len(anchors)]
    if not source.name.endswith("_grid"):
        return centres
    grid = math.isqrt(source.n_features)
    row, column = np.divmod(np.arange(source.n_features), grid) / np.float64(grid - 1) - 0.5
    right, up = -RETINOTOPIC_SPREAD * column, RETINOTOPIC_SPREAD * row
    return _unit(centres + np.stack([right, 0 * right, up], axis=1))


@dataclass(frozen=True)
class _Dipoles:
    """One row per feature (and per common component, at the end)."""

    directions: np.ndarray  # [D, 3] unit vectors
    moments: np.ndarray  # [D, 3]: along the direction and in two tangential directions
    latencies_s: np.ndarray  # [D]
    gains: np.ndarray  # [D]


def _world_dipoles(seed: int) -> _Dipoles:
    """The average brain: every feature gets its own place, orientation and latency."""
    rng = np.random.default_rng([seed, 3])
    every = SOURCES + COMMON_SOURCES
    n = sum(source.n_features for source in every)
    directions = np.concatenate([source_directions(source) for source in every])
    latencies = np.repeat([s.latency_s for s in every], [s.n_features for s in every])
    n_common = len(COMMON_SOURCES)
    moments = rng.standard_normal((n, 3))
    moments[-n_common:] = [1.0, 0.2, 0.2]  # the P1 is positive on everybody's scalp ...
    moments[-n_common + 1 : -1, 0] = -1.0  # ... and the N1 negative
    shifts = rng.normal(0, 0.12, (n, 3))
    lags = rng.uniform(-0.12, 0.12, n) * (latencies - ONSET_S)
    shifts[-n_common:], lags[-n_common:] = 0, 0
    return _Dipoles(_unit(directions + shifts), moments, latencies + lags, np.ones(n))


def _subject_dipoles(subject: int, seed: int) -> _Dipoles:
    """The world's dipoles in one head: other folds, other orientations, other speed."""
    rng = np.random.default_rng([seed, 4, subject])
    world = _world_dipoles(seed)
    n = len(world.gains)
    slowness = np.clip(rng.normal(0, 0.007), -0.015, 0.015)
    latencies = world.latencies_s + slowness + rng.normal(0, 0.003, n)
    return _Dipoles(
        directions=_unit(world.directions + rng.normal(0, 0.12, (n, 3))),
        moments=world.moments + rng.normal(0, 0.35, (n, 3)),
        latencies_s=np.maximum(latencies, ONSET_S + 0.025),
        gains=np.exp(rng.normal(0, 0.2, n)),
    )


def _topographies(dipoles: _Dipoles) -> np.ndarray:
    """[D, 63]: a radial lobe plus a pair of +/- lobes around every direction."""
    channels = channel_directions()
    cosine = np.clip(dipoles.directions @ channels.T, -1, 1)
    lobe = np.exp(-0.5 * (np.arccos(cosine) / SPREAD_RAD) ** 2)
    vertical = np.array([0.0, 0.0, 1.0]) - dipoles.directions * dipoles.directions[:, 2:]
    vertical = _unit(vertical)
    lateral = np.cross(dipoles.directions, vertical)
    slope_v, slope_l = vertical @ channels.T / SPREAD_RAD, lateral @ channels.T / SPREAD_RAD
    radial, tangential_v, tangential_l = dipoles.moments.T[:, :, None]
    weights = radial + tangential_v * slope_v + tangential_l * slope_l
    return dipoles.gains[:, None] * lobe * weights


def _kernels(latencies_s: np.ndarray) -> np.ndarray:
    """Responses [D, 250] that rise at ONSET_S, peak with 1 at the latency and then undershoot."""
    every = SOURCES + COMMON_SOURCES
    widths = np.repeat([s.width_s for s in every], [s.n_features for s in every])[:, None]
    since_onset = np.maximum(np.arange(N_TIMES) / SAMPLING_HZ - ONSET_S, 1e-9)[None, :]
    peak = latencies_s[:, None] - ONSET_S
    order = (peak / widths) ** 2  # a gamma bump of this order has the wanted width
    bump = np.exp(order * (np.log(since_onset / peak) + 1 - since_onset / peak))
    return bump * np.cos(0.75 * (since_onset - peak) / widths)


@dataclass(frozen=True)
class SubjectModel:
    """One simulated head. D features, C common components; arrays are float32."""

    topographies: np.ndarray  # [D + C, 63], scaled so that the evoked std is the snr
    kernels: np.ndarray  # [D + C, 250]
    mixing: np.ndarray  # [63, 63]: independent noise -> channels, each of std sqrt(1 - alpha)
    alpha: np.ndarray  # [2, 63]: std of the left and the right alpha generator per channel
    alpha_hz: float


def _scale_to_snr(
    topographies: np.ndarray, kernels: np.ndarray, snr: float, seed: int
) -> np.ndarray:
    """Gives each source its share and the total the std `snr`; returns topographies [D + C, 63].

    With x = sum_d f_d topography_d kernel_d, the variance over conditions, channels and times is
    the sum over d, e of cov(f)_de <topography_d, topography_e> <kernel_d, kernel_e> / (63 * 250).
    """
    n_features = sum(source.n_features for source in SOURCES)
    covariance = np.ones((len(kernels), len(kernels)))  # common components always "1"
    covariance[:n_features, :n_features] = reference_statistics(seed)[2]
    kernel_products = kernels @ kernels.T / (len(CHANNELS) * N_TIMES)

    def std(scaled: np.ndarray, part: slice) -> float:
        products = (scaled @ scaled.T) * kernel_products * covariance
        return math.sqrt(products[part, part].sum())

    scaled = topographies.copy()
    for source, part in zip(SOURCES, feature_slices().values(), strict=True):
        scaled[part] *= source.gain / std(topographies, part)
    for row, source in enumerate(COMMON_SOURCES, n_features):
        scaled[row] *= source.gain / std(topographies, slice(row, row + 1))
    for part in (slice(0, n_features), slice(n_features, None)):
        scaled[part] *= snr / std(scaled, part)
    return scaled


def _noise_model(subject: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Mixing [63, 63], alpha [2, 63] and alpha frequency; the noise std per channel is 1."""
    rng = np.random.default_rng([seed, 5, subject])
    channels = channel_directions()
    angles = np.arccos(np.clip(channels @ channels.T, -1, 1))
    covariance = 0.5 * np.exp(-0.5 * (angles / 0.5) ** 2) + 0.5 * np.eye(len(channels))
    generators = channels[[CHANNELS.index("PO3"), CHANNELS.index("PO4")]]
    generators = _unit(generators + rng.normal(0, 0.12, (2, 3)))
    distance = np.arccos(np.clip(generators @ channels.T, -1, 1))
    power = np.exp(-((distance / 0.6) ** 2))
    power *= ALPHA_SHARE / power.sum(axis=0).max()
    rest = np.sqrt(1 - power.sum(axis=0))
    return rest[:, None] * np.linalg.cholesky(covariance), np.sqrt(power), rng.uniform(9, 11)


@functools.lru_cache(maxsize=16)
def subject_model(subject: int, snr: float, seed: int) -> SubjectModel:
    """The forward and noise model of one simulated subject; the same arguments, the same head."""
    if not snr >= 0:
        raise ValueError(f"snr is {snr}, must be >= 0 (0 = noise only)")
    dipoles = _subject_dipoles(subject, seed)
    kernels = _kernels(dipoles.latencies_s)
    topographies = _scale_to_snr(_topographies(dipoles), kernels, snr, seed)
    mixing, alpha, alpha_hz = _noise_model(subject, seed)
    as_float32 = [a.astype(np.float32) for a in (topographies, kernels, mixing, alpha)]
    for array in as_float32:
        array.setflags(write=False)  # shared by every caller through the cache
    return SubjectModel(*as_float32, alpha_hz=float(alpha_hz))


# --- trials -------------------------------------------------------------------------------------


def _evoked_one(features: np.ndarray, model: SubjectModel) -> np.ndarray:
    """Noise-free response [63, 250] to one picture with features [D]."""
    weights = np.append(features, np.ones(len(COMMON_SOURCES), dtype=np.float32))
    return (model.topographies * weights[:, None]).T @ model.kernels


def evoked(features: np.ndarray, *, subject: int, snr: float, seed: int) -> np.ndarray:
    """Noise-free simulated responses [n, 63, 250] float32 to features [n, D]."""
    model = subject_model(subject, snr, seed)
    return np.stack([_evoked_one(row, model) for row in _checked(features)])


def _checked(features: np.ndarray) -> np.ndarray:
    n_features = sum(source.n_features for source in SOURCES)
    if features.ndim != 2 or features.shape[1] != n_features:
        raise ValueError(f"features are {features.shape}, expected (n, {n_features})")
    return features.astype(np.float32, copy=False)


@functools.lru_cache(maxsize=1)
def _noise_amplitudes() -> np.ndarray:
    """Amplitude per FFT bin [161] of 1/f noise with a white floor and a time-domain std of 1."""
    hz = np.fft.rfftfreq(PADDED, 1 / SAMPLING_HZ)
    amplitude = np.sqrt(1 / np.maximum(hz, 1) + 0.02)
    # irfft counts inner bins twice and drops the imaginary part of the first and the last one
    power = 4 * (amplitude[1:-1] ** 2).sum() + amplitude[0] ** 2 + amplitude[-1] ** 2
    return (amplitude * PADDED / math.sqrt(power)).astype(np.float32)


def _alpha(rng: np.random.Generator, n: int, model: SubjectModel) -> np.ndarray:
    """Ongoing alpha [n, 63, 250]: its phase, amplitude and frequency ignore the stimulus."""
    seconds = np.arange(N_TIMES, dtype=np.float32) / SAMPLING_HZ
    hz = model.alpha_hz + rng.normal(0, 0.4, (n, 2, 1))
    phase = rng.uniform(0, 2 * math.pi, (n, 2, 1))
    # a Rayleigh amplitude of scale 1 makes a sinusoid of variance 1
    waves = rng.rayleigh(1, (n, 2, 1)) * np.cos(2 * math.pi * hz * seconds + phase)
    return model.alpha.T @ waves.astype(np.float32)


def _trials_of_one(
    features: np.ndarray, model: SubjectModel, n: int, rng: np.random.Generator
) -> np.ndarray:
    """All n trials of one condition, [n, 63, 250] float32, from its features [D]."""
    from scipy import fft  # keeps float32, unlike numpy before 2.0

    n_bins = PADDED // 2 + 1
    gain = np.clip(rng.normal(1, TRIAL_GAIN_SD, (n, 1)), 0.2, 1.8)
    delay = np.clip(rng.normal(0, TRIAL_LATENCY_SD_S, (n, 1)), -0.012, 0.012)
    hz = np.fft.rfftfreq(PADDED, 1 / SAMPLING_HZ)
    transfer = (gain * np.exp(-2j * math.pi * hz * delay)).astype(np.complex64)
    signal = fft.rfft(_evoked_one(features, model), PADDED)
    white = rng.standard_normal((n, len(CHANNELS), 2 * n_bins), dtype=np.float32)
    noise = (model.mixing @ white).view(np.complex64) * _noise_amplitudes()
    spectrum = noise + transfer[:, None, :] * signal
    return fft.irfft(spectrum, PADDED)[:, :, :N_TIMES] + _alpha(rng, n, model)


def simulate(
    features: np.ndarray,
    *,
    subject: int,
    partition: str,
    repetitions: int,
    snr: float = DEFAULT_SNR,
    seed: int,
    first_condition: int = 0,
) -> np.ndarray:
    """Simulated trials [n, repetitions, 63, 250] float32 from features [n, D] of n pictures.

    Row i is condition `first_condition + i` of the partition and is seeded by its own number,
    so a large set may be simulated in pieces; the pieces have the same bytes as the whole.
    """
    if partition not in PARTITIONS:
        raise ValueError(f"partition is {partition!r}, expected one of {PARTITIONS}")
    model = subject_model(subject, snr, seed)
    rows = _checked(features)
    trials = np.empty((len(rows), repetitions, len(CHANNELS), N_TIMES), dtype=np.float32)
    for i, row in enumerate(rows):
        key = [seed, 6, subject, PARTITIONS.index(partition), first_condition + i]
        trials[i] = _trials_of_one(row, model, repetitions, np.random.default_rng(key))
    return trials


# --- files --------------------------------------------------------------------------------------


def _subject_number(name: str) -> int:
    """7 from "sub-07"."""
    prefix, _, digits = name.partition("-")
    if prefix != "sub" or not digits.isdigit():
        raise ValueError(f"subject name is {name!r}, expected sub-01, sub-02, ...")
    return int(digits)


def _write_recording(path: Path, eeg: np.ndarray) -> None:
    """Writes eeg [n, reps, 63, 250] as published: a pickled dict, in spite of the .npy name."""
    content = {
        "preprocessed_eeg_data": eeg.astype(np.float64),
        "ch_names": list(CHANNELS),
        "times": times(),
    }
    with atomic_write(path, "wb") as stream:
        pickle.dump(content, stream, protocol=4)


def write_subject(
    root: str | Path,
    subject_name: str,
    features_by_partition: Mapping[str, np.ndarray],
    repetitions: Mapping[str, int] = DEFAULT_REPETITIONS,
    snr: float = DEFAULT_SNR,
    seed: int = 0,
) -> None:
    """Writes one simulated subject below root/Preprocessed_data_250Hz/<subject_name>/.

    features: as from `features_of` with this seed, the same for every subject. A third file,
    simulated.json, says that nobody was recorded and how the signal was made.
    """
    subject = _subject_number(subject_name)
    folder = Path(root) / "Preprocessed_data_250Hz" / subject_name
    folder.mkdir(parents=True, exist_ok=True)
    note = "SIMULATED by miniworld.eeg, not recorded from a person"
    settings = {"snr": snr, "seed": seed, "repetitions": dict(repetitions)}
    sources = [asdict(source) for source in SOURCES]
    write_json(folder / SIMULATED_NOTE, {"note": note, **settings, "sources": sources})
    for partition in PARTITIONS:
        eeg = simulate(
            features_by_partition[partition],
            subject=subject,
            partition=partition,
            repetitions=repetitions[partition],
            snr=snr,
            seed=seed,
        )
        _write_recording(folder / f"preprocessed_eeg_{partition}.npy", eeg)
