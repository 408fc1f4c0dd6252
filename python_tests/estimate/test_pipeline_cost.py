"""What text-to-image pipelines are said to cost, against published numbers and against what runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import randomise
from tiny_pipelines import tiny_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pyard
from pyard import ops
from pyard.cli.command_line import main
from pyard.conditions import Condition, PromptTable
from pyard.cost.activations import fake_copy, peak_live
from pyard.cost.flops import teacher_flops, update_flops
from pyard.cost.memory import student_activations
from pyard.errors import InputError
from pyard.estimate.recipe_cost import estimate, student_of
from pyard.estimate.student_cost import count
from pyard.estimate.text_cost import encoder_parameters, encoding_flops
from pyard.models.lora import add_lora
from pyard.models.student import Student
from pyard.teachers import load_teacher
from pyard.teachers.published import network_of, outline_of
from pyard.teachers.text_to_image.published import PUBLISHED, published_pipeline
from pyard.teachers.text_to_image.teacher import PipelineTeacher
from pyard.training.config import TrainConfig
from pyard.training.processes import Processes
from pyard.training.regression import Regression
from pyard.trajectories import TrajectoryBatch, generate_trajectories
from pyard.trajectories.generate import grid_of

TINY = (
    "pixart_alpha", "pixart_alpha_1024", "pixart_sigma", "sd3", "aura_flow", "flux", "flux2_klein", "qwen_image", "z_image",
)  # fmt: skip
PROMPTS = ["a red circle", "two small blue squares above a cross", "a dog", "a dog"]


@pytest.fixture(scope="module", params=TINY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(request.param, tmp_path_factory.mktemp("pipelines") / request.param)


@pytest.mark.parametrize(("name", "billions"), [
    ("pixart-alpha", 0.611), ("pixart-sigma", 0.611), ("sd3-medium", 2.028), ("sd3.5-medium", 2.243), ("sd3.5-large", 8.057),
    ("flux.1-dev", 11.901), ("flux.2-klein-4b", 3.876), ("flux.2-klein-9b", 9.079), ("qwen-image", 20.430), ("z-image", 6.155),
])  # fmt: skip
def test_published_transformers_have_the_parameters_of_their_weights(name, billions):
    network, _ = network_of(name)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(billions * 1e9, abs=0.5e6)


@pytest.mark.parametrize(("name", "millions"), [
    ("pixart-sigma", [4762]), ("sd3.5-medium", [124, 695, 4762]), ("flux.1-dev", [123, 4762]), ("flux.2-klein-4b", [4022]),
    ("qwen-image", [8292]),
    ("z-image", [4022]),
])  # fmt: skip
def test_published_text_encoders_have_the_parameters_of_their_weights(name, millions):
    pipeline = outline_of(name).pipeline
    assert [round(encoder_parameters(encoder) / 1e6) for encoder in pipeline.encoders] == millions


def test_published_pipelines_have_several_names():
    for name in ("sd3.5-medium", "stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-medium", "SD3.5-Medium"):
        assert published_pipeline(name).pipeline == "StableDiffusion3Pipeline"
    names = [name for found in PUBLISHED for name in (found.name, found.repository.lower())]
    assert len(set(names)) == 2 * len(PUBLISHED)
    with pytest.raises(InputError, match=r"nor a published name; expected .* sd3.5-medium, .* z-image"):
        outline_of("sd3.6-medium")


def test_published_pipelines_draw_what_their_cards_say():
    """Latents of 128 x 128, so many tokens of text, the pipelines' own solvers and steps."""
    texts = {}
    for found in PUBLISHED:
        pipeline = outline_of(found.name).pipeline
        shape = pipeline.shape_of(None, None)
        assert shape[1:] == (128, 128)
        assert pipeline.grid(4, None, shape).teacher_steps == {20: 20, 28: 28, 50: 52}[pipeline.teacher_steps]
        assert pipeline.solver == ("dpm++2m" if "pixart" in found.name else "euler")
        texts[found.name] = (pipeline.text.tokens, pipeline.text.width, pipeline.text.pooled, pipeline.text.padded)
    assert texts["pixart-sigma"] == (300, 4096, None, False)
    assert texts["sd3.5-medium"] == (77 + 256, 4096, 2048, True)
    assert texts["flux.1-dev"] == (512, 4096, 768, True)
    assert texts["qwen-image"] == (512, 3584, None, False)


def test_an_outline_is_the_pipeline_without_its_weights(folder, tmp_path):
    teacher = load_teacher(folder)
    assert isinstance(teacher, PipelineTeacher)
    weights = [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]
    assert weights
    moved = {path: tmp_path / str(number) for number, path in enumerate(weights)}
    for path, place in moved.items():
        path.rename(place)
    try:
        outline = outline_of(folder)
    finally:
        for path, place in moved.items():
            place.rename(path)
    assert outline.network.config == teacher.network.config
    assert outline.schedule == teacher.schedule
    shapes = {name: tensor.shape for name, tensor in teacher.network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in outline.network.state_dict().items()} == shapes
    pipeline, shape = outline.pipeline, teacher.shape_of(32, 48)
    assert pipeline.shape_of(32, 48) == shape
    assert pipeline.grid(3, None, shape) == grid_of(teacher, 3, None, shape)
    assert (pipeline.solver, pipeline.cfg_scale) == (teacher.solver, teacher.cfg_scale)
    assert pipeline.constants(None) == teacher.constants(None)
    # What the text encoders give, and what they are.
    short, long = (one.tensors for one in teacher.text_encoder.encode(["a dog", "a very " + "small " * 700 + "dog"]))
    assert long["tokens"].shape == (pipeline.text.tokens, pipeline.text.width)
    assert (len(short["tokens"]) == pipeline.text.tokens) == pipeline.text.padded
    assert (long["pooled"].numel() if "pooled" in long else None) == pipeline.text.pooled
    loaded = [part for name, part in teacher.text_encoder.components().items() if not name.startswith("tokenizer")]
    assert [encoder_parameters(encoder) for encoder in pipeline.encoders] == [
        sum(parameter.numel() for parameter in part.parameters()) for part in loaded
    ]
    fewest, most = 1, 700  # of a text that is as long as may be
    while most - fewest > 1:
        middle = (fewest + most) // 2
        is_cut = teacher.text_encoder.encode(["small " * middle])[0].cut
        fewest, most = (fewest, middle) if is_cut else (middle, most)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        teacher.text_encoder.encode(["small " * fewest])
    assert encoding_flops(pipeline) == pytest.approx(counter.get_total_flops(), rel=0.02)
    condition = pipeline.text.condition(pipeline.constants(None))
    real = Condition({name: torch.ones(tensor.shape, dtype=tensor.dtype) for name, tensor in condition.items()})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher.network(torch.randn(1, *shape), torch.full((1,), 0.5), real)
    assert teacher_flops(outline.network, condition, shape) == pytest.approx(counter.get_total_flops(), rel=0.01)


def recipe_of(place: Path, teacher: Path, **settings: Any) -> Path:
    sizes = dict(height=32, width=32, num_steps=2, teacher_steps=4, num_trajectories=8, batch_size=4, max_steps=2, save_every=1)
    kinds = dict(trajectory_keep="state", trajectory_dtype="bfloat16", heads="shared", trackers="none", progress=False)
    file = place / "recipe.yaml"
    file.write_text(json.dumps({"teacher": str(teacher), **sizes, **kinds, **settings}))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [
    ("sd3", dict(history_layers=1)), ("qwen_image", dict(history_layers=0, output="jump")),
], ids=["sd3", "qwen_image"])  # fmt: skip
def test_an_estimate_is_what_a_run_leaves(name, settings, tmp_path):
    """Every byte of the shards and the prompts, and what LoRA trains: output layers whole, and as additions."""
    teacher = tiny_pipeline(name, tmp_path / "teacher")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    recipe = recipe_of(tmp_path, teacher, prompts=str(prompts), lora_rank=2, trajectory_precision="bfloat16", **settings)
    found = estimate(recipe, tflops=1.0)
    run = tmp_path / "run"
    pyard.train(TrainConfig(**{**TrainConfig.read(recipe).__dict__, "out": run}))
    shards = [*(run / "trajectories").glob("**/*.safetensors")]
    tables = [path for path in shards if "conditions" in path.parts]
    assert found.store_bytes == sum(path.stat().st_size for path in set(shards) - set(tables))
    record = PromptTable(run / "trajectories" / "conditions").record
    assert (found.texts.prompts, found.texts.texts, found.texts.known) == (4, record.num_texts, True)
    real, headers = sum(path.stat().st_size for path in tables), 1000
    if found.texts.shape.padded:
        assert 0 <= real - found.texts.num_bytes < headers
    else:
        assert real < found.texts.num_bytes  # at most
    student = Student.from_pretrained(run)
    assert found.parameters == sum(parameter.numel() for parameter in student.parameters())
    assert found.trained_parameters == sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert found.trained_parameters < 0.5 * found.parameters
    kept = [folder for folder in (run / "checkpoints").iterdir() if folder.is_dir()]
    assert len(kept) == found.checkpoints == 2
    written = sum(path.stat().st_size for path in kept[0].rglob("*") if path.is_file())
    assert found.checkpoint_bytes == pytest.approx(written, rel=0.6)  # names and headers are as large as such tensors
    assert [stage.name for stage in found.stages] == ["text encoding", "trajectories", "regression"]
    # A store that is there costs nothing, and its prompts have the length that they have.
    again = estimate(recipe_of(tmp_path, teacher, trajectories=str(run / "trajectories"), lora_rank=2), tflops=1.0)
    assert again.texts.encoded
    assert 0 <= real - again.texts.num_bytes < headers
    assert [stage.name for stage in again.stages] == ["regression"]


@pytest.mark.parametrize(
    ("name", "passes"), [("sd3", 2 * 4), ("flux", 4), pytest.param("pixart_sigma", 2 * 4, marks=pytest.mark.slow)]
)
def test_guidance_doubles_the_passes_that_run(name, passes, tmp_path, monkeypatch):
    folder = tiny_pipeline(name, tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a dog\n")
    found = estimate(recipe_of(tmp_path, folder, num_trajectories=4))
    pipeline = outline_of(folder)
    one = teacher_flops(pipeline.network, pipeline.pipeline.text.condition(pipeline.pipeline.constants(None)), (4, 8, 8))
    assert found.stages[1].flops == 4 * passes * one
    rows: list[int] = []
    teacher = load_teacher(folder)
    plain = teacher.network.forward
    monkeypatch.setattr(teacher.network, "forward", lambda x, *more: (rows.append(len(x)), plain(x, *more))[1])
    generate_trajectories(
        teacher, tmp_path / "store", 4, prompts=["a dog"], num_steps=2, teacher_steps=4, height=32, width=32, batch_size=4,
        progress=False,
    )  # fmt: skip
    assert sum(rows) == 4 * passes
    # Without guidance, half.
    without = estimate(recipe_of(tmp_path, folder, num_trajectories=4, cfg_scale=1.0))
    assert without.stages[1].flops == 4 * 4 * one


def low_rank(folder: Path, **settings: Any) -> tuple[TrainConfig, Student, Condition]:
    """A LoRA student of a pipeline, and a condition of one sample, without weights."""
    outline = outline_of(folder)
    config = TrainConfig(
        teacher=str(folder), out=Path(), num_steps=2, heads="shared", height=32, width=32, lora_rank=2, batch_size=4,
        max_steps=1, **settings,
    )  # fmt: skip
    config, student = student_of(config, outline)
    text = outline.pipeline.text
    short = type(text)(7, text.width, text.pooled, text.padded)
    return config, student, short.condition(outline.pipeline.constants(None))


def filled(student: Student, folder: Path) -> Student:
    """The same student with random weights."""
    network = load_teacher(folder).network
    made = Student(student.config, *network.trunk.for_student(network.head))
    add_lora(made, 2, student.lora.heads)
    randomise(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux", "z_image"])
def test_updates_of_low_rank_cost_what_runs(name, tmp_path):
    """Frozen weights get no gradient: an update takes well under three forward passes, and keeps fewer activations."""
    folder = tiny_pipeline(name, tmp_path / "teacher")
    config, student, condition = low_rank(folder)
    made = filled(student, folder)
    rows = Condition({k: torch.ones((4, *t.shape[1:]), dtype=t.dtype) for k, t in condition.items()})
    stage = Regression(config, made_with(made, rows), Processes())
    batch = TrajectoryBatch(torch.randn(4, 2, 4, 8, 8), torch.randn(4, 2, 4, 8, 8), rows)
    with ops.use_backend("reference"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stage.compute(1, batch)
    counted = update_flops(student, 4, condition)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.03)
    forward = sum(count(student, condition).flops_per_pass)
    assert 1.9 * forward < counted / 4 < 2.8 * forward

    def kept(size: int) -> int:
        some, data = rows.index(torch.arange(size) % 4), torch.randn(size, 2, 4, 8, 8)
        return saved_bytes(lambda: made(data, some), made)

    found = student_activations(student, condition, device_type="cpu")
    assert found.everything == pytest.approx((kept(8) - kept(2)) / 6, rel=0.02)


def made_with(student: Student, rows: Condition) -> Student:
    """The student with a table of conditions of which the first row is asked for its cost."""

    class Table:
        count = len(rows)

        def take(self, numbers: Any) -> Condition:
            return rows.index(torch.as_tensor(numbers))

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    student.conditions = Table()  # type: ignore[assignment]
    return student


def saved_bytes(run: Any, module: torch.nn.Module) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with ops.use_backend("reference"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(storage.nbytes() for storage in storages.values())
    del result
    return total


def test_a_frozen_base_is_held_once(tmp_path):
    """The bytes of everything that a run holds between two updates, each storage once."""
    folder = tiny_pipeline("sd3", tmp_path / "teacher")
    recipe = recipe_of(tmp_path, folder, lora_rank=2, trajectory_precision="bfloat16", ema_decay=[0.9, 0.99])
    found = estimate(recipe).memory["one GPU"][1]
    teacher = load_teacher(folder, dtype="bfloat16")
    config = TrainConfig.read(recipe)
    student = Student.from_teacher(teacher, grid_of(teacher, 2, 4, (4, 8, 8)), heads="shared", share=True)
    add_lora(student, 2)
    one = outline_of(folder).pipeline.text.condition({})
    rows = Condition({k: torch.ones((2, *t.shape[1:]), dtype=t.dtype) for k, t in one.items()})
    stage = Regression(config, made_with(student, rows), Processes())
    stage.compute(1, TrajectoryBatch(torch.randn(2, 2, 4, 8, 8), torch.randn(2, 2, 4, 8, 8), rows))
    stage.apply()
    modules = [student, *stage.averages]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()}
    moments = [t for state in stage.optimizer.state.values() for t in state.values() if t.ndim]
    assert found.weights + found.averages == sum(storages.values())
    assert found.optimizer == sum(t.numel() * t.element_size() for t in moments)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    assert found.weights < 2 * frozen + 4 * found.averages


def test_what_a_pass_holds_by_hand():
    """Of 16 rows, at its most: the input, the hidden layer before its activation, and after it."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8), torch.nn.Linear(8, 8))
    made = fake_copy(layers)
    assert peak_live(lambda: made(torch.empty(16, 8)), device_type="cuda") == 4 * 16 * (8 + 32 + 32)


def test_describe_answers_for_teachers_and_students(folder, tmp_path, capsys):
    assert main(["describe", str(folder), "--num_steps", "2", "--history_layers", "1"]) == 0
    printed = capsys.readouterr().out
    teacher = load_teacher(folder)
    passes = teacher.teacher_steps * (1 if teacher.cfg_scale == 1 else 2)
    assert f"{teacher.teacher_steps} steps, {passes} passes" in printed
    assert "student steps      2, history in the lowest 1 layers" in printed
    names = [line[:18].rstrip() for line in printed.splitlines()]
    assert names == [
        "teacher", "student steps", "student parameters", "student per pass", "student per image", "student per update",
        "cache per image", "cost of history",
    ]  # fmt: skip
    if folder.name != "sd3":
        return
    student = Student.from_teacher(
        teacher, teacher.grid(2, None, teacher.sample_shape), history_layers=1, heads="shared", text=teacher.text_source()
    )
    student.save_pretrained(tmp_path / "student")
    assert main(["describe", str(tmp_path / "student")]) == 0
    numbers = capsys.readouterr().out.splitlines()
    # The same, but those of a teacher's student say whose they are.
    assert [line[19:] for line in numbers] == [line[19:] for line in printed.splitlines()[1:]]
    assert numbers[0] == "steps              2, history in the lowest 1 layers"
    assert main(["describe", str(tmp_path / "student"), "--num_steps", "2"]) == 2
    assert "is a student, which has its own" in capsys.readouterr().err


def test_the_built_in_teacher_has_its_own_limit_of_tokens(capsys):
    outline, teacher = outline_of("scenes-text").pipeline, load_teacher("scenes-text")
    assert outline.text.tokens == teacher.text_encoder.max_sequence_length
    assert main(["describe", "scenes-text"]) == 0
    assert f"{teacher.teacher_steps} steps" in capsys.readouterr().out


def test_wrong_questions(tmp_path, capsys):
    folder = tiny_pipeline("sd3", tmp_path / "teacher")
    for teacher, flags, message in (
        (folder, ["--text_tokens", "9"], "attends to padding, so every text has 333"),
        ("digits", ["--text_tokens", "9"], "this teacher does not draw from prompts"),
        (tiny_pipeline("pixart_sigma", tmp_path / "pixart"), ["--text_tokens", "301"], "expected 1 to 300"),
    ):
        (tmp_path / "recipe.yaml").write_text(json.dumps({"teacher": str(teacher)}))
        assert main(["estimate", str(tmp_path / "recipe.yaml"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["describe", "sd3.6-medium"]) == 2
    assert "neither an existing path nor a published name" in capsys.readouterr().err
    (folder / "transformer" / "config.json").unlink()
    assert main(["describe", str(folder)]) == 2
    assert "config.json" in capsys.readouterr().err
