"""A student as one ONNX file: `python -m pyard.export --onnx student.onnx --student RUN`.

The S passes are unrolled into one graph, noise and label in, sample out; the passes share the weights, which are stored
once. The file appears, checked and equal to PyTorch, or not at all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

import pyard
from pyard.errors import InputError
from pyard.models.history import ConcatenatingCache
from pyard.models.student import Student
from pyard.noise import standard_normal, uniform_labels
from pyard.ops import use_backend
from pyard.runtime import FORMAT_VERSION, METADATA_KEY, OnnxStudent

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

PARITY_BOUND = 1e-4  # of fp32, relative to the largest value of the sample
PARITY_BATCH_SIZES = (1, 3)
OPSETS = (20, 21, 22, 23)


def export(student: str | Path, onnx: Path | None = None, *, opset: int = 23) -> None:
    """Write a student as one ONNX file and check it against PyTorch.

    Example: python -m pyard.export --onnx student.onnx --student runs/digits

    Args:
        student: a run folder or a student's folder.
        onnx: the file to write; a bare --onnx, or none, writes student.onnx into the student's folder.
        opset: version of the ONNX operators, 20 to 23; with 23 an attention is one node (onnxruntime 1.23 or newer).
    """
    folder = Path(student)
    model = Student.from_pretrained(folder)
    if onnx is None:
        onnx = (folder / "student" if (folder / "student").is_dir() else folder) / "student.onnx"
    parity = export_onnx(model, onnx, opset=opset)
    errors = ", ".join(f"{error:.1e} at batch {size}" for size, error in parity.items())
    megabytes = onnx.stat().st_size / 1e6
    print(f"{onnx}: {megabytes:.1f} MB, {model.num_steps} steps in one graph; error against PyTorch {errors}")


def export_onnx(student: Student | str | Path, path: str | Path, *, opset: int = 23) -> dict[int, float]:
    """Write a student as one ONNX file of the form `sampler`: noise [B, C, H, W], label [B] -> sample [B, C, H, W].

    The batch size is free. Grid, classes, sizes, hashes and pyard's version travel inside the file;
    `pyard.runtime.OnnxStudent` reads them.

    Args:
        student: the student, or the path of its folder; it is left as it is.
        path: the file to write; it appears complete and checked, or not at all.
        opset: version of the ONNX operators, 20 to 23; with 23 an attention is one node (onnxruntime 1.23 or newer).

    Returns:
        The largest relative error against PyTorch at each batch size that was tried.

    Raises:
        InputError: an opset out of range, no student there, or a path that is a folder.
        RuntimeError: the exported graph is invalid, or deviates from PyTorch by more than 1e-4 of the largest value.
    """
    path = Path(path)
    if opset not in OPSETS:
        raise InputError(f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected the name of a file, such as {path / 'student.onnx'}")
    if not isinstance(student, Student):
        student = Student.from_pretrained(student)
    student = copy.deepcopy(student).to("cpu", torch.float32).eval()
    program = _trace(Sampler(student), opset)
    metadata = _metadata(student, opset)
    with _new_file(path) as building:
        _save(program, building, metadata)
        onnx.checker.check_model(str(building), full_check=True)
        parity = measure_parity(student, OnnxStudent(building, providers=["CPUExecutionProvider"]))
        for size, error in parity.items():
            if not error <= PARITY_BOUND:  # also true of NaN
                raise RuntimeError(
                    f"{path} was not written: at batch {size} onnxruntime differs from PyTorch by {error:.1e} of the "
                    f"largest value; expected at most {PARITY_BOUND:.0e}"
                )
        _save(program, building, {**metadata, "parity": {str(size): error for size, error in parity.items()}})
    return parity


class Sampler(nn.Module):
    """The S cached passes as one function that the exporter can trace.

    The time embeddings depend on the grid alone, so they are computed here, once, and looked up by step.
    """

    def __init__(self, student: Student):
        super().__init__()
        student = copy.deepcopy(student).requires_grad_(False)
        with use_backend("reference"):
            embedded = student.trunk.time_embed(student.embed_times)  # [S, D]
        student.embed_times = torch.arange(student.num_steps)
        student.trunk.time_embed = nn.Embedding.from_pretrained(embedded)  # type: ignore[assignment]
        for module in list(student.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    setattr(module, name, TransposedLinear(child))
        self.student = student

    def forward(self, noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:  # [B, C, H, W], [B] -> [B, C, H, W]
        *_, sample = self.student.rollout(noise, label, ConcatenatingCache())
        return sample


class TransposedLinear(nn.Module):
    """A linear layer that keeps its weight as ONNX's MatMul takes it.

    The exporter would otherwise transpose each weight in every pass, and store (or keep in memory) S copies.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.T.contiguous(), requires_grad=False)  # [in, out]
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [..., in] -> [..., out]
        return x @ self.weight + self.bias


def measure_parity(student: Student, exported: OnnxStudent) -> dict[int, float]:
    """The largest error of an exported student relative to the largest value of PyTorch's sample, by batch size."""
    parity = {}
    for size in PARITY_BATCH_SIZES:
        index = np.arange(size)
        labels = uniform_labels(1, index, student.num_classes)
        noise = standard_normal(1, index, student.sample_shape)
        with torch.inference_mode():
            *_, last = student.rollout(torch.from_numpy(noise), torch.from_numpy(labels))
        expected = last.numpy()
        error = np.abs(exported.sample(labels, noise=noise) - expected).max() / np.abs(expected).max()
        parity[size] = float(error)
    return parity


def _trace(sampler: Sampler, opset: int) -> ONNXProgram:
    # Two samples, not one: torch.export takes a size of 1 for a constant.
    noise = torch.zeros(2, *sampler.student.sample_shape)
    label = torch.zeros(2, dtype=torch.int64)
    batch = torch.export.Dim("batch")
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    try:
        registration.setLevel(logging.ERROR)  # it warns that torchvision is not installed
        with use_backend("reference"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            program = torch.onnx.export(
                sampler,
                (noise, label),
                input_names=["noise", "label"],
                output_names=["sample"],
                dynamic_shapes=({0: batch}, {0: batch}),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    finally:
        registration.setLevel(level)
    assert program is not None
    # The exporter notes the source lines of every node: paths of this machine, and more bytes than a small student has.
    ClearMetadataAndDocStringPass()(program.model)
    return program


def _metadata(student: Student, opset: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name, tensor in sorted(student.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return {
        "format_version": FORMAT_VERSION,
        "pyard_version": pyard.__version__,
        "form": "sampler",
        "precision": "fp32",
        "opset": opset,
        "num_steps": student.num_steps,
        "history_layers": student.config.history_layers,
        "num_classes": student.num_classes,
        "sample_shape": list(student.sample_shape),
        "config": student.config.to_json(),
        "weights_sha256": digest.hexdigest(),
        "parity": {},
    }


def _save(program: ONNXProgram, path: Path, metadata: dict[str, Any]) -> None:
    program.model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    program.model.producer_name, program.model.producer_version = "pyard", pyard.__version__
    program.save(str(path))


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path`, replacing what was there, if the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = path.parent / f".{path.name}.{os.getpid()}.new"
    try:
        yield building
        with building.open("rb") as handle:
            os.fsync(handle.fileno())
        building.replace(path)
    finally:
        building.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pyard.export` is `pyard export`."""
    from pyard.__main__ import COMMANDS, run

    return run("export", COMMANDS["export"], sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
