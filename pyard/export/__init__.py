"""A student as an ONNX file: `python -m pyard.export --onnx student.onnx --student RUN`.

`parts` traces the few different parts of a pass with torch's exporter, `assembly` puts copies of them together with the weights
stored once, `files` lets the result appear, checked and equal to PyTorch, or not at all.
"""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
import torch

from pyard.diffusion.noise import standard_normal, uniform_labels
from pyard.errors import InputError
from pyard.export.assembly import Form, assemble
from pyard.export.decoder import Decoder, load_decoder
from pyard.export.files import (
    LARGEST_SINGLE_FILE,
    check_target,
    config_text,
    describe,
    new_files,
    save_model,
    weight_bytes,
    write_metadata,
)
from pyard.export.quantise import quantise
from pyard.models.folder import CONFIG_NAME
from pyard.models.student import Student
from pyard.runtime import OnnxStudent

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from pyard.models.backbone import Backbone

Precision = Literal["fp32", "fp16", "int8", "int8-static"]
PARITY_BOUND = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.25, "int8-static": 0.25}  # of the largest value of the sample
PARITY_BATCH_SIZES = (1, 3)
OPSETS = (20, 21, 22, 23)
FORMS = ("sampler", "step")


def export(
    student: str | Path,
    onnx: Path | None = None,
    *,
    form: Form = "sampler",
    opset: int = 23,
    precision: Precision = "fp32",
    calibration: int = 64,
    vae: Path | None = None,
    external_data: bool | None = None,
    network: str | None = None,
) -> None:
    """Write a student as one ONNX file and check it against PyTorch.

    Example: python -m pyard.export --onnx student.onnx --student runs/digits

    Args:
        student: a run folder or a student's folder.
        onnx: the file to write; a bare --onnx, or none, writes student.onnx into the student's folder.
        form: `sampler`, all steps in one call; `step`, one step a call with keys and values in and out, for previews.
        opset: version of the ONNX operators, 20 to 23: an attention is one node, of ONNX itself in 23 (onnxruntime 1.23 or
            newer, 1.24 for int8-static), of onnxruntime's own before (1.21 or newer).
        precision: of weights and products: `fp32`; `fp16`, half the size, for GPUs; `int8`, a quarter if the student is large,
            ranges measured in every call; `int8-static`, ranges fixed by calibration.
        calibration: samples that `int8-static` is calibrated with.
        vae: folder of a diffusers AutoencoderKL, whose decoder is appended: the samples become 8-bit pictures.
        external_data: weights in a second file, FILE.data; none: where one file cannot hold them (2 GB).
        network: package.module:Class of the backbone of a student that is none of pyard's.
    """
    folder = Path(student)
    model = Student.from_pretrained(folder, network=network)
    if onnx is None:
        onnx = (folder / "student" if (folder / "student").is_dir() else folder) / "student.onnx"
    settings = dict(form=form, opset=opset, precision=precision, calibration=calibration, vae=vae)
    parity = export_onnx(model, onnx, **settings, external_data=external_data)  # type: ignore[arg-type]
    errors = ", ".join(f"{error:.1e} at batch {size}" for size, error in parity.items())
    files = [file for file in (onnx, onnx.with_name(f"{onnx.name}.data")) if file.exists()]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    steps = f"{model.num_steps} steps in one graph" if form == "sampler" else f"one of {model.num_steps} steps a call"
    print(f"{' + '.join(map(str, files))}: {megabytes:.1f} MB, {steps}; error against PyTorch {errors}")


def export_onnx(
    student: Student | str | Path,
    path: str | Path,
    *,
    form: Form = "sampler",
    opset: int = 23,
    precision: Precision = "fp32",
    calibration: int = 64,
    vae: str | Path | AutoencoderKL | None = None,
    external_data: bool | None = None,
    network: type[Backbone] | str | None = None,
) -> dict[int, float]:
    """Write a student as one ONNX file, of the form `sampler`, noise [B, C, H, W], label [B] -> sample [B, C, H, W], or `step`,
    latent [B, C, H, W], label [B], step [], past keys and values [B, H, K, Dh] -> prediction, present keys and values.

    The batch size is free. Grid, classes, sizes, hashes and pyard's version travel inside the file; a `config.json` like the
    student's lies beside it. `pyard.runtime.OnnxStudent` reads both forms.

    Args:
        student: the student, or the path of its folder; it is left as it is.
        path: the file to write; it appears complete and checked, or not at all.
        form: see above. `step` counts from 0, and its present keys and values are the next step's past; step 0 takes K = 0.
        opset: version of the ONNX operators, 20 to 23: an attention is one node, of ONNX itself in 23 (onnxruntime 1.23 or
            newer, 1.24 for int8-static), of onnxruntime's own (com.microsoft) before (1.21 or newer).
        precision: of weights and products: `fp32`; `fp16`; `int8`, with ranges of the activations measured in every call;
            `int8-static`, with ranges fixed by `calibration` samples. Latents, jumps and predictions are float32 in all.
        calibration: samples whose trajectories calibrate `int8-static`.
        vae: a diffusers AutoencoderKL, or its folder: its decoder is appended, and samples are uint8 [B, height, width, 3].
        external_data: weights in a second file, `<path>.data`; None: where one file cannot hold them (2 GB).
        network: class of the backbone of a folder's student that is none of pyard's, or "package.module:Class".

    Returns:
        The largest relative error against PyTorch at each batch size that was tried.

    Raises:
        InputError: an opset or form out of range, no student there, a path that is a folder, a foreign config.json beside it.
        RuntimeError: the exported graph is invalid, or deviates from PyTorch by more than the bound of its precision.
    """
    path = Path(path)
    if opset not in OPSETS:
        raise InputError(f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    if form not in FORMS:
        raise InputError(f"form is {form!r}; expected {' or '.join(FORMS)}")
    if precision not in PARITY_BOUND:
        raise InputError(f"precision is {precision!r}; expected {', '.join(PARITY_BOUND)}")
    if calibration < 1:
        raise InputError(f"calibration is {calibration}; expected at least 1 sample")
    check_target(path)
    if not isinstance(student, Student):
        student = Student.from_pretrained(student, network=network)
    student = copy.deepcopy(student).to("cpu", torch.float32).eval().requires_grad_(False)
    decoder = None if vae is None else load_decoder(vae, student.sample_shape)
    model = assemble(student, form, opset, torch.float16 if precision == "fp16" else torch.float32, decoder)
    external = weight_bytes(model) > LARGEST_SINGLE_FILE if external_data is None else external_data
    facts = describe(student, form=form, precision=precision, opset=opset, pictures=vae is not None, parity={})
    with new_files(path) as building:
        if precision.startswith("int8"):
            with TemporaryDirectory(dir=building.parent) as folder:
                source = Path(folder) / path.name
                save_model(model, source, external_data=external)
                write_metadata(source, facts)
                samples = calibration if precision == "int8-static" else None
                quantise(source, building, calibration=samples, external_data=external)
        else:
            save_model(model, building, external_data=external)
        del model
        write_metadata(building, facts)
        try:
            onnx.checker.check_model(str(building), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise RuntimeError(f"{path} was not written: onnx.checker refuses the graph: {error}") from None
        parity = measure_parity(student, OnnxStudent(building, providers=["CPUExecutionProvider"]), decoder)
        # A picture's levels are whole numbers, so the smallest difference may round to one of 255.
        check_parity(parity, PARITY_BOUND[precision] + (0.0 if decoder is None else 1.01 / 255), path)
        write_metadata(building, {**facts, "parity": {str(size): error for size, error in parity.items()}})
        building.with_name(CONFIG_NAME).write_text(config_text(student))
    return parity


def measure_parity(student: Student, exported: OnnxStudent, decoder: Decoder | None = None) -> dict[int, float]:
    """The largest error of an exported student relative to the largest value of PyTorch's sample, by batch size."""
    parity = {}
    for size in PARITY_BATCH_SIZES:
        index = np.arange(size)
        labels = uniform_labels(1, index, student.num_conditions)
        noise = standard_normal(1, index, student.sample_shape)
        with torch.inference_mode():
            *_, last = student.rollout(torch.from_numpy(noise), torch.from_numpy(labels))
            expected = (last if decoder is None else decoder(last)).float().numpy()
        error = np.abs(exported.sample(labels, noise=noise) - expected).max() / np.abs(expected).max()
        parity[size] = float(error)
    return parity


def check_parity(parity: dict[int, float], bound: float, path: Path) -> None:
    """Fail on a deviation above the bound.

    Raises:
        RuntimeError: naming the batch size, what was found and what was expected.
    """
    for size, error in parity.items():
        if not error <= bound:  # also true of NaN
            raise RuntimeError(
                f"{path} was not written: at batch {size} onnxruntime differs from PyTorch by {error:.1e} of the "
                f"largest value; expected at most {bound:.0e}"
            )
