"""Sampling an exported student with onnxruntime: this module imports only numpy and onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.runtime.checks import check_info, require_finite
from pyard.runtime.conditions import ConditionTensor, check_condition
from pyard.runtime.device_buffers import FixedBuffers, run_on_device
from pyard.runtime.sessions import Provider, choose_providers, open_session
from pyard.storage.reading import as_object, damaged, parse_json, reading
from pyard.storage.typed import checked

METADATA_KEY = "pyard"
FORMAT_VERSION = 1
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class OnnxStudentInfo:
    """The metadata of an exported student, and where it runs.

    Args:
        form: `sampler`, where the graph runs all S passes, or `step`, where it runs one.
        num_steps: S.
        history_layers: N.
        num_classes: labels are 0 ... num_classes - 1; None: the student is conditioned on something else.
        num_conditions: number of rows of the table that the student was trained with; None: it has no table.
        conditions: the tensors that condition it.
        sample_shape: (C, ...) of the noise, and of samples that are not pictures.
        output_shape: shape of what `sample` returns for each label: `sample_shape`, or (height, width, 3) for pictures.
        times: the S + 1 grid times, in the teacher's time.
        precision: precision of weights and products: `fp32`, `fp16`, `int8` or `int8-static`.
        pictures: whether a decoder in the file turns samples into uint8 pictures.
        pyard_version: version of pyard that wrote the file.
        weights_sha256: sha256 of the student's weights, the same in every export of the student.
        teacher_fingerprint: fingerprint of the teacher that the student was distilled from.
        parity: relative error to PyTorch that the export measured, by batch size.
        provider: the onnxruntime execution provider that runs it.
        teacher_settings: settings, by name, with which the teacher sampled the trajectories of the student's training; None:
            the file does not have them.
    """

    form: str
    num_steps: int
    history_layers: int
    num_classes: int | None
    num_conditions: int | None
    conditions: tuple[ConditionTensor, ...]
    sample_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    times: tuple[float, ...]
    precision: str
    pictures: bool
    pyard_version: str
    weights_sha256: str
    teacher_fingerprint: str
    parity: dict[str, float]
    provider: str
    teacher_settings: dict[str, Any] | None = None


class OnnxStudent:
    """A student in an ONNX file written by `python -m pyard.export`.

    Args:
        path: the file.
        providers: onnxruntime execution providers in order of preference, by name or as (name, options); None uses CUDA if the
            installed onnxruntime and the machine have it, else the CPU.
        threads: CPU threads per call; None: the number in the variable OMP_NUM_THREADS, or if that is not set, onnxruntime's
            choice (one per physical core).
        cuda_graphs: on CUDA, record the whole sampler once for each batch size and replay it; calls from several threads then
            wait for each other.

    `repr(student)` describes the student and its provider in one line.

    Raises:
        InputError: the file does not exist, is damaged, is too new for this onnxruntime, or was not written by pyard; or a
            provider is unknown.

    Example:
        student = OnnxStudent("student.onnx")
        images = student.sample([3, 1, 4], seed=0)  # float32 [3, C, H, W], -1 black, 1 white
        images = other.sample(condition={"tokens": tokens, "mask": mask})  # of a student that takes these
    """

    @checked("OnnxStudent")
    def __init__(
        self,
        path: str | Path,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        *,
        cuda_graphs: bool = False,
    ):
        self.path = Path(path)
        self._session = open_session(self.path, choose_providers(providers), threads, cuda_graphs)
        self.info = _read_info(self.path, self._session)
        self._device = "cuda" if self.info.provider == "CUDAExecutionProvider" else "cpu"
        self._fixed = None
        if cuda_graphs:
            if self.info.form != "sampler":
                raise InputError(f"{self.path} has the form {self.info.form!r}; cuda_graphs needs the form 'sampler'")
            dtype = np.uint8 if self.info.pictures else np.float32
            self._fixed = FixedBuffers(self._session, "sample", self.info.output_shape, dtype, self._device)

    @checked("sample")
    def sample(
        self,
        labels: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        *,
        noise: NDArray[np.float32] | None = None,
        condition: Mapping[str, NDArray[Any]] | None = None,
    ) -> NDArray[Any]:
        """Draw one sample for each label, or for each row of a condition.

        Whatever the batch size, sample i starts from `pyard.diffusion.noise.standard_normal(seed, [i], sample_shape)`. So does
        `pyard.sample`, so both draw the same samples up to rounding. Any number of threads may call this at once.

        Args:
            labels: for a class-conditional student, the class of each sample, integers [n] in 0 ... num_classes - 1.
            seed: random seed of the noise, 0 to 2**64 - 1.
            batch_size: number of samples drawn together, which limits memory. None: all at once.
            noise: initial noise, float32 [n, C, ...], to use instead of the seed's.
            condition: instead of labels, arrays [n, ...] by name, with the dtypes and shapes in `info.conditions`.

        Returns:
            float32 [n, C, ...], in the range of the training data; uint8 [n, height, width, 3] from a file with a decoder.

        Raises:
            InputError: labels, condition, noise, seed or batch size are out of range or have the wrong shape or type.
        """
        tensors, count = self._check(labels, condition, noise)
        shape = self.info.sample_shape
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected at least 1, or None for all at once")
        rows = batch_size or max(count, 1)
        samples = np.empty((count, *self.info.output_shape), dtype=np.uint8 if self.info.pictures else np.float32)
        for start in range(0, count, rows):
            index = np.arange(start, min(start + rows, count))
            start_noise = standard_normal(seed, index, shape) if noise is None else noise[index]
            rows_of = {name: array[start : start + rows] for name, array in tensors.items()}
            if self._fixed is not None:
                samples[index] = self._fixed.run({"noise": start_noise, **rows_of})
            elif self.info.form == "sampler":
                samples[index] = self._session.run(["sample"], {"noise": start_noise, **rows_of})[0]
            else:
                *_, (_, samples[index]) = self.run_steps(start_noise, rows_of)
        require_finite(samples, self.path)
        return samples

    @checked("stream")
    def stream(
        self,
        labels: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        seed: int = 0,
        *,
        noise: NDArray[np.float32] | None = None,
        condition: Mapping[str, NDArray[Any]] | None = None,
    ) -> Iterator[NDArray[Any]]:
        """Draw samples and return a preview after each step: the S predictions one by one, coarse ones first.

        Args:
            labels, seed, noise, condition: as in `sample`.

        Returns:
            An iterator over S arrays like those of `sample`; each is computed when it is requested, and the last is the sample.

        Raises:
            InputError: as in `sample`; or the file has the form `sampler`, which computes all steps in one call.
        """
        if self.info.form != "step":
            raise InputError(
                f"{self.path} has the form {self.info.form!r}, which only returns the sample; "
                "export the student with --form step to see each prediction"
            )
        tensors, count = self._check(labels, condition, noise)
        if not count:  # operators refuse an empty batch
            dtype = np.uint8 if self.info.pictures else np.float32
            return iter([np.empty((0, *self.info.output_shape), dtype)] * self.info.num_steps)
        if noise is None:
            noise = standard_normal(seed, np.arange(count), self.info.sample_shape)
        return (prediction for _, prediction in self.run_steps(noise, tensors))

    def run_steps(
        self, noise: NDArray[np.float32], condition: Mapping[str, NDArray[Any]]
    ) -> Iterator[tuple[dict[str, Any], NDArray[Any]]]:
        """Yield each step's inputs in the form `step`, and its prediction (a picture if the file has a decoder).

        Keys, values and latents stay on the device from one step to the next.
        """
        for inputs, outputs in self.steps_on_device(noise, condition):
            yield inputs, outputs["image" if self.info.pictures else "prediction"].numpy()

    def steps_on_device(
        self, noise: NDArray[np.float32], condition: Mapping[str, NDArray[Any]]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield the inputs and outputs of each step in the form `step`; the outputs are OrtValues on the model's device."""
        latest: Any = np.ascontiguousarray(noise)
        tensors = {name: np.ascontiguousarray(array) for name, array in condition.items()}
        past: dict[str, Any] = {
            tensor.name: np.zeros([len(noise), tensor.shape[1], 0, tensor.shape[3]], dtype=_NUMPY_TYPES[tensor.type])
            for tensor in self._session.get_inputs()
            if tensor.name.startswith("past")
        }
        for step in range(self.info.num_steps):
            inputs = {"latent": latest, **tensors, "step": np.array(step, dtype=np.int64), **past}
            outputs = run_on_device(self._session, inputs, self._device)
            past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
            latest = outputs["prediction"]
            yield inputs, outputs

    def sample_on_device(self, noise: NDArray[np.float32], condition: Mapping[str, NDArray[Any]]) -> Any:
        """The sample, for either form, as an OrtValue on the model's device."""
        if self.info.form == "step":
            *_, (_, outputs) = self.steps_on_device(noise, condition)
            return outputs["prediction"]
        tensors = {name: np.ascontiguousarray(array) for name, array in {"noise": noise, **condition}.items()}
        return run_on_device(self._session, tensors, self._device)["sample"]

    def __repr__(self) -> str:
        info = self.info
        return f"{self.path}: {info.form} of {info.num_steps} steps, {info.precision}, on {info.provider}"

    def _check(
        self, labels: object, condition: Mapping[str, NDArray[Any]] | None, noise: NDArray[np.float32] | None
    ) -> tuple[dict[str, NDArray[Any]], int]:
        tensors = check_condition(labels, condition, self.info.conditions, self.info.num_classes)
        count = len(next(iter(tensors.values())))
        if noise is not None:
            _check_noise(noise, (count, *self.info.sample_shape))
        return tensors, count


def _read_info(path: Path, session: onnxruntime.InferenceSession) -> OnnxStudentInfo:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        inputs = ", ".join(tensor.name for tensor in session.get_inputs())
        raise InputError(
            f"{path} is an ONNX model (inputs: {inputs}) but not pyard's: it has no metadata entry "
            f"{METADATA_KEY!r}. Expected a file written by python -m pyard.export"
        )
    where = f"{path}: its metadata entry {METADATA_KEY!r} is damaged and"
    try:
        metadata = as_object(parse_json(text, "JSON"), "JSON")
    except InputError as error:
        raise damaged(where, error, "export the student again") from None
    with reading(where, "export the student again"):
        info = _info_of(metadata, path, session)
        check_info(info, session, path)
    return info


def _info_of(metadata: dict[str, Any], path: Path, session: onnxruntime.InferenceSession) -> OnnxStudentInfo:
    if metadata["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {metadata['format_version']}, written by pyard {metadata['pyard_version']}; "
            f"this pyard reads version {FORMAT_VERSION}: export the student again"
        )
    outputs, pictures = session.get_outputs(), metadata.get("pictures", False)
    return OnnxStudentInfo(
        form=metadata["form"],
        num_steps=metadata["num_steps"],
        history_layers=metadata["history_layers"],
        num_classes=metadata["num_classes"],
        num_conditions=metadata.get("num_conditions", metadata["num_classes"]),
        conditions=_conditions(metadata, session),
        sample_shape=tuple(metadata["sample_shape"]),
        output_shape=tuple(outputs[-1 if pictures and metadata["form"] == "step" else 0].shape[1:]),
        pictures=pictures,
        times=tuple(metadata["config"]["grid"]["times"]),
        precision=metadata["precision"],
        pyard_version=metadata["pyard_version"],
        weights_sha256=metadata["weights_sha256"],
        teacher_fingerprint=metadata["config"]["teacher_fingerprint"],
        parity=metadata["parity"],
        provider=session.get_providers()[0],
        teacher_settings=_teacher_settings(metadata["config"]),
    )


def _teacher_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    names = ("teacher_steps", "cfg_scale", "cfg_channels", "cfg_interval", "solver")
    if "cfg_scale" not in config:
        return None  # a file of an earlier version
    values = {name: config[name] for name in names}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _conditions(metadata: dict[str, Any], session: onnxruntime.InferenceSession) -> tuple[ConditionTensor, ...]:
    # Files of earlier versions are class-conditional and have no entry that says so.
    known = metadata.get("conditions", [{"name": "label", "dtype": "int64"}])
    shapes = {tensor.name: tuple(tensor.shape) for tensor in session.get_inputs()}
    return tuple(ConditionTensor(item["name"], item["dtype"], shapes[item["name"]]) for item in known)


def _check_noise(noise: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    if not isinstance(noise, np.ndarray) or noise.dtype != np.float32 or noise.shape != shape:
        found = f"{noise.dtype} {noise.shape}" if isinstance(noise, np.ndarray) else type(noise).__name__
        raise InputError(f"noise: found {found}; expected a numpy array, float32 {shape}, one for each sample")
    if not np.isfinite(noise).all():
        raise InputError("noise: found NaN or infinity; expected finite, standard normal numbers")
