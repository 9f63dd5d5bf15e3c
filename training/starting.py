"""What a training run starts from: fresh weights, a pre-trained encoder, or a model to adapt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import util
from datafiles.feature_bank import check_clip
from dataset import TrainingData
from decoder.aligners import Alignment, new_aligner
from decoder.decoder import Decoder, model_file, new_encoder
from decoder.foundation import ATMS_ALONE, EncoderChoice
from decoder.projector import new_projector
from rundirs.files import file_hash


def new_decoder(
    data: TrainingData,
    seed: int,
    alignment: Alignment,
    donor: Decoder | None,
    choice: EncoderChoice = ATMS_ALONE,
    layers: Sequence[str] = (),
) -> Decoder:
    """A fresh decoder, its aligner standardised on the training rows.

    ``donor``: a model of ATMS_retrieval.py whose encoder, and projector of ``layers``, it
    starts from. Raises UserError.
    """
    encoder = new_encoder(data, seed, choice)
    people = encoder.n_subjects
    projector = new_projector(layers, data.targets, data.train_rows, people, seed)
    width = data.targets["image"].shape[1]
    bank = new_aligner(width, encoder.embed_dim, alignment, seed)
    bank.fit_targets({name: features[data.train_rows] for name, features in data.targets.items()})
    decoder = Decoder(encoder, bank, data.signal, data.clip, projector)
    if donor is not None:
        start_from(donor, decoder)
    return decoder


def donor_of(run: Path, whole: bool) -> Decoder:
    """The model of a run to start from.

    Raises UserError if the ``whole`` of it is to be adapted, and it has no aligner.
    """
    donor = Decoder.load(run, "best")
    if whole and donor.bank is None:
        raise util.UserError(
            f"--adapt_from {run}",
            "an encoder alone, as ATMS_retrieval.py writes it",
            "a model of train.py",
            "start from it with --init_from",
        )
    return donor


def with_donor(data: TrainingData, flag: str, run: Path, donor: Decoder) -> TrainingData:
    """The data of a run that starts from another, whose model is one of its inputs."""
    notes = list(data.notes)
    if donor.concepts is None:
        notes.append(
            f"{run} does not say what it was trained on, it is of an older version: whether the "
            "concepts of validation are new to it is not known"
        )
    hashes = data.hashes | {flag: file_hash(model_file(run, "best"))}
    return replace(data, hashes=hashes, notes=notes)


def all_concepts(data: TrainingData, donor: Decoder | None) -> dict[str, list[str]]:
    """What a model has seen in the end: trained on here, or by what it started from."""
    here = data.concepts()
    before = (donor.concepts if donor else None) or {"trained": []}
    return here | {"trained": sorted({*here["trained"], *before["trained"]})}


def start_from(donor: Decoder, decoder: Decoder) -> None:
    """Take over a pre-trained encoder and projector. Raises UserError unless all of them fit."""
    found, needed = (
        [one.encoder.name, one.encoder.config, one.layers, one.signal] for one in (donor, decoder)
    )
    if found != needed:
        raise util.UserError(
            "--init_from",
            _start(donor),
            _start(decoder),
            "pre-train with the same --encoder, --contrast_layer, subjects, channels and time "
            "window",
        )
    decoder.encoder.load_state_dict(donor.encoder.state_dict())
    if decoder.projector is not None:
        decoder.projector.load_state_dict(donor.projector.state_dict())


def _start(one: Decoder) -> str:
    """What has to be the same to start from another model, for a message."""
    how = "as they are" if one.projector is None else "projected"
    return (
        f"{one.encoder.name} for {one.encoder.config} of {one.signal['subjects']}, compared with "
        f"{', '.join(one.picture_features)} features {how}"
    )


def scaled_as(decoder: Decoder, data: TrainingData, run: Path) -> TrainingData:
    """The data on the scale of a model. Raises UserError for recordings of another unit."""
    scale, own = decoder.signal.get("scale", 1.0), data.signal.get("scale", 1.0)
    if not 1e-2 <= own / scale <= 1e2:
        raise util.UserError(
            f"--adapt_from {run}",
            f"recordings whose unit asks for a scale of {own:g}",
            f"recordings in the unit that the model was trained on, scaled by {scale:g}",
            "export them in that unit",
        )
    return replace(data, cuts=[replace(cut, scale=scale) for cut in data.cuts])


def adapted(
    decoder: Decoder, run: Path, data: TrainingData, features: Path, trainable: str
) -> tuple[TrainingData, Decoder]:
    """(the data with the model's numbering of subjects, the model of ``run`` with them added).

    New subjects begin as an unknown one is computed: with the mean layer and the shared token.
    ``trainable``: subject_layers, encoder or all; the rest stays as it is. Raises UserError for
    subjects that the model knows already, and for another signal, DataError for another CLIP.
    """
    known, new = decoder.signal["subjects"], data.signal["subjects"]
    for name in ("channels", "times"):
        if decoder.signal[name] != data.signal[name]:
            raise util.UserError(
                f"--adapt_from {run}",
                f"{name} {decoder.signal[name][:3]}..., {len(decoder.signal[name])} of them",
                f"{data.signal[name][:3]}..., {len(data.signal[name])} as in the data",
                "choose the model's own with --channels and --time_window",
            )
    if set(known) & set(new):
        raise util.UserError(
            "--subjects",
            f"{', '.join(sorted(set(known) & set(new)))}: in the model already",
            f"subjects other than {', '.join(known)}",
            "name the new ones alone",
        )
    if decoder.signal.get("align") != data.signal.get("align"):
        raise util.UserError(
            f"--adapt_from {run}",
            f"trained with --align {decoder.signal.get('align', 'none')}",
            f"--align {data.signal.get('align', 'none')}, as given",
            "align the new people as the others were",
        )
    data = scaled_as(decoder, data, run)
    check_clip(data.clip, features, decoder.clip, run)
    decoder.encoder.add_subjects(len(new))
    if decoder.projector is not None:
        decoder.projector.add_subjects(len(new))
    decoder.signal["subjects"] = [*known, *new]
    decoder.train_only(trainable)
    return replace(data, signal=dict(decoder.signal), first_subject=len(known)), decoder
