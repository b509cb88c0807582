"""Samplers of other libraries, each on a grid that it is given: exact noise levels, no rounding.

Every one takes (score, sde, x, times) and returns x at the last of the times; what each needs to
know of the process is sigma / alpha alone.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from sde_lib import SDE
from sde_lib.reverse import Score

Solve = Callable[[Score, SDE, Tensor, Tensor], Tensor]


def ratios_of(sde: SDE, times: Tensor) -> Tensor:
    """sigma / alpha at ``times``."""
    return sde.level(times).noise_ratio


def diffusers(name: str, **settings: object) -> Solve:
    """A scheduler of diffusers; its state is x of a variance-preserving process."""

    def solve(score: Score, sde: SDE, x: Tensor, times: Tensor) -> Tensor:
        import diffusers as library

        scheduler = getattr(library, name)(**settings)
        steps = len(times) - 1
        scheduler.set_timesteps(steps)
        levels, ratios = sde.level(times), ratios_of(sde, times)
        scheduler.sigmas = ratios
        scheduler.timesteps = torch.arange(steps, 0, -1)
        scheduler.num_inference_steps = steps
        scale = torch.hypot(levels.alpha, levels.sigma)
        z = x / scale[0]
        for i, t in enumerate(scheduler.timesteps):
            noise = -levels.sigma[i].to(x) * score(scale[i].to(x) * z, times[i])
            z = scheduler.step(noise, t, z).prev_sample
        return scale[-1].to(x) * z

    return solve


def k_diffusion(name: str, **settings: object) -> Solve:
    """A sampler of k-diffusion; its state is x / alpha."""

    def solve(score: Score, sde: SDE, x: Tensor, times: Tensor) -> Tensor:
        from k_diffusion import sampling

        levels, ratios = sde.level(times), ratios_of(sde, times).to(x)

        def denoiser(y: Tensor, ratio: Tensor) -> Tensor:
            t = sde.time_at(-2 * ratio[0].double().log())
            level = sde.level(t).like(y)
            return level.denoised(level.alpha * y, score(level.alpha * y, level.t))

        run, extra = getattr(sampling, f"sample_{name}"), {}
        if "noise_sampler" in inspect.signature(run).parameters:  # else a tree, slow and float32
            extra["noise_sampler"] = lambda now, nxt: torch.randn_like(x)
        y = run(denoiser, x / levels.alpha[0].to(x), ratios, disable=True, **settings, **extra)
        return levels.alpha[-1].to(x) * y

    return solve


def azula(name: str, **settings: object) -> Solve:
    """A sampler of azula; its time is whatever its schedule says."""

    def solve(score: Score, sde: SDE, x: Tensor, times: Tensor) -> Tensor:
        from azula import sample
        from azula.denoise import Denoiser, DiracPosterior
        from azula.noise import Schedule

        class OurSchedule(Schedule):
            def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
                level = sde.level(t.double())
                return level.alpha.to(x), level.sigma.to(x)

        class OurDenoiser(Denoiser):
            def __init__(self) -> None:
                super().__init__()
                self.schedule = OurSchedule()

            def forward(self, x: Tensor, t: Tensor, **kwargs: object) -> object:
                level = sde.level(t.double()).like(x)
                return DiracPosterior(mean=level.denoised(x, score(x, level.t)))

        class OnOurTimes(getattr(sample, name)):
            timesteps = property(lambda self: times)

        return OnOurTimes(OurDenoiser(), steps=len(times) - 1, silent=True, **settings)(x)

    return solve


DETERMINISTIC: dict[str, tuple[Solve, int]] = {  # and evaluations a step
    "diffusers DDIM": (diffusers("DPMSolverMultistepScheduler", solver_order=1), 1),
    "diffusers DPM-Solver++ 2M": (
        diffusers("DPMSolverMultistepScheduler", solver_order=2, final_sigmas_type="sigma_min"),
        1,
    ),
    "diffusers DPM-Solver++ 3M": (
        diffusers("DPMSolverMultistepScheduler", solver_order=3, final_sigmas_type="sigma_min"),
        1,
    ),
    "diffusers UniPC 2": (
        diffusers("UniPCMultistepScheduler", solver_order=2, final_sigmas_type="sigma_min"),
        1,
    ),
    "diffusers UniPC 3": (
        diffusers("UniPCMultistepScheduler", solver_order=3, final_sigmas_type="sigma_min"),
        1,
    ),
    "diffusers DEIS 3": (diffusers("DEISMultistepScheduler", solver_order=3), 1),
    "k-diffusion Heun": (k_diffusion("heun"), 2),
    "k-diffusion dpm_2": (k_diffusion("dpm_2"), 2),
    "k-diffusion LMS": (k_diffusion("lms"), 1),
    "k-diffusion dpmpp_2m": (k_diffusion("dpmpp_2m"), 1),
    "azula Heun": (azula("HeunSampler"), 2),
    "azula zAB 3": (azula("zABSampler", order=3), 1),
    "azula vAB 3": (azula("vABSampler", order=3), 1),
    "azula zEAB 3": (azula("zEABSampler", order=3), 1),
    "azula xEAB 3": (azula("xEABSampler", order=3), 1),
    "azula REAB 3": (azula("REABSampler", order=3), 1),
}

STOCHASTIC: dict[str, tuple[Solve, int]] = {
    "diffusers SDE-DPM-Solver++ 2M": (
        diffusers(
            "DPMSolverMultistepScheduler",
            solver_order=2,
            algorithm_type="sde-dpmsolver++",
            final_sigmas_type="sigma_min",
        ),
        1,
    ),
    "k-diffusion dpmpp_2m_sde": (k_diffusion("dpmpp_2m_sde"), 1),
    "k-diffusion dpmpp_sde": (k_diffusion("dpmpp_sde"), 2),
    "k-diffusion Euler ancestral": (k_diffusion("euler_ancestral"), 1),
    "azula DDPM": (azula("DDPMSampler"), 1),
}
