"""The folder of a text-to-image student draws from prompts what the student draws in PyTorch, without PyTorch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export.test_traced_text_to_image import relative_error, tiny_text_student
from tiny_pipelines import randomise

import pyard
from pyard.cli.command_line import main
from pyard.errors import InputError
from pyard.export.pipeline import export_pipeline, own_text_encoders
from pyard.models.student import Student
from pyard.runtime import OnnxPipeline
from pyard.runtime.onnx_pipeline import to_pictures
from pyard.sampling.prompts import condition_of_prompts
from pyard.teachers import load_teacher
from pyard.teachers.scenes_text import ScenesTextConfig, new_network

PROMPTS = [
    "a red circle above a blue square",
    "",
    "two green triangles",
    "a large yellow circle to the left of a small red square",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a student whose teacher is built as scenes-text is, in pixel space, but tiny and random."""
    place = tmp_path_factory.mktemp("run")
    sizes = dict(hidden_size=48, depth=2, num_heads=2, text_hidden_size=32, text_depth=1, patch_size=4, size=16, cells=2)
    rates = dict(learning_rate=1e-3, matrix_learning_rate=0.02, caption_dropout=0.1, time_mean=0.3, ema_decay=0.9)
    config = ScenesTextConfig(**sizes, **rates, max_steps=1, batch_size=1, seed=0, jitter=0.5)
    randomise(new_network(config), 1).save_pretrained(place / "teacher")
    teacher = load_teacher(str(place / "teacher"))
    settings = dict(history_layers=1, heads="per_step", output="jump", history_bias=0.3, text=teacher.text_source())
    student = Student.from_teacher(teacher, teacher.grid(2, 4, teacher.shape_of(None, None)), **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    student.save_pretrained(place / "student")
    return place


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "scenes"
    assert main(["export", "--student", str(run), "--onnx", f"{folder}/"]) == 0
    return folder


@torch.inference_mode()
def pytorch(student: Student, prompts: list[str], seed: int) -> Iterator[np.ndarray]:
    from pyard.diffusion.noise import standard_normal

    noise = torch.from_numpy(standard_normal(seed, np.arange(len(prompts)), student.sample_shape))
    for prediction in student.rollout(noise, condition_of_prompts(student, prompts)):
        yield prediction.numpy()


def test_pictures_from_prompts_are_those_of_pytorch(run: Path, exported: Path) -> None:
    student = Student.from_pretrained(run)
    pipeline = OnnxPipeline.from_folder(exported, providers=["CPUExecutionProvider"])
    expected = list(pytorch(student, PROMPTS, 5))
    assert relative_error(*expected) > 0.05
    condition = pipeline.encode(PROMPTS)
    noise = pyard.diffusion.noise.standard_normal(5, np.arange(4), student.sample_shape)
    assert relative_error(pipeline.latents(condition, noise), expected[-1]) < 1e-4
    for batch_size in (None, 3):
        pictures = pipeline.sample(PROMPTS, seed=5, batch_size=batch_size)
        assert (pictures.dtype, pictures.shape) == (np.uint8, (4, 16, 16, 3))
        # One level where a value lies between two.
        assert np.abs(pictures.astype(int) - to_pictures(expected[-1])).max() <= 1
        assert (pictures == to_pictures(expected[-1])).mean() > 0.99
    streamed = list(pipeline.stream(PROMPTS, seed=5))
    assert len(streamed) == 2
    for picture, theirs in zip(streamed, expected, strict=True):
        assert np.abs(picture.astype(int) - to_pictures(theirs)).max() <= 1
    # A prompt alone, shorter than any that was traced, and one whose end is cut.
    for prompts in (["a red circle"], "red", "a red circle and " * 60):
        texts = [prompts] if isinstance(prompts, str) else prompts
        *_, alone = pytorch(student, texts, 5)
        assert np.abs(pipeline.sample(prompts, seed=5).astype(int) - to_pictures(alone)).max() <= 1


def test_layout(run: Path, exported: Path) -> None:
    files = sorted(path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file())
    assert files == [
        *("config.json", "text_encoder/model.onnx", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *("transformer/model.onnx", "transformer/step.onnx", "transformer/weights.data"),
    ]
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    student = Student.from_pretrained(run)
    assert config["grid"]["times"] == list(student.config.grid.times)
    (size,) = config["sizes"]
    assert (size["height"], size["width"], size["sample_shape"], size["decoder"]) == (16, 16, [3, 16, 16], None)
    assert (size["sampler"], size["step"]) == ("transformer/model.onnx", "transformer/step.onnx")
    assert set(config["files"]) == set(files) - {"config.json"}
    assert all(0 < error < 1e-4 for name, error in config["parity"].items() if name != "picture")
    held = 4 * sum(weight.numel() for weight in student.parameters())
    # Both forms read one file; the heads of a step that is a number are stored once more.
    assert (exported / "transformer" / "weights.data").stat().st_size < 1.3 * held
    assert all((exported / "transformer" / f"{name}.onnx").stat().st_size < 0.5 * held for name in ("model", "step"))
    paths = (str(Path(pyard.__file__).parent).encode(), str(exported.parent).encode())
    assert not any(path in (exported / name).read_bytes() for path in paths for name in files)
    for name in ("transformer/model.onnx", "transformer/step.onnx", "text_encoder/model.onnx"):
        onnx.checker.check_model(str(exported / name))


def test_neither_torch_nor_diffusers_is_needed(exported: Path) -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'onnx', 'safetensors'): sys.modules[name] = None\n"
        "from pyard.runtime import OnnxPipeline\n"
        f"pictures = OnnxPipeline.from_folder({str(exported)!r}).sample(['a red circle'], seed=5)\n"
        "sys.modules['tokenizers'] = None\n"
        f"pipeline = OnnxPipeline.from_folder({str(exported)!r})\n"
        "try: pipeline.sample(['a red circle'])\n"
        "except Exception as error: print(pictures.shape, error)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "(1, 16, 16, 3)" in found
    assert "pip install tokenizers" in found


def test_embeddings_in_place_of_prompts(exported: Path) -> None:
    pipeline = OnnxPipeline.from_folder(exported)
    condition = pipeline.encode(PROMPTS)
    drawn = pipeline.sample(PROMPTS, seed=2)
    np.testing.assert_array_equal(pipeline.sample(condition=condition, seed=2), drawn)
    images = pipeline.sample(PROMPTS, seed=2, output_type="pil")
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), drawn)
    # Half precision, as another program may have stored them, and no mask where there is no padding.
    half = {"tokens": condition["tokens"][:1, : condition["mask"][0].sum()].astype(np.float16)}
    assert np.abs(pipeline.sample(condition=half, seed=2).astype(int) - drawn[:1]).max() <= 3
    tokens = condition["tokens"]
    for wrong, message in (
        ({"tokens": tokens[:, :, :5]}, r"condition\['tokens'\]: found float32 \[4, \d+, 5\]; expected float32 \[4, \d+, 32\]"),
        ({"tokens": tokens, "mask": condition["mask"][:, :2]}, r"condition\['mask'\]: found bool \[4, 2\]"),
        ({"tokens": tokens, "pooled": tokens[:, 0]}, "condition: found pooled; expected tokens float32"),
        ({"mask": condition["mask"]}, r"condition\['tokens'\]: found NoneType"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline.sample(condition=wrong)
    with pytest.raises(InputError, match="found neither prompts and condition"):
        pipeline.sample()
    with pytest.raises(InputError, match="expected a string, or a list of at least one"):
        pipeline.sample([])
    with pytest.raises(InputError, match=r"height 32, width None: this student draws 16 x 16 pixels"):
        pipeline.sample(PROMPTS, height=32)
    with pytest.raises(InputError, match=r"noise: found float32 \[4, 3, 8, 8\]; expected float32 \[4, 3, 16, 16\]"):
        pipeline.sample(PROMPTS, noise=np.zeros((4, 3, 8, 8), dtype=np.float32))


def test_components_are_opened_once_and_shared(run: Path, exported: Path, tmp_path: Path) -> None:
    pipeline = OnnxPipeline.from_folder(exported, threads=1)
    shutil.copytree(exported, tmp_path / "copy")
    other = OnnxPipeline.from_folder(tmp_path / "copy", threads=1, share=[pipeline])
    drawn = other.sample(PROMPTS, seed=1)
    assert set(pipeline._opened) == {"text_encoder/model.onnx", "transformer/model.onnx"}
    assert all(other._opened[name] is pipeline._opened[name] for name in pipeline._opened)
    np.testing.assert_array_equal(drawn, OnnxPipeline.from_folder(exported, threads=1).sample(PROMPTS, seed=1))
    config = tmp_path / "copy" / "config.json"
    about = json.loads(config.read_text(encoding="utf-8"))
    about["files"]["text_encoder/model.onnx"]["sha256"] = "0" * 64
    config.write_text(json.dumps(about), encoding="utf-8")
    third = OnnxPipeline.from_folder(tmp_path / "copy", threads=1, share=[pipeline])
    third.encode(PROMPTS)
    assert third._opened["text_encoder/model.onnx"] is not pipeline._opened["text_encoder/model.onnx"]
    with pytest.raises(InputError, match=r"text_encoder/model.onnx: its checksum differs"):
        third.verify()
    pipeline.verify()


def test_damaged_folders_are_refused_in_one_line(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no config.json; expected a folder written by"):
        OnnxPipeline.from_folder(tmp_path / "nowhere")
    shutil.copytree(exported, tmp_path / "copy")
    weights = tmp_path / "copy" / "transformer" / "weights.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"weights.data: \d+ bytes; expected \d+ bytes. Copy the folder again"):
        OnnxPipeline.from_folder(tmp_path / "copy")
    weights.unlink()
    with pytest.raises(InputError, match=r"weights.data: missing"):
        OnnxPipeline.from_folder(tmp_path / "copy")
    config = tmp_path / "copy" / "config.json"
    whole = config.read_text(encoding="utf-8")
    for text, message in (
        (whole[:-20], "cut off or damaged"),
        (whole.replace('"OnnxPipeline"', '"PixArtPipeline"'), "describes a PixArtPipeline"),
        (whole.replace('"format_version": 1', '"format_version": 7'), "has format version 7"),
        (whole.replace('"sizes"', '"seizes"').replace('"files"', '"flies"'), "is missing; export the student again"),
        (whole.replace('"tokenizer/tokenizer.json"', '"../tokenizer.json"'), r"names '\.\./tokenizer.json'; expected files in"),
        (whole.replace('"tokenizer/tokenizer.json"', '"/etc/passwd"'), "names '/etc/passwd'; expected files in its own folder"),
    ):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            OnnxPipeline.from_folder(tmp_path / "copy")


def test_the_wrong_kind_of_target_is_refused_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from factories import tiny_student

    tiny_student(1, history_layers=0).save_pretrained(tmp_path / "classes")
    (tmp_path / "folder").mkdir()
    for student, words, message in (
        (run, ["--onnx", str(tmp_path / "s.onnx")], "is exported as a folder of graphs; give --onnx"),
        (tmp_path / "classes", ["--onnx", str(tmp_path / "folder")], "expected a file, such as"),
        (tmp_path / "classes", ["--onnx", f"{tmp_path}/new/"], "expected a file, such as"),
        (tmp_path / "classes", ["--form", "both"], "--form both is for folders of text-to-image students"),
        (run, ["--onnx", str(tmp_path / "x"), "--method", "traced"], "--method is for students in one file"),
        (run, ["--onnx", str(tmp_path / "x"), "--precision", "int8-static"], "a pipeline is exported in one of fp32"),
        (run, ["--onnx", str(tmp_path / "x"), "--text_encoders", str(tmp_path / "none")], "which does not exist"),
    ):
        assert main(["export", "--student", str(student), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    # A saved ARDPipeline has its own text encoders.
    assert (own_text_encoders(run), own_text_encoders(run / "teacher")) == ("own", run / "teacher")
    with pytest.raises(InputError, match="draws from classes or numbers"):
        export_pipeline(tiny_student(1, history_layers=0), tmp_path / "x")


@pytest.mark.slow
def test_half_precision_keeps_the_layer_that_outgrows_it(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = Student.from_pretrained(run)
    block = student.trunk.transformer.transformer_blocks[1]
    with torch.no_grad():
        block.ff.net[2].weight.mul_(1e6)
        block.ff.net[2].bias.mul_(1e6)
    student.save_pretrained(tmp_path / "large")
    for source, kept in ((run, False), (tmp_path / "large", True)):
        folder = tmp_path / f"onnx-{kept}"
        assert main(["export", "--student", str(source), "--onnx", str(folder), "--precision", "fp16"]) == 0
        assert ("blocks.1.ff.net.2" in capsys.readouterr().out) == kept
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert ("blocks.1.ff.net.2" in config["kept_in_float32"]["transformer"]) == kept
        assert 1e-6 < config["parity"]["sample"] < 2e-2
        pictures = OnnxPipeline.from_folder(folder).sample(PROMPTS, seed=5)
        *_, expected = pytorch(Student.from_pretrained(source), PROMPTS, 5)
        assert np.abs(pictures.astype(int) - to_pictures(expected)).max() <= 6
        if not kept:
            held = 2 * sum(weight.numel() for weight in student.parameters())
            assert (folder / "transformer" / "weights.data").stat().st_size < 1.4 * held
            session = onnx.load(folder / "transformer" / "step.onnx", load_external_data=False)
            kinds = {i.name: i.type.tensor_type.elem_type for i in session.graph.input}
            assert kinds["past_key_values.0.key"] == onnx.TensorProto.FLOAT16
            assert kinds["latent"] == onnx.TensorProto.FLOAT


@pytest.mark.slow
def test_several_sizes_over_one_file_of_weights_from_embeddings_alone(tmp_path: Path) -> None:
    shapes = ((4, 8, 8), (4, 6, 12))
    student, (condition, _) = tiny_text_student("sd3", tmp_path / "pipeline", sample_shapes=shapes)
    student.codec = pyard.models.codec.LatentCodec(tmp_path / "pipeline" / "vae")
    export_pipeline(student, tmp_path / "onnx", form="sampler", text_encoders="none")
    names = sorted(path.relative_to(tmp_path / "onnx").as_posix() for path in (tmp_path / "onnx").rglob("*.*"))
    assert names == [
        *("config.json", "transformer/model.onnx", "transformer/model_24x48.onnx", "transformer/weights.data"),
        *("vae_decoder/model.onnx", "vae_decoder/model_24x48.onnx", "vae_decoder/weights.data"),
    ]
    held = 4 * sum(weight.numel() for weight in student.parameters())
    assert (tmp_path / "onnx" / "transformer" / "weights.data").stat().st_size < 1.2 * held
    pipeline = OnnxPipeline.from_folder(tmp_path / "onnx")
    arrays = {name: tensor.numpy() for name, tensor in condition.items()}
    for size, shape in (({}, shapes[0]), ({"width": 48}, shapes[1])):
        noise = pyard.diffusion.noise.standard_normal(0, np.arange(1), shape)
        with torch.inference_mode():
            *_, expected = student.rollout(torch.from_numpy(noise), condition)
        assert relative_error(pipeline.latents(arrays, noise, **size), expected.numpy()) < 1e-4
        assert pipeline.sample(condition=arrays, **size).shape == (1, 4 * shape[1], 4 * shape[2], 3)
    with pytest.raises(InputError, match="was exported without text encoders"):
        pipeline.sample(PROMPTS)
    with pytest.raises(InputError, match="only has the form sampler"):
        pipeline.stream(condition=arrays)
    with pytest.raises(InputError, match="this student draws 32 x 32, 24 x 48 pixels"):
        pipeline.sample(condition=arrays, height=24, width=32)


@pytest.mark.slow
def test_int8_weights(run: Path, exported: Path, tmp_path: Path) -> None:
    student = Student.from_pretrained(run)
    parity = export_pipeline(student, tmp_path / "int8", precision="int8")
    assert 1e-4 < parity["sample"] < 0.25
    for name in ("transformer/model.onnx", "text_encoder/model.onnx"):
        operators = {node.op_type for node in onnx.load(tmp_path / "int8" / name).graph.node}
        assert operators & {"MatMulInteger", "DynamicQuantizeMatMul"}
    sizes = [(folder / "transformer" / "weights.data").stat().st_size for folder in (exported, tmp_path / "int8")]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pixart_alpha_1024", "sd3", "aura_flow", "flux", "flux2_klein", "qwen_image", "z_image"])
def test_every_family_draws_from_prompts_what_pytorch_draws(name: str, tmp_path: Path) -> None:
    student, _ = tiny_text_student(name, tmp_path / "pipeline")
    student.codec = pyard.models.codec.LatentCodec(tmp_path / "pipeline" / "vae")
    parity = export_pipeline(student, tmp_path / "onnx")
    assert all(0 < error < 1e-4 for error in (parity["transformer"], parity["text_encoder"], parity["sample"]))
    pipeline = OnnxPipeline.from_folder(tmp_path / "onnx", providers=["CPUExecutionProvider"])
    prompts = ["", "a red circle", "the large green square " * 40]
    *_, expected = pytorch(student, prompts, 3)
    noise = pyard.diffusion.noise.standard_normal(3, np.arange(3), student.sample_shape)
    assert relative_error(pipeline.latents(pipeline.encode(prompts), noise), expected) < 1e-4
    pictures = pipeline.sample(prompts, seed=3)
    images = student.codec.decode(torch.from_numpy(expected)).numpy()
    assert np.abs(pictures.astype(int) - to_pictures(images)).max() <= 1
    assert len({picture.tobytes() for picture in pictures}) == 3
    *_, streamed = pipeline.stream(prompts, seed=3)
    assert np.abs(streamed.astype(int) - pictures).max() <= 1
