"""Drawing samples: S cached passes, from noise that depends on a seed and the sample's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from pyard.errors import InputError
from pyard.noise import check_labels, standard_normal

if TYPE_CHECKING:
    from pyard.models.student import Student


@torch.inference_mode()
def sample(
    student: Student | str | Path,
    labels: Sequence[int] | np.ndarray | torch.Tensor,
    *,
    seed: int = 0,
    batch_size: int = 256,
    return_trajectory: bool = False,
    progress: bool = False,
) -> torch.Tensor:
    """Draw one sample for each label.

    Sample i starts from `pyard.noise.standard_normal(seed, [i], shape)` whatever the batch size, and
    `pyard.runtime.OnnxStudent.sample` starts from the same.

    Args:
        student: the student, or the path of its folder.
        labels: class of each sample, 0 ... num_classes - 1.
        seed: of the noise.
        batch_size: samples that run together; bounds memory.
        return_trajectory: return all S predictions instead of the last.
        progress: show a progress bar.

    Returns:
        float32 on the CPU: [n, C, H, W], or [n, S, C, H, W] with `return_trajectory`.

    Raises:
        InputError: a label out of range.
    """
    if isinstance(student, str | Path):
        from pyard.models.student import Student

        student = Student.from_pretrained(student)
    classes = check_labels(labels, student.num_classes)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    device = student.embed_times.device
    shape = student.sample_shape
    out = torch.empty((len(classes), student.num_steps if return_trajectory else 1, *shape))
    for start in tqdm(range(0, len(classes), batch_size), "sampling", unit="batch", disable=not progress):
        index = np.arange(start, min(start + batch_size, len(classes)))
        noise = torch.from_numpy(standard_normal(seed, index, shape)).to(device)
        predictions = list(student.rollout(noise, torch.from_numpy(classes[index]).to(device)))
        kept = predictions if return_trajectory else predictions[-1:]
        out[start : start + len(index)] = torch.stack(kept, dim=1)
    return out if return_trajectory else out[:, 0]


def sample_to_file(
    student: Path,
    out: Path,
    labels: list[int] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> None:
    """Draw samples with a student and write them to a file.

    Example: pyard sample --student runs/digits --labels '[3, 1, 4]' --out digits.png

    Args:
        student: a run folder or a student's folder.
        out: `.npz` (array `samples` float32 [n, C, H, W] and `labels`), or `.png` (a picture with one sample a tile; one, three
            or more channels, of which the first three are drawn; -1 is black, 1 is white).
        labels: class of each sample; none: every class once.
        seed: of the noise; the same seed draws the same samples in ONNX Runtime.
        batch_size: samples that run together.
    """
    from pyard.models.student import Student

    if out.suffix not in (".npz", ".png"):
        raise InputError(f"--out {out}: expected a name that ends in .npz or .png")
    model = Student.from_pretrained(student)
    classes = list(range(model.num_classes)) if labels is None else labels
    samples = sample(model, classes, seed=seed, batch_size=batch_size, progress=True).numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(out, samples=samples, labels=np.asarray(classes))
    else:
        from pyard.pictures import save_tiles

        save_tiles(samples, out)
    print(f"{len(classes)} samples of shape {model.sample_shape} in {out}")
