"""How much noise a prior's timestep has, and the samplers that go back along it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

TRAIN_STEPS = 1000  # DDPM: linear betas 1e-4 .. 2e-2 over 1000 steps
NOISE_SCHEDULE = {
    "num_train_timesteps": TRAIN_STEPS,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",  # see PriorBank.velocity_from
}


def sampler_named(name: str) -> SchedulerMixin:
    """A diffusers scheduler on the training schedule: ``dpm`` (DPM-Solver++ 2M) or ``ddim``.

    x0 is not clipped: un-normalised CLIP vectors, even standardised, leave [-1, 1].
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if name == "ddim":
        return DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, timestep_spacing="trailing")
    if name == "dpm":
        return DPMSolverMultistepScheduler(
            **NOISE_SCHEDULE,
            algorithm_type="dpmsolver++",
            timestep_spacing="trailing",
            final_sigmas_type="zero",
        )
    raise ValueError(f"unknown prior sampler {name!r}; expected dpm or ddim")
