"""Drawing samples: S cached passes, from noise that depends on a seed and the sample's number alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from tqdm import tqdm

from pyard.diffusion.noise import check_labels, standard_normal
from pyard.errors import InputError
from pyard.sampling.inference import (
    Rollout,
    batch_size_that_fits,
    compiled,
    graphed_rollout,
    is_out_of_memory,
    plain_rollout,
)

if TYPE_CHECKING:
    from pyard.models.student import Student

Precision = Literal["float32", "bfloat16", "float16"]


@torch.inference_mode()
def sample(
    student: Student | str | Path,
    labels: Sequence[int | str] | np.ndarray | torch.Tensor,
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    return_trajectory: bool = False,
    latents: bool = False,
    dtype: Precision | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
    progress: bool = False,
) -> torch.Tensor:
    """Draw one sample for each label: images if the student has a VAE, else what it was trained on.

    Sample i starts from `pyard.diffusion.noise.standard_normal(seed, [i], shape)` whatever the batch size, and
    `pyard.runtime.OnnxStudent.sample` starts from the same.

    Args:
        student: the student, or the path of its folder.
        labels: class of each sample, 0 ... num_classes - 1, or its name where the student knows names.
        seed: of the noise; or one for each sample, which then starts from `standard_normal(seed[i], [0], shape)`.
        batch_size: samples that run together; None: as many as fit. Batches that run out of memory are halved.
        return_trajectory: return all S predictions instead of the last.
        latents: return latents although there is a VAE.
        dtype: of weights and activations; None: those of the student. Jumps are computed in float32 all the same.
        compile: compile the steps with `torch.compile`; pays off after some hundred samples.
        cuda_graph: replay the S passes as one CUDA graph.
        progress: show a progress bar.

    Returns:
        float32 on the CPU: [n, C, H, W], or [n, S, C, H, W] with `return_trajectory`. Images are about -1 to 1, not clipped.

    Raises:
        InputError: a label, a name or a seed that does not fit; CUDA graphs without CUDA.
    """
    if isinstance(student, str | Path):
        from pyard.models.student import Student

        student = Student.from_pretrained(student)
    classes = class_indices(labels, student)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1, or None for as many as fit")
    if isinstance(seed, Sequence) and len(seed) != len(classes):
        raise InputError(f"{len(seed)} seeds for {len(classes)} labels; expected one seed, or one for each label")
    if dtype is not None:
        student = copy.deepcopy(student).to(getattr(torch, dtype))
    if compile:
        student = compiled(student)
    codec = None if latents else student.codec
    device = student.embed_times.device
    size = min(batch_size or batch_size_that_fits(student), max(len(classes), 1))
    rollout = _rollout(student, size, cuda_graph)
    parts: list[torch.Tensor] = []
    start = 0
    with tqdm(total=len(classes), desc="sampling", unit="sample", disable=not progress) as bar:
        while start < len(classes) or not parts:
            index = np.arange(start, min(start + size, len(classes)))
            try:
                noise = torch.from_numpy(_noise(seed, index, student.sample_shape)).to(device)
                predictions = rollout(noise, torch.from_numpy(classes[index]).to(device))
                kept = torch.stack(predictions if return_trajectory else predictions[-1:], dim=1).float()
                if codec is not None:
                    kept = codec.decode(kept.flatten(0, 1)).unflatten(0, kept.shape[:2])
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                size = (size + 1) // 2
                rollout = _rollout(student, size, cuda_graph)
                continue
            parts.append(kept.cpu())
            start += len(index)
            bar.update(len(index))
    out = torch.cat(parts)
    return out if return_trajectory else out[:, 0]


def class_indices(labels: Sequence[int | str] | np.ndarray | torch.Tensor, student: Student) -> np.ndarray:
    """Labels as class numbers, int64 [n]: names are looked up in the student's `class_names`, synonyms included.

    Raises:
        InputError: an unknown name, or a number out of range.
    """
    if isinstance(labels, str):
        raise InputError(f"labels: found the text {labels!r}; expected a list, such as [{labels!r}]")
    if not isinstance(labels, Sequence) or not any(isinstance(label, str) for label in labels):
        return check_labels(labels, student.num_classes)
    names = student.config.class_names
    if names is None:
        raise InputError("this student knows no class names; give numbers from 0 to " + str(student.num_classes - 1))
    numbers = {synonym.strip().lower(): i for i, name in enumerate(names) for synonym in (name, *name.split(","))}
    found = []
    for label in labels:
        if isinstance(label, str) and label.strip().lower() not in numbers:
            near = [name for name in names if label.strip().lower() in name.lower()]
            hint = f"; near: {', '.join(near[:5])}" if near else ""
            raise InputError(f"no class is named {label!r}{hint}")
        found.append(numbers[label.strip().lower()] if isinstance(label, str) else label)
    return check_labels(found, student.num_classes)


def _rollout(student: Student, size: int, cuda_graph: bool) -> Rollout:
    return graphed_rollout(student, size) if cuda_graph else plain_rollout(student)


def _noise(seed: int | Sequence[int], index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(seed, Sequence):
        rows = [standard_normal(seed[i], [0], shape) for i in index]
        return np.concatenate(rows) if rows else np.empty((0, *shape), np.float32)
    return standard_normal(seed, index, shape)


def sample_to_file(
    student: Path,
    out: Path,
    labels: list[int | str] | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: Precision | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
) -> None:
    """Draw samples with a student and write them to a file.

    Example: pyard sample --student runs/digits --labels '[3, 1, 4]' --out digits.png

    Args:
        student: a run folder or a student's folder.
        out: `.npz` (array `samples` float32 [n, C, H, W] and `labels`), or `.png` (a picture with one sample a tile; one, three
            or more channels, of which the first three are drawn; -1 is black, 1 is white).
        labels: class of each sample, by number or by name where the student knows names; none: every class once.
        seed: of the noise; the same seed draws the same samples in ONNX Runtime.
        batch_size: samples that run together; none: as many as fit into memory.
        dtype: of weights and activations; none: those of the student's folder, float32.
        compile: compile the steps with torch.compile.
        cuda_graph: replay the steps as one CUDA graph.
    """
    from pyard.models.student import Student

    if out.suffix not in (".npz", ".png"):
        raise InputError(f"--out {out}: expected a name that ends in .npz or .png")
    model = Student.from_pretrained(student)
    classes = class_indices(list(range(model.num_classes)) if labels is None else labels, model)
    if torch.cuda.is_available():
        model.to("cuda")
    samples = sample(
        model, classes, seed=seed, batch_size=batch_size, dtype=dtype, compile=compile, cuda_graph=cuda_graph, progress=True
    ).numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(out, samples=samples, labels=classes)
    else:
        from pyard.data.pictures import save_tiles

        save_tiles(samples, out)
    print(f"{len(classes)} samples of shape {samples.shape[1:]} in {out}")
