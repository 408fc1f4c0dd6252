"""Teachers: anything that predicts, has a noise schedule, and is identified by a fingerprint."""

from __future__ import annotations

import re
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
    from pyard.teachers.text_to_image.teacher import WeightsDType

__all__ = ["Family", "Teacher", "load_teacher"]

# The pipeline folder of the built-in text-to-image teacher, which `pyard.teachers.scenes_text.teach` makes.
SCENES_TEXT = Path(__file__).parent / "data" / "scenes-text"
_BUILT_IN = ("digits", "scenes-text")

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
    dtype: WeightsDType | None = None,
    variant: str | None = None,
    transformer: str | Path | None = None,
    lora: str | Path | None = None,
    max_sequence_length: int | None = None,
) -> NetworkTeacher:
    """Load a teacher.

    Args:
        source: `digits`, the built-in teacher of scikit-learn's handwritten digits (trained on first use, then cached);
            `scenes-text`, the built-in text-to-image teacher of captioned scenes, whose weights come with pyard; a
            folder that pyard wrote; a diffusers folder (`DiTPipeline`, or a `DiTTransformer2DModel` with its scheduler; a
            text-to-image pipeline of `pyard.teachers.text_to_image.PIPELINES`); the `.pt` or `.safetensors` of DiT, SiT, REPA,
            REPA-E or LightningDiT.
        family: code that a `.pt` or `.safetensors` comes from, if the file does not say so: `dit`, `sit`, `repa` (also for
            REPA-E) or `lightningdit`.
        num_heads: attention heads, for a `.pt` or `.safetensors` whose width is none of the published models'.
        num_classes: number of classes, for a `.pt` or `.safetensors` whose label table has no row for "no class" and whose
            settings do not say so.
        schedule: overrides the source's noise schedule; required if the source has none.
        vae: folder of a diffusers autoencoder (`pyard.models.codec.LatentCodec`), for a teacher in latent space whose source
            has none, such as a `.pt` file.
        network: class of the teacher's backbone, if it is not one of pyard's, or its "package.module:Class".
        weights: which weights to read from a `.pt` or `.safetensors` that has several: `ema` or `model`; None: the averaged
            ones (`ema`) if there are any.
        dtype: dtype of a text-to-image pipeline's weights: `float32` (None), `bfloat16` or `float16`. The weights of other
            teachers are float32.
        variant: variant of a text-to-image pipeline's weights, such as `fp16`.
        transformer: a fine-tuned transformer to use instead of the text-to-image pipeline's own: a folder or a single file.
        lora: a LoRA to add to a text-to-image pipeline's transformer.
        max_sequence_length: largest number of text tokens of a text-to-image pipeline; None: the pipeline's own limit.

    Returns:
        The teacher, ready for `generate_trajectories` and `train`.

    Raises:
        InputError: there is nothing that pyard can read, or nothing that it would reproduce exactly.
    """
    of_pipeline = {"variant": variant, "transformer": transformer, "lora": lora, "max_sequence_length": max_sequence_length}
    pipeline = pipeline_folder(source)
    if pipeline is not None:
        from pyard.data.captioned_scenes.tokenizer import MAX_TOKENS
        from pyard.teachers.text_to_image.teacher import load_pipeline

        if pipeline == SCENES_TEXT and max_sequence_length is None:
            max_sequence_length = MAX_TOKENS  # no caption is longer, and the pipeline's 300 are padding
        others = {"family": family, "num_heads": num_heads, "num_classes": num_classes, "schedule": schedule,
                  "network": network, "weights": weights}  # fmt: skip
        if given := [name for name, value in others.items() if value is not None]:
            raise InputError(f"teacher {source}: {given[0]} is not for a text-to-image pipeline, whose folder determines it")
        paths = {name: None if value is None else Path(value) for name, value in
                 (("transformer", transformer), ("lora", lora), ("vae", vae))}  # fmt: skip
        return load_pipeline(
            pipeline, dtype=dtype or "float32", variant=variant, max_sequence_length=max_sequence_length, **paths
        )
    if given := [name for name, value in of_pipeline.items() if value is not None]:
        raise InputError(f"teacher {source}: {given[0]} is for text-to-image pipelines of diffusers; this teacher is not one")
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


def is_text_to_image(source: str | Path) -> bool:
    """Whether `source` is the name or folder of a text-to-image pipeline."""
    return pipeline_folder(source) is not None


def pipeline_folder(source: str | Path) -> Path | None:
    """The folder of the text-to-image pipeline that `source` names; None if it names another kind of teacher."""
    from pyard.teachers.text_to_image.teacher import is_pipeline_folder

    path = SCENES_TEXT if str(source) == "scenes-text" else Path(source)
    return path if is_pipeline_folder(path) else None


def require_teacher(source: str | Path) -> None:
    """Raises InputError if `source` names no built-in teacher and no file or folder."""
    if str(source) not in _BUILT_IN and not Path(source).exists():
        download = f"; if it is a name on the Hugging Face hub, run: hf download {source} --local-dir FOLDER"
        is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) is not None
        raise InputError(
            f"teacher {str(source)!r}: neither a built-in teacher ({', '.join(_BUILT_IN)}) nor an existing file or folder"
            + (download if is_hub_name else "")
        )


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
    require_teacher(source)
    if path.is_file():
        from pyard.teachers.dit_checkpoint import load_checkpoint

        return load_checkpoint(
            path, family=family, num_heads=num_heads, num_classes=num_classes, schedule=schedule, weights=weights
        )
    for name, given in (("family", family), ("num_heads", num_heads), ("num_classes", num_classes), ("weights", weights)):
        if given is not None:
            raise InputError(f"teacher {path}: {name} is for .pt and .safetensors files; a folder has its own value")
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
