"""What the numbers mean: the protocols, for the foot of every table."""

from __future__ import annotations

from evaluation.opening import Opened
from unet import PriorBank
from util import CHECKOUT

LITERATURE = CHECKOUT / "configs" / "literature.yaml"
RETRIEVAL_PROTOCOL = {
    "retrieval": "cosine, whole test gallery, EEG averaged over repetitions; priors: cosine of "
    "embeddings standardised by the training targets (CLIP's embeddings share a large mean, near "
    "which a shrunken prediction is close to all); plain cosine: of the embeddings as they are; "
    "encoder: of its output and what it was trained to be near; k-way = exact expectation over "
    "distractors; MRR = mean reciprocal rank; back = from the gallery to the EEG; "
    "fused priors = cosines of the five, weighted by the registry's gains",
    "intervals": "95 % percentile bootstrap over stimuli, 2000 draws",
    "control": "retrieval: EEG of the test stimuli shuffled, mean and 95 % range over shuffles; "
    "pictures: each scored against another stimulus (one seeded cyclic shift)",
}
PICTURE_PROTOCOL = {
    "mindeye": "256 px, then the score's own size, bilinear antialiased, no crop; PixCorr and SSIM "
    "at 425 px, SSIM gray, Gaussian sigma 1.5; LPIPS at 256 px; EffNet-B1 with V2 weights; mean "
    "over the samples of a stimulus, then over stimuli",
    "braindiffuser": "Pillow on 8 bits: 425 px bicubic for PixCorr and SSIM (gray, Gaussian sigma "
    "1.5), 224 px bilinear for networks, 256 px for LPIPS; EffNet-B1 with V1 weights; mean over "
    "the samples of a stimulus, then over stimuli",
}
NETWORK_PROTOCOL = {
    "two-way": "share of the other stimuli whose features correlate less with the picture; ties "
    "lose; chance .5. EffNet and SwAV: 1 - Pearson r of features",
    "distributions": "FID and Frechet: unbiased covariances; KID and Kernel: cubic, unbiased, all "
    "pictures once; IS: logits without bias, pictures in the order of the stimuli; their "
    "intervals are moved onto the value, as resampling biases them (200 draws; Kernel 1000)",
}


def protocol_of(opened: Opened, pictures: str) -> dict[str, str]:
    """What the numbers mean, for the table's foot. ``pictures``: the protocol of their scores."""
    protocol = dict(RETRIEVAL_PROTOCOL)
    kinds = {model.bank.kind for model in opened.models.values() if model.bank is not None}
    if kinds - {PriorBank.kind}:
        protocol["prior"] = f"here what the model's own aligner predicts: {', '.join(kinds)}"
    layers = sorted({layer for model in opened.models.values() for layer in model.layers})
    if layers:
        mixed = any(len(model.layers) > 1 for model in opened.models.values())
        how = ", mixed with each person's weights" if mixed else ""
        protocol["encoder"] = f"images as {', '.join(layers)}, projected by the model{how}"
    views = {model.test_views for model in opened.models.values()} - {1}
    if views:
        protocol["views"] = (
            f"each EEG is read {max(views)} times, shifted and without some channels, and the mean "
            "embedding counts (--test_views)"
        )
    if not opened.groups:
        return protocol
    protocol["pictures"] = f"{pictures}: {PICTURE_PROTOCOL[pictures]}"
    protocol |= NETWORK_PROTOCOL
    smallest = min(len(group.stimuli) for group in opened.groups)
    if smallest < 2048:
        protocol["mostly bias"] = (
            f"at N = {smallest}, fewer than the features' dimensions, FID and Frechet are mostly "
            "bias (two samples of one distribution are far apart): compare them at equal N and by "
            "the same code only, and look at KID or Kernel, which have no bias"
        )
    return protocol
