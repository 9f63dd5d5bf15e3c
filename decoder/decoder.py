"""A trained model: an encoder with its aligner, and what its file says of the signal it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import util
from datafiles.alignment import Reading
from datafiles.feature_bank import FINAL_LAYER
from dataset import TestEEG, TrainingData
from decoder import aligners
from decoder.atms import ATMS
from decoder.encoders import NICE, Braindecode, EEGProject, Encoder, UnknownEncoder, check_name
from decoder.ensemble import TOGETHER, Ensemble
from decoder.foundation import ATMS_ALONE, EncoderChoice, Foundation, SavedEncoder, read_pretrained
from decoder.projector import LayerMixture, Projector, projector_from
from decoder.views import views_of
from modalities import NAMES
from rundirs.checkpoints import MODEL, checkpoint_folder
from rundirs.tensors import load_tensors
from unet import Sampling, TargetSpace

OWN: Mapping[str, type[Encoder]] = {kind.__name__: kind for kind in (ATMS, EEGProject, NICE)}


def make_encoder(name: str, config: Mapping[str, Any]) -> Encoder:
    """The encoder ``name`` of ``--encoder``. ``config``: of an encoder, or just the four sizes.

    Several names (``ATMS+NICE``) are an ensemble. Raises UnknownEncoder, and ValueError for a
    signal that it cannot take.
    """
    if "members" in config:
        return Ensemble.built(config, make_encoder)
    if TOGETHER in name:
        return Ensemble([make_encoder(one, config) for one in name.split(TOGETHER)])
    if name in OWN:
        return OWN[name].from_config(config)
    if "pretrained" in config:
        return Foundation.from_config({**config, "model": name})
    check_name(name)
    return Braindecode.from_config({**config, "model": name})


def model_file(run: Path, checkpoint: str) -> Path:
    """The ``best`` or ``latest`` model of a training run."""
    return checkpoint_folder(run, checkpoint) / MODEL


class Decoder(nn.Module):
    """An encoder with its aligner; ``bank`` is None after contrastive pre-training alone.

    ``projector``: of the layers of CLIP that EEG embeddings are compared with; None: with the image
    embeddings as they are.
    ``signal``: what the EEG must look like ({channels, times, subjects}); ``clip``: identity of the
    encoder that made the targets. Both are kept in the checkpoint's header and checked against
    every later input.
    """

    spatial: torch.Tensor  # [S, C, C], where the training's people are aligned

    def __init__(
        self,
        encoder: Encoder,
        bank: TargetSpace | None,
        signal: Mapping[str, Any],
        clip: Mapping[str, Any],
        projector: Projector | LayerMixture | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.bank, self.projector = encoder, bank, projector
        self.signal, self.clip = dict(signal), dict(clip)
        if self.signal.get("align"):  # the people's matrices, see datafiles/alignment.py
            sizes = len(signal["subjects"]), len(signal["channels"]), len(signal["channels"])
            self.register_buffer("spatial", torch.zeros(sizes))
        # by validation, for decoder/fusion.py and aligners.spread_factors
        self.calibration: dict[str, dict[str, float]] | None = None
        self.held_out: list[list[float]] | None = None
        # names, of this run and those that it went on from: {"trained", "held_out"}
        self.concepts: dict[str, list[str]] | None = None
        self.adapted = "all"
        self.test_views = 1  # of EEG, whose mean embedding counts: see decoder/views.py

    def header(self) -> dict[str, Any]:
        return {
            "encoder_name": self.encoder.name,
            "encoder": self.encoder.config,
            "bank": self.bank.config if self.bank else None,
            "projector": self.projector.config if self.projector else None,
            "signal": self.signal,
            "clip": self.clip,
            "calibration": self.calibration,
            "held_out": self.held_out,
            "concepts": self.concepts,
        }

    def recall(self, header: Mapping[str, Any]) -> None:
        """What validation found out, and what a model was trained on, from its header.

        Headers of older models have not all of it.
        """
        self.calibration = header["calibration"]
        self.held_out = header.get("held_out")
        self.concepts = header.get("concepts", self.concepts)

    def networks(self) -> list[nn.Module]:
        """Where the time of a training step goes."""
        return [self.encoder, *(self.bank.networks() if self.bank else [])]

    @property
    def layers(self) -> tuple[str, ...]:
        """What the projector needs of a bank, by its names there; nothing without a projector."""
        return self.projector.layers if self.projector else ()

    @property
    def picture_features(self) -> tuple[str, ...]:
        """The features of pictures that EEG embeddings are compared with, by their names."""
        return self.layers or (FINAL_LAYER,)

    def image_side(
        self, features: Mapping[str, torch.Tensor], subject: torch.Tensor
    ) -> torch.Tensor:
        """Features {name: [N, W]} of :attr:`picture_features` as EEG embeddings see them: [N, D].

        ``subject`` int64 [N]: who saw the pictures; -1 = unknown.
        """
        if self.projector is None:
            return features[FINAL_LAYER]
        return self.projector.seen_by(features, subject)

    @torch.no_grad()
    def gallery(self, features: Mapping[str, torch.Tensor], index: int = -1) -> torch.Tensor:
        """What EEG embeddings retrieve, of pictures with ``features`` {name: [N, W]}: [N, D].

        ``index``: :meth:`subject_index` of whose EEG it is.
        """
        rows = features[FINAL_LAYER]
        device = next(self.parameters()).device
        moved = {name: features[name].to(device) for name in self.picture_features}
        subject = torch.full((len(rows),), index, device=device)
        return self.image_side(moved, subject).to(rows.device)

    @torch.no_grad()
    def standardised(self, embeddings: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """{modality: [N, D]} by mean and std of the training targets, which the aligner keeps.

        Raises ValueError for an encoder alone.
        """
        if self.bank is None:
            raise ValueError("a pre-trained encoder has no aligner that knows the training targets")
        device = next(self.parameters()).device
        return {
            name: self.bank.standardise(name, embeddings[name].to(device)).to(rows.device)
            for name, rows in embeddings.items()
            if name in NAMES
        }

    def subject_index(self, subject: str) -> int:
        """Row of a subject's own parameters; -1 for a person the model was not trained on."""
        names = self.signal["subjects"]
        return names.index(subject) if subject in names else -1

    def know_alignment(self, data: TrainingData) -> None:
        """Take over the matrices by which the training's people are aligned, if they are."""
        if self.signal.get("align"):
            before = self.spatial[: data.first_subject].cpu()
            own = [torch.from_numpy(cut.spatial)[None] for cut in data.cuts]
            self.spatial = torch.cat([before, *own])

    def reading(self, subject: str) -> Reading:
        """How this person's recordings are read."""
        index, aligned = self.subject_index(subject), bool(self.signal.get("align"))
        return Reading(
            self.signal["channels"],
            self.signal["times"],
            self.signal.get("scale", 1.0),
            aligned,
            self.spatial[index].cpu().numpy() if aligned and index >= 0 else None,
        )

    def tell_stranger(self, subject: str) -> None:
        """Warn of a person whose own parameters the model lacks: its scores are a stranger's."""
        if self.subject_index(subject) < 0:
            util.LOG.warning(
                "%s is none of the people that the model was trained on (%s): read as a stranger's",
                subject,
                ", ".join(self.signal["subjects"]),
            )

    def train_only(self, trainable: str) -> None:
        """Freeze all but the ``subject_layers``, all but the ``encoder``, or nothing (``all``)."""
        mixing = self.projector.subject_parameters() if self.projector else []
        chosen = {
            "subject_layers": [*self.encoder.subject_parameters(), *mixing],
            "encoder": [*self.encoder.parameters(), *mixing],
            "all": list(self.parameters()),
        }[trainable]
        self.adapted = trainable
        learnt = {id(parameter) for parameter in self.parameters() if parameter.requires_grad}
        self.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(id(parameter) in learnt)  # what was frozen stays so

    @classmethod
    def load(cls, run: Path, checkpoint: str) -> Decoder:
        """The ``best`` or ``latest`` model of a run. Raises DataError."""
        path = model_file(run, checkpoint)
        state, header = load_tensors(path)
        if "encoder" not in header or "signal" not in header:
            raise util.DataError(
                path,
                "a safetensors file without this project's header",
                "a model of train.py",
                "give the run directory that train.py wrote",
            )
        bank = aligners.aligner_from(header["bank"]) if header["bank"] else None
        encoder = _encoder_of(header, path)
        config = header.get("projector")  # headers of older models have none
        projector = projector_from(config) if config else None
        decoder = cls(encoder, bank, header["signal"], header["clip"], projector)
        decoder.recall(header)
        try:
            decoder.load_state_dict(state)
        except RuntimeError as error:
            raise util.DataError(
                path,
                f"other parameters ({error})",
                "the parameters its header describes",
                "the file is from another version: train again or use that version",
            ) from None
        return decoder.eval()

    @torch.no_grad()
    def embed(
        self, eeg: torch.Tensor, subject: torch.Tensor, batch_size: int = 256
    ) -> torch.Tensor:
        """Embeddings [N, D] of EEG [N, C, T], made in batches on the model's device, on the CPU.

        Of several ``test_views`` the mean.
        """
        batches = zip(eeg.split(batch_size), subject.split(batch_size), strict=True)
        return torch.cat([self._mean_of_views(rows, ids).cpu() for rows, ids in batches])

    def _mean_of_views(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        device, times = next(self.parameters()).device, self.signal["times"]
        ids, number = subject.to(device), self.test_views
        if number == 1:
            return self.encoder(eeg.to(device), ids)
        rate_hz = 1 / (times[1] - times[0])
        views = views_of(eeg.to(device), number, rate_hz)
        return torch.stack([self.encoder(view, ids) for view in views]).mean(dim=0)

    def condition(self, test: TestEEG, rows: Sequence[int]) -> torch.Tensor:
        """EEG embeddings [n, D] of some rows of a test recording, on the CPU."""
        subject = torch.full((len(rows),), self.subject_index(test.subject))
        return self.embed(test.eeg[list(rows)], subject)

    def predict(
        self, test: TestEEG, rows: Sequence[int], sampling: Sampling, seed: int
    ) -> dict[str, torch.Tensor]:
        """Predicted CLIP embeddings {modality: [n, D]} of some rows, un-normalised, on the CPU.

        A row's noise belongs to its stimulus: it depends on nothing but ``seed`` and that. Raises
        ValueError for an encoder alone.
        """
        if self.bank is None:
            raise ValueError("a pre-trained encoder has no aligner to predict embeddings with")
        condition = self.condition(test, rows).to(next(self.parameters()).device)
        seeds = [util.seed_for(seed, "prior", test.ids[row]) for row in rows]
        held_out = None if self.held_out is None else torch.tensor(self.held_out)
        samples = aligners.predict_from_condition(
            self.bank, condition, seeds, sampling, seed, held_out
        )
        return {name: values.cpu() for name, values in samples.items()}


def _encoder_of(header: Mapping[str, Any], path: Path) -> Encoder:
    """The encoder that a checkpoint's header describes. Raises DataError."""
    name = header.get("encoder_name", ATMS.__name__)  # headers had no name when there was but one
    try:
        return make_encoder(name, header["encoder"])
    except UnknownEncoder as unknown:
        raise util.DataError(path, f"encoder {name}", unknown.expected, unknown.cure) from None
    except (TypeError, ValueError) as error:
        raise util.DataError(
            path,
            f"encoder {name} with {header['encoder']} ({error})",
            "options that this version of it takes",
            "the file is from another version: train again or use that version",
        ) from None


def check_encoder(choice: EncoderChoice) -> None:
    """For the first second of a run. Raises UserError for a name that nothing here answers to."""
    names = choice.encoder.split(TOGETHER)
    others = [name for name in names if name not in OWN]
    weighed = choice.encoder_weights is not None
    if weighed and len(others) != 1:
        raise util.UserError(
            f"--encoder {choice.encoder}", f"with {choice.encoder_weights}",
            "the class of braindecode that the weights are of", "e.g. --encoder Labram",
        )  # fmt: skip
    if util.repeated(names):
        raise util.UserError("--encoder", choice.encoder, "each of them once", "leave one out")
    try:
        for name in names:
            check_name(name, known_by_weights=weighed)
    except UnknownEncoder as unknown:
        raise util.UserError("--encoder", choice.encoder, unknown.expected, unknown.cure) from None


def new_encoder(data: TrainingData, seed: int, choice: EncoderChoice = ATMS_ALONE) -> Encoder:
    """A freshly initialised encoder for this signal, seeded, or with its pre-trained weights.

    Raises UserError if it cannot take the signal.
    """
    times = data.signal["times"]
    sizes = {
        "n_channels": len(data.signal["channels"]),
        "n_times": len(times),
        "n_subjects": len(data.signal["subjects"]),
        "embed_dim": data.targets["image"].shape[1],
    }
    saved = read_pretrained(choice)
    more = {} if saved is None else {
        "pretrained": saved.config, "learnt": saved.learnt,
        "channels": data.signal["channels"], "rate_hz": 1 / (times[1] - times[0]),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(util.seed_for(seed, "encoder"))
        try:
            return _built(choice.encoder, sizes, more, saved)
        except ValueError as error:
            raise util.UserError(
                "--encoder",
                str(error),
                "an encoder for this signal",
                "choose another one, or another --time_window or --channels",
            ) from None


def _built(
    name: str, sizes: Mapping[str, Any], more: Mapping[str, Any], saved: SavedEncoder | None
) -> Encoder:
    """``more``: what a pre-trained model needs beside the sizes; ``saved``: it and its weights."""
    if TOGETHER in name:
        return Ensemble([_built(one, sizes, more, saved) for one in name.split(TOGETHER)])
    if name in OWN or saved is None:
        return make_encoder(name, sizes)
    encoder = Foundation.from_config({**sizes, **more, "model": name})
    encoder.load_pretrained(saved.weights)
    return encoder
