"""A student as an ONNX file, or a folder: `python -m pyard.export --onnx student.onnx --student RUN`.

For a DiT, `parts` traces the few different parts of a pass with torch's exporter, and `assembly` combines copies of them, with
the weights stored once. `traced` traces students of all other backbones as a whole. `files` makes the result appear only after
it was checked and found equal to PyTorch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from pyard.conditions import Condition
from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.export.assembly import Form, assemble
from pyard.export.condition_inputs import ConditionInputs, as_arrays
from pyard.export.decoder import Decoder, expected_pictures, load_decoder
from pyard.export.files import (
    LARGEST_SINGLE_FILE,
    check_target,
    config_path,
    config_text,
    data_files,
    describe,
    new_files,
    save_model,
    weight_bytes,
    write_metadata,
)
from pyard.export.half import halve
from pyard.export.quantise import quantise, typical_inputs
from pyard.export.traced import trace_student
from pyard.models.backbone import Backbone
from pyard.models.dit.network import Trunk
from pyard.models.student import Student
from pyard.models.wrapped.backbone import WrappedBackbone
from pyard.runtime import OnnxStudent
from pyard.runtime.checks import NotFiniteError
from pyard.storage.disk import require_room
from pyard.storage.typed import checked

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from pyard.models.backbone import Backbone

Precision = Literal["fp32", "fp16", "int8", "int8-static"]
Method = Literal["auto", "assembled", "traced"]
PARITY_BOUND = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.25, "int8-static": 0.25}  # of the largest value of the sample
PRECISIONS_OF_PIPELINES = ("fp32", "fp16", "int8")
PARITY_BATCH_SIZES = (1, 3)
RANGE_SAMPLES = 4  # that say which layers outgrow fp16
OPSETS = (20, 21, 22, 23)
FORMS = ("sampler", "step")
METHODS = get_args(Method)


@checked("export")
def export(
    student: str | Path,
    onnx: Path | None = None,
    *,
    form: Literal["sampler", "step", "both"] | None = None,
    opset: int = 23,
    precision: Precision = "fp32",
    calibration: int = 64,
    vae: Literal["own", "none"] | Path | None = "own",
    text_encoders: Literal["own", "none"] | Path = "own",
    external_data: bool | None = None,
    method: Method = "auto",
    parity_bound: float | None = None,
    network: str | None = None,
) -> None:
    """Write a student as one ONNX file (a text-to-image student as a folder of ONNX files), and check it against PyTorch.

    Example: python -m pyard.export --onnx student.onnx --student runs/digits

    Args:
        student: a run folder or a student's folder.
        onnx: the file to write; for a text-to-image student, the folder; a bare --onnx, or none, writes student.onnx, or onnx/,
            into the student's folder.
        form: `sampler`, all steps in one call; `step`, one step a call with keys and values in and out, for previews; `both`,
            in a folder; none: `sampler` for a file, `both` for a folder.
        opset: version of the ONNX operators, 20 to 23. An attention is one node: ONNX's own in 23 (onnxruntime 1.23 or
            newer, 1.24 for int8-static), onnxruntime's in earlier versions (1.21 or newer).
        precision: precision of weights and products: `fp32`; `fp16`, half the size, for GPUs; `int8`, a quarter if the student
            is large, ranges measured in every call; `int8-static`, ranges fixed by calibration.
        calibration: samples that `int8-static` is calibrated with.
        vae: the VAE whose decoder is appended, so that the samples become 8-bit pictures: the student's `own`, if it has one;
            the folder of another diffusers autoencoder; `none`: the file draws latents.
        text_encoders: for a text-to-image student: `own`, those of the pipeline that it was made from; the folder of another
            copy of it; `none`: the folder draws from embeddings alone.
        external_data: write the weights to a second file, FILE.HASH.data; none: only if one file cannot hold them (2 GB).
        method: `assembled`, for pyard's DiT; `traced`, for any network; `auto`, the first one where it fits.
        parity_bound: largest error against PyTorch, relative to the largest value of a sample, with which the file is written;
            none: 1e-4 for fp32, 0.02 for fp16, 0.25 for int8, and one level of 255 more for pictures.
        network: package.module:Class of the student's backbone, if it is not one of pyard's.
    """
    folder = Path(student)
    model = Student.from_pretrained(folder, network=network)
    place = folder / "student" if (folder / "student").is_dir() else folder
    if model.config.text is not None:
        from pyard.export.pipeline import export_folder, own_text_encoders  # which writes transformers with export_onnx

        chosen = {"calibration": calibration != 64, "external_data": external_data is not None, "method": method != "auto"}
        export_folder(
            model,
            place / "onnx" if onnx is None else onnx,
            unused=[name for name, given in chosen.items() if given],
            form=form or "both",
            opset=opset,
            precision=precision,
            vae=vae,
            text_encoders=own_text_encoders(folder) if str(text_encoders) == "own" else text_encoders,
            parity_bound=parity_bound,
        )
        return
    onnx = place / "student.onnx" if onnx is None else onnx
    if onnx.is_dir() or onnx.suffix != ".onnx":
        raise InputError(
            f"--onnx {onnx}: expected a file, such as {onnx / 'student.onnx'}; folders hold text-to-image students"
        )
    if form == "both" or str(text_encoders) != "own":
        flag = "--form both" if form == "both" else "--text_encoders"
        raise InputError(f"{flag} is for folders of text-to-image students; this student is conditioned on something else")
    settings: dict[str, Any] = dict(
        form=form or "sampler", opset=opset, precision=precision, calibration=calibration, vae=vae, method=method
    )
    settings["parity_bound"] = parity_bound
    parity = export_onnx(model, onnx, **settings, external_data=external_data)
    errors = ", ".join(f"{error:.1e} at batch {size}" for size, error in parity.items())
    files = [onnx, *data_files(onnx)]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    steps = f"one of {model.num_steps} steps a call" if form == "step" else f"{model.num_steps} steps in one graph"
    print(f"{' + '.join(map(str, files))}: {megabytes:.1f} MB, {steps}; error against PyTorch {errors}")


@checked("export")
def export_onnx(
    student: Student | str | Path,
    path: str | Path,
    *,
    form: Form = "sampler",
    opset: int = 23,
    precision: Precision = "fp32",
    calibration: int = 64,
    vae: str | Path | ModelMixin | None = "own",
    external_data: bool | None = None,
    method: Method = "auto",
    parity_bound: float | None = None,
    examples: Sequence[Condition] = (),
    network: type[Backbone] | str | None = None,
) -> dict[int, float]:
    """Write a student as one ONNX file.

    The form `sampler` maps noise [B, C, ...] and condition to a sample [B, C, ...]. The form `step` maps latent [B, C, ...],
    condition, step [] and past keys and values [B, H, K, Dh] to a prediction and present keys and values.

    Each tensor of the condition is an input: `label` int64 [B] for a class-conditional student, `tokens` [B, n, D] and `mask`
    bool [B, n] for one with an EmbeddingTable. The batch size and sizes such as n are not fixed. The file contains grid,
    classes, sizes, hashes and pyard's version; the student's `config.json` is written beside it as `student.onnx.json`.
    `pyard.runtime.OnnxStudent` reads both forms.

    Args:
        student: the student, which is not changed, or the path of its folder.
        path: the file to write; it appears complete and checked, or not at all.
        form: see above. The input `step` counts from 0; the present keys and values are the next step's past, and step 0 takes
            K = 0.
        opset: version of the ONNX operators, 20 to 23. An attention is one node: ONNX's own in 23 (onnxruntime 1.23 or
            newer, 1.24 for int8-static), onnxruntime's (com.microsoft) in earlier versions (1.21 or newer).
        precision: precision of weights and products: `fp32`; `fp16`; `int8`, which measures the activations' ranges in every
            call; `int8-static`, with ranges fixed by `calibration` samples. Latents, jumps and predictions are always float32.
        calibration: number of samples whose trajectories calibrate `int8-static`.
        vae: the VAE whose decoder is appended, so that samples are uint8 [B, height, width, 3]: `own`, the student's, if it has
            one; a diffusers autoencoder (`pyard.models.codec.LatentCodec`), or its folder; `none` or None: samples are latents.
        external_data: write weights to a second file, `<path>.<hash>.data`; None: only if one file cannot hold them (2 GB).
        method: `assembled` from parts that are traced once, for pyard's DiT: fast to export and to run; `traced` as a whole,
            for any backbone; `auto`: assembled if possible.
        parity_bound: largest relative error that is accepted; None: `PARITY_BOUND` of the precision, plus one grey level of 255
            for pictures.
        examples: for a student without a table of conditions, conditions of one row or more with which it is traced and
            checked; sizes that differ between them are not fixed.
        network: class of the student's backbone, if it is not one of pyard's, or "package.module:Class".

    Returns:
        The largest relative error against PyTorch at each batch size that was tried.

    Raises:
        InputError: an opset, form or method is unknown; there is no student; the path is a folder or a link; another program's
            file would be overwritten; or the backbone cannot be traced, with the reason.
        ExportError: the exported graph is invalid, deviates from PyTorch by more than the bound, or overflows
            in half precision.
    """
    path = Path(path)
    if opset not in OPSETS:
        raise InputError(f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    if form not in FORMS:
        raise InputError(f"form is {form!r}; expected {' or '.join(FORMS)}")
    if precision not in PARITY_BOUND:
        raise InputError(f"precision is {precision!r}; expected {', '.join(PARITY_BOUND)}")
    if method not in METHODS:
        raise InputError(f"method is {method!r}; expected {', '.join(METHODS)}")
    if calibration < 1:
        raise InputError(f"calibration is {calibration}; expected at least 1 sample")
    if parity_bound is not None and not parity_bound > 0:
        raise InputError(f"parity_bound is {parity_bound:g}; expected more than 0")
    check_target(path)
    if not isinstance(student, Student):
        student = Student.from_pretrained(student, network=network)
    student = copy.deepcopy(student).to("cpu", torch.float32).eval().requires_grad_(False)
    # Some layers of diffusers transformers exceed fp16's range. They stay in float32 if the graph is converted afterwards.
    narrowed = precision == "fp16" and isinstance(student.trunk, WrappedBackbone)
    if precision == "fp16" and not narrowed:
        check_half_range(student)
    decoder = load_decoder(vae, student)
    inputs = ConditionInputs(student, examples)
    dtype = torch.float16 if precision == "fp16" and not narrowed else torch.float32
    if method == "assembled" or (method == "auto" and isinstance(student.trunk, Trunk)):
        model = assemble(student, form, opset, dtype, decoder)
    else:
        model = trace_student(student, form, opset, inputs, dtype, decoder)
    external = weight_bytes(model) > LARGEST_SINGLE_FILE if external_data is None else external_data
    facts = describe(student, form=form, precision=precision, opset=opset, pictures=decoder is not None, parity={})
    facts["conditions"] = [item.to_json() for item in inputs.inputs]
    size = (2 if precision.startswith("int8") or narrowed else 1) * weight_bytes(
        model
    )  # quantisation reads a copy from the disk
    require_room(path.parent, size, f"export to {path.name}")
    with new_files(path, size) as building:
        if precision.startswith("int8") or narrowed:
            with TemporaryDirectory(dir=building.parent) as folder:
                source = Path(folder) / path.name
                save_model(model, source, external_data=external)
                write_metadata(source, facts)
                samples = calibration if precision == "int8-static" else None

                def draw(seed: int, index: NDArray[Any]) -> dict[str, NDArray[Any]]:
                    return as_arrays(inputs.draw(seed, index))

                if narrowed:
                    ranges = typical_inputs(OnnxStudent(source, providers=["CPUExecutionProvider"]), RANGE_SAMPLES, draw)
                    facts["kept_in_float32"] = halve(source, building, ranges, external_data=external)
                else:
                    quantise(source, building, calibration=samples, external_data=external, draw=draw)
        else:
            save_model(model, building, external_data=external)
        del model
        write_metadata(building, facts)
        try:
            onnx.checker.check_model(str(building), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            if dtype == torch.float16 and "float16" in str(error) and not isinstance(student.trunk, Trunk):
                raise InputError(
                    f"{type(student.trunk).__name__} mixes float32 with half precision ({' '.join(str(error).split())[:200]}): "
                    "use precision fp32, or convert to the weights' dtype in its forward"
                ) from None
            raise ExportError(f"{path} was not written: onnx.checker refuses the graph: {error}") from None
        parity = measure_parity(student, OnnxStudent(building, providers=["CPUExecutionProvider"]), inputs, decoder)
        # A picture's levels are integers, so the smallest difference may become a whole level of 255.
        usual = PARITY_BOUND[precision] + (0.0 if decoder is None else 1.01 / 255)
        check_parity(parity, parity_bound or usual, path, precision)
        write_metadata(building, {**facts, "parity": {str(size): error for size, error in parity.items()}})
        config_path(building).write_text(config_text(student), encoding="utf-8")
    return parity


class ExportError(InputError, RuntimeError):
    """The exported file would not draw what the student draws; it was not written."""


def measure_parity(
    student: Student, exported: OnnxStudent, inputs: ConditionInputs, decoder: Decoder | None = None
) -> dict[int, float]:
    """The largest error of an exported student by batch size, relative to PyTorch's largest value, or to 255 for pictures.

    All batch sizes and condition sizes differ from those with which the graph was traced.
    """
    parity = {}
    for size in PARITY_BATCH_SIZES:
        index = np.arange(size)
        condition = inputs.draw(1, index)
        noise = standard_normal(1, index, student.sample_shape)
        with torch.inference_mode():
            *_, last = student.rollout(torch.from_numpy(noise), condition)
        drawn = last.numpy() if decoder is None else expected_pictures(decoder.codec, last)
        expected = drawn.astype(np.float32)
        # For pictures 255, so that one level counts the same in dark pictures.
        largest = np.abs(expected).max() if decoder is None else 255
        try:
            found = exported.sample(condition=as_arrays(condition), noise=noise)
            parity[size] = float(np.abs(found - expected).max() / largest)
        except NotFiniteError:
            parity[size] = np.nan  # what it means depends on the precision: check_parity
    return parity


def check_parity(parity: dict[int, float], bound: float, path: Path, precision: str = "fp32") -> None:
    """Fail if the deviation is above the bound.

    Raises:
        ExportError: the deviation is too large; the message names the batch size, the deviation and the bound.
    """
    for size, error in parity.items():
        if not np.isfinite(error):
            overflow = "; an activation exceeds 65504, the largest number of fp16" if precision == "fp16" else ""
            other = "Use --precision fp32 or int8" if precision == "fp16" else "Check the student with `pyard sample`"
            raise ExportError(
                f"{path} was not written: at batch {size} onnxruntime's sample is not finite in {precision}{overflow}. {other}"
            )
        if not error <= bound:
            raise ExportError(
                f"{path} was not written: at batch {size} onnxruntime differs from PyTorch by {error:.4g} of the largest "
                f"value; expected at most {bound:.6g}. Use --precision fp32, or, if that error is acceptable, --parity-bound"
            )


def check_half_range(student: Student) -> None:
    """Raise an ExportError for weights that fp16 cannot represent."""
    limit = torch.finfo(torch.float16).max
    for name, weight in student.named_parameters():
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        if not largest <= limit:
            raise ExportError(
                f"{name} of the student reaches {largest:.4g}; fp16 holds at most {limit:g}. Use --precision fp32 or int8"
            )
