"""A DiT as a teacher: network, noise schedule, fingerprint, and their folder on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.codec import LatentCodec
from pyard.models.dit.network import DiT, DiTConfig
from pyard.models.fingerprint import fingerprint_of
from pyard.models.folder import load_folder, save_folder


class DiTTeacher:
    """A diffusion transformer that teaches (implements `pyard.teachers.Teacher`).

    Args:
        network: a `DiT`, or a transformer of your own with its parts (`docs/own-teacher.md`); put into evaluation mode.
        schedule: its forward process and what it predicts.
        codec: the VAE of a latent-space model; students carry it along.
        class_names: of the classes, in order; students carry them along.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        *,
        codec: LatentCodec | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.network: Any = network.eval().requires_grad_(False)
        self.schedule = schedule
        self.codec = codec
        self.class_names = None if class_names is None else tuple(class_names)
        sizes: Any = network.config
        self.sample_shape: tuple[int, int, int] = sizes.sample_shape
        self.num_classes: int = sizes.num_classes

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def predict(self, x: torch.Tensor, time: float, labels: torch.Tensor) -> torch.Tensor:
        """The network's output for one time; predicted variances are dropped. Shapes as in `Teacher.predict`."""
        if not self.network.config.has_null_label and bool((labels == self.num_classes).any()):
            raise InputError("this teacher was trained without label dropout, so it cannot be guided; use cfg_scale=1")
        times = torch.full((len(x),), time, device=x.device)
        return self.network(x, times, labels)[:, : self.sample_shape[0]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of configuration, schedule and weights."""
        return fingerprint_of(self.network, self.schedule, self.network.config.to_json())

    def to(self, device: torch.device | str) -> DiTTeacher:
        """Move the network; returns itself."""
        self.network.to(device)
        return self

    def save_pretrained(self, path: str | Path) -> None:
        """Write the teacher's folder (`config.json`, `model.safetensors`, and `vae/` if it has one)."""
        config = {
            "network": self.network.config.to_json(),
            "schedule": self.schedule.to_json(),
            "class_names": self.class_names,
        }
        save_folder(Path(path), config, self.network.state_dict(), kind="DiTTeacher", codec=self.codec)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, network: Callable[[DiTConfig], nn.Module] = DiT) -> DiTTeacher:
        """Read a folder that `save_pretrained` wrote.

        Args:
            path: the folder.
            network: makes a network that is not pyard's own DiT.

        Raises:
            InputError: no teacher there, or files that do not fit each other.
        """
        config, tensors = load_folder(Path(path), kind="DiTTeacher")
        try:
            built = network(DiTConfig(**config["network"]))
            built.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{path}: config.json and weights do not fit each other: {error}") from None
        schedule = NoiseSchedule.from_json(config["schedule"])
        return cls(built, schedule, codec=LatentCodec.beside(Path(path)), class_names=config.get("class_names"))
