"""Stage 2: fit the EEG encoder and the five diffusion priors jointly, under one optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import args

if __name__ == "__main__":
    args.answer_quick_questions("train")

import torch

import engine
import fusion
import lowlevel
import util
from ATMS_retrieval import ATMS, Decoder, check_encoder, new_encoder, validation_retrieval
from dataset import Batch, TrainingData, list_stimuli, open_training
from loss import contrastive_total, prior_total
from masking import Masking
from modalities import NAMES
from unet import PriorBank

VALIDATION_DRAWS = 8  # timesteps and noises per held-out stimulus, the same at every validation


class JointObjective:
    """Sum of registry weight x prior loss, plus ``contrast_weight`` x CLIP loss.

    Gradients reach the encoder from all of them. ``noise_draws``: timesteps and noises at which
    the priors see each sample of a batch.
    """

    def __init__(
        self,
        decoder: Decoder,
        data: TrainingData,
        contrast_weight: float,
        text_share: float,
        noise_draws: int,
    ) -> None:
        self.decoder, self.data = decoder, data
        self.contrast_weight, self.text_share = contrast_weight, text_share
        self.noise_draws = noise_draws

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        embedding = self.decoder.encoder(batch.eeg, batch.subject)
        return self._losses(embedding, batch.targets, generator, self.noise_draws)

    def _losses(
        self,
        embedding: torch.Tensor,
        targets: dict[str, torch.Tensor],
        generator: torch.Generator,
        noise_draws: int,
    ) -> dict[str, torch.Tensor]:
        terms = self.decoder.bank.losses(targets, embedding, generator, noise_draws)
        contrast = contrastive_total(
            embedding, targets, self.decoder.encoder.similarity_scale, self.text_share
        )
        parts = {f"prior_{name}": terms[name].total for name in NAMES}
        parts |= {f"cosine_{name}": terms[name].cosine for name in NAMES}
        total = prior_total(terms, self.decoder.bank.log_variance)
        return parts | {"contrast": contrast, "loss": total + self.contrast_weight * contrast}

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
        losses = self._losses(embeddings.to(device), targets, generator, VALIDATION_DRAWS)
        scores = {f"val_{name}": float(value) for name, value in losses.items()}
        self.decoder.calibration = self._calibrate(embeddings.to(device), targets)
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
    data: TrainingData,
    seed: int,
    condition_dropout: float,
    loss_weights: str,
    prior_loss: str,
    init_from: Path | None,
    encoder_name: str = ATMS.__name__,
) -> Decoder:
    """A fresh decoder, its bank standardised on the training rows.

    ``init_from``: a run of ATMS_retrieval.py whose encoder it starts from. Raises UserError.
    """
    encoder = new_encoder(data, seed, encoder_name)
    if init_from is not None:
        donor = Decoder.load(init_from, "best")
        found, needed = ((one.name, one.config) for one in (donor.encoder, encoder))
        if found != needed or donor.signal != data.signal:
            raise util.UserError(
                "--init_from",
                f"{found[0]} for {found[1]} of {donor.signal['subjects']}",
                f"{needed[0]} for {needed[1]} of {data.signal['subjects']}",
                "pre-train with the same --encoder, subjects, channels and time window",
            )
        encoder.load_state_dict(donor.encoder.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(util.seed_for(seed, "priors"))
        width = data.targets["image"].shape[1]
        bank = PriorBank(
            width,
            encoder.embed_dim,
            condition_dropout=condition_dropout,
            learned_weights=loss_weights == "uncertainty",
            loss_on=prior_loss,
        )
    bank.fit_targets({name: features[data.train_rows] for name, features in data.targets.items()})
    return Decoder(encoder, bank, data.signal, data.clip)


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train, or go on training, or do nothing when the run is finished."""
    options = args.resolve("train", argv)
    values = options.values
    check_encoder(values.encoder)
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
    decoder = new_decoder(
        data,
        values.seed,
        values.condition_dropout,
        values.loss_weights,
        values.prior_loss,
        values.init_from,
        values.encoder,
    )
    masking = Masking(values.mask_channel, values.mask_time, values.mask_patch, values.mask_span)
    parameters = engine.describe_parameters(decoder)
    plan = [*data.describe(), f"train {parameters} on {device} for {values.epochs} epochs"]
    run = util.open_run(options, values.output_dir, data.hashes, plan)
    objective = JointObjective(
        decoder, data, values.contrast_weight, values.text_contrast, values.noise_draws
    )
    engine.fit(run, decoder, objective, data, masking, engine.schedule_from(values), device)
    if values.low_level and not (run.path / lowlevel.FILE).exists():
        best = Decoder.load(run.path, "best").to(device)
        stimuli = list_stimuli(values.data_path, "training")
        lowlevel.fit_head(best, data, stimuli).save(run.path, data.clip)
    print(f"model: {values.output_dir / 'checkpoints' / 'best' / 'model.safetensors'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
