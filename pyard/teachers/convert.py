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
        source: a teacher as `pyard train --teacher` takes it: a `.pt` or `.safetensors` of DiT, SiT or REPA, a diffusers
            folder, or a teacher's folder; for `transformer` and `lora`, the run or student folder of a text-to-image student.
        out: the folder to write, or for `dit` the `.pt` or `.safetensors`.
        to: `pyard`; `dit`, the names of DiT's own code (of SiT's for a flow); `diffusers`, a `DiTPipeline` folder. For a
            text-to-image student without a history: `transformer`, the folder of a diffusers transformer; `lora`, a file that
            the pipeline's `load_lora_weights` reads (an adapter folder of PEFT if it has none); the README.md in the folder
            has the code that uses it.
        family: family of a `.pt` or `.safetensors` file, if neither its name nor its contents tell.
        num_heads: attention heads of a `.pt` or `.safetensors` file, if its width is not that of a published model.
        num_classes: number of classes of a `.pt` or `.safetensors` file without a row for "no class".
        vae: folder of the diffusers autoencoder of a source that has none; it is copied into `out`.
        weights: which weights of a `.pt` or `.safetensors` file with several: `ema` or `model`; none: the averaged ones if
            there are any.
        network: package.module:Class of the teacher's backbone, if it is not one of pyard's.
        rank: for `lora`, approximate a student that was trained in full by the best LoRA of this rank; none: the LoRA must
            be exact.
        pipeline: for `transformer` and `lora`, the pipeline's folder; none: the teacher's, at its path during training.
    """
    if to in ("transformer", "lora"):
        from pyard.teachers.convert_student import convert_student

        of_teachers = {"family": family, "num_heads": num_heads, "num_classes": num_classes, "vae": vae, "weights": weights,
                       "network": network}  # fmt: skip
        if given := [name for name, value in of_teachers.items() if value is not None]:
            raise InputError(f"convert: {given[0]} is for teachers; --to {to} takes a student, which records it")
        if rank is not None and to != "lora":
            raise InputError("convert: rank is for --to lora")
        convert_student(source, out, to=to, rank=rank, pipeline=pipeline)
        return
    if given := [name for name, value in (("rank", rank), ("pipeline", pipeline)) if value is not None]:
        raise InputError(f"convert: {given[0]} is for --to lora and --to transformer")
    if to == "dit" and (out.exists() or out.is_symlink()):  # such as the checkpoint itself, with its optimiser
        raise InputError(f"convert: {out} is there and would be replaced; remove it, or choose another name")
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
