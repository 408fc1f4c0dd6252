"""A text-to-image student as a folder of ONNX graphs, one for each component, in the layout of diffusers' ONNX pipelines.

config.json  transformer/  vae_decoder/  text_encoder*/  tokenizer*/
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from pyard.conditions import Condition
from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.export import OPSETS, PARITY_BOUND, PRECISIONS_OF_PIPELINES, ExportError, export_onnx
from pyard.export.assembly import Form
from pyard.export.condition_inputs import ConditionInputs
from pyard.export.decoder import Decoder, decoder_model, load_decoder
from pyard.export.files import LARGEST_SINGLE_FILE, config_path, kept_in_float32, save_model, weight_bytes
from pyard.export.half import halve
from pyard.export.pipeline_parity import PARITY_PROMPTS, check_pipeline, measure_pipeline, random_conditions
from pyard.export.quantise import quantise_weights
from pyard.export.shared_weights import SharedWeights
from pyard.export.text_encoders import TextEncoders
from pyard.models.folder import require_replaceable
from pyard.models.student import Student
from pyard.runtime import OnnxPipeline
from pyard.runtime.pipeline_folder import CLASS_NAME, CONFIG_NAME, FORMAT_VERSION, PictureSize
from pyard.runtime.prompts import PromptEncoder
from pyard.sampling.prompts import encode_prompts, text_encoder_of
from pyard.storage.folders import new_folder
from pyard.version import __version__

Forms = Literal["sampler", "step", "both"]

_OWNED = (
    *("config.json", "transformer", "vae_decoder"),
    *(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
)
_GRAPHS = {"sampler": "model", "step": "step"}  # forms to names of files


@dataclass(frozen=True)
class _Request:
    """The arguments of `export_pipeline` that its parts need, and their results."""

    forms: tuple[Form, ...]
    opset: int
    precision: str
    parity_bound: float | None
    kept: dict[str, list[str]] = field(default_factory=dict)  # by component, layers that fp16 cannot hold


def export_pipeline(
    student: Student,
    folder: str | Path,
    *,
    form: Forms = "both",
    opset: int = 23,
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    vae: Any = "own",
    text_encoders: str | Path = "own",
    parity_bound: float | None = None,
) -> dict[str, float]:
    """Write a text-to-image student as a folder of ONNX graphs, which `pyard.runtime.OnnxPipeline` draws with.

    `transformer/model.onnx` is the form `sampler`, `transformer/step.onnx` the form `step` (`export_onnx` says what they take);
    further sizes that the student was trained on have separate graphs, `model_HEIGHTxWIDTH.onnx`. All of them share one file of
    weights. Text encoders take `input_ids` and `attention_mask`, int64 [B, n], and give `tokens` [B, n, D] and `pooled` [B, E];
    the decoder takes a `latent` [B, C, h, w] and gives an `image` uint8 [B, H, W, 3]. The batch size and the number of text
    tokens are not fixed.

    Args:
        student: made of a text-to-image pipeline; it is left as it is.
        folder: the folder to write, which appears complete and checked, or not at all. Other programs' files in it are kept.
        form: form of the transformer: `sampler`, `step`, or `both`.
        opset: version of the ONNX operators, 20 to 23.
        precision: precision of all components: `fp32`; `fp16`, except layers whose values exceed its range, which stay in fp32;
            `int8`, for weights of the transformer and the text encoders.
        vae: the VAE whose decoder is exported, as in `export_onnx`.
        text_encoders: `own`, those of the pipeline that the student was made from; the folder of another copy of it; `none`:
            the folder only draws from embeddings.
        parity_bound: as in `export_onnx`.

    Returns:
        The largest errors relative to PyTorch, by component; `picture` is that of whole pictures, as a fraction of 255.

    Raises:
        InputError: the student does not draw from prompts, text encoders are missing, or a component cannot be exported, with
            the reason.
        ExportError: a component, or the whole, deviates from PyTorch by more than the bound.
    """
    folder = Path(folder)
    if student.config.text is None:
        raise InputError(f"{folder}: this student draws from classes or numbers; its export is one file: --onnx student.onnx")
    if form not in ("sampler", "step", "both"):
        raise InputError(f"form is {form!r}; expected sampler, step or both")
    if opset not in OPSETS:
        raise InputError(f"opset is {opset}; expected {OPSETS[0]} to {OPSETS[-1]}")
    if precision not in PRECISIONS_OF_PIPELINES:
        expected = ", ".join(PRECISIONS_OF_PIPELINES)
        raise InputError(f"precision is {precision!r}; a pipeline is exported in one of {expected}")
    is_ours = require_replaceable(folder, CLASS_NAME, names=_OWNED)
    forms: tuple[Form, ...] = ("sampler", "step") if form == "both" else (form,)
    request = _Request(forms, opset, precision, parity_bound)
    student = copy.deepcopy(student).to("cpu", torch.float32).eval().requires_grad_(False)
    student.conditions = None
    encoders, conditions = _texts(student, text_encoders)
    decoder = load_decoder(vae, student)
    # The folder may be passed on, so it does not name the path of the text encoders.
    text = dataclasses.replace(student.config.text, folder="")  # type: ignore[type-var]
    student.config = dataclasses.replace(student.config, text=text)
    with new_folder(folder, owned=_OWNED if is_ours else ()) as building:
        parity = {"transformer": _write_transformer(building, student, conditions, request)}
        if decoder is not None:
            _write_decoder(building, student, decoder, conditions, request)
        if encoders is not None:
            _write_text_encoders(building, encoders, request)
        config = _config(student, decoder, encoders, conditions, request)
        _finish(building, config)
        parity |= measure_pipeline(OnnxPipeline(building, ["CPUExecutionProvider"]), student, conditions, decoder, encoders)
        check_pipeline(parity, parity_bound or PARITY_BOUND[precision], precision, folder)
        _finish(building, {**config, "parity": parity})
    return parity


def export_folder(student: Student, folder: Path, *, unused: Sequence[str], precision: str, **settings: Any) -> None:
    """Run `export_pipeline` for the command line.

    Args:
        student: a student made from a text-to-image pipeline.
        folder: the folder to write.
        unused: flags that were given but only apply to single files.
        precision, settings: arguments of `export_pipeline`.
    """
    if folder.suffix == ".onnx" and not folder.is_dir():
        other = folder.with_suffix("")
        raise InputError(f"--onnx {folder}: a text-to-image student is exported as a folder of graphs; give --onnx {other}/")
    if unused:
        raise InputError(f"--{unused[0]} is for students in one file; a text-to-image student is exported as a folder")
    parity = export_pipeline(student, folder, precision=precision, **settings)  # type: ignore[arg-type]
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    errors = ", ".join(f"{name} {error:.1e}" for name, error in parity.items())
    kept = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["kept_in_float32"]
    for component, layers in kept.items():
        if layers:
            print(f"{component}: too large for fp16, so in float32: {', '.join(layers)}")
    print(f"{folder}/: {megabytes:.1f} MB, {student.num_steps} steps; error against PyTorch: {errors}")


def own_text_encoders(folder: Path) -> str | Path:
    """The folder that a student was read from, if it is a pipeline with text encoders, otherwise `own`."""
    return folder if (folder / "model_index.json").is_file() and (folder / "tokenizer").is_dir() else "own"


def _texts(student: Student, source: str | Path) -> tuple[TextEncoders | None, list[Condition]]:
    """The text encoders, and the conditions of `PARITY_PROMPTS`, or random ones if there are no encoders."""
    text = student.config.text
    assert text is not None
    settings = student.config.network.transformer  # type: ignore[attr-defined]
    if str(source) == "none":
        return None, random_conditions(student)
    place = Path(text.folder if str(source) == "own" else source)
    if not place.is_dir():
        raise InputError(
            f"this student uses the text encoders of the pipeline in {place}, which does not exist; give another copy of "
            "it: --text_encoders PATH, or --text_encoders none"
        )
    encoder = text_encoder_of(student, folder=place, dtype=next(student.trunk.parameters()).dtype)
    return TextEncoders(encoder, settings), [encode_prompts(encoder, [prompt], text.constants) for prompt in PARITY_PROMPTS]


def _write_transformer(building: Path, student: Student, conditions: Sequence[Condition], request: _Request) -> float:
    folder = building / "transformer"
    folder.mkdir()
    weights, worst = SharedWeights(folder / "weights.data"), 0.0
    for shape in student.sample_shapes:
        for form in request.forms:
            path = building / _graph(student, shape, "transformer", _GRAPHS[form])
            errors = export_onnx(
                student.of_size(shape),
                path,
                form=form,
                opset=request.opset,
                precision=request.precision,  # type: ignore[arg-type]
                vae=None,
                parity_bound=request.parity_bound,
                examples=conditions,
            )
            config_path(path).unlink()
            if request.precision == "fp16":
                layers = {*request.kept.get("transformer", []), *kept_in_float32(path)}
                request.kept["transformer"] = sorted(layers)
            weights.move(path)
            worst = max(worst, *errors.values())
    return worst


def _write_decoder(
    building: Path, student: Student, decoder: Decoder, conditions: Sequence[Condition], request: _Request
) -> None:
    folder = building / "vae_decoder"
    folder.mkdir()
    paths = []
    for shape in student.sample_shapes:
        paths.append(building / _graph(student, shape, "vae_decoder", "model"))
        feeds = _latents(student, shape, conditions) if request.precision == "fp16" else []
        _save(decoder_model(decoder, shape, request.opset), paths[-1], request, feeds)
    if len(paths) > 1:
        weights = SharedWeights(folder / "weights.data")
        for path in paths:
            weights.move(path)


def _latents(student: Student, shape: tuple[int, ...], conditions: Sequence[Condition]) -> list[dict[str, NDArray[Any]]]:
    """Typical inputs of the decoder: samples, and the predictions before them, which `stream` shows."""
    condition = Condition.cat(list(conditions))
    noise = torch.from_numpy(standard_normal(0, np.arange(condition.batch_size), shape))
    with torch.inference_mode():
        return [{"latent": prediction.numpy()} for prediction in student.rollout(noise, condition)]


def _write_text_encoders(building: Path, encoders: TextEncoders, request: _Request) -> None:
    encoders.save_tokenizers(building)
    for settings in encoders.layout.encoders:
        path = building / settings.name / "model.onnx"
        path.parent.mkdir()
        prompts = PromptEncoder(building, encoders.layout.to_json(), lambda name: None)
        feeds = [prompts.inputs(dataclasses.asdict(settings), [text]) for text in PARITY_PROMPTS]
        _save(encoders.trace(settings.name, request.opset), path, request, feeds, quantised=True)


def _save(
    model: ir.Model,
    path: Path,
    request: _Request,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    *,
    quantised: bool = False,
) -> None:
    """Write a component in the requested precision; `int8` only applies to components that are `quantised`."""
    external = weight_bytes(model) > LARGEST_SINGLE_FILE
    if request.precision == "fp32" or (request.precision == "int8" and not quantised):
        save_model(model, path, external_data=external)
    else:
        with TemporaryDirectory(dir=path.parent) as place:
            source = Path(place) / path.name
            save_model(model, source, external_data=external)
            if request.precision == "int8":
                quantise_weights(source, path, external_data=external)
            else:
                request.kept[path.parent.name] = halve(source, path, feeds, external_data=external)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.parent.name} was not written: onnx.checker refuses the graph: {error}") from None


def _graph(student: Student, shape: tuple[int, ...], component: str, name: str) -> str:
    """The path in the folder of a graph for samples of this shape; the usual size's has no numbers in its name."""
    if shape != student.sample_shape:
        height, width = _pixels(student, shape)
        name = f"{name}_{height}x{width}"
    return f"{component}/{name}.onnx"


def _pixels(student: Student, shape: tuple[int, ...]) -> tuple[int, int]:
    factor: int = student.config.network.pixels  # type: ignore[attr-defined]
    return shape[-2] * factor, shape[-1] * factor


def _config(
    student: Student,
    decoder: Decoder | None,
    encoders: TextEncoders | None,
    conditions: Sequence[Condition],
    request: _Request,
) -> dict[str, Any]:
    config = student.config
    assert config.text is not None
    others = [shape for shape in student.sample_shapes if shape != student.sample_shape]
    sizes = []
    for shape in (student.sample_shape, *others):
        height, width = _pixels(student, shape)
        forms = {form: _graph(student, shape, "transformer", name) for form, name in _GRAPHS.items() if form in request.forms}
        decodes = None if decoder is None else _graph(student, shape, "vae_decoder", "model")
        size = PictureSize(height, width, shape, forms.get("sampler"), forms.get("step"), decodes)
        sizes.append(dataclasses.asdict(size))
    return {
        "_class_name": CLASS_NAME,
        "format_version": FORMAT_VERSION,
        "pyard_version": __version__,
        "precision": request.precision,
        "kept_in_float32": request.kept,
        "opset": request.opset,
        "num_steps": student.num_steps,
        "grid": config.grid.to_json(),
        "sizes": sizes,
        "conditions": [item.to_json() for item in ConditionInputs(student, conditions).inputs],
        "constants": config.text.constants,
        "text": None if encoders is None else encoders.layout.to_json(),
        "student": config.to_json(),
    }


def _finish(building: Path, config: Mapping[str, Any]) -> None:
    """Write the configuration, with the size and checksum of every other file."""
    files = {}
    for path in sorted(path for path in building.rglob("*") if path.is_file() and path != building / CONFIG_NAME):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(building).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    text = json.dumps({**config, "files": files}, indent=2) + "\n"
    (building / CONFIG_NAME).write_text(text, encoding="utf-8")
