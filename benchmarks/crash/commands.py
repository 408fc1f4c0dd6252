"""The commands of the trial, at sizes that take about a second, and what they read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT
from pyard.teachers.network_teacher import NetworkTeacher

# Every second checkpoint stays and no other: which ones are the newest depends on where a signal had one written.
_SAVE = "--save_every 2 --keep_every 2 --keep_last 1 --log_every 1 --progress false"
_TRAIN = f"train --num_steps 3 --history_layers 2 --max_steps 8 --batch_size 8 --learning_rate 0.003 {_SAVE} --out run"


@dataclass(frozen=True)
class Command:
    """A row of the table.

    Args:
        name: what the table calls it.
        lines: one for each process, without `pyard`; `{inputs}` stands for the folder of inputs.
        ranks: gloo processes of a single line.
        before: puts what the command changes into the folder it works in.
        skips: reasons why ways do not apply, by the way.
    """

    name: str
    lines: tuple[str, ...]
    ranks: int = 1
    before: Callable[[Path, Path], None] | None = field(default=None, repr=False)
    skips: Mapping[str, str] = field(default_factory=dict, compare=False)

    def arguments(self, inputs: Path) -> list[list[str]]:
        """The words of each process."""
        return [line.format(inputs=inputs).split() for line in self.lines for _ in range(self.ranks)]


def _parts(inputs: Path, place: Path) -> None:
    for name in ("part1", "part2"):
        shutil.copytree(inputs / name, place / name)


def _former_export(inputs: Path, place: Path) -> None:
    for file in (inputs / "former").iterdir():
        shutil.copyfile(file, place / file.name)
    (place / "notes.txt").write_text("precious", encoding="utf-8")


def _former_folder(inputs: Path, place: Path) -> None:
    shutil.copytree(inputs / "first" / "student", place / "student")
    (place / "student" / "notes.txt").write_text("precious", encoding="utf-8")


_STORE = (
    "trajectories --teacher {inputs}/teacher --num_steps 3 --teacher_steps 6 --batch_size 8 --shard_size 8 --progress false"
)
_TRAINED = f"{_TRAIN} --teacher {{inputs}}/teacher --trajectories {{inputs}}/store"
_ADVERSARIAL = f"{_TRAINED} --stage adversarial --student {{inputs}}/first --adversarial.real {{inputs}}/real.safetensors"
_TEACH = "teach --hidden_size 16 --depth 2 --num_heads 2 --batch_size 8 --progress false"
_TEXT_TEACHER = (
    "teach scenes-text --hidden_size 48 --depth 1 --num_heads 2 --patch_size 8 --text_hidden_size 32 --text_depth 1 "
    "--batch_size 4 --progress false"
)
_TEXT_STORE = (
    "trajectories --teacher {inputs}/text --prompts {inputs}/prompts.txt --num_steps 2 --teacher_steps 4 --batch_size 4 "
    "--shard_size 4 --progress false"
)
_TEXT_TRAIN = (
    "train --teacher {inputs}/text --trajectories {inputs}/text-store --num_steps 2 --history_layers 0 --output jump "
    f"--heads shared --target state --lora_rank 2 --batch_size 4 {_SAVE}"
)
_NOTHING_READ = {"read error": "it reads no file of the user's"}
_EVALUATE = "evaluate --students [{inputs}/small-run] --teacher {inputs}/small"
COMMANDS = (
    Command("trajectories", (f"{_STORE} --count 96 --out store",)),
    Command("trajectories, 2 writers", tuple(f"{_STORE} --count 96 --out store --part {k}/2" for k in (1, 2))),
    Command(
        "teach",
        (f"{_TEACH} --out teacher --max_steps 12 --save_every 2",),
        skips=_NOTHING_READ,
    ),
    Command("teach scenes-text", (f"{_TEXT_TEACHER} --out teacher --max_steps 8 --save_every 2",), skips=_NOTHING_READ),
    Command("trajectories, prompts", (f"{_TEXT_STORE} --count 24 --out store",)),
    Command("train", (_TRAINED,)),
    Command(
        "train, adversarial",
        (f"{_ADVERSARIAL} --adversarial.virtual_batch 4 --adversarial.width 8 --adversarial.warmup_steps 4",),
    ),
    Command("train, LoRA", (f"{_TRAINED} --lora_rank 2",)),
    Command("train, prompts, LoRA", (f"{_TEXT_TRAIN} --max_steps 6 --out run",)),
    Command("train, 2 ranks", (_TRAINED,), ranks=2),
    Command("train, FSDP2", (f"{_TRAINED} --parallel fsdp",), ranks=2),
    Command("export", ("export --student {inputs}/first --onnx student.onnx --external_data true",), before=_former_export),
    Command("export, decoder", ("export --student {inputs}/first --onnx student.onnx --vae {inputs}/vae",)),
    Command("export, prompts", ("export --student {inputs}/text-run --onnx onnx/ --form sampler",)),
    Command("convert", ("convert {inputs}/teacher --out converted --vae {inputs}/vae",)),
    Command("convert --to lora", ("convert {inputs}/text-run --to lora --out lora",)),
    Command("consolidate", ("consolidate --run {inputs}/first --out student",), before=_former_folder),
    Command("merge", ("trajectories merge --stores [{inputs}/part1,{inputs}/part2] --out store --progress false",)),
    Command(
        "merge --move", ("trajectories merge --stores [part1,part2] --out store --move true --progress false",), before=_parts
    ),
    Command("sample", ("sample --student {inputs}/first --out samples.npz",)),
    Command("sample, picture", ("sample --student {inputs}/first --out samples.png",)),
    Command("sample, prompts", ("sample --student {inputs}/text-run --prompts {inputs}/prompts.txt --out samples.npz",)),
    Command(
        "evaluate",
        (f"{_EVALUATE} --count 20 --samples_npz samples.npz --out table.json --progress false",),
    ),
    Command("demo", ("demo --quick true --out demo --progress false",), skips=_NOTHING_READ),
)


def write_inputs(inputs: Path, run: Callable[[str], None]) -> None:
    """Write what the commands read, in seconds.

    Args:
        inputs: the folder; a whole one is left as it is.
        run: runs a line in that folder.
    """
    if (inputs / "whole").exists():
        return
    inputs.mkdir(parents=True, exist_ok=True)
    config = DiTConfig(
        input_size=8, in_channels=2, patch_size=2, hidden_size=32, depth=3, num_heads=2, num_classes=5, frequency_size=32
    )
    network = DiT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    NetworkTeacher(network, NoiseSchedule(kind="flow", prediction="velocity")).save_pretrained(inputs / "teacher")
    images = torch.randn(30, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    save_file({"images": images, "labels": torch.arange(30) % 5}, inputs / "real.safetensors")
    _write_vae(inputs / "vae")
    here = {"inputs": inputs}
    run(f"{_STORE} --count 40 --out store".format(**here))
    for part in (1, 2):
        run(f"{_STORE} --count 64 --out part{part} --part {part}/2".format(**here))
    run(_TRAINED.format(**here).replace("--out run", "--out first").replace("--max_steps 8", "--max_steps 2"))
    run(_TRAINED.format(**here).replace("--out run", "--out other").replace("--max_steps 8", "--max_steps 4"))
    (inputs / "former").mkdir(exist_ok=True)
    run("export --student other --onnx former/student.onnx --external_data true")
    run(f"{_TEACH} --out small --max_steps 10")
    run(
        "train --teacher small --out small-run --num_trajectories 16 --num_steps 2 --teacher_steps 4 --max_steps 2 "
        "--batch_size 8 --progress false"
    )
    run(f"{_TEXT_TEACHER} --out text --max_steps 2")
    (inputs / "prompts.txt").write_text(
        "a red circle\na blue square above a green cross\ntwo small circles\n", encoding="utf-8"
    )
    run(f"{_TEXT_STORE} --count 8 --out text-store".format(**here))
    run(f"{_TEXT_TRAIN} --max_steps 2 --out text-run".format(**here))
    (inputs / "whole").touch()


def _write_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            latent_channels=2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=16,
        )
    vae.save_pretrained(str(folder))
