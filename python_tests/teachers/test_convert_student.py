"""Students as what diffusers loads: the stock pipeline, set up by the model card's own lines, draws what pyard draws."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import randomise, tiny_pipeline
from torch import nn
from torch.nn.functional import pixel_unshuffle

from pyard import load_teacher
from pyard.cli.command_line import main
from pyard.models.codec import LatentCodec
from pyard.models.lora import add_lora, merge_lora
from pyard.models.student import Student
from pyard.models.student_config import TextSource
from pyard.sampling.prompts import condition_of_prompts

NAMES = ("pixart_alpha", "pixart_sigma", "sd3", "aura_flow", "flux", "flux2_klein", "qwen_image", "z_image")
PROMPT = "a red circle above a blue square"
SHAPE = (4, 8, 12)
LORA = "pytorch_lora_weights.safetensors"


def convert(*words: str | Path | int) -> int:
    return main(["convert", *map(str, words)])


def student_of(folder: Path, steps: int, teacher_steps: int | None = None, **settings: Any) -> Student:
    """An untrained student of a pipeline for 32 x 48 pixels."""
    teacher: Any = load_teacher(folder)
    grid = teacher.grid(steps, teacher_steps, SHAPE)
    text = TextSource(teacher.family.pipeline, str(folder), None, teacher.constants(None))
    settings = {"history_layers": 0, "output": "jump", "heads": "shared", "target": "state", **settings}
    return Student.from_teacher(teacher, grid, sample_shapes=[SHAPE], text=text, **settings).eval()


def train_in_full(student: Student) -> Student:
    """Move every weight."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    return student


def train_lora(student: Student, rank: int = 2) -> Student:
    """Move every matrix of the blocks by a matrix of this rank."""
    add_random_lora(student, rank)
    merge_lora(student)
    return student


def add_random_lora(student: Student, rank: int, heads: Any = "whole") -> Student:
    """Low-rank additions that are not zero, as they are after training."""
    add_lora(student, rank, heads)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return student


def noise() -> torch.Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def drawn_by_pyard(student: Student) -> torch.Tensor:
    *_, last = student.rollout(noise(), condition_of_prompts(student, [PROMPT]))
    return last


def code_of(folder: Path) -> str:
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@torch.no_grad()
def drawn_by_the_card(folder: Path) -> torch.Tensor:
    """What the card's lines draw from `noise`, unpacked: the same lines, told to start there and to stop before the VAE."""
    code = code_of(folder)
    assert code.count(").images[0]") == 1
    is_flux2 = "Flux2" in code
    packs = ("Flux" in code or "Qwen" in code) and not is_flux2
    start = pixel_unshuffle(noise(), 2).flatten(2).transpose(1, 2) if packs else noise()
    start = pixel_unshuffle(start, 2) if is_flux2 else start
    code = code.replace(").images[0]", ', latents=start, output_type="latent").images')
    names: dict[str, Any] = {"start": start}
    exec(code, names)
    latents: torch.Tensor = names["image"]
    if packs:
        latents = nn.functional.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (SHAPE[1] // 2, SHAPE[2] // 2)), 2)
    if is_flux2:  # its latents are those of the VAE
        latents = LatentCodec(names["pipe"].vae).scaling().from_vae(latents)
    return latents


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


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
