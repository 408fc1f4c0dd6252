"""`pyard evaluate --prompts`, on students of tiny random text-to-image pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import randomise, tiny_student
from PIL import Image
from tiny_pipelines import randomise as randomised
from tiny_pipelines import tiny_pipeline
from tiny_tokenizers import clip_tokenizer

import pyard
from pyard.cli.command_line import main
from pyard.conditions import PromptTable
from pyard.diffusion.noise import standard_normal
from pyard.evaluation.candidates import over_teacher
from pyard.evaluation.clip_score import ClipFolder
from pyard.evaluation.evaluate_students import usual_batch_size
from pyard.models.student import Student
from pyard.teachers import load_teacher
from pyard.teachers.guidance import endpoints
from pyard.teachers.text_to_image.outline import pipeline_outline
from pyard.teachers.text_to_image.teacher import PipelineTeacher

PROMPTS = ["a red circle", "a large green square above a circle", "the blue square"]


def student_of(name: str, folder: Path, dtype: str = "float32") -> Path:
    """A run folder's student of the tiny pipeline `name`, all weights random, in `folder`/run; its store is there too."""
    pipeline = tiny_pipeline(name, folder / "pipeline")
    pyard.generate_trajectories(
        pipeline, folder / "store", 4, num_steps=2, teacher_steps=4, height=32, width=32, prompts=["a circle", "a square"],
        keep="state", batch_size=2, precision=dtype, progress=False,
    )  # fmt: skip
    pyard.train(
        pipeline, folder / "store", out=folder / "run", batch_size=2, max_steps=2, heads="shared", learning_rate=1e-3,
        progress=False, num_steps=2,
    )  # fmt: skip
    return folder / "run"


def clip_folder(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
        ),
        projection_dim=6,
    )  # fmt: skip
    randomised(CLIPModel(config), 1).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(str(folder))
    return folder


def teacher_with(prompts: PromptTable, folder: Path) -> PipelineTeacher:
    from pyard.teachers import load_teacher

    teacher = load_teacher(folder)
    assert isinstance(teacher, PipelineTeacher)
    return teacher.with_prompts(prompts)


@pytest.mark.parametrize("name", ["pixart_sigma", "sd3", "flux"])
def test_numbers_are_those_of_samples_and_endpoints(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the public samplers: solver, times and guidance are those of the trajectories, which no flag repeats."""
    run = student_of(name, tmp_path)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "quality.json"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    words = ["--students", str(run), "--prompts", str(prompts), "--out", str(out), "--count", "5", "--batch-size", "2"]
    assert main(["evaluate", *words]) == 0
    assert "endpoint MSE" in capsys.readouterr().out
    content = json.loads(out.read_text())
    of_teacher, of_student = content["rows"]

    numbers = np.arange(5) % 3
    student = Student.from_pretrained(run)
    table = PromptTable(tmp_path / "quality")
    teacher = teacher_with(table, tmp_path / "pipeline")
    noise = torch.from_numpy(standard_normal(1000, np.arange(5), student.sample_shape))
    manifest = json.loads((run / "train.json").read_text())["manifest"]
    assert (manifest["cfg_scale"] == 1) == (name == "flux")
    ends = endpoints(
        teacher, noise, torch.from_numpy(numbers), student.config.grid.visits(teacher.schedule),
        cfg_scale=manifest["cfg_scale"], solver=manifest["solver"],
    )  # fmt: skip
    drawn = pyard.sample(student, prompts=[PROMPTS[i] for i in numbers], seed=1000, latents=True)
    assert of_student["endpoint_mse"] == pytest.approx(float((drawn - ends).square().mean()), rel=1e-3)
    assert of_student["endpoint_mse"] > 1e-3
    assert of_teacher["endpoint_mse"] == 0
    assert [row["network_passes"] for row in content["rows"]] == [4 if name == "flux" else 8, 2]
    assert content["settings"]["prompts"] == 3
    assert content["settings"]["cfg_scale"] == manifest["cfg_scale"]

    # One row of the sheet for each prompt; the student's picture of the first one is where it belongs.
    sheet = np.asarray(Image.open(tmp_path / "quality.png"))
    assert sheet.shape == (28 + 3 * 260, 224 + 2 * 260, 3)
    assert student.codec is not None
    picture = student.codec.decode(drawn[:1]).clamp(-1, 1)[0].permute(1, 2, 0).numpy()
    shown = sheet[28 : 28 + 256 : 8, 224 + 260 : 224 + 260 + 256 : 8]  # each pixel of 32 x 32 is 8 x 8 there
    assert np.abs(shown.astype(float) - (127.5 * picture + 127.5)).max() <= 2

    # The embeddings are used again; those of other prompts are not written over them.
    again = pyard.evaluate(run, prompts=prompts, out=out, count=5, batch_size=2, progress=False)
    assert again.rows[1].endpoint_mse == of_student["endpoint_mse"]
    with pytest.raises(pyard.InputError, match="prompt"):
        pyard.evaluate(run, prompts=["a circle"], out=out, progress=False)


@pytest.mark.parametrize("place", ["run/student", pytest.param("pipe", marks=pytest.mark.slow)])
def test_the_teacher_is_read_as_for_the_trajectories_wherever_the_student_is(place: str, tmp_path: Path) -> None:
    student_of("sd3", tmp_path, "bfloat16")
    if place == "pipe":
        pyard.ARDPipeline.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "pipe")
    else:
        place = str((tmp_path / place).rename(tmp_path / "student").name)
    found = pyard.evaluate([str(tmp_path / place)], prompts=PROMPTS, count=3, progress=False)
    assert found.rows[0].name.startswith("teacher")
    assert found.rows[1].endpoint_mse > 0


def test_clip_scores_and_distances(tmp_path: Path) -> None:
    run, clip = student_of("sd3", tmp_path, dtype="bfloat16"), clip_folder(tmp_path / "clip")
    found = pyard.evaluate(run, prompts=PROMPTS, clip=clip, count=6, batch_size=4, progress=False)
    student = Student.from_pretrained(run)
    assert student.codec is not None
    pictures = pyard.sample(student, prompts=PROMPTS * 2, seed=1000).clamp(-1, 1).numpy()
    network = ClipFolder(clip)
    features = network.features(pictures)
    texts = network.text_features(PROMPTS * 2)
    expected = 100 * np.maximum(np.einsum("ne,ne->n", features, texts), 0)
    assert features.shape == (6, 6)
    assert found.rows[1].clip_score == pytest.approx(expected.mean(), rel=0.02)
    assert found.rows[0].clip_score is not None
    assert found.rows[0].clip_score != found.rows[1].clip_score
    assert found.rows[1].frechet_to_teacher is not None
    assert found.rows[1].frechet_to_teacher > 0
    assert found.settings["features"] == "CLIP clip"
    assert "CLIP score" in found.table()


def test_clip_is_that_of_transformers(tmp_path: Path) -> None:
    """Against CLIPModel's own logits, of prompts one of which is longer than CLIP's limit."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    clip = clip_folder(tmp_path / "clip")
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 24), dtype=np.uint8)
    texts = ["a red circle", "a blue square above " * 40]
    inputs: dict[str, Any] = dict(
        CLIPTokenizer.from_pretrained(clip)(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    )
    processor = CLIPImageProcessorPil.from_pretrained(clip)
    inputs |= processor(images=[Image.fromarray(p.transpose(1, 2, 0)) for p in pictures], return_tensors="pt")
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        cosines = (model(**inputs).logits_per_image / model.logit_scale.exp()).diagonal().numpy()
    network = ClipFolder(clip)
    scores = network.scores(network.features(pictures), texts)
    np.testing.assert_allclose(scores, 100 * np.maximum(cosines, 0), atol=1e-3)
    assert scores.max() > 0


def test_wrong_input_is_refused_before_any_work(tmp_path: Path) -> None:
    run, out = student_of("pixart_sigma", tmp_path), tmp_path / "quality.json"
    of_classes = tiny_student(2)
    randomise(of_classes)
    of_classes.eval().save_pretrained(tmp_path / "classes")
    calls: list[tuple[Any, dict[str, Any], str]] = [
        (run, {}, r"run draws from prompts: give --prompts"),
        (tmp_path / "classes", {"prompts": PROMPTS}, "which .*classes is not"),
        ([str(run), str(tmp_path / "classes")], {"prompts": PROMPTS}, "which .*classes is not"),
        (tmp_path / "classes", {"clip": tmp_path}, "clip compares pictures with prompts"),
        (
            run,
            {"prompts": PROMPTS, "clip": tmp_path / "nowhere"},
            "nowhere: expected .* CLIP model.*no such folder",
        ),
        (run, {"prompts": PROMPTS, "clip": tmp_path / "pipeline"}, "no config.json, no preprocessor_config.json"),
        (run, {"prompts": tmp_path / "missing.txt"}, "missing.txt does not exist"),
        (run, {"prompts": PROMPTS, "teacher": tmp_path / "gone"}, "gone does not exist"),
        (run, {"prompts": PROMPTS, "labels": "random"}, "prompts are taken in turn"),
        (run, {"prompts": PROMPTS, "cfg_scale": 2.0}, "leave --cfg_scale out"),
        ([str(run), str(run)], {"prompts": PROMPTS}, "two students have the same name"),
    ]
    for students, settings, message in calls:
        with pytest.raises(pyard.InputError, match=message):
            pyard.evaluate(students, **{"out": out, "progress": False, **settings})
    assert not out.exists()
    assert not (tmp_path / "quality").exists()


def test_the_base_of_a_lora_student_is_in_memory_once(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd3", tmp_path / "pipeline")
    settings: dict[str, Any] = dict(num_steps=2, teacher_steps=4, keep="state", prompts=PROMPTS, progress=False)
    pyard.generate_trajectories(pipeline, tmp_path / "store", 4, precision="bfloat16", **settings)
    how: dict[str, Any] = dict(lora_rank=2, batch_size=2, max_steps=2, num_steps=2, learning_rate=0.1, progress=False)
    student = pyard.train(pipeline, tmp_path / "store", out=tmp_path / "run", **how)
    teacher = load_teacher(pipeline, dtype="bfloat16")
    shared = over_teacher(student, tmp_path / "run", teacher)
    assert isinstance(shared, Student)
    assert shared is not student
    mine = {parameter.data_ptr() for parameter in shared.parameters()}
    theirs = [parameter for parameter in teacher.network.trunk.parameters() if parameter.ndim > 1]
    assert sum(parameter.data_ptr() in mine for parameter in theirs) >= 0.9 * len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), shared.state_dict().values(), strict=True))
    # Another base, such as the same weights in another precision, is not the teacher's; nor are students that a caller holds.
    assert over_teacher(student, tmp_path / "run", load_teacher(pipeline)) is student
    assert over_teacher(student, student, teacher) is student


@pytest.mark.parametrize(("side", "expected"), [(1024, 16), (512, 128)])
def test_large_pictures_are_drawn_in_smaller_batches(side: int, expected: int) -> None:
    outline = pipeline_outline("sd3.5-medium")
    assert usual_batch_size(outline.network.trunk, [], outline.shape_of(side, side)) == expected


def test_less_memory_means_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    student = tiny_student(2, history_layers=1)
    assert usual_batch_size(student.trunk, [student], student.sample_shape) == 128
    monkeypatch.setattr("pyard.sampling.inference.free_memory", lambda device: 10**6)
    assert 1 <= usual_batch_size(student.trunk, [student], student.sample_shape) < 32
