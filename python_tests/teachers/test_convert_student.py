"""Students as what diffusers loads: the stock pipeline, set up by the model card's own lines, draws what pyard draws."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_students import (
    LORA,
    add_random_lora,
    code_of,
    convert,
    drawn_by_pyard,
    drawn_by_the_card,
    relative,
    student_of,
    train_lora,
)
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline

from pyard import load_teacher
from pyard.models.student import Student

NAMES = ("pixart_alpha", "pixart_sigma", "sd3", "aura_flow", "flux", "flux2_klein", "qwen_image", "z_image")


def train_in_full(student: Student) -> Student:
    """Move every weight."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return student


class Records(logging.Handler):
    """Warnings of diffusers and PEFT, which do not reach the root logger."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())

    def __enter__(self) -> Records:
        for name in ("diffusers", "peft"):
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *args: object) -> None:
        for name in ("diffusers", "peft"):
            logging.getLogger(name).removeHandler(self)


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_stock_pipeline_draws_with_the_transformer(name: str, steps: int, tmp_path: Path) -> None:
    folder = tiny_pipeline(name, tmp_path / "pipeline")
    untrained = student_of(folder, steps)
    before = drawn_by_pyard(untrained)
    student = train_in_full(untrained)
    student.save_pretrained(tmp_path / "run" / "student")
    assert convert(tmp_path / "run", "--to", "transformer", "--out", tmp_path / "out") == 0
    expected = drawn_by_pyard(student)
    assert relative(expected, before) > 1e-2
    assert relative(drawn_by_the_card(tmp_path / "out"), expected) <= 1e-4


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_the_stock_pipeline_draws_with_the_lora(name: str, steps: int, tmp_path: Path) -> None:
    folder = tiny_pipeline(name, tmp_path / "pipeline")
    before = drawn_by_pyard(student_of(folder, steps))
    student = train_lora(student_of(folder, steps))
    student.save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out") == 0
    expected = drawn_by_pyard(student)
    assert relative(expected, before) > 1e-2
    with Records() as records:
        found = drawn_by_the_card(tmp_path / "out")
    # Pipelines that can load a LoRA of text encoders, too, say of every LoRA that has none that it has none.
    others = [line for line in records.found if not re.match(r"No LoRA keys .* prefix='text_encoder(_2)?'", line)]
    assert [line for line in others if "clean_caption" not in line] == []  # beautifulsoup4, which is not installed
    assert relative(found, expected) <= 1e-4
    if name.startswith("pixart"):
        assert not (tmp_path / "out" / LORA).exists()
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    else:
        tensors = load_file(tmp_path / "out" / LORA)
        assert all(re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", key) for key in tensors)
    assert {min(tensor.shape) for tensor in tensors.values()} == {2}


@pytest.mark.parametrize(("name", "heads"), [*((name, "lora") for name in NAMES), ("sd3", "frozen")])
def test_what_a_lora_run_trained_becomes_the_same_lora(name: str, heads: Any, tmp_path: Path) -> None:
    folder = tiny_pipeline(name, tmp_path / "pipeline")
    student = add_random_lora(student_of(folder, 2, share=True), 3, heads)
    teacher: Any = load_teacher(folder)
    student.config = dataclasses.replace(student.config, base=teacher.base_source(3, heads))
    student.save_pretrained(tmp_path / "run" / "student")
    trained = load_file(tmp_path / "run" / "student" / "model.safetensors")
    expected = drawn_by_pyard(student)
    folder = folder.rename(tmp_path / "moved")
    words = ("--to", "lora", "--out", tmp_path / "out", "--pipeline", folder)
    assert convert(tmp_path / "run", *words) == 0
    assert relative(drawn_by_the_card(tmp_path / "out"), expected) <= 1e-4
    # PixArt's output layer has other rows than the pipeline's, so its addition is found anew.
    pixart = name.startswith("pixart")
    file = "adapter_model.safetensors" if pixart else LORA
    written = load_file(tmp_path / "out" / file)
    learnt = [tensor for key, tensor in trained.items() if "lora_" in key and not (pixart and key.startswith("heads."))]
    assert learnt
    assert all(any(torch.equal(tensor, other) for other in written.values()) for tensor in learnt)


def test_layers_trained_in_full_are_no_lora_unless_an_approximation_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_pipeline("sd3", tmp_path / "pipeline")
    student = student_of(folder, 2)
    with torch.no_grad():
        for name, parameter in student.trunk.named_parameters():
            if name.endswith("attn.to_q.weight"):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    student.save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has rank 24 in transformer_blocks." in error
    assert "(24 x 24), so it was trained in full" in error
    said = re.search(r"--rank (\d+) leaves (\d+)% of the difference out", error)
    assert said is not None
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out", "--rank", said[1]) == 0
    found = re.search(r"relative error .* (0\.\d+)", capsys.readouterr().out)
    assert found is not None
    assert 0.1 < float(found[1]) < 1
    assert float(found[1]) == pytest.approx(int(said[2]) / 100, abs=0.06)
    # The error is that of the file.
    base = load_teacher(folder).network.trunk.transformer.state_dict()  # type: ignore[attr-defined]
    lora, left, whole = load_file(tmp_path / "out" / LORA), 0.0, 0.0
    for name, tensor in student.trunk.transformer.state_dict().items():  # type: ignore[union-attr]
        difference = tensor - base[name]
        whole += float(difference.square().sum())
        key = f"transformer.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in lora:
            difference = difference - lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]
        left += float(difference.square().sum())
    assert (left / whole) ** 0.5 == pytest.approx(float(found[1]), rel=0.1)


def test_output_layers_trained_in_full_are_refused_for_their_biases(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_pipeline("pixart_sigma", tmp_path / "pipeline")
    student = train_lora(student_of(folder, 2), rank=1)
    with torch.no_grad():
        student.heads[0].proj_out.weight += 0.1 * torch.randn(student.heads[0].proj_out.weight.shape)  # type: ignore[operator, union-attr]
    student.save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out") == 0
    assert relative(drawn_by_the_card(tmp_path / "out"), drawn_by_pyard(student)) <= 1e-4
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors["base_model.model.proj_out.lora_A.weight"]) > 1
    with torch.no_grad():
        student.heads[0].proj_out.bias += 0.1  # type: ignore[operator, union-attr]
    student.save_pretrained(tmp_path / "student")
    capsys.readouterr()
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "other") == 2
    assert "proj_out.bias of the student also differs from its base: use --to transformer" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_other_students_are_refused_in_one_line_that_names_what_differs(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_pipeline("z_image", tmp_path / "pipeline")
    student_of(folder, 2, history_layers=2, output="direct", heads="per_step", target="denoised").save_pretrained(
        tmp_path / "student"
    )
    capsys.readouterr()  # transformers may have drawn a progress bar
    for kind in ("lora", "transformer"):
        assert convert(tmp_path / "student", "--to", kind, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "a student with history_layers 2, output direct, heads per_step, target denoised, which stock" in error
        assert "with --history_layers 0 --output jump --heads shared --target state" in error
    assert not (tmp_path / "out").exists()
    student_of(folder, 2).save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out") == 2
    assert "no matrix of the student differs" in capsys.readouterr().err
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out", "--pipeline", tmp_path / "none") == 2
    assert "which does not exist; restore it, or give another copy of that pipeline: --pipeline" in capsys.readouterr().err
    assert convert(tmp_path / "student", "--to", "transformer", "--out", tmp_path / "student") == 2
    assert "holds a Student; choose another folder" in capsys.readouterr().err
    assert convert(tmp_path / "student", "--to", "transformer", "--out", tmp_path / "out", "--rank", 2) == 2
    assert "rank is for --to lora" in capsys.readouterr().err


def test_foreign_files_stay_and_those_of_another_conversion_go(tmp_path: Path) -> None:
    folder = tiny_pipeline("flux", tmp_path / "pipeline")
    train_lora(student_of(folder, 2)).save_pretrained(tmp_path / "student")
    assert convert("--source", tmp_path / "student", "--to", "lora", "--out", tmp_path / "out") == 0
    (tmp_path / "out" / "mine.txt").write_text("kept", encoding="utf-8")
    assert convert(tmp_path / "student", "--to", "transformer", "--out", tmp_path / "out") == 0
    assert "from_pretrained(" in code_of(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("# Mine", encoding="utf-8")
    assert convert(tmp_path / "student", "--to", "transformer", "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "# Mine"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"mine.txt", "README.md", "scheduler", "config.json", "diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize(
    ("name", "steps", "teacher_steps", "passed"),
    [("sd3", 4, 10, "sigmas"), ("sd3", 4, 8, "sigmas"), ("flux", 4, 8, None), ("flux", 4, 10, "sigmas"), ("flux", 1, 8, None),
     ("qwen_image", 2, 8, None), ("qwen_image", 4, 8, "sigmas"), ("z_image", 4, 10, "sigmas"), ("z_image", 3, 9, None),
     ("pixart_sigma", 4, 8, None), ("pixart_sigma", 4, 10, "timesteps")],
)  # fmt: skip
def test_times_that_no_stock_spacing_has_are_passed(
    name: str, steps: int, teacher_steps: int, passed: str | None, tmp_path: Path
) -> None:
    folder = tiny_pipeline(name, tmp_path / "pipeline")
    student = train_in_full(student_of(folder, steps, teacher_steps))
    student.save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "transformer", "--out", tmp_path / "out") == 0
    assert re.findall(r"\b(sigmas|timesteps)=", code_of(tmp_path / "out")) == ([] if passed is None else [passed])
    assert relative(drawn_by_the_card(tmp_path / "out"), drawn_by_pyard(student)) <= 1e-4


@pytest.mark.parametrize(("teacher_steps", "exact"), [(8, True), (10, False)])
def test_a_flow_whose_network_is_told_whole_thousandths(teacher_steps: int, exact: bool, tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    folder = tiny_pipeline("sd3", tmp_path / "pipeline")
    DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    student = train_in_full(student_of(folder, 4, teacher_steps))
    grid = student.config.grid
    assert grid.embed_times != grid.times[:-1]
    student.save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "transformer", "--out", tmp_path / "out") == 0
    # The pipeline itself cannot be loaded with another class of scheduler than its index names.
    index = folder / "model_index.json"
    text = index.read_text(encoding="utf-8").replace("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler")
    index.write_text(text, encoding="utf-8")
    error = relative(drawn_by_the_card(tmp_path / "out"), drawn_by_pyard(student))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("passed rounded times to the network" in card) != exact
    assert error <= 1e-4 if exact else 1e-6 < error < 1e-1


def test_the_card_draws_a_picture_as_it_stands(tmp_path: Path) -> None:
    folder = tiny_pipeline("flux", tmp_path / "pipeline")
    train_lora(student_of(folder, 2)).save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out") == 0
    names: dict[str, Any] = {}
    exec(code_of(tmp_path / "out"), names)
    assert names["image"].size == (48, 32)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "sampler `euler`, 2 steps, cfg 1, FluxGuidance 3.5; sigmas 1, 0." in card
    assert "rank 2, 34 layers" in card
