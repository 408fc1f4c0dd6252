"""The tutorials on LoRA and on shipping: their commands and code run, on tiny stand-ins of the same format."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import AutoencoderKL
from evaluation.feature_files import SmallInception, save_torchscript
from factories import digits_student, randomise
from PIL import Image
from tiny_pipelines import tiny_pipeline

from pyard.cli.command_line import main
from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT
from pyard.teachers.dit_checkpoint import save_checkpoint
from pyard.teachers.network_teacher import NetworkTeacher

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(line: str, *more: str) -> None:
    command, _, file = line.partition(" > ")
    name, *words = shlex.split(command)
    assert name == "pyard"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if file else contextlib.nullcontext():
        assert main([*words, *more]) == 0, line
    if file:
        Path(file).write_text(printed.getvalue(), encoding="utf-8")


@pytest.mark.slow
def test_the_page_on_lora_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pipeline("sd3", tmp_path / "stable-diffusion-3.5-medium")
    Path("prompts.txt").write_text("a red circle\na green square\n", encoding="utf-8")
    Path("held-out.txt").write_text("a blue circle\na red square\n", encoding="utf-8")
    smaller = "--num_trajectories none --lora_rank 2 --batch_size 2 --gradient_accumulation 1 --max_steps 2"
    more = {"trajectories": ["--batch_size", "2"], "train": smaller.split()}
    for line in "".join(blocks("lora-four-steps.md", "bash")).splitlines():
        command = shlex.split(line)[1]
        # The scale of the recipe, and CLIP, are not on this machine.
        line = line.replace("50000", "4").replace("--count 500", "--count 2").replace("--clip clip-vit-large-patch14 ", "")
        run(line, *more.get(command, []))
        if command == "train":
            names: dict[str, Any] = {}
            exec("".join(blocks("lora-four-steps.md", "python")), names)
            assert names["image"].size == (32, 32)
    assert list(Path("sd35-4-steps").glob("*lora*.safetensors"))
    assert "load_lora_weights" in Path("sd35-4-steps/README.md").read_text(encoding="utf-8")
    card = Path("runs/sd35-lora/student/README.md").read_text(encoding="utf-8")
    assert "## Scores" in card
    assert "rank 2" in card


@pytest.mark.slow
def test_the_page_on_shipping_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digits_student().save_pretrained("run/student")
    for line in "".join(blocks("ship-it.md", "bash")).splitlines():
        # An untrained student may round worse than the bound for trained ones.
        run(line, *(["--parity-bound", "2"] if "int8" in line else []))
    names: dict[str, Any] = {}
    exec("".join(blocks("ship-it.md", "python")), names)
    assert names["images"].shape == (3, 1, 8, 8)
    assert {file.name for file in tmp_path.glob("*.onnx")} == {
        "digits.onnx",
        "step.onnx",
        "digits-fp16.onnx",
        "digits-int8.onnx",
    }


@pytest.mark.slow
def test_the_page_on_dit_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint to scores against a folder of pictures, with a network, a VAE and a feature network of a few layers."""
    monkeypatch.chdir(tmp_path)
    write_dit_files()
    smaller = [("torchrun --nproc-per-node 8 -m ", ""), ("262144", "8"), ("50000", "16"), ("--batch-size 64", "--batch-size 8")]
    smaller += [("207,360,387", "0,1,2"), ("--precision bfloat16 ", "")]
    # The recipe is for a network of 28 layers and GPUs; the page says how to leave it to the store and the network.
    own = "--num-trajectories none --history-layers none --trajectory-precision none --max-steps 2 --batch-size 4"
    more = {"train": f"{own} --mixed-precision no --evaluate-every 0".split(), "trajectories": ["--batch-size", "4"]}
    for line in "".join(blocks("dit-to-fid.md", "bash")).splitlines():
        for large, tiny in smaller:
            line = line.replace(large, tiny)
        line = line.partition(" #")[0].strip()
        words = shlex.split(line)
        if "--print_config" in words:
            run(line.replace("--print_config", "--batch-size 4 --print_config"))
            continue
        extra = [] if words[1:3] == ["trajectories", "stats"] else more.get(words[1], [])
        if words[1] == "describe" or (words[1] == "train" and "adversarial" in line):
            continue  # describe asks of the published network; the adversarial stage has tests of its own
        run(line, *extra)
    assert Image.open("samples.png").size[1] >= 16
    assert "| student | 4 |" in Path("runs/imagenet/student/README.md").read_text(encoding="utf-8")
    rows = {name: json.loads(Path(name).read_text(encoding="utf-8"))["rows"] for name in ("quality.json", "own-quality.json")}
    assert [len(found) for found in rows.values()] == [1, 2]  # with pictures of one's own, the teacher has a row


def write_dit_files() -> None:
    """What the page starts from: a checkpoint, a VAE, a feature network, ADM's reference batch, and a folder of pictures."""
    network = DiT(
        DiTConfig(
            input_size=8, in_channels=4, patch_size=2, hidden_size=384, depth=2, num_heads=6, num_classes=3, out_channels=8
        )
    )
    randomise(network, std=0.05)
    teacher = NetworkTeacher(network, NoiseSchedule())
    save_checkpoint(teacher, "DiT-XL-2-256x256.pt")
    teacher.save_pretrained("teachers/mine")
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4)  # fmt: skip
    vae.save_pretrained("sd-vae-ft-ema")
    save_torchscript(SmallInception(), Path("inception-2015-12-05.pt"))
    pictures = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    np.savez("VIRTUAL_imagenet256_labeled.npz", pictures)
    Path("pictures/some").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(f"pictures/some/{number}.png")
