"""A network as a teacher: its noise schedule, conditions, fingerprint, and their folder on disk."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyard.conditions import ClassConditions, Condition, Conditions, as_condition, load_conditions, save_conditions
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.errors import InputError
from pyard.models.backbone import Backbone, Denoiser
from pyard.models.codec import Codec, LatentCodec
from pyard.models.families import backbone_class
from pyard.models.fingerprint import fingerprint_of
from pyard.models.folder import load_folder, require_sizes, save_folder
from pyard.models.wrapped.config import WrappedConfig
from pyard.storage.reading import reading
from pyard.storage.units import format_count
from pyard.teachers.latent_statistics import LatentStatistics

# What folders of version 0.1 called it.
KINDS = ("NetworkTeacher", "DiTTeacher")


class NetworkTeacher:
    """A diffusion transformer that teaches (implements `pyard.teachers.Teacher`).

    Args:
        network: a `DiT`, or another backbone with its head (`docs/own-teacher.md`); put into evaluation mode.
        schedule: its forward process and what it predicts.
        codec: the VAE of a latent-space model; students carry it along.
        class_names: of the classes, in order; students carry them along.
        conditions: what it can be asked for; None: the classes of its network.
        latent_statistics: of the VAE's latents, where the checkpoint brings them: a VAE that is given later is told them.

    Raises:
        InputError: a network without classes and no conditions.
    """

    def __init__(
        self,
        network: Denoiser,
        schedule: NoiseSchedule,
        *,
        codec: Codec | None = None,
        class_names: Sequence[str] | None = None,
        conditions: Conditions | None = None,
        latent_statistics: LatentStatistics | None = None,
    ):
        self.network = network.eval().requires_grad_(False)
        self.schedule = schedule
        self.codec = codec
        self.latent_statistics = latent_statistics
        self.class_names = None if class_names is None else tuple(class_names)
        self.sample_shape: tuple[int, ...] = tuple(network.config.sample_shape)
        trunk = network.trunk
        if conditions is None:
            if trunk.num_classes is None:
                raise InputError(
                    f"teacher: {type(trunk).__name__} has no classes, so it needs a table of conditions: NetworkTeacher(…, "
                    "conditions=…) in Python, conditions/ in a teacher's folder"
                )
            conditions = ClassConditions(trunk.num_classes, self.class_names, has_null=trunk.has_null_class)
        self.conditions = conditions

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional teacher; None: it is conditioned on something else."""
        return self.network.trunk.num_classes

    def __repr__(self) -> str:
        trunk = self.network.trunk
        parameters = format_count(sum(parameter.numel() for parameter in self.network.parameters()))
        asked = "prompts" if isinstance(trunk.config, WrappedConfig) else "conditions"
        asked = asked if self.num_classes is None else f"{self.num_classes} classes"
        return (
            f"{type(self).__name__}({trunk.family()}, {parameters} parameters, samples of shape {self.sample_shape}, {asked})"
        )

    def check_sample(self, sample_shape: tuple[int, ...]) -> None:
        """Raises InputError if the network takes no samples of this shape."""
        self.network.trunk.check_sample(sample_shape)

    def predict(self, x: torch.Tensor, time: float, condition: Condition | torch.Tensor) -> torch.Tensor:
        """The network's output for one time; predicted variances are dropped. Labels will do for a condition."""
        condition = as_condition(condition)
        trunk = self.network.trunk
        if trunk.num_classes is not None and not trunk.has_null_class and bool((condition["label"] >= trunk.num_classes).any()):
            raise InputError("this teacher was trained without label dropout, so it cannot be guided; use cfg_scale=1")
        times = torch.full((len(x),), time, device=x.device)
        output: torch.Tensor = self.network(x, times, condition)
        return output[:, : x.shape[1]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of configuration, schedule, weights and, but for classes, the table of conditions."""
        settings: object = self.network.config.to_json()
        if self.conditions.fingerprint:
            settings = [settings, self.conditions.fingerprint]
        return fingerprint_of(self.network, self.schedule, settings)

    def to(self, device: torch.device | str) -> NetworkTeacher:
        """Move the network; returns itself."""
        self.network.to(device)
        return self

    def with_schedule(self, schedule: NoiseSchedule) -> NetworkTeacher:
        """The same network under another noise schedule."""
        return NetworkTeacher(
            self.network,
            schedule,
            codec=self.codec,
            class_names=self.class_names,
            conditions=self.conditions,
            latent_statistics=self.latent_statistics,
        )

    def save_pretrained(self, path: str | Path) -> None:
        """Write the teacher's folder: `config.json`, `model.safetensors`, and what it has of `vae/` and `conditions/`."""
        config = {
            "family": self.network.trunk.family(),
            "network": self.network.config.to_json(),
            "schedule": self.schedule.to_json(),
            "class_names": self.class_names,
        }
        if self.latent_statistics is not None:
            config["latent_statistics"] = self.latent_statistics._asdict()

        def beside(folder: Path) -> None:
            if self.codec is not None:
                self.codec.save(folder)
            save_conditions(self.conditions, folder)

        save_folder(Path(path), config, self.network.state_dict(), kind=KINDS[0], beside=beside, former_kinds=KINDS[1:])

    @classmethod
    def from_pretrained(cls, path: str | Path, *, network: type[Backbone] | str | None = None) -> NetworkTeacher:
        """Read a folder that `save_pretrained` wrote.

        Args:
            path: the folder.
            network: class of a backbone that is none of pyard's, or "package.module:Class" to import it from.

        Raises:
            InputError: no teacher there, or files that do not fit each other.
        """
        path = Path(path)
        config, tensors = load_folder(path, kind=KINDS)
        built = build_denoiser(path, config, tensors, network)
        return cls(
            built,
            NoiseSchedule.from_json(config["schedule"]),
            codec=LatentCodec.beside(path),
            class_names=class_names_in(config, path),
            conditions=load_conditions(path),
            latent_statistics=LatentStatistics.from_json(config.get("latent_statistics"), path),
        )


def build_denoiser(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], network: type[Backbone] | str | None
) -> Denoiser:
    """The network of a teacher's folder with its weights; memory is taken for what is there, not for what is asked for.

    Raises:
        InputError: a configuration of no teacher, or one that does not fit the tensors.
    """
    if not isinstance(config.get("schedule"), dict) or not isinstance(config.get("network"), dict):
        raise InputError(f"{path}: config.json has no network or no schedule; it is not a teacher written by pyard")
    backbone = backbone_class(str(config.get("family", "dit")), network, path)
    with reading(path, "config.json and weights do not match", RuntimeError):
        sizes = backbone.config_class(**config["network"])
        require_sizes(path, sizes.depth, tensors)
        with backbone.without_weights():
            built = Denoiser(backbone(sizes))  # type: ignore[call-arg]
        built.load_state_dict(dict(tensors), assign=True)
    return built


def class_names_in(config: Mapping[str, Any], path: Path) -> list[str] | None:
    """The names of classes in a teacher's configuration, if it has any."""
    names = config.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(
            f"{path}: class_names in config.json are a {type(names).__name__}; expected a list of strings, or null"
        )
    return names
