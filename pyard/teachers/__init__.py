"""Who can teach: anything that predicts, knows its noise schedule and can be told from another by its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pyard.errors import InputError
from pyard.storage.typed import checked
from pyard.teachers.protocol import Teacher

if TYPE_CHECKING:
    from pyard.diffusion.noise_schedule import NoiseSchedule
    from pyard.models.backbone import Backbone
    from pyard.models.dit.checkpoint_file import Weights
    from pyard.teachers.network_teacher import NetworkTeacher

__all__ = ["Family", "Teacher", "load_teacher"]

# Which code a checkpoint with DiT's tensor names belongs to; REPA-E's are `repa`, too.
Family = Literal["dit", "sit", "repa", "lightningdit"]


@checked("load_teacher")
def load_teacher(
    source: str | Path,
    *,
    family: Family | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    schedule: NoiseSchedule | None = None,
    vae: str | Path | None = None,
    network: type[Backbone] | str | None = None,
    weights: Weights | None = None,
) -> NetworkTeacher:
    """Load a teacher.

    Args:
        source: `digits`, the built-in teacher of scikit-learn's handwritten digits (trained on first use, then cached); a
            folder that pyard wrote; a diffusers folder (`DiTPipeline`, or a `DiTTransformer2DModel` with its scheduler); the
            `.pt` or `.safetensors` of DiT, SiT, REPA or REPA-E.
        family: for a `.pt` or `.safetensors` that does not say it: `dit`, `sit` or `repa` (REPA-E as well).
        num_heads: for a `.pt` or `.safetensors` of another width than the published models: attention heads.
        num_classes: for a `.pt` or `.safetensors` whose label table has no row for "no class" and whose settings do not say so.
        schedule: overrides the noise schedule that the source comes with; needed where it comes with none.
        vae: folder of the diffusers autoencoder (`pyard.models.codec.LatentCodec`) of a teacher in latent space that comes
            without one, as `.pt` files do.
        network: class of the backbone of a teacher's folder that is none of pyard's, or its "package.module:Class".
        weights: of a `.pt` or `.safetensors` with several: `ema` or `model`; None: the averaged ones where there are any.

    Returns:
        The teacher, ready for `generate_trajectories` and `train`.

    Raises:
        InputError: nothing there that pyard knows how to read, or that it would not reproduce.
    """
    teacher = _load(source, family, num_heads, num_classes, schedule, network, weights)
    if vae is not None:
        from pyard.models.codec import LatentCodec

        teacher.codec = LatentCodec(vae)
        try:
            teacher.codec.check(teacher.sample_shape)
        except InputError as error:
            raise InputError(f"teacher: the VAE {vae} does not fit: {error}") from None
        if teacher.latent_statistics is not None:
            teacher.codec = LatentCodec(teacher.latent_statistics.on(teacher.codec.vae))
    return teacher


def _load(
    source: str | Path,
    family: Family | None,
    num_heads: int | None,
    num_classes: int | None,
    schedule: NoiseSchedule | None,
    network: type[Backbone] | str | None,
    weights: Weights | None,
) -> NetworkTeacher:
    from pyard.teachers.network_teacher import NetworkTeacher

    path = Path(source)
    if str(source) == "digits":
        from pyard.teachers.digits import digits_teacher

        return digits_teacher()
    if not path.exists():
        raise InputError(f"teacher {str(source)!r}: neither a built-in teacher ('digits') nor an existing file or folder")
    if path.is_file():
        from pyard.teachers.dit_checkpoint import load_checkpoint

        return load_checkpoint(
            path, family=family, num_heads=num_heads, num_classes=num_classes, schedule=schedule, weights=weights
        )
    for name, given in (("family", family), ("num_heads", num_heads), ("num_classes", num_classes), ("weights", weights)):
        if given is not None:
            raise InputError(f"teacher {path}: {name} is for .pt and .safetensors files; a folder says it itself")
    from pyard.teachers.diffusers_folder import is_diffusers_folder, load_diffusers
    from pyard.teachers.mixture_teacher import MixtureTeacher, is_mixture_folder

    if is_diffusers_folder(path):
        return load_diffusers(path, schedule=schedule)
    if is_mixture_folder(path):
        if schedule is not None:
            raise InputError(f"teacher {path}: its network was fitted to its own noise schedule; leave schedule out")
        return MixtureTeacher.from_pretrained(path)
    teacher = NetworkTeacher.from_pretrained(path, network=network)
    return teacher if schedule is None else teacher.with_schedule(schedule)
