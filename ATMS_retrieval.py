"""The ATMS encoder, the decoder built on an encoder, and retrieval; as a script: pre-training.

ATMS: Adaptive Thinking Mapper with subject tokens (Li et al., NeurIPS 2024, EEG_Image_decode), with
the published code's traps mended; ``reference=True`` keeps them for public checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import args

if __name__ == "__main__":
    args.answer_quick_questions("retrieval")

import torch
from torch import nn

import util
from datafiles.feature_bank import FINAL_LAYER, layer_name
from dataset import Batch, TestEEG, TrainingData
from decoder import aligners
from decoder.encoders import (
    NICE,
    Braindecode,
    EEGProject,
    Encoder,
    SpatioTemporalConvolution,
    UnknownEncoder,
    check_name,
    pooled_width,
    projection,
)
from decoder.projector import Projector, new_projector
from loss import Contrast, embedding_losses
from metrics import retrieval_topk
from modalities import NAMES
from subject_layers.transformer import ChannelTransformer
from training import loop
from training.processes import Processes, gathered
from unet import Sampling, TargetSpace
from util import WHOLE, Part


class ATMS(Encoder):
    """EEG [B, C, T] float32 and subject [B] int64 -> embedding [B, D], not L2-normalised.

    ``subject``: 0-based per row, -1 = unknown. ``reference=True`` computes what the published code
    does: the last channel's token dropped, ids read as table rows (one beyond the table switches
    the whole batch to the shared token), no subject layer, the logit scale used raw. Raises
    ValueError on wrong shapes.
    """

    def __init__(
        self,
        n_channels: int = 63,
        n_times: int = 250,
        n_subjects: int = 10,
        embed_dim: int = 1024,
        *,
        width: int = 250,
        hidden: int = 256,
        heads: int = 4,
        dropout: float = 0.25,
        features: int = 40,
        kernel: int = 25,
        pool_kernel: int = 51,
        positional: bool = True,
        reference: bool = False,
    ) -> None:
        super().__init__(n_channels, n_times, n_subjects, embed_dim, subject_layer=not reference)
        self.config |= {
            "width": width,
            "hidden": hidden,
            "heads": heads,
            "dropout": dropout,
            "features": features,
            "kernel": kernel,
            "pool_kernel": pool_kernel,
            "positional": positional,
            "reference": reference,
        }
        self.reference = reference
        self.encoder = ChannelTransformer(
            n_channels,
            n_times,
            n_subjects,
            width,
            hidden,
            heads,
            dropout,
            positional=positional,
            reference=reference,
        )
        self.enc_eeg = nn.Sequential(
            SpatioTemporalConvolution(n_channels, features, kernel, pool_kernel)
        )
        flat = features * pooled_width(width, kernel, pool_kernel)
        self.proj_eeg = projection(flat, embed_dim, dropout=0.5)

    def _embed(self, eeg: torch.Tensor, subject: torch.Tensor) -> torch.Tensor:
        return self.proj_eeg(self.enc_eeg(self.encoder(eeg, subject)))

    def add_subjects(self, count: int) -> None:
        """As of every encoder; tokens, too."""
        super().add_subjects(count)
        self.encoder.enc_embedding.subject_embedding.add_subjects(count)

    def subject_parameters(self) -> list[nn.Parameter]:
        """As of every encoder; tokens, too."""
        embedding = self.encoder.enc_embedding.subject_embedding
        return [*super().subject_parameters(), *embedding.parameters()]

    @property
    def similarity_scale(self) -> torch.Tensor:
        """As of every encoder; ``reference``: the parameter itself."""
        return self.logit_scale if self.reference else super().similarity_scale

    @classmethod
    def from_reference(
        cls, state_dict: Mapping[str, torch.Tensor], positional: bool = True, pool_kernel: int = 51
    ) -> ATMS:
        """Load a public ATM-S checkpoint; sizes are read from its shapes.

        The returned module takes the reference's own integer ids (``sub-08`` -> 8).
        ``positional=False`` for checkpoints trained before 2025-12-24, in which the table was
        silently off. Parameters that never took part in the published forward pass are left out.
        Raises ValueError for another model.
        """
        live = {
            key: value
            for key, value in state_dict.items()
            if not key.startswith(_DEAD_IN_REFERENCE)
        }
        try:
            model = cls(
                **_reference_sizes(live),
                positional=positional,
                pool_kernel=pool_kernel,
                reference=True,
            )
        except KeyError as missing:
            raise ValueError(f"not an ATM-S state dict: {missing} is missing") from None
        found, needed = live["proj_eeg.0.weight"].shape, model.proj_eeg[0].weight.shape
        if found != needed:
            raise ValueError(
                f"proj_eeg.0.weight is {tuple(found)}, expected {tuple(needed)} with pool_kernel="
                f"{pool_kernel}: pass the pooling width that this checkpoint was trained with"
            )
        model.to(live["proj_eeg.0.weight"].dtype)
        try:
            model.load_state_dict(live)
        except RuntimeError as error:
            raise ValueError(f"not an ATM-S state dict: {error}") from None
        return model.eval()


_DEAD_IN_REFERENCE = (
    "subject_wise_linear.",
    "encoder.enc_embedding.mask_token",
    "encoder.enc_embedding.temporal_embedding.",
    "encoder.enc_embedding.position_embedding.",
    "encoder.enc_embedding.subject_embedding.mask_embedding",
)


def _reference_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
    return {
        "n_times": state["encoder.enc_embedding.value_embedding.weight"].shape[1],
        "width": state["encoder.enc_embedding.value_embedding.weight"].shape[0],
        "n_subjects": state[
            "encoder.enc_embedding.subject_embedding.subject_embedding.weight"
        ].shape[0],
        "hidden": state["encoder.encoder.attn_layers.0.conv1.weight"].shape[0],
        "n_channels": state["enc_eeg.0.tsconv.4.weight"].shape[2],
        "features": state["enc_eeg.0.tsconv.0.weight"].shape[0],
        "kernel": state["enc_eeg.0.tsconv.0.weight"].shape[3],
        "embed_dim": state["proj_eeg.0.weight"].shape[0],
    }


OWN = {kind.__name__: kind for kind in (ATMS, EEGProject, NICE)}


def make_encoder(name: str, config: Mapping[str, Any]) -> Encoder:
    """The encoder ``name`` of ``--encoder``. ``config``: of an encoder, or just the four sizes.

    Raises UnknownEncoder, and ValueError for a signal that it cannot take.
    """
    if name in OWN:
        return OWN[name](**config)
    return Braindecode(**{**config, "model": name})


# ---------------------------------------------------------------- encoder and, once trained, priors


def model_file(run: Path, checkpoint: str) -> Path:
    """The ``best`` or ``latest`` model of a training run."""
    return run / "checkpoints" / checkpoint / "model.safetensors"


class Decoder(nn.Module):
    """An encoder with its aligner; ``bank`` is None after contrastive pre-training alone.

    ``projector``: of the layer of CLIP that EEG embeddings are compared with; None: with the image
    embeddings as they are.
    ``signal``: what the EEG must look like ({channels, times, subjects}); ``clip``: identity of the
    encoder that made the targets. Both are kept in the checkpoint's header and checked against
    every later input.
    """

    def __init__(
        self,
        encoder: Encoder,
        bank: TargetSpace | None,
        signal: Mapping[str, Any],
        clip: Mapping[str, Any],
        projector: Projector | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.bank, self.projector = encoder, bank, projector
        self.signal, self.clip = dict(signal), dict(clip)
        # by validation, for fusion.py and for aligners.spread_factors
        self.calibration: dict[str, dict[str, float]] | None = None
        self.held_out: list[list[float]] | None = None

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
        }

    def networks(self) -> list[nn.Module]:
        """Where the time of a training step goes."""
        return [self.encoder, *(self.bank.networks() if self.bank else [])]

    @property
    def layer(self) -> str | None:
        """What the projector needs of a bank beside the five modalities."""
        return self.projector.layer if self.projector else None

    @property
    def picture_features(self) -> str:
        """The features of pictures that EEG embeddings are compared with, by their name."""
        return self.layer or FINAL_LAYER

    def image_side(self, features: torch.Tensor) -> torch.Tensor:
        """Features [N, W] of :attr:`picture_features` as EEG embeddings see them: [N, D]."""
        return features if self.projector is None else self.projector(features)

    @torch.no_grad()
    def gallery(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What EEG embeddings retrieve, of pictures with ``features`` {name: [N, W]}: [N, D]."""
        rows = features[self.picture_features]
        return self.image_side(rows.to(next(self.parameters()).device)).to(rows.device)

    def subject_index(self, subject: str) -> int:
        """Row of a subject's own parameters; -1 for a person the model was not trained on."""
        names = self.signal["subjects"]
        return names.index(subject) if subject in names else -1

    def train_only(self, trainable: str) -> None:
        """Freeze all but the ``subject_layers``, all but the ``encoder``, or nothing (``all``)."""
        chosen = {
            "subject_layers": self.encoder.subject_parameters(),
            "encoder": list(self.encoder.parameters()),
            "all": list(self.parameters()),
        }[trainable]
        self.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)

    @classmethod
    def load(cls, run: Path, checkpoint: str) -> Decoder:
        """The ``best`` or ``latest`` model of a run. Raises DataError."""
        path = model_file(run, checkpoint)
        state, header = util.load_tensors(path)
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
        projector = Projector(**config) if config else None
        decoder = cls(encoder, bank, header["signal"], header["clip"], projector)
        decoder.calibration = header["calibration"]
        decoder.held_out = header.get("held_out")  # headers of older models have none
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
        """Embeddings [N, D] of EEG [N, C, T], made in batches on the model's device, on the CPU."""
        device = next(self.parameters()).device
        return torch.cat(
            [
                self.encoder(rows.to(device), ids.to(device)).cpu()
                for rows, ids in zip(eeg.split(batch_size), subject.split(batch_size), strict=True)
            ]
        )

    def condition(self, test: TestEEG, rows: Sequence[int]) -> torch.Tensor:
        """EEG embeddings [n, D] of some rows of a test recording, on the CPU."""
        subject = torch.full((len(rows),), self.subject_index(test.subject))
        return self.embed(test.eeg[list(rows)], subject)

    def predict(
        self, test: TestEEG, rows: Sequence[int], sampling: Sampling, seed: int
    ) -> dict[str, torch.Tensor]:
        """Predicted CLIP embeddings {modality: [n, D]} of some rows, un-normalised, on the CPU.

        A row's noise belongs to its stimulus: it depends on nothing but ``seed`` and that.
        """
        condition = self.condition(test, rows).to(next(self.parameters()).device)
        seeds = [util.seed_for(seed, "prior", test.ids[row]) for row in rows]
        held_out = None if self.held_out is None else torch.tensor(self.held_out)
        samples = aligners.predict(self.bank, condition, seeds, sampling, seed, held_out)
        return {name: values.cpu() for name, values in samples.items()}


def _encoder_of(header: Mapping[str, Any], path: Path) -> Encoder:
    """The encoder that a checkpoint's header describes. Raises DataError."""
    name = header.get("encoder_name", ATMS.__name__)  # headers had no name when there was but one
    try:
        check_name(name)
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


def check_encoder(name: str) -> None:
    """For the first second of a run. Raises UserError for a name that nothing here answers to."""
    try:
        check_name(name)
    except UnknownEncoder as unknown:
        raise util.UserError("--encoder", name, unknown.expected, unknown.cure) from None


def new_encoder(data: TrainingData, seed: int, name: str = ATMS.__name__) -> Encoder:
    """A freshly initialised encoder for this signal, seeded. UserError if it cannot take it."""
    sizes = {
        "n_channels": len(data.signal["channels"]),
        "n_times": len(data.signal["times"]),
        "n_subjects": len(data.signal["subjects"]),
        "embed_dim": data.targets["image"].shape[1],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(util.seed_for(seed, "encoder"))
        try:
            return make_encoder(name, sizes)
        except ValueError as error:
            raise util.UserError(
                "--encoder",
                str(error),
                "an encoder for this signal",
                "choose another one, or another --time_window or --channels",
            ) from None


def validation_retrieval(
    decoder: Decoder, embeddings: torch.Tensor, data: TrainingData
) -> dict[str, float]:
    """Retrieval per modality of held-out stimuli by EEG embeddings [stimuli x subjects, D]."""
    truth = torch.arange(len(data.val_rows)).repeat(len(data.recordings))
    galleries = {name: rows[data.val_rows] for name, rows in data.targets.items()}
    galleries["image"] = decoder.gallery(galleries)
    scores = {}
    for name in NAMES:
        result = retrieval_topk(embeddings, galleries[name], truth)
        scores |= {f"val_{name}_top1": result["top1"], f"val_{name}_top5": result["top5"]}
    return scores | {"val_gallery": len(data.val_rows)}


def contrast_from(values: Any) -> Contrast:
    """The contrast that the flags ask for."""
    return Contrast(
        values.text_contrast,
        values.contrast_normalise,
        values.contrast_positives,
        values.target_mse,
    )


def global_losses(
    decoder: Decoder,
    embedding: torch.Tensor,
    targets: Mapping[str, torch.Tensor],
    how: Contrast,
    groups: torch.Tensor | None,
    contrast_weight: float,
    part: Part,
) -> dict[str, torch.Tensor]:
    """:func:`loss.embedding_losses` over the rows of all processes that compute parts of a batch.

    In float32 whatever autocast says: cosines times 100 need it.
    """
    # what is WHOLE one process computes alone: nobody else would answer
    everybody = gathered if part.count > 1 else _as_they_are
    with torch.autocast(embedding.device.type, enabled=False):
        wide = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
        everyone = {
            "image": decoder.image_side(everybody(targets[decoder.picture_features])),
            "text": everybody(targets["text"]),
        }
        together = None if groups is None else everybody(groups)
        scale = decoder.encoder.similarity_scale
        return embedding_losses(everybody(wide), everyone, scale, how, together, contrast_weight)


def _as_they_are(rows: torch.Tensor) -> torch.Tensor:
    return rows


class ContrastiveObjective:
    """Loss and validation of encoder-only training, for :func:`engine.fit`."""

    def __init__(self, decoder: Decoder, data: TrainingData, contrast: Contrast) -> None:
        self.decoder, self.data, self.contrast = decoder, data, contrast

    def losses(
        self, batch: Batch, generator: torch.Generator, part: Part = WHOLE
    ) -> dict[str, torch.Tensor]:
        decoder = self.decoder
        groups = self.data.groups(batch.stimulus, self.contrast.positives)
        embedding = decoder.encoder(batch.eeg, batch.subject)
        return global_losses(decoder, embedding, batch.targets, self.contrast, groups, 1.0, part)

    def validate(self) -> dict[str, float]:
        """Held-out concepts only; ``select`` (higher is better) chooses ``best``."""
        eeg, subject = self.data.validation()
        if not len(eeg):
            return {}
        embeddings = self.decoder.embed(eeg, subject)
        scores = validation_retrieval(self.decoder, embeddings, self.data)
        return scores | {"select": scores["val_image_top5"]}


@util.command
def main(argv: Sequence[str] | None = None) -> int:
    """Contrastive pre-training of the encoder alone, scored on held-out training concepts."""
    options = args.resolve("retrieval", argv)
    check_encoder(options.values.encoder)
    processes = Processes.join(options.values.device)
    for fold in loop.folds(options):
        values = fold.values
        layer = layer_name(values.contrast_layer)
        data = loop.open_data(values, layer)
        encoder = new_encoder(data, values.seed, values.encoder)
        projector = new_projector(layer, data.targets, data.train_rows, values.seed)
        decoder = Decoder(encoder, None, data.signal, data.clip, projector)
        objective = ContrastiveObjective(decoder, data, contrast_from(values))
        loop.train(fold, decoder, objective, data, processes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
