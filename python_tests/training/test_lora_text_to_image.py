"""LoRA over a text-to-image pipeline: the base is held once, and nothing but what is trained is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import relative_error
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_pipeline
from torch.distributed.checkpoint.filesystem import FileSystemReader
from training_runs import assert_same_run, signal_at, start, train_in, wait

import pyard
from pyard.errors import InputError
from pyard.models.lora import add_lora
from pyard.models.student import Student
from pyard.storage.log import read_log
from pyard.teachers.text_to_image.teacher import PipelineTeacher, load_pipeline
from pyard.training.config import TrainConfig
from pyard.training.processes import Processes
from pyard.training.regression import Regression
from pyard.training.sharded import consolidate
from pyard.trajectories import TrajectoryStore, generate_trajectories

SETTINGS: dict[str, Any] = dict(
    num_steps=2, history_layers=2, max_steps=6, batch_size=4, learning_rate=1e-2, save_every=2, log_every=1,
    trackers="none", progress=False, history_bias=-1.0, lora_rank=2,
)  # fmt: skip
PROMPTS = ["a red circle", "two small blue squares above a cross", "a dog"]


def make_store(place: Path, precision: Any = "bfloat16") -> Path:
    """`store/` beside `teacher/`."""
    generate_trajectories(
        place / "teacher", place / "store", 8, num_steps=2, teacher_steps=4, height=32, width=32, prompts=PROMPTS,
        batch_size=4, keep="state", precision=precision, progress=False,
    )  # fmt: skip
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in bfloat16, its trajectories and a run over it."""
    place = tmp_path_factory.mktemp("lora")
    tiny_pipeline("sd3", place / "teacher")
    train_in(make_store(place), "run", **SETTINGS)
    return place


@pytest.fixture(scope="module")
def exact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32, for comparisons to rounding; without a run."""
    place = tmp_path_factory.mktemp("exact")
    tiny_pipeline("sd3", place / "teacher")
    return make_store(place, "float32")


def low_rank_student(teacher: PipelineTeacher, **settings: Any) -> Student:
    shape = teacher.shape_of(32, 32)
    settings = {"history_layers": 2, "history_bias": -1.0, **settings}
    grid = teacher.grid(2, 4, shape)
    return Student.from_teacher(teacher, grid, text=teacher.text_source(), sample_shapes=[shape], share=True, **settings)


def predictions(student: Student) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    history = torch.randn(2, 2, *student.sample_shape, generator=generator)
    text = student.trunk.transformer.config.joint_attention_dim
    pooled = student.trunk.transformer.config.pooled_projection_dim
    from pyard.conditions import Condition

    tensors = {
        "tokens": torch.randn(2, 4, text, generator=generator),
        "mask": torch.ones(2, 4, dtype=torch.bool),
        "pooled": torch.randn(2, pooled, generator=generator),
    }
    with torch.no_grad():
        return student.eval()(history, Condition(tensors)).float()


@pytest.mark.parametrize("heads", ["whole", "lora", "frozen"])
def test_the_base_is_held_once_in_its_own_dtype(folder: Path, heads: Any) -> None:
    table: Any = TrajectoryStore.open(folder / "store").conditions
    teacher = load_pipeline(folder / "teacher", dtype="bfloat16").with_prompts(table)
    student = low_rank_student(teacher)
    add_lora(student, 2, heads)
    config = TrainConfig(teacher="", out=Path(), num_steps=2, batch_size=4, ema_decay=(0.9, 0.99))
    stage = Regression(config, student, Processes())
    theirs = {tensor.data_ptr() for tensor in [*teacher.network.parameters(), *teacher.network.buffers()]}
    for one in (student, *stage.averages):
        trained = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
        assert {name for name in trained if name.startswith("heads.")} == {
            name
            for name, _ in one.named_parameters()
            if name.startswith("heads.") and (heads == "whole" or (heads == "lora" and "lora_" in name))
        }
        for name, parameter in one.named_parameters():
            if name in trained:
                assert parameter.dtype == torch.float32, name
                assert parameter.data_ptr() not in theirs, name
            elif name.startswith("trunk."):
                assert parameter.data_ptr() in theirs, name
                assert parameter.dtype == torch.bfloat16, name
    mine, average = (dict(one.named_parameters()) for one in (student, stage.averages[1]))
    assert all((mine[name].data_ptr() == average[name].data_ptr()) == (not mine[name].requires_grad) for name in mine)
    assert {id(p) for group in stage.optimizer.param_groups for p in group["params"]} == {
        id(p) for p in student.parameters() if p.requires_grad
    }


def test_a_plain_student_of_a_bfloat16_pipeline_trains_in_float32(folder: Path) -> None:
    run = train_in(folder, "plain", **{**SETTINGS, "lora_rank": None, "max_steps": 1, "mixed_precision": "bf16"})
    assert {t.dtype for t in load_file(run / "student" / "model.safetensors").values() if t.is_floating_point()} == {
        torch.float32
    }


def test_what_is_written_grows_with_the_rank_and_not_with_the_base(folder: Path) -> None:
    train_in(folder, "rank-4", **{**SETTINGS, "lora_rank": 4, "max_steps": 2})
    sizes = []
    for run, step in (("run", 6), ("rank-4", 2)):
        checkpoint = folder / run / "checkpoints" / f"step-{step:07d}"
        for file in (
            checkpoint / "model.safetensors",
            checkpoint / "ema.safetensors",
            folder / run / "student/model.safetensors",
        ):
            tensors = load_file(file)
            assert all("lora_" in name or name.startswith("heads.") or name == "history_bias" for name in tensors), file
        sizes.append(sum(t.numel() for name, t in tensors.items() if "lora_" in name))
        moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
        assert sum(state["exp_avg"].numel() for state in moments.values()) == sum(t.numel() for t in tensors.values())
    assert sizes[1] == 2 * sizes[0] > 0


def test_the_folder_names_its_base_and_is_put_together_again(folder: Path, tmp_path: Path) -> None:
    student = Student.from_pretrained(folder / "run")
    base = student.config.base
    assert base is not None
    assert (base.rank, base.heads, base.dtype) == (2, "whole", "bfloat16")
    drawn = predictions(student)
    teacher = load_pipeline(folder / "teacher", dtype="bfloat16")
    untrained = predictions(low_rank_student(teacher))
    assert relative_error(drawn, untrained) > 1e-3
    again = Student.from_pretrained(folder / "run", base=teacher.network)
    assert torch.equal(predictions(again), drawn)
    student.save_pretrained(tmp_path / "copy")
    assert torch.equal(predictions(Student.from_pretrained(tmp_path / "copy")), drawn)
    student.save_pretrained(tmp_path / "whole", merge=True)
    assert torch.equal(predictions(student), drawn), "saving changes nothing"
    whole = Student.from_pretrained(tmp_path / "whole")
    assert whole.config.base is None
    assert relative_error(predictions(whole), drawn) < 2e-2  # sums are rounded to bfloat16
    pyard.ARDPipeline.from_pretrained(folder / "run").save_pretrained(str(tmp_path / "pipeline"))
    alone = Student.from_pretrained(tmp_path / "pipeline")
    assert alone.config.base is None
    assert torch.equal(predictions(alone), predictions(whole))
    early = consolidate(folder / "run", tmp_path / "early", step=4, weights="model")
    assert torch.equal(predictions(Student.from_pretrained(tmp_path / "early")), predictions(early))
    assert relative_error(predictions(early), drawn) > 1e-4


def test_a_base_that_is_elsewhere_gone_or_changed(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", place)
    shutil.copytree(folder / "run" / "student", tmp_path / "student")
    drawn = predictions(Student.from_pretrained(folder / "run"))
    config = tmp_path / "student" / "config.json"
    config.write_text(config.read_text().replace(str(folder / "teacher"), str(tmp_path / "gone")))
    with pytest.raises(InputError, match=r"trained on top of the pipeline .*gone, which does not exist; restore .*base="):
        Student.from_pretrained(tmp_path / "student")
    moved = Student.from_pretrained(tmp_path / "student", base=place)
    assert torch.equal(predictions(moved), drawn)
    assert moved.config.text is not None
    assert moved.config.text.folder == str(place.resolve())
    here, there = (
        pyard.sample(path, prompts=["a dog"], seed=0, latents=True, pipeline=pipeline)
        for path, pipeline in ((folder / "run", None), (tmp_path / "student", place))
    )
    assert torch.equal(torch.as_tensor(here), torch.as_tensor(there))
    file = place / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(iter(sorted(tensors)))
    save_file({**tensors, name: tensors[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="has changed since training"):
        Student.from_pretrained(tmp_path / "student", base=place)
    lacking = {key: t for key, t in load_file(tmp_path / "student" / "model.safetensors").items() if key != "history_bias"}
    save_file(lacking, tmp_path / "student" / "model.safetensors")
    with pytest.raises(InputError, match="history_bias"):
        Student.from_pretrained(tmp_path / "student", base=folder / "teacher")


def test_a_transformer_in_the_place_of_the_pipelines_is_recorded(exact_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(exact_folder / "teacher", tmp_path / "teacher")
    other = tmp_path / "other"
    shutil.copytree(exact_folder / "teacher" / "transformer", other)
    file = other / "diffusion_pytorch_model.safetensors"
    save_file({name: 0.9 * t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    teacher = load_pipeline(tmp_path / "teacher", transformer=other)
    generate_trajectories(
        teacher, tmp_path / "store", 4, num_steps=2, teacher_steps=4, height=32, width=32, prompts=PROMPTS, batch_size=4,
        keep="state", progress=False,
    )  # fmt: skip
    train_in(tmp_path, "run", **{**SETTINGS, "max_steps": 2, "transformer": str(other)})
    student = Student.from_pretrained(tmp_path / "run")
    assert student.config.base is not None
    assert student.config.base.transformer == str(other)
    frozen = student.trunk.transformer.transformer_blocks[0].ff.net[0].proj.base_layer.weight
    assert torch.equal(frozen, teacher.network.trunk.transformer.transformer_blocks[0].ff.net[0].proj.weight)
    other.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"trained on top of the transformer .*other, which does not exist"):
        Student.from_pretrained(tmp_path / "run")
    assert torch.equal(
        predictions(Student.from_pretrained(tmp_path / "run", base=tmp_path / "elsewhere")), predictions(student)
    )


@pytest.mark.parametrize(
    ("world", "parallel"), [pytest.param(2, "ddp", marks=pytest.mark.slow), pytest.param(2, "fsdp", marks=pytest.mark.slow)]
)
def test_two_processes_train_what_one_trains(exact_folder: Path, world: int, parallel: str) -> None:
    if not (exact_folder / "one").exists():
        train_in(exact_folder, "one", **SETTINGS)
    assert set(wait(start(exact_folder, parallel, world, None, **{**SETTINGS, "parallel": parallel}))) == {0}
    logs = [read_log(exact_folder / name / "log.jsonl") for name in ("one", parallel)]
    assert len(logs[0]) == len(logs[1]) == SETTINGS["max_steps"]
    for one, two in zip(*logs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    ours, theirs = (load_file(exact_folder / name / "student" / "model.safetensors") for name in ("one", parallel))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 2e-3
    if parallel == "fsdp":
        checkpoint = exact_folder / "fsdp" / "checkpoints" / "step-0000006"
        metadata = FileSystemReader(checkpoint / "shards").read_metadata().state_dict_metadata
        names = {name.removeprefix("model.") for name in metadata if name.startswith("model.")}
        assert names == {name.removeprefix("ema.") for name in metadata if name.startswith("ema.")} == ours.keys()
        consolidate(exact_folder / "fsdp", exact_folder / "consolidated")
        again = load_file(exact_folder / "consolidated" / "model.safetensors")
        assert all(torch.equal(again[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(("world", "parallel"), [(1, "ddp"), (2, "fsdp")])
@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(folder: Path, world: int, parallel: str) -> None:
    settings = {**SETTINGS, "parallel": parallel, "max_steps": 8}
    whole, killed = f"whole-{world}", f"killed-{world}"
    assert set(wait(start(folder, whole, world, None, **settings))) == {0}
    processes = start(folder, killed, world, None, **settings)
    assert signal_at(processes, folder / killed / "log.jsonl", 3) >= 3
    wait(processes)
    assert not (folder / killed / "student").exists()
    assert set(wait(start(folder, killed, world, None, **settings))) == {0}
    assert_same_run(folder / whole, folder / killed)


@pytest.mark.slow
def test_the_adversarial_stage_goes_on_with_the_same_additions(folder: Path) -> None:
    shape = load_pipeline(folder / "teacher").shape_of(32, 32)
    images = torch.randn(12, *shape, generator=torch.Generator().manual_seed(3))
    save_file({"images": images, "labels": torch.arange(12) % 3}, folder / "real.safetensors")
    adversarial = dict(real=str(folder / "real.safetensors"), virtual_batch=2, width=8, warmup_steps=1)
    settings = {**SETTINGS, "lora_rank": None, "max_steps": 4, "stage": "adversarial", "student": str(folder / "run")}
    settings["adversarial"] = adversarial
    train_in(folder, "adversarial", **settings)
    before, after = (Student.from_pretrained(folder / name) for name in ("run", "adversarial"))
    assert after.config.base == before.config.base
    moved = [name for name, t in after.named_parameters() if not torch.equal(t, before.get_parameter(name))]
    assert moved
    assert all(after.get_parameter(name).requires_grad for name in moved)
    assert set(wait(start(folder, "adversarial-fsdp", 2, None, **{**settings, "parallel": "fsdp"}))) == {0}
    ours, theirs = (load_file(folder / name / "student/model.safetensors") for name in ("adversarial", "adversarial-fsdp"))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) < 2e-2
