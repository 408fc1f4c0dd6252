"""Drawing samples: S cached passes, from noise that depends only on the seed and the sample's number."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from tqdm import tqdm

from pyard.conditions import ClassConditions, Condition
from pyard.diffusion.noise import check_labels, standard_normal
from pyard.errors import InputError
from pyard.models.hub import local_folder
from pyard.sampling.inference import (
    Rollout,
    batch_size_that_fits,
    compiled,
    graphed_rollout,
    is_out_of_memory,
    plain_rollout,
)
from pyard.sampling.prompts import condition_of_prompts, shape_of_pixels, texts_of
from pyard.storage.files import new_file
from pyard.storage.typed import checked

if TYPE_CHECKING:
    from pyard.models.backbone import Backbone
    from pyard.models.student import Student

Precision = Literal["float32", "bfloat16", "float16"]


@checked("sample")
@torch.inference_mode()
def sample(
    student: Student | str | Path,
    labels: Sequence[int | str] | np.ndarray | torch.Tensor | None = None,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    condition: Condition | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    return_trajectory: bool = False,
    latents: bool = False,
    dtype: Precision | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
    progress: bool = False,
    network: type[Backbone] | str | None = None,
    sample_shape: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    pipeline: str | Path | None = None,
) -> torch.Tensor:
    """Draw one sample for each condition: images if the student has a VAE, otherwise samples like those it was trained on.

    Whatever the batch size, sample i starts from `pyard.diffusion.noise.standard_normal(seed, [i], shape)`, as in
    `pyard.runtime.OnnxStudent.sample`.

    Args:
        student: the student, or the path of its folder.
        labels: class of each sample, 0 ... num_classes - 1, or its name if the student has class names; for other students,
            condition numbers (rows of its table).
        prompts: instead of labels, for a text-to-image student: texts, a file of texts (`.txt`, `.jsonl`), or one text.
        condition: instead of labels, the condition's tensors.
        seed: random seed of the noise; or one for each sample, which then starts from `standard_normal(seed[i], [0], shape)`.
        batch_size: number of samples drawn together; None: as many as fit. Batches that run out of memory are halved.
        return_trajectory: return all S predictions instead of the last.
        latents: return latents even if there is a VAE.
        dtype: dtype of weights and activations; None: the student's. Jumps are always computed in float32.
        compile: compile the steps with `torch.compile`, which pays off after some hundred samples.
        cuda_graph: replay the S passes as one CUDA graph.
        progress: show a progress bar.
        network: class of the student's backbone, if it is not one of pyard's, or "package.module:Class".
        sample_shape: [C, ...] of the samples of a student that was trained on several; None: the usual one.
        height: height of the pictures in pixels, in place of sample_shape.
        width: width of the pictures in pixels, in place of sample_shape.
        pipeline: folder of the diffusers pipeline whose text encoders a text-to-image student's prompts need; None: its
            teacher's, at its path during training.

    Returns:
        float32 on the CPU: [n, C, ...], or [n, S, C, ...] with `return_trajectory`. Images are about -1 to 1, not clipped.

    Raises:
        InputError: a label, name or seed is out of range or unknown; the student was not trained on the shape; or CUDA graphs
            are requested without CUDA.
    """
    if isinstance(student, str | Path):
        from pyard.models.student import Student

        source, student = student, Student.from_pretrained(student, network=network, base=pipeline)
        pipeline = pipeline or _own_pipeline(source)
    if sum(value is not None for value in (labels, prompts, condition)) != 1:
        raise InputError("sample: expected exactly one of labels, prompts and condition")
    if labels is not None:
        condition = student.require_conditions().take(condition_numbers(labels, student))
    if prompts is not None:
        condition = condition_of_prompts(student, texts_of(prompts), folder=pipeline)
    assert condition is not None
    if height is not None or width is not None:
        if sample_shape is not None:
            raise InputError("sample: expected sample_shape, or height and width; found both")
        sample_shape = shape_of_pixels(student, height, width)
    count = condition.batch_size
    shape = student.trained_shape(sample_shape)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1, or None for as many as fit")
    if isinstance(seed, Sequence) and len(seed) != count:
        raise InputError(f"{len(seed)} seeds for {count} samples; expected one seed, or one for each")
    if dtype is not None:
        student = copy.deepcopy(student).to(getattr(torch, dtype))
    if compile:
        student = compiled(student)
    codec = None if latents else student.codec
    device = student.embed_times.device
    size = min(batch_size or batch_size_that_fits(student, shape), max(count, 1))
    rollout = _rollout(student, size, cuda_graph, condition, shape)
    parts: list[torch.Tensor] = []
    start = 0
    with tqdm(total=count, desc="sampling", unit="sample", disable=not progress) as bar:
        while start < count or not parts:
            index = np.arange(start, min(start + size, count))
            try:
                noise = torch.from_numpy(_noise(seed, index, shape)).to(device)
                predictions = rollout(noise, condition.index(slice(start, start + len(index))).to(device))
                kept = torch.stack(predictions if return_trajectory else predictions[-1:], dim=1).float()
                if codec is not None:
                    kept = codec.decode(kept.flatten(0, 1)).unflatten(0, kept.shape[:2])
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                size = (size + 1) // 2
                rollout = _rollout(student, size, cuda_graph, condition, shape)
                continue
            parts.append(kept.cpu())
            start += len(index)
            bar.update(len(index))
    out = torch.cat(parts)
    return out if return_trajectory else out[:, 0]


def _own_pipeline(source: str | Path) -> str | None:
    """The folder itself if it is that of an `ARDPipeline` with text encoders of its own."""
    folder = local_folder(source)
    return str(folder) if (folder / "model_index.json").is_file() and (folder / "tokenizer").is_dir() else None


def condition_numbers(labels: Sequence[int | str] | np.ndarray | torch.Tensor, student: Student) -> np.ndarray:
    """The row numbers of labels in the student's table of conditions, int64 [n]; class names and their synonyms are looked up.

    Raises:
        InputError: a name is unknown, a number is out of range, or the student has no table of conditions.
    """
    if isinstance(labels, str):
        raise InputError(f"labels: found the string {labels!r}; expected a list, such as [{labels!r}]")
    table = student.require_conditions()
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "UO":
        labels = labels.tolist()
    if not isinstance(labels, Sequence) or not any(isinstance(label, str) for label in labels):
        return check_labels(labels, table.count)
    if not isinstance(table, ClassConditions):
        raise InputError(f"labels: found names, but this student has no classes; give numbers from 0 to {table.count - 1}")
    return check_labels(table.find(labels), table.count)


def _rollout(student: Student, size: int, cuda_graph: bool, condition: Condition, shape: tuple[int, ...]) -> Rollout:
    return graphed_rollout(student, size, condition, shape) if cuda_graph else plain_rollout(student)


def _noise(seed: int | Sequence[int], index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(seed, Sequence):
        rows = [standard_normal(seed[i], [0], shape) for i in index]
        return np.concatenate(rows) if rows else np.empty((0, *shape), np.float32)
    return standard_normal(seed, index, shape)


@checked("sample")
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
    network: str | None = None,
    sample_shape: list[int] | None = None,
    prompts: list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    pipeline: str | None = None,
) -> None:
    """Draw samples with a student and write them to a file.

    Example: pyard sample --student runs/digits --labels 3 1 4 --out digits.png

    Args:
        student: a run folder or a student's folder.
        out: `.npz` (array `samples` float32 [n, C, ...] and `labels` or `prompts`), or `.png` (a picture with one sample a
            tile; one, three or more channels, of which the first three are drawn; -1 is black, 1 is white).
        labels: class of each sample, by number or by name where the student knows names, or other condition numbers; none:
            each one once.
        seed: random seed of the noise; the same seed draws the same samples in ONNX Runtime.
        batch_size: samples that run together; none: as many as fit into memory.
        dtype: dtype of weights and activations; none: that of the student's folder, float32.
        compile: compile the steps with torch.compile.
        cuda_graph: replay the steps as one CUDA graph.
        network: package.module:Class of the student's backbone, if it is not one of pyard's.
        sample_shape: [C, ...] of the samples of a student that was trained on several; none: the usual one.
        prompts: for a text-to-image student, in place of labels: texts, or one file of them (`.txt`, `.jsonl`).
        height: height of the pictures in pixels, in place of sample_shape; none: the usual one.
        width: width of the pictures in pixels, in place of sample_shape; none: the usual one.
        pipeline: folder of the diffusers pipeline whose text encoders the prompts need; none: the teacher's, at its path
            during training.
    """
    from pyard.models.student import Student

    if out.suffix not in (".npz", ".png"):
        raise InputError(f"--out {out}: expected a name that ends in .npz or .png")
    model = Student.from_pretrained(student, network=network, base=pipeline)
    pipeline = pipeline or _own_pipeline(student)
    shape = model.sample_shape if model.codec is None else model.codec.image_shape(model.sample_shape)
    if out.suffix == ".png" and len(shape) != 3:
        raise InputError(f"--out {out}: samples of shape {shape} are not pictures; expected a name that ends in .npz")
    if prompts is not None and labels is not None:
        raise InputError("--labels and --prompts: expected one of the two")
    if prompts is None and labels is None and model.config.text is not None:
        raise InputError("--prompts is missing: expected texts, or a file of them")
    texts = None if prompts is None else texts_of(prompts[0] if len(prompts) == 1 else prompts)
    numbers = None
    if texts is None:
        numbers = condition_numbers(list(range(model.num_conditions)) if labels is None else labels, model)
    if torch.cuda.is_available():
        model.to("cuda")
    samples = sample(
        model,
        numbers,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        compile=compile,
        cuda_graph=cuda_graph,
        progress=True,
        sample_shape=sample_shape,
        prompts=texts,
        height=height,
        width=width,
        pipeline=pipeline,
    ).numpy()
    if out.suffix == ".npz":
        with new_file(out, samples.nbytes) as partial, partial.open("wb") as file:
            np.savez(file, samples=samples, **({"prompts": texts} if numbers is None else {"labels": numbers}))
    else:
        from pyard.data.pictures import save_tiles

        save_tiles(samples, out)
    print(f"{len(samples)} samples of shape {samples.shape[1:]} in {out}")
