"""`pyard convert`: a checkpoint of one kind as one of another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pyard.errors import InputError
from pyard.models.dit.checkpoint_file import Weights
from pyard.storage.typed import checked
from pyard.teachers import Family, load_teacher


@checked("convert")
def convert(
    source: str,
    out: Path,
    *,
    to: Literal["pyard", "dit", "diffusers", "transformer", "lora"] = "pyard",
    family: Family | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    vae: Path | None = None,
    weights: Weights | None = None,
    network: str | None = None,
    rank: int | None = None,
    pipeline: Path | None = None,
) -> None:
    """Turn a checkpoint into a teacher's folder that needs no more flags, or write a model for other programs.

    Example: pyard convert 0100000.pt --family dit --num_heads 6 --out teachers/mine

    Example: pyard convert runs/sd35-4 --to lora --out sd35-4-lora

    Args:
        source: what `pyard train --teacher` takes: a `.pt` or `.safetensors` of DiT, SiT or REPA, a diffusers folder,
            a teacher's; for `transformer` and `lora` a run's or student's folder of a text-to-image student.
        out: the folder to write, or for `dit` the `.pt` or `.safetensors`.
        to: `pyard`; `dit`, the names of DiT's own code (of SiT's for a flow); `diffusers`, a `DiTPipeline` folder. Of a
            text-to-image student without a history: `transformer`, the folder of a diffusers transformer; `lora`, a file that
            the pipeline's `load_lora_weights` reads (an adapter folder of PEFT where it has none); a README.md in it has the
            lines of Python that use it.
        family: of a `.pt` or `.safetensors` whose name does not say it.
        num_heads: attention heads of a `.pt` or `.safetensors` of another width than the published models.
        num_classes: of a `.pt` or `.safetensors` without a row for "no class".
        vae: folder of the diffusers autoencoder that belongs to the source, where it comes without; it goes along.
        weights: of a `.pt` or `.safetensors` with several: `ema` or `model`; none: the averaged ones where there are any.
        network: package.module:Class of the backbone of a teacher's folder that is none of pyard's.
        rank: for `lora`, of a student that was trained in full: the best LoRA of this rank; none: the LoRA must be exact.
        pipeline: for `transformer` and `lora`, the pipeline's folder; none: the teacher's, where it was in training.
    """
    if to in ("transformer", "lora"):
        from pyard.teachers.convert_student import convert_student

        of_teachers = {"family": family, "num_heads": num_heads, "num_classes": num_classes, "vae": vae, "weights": weights,
                       "network": network}  # fmt: skip
        if given := [name for name, value in of_teachers.items() if value is not None]:
            raise InputError(f"convert: {given[0]} is for teachers; --to {to} takes a student, which says it itself")
        if rank is not None and to != "lora":
            raise InputError("convert: rank is for --to lora")
        convert_student(source, out, to=to, rank=rank, pipeline=pipeline)
        return
    if given := [name for name, value in (("rank", rank), ("pipeline", pipeline)) if value is not None]:
        raise InputError(f"convert: {given[0]} is for --to lora and --to transformer")
    teacher = load_teacher(
        source, family=family, num_heads=num_heads, num_classes=num_classes, vae=vae, weights=weights, network=network
    )
    if to == "pyard":
        teacher.save_pretrained(out)
    elif to == "diffusers":
        from pyard.teachers.diffusers_folder import save_diffusers

        save_diffusers(teacher, out)
    elif to == "dit":
        from pyard.teachers.dit_checkpoint import save_checkpoint

        save_checkpoint(teacher, out)
    else:
        raise InputError(f"to is {to!r}; expected pyard, dit, diffusers, transformer or lora")
    trunk, sizes = teacher.network.trunk, teacher.network.config
    print(
        f"{out}: {sizes.depth} layers of width {trunk.hidden_size}, {sizes.num_heads} heads, {trunk.tokens_per_step()} tokens, "
        f"samples of {teacher.sample_shape}, {teacher.conditions.count} {'classes' if trunk.num_classes else 'conditions'}, "
        f"predicts {teacher.schedule.prediction}"
    )
