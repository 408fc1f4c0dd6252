"""Checks of an ONNX file's metadata against its graph, before anything is computed; needs only numpy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyard.errors import InputError
from pyard.storage.numbers import number, whole_number

if TYPE_CHECKING:
    from pyard.runtime.onnx_student import OnnxStudentInfo

_MOST_STEPS = 1000
_MOST_SIDE = 2**20
_NUMPY_NAMES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}  # fmt: skip
_INPUTS = {"sampler": {"noise"}, "step": {"latent", "step"}}
_OUTPUTS = {"sampler": {"sample"}, "step": {"prediction"}}


def check_info(info: OnnxStudentInfo, session: Any, path: Path) -> None:
    """Raise an InputError if a file's metadata do not match its graph, or are not those of a student."""
    where = f"{path}: its metadata"
    if not isinstance(info.form, str) or info.form not in _INPUTS:
        raise InputError(f"{where}: form is {info.form!r:.60}; expected {' or '.join(_INPUTS)}. Export the student again")
    for name, value, low, high in (
        ("num_steps", info.num_steps, 1, _MOST_STEPS),
        ("history_layers", info.history_layers, 0, 10**5),
        ("num_classes", info.num_classes, 1, 2**53),
        ("num_conditions", info.num_conditions, 1, 2**53),
    ):
        if value is not None or name in ("num_steps", "history_layers"):
            whole_number(f"{where}: {name}", value, low, high)
    if not 1 <= len(info.sample_shape) <= 6 or len(info.times) != info.num_steps + 1:
        raise InputError(f"{where}: sample_shape {info.sample_shape} and {len(info.times)} times for {info.num_steps} steps")
    for size in (*info.sample_shape, *info.output_shape):
        whole_number(f"{where}: a size", size, 1, _MOST_SIDE)
    for time in info.times:
        number(f"{where}: a time", time)
    if not isinstance(info.pictures, bool) or not isinstance(info.parity, dict):
        raise InputError(f"{where}: pictures or parity have the wrong type; export the student again")
    texts = (info.precision, info.pyard_version, info.weights_sha256, info.teacher_fingerprint)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: precision, version or fingerprints are not strings; export the student again")
    inputs = {tensor.name: tensor.shape for tensor in session.get_inputs()}
    outputs = {tensor.name for tensor in session.get_outputs()}
    wanted = _INPUTS[info.form] | {tensor.name for tensor in info.conditions}
    if not wanted <= inputs.keys() or not _OUTPUTS[info.form] <= outputs:
        raise InputError(
            f"{path}: its graph takes {', '.join(inputs)} and returns {', '.join(outputs)}; a student of the form {info.form} "
            f"takes {', '.join(sorted(wanted))}"
        )
    untold = {name for name in inputs if not name.startswith("past")} - wanted
    if untold:
        raise InputError(
            f"{where} do not say what {', '.join(sorted(untold))} is, which its graph takes; export the student again"
        )
    types = {tensor.name: _NUMPY_NAMES.get(tensor.type, tensor.type) for tensor in session.get_inputs()}
    for item in info.conditions:
        if item.dtype != types[item.name]:
            raise InputError(f"{where}: {item.name} is {item.dtype!r:.60}; its graph takes {types[item.name]}")
    if info.pictures != any(tensor.type == "tensor(uint8)" for tensor in session.get_outputs()):
        raise InputError(f"{where}: pictures is {info.pictures}, which its graph contradicts; export the student again")
    if info.num_classes is not None and info.num_conditions not in (None, info.num_classes):
        raise InputError(f"{where}: {info.num_classes} classes and {info.num_conditions} conditions; export the student again")
    start = inputs["noise" if info.form == "sampler" else "latent"]
    if len(start) != len(info.sample_shape) + 1 or any(
        isinstance(there, int) and there != said for there, said in zip(start[1:], info.sample_shape, strict=True)
    ):
        raise InputError(f"{path}: its graph takes noise of {start[1:]}, its metadata say {list(info.sample_shape)}")


class NotFiniteError(InputError):
    """A student drew NaN or infinity."""


def require_finite(samples: NDArray[Any], path: Path) -> None:
    """Raise a NotFiniteError if a student's output contains NaN or infinity."""
    if samples.dtype != np.uint8 and not np.isfinite(samples).all():
        raise NotFiniteError(f"{path} drew NaN or infinity: its weights are damaged, or its precision is too low for them")
