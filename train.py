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
from datafiles.eeg_files import is_simulated
from datafiles.feature_bank import layer_names
from datafiles.stimuli import list_stimuli
from dataset import Batch, DataChoice, TrainingData, open_training
from decoder import aligners, fusion, low_level
from decoder.aligners import Alignment
from decoder.decoder import Decoder, check_encoder, model_file
from decoder.foundation import EncoderChoice, encoder_hash
from loss import Contrast, prior_total
from modalities import NAMES
from rundirs.closing import call, tell_end
from training import loop
from training.calibration_curve import Calibration, calibrations, within_minutes, write_curve
from training.objectives import global_losses, validation_retrieval
from training.processes import Processes
from training.settings import Fold, folds
from training.starting import adapted, all_concepts, donor_of, new_decoder, scaled_as, with_donor
from util import WHOLE, Part

VALIDATION_DRAWS = 8  # timesteps and noises per held-out stimulus, the same at every validation
VALIDATION_ROWS = 512  # of all subjects, whose losses are computed at once


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
        return self._losses(embedding, batch, generator, self.noise_draws, part)

    def _losses(
        self,
        embedding: torch.Tensor,
        of: Batch,
        generator: torch.Generator,
        noise_draws: int,
        part: Part = WHOLE,
    ) -> dict[str, torch.Tensor]:
        terms = self.decoder.bank.losses(of.targets, embedding, generator, noise_draws, part)
        own = global_losses(
            self.decoder,
            embedding,
            of.subject,
            of.targets,
            self.contrast,
            self.data.groups(of.stimulus, self.contrast.contrast_positives),
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
        rows = self.data.val_rows.repeat(len(self.data.recordings))
        scores = {
            f"val_{name}": value
            for name, value in self._validation_losses(embeddings, subject, rows).items()
        }
        self._calibrate(embeddings, rows)
        self.decoder.held_out = aligners.held_out_rows(embeddings)
        scores |= {
            f"val_{name}_skill": of["skill"] for name, of in self.decoder.calibration.items()
        }
        scores |= validation_retrieval(self.decoder, embeddings, self.data)
        return scores | {"select": -scores["val_aligner"]}

    def _validation_losses(
        self, embeddings: torch.Tensor, subject: torch.Tensor, rows: torch.Tensor
    ) -> dict[str, float]:
        """Mean losses of embeddings [n, D] of stimuli in ``rows`` [n], VALIDATION_ROWS at a time.

        Memory would not hold ten subjects at once. The contrast is then with the rows of a piece.
        """
        device = next(self.decoder.parameters()).device
        generator = util.generator_for(self.data.seed, "validation noise")
        means: dict[str, float] = {}
        for place in torch.arange(len(rows)).split(VALIDATION_ROWS):
            at = rows[place]
            targets = {name: features[at] for name, features in self.data.targets.items()}
            piece = Batch(embeddings[place], subject[place], self.data.stimulus[at], targets).to(
                device
            )  # of the EEG its embeddings
            losses = self._losses(piece.eeg, piece, generator, VALIDATION_DRAWS)
            for name, value in losses.items():
                means[name] = means.get(name, 0.0) + float(value) * len(place) / len(rows)
        return means

    def _calibrate(self, embeddings: torch.Tensor, rows: torch.Tensor) -> None:
        """What ``--fusion_weights`` needs to know, saved with the model."""
        bank, chosen = self.decoder.bank, fusion.calibration_rows(len(rows))
        if len(chosen) < len(rows) and not self.decoder.calibration:
            util.LOG.info("calibration sees %d of %d held-out rows", len(chosen), len(rows))
        condition = embeddings[chosen].to(next(self.decoder.parameters()).device)
        noise = util.generator_for(self.data.seed, "agreement")
        samples = fusion.repeated_samples(bank, condition, noise)
        targets = {name: features[rows[chosen]] for name, features in self.data.targets.items()}
        truth = self.decoder.standardised(targets)
        self.decoder.calibration = fusion.calibrate(samples, truth)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or go on training, or do nothing when the run is finished."""
    options = args.resolve("train", argv)
    processes = Processes.join(options.values.device)
    for fold in folds(options.settings(Fold)):
        asked = options.changed(fold)
        parts = calibrations(asked.settings(Calibration))
        if len(parts) > 1:  # the last one, too, before the first is trained
            _, data = new_people(asked)
            for minutes in asked.values.minutes:
                within_minutes(data, minutes, asked.values.trial_seconds)
        for part in parts:
            train_one(asked.changed(part), processes)
        if len(parts) > 1 and processes.first:
            print(*curve_of(asked), sep="\n")
    return 0


def new_people(options: Options) -> tuple[Decoder, TrainingData]:
    """(the model of ``--adapt_from``, all that there is of the people it does not know)."""
    start = options.values.adapt_from
    donor = donor_of(start, whole=True)
    if options.values.minutes and donor.signal.get("align"):
        raise util.UserError(
            "--minutes", f"with {start}, which is of --align euclidean", "a model without it",
            "train one: the curve compares models that read the same EEG",
        )  # fmt: skip
    data = open_training(options.settings(DataChoice), donor.layers, donor.concepts)
    return donor, scaled_as(donor, data, start)


def curve_of(options: Options) -> list[str]:
    """The scores of finished calibrations against their minutes, written; returns the table."""
    values = options.values
    donor, data = new_people(options)
    simulated = is_simulated(values.data_path)
    return write_curve(values.output_dir, donor, values.minutes, data, simulated)


def train_one(options: Options, processes: Processes) -> None:
    """One model."""
    values = options.values
    check_encoder(choice := options.settings(EncoderChoice))
    start = values.adapt_from or values.init_from
    donor = donor_of(start, whole=start == values.adapt_from) if start else None
    adapting = donor if values.adapt_from else None
    layers = adapting.layers if adapting else layer_names(values.contrast_layer)
    data = open_training(options.settings(DataChoice), layers, donor.concepts if donor else None)
    if adapting:
        features = values.clip_feature_path
        data, decoder = adapted(adapting, values.adapt_from, data, features, values.trainable)
        if values.minutes:
            data = within_minutes(data, values.minutes[0], values.trial_seconds)
    else:
        alignment = Alignment(
            values.aligner,
            values.loss_weights == "uncertainty",
            values.condition_dropout,
            values.prior_predicts,
            values.prior_loss,
            values.aligner_skip == "on",
        )
        decoder = new_decoder(data, values.seed, alignment, donor, choice, layers)
    data = replace(data.aligned(), hashes=data.hashes | encoder_hash(choice))
    decoder.know_alignment(data)
    if donor:
        data = with_donor(data, "adapt_from" if adapting else "init_from", start, donor)
    decoder.concepts = all_concepts(data, donor)
    objective = JointObjective(
        decoder, data, options.settings(Contrast), values.contrast_weight, values.noise_draws
    )
    run = loop.train(options, decoder, objective, data, processes)
    if not processes.first:
        return
    if values.low_level and not (run.path / low_level.FILE).exists():
        best = Decoder.load(run.path, "best").to(processes.device)
        stimuli = list_stimuli(values.data_path, "training")
        low_level.fit_head(best, data, stimuli).save(run.path, data.clip)
    tell_model(run.path, values.data_path, values.clip_feature_path)


def tell_model(run: Path, data: Path, features: Path) -> None:
    """What a finished training says: where the model is, and what to do with it."""
    pictures = {"model_path": run, "output_dir": run.parent / "images"}
    scores = {"model_path": run, "output_dir": run.parent / "scores"}
    weights = {"sd_model_path": "sd_xl_base_1.0.safetensors",
               "ip_adapter_path": "ip-adapter_sdxl_vit-h.safetensors"}  # fmt: skip
    tell_end(
        {"model": model_file(run, "best")},
        [
            call("generate.py", eeg_data=data, **pictures, **weights),
            call("evaluate.py", data_path=data, clip_feature_path=features, **scores),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
