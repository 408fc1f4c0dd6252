"""Exported students in onnxruntime: this package imports only numpy and onnxruntime."""

from pyard.runtime.conditions import ConditionTensor
from pyard.runtime.onnx_pipeline import OnnxPipeline
from pyard.runtime.onnx_student import OnnxStudent, OnnxStudentInfo

__all__ = ["ConditionTensor", "OnnxPipeline", "OnnxStudent", "OnnxStudentInfo"]
