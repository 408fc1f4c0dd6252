"""Sampling without torch: the seed's samples whatever the batch, and a clear error for every wrong input."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from factories import tiny_student
from models.autoencoders import plain_vae
from onnx import TensorProto, helper
from PIL import Image

import pyard
from pyard.diffusion.noise import standard_normal
from pyard.errors import InputError
from pyard.export import export_onnx
from pyard.models.codec import LatentCodec
from pyard.runtime import OnnxStudent

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_inference.py"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("export") / "student.onnx"
    export_onnx(tiny_student(2, history_layers=1), file)
    return file


@pytest.fixture(scope="module")
def student(path: Path) -> OnnxStudent:
    return OnnxStudent(path, threads=1)


def test_samples_do_not_depend_on_the_batch(student: OnnxStudent) -> None:
    labels = np.array([4, 0, 3, 1, 2, 0, 4], dtype=np.int32)
    whole = student.sample(labels, seed=5)
    assert whole.shape == (7, *student.info.sample_shape)
    assert whole.dtype == np.float32
    for batch_size in (1, 3, 7, 100):
        np.testing.assert_allclose(student.sample(labels, 5, batch_size), whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    assert np.abs(student.sample(labels, seed=6) - whole).max() > 0.1 * np.abs(whole).max()


def test_the_noise_is_that_of_the_seed(student: OnnxStudent) -> None:
    noise = standard_normal(5, [0, 1], student.info.sample_shape)
    np.testing.assert_array_equal(student.sample([1, 2], noise=noise), student.sample([1, 2], seed=5))


def test_pyard_sample_draws_the_same(student: OnnxStudent) -> None:
    expected = pyard.sample(tiny_student(2, history_layers=1), [2, 3], seed=2**64 - 1).numpy()
    found = student.sample([2, 3], seed=2**64 - 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_sixteen_threads_draw_what_one_draws(student: OnnxStudent) -> None:
    labels = [[i % 5, (i + 1) % 5] for i in range(48)]
    alone = [student.sample(pair, seed=i) for i, pair in enumerate(labels)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: student.sample(labels[i], seed=i), range(len(labels))))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_sixteen_threads_step_and_share_fixed_buffers(path: Path, tmp_path: Path) -> None:
    export_onnx(tiny_student(2, history_layers=1), tmp_path / "step.onnx", form="step")
    steps = OnnxStudent(tmp_path / "step.onnx", threads=1)
    fixed = OnnxStudent(path, providers=["CPUExecutionProvider"], threads=1, cuda_graphs=True)
    for shared in (steps, fixed):
        labels = [[i % 5] * (1 + i % 3) for i in range(48)]
        alone = [shared.sample(some, seed=i) for i, some in enumerate(labels)]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(shared.sample, labels, range(len(labels))))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_array_equal(a, b)


def test_fixed_buffers_give_the_same_samples(path: Path, student: OnnxStudent) -> None:
    fixed = OnnxStudent(path, providers=["CPUExecutionProvider"], threads=1, cuda_graphs=True)
    for labels, seed in (([1, 2, 3], 0), ([4], 1), ([0, 0, 4], 2)):
        np.testing.assert_array_equal(fixed.sample(labels, seed=seed), student.sample(labels, seed=seed))
    first = fixed.sample([1, 2, 3], seed=0)
    fixed.sample([0, 0, 4], seed=2)
    np.testing.assert_array_equal(first, student.sample([1, 2, 3], seed=0))


def test_repr_says_where_it_runs(student: OnnxStudent) -> None:
    assert repr(student).endswith("student.onnx: sampler of 2 steps, fp32, on CPUExecutionProvider")


def test_a_sampler_cannot_stream(student: OnnxStudent) -> None:
    with pytest.raises(InputError, match=r"form 'sampler'.*--form step"):
        student.stream([0])


def test_a_step_file_streams_the_sample_whatever_the_batch(tmp_path: Path) -> None:
    export_onnx(tiny_student(3, history_layers=2), tmp_path / "step.onnx", form="step")
    student = OnnxStudent(tmp_path / "step.onnx")
    *_, last = student.stream([4, 0, 3], seed=5)
    for batch_size in (1, 2, None):
        found = student.sample([4, 0, 3], 5, batch_size)
        np.testing.assert_allclose(found, last, rtol=0, atol=1e-5 * np.abs(last).max())
    with pytest.raises(InputError, match="label 5"):
        student.stream([5])


@pytest.mark.parametrize("keep", [0.5, *(pytest.param(keep, marks=pytest.mark.slow) for keep in (0, 0.999))])
def test_truncated_or_missing_external_data(tmp_path: Path, keep: float) -> None:
    export_onnx(tiny_student(2, history_layers=1), tmp_path / "student.onnx", external_data=True)
    (data,) = tmp_path.glob("student.onnx.*.data")
    content = data.read_bytes()
    data.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(InputError, match=r"student\.onnx\.[0-9a-f]{16}\.data \(\d+ bytes\) is cut off"):
        OnnxStudent(tmp_path / "student.onnx")
    data.unlink()
    with pytest.raises(InputError, match=r"student\.onnx\.[0-9a-f]{16}\.data is missing"):
        OnnxStudent(tmp_path / "student.onnx")


def test_external_data_are_named_by_what_the_file_says(tmp_path: Path) -> None:
    export_onnx(tiny_student(2, history_layers=1), tmp_path / "student.onnx", external_data=True)
    renamed = (tmp_path / "student.onnx").rename(tmp_path / "renamed.onnx")
    assert OnnxStudent(renamed).sample([1]).shape == (1, 2, 8, 8)
    (data,) = tmp_path.glob("student.onnx.*.data")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(
        InputError, match=r"student\.onnx\.[0-9a-f]{16}\.data \(100 bytes\) is cut off: renamed\.onnx keeps its weights there"
    ):
        OnnxStudent(renamed)
    data.unlink()
    with pytest.raises(
        InputError, match=r"student\.onnx\.[0-9a-f]{16}\.data is missing: renamed\.onnx keeps its weights there"
    ):
        OnnxStudent(renamed)


def test_an_empty_list_streams_empty_predictions(tmp_path: Path) -> None:
    export_onnx(tiny_student(3, history_layers=1), tmp_path / "step.onnx", form="step")
    student = OnnxStudent(tmp_path / "step.onnx")
    assert student.sample([]).shape == (0, 2, 8, 8)
    assert [prediction.shape for prediction in student.stream([])] == [(0, 2, 8, 8)] * 3


def test_providers_may_have_options(path: Path) -> None:
    options = {"arena_extend_strategy": "kSameAsRequested"}
    student = OnnxStudent(path, providers=[("CPUExecutionProvider", options)])
    assert student.info.provider == "CPUExecutionProvider"
    assert student.sample([1]).shape == (1, 2, 8, 8)
    assert OnnxStudent(path, providers=["CPUExecutionProvider"], threads=np.int64(1)).info.provider == "CPUExecutionProvider"
    for wrong in ([("CPUExecutionProvider", {}, 3)], [("CPUExecutionProvider",)], [3], [("CPUExecutionProvider", "fast")]):
        with pytest.raises(InputError, match="expected a name, or"):
            OnnxStudent(path, providers=wrong)
    with pytest.raises(InputError, match="providers: found NoSuchProvider; this onnxruntime has"):
        OnnxStudent(path, providers=[("NoSuchProvider", {})])
    with pytest.raises(InputError, match="providers: found a dictionary"):  # whose options would be passed over
        OnnxStudent(path, providers={"CPUExecutionProvider": options})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="threads is 1000000; expected 1 to 1024"):
        OnnxStudent(path, threads=10**6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pictures", True, "pictures is True, which its graph contradicts"),  # floats would be read as bytes
        ("num_classes", 9, "9 classes and 5 conditions"),
        ("conditions", [], "do not say what label is"),
        ("conditions", [{"name": "label", "dtype": "int32"}], "label is 'int32'; its graph takes int64"),
        ("conditions", [{"name": "label", "dtype": "banana"}], "label is 'banana'; its graph takes int64"),
    ],
)
def test_metadata_that_contradict_the_graph_are_one_line(
    name: str, value: object, message: str, path: Path, tmp_path: Path
) -> None:
    model = onnx.load(path)
    (entry,) = (entry for entry in model.metadata_props if entry.key == "pyard")
    entry.value = json.dumps({**json.loads(entry.value), name: value})
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match=message):
        OnnxStudent(tmp_path / "other.onnx")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "", lambda text: "{", lambda text: "[1]", lambda text: text.replace('"num_steps"', '"steps"'),
        lambda text: text.replace('"grid"', '"g"'), lambda text: text.replace('"sample_shape": [2, 8, 8]', '"sample_shape": 3'),
        lambda text: text.replace('"name": "label"', '"name": "other"'), lambda text: "null",
        lambda text: text.replace('"conditions": [', '"conditions": [3, '),
    ],
)  # fmt: skip
def test_damaged_metadata_is_one_line(change, path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    text = model.metadata_props[0].value
    assert change(text) != text
    model.metadata_props[0].value = change(text)
    onnx.save(model, tmp_path / "damaged.onnx")
    with pytest.raises(InputError, match=r"damaged\.onnx: its metadata entry 'pyard' is damaged.*export the student again"):
        OnnxStudent(tmp_path / "damaged.onnx")


@pytest.mark.slow
def test_example_draws_the_pictures_of_a_file_with_a_decoder(tmp_path: Path) -> None:
    """Upright, in colour, as the runtime draws them."""
    student = tiny_student(2, history_layers=1)
    student.codec = LatentCodec(plain_vae())
    export_onnx(student, tmp_path / "student.onnx")
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "student.onnx"), str(tmp_path / "samples.png")]
    subprocess.run(command, capture_output=True, text=True, check=True)
    noise = np.random.default_rng(0).standard_normal((5, 2, 8, 8), dtype=np.float32)
    expected = OnnxStudent(tmp_path / "student.onnx").sample(range(5), noise=noise)
    side, scale = expected.shape[1], 64 // expected.shape[1]
    with Image.open(tmp_path / "samples.png") as picture:
        drawn = np.asarray(picture)[::scale, ::scale]
    assert drawn.shape == (side, 5 * side, 3)
    np.testing.assert_array_equal(drawn, np.hstack(list(expected)))
    assert 5 < drawn.std() < 200


def test_no_labels_no_samples(student: OnnxStudent) -> None:
    assert student.sample([]).shape == (0, *student.info.sample_shape)


def test_info(student: OnnxStudent) -> None:
    info = student.info
    assert (info.form, info.precision, info.provider) == ("sampler", "fp32", "CPUExecutionProvider")
    assert info.pyard_version == pyard.__version__
    assert len(info.weights_sha256) == 64
    assert set(info.parity) == {"1", "3"}


def test_sampling_imports_no_torch(path: Path) -> None:
    code = (
        "import sys; from pyard.runtime import OnnxStudent; "
        f"OnnxStudent({str(path)!r}).sample([1]); "
        "sys.exit(', '.join({'torch', 'onnx', 'diffusers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_example_draws_every_class(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), str(path), str(tmp_path / "samples.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("5 samples, 2 network passes each")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([5], "label 5: expected 0 to 4"),
        ([0, -1], "label -1: expected 0 to 4"),
        ([0.0], "of float64; expected a list of integers"),
        ([float("nan")], "of float64; expected a list of integers"),
        ([[0, 1]], r"shape \(1, 2\)"),
        ([[0], [1, 2]], "expected a list of integers"),
        (["cat"], "expected a list of integers"),
        ([True], "of bool; expected a list of integers"),
    ],
)
def test_wrong_labels(student: OnnxStudent, labels: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        student.sample(labels)


def test_wrong_noise(student: OnnxStudent) -> None:
    noise = standard_normal(0, [0, 1], student.info.sample_shape)
    broken = noise.copy()
    broken[1, 0, 3, 3] = np.nan
    for wrong, message in (
        (broken, "NaN"),
        (noise.astype(np.float64), "found float64"),
        (noise[:1], r"found float32 \(1, 2, 8, 8\)"),
        (noise[:, :, :4], r"\(2, 2, 4, 8\); expected a numpy array, float32 \(2, 2, 8, 8\)"),
        (noise.tolist(), "found list"),
    ):
        with pytest.raises(InputError, match=message):
            student.sample([0, 1], noise=wrong)


def test_wrong_seed_and_batch_size(student: OnnxStudent) -> None:
    with pytest.raises(InputError, match="seed is -1"):
        student.sample([0], seed=-1)
    with pytest.raises(InputError, match="batch_size is 0"):
        student.sample([0], batch_size=0)


def test_wrong_session_settings(path: Path) -> None:
    with pytest.raises(InputError, match=r"NoSuchProvider; this onnxruntime has .*CPUExecutionProvider"):
        OnnxStudent(path, providers=["NoSuchProvider"])
    with pytest.raises(InputError, match="an empty list"):
        OnnxStudent(path, providers=[])
    with pytest.raises(InputError, match="threads is 0"):
        OnnxStudent(path, threads=0)


@pytest.mark.parametrize(
    ("variable", "threads", "expected"), [("3", None, 3), ("3,2", None, 3), ("3", 1, 1), ("none", None, 0), (None, None, 0)]
)
def test_the_environment_limits_threads_that_nobody_chose(
    path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, threads: int | None, expected: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    student = OnnxStudent(path, providers=["CPUExecutionProvider"], threads=threads)
    assert student._session.get_session_options().intra_op_num_threads == expected


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_truncated_file(path: Path, tmp_path: Path, keep: float) -> None:
    content = path.read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(InputError, match=r"cut\.onnx \(\d+ bytes\) cannot be opened as an ONNX model|not pyard's"):
        OnnxStudent(cut)


def test_no_model_and_no_file(tmp_path: Path) -> None:
    text = tmp_path / "opset.onnx"  # the name must not be taken for what onnxruntime says
    text.write_text("hello, I am no model\n" * 100)
    with pytest.raises(InputError, match="cannot be opened as an ONNX model"):
        OnnxStudent(text)
    with pytest.raises(InputError, match="no such file"):
        OnnxStudent(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match="no such file"):
        OnnxStudent(tmp_path)


def test_a_model_that_is_newer_than_this_onnxruntime(path: Path, tmp_path: Path) -> None:
    for name, change in (("ir_version", {"ir_version": 999}), ("opset", {"opset": 999})):
        model = onnx.load(path)
        model.ir_version = change.get("ir_version", model.ir_version)
        model.opset_import[0].version = change.get("opset", model.opset_import[0].version)
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match=rf"{name}\.onnx needs a newer onnxruntime than \d.*--opset 20"):
            OnnxStudent(tmp_path / f"{name}.onnx")


def test_a_model_that_is_not_pyards(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"is an ONNX model \(inputs: x\) but not pyard's"):
        OnnxStudent(tmp_path / "other.onnx")


def test_a_format_of_another_version(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    entry = model.metadata_props[0]
    entry.value = entry.value.replace('"format_version": 1', '"format_version": 99')
    onnx.save(model, tmp_path / "future.onnx")
    with pytest.raises(InputError, match="has format version 99"):
        OnnxStudent(tmp_path / "future.onnx")
