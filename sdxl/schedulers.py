"""Schedulers that can draw here, and how much noise is left at each of their steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import util

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

SCHEDULERS = (  # those that find a known picture again with a U-Net that predicts perfectly
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
# of models that were trained so: their U-Nets read 0.25 log(sigma), SDXL's a timestep
EDM_SCHEDULERS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def check_scheduler(own: str, name: str | None) -> str:
    """The class that is asked for by ``name``; None: the model's ``own``.

    Raises UserError for a name that is none, and for one that cannot draw here.
    """
    chosen = own if name is None else name
    if chosen not in SCHEDULERS + EDM_SCHEDULERS and not _by_torchsde(chosen):
        raise util.UserError(
            "--scheduler" if name else "the model's own scheduler",
            f"{chosen}, which is {_why_not(chosen)}",
            f"one of {', '.join(SCHEDULERS)}",
            "name one of these with --scheduler",
        )
    return chosen


def set_scheduler(pipe: StableDiffusionXLPipeline, name: str | None, spacing: str | None) -> None:
    """Give ``pipe`` a diffusers scheduler by class name; None keeps the model's own.

    ``spacing``: of the timesteps; distilled models need "trailing", to start at pure noise. Raises
    UserError.
    """
    import diffusers

    own = type(pipe.scheduler).__name__
    chosen = check_scheduler(own, name)
    if chosen in EDM_SCHEDULERS and own not in EDM_SCHEDULERS:
        util.LOG.warning(
            "%s is for models that were trained with it, as Playground 2.5: this one's is %s, and "
            "what it is told of the noise will be wrong",
            chosen,
            own,
        )
    options = {} if spacing is None else {"timestep_spacing": spacing}
    # what one class has left open another may not know how to
    known = {key: value for key, value in pipe.scheduler.config.items() if value is not None}
    pipe.scheduler = getattr(diffusers, chosen).from_config(known, **options)


def _by_torchsde(name: str) -> bool:
    """Whether it is the one scheduler that draws here with a package of its own, if installed."""
    from diffusers.utils import is_torchsde_available

    return name == "DPMSolverSDEScheduler" and is_torchsde_available()


def _why_not(name: str) -> str:
    """What a scheduler is that cannot draw here."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if name == "DPMSolverSDEScheduler":
        return "of the package torchsde, which is not installed"
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        return "no scheduler of the installed diffusers"
    if "Flow" in name:
        return "for flow matching, which SDXL was not trained for"
    if "PNDM" in name:
        return "a multistep method that repeats its first steps, whose guidance and starts are off"
    return "for other models than SDXL"


def _training_levels(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """(log sigma, share of the way to pure noise) of a model's training timesteps, growing."""
    start, end, count = (config.get(key) or value for key, value in SDXL_BETAS.items())
    betas = np.linspace(float(start) ** 0.5, float(end) ** 0.5, int(count)) ** 2
    kept = np.cumprod(1 - betas)
    return 0.5 * np.log((1 - kept) / kept), np.arange(count) / count


def noise_levels(scheduler: Any) -> list[float]:
    """Of each step, once they are set: 0 (picture) to 1 (pure noise, as far as SDXL knows it).

    In timesteps of SDXL's training, whatever a scheduler counts in: those that have sigmas are
    asked for these.
    """
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) < len(timesteps):
        return (timesteps.float() / scheduler.config.num_train_timesteps).tolist()
    known = sigmas[: len(timesteps)].double().cpu().clamp(min=1e-10).log().numpy()
    return np.interp(known, *_training_levels(scheduler.config)).tolist()


def honour_markers(pipe: StableDiffusionXLPipeline, keys: set[str]) -> None:
    """What a single file says of its model beside the weights: ``v_pred``, ``ztsnr``."""
    changes: dict[str, Any] = {}
    if "v_pred" in keys:
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if changes:
        util.LOG.info("the file says %s", ", ".join(sorted(keys & {"v_pred", "ztsnr"})))
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)


def check_not_finite(latents: torch.Tensor, pictures: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise UserError where pictures hold NaN: whether of the U-Net or of the VAE."""
    if pictures.isfinite().all():
        return
    if latents.isfinite().all():
        raise util.UserError(
            "--vae_path",
            f"pictures with NaN: the VAE overflows in {dtype}",
            "finite numbers",
            "give a VAE that was repaired for float16, or --precision bf16 or fp32",
        )
    raise util.UserError(
        "--precision",
        f"latents with NaN: the U-Net overflows in {dtype}",
        "finite numbers",
        "give --precision bf16 or fp32",
    )
