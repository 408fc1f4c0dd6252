"""Half precision keeps in float32, and names, what outgrows it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pyard.errors import InputError
from pyard.export.half import LIMIT, halve

RNG = np.random.default_rng(0)


def network(path: Path, scale: float) -> None:
    """Two layers with a norm between them; `scale` is that of the first layer's output. `angle` is a time in thousands."""
    weights = {
        "blocks.0.up.weight": RNG.standard_normal((8, 16)).astype(np.float32) * scale,
        "blocks.0.norm.weight": np.ones(16, dtype=np.float32),
        "blocks.1.down.weight": RNG.standard_normal((16, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "blocks.0.up.weight"], ["grown"], "up"),
        helper.make_node("Abs", ["grown"], ["positive"], "positive"),
        helper.make_node("LayerNormalization", ["positive", "blocks.0.norm.weight"], ["normal"], "norm"),
        helper.make_node("Sin", ["angle"], ["wave"], "wave"),
        helper.make_node("Add", ["normal", "wave"], ["sum"], "add"),
        helper.make_node("MatMul", ["sum", "blocks.1.down.weight"], ["y"], "down"),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8]),
        helper.make_tensor_value_info("angle", TensorProto.FLOAT, ["batch", 1]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "network", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    (found,) = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)
    return found


@pytest.mark.parametrize(("scale", "kept"), [(1.0, []), (1e4, ["blocks.0.norm", "blocks.0.up"])])
def test_what_outgrows_half_precision_stays_and_is_named(scale: float, kept: list[str], tmp_path: Path) -> None:
    network(tmp_path / "whole.onnx", scale)
    feed = {"x": RNG.standard_normal((64, 8)).astype(np.float32), "angle": RNG.uniform(0, 1000, (64, 1)).astype(np.float32)}
    assert halve(tmp_path / "whole.onnx", tmp_path / "half.onnx", [feed], external_data=False) == kept
    onnx.checker.check_model(str(tmp_path / "half.onnx"), full_check=True)
    expected, found = run(tmp_path / "whole.onnx", feed), run(tmp_path / "half.onnx", feed)
    assert found.dtype == np.float32
    error = np.abs(found - expected).max() / np.abs(expected).max()
    # The angle would be off by a quarter in half precision, and the large layer infinite.
    assert 1e-6 < error < 3e-3
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert stored["blocks.1.down.weight.half"] == TensorProto.FLOAT16
    assert ("blocks.0.up.weight" in stored) == bool(kept)
    assert len(stored) == 3, "a weight is stored twice"
    assert list(tmp_path.glob("*")) == list(tmp_path.glob("*.onnx")), "temporary files are left"


def test_the_limit_leaves_room_for_other_prompts(tmp_path: Path) -> None:
    network(tmp_path / "whole.onnx", 1.0)
    feed = {"x": np.ones((1, 8), dtype=np.float32), "angle": np.zeros((1, 1), dtype=np.float32)}
    weight = numpy_helper.to_array(onnx.load(tmp_path / "whole.onnx").graph.initializer[0])
    largest = float(np.abs(feed["x"] @ weight).max())
    for factor, kept in ((0.99, False), (1.01, True)):
        scaled = {**feed, "x": feed["x"] * (LIMIT / largest * factor)}
        layers = halve(tmp_path / "whole.onnx", tmp_path / "half.onnx", [feed, scaled], external_data=False)
        assert ("blocks.0.up" in layers) == kept


def test_branches_are_refused(tmp_path: Path) -> None:
    yes = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["a"])], "yes", [], [helper.make_tensor_value_info("a", TensorProto.FLOAT, None)]
    )
    no = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["b"])], "no", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    )
    node = helper.make_node("If", ["which"], ["y"], then_branch=yes, else_branch=no)
    inputs = [
        helper.make_tensor_value_info("which", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / "g.onnx")
    with pytest.raises(InputError, match="fp16: the graph has branches or loops"):
        halve(tmp_path / "g.onnx", tmp_path / "half.onnx", [], external_data=False)
