"""The code of docs/checkpoints.md does what the page says, on networks of the published width and one layer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from factories import randomise
from safetensors.torch import load_file

from pyard.diffusion.noise_schedule import NoiseSchedule
from pyard.diffusion.time_grid import TimeGrid
from pyard.models.dit.ard_checkpoint import save_ard_student
from pyard.models.dit.config import DiTConfig
from pyard.models.dit.network import DiT
from pyard.models.student import Student
from pyard.teachers.diffusers_folder import to_diffusers
from pyard.teachers.dit_checkpoint import save_checkpoint
from pyard.teachers.network_teacher import NetworkTeacher

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"


def network(**changes: Any) -> DiT:
    sizes: dict[str, Any] = dict(
        input_size=8, in_channels=4, patch_size=2, hidden_size=384, depth=1, num_heads=6, num_classes=3, out_channels=8
    )
    made = DiT(DiTConfig(**{**sizes, **changes}))
    randomise(made, std=0.05)
    return made


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4)  # fmt: skip
    vae.save_pretrained("sd-vae-ft-ema")
    schedule, flow = NoiseSchedule(), NoiseSchedule(kind="flow", prediction="velocity")
    teacher = NetworkTeacher(network(), schedule)
    save_checkpoint(teacher, "DiT-XL-2-256x256.pt")
    save_checkpoint(NetworkTeacher(network(time_scale=-1.0, time_offset=1.0), flow), "SiT-XL-2-256x256.pt")
    transformer = to_diffusers(network(freq_shift=1.0), schedule)
    DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False)).save_pretrained("dit-pipeline")
    index = json.loads(Path("dit-pipeline/model_index.json").read_text())
    names = {"0": "tench", "1": "goldfish", "2": "hen"}
    Path("dit-pipeline/model_index.json").write_text(json.dumps({**index, "id2label": names}))
    student = Student.from_teacher(teacher, TimeGrid.build(schedule), history_layers=1, target="denoised")
    save_ard_student(student, "ard-student.pt")

    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, found)

    assert found["teacher"].codec is not None
    assert found["flow"].schedule == flow
    assert found["images"].shape == (2, 3, 16, 16)
    assert [picture.size for picture in found["pictures"]] == [(16, 16), (16, 16)]
    assert "cost of history" in capsys.readouterr().out
    assert torch.load("again.pt", weights_only=True).keys() == {"model", "ema", "opt"}
    assert set(load_file("pipeline/student/model.safetensors")) == set(found["student"].state_dict())
