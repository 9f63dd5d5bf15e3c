"""The ATMS encoder, the decoder built on an encoder, and retrieval; as a script: pre-training.

ATMS: Adaptive Thinking Mapper with subject tokens (Li et al., NeurIPS 2024, EEG_Image_decode), with
the published code's traps mended; ``reference=True`` keeps them for public checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import args

if __name__ == "__main__":
    args.answer_quick_questions("retrieval")

import torch

import util
from cli.config import Options
from datafiles.feature_bank import FINAL_LAYER, RETRIEVAL_NAMES, layer_names
from dataset import Batch, DataChoice, TrainingData, open_training
from decoder.atms import ATMS as ATMS  # where users of the public code look for it
from decoder.decoder import Decoder, check_encoder, model_file, new_encoder
from decoder.foundation import EncoderChoice, encoder_hash
from decoder.projector import new_projector
from loss import Contrast
from rundirs.closing import call, tell_end
from training import loop
from training.objectives import global_losses, validation_retrieval
from training.processes import Processes
from training.settings import Fold, folds
from util import WHOLE, Part


class ContrastiveObjective:
    """Loss and validation of encoder-only training, for :func:`training.loop.fit`."""

    def __init__(self, decoder: Decoder, data: TrainingData, contrast: Contrast) -> None:
        self.decoder, self.data, self.contrast = decoder, data, contrast

    def losses(
        self, batch: Batch, generator: torch.Generator, part: Part = WHOLE
    ) -> dict[str, torch.Tensor]:
        decoder = self.decoder
        groups = self.data.groups(batch.stimulus, self.contrast.contrast_positives)
        embedding = decoder.encoder(batch.eeg, batch.subject)
        return global_losses(
            decoder, embedding, batch.subject, batch.targets, self.contrast, groups, 1.0, part
        )

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
    check_encoder(options.settings(EncoderChoice))
    processes = Processes.join(options.values.device)
    for fold in folds(options.settings(Fold)):
        pretrain(options.changed(fold), processes)
    return 0


def pretrain(options: Options, processes: Processes) -> None:
    """One encoder."""
    values = options.values
    layers = layer_names(values.contrast_layer)
    needed = RETRIEVAL_NAMES if values.text_contrast else (FINAL_LAYER,)
    choice = options.settings(EncoderChoice)
    data = open_training(options.settings(DataChoice), layers, needed=needed).aligned()
    data = replace(data, hashes=data.hashes | encoder_hash(choice))
    encoder = new_encoder(data, values.seed, choice)
    people = encoder.n_subjects
    projector = new_projector(layers, data.targets, data.train_rows, people, values.seed)
    decoder = Decoder(encoder, None, data.signal, data.clip, projector)
    decoder.know_alignment(data)
    decoder.concepts = data.concepts()
    objective = ContrastiveObjective(decoder, data, options.settings(Contrast))
    run = loop.train(options, decoder, objective, data, processes)
    if processes.first:
        paths = {"data_path": values.data_path, "clip_feature_path": values.clip_feature_path}
        tell_end(
            {"encoder": model_file(run.path, "best")},
            [call("train.py", **paths, init_from=run.path, output_dir=run.path.parent / "model"),
             call("evaluate.py", **paths, model_path=run.path,
                  output_dir=run.path.parent / "encoder_scores")],
        )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
