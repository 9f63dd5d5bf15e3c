"""Stage 2: fit the EEG encoder and the aligner to five embeddings jointly, by one optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import args

if __name__ == "__main__":
    args.answer_quick_questions("train")

import torch

import util
from cli.config import Options
from datafiles.feature_bank import check_clip, layer_name
from datafiles.stimuli import list_stimuli
from dataset import Batch, TrainingData
from decoder import aligners, fusion, low_level
from decoder.atms import ATMS
from decoder.decoder import Decoder, check_encoder, model_file, new_encoder
from decoder.projector import new_projector
from loss import Contrast, prior_total
from modalities import NAMES
from rundirs.files import file_hash
from training import loop
from training.objectives import contrast_from, global_losses, validation_retrieval
from training.processes import Processes
from training.settings import folds, open_data
from util import WHOLE, Part

VALIDATION_DRAWS = 8  # timesteps and noises per held-out stimulus, the same at every validation


class JointObjective:
    """Sum of registry weight x aligner's loss, plus ``contrast_weight`` x CLIP loss.

    Gradients reach the encoder from all of them. ``contrast``: how its output itself is drawn to
    the targets; ``noise_draws``: timesteps and noises at which priors see each sample of a batch.
    """

    def __init__(
        self,
        decoder: Decoder,
        data: TrainingData,
        contrast: Contrast,
        contrast_weight: float,
        noise_draws: int,
    ) -> None:
        self.decoder, self.data = decoder, data
        self.contrast, self.contrast_weight = contrast, contrast_weight
        self.noise_draws = noise_draws

    def losses(
        self, batch: Batch, generator: torch.Generator, part: Part = WHOLE
    ) -> dict[str, torch.Tensor]:
        embedding = self.decoder.encoder(batch.eeg, batch.subject)
        return self._losses(
            embedding, batch.targets, batch.stimulus, generator, self.noise_draws, part
        )

    def _losses(
        self,
        embedding: torch.Tensor,
        targets: dict[str, torch.Tensor],
        stimulus: torch.Tensor,
        generator: torch.Generator,
        noise_draws: int,
        part: Part = WHOLE,
    ) -> dict[str, torch.Tensor]:
        terms = self.decoder.bank.losses(targets, embedding, generator, noise_draws, part)
        own = global_losses(
            self.decoder,
            embedding,
            targets,
            self.contrast,
            self.data.groups(stimulus, self.contrast.positives),
            self.contrast_weight,
            part,
        )
        parts = {f"prior_{name}": terms[name].total for name in NAMES}
        parts |= {f"cosine_{name}": terms[name].cosine for name in NAMES}
        total = prior_total(terms, self.decoder.bank.log_variance)
        return parts | own | {"aligner": total, "loss": total + own["loss"]}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and retrieval on held-out concepts; the aligner's lowest loss is ``best``.

        Not the lowest total: of unseen concepts the contrast is soon too sure of itself, and rises
        while what it ranks, and all five embeddings, still get better.
        """
        eeg, subject = self.data.validation()
        if not len(eeg):
            return {}
        embeddings = self.decoder.embed(eeg, subject)
        device = next(self.decoder.parameters()).device
        rows = self.data.val_rows.repeat(len(self.data.recordings))
        targets = {name: features[rows].to(device) for name, features in self.data.targets.items()}
        generator = util.generator_for(self.data.seed, "validation noise")
        losses = self._losses(
            embeddings.to(device), targets, self.data.stimulus[rows], generator, VALIDATION_DRAWS
        )
        scores = {f"val_{name}": float(value) for name, value in losses.items()}
        self.decoder.calibration = self._calibrate(embeddings.to(device), targets)
        self.decoder.held_out = aligners.held_out_rows(embeddings)
        scores |= {
            f"val_{name}_skill": of["skill"] for name, of in self.decoder.calibration.items()
        }
        scores |= validation_retrieval(self.decoder, embeddings, self.data)
        return scores | {"select": -scores["val_aligner"]}

    def _calibrate(
        self, condition: torch.Tensor, targets: dict[str, torch.Tensor]
    ) -> dict[str, dict[str, float]]:
        """What ``--fusion_weights`` needs to know, saved with the model."""
        bank = self.decoder.bank
        samples = fusion.repeated_samples(bank, condition, range(len(condition)), self.data.seed)
        truth = {name: bank.standardise(name, targets[name]).cpu() for name in NAMES}
        return fusion.calibrate(samples, truth)


def new_decoder(
    data: TrainingData,
    seed: int,
    alignment: aligners.Alignment,
    init_from: Path | None,
    encoder_name: str = ATMS.__name__,
    layer: str | None = None,
) -> Decoder:
    """A fresh decoder, its aligner standardised on the training rows.

    ``init_from``: a run of ATMS_retrieval.py whose encoder, and projector of CLIP's ``layer``, it
    starts from. Raises UserError.
    """
    encoder = new_encoder(data, seed, encoder_name)
    projector = new_projector(layer, data.targets, data.train_rows, seed)
    width = data.targets["image"].shape[1]
    bank = aligners.new_aligner(width, encoder.embed_dim, alignment, seed)
    bank.fit_targets({name: features[data.train_rows] for name, features in data.targets.items()})
    decoder = Decoder(encoder, bank, data.signal, data.clip, projector)
    if init_from is not None:
        start_from(Decoder.load(init_from, "best"), decoder)
    return decoder


def start_from(donor: Decoder, decoder: Decoder) -> None:
    """Take over a pre-trained encoder and projector. Raises UserError unless all of them fit."""
    found, needed = (
        [one.encoder.name, one.encoder.config, one.layer, one.signal] for one in (donor, decoder)
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
        f"{one.picture_features} features {how}"
    )


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
    check_clip(data.clip, features, decoder.clip, run)
    decoder.encoder.add_subjects(len(new))
    decoder.signal["subjects"] = [*known, *new]
    decoder.train_only(trainable)
    return replace(
        data,
        signal=data.signal | {"subjects": decoder.signal["subjects"]},
        first_subject=len(known),
        hashes=data.hashes | {"adapt_from": file_hash(model_file(run, "best"))},
    ), decoder


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or go on training, or do nothing when the run is finished."""
    options = args.resolve("train", argv)
    processes = Processes.join(options.values.device)
    for fold in folds(options):
        train_one(fold, processes)
    return 0


def train_one(options: Options, processes: Processes) -> None:
    """One model."""
    values = options.values
    check_encoder(values.encoder)
    known = Decoder.load(values.adapt_from, "best") if values.adapt_from else None
    layer = known.layer if known else layer_name(values.contrast_layer)
    data = open_data(values, layer)
    if known:
        features = values.clip_feature_path
        data, decoder = adapted(known, values.adapt_from, data, features, values.trainable)
    else:
        alignment = aligners.Alignment(
            values.aligner,
            values.loss_weights == "uncertainty",
            values.condition_dropout,
            values.prior_predicts,
            values.prior_loss,
        )
        decoder = new_decoder(data, values.seed, alignment, values.init_from, values.encoder, layer)
    objective = JointObjective(
        decoder, data, contrast_from(values), values.contrast_weight, values.noise_draws
    )
    run = loop.train(options, decoder, objective, data, processes)
    if not processes.first:
        return
    if values.low_level and not (run.path / low_level.FILE).exists():
        best = Decoder.load(run.path, "best").to(processes.device)
        stimuli = list_stimuli(values.data_path, "training")
        low_level.fit_head(best, data, stimuli).save(run.path, data.clip)
    print(f"model: {model_file(run.path, 'best')}")


if __name__ == "__main__":
    raise SystemExit(main())
