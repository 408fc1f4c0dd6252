"""LoRAs of students whose base is not the pipeline's own transformer in float32: another one, a LoRA on it, half precision."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from converted_students import (
    LORA,
    SHAPE,
    add_random_lora,
    code_of,
    convert,
    drawn_by_pyard,
    drawn_by_the_card,
    relative,
    student_of,
    train_lora,
)
from safetensors.torch import load_file, save_file
from tiny_pipelines import randomise, tiny_pipeline

from pyard import load_teacher
from pyard.models.student import Student
from pyard.models.student_config import TextSource


@pytest.mark.parametrize("single_file", [False, True])
def test_a_lora_over_a_transformer_of_ones_own_is_used_with_that_one(single_file: bool, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    folder, tuned = tiny_pipeline("sd3", tmp_path / "pipeline"), tmp_path / "tuned"
    randomise(SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer"), 9).save_pretrained(tuned)
    if single_file:
        tuned = tuned / "diffusion_pytorch_model.safetensors"
    teacher: Any = load_teacher(folder, transformer=tuned)
    text = TextSource(teacher.family.pipeline, str(folder), None, teacher.constants(None))
    settings: dict[str, Any] = dict(history_layers=0, output="jump", heads="shared", target="state", share=True)
    student = Student.from_teacher(teacher, teacher.grid(2, None, SHAPE), sample_shapes=[SHAPE], text=text, **settings).eval()
    add_random_lora(student, 3, "lora")
    student.config = dataclasses.replace(student.config, base=teacher.base_source(3, "lora"))
    student.save_pretrained(tmp_path / "run" / "student")
    expected = drawn_by_pyard(student)
    assert convert(tmp_path / "run", "--to", "lora", "--out", tmp_path / "out") == 0
    assert str(tuned) in code_of(tmp_path / "out")
    if not single_file:  # diffusers reads single files of published sizes alone
        assert relative(drawn_by_the_card(tmp_path / "out"), expected) <= 1e-4
    learnt = [tensor for key, tensor in load_file(tmp_path / "run/student/model.safetensors").items() if "lora_" in key]
    written = load_file(tmp_path / "out" / LORA)
    assert all(any(torch.equal(tensor, other) for other in written.values()) for tensor in learnt)


def test_small_additions_to_half_precision_are_written_as_they_were_trained(tmp_path: Path, capsys: Any) -> None:
    """Merged, they would round to nothing; the file has the additions themselves, and they have no error."""
    folder = tiny_pipeline("sd3", tmp_path / "pipeline")
    teacher: Any = load_teacher(folder, dtype="bfloat16")
    text = TextSource(teacher.family.pipeline, str(folder), None, teacher.constants(None))
    settings: dict[str, Any] = dict(history_layers=0, output="jump", heads="shared", target="state", share=True)
    student = Student.from_teacher(teacher, teacher.grid(2, None, SHAPE), sample_shapes=[SHAPE], text=text, **settings).eval()
    add_random_lora(student, 3, "lora")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter *= 1e-3
    student.config = dataclasses.replace(student.config, base=teacher.base_source(3, "lora"))
    student.save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out") == 0
    found = re.search(r"relative error .* base (\S+)\n", capsys.readouterr().out)
    assert found is not None
    assert float(found[1]) < 1e-6
    learnt = {key: tensor for key, tensor in load_file(tmp_path / "student/model.safetensors").items() if "lora_" in key}
    written = load_file(tmp_path / "out" / LORA)
    assert len(written) == len(learnt)
    assert all(any(torch.equal(tensor, other) for other in written.values()) for tensor in learnt.values())


def lora_of_others(folder: Path, out: Path) -> Path:
    """A LoRA of rank 2 for the tiny pipeline of SD3, as its trainer publishes it."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    base = StableDiffusion3Pipeline.from_pretrained(folder).transformer
    base.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"]))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(one for one in base.named_parameters() if "lora" in one[0]):
            parameter.normal_(generator=torch.Generator().manual_seed(number)).mul_(0.2)
    metadata = base.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(base)
    StableDiffusion3Pipeline.save_lora_weights(out, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
    return out / LORA


def additions_in(file: Path) -> dict[str, torch.Tensor]:
    """up @ down of each layer in a LoRA file of rank-many weights."""
    tensors = load_file(file)
    places = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {place.removeprefix("transformer."): tensors[f"{place}.lora_B.weight"] @ tensors[f"{place}.lora_A.weight"]
            for place in places}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lora_of_the_teacher_is_in_the_students_lora(dtype: str, tmp_path: Path) -> None:
    """The file is for the pipeline without that LoRA; half precision must not blur what was trained."""
    folder = tiny_pipeline("sd3", tmp_path / "pipeline")
    theirs = lora_of_others(folder, tmp_path / "theirs")
    teacher: Any = load_teacher(folder, dtype=dtype, lora=theirs)
    text = teacher.text_source()
    settings: dict[str, Any] = dict(history_layers=0, output="jump", heads="shared", target="state", share=True)
    student = Student.from_teacher(teacher, teacher.grid(2, None, SHAPE), sample_shapes=[SHAPE], text=text, **settings).eval()
    add_random_lora(student, 3, "lora")
    student.config = dataclasses.replace(student.config, base=teacher.base_source(3, "lora"))
    student.save_pretrained(tmp_path / "run" / "student")
    trained = {
        key.removeprefix("trunk.transformer.").removesuffix(".lora_A.default.weight"): (
            load_file(tmp_path / "run/student/model.safetensors")[key.replace("lora_A", "lora_B")] @ tensor
        )
        for key, tensor in load_file(tmp_path / "run/student/model.safetensors").items()
        if ".lora_A." in key and key.startswith("trunk.")
    }
    assert convert(tmp_path / "run", "--to", "lora", "--out", tmp_path / "out") == 0
    assert f"contains | {LORA}" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8").replace("**", "")
    found, stock = additions_in(tmp_path / "out" / LORA), load_teacher(folder).network.trunk.transformer.state_dict()  # type: ignore[attr-defined]
    merged = load_teacher(folder, lora=theirs).network.trunk.transformer.state_dict()  # type: ignore[attr-defined]
    assert len(trained) > 10
    for layer, addition in trained.items():
        expected = addition.float() + merged[f"{layer}.weight"] - stock[f"{layer}.weight"]
        error = (found[layer].float() - expected).norm() / expected.norm()
        assert error < (1e-4 if dtype == "float32" else 1e-2)  # LoRAs are read in the weights' precision, as by diffusers
        assert error < 0.1 * addition.float().norm() / expected.norm()
    if dtype == "float32":
        assert relative(drawn_by_the_card(tmp_path / "out"), drawn_by_pyard(student)) <= 1e-4


@pytest.mark.parametrize("how", ["dtype", "transformer"])
def test_an_approximation_is_one_of_what_was_trained(how: str, tmp_path: Path) -> None:
    """Not of the rounding of the weights that training began with, nor of a transformer in place of the pipeline's."""
    from diffusers import SD3Transformer2DModel

    folder, other = tiny_pipeline("sd3", tmp_path / "pipeline"), tmp_path / "tuned"
    randomise(SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer"), 9).save_pretrained(other)
    teacher: Any = load_teacher(folder, **({"dtype": "bfloat16"} if how == "dtype" else {"transformer": other}))
    settings: dict[str, Any] = dict(history_layers=0, output="jump", heads="shared", target="state", text=teacher.text_source())
    student = Student.from_teacher(teacher, teacher.grid(2, None, SHAPE), sample_shapes=[SHAPE], **settings).float().eval()
    generator = torch.Generator().manual_seed(1)
    weights = {name: parameter for name, parameter in student.trunk.named_parameters() if name.endswith("attn.to_q.weight")}
    trained = {name: 1e-3 * torch.randn(w.shape[0], 1, generator=generator) @ torch.randn(1, w.shape[1], generator=generator)
               for name, w in weights.items()}  # fmt: skip
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter += trained[name]
    student.save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", "lora", "--out", tmp_path / "out", "--rank", 1) == 0
    found = additions_in(tmp_path / "out" / LORA)
    assert found.keys() == {name.removeprefix("transformer.").removesuffix(".weight") for name in trained}
    for name, expected in trained.items():
        addition = found[name.removeprefix("transformer.").removesuffix(".weight")]
        torch.testing.assert_close(addition, expected, rtol=1e-3, atol=1e-6)
    assert (str(other) in code_of(tmp_path / "out")) == (how == "transformer")


@pytest.mark.parametrize("kind", ["lora", "transformer"])
def test_additions_to_a_base_in_bfloat16(kind: str, tmp_path: Path) -> None:
    folder = tiny_pipeline("z_image", tmp_path / "pipeline")
    student = train_lora(student_of(folder, 2).bfloat16())
    student.heads.float()  # as training leaves them
    student.save_pretrained(tmp_path / "student")
    assert convert(tmp_path / "student", "--to", kind, "--out", tmp_path / "out") == 0
    file = tmp_path / "out" / (LORA if kind == "lora" else "diffusion_pytorch_model.safetensors")
    tensors = load_file(file)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    if kind == "lora":
        assert {min(tensor.shape) for tensor in tensors.values()} == {2}
    assert "torch_dtype=torch.bfloat16" in code_of(tmp_path / "out")
    expected = drawn_by_pyard(Student.from_pretrained(tmp_path / "student").bfloat16()).float()
    assert relative(drawn_by_the_card(tmp_path / "out").float(), expected) <= 0.05


def lora_student(folder: Path, lora: Path, out: Path) -> Student:
    """A student with trained additions over a teacher that was read with a LoRA, saved in a run's folder."""
    teacher: Any = load_teacher(folder, lora=lora)
    settings: dict[str, Any] = dict(history_layers=0, output="jump", heads="shared", target="state", share=True)
    grid, text = teacher.grid(2, None, SHAPE), teacher.text_source()
    student = Student.from_teacher(teacher, grid, sample_shapes=[SHAPE], text=text, **settings).eval()
    add_random_lora(student, 3, "lora")
    student.config = dataclasses.replace(student.config, base=teacher.base_source(3, "lora"))
    student.save_pretrained(out / "student")
    return student


def pixart_adapter(folder: Path, out: Path, **settings: Any) -> Path:
    """A PEFT adapter of rank 2 for the tiny PixArt, whose additions are small beside the weights."""
    from diffusers import PixArtTransformer2DModel
    from peft import LoraConfig, get_peft_model

    base = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    torch.manual_seed(0)  # of PEFT's lora_A
    adapted = get_peft_model(base, LoraConfig(r=2, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    adapted.save_pretrained(out)
    return out


def lokr_file(folder: Path, out: Path) -> Path:
    """A LoKr of ai-toolkit for the tiny Z-Image: Kronecker products of matrices of full rank."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"diffusion_model.layers.{layer}.attention.to_{each}.{name}": 0.1 * torch.randn(size, size, generator=generator)
        for layer in range(3)
        for each in "qkv"
        for name, size in (("lokr_w1", 4), ("lokr_w2", 8))
    }
    save_file(tensors, out)
    return out


def test_an_adapter_on_all_linear_layers_is_in_the_students_lora(tmp_path: Path) -> None:
    """The targets of PixArt's published training script but for the patch embedding, a convolution."""
    folder = tiny_pipeline("pixart_alpha", tmp_path / "pipeline")
    targets = ["to_k", "to_q", "to_v", "to_out.0", "proj_out", "ff.net.0.proj", "ff.net.2", "linear", "linear_1", "linear_2"]
    adapter = pixart_adapter(folder, tmp_path / "adapter", target_modules=targets)
    student = lora_student(folder, adapter, tmp_path / "run")
    assert convert(tmp_path / "run", "--to", "lora", "--out", tmp_path / "out") == 0
    expected = drawn_by_pyard(student)
    assert relative(drawn_by_the_card(tmp_path / "out"), expected) <= 1e-4
    plain = lora_student(folder, pixart_adapter(folder, tmp_path / "less", target_modules=["to_k"]), tmp_path / "other")
    assert relative(drawn_by_pyard(plain), expected) > 1e-2


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("lokr", r"layers\.0\.attention\.to_q \(lokr\.Linear\)"),
        ("convolution", r"pos_embed\.proj \(lora\.Conv2d\)"),
        ("dora", r"attn1\.to_q \(Dora"),
        ("bias", r"\.bias"),
        ("whole layers", r"proj_out \(all of its weights\)"),
    ],
)
def test_a_lora_of_the_teacher_that_no_low_rank_addition_expresses_is_refused(
    kind: str, named: str, tmp_path: Path, capsys: Any
) -> None:
    """As a teacher it is read, and a transformer of one's own holds it."""
    folder = tiny_pipeline("z_image" if kind == "lokr" else "pixart_alpha", tmp_path / "pipeline")
    settings: dict[str, dict[str, Any]] = {
        "convolution": dict(target_modules=["to_q", "proj"]),
        "dora": dict(target_modules=["attn1.to_q"], use_dora=True),
        "bias": dict(target_modules=["to_q"], bias="all"),
        "whole layers": dict(target_modules=["to_q"], modules_to_save=["proj_out"]),
    }
    if kind == "lokr":
        lora = lokr_file(folder, tmp_path / "lokr.safetensors")
    else:
        lora = pixart_adapter(folder, tmp_path / "adapter", **settings[kind])
    student = lora_student(folder, lora, tmp_path / "run")
    capsys.readouterr()
    assert convert(tmp_path / "run", "--to", "lora", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(rf"the teacher's LoRA {re.escape(str(lora))} changes \S*{named}.* use --to transformer\n", error)
    assert not (tmp_path / "out").exists()
    assert convert(tmp_path / "run", "--to", "transformer", "--out", tmp_path / "out") == 0
    assert relative(drawn_by_the_card(tmp_path / "out"), drawn_by_pyard(student)) <= 1e-4
