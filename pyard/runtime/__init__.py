"""An exported student in onnxruntime: numpy and onnxruntime are all that this package imports."""

from pyard.runtime.conditions import ConditionTensor
from pyard.runtime.onnx_pipeline import OnnxPipeline
from pyard.runtime.onnx_student import OnnxStudent, OnnxStudentInfo

__all__ = ["ConditionTensor", "OnnxPipeline", "OnnxStudent", "OnnxStudentInfo"]
