"""Damaged inputs of every kind that pyard reads, made by a seeded generator.

`build` writes one good input of each kind; `inputs` lists which file of which of them is damaged how; `run` damages a copy and
reads it. Nothing here is random but by the seed, so that any input can be made again:
`python damaged_inputs.py SEED COUNT NUMBER ...`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from damaged_files import Damage
from damaged_targets import TARGETS, Target, damages_of, flag_damage

RECIPE = """teacher: digits
num_trajectories: 64
num_steps: 2
history_layers: 1
max_steps: 3
batch_size: 8
learning_rate: 1.0e-3
stage: adversarial
student: runs/first
adversarial:
  real: digits
  r1: 0.1
lr_schedule: cosine
ema_decay: [0.9, 0.99]
"""


@dataclass(frozen=True)
class Input:
    """One damaged input: a file of a target and what is done to it; or flags of a command."""

    number: int
    target: Target
    file: str
    damage: Damage
    seed: int

    def __str__(self) -> str:
        return f"{self.number}: {self.target.name}/{self.file}: {self.damage.name}"


def build(base: Path) -> None:
    """Write one good input of each kind."""
    from conditions.toy_encoder import build as build_prompts
    from factories import dit_tensors, randomise, tiny_student, tiny_teacher
    from own_teachers import prompts
    from PIL import Image
    from safetensors.torch import save_file
    from tiny_pipelines import _vae, tiny_pipeline
    from training_runs import student_and_real_data, teacher_and_store, train_in
    from trajectories.test_authors_files import write_tree

    import pyard
    from pyard.export import export_onnx
    from pyard.models.student import Student
    from pyard.teachers.diffusers_folder import save_diffusers

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for name in (
        "teacher",
        "student",
        "onnx",
        "checkpoint",
        "safetensors",
        "recipe",
        "pictures",
        "reference",
        "real",
        "vae",
        "texts",
    ):
        (base / name).mkdir(parents=True)
    tiny_teacher().save_pretrained(base / "teacher/teacher")
    tiny_student().save_pretrained(base / "student/student")
    student = Student.from_teacher(
        tiny_teacher(in_channels=1), pyard.TimeGrid.build(tiny_teacher().schedule, 2), history_layers=1
    )
    randomise(student, 1)
    export_onnx(student.eval(), base / "onnx/student.onnx")
    export_onnx(student.eval(), base / "onnx/step.onnx", form="step")
    tensors = dit_tensors()
    torch.save({"ema": tensors, "model": tensors, "args": {"num_classes": 5}}, base / "checkpoint/dit.pt")
    torch.save(tensors, base / "checkpoint/old.pt", _use_new_zipfile_serialization=False)
    save_file(tensors, base / "safetensors/dit.safetensors")
    (base / "safetensors/args.json").write_text(json.dumps({"model": "DiT-S/2", "num_classes": 5}))
    (base / "run").mkdir()
    teacher_and_store(base / "run")
    shutil.copytree(base / "run", base / "stopped")
    shutil.copytree(base / "run/store", base / "store/store")
    student_and_real_data(base / "run")
    stopped = train_in(base / "stopped", "run", max_steps=4, save_every=2)
    for last in (stopped / "student", stopped / "checkpoints/step-0000004"):
        shutil.rmtree(last)
    (base / "recipe/recipe.yaml").write_text(RECIPE)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (12, 10 + i, 3), dtype=np.uint8)).save(base / f"pictures/{i}.png")
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(base / "pictures/3.jpg")
    images = rng.integers(0, 255, (6, 8, 8, 1), dtype=np.uint8)
    np.savez(base / "reference/images.npz", images)
    np.savez_compressed(base / "reference/small.npz", arr_0=images)
    np.savez(base / "reference/statistics.npz", mu=rng.normal(size=128), sigma=np.eye(128))
    labels = np.arange(6) % 5
    np.savez(base / "real/real.npz", images=rng.normal(size=(6, 1, 8, 8)).astype(np.float32), labels=labels)
    save_file({"images": torch.randn(6, 1, 8, 8), "labels": torch.from_numpy(labels)}, base / "real/real.safetensors")
    _vae(scaling_factor=0.5).save_pretrained(base / "vae/vae")
    (base / "texts/prompts.txt").write_text("a red circle\na blue square\n")
    (base / "texts/prompts.jsonl").write_text(
        '{"prompt": "a red circle"}\n{"prompt": "a square", "negative_prompt": "blurry"}\n'
    )
    build_prompts(base / "prompts/table")
    (base / "table/conditions").mkdir(parents=True)
    prompts().save(base / "table/conditions")
    write_tree(base / "tree", steps=range(5))
    tiny_pipeline("pixart_sigma", base / "pipeline/pixart")
    tiny_pipeline("sd3", base / "pipeline/sd3")
    (base / "dit").mkdir()
    network = tiny_teacher(freq_shift=1.0, frequency_size=256, out_channels=4, mlp_norm_eps=1e-6)
    save_diffusers(network, base / "dit/dit")


def inputs(base: Path, seed: int, count: int) -> list[Input]:
    """Damaged inputs in equal shares of files, by weight of their targets; a seventh are flags."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        if rng.random() < 1 / 7:
            name, call = flag_damage(rng)
            target = Target("student", (), call)
            found.append(Input(number, target, name, Damage("flags", lambda path, rng: None, False), rng.randrange(2**32)))
            continue
        target = rng.choices(TARGETS, [target.weight for target in TARGETS])[0]
        files = sorted(
            {str(f.relative_to(base / target.name)) for p in target.files for f in (base / target.name).glob(p) if f.is_file()}
        )
        file = rng.choice([name for name in files if Path(name).name not in (".lock", "README.md")])
        damage = rng.choice(damages_of(file, target))
        found.append(Input(number, target, file, damage, rng.randrange(2**32)))
    return found


def run(base: Path, damaged: Input, folder: Path) -> int | None:
    """Damage a copy and read it; whether code in it was executed is left behind as a folder."""
    os.chdir(folder)
    shutil.copytree(base / damaged.target.name, folder / "input")
    if damaged.target.files:
        damaged.damage.apply(folder / "input" / damaged.file, random.Random(damaged.seed))
    torch.set_num_threads(1)
    return damaged.target.read(folder / "input")


def code_was_executed(folder: Path) -> bool:
    return any(folder.rglob("code-was-executed")) or (folder / "x").exists()


def _one(seed: int, count: int, numbers: Iterable[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        build(base)
        for number in numbers:
            damaged = inputs(base, seed, count)[number]
            print(damaged, file=sys.stderr)
            place = Path(folder) / str(number)
            place.mkdir()
            print(run(base, damaged, place), file=sys.stderr)


if __name__ == "__main__":
    _one(int(sys.argv[1]), int(sys.argv[2]), map(int, sys.argv[3:]))
