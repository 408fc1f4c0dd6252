"""Forward processes x_t = alpha(t) x_0 + sigma(t) eps, and what a network's output means in them.

Times are the teacher's own: a diffusion schedule (`ddpm`) numbers its noise levels 0 ... n-1 and calls clean data -1; a flow
(`flow`) runs from 1, pure noise, to 0, clean data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from pyard.errors import InputError

Prediction = Literal["eps", "v_prediction", "velocity", "denoised"]
Spacing = Literal["linspace", "leading", "trailing"]


@dataclass(frozen=True)
class NoiseSchedule:
    """How noise and data are mixed at every time, and what the network predicts.

    Args:
        kind: `ddpm`, discrete noise levels from a list of betas, or `flow`, x_t = (1 - t) x_0 + t eps.
        prediction: what the network returns: `eps`; `denoised` x_0; `v_prediction`, alpha eps - sigma x_0 (Salimans & Ho 2022);
            `velocity`, dx/dt = eps - x_0 of a linear path.
        num_train_timesteps: noise levels of a `ddpm` schedule.
        beta_schedule: `linear`, `scaled_linear` (linear in sqrt(beta)) or `squaredcos_cap_v2` (cosine); diffusers' names.
        beta_start, beta_end: first and last beta of the linear schedules.
        trained_betas: the betas themselves; overrides the three above.
        rescale_betas_zero_snr: rescale so that the last level is pure noise (Lin et al. 2023, algorithm 1).
        shift: timestep shift of a `flow` (SD3, section 5.3.2): t -> shift t / (1 + (shift - 1) t); 1 leaves times as they are.
        spacing: which times a solver with fewer steps visits: `linspace` (first and last included: DiT's respacing), `leading`
            or `trailing` (diffusers' names).
    """

    kind: Literal["ddpm", "flow"] = "ddpm"
    prediction: Prediction = "eps"
    num_train_timesteps: int = 1000
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    shift: float = 1.0
    spacing: Spacing = "linspace"

    def __post_init__(self) -> None:
        if self.kind not in ("ddpm", "flow"):
            raise InputError(f"noise schedule: kind is {self.kind!r}; expected 'ddpm' or 'flow'")
        if self.prediction not in get_args(Prediction):
            raise InputError(f"noise schedule: prediction is {self.prediction!r}; expected one of {get_args(Prediction)}")
        if self.spacing not in get_args(Spacing):
            raise InputError(f"noise schedule: spacing is {self.spacing!r}; expected one of {get_args(Spacing)}")
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", tuple(float(b) for b in self.trained_betas))
            object.__setattr__(self, "num_train_timesteps", len(self.trained_betas))
        if self.num_train_timesteps < 1:
            raise InputError(f"noise schedule: num_train_timesteps is {self.num_train_timesteps}; expected at least 1")

    @property
    def noisiest_time(self) -> float:
        """The time of x_T, the noise that sampling starts from."""
        return float(self.num_train_timesteps - 1) if self.kind == "ddpm" else 1.0

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
        elif self.beta_schedule == "squaredcos_cap_v2":
            # Nichol & Dhariwal 2021, equation 17.
            f = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
            betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
        else:
            raise InputError(
                f"noise schedule: beta_schedule is {self.beta_schedule!r}; "
                "expected 'linear', 'scaled_linear' or 'squaredcos_cap_v2', or give trained_betas"
            )
        alphas_cumprod = np.cumprod(1 - betas)
        if self.rescale_betas_zero_snr:
            root = np.sqrt(alphas_cumprod)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root**2
        return alphas_cumprod

    def alpha(self, time: float) -> float:
        """Weight of the data in x_t."""
        if self.kind == "flow":
            return 1.0 - time
        return math.sqrt(self._alpha_cumprod(time))

    def sigma(self, time: float) -> float:
        """Weight of the noise in x_t."""
        if self.kind == "flow":
            return time
        return math.sqrt(1.0 - self._alpha_cumprod(time))

    def timesteps(self, num_steps: int) -> tuple[float, ...]:
        """The times that a solver of `num_steps` evaluations visits, decreasing, clean data last: `num_steps + 1` of them."""
        n = self.num_train_timesteps
        if num_steps < 1 or (self.kind == "ddpm" and num_steps > n):
            raise InputError(f"{num_steps} solver steps: expected 1 to {n} (the schedule's num_train_timesteps)")
        if self.kind == "flow":
            u = 1.0 - np.arange(num_steps + 1) / num_steps
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
                    f"noise schedule: at time {time:g} there is no data left (alpha = 0), so a network that predicts "
                    "eps says nothing there; zero-terminal-SNR schedules need prediction='v_prediction' or 'denoised'"
                )
            return 1 / alpha, -sigma / alpha, 0.0, 1.0
        if self.prediction == "v_prediction":
            return alpha, -sigma, sigma, alpha
        if self.prediction == "velocity":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma), 1 / (alpha + sigma), alpha / (alpha + sigma)
        return 0.0, 1.0, 1 / sigma, -alpha / sigma

    def jump_coefficients(self, time: float, next_time: float) -> tuple[float, float]:
        """(a, b) with x_next = a x_t + b F: one DDIM step (Song et al. 2021, eq. 12, eta = 0), Euler for a `flow`."""
        p, q, r, s = self.output_map(time)
        alpha, sigma = self.alpha(next_time), self.sigma(next_time)
        return alpha * p + sigma * r, alpha * q + sigma * s

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_json` turns back into an equal schedule."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> NoiseSchedule:
        """The schedule of a `to_json` dictionary; unknown keys are an InputError."""
        unknown = set(config) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise InputError(f"noise schedule: unknown settings {sorted(unknown)}")
        betas = config.get("trained_betas")
        return cls(**{**config, "trained_betas": None if betas is None else tuple(betas)})

    def _alpha_cumprod(self, time: float) -> float:
        if time == self.clean_time:
            return 1.0
        level = int(time)
        if level != time or not 0 <= level < self.num_train_timesteps:
            raise InputError(f"time {time:g}: a ddpm schedule knows -1 (clean data) and 0 ... {self.num_train_timesteps - 1}")
        return float(self.alphas_cumprod[level])
