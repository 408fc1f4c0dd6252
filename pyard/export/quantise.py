"""8-bit integer matrix products by onnxruntime's quantiser: weights per output channel, activations per tensor.

The matrix products of the blocks and their modulations are quantised. Everything between the products stays in float32, and so
do the first and last layers, which are small and whose errors would reach the sample undamped.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.runtime import OnnxStudent

CALIBRATION_SEED = 2**32 + 1  # of nobody's samples
CALIBRATION_BATCH = 8

# From a seed and the numbers of samples to the tensors of their conditions.
Draw = Callable[[int, NDArray[Any]], Mapping[str, NDArray[Any]]]


def quantise(source: Path, target: Path, *, calibration: int | None, external_data: bool, draw: Draw) -> None:
    """Write an 8-bit copy of an exported student.

    Args:
        source: the float32 file, with its metadata.
        target: the file to write.
        calibration: number of samples whose trajectories determine fixed ranges of the activations (a separate range for every
            step in the form `sampler`); None: ranges are measured in every call.
        external_data: write weights to `<target>.data`.
        draw: returns conditions for the calibration samples.

    Raises:
        InputError: the blocks have no matrix product with a weight.
    """
    nodes = onnx.load(source, load_external_data=False).graph.node
    chosen = [node.name for node in nodes if node.op_type == "MatMul" and re.search(r"blocks?\.?\d", " ".join(node.input))]
    if not chosen:
        raise InputError(
            "int8: the blocks of this network have no product with a weight, so there is nothing to quantise; use fp32 or fp16"
        )
    # Seven bits, because products of 8-bit numbers silently overflow 16 bits on processors without VNNI.
    settings: dict[str, Any] = dict(
        op_types_to_quantize=["MatMul"],
        nodes_to_quantize=chosen,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=external_data,
    )
    # ONNX's type inference knows nothing that follows onnxruntime's own attention operator.
    extra: dict[str, Any] = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    with _quiet():
        if calibration is None:
            quantize_dynamic(source, target, extra_options=extra, **settings)
        else:
            quantize_static(
                source,
                target,
                _Trajectories(OnnxStudent(source, providers=["CPUExecutionProvider"]), calibration, draw),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"], **extra},
                **settings,
            )


def quantise_weights(source: Path, target: Path, *, external_data: bool) -> None:
    """Write a copy of a text encoder with 8-bit weights; the activations' ranges are measured in every call."""
    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external_data,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True},
        )


class _Trajectories(CalibrationDataReader):
    """The inputs of a student's graph while it draws samples."""

    def __init__(self, student: OnnxStudent, count: int, draw: Draw):
        self.inputs = typical_inputs(student, count, draw)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.inputs, None)


def typical_inputs(student: OnnxStudent, count: int, draw: Draw) -> Iterator[dict[str, np.ndarray]]:
    """The inputs of a student's graph while it draws `count` samples."""
    for start in range(0, count, CALIBRATION_BATCH):
        index = np.arange(start, min(start + CALIBRATION_BATCH, count))
        condition = draw(CALIBRATION_SEED, index)
        noise = standard_normal(CALIBRATION_SEED, index, student.info.sample_shape)
        if student.info.form == "sampler":
            yield {"noise": noise, **condition}
        else:
            for inputs, _ in student.run_steps(noise, condition):
                yield {name: x if isinstance(x, np.ndarray) else x.numpy() for name, x in inputs.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    # Hide its advice to preprocess the graph, which assembled graphs do not need.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
