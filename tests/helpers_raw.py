"""Raw recordings simulated through MNE, with known responses, in THINGS-EEG2's layout and others.

A picture's response is a half-sine of its own height and sign per channel; noise is optional.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mne
import numpy as np

from preprocessing.channels import THINGS_CHANNELS
from preprocessing.recordings import TARGET

RATE_HZ = 500.0
SOA_S = 1.5  # trials do not overlap


def response(
    condition: int, channels: int, times: np.ndarray, height_v: float = 5e-6
) -> np.ndarray:
    """[C, T] volts: a half-sine from 0.1 to 0.5 s after the onset, zero elsewhere."""
    draw = np.random.default_rng(condition)
    heights = draw.normal(size=channels) * height_v
    inside = (times >= 0.1) & (times <= 0.5)
    return heights[:, None] * np.where(inside, np.sin(np.pi * (times - 0.1) / 0.4), 0.0)


def simulate(
    codes: Sequence[int],
    names: Sequence[str],
    noise: np.ndarray | None = None,
    seed: int = 0,
    rate_hz: float = RATE_HZ,
    height_v: float = 5e-6,
) -> tuple[mne.io.RawArray, np.ndarray]:
    """A continuous recording of pictures 1, 2, ...; ``noise`` [C, C] mixes white noise of 1 V.

    Also the events [n, 3].
    """
    step = round(SOA_S * rate_hz)
    onsets = step + step * np.arange(len(codes))
    data = np.zeros((len(names), step * (len(codes) + 2)))
    times = np.arange(step) / rate_hz
    for onset, code in zip(onsets, codes, strict=True):
        if code != TARGET:
            data[:, onset : onset + step] += response(code, len(names), times, height_v)
    if noise is not None:
        data += noise @ np.random.default_rng(seed).normal(size=data.shape)
    raw = mne.io.RawArray(data, mne.create_info(list(names), rate_hz, "eeg"), verbose="error")
    return raw, np.column_stack([onsets, np.zeros_like(onsets), codes])


def published_raw(raw: mne.io.RawArray, events: np.ndarray) -> dict[str, Any]:
    """The content of ``raw_eeg_{partition}.npy``."""
    stim = np.zeros((1, raw.n_times))
    info = mne.create_info(["stim"], raw.info["sfreq"], "stim")
    with_stim = raw.copy().add_channels(
        [mne.io.RawArray(stim, info, verbose="error")], force_update_info=True
    )
    with_stim.load_data().add_events(events, "stim")
    return {
        "raw_eeg_data": with_stim.get_data(),
        "ch_names": with_stim.ch_names,
        "sfreq": with_stim.info["sfreq"],
        "ch_types": with_stim.get_channel_types(),
    }


def shuffled_codes(pictures: int, repetitions: int, seed: int, targets: int = 2) -> list[int]:
    codes = [*np.repeat(np.arange(1, pictures + 1), repetitions), *[TARGET] * targets]
    return np.random.default_rng(seed).permutation(codes).tolist()


def session_file(root: Path, subject: str, session: int, partition: str) -> Path:
    return root / "Raw_data" / subject / f"ses-{session:02d}" / f"raw_eeg_{partition}.npy"


def write_raw(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, content)
    return path


def write_subject(
    root: Path,
    subject: str = "sub-01",
    sessions: int = 2,
    training: int = 4,
    test: int = 2,
    noise: np.ndarray | None = None,
    names: Sequence[str] = THINGS_CHANNELS,
    height_v: float = 5e-6,
) -> Path:
    """Raw THINGS-EEG2 in miniature: each picture twice (training) or 20 times (test) a session."""
    for session in range(1, sessions + 1):
        for partition, pictures, repetitions in (("training", training, 2), ("test", test, 20)):
            seed = 10 * session + repetitions
            codes = shuffled_codes(pictures, repetitions, seed)
            raw, events = simulate(codes, names, noise, seed, height_v=height_v)
            path = session_file(root, subject, session, partition)
            write_raw(path, published_raw(raw, events))
    return root


# --- own recordings -----------------------------------------------------------------------------

# fmt: off
CAP_32 = (
    "Fp1", "Fp2", "F7", "F3", "Fz", "F4", "F8", "FC5", "FC1", "FC2", "FC6", "T7", "C3", "Cz", "C4",
    "T8", "TP9", "CP5", "CP1", "CP2", "CP6", "TP10", "P7", "P3", "Pz", "P4", "P8", "PO9", "O1",
    "Oz", "O2", "PO10",
)
# fmt: on


def write_brainvision(
    folder: Path, raw: mne.io.BaseRaw, markers: np.ndarray, unit: str = "µV"
) -> Path:
    """A BrainVision recording (header, markers, float32 µV) as the format's description has it.

    ``unit``: what the header says that the numbers are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    channels = "\n".join(f"Ch{i}={name},,1,{unit}" for i, name in enumerate(raw.ch_names, start=1))
    (folder / "a.vhdr").write_text(
        "Brain Vision Data Exchange Header File Version 1.0\n\n[Common Infos]\nCodepage=UTF-8\n"
        "DataFile=a.eeg\nMarkerFile=a.vmrk\nDataFormat=BINARY\nDataOrientation=MULTIPLEXED\n"
        f"NumberOfChannels={len(raw.ch_names)}\nSamplingInterval={1e6 / raw.info['sfreq']:.10g}\n\n"
        f"[Binary Infos]\nBinaryFormat=IEEE_FLOAT_32\n\n[Channel Infos]\n{channels}\n",
        encoding="utf-8",
    )
    lines = "\n".join(
        f"Mk{i}=Stimulus,S{code:3d},{onset + 1},1,0"
        for i, (onset, _, code) in enumerate(markers.tolist(), start=1)
    )
    (folder / "a.vmrk").write_text(
        "Brain Vision Data Exchange Marker File, Version 1.0\n\n[Common Infos]\nCodepage=UTF-8\n"
        f"DataFile=a.eeg\n\n[Marker Infos]\n{lines}\n",
        encoding="utf-8",
    )
    (raw.get_data().T * 1e6).astype("<f4").tofile(folder / "a.eeg")
    return folder / "a.vhdr"


def write_events(path: Path, head: str, rows: Sequence[str], ends: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ends.join([head, *rows, ""]).encode())
    return path


def write_edf(
    path: Path,
    raw: mne.io.BaseRaw,
    pauses: Mapping[int, float] | None = None,
    units: str = "uV",
    note_text: bytes = b"",
    notes: Sequence[tuple[float, str]] = (),
) -> Path:
    """An EDF+ file of 1-s records of 16 bits, as the format's description has it.

    ``pauses``: {record: s before it}, which make it EDF+D; ``note_text``: an annotation in the
    first record; ``notes``: others by their onset in s.
    """
    rate, records = round(raw.info["sfreq"]), raw.n_times // round(raw.info["sfreq"])
    names, reach_uv, note = [*raw.ch_names, "EDF Annotations"], 400.0, 32 + 64 * bool(notes)
    columns = [
        (16, names), (80, [""] * len(names)), (8, [units] * len(raw.ch_names) + [""]),
        (8, [f"-{reach_uv:g}"] * len(raw.ch_names) + ["-1"]),
        (8, [f"{reach_uv:g}"] * len(raw.ch_names) + ["1"]),
        (8, ["-32768"] * len(names)), (8, ["32767"] * len(names)), (80, [""] * len(names)),
        (8, [str(rate)] * len(raw.ch_names) + [str(note)]), (32, [""] * len(names)),
    ]  # fmt: skip
    kind = "EDF+C" if pauses is None else "EDF+D"
    head = [(8, "0"), (80, "X X X X"), (80, "Startdate 01-JAN-2020 X X X"), (8, "01.01.20"),
            (8, "00.00.00"), (8, str(256 * (1 + len(names)))), (44, kind), (8, str(records)),
            (8, "1"), (4, str(len(names)))]  # fmt: skip
    text = "".join(value.ljust(width) for width, value in head)
    text += "".join(value.ljust(width) for width, column in columns for value in column)
    digital = np.round((raw.get_data() * 1e6 + reach_uv) / (2 * reach_uv) * 65535 - 32768)
    onset, body = 0.0, []
    for record in range(records):
        onset += (pauses or {}).get(record, 0.0)
        body.append(digital[:, record * rate : (record + 1) * rate].astype("<i2").tobytes())
        more = b"+0.5\x14" + note_text + b"\x14\0" if note_text and not record else b""
        for start, said in notes:
            if record <= start < record + 1:
                more += f"+{start:.4f}\x14{said}\x14\0".encode()
        body.append((f"+{onset:g}\x14\x14\0".encode() + more).ljust(2 * note, b"\0"))
        onset += 1
    path.write_bytes(text.encode("latin-1") + b"".join(body))
    return path
