"""The analytic teacher: it predicts with a Gaussian mixture's closed form; its network, fitted to that, is for students."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from pyard.conditions import Condition, as_condition
from pyard.data.mixture import GaussianMixture
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.backbone import Backbone, Denoiser
from pyard.models.dit.config import DiTConfig
from pyard.models.fingerprint import fingerprint_of
from pyard.models.folder import load_config, load_folder, save_folder
from pyard.storage.reading import reading
from pyard.teachers.network_teacher import NetworkTeacher, build_denoiser
from pyard.teachers.teaching import TeachBatch, TeachConfig, new_network, taught_once, teaching_device, train_network

_ARRAYS = ("means", "weights", "variances", "factors")


class MixtureTeacher(NetworkTeacher):
    """A Gaussian mixture that teaches (implements `pyard.teachers.Teacher`).

    Args:
        mixture: what `predict` is computed from, in float64.
        network: a DiT of the mixture's shape and classes; students start with its weights, `predict` never runs it.
        schedule: the forward process and what is predicted.
    """

    def __init__(self, mixture: GaussianMixture, network: Denoiser, schedule: NoiseSchedule | None = None):
        super().__init__(network, schedule or NoiseSchedule())
        found, expected = (self.sample_shape, self.conditions.count), (mixture.sample_shape, mixture.num_classes)
        if found != expected:
            raise InputError(f"mixture of samples and classes {expected}, network of {found}; expected the same")
        self.mixture = mixture

    def predict(self, x: torch.Tensor, time: float, condition: Condition | torch.Tensor) -> torch.Tensor:
        """The exact output for one time, in the dtype of x. Shapes as in `Teacher.predict`."""
        denoised = self.mixture.denoised(
            x, self.schedule.alpha(time), self.schedule.sigma(time), as_condition(condition)["label"]
        )
        p, q, _, _ = self.schedule.output_map(time)  # denoised = p x + q F
        return ((denoised - p * x.double()) / q).to(x.dtype)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of mixture, network and schedule."""
        network = fingerprint_of(self.network, self.schedule, self.network.config.to_json())
        return hashlib.sha256(f"{self.mixture.fingerprint} {network}".encode()).hexdigest()

    def save_pretrained(self, path: str | Path) -> None:
        """Write the teacher's folder (`config.json`, and `model.safetensors` with the mixture's arrays in float64)."""
        config = {
            "family": self.network.trunk.family(),
            "network": self.network.config.to_json(),
            "schedule": self.schedule.to_json(),
            "sample_shape": self.sample_shape,
        }
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"mixture.{name}": torch.from_numpy(getattr(self.mixture, name)) for name in _ARRAYS}
        save_folder(Path(path), config, tensors, kind="MixtureTeacher")

    @classmethod
    def from_pretrained(cls, path: str | Path, *, network: type[Backbone] | str | None = None) -> MixtureTeacher:
        """Read a folder that `save_pretrained` wrote; arguments and errors as `NetworkTeacher.from_pretrained`."""
        config, tensors = load_folder(Path(path), kind="MixtureTeacher")
        path, prefix = Path(path), "network."
        of_network = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        built = build_denoiser(path, config, of_network, network)
        with reading(path, "config.json and weights do not match", RuntimeError):
            arrays = {name: tensors[f"mixture.{name}"].numpy() for name in _ARRAYS}
            mixture = GaussianMixture(sample_shape=config["sample_shape"], **arrays)
        return cls(mixture, built, NoiseSchedule.from_json(config["schedule"]))


def is_mixture_folder(path: Path) -> bool:
    """True for a folder that `MixtureTeacher.save_pretrained` wrote."""
    try:
        load_config(path, kind="MixtureTeacher")
    except InputError:
        return False
    return True


@dataclass(frozen=True)
class FitConfig(TeachConfig):
    """Settings of `fit`, and the fingerprint of the mixture."""

    patch_size: int
    mixture: str


def fit(
    mixture: GaussianMixture,
    out: str | Path,
    *,
    patch_size: int,
    max_steps: int = 3000,
    hidden_size: int = 64,
    depth: int = 4,
    num_heads: int = 4,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    label_dropout: float = 0.1,
    ema_decay: float = 0.998,
    seed: int = 0,
    save_every: int = 500,
    progress: bool = True,
) -> MixtureTeacher:
    """Fit a network to a mixture's exact eps under the linear schedule of 1000 noise levels (Ho et al. 2020).

    The target is E[eps | x_t, class] itself, not the noise that was drawn: the same optimum without the targets' variance. A
    run that was stopped resumes from its last checkpoint; a finished one is loaded.

    Args:
        mixture: what to fit.
        out: the teacher's folder.
        patch_size: P of the network.
        max_steps, hidden_size, depth, num_heads, batch_size, learning_rate, label_dropout, ema_decay, seed, save_every,
            progress: as in `pyard.teachers.digits.teach`.

    Returns:
        The teacher; its network has the averaged weights.

    Raises:
        InputError: a setting out of range, or `out` holds a teacher of another mixture or other settings.
    """
    config = FitConfig(
        max_steps=max_steps,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        batch_size=batch_size,
        learning_rate=learning_rate,
        label_dropout=label_dropout,
        ema_decay=ema_decay,
        seed=seed,
        patch_size=patch_size,
        mixture=mixture.fingerprint,
    )
    return taught_once(
        out, config, lambda working: _fit(mixture, config, working, save_every, progress), MixtureTeacher.from_pretrained
    )


def _fit(mixture: GaussianMixture, config: FitConfig, working: Path, save_every: int, progress: bool) -> MixtureTeacher:
    channels, height, width = mixture.sample_shape
    if height != width:
        raise InputError(f"fit: samples of {height} x {width}; a DiT's are square")
    schedule = NoiseSchedule()
    device = teaching_device()
    alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod)
    sizes = DiTConfig(
        input_size=height,
        in_channels=channels,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=mixture.num_classes,
    )
    batch, normals = config.batch_size, mixture.means.shape[2] + min(mixture.factors.shape[2:])

    def draw(random: torch.Generator) -> TeachBatch:
        labels = torch.randint(mixture.num_classes, (batch,), generator=random)
        uniform = torch.rand(batch, generator=random, dtype=torch.float64)
        clean = mixture.transform(labels, uniform, torch.randn(batch, normals, generator=random, dtype=torch.float64))
        level = torch.randint(schedule.num_train_timesteps, (batch,), generator=random)
        seen = labels.masked_fill(torch.rand(batch, generator=random) < config.label_dropout, mixture.num_classes)
        alpha, sigma = alphas_cumprod[level].sqrt().to(device), (1 - alphas_cumprod[level]).sqrt().to(device)
        weights = alpha[:, None, None, None], sigma[:, None, None, None]
        noisy = weights[0] * clean.to(device) + weights[1] * torch.randn(clean.shape, generator=random).to(device)
        denoised = mixture.denoised(noisy, alpha, sigma, seen.to(device))
        eps = (noisy - weights[0] * denoised) / weights[1]
        return TeachBatch(noisy.float(), level.float(), seen, eps.float())

    network = new_network(sizes, config.seed).to(device)
    return MixtureTeacher(
        mixture, train_network(network, draw, config, working, save_every=save_every, progress=progress), schedule
    )
