"""Forward processes x_t = alpha(t) x_0 + sigma(t) eps, and what a network's output means in them.

Times are in the teacher's own units. In a diffusion schedule (`ddpm`), noise levels are numbered 0 ... n-1, clean data is -1,
and a fraction is a noise level between two others; a flow (`flow`) runs from 1, pure noise, to 0, clean data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from pyard.errors import InputError
from pyard.storage.numbers import number, whole_number

Prediction = Literal["eps", "v_prediction", "velocity", "denoised", "score"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
FlowPath = Literal["linear", "gvp", "vp"]
Spacing = Literal["linspace", "leading", "trailing"]

# More noise levels than anyone trains with; a damaged configuration asks for memory otherwise.
MOST_TIMESTEPS = 10**6


@dataclass(frozen=True)
class NoiseSchedule:
    """How noise and data are mixed at every time, and what the network predicts.

    Args:
        kind: `ddpm` (discrete noise levels from a list of betas) or `flow` (continuous times along a `path`).
        prediction: what the network returns: `eps`; `denoised` x_0; `v_prediction`, alpha eps - sigma x_0 (Salimans & Ho 2022);
            `velocity`, dx/dt = alpha' x_0 + sigma' eps, on a linear path eps - x_0; `score`, -eps / sigma.
        num_train_timesteps: number of noise levels of a `ddpm` schedule.
        beta_schedule: in diffusers' terms, `linear`, `scaled_linear` (linear in sqrt(beta)) or `squaredcos_cap_v2` (cosine).
        beta_start, beta_end: first and last beta of the linear schedules.
        trained_betas: the betas themselves; overrides the arguments from beta_schedule on.
        rescale_betas_zero_snr: rescale so that the last level is pure noise (Lin et al. 2023, algorithm 1).
        shift: timestep shift of a `flow` (SD3, section 5.3.2): t -> shift t / (1 + (shift - 1) t); 1 means no shift.
        path: (alpha, sigma) of a `flow` at time t, from 0 (data) to 1 (noise); SiT (Ma et al. 2024, section 2.3) counts time
            the other way. `linear`: (1 - t, t); `gvp`: (cos, sin) of pi t / 2; `vp`: the variance-preserving diffusion with
            betas from 0.1 to 20, which ends near pure noise, but not at it.
        start: time of a `flow` at which x_T, pure noise, is placed: 1, or slightly less if the network is not defined at 1.
        spacing: the times that a solver with fewer steps visits: `linspace` (including the first and last, as in DiT's
            respacing), or diffusers' `leading` or `trailing`.
    """

    kind: Literal["ddpm", "flow"] = "ddpm"
    prediction: Prediction = "eps"
    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "linear"
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    shift: float = 1.0
    spacing: Spacing = "linspace"
    path: FlowPath = "linear"
    start: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("ddpm", "flow"):
            raise InputError(f"noise schedule: kind is {self.kind!r}; expected 'ddpm' or 'flow'")
        if self.prediction not in get_args(Prediction):
            raise InputError(f"noise schedule: prediction is {self.prediction!r}; expected one of {get_args(Prediction)}")
        if self.spacing not in get_args(Spacing):
            raise InputError(f"noise schedule: spacing is {self.spacing!r}; expected one of {get_args(Spacing)}")
        if self.beta_schedule not in get_args(BetaSchedule):
            raise InputError(
                f"noise schedule: beta_schedule is {self.beta_schedule!r}; expected one of {get_args(BetaSchedule)}, or give "
                "trained_betas"
            )
        if self.path not in get_args(FlowPath):
            raise InputError(f"noise schedule: path is {self.path!r}; expected one of {get_args(FlowPath)}")
        if self.trained_betas is not None:
            betas = tuple(number("noise schedule: a beta of trained_betas", beta, 0, 1) for beta in self.trained_betas)
            if not betas:
                raise InputError("noise schedule: trained_betas is empty; expected a beta for each noise level")
            object.__setattr__(self, "trained_betas", betas)
            object.__setattr__(self, "num_train_timesteps", len(betas))
        count = whole_number("noise schedule: num_train_timesteps", self.num_train_timesteps, 1, MOST_TIMESTEPS)
        object.__setattr__(self, "num_train_timesteps", count)
        for name, low, high in (("beta_start", 0, 1), ("beta_end", 0, 1), ("shift", 1e-6, 1e6), ("start", 1e-6, 1)):
            # Plain floats, whatever kind of number came: a schedule is written as JSON, and that decides fingerprints.
            object.__setattr__(self, name, number(f"noise schedule: {name}", getattr(self, name), low, high))
        if self.kind == "ddpm" and (self.path, self.start) != ("linear", 1.0):
            raise InputError("noise schedule: path and start belong to a 'flow'; this is a 'ddpm'")
        if self.path != "linear" and self.shift != 1.0:
            raise InputError(f"noise schedule: shift is {self.shift}; path {self.path!r} has no shift, so expected 1")

    @property
    def noisiest_time(self) -> float:
        """The time of x_T, the pure noise from which sampling starts."""
        return float(self.num_train_timesteps - 1) if self.kind == "ddpm" else self.start

    @property
    def clean_time(self) -> float:
        """The time of x_0: -1 for `ddpm` (one before its first noise level), 0 for `flow`."""
        return -1.0 if self.kind == "ddpm" else 0.0

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """alpha(t)^2 of a `ddpm` schedule for t = 0 ... n-1: float64 [n]."""
        n = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, dtype=np.float64)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, n)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, n) ** 2
        else:
            # Nichol & Dhariwal 2021, equation 17.
            f = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
        alphas_cumprod = np.cumprod(1 - betas)
        if self.rescale_betas_zero_snr:
            root = np.sqrt(alphas_cumprod)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root**2
        return alphas_cumprod

    @functools.cached_property
    def log_noise_ratios(self) -> np.ndarray:
        """log(sigma(t) / alpha(t)) of a `ddpm` schedule for t = 0 ... n-1, to be interpolated linearly: float64 [n].

        The sigmas of Karras et al. (2022, equation 5) and others lie between noise levels. If the last level is pure noise,
        where the ratio is infinite, its alpha^2 is taken to be 2^-24, as in diffusers' schedulers, or less if the level before
        it has less.
        """
        alphas_cumprod = self.alphas_cumprod.copy()
        if alphas_cumprod[-1] == 0:
            alphas_cumprod[-1] = min(2.0**-24, *alphas_cumprod[-2:-1] / 4)
        ratios: np.ndarray = 0.5 * (np.log1p(-alphas_cumprod) - np.log(alphas_cumprod))
        return ratios

    def alpha(self, time: float) -> float:
        """Weight of the data in x_t."""
        if self.kind == "ddpm":
            return math.sqrt(self._alpha_cumprod(time))
        if self.path == "linear":
            return 1.0 - time
        return math.cos(math.pi / 2 * time) if self.path == "gvp" else math.exp(_vp_log_alpha(time))

    def sigma(self, time: float) -> float:
        """Weight of the noise in x_t."""
        if self.kind == "ddpm":
            return math.sqrt(1.0 - self._alpha_cumprod(time))
        if self.path == "linear":
            return time
        return math.sin(math.pi / 2 * time) if self.path == "gvp" else math.sqrt(-math.expm1(2 * _vp_log_alpha(time)))

    def timesteps(self, num_steps: int) -> tuple[float, ...]:
        """The times that a solver of `num_steps` evaluations visits, decreasing, clean data last: `num_steps + 1` of them."""
        n = self.num_train_timesteps
        num_steps = whole_number("solver steps", num_steps, -MOST_TIMESTEPS, MOST_TIMESTEPS)
        if num_steps < 1 or (self.kind == "ddpm" and num_steps > n):
            raise InputError(f"{num_steps} solver steps: expected 1 to {n} (the schedule's num_train_timesteps)")
        if self.kind == "flow":
            u = 1.0 - np.arange(num_steps + 1) / num_steps
            if self.start != 1.0:
                u = u * (self.start / (self.shift - (self.shift - 1) * self.start))  # the shift of u[0] is `start`
            return tuple(float(t) for t in self.shift * u / (1 + (self.shift - 1) * u))
        if self.spacing == "linspace":
            levels = np.round(np.linspace(n - 1, 0, num_steps))
        elif self.spacing == "leading":
            levels = np.arange(num_steps, dtype=np.float64)[::-1] * (n // num_steps)
        else:
            levels = np.round(n - np.arange(num_steps) * (n / num_steps)) - 1
        return (*(float(t) for t in levels), self.clean_time)

    def output_map(self, time: float) -> tuple[float, float, float, float]:
        """(p, q, r, s) with denoised = p x_t + q F and eps = r x_t + s F for a network output F at `time`."""
        alpha, sigma = self.alpha(time), self.sigma(time)
        if self.prediction == "eps":
            if alpha == 0.0:
                raise InputError(
                    f"noise schedule: at time {time:g} there is no data left (alpha = 0), so a predicted eps "
                    "carries no information; zero-terminal-SNR schedules need prediction='v_prediction' or 'denoised', and "
                    "flows need a start below 1"
                )
            return 1 / alpha, -sigma / alpha, 0.0, 1.0
        if self.prediction == "score":
            if alpha == 0.0:
                raise InputError(
                    f"noise schedule: at time {time:g} there is no data left (alpha = 0), so a score carries no information; "
                    "give a flow a start below 1"
                )
            return 1 / alpha, sigma**2 / alpha, 0.0, -sigma
        if self.prediction == "v_prediction":
            return alpha, -sigma, sigma, alpha
        if self.prediction == "velocity" and self.path == "gvp":
            # alpha' = -pi/2 sigma, sigma' = pi/2 alpha
            return alpha, -sigma * 2 / math.pi, sigma, alpha * 2 / math.pi
        if self.prediction == "velocity" and self.path == "vp":
            slope = _vp_log_alpha_slope(time)  # alpha' = slope alpha, sigma' = -slope alpha^2 / sigma
            return alpha, sigma**2 / (slope * alpha), sigma, -sigma / slope
        if self.prediction == "velocity":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma), 1 / (alpha + sigma), alpha / (alpha + sigma)
        return 0.0, 1.0, 1 / sigma, -alpha / sigma

    def jump_coefficients(self, time: float, next_time: float) -> tuple[float, float]:
        """(a, b) with x_next = a x_t + b F: a DDIM step (Song et al. 2021, eq. 12, eta = 0); on a linear path Euler's."""
        p, q, r, s = self.output_map(time)
        alpha, sigma = self.alpha(next_time), self.sigma(next_time)
        return alpha * p + sigma * r, alpha * q + sigma * s

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` turns back into an equal schedule."""
        config = dataclasses.asdict(self)
        # Left out where they are as they were before there were any: fingerprints and stores of then stay valid.
        return {key: value for key, value in config.items() if (key, value) not in (("path", "linear"), ("start", 1.0))}

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> NoiseSchedule:
        """The schedule of a `to_json` dictionary; unknown keys are an InputError."""
        if not isinstance(config, dict):
            raise InputError(f"noise schedule: found {config!r}; expected a dictionary of its settings")
        unknown = set(config) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise InputError(f"noise schedule: unknown settings {sorted(unknown)}")
        betas = config.get("trained_betas")
        if betas is not None and not isinstance(betas, list | tuple):
            raise InputError(f"noise schedule: trained_betas is {betas!r}; expected a list of numbers")
        return cls(**{**config, "trained_betas": None if betas is None else tuple(betas)})

    def _alpha_cumprod(self, time: float) -> float:
        if time == self.clean_time:
            return 1.0
        if not 0 <= time <= self.num_train_timesteps - 1:
            raise InputError(
                f"time {time:g}: a ddpm schedule has times -1 (clean data) and 0 to {self.num_train_timesteps - 1}"
            )
        level = int(time)
        if level == time:
            return float(self.alphas_cumprod[level])
        low, high = self.log_noise_ratios[level : level + 2]
        return float(1 / (1 + np.exp(2 * (low + (time - level) * (high - low)))))


# SiT's variance-preserving path: d log alpha / dt = -beta(t) / 2, beta linear from 0.1 to 20 (Song et al. 2021, equation 32).
_VP_BETA_MIN, _VP_BETA_MAX = 0.1, 20.0


def _vp_log_alpha(time: float) -> float:
    return -0.25 * time**2 * (_VP_BETA_MAX - _VP_BETA_MIN) - 0.5 * time * _VP_BETA_MIN


def _vp_log_alpha_slope(time: float) -> float:
    return -0.5 * time * (_VP_BETA_MAX - _VP_BETA_MIN) - 0.5 * _VP_BETA_MIN
