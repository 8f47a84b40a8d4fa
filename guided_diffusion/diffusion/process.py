"""The forward process q: noise schedules, its float64 tables, x_0 ↔ ε ↔ v, respacing (Ho et al. 2020; Nichol 2021)."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """β of every step, [T] float64, of ᾱ as a function of time in [0, 1]."""
    steps = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)])


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """β of every step, [T] float64: `linear` (Ho et al., scaled to T steps) or `cosine` (Nichol & Dhariwal)."""
    steps = num_diffusion_timesteps
    if schedule_name == "linear":
        if steps < 20:
            raise ValueError(f"diffusion_steps: the linear schedule needs at least 20, got {steps}")
        return 1000 / steps * np.linspace(0.0001, 0.02, steps, dtype=np.float64)
    if schedule_name == "cosine":

        def alpha_bar(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        return betas_for_alpha_bar(steps, alpha_bar)
    raise ValueError(
        f"noise_schedule: {schedule_name!r} is neither linear nor cosine; linear_path is for --sampler euler or heun"
    )


def space_timesteps(num_timesteps: int, section_counts: str | Iterable[int]) -> set[int]:
    """The original steps that a respaced process keeps.

    section_counts: `"250"` or `[250]` (evenly spread), `"10,15,20"` (so many in each third of the process), or
    `"ddim25"` (the fixed stride of the DDIM paper). A ValueError tells which spacing cannot be had.
    """
    asked = f"timestep_respacing: {section_counts!r}"
    if isinstance(section_counts, str):
        ddim = section_counts.startswith("ddim")
        try:
            counts = [int(part) for part in section_counts.removeprefix("ddim").split(",")]
        except ValueError:
            raise ValueError(f"{asked} is not a number, a list of numbers like 10,15,20, ddimN or logsnrN") from None
        if ddim:
            if len(counts) != 1 or counts[0] < 1:
                raise ValueError(f"{asked} is not ddimN with one N of at least 1")
            for every in range(1, num_timesteps + 1):
                if len(range(0, num_timesteps, every)) == counts[0]:
                    return set(range(0, num_timesteps, every))
            raise ValueError(f"{asked}: no whole stride takes {counts[0]} of {num_timesteps} steps")
    else:
        counts = list(section_counts)
    if min(counts, default=0) < 1:
        raise ValueError(f"{asked} needs at least one step in every section")
    size, extra = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if count > length:
            raise ValueError(f"{asked}: wanted at most {length} steps of {len(counts)} section(s), got {count}")
        stride = 1.0 if count == 1 else (length - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += length
    return kept


def half_log_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """λ = log(α/σ) of ᾱ, float64: ∞ for an image (ᾱ = 1), −∞ for noise alone (ᾱ = 0)."""
    with np.errstate(divide="ignore"):
        return (np.log(alphas_cumprod) - np.log1p(-np.asarray(alphas_cumprod))) / 2


NOISE_ALONE = -5.1
"""λ below which x_t is as good as noise: the cosine schedule goes on to −9.9 in its last four steps."""


def kept_timesteps(betas: np.ndarray, respacing: str | Iterable[int]) -> set[int]:
    """The original steps, of those with these β, that a respaced process keeps: `space_timesteps`, and `"logsnr20"`.

    logsnrN: N steps evenly spread in λ = log(α/σ), from noise to step 0. Where the original steps lie farther apart
    than that, every one is kept. A ValueError tells which spacing cannot be had.
    """
    if not isinstance(respacing, str) or not respacing.startswith("logsnr"):
        return space_timesteps(len(betas), respacing)
    number = respacing.removeprefix("logsnr")
    if not number.isdecimal() or not 1 <= int(number) <= len(betas):
        raise ValueError(f"timestep_respacing: {respacing!r} is not logsnrN with an N from 1 to {len(betas)}")
    count = int(number)
    levels = half_log_snr(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
    wanted = np.linspace(max(levels[-1], NOISE_ALONE), levels[0], count)[::-1]
    nearest = np.interp(-wanted, -levels, np.arange(len(betas))).round().astype(int)
    # The i-th kept step k_i is above the one before where k_i − i does not fall, and leaves room below the last one.
    order = np.arange(count)
    room = np.minimum(np.maximum.accumulate(nearest - order), max(nearest[-1] + 1 - count, 0))
    return set((room + order).tolist())


class NoiseLevels:
    """q(x_t | x_0) = N(α_t x_0, σ_t² I) at the steps of a sampler, in that sampler's own scale of x.

    alphas, sigmas: [T] each; α² + σ² = 1 in samplers that keep the variance, α = 1 in those that let it grow, α + σ = 1
    in flow models, α = 0 at a zero terminal SNR. timesteps: [T], what the network is told. Steps are counted as they
    are left to go: t = T − 1 is the first, t = 0 the last. Tables are numpy float64; methods take tensors x [N, ...]
    and t [N] int64 and return float32 on x's device.
    """

    def __init__(self, alphas: np.ndarray, sigmas: np.ndarray, timesteps: Tensor | np.ndarray):
        self.alphas, self.sigmas = (np.asarray(values, dtype=np.float64) for values in (alphas, sigmas))
        self.norms = np.hypot(self.alphas, self.sigmas)
        self.timesteps = timesteps
        self.num_timesteps = len(timesteps)
        # What stands before x_t, x_0 and ε in x_t = α x_0 + σ ε: the equation that one is solved for, given two.
        self.x_factors, self.x0_factors, self.eps_factors = np.ones_like(self.alphas), self.alphas, self.sigmas
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _tensor(self, table: str, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        key = (table, device)
        if key not in self._on_device:
            self._on_device[key] = torch.as_tensor(getattr(self, table), dtype=dtype, device=device)
        return self._on_device[key]

    def first(self, steps: int) -> "NoiseLevels":
        """The levels of the first so many steps as they are counted, those nearest to the image."""
        return NoiseLevels(self.alphas[:steps], self.sigmas[:steps], self.timesteps[:steps])

    def at(self, table: str, t: Tensor, x: Tensor) -> Tensor:
        """Row values of the table of that name at steps t, float32, shaped to broadcast over x: [N, 1, …]."""
        return self._tensor(table, t.device, torch.float32)[t].reshape(-1, *[1] * (x.ndim - 1))

    def network_timesteps(self, t: Tensor) -> Tensor:
        """What the network is told, [N] of the dtype of `timesteps`."""
        return self._tensor("timesteps", t.device)[t]

    def has_signal(self, t: Tensor, x: Tensor) -> Tensor:
        """Whether α_t > 0, so that ε says what x̂_0 is: bool, shaped to broadcast over x."""
        return self.at("alphas", t, x) > 0

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = α_t x_0 + σ_t ε."""
        return self.at("alphas", t, x0) * x0 + self.at("sigmas", t, x0) * noise

    def x0_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor, otherwise: Tensor | float = math.nan) -> Tensor:
        """x̂_0 = (x_t − σ_t ε) / α_t; `otherwise` where α_t = 0 and ε says nothing of x̂_0."""
        signal = self.at("x_factors", t, x_t) * x_t - self.at("eps_factors", t, x_t) * eps
        return torch.where(self.has_signal(t, x_t), signal / self.at("x0_factors", t, x_t), otherwise)

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """ε = (x_t − α_t x̂_0) / σ_t."""
        noise = self.at("x_factors", t, x_t) * x_t - self.at("x0_factors", t, x_t) * x0
        return noise / self.at("eps_factors", t, x_t)

    def velocity(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """v = (α_t ε − σ_t x̂_0) / √(α_t² + σ_t²) (Salimans & Ho 2022, for any scale of x)."""
        return (self.at("alphas", t, eps) * eps - self.at("sigmas", t, x0) * x0) / self.at("norms", t, x0)

    def from_velocity(self, x_t: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂_0, ε) of a v at x_t; both are defined for every α_t and σ_t."""
        alpha, sigma, norm = (self.at(name, t, x_t) for name in ("alphas", "sigmas", "norms"))
        unit = x_t / norm
        return (alpha * unit - sigma * v) / norm, (sigma * unit + alpha * v) / norm

    def q_posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t−1} | x_t, x_0), where the process has its tables: a `ForwardProcess`."""
        return self.at("posterior_mean_coef1", t, x_t) * x0 + self.at("posterior_mean_coef2", t, x_t) * x_t

    def x0_from_previous(self, x_t: Tensor, t: Tensor, previous: Tensor) -> Tensor:
        """x̂_0 of which `previous` is the posterior mean."""
        return (previous - self.at("posterior_mean_coef2", t, x_t) * x_t) / self.at("posterior_mean_coef1", t, x_t)


class ForwardProcess(NoiseLevels):
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I) on the steps that respacing kept, counted 0 … num_timesteps − 1.

    betas: [T] in (0, 1], the original process. kept: original steps to keep (default: all).
    rescale_timesteps: networks see steps scaled to [0, 1000), float32, as IDDPM's 4000-step models want.
    """

    def __init__(self, betas: np.ndarray, kept: Iterable[int] | None = None, rescale_timesteps: bool = False):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be a list of numbers in (0, 1]")
        self.original_betas, self.original_num_steps = betas, len(betas)
        self.rescale_timesteps = rescale_timesteps
        self.timestep_map = sorted(range(len(betas)) if kept is None else set(kept))
        kept_alphas = np.cumprod(1 - betas)[self.timestep_map]
        if kept is not None:
            betas = 1 - kept_alphas / np.append(1.0, kept_alphas[:-1])
        self.betas = betas
        self.alphas_cumprod = np.cumprod(1 - betas)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        timesteps = np.array(self.timestep_map)
        if rescale_timesteps:
            timesteps = timesteps.astype(np.float32) * np.float32(1000.0 / self.original_num_steps)
        super().__init__(self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod, timesteps)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.log_one_minus_alphas_cumprod = np.log(1 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):
            self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # The first entry is 0, so the second stands in for it wherever a logarithm is taken.
        second = self.posterior_variance[min(1, self.num_timesteps - 1)] or betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - betas) / (1 - self.alphas_cumprod)
        self._derive()

    def first(self, steps: int) -> "ForwardProcess":
        """The process of the first so many of these steps, those nearest to the image."""
        return ForwardProcess(self.original_betas, self.timestep_map[:steps], self.rescale_timesteps)

    def _derive(self) -> None:
        """Tables that are others in other words."""
        self.alphas, self.sigmas = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        # Divided by α, as guided-diffusion has it: x̂_0 and ε are then its own to the last bit. Where α = 0, as it is.
        signal = self.alphas > 0
        self.x_factors = np.where(signal, self.sqrt_recip_alphas_cumprod, 1.0)
        self.x0_factors = np.where(signal, 1.0, 0.0)
        self.eps_factors = np.where(signal, self.sqrt_recipm1_alphas_cumprod, self.sigmas)
        self.log_betas = np.log(self.betas)
        self.fixed_large_log_variance = np.append(self.posterior_log_variance_clipped[:1], self.log_betas[1:])
        self.fixed_large_variance = np.exp(self.fixed_large_log_variance)

    def replace_table(self, name: str, value: Any) -> None:
        """Put another table, or number of steps, in the place of one."""
        setattr(self, name, value)
        self._on_device.clear()
        self._derive()
