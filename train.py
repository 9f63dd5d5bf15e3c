"""Stage 2: fit the EEG encoder and the aligner to five embeddings jointly, by one optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import args

if __name__ == "__main__":
    args.answer_quick_questions("train")

import torch

import aligners
import engine
import fusion
import lowlevel
import util
from ATMS_retrieval import Decoder, new_encoder, validation_retrieval
from dataset import Batch, TrainingData, list_stimuli, open_training
from loss import Contrast, embedding_losses, prior_total
from masking import Masking
from modalities import NAMES

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

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        embedding = self.decoder.encoder(batch.eeg, batch.subject)
        return self._losses(embedding, batch.targets, batch.stimulus, generator, self.noise_draws)

    def _losses(
        self,
        embedding: torch.Tensor,
        targets: dict[str, torch.Tensor],
        stimulus: torch.Tensor,
        generator: torch.Generator,
        noise_draws: int,
    ) -> dict[str, torch.Tensor]:
        terms = self.decoder.bank.losses(targets, embedding, generator, noise_draws)
        own = embedding_losses(
            embedding,
            targets,
            self.decoder.encoder.similarity_scale,
            self.contrast,
            self.data.groups(stimulus, self.contrast.positives),
            self.contrast_weight,
        )
        parts = {f"prior_{name}": terms[name].total for name in NAMES}
        parts |= {f"cosine_{name}": terms[name].cosine for name in NAMES}
        total = prior_total(terms, self.decoder.bank.log_variance)
        return parts | own | {"loss": total + own["loss"]}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Losses and retrieval on held-out concepts; the lowest total loss is ``best``."""
        eeg, subject = self.data.validation()
        if not len(eeg):
            return {}
        embeddings = self.decoder.embed(eeg, subject)
        device = next(self.decoder.parameters()).device
        rows = self.data.val_rows.repeat(len(self.data.signal["subjects"]))
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
        return (
            scores | validation_retrieval(embeddings, self.data) | {"select": -scores["val_loss"]}
        )

    def _calibrate(
        self, condition: torch.Tensor, targets: dict[str, torch.Tensor]
    ) -> dict[str, dict[str, float]]:
        """What ``--fusion_weights`` needs to know, saved with the model."""
        bank = self.decoder.bank
        samples = fusion.repeated_samples(bank, condition, range(len(condition)), self.data.seed)
        truth = {name: bank.standardise(name, rows).cpu() for name, rows in targets.items()}
        return fusion.calibrate(samples, truth)


def new_decoder(
    data: TrainingData, seed: int, alignment: aligners.Alignment, init_from: Path | None
) -> Decoder:
    """A fresh decoder, its aligner standardised on the training rows.

    ``init_from``: a run of ATMS_retrieval.py whose encoder it starts from. Raises UserError.
    """
    encoder = new_encoder(data, seed)
    if init_from is not None:
        donor = Decoder.load(init_from, "best")
        if donor.encoder.config != encoder.config or donor.signal != data.signal:
            raise util.UserError(
                "--init_from",
                f"an encoder for {donor.encoder.config} of {donor.signal['subjects']}",
                f"one for {encoder.config} of {data.signal['subjects']}",
                "pre-train with the same subjects, channels and time window",
            )
        encoder.load_state_dict(donor.encoder.state_dict())
    width = data.targets["image"].shape[1]
    bank = aligners.new_aligner(width, encoder.embed_dim, alignment, seed)
    bank.fit_targets({name: features[data.train_rows] for name, features in data.targets.items()})
    return Decoder(encoder, bank, data.signal, data.clip)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or go on training, or do nothing when the run is finished."""
    options = args.resolve("train", argv)
    values = options.values
    device = util.pick_device(values.device)
    data = open_training(
        values.data_path,
        values.clip_feature_path,
        values.subjects,
        values.channels,
        values.time_window,
        values.trials,
        values.val_fraction,
        values.seed,
        values.cache_dir,
    )
    alignment = aligners.Alignment(
        values.aligner,
        values.loss_weights == "uncertainty",
        values.condition_dropout,
        values.prior_predicts,
        values.prior_loss,
    )
    decoder = new_decoder(data, values.seed, alignment, values.init_from)
    masking = Masking(values.mask_channel, values.mask_time, values.mask_patch, values.mask_span)
    parameters = engine.describe_parameters(decoder)
    plan = [*data.describe(), f"train {parameters} on {device} for {values.epochs} epochs"]
    run = util.open_run(options, values.output_dir, data.hashes, plan)
    contrast = Contrast(
        values.text_contrast,
        values.contrast_normalise,
        values.contrast_positives,
        values.target_mse,
    )
    objective = JointObjective(decoder, data, contrast, values.contrast_weight, values.noise_draws)
    engine.fit(run, decoder, objective, data, masking, engine.schedule_from(values), device)
    if values.low_level and not (run.path / lowlevel.FILE).exists():
        best = Decoder.load(run.path, "best").to(device)
        stimuli = list_stimuli(values.data_path, "training")
        lowlevel.fit_head(best, data, stimuli).save(run.path, data.clip)
    print(f"model: {values.output_dir / 'checkpoints' / 'best' / 'model.safetensors'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
