"""THINGS-MEG as decoding papers exchange it: pickled sensors at 200 Hz."""

from __future__ import annotations

from pathlib import Path

from datafiles.datasets.form import Form, Parsed
from datafiles.datasets.things_eeg2 import parse_pickled

MEG_KEYS = ("meg_data", "ch_names", "times")


def parse_meg(path: Path) -> Parsed:
    """MEG in tesla. Raises DataError."""
    return parse_pickled(path, MEG_KEYS, "take a preprocessed THINGS-MEG")


THINGS_MEG = Form(
    name="things-meg",
    title="THINGS-MEG, 200 Hz",
    licence="CC0",
    layout="preprocessed_npy/sub-XX/preprocessed_meg_training.pkl and ..._zs_test.pkl: a pickled "
    "dict of meg_data (pictures, repetitions, 271 sensors, 201 samples), ch_names, times",
    order="by the number of the picture: concepts by name, pictures in them by name",
    splits="1,654 concepts x 12 pictures x 1 trial; 200 other concepts x 1 picture x 12 trials",
    traps=(
        "preprocessed_meg_test.pkl is not read: only the zero-shot test is of unseen concepts",
        "tesla, about 1e-13: not to be mixed with whitened recordings",
    ),
    folders=("preprocessed_npy", "derivatives/preprocessed_npy", "Preprocessed_data*", "."),
    files={"training": "preprocessed_meg_training.pkl", "test": "preprocessed_meg_zs_test.pkl"},
    parse=parse_meg,
)
